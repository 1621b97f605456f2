# SPDX-License-Identifier: Apache-2.0
"""`rlar scout`: finds reward models for a task on the hub, by an LLM agent or by metadata."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from verl_rlar.cli.app import (
    BAD,
    OK,
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
from verl_rlar.errors import ConfigError, DataError
from verl_rlar.row_files import read_some
from verl_rlar.rows import query_of
from verl_rlar.types import Query

OURS = ("agent", "hub", "files")
"""Sources of evidence that no LLM quoted."""

if TYPE_CHECKING:
    from verl_rlar.agents.scout import Findings, Proposal  # the hub's client takes a while to import


@app.command("scout", short_help="Find reward models on the hub.")
def scout_command(
    task: Annotated[str, typer.Argument(metavar="TASK", help="The task in a few words.")],
    data: Annotated[
        list[str] | None, typer.Option("--data", metavar="FILE", help="Rows of the task. Repeatable.")
    ] = None,
    most: Annotated[int, typer.Option(min=1, max=100, help="Most proposals.")] = 10,
    no_llm: Annotated[bool, typer.Option("--no-llm", help="Use no LLM, though one is configured.")] = False,
    record: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keep the traffic with LLM and hub in this cassette.")
    ] = None,
    note: Annotated[
        str, typer.Option(metavar="TEXT", help="What the cassette says about who wrote the LLM's answers.")
    ] = "",
    replay: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Use this cassette instead of LLM and hub.")
    ] = None,
    as_json: Json = False,
    settings: Set = None,
) -> None:
    """Find reward models for a task on the hub, ranked, with reasons; nothing is downloaded but headers and texts.

    Every candidate passes the gate or is refused with its reason: safetensors only, no code of its own, a known
    architecture whose weights are what its config says, licence, size, owner, a card that gives no orders. What passes
    is ranked by what the hub says about it, or by an LLM agent, if one is configured (agents.url, agents.model: any
    OpenAI-compatible endpoint). It searches and reads; what it proposes passes the same gate. If it does not come to
    its end, metadata fill up the rest. Whether a model is good is for an exam to say.
    Exit code: 0 there are proposals, 1 there are none.

    \b
    Examples:
      rlar scout "en-fr translation"
      rlar scout "helpful chat" --data train.parquet --most 3
      rlar scout "math word problems" --set hub.max_gb=4 --set 'hub.licences=["mit", "apache-2.0", "llama3.1"]'
      rlar scout "safety" --json | jq 'select(.type == "refused") | .reasons'
      rlar scout "helpful chat" --set agents.url=http://127.0.0.1:8000/v1 --set agents.model=Qwen/Qwen3-32B
      rlar scout "helpful chat" --set agents.url=... --set agents.model=... --record chat.cassette.jsonl
      rlar scout "helpful chat" --replay chat.cassette.jsonl
    """
    run(lambda: _scout(task, data or [], most, no_llm, record, note, replay, as_json, configured(settings)))


def _scout(
    task: str,
    data: list[str],
    most: int,
    no_llm: bool,
    record: Path | None,
    note: str,
    replay: Path | None,
    as_json: bool,
    config: RlarConfig,
) -> int:
    from verl_rlar.agents.guided import guided
    from verl_rlar.agents.scout import SAMPLES, brief_of, scout
    from verl_rlar.hub import Hub

    if not task.strip():
        raise ConfigError("TASK is empty: say what is to be scored, for example 'en-fr translation'")
    if record and replay:
        raise ConfigError("--record and --replay exclude each other: what is replayed is recorded already")
    if (record or replay) and no_llm:
        raise ConfigError("--no-llm excludes --record and --replay: a cassette holds the traffic with an LLM")
    if record and not config.agents.url:
        raise ConfigError("--record wants an LLM: --set agents.url=http://HOST:PORT/v1 --set agents.model=NAME")
    queries = list(islice(_queries(data), SAMPLES))
    brief = brief_of(task, queries)
    with progress_bar() as on_progress:
        if (config.agents.url or replay) and not no_llm:
            folder = Path(config.agents.transcripts or Path(config.run_dir) / "agents")
            findings = guided(
                brief,
                queries,
                config.hub,
                config.agents,
                folder=folder,
                most=most,
                record=record,
                note=note,
                replay=replay,
                on_progress=on_progress,
            )
        else:
            with Hub(config.hub) as hub:
                findings = scout(brief, hub, most=most, on_progress=on_progress)
    for fault in findings.faults:
        complain(fault)
    if as_json:
        for line in _records(findings):
            print_json(line)
    else:
        _print(findings)
    return OK if findings.proposals else BAD


def _queries(files: list[str]) -> Iterator[Query]:
    for file in files:
        for number, row in read_some(file):
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

    console = Output()

    def say(text: str = "", style: str = "") -> None:
        console.print(Text(visible(text), style=style), soft_wrap=True)

    brief = findings.brief
    about = ", ".join((*brief.topics, *brief.words, *brief.languages))
    say(f"Looked for: {about}. {findings.found:,} models found, {findings.looked_at:,} looked into", "bold")
    say(f"Ranked by {findings.by}.")
    if run := findings.agent:
        say(f"The LLM took {run.steps} steps, {run.tokens:,} tokens, {run.seconds:.0f} s. Transcript: {run.transcript}")
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
        console.table(table)
        say()
        for rank, proposal in enumerate(findings.proposals, start=1):
            if words := _words(proposal):
                say(f"{rank:>3}  the LLM: {words}")
                say(f"     {proposal.why}", "dim")
            else:
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
    if findings.proposals:
        first, kinds = findings.proposals[0], "".join(f" --kind {kind.value}" for kind in brief.kinds)
        say()
        say(f"Is one good for your task? rlar exam {first.repo}@{first.commit}{kinds} --data FILE", "bold")
        say("  FILE: rows with `chosen` and `rejected`, or `response` and `label`; --in FOLDER keeps it", "dim")


def _words(proposal: Proposal) -> str:
    """What an LLM says about a model, and what it quotes; empty if none did."""
    said = [item.quote for item in proposal.evidence if item.source == "agent"]
    quotes = [f"{item.source}: {item.quote!r}" for item in proposal.evidence if item.source not in OURS]
    return f"{said[0]!r} ({'; '.join(quotes)})" if proposal.by == "agent" and said else ""


def _size(gib: float) -> str:
    return f"{gib:.2f} GiB" if gib >= 0.01 else f"{gib * 1024:.2f} MiB"
