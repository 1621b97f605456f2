# SPDX-License-Identifier: Apache-2.0
"""`rlar tools`: looks into a run's library of tools, and changes it."""

from __future__ import annotations

import sys
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from verl_rlar.cli.app import (
    OK,
    In,
    Json,
    Output,
    Set,
    app,
    complain,
    configured,
    library_folder,
    new_library_folder,
    open_library,
    print_json,
    run,
    submitted,
    visible,
)
from verl_rlar.config import RlarConfig
from verl_rlar.errors import ConfigError, LibraryError
from verl_rlar.export import Target, exported_file
from verl_rlar.inbox import Submission
from verl_rlar.library import FOLDER_NAME, Event, EventKind, LibraryView, Trusted, spec_to_json
from verl_rlar.trusted import trusted_tools
from verl_rlar.types import Kind, ToolSpec

STATES = {"live": "green", "shadow": "cyan", "rejected": "red", "quarantined": "red", "retired": "dim"}


tools_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(tools_app, name="tools")


class Stage(str, Enum):
    """Where `rlar tools promote` puts a tool."""

    SHADOW = "shadow"
    LIVE = "live"


Tool = Annotated[str, typer.Argument(metavar="TOOL", help="A name, a digest, or the beginning of one.")]
Why = Annotated[str, typer.Option(metavar="TEXT", help="For the log.")]
From = Annotated[
    int | None, typer.Option("--from", min=0, metavar="STEP", help="From which step on. Default: the next one.")
]
By = Annotated[str, typer.Option(metavar="WHO", help="Who says so, for the log.")]


@tools_app.callback()
def tools_group() -> None:
    """Look into a run's library of tools, and change it.

    While a training runs, its service is the only one that writes: it takes a change in at its next step boundary.
    """


@tools_app.command("ls", short_help="List the tools.")
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
    run(lambda: _tools_ls(folder, step, as_json, configured(settings)))


@tools_app.command("show", short_help="Show a tool.")
def tools_show_command(tool: Tool, folder: In = None, as_json: Json = False, settings: Set = None) -> None:
    """Show a tool: its description, what it misses, its card, and what became of it.

    Without a library: one of the tools that a training with these settings begins with.

    \b
    Examples:
      rlar tools show final_answer
      rlar tools show 3fa9 --json | jq .events
    """
    run(lambda: _tools_show(tool, folder, as_json, configured(settings)))


@tools_app.command("add", short_help="Propose a verifier.")
def tools_add_command(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A verifier: *.py with a function `score`.")],
    folder: In = None,
    name: Annotated[str | None, typer.Option(help="Name of the tool. Default: that of the file.")] = None,
    kind: Annotated[
        list[Kind] | None, typer.Option("--kind", help="What it is for, if the file does not say. Repeatable.")
    ] = None,
    why: Annotated[str, typer.Option(metavar="TEXT", help="For the log.")] = "added by hand",
    by: By = "command line",
    as_json: Json = False,
    settings: Set = None,
) -> None:
    """Put a verifier that nobody has read into the library, as proposed. It is not run here.

    The file has a function score(prompt, response, reference, extra) that returns a number in [0, 1] or None, and may
    say KINDS, NEEDS_REFERENCE, TIMEOUT_S and DESCRIPTION. It scores only in a box, and only after an exam.

    \b
    Examples:
      rlar tools add unit_price.py --kind math
      rlar tools add unit_price.py --in checkpoints/qwen3-8b/rlar
    """
    run(lambda: _tools_add(file, folder, name, kind or [], why, by, as_json, configured(settings)))


@tools_app.command("promote", short_help="Give a tool a chance, or a say.")
def tools_promote_command(
    tool: Tool,
    why: Why,
    folder: In = None,
    to: Annotated[Stage, typer.Option(help="The shadow, where it scores without a say, or live.")] = Stage.SHADOW,
    step: From = None,
    replace: Annotated[bool, typer.Option("--replace", help="Take the place of the live tool of its name.")] = False,
    by: By = "command line",
    as_json: Json = False,
    settings: Set = None,
) -> None:
    """Give a tool that passed its exam a chance, or a say, from a step on.

    From the shadow a training promotes it by itself when it has shown what it is worth (rlar.life.*).

    \b
    Examples:
      rlar tools promote unit_price --why "fits the new rows" --in checkpoints/qwen3-8b/rlar
      rlar tools promote unit_price --to live --replace --from 40 --why "version 2"
    """
    run(lambda: _tools_change(to.value, tool, folder, step, why, by, as_json, replace, configured(settings)))


