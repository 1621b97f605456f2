# SPDX-License-Identifier: Apache-2.0
r"""Changes of a right answer: those that must fail, and those that must not matter.

A generator takes a query and a right answer to it and gives answers of which it *claims* something: `BAD` ones are
wrong, `SAME` ones are as right as the answer itself. Each is applied only to the kinds of query for which its claim
holds (a changed number in a mathematical answer is wrong; in a program it may not matter), and where it cannot be sure
in the case at hand, it gives nothing.

Guarantees: deterministic, given the random generator; linear in the answer; nothing is evaluated.

Not covered: queries with several right answers, of which the reference is one; mutants of programs that happen to be
equivalent (their thresholds are lower for that reason).
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction

from verl_rlar.planning import WORDS
from verl_rlar.types import Kind, Query

LONG = 60_000
"""Characters of a very long answer."""

_INTEGER = re.compile(r"(?<![\w.])\d{1,12}(?![\w.])")
_COMPUTATION = re.compile(r"(?<![\w.,/^=-])\d{1,9}(?:\s*[-+*/×·÷−]\s*\d{1,9})+(?![\w^/=]|[.,]\d)")
_NUMBER = re.compile(r"-?\d{1,15}(?:\.\d{1,6})?")
_WITH_UNIT = re.compile(r"(-?\d{1,12}(?:\.\d{1,6})?)\s*([a-z]{1,12})")

FRAMES = (
    "The answer is {}.",
    "Let me work through this step by step.\n\nFirst I write down what is given, then I put it together.\n\n"
    "Therefore, the final answer is $\\boxed{{{}}}$.",
    "<think>I should read the question again before I commit.</think>\nThe answer is {}.",
    "I collect the terms and simplify.\n#### {}",
)
"""What a model writes around a final answer in mathematics."""

LANGUAGE_SAMPLES = {
    "de": "Das ist eine ganz andere Aussage, die mit der Frage überhaupt nichts zu tun hat und in die Irre führt.",
    "en": "This is quite a different statement that has nothing at all to do with what was asked and is misleading.",
    "fr": "C'est une tout autre affirmation, qui n'a absolument rien à voir avec la question et induit en erreur.",
    "es": "Esta es una afirmación completamente distinta, que no tiene nada que ver con la pregunta y confunde.",
    "ru": "Это совершенно другое утверждение, которое не имеет никакого отношения к вопросу и вводит в заблуждение.",
}
"""A sentence about nothing in each of some languages."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """What a generator gives."""

    sort: str
    response: str
    mutant: bool = False


Generator = Callable[[Query, str, random.Random], Iterable[str]]


@dataclass(frozen=True, kw_only=True)
class _Entry:
    sort: str
    kinds: frozenset[Kind]
    make: Generator
    mutant: bool


BAD: list[_Entry] = []
SAME: list[_Entry] = []

ALL = frozenset(Kind)
ANSWERS = frozenset({Kind.MATH, Kind.CHOICE, Kind.SHORT_TEXT})
CHECKED = ANSWERS | {Kind.UNIT_TESTS, Kind.TRANSLATION, Kind.JSON_SCHEMA}


def _bad(kinds: Iterable[Kind], *, mutant: bool = False) -> Callable[[Generator], Generator]:
    def register(make: Generator) -> Generator:
        BAD.append(_Entry(sort=make.__name__, kinds=frozenset(kinds), make=make, mutant=mutant))
        return make

    return register


def _same(kinds: Iterable[Kind]) -> Callable[[Generator], Generator]:
    def register(make: Generator) -> Generator:
        SAME.append(_Entry(sort=make.__name__, kinds=frozenset(kinds), make=make, mutant=False))
        return make

    return register


def wrong_answers(query: Query, kind: Kind, gold: str, rng: random.Random) -> Iterator[Made]:
    """Answers that are wrong, made from a right one."""
    yield from _made(BAD, query, kind, gold, rng)


def equal_answers(query: Query, kind: Kind, gold: str, rng: random.Random) -> Iterator[Made]:
    """Answers that are as right as the given one."""
    yield from _made(SAME, query, kind, gold, rng)


def _made(entries: list[_Entry], query: Query, kind: Kind, gold: str, rng: random.Random) -> Iterator[Made]:
    for entry in entries:
        if kind in entry.kinds:
            for response in entry.make(query, gold, rng):
                if response != gold:
                    yield Made(sort=entry.sort, response=response, mutant=entry.mutant)


def stated(gold: str) -> str:
    r"""What a worked answer states in the end: after the last ``####``, in the last ``\boxed{}``, else all of it."""
    _, mark, tail = gold.rpartition("####")
    if mark and tail.strip():
        return tail.strip().split("\n")[0].strip()
    start = gold.rfind("\\boxed{")
    if start < 0:
        return gold.strip()
    depth, begin = 0, start + len("\\boxed{")
    for at in range(begin, len(gold)):
        if gold[at] == "}" and depth == 0:
            return gold[begin:at].strip()
        depth += (gold[at] == "{") - (gold[at] == "}")
    return gold.strip()


