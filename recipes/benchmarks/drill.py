# SPDX-License-Identifier: Apache-2.0
"""A fault drill: one thing after the other breaks while a training goes on, and what came of it is counted.

    python recipes/benchmarks/drill.py                       # all faults: some ten minutes
    python recipes/benchmarks/drill.py --only disk --only service --json

The training has no policy: its responses are fixed, so that two runs can be compared bit by bit. All else is real: a
Ray of two nodes on this machine, verl's reward workers with our manager, the service with ledger and library, boxes, a
reward model from a stand-in hub, and a judge at the address of an LLM (a stand-in, whose ratings depend on the texts
alone), which is the LLM of the agents as well: rows that no tool fits have them write a verifier all the time.

    boxes box_actor       the running boxes are killed in the middle of a step; then the actor that keeps them
    model_server          the reward model's server is killed
    model_hangs           ... or stands still
    model_actor           the actor that keeps it is killed
    llm_429 llm_500 llm_garbage llm_hangs
                          what the LLM's endpoint does, for judge and agents
    service worker        the service is killed; a reward worker is (which ends verl's own trainer, and has it make the
                          steps since its checkpoint again: see `kill.py`; here the last two steps are made again)
    disk                  the disk of ledger and library is full for a while (a small tmpfs: needs root)
    node                  a node leaves, with its raylet and its reward worker
    stop                  a run of its own: the LLM fails for good, and `rlar.scoring.max_unscored` is to end the run

Afterwards the same steps are made again, undisturbed. *Survived* means: the run went on to its end; every response that
got a value got the one that it gets undisturbed, bit by bit; every response that got none is in the ledger as failed,
with its reason; and the ledger has one row per response, all the others as they went out.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import errno
import gzip
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import kill
from kill import GROUP, LIMIT_S, Training, descendants, has_engine, tell, title
from rich.console import Console
from rich.table import Table

from verl_rlar.config import HubConfig
from verl_rlar.ledger import read
from verl_rlar.library import Library
from verl_rlar.serving import How, Judge
from verl_rlar.tools.reward_model import serving, target
from verl_rlar.types import Kind, Scope, ToolSpec

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "tests"))  # the stand-in hub is there
REPO = "meadow-lab/chat-reward-llama"
SCHEMA = {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}
ROWS = ("math", "math", "code", "code", "chat", "chat", "judged", "schema")
"""The prompts of a step, by what scores them: the rule, boxes, the reward model, the LLM, and nobody."""
DURING, AFTER = 3, 3
"""Steps that a fault lasts, and steps after it."""
PAUSE_S = 0.1
"""What the policy would take, in seconds."""
DISK_MB = 64
FAULTS = (
    *("boxes", "box_actor", "model_server", "model_hangs", "model_actor"),
    *("llm_429", "llm_500", "llm_garbage", "llm_hangs", "service", "worker", "disk", "node", "stop"),
)
GOALS: dict[str, float | str] = {"survived_share": 1, "changed_values": 0, "uncounted": 0, "lost_rows": 0}


# --- The LLM ----------------------------------------------------------------------------------------------------------


class Endpoint:
    """An OpenAI-compatible endpoint that rates texts by their length, unless `mode` says otherwise. Use as ``with``."""

    def __init__(self) -> None:
        self.mode = "well"
        """``well``, ``429``, ``500``, ``garbage`` or ``hangs``."""
        self.asked: Counter[tuple[str, str]] = Counter()
        """Calls by mode, and by whom: ``judge`` or ``agent``."""
        self._over = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._send(200, b'{"data": [{"id": "stand-in"}]}')

            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
                mode, text = outer.mode, asked["messages"][-1]["content"]
                outer.asked[mode, "judge" if str(text).startswith("RATE ") else "agent"] += 1
                if mode == "hangs":
                    while outer.mode == "hangs" and not outer._over.wait(0.1):
                        pass
                    self.close_connection = True
                elif mode == "garbage":
                    self._send(200, b'{"choices": "<html>')
                elif mode in ("429", "500"):
                    self._send(int(mode), b'{"error": {"message": "not now"}}')
                else:
                    said = {"role": "assistant", "content": f"Rating: {1 + len(str(text)) % 9}."}
                    choice = {"index": 0, "message": said, "finish_reason": "stop"}
                    usage = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}
                    self._send(200, json.dumps({"choices": [choice], "usage": usage}).encode())

            def _send(self, status: int, body: bytes) -> None:
                with suppress(OSError):  # who asked may be gone
                    self.send_response(status)
                    self.send_header("content-length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)

            def log_message(self, *_: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Endpoint:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._server.shutdown()
        self._server.server_close()


# --- The training -----------------------------------------------------------------------------------------------------


def reward_model(commit: str) -> ToolSpec:
    return ToolSpec(
        name="chat_reward",
        kind="reward_model",
        target=target(REPO, commit),
        scope=Scope(kinds=frozenset({Kind.OPEN}), needs_reference=False),
        description="prefers answers over refusals",
        low=-50,
        high=50,
        timeout_s=30.0,
        serving=serving(How(max_length=256)),
    )


def judge(address: str) -> ToolSpec:
    asked = Judge(template="RATE {mark}\n{question}\n{response}\n{mark}", choice=None, low=0, answer_tokens=16)
    return ToolSpec(
        name="judge",
        kind="reward_model",
        target=target("stand-in/judge", "0" * 40),
        scope=Scope(kinds=frozenset({Kind.OPEN}), needs_reference=False),
        description="a language model that rates",
        low=0,
        high=10,
        timeout_s=10.0,
        serving=serving(How(max_length=2048, judge=asked), family="judge", address=address),
    )


def prepare(run: Path, specs: tuple[ToolSpec, ...]) -> None:
    """A library in which these reward models are live."""
    from verl_rlar.inbox import Exam, Submission, apply
    from verl_rlar.library import spec_to_json

    with Library(run / "library") as library:
        for spec in specs:
            exam = Exam(
                card={"fingerprint": spec.digest}, text="", transcript=[], canaries=[], passed=True, why="drill"
            )
            asked = Submission(
                digest=spec.digest, by="drill.py", why="drill", spec=spec_to_json(spec), exam=exam, event="live"
            )
            if apply(library, asked) is None:
                raise RuntimeError(f"{spec.name} was not taken into the library")


def settings(folder: Path, run: Path, hub: str, llm: str, *, boxes: bool, limit: float) -> list[str]:
    """Overrides of verl's configuration."""
    base = os.environ.get("RLAR_TEST_BASE")
    sandbox = ["rlar.sandbox.program_boxes=2", "rlar.sandbox.program_timeout_s=20"]
    sandbox += [f"rlar.sandbox.base={base}"] if base else []
    return [
        "+rlar=default",
        f"trainer.default_local_dir={folder}",
        f"rlar.run_dir={run}",
        f"actor_rollout_ref.model.path={folder.parent}/model",
        f"actor_rollout_ref.rollout.n={GROUP}",
        "rlar.service_timeout_s=120",
        "rlar.rules.processes=1",
        "rlar.scoring.timeout_s=60",
        *(f"rlar.scoring.max_unscored={limit}", f"rlar.scoring.unscored_window={4 * len(ROWS) * GROUP}"),
        *(sandbox if boxes else ["rlar.sandbox.backend=none"]),
        *("rlar.serving.threads=1", "rlar.serving.batch_tokens=1", "rlar.serving.health_s=1"),  # one by one: bit by bit
        *(f"rlar.hub.endpoint={hub}", f"rlar.hub.cache_dir={folder.parent}/cache", "rlar.hub.offline=False"),
        "rlar.routing.forbid=[json_schema]",
        "+rlar.routing.routes.chat={columns: [chat], parts: [{tool: chat_reward}]}",
        "+rlar.routing.routes.judged={columns: [judged], parts: [{tool: judge}]}",
        "rlar.acquire.enabled=True",
        f"rlar.acquire.labelled=[{folder.parent}/labelled.jsonl]",
        *("rlar.acquire.window=32", "rlar.acquire.again_after=1", "rlar.acquire.wall_s=60", "rlar.acquire.gaps=1000"),
        *(f"rlar.agents.url={llm}/v1", "rlar.agents.model=stand-in", "rlar.agents.timeout_s=2"),
        *("rlar.agents.retries=1", "rlar.agents.max_wait_s=0.2", f"rlar.agents.transcripts={folder}/agents"),
    ]


