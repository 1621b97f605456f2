# SPDX-License-Identifier: Apache-2.0
"""What it costs to run unit tests in boxes, against running them without walls, and against verl's own grader.

    python recipes/benchmarks/sandbox.py                 # all problems, 4 responses each
    python recipes/benchmarks/sandbox.py --problems 200  # some, spread evenly
    python recipes/benchmarks/sandbox.py --quick         # a few; says nothing about speed
    python recipes/benchmarks/sandbox.py --json          # prints one object last

HumanEval and MBPP with all of their tests; the responses are the reference solutions. The contenders take turns with
the same parts of the same list:

- *boxes*: the rule `unit_tests` through `BoxRunner` and `DockerSandbox`, as in training (one box per core and one more,
  so that none idles between two jobs), a whole part at once;
- *fork server*: the limit. One warm interpreter per core forks for each response and executes program and tests in
  the child, as one text; the next one is always sent ahead. No isolation at all, so trusted programs only;
- *fresh interpreter*: ``python -I`` for each response, one per core at a time;
- *verl*: `verl.utils.reward_score.prime_code`, one per core at a time, each response with its tests as one program that
  has to print a word at its end.

Latencies are of one call at a time, boxes and fork server in turn, and of as many calls at a time as there are cores.
Beside the rates stands the processor time per response, of which other work on the machine takes nothing away: in our
process, in the engine, in the boxes; and in the fork server. ``boxes_throttled`` counts how often a box had used up its
share of a core (``rlar.sandbox.cpus``), which a fork server does not have.

A problem is left out if its reference fails its own tests in the fork server. The exit code is 0 only if every goal is
reached. `DOCKER_HOST` and, as base image of the boxes, `RLAR_TEST_BASE` are looked at.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gzip
import json
import logging
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from verl_rlar.config import SandboxConfig
from verl_rlar.rows import query_of
from verl_rlar.sandbox.docker import OWNER_LABEL, Box, DockerSandbox, _owner, box_counts
from verl_rlar.sandbox.engine import connect
from verl_rlar.sandbox.image import ensure_image
from verl_rlar.tools.boxed import BoxRunner
from verl_rlar.tools.rules.code import unit_tests
from verl_rlar.types import Sample, ToolSpec

DATA = Path(__file__).resolve().parent.parent / "data"
ERRORS = Console(stderr=True)
SECONDS = 5.0
"""Time limit of a program, in seconds, for every contender."""
PART = 50
"""Problems after which it is the next contender's turn."""
WORD = "all tests passed"
GOALS: dict[str, str | float] = {
    "boxes_to_fork_server": ">= 0.8",
    "boxes_to_fresh_interpreter": ">= 1.5",
    "boxes_to_verl": "> 1",
    "warm_p50_minus_fork_server_ms": "<= 5",
    "waited_after_warm_up": 0,
    "boxes_failed": 0,
}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One problem with its reference solution."""

    name: str
    program: str
    """The reference solution, complete."""
    tests: str
    """Code that defines ``check``, and calls it."""
    sample: Sample
    """The same as the rule gets it."""

    @property
    def script(self) -> str:
        """Program and tests in one text: the naive way."""
        return f"{self.program}\n{self.tests}"


def load_problems() -> list[Problem]:
    """Every problem of HumanEval and MBPP."""
    problems = []
    for name in ("humaneval", "mbpp"):
        with gzip.open(DATA / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
            for line in map(json.loads, lines):
                program = line["prompt"] + line["canonical_solution"] + "\n"
                row = {
                    "prompt": [{"role": "user", "content": line["prompt"]}],
                    "reward_model": {"style": "rule", "ground_truth": ""},
                    "extra_info": {"test": line["test"], "entry_point": line["entry_point"]},
                    "data_source": name,
                }
                problems.append(
                    Problem(
                        name=line["task_id"],
                        program=program,
                        tests=f"{line['test']}\ncheck({line['entry_point']})\n",
                        sample=Sample(query=query_of(row), response=f"```python\n{program}```"),
                    )
                )
    return problems


# without walls

_FORK_SERVER = """
import collections, json, os, signal, sys
import bisect, copy, functools, heapq, itertools, math, random, re, string, typing
import gc
gc.collect(); gc.freeze()
quiet = os.open(os.devnull, os.O_RDWR)
for line in sys.stdin:
    source, seconds = json.loads(line)
    pid = os.fork()
    if not pid:
        signal.alarm(int(seconds))
        os.dup2(quiet, 1); os.dup2(quiet, 2)
        try:
            exec(compile(source, "program.py", "exec"), {"__name__": "program"})
        except BaseException:
            os._exit(1)
        os._exit(0)
    sys.stdout.write(f"{os.waitpid(pid, 0)[1]}\\n")
    sys.stdout.flush()
