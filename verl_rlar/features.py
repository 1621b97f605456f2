# SPDX-License-Identifier: Apache-2.0
"""What a query is, seen from the query alone: which checks its row makes possible, and which format it demands.

`describe` looks at the prompt, the reference and the further columns. It never looks at `data_source` (renaming a data
set changes nothing) and never at a response (all responses of a group are treated alike, I2).

Guarantees: pure and deterministic, linear in the length of the row, never raises on strange columns.

Not covered: prompts in languages other than English are recognised by their columns and references only, as the phrase
patterns are English; a reference that is a bare word and a mathematical symbol at once ("e") counts as text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from verl_rlar.types import Kind, Query

TEST_COLUMNS = ("tests", "test", "test_list", "test_cases", "unit_tests", "input_output")
"""Columns that hold unit tests or input/output pairs of a program."""

SHORT_REFERENCE_WORDS = 12
"""A reference of at most this many words can be compared as a short text; a longer one is prose."""

_TRANSLATE = re.compile(r"\btranslat(?:e|ion|ing)\b", re.IGNORECASE)
_OPTION = re.compile(r"^[ \t]*[(\[]?([A-J])[).:\]][ \t]*\S", re.MULTILINE)
_LETTER = re.compile(r"\(?([A-Ja-j])\)?\.?")
_FINAL = re.compile(r"####[ \t]*\S|\\boxed\b")
_NUMBER = re.compile(r"[-+]?[$€£]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?(?:/\d[\d,]*)?", re.IGNORECASE)
_UNIT = re.compile(r"\s*(?:%|°|°?[CF]|\\?[$%]|[a-zA-Z]{1,12}(?:\^?[23]|/[a-zA-Z]{1,8})?)?\.?")
_LATEX = re.compile(
    r"\\(?:d?t?frac|sqrt|pi|text|mathrm|mathbf|left|right|begin|infty|cup|cap|circ|angle|theta|cdot|times|pm|sin|cos|tan|log|ln|sum|int"
    r"|overline|binom|in|le|ge|leq|geq|neq|%|\$|\{|!)"
)
_FORMULA = re.compile(r"[\s\d().,\[\]{}+\-*/^=<>|!%$_a-zA-Z\\']+")
_OPERATOR = re.compile(r"[\d)\]}a-zA-Z]\s*[+\-*/^=<>]\s*[\d(\[{a-zA-Z\\-]|^\s*[(\[{].*[\d,].*[)\]}]\s*$|\d[a-z]\b|_\{?\w")
_WORD = re.compile(r"[^\W\d_]{3,}")
_THINK = re.compile(r"<think>", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Features:
    """What `describe` found."""

    kinds: tuple[tuple[Kind, str], ...]
    """Every check that the row makes possible, the most specific first, each with the evidence in words. The first one
    is what the query is taken for; never empty."""
    gates: tuple[str, ...]
    """Names of the gates whose format the query demands."""

    @property
    def kind(self) -> Kind:
        return self.kinds[0][0]

    @property
    def verifiable(self) -> bool:
        """Whether the row says what a right answer is."""
        return self.kind is not Kind.OPEN


def describe(query: Query) -> Features:
    """Finds what makes a query checkable, and what format it demands."""
    kinds = tuple(_kinds(query)) or ((Kind.OPEN, "no tests, constraints, schema or checkable reference"),)
    return Features(kinds=kinds, gates=tuple(_gates(query)))


def _kinds(query: Query) -> Iterator[tuple[Kind, str]]:
    extra, reference = query.extra, (query.reference or "").strip()
    column = next((name for name in TEST_COLUMNS if _filled(extra.get(name))), None)
    if column:
        yield Kind.UNIT_TESTS, f"column `{column}` holds tests"
    elif _is_tests(reference):
        yield Kind.UNIT_TESTS, "the reference holds tests"
    if _filled(extra.get("instruction_id_list")):
        yield Kind.CONSTRAINTS, "column `instruction_id_list` names constraints"
    if _filled(extra.get("json_schema")):
        yield Kind.JSON_SCHEMA, "column `json_schema` holds a schema"
    if not reference:
        return
    options = next((name for name in ("choices", "options") if _filled(extra.get(name))), None)
    if options:
        yield Kind.CHOICE, f"column `{options}` lists the options"
    elif _LETTER.fullmatch(reference) and len({m.group(1) for m in _OPTION.finditer(query.prompt)}) >= 2:
        yield Kind.CHOICE, "the prompt lists options and the reference is a letter"
    if _filled(extra.get("target_lang")):
        yield Kind.TRANSLATION, "column `target_lang` names a language"
    elif _TRANSLATE.search(query.prompt[:400]) and _WORD.search(reference):
        yield Kind.TRANSLATION, "the prompt asks for a translation"
    if evidence := _math_evidence(reference):
        yield Kind.MATH, evidence
    if len(reference.split()) <= SHORT_REFERENCE_WORDS:
        yield Kind.SHORT_TEXT, f"the reference has at most {SHORT_REFERENCE_WORDS} words"


def _gates(query: Query) -> Iterator[str]:
    demanded = query.extra.get("format")
    if demanded == "think" or any(m.role == "system" and _THINK.search(m.content) for m in query.messages):
        yield "think_format"
    if any(_filled(query.extra.get(name)) for name in ("min_words", "max_words", "min_chars", "max_chars")):
        yield "length_limits"


def _filled(value: Any) -> bool:
    """Whether a column holds anything; arrays and lists count by their length, a number is something."""
    if value is None:
        return False
    try:
        return len(value) > 0
    except TypeError:
        return True


def _is_tests(reference: str) -> bool:
    if re.search(r"^\s*assert\s", reference, re.MULTILINE) or "def check(" in reference:
        return True
    if not reference.startswith("{"):
        return False
    try:
        tests = json.loads(reference)
    except (ValueError, RecursionError):
        return False
    return isinstance(tests, dict) and "inputs" in tests and "outputs" in tests


def _math_evidence(reference: str) -> str | None:
    """Why a reference is a mathematical answer, or None if it is not."""
    if _FINAL.search(reference):
        return "the reference marks a final answer"
    bare = reference.strip("$ ").removeprefix("\\(").removesuffix("\\)").strip()
    number = _NUMBER.match(bare)
    if number and _UNIT.fullmatch(bare, number.end()):
        return "the reference is a number"
    if len(bare) > 400:
        return None
    if _LATEX.search(bare):
        return "the reference is LaTeX"
    if _FORMULA.fullmatch(bare) and _OPERATOR.search(bare) and not _WORD.search(bare):
        return "the reference is a formula"
    if re.fullmatch(r"-?\d+(?:\.\d+)?(?:\s*,\s*-?\d+(?:\.\d+)?)+", bare):
        return "the reference is a list of numbers"
    return None
