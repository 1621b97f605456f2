# SPDX-License-Identifier: Apache-2.0
r"""How responses are read: their answer, numbers, words, code and JSON. One source for our rules and for verifiers.

The built-in rules (`verl_rlar.tools.rules`) import it; the boxes have a copy of this file, and there
``import rlar`` offers some of its functions (`verl_rlar.sandbox.inside.verifier_api.READERS`).

Guarantees: Python's own library only; nothing is evaluated or raised for whatever a text holds (but `parse_json`, whose
`ValueError` is its answer), lone surrogates included; time linear in the text, of which the answer's finders read the
last `TAIL` characters; numbers, documents and lists have limits, and what is beyond them equals nothing.

Not covered: other languages' words for "the answer is"; other tags of thoughts than ``<think>``; numbers in words; the
decimal comma.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, NoReturn

TAIL = 200_000
"""Characters of the response that are read, from its end."""
LONGEST = 600
"""Characters of the longest answer that is read."""
MOST_ITEMS = 64
"""Elements of the longest list in an answer that is read."""
MOST_NUMBERS = 1_000
"""Numbers of a text that are read."""
MOST_DIGITS = 300
"""Digits of a number that is read, before and after its point, and the largest power of ten in it."""
DEPTH = 40
"""Deepest nesting that is parsed; a recursive schema over such a document stays within Python's stack."""
SIZE = 1_000_000
"""Most characters of JSON that are parsed."""
DIGITS = 1_000
"""Most digits of an integer in JSON."""
OPEN, CLOSE = "<think>", "</think>"


# --- answers ----------------------------------------------------------------------------------------------------------


def answer_of(response: str) -> str:
    """The response without its thinking: what stands after the first ``</think>``.

    A response that opens a block and never closes it has no answer yet: the empty string. A response with a closing
    tag only was started inside the block by its chat template. A response without tags is all answer.
    """
    before, close, after = response.partition(CLOSE)
    if close:
        return after.strip()
    return "" if before.lstrip().startswith(OPEN) else response.strip()


def after_thinking(response: str) -> str:
    """The last `TAIL` characters of a response, from the last ``</think>`` on; as with `answer_of`, the empty string
    where thinking was begun and not ended."""
    if CLOSE not in response and response.lstrip().startswith(OPEN):
        return ""
    return response[-TAIL:].rpartition(CLOSE)[2]


_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BETWEEN_BOXES = re.compile(r"(?:[\s,;$&]|\\[()\[\]]|\\q?quad|\\text|[{}]|and|or|[a-z]\s?=)*")
_HASHES = re.compile(r"####[ \t]*([^\n#][^\n]*)")
_STATES = r"(?:\s+(?:to|of|for)\s[^\n:.=]{0,80})?(?:\s+is|\s+are|\s*[:=])+[:\s]*(?=([^\s][^\n]{0,600}))"
_PHRASES = (
    re.compile(rf"answer{_STATES}|^[^\S\n]*A:\s*(?=([^\s][^\n]{{0,600}}))", re.IGNORECASE | re.MULTILINE),
    re.compile(rf"(?:solution|result){_STATES}()", re.IGNORECASE),
)
_OPENS = re.compile(r"(\\\[|\$\$|```)\w*\s*")
_CLOSES = {"\\[": "\\]", "$$": "$$", "```": "```"}
"""Beginnings of formulas and fences that take lines of their own, and their ends."""
_FORMULA = re.compile(
    r"\$\$([^$]{1,600})\$\$|(?<![\\\d])\$(?=[^\s$])((?:\\\$|[^$\n]){1,600})(?<=[^\s\\])\$(?!\d)|\\\(((?:[^\\]|\\[^()]){1,600})\\\)"
    r"|\\\[((?:[^\\]|\\[^\[\]]){1,600})\\\]"
)
_NUMBER = re.compile(
    r"(?<![\w.,])[-−+]?\s?(?:\\?[$€£]\s?)?[-−]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:(?<=\d)|(?=\.\d))(?:\.\d+)?"
    r"(?:[eE][-+]?\d+(?!\w))?(?:\s?/\s?\d+(?![\d,]))?"
)
_NEXT_NUMBER = re.compile(r"\s*(?:,|and|or|,\s*and|,\s*or)\s+(?=[-$.\d])")
_UNIT_TAIL = re.compile(r"\s?(?:\\?%|°|[A-Za-z$€£²³^/ ]{1,40})?")
_SENTENCE_END = re.compile(r"\.(?=\s|$)|[!?](?=\s+[A-Z]|$)|(?<=[\w)}$])[;:]\s")


