# SPDX-License-Identifier: Apache-2.0
"""Kills every process of a training at random moments, and looks at what is left.

    python recipes/benchmarks/kill.py                    # --rounds 100: some ten minutes
    python recipes/benchmarks/kill.py --only ledger --only library
    python recipes/benchmarks/kill.py --json             # prints one object last

``kill -9``, at moments drawn with a seed, of:

- *ledger*: a process that adds rows, routes, shadows and canaries, and drops old texts (``--rounds`` times);
- *library*: ``rlar tools add``, ``retire`` and ``promote``, one after the other in a process (``--rounds`` times);
- *service*, *worker*, *boxes*: processes of a training in a real Ray, while reward workers (verl's own, with our
  manager) score groups of responses (a tenth as often each, as what was killed takes some seconds to come back).
  Without a Docker engine, boxes are left out;
- *driver*: the training itself, and with it its Ray, everything at once; it starts again some steps back (a twentieth).

The training takes its responses from `recipes/data`; a tool appears, is replaced and goes again all the time. After
each kill: library and ledger are whole (each event decodes, SQLite's own check); what was acknowledged is there, bit by
bit; each group has one route and one version of each tool (I2); each step has the tools that it had (I1); and what
is scored again after a restart gets the value that it had, bit by bit. A worker's last rows, which it had not handed to
the service yet, may go with it: they are counted, and none of them was acknowledged.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import hashlib
import importlib.util
import json
import math
import os
import queue
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from verl_rlar.config import RlarConfig, RoutingConfig, SandboxConfig
from verl_rlar.errors import ToolUnavailable
from verl_rlar.ledger import FILE_NAME, CanaryRow, Ledger, Row, ShadowRow, read
from verl_rlar.library import FOLDER_NAME, Library, LibraryView, library_path
from verl_rlar.router import settings_of
from verl_rlar.trusted import trusted_tools
from verl_rlar.types import (
    Kind,
    Message,
    Outcome,
    Query,
    Route,
    RoutePart,
    Sample,
    Scope,
    Score,
    Snapshot,
    ToolScore,
    ToolSpec,
)

SHARES = {"ledger": 1.0, "library": 1.0, "service": 0.1, "worker": 0.1, "boxes": 0.1, "driver": 0.05}
"""How many of ``--rounds`` each kind gets."""
TITLES = {"service": "ray::Service", "worker": "ray::Worker", "boxes": "ray::_BoxActor"}
"""How the processes are called."""
STAY = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Processes of Ray that outlive its driver for a while."""
GONE_S = 60.0
"""Longest time until the processes of a training that was killed are gone, in seconds."""
FAULTS = ("damaged", "acknowledged_lost", "mixed_groups", "changed_steps", "changed_values", "left_over")
GOALS: dict[str, str | float] = {fault: 0 for fault in FAULTS}
PROMPTS, GROUP, WORKERS = 6, 4, 2
STEPS_PLANNED = 3000
PERIOD = 5
"""Steps after which what happens to tools begins again."""
LIMIT_S = 300.0
"""Longest wait for anything."""
CHECKER = """# version {version}
def score(prompt, response, reference, extra):
    words = response.split()
    return float(reference in words) * 0.9 + 0.1 / (len(words) + {version})
"""

Faults = Counter[str]


# --- Writers without Ray ----------------------------------------------------------------------------------------------