def number_of(text: str) -> Fraction | None:
    """A plain number, with or without thousands separators; None if the text is anything else."""
    bare = text.strip().strip("$").strip()
    if re.fullmatch(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?", bare):
        bare = bare.replace(",", "")
    return Fraction(bare) if _NUMBER.fullmatch(bare) else None


def _plain(number: Fraction) -> str:
    if number.denominator == 1:
        return str(number.numerator)
    return f"{float(number):.6f}".rstrip("0")


def framed(answer: str, rng: random.Random) -> str:
    """A final answer as a model would write it."""
    if "\\" in answer:
        return FRAMES[1].format(answer)
    return rng.choice(FRAMES).format(answer)


def _comes_to(computation: str, number: Fraction) -> bool:
    """Whether whole numbers with + - * / between them come to a number."""
    total = Fraction(0)
    for sign, term in re.findall(r"([-+−]?)\s*(\d+(?:\s*[*/×·÷]\s*\d+)*)", computation):
        value, operator = Fraction(1), "*"
        for part in re.findall(r"\d+|[*/×·÷]", term):
            if not part.isdigit():
                operator = part
            elif operator in "*×·":
                value *= int(part)
            elif int(part):
                value /= int(part)
            else:
                return False
        total += value if sign in ("", "+") else -value
    return total == number


# --- What must fail ---------------------------------------------------------------------------------------------------


@_bad({Kind.MATH}, mutant=True)
def changed_number(query: Query, gold: str, rng: random.Random) -> Iterable[str]:
    """Another number in the place of the right one, bare and as a model would write it."""
    answer = stated(gold)
    number = number_of(answer)
    if number is not None:
        near = [number + 1, number - 1, number * 10, number + 7]
        first, second = rng.sample([_plain(other) for other in near if other != number], 2)
        return [first, framed(second, rng)]
    places = [] if "^" in answer or "_" in answer else list(_INTEGER.finditer(answer))
    if not places:
        return []
    place = places[-1]
    return [framed(answer[: place.start()] + str(int(place[0]) + 1) + answer[place.end() :], rng)]


@_bad({Kind.SHORT_TEXT}, mutant=True)
def changed_year(query: Query, gold: str, rng: random.Random) -> Iterable[str]:
    """Another number in a short text."""
    place = _INTEGER.search(gold)
    return [gold[: place.start()] + str(int(place[0]) + 1) + gold[place.end() :]] if place else []


@_bad({Kind.MATH}, mutant=True)
def swapped_operator(query: Query, gold: str, rng: random.Random) -> Iterable[str]:
    """Plus for minus between two terms."""
    answer = stated(gold)
    place = re.search(r"(?<=[\w)}])\s*([+-])\s*(?=[\w(\\])", answer)
    if not place or "," in answer or "e" in answer[max(0, place.start() - 1) : place.start()]:
        return []
    other = "-" if place[1] == "+" else "+"
    return [framed(answer[: place.start(1)] + other + answer[place.end(1) :], rng)]


@_bad({Kind.UNIT_TESTS}, mutant=True)
def swapped_code_operator(query: Query, gold: str, rng: random.Random) -> Iterable[str]:
    """One operator of a program turned into its opposite."""
    swaps = ((" < ", " >= "), (" > ", " <= "), (" == ", " != "), (" + ", " - "), ("return True", "return False"))
    found = [gold.replace(old, new, 1) for old, new in swaps if old in gold]
    return found[:2]


@_bad({Kind.MATH}, mutant=True)
def negated(query: Query, gold: str, rng: random.Random) -> Iterable[str]:
    """The other sign."""
    number = number_of(stated(gold))
    return [] if not number else [framed(_plain(-number), rng)]


@_bad({Kind.SHORT_TEXT}, mutant=True)
def negated_text(query: Query, gold: str, rng: random.Random) -> Iterable[str]:
    """The contrary, in words."""
    return [f"not {gold}"]


@_bad({Kind.MATH})
def wrong_unit(query: Query, gold: str, rng: random.Random) -> Iterable[str]:
    """The right number of something else."""
    units = {"cm": "km", "m": "mm", "km": "cm", "kg": "mg", "g": "kg", "hours": "days", "minutes": "hours"}
    parts = _WITH_UNIT.fullmatch(stated(gold))
    return [f"{parts[1]} {units[parts[2]]}"] if parts and parts[2] in units else []


@_bad({Kind.JSON_SCHEMA}, mutant=True)
def dropped_field(query: Query, gold: str, rng: random.Random) -> Iterable[str]:
    """A document without one of the fields that its schema requires."""
    schema = query.extra.get("json_schema")
    try:
        schema = json.loads(schema) if isinstance(schema, str) else schema
        document = json.loads(gold)
    except (ValueError, RecursionError):
        return []
    required = schema.get("required") if isinstance(schema, dict) else None
    if not isinstance(document, dict) or not isinstance(required, list):
        return []
    return [json.dumps({k: v for k, v in document.items() if k != name}) for name in required[:2] if name in document]


@_bad({Kind.CONSTRAINTS}, mutant=True)
def dropped_constraint(query: Query, gold: str, rng: random.Random) -> Iterable[str]:
    """An answer that satisfied its constraints, with one of them broken."""
    ids = query.extra.get("instruction_id_list")
    for name in ids if isinstance(ids, (list, tuple)) else ():
        if name == "punctuation:no_comma":
            yield gold + " And so on, and so forth."
        elif name == "change_case:english_lowercase":
            yield gold + " AND THIS IS LOUD."
        elif name == "change_case:english_capital":
            yield gold + " and this is quiet."
        elif name == "startend:quotation":
            yield gold.strip().strip('"') + " and no quotation marks"


@_bad(CHECKED)
def truncated(query: Query, gold: str, rng: random.Random) -> Iterable[str]:
    """An answer that stops before it has said anything, or in the middle."""
    if "json_schema" in query.extra or (len(gold) > 60 and stated(gold) == gold.strip()):
        return [gold[: len(gold) // 2].rstrip()]
    return ["Let me work through this step by step. First, we"]


@_bad({Kind.TRANSLATION})
def wrong_language(query: Query, gold: str, rng: random.Random) -> Iterable[str]:
    """Something in another language."""
    target = query.extra.get("target_lang")
    return [text for code, text in LANGUAGE_SAMPLES.items() if code != target and target][:2]


@_bad(CHECKED)
def copy_of_prompt(query: Query, gold: str, rng: random.Random) -> Iterable[str]:
    """The question as the answer, unless it holds the answer."""
    answer = stated(gold)
    holds = answer.casefold() in query.prompt.casefold()
    number = number_of(answer)
    if number is not None:
        numbers = [found.replace(",", "") for found in re.findall(r"\d[\d,]*(?:\.\d+)?", query.prompt)]
        holds = any(number_of(found.rstrip(",")) == abs(number) for found in numbers)
    return [] if holds and len(answer) < 60 else [query.prompt]


@_bad({Kind.MATH})
def not_worked_out(query: Query, gold: str, rng: random.Random) -> Iterable[str]:
    """The computation that the question asks for, as the answer: 19 + 31, asked for 19 + 31."""
    number = number_of(stated(gold))
    for one in _COMPUTATION.finditer(query.prompt):
        if number is not None and _comes_to(one[0], number):
            return [one[0], f"The answer is {one[0]}."]
    return []


@_bad(ALL)
def empty(query: Query, gold: str, rng: random.Random) -> Iterable[str]:
    """Nothing, and nothing but white space."""
    return ["", " \n\t\n "]


@_bad(CHECKED | {Kind.OPEN})
def garbled(query: Query, gold: str, rng: random.Random) -> Iterable[str]:
    """Random words, and the answer's letters in disorder."""
    texts = [" ".join(rng.choices(WORDS, k=12))]
    letters = [char for char in stated(gold) if not char.isspace()]
    if len(set(letters)) >= 8:
        rng.shuffle(letters)
        texts.append("".join(letters))
    return texts


@_bad(CHECKED)
def very_long(query: Query, gold: str, rng: random.Random) -> Iterable[str]:
    """A lot of words."""
    return [(" ".join(rng.choices(WORDS, k=40)) + " ") * (LONG // 250)]


@_bad(ANSWERS)
def no_answer(query: Query, gold: str, rng: random.Random) -> Iterable[str]:
    """A refusal to answer."""
    return ["I don't know."]


@_bad({Kind.MATH})
def hedged(query: Query, gold: str, rng: random.Random) -> Iterable[str]:
    """The right answer beside a wrong one."""
    number = number_of(stated(gold))
    return [] if number is None else [f"The answer is {stated(gold)} or {_plain(number + 3)}."]


@_bad({Kind.MATH}, mutant=True)
def wrong_at_last(query: Query, gold: str, rng: random.Random) -> Iterable[str]:
    """A text that holds the right answer and concludes another one."""
    number = number_of(stated(gold))
    if number is None:
        return []
    return [f"{stated(gold)} comes to mind first, but that forgets a term. The answer is {_plain(number + 2)}."]


@_bad({Kind.CHOICE}, mutant=True)
def other_choice(query: Query, gold: str, rng: random.Random) -> Iterable[str]:
    """Another option."""
    right = re.search(r"\(([A-Z])\)", gold)
    if not right:
        return []
    first, second = rng.sample([letter for letter in "ABCD" if letter != right[1]], 2)
    return [f"The answer is ({first}).", f"I compare the options one by one.\n\nTherefore, the answer is {second}."]


# --- What must not matter ---------------------------------------------------------------------------------------------


@_same(ALL - {Kind.CONSTRAINTS})
def white_space(query: Query, gold: str, rng: random.Random) -> Iterable[str]:
    """Empty lines before and after."""
    return [gold + "\n\n"] if query.extra.get("entry_point") else ["\n" + gold + "  \n"]


@_same(ANSWERS | {Kind.TRANSLATION, Kind.JSON_SCHEMA, Kind.CONSTRAINTS})
def think_tags(query: Query, gold: str, rng: random.Random) -> Iterable[str]:
    """A thought before the answer."""
    return [f"<think>\nLet me see what is asked here.\n</think>\n\n{gold}"]


@_same({Kind.MATH})
def number_form(query: Query, gold: str, rng: random.Random) -> Iterable[str]:
    r"""42, 42.0, \boxed{42}."""
    answer = stated(gold)
    number = number_of(answer)
    yield f"\\boxed{{{answer}}}"
    if number is not None and number.denominator == 1:
        yield f"{number.numerator}.0"
        if abs(number) >= 1_000:
            yield f"The answer is {number.numerator:,}."


@_same({Kind.MATH})
def worded(query: Query, gold: str, rng: random.Random) -> Iterable[str]:
    """The answer as a model would write it."""
    return [framed(stated(gold), rng)]


@_same({Kind.MATH})
def unit_spelling(query: Query, gold: str, rng: random.Random) -> Iterable[str]:
    r"""5 cm, 5cm, 5\text{ cm}."""
    parts = _WITH_UNIT.fullmatch(stated(gold))
    return [f"{parts[1]}{parts[2]}", f"${parts[1]}\\text{{ {parts[2]}}}$"] if parts else []


@_same({Kind.SHORT_TEXT})
def casing(query: Query, gold: str, rng: random.Random) -> Iterable[str]:
    """Upper and lower case, and a full stop."""
    return [gold.lower(), gold.upper(), gold + "."]


@_same({Kind.SHORT_TEXT})
def labelled_answer(query: Query, gold: str, rng: random.Random) -> Iterable[str]:
    """The answer after a label, as many prompts ask for it."""
    return [f"I recall that this is well known.\nAnswer: {gold}"]


@_same({Kind.CHOICE})
def choice_form(query: Query, gold: str, rng: random.Random) -> Iterable[str]:
    """A letter with and without its brackets."""
    letter = re.search(r"\(([A-Z])\)", gold)
    return [letter[1], f"({letter[1]})", f"\\boxed{{{letter[1]}}}"] if letter else []


@_same({Kind.UNIT_TESTS})
def code_fence(query: Query, gold: str, rng: random.Random) -> Iterable[str]:
    """The same program in a fence, with prose around it."""
    return [f"Here is my solution.\n\n```python\n{gold.rstrip()}\n```\nIt runs in linear time."]


@_same({Kind.UNIT_TESTS})
def code_format(query: Query, gold: str, rng: random.Random) -> Iterable[str]:
    """The same program with comments and empty lines."""
    return [gold.rstrip() + "\n\n# end of the program\n\n"] if '"""' not in gold and "'''" not in gold else []


@_same({Kind.JSON_SCHEMA})
def json_layout(query: Query, gold: str, rng: random.Random) -> Iterable[str]:
    """The same document, laid out otherwise."""
    try:
        document = json.loads(gold)
    except (ValueError, RecursionError):
        return []
    return [json.dumps(document, indent=4), json.dumps(document, separators=(",", ":"))]