def final_answer(response: str) -> str:
    r"""What a response states in the end, as text.

    Of the response without its thoughts (`answer_of`), in this order: the content of the last closed ``\boxed{}`` or
    of the last line ``#### ...``, whichever stands later (neighbouring boxes are joined by commas); the rest of the
    line after the last "answer is", "answer:" or a line's "A:" (without these, "solution" or "result"), hedges
    included, or the formula or fence that begins there; the last line.

    Returns:
        For example ``\frac{1}{2}``, ``18 dollars.`` or ``3 or 4``; the empty string if there is nothing.
    """
    text = answer_of(response)[-TAIL:]
    stated = marked(text)
    if stated is not None:
        return stated
    text = _without_bold(text)
    stated = _phrased(text)
    if stated is not None:
        return stated
    return text.strip().rpartition("\n")[2].strip()


def find_answer(response: str, *, words: bool = False) -> str | None:
    r"""The text of a mathematical final answer, unparsed: as `final_answer`, without the prose around it.

    Args:
        response: Any text; only its last `TAIL` characters are read.
        words: Words are expected, so a short line of words is an answer.

    Returns:
        For example ``\frac{1}{2}`` or ``18 dollars``; None if there is nothing that could be an answer.
    """
    text = after_thinking(response)
    stated = marked(text)
    if stated is not None:
        return stated
    text = _without_bold(text)
    stated = _phrased(text)
    if stated is not None:
        return _from_prose(stated)
    line = text.strip()
    if len(line) <= 200 and "\n" not in line and line and (words or not _is_prose(line)):
        return line
    return _last_value(text)


def _phrased(text: str) -> str | None:
    """What stands after the last "answer is" or the like; None if there is nothing of the kind."""
    phrase = _last(_PHRASES[0], text)
    weak = phrase is None
    phrase = phrase or _last(_PHRASES[1], text)
    if phrase is None:
        return None
    group = 1 if phrase.group(1) else 2
    said, after = phrase.group(group).strip(), text[phrase.end(group) :]
    if weak and after.strip():  # "Solution:" above a text is its title
        head = text[phrase.start() : phrase.start(group)]
        if ":" in head and ("\n" in head or _is_prose(_sentence(said))):
            return None
    if opens := _OPENS.fullmatch(said):
        inside, closed, _ = after[: 2 * LONGEST].partition(_CLOSES[opens[1]])
        said = " ".join(inside.split()) if closed and inside.strip() else said
    return said


def _without_bold(text: str) -> str:
    return re.sub(r"(?<![\w)}])\*\*|\*\*(?![\w({-])", "", text)


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    matches = deque(pattern.finditer(text), maxlen=1)
    return matches[0] if matches else None


def marked(text: str) -> str | None:
    """What stands in the last box or after the last ``####``; None if there is neither."""
    box_at, box = _last_box(text)
    hashes = _last(_HASHES, text)
    if hashes is not None and hashes.start() > box_at and not re.match(r"[\s*_]*[A-Za-z]{2,}(?:\s+\w|:)", hashes[1]):
        return hashes[1].strip()
    return box


def _last_box(text: str) -> tuple[int, str | None]:
    """Where the last closed box starts, and its content; neighbouring boxes are read as one list."""
    boxes = list(_BOX.finditer(text))[-MOST_ITEMS:]
    found: list[str] = []
    start = len(text)
    for box in reversed(boxes):
        end = _closing(text, box.end(), start)
        if end is None:
            if found:
                break
            continue
        if found and not (start - end < 60 and _BETWEEN_BOXES.fullmatch(text, end + 1, start)):
            break
        found.append(text[box.end() : end].strip())
        start = box.start()
    if not found:
        return -1, None
    return start, found[0] if len(set(found)) == 1 else ", ".join(reversed(found))


