# SPDX-License-Identifier: Apache-2.0
"""Planted tools before the exam: is every bad one rejected, and every good one admitted?

    python recipes/benchmarks/exam.py                # rules, and verifiers in boxes where there is an engine
    python recipes/benchmarks/exam.py --no-boxes     # rules only
    python recipes/benchmarks/exam.py --only slow --only coin --cards   # these, with their cards
    python recipes/benchmarks/exam.py --json         # prints one object last

The tools stand in `tests/planted_tools.py`; the built-in rules are examined with them. The rows are real ones of
`recipes/data`. The exit code is 0 only if every verdict is right.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import importlib
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from verl_rlar.config import ExamConfig, RlarConfig, SandboxConfig
from verl_rlar.exam.card import Card
from verl_rlar.exam.evidence import Evidence, gather
from verl_rlar.exam.hall import Hall
from verl_rlar.exam.subject import Subject, find, verifier
from verl_rlar.types import Kind

ROOT = Path(__file__).resolve().parent.parent.parent
DATA = ROOT / "recipes" / "data"
sys.path.insert(0, str(ROOT / "tests"))  # worker processes import the planted tools from there, too
planted_tools: Any = importlib.import_module("planted_tools")

GOALS = {"bad_admitted": 0, "good_rejected": 0, "tools": ">= 40"}
BUILT_IN = ("final_answer", "exact_match", "token_f1", "translation", "multiple_choice")
BOXED = ("unit_tests", "unit_tests_partial")
QUERIES = 14
CONSOLE = Console(stderr=True)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A tool that is examined, and what is known of it."""

    subject: Subject
    good: bool
    why: str


