# SPDX-License-Identifier: Apache-2.0
"""`rlar bench`: what rewards take on this machine, with these settings, on the user's own responses.

The figures of the README have scripts of their own, `recipes/benchmarks`, which need a checkout, their data and goals.
This is the part of them that a machine of one's own needs: it comes with the wheel, takes anybody's data, and has no
goals, so it never fails for being slow.

Guarantees: everything is the real thing, as in training: `Dispatcher`, worker processes, boxes, served models, and the
ledger on the disk of the run; nothing stays behind. The first answers of each tool, which wait for processes, boxes or
servers to start, are shown apart and counted nowhere else.

Not covered: verl and Ray between the rollout and the reward; several nodes; other work on the machine meanwhile.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from verl_rlar.cli.app import (
    BAD,
    OK,
    BadLine,
    Json,
    OnlyIn,
    Output,
    Set,
    app,
    complain,
    complain_of,
    configured,
    print_json,
    progress_bar,
    run,
    visible,
)
from verl_rlar.cli.score import live_tools, sample_of
from verl_rlar.config import RlarConfig
from verl_rlar.dispatcher import Dispatcher
from verl_rlar.errors import ConfigError, DataError
from verl_rlar.ledger import FILE_NAME, Ledger, Row
from verl_rlar.row_files import read_rows
from verl_rlar.streams import in_background, in_order
from verl_rlar.types import Kind, Outcome, Route, Sample, Score

MOST_LINES = 2000
BATCH = 64
"""Rows that go into the ledger together."""
GROUP = 8
"""Responses of one prompt in the ledger, as GRPO has them."""
MODELS_AT_ONCE = 64
"""Calls of served models at the same time, which their servers put into batches."""


@app.command("bench", short_help="Time the rewards on this machine.")
def bench_command(
    file: Annotated[
        str | None,
        typer.Argument(metavar="FILE", help="Responses, as of `rlar score`. Default: a small public set."),
    ] = None,
    folder: OnlyIn = None,
    calls: Annotated[int, typer.Option("--calls", min=1, metavar="N", help="Calls of each tool.")] = 200,
    as_json: Json = False,
    settings: Set = None,
) -> None:
    """Time the rewards on this machine: routing, every tool that your responses need, and the ledger.

    Prints for each tool: the seconds of its first answers (worker processes, boxes or servers start), then responses
    per second with as many calls at a time as it has processes, boxes or batches for, and a call's median and 95th
    percentile. `route` is the decision for a prompt that was never seen, `ledger` a row written to the disk of
    rlar.run_dir.
    With --in, the verifiers and reward models that are live in that library are timed, too.
    Exit code: 1 if a tool failed, or a line cannot be read; being slow is no failure.

    \b
    Examples:
      rlar bench
      rlar bench answers.jsonl --calls 1000
      rlar bench answers.jsonl --in checkpoints/qwen3-8b/rlar --set rules.processes=8
      rlar bench --set sandbox.backend=none --json | jq '{what, per_s}'
    """
    run(lambda: _bench(file, folder, calls, as_json, configured(settings)))


@dataclass(frozen=True, kw_only=True)
class Timed:
    """What something took."""

    what: str
    """``route``, ``ledger``, or the tools of a route, joined by ``+``."""
    calls: int
    first_s: float | None
    """Seconds of the first round of calls, as many as are made at a time; None: nothing has to start."""
    per_s: float
    p50_ms: float
    p95_ms: float
    outcomes: dict[str, int]
    """Of the calls, by name; empty: it has none."""
    note: str = ""
    """Why calls failed, the most frequent reason."""


async def _bench(file: str | None, folder: str | None, calls: int, as_json: bool, config: RlarConfig) -> int:
    folder = folder or config.library.path
    samples, bad = _samples(file)
    if file is not None and not samples:
        raise ConfigError(f"{file}: there is no response in it that could be timed")
    console = Output()
    table = Table("what", "calls", "first s", "per s", "p50 ms", "p95 ms", "outcomes", box=None, pad_edge=False)
    failed = False
    with progress_bar() as on_progress:
        async for timed in _timed(samples, folder, calls, config, on_progress):
            failed = failed or bool(timed.outcomes.get(Outcome.FAILED.value))
            if as_json:
                print_json(asdict(timed))
                continue
            cells = (
                timed.what,
                f"{timed.calls:,}",
                "" if timed.first_s is None else f"{timed.first_s:.2f}",
                f"{timed.per_s:,.0f}" if timed.per_s >= 10 else f"{timed.per_s:.2f}",
                f"{timed.p50_ms:.3g}",
                f"{timed.p95_ms:.3g}",
                " ".join(f"{name} {count}" for name, count in timed.outcomes.items()),
            )
            table.add_row(*(Text(visible(cell)) for cell in cells))
            if timed.note:
                complain(f"{timed.what}: {timed.note}")
    if not as_json:
        console.table(table)
    return BAD if failed or bad else OK


def _samples(file: str | None) -> tuple[list[Sample], int]:
    """The first responses of a file, or of the public set, and how many lines are bad."""
    if file is None:
        from verl_rlar.exam.public import public_cases

        return [Sample(query=query, response=response) for query, response in public_cases(frozenset(Kind))], 0
    found: list[Sample] = []
    bad = 0
    for number, row in islice(read_rows(file), MOST_LINES):
        try:
            found.append(sample_of(row))
        except DataError as error:
            bad += 1
            complain_of(BadLine(line=number, error=str(error)))
    return found, bad


async def _timed(
    samples: Sequence[Sample],
    folder: str | None,
    calls: int,
    config: RlarConfig,
    on_progress: Callable[[str, int, int | None], None],
) -> AsyncIterator[Timed]:
    """Times routing, then each tool, then the ledger."""
    async with Dispatcher(config, *(live_tools(folder, None, config) if folder else ())) as dispatcher:
        by_tools: dict[str, list[tuple[Sample, Route]]] = {}
        seconds = []
        for sample in samples:
            _ = sample.query.key  # the hash of a query is a part of decoding it
            began = time.perf_counter()
            route = await dispatcher.route(sample.query)
            seconds.append(time.perf_counter() - began)
            if route.covered:
                by_tools.setdefault("+".join(part.tool for part in route.parts), []).append((sample, route))
        firsts = {sample.query.key: took for sample, took in zip(reversed(samples), reversed(seconds), strict=True)}
        yield _of("route", list(firsts.values()), sum(firsts.values()))
        scored: list[tuple[Sample, Route, Score]] = []
        for name, work in by_tools.items():
            at_once = _at_once(work[0][1], dispatcher)
            began = time.perf_counter()
            await asyncio.gather(*(dispatcher.score(*item) for item in islice(cycle(work), at_once)))
            first_s = time.perf_counter() - began
            kept: list[tuple[Sample, Route, Score]] = []

            async def score(item: tuple[Sample, Route]) -> tuple[Sample, Route, Score]:
                return (*item, await dispatcher.score(*item))

            began = time.perf_counter()
            many = in_order(score, in_background(islice(cycle(work), calls)), at_once=at_once)
            async for done in many:
                kept.append(done)
                on_progress(name, len(kept), calls)
            took = time.perf_counter() - began
            scored += kept
            yield _of(name, [score.seconds for *_, score in kept], took, first_s, [score for *_, score in kept])
    if scored:
        yield _ledger(scored, Path(config.run_dir), config.ledger.store_responses)


def _at_once(route: Route, dispatcher: Dispatcher) -> int:
    """How many calls to make at the same time: rules have a process each, boxes and servers wait in queues of ours."""
    specs = [dispatcher.snapshot.tool(part.tool) for part in route.parts]
    if all(spec.kind == "rule" and not spec.boxed for spec in specs):
        return dispatcher.at_once
    return MODELS_AT_ONCE if any(spec.kind == "reward_model" for spec in specs) else 1 + (os.cpu_count() or 1)


def _ledger(scored: Sequence[tuple[Sample, Route, Score]], run_dir: Path, store_texts: bool) -> Timed:
    """Writes rows as a training does, to a file of its own where the ledger of a run would be."""
    place = next(parent for parent in (run_dir.absolute(), *run_dir.absolute().parents) if parent.is_dir())
    rows = [
        Row(
            sample=replace(sample, step=1, uid=str(number // GROUP), session=number % GROUP),
            route=route,
            score=score,
            sent=score.value or 0.0,
            sent_as="value",
            received=time.time(),
            seconds=score.seconds,
        )
        for number, (sample, route, score) in enumerate(islice(cycle(scored), max(len(scored), 2 * BATCH)))
    ]
    seconds: list[float] = []
    began = time.perf_counter()
    try:
        with (
            tempfile.TemporaryDirectory(dir=place, prefix=".rlar-bench-") as folder,
            Ledger(Path(folder) / FILE_NAME, token="bench", store_texts=store_texts) as ledger,
        ):
            for first in range(0, len(rows), BATCH):
                started = time.perf_counter()
                batch = rows[first : first + BATCH]
                ledger.add(batch)
                seconds += [(time.perf_counter() - started) / len(batch)] * len(batch)
            took = time.perf_counter() - began
    except OSError as error:
        raise ConfigError(f"{place} cannot be written ({error}); name another folder: --set run_dir=FOLDER") from None
    return _of("ledger", seconds, took)


def _of(
    what: str,
    seconds: Sequence[float],
    took: float,
    first_s: float | None = None,
    scores: Sequence[Score] = (),
) -> Timed:
    ordered = sorted(seconds)
    reasons = Counter(score.reason for score in scores if score.outcome is Outcome.FAILED)
    return Timed(
        what=what,
        calls=len(seconds),
        first_s=first_s,
        per_s=len(seconds) / took,
        p50_ms=1000 * statistics.median(ordered),
        p95_ms=1000 * ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))],
        outcomes=dict(Counter(score.outcome.value for score in scores)),
        note=reasons.most_common(1)[0][0] if reasons else "",
    )
