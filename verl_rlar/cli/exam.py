# SPDX-License-Identifier: Apache-2.0
"""`rlar exam`: examines a tool by hand."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from verl_rlar.cli.app import (
    BAD,
    OK,
    Json,
    Set,
    app,
    configured,
    print_json,
    progress_bar,
    run,
    visible,
)
from verl_rlar.config import RlarConfig
from verl_rlar.errors import ConfigError
from verl_rlar.types import Kind


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
    run(lambda: _exam(tool, data or [], cases or [], kind or [], seed, as_json, configured(settings)))


async def _exam(
    tool: str, data: list[str], cases: list[str], kinds: list[Kind], seed: int, as_json: bool, config: RlarConfig
) -> int:
    from verl_rlar.exam.hall import examine_files

    if not data and not cases:
        raise ConfigError("nothing to examine it on: give --data FILE or --cases FILE")
    sys.path.insert(0, os.getcwd())  # the user's own package.module
    with progress_bar() as on_progress:
        card = await examine_files(tool, data, cases, config, kinds=kinds, seed=seed, on_progress=on_progress)
    if as_json:
        print_json(card.as_dict())
    else:
        print("\n".join(map(visible, card.markdown().splitlines())))
    return OK if card.admitted else BAD
