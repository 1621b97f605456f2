# SPDX-License-Identifier: Apache-2.0
"""Does the library evolve with the data? A mixture that shifts, scored by a frozen library and by one that grows.

    python recipes/evolution/run.py              # math, +code, +translation, +demands in a new wording; some minutes
    python recipes/evolution/run.py --quick      # shorter, for tests
    python recipes/evolution/run.py --json       # prints one object last

Both start with one checker, for math, and a static reward (`generic.py`) for whatever no tool fits. Both are a real
`verl_rlar.service.Service` with library, ledger, router, scorer, shadow and life, step by step; no policy is trained:
each prompt comes with two right and two wrong answers whose labels nobody sees (`stream.py`). In the growing one the
watch's alarms and gaps start a scripted coder (`agents.py`), whose drafts, bad and good ones, take the real exam in
boxes and go through inbox and shadow. Its exams have their own queries.

- *reward accuracy*: over pairs of a right and a wrong answer to a prompt, how often the right one gets more; the same
  counts half;
- *wrong gradients*: share of the groups in which wrong answers have the higher mean of GRPO's advantages, so that the
  policy would be taught wrong; *no gradient*: all answers got the same;
- *covered*: share of responses that a tool scored that fits them;
- *oracle*: for each task the tool of the whole pool (built in, written, static) that is best on it, in hindsight, from
  the first step on. The *end* is the last third of the last phase;
- *false alarms*: `drift` and `new_cluster` before a shift, and on streams of all tasks in shares that never change.

The exit code is 0 only if the growing library ends within `NEAR` of the oracle, the frozen one at least `BELOW` lower
than the growing one, each shift raises `drift` within `LATE` steps, and nothing does before one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agents import SCRIPT, ScriptedCoder
from groups import Group, mean_accuracy, share
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from stream import Stream, Task, Visit, tasks

from verl_rlar.clusters import Clusters
from verl_rlar.config import RlarConfig, WatchConfig, parse
from verl_rlar.exam.subject import verifier
from verl_rlar.ledger import Row, read
from verl_rlar.library import FOLDER_NAME, LibraryView, builtin_snapshot
from verl_rlar.purse import Purse
from verl_rlar.scoring import Scorer
from verl_rlar.service import Service
from verl_rlar.shadow import Shadow
from verl_rlar.tools.boxed import BoxRunner
from verl_rlar.tools.runner import RuleRunner
from verl_rlar.types import Kind, Sample, ToolSpec
from verl_rlar.watch import Watch

HERE = Path(__file__).resolve().parent
NEAR, BELOW, LATE, FALSE = 0.02, 0.05, 3, 3
GOALS = {
    "below_oracle_at_the_end": f"<= {NEAR}",
    "growing_above_frozen_at_the_end": f">= {BELOW}",
    "steps_to_drift_alarm": f"<= {LATE} for each shift",
    "drift_alarms_without_shift": 0,
    "false_alarms_per_1000_steps": f"<= {FALSE}",
    "bad_drafts_admitted": 0,
}
AT_ONCE = 8
NEUTRAL = 0.5


@dataclass
class Trained:
    """What came of a run."""

    groups: list[Group] = field(default_factory=list)
    drifts: list[int] = field(default_factory=list)
    """Steps before which the watch raised it."""
    new_clusters: list[int] = field(default_factory=list)
    live: dict[str, int] = field(default_factory=dict)
    """By tool that was written, the first step at which it had a say."""
    coder: ScriptedCoder | None = None


def settings(folder: Path, **routing: Any) -> RlarConfig:
    """Of both runs. Of the built-in tools only the one for math is there."""
    base = os.environ.get("RLAR_TEST_BASE")
    kinds = frozenset(SCRIPT)
    forbidden = [tool.name for tool in builtin_snapshot().tools if tool.scope.kinds & kinds and not tool.gate]
    return parse(
        {
            "run_dir": str(folder),
            "tools": ["generic:generic"],
            "routing": {"fallback": "generic", "forbid": [*forbidden, "generic"]},
            "exam": {"max_queries": 24, "repeats": 24},
            "life": {"shadow_steps": 2, "shadow_responses": 24, "canaries": 2},
            "sandbox": {"base": base} if base else {},
        }
    )


async def train(
    name: str, folder: Path, stream: Stream, labelled: Mapping[Kind, Path] | None, progress: Progress
) -> Trained:
    """A run over the stream; with files of labelled answers its library grows."""
    config = settings(folder)
    done = Trained()
    if labelled is not None:
        done.coder = ScriptedCoder(config, folder / FOLDER_NAME, labelled)
    service = Service(config, name, seeker=done.coder)
    sources: dict[str, str] = {}
    rules = tuple(tool.target for tool in (await service.at(0)).tools if tool.kind == "rule" and not tool.boxed)
    bar = progress.add_task(name, total=len(stream.steps))
    gate = asyncio.Semaphore(AT_ONCE)
    try:
        with RuleRunner(config.rules, rules) as runner:
            async with BoxRunner(config.sandbox, sources) as boxes:
                scorer = Scorer(config.scoring, runner, boxes)
                shadow = Shadow(config.life, scorer, service)
                for step in stream.steps:
                    await begin(service, step)
                    snapshot = await service.at(step)
                    for tool in (*snapshot.tools, *snapshot.shadows):
                        if tool.kind == "verifier" and tool.source_sha256 not in sources:
                            sources[tool.source_sha256] = await service.source(tool.source_sha256) or ""
                    for tool in snapshot.tools:
                        if tool.kind == "verifier":
                            done.live.setdefault(tool.name, step)

                    async def visit(one: Visit, step: int = step, snapshot: Any = snapshot) -> tuple[Group, list[Row]]:
                        route = await service.route(one.item.query, snapshot)
                        samples = [
                            Sample(
                                query=one.item.query,
                                response=answer,
                                step=step,
                                uid=one.uid,
                                session=session,
                                group_size=len(one.answers),
                            )
                            for session, (answer, _) in enumerate(one.answers)
                        ]
                        async with gate:
                            scores = await asyncio.gather(
                                *(scorer.score(sample, route, snapshot) for sample in samples)
                            )
                        known = [score.value for score in scores if score.value is not None]
                        mean = statistics.fmean(known) if known else NEUTRAL
                        sent = tuple(mean if score.value is None else score.value for score in scores)
                        rows = [
                            Row(
                                sample=sample,
                                route=route,
                                score=score,
                                sent=value,
                                sent_as="value" if score.value is not None else "siblings",
                                received=0.0,
                                seconds=score.seconds,
                            )
                            for sample, score, value in zip(samples, scores, sent, strict=True)
                        ]
                        right = tuple(is_right for _, is_right in one.answers)
                        return Group(step, one.task, right, sent, route.covered), rows

                    found = await asyncio.gather(*map(visit, stream.at(step)))
                    done.groups += [group for group, _ in found]
                    rows = [row for _, of_group in found for row in of_group]
                    await service.record(rows)
                    for row in rows:
                        shadow.scored(row.sample, row.route.kind, snapshot)
                    await shadow.flush()
                    if done.coder is not None:
                        await done.coder.settled()
                    progress.advance(bar)
                await begin(service, stream.steps[-1] + 1)
                if done.coder is not None:
                    await done.coder.settled()
    finally:
        service.close()
    with read(folder) as db:
        for step, sign in db.execute("SELECT step, sign FROM alarms ORDER BY step"):
            {"drift": done.drifts, "new_cluster": done.new_clusters}.get(sign, []).append(step)
    return done


async def begin(service: Service, step: int) -> None:
    while not await service.begin_step(step):
        pass


# --- The oracle -------------------------------------------------------------------------------------------------------


async def oracle(
    stream: Stream, found: Sequence[Task], folder: Path, progress: Progress
) -> tuple[list[Group], dict[str, str]]:
    """What the best tool of each task gives, and which one that is."""
    config = settings(folder)
    builtin = builtin_snapshot()
    sources: dict[str, str] = {}
    pool: dict[str, list[ToolSpec]] = {}
    for task in found:
        pool[task.name] = [
            tool
            for tool in builtin.tools
            if task.kind in tool.scope.kinds and not tool.gate and task.kind is not Kind.OPEN
        ]
        for draft in SCRIPT.get(task.kind, ())[-1:]:
            subject = verifier((HERE / "drafts" / f"{draft}.py").read_text(), name=draft, kinds=[task.kind])
            sources[subject.spec.source_sha256] = subject.source
            pool[task.name].append(subject.spec)
    visits = [(step, one) for step in stream.steps for one in stream.at(step)]
    got: dict[tuple[str, str], list[Group]] = defaultdict(list)
    bar = progress.add_task("oracle", total=len(visits))
    gate = asyncio.Semaphore(AT_ONCE)
    rules = tuple(tool.target for tools in pool.values() for tool in tools if tool.kind == "rule" and not tool.boxed)
    with RuleRunner(config.rules, rules) as runner:
        async with BoxRunner(config.sandbox, sources) as boxes:
            scorer = Scorer(config.scoring, runner, boxes)

            async def visit(step: int, one: Visit) -> None:
                for tool in pool[one.task]:
                    async with gate:
                        scores = await asyncio.gather(
                            *(
                                scorer.call(tool, Sample(query=one.item.query, response=answer, step=step, uid=one.uid))
                                for answer, _ in one.answers
                            )
                        )
                    known = [score.value for score in scores if score.value is not None]
                    mean = statistics.fmean(known) if known else NEUTRAL
                    sent = tuple(mean if score.value is None else score.value for score in scores)
                    right = tuple(is_right for _, is_right in one.answers)
                    got[one.task, tool.name].append(Group(step, one.task, right, sent, True))
                progress.advance(bar)

            await asyncio.gather(*(visit(*one) for one in visits))
    best: dict[str, str] = {}
    for task in found:
        best[task.name] = max(
            (tool.name for tool in pool[task.name]),
            key=lambda name, task=task: statistics.fmean(group.accuracy for group in got[task.name, name]),  # type: ignore[misc]
        )
    return [group for task, name in best.items() for group in got[task, name]], best


# --- Alarms without a shift -------------------------------------------------------------------------------------------


def false_alarms(found: Sequence[Task], streams: int, steps: int, prompts: int) -> tuple[int, int]:
    """Steps of streams of all tasks in shares that do not change, and the alarms about shares that were raised."""
    alarms = 0
    for seed in range(streams):
        stream = Stream(tuple(found), 1, prompts, seed)
        clusters, watch = Clusters(), Watch(WatchConfig())
        for step in range(1, steps + 1):
            for _ in watch.close(step):
                pass
            alarms += sum(alarm.sign in ("drift", "new_cluster") for alarm in watch.judge(step))
            for one in stream.at(step + len(found)):  # where all tasks are there
                watch.saw_response(
                    step=step,
                    uid=one.uid,
                    session=0,
                    query=one.item.query.key,
                    cluster=clusters.of(one.item.query),
                    kind=Kind.OPEN,
                    covered=True,
                    parts=(),
                    text=None,
                )
    return streams * steps, alarms


# --- What is printed --------------------------------------------------------------------------------------------------


def table_of(stream: Stream, phase: int, end: range, runs: Mapping[str, list[Group]]) -> Table:
    table = Table("phase", "library", "covered", "reward accuracy", "wrong gradients", "no gradient", box=None)
    names = ["math", "+ code", "+ translation", "+ demands"]
    parts = [(names[n], range(1 + n * phase, 1 + (n + 1) * phase)) for n in range(len(names))] + [("the end", end)]
    for name, steps in parts:
        for library, groups in runs.items():
            some = [group for group in groups if group.step in steps]
            covered = sum(group.covered for group in some) / len(some)
            table.add_row(
                f"{name} (steps {steps[0]} to {steps[-1]})",
                library,
                f"{covered:.3f}",
                f"{mean_accuracy(some):.3f}",
                f"{share(some, 'wrong'):.3f}",
                f"{share(some, 'none'):.3f}",
            )
    return table


async def measured(phase: int, prompts: int, streams: int, folder: Path, console: Console) -> dict[str, Any]:
    found = tasks()
    stream = Stream(found, phase, prompts)
    labelled: dict[Kind, Path] = {}
    for task in found:
        labelled[task.kind] = folder / f"{task.name}.jsonl"
        labelled[task.kind].write_text("".join(json.dumps(row) + "\n" for row in task.rows()))
    with Progress(console=console, transient=True) as progress:
        frozen = await train("frozen", folder / "frozen", stream, None, progress)
        growing = await train("growing", folder / "growing", stream, labelled, progress)
        best_groups, best = await oracle(stream, found, folder / "oracle", progress)
    last = stream.steps[-1]
    end = range(last - phase // 3 + 1, last + 1)
    runs = {"frozen": frozen.groups, "growing": growing.groups, "oracle": best_groups}
    at_end = {name: mean_accuracy(group for group in groups if group.step in end) for name, groups in runs.items()}
    console.print(table_of(stream, phase, end, runs))
    delays = {
        shift: min((step - shift for step in growing.drifts if shift < step <= shift + phase), default=None)
        for shift in stream.shifts
    }
    near = {step for shift in stream.shifts for step in range(shift + 1, shift + LATE + 1)}
    stray = [step for run in (frozen, growing) for step in run.drifts if step not in near]
    steps, alarms = false_alarms(found, streams, 100, prompts)
    coder = growing.coder
    assert coder is not None
    events = LibraryView(folder / "growing" / FOLDER_NAME).events
    agents = folder / "growing" / "agents"  # where those who ask an LLM keep their account
    tokens = Purse(agents, "", settings(folder).agents).spent().tokens if agents.exists() else 0
    acquired: dict[str, Any] = {}
    for task, shift in zip(found[1:], stream.shifts, strict=True):
        tries = [one for one in coder.tries if one.kind is task.kind]
        admitted = next((one for one in tries if one.admitted), None)
        acquired[task.name] = {
            "tries": len(tries),
            "steps_to_admitted": admitted.step - shift if admitted else None,
            "steps_to_live": growing.live[admitted.draft] - shift
            if admitted and admitted.draft in growing.live
            else None,
            "asked_by_alarm": bool(tries) and tries[0].asked,
            "tool": admitted.draft if admitted else None,
        }
    written = Table(
        "task", "tries", "first admitted", "first with a say", "drift alarm", "best tool (oracle)", box=None
    )
    for task, shift in zip(found[1:], stream.shifts, strict=True):
        one = acquired[task.name]
        written.add_row(
            task.name,
            str(one["tries"]),
            f"{one['steps_to_admitted']} steps after the shift: {one['tool']}",
            f"{one['steps_to_live']} steps",
            f"{delays[shift]} steps",
            best[task.name],
        )
    console.print(written)
    for one in coder.tries:
        console.print(f"step {one.step}: {one.draft} {'admitted' if one.admitted else 'rejected'}: {one.why[:120]}")
    bad = [one.draft for one in coder.tries if one.admitted and one.draft == SCRIPT[one.kind][0]]
    return {
        "accuracy_at_the_end": {name: round(value, 4) for name, value in at_end.items()},
        "below_oracle_at_the_end": round(at_end["oracle"] - at_end["growing"], 4),
        "growing_above_frozen_at_the_end": round(at_end["growing"] - at_end["frozen"], 4),
        "accuracy": {name: round(mean_accuracy(groups), 4) for name, groups in runs.items()},
        "covered": {name: round(sum(g.covered for g in gs) / len(gs), 4) for name, gs in runs.items()},
        "wrong_gradients": {name: round(share(groups, "wrong"), 4) for name, groups in runs.items()},
        "no_gradient": {name: round(share(groups, "none"), 4) for name, groups in runs.items()},
        "steps_to_drift_alarm": {str(shift): delay for shift, delay in delays.items()},
        "drift_alarms_without_shift": len(stray),
        "false_alarms_per_1000_steps": round(1000 * alarms / steps, 3),
        "stationary_steps": steps,
        "acquired": acquired,
        "bad_drafts_admitted": len(bad),
        "tokens": tokens,
        "events": len(events),
        "oracle": best,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="Fewer steps and prompts.")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", metavar="FOLDER", help="Where the runs' folders stay; default: nowhere.")
    arguments = parser.parse_args()
    logging.getLogger("verl_rlar").setLevel(logging.ERROR)  # what happened is in ledger and library
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(HERE), os.environ.get("PYTHONPATH", "")]
    )  # workers import `generic`
    phase, prompts, streams = (8, 14, 2) if arguments.quick else (18, 24, 50)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(arguments.keep or place)
        folder.mkdir(parents=True, exist_ok=True)
        figures = asyncio.run(measured(phase, prompts, streams, folder, Console(stderr=arguments.json, width=140)))
    delays = figures["steps_to_drift_alarm"].values()
    ok = (
        figures["below_oracle_at_the_end"] <= NEAR
        and figures["growing_above_frozen_at_the_end"] >= BELOW
        and all(delay is not None and delay <= LATE for delay in delays)
        and figures["drift_alarms_without_shift"] == 0
        and figures["false_alarms_per_1000_steps"] <= FALSE
        and figures["bad_drafts_admitted"] == 0
    )
    if arguments.json:
        print(json.dumps({"name": "evolution", "figures": figures, "goals": GOALS, "ok": ok}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
