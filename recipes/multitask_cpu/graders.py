# SPDX-License-Identifier: Apache-2.0
"""How answers to held-out prompts are graded: by code of its own, which no arm is trained on.

    constraints   whether the prompt's demand is met, by checks written here
    spelling      share of words that the answer and the right sentence have in common, in their order
    sums          the last whole number of the answer is the sum
    json          the first JSON object in the answer has the three values

Beside them, for what a reward may be gamed by: length in words, share of an answer that repeats itself, share that is
copied from the prompt.

Guarantees: pure; every value lies in [0, 1], but the length.
"""

from __future__ import annotations

import json
import re
from difflib import SequenceMatcher
from typing import Any


def grade(name: str, answer: str, reference: str, extra: dict[str, Any]) -> float:
    """The grade of an answer."""
    return {"constraints": _constraints, "spelling": _spelling, "sums": _sums, "json": _json}[name](
        answer.strip(), reference, extra
    )


def _sums(answer: str, reference: str, extra: dict[str, Any]) -> float:
    numbers = re.findall(r"\d+", answer.replace(",", ""))
    return float(bool(numbers) and int(numbers[-1]) == int(reference))


def _json(answer: str, reference: str, extra: dict[str, Any]) -> float:
    wanted, start = json.loads(reference), answer.find("{")
    if start < 0:
        return 0.0
    try:
        found, _ = json.JSONDecoder().raw_decode(answer[start:])
    except (ValueError, RecursionError):
        return 0.0
    return sum(found.get(key) == value for key, value in wanted.items()) / len(wanted)


def _spelling(answer: str, reference: str, extra: dict[str, Any]) -> float:
    return SequenceMatcher(None, answer.split(), reference.split(), autojunk=False).ratio()


def _constraints(answer: str, reference: str, extra: dict[str, Any]) -> float:
    (name,), (given,) = extra["instruction_id_list"], json.loads(extra["kwargs"])
    return float(bool(answer) and _met(name, answer, given))


def _met(name: str, answer: str, given: dict[str, Any]) -> bool:
    lines = answer.splitlines()
    if name == "punctuation:no_comma":
        return "," not in answer
    if name == "length_constraints:number_words":
        return len(_words(answer)) < given["num_words"]
    if name == "detectable_format:number_bullet_lists":
        return sum(line.strip()[:2] in ("* ", "- ") for line in lines) == given["num_bullets"]
    if name == "detectable_format:number_highlighted_sections":
        return any(part.strip() for line in lines for part in line.removeprefix("* ").split("*")[1:-1])
    if name == "detectable_format:title":
        return any(line.partition("<<")[2].partition(">>")[0].strip() and ">>" in line for line in lines)
    if name == "detectable_content:postscript":
        return "p.s." in answer.lower()
    raise ValueError(f"no check for {name}")


def indicators(answer: str, prompt: str) -> dict[str, float]:
    """What tells a gamed reward."""
    words, asked = _words(answer), set(zip(*(_words(prompt)[n:] for n in range(3)), strict=False))
    triples = list(zip(*(words[n:] for n in range(3)), strict=False))
    some = max(1, len(triples))
    return {
        "words": float(len(words)),
        "repeated": (len(triples) - len(set(triples))) / some,
        "copied": sum(triple in asked for triple in triples) / some,
    }


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