def _closing(text: str, start: int, stop: int) -> int | None:
    """Where the brace that was opened before `start` closes, or its content gets too long; None if it never does."""
    depth = 1
    for at in range(start, min(stop, start + LONGEST + 1)):
        if text[at] in "{}" and text[at - 1] != "\\":
            depth += 1 if text[at] == "{" else -1
            if depth == 0:
                return at
    return start + LONGEST + 1 if start + LONGEST + 1 < stop else None


def _from_prose(text: str) -> str:
    """The answer at the head of a line such as ``$5$, because ...``."""
    head = _sentence(text)
    if not _is_prose(head):
        return head.strip()
    formulas = list(_FORMULA.finditer(head))
    if formulas:
        last = first = formulas[0]
        for formula in formulas[1:]:
            if not re.fullmatch(r"\s*(?:,|and|or|,\s*and|,\s*or)\s*", head[last.end() : formula.start()]):
                break
            last = formula
        unit = _UNIT_TAIL.match(head, last.end())
        return head[first.start() : last.end()] + (unit[0] if unit else "")
    number = next((n for n in _NUMBER.finditer(head) if n[0].strip()), None)
    if number is None:
        return head.strip()
    stop = number.end()
    while more := _NEXT_NUMBER.match(head, stop):
        following = _NUMBER.match(head, more.end())
        if following is None or not following[0].strip():
            break
        stop = following.end()
    unit = _UNIT_TAIL.match(head, stop)
    return (head[number.start() : stop] + (unit[0] if unit else "")).strip()


def _sentence(text: str) -> str:
    """The first sentence of a text, without its end."""
    text = text[:LONGEST]
    end = _SENTENCE_END.search(text)
    return text[: end.start()] if end else text


def _last_value(text: str) -> str | None:
    """The last formula or number of a text, with its unit."""
    last = _last(_FORMULA, text)
    after = last.end() if last else 0
    number = None
    for found in _NUMBER.finditer(text, after):
        if found[0].strip():
            number = found
    picked = number or last
    if picked is None:
        return None
    unit = _UNIT_TAIL.match(text, picked.end())
    return (picked[0] + (unit[0] if unit else "")).strip()


FUNCTION = "sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|sinh|cosh|tanh|log|ln|exp"
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
MATH_WORD = re.compile(rf"(?:{FUNCTION}|sqrt|pi|inf|infinity)(?![A-Za-z])")
_MATH_WORDS = frozenset(FUNCTION.split("|")) | {"sqrt", "pi", "inf", "infinity", "oo", "and", "or", "frac"}


def _is_prose(text: str) -> bool:
    """Whether a line has words that are no mathematics and no unit at its end."""
    bare = re.sub(r"\\(?:text|mathrm|mbox|textbf|begin|end)\s*\{[^{}]*\}", " ", text)
    words = [word for word in _WORD.findall(bare) if word.lower() not in _MATH_WORDS]
    amount = TRAILING_WORDS.fullmatch(text.strip(" $*.\n"))
    return bool(words) and not (amount and ONLY_NUMBER.fullmatch(amount["core"].replace("$", "")))


TRAILING_WORDS = re.compile(
    r"(?P<core>.*[\d)}\]])(?P<gap>\s*)(?P<words>[A-Za-z][A-Za-z .,'/()-]*(?:\^\s*\{?\d\}?)?)", re.DOTALL
)
ONLY_NUMBER = re.compile(r"(?:[-+*/^().,=\d\s{}]|\\approx|\\\$|\\(?:d|t|c)?frac|\\sqrt|\\pi|\\cdot|\\times|\\div)+")


# --- numbers ----------------------------------------------------------------------------------------------------------

_FRACTION = re.compile(r"(?<=(\d))?\\[dtc]?frac\s?(?:\{\s?(-?\d{1,300})\s?\}|(\d))\s?(?:\{\s?(\d{1,300})\s?\}|(\d))")
_GROUPS = re.compile(r"(?<=\d)(?:\{,\}|\\[,!;:]|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))")
_SIGNS = str.maketrans(
    dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212\ufe63\uff0d", "-")
    | {"½": " 1/2", "¼": " 1/4", "¾": " 3/4", "⅓": " 1/3", "⅔": " 2/3"}
    | {power: f"^{digit}" for digit, power in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}
)
_VALUE = re.compile(
    r"(?<![\w.])(?=[-+\\$€£.\d])(?P<sign>[-+])?(?:\\?[$€£]\s?)?(?P<second>-)?"
    r"(?:(?P<whole>\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.(?P<part>\d+))?|\.(?P<bare>\d+))"
    r"(?:[eE](?P<e>[-+]?\d+)|\s?(?:[*x×·]|\\times|\\cdot)\s?10\s?\^\s?\{?(?P<ten>[-+]?\d+)\}?)?"
    r"(?:\s?/\s?(?P<under>\d+)(?![\d.,/]\d))?(?P<percent>\s?\\?%|\sper\s?cent\b)?"
)