def rows(tokenizer: Any) -> Callable[[int, int, int], Any]:
    """Makes a response, as verl sends it, of a step, a prompt and a session: always the same."""
    from dispatch import ANSWERS, response
    from hub_repos import pairs_of

    with gzip.open(ANSWERS, "rt") as file:
        answers = [json.loads(line) for line in file]
    pairs = pairs_of("chat")

    def make(step: int, prompt: int, session: int) -> Any:
        number, sort = step * len(ROWS) + prompt, ROWS[prompt]
        truth, extra = "", {"index": number}
        if sort == "math":
            row = answers[number * GROUP % len(answers)]
            asked, truth = row["question"], row["ground_truth"].rpartition("A:")[2].strip()
            said = answers[(number * GROUP + session) % len(answers)]["response"]
        elif sort == "code":
            asked, truth = f"Write f, which adds {number}.", f"assert f(1) == {1 + number}"
            said = f"```python\ndef f(x):\n    return x + {number + session % 2}\n```"
        elif sort == "schema":
            asked, extra = f"Give a JSON object with a = {number}.", extra | {"json_schema": json.dumps(SCHEMA)}
            said = json.dumps({"a" if session % 2 else "b": number})
        else:
            asked, good, bad = pairs[number % len(pairs)]
            said, extra = f"{(good, bad)[session % 2]} {session}"[:300], extra | {sort: True}
            asked = f"{asked[:200]} ({number})"
        data = response({"question": asked, "ground_truth": "A: x", "response": said}, session, prompt, tokenizer)
        fields = {"reward_model": {"style": "rule", "ground_truth": truth}, "extra_info": extra, "data_source": sort}
        for name, value in (fields | {"uid": f"{step}-{prompt}", "global_steps": step}).items():
            data.non_tensor_batch[name][0] = value
        return data

    return make


