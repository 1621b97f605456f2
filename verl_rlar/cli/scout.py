# SPDX-License-Identifier: Apache-2.0
"""`rlar scout`: finds reward models for a task on the hub."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from verl_rlar.cli.app import (
    BAD,
    OK,
    WIDTH,
    BadLine,
    Json,
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
from verl_rlar.errors import ConfigError, DataError
from verl_rlar.row_files import read_rows
from verl_rlar.rows import query_of
from verl_rlar.types import Query

if TYPE_CHECKING:
    from verl_rlar.agents.scout import Findings  # the hub's client takes a while to import


@app.command("scout")
def scout_command(
    task: Annotated[str, typer.Argument(metavar="TASK", help="The task in a few words.")],
    data: Annotated[
        list[str] | None, typer.Option("--data", metavar="FILE", help="Rows of the task. Repeatable.")
    ] = None,
    most: Annotated[int, typer.Option(min=1, max=100, help="Most proposals.")] = 10,
    as_json: Json = False,
    settings: Set = None,
) -> None:
    """Find reward models for a task on the hub, ranked, with reasons; nothing is downloaded but headers and texts.

    \b
    Every candidate passes the gate or is refused with its reason: safetensors only, no code of its own, a known
    architecture whose weights are what its config says, licence, size, owner, a card that gives no orders. What passes
    is ranked by what the hub says about it; no LLM is used, and whether a model is good is for an exam to say.
    Exit code: 0 there are proposals, 1 there are none.

    \b
    Examples:
      rlar scout "en-fr translation"
      rlar scout "helpful chat" --data train.parquet --most 3
      rlar scout "math word problems" --set hub.max_gb=4 --set 'hub.licences=["mit", "apache-2.0", "llama3.1"]'
      rlar scout "safety" --json | jq 'select(.type == "refused") | .reasons'
    """
    run(lambda: _scout(task, data or [], most, as_json, configured(settings)))


def _scout(task: str, data: list[str], most: int, as_json: bool, config: RlarConfig) -> int:
    from verl_rlar.agents.scout import brief_of, scout
    from verl_rlar.hub import Hub

    if not task.strip():
        raise ConfigError("TASK is empty: say what is to be scored, for example 'en-fr translation'")
    brief = brief_of(task, _queries(data))
    with Hub(config.hub) as hub, progress_bar() as on_progress:
        findings = scout(brief, hub, most=most, on_progress=on_progress)
    for fault in findings.faults:
        complain(fault)
    if as_json:
        for record in _records(findings):
            print_json(record)
    else:
        _print(findings)
    return OK if findings.proposals else BAD


def _queries(files: list[str]) -> Iterator[Query]:
    for file in files:
        for number, row in read_rows(file):
            try:
                if isinstance(row, DataError):
                    raise row
                yield query_of(row)
            except DataError as error:
                complain_of(BadLine(line=number, error=str(error)))


def _records(findings: Findings) -> Iterator[dict[str, Any]]:
    """Findings as JSON-like objects; `type` is ``proposal``, ``refused`` or ``summary``."""
    tree = findings.as_dict()
    for rank, proposal in enumerate(tree.pop("proposals"), start=1):
        yield {"type": "proposal", "rank": rank, **proposal}
    for refusal in tree.pop("refused"):
        yield {"type": "refused", **refusal}
    counts = {"proposals": len(findings.proposals), "refused": len(findings.refused)}
    yield {"type": "summary", **tree, **counts}


def _print(findings: Findings) -> None:
    from verl_rlar.agents.scout import SCORING_TEXT

    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)

    def say(text: str = "", style: str = "") -> None:
        console.print(Text(visible(text), style=style), soft_wrap=True)

    brief = findings.brief
    about = ", ".join((*brief.topics, *brief.words, *brief.languages))
    say(f"Looked for: {about}. {findings.found:,} models found, {findings.looked_at:,} looked into", "bold")
    say(f"Ranked by {findings.by}.")
    if findings.proposals:
        say()
        table = Table("", "model", "commit", "value", "scores by", "licence", "parameters", "size", box=None)
        for rank, proposal in enumerate(findings.proposals, start=1):
            cells = (
                str(rank),
                proposal.repo,
                proposal.commit[:10],
                f"{proposal.value:.3f}",
                SCORING_TEXT[proposal.scoring],
                proposal.licence,
                f"{proposal.parameters:,}",
                _size(proposal.gib),
            )
            table.add_row(*(Text(visible(cell)) for cell in cells))
        console.print(table)
        say()
        for rank, proposal in enumerate(findings.proposals, start=1):
            say(f"{rank:>3}  {proposal.why}", "dim")
    else:
        say("No model passed the gate: name the task differently, or look at the reasons and the settings of rlar.hub.")
    if findings.refused:
        say()
        say("Refused", "bold")
        for refusal in findings.refused:
            say(f"  {refusal.repo}", "yellow")
            for reason in refusal.reasons:
                say(f"      {reason}", "dim")


def _size(gib: float) -> str:
    return f"{gib:.2f} GiB" if gib >= 0.01 else f"{gib * 1024:.2f} MiB"
