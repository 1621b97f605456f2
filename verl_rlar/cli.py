# SPDX-License-Identifier: Apache-2.0
"""The `rlar` command: scores responses and plans data sets with the tools of a training run, without verl or Ray.

Guarantees: with ``--json`` every line of standard output is one JSON object, in ASCII, and nothing else stands there;
counts, faults and progress go to standard error. What a file says is never interpreted: control characters and markup
are shown as text. Input is read as a stream, and results come in its order. Exit codes: 0 all is well; 1 some rows are
bad, or a route's gold answers do not win; 2 the command, a setting or the file is wrong; 130 Ctrl-C, 143 SIGTERM (after
the worker processes have been ended); 141 the reader of the output is gone.

Not covered: what an earlier training scored; that stands in its ledger.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from verl_rlar import __version__
from verl_rlar.config import RlarConfig, parse
from verl_rlar.dispatcher import Dispatcher
from verl_rlar.errors import ConfigError, DataError, RlarError
from verl_rlar.planning import WIN_SHARE, Example, Plan, make_plan
from verl_rlar.row_files import read_rows
from verl_rlar.rows import query_of
from verl_rlar.streams import in_background, in_order
from verl_rlar.types import Outcome, Route, Sample, Score

OK, BAD, USAGE = 0, 1, 2
WIDTH = 160
"""Columns of the tables where standard output is no terminal."""
STYLES = {"scored": "green", "abstained": "yellow", "failed": "red", "hacked": "magenta", "ok": "green", "lost": "red"}

app = typer.Typer(
    name="rlar",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object per line.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A setting under rlar.*, e.g. scoring.timeout_s=3. Repeatable."),
]


def main() -> None:
    """Runs the command."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    app()


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rlar {__version__}")
        raise typer.Exit(OK)


