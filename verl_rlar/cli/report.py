# SPDX-License-Identifier: Apache-2.0
"""`rlar report`: a run to look at, as one HTML file, or live while it trains."""

from __future__ import annotations

import os
import webbrowser
from pathlib import Path
from typing import Annotated, Any

import typer

from verl_rlar.cli.app import (
    OK,
    Json,
    Set,
    app,
    complain,
    configured,
    library_folder,
    print_json,
    progress_bar,
    run,
)
from verl_rlar.config import RlarConfig
from verl_rlar.errors import ConfigError
from verl_rlar.library import LibraryView

FILE = "report.html"
NO_LIBRARY = "there is no library in {}, so tools come without their exams and states; --in FOLDER names one"


@app.command("report", short_help="Make a report of a run.")
def report_command(
    folder: Annotated[
        str, typer.Argument(metavar="RUN", help="The folder of a run: `rlar`, or the checkpoint folder.")
    ],
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE", help=f"Where to. Default: {FILE}, here.")
    ] = None,
    live: Annotated[
        bool, typer.Option("--live", help="Serve it on 127.0.0.1 and refresh it while the run trains, until Ctrl-C.")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="N", help="For --live; 0: any that is free.")] = 0,
    library: Annotated[
        str | None, typer.Option("--in", metavar="FOLDER", help="The library, where it is not in the run's folder.")
    ] = None,
    groups: Annotated[int, typer.Option(min=0, metavar="N", help="Most groups of responses to look at.")] = 240,
    texts: Annotated[
        bool,
        typer.Option("--texts/--no-texts", help="Prompts, responses, sources, reasons; without: to be shown around."),
    ] = True,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that is no report.")] = False,
    show: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    as_json: Json = False,
    settings: Set = None,
) -> None:
    """Make a report of a run: rewards, routing, tools, samples, alarms, costs.

    The file holds all that it needs and can be opened, sent and printed. Texts in it are the data's and the policy's:
    they are shown, and never run. A run may be training meanwhile; nothing is written into it. With --json: the
    figures as one object, without samples and sources.

    \b
    Examples:
      rlar report checkpoints/qwen3-8b --open
      rlar report checkpoints/qwen3-8b -o qwen3-8b.html --groups 400
      rlar report checkpoints/qwen3-8b --live --port 8420
      rlar report checkpoints/qwen3-8b --json | jq '.alarms[].title'
    """
    run(lambda: _report(folder, output, live, port, library, groups, texts, force, show, as_json, configured(settings)))


def _report(
    folder: str,
    output: str | None,
    live: bool,
    port: int,
    library: str | None,
    groups: int,
    texts: bool,
    force: bool,
    show: bool,
    as_json: bool,
    config: RlarConfig,
) -> int:
    from verl_rlar.replay import run_folder
    from verl_rlar.report import figures, page

    if show and as_json and output is None:
        raise ConfigError("--open wants a file, and --json alone writes none: add -o FILE")
    if live and (as_json or output is not None):
        raise ConfigError("--live serves the report; leave --json and --output away, or --live")
    place = run_folder(folder)
    library = library or config.library.path
    found = library_folder(library or str(place))
    if library is not None and found is None:
        raise ConfigError(f"there is no library at {library}; leave --in away where it is in the run's folder")

    def gather() -> dict[str, Any]:
        view = LibraryView(found) if found else None
        agents = Path(config.agents.transcripts) if config.agents.transcripts else None
        tolerance = config.life.tolerance
        return figures.gather(place, view, agents=agents, groups=groups, texts=texts, tolerance=tolerance)

    if live:
        return _serve(gather, place, found, port, show=show)
    file = Path(output or FILE)
    writes = output is not None or not as_json
    if writes:
        _check(file, force=force)
    with progress_bar() as on_progress:
        on_progress("reading the ledger", 0, None)
        gathered = gather()
    if found is None:
        complain(NO_LIBRARY.format(place))
    if writes:
        content = page.render(gathered)
        _write(file, content)
        alarms = len(gathered["alarms"])
        complain(f"{file}: {gathered['run']['rows']:,} responses, {alarms} alarms, {len(content) / 1e6:.1f} MB")
        if show:
            _open(file.absolute().as_uri())
    if as_json:
        print_json({name: value for name, value in gathered.items() if name not in ("samples", "sources")})
    return OK


def _serve(gather: Any, place: Path, library: Path | None, port: int, *, show: bool) -> int:
    from verl_rlar.report.live import Live, watched

    with Live(gather, watched(place, library), port=port) as server:
        print(server.url, flush=True)
        complain("the report is served there until Ctrl-C; from another machine: ssh -L")
        if library is None:
            complain(NO_LIBRARY.format(place))
        if show:
            _open(server.url)
        server.join()
    return OK


def _open(address: str) -> None:
    if not webbrowser.open(address):
        complain(f"there is no browser here; open {address} in one")


def _check(file: Path, *, force: bool) -> None:
    """Makes sure, before the work, that a file may be written."""
    from verl_rlar.report.page import MARKER

    try:
        with open(file, "rb") as old:
            ours = f'name="generator" content="{MARKER}"'.encode() in old.read(4000)
    except FileNotFoundError:
        ours = True
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror}") from None
    if not ours and not force:
        raise ConfigError(f"{file} is there already, and no report; --force overwrites it")
    if not file.absolute().parent.is_dir():
        raise ConfigError(f"cannot write {file}: there is no folder {file.absolute().parent}")


def _write(file: Path, content: bytes) -> None:
    aside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        aside.write_bytes(content)
        os.replace(aside, file)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise ConfigError(f"cannot write {file}: {error.strerror}") from None
