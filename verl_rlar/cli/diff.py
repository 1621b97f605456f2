# SPDX-License-Identifier: Apache-2.0
"""`rlar diff`: two tools side by side, on cases and on the responses of a run."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
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
    complain_of,
    configured,
    print_json,
    progress_bar,
    run,
    visible,
)
from verl_rlar.cli.rescore import Attempt, Examples, OfSplit, Split, Steps, library_of, number
from verl_rlar.config import RlarConfig
from verl_rlar.errors import ConfigError
from verl_rlar.types import Kind, Outcome, ToolSpec

if TYPE_CHECKING:
    from verl_rlar.replay import CasesDiff, Pair  # the exam's imports take a second

Tool = Annotated[
    str, typer.Argument(metavar="TOOL", help="As for `rlar rescore --tool`; versions of the library need --run.")
]
LABELLED = ("false_accept", "false_reject", "pairwise", "pairwise_low", "pairwise_high")


@app.command("diff", short_help="Compare two tools.")
def diff_command(
    first: Tool,
    second: Tool,
    data: Annotated[
        list[str] | None, typer.Option("--data", metavar="FILE", help="Rows to make cases from. Repeatable.")
    ] = None,
    cases: Annotated[
        list[str] | None, typer.Option("--cases", metavar="FILE", help="A case file (JSON lines). Repeatable.")
    ] = None,
    of_run: Annotated[
        str | None, typer.Option("--run", metavar="RUN", help="The folder of a run, for its responses and its library.")
    ] = None,
    steps: Steps = None,
    split: OfSplit = Split.TRAIN,
    attempt: Attempt = None,
    seed: Annotated[int, typer.Option(help="Decides which rows are taken, and what is changed.")] = 0,
    examples: Examples = 5,
    as_json: Json = False,
    settings: Set = None,
) -> None:
    """Compare two tools: where do they agree, which one is right more often, which one is faster?

    Both are asked the same: cases as in `rlar exam`, and the stored responses of a run, as far as both are for them.
    With --json: an object per response, per kind of query, per tool, and a summary. Exit code: 1 if a tool failed
    somewhere, or a text is gone.

    \b
    Examples:
      rlar diff final_answer unit_price.py --data train.parquet
      rlar diff final_answer@3fa9 final_answer@77c0 --run checkpoints/qwen3-8b --steps 40..60
      rlar diff token_f1 my_package.rewards:names --cases cases.jsonl --json | jq 'select(.type == "kind")'
    """
    run(
        lambda: _diff(
            (first, second),
            data or [],
            cases or [],
            of_run,
            steps,
            split,
            attempt,
            seed,
            examples,
            as_json,
            configured(settings),
        )
    )


async def _diff(
    names: tuple[str, str],
    data: list[str],
    cases: list[str],
    of_run: str | None,
    steps: str | None,
    split: Split,
    attempt: int | None,
    seed: int,
    examples: int,
    as_json: bool,
    config: RlarConfig,
) -> int:
    from verl_rlar import replay

    if not (data or cases or of_run):
        raise ConfigError("nothing to compare them on: give --data FILE, --cases FILE or --run RUN")
    if not of_run and (steps is not None or attempt is not None):
        raise ConfigError("--steps and --attempt choose among the responses of a run: add --run RUN")
    of_steps = replay.parse_steps(steps)
    place = replay.run_folder(of_run) if of_run else Path(config.run_dir)
    library = library_of(place, config)
    tools = (replay.find_tool(names[0], library), replay.find_tool(names[1], library))
    first, second = (tool.spec for tool in tools)
    if first.digest == second.digest:
        raise ConfigError(f"{names[0]} and {names[1]} are the same tool, {first.name} ({first.digest})")
    replay.common_scope(first, second)
    pairs: list[Pair] = []
    left_out: Counter[str] = Counter()
    on_cases: CasesDiff | None = None
    with progress_bar() as on_progress:
        async with replay.Bench(config, tools) as bench:
            if data or cases:
                on_cases = await replay.diff_cases(
                    tools, bench, config, data=data, case_files=cases, seed=seed, on_progress=on_progress
                )
                pairs += on_cases.pairs
            if of_run:
                found, left_out = await replay.diff_run(
                    place, tools, bench, steps=of_steps, split=split.value, attempt=attempt, on_progress=on_progress
                )
                pairs += found
    for line, fault in on_cases.evidence.bad if on_cases else ():
        complain_of(BadLine(line=line, error=fault))
    kinds = _kinds(pairs, on_cases, config)
    tool_records = [_tool(pairs, side, on_cases, tool.spec) for side, tool in enumerate(tools)]
    failed = sum(record["outcomes"].get(Outcome.FAILED.value, 0) for record in tool_records)
    stopped = any(record["stopped"] for record in tool_records)
    summary = {
        "first": f"{first.name}@{first.digest}",
        "second": f"{second.name}@{second.digest}",
        "compared": len(pairs),
        "failed": failed,
        "missing": left_out["missing"],
        "other_kinds": left_out["other"],
        "bad_rows": len(on_cases.evidence.bad) if on_cases else 0,
        "set_apart": len(on_cases.evidence.set_apart) if on_cases else 0,
    }
    if as_json:
        for pair in pairs:
            print_json(_pair(pair))
        for record in (*kinds, *tool_records, {"type": "summary", **summary}):
            print_json(record)
    else:
        apart = heapq.nlargest(examples, (pair for pair in pairs if pair.gap > 1e-6), key=lambda pair: pair.gap)
        _print(kinds, tool_records, summary, apart)
    return BAD if failed or stopped or left_out["missing"] or summary["bad_rows"] else OK


def _pair(pair: Pair) -> dict[str, Any]:
    sides = [
        {
            "value": score.value,
            "outcome": score.outcome.value,
            "reason": score.reason,
            "ms": round(1000 * score.seconds, 3),
        }
        for score in pair.scores
    ]
    about = {"type": "response", "on": pair.on, "id": pair.id, "kind": pair.kind.value, "query": pair.query}
    return about | {"expect": pair.expect or None, "first": sides[0], "second": sides[1]}


def _kinds(pairs: Sequence[Pair], on_cases: CasesDiff | None, config: RlarConfig) -> list[dict[str, Any]]:
    """A record for each kind of query on the cases, and on the run."""
    from verl_rlar import replay

    records = []
    for on in ("cases", "run"):
        for kind in Kind:
            of_kind = [pair for pair in pairs if pair.on == on and pair.kind is kind]
            if not of_kind:
                continue
            found = asdict(replay.agreement(of_kind, config.exam.limits_of(kind).tolerance))
            record = {"type": "kind", "on": on, "kind": kind.value, **found}
            if on == "cases" and on_cases:
                record |= _labelled(on_cases, kind)
            records.append(record)
    return records


def _labelled(on_cases: CasesDiff, kind: Kind) -> dict[str, Any]:
    """What the labels say of either tool, as on the card of an exam."""
    from verl_rlar import replay

    figures = [exam.card.figures.get(kind.value, {}) for exam in on_cases.exams]
    sides = [{name: each[name].value for name in LABELLED if name in each} for each in figures]
    counts = {name: int(figures[0][name].value or 0) for name in ("good", "bad", "queries") if name in figures[0]}
    return {"labelled": counts, "first": sides[0], "second": sides[1], "better": replay.better(on_cases.exams, kind)}


def _tool(pairs: Sequence[Pair], side: int, on_cases: CasesDiff | None, spec: ToolSpec) -> dict[str, Any]:
    from verl_rlar import replay

    scores = [pair.scores[side] for pair in pairs]
    return {
        "type": "tool",
        "tool": spec.name,
        "digest": spec.digest,
        "outcomes": dict(Counter(score.outcome.value for score in scores)),
        "p50_s": replay.quantile((score.seconds for score in scores), 0.5),
        "p95_s": replay.quantile((score.seconds for score in scores), 0.95),
        "stopped": on_cases.exams[side].card.stopped if on_cases else "",
    }


def _print(
    kinds: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], summary: dict[str, Any], apart: Sequence[Pair]
) -> None:
    console = Output()

    def say(label: str, text: str) -> None:
        console.print(Text.assemble((f"{label:<15}", "bold"), visible(text)), soft_wrap=True)

    say("first", summary["first"])
    say("second", summary["second"])
    table = Table("on", "kind", "responses", "both scored", "only first", "only second", box=None, pad_edge=False)
    for name in ("agree", "pearson", "kendall"):
        table.add_column(name)
    for record in kinds:
        share = record["agreed"] / record["both"] if record["both"] else None
        counts = (record[name] for name in ("pairs", "both", "only_first", "only_second"))
        figures = (number(share, ".1%"), number(record["pearson"]), number(record["kendall"]))
        table.add_row(record["on"], record["kind"], *map(str, counts), *figures)
    console.table(table)
    labelled = Table(
        "labelled", "tool", "wrong accepted", "right rejected", "right above wrong", box=None, pad_edge=False
    )
    labelled.add_column("95 %")
    labelled.add_column("better")
    for record in kinds:
        for side in ("first", "second"):
            if found := record.get(side):
                shares = (number(found.get(name), ".1%") for name in LABELLED[:3])
                interval = f"{number(found.get('pairwise_low'), '.3f')} to {number(found.get('pairwise_high'), '.3f')}"
                mark = {side: "this one", None: "not clear"}.get(record["better"], "")
                labelled.add_row(record["kind"], side, *shares, interval, mark)
    if labelled.row_count:
        console.table(labelled)
    for side, record in zip(("first", "second"), tools, strict=True):
        outcomes = ", ".join(f"{count} {outcome}" for outcome, count in sorted(record["outcomes"].items()))
        times = f"p50 {number(record['p50_s'], '.2g')} s, p95 {number(record['p95_s'], '.2g')} s"
        say(side, f"{outcomes or 'nothing'}; {times}")
        if record["stopped"]:
            say(side, f"was sent home early: {record['stopped']}")
    for name, text in (
        ("missing", "responses whose text is not in the ledger"),
        ("other_kinds", "responses of queries that not both are for"),
        ("set_apart", "rows set apart, as their gold is not to be trusted"),
    ):
        if summary[name]:
            say("left out", f"{summary[name]} {text}")
    for pair in apart:
        sides = " / ".join(f"{number(s.value, '.4g')} {s.outcome.value} ({s.reason[:200]})" for s in pair.scores)
        wanted = f", wanted: {pair.expect}" if pair.expect else ""
        texts = f"prompt {pair.prompt!r}, response {pair.response!r}" if pair.prompt else "a sealed case"
        say("apart", f"{pair.on} {pair.id}{wanted}: {sides}; {texts}")
