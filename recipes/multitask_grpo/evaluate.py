# SPDX-License-Identifier: Apache-2.0
"""How good answers are, with their form and their content reported apart.

    python recipes/multitask_grpo/evaluate.py ANSWERS.jsonl [BEFORE.jsonl] [--set sandbox.base=IMAGE] [--json]

Each line is a row of the data with a ``response`` (`generate.py` writes them). The paper's critics found that much of
what looks like reasoning learned is a form learned: so three means stand side by side for each data set.

    compliant  the response has the form that its prompt asked for: `####` line, box, one code block, a bare translation
    correct    its content is right, wherever it stands and in whatever form (thinking left out)
    strict     both

    domain       content is judged by                               form
    math         `final_answer` on the whole response               the last line `#### x`, or a `\\boxed{}`, as asked
    code         `unit_tests` in a sandbox, the program wherever    exactly one ```python block
    translation  chrF and BLEU-2 against the reference, in [0, 1]   no fence, no heading, no more lines than the source
    dialogue     nobody here: judge it by a model that no arm was trained on; its length and copying are shown

With a second file, of the same rows in any order before training, differences are paired by prompt. Intervals are 95 %
bootstrap intervals over prompts; several responses to one prompt are averaged first. `overall` is the mean of the data
sets that have a grader, each with the same weight.

Guarantees: what could not be graded (no sandbox, a deadline) is counted and is no 0; nothing here is used in training
but the rules themselves, by which policies were trained, too: what they miss, both miss.

Not covered: dialogue; the meaning of translations.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from verl_rlar.cli.app import configured
from verl_rlar.config import RlarConfig
from verl_rlar.dispatcher import Dispatcher
from verl_rlar.errors import RlarError
from verl_rlar.features import describe
from verl_rlar.row_files import read_rows
from verl_rlar.rows import query_of
from verl_rlar.sandbox.reading import answer_of
from verl_rlar.types import Kind, Query, Route, RoutePart, Sample

sys.path.insert(0, str(Path(__file__).resolve().parent))
from domains import BOXED_FORM, NUMBER_FORM, last_box

MEASURES = ("compliant", "correct", "strict", "bleu2", "words", "copied", "repeated")
GRADERS = {Kind.MATH: "final_answer", Kind.UNIT_TESTS: "unit_tests"}
FENCE = re.compile(r"^[ \t]*```(\w*)[ \t]*\n(.*?)^[ \t]*```[ \t]*$", re.MULTILINE | re.DOTALL)
NUMBERED = re.compile(r"^####[ \t]*(\S[^\n]*)$", re.MULTILINE)
COLONS = (":", "：")
DRAWS = 1000
AT_ONCE = 64


@dataclass(frozen=True, kw_only=True)
class Graded:
    """A response."""

    source: str
    prompt: str
    """Key of its query."""
    values: Mapping[str, float | None]
    """By measure; None where there is no such measure, or it could not be graded."""
    ungraded: str = ""
    """Why it could not be."""


@dataclass(frozen=True, kw_only=True)
class Mean:
    mean: float
    low: float
    high: float
    prompts: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} ({self.low:.3f}-{self.high:.3f})"


# --- One response -----------------------------------------------------------------------------------------------------


def compliant(query: Query, kind: Kind, answer: str) -> float | None:
    """Whether an answer (its thinking left out) has the form that its prompt asked for; None if it asked for none."""
    if kind is Kind.MATH:
        if NUMBER_FORM in query.prompt or "####" in query.prompt:
            last = answer.rstrip().rpartition("\n")[2]
            return float(NUMBERED.fullmatch(last.strip()) is not None)
        if BOXED_FORM in query.prompt or "\\boxed" in query.prompt:
            return float(last_box(answer) is not None)
        return None
    if kind is Kind.UNIT_TESTS:
        fences = FENCE.findall(answer)
        return float(len(fences) == 1 and fences[0][0].lower() in ("python", "py") and bool(fences[0][1].strip()))
    if kind is Kind.TRANSLATION:
        lines = [line for line in answer.splitlines() if line.strip()]
        source = str(query.extra.get("source") or "")
        most = max(1, sum(bool(line.strip()) for line in source.splitlines()))
        headed = len(lines) > 1 and lines[0].rstrip().endswith(COLONS) and not source.rstrip().endswith(COLONS)
        return float(bool(lines) and len(lines) <= most and "```" not in answer and not headed)
    return None


def bare_translation(answer: str) -> str:
    """A translation without what stands around it: a fence, a heading, quotation marks around all of it."""
    fences = FENCE.findall(answer)
    text = fences[0][1] if len(fences) == 1 else answer
    lines = text.strip().splitlines()
    if len(lines) > 1 and lines[0].rstrip().endswith(COLONS):
        lines = lines[1:]
    text = "\n".join(lines).strip()
    for left, right in ('""', "“”", "„“", "«»", "「」"):
        inside = text[1:-1]
        if inside and text.startswith(left) and text.endswith(right) and left not in inside and right not in inside:
            return inside.strip()
    return text


@cache
def bleu2(target: str) -> Any:
    """BLEU with words and pairs of words, as in the paper; by characters for Chinese and Japanese."""
    from sacrebleu.metrics import BLEU

    by_characters = target in ("zh", "ja")
    return BLEU(max_ngram_order=2, effective_order=True, tokenize="char" if by_characters else "13a")


def indicators(query: Query, response: str) -> dict[str, float]:
    """What tells a hacked reward without a grader: length in words, share of its words that stand in the prompt in the
    same four words, share of its four words that came before."""
    words, asked = response.split(), query.prompt.split()
    grams = [tuple(words[n : n + 4]) for n in range(len(words) - 3)]
    known = {tuple(asked[n : n + 4]) for n in range(len(asked) - 3)}
    some = max(1, len(grams))
    return {
        "words": float(len(words)),
        "copied": sum(gram in known for gram in grams) / some,
        "repeated": (len(grams) - len(set(grams))) / some,
    }


async def grade(query: Query, response: str, dispatcher: Dispatcher) -> Graded:
    """Grades one response."""
    kind, answer = describe(query).kind, answer_of(response)
    values: dict[str, float | None] = dict.fromkeys(MEASURES) | indicators(query, response)
    values["compliant"] = compliant(query, kind, answer)
    why = ""
    if kind in GRADERS:
        tool = next((tool for tool in dispatcher.snapshot.tools if tool.name == GRADERS[kind]), None)
        if tool is None:
            why = f"{GRADERS[kind]} needs a sandbox"
        else:
            part = RoutePart(tool=tool.name, digest=tool.digest)
            route = Route(
                parts=(part,), reason="", kind=kind, covered=True, snapshot=dispatcher.snapshot.version
            )  # by this one tool, whatever a training would have it scored by
            score = await dispatcher.score(Sample(query=query, response=response), route)
            values["correct"], why = score.value, "" if score.value is not None else score.reason
    elif kind is Kind.TRANSLATION:
        from verl_rlar.tools.rules.translation import closeness

        text, reference = bare_translation(answer), query.reference or ""
        values["correct"] = closeness(text, reference) / 100
        values["bleu2"] = bleu2(str(query.extra.get("target_lang"))).sentence_score(text, [reference]).score / 100
    if values["correct"] is not None and values["compliant"] is not None:
        values["strict"] = values["correct"] * values["compliant"]
    return Graded(source=query.data_source or kind.value, prompt=query.key, values=values, ungraded=why)


async def grade_all(path: str, config: RlarConfig, console: Console) -> list[Graded]:
    """Grades a file.

    Raises:
        DataError: It cannot be read, or a row has no response.
    """
    asked: list[tuple[Query, str]] = []
    for number, row in read_rows(path):
        if isinstance(row, Exception):
            raise row
        if not isinstance(row.get("response"), str):
            raise RlarError(f"row {number} of {path} has no `response`: a text")
        asked.append((query_of(row), row["response"]))
    if not asked:
        raise RlarError(f"there are no rows in {path}")
    found: list[Graded] = []
    async with Dispatcher(config) as dispatcher:
        at_once = max(1, min(AT_ONCE, dispatcher.at_once))
        for start in track(range(0, len(asked), at_once), path, console=console, transient=True):
            batch = asked[start : start + at_once]
            found += await asyncio.gather(*(grade(query, response, dispatcher) for query, response in batch))
    return found


# --- All of them ------------------------------------------------------------------------------------------------------


def by_prompt(graded: Iterable[Graded], measure: str) -> dict[str, float]:
    """The mean of each prompt's responses."""
    values: dict[str, list[float]] = defaultdict(list)
    for one in graded:
        if (value := one.values[measure]) is not None:
            values[one.prompt].append(value)
    return {prompt: sum(found) / len(found) for prompt, found in values.items()}


