# SPDX-License-Identifier: Apache-2.0
"""Does the sandbox last? Thousands of mixed calls, a tenth of them hostile, and then nothing may be lost or left.

    python recipes/benchmarks/soak.py                  # 10,000 calls
    python recipes/benchmarks/soak.py --calls 500      # fewer
    python recipes/benchmarks/soak.py --json           # prints one object last

Calls: references of HumanEval and MBPP through `unit_tests` (must pass) and broken ones (must fail), programs on
standard input, verifiers, and hostile programs: loops, fork bombs, memory bombs, floods, early exits, litter in the
temporary folder, daemons. Each kind has the outcome that it must have, and every call must have it; the number of
containers, our memory, the engine's and the boxes' are looked at on the way. The exit code is 0 only if every goal is
reached.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sandbox import Problem, good_problems

from verl_rlar.config import SandboxConfig
from verl_rlar.sandbox.base import BoxLost, Job
from verl_rlar.sandbox.docker import LABEL, OWNER_LABEL, DockerSandbox
from verl_rlar.sandbox.engine import connect
from verl_rlar.tools.boxed import BoxRunner
from verl_rlar.tools.rules.code import unit_tests
from verl_rlar.types import Sample

HOSTILE = {
    "endless loop": "while True: pass",
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "memory bomb": "x = []\nwhile True: x.append(bytearray(1 << 24))",
    "flood": "while True: print('x' * 65536)",
    "early exit": "import os\nos._exit(0)",
    "litter": "for n in range(200): open(f'/tmp/{n}', 'w').write('x' * 1000)\nimport os\nos.makedirs('/tmp/a/b/c')",
    "daemon": "import os, time\nif not os.fork():\n    os.setsid()\n    if not os.fork(): time.sleep(1000)",
}
"""Programs that do harm, by what they do."""
ENDS = {
    "endless loop": {"timeout"},
    "fork bomb": {"timeout", "killed"},
    "memory bomb": {"killed", "done 1", "timeout"},
    "flood": {"flooded"},
    "early exit": {"done 0"},
    "litter": {"done 0"},
    "daemon": {"done 0"},
}
"""How they may end."""
SECONDS = 0.5
"""What a program has that would not end, in seconds."""
PATIENT_S = 10.0
"""... and what one has that does, however busy the machine is."""
VERIFIER = """
import rlar

def score(prompt, response, reference, extra):
    if extra["ask"]:
        return float(rlar.run_program(response, stdin="3").stdout.strip() == reference)
    return float(reference in response)
"""
GOALS: dict[str, str | float] = {
    "lost": 0,
    "unexpected": 0,
    "containers_grown": 0,
    "orphans": 0,
    "our_memory_grown_mb": "<= 50",
}

Call = Callable[[], Coroutine[Any, Any, str]]


class Soak:
    """Makes calls of all kinds.

    Args:
        runner: For the rule.
        sandbox: Its sandbox, for plain jobs.
        problems: Problems whose references pass.
    """

    def __init__(self, runner: BoxRunner, sandbox: DockerSandbox, problems: Sequence[Problem]) -> None:
        self._runner = runner
        self._sandbox = sandbox
        self._problems = problems
        self._dice = random.Random(0)
        self.outcomes: dict[str, Counter[str]] = {}
        """By kind, how often each outcome came."""
        self.lost = self.unexpected = 0

    async def one(self) -> None:
        """One call, and its entry in the table."""
        kind, expected, call = self._pick()
        try:
            outcome = await call()
        except BoxLost:
            outcome = "box lost"
            self.lost += 1
        except Exception as error:  # a soak counts whatever comes
            outcome = type(error).__name__
            self.lost += 1
        else:
            self.unexpected += outcome not in expected
        self.outcomes.setdefault(kind, Counter())[outcome] += 1

    def _pick(self) -> tuple[str, set[str], Call]:
        problem, share = self._dice.choice(self._problems), self._dice.random()
        if share < 0.1:
            name = self._dice.choice(list(HOSTILE))
            seconds = SECONDS if "timeout" in ENDS[name] else PATIENT_S
            return f"hostile: {name}", ENDS[name], lambda: self._program(HOSTILE[name], seconds)
        if share < 0.5:
            return "reference", {"1.0"}, lambda: self._tests(problem.sample.query, problem.program)
        if share < 0.7:
            entry = problem.sample.query.extra["entry_point"]
            broken = f"{problem.program}\ndef {entry}(*args):\n    raise ValueError(len(args))\n"
            return "broken reference", {"0.0"}, lambda: self._tests(problem.sample.query, broken)
        if share < 0.9:
            return "program", {"done 0: 6"}, lambda: self._program("print(2 * int(input()))", PATIENT_S, show=True)
        ask = share < 0.95
        return f"verifier{' that runs a program' if ask else ''}", {"1.0"}, lambda: self._verify(ask)

    async def _tests(self, query: Any, program: str) -> str:
        sample = Sample(query=query, response=f"```python\n{program}```")
        return str((await self._runner.run(unit_tests.spec, sample)).value)

    async def _program(self, source: str, seconds: float, *, show: bool = False) -> str:
        ran = await self._sandbox.run(Job(mode="program", source=source, stdin="3\n", seconds=seconds))
        code = f" {ran.exit_code}" if ran.end.value == "done" else ""
        return f"{ran.end.value}{code}{': ' + ran.stdout.strip() if show else ''}"

    async def _verify(self, ask: bool) -> str:
        response = "print(2 * int(input()))" if ask else "the answer is 6"
        inputs = {"prompt": "", "response": response, "reference": "6", "extra": {"ask": ask}}

        async def answer(question: Any, left: float) -> Any:
            ran = await self._sandbox.run(
                Job(mode="program", source=question["source"], stdin=question["stdin"], seconds=min(left, PATIENT_S))
            )
            return {"end": ran.end.value, "exit_code": ran.exit_code, "stdout": ran.stdout, "stderr": ran.stderr}

        ran = await self._sandbox.run(
            Job(mode="verifier", source=VERIFIER, inputs=inputs, seconds=2 * PATIENT_S), answer
        )
        return str(ran.answers[0].get("value")) if ran.answers else ran.end.value


def resident_mb(pid: int | str = "self") -> float:
    """Memory of a process, in MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def engine_mb() -> float:
    """Memory of the engine's own processes, if they are on this machine, in MiB."""
    total = 0.0
    for comm in Path("/proc").glob("[0-9]*/comm"):
        try:
            if comm.read_text().strip() in ("dockerd", "containerd"):
                total += resident_mb(comm.parent.name)
        except OSError:
            pass
    return total


