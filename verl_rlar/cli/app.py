# SPDX-License-Identifier: Apache-2.0
"""What the subcommands of `rlar` share: options, settings, exit codes, progress and output."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from verl_rlar import __version__
from verl_rlar.config import RlarConfig, parse
from verl_rlar.errors import ConfigError, RlarError
from verl_rlar.inbox import Submission, submit
from verl_rlar.ledger import FILE_NAME as LEDGER
from verl_rlar.library import FOLDER_NAME, SCHEMA_FILE, Library, LibraryView

OK, BAD, USAGE = 0, 1, 2
WIDTH = 160
"""Columns of the tables where standard output is no terminal."""
DEFAULTS = RlarConfig()
RUN = "rlar"
"""Name of the run's folder inside its checkpoint folder, as ``+rlar=default`` has it."""
STYLES = {"scored": "green", "abstained": "yellow", "failed": "red", "hacked": "magenta", "ok": "green", "lost": "red"}

app = typer.Typer(
    name="rlar",
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
In = Annotated[
    str | None,
    typer.Option(
        "--in", metavar="FOLDER", help="A library, or the folder of a run. Default: rlar, as in the settings."
    ),
]
OnlyIn = Annotated[
    str | None,
    typer.Option(
        "--in", metavar="FOLDER", help="A library, or a run. Default: none, the tools a training begins with."
    ),
]


def main() -> None:
    """Runs the command."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    signal.signal(signal.SIGINT, _interrupt)  # at once, where asyncio's own handler would wait for the next await
    app()


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


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
    """Agent-backed rewards for verl: score responses, plan data sets, look at runs, find and examine tools.

    Every command has --json (one object per line, and nothing else, on standard output; progress and faults go to
    standard error), --set KEY=VALUE (any setting under rlar.*) and examples in its --help.

    Exit codes: 0 all is well; 1 something in the data, the tools or the machine is not; 2 the command, a setting or a
    file is wrong, and the message says what to do; 130 Ctrl-C.

    Tab completion of commands and options: rlar --install-completion.

    \b
    Examples:
      rlar score answers.jsonl
      rlar score answers.jsonl --json | jq .value
      echo '{"prompt": "6*7?", "response": "It is 42.", "reference": "42"}' | rlar score -
      rlar plan train.parquet
      rlar exam final_answer --data train.parquet
      rlar doctor
      rlar bench answers.jsonl
      rlar scout "en-fr translation"
      rlar fetch OWNER/NAME@COMMIT
      rlar write "the final number is right" --data train.parquet
      rlar build train.parquet --in checkpoints/run --dry-run
      rlar tools ls
      rlar report checkpoints/run
      rlar rescore checkpoints/run --steps 40..60 --tool unit_price.py
      rlar diff final_answer unit_price.py --data train.parquet
    """


def run(work: Callable[[], Coroutine[Any, Any, int] | int]) -> None:
    """Runs a command to its exit code; what the user can mend becomes a message."""
    sys.path.insert(0, os.getcwd())  # the user's own package.module, whatever starts us
    try:
        result = work()
        code = result if isinstance(result, int) else asyncio.run(result)
        sys.stdout.flush()
    except RlarError as error:
        complain(f"error: {error}")
        code = USAGE
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BrokenPipeError:
        _silence()
        code = 128 + signal.SIGPIPE
    except PermissionError as error:
        complain(f"error: {error.filename or 'a file'}: {error.strerror}; may you read it, and its folder?")
        code = USAGE
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        _silence()
        complain(f"error: the output cannot be written: {error.strerror}")
        code = USAGE
    raise typer.Exit(code)


def _silence() -> None:
    """Nothing goes to standard output any more, so that the flush at exit does not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def configured(settings: list[str] | None) -> RlarConfig:
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


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int | None], None]]:
    """A progress bar on standard error, if that is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        tasks: dict[str, Any] = {}

        def on_progress(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done, total=total)

        yield on_progress


class Output(Console):
    """Standard output for people: a reader that goes away is met by `run`, and no table loses a letter."""

    def __init__(self) -> None:
        super().__init__(highlight=False, width=None if sys.stdout.isatty() else WIDTH)

    def on_broken_pipe(self) -> None:
        raise  # the BrokenPipeError that is being handled; rich would exit with 1

    def table(self, table: Table) -> None:
        """Prints a table. Where it is too wide, texts are broken between words; where that is not enough, it is as wide
        as for a file, and the terminal breaks the lines. No name, digest or number is cut."""
        gaps = 2 * len(table.columns) - (0 if table.pad_edge else 2)
        texts = [[str(text) for text in (column.header, *column.cells)] for column in table.columns]
        whole = [max(map(cell_len, column)) for column in texts]
        least = [max(cell_len(word) for text in column for word in (text.split() or [""])) for column in texts]
        room, least_room = self.width, gaps + sum(least)
        self.width = room if room >= least_room else max(WIDTH, least_room)
        spare = self.width - least_room
        needs = sorted((whole[place] - least[place], place) for place in range(len(whole)))
        for left, (need, place) in zip(range(len(needs), 0, -1), needs, strict=True):
            more = min(need, spare // left)
            spare -= more
            table.columns[place].width = least[place] + more
        self.print(table, crop=False)
        self.width = room


def library_folder(folder: str | None, config: RlarConfig = DEFAULTS) -> Path | None:
    """The library that is meant: ``--in``, or else that of the settings; None if there is none.

    In a checkpoint folder that of the training comes before one that somebody made beside it.
    """
    place = Path(folder or config.library.path or config.run_dir)
    for candidate in (place, place / RUN / FOLDER_NAME, place / FOLDER_NAME):
        if (candidate / SCHEMA_FILE).exists():
            return candidate
    return None


def open_library(folder: str | None, config: RlarConfig = DEFAULTS) -> LibraryView:
    """The library that is meant.

    Raises:
        LibraryError: There is none, or it cannot be read.
    """
    return Library.read(library_folder(folder, config) or Path(folder or config.library.path or config.run_dir))


def new_library_folder(folder: str | None, config: RlarConfig = DEFAULTS) -> Path:
    """Where a library is made, if there is none: where a training will look for it. A folder that is not named ``rlar``
    and has no ledger is taken for that of the checkpoints.

    Raises:
        ConfigError: A file is in the way.
    """
    if folder is None and config.library.path:
        return Path(config.library.path)
    place = Path(folder or config.run_dir)
    if place.is_file():
        raise ConfigError(f"{place} is a file; the folder of a run or of a library is wanted")
    if place.name == FOLDER_NAME:
        return place
    of_run = folder is None or place.name == RUN or (place / LEDGER).exists()
    return (place if of_run else place / RUN) / FOLDER_NAME


def submitted(path: Path, asked: Submission, name: str, *, as_json: bool) -> None:
    """Asks something of a library, and prints what came of it.

    Raises:
        LibraryError: It is refused.
    """
    new = not (path / SCHEMA_FILE).exists()
    came = submit(path, asked)
    if new:
        complain(f"there was no library: {path} was made")
    record: dict[str, Any] = {"tool": name, "digest": asked.digest, "library": str(path)}
    if isinstance(came, Path):
        record |= {"state": "waiting", "inbox": str(came)}
        said = f"{name} ({asked.digest}): a training writes this library, and takes it in at its next step ({came})"
    else:
        standing = Library.read(path).standings()[asked.digest]
        record |= {"state": standing.event, "step": standing.step}
        said = f"{name} ({asked.digest}) is {standing.event} from step {standing.step} on, in {path}"
    if as_json:
        print_json(record)
    else:
        print(visible(said))


@dataclass(frozen=True, kw_only=True)
class BadLine:
    """A line that cannot be scored."""

    line: int
    error: str


def visible(text: str) -> str:
    """A text whose control characters and the like are escaped, so that a terminal shows it and does not obey it."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def print_json(record: Mapping[str, Any]) -> None:
    print(json.dumps(record, ensure_ascii=True, allow_nan=False), flush=True)


def complain(message: str) -> None:
    print(f"rlar: {visible(message)}", file=sys.stderr, flush=True)


def complain_of(line: BadLine) -> None:
    complain(f"line {line.line}: {line.error}")
