# SPDX-License-Identifier: Apache-2.0
"""`rlar build`: fills the gaps of a data set before a training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from verl_rlar.cli.app import (
    BAD,
    OK,
    BadLine,
    Json,
    Output,
    Set,
    app,
    complain_of,
    configured,
    library_folder,
    new_library_folder,
    print_json,
    progress_bar,
    run,
    submitted,
    visible,
)
from verl_rlar.cli.exam import Then
from verl_rlar.cli.score import live_tools
from verl_rlar.config import RlarConfig
from verl_rlar.dispatcher import Dispatcher
from verl_rlar.errors import DataError
from verl_rlar.library import EventKind, builtin_snapshot
from verl_rlar.row_files import STDIN, read_some
from verl_rlar.types import Kind

if TYPE_CHECKING:
    from verl_rlar.acquisition import Acquired, Gap  # the hub's client and the exam take a while to import


UNCOVERED = 0.5
"""Headroom of queries that no tool fits."""


@app.command("build", short_help="Look for tools where a data set has none.")
def build_command(
    data: Annotated[
        list[str], typer.Argument(metavar="DATA...", help="The rows of the training: Parquet or JSON lines.")
    ],
    folder: Annotated[str, typer.Option("--in", metavar="FOLDER", help="The library, or the run; made if missing.")],
    labelled: Annotated[
        list[str] | None,
        typer.Option("--labelled", metavar="FILE", help="Rows with right and wrong answers, for exams. Repeatable."),
    ] = None,
    task: Annotated[str, typer.Option(metavar="TEXT", help="What the queries without a tool are about.")] = "",
    models: Annotated[int, typer.Option(min=1, max=20, help="Most models of the scout's that are examined.")] = 3,
    least: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Share of the rows below which a gap is left; small clusters of a kind count together."
        ),
    ] = 0.01,
    then: Annotated[Then, typer.Option(help="What becomes of a tool that passed.")] = Then.LIVE,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and what it may cost.")] = False,
    seed: Annotated[int, typer.Option(help="As of `rlar exam`.")] = 0,
    as_json: Json = False,
    settings: Set = None,
) -> None:
    """Look for tools for the queries of a data set that have no competent one, and examine them, before a training.

    The rows are routed by the tools of the library. Shown are the clusters of alike queries that no tool fits, or whose
    tool is weak there by its evidence; those first by which most is to be gained (share of the rows, times how much
    better their answers could be told apart). For open dialogue the scout looks for reward models on the hub, and the
    best ones are examined one by one until one passes; where an LLM is configured (agents.url, agents.model), it writes
    a rubric if none does (acquire.rubrics), and for other queries a verifier. All need answers of which it is known
    whether they are right (in DATA itself, or --labelled). What was admitted is in the library at once; run it again to
    go on. Exit code: 0 every gap is filled, 1 some are left.

    \b
    Examples:
      rlar build train.parquet --in checkpoints/qwen3-8b/rlar --dry-run
      rlar build train.parquet --labelled preferences.jsonl --in checkpoints/qwen3-8b/rlar
      rlar build train.parquet --in library --set agents.url=http://127.0.0.1:8000/v1 --set agents.model=Qwen/Qwen3-32B
    """
    run(
        lambda: _build(
            data, folder, labelled or [], task, models, least, then.value, dry_run, seed, as_json, configured(settings)
        )
    )


async def _build(
    data: list[str],
    folder: str,
    labelled: list[str],
    task: str,
    models: int,
    least: float,
    then: str,
    dry_run: bool,
    seed: int,
    as_json: bool,
    config: RlarConfig,
) -> int:
    from verl_rlar.acquisition import acquire, find_gaps

    path = library_folder(folder)
    place = path or new_library_folder(folder)
    for file in set(labelled) - {STDIN}:
        next(read_some(file))  # that it can be read is known before anything is paid for
    known = live_tools(folder, None, config) if path else ()
    bad: list[BadLine] = []

    reading = ""

    def rows() -> Iterator[tuple[int, Mapping[str, Any] | DataError]]:
        nonlocal reading
        for reading in data:
            yield from read_some(reading)

    def on_bad(number: int, error: str) -> None:
        bad.append(BadLine(line=number, error=error if len(data) == 1 else f"{error} (in {reading})"))
        complain_of(bad[-1])

    async with Dispatcher(config, *known) as dispatcher:
        total, gaps = await find_gaps(rows(), dispatcher, config, least, on_bad)
    if not total:
        raise DataError(f"no row of {', '.join(data)} can be read: `rlar plan` says what is wrong with each")
    _show(total, len(bad), gaps, config, models, as_json)
    if dry_run:
        return BAD if gaps or bad else OK
    left = 0
    taken = [*builtin_snapshot().tools, *(dispatcher.snapshot.tools if known else ())]
    events: dict[str, EventKind] = {"shadow": "shadow", "live": "live"}
    filled: set[Kind] = set()
    for gap in gaps:
        if gap.kind in filled and gap.headroom >= UNCOVERED:
            continue  # the tool that was found for another cluster fits these queries, too
        with progress_bar() as on_progress:
            acquired = await acquire(
                gap,
                [*data, *labelled],
                config,
                task=task,
                models=models,
                taken=taken,
                event=events.get(then, "shadow"),
                seed=seed,
                on_progress=on_progress,
            )
        if acquired.submission and then not in events:
            acquired = replace(acquired, submission=replace(acquired.submission, event=None))
        _tell(acquired, as_json)
        left += acquired.submission is None
        if acquired.submission is not None and acquired.submission.spec is not None:
            name = str(acquired.submission.spec["name"])
            filled.add(gap.kind)
            submitted(place, acquired.submission, name, as_json=as_json)
    return BAD if left or bad else OK


def _show(total: int, bad: int, gaps: Sequence[Gap], config: RlarConfig, models: int, as_json: bool) -> None:
    if as_json:
        for gap in gaps:
            fields = ("cluster", "name", "rows", "share", "headroom", "gain", "reason", "way", "plan")
            print_json({"type": "gap", "kind": gap.kind.value} | {name: getattr(gap, name) for name in fields})
        print_json({"type": "rows", "rows": total, "bad": bad, "gaps": len(gaps)})
        return
    console = Output()
    if not gaps:
        console.print(f"{total:,} rows, and a competent tool for every cluster of queries in them.")
        return
    console.print(Text(f"{total:,} rows. No competent tool for:", style="bold"))
    table = Table("cluster", "rows", "share", "gain", "who looks for one", "how", "why", box=None, pad_edge=False)
    for gap in gaps:
        name = gap.name or f"{gap.kind.value}: small ones"
        cells = (name, f"{gap.rows:,}", f"{gap.share:.1%}", f"{gap.gain:.3f}", gap.way, gap.plan, gap.reason)
        table.add_row(*(Text(visible(cell)) for cell in cells))
    console.table(table)
    console.print(Text(visible(_cost(gaps, config, models))))


def _cost(gaps: Sequence[Gap], config: RlarConfig, models: int) -> str:
    """What all of it costs at most, in words."""
    from verl_rlar.acquisition import judging_tokens, most_tokens, rubrics_are_written

    agents, ways = config.agents, [gap.way for gap in gaps]
    judged = [gap for gap in gaps if rubrics_are_written(gap.kind, config) != "never"]
    asking = len(gaps) - ways.count("nobody") + sum(gap.way == "scout" for gap in judged) if agents.url else 0
    tokens = sum(most_tokens(gap.kind, config) for gap in gaps)
    caps = [f"{tokens:,} tokens", f"{asking * agents.wall_s / 3600:.1f} h of agents' time"]
    if agents.run_tokens is not None:
        caps[0] = f"{min(tokens, agents.run_tokens):,} tokens"
    if agents.dollars is not None or agents.run_dollars is not None:
        each = float("inf") if agents.dollars is None else asking * agents.dollars
        caps.append(f"{min(each, float('inf') if agents.run_dollars is None else agents.run_dollars):g} dollars")
    if not asking:
        caps = ["no tokens"]
    if scouts := ways.count("scout"):
        caps.append(f"{scouts * models} models of {config.hub.max_gb:g} GiB each to download and examine")
    each = judging_tokens([query for gap in judged for query in gap.queries]) if judged else 0
    then = f" A rubric then takes about {each:,} tokens for each response that it scores." if judged else ""
    return f"In all at most: {', '.join(caps)}.{then}"


def _tell(acquired: Acquired, as_json: bool) -> None:
    if as_json:
        print_json({"type": "acquired", **acquired.as_dict()})
        return
    print(visible(f"{acquired.name or acquired.kind.value}: {acquired.why}"))
    for one in acquired.tried:
        print(visible(f"  {one.verdict:<8} {one.name}: {one.why}"))
