# SPDX-License-Identifier: Apache-2.0
"""`rlar exam`: examines a tool by hand."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from verl_rlar.cli.app import (
    BAD,
    OK,
    Json,
    Set,
    app,
    complain,
    configured,
    library_folder,
    new_library_folder,
    print_json,
    progress_bar,
    run,
    submitted,
    visible,
)
from verl_rlar.config import RlarConfig
from verl_rlar.errors import ConfigError, DataError, LibraryError, ModelRefused
from verl_rlar.inbox import Submission, record_of
from verl_rlar.library import EventKind, Library, builtin_snapshot, spec_to_json
from verl_rlar.types import Kind

if TYPE_CHECKING:
    from verl_rlar.exam.evidence import Evidence  # the exam's imports take a second
    from verl_rlar.exam.subject import Subject
    from verl_rlar.serving import Pool
    from verl_rlar.tools.reward_model import RewardModelRunner


class Then(str, Enum):
    """What becomes of a tool that passed its exam."""

    SHADOW = "shadow"
    LIVE = "live"
    NOTHING = "nothing"


@app.command("exam", short_help="Examine a tool: does it tell right from wrong?")
def exam_command(
    tool: Annotated[
        str,
        typer.Argument(
            metavar="TOOL",
            help="A built-in tool, package.module:function, a verifier (*.py), or a reward model: OWNER/NAME[@COMMIT] "
            "on the hub, or ./FOLDER.",
        ),
    ],
    data: Annotated[
        list[str] | None, typer.Option("--data", metavar="FILE", help="Rows to make cases from. Repeatable.")
    ] = None,
    cases: Annotated[
        list[str] | None, typer.Option("--cases", metavar="FILE", help="A case file (JSON lines). Repeatable.")
    ] = None,
    kind: Annotated[
        list[Kind] | None, typer.Option("--kind", help="What a verifier, or a reward model, is for. Repeatable.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides which rows are taken, what is changed, and what is sealed.")] = 0,
    as_json: Json = False,
    folder: Annotated[
        str | None, typer.Option("--in", metavar="FOLDER", help="A library, or a run: the card goes there.")
    ] = None,
    then: Annotated[Then, typer.Option(help="With --in: what becomes of a tool that passed.")] = Then.SHADOW,
    unsure: Annotated[
        bool, typer.Option("--unsure", help="Examine a reward model also if nothing tells how it is asked.")
    ] = False,
    by: Annotated[str, typer.Option(metavar="WHO", help="Who says so, for the log.")] = "command line",
    settings: Set = None,
) -> None:
    """Examine a tool: does it tell right from wrong, always, in time, whoever asks?

    Cases are made from rows (gold answers, labelled ones, changes that must fail and changes that must not matter,
    attacks), or come from case files: rows with a `response` and `expect`: good, bad, abstain, or same_as:<id>.
    A verifier's file runs in a box. Prints the card; --json prints it as one object. Exit code: 0 admitted, 1 rejected.
    A reward model must pass the gate before anything is downloaded; then it is served here, and asked in many ways to
    find out which one is right. Rows with `chosen` and `rejected` show it what is right; it is for open dialogue,
    unless --kind says otherwise.
    With --in, TOOL may be one of that library, and its record stays there, passed or not. A verifier that passed goes
    into the shadow from the next step on; while a training runs, it takes this in at its next step boundary.

    \b
    Examples:
      rlar exam final_answer --data train.parquet
      rlar exam my_package.rewards:brevity --cases cases.jsonl --json | jq .reasons
      rlar exam verifier.py --data train.parquet --kind math --set exam.max_queries=100
      rlar exam unit_price.py --data train.parquet --in checkpoints/qwen3-8b/rlar --then live
      rlar exam OWNER/NAME@COMMIT --data preferences.parquet --in checkpoints/qwen3-8b/rlar
      rlar exam ./my-reward-model --data preferences.parquet --kind open --kind translation
    """
    run(
        lambda: _exam(
            tool,
            data or [],
            cases or [],
            kind or [],
            seed,
            as_json,
            folder,
            then.value,
            unsure,
            by,
            configured(settings),
        )
    )


async def _exam(
    tool: str,
    data: list[str],
    cases: list[str],
    kinds: list[Kind],
    seed: int,
    as_json: bool,
    folder: str | None,
    then: str,
    unsure: bool,
    by: str,
    config: RlarConfig,
) -> int:
    from verl_rlar.admission import draft, is_model
    from verl_rlar.exam.hall import Hall
    from verl_rlar.exam.subject import find

    if not data and not cases:
        raise ConfigError("nothing to examine it on: give --data FILE or --cases FILE")
    sys.path.insert(0, os.getcwd())  # the user's own package.module
    path = library_folder(folder) if folder else None
    place = (path or new_library_folder(folder)) if folder else None
    if tool.startswith(("/", ".", "~")) and is_model(tool) and not Path(tool).expanduser().is_dir():
        raise ConfigError(f"there is no folder {tool}; a model on the hub is OWNER/NAME[@COMMIT]")
    known = None if is_model(tool) else (in_library(path, tool) if path else None) or find(tool, kinds)
    if folder and known and known.spec.kind == "rule":
        spec = known.spec
        if path is None or spec.digest not in Library.read(path).digests():
            raise ConfigError(
                f"{spec.name} ({spec.digest}) is no tool of a library at {folder}, or not in this version: rules come "
                "into one at the start of a training; leave --in away to see the card alone"
            )
    kinds = kinds or [Kind.OPEN]
    async with AsyncExitStack() as stack:
        on_progress = stack.enter_context(progress_bar())
        pool, runner = None, None
        if known is None or known.spec.kind == "reward_model":
            pool, runner = await _serving(stack, config)
        hall = await stack.enter_async_context(Hall(config, runner))
        wanted = known.spec if known else draft(kinds)
        evidence = await hall.gather(data, cases, wanted, seed=seed, on_progress=on_progress)
        _complain_of_rows(evidence, [*data, *cases])
        if known is None and not evidence.cases:
            of, files = ", ".join(kind.value for kind in kinds), ", ".join((*data, *cases))
            raise DataError(
                f"no case for {of} queries can be made of {files}: give rows with `chosen` and `rejected`, or with "
                "`response` and `label`, and say by --kind what the model is for"
            )
        if known and pool and runner:
            await pool.ensure([runner.model(known.spec)])
        try:
            subject = known or await _brought(tool, stack, pool, kinds, evidence, path, unsure, config, on_progress)
        except ModelRefused as refused:
            return _refused(tool, refused, as_json)
        examination = await hall.examine(subject, evidence, seed=seed, on_progress=on_progress)
    card, spec = examination.card, examination.spec
    if as_json:
        print_json(card.as_dict())
    else:
        print("\n".join(map(visible, card.markdown().splitlines())))
    if place:
        events: dict[str, EventKind] = {"shadow": "shadow", "live": "live"}
        asked = Submission(
            digest=spec.digest,
            spec=spec_to_json(spec),
            source=subject.source or None,
            by=by,
            why="brought to its exam",
            exam=record_of(examination, config.life.canaries),
            event=events.get(then) if spec.kind != "rule" else None,
            replace=True,
        )
        submitted(place, asked, spec.name, as_json=as_json)
    return OK if card.admitted else BAD


async def _serving(stack: AsyncExitStack, config: RlarConfig) -> tuple[Pool, RewardModelRunner]:
    """What serves and runs reward models until the stack ends.

    Raises:
        ToolUnavailable: It is not installed.
    """
    from verl_rlar.admission import able
    from verl_rlar.serving import Pool
    from verl_rlar.snapshots import Snapshots
    from verl_rlar.tools.reward_model import RewardModelRunner

    able(config.serving)
    pool = await stack.enter_async_context(Pool(config.serving))
    return pool, RewardModelRunner(pool, Snapshots(config.hub).locate)


async def _brought(
    name: str,
    stack: AsyncExitStack,
    pool: Pool | None,
    kinds: list[Kind],
    evidence: Evidence,
    path: Path | None,
    unsure: bool,
    config: RlarConfig,
    on_progress: Callable[[str, int, int | None], None],
) -> Subject:
    """A reward model by the name of its repository or folder, served in the pool.

    Raises:
        ModelRefused, HubError, ToolUnavailable: See `verl_rlar.admission.bring`.
    """
    from verl_rlar.admission import bring, own_pairs, taken_names
    from verl_rlar.hub import Hub

    assert pool
    others = [*builtin_snapshot().tools]
    if path:
        library = Library.read(path)
        others += [library.spec(digest) for digest in library.digests()]
    brought = await bring(
        name,
        stack.enter_context(Hub(config.hub)),
        pool,
        config,
        kinds=kinds,
        pairs=own_pairs(evidence),
        taken=taken_names(others, name),
        unsure=unsure,
        on_progress=on_progress,
    )
    return brought.subject


def _complain_of_rows(evidence: Evidence, files: list[str]) -> None:
    """Says what in the files cannot be read.

    Raises:
        DataError: Nothing can.
    """
    first = f", the first in line {evidence.bad[0][0]}: {evidence.bad[0][1]}" if evidence.bad else ""
    if not evidence.rows and not evidence.cases:
        raise DataError(f"no row of {', '.join(files)} can be read" + (first or ": there are none"))
    if evidence.bad:
        complain(f"{len(evidence.bad):,} rows cannot be read{first}")


def _refused(tool: str, refused: ModelRefused, as_json: bool) -> int:
    if as_json:
        print_json({"tool": tool, "verdict": "refused", "reasons": list(refused.reasons)})
    else:
        said = str(refused).removesuffix("; ".join(refused.reasons)).rstrip(" .:")  # what it is, and what to do
        print(visible(f"{said}:"))
        for reason in refused.reasons:
            print(visible(f"  - {reason}"))
    return BAD


def in_library(path: Path, tool: str) -> Subject | None:
    """A tool of a library; None if it has none of that name."""
    from verl_rlar.exam.subject import Subject, find

    library = Library.read(path)
    try:
        digest = library.find(tool)
    except LibraryError:
        return None
    spec = library.spec(digest)
    if spec.kind == "rule":
        return find(spec.target)  # in today's code: no other can be run
    card = library.card(digest) or {}
    return Subject(spec=spec, source=library.source(digest) or "", model=card.get("model"))