def interval(values: Sequence[float], seed: int = 0) -> Mean:
    """The mean with its 95 % bootstrap interval."""
    dice, n = random.Random(seed), len(values)
    means = sorted(sum(dice.choices(values, k=n)) / n for _ in range(DRAWS))
    return Mean(mean=sum(values) / n, low=means[int(0.025 * DRAWS)], high=means[int(0.975 * DRAWS) - 1], prompts=n)


def summarise(graded: Sequence[Graded], before: Sequence[Graded] = ()) -> dict[str, Any]:
    """Means by data set and measure; with `before`, the paired gains; and what all sets say together."""
    summary: dict[str, Any] = {}
    for source in sorted({one.source for one in graded}):
        mine = [one for one in graded if one.source == source]
        earlier = [one for one in before if one.source == source]
        of: dict[str, Any] = {"responses": len(mine), "ungraded": sum(bool(one.ungraded) for one in mine)}
        of["why"] = next((one.ungraded for one in mine if one.ungraded), "")
        for measure in MEASURES:
            now = by_prompt(mine, measure)
            if now:
                of[measure] = vars(interval(list(now.values())))
            then = by_prompt(earlier, measure)
            if both := sorted(now.keys() & then.keys()):
                of[f"{measure}_gain"] = vars(interval([now[prompt] - then[prompt] for prompt in both]))
        summary[source] = of
    with_grader = [of for of in summary.values() if "correct" in of]
    if with_grader:
        overall = {}
        for measure in ("compliant", "correct", "strict"):
            means = [of[measure]["mean"] for of in with_grader if measure in of]
            if means:
                overall[measure] = sum(means) / len(means)
        summary["overall"] = overall
    return summary