@contextmanager
def doomed(work: Callable[[int], None], seconds: float) -> Iterator[list[str]]:
    """Runs `work` in a process of its own, which is killed after so many seconds; gives the lines that it wrote into
    the pipe (a file descriptor) that it got."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(out)
        try:
            work(into)
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(1)
    os.close(into)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    if os.waitpid(child, 0)[1] != signal.SIGKILL:
        raise RuntimeError("a writer that was to be killed ended by itself; see above")
    with os.fdopen(out) as lines:
        yield [line.rstrip("\n") for line in lines.read().splitlines(keepends=True) if line.endswith("\n")]


def query(number: int) -> Query:
    return Query(messages=(Message(role="user", content=f"{number} + 1?"),), reference=str(number + 1))


def number_value(number: int, session: int) -> float:
    return 1 / (1 + number + session / 7)


def write_ledger(path: Path, token: str, pipe: int) -> None:
    digest, snapshot = "d" * 16, Snapshot(tools=()).version
    with Ledger(path, token=token) as ledger:
        for number in range(1_000_000):
            asked, uid = query(number), f"{token} {number}"
            parts = (RoutePart(tool="final_answer", digest=digest),)
            route = Route(parts=parts, reason="", kind=Kind.MATH, covered=True, snapshot=snapshot)
            ledger.add_route(asked, route)
            rows, shadows = [], []
            for session in range(GROUP):
                value = number_value(number, session)
                part = ToolScore(tool="final_answer", digest=digest, outcome=Outcome.SCORED, raw=value, value=value)
                sample = Sample(query=asked, response=f"{token} {number} " * 30, step=number, uid=uid, session=session)
                score = Score(value=value, outcome=Outcome.SCORED, reason="", parts=(part,))
                rows.append(
                    Row(sample=sample, route=route, score=score, sent=value, sent_as="value", received=0.0, seconds=0.0)
                )
                shadows.append(ShadowRow(uid=uid, session=session, step=number, score=part))
            ledger.add(rows)
            ledger.add_shadows(shadows)
            ledger.add_canaries([CanaryRow(canary="c", step=number, score=part)])
            if number % 5 == 0:
                ledger.trim(before_step=number - 10, max_bytes=math.inf)
            os.write(pipe, f"{uid}\n".encode())


def kill_ledger(folder: Path, rounds: int, dice: random.Random, bar: Callable[[], None]) -> tuple[Faults, int]:
    """Faults, and the number of acknowledged groups."""
    path, faults, told = folder / FILE_NAME, Counter[str](), 0
    for number in range(rounds):
        token = f"start {number}"
        with doomed(lambda pipe, token=token: write_ledger(path, token, pipe), dice.random() * 0.12) as uids:
            told += len(uids)
        if not path.exists():
            continue
        with sqlite3.connect(path) as db:
            unmade = db.execute("PRAGMA user_version").fetchone()[0] == 0
        db.close()
        if unmade:
            faults["damaged"] += bool(uids)
            continue
        with read(path) as db:
            faults["damaged"] += db.execute("PRAGMA integrity_check").fetchone()[0] != "ok"
            halves = "SELECT COUNT(*) FROM (SELECT COUNT(*) c FROM {} GROUP BY attempt, uid HAVING c != ?)"
            for table in ("scores", "shadows"):
                faults["damaged"] += db.execute(halves.format(table), (GROUP,)).fetchone()[0]
            for uid in uids:
                step = int(uid.rpartition(" ")[2])
                kept = [tuple(row) for row in db.execute(
                    "SELECT scores.session, scores.value, shadows.value, canaries.value, routes.name FROM scores "
                    "JOIN attempts USING (attempt) JOIN shadows USING (attempt, uid, session) "
                    "JOIN canaries ON canaries.attempt = scores.attempt AND canaries.step = scores.step "
                    "JOIN routes USING (snapshot, split, query) WHERE token = ? AND uid = ? ORDER BY session",
                    (token, uid),
                )]  # fmt: skip
                last = number_value(step, GROUP - 1)
                wanted = [(s, number_value(step, s), number_value(step, s), last, "final_answer") for s in range(GROUP)]
                faults["acknowledged_lost"] += kept != wanted
        Ledger(path, token=f"after {number}").close()
        bar()
    return faults, told


def write_library(folder: Path, number: int, pipe: int) -> None:
    from verl_rlar.cli import app

    def rlar(*command: str) -> None:
        code = app(["tools", *command, "--in", str(folder)], standalone_mode=False)
        if code:
            raise RuntimeError(f"rlar tools {' '.join(command)}: exit code {code}")
        os.write(pipe, f"{' '.join(command)}\n".encode())

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    with Library(folder / FOLDER_NAME) as library:  # whatever the one before left undone
        live = any(tool.name == "length_limits" for tool in library.latest().tools)
    for count in range(1_000_000):
        name = f"checker_{number}_{count}"
        file = folder / f"{name}.py"
        file.write_text(CHECKER.format(version=10_000 * (number + 1) + count))
        rlar("add", str(file), "--name", name, "--kind", "math")
        if live:
            rlar("retire", "length_limits", "--why", f"round {number}.{count}")
        rlar("promote", "length_limits", "--to", "live", "--why", f"round {number}.{count}")
        live = True


def kill_library(folder: Path, rounds: int, dice: random.Random, bar: Callable[[], None]) -> tuple[Faults, int]:
    """Faults, and the number of acknowledged commands."""
    import verl_rlar.cli  # noqa: F401  # once, so that a round costs a fork

    config = RlarConfig(run_dir=str(folder))
    with Library(library_path(config)) as library:
        library.begin(trusted_tools(config), "start")
        versions = [library.snapshot(step).version for step in range(4)]
    faults, told = Counter[str](), 0
    for number in range(rounds):
        with doomed(lambda pipe, number=number: write_library(folder, number, pipe), dice.random() * 0.5) as commands:
            told += len(commands)
        for opened in (Library.read, Library):
            library = opened(library_path(config))
            events = Counter((event.event, event.tool) for event in library.events)
            whys = Counter((event.event, event.why) for event in library.events)
            for command in commands:
                verb, what, *rest = command.split(" ")
                if verb == "add":
                    name = rest[1]
                    found = events["proposed", name] == 1 and library.source(library.find(name))
                    faults["acknowledged_lost"] += found != Path(what).read_text()
                else:
                    event = {"retire": "retired", "promote": "live"}[verb]
                    faults["acknowledged_lost"] += whys[event, command.partition("--why ")[2]] != 1
            now = [LibraryView.snapshot(library, step).version for step in range(4)]
            faults["changed_steps"] += now != versions
            for digest in library.digests():
                faults["damaged"] += library.spec(digest).digest != digest
            for waiting in (library.path / "inbox").rglob("*.json"):
                json.loads(waiting.read_bytes())
        library.close()
        bar()
    return faults, told


# --- The training -----------------------------------------------------------------------------------------------------


def checker(version: int) -> tuple[ToolSpec, str]:
    """A verifier, and its code."""
    source = CHECKER.format(version=version)
    spec = ToolSpec(
        name="checker",
        kind="verifier",
        target="score",
        scope=Scope(kinds=frozenset({Kind.MATH})),
        description=f"Looks for the number. Version {version}.",
        boxed=True,
        origin="kill.py",
        source_sha256=hashlib.sha256(source.encode()).hexdigest(),
        timeout_s=60.0,
    )
    return spec, source


def prepare(config: RlarConfig, *, boxes: bool) -> None:
    """A library in which tools come and go at the boundaries of all the steps to come.

    With boxes: a verifier is live, then replaced by another version, then none is (but after the end, as the settings
    name it). Without: the rule for math goes and comes back.
    """
    with Library(library_path(config)) as library:
        library.begin(trusted_tools(config), "before")
        rule = library.find("final_answer")
        digests = []
        for version in (1, 2) if boxes else ():
            spec, source = checker(version)
            library.propose(spec, source, by="kill.py", why="to come and go")
            library.put_exam(
                spec.digest, card={}, text="", transcript=[], passed=True, by="kill.py", why="to come and go"
            )
            digests.append(spec.digest)
        for step in range(PERIOD, STEPS_PLANNED, PERIOD):
            why = f"planned for step {step}"
            if not boxes:
                library.append("retired", rule, by="kill.py", why=why, step=step)
                library.append("live", rule, by="kill.py", why=why, step=step + 2)
                continue
            library.append("live", digests[0], by="kill.py", why=why, step=step)
            library.append("live", digests[1], by="kill.py", why=why, step=step + 1, replaces=digests[0])
            library.append("retired", digests[1], by="kill.py", why=why, step=step + 3)
        if boxes:
            library.append("live", digests[0], by="kill.py", why="the end", step=STEPS_PLANNED)


def settings(folder: Path, *, boxes: bool) -> list[str]:
    """Overrides of verl's configuration."""
    if boxes:
        base = os.environ.get("RLAR_TEST_BASE")
        sandbox = ["rlar.sandbox.program_boxes=1", "rlar.sandbox.verifier_boxes=1"]
        sandbox += ["rlar.routing.prefer.math=checker", *([f"rlar.sandbox.base={base}"] if base else [])]
    else:
        sandbox = ["rlar.sandbox.backend=sandbox_fusion", "rlar.sandbox.fusion_url=http://127.0.0.1:9"]
    return [
        "+rlar=default",
        f"trainer.default_local_dir={folder}",
        f"actor_rollout_ref.model.path={folder}/model",
        f"actor_rollout_ref.rollout.n={GROUP}",
        "rlar.service_timeout_s=120",
        "rlar.rules.processes=1",
        "rlar.scoring.timeout_s=60",
        *sandbox,
    ]