async def train(folder: Path, last: int) -> None:
    """A training without a policy, until its last step or until the file `stop` is there. It says what it gets, a JSON
    object per line. The file `leave` takes the second node away in the middle of a step."""
    import random

    import ray
    from hydra import compose, initialize_config_module
    from ray.cluster_utils import Cluster
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
    from transformers import AutoTokenizer
    from verl.experimental.reward_loop.reward_loop import RewardLoopWorker, migrate_legacy_reward_impl

    from verl_rlar.plugin import check
    from verl_rlar.service import Client

    class Worker(RewardLoopWorker):
        """verl's reward worker, which can say when its rows are in the ledger."""

        async def flush(self) -> None:
            await self.reward_manager.flush()

    overrides = json.loads((folder / "settings.json").read_text())
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = migrate_legacy_reward_impl(compose("ppo_trainer", overrides=overrides))
    make = rows(AutoTokenizer.from_pretrained(folder.parent / "model"))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 8, "include_dashboard": False})
    second = cluster.add_node(num_cpus=8)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    actor: Any = ray.remote(Worker)

    def start(node: str) -> Any:
        return actor.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(config)

    head = cluster.head_node.node_id
    workers = [start(head), start(second.node_id)]
    client, dice = Client(check(config)), random.Random(0)
    dead: set[int] = set()

    async def one(step: int, prompt: int, session: int) -> dict[str, Any]:
        data = make(step, prompt, session)
        while True:
            place = dice.randrange(len(workers))
            scorer = workers[place]
            try:
                result = await asyncio.wait_for(scorer.compute_score.remote(data), LIMIT_S)
            except ray.exceptions.RayActorError:
                if workers[place] is scorer:  # the first to see that it is dead
                    workers[place] = start(head)
                    dead.add(step)
                continue
            info = result["reward_extra_info"]
            value = result["reward_score"] if info["rlar_scored"] else None
            return {"key": f"{step}/{prompt}/{session}", "value": value, "sent": result["reward_score"]}

    step, leaving = 1, None
    try:
        while step <= last and not (folder / "stop").exists():
            client.begin_step(step)
            if (folder / "leave").exists() and leaving is None:
                leaving = asyncio.create_task(asyncio.to_thread(cluster.remove_node, second, allow_graceful=False))
            made = [step]
            while made:
                steps, made = made, []
                dead.clear()
                calls = (
                    one(n, prompt, session) for n in steps for prompt in range(len(ROWS)) for session in range(GROUP)
                )
                tell(scored=list(await asyncio.gather(*calls)))
                if dead:  # it took its last rows along, and verl goes back to a checkpoint
                    made = sorted({max(1, step - 1), step})
            tell(done=step)
            step += 1
            await asyncio.sleep(PAUSE_S)
    finally:  # as `verl_rlar.modes` does
        for scorer in workers:
            with suppress(ray.exceptions.RayActorError):
                await asyncio.wait_for(scorer.flush.remote(), LIMIT_S)
    if leaving is not None:
        await leaving
    ray.shutdown()
    cluster.shutdown()