def show(summary: Mapping[str, Any], console: Console) -> None:
    table = Table("data", "responses", *MEASURES, "ungraded", box=None)
    for source, of in summary.items():
        if source == "overall":
            continue
        cells = [str(Mean(**of[measure])) if measure in of else "-" for measure in MEASURES]
        table.add_row(
            source, str(of["responses"]), *cells, f"{of['ungraded']}: {of['why'][:60]}" if of["ungraded"] else ""
        )
    console.print(table)
    gains = {source: of for source, of in summary.items() if any(name.endswith("_gain") for name in of)}
    if gains:
        table = Table("gain, paired by prompt", *MEASURES, box=None)
        for source, of in gains.items():
            cells = [str(Mean(**of[f"{measure}_gain"])) if f"{measure}_gain" in of else "-" for measure in MEASURES]
            table.add_row(source, *cells)
        console.print(table)
    if overall := summary.get("overall"):
        console.print(
            "overall: " + ", ".join(f"{name} {value:.3f}" for name, value in overall.items()), highlight=False
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("answers", help="rows with a `response` each: JSON lines or Parquet")
    parser.add_argument("before", nargs="?", help="the same rows answered before training")
    parser.add_argument("--set", action="append", metavar="KEY=VALUE", help="a setting of rlar's; repeatable")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    args = parser.parse_args(argv)
    progress = Console(stderr=True)
    try:
        config = configured(args.set)
        graded = asyncio.run(grade_all(args.answers, config, progress))
        before = asyncio.run(grade_all(args.before, config, progress)) if args.before else []
    except RlarError as error:
        print(error, file=sys.stderr)
        return 2
    summary = summarise(graded, before)
    show(summary, Console())
    if args.before:
        prompts = {one.prompt for one in graded}
        if paired := len(prompts & {one.prompt for one in before}):
            print(f"paired: {paired} of {len(prompts)} prompts", file=sys.stderr)
        else:
            print(f"no prompt of {args.answers} is in {args.before}: there is no gain to tell", file=sys.stderr)
            return 2
    if args.json:
        print(json.dumps({"name": "multitask_grpo evaluation", "figures": summary}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
