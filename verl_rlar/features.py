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
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from verl_rlar.types import Kind, Query

TEST_COLUMNS = ("tests", "test", "test_list", "test_cases", "unit_tests", "input_output")
"""Columns that hold unit tests or input/output pairs of a program."""

SHORT_REFERENCE_WORDS = 12
"""A reference of at most this many words can be compared as a short text; a longer one is prose."""

SHORT_REFERENCE_CHARS = 150
"""... and at most this many characters: some scripts do not separate words."""

MATH_WORDS = 4
"""A reference with LaTeX and more than this many words outside of it is prose."""

PROMPT_HEAD = 400
"""Characters of a prompt in which a request for a translation is looked for."""

_TRANSLATE = re.compile(
    r"(?i:\btranslat(?:e|ion|ing)\b)[^\n]{0,200}?\b(?i:into|to)\s+(?:\w+\s+)?[A-Z][a-z]+"
    r"|\b(?i:give|provide|write|produce)\b[^\n]{0,60}\b[A-Z][a-z]+\s+translation\b"
)
_OPTION = re.compile(
    r"^[ \t]*[(\[]?([A-J])[).:\]][ \t]*\S|(?<![\w(\[])[(\[]([A-J])[)\]]|(?<=[ \t])([A-J])[).:][ \t]", re.MULTILINE
)
_LETTER = re.compile(r"\(?([A-Ja-j])\)?\.?")
_HASHES = re.compile(r"####[ \t]*\S")
_BOXED = re.compile(r"\\boxed\b")
_NUMBER = re.compile(r"[-+]?[$€£]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:e[-+]?\d+)?(?:/\d[\d,]*)?", re.IGNORECASE)
_UNIT = re.compile(
    r"\s*(?:%|°|°?[CF]|\\?[$%]|(?:(?:square|cubic|sq\.?|cu\.?|per)\s)?[a-zA-Z]{1,12}"
    r"(?:\^?[23]|\s?(?:/|\bper\b)\s?[a-zA-Z]{1,12})?)?\.?"
)
_LATEX = re.compile(r"\\(?:[a-zA-Z]{2,}|[%${!])")
_DRIVE = re.compile(r"\b[A-Za-z]:\\")
_MARKUP = re.compile(r"\\(?:text\w*|mbox|mathrm|mathbf|operatorname|begin|end)\s*\{[^{}]*\}|\\[a-zA-Z]+")
_FORMULA = re.compile(r"[\s\d().,\[\]{}+\-*/^=<>|!%$_a-zA-Z\\']+")
_OPERATOR = re.compile(
    r"[\d)\]}a-zA-Z]\s*[+\-*/^=<>]\s*[\d(\[{a-zA-Z\\-]|^\s*[(\[{].*[\d,].*[)\]}]\s*$|\d[a-z]\b|_\{?\w"
)
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
    column = next((name for name in TEST_COLUMNS if _filled(extra.get(name), sized=True)), None)
    if column:
        yield Kind.UNIT_TESTS, f"column `{column}` holds tests"
    if _is_tests(reference):
        if not column:
            yield Kind.UNIT_TESTS, "the reference holds tests"
        reference = ""  # it is no answer
    if _filled(extra.get("instruction_id_list")):
        yield Kind.CONSTRAINTS, "column `instruction_id_list` names constraints"
    if _filled(extra.get("json_schema")):
        yield Kind.JSON_SCHEMA, "column `json_schema` holds a schema"
    if not reference:
        return
    mathematics = _math_evidence(reference)
    options = next((name for name in ("choices", "options") if _filled(extra.get(name), sized=True)), None)
    if options:
        yield Kind.CHOICE, f"column `{options}` lists the options"
    elif _LETTER.fullmatch(reference) and _lists_options(query.prompt):
        yield Kind.CHOICE, "the prompt lists options and the reference is a letter"
    if _filled(extra.get("target_lang")):
        yield Kind.TRANSLATION, "column `target_lang` names a language"
    elif not mathematics and _WORD.search(reference) and _TRANSLATE.search(query.prompt[:PROMPT_HEAD]):
        yield Kind.TRANSLATION, "the prompt asks for a translation"
    if mathematics:
        yield Kind.MATH, mathematics
    if len(reference.split()) <= SHORT_REFERENCE_WORDS and len(reference) <= SHORT_REFERENCE_CHARS:
        yield Kind.SHORT_TEXT, f"the reference has at most {SHORT_REFERENCE_WORDS} words"


def _lists_options(prompt: str) -> bool:
    return {"A", "B"} <= {letter for match in _OPTION.finditer(prompt) for letter in match.groups() if letter}


def _gates(query: Query) -> Iterator[str]:
    demanded = query.extra.get("format")
    if demanded == "think" or any(m.role == "system" and _THINK.search(m.content) for m in query.messages):
        yield "think_format"
    if any(_filled(query.extra.get(name)) for name in ("min_words", "max_words", "min_chars", "max_chars")):
        yield "length_limits"


def _filled(value: Any, *, sized: bool = False) -> bool:
    """Whether a column holds anything: arrays, lists and texts count by their length, NaN is nothing.

    Args:
        value: What the column holds.
        sized: Whether only what has a length is something.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return False
    try:
        return len(value) > 0
    except TypeError:
        return not sized


def _is_tests(reference: str) -> bool:
    """Whether a reference is a test program, or input/output pairs in one of the JSON forms that code data sets use."""
    if re.search(r"^[ \t]*assert\s", reference, re.MULTILINE) or "def check(" in reference:
        return True
    if re.search(r"^class[ \t]+\w+\([\w.]*TestCase\):", reference, re.MULTILINE):
        return True
    if not reference.startswith(("{", "[{", '["assert')):
        return False
    try:
        tests = json.loads(reference)
    except (ValueError, RecursionError):
        return False
    if isinstance(tests, list):
        if all(isinstance(test, str) for test in tests):
            return True
        return all(isinstance(test, dict) and {"input", "output"} <= test.keys() for test in tests)
    return {"inputs", "outputs"} <= tests.keys() or "functional" in tests


def _math_evidence(reference: str) -> str | None:
    """Why a reference is a mathematical answer, or None if it is not."""
    if _BOXED.search(reference) or _HASHES.search(reference.rstrip().rpartition("\n")[2]):
        return "the reference marks a final answer"
    bare = reference.strip("$ ").removeprefix("\\(").removesuffix("\\)").strip()
    number = _NUMBER.match(bare)
    if number and _UNIT.fullmatch(bare, number.end()):
        return "the reference is a number"
    if len(bare) > 400:
        return None
    if _LATEX.search(bare) and not _DRIVE.search(bare) and len(_WORD.findall(_MARKUP.sub(" ", bare))) <= MATH_WORDS:
        return "the reference is LaTeX"
    if _FORMULA.fullmatch(bare) and _OPERATOR.search(bare) and not _WORD.search(bare):
        return "the reference is a formula"
    if re.fullmatch(r"-?\d+(?:\.\d+)?(?:\s*,\s*-?\d+(?:\.\d+)?)+", bare):
        return "the reference is a list of numbers"
    return None