class Heard(kill.Told):
    """What one start of the training said."""

    def __init__(self) -> None:
        super().__init__()
        self.got: dict[str, float | None] = {}
        """By step, prompt and session: the value, or None for an unscored response."""

    def hear(self, line: dict[str, Any]) -> None:
        super().hear(line)
        self.got |= {row["key"]: row["value"] for row in line.get("scored", ())}


# --- The faults -------------------------------------------------------------------------------------------------------


@dataclass
class Drill:
    """A training, and what can be broken in it."""

    training: Training
    heard: Heard
    folder: Path
    run: Path
    llm: Endpoint
    held_back: int = 0
    """Rows that waited for the disk, at the most."""
    notes: dict[str, str] = field(default_factory=dict)

    def pids(self, *words: str) -> list[int]:
        """Processes of the training whose command line has all these words."""
        mine = descendants(self.training._process.pid)
        return [pid for pid in mine if all(word in title(pid) for word in words)]

    def some(self, *words: str) -> list[int]:
        """... as soon as there is one."""
        self.training.hear(lambda: bool(self.pids(*words)))
        return self.pids(*words)

    @contextmanager
    def killed(self, *words: str) -> Iterator[None]:
        os.kill(self.some(*words)[0], signal.SIGKILL)
        yield

    @contextmanager
    def boxes(self) -> Iterator[None]:
        import docker

        from verl_rlar.sandbox.docker import LABEL, OWNER_LABEL, _owner

        client = docker.from_env()
        killed = 0
        for pid in self.some("ray::_BoxActor"):
            mine = {"label": [LABEL, f"{OWNER_LABEL}={_owner(pid)}"]}
            for box in client.containers.list(filters=mine, ignore_removed=True):
                with suppress(docker.errors.APIError):  # it went by itself
                    box.kill()
                    killed += 1
        client.close()
        self.notes["boxes"] = f"{killed} boxes killed"
        yield

    @contextmanager
    def stands_still(self) -> Iterator[None]:
        (pid,) = self.some("verl_rlar.serving.server")
        os.kill(pid, signal.SIGSTOP)
        yield
        replaced = pid not in self.pids("verl_rlar.serving.server")
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
        self.notes["model_hangs"] = "it was replaced" if replaced else "it went on"

    @contextmanager
    def endpoint(self, mode: str) -> Iterator[None]:
        self.llm.mode = mode
        try:
            yield
            self.training.hear(lambda: bool(self.llm.asked[mode, "agent"]))  # they have felt it as well
        finally:
            self.llm.mode = "well"
        calls = {who: self.llm.asked[mode, who] for who in ("judge", "agent")}
        self.notes[f"llm_{mode}"] = ", ".join(f"{count} calls by {who}" for who, count in calls.items())

    @contextmanager
    def full_disk(self) -> Iterator[None]:
        filler = self.run / "filler"
        with open(filler, "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(65536))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise

        def behind() -> int:
            return self.heard.done - newest_step(self.run)

        self.training.hear(lambda: behind() > DURING)  # what is left of the last pages is used first
        yield
        self.held_back = behind() * len(ROWS) * GROUP
        filler.unlink()
        self.training.hear(lambda: behind() <= 1)
        self.notes["disk"] = f"{self.held_back} rows waited"

    @contextmanager
    def node(self) -> Iterator[None]:
        there = len(self.pids("raylet/raylet"))
        (self.folder / "leave").touch()
        self.training.hear(lambda: len(self.pids("raylet/raylet")) < there)
        yield

    def fault(self, name: str) -> Any:
        """The fault, as a context."""
        if name.startswith("llm_"):
            return self.endpoint(name.removeprefix("llm_"))
        return {
            "boxes": self.boxes,
            "box_actor": lambda: self.killed("ray::_BoxActor"),
            "model_server": lambda: self.killed("verl_rlar.serving.server"),
            "model_hangs": self.stands_still,
            "model_actor": lambda: self.killed("ray::_ModelActor"),
            "service": lambda: self.killed("ray::Service"),
            "worker": lambda: self.killed("ray::Worker"),
            "disk": self.full_disk,
            "node": self.node,
        }[name]()


def newest_step(run: Path) -> int:
    with read(run) as db:
        return db.execute("SELECT MAX(step) FROM scores").fetchone()[0] or 0


@dataclass
class Seen:
    """What a fault did."""

    steps: tuple[int, int]
    """First and last step that it could touch."""
    seconds: float
    """From its beginning until the training had made its further steps."""
    went_on: bool = True
    unscored: int = 0
    changed: int = 0
    uncounted: int = 0
    lost: int = 0
    note: str = ""

    @property
    def survived(self) -> bool:
        return self.went_on and not (self.changed or self.uncounted or self.lost)


def compare(seen: Mapping[str, Seen], run: Path, disturbed: Heard, calm: Heard, *, boxes: bool) -> Seen:
    """Fills in what values and ledger say, fault by fault; returns the whole run's."""
    nobodys = {"schema"} if boxes else {"schema", "code"}  # rows that no tool scores
    whole = Seen(steps=(1, disturbed.done), seconds=0)
    kept: dict[str, list[tuple[Any, ...]]] = {}
    with read(run) as db:
        for row in db.execute("SELECT step, uid, session, value, outcome, reason FROM scores"):
            step, prompt = row["uid"].split("-")
            kept.setdefault(f"{step}/{prompt}/{row['session']}", []).append(tuple(row)[3:])
    for key, value in disturbed.got.items():
        step, prompt, _ = map(int, key.split("/"))
        for one in (whole, *(one for one in seen.values() if one.steps[0] <= step <= one.steps[1])):
            rows = kept.get(key, [])
            one.lost += len(rows) != 1 or rows[0][0] != value
            if value is not None:
                one.changed += value != calm.got.get(key)
            elif ROWS[prompt] not in nobodys:
                one.unscored += 1
                one.uncounted += not (rows and rows[0][1] == "failed" and rows[0][2])
    whole.lost += max(0, len(kept) - len(disturbed.got))
    return whole


# --- All of it --------------------------------------------------------------------------------------------------------


def mount(folder: Path) -> str | None:
    """Mounts a small tmpfs; why not, if it cannot be."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, f"size={DISK_MB}m".encode()):
        return f"no tmpfs can be mounted: {os.strerror(ctypes.get_errno())}"
    return None


def begin(folder: Path, run: Path, overrides: list[str], last: int) -> tuple[Training, Heard]:
    (folder / "settings.json").write_text(json.dumps(overrides))
    heard = Heard()
    command = [sys.executable, __file__, "--train", str(folder), "--last", str(last)]
    return Training(folder, heard, 1, boxes=False, command=command), heard


def drill(folder: Path, faults: list[str]) -> tuple[dict[str, Seen], Seen, dict[str, str], Endpoint]:
    """Runs it: disturbed, then undisturbed. Returns what was seen of each fault, and in all, and what was left out."""
    from hub_repos import build
    from hub_server import HubServer

    from verl_rlar.cpu.models import build_tiny
    from verl_rlar.hub import Hub

    left_out: dict[str, str] = {}
    build_tiny(folder / "model")
    build(folder / "hub", only=(REPO,))
    labelled = [
        {"prompt": f"Give a JSON object with a = {n}.", "extra": {"json_schema": json.dumps(SCHEMA)}, **answer}
        for n in range(30)
        for answer in ({"response": f'{{"a": {n}}}', "label": 1}, {"response": f'{{"b": {n}}}', "label": 0})
    ]
    (folder / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled))
    boxes = has_engine()
    if not boxes:
        left_out |= dict.fromkeys(("boxes", "box_actor"), "there is no Docker engine")
    seen: dict[str, Seen] = {}
    with ExitStack() as stack:
        hub = stack.enter_context(HubServer(folder / "hub"))
        llm = stack.enter_context(Endpoint())
        with Hub(HubConfig(endpoint=hub.url, cache_dir=str(folder / "elsewhere"), offline=False)) as client:
            specs = (reward_model(client.inspect(REPO).commit), judge(llm.address))

        def ready(name: str, limit: float = 1.0, *, small: bool = False) -> tuple[Path, Path, list[str]]:
            place, run = folder / name, folder / name / "rlar"
            run.mkdir(parents=True)
            why = mount(run) if small else None
            if small and why is None:
                stack.callback(ctypes.CDLL(None).umount2, str(run).encode(), 2)
            elif why:
                left_out["disk"] = why
            prepare(run, specs)
            return place, run, settings(place, run, hub.url, llm.address, boxes=boxes, limit=limit)

        wanted = [name for name in FAULTS if name in faults and name != "stop"]
        if wanted:
            place, run, overrides = ready("disturbed", small="disk" in wanted)
            training, heard = begin(place, run, overrides, 100_000)
            one = Drill(training=training, heard=heard, folder=place, run=run, llm=llm)
            try:
                training.steps(AFTER)
                for name in (name for name in wanted if name not in left_out):
                    print(f"{name} ...", file=sys.stderr, flush=True)
                    first, start = heard.done + 1, time.monotonic()
                    with one.fault(name):
                        training.steps(DURING)
                    training.steps(AFTER)
                    seen[name] = Seen(steps=(first, heard.done), seconds=time.monotonic() - start)
                (place / "stop").touch()
                training.wait()
                if training._process.returncode:
                    raise RuntimeError(f"the training ended with exit code {training._process.returncode}")
            finally:
                training.kill()
            for name, note in one.notes.items():
                seen[name].note = note
            print("the same undisturbed ...", file=sys.stderr, flush=True)
            calm_place, calm_run, overrides = ready("calm")
            training, calm = begin(calm_place, calm_run, overrides, heard.done)
            try:
                for step in range(1, heard.done + 1):
                    training.hear(lambda step=step: calm.done >= step)
                training.wait()
            finally:
                training.kill()
            whole = compare(seen, run, heard, calm, boxes=boxes)
        else:
            whole = Seen(steps=(0, 0), seconds=0)
        if "stop" in faults:
            print("stop ...", file=sys.stderr, flush=True)
            seen["stop"] = stopped(*ready("stop", 0.2), llm)
    return seen, whole, left_out, llm


def stopped(folder: Path, run: Path, overrides: list[str], llm: Endpoint) -> Seen:
    """The LLM fails for good: one row of eight is unscored, one has no tool, and a fifth may be unscored."""
    training, heard = begin(folder, run, overrides, 1000)
    try:
        training.steps(1)
        start, first, llm.mode = time.monotonic(), heard.done, "500"
        with suppress(RuntimeError):  # its output ends
            training.hear(lambda: False)
        seconds = time.monotonic() - start
        training._process.wait(LIMIT_S)
    finally:
        llm.mode = "well"
        training.kill()
    log = "".join(file.read_text() for file in folder.glob("log-*"))
    said = "TooManyUnscored" in log and "judge" in log.partition("TooManyUnscored")[2]
    seen = Seen(steps=(first, heard.done), seconds=seconds, went_on=said and training._process.returncode != 0)
    seen.note = (
        f"stopped before step {heard.done + 1}, with the tool's name" if said else "it did not stop as configured"
    )
    compare({"stop": seen}, run, heard, heard, boxes=has_engine())
    return seen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=FAULTS, help="a fault; repeatable")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--train", help=argparse.SUPPRESS)
    parser.add_argument("--last", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        asyncio.run(train(Path(args.train), args.last))
        return 0
    os.environ["HF_HUB_OFFLINE"] = "0"  # the stand-in hub answers
    folder = Path(tempfile.mkdtemp(prefix="drill"))
    try:
        seen, whole, left_out, _ = drill(folder, args.only or list(FAULTS))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    table = Table("fault", "survived", "steps", "s", "unscored, counted", "changed", "lost", "", box=None)
    for name, one in seen.items():
        steps = f"{one.steps[0]}-{one.steps[1]}"
        cells = (str(one.unscored), str(one.changed), str(one.lost), one.note)
        table.add_row(name, "yes" if one.survived else "NO", steps, f"{one.seconds:.1f}", *cells)
    for name, why in left_out.items():
        if name in (args.only or FAULTS):
            table.add_row(name, "left out", "", "", "", "", "", why)
    Console().print(table)
    figures: dict[str, float] = {
        "faults": len(seen),
        "left_out": sum(name in (args.only or FAULTS) for name in left_out),
        "survived_share": sum(one.survived for one in seen.values()) / max(1, len(seen)),
        "steps": whole.steps[1],
        "responses": whole.steps[1] * len(ROWS) * GROUP,
        "unscored": whole.unscored,
        "changed_values": whole.changed,
        "uncounted": whole.uncounted,
        "lost_rows": whole.lost,
        **{f"{name}_s": one.seconds for name, one in seen.items()},
        **{f"{name}_unscored": one.unscored for name, one in seen.items()},
    }
    ok = all(one.survived for one in seen.values()) and whole.survived and bool(seen)
    if args.json:
        print(json.dumps({"name": "drill", "figures": figures, "goals": GOALS, "ok": ok}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