def tell(**line: Any) -> None:
    """Says something to who started this training."""
    print(json.dumps(line), flush=True)


async def train(folder: Path, first: int, *, boxes: bool) -> None:
    """A training without a model, from a step on, until it is killed or the file `stop` is there. It says what it gets
    and what is acknowledged, a JSON object per line."""
    import ray
    from dispatch import ANSWERS, response
    from hydra import compose, initialize_config_module
    from transformers import AutoTokenizer
    from verl.experimental.reward_loop.reward_loop import RewardLoopWorker, migrate_legacy_reward_impl

    from verl_rlar.plugin import check
    from verl_rlar.service import Client

    class Worker(RewardLoopWorker):
        """verl's reward worker, which can say when its rows are in the ledger."""

        async def flush(self) -> None:
            await self.reward_manager.flush()

    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=settings(folder, boxes=boxes))
    config = migrate_legacy_reward_impl(config)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    with gzip.open(ANSWERS, "rt") as file:
        answers = [json.loads(line) for line in file]
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="error")
    worker: Any = ray.remote(Worker)
    workers = [worker.remote(config) for _ in range(WORKERS)]
    client = Client(check(config))
    start, dice = uuid.uuid4().hex[:8], random.Random(first)

    async def one(step: int, prompt: int, session: int) -> tuple[Any, dict[str, Any]]:
        """A response that every start of the training gives again, scored by any worker that lives."""
        number = (step * PROMPTS + prompt) * GROUP + session
        row = answers[number % len(answers)] | {
            name: answers[number // GROUP * GROUP % len(answers)][name] for name in ("question", "ground_truth")
        }
        data = response(row, session, prompt, tokenizer)
        uid = f"{start}-{step}-{prompt}"
        data.non_tensor_batch["uid"][0], data.non_tensor_batch["global_steps"][0] = uid, step
        while True:
            place = dice.randrange(WORKERS)
            scorer = workers[place]
            try:
                result = await asyncio.wait_for(scorer.compute_score.remote(data), LIMIT_S / 2)
            except ray.exceptions.RayActorError:
                if workers[place] is scorer:  # the first to see that it is dead
                    workers[place] = worker.remote(config)
                continue
            value = result["reward_score"] if result["reward_extra_info"]["rlar_scored"] else None
            key = f"{step}/{prompt}/{session}"
            return scorer, {"key": key, "uid": uid, "session": session, "value": value}

    for step in (first, *range(1, first)):  # the one that goes on asks for its own step first
        tell(step=step, snapshot=(await client.at(step)).version)
    step = first
    while not (folder / "stop").exists():
        client.begin_step(step)
        tell(step=step, snapshot=(await client.at(step)).version)
        calls = (one(step, prompt, session) for prompt in range(PROMPTS) for session in range(GROUP))
        scored = await asyncio.gather(*calls)
        tell(scored=[row for _, row in scored])
        flushed = set()
        for scorer in workers:
            with suppress(ray.exceptions.RayActorError):
                await asyncio.wait_for(scorer.flush.remote(), LIMIT_S / 2)
                flushed.add(scorer)
        tell(acknowledged=[row for by, row in scored if by in flushed], lost=sum(by not in flushed for by, _ in scored))
        tell(done=step)
        step += 1
    ray.shutdown()


# --- Who kills it -----------------------------------------------------------------------------------------------------


class Training:
    """A training in a process of its own, and what it said. All starts of it share `told`.

    Args:
        folder: Its checkpoint folder.
        told: What earlier starts said.
        first: The step from which it goes on.
        boxes: Whether it uses a Docker engine.
        command: What is run in place of all that. None: `train`, of this file.
    """

    def __init__(self, folder: Path, told: Told, first: int, *, boxes: bool, command: list[str] | None = None) -> None:
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._told = told
        own = [sys.executable, __file__, "--train", str(folder), "--first", str(first), *["--boxes"] * boxes]
        self._log = open(folder / f"log-{uuid.uuid4().hex[:8]}", "w+")
        self._process = subprocess.Popen(command or own, stdout=subprocess.PIPE, stderr=self._log, text=True)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.endswith("\n") and line.startswith("{"):
                self._lines.put(json.loads(line))
        self._lines.put(None)

    def hear(self, done: Callable[[], bool]) -> None:
        """Takes in what the training says until `done`.

        Raises:
            RuntimeError: It ended, or takes too long.
        """
        end = time.monotonic() + LIMIT_S
        while not done():
            try:
                line = self._lines.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                line = None
            self._hear_one(line)

    def _hear_one(self, line: dict[str, Any] | None) -> None:
        if line is None:
            self._lines.put(None)  # it stays over
            self._log.seek(0)
            raise RuntimeError(f"the training stands still, or ended:\n{self._log.read()[-3000:]}")
        self._told.hear(line)

    def steps(self, number: int) -> None:
        """Waits until so many more steps are done, from now on."""
        while not self._lines.empty():
            self._hear_one(self._lines.get())
        goal = self._told.done_lines + number
        self.hear(lambda: self._told.done_lines >= goal)

    def pids(self, kind: str) -> list[int]:
        """The processes of a kind."""
        return [pid for pid in descendants(self._process.pid) if title(pid).startswith(TITLES[kind])]

    def kill(self) -> int:
        """Kills it; with it goes its Ray. Returns how many processes stay, besides those of Ray itself that do."""
        mine = descendants(self._process.pid)
        self._process.kill()
        self.wait()
        end = time.monotonic() + GONE_S
        while (left := [pid for pid in mine if (name := title(pid)) and not name.startswith(STAY)]) and (
            time.monotonic() < end
        ):
            time.sleep(0.1)
        for pid in mine:
            if title(pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        return len(left)

    def wait(self) -> None:
        """Waits until it has ended, and takes in all that it said."""
        self._process.wait(timeout=LIMIT_S)
        self._reader.join()
        while (line := self._lines.get()) is not None:
            self._told.hear(line)
        self._lines.put(None)
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._log.close()


class Told:
    """What the starts of a training said, and whether it agrees."""

    def __init__(self) -> None:
        self.snapshots: dict[int, str] = {}
        self.values: dict[str, float] = {}
        """By step, prompt and session."""
        self.acknowledged: dict[tuple[str, int], float | None] = {}
        """By uid and session."""
        self.done = self.done_lines = self.scored = self.again = self.unscored = self.lost = 0
        self.faults = Counter[str]()

    def hear(self, line: dict[str, Any]) -> None:
        if "snapshot" in line:
            self.faults["changed_steps"] += (
                self.snapshots.setdefault(line["step"], line["snapshot"]) != line["snapshot"]
            )
        for row in line.get("scored", ()):
            self.scored += 1
            if row["value"] is None:
                self.unscored += 1
                continue
            self.again += row["key"] in self.values
            self.faults["changed_values"] += self.values.setdefault(row["key"], row["value"]) != row["value"]
        for row in line.get("acknowledged", ()):
            self.acknowledged[row["uid"], row["session"]] = row["value"]
        self.lost += line.get("lost", 0)
        if "done" in line:
            self.done = max(self.done, line["done"])
            self.done_lines += 1

    def check(self, folder: Path, routing: RoutingConfig) -> None:
        """Looks at library and ledger as they lie there, by the routes of the run; a writer may be at work."""
        run = folder / "rlar"
        with read(run) as db:
            self.faults["damaged"] += db.execute("PRAGMA integrity_check").fetchone()[0] != "ok"
            rows = db.execute("SELECT step, uid, session, value, snapshot, route, parts FROM scores").fetchall()
        library = Library.read(run / FOLDER_NAME)  # after the ledger: so each step that has rows is handed out
        steps, settings = range(library.handed_out + 1), settings_of(routing)
        versions = {step: replace(library.snapshot(step), settings=settings).version for step in steps}
        self.faults["changed_steps"] += sum(versions[step] != told for step, told in self.snapshots.items())
        kept, groups = {}, defaultdict(set)
        for row in rows:
            kept[row["uid"], row["session"]] = row["value"]
            parts = [(part["tool"], part["digest"]) for part in json.loads(row["parts"])]
            groups[row["uid"]].add((row["snapshot"], row["route"], json.dumps(parts)))
            self.faults["changed_steps"] += row["snapshot"] != versions[row["step"]]
        missing = object()
        for key, value in self.acknowledged.items():
            self.faults["acknowledged_lost"] += kept.get(key, missing) != value
        self.faults["mixed_groups"] += sum(len(ways) > 1 for ways in groups.values())


def descendants(pid: int) -> list[int]:
    """All processes that a process started, and those that they started."""
    children = defaultdict(list)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            children[int(stat.read_text().rpartition(")")[2].split()[1])].append(int(stat.parent.name))
    found = [pid]
    for one in found:
        found += children[one]
    return found[1:]


def title(pid: int) -> str:
    """What a process is called; empty if it is gone."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""


def kill_training(
    folder: Path, rounds: dict[str, int], dice: random.Random, bar: Callable[[], None], *, boxes: bool
) -> tuple[Told, dict[str, float]]:
    """All kinds that need a Ray, in one training."""
    from verl_rlar.cpu.models import build_tiny

    with redirect_stdout(sys.stderr):
        build_tiny(folder / "model")
    prepare(RlarConfig(run_dir=str(folder / "rlar")), boxes=boxes)
    routing = RoutingConfig(prefer={Kind.MATH: "checker"} if boxes else {})  # as `settings` says
    told, figures = Told(), defaultdict[str, float](float)
    training = Training(folder, told, 1, boxes=boxes)
    order = [kind for kind in TITLES for _ in range(rounds.get(kind, 0))]
    dice.shuffle(order)
    try:
        training.steps(PERIOD + 1)
        for kind in order:
            time.sleep(dice.random() * 1.5)
            training.hear(lambda kind=kind: bool(training.pids(kind)))
            os.kill(dice.choice(training.pids(kind)), signal.SIGKILL)
            told.check(folder, routing)
            before = time.monotonic()
            training.steps(2)  # the second one began after the kill
            figures[f"{kind}_back_s"] = max(figures[f"{kind}_back_s"], time.monotonic() - before)
            told.check(folder, routing)
            bar()
        for _ in range(rounds.get("driver", 0)):
            time.sleep(dice.random() * 1.5)
            told.faults["left_over"] += training.kill()
            told.check(folder, routing)
            before, goal = time.monotonic(), told.done + 1
            training = Training(folder, told, max(1, told.done - dice.randrange(PERIOD)), boxes=boxes)
            training.hear(lambda goal=goal: told.done >= goal)
            figures["driver_back_s"] = max(figures["driver_back_s"], time.monotonic() - before)
            told.check(folder, routing)
            bar()
        (folder / "stop").touch()
        training.wait()
        told.check(folder, routing)
    finally:
        training._process.kill()
    return told, figures


def has_engine() -> bool:
    """Whether a Docker engine answers, with the image that boxes need."""
    if importlib.util.find_spec("docker") is None:
        return False
    from verl_rlar.sandbox.engine import connect
    from verl_rlar.sandbox.image import ensure_image

    base: dict[str, Any] = {"base": os.environ["RLAR_TEST_BASE"]} if os.environ.get("RLAR_TEST_BASE") else {}
    config = SandboxConfig(**base)
    try:
        client = connect(config)
    except ToolUnavailable:
        return False
    ensure_image(client, config)
    client.close()
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100, help="kills of each cheap kind (default 100)")
    parser.add_argument("--only", action="append", choices=list(SHARES), help="a kind of victim; repeatable")
    parser.add_argument("--seed", type=int, default=0, help="draws the moments (default 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--train", help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--boxes", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        asyncio.run(train(Path(args.train), args.first, boxes=args.boxes))
        return 0
    rounds = {kind: math.ceil(args.rounds * SHARES[kind]) for kind in args.only or SHARES}
    boxes = "boxes" in rounds and has_engine()
    if not boxes:
        rounds.pop("boxes", None)
    faults, figures, dice = Counter[str](), dict[str, float](), random.Random(args.seed)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, _bar() as bar:
        task = bar.add_task("kills", total=sum(rounds.values()))
        for kind, work in (("ledger", kill_ledger), ("library", kill_library)):
            if kind in rounds:
                found, acknowledged = work(Path(folder) / kind, rounds[kind], dice, lambda: bar.advance(task))
                faults.update(found)
                figures[f"{kind}_acknowledged"] = acknowledged
        if rounds.keys() & {*TITLES, "driver"}:
            (Path(folder) / "run").mkdir()
            told, times = kill_training(Path(folder) / "run", rounds, dice, lambda: bar.advance(task), boxes=boxes)
            faults.update(told.faults)
            figures |= {
                "steps": told.done,
                "responses_scored": told.scored,
                "acknowledged_rows": len(told.acknowledged),
                "scored_again_after_a_restart": told.again,
                "unscored": told.unscored,
                "lost_with_their_worker": told.lost,
                **times,
            }
    figures = {f"{kind}_kills": count for kind, count in rounds.items()} | figures
    figures |= {fault: faults[fault] for fault in FAULTS}
    ok = not any(faults.values())
    table = Table("figure", "value", "goal", title="Kills, and what was left", box=None)
    for name, value in figures.items():
        table.add_row(name, f"{value:.6g}", str(GOALS.get(name, "")))
    Console().print(table)
    if args.json:
        print(json.dumps({"name": "kill", "figures": figures, "goals": GOALS, "ok": ok}))
    return 0 if ok else 1


def _bar() -> Progress:
    return Progress(console=Console(stderr=True), transient=True)


if __name__ == "__main__":
    sys.exit(main())
