# SPDX-License-Identifier: Apache-2.0
"""`rlar build`: fills the gaps of a data set before a training."""

from __future__ import annotations

import sys
from itertools import chain
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from verl_rlar.cli.app import (
    BAD,
    OK,
    WIDTH,
    Json,
    Set,
    app,
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
from verl_rlar.library import EventKind, builtin_snapshot
from verl_rlar.row_files import read_rows

if TYPE_CHECKING:
    from verl_rlar.acquisition import Acquired, Gap  # the hub's client and the exam take a while to import


@app.command("build")
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
    least: Annotated[float, typer.Option(min=0, max=1, help="Share of the rows below which a gap is left.")] = 0.01,
    then: Annotated[Then, typer.Option(help="What becomes of a tool that passed.")] = Then.LIVE,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and what it may cost.")] = False,
    seed: Annotated[int, typer.Option(help="As of `rlar exam`.")] = 0,
    as_json: Json = False,
    settings: Set = None,
) -> None:
    """Look for tools for the queries of a data set that none fits, and examine them, before a training starts.

    \b
    The rows are routed by the tools of the library. Of the kinds of query that no tool fits, the largest first: for
    open dialogue the scout looks for reward models on the hub, and the best ones are examined one by one until one
    passes; for others, where an LLM is configured (agents.url, agents.model), the coder writes a verifier. Both need
    answers of which it is known whether they are right (in DATA itself, or --labelled). What was admitted is in the
    library at once; run it again to go on. Exit code: 0 every gap is filled, 1 some are left.

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
    known = live_tools(folder, None, config) if path else ()
    async with Dispatcher(config, *known) as dispatcher:
        total, gaps = await find_gaps(chain.from_iterable(map(read_rows, data)), dispatcher, config)
    wanted = [gap for gap in gaps if gap.share >= least]
    _show(total, wanted, as_json)
    if dry_run:
        return BAD if wanted else OK
    left = 0
    taken = [*builtin_snapshot().tools, *(dispatcher.snapshot.tools if known else ())]
    events: dict[str, EventKind] = {"shadow": "shadow", "live": "live"}
    for gap in wanted:
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
        _tell(acquired, as_json)
        left += acquired.submission is None
        if acquired.submission is not None and acquired.submission.spec is not None:
            name = str(acquired.submission.spec["name"])
            submitted(path or new_library_folder(folder), acquired.submission, name, as_json=as_json)
    return BAD if left else OK


def _show(total: int, gaps: list[Gap], as_json: bool) -> None:
    if as_json:
        for gap in gaps:
            print_json(
                {
                    "type": "gap",
                    "kind": gap.kind.value,
                    "rows": gap.rows,
                    "share": gap.share,
                    "reason": gap.reason,
                    "way": gap.way,
                    "plan": gap.plan,
                }
            )
        return
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    if not gaps:
        console.print(f"{total:,} rows, and a tool for every kind of query in them.")
        return
    console.print(Text(f"{total:,} rows. No tool fits:", style="bold"))
    table = Table("kind", "rows", "share", "who looks for one", "how", box=None, pad_edge=False)
    for gap in gaps:
        cells = (gap.kind.value, f"{gap.rows:,}", f"{gap.share:.1%}", gap.way, gap.plan)
        table.add_row(*(Text(visible(cell)) for cell in cells))
    console.print(table)


def _tell(acquired: Acquired, as_json: bool) -> None:
    if as_json:
        print_json({"type": "acquired", **acquired.as_dict()})
        return
    print(visible(f"{acquired.kind.value}: {acquired.why}"))
    for one in acquired.tried:
        print(visible(f"  {one.verdict:<8} {one.name}: {one.why}"))