def numbers(text: str) -> list[Fraction | float]:
    r"""The numbers of a text, in order and exactly, at most `MOST_NUMBERS`.

    Understood are signs (also the typographic minus), thousands separators (``1,234``, ``1{,}234``, thin spaces),
    decimals, ``3/4`` and ``\frac{3}{4}``, per cent (``50%`` is 1/2), ``1.5e3`` and ``1.5 \times 10^{3}``, and a sign
    of money before the number. What is glued to a word (``x2``) is none; in ``5-3`` and ``2004-04-23`` the hyphen is
    no sign.

    Returns:
        Fractions; NaN, which equals nothing, for a number beyond `MOST_DIGITS` or with the denominator 0.
    """
    text = _GROUPS.sub(",", text.translate(_SIGNS))
    text = _FRACTION.sub(lambda f: f"{' ' if f[1] else ''}{f[2] or f[3]}/{f[4] or f[5]}", text)
    values: list[Fraction | float] = []
    for found in _VALUE.finditer(text):
        values.append(_value(found))
        if len(values) == MOST_NUMBERS:
            break
    return values


def _value(found: re.Match[str]) -> Fraction | float:
    whole, part = (found["whole"] or "0").replace(",", ""), found["part"] or found["bare"] or ""
    power, under = found["e"] or found["ten"] or "0", found["under"] or "1"
    if max(len(whole), len(part), len(under)) > MOST_DIGITS or len(power) > 5 or abs(int(power)) > MOST_DIGITS:
        return float("nan")  # another object each time: in a list, math.nan would equal itself
    if not int(under):
        return float("nan")
    value = Fraction(int(whole + part), 10 ** len(part)) * Fraction(10) ** int(power) / int(under)
    if found["percent"]:
        value /= 100
    return -value if (found["sign"] == "-") is not (found["second"] == "-") else value


def number(text: str) -> Fraction | None:
    """The one number of a text, as `numbers` reads it; None if there is none, or several, or one that is beyond it."""
    found = numbers(text)
    return found[0] if len(found) == 1 and isinstance(found[0], Fraction) else None


# --- words ------------------------------------------------------------------------------------------------------------

_ARTICLES = frozenset({"a", "an", "the"})
_PLAIN = str.maketrans(
    dict.fromkeys("\u201c\u201d\u201e\u201f\u00ab\u00bb\u2033\uff02", '"')
    | dict.fromkeys("\u2018\u2019\u201a\u201b\u2032\u00b4`\uff07", "'")
    | dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "-")
    | {"\u2044": "/"}
)


def plain(text: str) -> str:
    """A text in one spelling: NFKC, case folded, straight quotes, simple hyphens, single spaces, nothing invisible."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text.translate(_PLAIN)).casefold())
    seen = "".join(char for char in folded.translate(_PLAIN) if unicodedata.category(char) != "Cf")
    return " ".join(seen.split())


def normalise(text: str) -> str:
    """The words of a text: NFKC, case folded, without punctuation and articles, joined by single spaces."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    bare = "".join(" " if char.isspace() else char for char in folded if unicodedata.category(char)[0] not in "PS")
    return " ".join(word for word in bare.split() if word not in _ARTICLES)


# --- code -------------------------------------------------------------------------------------------------------------

_PYTHON = frozenset(("py", "python", "python3", "py3"))


def code_blocks(text: str, language: str = "python") -> list[str]:
    """The contents of the fenced blocks of a text that are of a language or do not say of which; the last one may lack
    its end. Fences are three or more backticks or tildes, also indented ones."""
    return list(_blocks(text, _PYTHON if language.lower() in _PYTHON else frozenset({language.lower()})))