@tools_app.command("retire", short_help="Take a tool out.")
def tools_retire_command(
    tool: Tool,
    why: Why,
    folder: In = None,
    step: From = None,
    by: By = "command line",
    as_json: Json = False,
    settings: Set = None,
) -> None:
    """Take a tool out, from a step on. What it scored stays in the ledger, and it stays in the library.

    \b
    Examples:
      rlar tools retire token_f1 --why "too lenient on names" --in checkpoints/qwen3-8b/rlar
    """
    run(lambda: _tools_change("retired", tool, folder, step, why, by, as_json, False, configured(settings)))


@tools_app.command("export", short_help="Write a tool's code into a file.")
def tools_export_command(
    tool: Tool,
    file: Annotated[str, typer.Argument(metavar="FILE", help="Where to; - is standard output.")],
    folder: In = None,
    target: Annotated[
        Target, typer.Option("--as", help="Its code, or a file for use in verl, TRL or verifiers.")
    ] = Target.SOURCE,
    force: Annotated[
        bool, typer.Option("--force", help="Overwrite the file; export a verifier that passed no exam, too.")
    ] = False,
    as_json: Json = False,
    settings: Set = None,
) -> None:
    """Write a tool's code into a file, byte by byte as it scored; or a file that scores with it elsewhere.

    With --as verl, trl or verifiers the file has a reward function for that framework, and needs verl-rlar there. A
    verifier's code is data in it, and runs in a box only; it must have passed an exam. Settings (scoring, rules,
    sandbox) go along.
    Without a library: one of the tools that a training with these settings begins with.

    \b
    Examples:
      rlar tools export 3fa9c0de12345678 unit_price.py
      rlar tools export unit_price unit_price_trl.py --as trl --in checkpoints/qwen3-8b/rlar
      rlar tools export final_answer final_answer_verl.py --as verl
    """
    run(lambda: _tools_export(tool, file, folder, target, force, as_json, configured(settings)))


def _tools_ls(folder: str | None, step: int | None, as_json: bool, config: RlarConfig) -> int:
    rows: list[tuple[ToolSpec, str, int, str, str]]
    library = _library(folder, config)
    if library is None:
        complain(f"there is no library at {Path(config.run_dir) / FOLDER_NAME}; a training begins with these")
        rows = [(tool.spec, "live", 0, tool.by, "at the start") for tool in trusted_tools(config)]
    else:
        live = library.latest() if step is None else library.snapshot(step)
        order = {tool.digest: place for place, tool in enumerate(live.tools)}
        standings = library.standings(step).values()
        rows = [
            (library.spec(standing.digest), standing.event, standing.step, standing.by, standing.why)
            for standing in sorted(standings, key=lambda standing: order.get(standing.digest, len(order)))
        ]
    table = Table("tool", "state", "since", "kind", "checks", "digest", "by", "why", box=None, pad_edge=False)
    for spec, state, since, by_whom, why in rows:
        kinds = sorted(kind.value for kind in spec.scope.kinds)
        if as_json:
            record = {"tool": spec.name, "digest": spec.digest, "state": state, "step": since, "kind": spec.kind}
            print_json(record | {"checks": kinds, "by": by_whom, "why": why, "description": spec.description})
        checks = ("gate: " if spec.gate else "") + ("all" if len(kinds) == len(Kind) else " ".join(kinds))
        cells = (spec.name, state, str(since), spec.kind, checks, spec.digest, by_whom, why)
        table.add_row(
            *(Text(visible(cell), style=STATES.get(cell, "") if n == 1 else "") for n, cell in enumerate(cells))
        )
    if not as_json:
        Output().table(table)
    return OK


def _tools_show(tool: str, folder: str | None, as_json: bool, config: RlarConfig) -> int:
    card, text, events = None, None, list[Event]()
    if library := _library(folder, config):
        digest = library.find(tool)
        spec, standing, card = library.spec(digest), library.standings()[digest], library.card(digest)
        events = [event for event in library.events if event.digest == digest or event.replaces == digest]
        text, code = library.card_text(digest), str(library.path / "tools" / digest)
        state, step, why = standing.event, standing.step, standing.why
    else:
        trusted = _trusted(tool, config)
        spec, digest, code = trusted.spec, trusted.spec.digest, f"rlar tools export {trusted.spec.name} -"
        state, step, why = "live", 0, "a training begins with it"
    if as_json:
        about = {"digest": digest, "state": state, "step": step, "spec": spec_to_json(spec)}
        print_json(about | {"card": card, "events": [asdict(event) for event in events]})
        return OK
    console = Output()

    def say(label: str, text: str) -> None:
        console.print(Text.assemble((f"{label:<13}", "bold"), visible(text)), soft_wrap=True)

    say("tool", f"{spec.name} ({digest})")
    say("state", f"{state} since step {step}: {why}")
    say("kind", f"{spec.kind}, {spec.target}" + (", a gate" if spec.gate else ""))
    kinds = " ".join(sorted(kind.value for kind in spec.scope.kinds))
    say("checks", kinds + ("" if not spec.scope.needs_reference else "; needs a reference"))
    say("range", f"{spec.low:g} to {spec.high:g}, within {spec.timeout_s:g} s" + (", in a box" if spec.boxed else ""))
    if spec.wraps:
        say("wraps", ", ".join(spec.wraps))
    say("made by", spec.origin)
    say("description", spec.description or "-")
    for missed in spec.misses:
        say("misses", missed)
    say("code", code)
    for event in events:
        what = event.event if event.digest == digest else f"replaced by {event.digest}"
        say(f"event {event.seq}", f"{event.time[:19]}  step {event.step}  {what}, by {event.by}: {event.why}")
    say("card", "none: it had no exam" if text is None else "")
    for line in (text or "").splitlines():
        console.print(Text("  " + visible(line)), soft_wrap=True)
    return OK


