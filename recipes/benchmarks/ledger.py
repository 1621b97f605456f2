# SPDX-License-Identifier: Apache-2.0
"""What the ledger costs on the scoring path, and whether a large one can still be asked.

    python recipes/benchmarks/ledger.py                  # fills a ledger with 1,000,000 rows first: some minutes
    python recipes/benchmarks/ledger.py --rows 20000     # fewer
    python recipes/benchmarks/ledger.py --json           # prints one object last

Three parts:

- *path*: the real client of the real service in a real Ray takes rows one by one, as a reward worker does. A row costs
  what `Client.record` takes, and its share of what the sender costs the worker's event loop later on (pickling and the
  call, in CPU time of that thread).
- *file*: rows through `Ledger.add`: queries of all of `recipes/data`, texts of real answers (cut and joined anew, but
  for a share of repeats), groups of 8, 520 steps, several versions of the tools, all outcomes, tools in the shadow for
  a tenth, canaries. Rows per second are those of `Ledger.add` alone. The size without texts comes from a second file.
- *questions*: what a report asks, each on a new connection, after the system has dropped what it had of the file; and
  what it takes to drop the texts of old steps (`Ledger.trim`), and whether the file then grows by rows alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from routing import lines, mixture

from verl_rlar.config import RlarConfig
from verl_rlar.ledger import FILE_NAME, CanaryRow, Ledger, Row, ShadowRow, read
from verl_rlar.library import builtin_snapshot
from verl_rlar.rows import query_of
from verl_rlar.types import Kind, Outcome, Query, Route, RoutePart, Sample, Score, Snapshot, Split, ToolScore

GROUP, STEPS, VERSIONS = 8, 520, 6
REPEATS = 0.2
"""Share of responses that are one of the real texts as it is, and so come again and again."""
EVERY_VAL = 25
"""Every so many groups one belongs to validation."""
ARRIVALS_PER_S = 200.0
"""Rows that a reward worker gets, in the first part."""
GOALS = {"path_p50_ms": 0.2, "slowest_question_s": 2.0, "trim_a_step_s": 1.0, "grown_to_bare": 1.1}
"""What must be more than the figure. Besides, no row may be lost."""
NOTES = {
    Outcome.SCORED: "the answer is {}, the reference says {}",
    Outcome.ABSTAINED: "the reference is no number: {} {}",
    Outcome.FAILED: "still at work after 5 s",
    Outcome.HACKED: "the response is a copy of the question ({} of {} words)",
}
TRAIN = "FROM scores WHERE split = 'train'"
QUESTIONS: dict[str, tuple[str, ...]] = {
    "reward and count per step": (
        "SELECT split, step, COUNT(*), COUNT(value), AVG(value), AVG(sent) FROM scores GROUP BY split, step",
    ),
    "per step, tool and outcome": (
        f"SELECT step, route, outcome, COUNT(*), AVG(value) {TRAIN} GROUP BY step, route, outcome",
    ),
    "per step and data source": (
        f"SELECT step, data_source, COUNT(*), COUNT(value), AVG(value) {TRAIN} GROUP BY step, data_source",
    ),
    "groups of a step with their parts": (
        f"SELECT attempt, uid, session, query, route, value, sent, reason, parts {TRAIN} AND step = 300 "
        "ORDER BY attempt, uid, session",
    ),
    "one group": ("SELECT * FROM scores WHERE attempt IN (SELECT attempt FROM attempts) AND uid = :uid",),
    "groups without variance per step": (
        "SELECT step, COUNT(*), SUM(same) FROM (SELECT step, MIN(value) IS MAX(value) AS same "
        f"{TRAIN} GROUP BY split, step, attempt, uid) GROUP BY step",
    ),
    "the tools with their share": (
        "SELECT digest, name, kind, spec FROM tools",
        "SELECT snapshot, name, parts, COUNT(*) FROM routes GROUP BY snapshot, name",
        f"SELECT route, COUNT(*), MIN(step), MAX(step) {TRAIN} GROUP BY route",
    ),
    "the latest failures": (
        f"SELECT step, uid, session, route, reason, parts {TRAIN} AND outcome = 'failed' ORDER BY step DESC LIMIT 50",
    ),
    "shadows per step and tool": (
        "SELECT step, digest, outcome, COUNT(*), AVG(value) FROM shadows GROUP BY step, digest, outcome",
    ),
    "canaries": ("SELECT * FROM canaries ORDER BY digest, canary, step",),
    "ten steps to be scored again": (
        "SELECT scores.*, texts.body AS text, queries.body AS asked FROM scores "
        "LEFT JOIN texts ON texts.sha = scores.response LEFT JOIN texts AS queries ON queries.sha = scores.query "
        "WHERE split = 'train' AND scores.step BETWEEN 300 AND 309 ORDER BY scores.step, uid, session",
        f"SELECT * FROM routes WHERE (snapshot, split, query) IN (SELECT snapshot, split, query {TRAIN} "
        "AND step BETWEEN 300 AND 309)",
    ),
}
"""What a report asks, by what it is for."""


class Run:
    """Makes the rows of a training that never was; always the same ones.

    Args:
        rows: How many.
    """

    def __init__(self, rows: int) -> None:
        self._dice = random.Random(0)
        self._groups = max(1, rows // GROUP)
        self._texts = _texts()
        self._queries: list[tuple[Query, tuple[str, ...]]] = []
        for source, tool, row in mixture():
            query = query_of(row | {"data_source": source.partition(" ")[0]})
            gated = ("length_limits", tool) if tool == "instruction_constraints" else (tool,)
            self._queries.append((query, () if tool == "-" else gated))
        tools = builtin_snapshot().tools
        shadows = tuple(replace(tool, name=f"{tool.name}_new", description="Another one.") for tool in tools[2:8:5])
        self.snapshots = [
            Snapshot(
                tools=tuple(replace(t, description=f"{t.description} {version}") if n < 9 else t for n, t in all_tools),
                shadows=shadows,
            )
            for version, all_tools in enumerate([tuple(enumerate(tools))] * VERSIONS)
        ]

    def groups(self) -> Iterator[tuple[Snapshot, Split, Query, Route, list[Row], list[ShadowRow]]]:
        """Group by group, in the order of steps."""
        for number in range(self._groups):
            step = 1 + number * STEPS // self._groups
            snapshot = self.snapshots[(step - 1) * VERSIONS // STEPS]
            split: Split = "val" if number % EVERY_VAL == 0 else "train"
            query, names = self._dice.choice(self._queries)
            parts = tuple(
                RoutePart(tool=name, digest=snapshot.tool(name).digest, gate=name == "length_limits") for name in names
            )
            reason = f"{names[-1]}: the row has what it needs" if names else "no tool fits"
            kind = Kind.MATH if names else Kind.OPEN
            route = Route(parts=parts, reason=reason, kind=kind, covered=bool(names), snapshot=snapshot.version)
            rows, shadows = self._group(number, step, split, query, route, snapshot)
            yield snapshot, split, query, route, rows, shadows

    def _group(
        self, number: int, step: int, split: Split, query: Query, route: Route, snapshot: Snapshot
    ) -> tuple[list[Row], list[ShadowRow]]:
        dice, rows, shadows = self._dice, [], []
        uid, ease = str(uuid.UUID(int=dice.getrandbits(128))), dice.choice((0.0, 0.1, 0.4, 0.7, 1.0))
        for session in range(GROUP):
            sample = Sample(
                query=query,
                response=self._response(route),
                step=step,
                uid=uid,
                session=session,
                group_size=8,
                split=split,
            )
            outcome = dice.choices(tuple(Outcome), (95, 2, 2, 1))[0] if route.parts else Outcome.ABSTAINED
            value = {Outcome.SCORED: float(dice.random() < ease), Outcome.HACKED: 0.0}.get(outcome)
            if value is not None and route.name == "translation":
                value = dice.random()
            reason = NOTES[outcome].format(dice.randrange(1000), dice.randrange(1000))
            parts = tuple(self._part(part.tool, part.digest, outcome, value, reason) for part in route.parts)
            score = Score(value=value, outcome=outcome, reason=reason, parts=parts)
            sent = 0.5 if value is None else value
            sent_as = "value" if value is not None else "siblings" if route.parts and split == "train" else "neutral"
            received = 1.75e9 + number + dice.random()
            seconds = dice.random() / 100
            rows.append(
                Row(
                    sample=sample,
                    route=route,
                    score=score,
                    sent=sent,
                    sent_as=sent_as,
                    received=received,
                    seconds=seconds,
                )
            )
            if number % 10 == 1:
                tool = snapshot.shadows[number % len(snapshot.shadows)]
                in_shadow = self._part(tool.name, tool.digest, Outcome.SCORED, dice.random(), reason)
                shadows.append(ShadowRow(uid=uid, session=session, step=step, score=in_shadow))
        return rows, shadows

    def canaries(self, step: int, snapshot: Snapshot) -> list[CanaryRow]:
        """What four canaries of each tool gave at a step."""
        return [
            CanaryRow(
                canary=f"{tool.name}-{number}",
                step=step,
                score=self._part(tool.name, tool.digest, Outcome.SCORED, float(number % 2), ""),
            )
            for tool in snapshot.tools
            for number in range(4)
        ]

    def _part(self, tool: str, digest: str, outcome: Outcome, value: float | None, reason: str) -> ToolScore:
        seconds = self._dice.random() / 100
        return ToolScore(
            tool=tool, digest=digest, outcome=outcome, raw=value, value=value, reason=reason, seconds=seconds
        )

    def _response(self, route: Route) -> str:
        texts = self._texts.get(route.name.partition("+")[2] or route.name, self._texts["-"])
        one, other = self._dice.choice(texts), self._dice.choice(texts)
        if self._dice.random() < REPEATS:
            return one
        return one[: self._dice.randrange(len(one) + 1)] + other[self._dice.randrange(len(other) + 1) :]


def _texts() -> dict[str, list[str]]:
    """Real answers, by the tool that scores such."""
    pairs = list(lines("ifbench_preferences.jsonl.gz"))
    code = [line["canonical_solution"] for name in ("humaneval", "mbpp") for line in lines(f"{name}.jsonl.gz")]
    return {
        "final_answer": [line["response"] for line in lines("gsm8k_model_solutions.jsonl.gz")],
        "translation": [
            output["text"] for line in lines("ted_mqm_ende.jsonl.gz") for output in line["outputs"].values()
        ],
        "instruction_constraints": [text for pair in pairs for text in (*pair["chosen"], *pair["rejected"])],
        "unit_tests": code,
        "-": [line["text"] for line in lines("answers.jsonl.gz")],
    }


# --- The path ---------------------------------------------------------------------------------------------------------


def path_figures(samples: int, folder: Path) -> dict[str, float]:
    """What a row costs in a reward worker, and what becomes of the rows."""
    import ray

    from verl_rlar.service import Client

    rows = [row for *_, rows, _ in Run(samples).groups() for row in rows][:samples]
    rows = [replace(row, sample=replace(row.sample, step=1)) for row in rows]
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        client = Client(RlarConfig(run_dir=str(folder), service_timeout_s=120))
        asyncio.run(_record(client, rows[:50], []))
        times: list[tuple[float, float]] = []
        asyncio.run(_record(client, rows, times))
        with read(folder) as db:
            kept = db.execute("SELECT COUNT(*) FROM scores").fetchone()[0]
    finally:
        ray.shutdown()
    record, whole = (np.array(column) for column in zip(*times, strict=True))
    return {
        "record_p50_ms": float(np.percentile(record, 50)),
        "record_p99_ms": float(np.percentile(record, 99)),
        "path_p50_ms": float(np.percentile(whole, 50)),
        "path_p99_ms": float(np.percentile(whole, 99)),
        "rows_lost": len(rows) - kept,
    }


async def _record(client: Any, rows: Sequence[Row], times: list[tuple[float, float]]) -> None:
    """Hands rows over at the pace of training; notes milliseconds of `record`, and with the row's share of what the
    thread spends until the rows are gone, less what the pauses cost by themselves."""

    async def pause() -> float:
        before = time.thread_time()
        await asyncio.sleep(1 / ARRIVALS_PER_S)
        return 1000 * (time.thread_time() - before)

    idle = float(np.median([await pause() for _ in range(100)]))
    spent, records = 0.0, list[float]()
    for row in rows:
        before = time.perf_counter()
        client.record(row)
        records.append(1000 * (time.perf_counter() - before))
        spent += await pause() - idle
        if not client._rows:  # a batch went out
            times += [(ms, ms + spent / len(records)) for ms in records]
            spent, records = 0.0, []
    await client.flush()


# --- The file ---------------------------------------------------------------------------------------------------------


def fill(path: Path, rows: int, *, store_texts: bool = True, at_once: int = 64) -> dict[str, float]:
    """Fills a ledger; returns figures of `Ledger.add`, called with so many rows at once."""
    run, seconds, latest, routed = Run(rows), 0.0, 0, set()
    batch: list[Row] = []
    batches: list[float] = []
    with Ledger(path, token="run", store_texts=store_texts) as ledger, _bar() as bar:
        task = bar.add_task(path.stem, total=rows)
        for snapshot, split, query, route, group, shadows in run.groups():
            step = group[0].sample.step
            if step != latest:
                ledger.add_tools(snapshot)
                ledger.add_canaries(run.canaries(step, snapshot))
                latest = step
            if (key := (snapshot.version, split, query.key)) not in routed:
                routed.add(key)
                ledger.add_route(query, route, split)
            batch += group
            while len(batch) >= at_once:
                start = time.perf_counter()
                ledger.add(batch[:at_once])
                batches.append(time.perf_counter() - start)
                seconds += batches[-1]
                bar.advance(task, at_once)
                del batch[:at_once]
            if shadows:
                ledger.add_shadows(shadows)
        ledger.add(batch)
    kept = rows // GROUP * GROUP
    last = batches[-max(1, len(batches) // 10) :]
    return {
        "rows_per_s": kept / seconds,
        "rows_per_s_at_the_end": at_once * len(last) / sum(last),
        "add_us_per_row": 1e6 * seconds / kept,
        "bytes_per_row": path.stat().st_size / kept,
    }


def _bar() -> Progress:
    return Progress(console=Console(stderr=True), transient=True)


# --- The questions ----------------------------------------------------------------------------------------------------


def ask(path: Path) -> dict[str, tuple[float, float]]:
    """Seconds of each question, and those of them that the processor was at work."""
    with read(path) as db:
        uid = db.execute(f"SELECT uid {TRAIN} AND step = 300 LIMIT 1").fetchone()[0]
    seconds = {}
    for name, statements in QUESTIONS.items():
        _forget(path)
        start, worked = time.perf_counter(), time.process_time()
        with read(path) as db:
            for sql in statements:
                found = db.execute(sql, {"uid": uid} if ":uid" in sql else {}).fetchall()
                assert found, name
        seconds[name] = time.perf_counter() - start, time.process_time() - worked
    return seconds


def _forget(path: Path) -> None:
    """Asks the system to drop what it holds of a file in memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def trim(path: Path, rows: int) -> dict[str, float]:
    """Drops texts step by step while as many new ones come, and looks at the size of the file."""
    groups, steps, slowest, dropped = list(Run(rows // 10).groups()), STEPS // 10, (0.0, 0.0), 0
    with Ledger(path, token="later") as ledger:
        before = _rows_and_bytes(path)
        for number in range(steps):
            for *_, group, _ in groups[number * len(groups) // steps : (number + 1) * len(groups) // steps]:
                changes = {"step": STEPS + 1 + number}
                new = [replace(row.sample, response=f"{number} {row.sample.response}", **changes) for row in group]
                ledger.add(replace(row, sample=sample) for row, sample in zip(group, new, strict=True))
            start, worked = time.perf_counter(), time.process_time()
            dropped += ledger.trim(before_step=number + 2, max_bytes=float("inf"))
            took = time.perf_counter() - start, time.process_time() - worked
            slowest = max(slowest[0], took[0]), max(slowest[1], took[1])
        after = _rows_and_bytes(path)
    came = GROUP * len(groups)
    return {
        "trim_a_step_s": slowest[0],
        "trim_a_step_cpu_s": slowest[1],
        "texts_dropped": dropped,
        "bytes_grown_per_row": (after[1] - before[1]) / came,
        "rows_lost_by_trim": before[0] + came - after[0],
    }


def _rows_and_bytes(path: Path) -> tuple[int, int]:
    with read(path) as db:
        rows, pages, size = (
            db.execute(sql).fetchone()[0]
            for sql in ("SELECT COUNT(*) FROM scores", "PRAGMA page_count", "PRAGMA page_size")
        )
    return rows, pages * size


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the file (default 1,000,000)")
    parser.add_argument("--samples", type=int, default=2000, help="rows on the path (default 2000)")
    parser.add_argument("--folder", help="where the file goes, and stays (default: a temporary folder)")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        figures: dict[str, float] = {"rows": args.rows}
        figures |= path_figures(args.samples, Path(temporary) / "path")
        file = folder / FILE_NAME
        figures |= fill(file, args.rows)
        fours = fill(Path(temporary) / "fours.sqlite", min(args.rows, 20_000), at_once=4)
        bare = fill(Path(temporary) / "without_texts.sqlite", max(GROUP, args.rows // 10), store_texts=False)
        figures["add_us_per_row_in_fours"] = fours["add_us_per_row"]
        figures["bytes_per_row_without_texts"] = bare["bytes_per_row"]
        seconds = ask(file)
        figures |= {f"{name.replace(' ', '_').replace(',', '')}_s": wall for name, (wall, _) in seconds.items()}
        figures["slowest_question_s"], figures["slowest_question_cpu_s"] = map(max, zip(*seconds.values(), strict=True))
        figures |= trim(file, args.rows)
        figures["grown_to_bare"] = figures["bytes_grown_per_row"] / bare["bytes_per_row"]
    ok = all(figures[name] < goal for name, goal in GOALS.items())
    ok = ok and not figures["rows_lost"] and not figures["rows_lost_by_trim"]
    table = Table("figure", "value", "goal", title="The ledger", box=None)
    for name, value in figures.items():
        goal = f"< {GOALS[name]:g}" if name in GOALS else "0" if name.startswith("rows_lost") else ""
        table.add_row(name, f"{value:.4g}", goal)
    Console().print(table)
    if args.json:
        print(json.dumps({"name": "ledger", "figures": figures, "goals": GOALS, "ok": ok}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