"""
BARE_PYTHON = getattr(sys, "_base_executable", sys.executable)
"""The interpreter without what a virtual environment adds to its start."""


class ForkServer:
    """Warm interpreters that fork for each script."""

    def __init__(self, size: int) -> None:
        self._servers = [
            subprocess.Popen([BARE_PYTHON, "-I", "-c", _FORK_SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            for _ in range(size)
        ]
        self._threads = ThreadPoolExecutor(size)

    def close(self) -> None:
        for server in self._servers:
            server.communicate()
        self._threads.shutdown()

    def seconds(self) -> float:
        """Processor time so far of the interpreters and of what they have forked, in seconds."""
        stats = [Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2] for server in self._servers]
        return sum(int(ticks) for stat in stats for ticks in stat.split()[11:15]) / os.sysconf("SC_CLK_TCK")

    def one(self, problem: Problem) -> bool:
        return self._share(self._servers[0], [problem])[0]

    def all(self, problems: Sequence[Problem]) -> list[bool]:
        """Whether each passes."""
        size = len(self._servers)
        shares = [problems[number::size] for number in range(size)]
        passed: list[bool] = [False] * len(problems)
        for number, share in enumerate(self._threads.map(self._share, self._servers, shares)):
            passed[number::size] = share
        return passed

    def _share(self, server: subprocess.Popen[bytes], problems: Sequence[Problem]) -> list[bool]:
        """Sends scripts, always one more than is at work, so that the server never waits."""
        assert server.stdin and server.stdout
        passed = []
        lines = [json.dumps([problem.script, SECONDS]).encode() + b"\n" for problem in problems]
        for number, line in enumerate(lines):
            server.stdin.write(line)
            server.stdin.flush()
            if number:
                passed.append(server.stdout.readline() == b"0\n")
        if lines:
            passed.append(server.stdout.readline() == b"0\n")
        return passed


def fresh(problem: Problem) -> bool:
    """Whether a script passes in an interpreter of its own."""
    try:
        done = subprocess.run([BARE_PYTHON, "-I", "-c", problem.script], capture_output=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def load_verl() -> None:
    multiprocessing.set_start_method("fork", force=True)  # as in a worker of training, where imports are done already
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        import verl.utils.reward_score.prime_code  # noqa: F401


def by_verl(script: str) -> bool:
    """Whether verl's grader passes a script that prints `WORD` at its end."""
    from verl.utils.reward_score.prime_code import compute_score

    tests = {"inputs": [""], "outputs": [WORD]}
    passed, _ = compute_score(f"{script}\nprint({WORD!r})\n", tests, continuous=True)  # as verl calls it
    return passed == 1


# in boxes


class Boxes:
    """The rule, as a node's runner calls it in training."""

    def __init__(self, runner: BoxRunner) -> None:
        self._runner = runner
        self.spec: ToolSpec = unit_tests.spec
        self.reasons: dict[str, str] = {}
        """Problems that did not pass, and why."""

    async def one(self, problem: Problem) -> bool:
        verdict = await self._runner.run(self.spec, problem.sample)
        if verdict.value != 1:
            self.reasons[problem.name] = f"{verdict.value}: {verdict.reason}"
        return verdict.value == 1

    async def all(self, problems: Sequence[Problem]) -> list[bool]:
        return await asyncio.gather(*map(self.one, problems))

    async def some_at_a_time(self, problems: Sequence[Problem], count: int) -> list[float]:
        """Seconds of each call, with so many under way at any time."""
        left, times = iter(problems), []

        async def caller() -> None:
            for problem in left:
                start = time.perf_counter()
                await self.one(problem)
                times.append(time.perf_counter() - start)

        await asyncio.gather(*(caller() for _ in range(count)))
        return times


async def cold_starts(config: SandboxConfig, count: int) -> list[float]:
    """Seconds from nothing to a box that is ready for its first job."""
    client = await asyncio.to_thread(connect, config)
    image = await asyncio.to_thread(ensure_image, client, config)
    times = []
    for _ in range(count):
        start = time.perf_counter()
        box = await Box.start(client, config, image)
        try:
            await box.prepare(())
            times.append(time.perf_counter() - start)
        finally:
            await box.destroy()
    client.close()
    return times


