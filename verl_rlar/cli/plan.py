# SPDX-License-Identifier: Apache-2.0
"""`rlar plan`: what the tools would make of a data set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from verl_rlar.cli.app import (
    BAD,
    OK,
    STYLES,
    BadLine,
    Json,
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
from verl_rlar.config import RlarConfig
from verl_rlar.dispatcher import Dispatcher
from verl_rlar.planning import WIN_SHARE, Example, Plan, make_plan
from verl_rlar.row_files import read_some
from verl_rlar.types import Kind

FORMATS = "it must be JSON lines (one object per line) or *.parquet, with `prompt` or `messages`"
CLUSTERS = 20
"""Most clusters that are printed."""


@app.command("plan", short_help="Route a data set, and try its rewards.")
def plan_command(
    file: Annotated[str, typer.Argument(metavar="DATA", help="Parquet or JSON lines (also .gz); - is standard input.")],
    as_json: Json = False,
    sample: Annotated[int, typer.Option(min=0, help="Most rows per route that are dry-scored; 0: none.")] = 64,
    settings: Set = None,
) -> None:
    """Route a data set, and try whether its rewards tell right from wrong.

    Prints the coverage per tool, kind and cluster of queries, queries that no tool fits, conflicts among labels, and a
    dry score: for every route, gold answers made from the references against garbage (empty, "I don't know.", another
    row's reference, the prompt, random words). A route where gold does not win is an error; the exit code is 1 then.

    \b
    Examples:
      rlar plan train.parquet
      rlar plan train.jsonl --sample 256
      rlar plan train.parquet --json | jq 'select(.type == "uncovered")'
    """
    run(lambda: _plan(file, as_json, sample, configured(settings)))


async def _plan(file: str, as_json: bool, sample: int, config: RlarConfig) -> int:
    async with Dispatcher(config) as dispatcher:
        with progress_bar() as on_progress:
            plan = await make_plan(read_some(file), dispatcher, sample=sample, on_progress=on_progress)
    for number, fault in plan.bad:
        complain_of(BadLine(line=number, error=fault))
    if not plan.rows:
        complain(f"no row of {file} can be read: {FORMATS}")
    if as_json:
        for record in plan_records(plan):
            print_json(record | ({"remedy": _remedy(record["kind"], config)} if record["type"] == "uncovered" else {}))
    else:
        _print_plan(plan, config)
    return BAD if plan.bad or plan.errors else OK


def _remedy(kind: str, config: RlarConfig) -> str:
    """What `rlar build` would do about queries that no tool fits, and what that may cost."""
    from verl_rlar.acquisition import remedy  # the hub's client takes a while to import

    return remedy(Kind(kind), config)


def plan_records(plan: Plan) -> Iterator[dict[str, Any]]:
    """A plan as JSON-like objects; `type` is ``route``, ``cluster``, ``uncovered``, ``conflict``, ``error`` or
    ``summary``."""
    for number, fault in plan.bad:
        yield {"type": "error", "line": number, "error": fault}
    for group in plan.routes:
        yield {"type": "route", **asdict(group), "verdict": group.dry.verdict}
    for cluster in plan.clusters:
        yield {"type": "cluster", **asdict(cluster)}
    for uncovered in plan.uncovered:
        yield {"type": "uncovered", **asdict(uncovered)}
    for conflict in plan.conflicts:
        yield {"type": "conflict", **asdict(conflict)}
    for group, message in zip(plan.errors, _errors(plan), strict=True):
        where = {"tool": group.tool, "data_source": group.data_source}
        yield {"type": "error", **where, "error": message, "examples": [asdict(row) for row in group.dry.losers]}
    yield {
        "type": "summary",
        "rows": plan.rows,
        "bad": len(plan.bad),
        "verifiable": plan.verifiable,
        "verified": plan.verified,
        "coverage": plan.coverage,
        "unread_references": plan.unread_references,
        "tools": dict(plan.tools),
        "kinds": dict(plan.kinds),
        "uncovered": sum(uncovered.rows for uncovered in plan.uncovered),
        "fallback": sum(uncovered.rows for uncovered in plan.uncovered if uncovered.fallback != "-"),
        "conflicts": len(plan.conflicts),
        "errors": len(plan.errors),
    }


def _errors(plan: Plan) -> list[str]:
    """What is wrong with each of `Plan.errors`, and what to do."""
    messages = []
    for group in plan.errors:
        dry, where = group.dry, f"{group.tool} on data_source {group.data_source!r}"
        if dry.verdict == "failed":
            messages.append(f"gold could not be scored: {where}: {dry.note}. Mend the tool, or raise its deadline")
            continue
        messages.append(
            f"gold does not win: {where}: gold answers score more than garbage on {dry.wins} of {dry.rows - dry.failed}"
            f" sampled rows (at least {WIN_SHARE:.0%} are needed). A reward that cannot tell them apart is no use:"
            " look at the examples, correct the references or columns of these rows"
            + (
                ". All rows have the same reference: one answer wins them all"
                if "only_reference" in dry.garbage
                else ""
            )
        )
    return messages


def _clusters(plan: Plan) -> Table:
    """The largest clusters, and who scores them."""
    table = Table("cluster", "rows", "share", "goes to", box=None, pad_edge=False)
    for cluster in plan.clusters[:CLUSTERS]:
        tools = ", ".join(name if len(cluster.tools) == 1 else f"{name} {n:,}" for name, n in cluster.tools.items())
        cells = (cluster.name, f"{cluster.rows:,}", f"{cluster.rows / plan.rows:.1%}", tools)
        table.add_row(*(Text(visible(cell)) for cell in cells))
    if left := plan.clusters[CLUSTERS:]:
        rows = sum(cluster.rows for cluster in left)
        table.add_row(f"{len(left)} more", f"{rows:,}", f"{rows / plan.rows:.1%}", "(--json)")
    return table


def _print_plan(plan: Plan, config: RlarConfig) -> None:
    console = Output()

    def say(text: str = "", style: str = "") -> None:
        console.print(Text(visible(text), style=style), soft_wrap=True)

    def show(examples: Iterable[Example]) -> None:
        for example in examples:
            say(f"    row {example.line}: {example.prompt!r}" + (f"  {example.note}" if example.note else ""), "dim")

    def counts(title: str, numbers: Mapping[str, int]) -> Table:
        table = Table(title, "rows", "share", box=None, pad_edge=False)
        for name, rows in numbers.items():
            table.add_row(Text(visible(name)), f"{rows:,}", f"{rows / plan.rows:.1%}")
        return table

    say(f"{plan.rows:,} rows" + (f", {len(plan.bad):,} bad ones left out" if plan.bad else ""), "bold")
    if not plan.rows:
        return
    share = f"{plan.verified:,} of them ({plan.coverage:.1%})"
    say(f"{plan.verifiable:,} say what a right answer is; {share} go to a tool that verifies it")
    if plan.unread_references:
        say(f"{plan.unread_references:,} more have a reference that no kind of check fits (prose)")
    for title, numbers in (("tool", plan.tools), ("kind", plan.kinds)):
        say()
        console.table(counts(title, numbers))
    say()
    console.table(_clusters(plan))
    say()
    columns = ("tool", "data_source", "kind", "rows", "sampled", "gold", "garbage", "gold wins", "")
    table = Table(*columns, title="Dry score", title_justify="left", box=None, pad_edge=False)
    for group in plan.routes:
        dry = group.dry
        best = max(((v, sort) for sort, v in dry.garbage.items() if v is not None), default=None)
        cells = (
            group.tool,
            group.data_source or "-",
            " ".join(group.kinds),
            f"{group.rows:,}",
            str(dry.rows),
            "-" if dry.gold is None else f"{dry.gold:.3f}",
            "-" if best is None else f"{best[0]:.3f} {best[1] if best[0] else ''}",
            "-" if dry.wins is None else f"{dry.wins / dry.rows:.0%}",
        )
        verdict = Text(dry.verdict.replace("_", " "), style=STYLES.get(dry.verdict, "dim"))
        table.add_row(*(Text(visible(cell)) for cell in cells), verdict)
    console.table(table)
    if plan.uncovered:
        say()
        say(f"Uncovered: {sum(uncovered.rows for uncovered in plan.uncovered):,} rows that no tool fits", "bold")
    for uncovered in plan.uncovered:
        scored = "they stay unscored" if uncovered.fallback == "-" else f"{uncovered.fallback} scores them all the same"
        say(f"  {uncovered.rows:,} rows: {uncovered.reason}; {scored}")
        say(f"    rlar build: {_remedy(uncovered.kind, config)}", "dim")
        show(uncovered.examples)
    if plan.conflicts:
        say()
        say("Conflicts", "bold")
    for conflict in plan.conflicts:
        say(f"  {conflict.rows:,} rows, {conflict.sort}: {conflict.what}")
        show(conflict.examples)
    if plan.errors:
        say()
        say("Errors", "bold red")
    for group, message in zip(plan.errors, _errors(plan), strict=True):
        say(f"  {message}", "red")
        show(group.dry.losers)