@app.callback()
def rlar(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Agent-backed rewards for verl: score responses, plan data sets.

    \b
    Examples:
      rlar score answers.jsonl
      rlar score answers.jsonl --json | jq .value
      echo '{"prompt": "6*7?", "response": "It is 42.", "reference": "42"}' | rlar score -
      rlar plan train.parquet
    """


@app.command("score")
def score_command(
    file: Annotated[str, typer.Argument(metavar="FILE", help="JSON lines (also .gz) or parquet; - is standard input.")],
    as_json: Json = False,
    settings: Set = None,
) -> None:
    """Score responses by the tools that fit their queries, as in training.

    \b
    Every line is an object with `messages` (or `prompt`) and `response`, and, where the data has them, `reference`,
    `data_source` and `extra` (tests, constraints, languages, ...). verl's own columns are understood, too.

    \b
    Prints for every line: number, value in [0, 1] (- if unscored), outcome, tool, milliseconds, reason.
    Bad lines are reported with their numbers, and the rest goes on; the exit code is 1 then.

    \b
    Examples:
      rlar score answers.jsonl
      rlar score answers.jsonl --json > scores.jsonl
      rlar score answers.jsonl --set scoring.timeout_s=3 --set rules.processes=8
      zcat answers.jsonl.gz | rlar score - | sort -t$'\\t' -k2 -n | head
    """
    _run(lambda: _score(file, as_json, _config(settings)))


@app.command("plan")
def plan_command(
    file: Annotated[str, typer.Argument(metavar="DATA", help="Parquet or JSON lines (also .gz); - is standard input.")],
    as_json: Json = False,
    sample: Annotated[int, typer.Option(min=0, help="Most rows per route that are dry-scored; 0: none.")] = 64,
    settings: Set = None,
) -> None:
    """Route a data set, and try whether its rewards tell right from wrong.

    \b
    Prints the coverage per tool and kind of query, queries that no tool fits, conflicts among labels, and a dry score:
    for every route, gold answers made from the references against garbage (empty, "I don't know.", another row's
    reference, the prompt, random words). A route where gold does not win is an error; the exit code is 1 then.

    \b
    Examples:
      rlar plan train.parquet
      rlar plan train.jsonl --sample 256
      rlar plan train.parquet --json | jq 'select(.type == "uncovered")'
    """
    _run(lambda: _plan(file, as_json, sample, _config(settings)))


def _run(work: Callable[[], Coroutine[Any, Any, int]]) -> None:
    """Runs a command to its exit code; what the user can mend becomes a message."""
    try:
        code = asyncio.run(work())
        sys.stdout.flush()
    except RlarError as error:
        _complain(f"error: {error}")
        code = USAGE
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the flush at exit does not fail again
        code = 128 + signal.SIGPIPE
    raise typer.Exit(code)


def _config(settings: list[str] | None) -> RlarConfig:
    """The settings of ``--set``, checked.

    Raises:
        ConfigError: One has no value, or a key or value is wrong.
    """
    tree: dict[str, Any] = {}
    for setting in settings or ():
        key, equals, text = setting.partition("=")
        *sections, name = key.removeprefix("rlar.").split(".")
        if not equals or not all((*sections, name)):
            raise ConfigError(f"--set {setting!r}: write KEY=VALUE, for example --set scoring.timeout_s=3")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise ConfigError(f"--set {setting!r}: {section} was set to {node!r} before, it cannot hold {name}")
        try:
            node[name] = json.loads(text)
        except ValueError:
            node[name] = text
    return parse(tree)


# --- rlar score -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A line and its score."""

    line: int
    sample: Sample
    route: Route
    score: Score


@dataclass(frozen=True, kw_only=True)
class BadLine:
    """A line that cannot be scored."""

    line: int
    error: str


async def _score(file: str, as_json: bool, config: RlarConfig) -> int:
    report = _JsonScores() if as_json else _TableScores()
    bad = 0
    tally: dict[str, Counter[str]] = {}
    values: list[float] = [0.0, 0.0]  # sum and count
    with Dispatcher(config) as dispatcher:

        async def score(item: tuple[int, Mapping[str, Any] | DataError]) -> Scored | BadLine:
            number, row = item
            try:
                sample = _sample(row)
            except DataError as error:
                return BadLine(line=number, error=str(error))
            route = await dispatcher.route(sample.query)
            return Scored(line=number, sample=sample, route=route, score=await dispatcher.score(sample, route))

        async for result in in_order(score, in_background(read_rows(file)), at_once=dispatcher.at_once):
            if isinstance(result, BadLine):
                bad += 1
                report.bad(result)
                continue
            report.scored(result)
            tally.setdefault(result.route.name, Counter())[result.score.outcome.value] += 1
            if result.score.value is not None:
                values[0] += result.score.value
                values[1] += 1
    _summarise(tally, bad, values[0] / values[1] if values[1] else None)
    return BAD if bad else OK


def _sample(row: Mapping[str, Any] | DataError) -> Sample:
    if isinstance(row, DataError):
        raise row
    response = row.get("response")
    if not isinstance(response, str):
        raise DataError("no `response`" if response is None else f"`response` is {type(response).__name__}, not a text")
    return Sample(query=query_of(row), response=response)


class _JsonScores:
    """One JSON object for every line of the input."""

    def scored(self, result: Scored) -> None:
        route, score = result.route, result.score
        _print_json(
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
        _print_json({"line": line.line, "error": line.error})
        _complain_of(line)


class _TableScores:
    """A table for people: aligned and cut to the width of a terminal, else separated by tabs and whole."""

    def __init__(self) -> None:
        self._console = Console(highlight=False)
        self._begun = False

    def scored(self, result: Scored) -> None:
        score = result.score
        value = "-" if score.value is None else f"{score.value:.4g}"
        cells = (str(result.line), value, score.outcome.value, result.route.name, f"{1000 * score.seconds:.1f}")
        self._row(*cells, visible(score.reason))

    def bad(self, line: BadLine) -> None:
        _complain_of(line)

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
        text.append(f"  {tool:<24}  {ms:>8}  {reason}")
        self._console.print(text, no_wrap=True, overflow="ellipsis")


def _summarise(tally: Mapping[str, Counter[str]], bad: int, mean: float | None) -> None:
    lines = sum(counts.total() for counts in tally.values())
    _complain(f"{lines:,} lines, and {bad:,} bad ones; mean value {'-' if mean is None else f'{mean:.4f}'}")
    outcomes = [outcome.value for outcome in Outcome]
    table = Table("tool", *outcomes, box=None, pad_edge=False)
    for tool, counts in sorted(tally.items(), key=lambda item: -item[1].total()):
        table.add_row(Text(tool), *(str(counts[outcome]) for outcome in outcomes))
    if tally:
        Console(stderr=True, highlight=False).print(table)


# --- rlar plan --------------------------------------------------------------------------------------------------------


async def _plan(file: str, as_json: bool, sample: int, config: RlarConfig) -> int:
    with Dispatcher(config) as dispatcher:
        with _progress() as on_progress:
            plan = await make_plan(read_rows(file), dispatcher, sample=sample, on_progress=on_progress)
    for number, fault in plan.bad:
        _complain_of(BadLine(line=number, error=fault))
    if as_json:
        for record in plan_records(plan):
            _print_json(record)
    else:
        _print_plan(plan)
    return BAD if plan.bad or plan.errors else OK


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int | None], None]]:
    """A progress bar on standard error, if that is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        tasks: dict[str, Any] = {}

        def on_progress(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done, total=total)

        yield on_progress


def plan_records(plan: Plan) -> Iterator[dict[str, Any]]:
    """A plan as JSON-like objects; `type` is ``route``, ``uncovered``, ``conflict``, ``error`` or ``summary``."""
    for number, fault in plan.bad:
        yield {"type": "error", "line": number, "error": fault}
    for group in plan.routes:
        yield {"type": "route", **asdict(group), "verdict": group.dry.verdict}
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
        )
    return messages


def _print_plan(plan: Plan) -> None:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)

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
        console.print(counts(title, numbers))
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
    console.print(table)
    if plan.uncovered:
        say()
        say(f"Uncovered: {sum(uncovered.rows for uncovered in plan.uncovered):,} rows that no tool fits", "bold")
    for uncovered in plan.uncovered:
        say(f"  {uncovered.rows:,} rows: {uncovered.reason}")
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


# --- Output -----------------------------------------------------------------------------------------------------------


def visible(text: str) -> str:
    """A text whose control characters and the like are escaped, so that a terminal shows it and does not obey it."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _print_json(record: Mapping[str, Any]) -> None:
    print(json.dumps(record, ensure_ascii=True, allow_nan=False), flush=True)


def _complain(message: str) -> None:
    print(f"rlar: {visible(message)}", file=sys.stderr, flush=True)


def _complain_of(line: BadLine) -> None:
    _complain(f"line {line.line}: {line.error}")
