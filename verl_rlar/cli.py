# SPDX-License-Identifier: Apache-2.0
"""The `rlar` command: scores responses and plans data sets with the tools of a training run, without verl or Ray, and
checks the place where code runs that nobody has read; shows a run's library of tools.

Guarantees: with ``--json`` every line of standard output is one JSON object, in ASCII, and nothing else stands there;
counts, faults and progress go to standard error. What a file says is never interpreted: control characters and markup
are shown as text. Input is read as a stream, and results come in its order. Exit codes: 0 all is well; 1 some rows are
bad, or a route's gold answers do not win, or a check of the doctor failed; 2 the command, a setting or the file is
wrong; 130 Ctrl-C, 143 SIGTERM (after the worker processes have been ended); 141 the reader of the output is gone.

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
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from verl_rlar import __version__
from verl_rlar.config import RlarConfig, parse
from verl_rlar.dispatcher import Dispatcher
from verl_rlar.errors import ConfigError, DataError, LibraryError, RlarError
from verl_rlar.library import FOLDER_NAME, SCHEMA_FILE, Library, LibraryView, spec_to_json
from verl_rlar.planning import WIN_SHARE, Example, Plan, make_plan
from verl_rlar.row_files import read_rows
from verl_rlar.rows import query_of
from verl_rlar.streams import in_background, in_order
from verl_rlar.trusted import trusted_tools
from verl_rlar.types import Kind, Outcome, Route, Sample, Score, ToolSpec

OK, BAD, USAGE = 0, 1, 2
WIDTH = 160
"""Columns of the tables where standard output is no terminal."""
STYLES = {"scored": "green", "abstained": "yellow", "failed": "red", "hacked": "magenta", "ok": "green", "lost": "red"}
STATES = {"live": "green", "shadow": "cyan", "rejected": "red", "quarantined": "red", "retired": "dim"}
CHECKS = {True: ("ok", "green"), None: ("warning", "yellow"), False: ("FAIL", "bold red")}

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
      rlar exam final_answer --data train.parquet
      rlar doctor
      rlar tools ls
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


@app.command("exam")
def exam_command(
    tool: Annotated[
        str, typer.Argument(metavar="TOOL", help="A built-in tool, package.module:function, or a verifier (*.py).")
    ],
    data: Annotated[
        list[str] | None, typer.Option("--data", metavar="FILE", help="Rows to make cases from. Repeatable.")
    ] = None,
    cases: Annotated[
        list[str] | None, typer.Option("--cases", metavar="FILE", help="A case file (JSON lines). Repeatable.")
    ] = None,
    kind: Annotated[
        list[Kind] | None, typer.Option("--kind", help="What a verifier is for, if its file does not say. Repeatable.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides which rows are taken, what is changed, and what is sealed.")] = 0,
    as_json: Json = False,
    settings: Set = None,
) -> None:
    """Examine a tool: does it tell right from wrong, always, in time, whoever asks?

    \b
    Cases are made from rows (gold answers, labelled ones, changes that must fail and changes that must not matter,
    attacks), or come from case files: rows with a `response` and `expect`: good, bad, abstain, or same_as:<id>.
    A verifier's file runs in a box. Prints the card; --json prints it as one object. Exit code: 0 admitted, 1 rejected.

    \b
    Examples:
      rlar exam final_answer --data train.parquet
      rlar exam my_package.rewards:brevity --cases cases.jsonl --json | jq .reasons
      rlar exam verifier.py --data train.parquet --kind math --set exam.max_queries=100
    """
    _run(lambda: _exam(tool, data or [], cases or [], kind or [], seed, as_json, _config(settings)))


@app.command("doctor")
def doctor_command(as_json: Json = False, settings: Set = None) -> None:
    """Check the sandbox: where code runs that a policy or a model wrote.

    \b
    Looks at the Docker engine and what it can enforce, builds or pulls the image of the boxes where it is missing,
    tries every limit from inside a box, and runs a program as a training does; for a SandboxFusion server, runs a
    program there. What is wrong comes with what to do; the exit code is 1 then, and 0 with warnings alone.

    \b
    Examples:
      rlar doctor
      rlar doctor --set sandbox.runtime=runsc
      rlar doctor --set sandbox.backend=sandbox_fusion --set sandbox.fusion_url=http://host:8080
      rlar doctor --json | jq 'select(.ok == false)'
    """
    _run(lambda: _doctor(as_json, _config(settings)))


tools_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(tools_app, name="tools")

In = Annotated[
    str | None,
    typer.Option(
        "--in", metavar="FOLDER", help="A library, or the folder of a run. Default: rlar, as in the settings."
    ),
]
Tool = Annotated[str, typer.Argument(metavar="TOOL", help="A name, a digest, or the beginning of one.")]
By = Annotated[str, typer.Option(metavar="WHO", help="Who says so, for the log.")]


@tools_app.callback()
def tools_group() -> None:
    """Look into a run's library of tools, and change it.

    While a training runs, its service is the only one that writes; looking is always possible.
    """


@tools_app.command("ls")
def tools_ls_command(
    folder: In = None,
    step: Annotated[int | None, typer.Option(min=0, help="How things stood at that step. Default: after all.")] = None,
    as_json: Json = False,
    settings: Set = None,
) -> None:
    """List the tools: what each is, since which step, and why.

    Without a library: the tools that a training with these settings begins with.

    \b
    Examples:
      rlar tools ls --in checkpoints/qwen3-8b/rlar
      rlar tools ls --step 40
      rlar tools ls --set 'tools=["my_package.rewards:shouting"]'
    """
    _run(lambda: _tools_ls(folder, step, as_json, _config(settings)))


@tools_app.command("show")
def tools_show_command(tool: Tool, folder: In = None, as_json: Json = False) -> None:
    """Show a tool: its description, what it misses, its card, and what became of it.

    \b
    Examples:
      rlar tools show final_answer
      rlar tools show 3fa9 --json | jq .events
    """
    _run(lambda: _tools_show(tool, folder, as_json))


@tools_app.command("add")
def tools_add_command(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A verifier: *.py with a function `score`.")],
    folder: In = None,
    name: Annotated[str | None, typer.Option(help="Name of the tool. Default: that of the file.")] = None,
    kind: Annotated[
        list[Kind] | None, typer.Option("--kind", help="What it is for, if the file does not say. Repeatable.")
    ] = None,
    live_from: Annotated[
        int | None, typer.Option("--live-from", min=0, metavar="STEP", help="Make it live from this step on.")
    ] = None,
    replaces: Annotated[
        str | None, typer.Option(metavar="DIGEST", help="The live tool of the same name that goes, with --live-from.")
    ] = None,
    why: Annotated[str, typer.Option(metavar="TEXT", help="For the log.")] = "added by hand",
    by: By = "command line",
    as_json: Json = False,
    settings: Set = None,
) -> None:
    """Put a verifier that nobody has read into the library, as proposed. It is not run here.

    \b
    The file has a function score(prompt, response, reference, extra) that returns a number in [0, 1] or None, and may
    say KINDS, NEEDS_REFERENCE, TIMEOUT_S and DESCRIPTION. It scores only in a box, and only after an exam.

    \b
    Examples:
      rlar tools add unit_price.py --kind math
      rlar tools add unit_price.py --in checkpoints/qwen3-8b/rlar
    """
    _run(lambda: _tools_add(file, folder, name, kind or [], live_from, replaces, why, by, as_json, _config(settings)))


@tools_app.command("retire")
def tools_retire_command(
    tool: Tool,
    why: Annotated[str, typer.Option(metavar="TEXT", help="For the log.")],
    folder: In = None,
    step: Annotated[
        int | None, typer.Option("--from", min=0, metavar="STEP", help="From which step on. Default: the next one.")
    ] = None,
    by: By = "command line",
    as_json: Json = False,
) -> None:
    """Take a tool out, from a step on. What it scored stays in the ledger, and it stays in the library.

    \b
    Example:
      rlar tools retire token_f1 --why "too lenient on names"
    """
    _run(lambda: _tools_retire(tool, folder, step, why, by, as_json))


@tools_app.command("export")
def tools_export_command(
    tool: Tool,
    file: Annotated[str, typer.Argument(metavar="FILE", help="Where to; - is standard output.")],
    folder: In = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
) -> None:
    """Write a tool's code into a file, byte by byte as it scored.

    \b
    Example:
      rlar tools export 3fa9c0de12345678 unit_price.py
    """
    _run(lambda: _tools_export(tool, file, folder, force))


def _run(work: Callable[[], Coroutine[Any, Any, int] | int]) -> None:
    """Runs a command to its exit code; what the user can mend becomes a message."""
    try:
        result = work()
        code = result if isinstance(result, int) else asyncio.run(result)
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
    async with Dispatcher(config) as dispatcher:

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
    async with Dispatcher(config) as dispatcher:
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


# --- rlar exam --------------------------------------------------------------------------------------------------------


async def _exam(
    tool: str, data: list[str], cases: list[str], kinds: list[Kind], seed: int, as_json: bool, config: RlarConfig
) -> int:
    from verl_rlar.exam.hall import examine_files

    if not data and not cases:
        raise ConfigError("nothing to examine it on: give --data FILE or --cases FILE")
    sys.path.insert(0, os.getcwd())  # the user's own package.module
    with _progress() as on_progress:
        card = await examine_files(tool, data, cases, config, kinds=kinds, seed=seed, on_progress=on_progress)
    if as_json:
        _print_json(card.as_dict())
    else:
        print("\n".join(map(visible, card.markdown().splitlines())))
    return OK if card.admitted else BAD


# --- rlar doctor ------------------------------------------------------------------------------------------------------


def _doctor(as_json: bool, config: RlarConfig) -> int:
    from verl_rlar.sandbox.doctor import diagnose  # docker's package takes a while to import

    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    tally = Counter[str]()
    for check in diagnose(config.sandbox, progress=_complain):
        word, style = CHECKS[check.ok]
        tally[word] += 1
        if as_json:
            _print_json({"name": check.name, "ok": check.ok, "detail": check.detail, "advice": check.advice})
            continue
        line = Text(f"{word:<8}", style=style)
        line.append(f"{check.name:<24}", style="bold")
        first, *more = check.detail.splitlines() or [""]
        line.append(visible(first), style="default")
        console.print(line, soft_wrap=True)
        for text in [*more, *check.advice.splitlines()]:
            console.print(Text(" " * 32 + visible(text), style="dim"), soft_wrap=True)
    _complain(", ".join(f"{tally[word]} {word}" for word, _ in CHECKS.values()))
    return BAD if tally["FAIL"] else OK


# --- rlar tools -------------------------------------------------------------------------------------------------------


def _library_folder(folder: str | None) -> Path | None:
    """The library that is meant; None if there is none."""
    place = Path(folder or RlarConfig().run_dir)
    for candidate in (place, place / FOLDER_NAME, place / "rlar" / FOLDER_NAME):
        if (candidate / SCHEMA_FILE).exists():
            return candidate
    return None


def _open_library(folder: str | None) -> LibraryView:
    return Library.read(_library_folder(folder) or Path(folder or RlarConfig().run_dir))


def _new_library_folder(folder: str | None) -> Path:
    place = Path(folder or RlarConfig().run_dir)
    return place if place.name == FOLDER_NAME else place / FOLDER_NAME


def _tools_ls(folder: str | None, step: int | None, as_json: bool, config: RlarConfig) -> int:
    rows: list[tuple[ToolSpec, str, int, str, str]]
    if folder is None and _library_folder(None) is None:
        _complain(f"there is no library at {Path(config.run_dir) / FOLDER_NAME}; a training begins with these")
        rows = [(tool.spec, "live", 0, tool.by, "at the start") for tool in trusted_tools(config)]
    else:
        library = _open_library(folder)
        live = library.latest() if step is None else library.snapshot(step)
        order = {tool.digest: place for place, tool in enumerate(live.tools)}
        by = {event.digest: event.by for event in library.events}
        standings = library.standings(step).values()
        rows = [
            (library.spec(standing.digest), standing.event, standing.step, by[standing.digest], standing.why)
            for standing in sorted(standings, key=lambda standing: order.get(standing.digest, len(order)))
        ]
    table = Table("tool", "state", "since", "kind", "checks", "digest", "by", "why", box=None, pad_edge=False)
    for spec, state, since, by_whom, why in rows:
        kinds = sorted(kind.value for kind in spec.scope.kinds)
        if as_json:
            record = {"tool": spec.name, "digest": spec.digest, "state": state, "step": since, "kind": spec.kind}
            _print_json(record | {"checks": kinds, "by": by_whom, "why": why, "description": spec.description})
        checks = ("gate: " if spec.gate else "") + ("all" if len(kinds) == len(Kind) else " ".join(kinds))
        cells = (spec.name, state, str(since), spec.kind, checks, spec.digest, by_whom, why)
        table.add_row(
            *(Text(visible(cell), style=STATES.get(cell, "") if n == 1 else "") for n, cell in enumerate(cells))
        )
    if not as_json:
        Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH).print(table)
    return OK


def _tools_show(tool: str, folder: str | None, as_json: bool) -> int:
    library = _open_library(folder)
    digest = library.find(tool)
    spec, standing, card = library.spec(digest), library.standings()[digest], library.card(digest)
    events = [event for event in library.events if event.digest == digest or event.replaces == digest]
    if as_json:
        state = {"digest": digest, "state": standing.event, "step": standing.step, "spec": spec_to_json(spec)}
        _print_json(state | {"card": card, "events": [asdict(event) for event in events]})
        return OK
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)

    def say(label: str, text: str) -> None:
        console.print(Text.assemble((f"{label:<13}", "bold"), visible(text)), soft_wrap=True)

    say("tool", f"{spec.name} ({digest})")
    say("state", f"{standing.event} since step {standing.step}: {standing.why}")
    say("kind", f"{spec.kind}, {spec.target}" + (", a gate" if spec.gate else ""))
    kinds = " ".join(sorted(kind.value for kind in spec.scope.kinds))
    say("checks", kinds + ("" if not spec.scope.needs_reference else "; needs a reference"))
    say("range", f"{spec.low:g} to {spec.high:g}, within {spec.timeout_s:g} s" + (", in a box" if spec.boxed else ""))
    say("made by", spec.origin)
    say("description", spec.description or "-")
    for missed in spec.misses:
        say("misses", missed)
    say("code", str(library.path / "tools" / digest))
    for event in events:
        what = event.event if event.digest == digest else f"replaced by {event.digest}"
        say(f"event {event.seq}", f"{event.time[:19]}  step {event.step}  {what}, by {event.by}: {event.why}")
    text = library.card_text(digest)
    say("card", "none: it had no exam" if text is None else "")
    for line in (text or "").splitlines():
        console.print(Text("  " + visible(line)), soft_wrap=True)
    return OK


def _tools_add(
    file: str,
    folder: str | None,
    name: str | None,
    kinds: list[Kind],
    live_from: int | None,
    replaces: str | None,
    why: str,
    by: str,
    as_json: bool,
    config: RlarConfig,
) -> int:
    from verl_rlar.exam.subject import verifier

    try:
        source = Path(file).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the verifier {file}: {error}") from None
    spec = verifier(source, name=name or Path(file).stem, kinds=kinds).spec
    with Library(_library_folder(folder) or _new_library_folder(folder)) as library:
        if live_from is not None and not library.passed(spec.digest):
            raise LibraryError(
                f"{spec.name} ({spec.digest}) cannot become live: it needs an exam first, and there is no card of one "
                "that it passed. Add it without --live-from, and see `rlar exam`"
            )
        new = library.propose(spec, source, by=by, why=why)
        if live_from is not None:
            library.append("live", spec.digest, by=by, why=why, step=live_from, replaces=replaces)
        state = library.standings()[spec.digest]
        if as_json:
            record = {"tool": spec.name, "digest": spec.digest, "new": new, "state": state.event, "step": state.step}
            _print_json(record | {"library": str(library.path)})
        else:
            print(f"{spec.name} ({spec.digest}) is {'' if new else 'there already, '}{state.event} in {library.path}")
    return OK


def _tools_retire(tool: str, folder: str | None, step: int | None, why: str, by: str, as_json: bool) -> int:
    with Library(_open_library(folder).path) as library:
        event = library.append("retired", library.find(tool), by=by, why=why, step=step)
    if as_json:
        _print_json({"tool": event.tool, "digest": event.digest, "state": event.event, "step": event.step})
    else:
        print(f"{event.tool} ({event.digest}) is retired from step {event.step} on")
    return OK


def _tools_export(tool: str, file: str, folder: str | None, force: bool) -> int:
    library = _open_library(folder)
    digest = library.find(tool)
    source = library.source(digest)
    if source is None:
        raise LibraryError(f"{tool}: the library has no code of {digest}; `rlar tools show` says what it is")
    if file == "-":
        sys.stdout.write(source)
        return OK
    try:
        with open(file, "w" if force else "x", encoding="utf-8", newline="") as out:
            out.write(source)
    except FileExistsError:
        raise ConfigError(f"{file} is there already; --force overwrites it") from None
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error}") from None
    _complain(f"{library.spec(digest).name} ({digest}) is in {file}")
    return OK


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