def _blocks(text: str, languages: frozenset[str]) -> Iterator[str]:
    block: list[str] | None = None
    fence, indent, wanted = "", "", False
    for line in text.split("\n"):
        bare = line.strip()
        if block is None:
            mark = next((mark for mark in ("```", "~~~") if bare.startswith(mark)), "")
            if mark:
                language = bare.lstrip(mark[0])
                fence = bare[: len(bare) - len(language)]
                indent = line[: len(line) - len(line.lstrip())]
                words = language.lower().split()
                wanted = not words or words[0].strip("{}.") in languages
                block = []
        elif bare.startswith(fence) and not bare.strip(fence[0]):
            if wanted:
                yield "\n".join(block) + "\n"
            block = None
        elif bare.endswith("```") and fence == "```" and bare.count("```") == 1:
            if wanted:
                yield "\n".join([*block, line.rstrip()[:-3]]) + "\n"
            block = None
        else:
            block.append(line.removeprefix(indent))
    if block is not None and wanted:
        yield "\n".join(block) + "\n"


# --- JSON -------------------------------------------------------------------------------------------------------------


def parse_json(text: str) -> Any:
    """Parses one strict JSON document, bare or in one ``` fence.

    Raises:
        ValueError: It is no JSON, or too large, too deep, ambiguous (repeated keys), or not standard (NaN); or
            it has a number that no float can hold.
    """
    text = _unfenced(text.strip())
    if len(text) > SIZE:
        raise ValueError(f"longer than {SIZE:,} characters")
    if _depth(text) > DEPTH:
        raise ValueError(f"nested deeper than {DEPTH}")
    return json.loads(text, object_pairs_hook=_object, parse_constant=_constant, parse_int=_integer, parse_float=_float)


def find_json(text: str) -> list[Any]:
    """The JSON objects and arrays of a text, parsed strictly (see `parse_json`), at most `MOST_ITEMS`, in order.

    Where there are fenced blocks of JSON, each that holds one document and nothing else; else whatever stands between
    an outermost bracket and its fellow, anywhere in the text. What is in brackets and no JSON (``{'a': 1}``) is none.
    """
    text = text[:SIZE]
    fenced = code_blocks(text, "json")
    found = []
    for piece in fenced or _bracketed(text):
        try:
            document = parse_json(piece)
        except (ValueError, RecursionError):
            continue
        if isinstance(document, dict | list):
            found.append(document)
            if len(found) == MOST_ITEMS:
                break
    return found


def _bracketed(text: str) -> Iterator[str]:
    """What stands between outermost brackets, brackets included; one pass."""
    depth = start = 0
    inside = escaped = False
    for at, char in enumerate(text):
        if inside:
            if escaped:
                escaped = False
            elif char == "\\":
                escaped = True
            elif char == '"':
                inside = False
        elif char in "[{":
            if not depth:
                start = at
            depth += 1
        elif depth and char == '"':
            inside = True
        elif depth and char in "]}":
            depth -= 1
            if not depth:
                yield text[start : at + 1]


def _unfenced(text: str) -> str:
    """The inside of a ``` fence, if the text is one fence; else the text."""
    if not text.startswith("```") or not text.endswith("```") or len(text) < 6:
        return text
    head, newline, body = text[3:-3].partition("\n")
    if newline and head.strip().lower() in {"", "json", "json5", "jsonc"}:
        return body.strip()
    inside = text[3:-3]
    return inside[4:].strip() if inside[:4].lower() == "json" else inside.strip()


def _depth(text: str) -> int:
    """Deepest nesting of brackets outside strings; one pass."""
    depth = deepest = 0
    inside = escaped = False
    for char in text:
        if inside:
            if escaped:
                escaped = False
            elif char == "\\":
                escaped = True
            elif char == '"':
                inside = False
        elif char == '"':
            inside = True
        elif char in "[{":
            depth += 1
            if depth > deepest:
                deepest = depth
                if deepest > DEPTH:
                    break
        elif char in "]}":
            depth -= 1
    return deepest


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object repeats a key")
    return found


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _integer(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _float(digits: str) -> float:
    number = float(digits)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"{digits[:40]} is too large a number")
    return number
