# SPDX-License-Identifier: Apache-2.0
"""A real run of stock verl in which a reward model from the (stand-in) hub gets a say between two steps, and its server
and the actor that keeps it are killed in the middle of later ones."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("verl", reason="verl is not installed (extra `cpu`)")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

from hub_repos import build, pairs_of
from hub_server import HubServer
from test_train import command

from verl_rlar.config import HubConfig
from verl_rlar.errors import LedgerError
from verl_rlar.hub import Hub
from verl_rlar.inbox import Exam, Submission, apply, hand_in
from verl_rlar.ledger import read
from verl_rlar.library import Library, LibraryView, spec_to_json
from verl_rlar.serving import How
from verl_rlar.tools.reward_model import serving, target
from verl_rlar.types import Kind, Scope, ToolSpec

STEPS, PROMPTS, RESPONSES = 30, 4, 4
"""Some ten steps go by while the model's server starts, on two cores."""
REPO = "meadow-lab/chat-reward-llama"


def write_chat_rows(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    made = [
        {
            "data_source": "chat",
            "prompt": [{"role": "user", "content": prompt[:200]}],
            "reward_model": {"style": "none", "ground_truth": ""},
            "extra_info": {"index": index},
        }
        for index, (prompt, _, _) in enumerate(pairs_of("chat")[: 4 * PROMPTS])
    ]
    for name in ("train", "val"):
        pq.write_table(pa.Table.from_pylist(made), folder / f"{name}.parquet")


def chat_reward(commit: str, max_length: int = 256) -> ToolSpec:
    return ToolSpec(
        name="chat_reward",
        kind="reward_model",
        target=target(REPO, commit),
        scope=Scope(kinds=frozenset({Kind.OPEN}), needs_reference=False),
        description="prefers answers over refusals",
        low=-50,
        high=50,
        timeout_s=30.0,
        serving=serving(How(max_length=max_length)),
    )


def submission(commit: str, max_length: int = 256) -> Submission:
    """A model that passed its exam, and wants a say."""
    spec = chat_reward(commit, max_length)
    exam = Exam(card={"fingerprint": spec.digest}, text="", transcript=[], canaries=[], passed=True, why="for the test")
    return Submission(digest=spec.digest, by="test", why="to see it", spec=spec_to_json(spec), exam=exam, event="live")


def make_live(run_dir: Path, commit: str) -> None:
    """Has the model live before the training starts."""
    asked = submission(commit)
    with Library(run_dir / "library") as library:
        assert apply(library, asked) is not None


class Run:
    """A training that goes on.

    Args:
        folder: Where it writes.
        overrides: Further settings.
    """

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.folder = folder
        self.rlar = folder / "checkpoints" / "rlar"
        self.log = open(folder / "train.log", "w")
        environment = os.environ | {
            "HF_HUB_OFFLINE": "0",
            "RAY_ADDRESS": "local",
            "RAY_USAGE_STATS_ENABLED": "0",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self.process = subprocess.Popen(
            command(folder, *overrides), env=environment, cwd=folder, stdout=self.log, stderr=subprocess.STDOUT
        )

    def until(self, what: str, condition: Callable[[], Any]) -> Any:
        """Waits for something, as long as the training goes on."""
        while True:
            over = self.process.poll() is not None
            if found := condition():
                return found
            if over:
                raise AssertionError(f"the training ended before {what}:\n{self.tail()}")
            time.sleep(0.05)

    def tail(self) -> str:
        return "\n".join((self.folder / "train.log").read_text().splitlines()[-60:])

    def query(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        try:
            with read(self.rlar) as db:
                return [tuple(row) for row in db.execute(sql, values)]
        except LedgerError:  # it is not made yet
            return []

    def newest_step(self) -> int:
        return (self.query("SELECT MAX(step) FROM scores WHERE split = 'train'") or [(0,)])[0][0] or 0

    def scored_at(self, step: int) -> int:
        sql = "SELECT COUNT(*) FROM scores WHERE step >= ? AND route = 'chat_reward' AND outcome = 'scored'"
        return (self.query(sql, step) or [(0,)])[0][0]

    def scored_by(self, tool: str) -> int:
        found = self.query("SELECT COUNT(*) FROM scores WHERE route = ? AND outcome = 'scored'", tool)
        return (found or [(0,)])[0][0]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(300)
        self.log.close()


def processes(*words: str) -> list[int]:
    """Processes whose command line has all these words."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if all(word in line for word in words):
            found.append(int(entry.name))
    return found


def gone(*words: str) -> bool:
    """Whether those processes come to their end, now that what they served is over."""
    end = time.monotonic() + 60
    while (left := processes(*words)) and time.monotonic() < end:
        time.sleep(0.05)
    return not left


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """Address of a hub with one model, and the model's commit; data and policy lie ready."""
    from verl_rlar.cpu.models import build_tiny

    build_tiny(tmp_path / "model")
    write_chat_rows(tmp_path)
    build(tmp_path / "hub", only=(REPO,))
    with HubServer(tmp_path / "hub") as server:
        with Hub(HubConfig(endpoint=server.url, cache_dir=str(tmp_path / "elsewhere"), offline=False)) as client:
            commit = client.inspect(REPO).commit
        yield server.url, commit


@contextmanager
def started(folder: Path, url: str, steps: int, *overrides: str) -> Iterator[Run]:
    made = Run(
        folder,
        f"trainer.total_training_steps={steps}",
        f"trainer.total_epochs={steps}",
        "trainer.save_freq=-1",
        "trainer.test_freq=-1",
        "rlar.scoring.max_unscored=1",
        "rlar.sandbox.backend=none",
        "rlar.serving.threads=1",
        "rlar.library.look_s=0.2",
        f"rlar.hub.endpoint={url}",
        f"rlar.hub.cache_dir={folder}/cache",
        "rlar.hub.offline=False",
        *overrides,
    )
    try:
        yield made
    finally:
        made.close()


def test_a_published_model_scores_from_a_boundary_on_and_its_death_costs_a_retry(
    tmp_path: Path, hub: tuple[str, str]
) -> None:
    url, commit = hub
    with started(tmp_path, url, STEPS) as training:
        publish_and_kill(training, commit)


def publish_and_kill(training: Run, commit: str) -> None:
    training.until("its second step", lambda: training.newest_step() >= 2)
    hand_in(training.rlar / "library", submission(commit))
    training.until("the model scored", lambda: training.scored_at(0))

    snapshot = f"snapshots/{commit}"
    (server,) = processes("verl_rlar.serving.server", str(training.folder), snapshot)
    actor = parent(server)
    os.kill(server, signal.SIGKILL)
    killed_at = training.newest_step()
    training.until("the model scored again", lambda: training.scored_at(killed_at + 1))

    (second,) = processes("verl_rlar.serving.server", str(training.folder), snapshot)
    assert (second != server, parent(second)) == (True, actor), "another server, of the same actor"
    os.kill(actor, signal.SIGKILL)
    killed_at = training.newest_step()
    training.until("the model scored after its actor died", lambda: training.scored_at(killed_at + 1))
    assert training.process.wait(1200) == 0, training.tail()

    view = LibraryView(training.rlar / "library")
    (published,) = [event for event in view.events if event.event == "live" and event.tool == "chat_reward"]
    by_step = training.query(
        "SELECT step, route, outcome, COUNT(*) FROM scores WHERE split = 'train' GROUP BY 1, 2, 3 ORDER BY 1"
    )
    before = [(step, "-", "abstained", PROMPTS * RESPONSES) for step in range(1, published.step)]
    after = [(step, "chat_reward", "scored", PROMPTS * RESPONSES) for step in range(published.step, STEPS + 1)]
    assert by_step == before + after, "none before the boundary, all from it on, and none lost to the kills"
    assert 3 <= published.step < STEPS
    values = training.query("SELECT MIN(value), MAX(value), COUNT(DISTINCT value) FROM scores WHERE value IS NOT NULL")
    assert 0 < values[0][0] < values[0][1] < 1 and values[0][2] > STEPS, "and never a 0"
    assert gone("verl_rlar.serving.server", str(training.folder)), "its servers ended with it"
    assert replayed(training, f"hub.cache_dir={training.folder}/cache") == PROMPTS * RESPONSES * len(after)


def replayed(training: Run, *settings: str) -> int:
    """How many responses get from the served model again what they got, when the run is over."""
    options = [f"--set={setting}" for setting in (*settings, "serving.threads=1", "hub.offline=true")]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "verl_rlar", "rescore", str(training.rlar), "--tool", "chat_reward"),
            *options,
            "--json",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (summary,) = [one for one in map(json.loads, done.stdout.splitlines()) if one["type"] == "summary"]
    assert summary["not_reproducible"] == 0
    return int(summary["reproducible"])


@pytest.mark.parametrize("mode", ["rlar_sync", "rlar_colocate_async"])
def test_colocated_models_sleep_while_the_policy_learns_and_one_takes_the_place_of_another(
    tmp_path: Path, hub: tuple[str, str], mode: str
) -> None:
    url, commit = hub
    steps = 6
    make_live(tmp_path / "checkpoints" / "rlar", commit)
    settings = ["+rlar_placement=colocated", f"trainer.v1.trainer_mode={mode}", "trainer.val_before_train=False"]
    with started(tmp_path, url, steps, *settings) as training:
        training.until("its second step", lambda: training.newest_step() >= 2)
        hand_in(training.rlar / "library", replace(submission(commit, max_length=128), replace=True))
        assert training.process.wait(900) == 0, training.tail()
        view = LibraryView(training.rlar / "library")
        first, second = [event for event in view.events if event.event == "live" and event.tool == "chat_reward"]
        scored = training.query(
            "SELECT uid, MAX(step), COUNT(*), COUNT(DISTINCT snapshot), MAX(json_extract(parts, '$[0].digest')) "
            "FROM scores WHERE outcome = 'scored' GROUP BY uid"
        )
        failed = training.query("SELECT COUNT(*) FROM scores WHERE outcome != 'scored'")
    assert failed == [(0,)]
    assert {snapshots for _, _, _, snapshots, _ in scored} == {1}, "one ruler for a group"
    whole = sum(count == RESPONSES for _, _, count, _, _ in scored)
    in_flight = 0 if mode == "rlar_sync" else PROMPTS  # what an asynchronous trainer has under way when it ends
    assert whole >= len(scored) - in_flight and whole >= steps * PROMPTS - in_flight
    for _, step, _, _, digest in scored:
        assert digest == (second if step >= second.step else first).digest, "the tools of its own step"
    assert {digest for *_, digest in scored} == {first.digest, second.digest}
    log = (tmp_path / "train.log").read_text()
    assert log.count("1 reward models sleep") >= steps
    assert log.count("1 reward models are awake") >= steps - 1, "Ray may end before it has printed the last line"


def test_a_training_finds_a_model_for_its_own_queries_and_is_scored_by_it(tmp_path: Path, hub: tuple[str, str]) -> None:
    """Scout, gate, download, exam, inbox, server, shadow, and a say: nobody does anything."""
    url, _ = hub
    pairs = pairs_of("chat")
    labelled = [{"prompt": prompt, "chosen": good, "rejected": bad} for prompt, good, bad in pairs[-len(pairs) // 5 :]]
    (tmp_path / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled))
    limits = {"attacks": 1.0, "false_accept": 0.6, "false_reject": 0.6, "pairwise": 0.6, "worst_sort": 1.0}
    limits["pairwise_low"] = 0.3  # a model of ten thousand parameters meets these
    settings = [
        "rlar.acquire.enabled=True",
        f"rlar.acquire.labelled=[{tmp_path}/labelled.jsonl]",
        "rlar.acquire.window=16",
        *(f"++rlar.exam.by_kind.open.{name}={limit}" for name, limit in limits.items()),
        "rlar.life.shadow_steps=1",
        f"rlar.life.shadow_responses={PROMPTS * RESPONSES}",
        "rlar.life.min_varied=0",
        "rlar.life.max_outside=1",
        "trainer.val_before_train=False",
    ]
    with started(tmp_path, url, 4000, *settings) as training:  # more than it takes: it is ended then
        training.until("a model of its own scored", lambda: training.scored_by("chat_reward_llama"))
        view = LibraryView(training.rlar / "library")
        events = {event.event: event for event in view.events if event.tool == "chat_reward_llama"}
        assert list(events) == ["proposed", "examined", "shadow", "live"]
        steps = training.query("SELECT MIN(step) FROM scores WHERE route = 'chat_reward_llama'")
        assert steps == [(events["live"].step,)]
        assert events["shadow"].step < events["live"].step