def lines(name: str) -> Iterator[dict[str, Any]]:
    with (gzip.open if name.endswith(".gz") else open)(DATA / name, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def rows(kind: Kind, *, latex: bool) -> Iterator[dict[str, Any]]:
    """Rows of one kind of query."""
    if kind is Kind.MATH:
        for line in list(lines("gsm8k_train_short.jsonl.gz"))[:200]:
            yield {"prompt": line["question"], "reference": line["answer"].rpartition("####")[2].strip()}
        for line in list(lines("math500.jsonl.gz"))[:60] if latex else ():
            yield {"prompt": line["prompt"], "reference": line["answer"]}
    elif kind is Kind.SHORT_TEXT:
        for line in lines("short_answers.jsonl"):
            yield {"prompt": line["question"], "reference": line["answer"]}
    elif kind is Kind.CHOICE:
        for line in lines("short_answers.jsonl"):
            options = "\n".join(f"{letter}) {text}" for letter, text in zip("ABCD", line["choices"], strict=True))
            prompt = f"{line['question']}\n{options}"
            yield {"prompt": prompt, "reference": line["letter"], "extra": {"choices": line["choices"]}}
    elif kind is Kind.TRANSLATION:
        for line in list(lines("ted_mqm_ende.jsonl.gz"))[:120]:
            columns = {"source": line["source"], "source_lang": "en", "target_lang": "de"}
            prompt = f"Translate the following text into German:\n{line['source']}"
            yield {"prompt": prompt, "reference": line["reference"], "extra": columns}
    elif kind is Kind.UNIT_TESTS:
        for line in list(lines("humaneval.jsonl.gz"))[:40]:
            names = ("test", "entry_point", "canonical_solution")
            yield {"prompt": line["prompt"], "extra": {name: line[name] for name in names}}


def labelled() -> Iterator[dict[str, Any]]:
    """Real answers of models to GSM8K with the set's labels: what a training looks like."""
    for line in list(lines("gsm8k_model_solutions.jsonl.gz"))[:400]:
        reference = line["ground_truth"].rpartition("A:")[2].strip()
        yield {
            "prompt": line["question"],
            "reference": reference,
            "response": line["response"],
            "is_correct": line["is_correct"],
        }


def evidence(subject: Subject, config: ExamConfig, seed: int) -> Evidence:
    """Cases for a tool."""
    spec, found = subject.spec, []
    for kind in sorted(spec.scope.kinds, key=lambda kind: kind.value):
        made = list(rows(kind, latex=spec.name == "final_answer"))
        if spec.name == "final_answer":
            made += labelled()
        found += made
    numbered, share = enumerate(found, start=1), config.sealed_share
    return gather(numbered, spec, queries=config.max_queries, seed=seed, sealed_share=share)


def candidates(*, boxes: bool) -> Iterator[Candidate]:
    """All that are examined."""
    for name in (*BUILT_IN, *(BOXED if boxes else ())):
        yield Candidate(subject=find(name), good=True, why="built in")
    for planted in planted_tools.RULES:
        assert planted.rule is not None
        yield Candidate(subject=Subject(spec=planted.rule.spec), good=planted.good, why=planted.why)
    for planted in planted_tools.VERIFIERS if boxes else ():
        yield Candidate(subject=verifier(planted.source, name=planted.name), good=planted.good, why=planted.why)


async def examine_all(chosen: list[Candidate], config: RlarConfig, seed: int) -> list[tuple[Candidate, Card, float]]:
    results = []
    async with Hall(config) as hall:
        hall.scorers()
        for candidate in track(chosen, description="exams", console=CONSOLE, transient=True):
            start = time.perf_counter()
            taken = evidence(candidate.subject, config.exam, seed)
            examination = await hall.examine(candidate.subject, taken, seed=seed)
            results.append((candidate, examination.card, time.perf_counter() - start))
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-boxes", action="store_true", help="leave out what needs a sandbox")
    parser.add_argument("--only", action="append", help="examine this tool only; repeatable")
    parser.add_argument("--cards", action="store_true", help="print the cards")
    parser.add_argument("--seed", type=int, default=0, help="another choice of rows, changes and seals")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    options = parser.parse_args()
    base = {"base": os.environ["RLAR_TEST_BASE"]} if os.environ.get("RLAR_TEST_BASE") else {}
    config = RlarConfig(
        exam=ExamConfig(max_queries=QUERIES, repeats=60),
        sandbox=SandboxConfig(backend="none" if options.no_boxes else "docker", **base),
    )
    chosen = list(candidates(boxes=not options.no_boxes))
    chosen = [one for one in chosen if not options.only or one.subject.spec.name in options.only]
    results = asyncio.run(examine_all(chosen, config, options.seed))
    table: dict[tuple[bool, bool], list[str]] = {(good, said): [] for good in (True, False) for said in (True, False)}
    for candidate, card, seconds in results:
        table[candidate.good, card.admitted].append(card.tool)
        mark = "" if candidate.good == card.admitted else "   <-- WRONG"
        why = "; ".join(card.reasons)[:150]
        sort = "good" if candidate.good else "bad"
        print(f"{sort:<5} {card.verdict:<9} {card.tool:<32} {card.cases:>4} cases {seconds:5.1f} s  {why}{mark}")
        if options.cards:
            print(card.markdown())
    print(f"\n{'':<12}{'admitted':>10}{'rejected':>10}")
    for good in (True, False):
        print(f"{'good' if good else 'bad':<12}{len(table[good, True]):>10}{len(table[good, False]):>10}")
    figures = {
        "tools": len(results),
        "good": sum(candidate.good for candidate, _, _ in results),
        "bad": sum(not candidate.good for candidate, _, _ in results),
        "good_admitted": len(table[True, True]),
        "good_rejected": len(table[True, False]),
        "bad_admitted": len(table[False, True]),
        "bad_rejected": len(table[False, False]),
        "seconds": sum(seconds for _, _, seconds in results),
    }
    ok = not figures["bad_admitted"] + figures["good_rejected"] and (bool(options.only) or len(results) >= 40)
    if options.json:
        print(json.dumps({"name": "exam", "figures": figures, "goals": GOALS, "ok": ok}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