def _tools_add(
    file: str,
    folder: str | None,
    name: str | None,
    kinds: list[Kind],
    why: str,
    by: str,
    as_json: bool,
    config: RlarConfig,
) -> int:
    from verl_rlar.exam.subject import verifier

    try:
        source = Path(file).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the verifier {file}: {getattr(error, 'strerror', None) or error}") from None
    spec = verifier(source, name=name or Path(file).stem, kinds=kinds).spec
    asked = Submission(digest=spec.digest, spec=spec_to_json(spec), source=source, by=by, why=why)
    submitted(library_folder(folder, config) or new_library_folder(folder, config), asked, spec.name, as_json=as_json)
    return OK


def _tools_change(
    event: EventKind,
    tool: str,
    folder: str | None,
    step: int | None,
    why: str,
    by: str,
    as_json: bool,
    replace: bool,
    config: RlarConfig,
) -> int:
    if not why.strip():
        raise ConfigError("--why is empty: say for the log why this is done")
    library = open_library(folder, config)
    digest = library.find(tool)
    asked = Submission(digest=digest, event=event, step=step, replace=replace, by=by, why=why)
    submitted(library.path, asked, library.spec(digest).name, as_json=as_json)
    return OK


def _tools_export(
    tool: str, file: str, folder: str | None, target: Target, force: bool, as_json: bool, config: RlarConfig
) -> int:
    spec, source, examined = _tool_and_source(tool, folder, config)
    if target is not Target.SOURCE:
        if not (examined or force):
            raise LibraryError(
                f"{spec.name} ({spec.digest}) did not pass an exam, which a tool needs before it scores: `rlar exam`; "
                "--force exports it all the same, and the file says so"
            )
        source = exported_file(spec, source, target, config, examined=examined)
    if source is None:
        raise LibraryError(f"{tool}: the library has no code of {spec.digest}; `rlar tools show` says what it is")
    if file == "-":
        if as_json:
            raise ConfigError("--json and - both want standard output: name a file, or leave --json away")
        sys.stdout.write(source)
        return OK
    try:
        with open(file, "w" if force else "x", encoding="utf-8", newline="") as out:
            out.write(source)
    except FileExistsError:
        raise ConfigError(f"{file} is there already; --force overwrites it") from None
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror}") from None
    if as_json:
        print_json({"tool": spec.name, "digest": spec.digest, "as": target.value, "file": file})
    complain(f"{spec.name} ({spec.digest}) is in {file}")
    return OK


def _tool_and_source(tool: str, folder: str | None, config: RlarConfig) -> tuple[ToolSpec, str | None, bool]:
    """A tool of the library, its code, and whether it may score; without one, of those that a training begins with."""
    if library := _library(folder, config):
        digest = library.find(tool)
        return library.spec(digest), library.source(digest), library.may_return(digest)
    trusted = _trusted(tool, config)
    return trusted.spec, trusted.source, True


def _library(folder: str | None, config: RlarConfig) -> LibraryView | None:
    """The library that is meant; None: none was named, and there is none."""
    named = folder or config.library.path
    return None if not named and library_folder(None, config) is None else open_library(folder, config)


def _trusted(tool: str, config: RlarConfig) -> Trusted:
    """One of the tools that a training begins with."""
    tools = trusted_tools(config)
    found = [one for one in tools if one.spec.name == tool] or [
        one for one in tools if tool and one.spec.digest.startswith(tool)
    ]
    if len(found) == 1:
        return found[0]
    names = ", ".join(trusted.spec.name for trusted in tools)
    raise LibraryError(f"there is no library here, and no tool {tool!r} that a training begins with: {names}")
