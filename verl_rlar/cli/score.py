# SPDX-License-Identifier: Apache-2.0
"""`rlar score`: responses in, scores out, by the tools that fit their queries."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from verl_rlar.advice import FILE_NAME as ADVICE_FILE
from verl_rlar.advice import Advice
from verl_rlar.cli.app import (
    BAD,
    OK,
    STYLES,
    BadLine,
    Json,
    OnlyIn,
    Output,
    Set,
    app,
    complain,
    complain_of,
    configured,
    open_library,
    print_json,
    run,
    visible,
)
from verl_rlar.clusters import FILE_NAME as CLUSTERS_FILE
from verl_rlar.clusters import Clusters
from verl_rlar.competence import Competence, Store, read_labelled
from verl_rlar.config import RlarConfig
from verl_rlar.dispatcher import Dispatcher
from verl_rlar.errors import ConfigError, DataError
from verl_rlar.router import settings_of
from verl_rlar.row_files import read_some
from verl_rlar.rows import query_of, there_is
from verl_rlar.streams import in_background, in_order
from verl_rlar.trusted import trusted_snapshot
from verl_rlar.types import Outcome, Route, Sample, Score, Snapshot

NOTHING = (
    "nothing in {file} can be scored: it must be JSON lines (one object per line) or *.parquet, with `prompt` or "
    "`messages` and `response`; `rlar plan` takes rows without responses"
)
NARROW = 110
"""Columns of a terminal below which there is no room for a reason beside its score."""


@app.command("score", short_help="Score responses, as in training.")
def score_command(
    file: Annotated[str, typer.Argument(metavar="FILE", help="JSON lines (also .gz) or parquet; - is standard input.")],
    folder: OnlyIn = None,
    step: Annotated[
        int | None, typer.Option(min=0, help="With --in: the tools that were live at that step. Default: after all.")
    ] = None,
    as_json: Json = False,
    settings: Set = None,
) -> None:
    """Score responses by the tools that fit their queries, as in training.

    Every line is an object with `messages` (or `prompt`) and `response`, and, where the data has them, `reference`,
    `data_source` and `extra` (tests, constraints, languages, ...). verl's own columns are understood, too.

    Prints for every line: number, value in [0, 1] (- if unscored), outcome, tool, milliseconds, reason.
    Bad lines are reported with their numbers, and the rest goes on; the exit code is 1 then, and also if a tool failed.
    With --in, the verifiers that are live in that library score, too, each in a box; rules run as they are installed.

    \b
    Examples:
      rlar score answers.jsonl
      rlar score answers.jsonl --json > scores.jsonl
      rlar score answers.jsonl --set scoring.timeout_s=3 --set rules.processes=8
      rlar score answers.jsonl --in checkpoints/qwen3-8b/rlar --step 40
      zcat answers.jsonl.gz | rlar score - | sort -t$'\\t' -k2 -n | head
    """
    run(lambda: _score(file, folder, step, as_json, configured(settings)))


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A line and its score."""

    line: int
    sample: Sample
    route: Route
    score: Score


async def _score(file: str, folder: str | None, step: int | None, as_json: bool, config: RlarConfig) -> int:
    folder = folder or config.library.path
    if step is not None and not folder:
        raise ConfigError("--step is about the tools of a library: add --in FOLDER, or leave it away")
    report = _JsonScores() if as_json else _TableScores()
    bad = 0
    tally: dict[str, Counter[str]] = {}
    values: list[float] = [0.0, 0.0]  # sum and count
    async with Dispatcher(config, *(live_tools(folder, step, config) if folder else ())) as dispatcher:

        async def score(item: tuple[int, Mapping[str, Any] | DataError]) -> Scored | BadLine:
            number, row = item
            try:
                sample = sample_of(row)
            except DataError as error:
                return BadLine(line=number, error=str(error))
            route = await dispatcher.route(sample.query)
            return Scored(line=number, sample=sample, route=route, score=await dispatcher.score(sample, route))

        async for result in in_order(score, in_background(read_some(file)), at_once=dispatcher.at_once):
            if isinstance(result, BadLine):
                bad += 1
                report.bad(result)
                continue
            report.scored(result)
            tally.setdefault(result.route.name, Counter())[result.score.outcome.value] += 1
            if result.score.value is not None:
                values[0] += result.score.value
                values[1] += 1
    if bad and not tally:
        complain(NOTHING.format(file=file))
    _summarise(tally, bad, values[0] / values[1] if values[1] else None)
    failed = any(counts[Outcome.FAILED.value] for counts in tally.values())
    return BAD if bad or failed else OK