def our_boxes(client: Any) -> list[Any]:
    """Containers of this process, as the engine lists them."""
    mine = f"{os.getpid()}:"
    found = client.containers.list(all=True, filters={"label": LABEL}, ignore_removed=True)
    return [box for box in found if box.labels.get(OWNER_LABEL, "").startswith(mine)]


def boxes_mb(client: Any) -> float:
    """Memory of the fullest box, in MiB."""
    used = [box.stats(stream=False, one_shot=True)["memory_stats"].get("usage", 0) for box in our_boxes(client)]
    return max(used, default=0) / (1 << 20)


async def soak(calls: int, at_once: int, config: SandboxConfig, problems: list[Problem]) -> dict[str, float]:
    client = await asyncio.to_thread(connect, config)
    figures: dict[str, float] = {"calls": calls}
    looks: list[tuple[int, float, float, float]] = []
    started = time.perf_counter()
    async with BoxRunner(config) as runner:
        sandbox = await runner._sandbox()
        assert isinstance(sandbox, DockerSandbox)
        work = Soak(runner, sandbox, problems)

        async def look() -> None:
            """Waits until destroyed boxes are gone and replaced, and notes what there is."""
            for _ in range(30):
                await asyncio.sleep(0.5)
                count = len(await asyncio.to_thread(our_boxes, client))
                if count == sandbox.boxes:
                    break
            looks.append((count, resident_mb(), engine_mb(), await asyncio.to_thread(boxes_mb, client)))

        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("calls", total=calls)
            done = 0

            async def caller() -> None:
                nonlocal done
                while done < end:
                    done += 1
                    await work.one()
                    bar.advance(task)

            for part in range(10):
                end = calls * (part + 1) // 10
                await asyncio.gather(*(caller() for _ in range(at_once)))
                await look()
        figures["waited"] = sandbox.waited
    figures["seconds"] = time.perf_counter() - started
    figures["orphans"] = len(await asyncio.to_thread(our_boxes, client))
    client.close()
    table = Table("calls", "number", "outcomes", title="What became of each call", box=None)
    for kind, outcomes in sorted(work.outcomes.items()):
        table.add_row(kind, str(outcomes.total()), ", ".join(f"{name} {n}" for name, n in outcomes.most_common()))
    table.add_row("all", str(sum(outcomes.total() for outcomes in work.outcomes.values())), "")
    Console().print(table)
    counted = sum(outcomes.total() for outcomes in work.outcomes.values())
    figures["lost"] = work.lost + calls - counted
    figures["unexpected"] = work.unexpected
    limit = (config.program_boxes or 0) + (config.verifier_boxes or 0) + 2 * config.spare_boxes
    figures["containers_at_most"] = max(count for count, *_ in looks)
    figures["containers_grown"] = max(0, int(figures["containers_at_most"]) - limit)
    for place, name in ((1, "our_memory"), (2, "engine_memory"), (3, "fullest_box")):
        figures[f"{name}_first_mb"], figures[f"{name}_last_mb"] = looks[0][place], looks[-1][place]
    figures["our_memory_grown_mb"] = looks[-1][1] - looks[0][1]
    figures["fullest_box_at_most_mb"] = max(look[3] for look in looks)
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=10_000, help="number of calls (default 10,000)")
    parser.add_argument("--at-once", type=int, default=4, help="calls under way at any time (default 4)")
    parser.add_argument("--boxes", type=int, default=os.cpu_count() or 1, help="boxes of each pool (default: cores)")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    arguments = parser.parse_args()
    base: dict[str, Any] = {"base": os.environ["RLAR_TEST_BASE"]} if os.environ.get("RLAR_TEST_BASE") else {}
    boxes = {"program_boxes": arguments.boxes, "verifier_boxes": arguments.boxes, "program_timeout_s": PATIENT_S}
    config = SandboxConfig(**boxes, **base)
    problems = good_problems(0, arguments.boxes)
    figures = asyncio.run(soak(arguments.calls, arguments.at_once, config, problems))
    zero = ("lost", "unexpected", "containers_grown", "orphans")
    ok = not any(figures[name] for name in zero) and figures["our_memory_grown_mb"] <= 50
    for name, value in figures.items():
        goal = f"   (goal: {GOALS[name]})" if name in GOALS else ""
        print(f"{name:<28} {value:.6g}{goal}")
    if arguments.json:
        print(json.dumps({"name": "soak", "figures": figures, "goals": GOALS, "ok": ok}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
