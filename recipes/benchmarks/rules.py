# SPDX-License-Identifier: Apache-2.0
"""How right the built-in rules are, against labelled real answers and answers that are right or wrong by construction.

    python recipes/benchmarks/rules.py                 # all sections
    python recipes/benchmarks/rules.py --only math500  # one
    python recipes/benchmarks/rules.py --list          # with every disagreement and its verdict
    python recipes/benchmarks/rules.py --json          # prints one object last

The exit code is 0 only if every goal is reached.

Sections on final-answer mathematics are here, those on language in `rules_language.py`. The data are in `recipes/data`.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import rules_language
from math_forms import forms
from rich.console import Console
from rich.progress import track
from section import SectionResult

from verl_rlar.tools.rules.math import final_answer
from verl_rlar.types import Query, Sample

DATA = Path(__file__).resolve().parent.parent / "data"
CONSOLE = Console(stderr=True)

KNOWN: dict[str, str] = {
    r"#### \\begin\{pmatrix\}[^\n]*\\\\\n": (
        "the rule is wrong, and stays so: `####` states one line, and this matrix goes on over three"
    ),
}
"""Judged disagreements: a pattern in the response, and the verdict. They count as disagreements all the same."""


def rows(name: str) -> Iterator[dict[str, Any]]:
    """The rows of a file of `recipes/data`."""
    with gzip.open(DATA / name, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def verdict(reference: str, response: str) -> float | None:
    """What `final_answer` says; None if it abstains."""
    return final_answer(Sample(query=Query(messages=(), reference=reference), response=response)).value


def note(reference: str, response: str, said: float | None, wanted: float) -> str:
    judged = next((why for pattern, why in KNOWN.items() if re.search(pattern, response)), "NOT JUDGED")
    return f"{reference!r}: {response[-120:]!r} got {said}, wanted {wanted}: {judged}"


def gsm8k() -> SectionResult:
    """Real answers of four models to GSM8K, with the data set's own labels."""
    notes = []
    answers = list(rows("gsm8k_model_solutions.jsonl.gz"))
    for row in progress(answers, "GSM8K"):
        reference = row["ground_truth"].rpartition("A:")[2].strip()
        said, wanted = verdict(reference, row["response"]), float(row["is_correct"])
        if said != wanted:
            notes.append(note(reference, row["response"], said, wanted))
    return SectionResult(
        figures={"answers": len(answers), "disagreements": len(notes)},
        goals={"disagreements": 0},
        ok=not notes,
        notes=tuple(notes),
    )


def math500() -> SectionResult:
    """MATH-500 references in equivalent forms and near misses; see `math_forms`."""
    notes: list[str] = []
    counts = {"right": 0, "wrong": 0}
    accepted = rejected = 0
    fewest = {"right": sys.maxsize, "wrong": sys.maxsize}
    references = [row["answer"] for row in rows("math500.jsonl.gz")]
    for reference in progress(references, "MATH-500"):
        made = forms(reference)
        for sort, responses, wanted in (("right", made.right, 1.0), ("wrong", made.wrong, 0.0)):
            counts[sort] += len(responses)
            fewest[sort] = min(fewest[sort], len(responses))
            for response in responses:
                said = verdict(reference, response)
                if said != wanted:
                    notes.append(note(reference, response, said, wanted))
                elif wanted:
                    accepted += 1
                else:
                    rejected += 1
    accept_rate, reject_rate = accepted / counts["right"], rejected / counts["wrong"]
    return SectionResult(
        figures={
            "references": len(references),
            "equivalent_forms": counts["right"],
            "fewest_equivalent_forms": fewest["right"],
            "accepted": accept_rate,
            "near_misses": counts["wrong"],
            "fewest_near_misses": fewest["wrong"],
            "rejected": reject_rate,
            "not_judged": sum("NOT JUDGED" in line for line in notes),
        },
        goals={"accepted": ">= 0.99", "rejected": ">= 0.995", "not_judged": 0},
        ok=accept_rate >= 0.99 and reject_rate >= 0.995 and not any("NOT JUDGED" in line for line in notes),
        notes=tuple(notes),
    )


def progress(items: Iterable[Any], what: str) -> Iterable[Any]:
    return track(items, description=what, console=CONSOLE, transient=True)


SECTIONS: dict[str, Callable[[], SectionResult]] = {"gsm8k": gsm8k, "math500": math500, **rules_language.SECTIONS}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=sorted(SECTIONS), help="run this section only")
    parser.add_argument("--list", action="store_true", help="list every disagreement with its verdict")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    options = parser.parse_args()
    figures: dict[str, dict[str, float]] = {}
    goals: dict[str, dict[str, str | float]] = {}
    ok = True
    for name in [options.only] if options.only else SECTIONS:
        result = SECTIONS[name]()
        figures[name], goals[name] = dict(result.figures), dict(result.goals)
        ok = ok and result.ok
        print(f"{name}: {'ok' if result.ok else 'GOAL MISSED'}")
        for figure, value in result.figures.items():
            goal = f"   (goal: {result.goals[figure]})" if figure in result.goals else ""
            print(f"  {figure:<28} {value:.6g}{goal}")
        if result.notes:
            print(f"  {len(result.notes)} disagreements" + ("" if options.list else ", shown by --list"))
        for line in result.notes if options.list else ():
            print(f"    {line}")
    if options.json:
        print(json.dumps({"name": "rules", "figures": figures, "goals": goals, "ok": ok}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