def live_tools(
    folder: str, step: int | None, config: RlarConfig
) -> tuple[Snapshot, dict[str, str], Competence, Clusters]:
    """The tools that are live in a library, with the advice that counts, the code of its verifiers by hash, what is
    known of them, and its clusters as they are now."""
    library = open_library(folder)
    live = library.latest() if step is None else library.snapshot(step)
    today = {tool.name: tool for tool in trusted_snapshot(config).tools}
    for tool in live.tools:
        if tool.kind == "rule" and tool.name not in today and not tool.target.startswith("verl_rlar."):
            complain(f"{tool.name} is live there and left out here: add --set 'tools=[\"{tool.target}\"]'")
    tools = [today.get(tool.name) if tool.kind == "rule" else tool for tool in live.tools]
    code = {tool.source_sha256: library.source(tool.digest) for tool in live.tools if tool.kind == "verifier"}
    labelled = read_labelled(Path(config.routing.labelled)) if config.routing.labelled else ()
    clusters = Clusters(library.path / CLUSTERS_FILE, writes=False)
    advice = Advice(library.path / ADVICE_FILE, writes=False)
    store = Store(library.card, labelled, exam_of=library.labelled, cluster_of=clusters.of, rulings=advice.of)
    settings = settings_of(config.routing, labelled)
    there = Snapshot(tools=tuple(tool for tool in tools if tool is not None), settings=settings)
    snapshot = advice.on(there, step)
    sources = {sha: source for sha, source in code.items() if source is not None}
    return snapshot, sources, store.of(snapshot), clusters


def sample_of(row: Mapping[str, Any] | DataError) -> Sample:
    """A row with a response as a sample.

    Raises:
        DataError: It is none.
    """
    if isinstance(row, DataError):
        raise row
    response = row.get("response")
    if response is None:
        raise DataError(f"no `response`{there_is(row)}")
    if not isinstance(response, str):
        raise DataError(f"`response` is {type(response).__name__}, not a text")
    return Sample(query=query_of(row), response=response)


class _JsonScores:
    """One JSON object for every line of the input."""

    def scored(self, result: Scored) -> None:
        route, score = result.route, result.score
        print_json(
            {
                "line": result.line,
                "value": score.value,
                "outcome": score.outcome.value,
                "tool": route.name,
                "reason": score.reason,
                "ms": round(1000 * score.seconds, 3),
                "data_source": result.sample.query.data_source,
                "kind": route.kind.value,
                "covered": route.covered,
                "route": route.reason,
                "parts": [
                    {
                        "tool": part.tool,
                        "version": part.digest,
                        "outcome": part.outcome.value,
                        "raw": part.raw,
                        "value": part.value,
                        "reason": part.reason,
                        "ms": round(1000 * part.seconds, 3),
                        "details": dict(part.details),
                    }
                    for part in score.parts
                ],
            }
        )

    def bad(self, line: BadLine) -> None:
        print_json({"line": line.line, "error": line.error})
        complain_of(line)


class _TableScores:
    """A table for people: aligned and cut to the width of a terminal (where that is narrow, the reason stands in a line
    of its own), else separated by tabs and whole."""

    def __init__(self) -> None:
        self._console = Output()
        self._begun = False

    def scored(self, result: Scored) -> None:
        score = result.score
        value = "-" if score.value is None else f"{score.value:.4g}"
        cells = (str(result.line), value, score.outcome.value, result.route.name, f"{1000 * score.seconds:.1f}")
        self._row(*cells, visible(score.reason))

    def bad(self, line: BadLine) -> None:
        complain_of(line)

    def _row(self, *cells: str) -> None:
        if not self._begun:
            self._begun = True
            self._row("line", "value", "outcome", "tool", "ms", "reason")
        if not self._console.is_terminal:
            print("\t".join(cells), flush=True)
            return
        line, value, outcome, tool, ms, reason = cells
        text = Text(f"{line:>6}  {value:>7}  ")
        text.append(f"{outcome:<9}", style=STYLES.get(outcome, "bold"))
        narrow = self._console.width < NARROW
        text.append(f"  {tool}" if narrow else f"  {tool:<24}  {ms:>8}  {reason}")
        self._console.print(text, no_wrap=True, overflow="ellipsis")
        if narrow and line != "line":
            self._console.print(Text(f"{'':>8}{reason}", style="dim"), no_wrap=True, overflow="ellipsis")


def _summarise(tally: Mapping[str, Counter[str]], bad: int, mean: float | None) -> None:
    lines = sum(counts.total() for counts in tally.values())
    complain(f"{lines:,} lines, and {bad:,} bad ones; mean value {'-' if mean is None else f'{mean:.4f}'}")
    outcomes = [outcome.value for outcome in Outcome]
    table = Table("tool", *outcomes, box=None, pad_edge=False)
    for tool, counts in sorted(tally.items(), key=lambda item: -item[1].total()):
        table.add_row(Text(tool), *(str(counts[outcome]) for outcome in outcomes))
    if tally:
        Console(stderr=True, highlight=False).print(table)
