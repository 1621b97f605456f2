# SPDX-License-Identifier: Apache-2.0
"""`rlar rescore`: what another tool would have given to the responses of a run."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import aclosing
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from verl_rlar.cli.app import (
    BAD,
    OK,
    Json,
    Output,
    Set,
    app,
    complain,
    configured,
    library_folder,
    print_json,
    progress_bar,
    run,
    visible,
)
from verl_rlar.config import RlarConfig
from verl_rlar.ledger import read as read_ledger
from verl_rlar.library import LibraryView
from verl_rlar.types import Score

if TYPE_CHECKING:
    from verl_rlar.replay import Rescored, Tally  # the exam's imports take a second


class Split(str, Enum):
    """Training or validation."""

    TRAIN = "train"
    VAL = "val"


Run = Annotated[str, typer.Argument(metavar="RUN", help="The folder of a run: `rlar`, or the checkpoint folder.")]
Steps = Annotated[
    str | None, typer.Option("--steps", metavar="A..B", help="Which steps: 7, 3..7, 3.. or ..7. Default: all.")
]
OfSplit = Annotated[Split, typer.Option("--split", help="Responses of training or of validation.")]
Attempt = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Which start of the training. Default: for each step, the latest."),
]
Examples = Annotated[int, typer.Option(min=0, metavar="N", help="How many examples to print.")]


@app.command("rescore", short_help="Score the stored responses of a run again.")
def rescore_command(
    folder: Run,
    tool: Annotated[
        str,
        typer.Option(
            metavar="TOOL",
            help="In the run's library: a name, a digest or its beginning, name@digest. Else a built-in tool, "
            "package.module:function, or a verifier (*.py).",
        ),
    ],
    steps: Steps = None,
    failed_only: Annotated[
        bool, typer.Option("--failed-only", help="Only responses that were unscored; the others keep their value.")
    ] = False,
    split: OfSplit = Split.TRAIN,
    attempt: Attempt = None,
    norm: Annotated[
        bool, typer.Option("--norm/--no-norm", help="As algorithm.norm_adv_by_std_in_grpo of the run.")
    ] = True,
    examples: Examples = 5,
    as_json: Json = False,
    settings: Set = None,
) -> None:
    """Score the stored responses of a run again: what would rewards and advantages have been?

    Where a route has a part of that name, the tool takes its place, and the other parts keep their scores; where it
    has none, the tool scores alone what it is for. Nothing is written. A version that scored then must say the same
    again. With --json: an object per response, per step, and a summary. Exit code: 1 if a response could not be
    re-scored (its text is gone, or the tool failed), or a score is not reproducible.

    \b
    Examples:
      rlar rescore checkpoints/qwen3-8b --steps 40..60 --tool unit_price.py
      rlar rescore checkpoints/qwen3-8b --tool final_answer@3fa9 --json | jq 'select(.type == "summary")'
      rlar rescore checkpoints/qwen3-8b --steps 12 --tool unit_tests --failed-only
    """
    run(
        lambda: _rescore(
            folder, tool, steps, failed_only, split, attempt, norm, examples, as_json, configured(settings)
        )
    )


async def _rescore(
    folder: str,
    tool: str,
    steps: str | None,
    failed_only: bool,
    split: Split,
    attempt: int | None,
    norm: bool,
    examples: int,
    as_json: bool,
    config: RlarConfig,
) -> int:
    from verl_rlar import replay

    of_steps, place = replay.parse_steps(steps), replay.run_folder(folder)
    with read_ledger(place):
        pass  # where there is none, that is said first
    library = library_of(place, config)
    subject = replay.find_tool(tool, library)
    spec, total = subject.spec, replay.Tally(examples)
    complain(f"{spec.name} ({spec.digest}) scores now")
    table = Table("step", "responses", "re-scored", "missing", "failed", box=None, pad_edge=False)
    for name in ("reward", "changed", "groups re-ranked", "flipped", "|change| of advantage", "correlation"):
        table.add_column(name)
    with progress_bar() as on_progress:
        replays: Any = replay.rescore(
            place,
            subject,
            config,
            library=library,
            steps=of_steps,
            split=split.value,
            attempt=attempt,
            failed_only=failed_only,
            norm=norm,
            on_progress=on_progress,
        )
        async with aclosing(replays):
            async for done in replays:
                of_step = replay.Tally()
                of_step.add(done)
                total.add(done)
                if as_json:
                    for one in done.responses:
                        print_json(_response(one))
                    print_json({"type": "step", "step": done.step, "attempt": done.attempt, **of_step.figures()})
                table.add_row(str(done.step), *_cells(of_step.figures()))
    figures = total.figures()
    if as_json:
        about = {
            "tool": spec.name,
            "digest": spec.digest,
            "split": split.value,
            "failed_only": failed_only,
            "norm": norm,
        }
        print_json({"type": "summary", **about, **figures})
    else:
        table.add_row("all", *_cells(figures), style="bold")
        _print(table, total, figures)
    return BAD if total.failed or figures["not_reproducible"] else OK


def library_of(folder: Path, config: RlarConfig) -> LibraryView | None:
    """The library of a run, and what is in the working directory can be imported; None: the run has none."""
    sys.path.insert(0, os.getcwd())  # the user's own package.module
    if config.library.path:
        return LibraryView(Path(config.library.path))
    found = library_folder(str(folder))
    return LibraryView(found) if found else None


def number(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None else format(value, form)


def _response(one: Rescored) -> dict[str, Any]:
    stored = one.stored
    rewards, gains = one.rewards or (None, None), one.advantages or (None, None)

    def side(score: Score | None, place: int) -> dict[str, Any]:
        said = {"value": score and score.value, "outcome": score and score.outcome.value}
        return said | {"reason": score and score.reason, "reward": rewards[place], "advantage": gains[place]}

    return {
        "type": "response",
        "step": stored.step,
        "attempt": stored.attempt,
        "uid": stored.uid,
        "session": stored.session,
        "data_source": stored.data_source,
        "kind": stored.kind.value if stored.kind else None,
        "route": stored.route.name if stored.route else None,
        "how": one.how,
        "why": one.why,
        "reproduced": one.reproduced,
        "old": side(stored.score, 0),
        "new": side(one.score, 1),
    }


def _cells(figures: dict[str, Any]) -> Sequence[str]:
    mean = f"{number(figures['old_mean'])} -> {number(figures['new_mean'])}"
    return (
        *(str(figures[name]) for name in ("responses", "rescored", "missing", "failed")),
        mean,
        number(figures["changed"], ".1%"),
        f"{figures['groups_reranked']} of {figures['groups'] - figures['groups_left_out']}",
        number(figures["flipped"], ".1%"),
        number(figures["mean_advantage_change"]),
        number(figures["advantage_correlation"]),
    )


def _print(table: Table, total: Tally, figures: dict[str, Any]) -> None:
    console = Output()
    console.table(table)

    def say(label: str, text: str) -> None:
        console.print(Text.assemble((f"{label:<15}", "bold"), visible(text)), soft_wrap=True)

    say("re-scored", f"{figures['in_place']} in place, {figures['alone']} instead of the route")
    for why, count in total.why.most_common():
        say("not re-scored", f"{count}: {why}")
    if figures["groups_left_out"]:
        say("left out", f"{figures['groups_left_out']} groups with a response that cannot be re-scored")
    for change, count in figures["outcomes"].items():
        say("outcome", f"{count:>6}  {change}")
    again = figures["reproducible"] + figures["not_reproducible"]
    if again:
        say("replayed", f"{figures['reproducible']} of {again} scores of this very version are the same again")
    for one in total.odd:
        say("not the same", _example(one))
    for one in total.changes:
        say("changed", _example(one))


def _example(one: Rescored) -> str:
    stored = one.stored
    then, now = (
        f"{number(score.value, '.4g')} {score.outcome.value} ({score.reason[:200]})" if score else "-"
        for score in (stored.score, one.score)
    )
    text = f"step {stored.step}, {stored.uid}, {stored.session}: {then} -> {now}"
    if stored.sample:
        text += f"; prompt {stored.sample.query.prompt[:300]!r}, response {stored.sample.response[-300:]!r}"
    return text