def box_seconds(sandbox: DockerSandbox) -> dict[str, float]:
    """Processor time so far of all boxes, in seconds; and how often one was held back because it had used up its share
    of a core."""
    used = {"boxes": 0.0, "throttled": 0.0}
    client = sandbox._client
    for box in client.containers.list(filters={"label": f"{OWNER_LABEL}={_owner(os.getpid())}"}):
        stats = client.api.stats(box.id, stream=False, one_shot=True)["cpu_stats"]
        used["boxes"] += stats["cpu_usage"]["total_usage"] / 1e9
        used["throttled"] += stats["throttling_data"]["throttled_periods"]
    return used


def processor_seconds() -> dict[str, float]:
    """Processor time so far of this process, and of the engine's processes on this machine, in seconds."""
    used = {"host": time.process_time(), "engine": 0.0}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = stat.read_text().partition("(")[2].rpartition(")")
            if name.startswith(("dockerd", "containerd")):
                user, system = rest.split()[11:13]
                used["engine"] += (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return used


async def measure(problems: list[Problem], responses: int, size: int, config: SandboxConfig) -> dict[str, float]:
    """Every figure."""
    figures: dict[str, float] = {"problems": len(problems), "responses": responses, "boxes": box_counts(config)[0]}
    loop = asyncio.get_running_loop()
    seconds: dict[str, float] = {}
    failed: dict[str, set[str]] = {}
    spent: dict[str, float] = {}
    async with BoxRunner(config) as runner:
        boxes = Boxes(runner)
        server, threads = ForkServer(size), ThreadPoolExecutor(size)
        graders = ProcessPoolExecutor(size, mp_context=multiprocessing.get_context("spawn"), initializer=load_verl)

        async def in_threads(function: Callable[[Problem], bool], batch: list[Problem]) -> list[bool]:
            return await asyncio.gather(*(loop.run_in_executor(threads, function, problem) for problem in batch))

        async def in_graders(batch: list[Problem]) -> list[bool]:
            return await asyncio.gather(*(loop.run_in_executor(graders, by_verl, problem.script) for problem in batch))

        contenders: dict[str, Callable[[list[Problem]], Coroutine[Any, Any, list[bool]]]] = {
            "boxes": boxes.all,
            "fork_server": lambda batch: asyncio.to_thread(server.all, batch),
            "fresh_interpreter": lambda batch: in_threads(fresh, batch),
            "verl": in_graders,
        }
        try:
            for run in contenders.values():  # warm up: boxes, interpreters, imports
                await run(problems[: 2 * size])
            sandbox = await runner._sandbox()
            assert isinstance(sandbox, DockerSandbox)
            await all_started(sandbox)
            parts = [problems[number : number + PART] for number in range(0, len(problems), PART)]
            for part in progress(parts, "throughput"):
                batch = [problem for problem in part for _ in range(responses)]
                for name, run in contenders.items():
                    before = await asyncio.to_thread(box_seconds, sandbox) if name == "boxes" else {}
                    before |= processor_seconds() | {"fork_server": server.seconds()}
                    start = time.perf_counter()
                    passed = await run(batch)
                    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
                    after = processor_seconds() | {"fork_server": server.seconds()}
                    after |= await asyncio.to_thread(box_seconds, sandbox) if name == "boxes" else {}
                    for what in ("host", "engine", "boxes", "throttled") if name == "boxes" else ("fork_server",):
                        spent[what] = spent.get(what, 0.0) + after[what] - before[what]
                    failed.setdefault(name, set()).update(
                        problem.name for problem, good in zip(batch, passed, strict=True) if not good
                    )
            calls = len(problems) * responses
            for name in contenders:
                figures[f"{name}_per_s"] = calls / seconds[name]
                figures[f"{name}_failed"] = len(failed[name])
                if name != "boxes":
                    figures[f"boxes_to_{name}"] = seconds[name] / seconds["boxes"]
            figures["boxes_throttled"] = spent.pop("throttled")
            for name in ("host", "engine", "boxes", "fork_server"):
                figures[f"{name}_cpu_ms_a_call"] = 1000 * spent[name] / calls
            all_told = spent["host"] + spent["engine"] + spent["boxes"]
            figures["boxes_to_fork_server_by_cpu"] = spent["fork_server"] / all_told
            one, bare = [], []
            for problem in progress(problems[:: max(1, len(problems) // 300)], "one at a time"):
                for _ in range(2):  # the second time, its tests have been read before
                    start = time.perf_counter()
                    await boxes.one(problem)
                    between = time.perf_counter()
                    server.one(problem)
                    one.append(between - start)
                    bare.append(time.perf_counter() - between)
            waited = sandbox.waited
            under_load = await boxes.some_at_a_time(
                [problem for problem in problems[:: max(1, len(problems) // 300)] for _ in range(responses)], size
            )
            figures["waited_after_warm_up"] = sandbox.waited - waited
            figures |= quantiles("warm", one[1::2]) | quantiles("warm_first", one[::2])
            figures |= quantiles("fork_server", bare) | quantiles("under_load", under_load)
            figures["warm_p50_minus_fork_server_ms"] = figures["warm_p50_ms"] - figures["fork_server_p50_ms"]
        finally:
            server.close()
            threads.shutdown()
            graders.shutdown()
    figures["cold_start_ms"] = 1000 * statistics.median(await cold_starts(config, 5))
    for name, names in failed.items():
        for problem in sorted(names)[:10]:
            why = f": {boxes.reasons[problem]}" if name == "boxes" else ""
            ERRORS.print(f"{name} does not pass {problem}{why}", markup=False, highlight=False)
    return figures


async def all_started(sandbox: DockerSandbox) -> None:
    """Waits until no more boxes are being started."""
    count = -1
    while count != sandbox.boxes:
        count = sandbox.boxes
        await asyncio.sleep(2)


def quantiles(name: str, seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {f"{name}_p{p}_ms": 1000 * ordered[min(len(ordered) - 1, len(ordered) * p // 100)] for p in (50, 99)}


def reached(figures: dict[str, float]) -> dict[str, bool]:
    """Whether each goal is."""
    return {
        "boxes_to_fork_server": figures["boxes_to_fork_server"] >= 0.8,
        "boxes_to_fresh_interpreter": figures["boxes_to_fresh_interpreter"] >= 1.5,
        "boxes_to_verl": figures["boxes_to_verl"] > 1,
        "warm_p50_minus_fork_server_ms": figures["warm_p50_minus_fork_server_ms"] <= 5,
        "waited_after_warm_up": figures["waited_after_warm_up"] == 0,
        "boxes_failed": figures["boxes_failed"] == 0,
    }


def progress(items: Iterable[Any], what: str) -> Iterable[Any]:
    return track(items, description=what, console=ERRORS, transient=True)


def good_problems(count: int, size: int) -> list[Problem]:
    """Problems whose references pass, spread evenly over all."""
    problems = load_problems()
    problems = problems[:: max(1, len(problems) // count)][:count] if count else problems
    server = ForkServer(size)
    try:
        passed = server.all(problems)
    finally:
        server.close()
    return [problem for problem, good in zip(problems, passed, strict=True) if good]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=0, help="number of problems (default: all)")
    parser.add_argument("--responses", type=int, default=4, help="responses to each problem (default 4)")
    parser.add_argument("--boxes", type=int, help="boxes for programs (default: as in training)")
    parser.add_argument("--quick", action="store_true", help="24 problems, 2 responses")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.problems, arguments.responses = 24, 2
    logging.getLogger("verl_rlar").addHandler(logging.StreamHandler())
    size = os.cpu_count() or 1
    base: dict[str, Any] = {"base": os.environ["RLAR_TEST_BASE"]} if os.environ.get("RLAR_TEST_BASE") else {}
    config = SandboxConfig(program_boxes=arguments.boxes, program_timeout_s=SECONDS, **base)
    problems = good_problems(arguments.problems, size)
    figures = asyncio.run(measure(problems, arguments.responses, size, config))
    met = reached(figures)
    table = Table("figure", "value", "goal", title="Unit tests in boxes", box=None)
    for name, value in figures.items():
        goal = f"{GOALS[name]}{'' if met[name] else '   MISSED'}" if name in GOALS else ""
        table.add_row(name, f"{value:.4g}", goal)
    Console().print(table)
    ok = all(met.values())
    if arguments.json:
        print(json.dumps({"name": "sandbox", "figures": figures, "goals": GOALS, "ok": ok}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
