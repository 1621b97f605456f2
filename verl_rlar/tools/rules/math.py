# SPDX-License-Identifier: Apache-2.0
r"""Rule `final_answer`: is the final answer of a mathematical response the reference?

Three steps: find the final answer in the response (`verl_rlar.sandbox.reading.find_answer`), take its shape apart
(lists, tuples, intervals, units; `_read`), and compare the scalars that are left with math-verify (`_equal`).

**Which answer counts.** Text after the last ``</think>`` only; thinking that has not ended is no answer. There, in this
order: the last closed ``\boxed{}`` or the last line ``#### n``, whichever stands later; what follows the last "answer
is", "answer:" or a line's "A:" (without these, "solution" or "result"); the whole response if it is one short line
without prose; the last formula or number. Boxes that stand next to each other ("\boxed{1} and \boxed{2}") are ONE
answer with several values, and so is a list in a box: every value must be in the reference and every value of the
reference must be there. So listing candidates never pays, and is no cheat to be flagged either: it is a wrong answer.

**What is the same answer.** Equal value, as math-verify decides (decimals count if right to 6 places). Lists and sets:
order and repetition are free. Tuples and intervals: order and the kind of each bracket count, and the brackets must be
there. ``x=5`` is 5; ``y=5`` is not ``x=5``. Units: where the reference has none, any unit in the answer is ignored;
where it has one, the answer has the same one or none (a wrong one is a wrong answer). A base (``52_8``) counts as a
unit. Nothing is converted (500 cm is not 5 m), except per cent: 50 % = 0.5 = 1/2; a bare 50 is right if the reference
is ``50%``, and ``50%`` is right if the reference is 50 (only for references of at least 1: against 0.5, ``0.5%`` is
wrong). ``5 million`` is 5000000, and 5 where only one of the two says it, as a question may ask for millions. Words as
reference (``\text{Evelyn}``) are compared as words.

**What is no answer yet.** ``19 + 31``, ``2^{10}``, ``100/2``, ``5!``, ``19\frac{31}{1}`` or ``19 - 31i^2`` where the
reference is a number that is worked out: a computation is left to be done. Otherwise the sum of the question is its own
right answer, which a policy that cannot add learns to give (`recipes/multitask_cpu`). Fractions (``\frac{18}{2}``,
too), mixed numbers with a proper one, roots that stay roots, and powers of ten are numbers as they are written; a
reference that has computations itself allows them in the answer.

Guarantees: no text is evaluated, not even its digits. The parser is latex2sympy2_extended, math-verify's own, a
grammar that builds trees; the other parser of math-verify, for plain expressions, is SymPy's `parse_expr`, which calls
`eval`, and is never called here. LaTeX commands outside an allow-list (sums, integrals, \operatorname, ...) are not
parsed at all. No signals, hence any thread. A reference that cannot be read makes the rule abstain, whatever the
response. Bounded: the last 200,000 characters of the response are read, answers of up to 600 characters, and numbers
of up to about 100,000 binary digits; the rest is up to the deadline of the call.

Not covered: see `misses` of the spec.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import sympy
from latex2sympy2_extended import NormalizationConfig, normalize_latex
from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy
from math_verify import verify

from verl_rlar.sandbox.reading import (
    FUNCTION,
    LONGEST,
    MATH_WORD,
    MOST_ITEMS,
    ONLY_NUMBER,
    TRAILING_WORDS,
    find_answer,
    marked,
)
from verl_rlar.tools.rule import rule
from verl_rlar.types import Kind, Sample, Verdict

logging.getLogger("math_verify.grader").setLevel(logging.ERROR)  # it warns that it has no timeout: ours is outside

DEEPEST = 12
"""Brackets within brackets, and sums and products within each other, of an answer that is read."""
MOST_BARS, MOST_FUNCTIONS = 12, 8
"""Bars, and names of functions, of a formula that is parsed."""
MOST_BITS = 100_000
"""Binary digits of the largest number that is computed."""


@rule(
    name="final_answer",
    kinds={Kind.MATH},
    description=r"""Final-answer mathematics against a reference, by math-verify: numbers, fractions, LaTeX, \boxed{},
    `#### n`, percentages, units, sets, tuples, intervals, matrices, equations, with prose around them. 1 if the final
    answer equals the reference, else 0; abstains if the reference is no mathematics that it can read. Use it wherever
    the reference is a number or an expression.""",
    misses=(
        "It looks at the final answer only: a right answer by wrong reasoning scores 1.",
        "Units are not converted: an equal amount in another unit scores 0; a unit it does not know is ignored.",
        "An answer without a unit passes where the reference has one, so a forgotten unit is not punished.",
        "'5 million' passes for 5, too, as the question may ask for millions; '5k' is not read.",
        "A decimal that is right to 6 places passes for an exact value.",
        "It does not tell a simplified from an unsimplified form: 2/4 passes for 1/2, (x+1)^2 for its expansion,"
        r" \frac{18}{2} for 9. But a sum, product or power of numbers that the reference has worked out scores 0.",
        "Capital and small variable names are the same to it.",
        "A tuple or interval without its brackets, and an amount in two units ('5 hours 30 minutes'), score 0.",
        "Sums, integrals, limits and the like are not read; on them as a reference it abstains.",
        "Without any marker it takes the last formula or number, which may not be the one that was meant.",
    ),
    timeout_s=10.0,
)
def final_answer(sample: Sample) -> Verdict:
    """Compares the final answer of a response with the reference.

    Args:
        sample: Its `query.reference` is the bare answer, or a worked solution that ends in ``#### n`` or
        ``\\boxed{}``.

    Returns:
        1.0 or 0.0, or None if the reference cannot be read.

    Raises:
        Exception: Whatever math-verify or SymPy trips over while comparing two answers that it could read.
    """
    reference = sample.query.reference or ""
    stated = marked(reference)
    gold = _read(reference if stated is None else stated)
    if gold is None:
        return Verdict(value=None, reason=f"cannot read the reference {_quote(reference)}")
    text = find_answer(sample.response, words=gold.words is not None)
    if text is None:
        return Verdict(value=0.0, reason="no final answer found")
    answer = _read(text, numeric=gold.numeric)
    if answer is None and gold.words is None:
        return Verdict(value=0.0, reason=f"cannot read the final answer {_quote(text)}")
    right = answer is not None and _same(gold, answer)
    if answer is not None and right and _undone(answer) and not _undone(gold):
        return Verdict(value=0.0, reason=f"{_quote(text)} is not worked out")
    return Verdict(value=float(right), reason=f"{_quote(text)} is {'' if right else 'not '}{_quote(gold.text)}")


def _quote(text: str) -> str:
    text = text.replace(_DOLLAR, "$")
    return repr(text if len(text) <= 60 else text[:57] + "...")


# --- 1. Taking an answer apart ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Form:
    """An answer, taken apart. A leaf has `tree` or `words`; an inner node has `parts`."""

    text: str
    """What it was read from, cleaned."""
    left: str = ""
    """Opening bracket of a tuple or interval; empty for a leaf or a list."""
    right: str = ""
    parts: tuple[_Form, ...] = ()
    tree: sympy.Basic | sympy.MatrixBase | None = None
    words: str | None = None
    """A leaf that is words, in normal form."""
    unit: str = ""
    """Canonical unit; empty if there is none."""
    scale: int = 1
    """What a word like "million" after the number multiplies it by."""
    name: str = ""
    """What the value was assigned to: ``x`` in ``x=5``."""

    @property
    def numeric(self) -> bool:
        """Whether there are no variables in it, so that letters after a number can only be a unit."""
        if self.parts:
            return all(part.numeric for part in self.parts)
        return self.tree is not None and not self.tree.free_symbols


_UNICODE = {
    "−": "-", "–": "-", "—": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "÷": r"\div ",
    "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∈": r"\in ",
    "∅": r"\emptyset ", "°": r"^\circ ", "±": r"\pm ", "∓": r"\mp ", "²": "^2", "³": "^3", "⁴": "^4", "θ": r"\theta ",
    "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}",
    "≈": r"\approx ", "⟨": "(", "⟩": ")", "\u00a0": " ", "\u202f": " ", "\u2009": " ",
}  # fmt: skip
_DOLLAR = "\ue000"
"""Stands for a dollar sign that is money."""
_STRIP = re.compile(
    r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits|mathop)(?![A-Za-z])\.?"
    r"|\\(?:bf|bm|boldsymbol)(?![A-Za-z])|(?<!\\)\\!\s*|(?<!\\)\*\*$|^\*\*"
)
_TEXT_AMOUNT = re.compile(r"^\\(?:text|textbf|textrm|mathrm|mathbf|mbox)\s*\{(\s*-?(?:\\?\$)?\d[^{}]*)\}$")
"""``\text{18 dollars}``"""
_SPACES = re.compile(r"(?<!\\)\\[,;: ]|\\q?quad(?![A-Za-z])|(?<!\\)~|\s+")
_ROW_END = re.compile(r"\\\\\s*\[\s*-?[\d.]+\s*(?:pt|em|ex|mm|cm|in)\s*\]")
"""``\\\\[6pt]``"""
_ARRAY = re.compile(r"\\begin\s*\{array\}\s*\{[^{}]*\}(.*?)\\end\s*\{array\}", re.DOTALL)
_REPEATING = re.compile(r"(?<![\d.])(\d{0,20})\.(\d{0,20})\\(?:overline|bar)\s*(?:\{\s*(\d{1,20})\s*\}|(\d))")
_THOUSANDS = re.compile(r"(?<![\w.,(\[])(\d{1,3})((?:,\d{3})+)(?![\d,])")


def _clean(text: str) -> str:
    """One spelling for what has several: Unicode, spaces, math delimiters, dollar signs, thousands separators."""
    text = _TEXT_AMOUNT.sub(r"\1", text.strip("` \n"))
    text = _ARRAY.sub(r"\\begin{matrix}\1\\end{matrix}", _ROW_END.sub(r"\\\\", text))
    text = _REPEATING.sub(_fraction, text)
    text = re.sub(r"√\s*(\d+|[A-Za-z])", r"\\sqrt{\1}", text).replace("√", r"\sqrt")
    text = re.sub(r"\\lor(?![A-Za-z])", " or ", re.sub(r"\\([lg]e)qslant(?![A-Za-z])", r"\\\1 ", text))
    for symbol, latex in _UNICODE.items():
        text = text.replace(symbol, latex)
    text = unicodedata.normalize("NFKC", text)
    text = re.sub(r"(?<!\\)\\[()\[\]]", " ", text).replace(r"\$", _DOLLAR)
    if text.count("$") % 2:  # one is money
        text = re.sub(r"\$(?=\s?-?[\d.])", _DOLLAR, text, count=1)
    text = text.replace("$", " ")
    text = re.sub(r"\\(?:boxed|fbox)(?=\s*\{)", "", text)
    text = text.replace(r"\lbrace", r"\{").replace(r"\rbrace", r"\}").replace(r"\langle", "(").replace(r"\rangle", ")")
    text = _SPACES.sub(" ", _STRIP.sub("", text))
    text = re.sub(r"(\d)\s*\{,\}\s*(?=\d)", r"\1,", text)
    text = _THOUSANDS.sub(lambda m: m[0].replace(",", ""), text)
    text = re.sub(r"(?<=[\w)}])\*\*(?=[\w({-])", "^", text)
    text = re.sub(r"\s*(?:\\ldots|\\dots)$", "", text.strip())
    text = re.sub(r"(?:(?<!\\)[.,;:\s]|\*\*)+$", "", text.strip())
    return re.sub(r"^<\s*([^<>]*\S)\s*>$", r"\1", text)  # as the prompt may show the place of a number


def _fraction(found: re.Match[str]) -> str:
    """``0.1\\overline{6}`` as a fraction."""
    head, tail, again = found[1], found[2], found[3] or found[4]
    over = int(head + tail + again) - int(head + tail or "0")
    return rf"\frac{{{over}}}{{{10 ** len(tail) * (10 ** len(again) - 1)}}}"


def _read(text: str, *, numeric: bool = False) -> _Form | None:
    """Takes an answer apart.

    Args:
        text: The answer as it was written.
        numeric: The reference has no variables, so a letter at the end of a number is a unit (``5m``).

    Returns:
        None if it is no mathematics that can be read.
    """
    if not text.strip() or len(text) > LONGEST:
        return None
    return _shape(_clean(text), numeric, 0)


_NAMED = re.compile(
    r"(\(?[A-Za-z](?:_\{?\w\}?)?(?:\([^()]*\))?(?:\s*,\s*[A-Za-z])*\)?)\s*(?:=|\\in(?![A-Za-z]))(.+)", re.DOTALL
)
"""What is assigned to a variable, a function value or a tuple of variables."""


def _shape(text: str, numeric: bool, depth: int) -> _Form | None:
    text = text.strip()
    if depth > 4 or not text:
        return None
    cuts = _top_level(text)
    if cuts is None:
        return None
    if cuts.union:
        return _group(text, _cut(text, cuts.union), "∪", "∪", numeric, depth)
    if cuts.commas:
        return _group(text, _cut(text, cuts.commas), "", "", numeric, depth)
    named = _NAMED.fullmatch(text)
    if named:
        form = _shape(named[2], numeric, depth + 1)
        if form is None or form.words is not None:
            return None
        names = re.sub(r"\s", "", named[1])
        return _Form(**{**vars(form), "text": text, "name": form.name or names})
    if cuts.wrapped:
        left, right, inner = cuts.wrapped
        inside = _top_level(inner)
        if inside is not None and inside.commas:
            items = _cut(inner, inside.commas)
            if left in (r"\{", "{"):
                return _group(text, items, "", "", numeric, depth)
            return _group(text, items, left, right, numeric, depth)
        if left == r"\{":
            if not inner.strip():
                return _Form(text=text, words="emptyset")
            return _shape(inner, numeric, depth + 1)
        if left == "{":
            return _shape(inner, numeric, depth + 1)
    if r"\pm" in text or r"\mp" in text:
        upper = text.replace(r"\pm", "+").replace(r"\mp", "-")
        lower = text.replace(r"\pm", "-").replace(r"\mp", "+")
        return _group(text, [upper, lower], "", "", numeric, depth)
    return _leaf(text, numeric)


def _group(text: str, items: list[str], left: str, right: str, numeric: bool, depth: int) -> _Form | None:
    if len(items) > MOST_ITEMS:
        return None
    forms = [_shape(item, numeric, depth + 1) for item in items]
    parts: list[_Form] = []
    for form in forms:
        if form is None:
            return None
        # a list within a list (1 \pm \sqrt{5}, -2) is one list
        parts.extend(form.parts if not left and form.parts and not form.left else [form])
    if len(parts) > MOST_ITEMS:
        return None
    return _Form(text=text, left=left, right=right, parts=tuple(parts))


@dataclass(frozen=True)
class _Cuts:
    commas: list[tuple[int, int]]
    union: list[tuple[int, int]]
    wrapped: tuple[str, str, str] | None
    """Opening bracket, closing bracket and content, if one pair of brackets holds the whole text."""


_SEPARATOR = re.compile(
    r"(?:[,;]\s*)?(?:\\(?:text|mathrm|mbox)\s*\{\s*(?:and|or)\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z]))|[,;]"
)
_UNION = re.compile(r"\\cup(?![A-Za-z])")
_TOKEN = re.compile(r"\\[{}]|\\[A-Za-z]+|[()\[\]{}]|.", re.DOTALL)


def _top_level(text: str) -> _Cuts | None:
    """Where a text can be cut outside all brackets; None if the brackets do not match."""
    commas: list[tuple[int, int]] = []
    union: list[tuple[int, int]] = []
    opened: list[tuple[str, int]] = []
    wrapped: tuple[str, str, str] | None = None
    at, environment = 0, 0
    while at < len(text):
        if not opened and not environment:
            if cut := _SEPARATOR.match(text, at):
                commas.append(cut.span())
                at = cut.end()
                continue
            if cut := _UNION.match(text, at):
                union.append(cut.span())
                at = cut.end()
                continue
        match = _TOKEN.match(text, at)
        assert match is not None
        token = match[0]
        if token == r"\begin":
            environment += 1
        elif token == r"\end":
            environment -= 1
        elif token in ("(", "[", "{", r"\{"):
            opened.append((token, at))
            if len(opened) > DEEPEST:
                return None
        elif token in (")", "]", "}", r"\}"):
            if not opened or (opened[-1][0] in "([") != (token in ")]") or (opened[-1][0] == r"\{") != (token == r"\}"):
                return None
            left, start = opened.pop()
            if start == 0 and match.end() == len(text):
                wrapped = (left, token, text[len(left) : at])
        at = match.end()
    return None if opened or environment else _Cuts(commas, union, wrapped)


def _cut(text: str, cuts: list[tuple[int, int]]) -> list[str]:
    ends = [0, *(stop for _, stop in cuts)]
    starts = [*(start for start, _ in cuts), len(text)]
    items = [text[a:b].strip() for a, b in zip(ends, starts, strict=True)]
    return items if items[-1] else items[:-1]


_UNITS = {
    "mm": "mm millimeter millimetre",
    "cm": "cm centimeter centimetre cms",
    "m": "m meter metre",
    "km": "km kilometer kilometre kms",
    "inch": "in inch inches",
    "foot": "ft foot feet",
    "yard": "yd yard",
    "mile": "mi mile",
    "mg": "mg milligram",
    "gram": "g gram",
    "kg": "kg kilogram kgs kilo",
    "pound": "lb lbs pound",
    "ounce": "oz ounce",
    "ton": "ton tonne",
    "second": "s sec second",
    "minute": "min mins minute",
    "hour": "h hr hrs hour",
    "day": "day",
    "week": "week",
    "month": "month",
    "year": "yr year",
    "ml": "ml milliliter millilitre",
    "liter": "l liter litre",
    "gallon": "gal gallon",
    "mph": "mph",
    "kmh": "kmh kph",
    "degree": "degree deg",
    "radian": "radian rad",
    "dollar": "dollar usd",
    "cent": "cent cents",
    "euro": "euro eur €",
    "sterling": "£ gbp",
    "percent": "percent percentage pct %",
}
_UNIT_OF = {
    spelling + plural: unit
    for unit, spellings in _UNITS.items()
    for spelling in spellings.split()
    for plural in ("", "s" if len(spelling) > 2 or spelling == "yd" else "")
} | {_DOLLAR: "dollar", "€": "euro", "£": "sterling"}
_ONE_LETTER = frozenset(spelling for spelling in _UNIT_OF if len(spelling) == 1)
_UNIT_ALONE = frozenset({"in", "m", "s", "h", "g", "l", "min"})
"""Spellings that are units only if nothing follows: "5 in total" is no length."""

_GOES_ON = re.compile(r"[A-Za-z]{3}|[a-z] [a-z]{2}|per |(?:as|at|by|if|in|is|of|on|so|to)(?: |$)")
"""How words begin that go on after an amount, so that "18 at the market" is 18, and no product of letters."""
_DEGREES = re.compile(r"\s*(?:\^\s*\{?\s*\\circ\s*\}?|\\degree)(?:\s*(?:\\text\s*\{)?\s*([CF])\}?)?$")
_PERCENT = re.compile(r"\s*(?:\\?%|\\text\s*\{\s*\\?%\s*\})$")
_MONEY = re.compile(rf"^(-?)\s*([{_DOLLAR}€£])\s*")
_LATEX_UNIT = re.compile(
    r"\s*\\(?:text|textbf|textit|textrm|mathrm|mathit|mbox|rm|operatorname)(?![A-Za-z])\s*\{?([^{}\\]*)\}?\s*"
    r"(\^\s*\{?\s*\d\s*\}?)?\s*$"
)
_SCALE_OF = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SCALE = re.compile(
    rf"(?<=[\d}}])\s*-?\s*(\\(?:text|textrm|mathrm|mbox)\s*\{{\s*)?({'|'.join(_SCALE_OF)})s?(?![A-Za-z])\s*(\}})?",
    re.IGNORECASE,
)
_BASE = re.compile(r"(-?\d[0-9A-F]*)_(?:\{\s*(?:\\text\{)?(\d{1,2})\}?\s*\}|(\d{1,2}))")


def _leaf(text: str, numeric: bool) -> _Form | None:
    words = _words(text)
    if words is not None:
        return _Form(text=text, words=words)
    bare, scale = _split_scale(text)
    core, unit = _split_unit(bare, numeric)
    base = _BASE.fullmatch(core)
    if base:
        core, unit = base[1], f"base {base[2] or base[3]}"
    tree = _parse(_last_of_chain(core))
    return None if tree is None else _Form(text=text, tree=tree, unit=unit, scale=scale)


def _words(text: str) -> str | None:
    """The text in normal form if it is words (``Evelyn``, ``\\text{(C)}``), else None."""
    inside = re.fullmatch(r"\\(?:text|textbf|textit|textrm|mathrm|mbox)\s*\{([^{}]*)\}", text.strip())
    plain = inside[1] if inside else text
    if re.fullmatch(r"\\(?:emptyset|varnothing)", plain.strip()):
        return "emptyset"
    if re.search(r"[\d\\^=<>+*_]", plain):
        return None
    if not inside:
        function = re.search(rf"(?<![A-Za-z])(?:{FUNCTION}|sqrt)(?![a-z])|[/|]", plain)
        if function or not re.search(r"[A-Za-z]{3}", plain):
            return None
        if plain.strip().lower() in ("infinity", "inf"):
            return None
    return _plain_words(plain) or None


def _plain_words(text: str) -> str:
    return " ".join(re.findall(r"\w+", re.sub(r"\\[A-Za-z]+", " ", text).casefold()))


def _split_scale(text: str) -> tuple[str, int]:
    """The text without the one word like "million" that follows a number, and what that multiplies by; else 1."""
    found = list(_SCALE.finditer(text))
    if len(found) != 1:
        return text, 1
    (word,) = found
    rest = "" if word[1] and word[3] else f"{word[1] or ''}{word[3] or ''}"  # \text{ million}, \text{ million people}
    return f"{text[: word.start()]} {rest}{text[word.end() :]}".strip(), _SCALE_OF[word[2].lower()]


def _split_unit(text: str, numeric: bool) -> tuple[str, str]:
    """Value and canonical unit; the unit is empty if there is none or it is not known."""
    if money := _MONEY.match(text):
        rest = money[1] + text[money.end() :]
        return _split_unit(rest, True)[0], _UNIT_OF[money[2]]
    if text.endswith((_DOLLAR, "€", "£")):
        return text[:-1], _UNIT_OF[text[-1]]
    if percent := _PERCENT.search(text):
        return text[: percent.start()], "percent"
    if degrees := _DEGREES.search(text):
        return text[: degrees.start()], "degree" + (degrees[1] or "")
    if (latex := _LATEX_UNIT.search(text)) and latex.start() > 0:
        unit = _canonical_unit(latex[1] + (latex[2] or ""))
        return text[: latex.start()], unit
    if plain := TRAILING_WORDS.fullmatch(text):
        core, words = plain["core"], plain["words"]
        digits_only = bool(ONLY_NUMBER.fullmatch(core))
        glued = not plain["gap"]
        known = _canonical_unit(words)
        if not digits_only:
            return text, ""
        if not re.search(r"[A-Za-z]{2}", words):  # 5 m, 5x: a variable, unless it must be a unit
            return (core, known) if known and (numeric or not glued) else (text, "")
        if known or (not glued and _GOES_ON.match(words) and not MATH_WORD.match(words)):
            return core, known
    return text, ""


def _canonical_unit(phrase: str) -> str:
    """Canonical spelling of the longest known unit at the head of a phrase; empty if there is none."""
    phrase = re.sub(r"[{}.\s()-]+", " ", phrase.replace("**", "^")).strip()
    phrase = re.sub(r"\s*\^\s*", "^", phrase)
    tokens = re.findall(r"[A-Za-z]+(?:\^\d)?|\^\d|/|\S", phrase)
    parts: list[str] = []
    power, joint = "", ""
    for at, token in enumerate(tokens):
        word, _, exponent = token.partition("^")
        word = word if word in _UNIT_OF else word.lower()
        if word in ("square", "sq", "squared", "cubic", "cube", "cubed"):
            exponent = "2" if word[0] == "s" else "3"
            if word.endswith("d") and parts:
                parts[-1] += "^" + exponent
            else:
                power = exponent
            continue
        if word in ("per", "/"):
            joint = "/" if parts else ""
            continue
        if word == "" and exponent and parts:
            parts[-1] += "^" + exponent
            continue
        unit = _UNIT_OF.get(word)
        following = tokens[at + 1] if at + 1 < len(tokens) else "^"
        if unit is None or (word in _UNIT_ALONE and following not in ("/", "per", "squared") and following[0] != "^"):
            break
        exponent, power = exponent or power, ""
        parts.append(joint + unit + (f"^{exponent}" if exponent and exponent != "1" else ""))
        joint = " "
    return {"mile/hour": "mph", "km/hour": "kmh"}.get("".join(parts), "".join(parts))


def _last_of_chain(text: str) -> str:
    r"""``15`` of ``3 \cdot 5 = 15``, and the exact side of ``\sqrt{2} \approx 1.41``; equations with variables stay."""
    exact, _, rounded = text.partition(r"\approx")
    if rounded:
        text = exact if re.search(r"\d|\\pi", exact) else rounded
    sides = re.split(r"(?<![<>!\\])=", text)
    if len(sides) > 1 and (len(sides) > 2 or not re.search(r"(?<![\\A-Za-z])[A-Za-z](?![A-Za-z])", text)):
        return sides[-1]
    return text


# --- 2. Scalars: parsing and comparing --------------------------------------------------------------------------------

_NORMAL = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False
)
_ALLOWED = frozenset(
    f"""frac dfrac tfrac cfrac sqrt cdot times div pi infty pm mp le leq ge geq lt gt
    binom dbinom tbinom circ lfloor rfloor lceil rceil lvert rvert vert mid begin end text mathrm mathbf mbox in
    alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau phi varphi chi psi omega
    Gamma Delta Theta Lambda Sigma Phi Psi Omega imath {FUNCTION.replace("|", " ")}""".split()
)
_FUNCTIONS = frozenset(FUNCTION.split("|"))
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_ENVIRONMENT = re.compile(r"\\begin\s*\{([^{}]*)\}")


_I = sympy.Symbol("i", real=True)
"""What the parser makes of the imaginary unit."""


def _parse(text: str) -> sympy.Basic | sympy.MatrixBase | None:
    """A scalar, matrix or relation as a SymPy tree; None if it cannot be read, or is too large to compute with."""
    latex = _as_latex(text)
    if latex is None:
        return None
    try:
        return _tree(latex)
    except MemoryError:
        raise
    except Exception:  # the parser raises bare Exception, and SymPy many kinds, on what means nothing (i < 1, e^matrix)
        return None


class _Parser(_Latex2Sympy):
    """math-verify's parser, with numbers made directly: upstream hands digits to `sympify`, which evaluates them."""

    def convert_postfix_list(self, terms: list[Any], at: int = 0) -> Any:
        """The product of factors side by side, or a mixed number, as 2\\frac{1}{2}: upstream takes any two numbers for
        one, and adds them."""
        *before, tree = [self.convert_postfix(term) for term in terms[at:]]
        for left in reversed(before):
            if not isinstance(left, (sympy.Expr, sympy.MatrixBase)):
                raise ValueError(f"{left} is no factor")
            if isinstance(left, sympy.MatrixBase) or isinstance(tree, sympy.MatrixBase):
                tree = self.mat_mul_flat(left, tree)
            elif isinstance(left, sympy.Integer) and isinstance(tree, sympy.Rational) and 0 < tree < 1:
                tree = left - tree if left < 0 else left + tree
            else:
                tree = self.mul_flat(left, tree)
        return tree

    def parse_number(self, text: str) -> sympy.Number:
        digits = text.replace(",", "")
        return sympy.Integer(int(digits)) if digits.isdigit() else sympy.Float(digits)


@lru_cache(maxsize=64)
def _tree(latex: str) -> sympy.Basic | sympy.MatrixBase | None:
    whole = latex.isascii() and latex.isdigit()  # as most answers are; the parser takes ten times as long
    tree = sympy.Integer(int(latex)) if whole else _Parser(is_real=True).parse(latex)
    if not isinstance(tree, (sympy.Basic, sympy.MatrixBase)) or _nested(tree) > DEEPEST or _bits(tree) > MOST_BITS:
        return None
    tree = tree.xreplace({_I: sympy.I})
    if tree.has(sympy.nan, sympy.zoo):
        return None
    if isinstance(tree, sympy.Expr):
        _at_a_point(tree, tree.free_symbols)  # raises if it cannot be computed
    return tree


def _nested(tree: sympy.Basic | sympy.MatrixBase) -> int:
    """Sums and products within each other: SymPy's `evalf` takes twice as long for each."""
    parts = tree.flat() if isinstance(tree, sympy.MatrixBase) else tree.args
    return max(map(_nested, parts), default=0) + isinstance(tree, (sympy.Add, sympy.Mul))


def _at_a_point(tree: sympy.Expr, symbols: set[sympy.Basic]) -> sympy.Expr:
    """The value to 20 digits, where the variables have some fixed values."""
    point = {symbol: sympy.Float(0.7 + 0.37 * i, 30) for i, symbol in enumerate(sorted(symbols, key=str))}
    return sympy.N(tree.xreplace(point), 20)


def _as_latex(text: str) -> str | None:
    """The text in the dialect that the parser understands; None if it has commands that are not allowed."""
    text = re.sub(r"(?<![A-Za-z\\])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(rf"(?<![A-Za-z\\])({FUNCTION})(?![A-Za-z])", r"\\\1 ", text)
    text = re.sub(r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi ", text)
    text = re.sub(r"(?<![A-Za-z\\])(?:infinity|inf|oo)(?![A-Za-z])", r"\\infty ", text)
    text = re.sub(r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([-+]?\d+)(?!\w)", r"\1\\cdot 10^{\2}", text)
    text = re.sub(r"\\sqrt\s*(\d)(?!\d)", r"\\sqrt{\1}", text.replace("*", r"\cdot "))
    text = re.sub(r"(?<![\d.])(\d+)\s+(\d+)\s*/\s*(\d+)(?!\d)", r"\1\\frac{\2}{\3}", text)  # 2 1/2
    text = re.sub(r"(?<=[\d)])\s*(?=\()", r"\\cdot ", text)  # the parser takes 2(3) for 2 + 3
    text = re.sub(r"(?<!\d)(\d{1,3})((?: \d{3})+)(?!\d)", lambda m: m[0].replace(" ", ""), text)
    text = re.sub(r"(\\log\s*_)\s*(\d)\s+(?=\d)", r"\1{\2} ", text)
    if re.search(r"[\d.]\s+[\d.]", text):  # ... and 2 3 as well
        return None
    if not {command for command in _COMMAND.findall(text)} <= _ALLOWED:
        return None
    if any(not name.endswith("matrix") for name in _ENVIRONMENT.findall(text)):
        return None
    if any(not re.match(r"\{\d{1,4}\}\{\d{1,4}\}", tail) for tail in re.split(r"\\[dt]?binom\s*", text)[1:]):
        return None  # the parser computes it at once
    if re.search(r"\d{1000}", text):
        return None
    if text.count("|") > MOST_BARS or sum(name in _FUNCTIONS for name in _COMMAND.findall(text)) > MOST_FUNCTIONS:
        return None  # the grammar takes seconds for them
    return normalize_latex(text, _NORMAL)


def _bits(tree: sympy.Basic | sympy.MatrixBase) -> float:
    """An upper bound for the binary digits of any number that computing the tree makes; infinite if hopeless."""
    if isinstance(tree, sympy.MatrixBase):
        return max((_bits(entry) for entry in tree.flat()), default=0)
    if isinstance(tree, sympy.Rational):
        return tree.p.bit_length() + tree.q.bit_length()
    parts = [_bits(part) for part in tree.args]
    if isinstance(tree, sympy.Pow):
        base, exponent = parts
        if not tree.exp.free_symbols and exponent > 20:
            return float("inf")
        return max(base, 2) * 2 ** min(exponent, 20) if tree.exp.is_Integer or not tree.exp.is_Atom else max(parts) + 2
    if isinstance(tree, sympy.factorial):
        return float("inf") if parts[0] > 13 else 2 ** parts[0] * 13
    return 2 + sum(parts)


def _same(gold: _Form, answer: _Form) -> bool:
    """Whether two answers are the same; `gold` is the reference."""
    if gold.words is not None:
        return _plain_words(answer.text) == gold.words or answer.words == gold.words
    if answer.words is not None:
        return isinstance(gold.tree, sympy.Symbol) and _plain_words(gold.text) == answer.words
    if gold.name and answer.name and gold.name.lower() != answer.name.lower():
        return _same_relation(gold, answer)
    if gold.parts and answer.parts:
        if (gold.left, gold.right) != (answer.left, answer.right) and not (
            (gold.left == "∪" and _alternatives(answer)) or (answer.left == "∪" and _alternatives(gold))
        ):
            return False
        if gold.left and gold.left != "∪":
            pairs = zip(gold.parts, answer.parts, strict=False)
            return len(gold.parts) == len(answer.parts) and all(_same(g, a) for g, a in pairs)
        return all(any(_same(g, a) for a in answer.parts) for g in gold.parts) and all(
            any(_same(g, a) for g in gold.parts) for a in answer.parts
        )
    if gold.parts or answer.parts:
        return _same_relation(gold, answer)
    return _same_scalar(gold, answer) or (bool(gold.name) != bool(answer.name) and _same_relation(gold, answer))


def _alternatives(form: _Form) -> bool:
    """Whether it is ``x < 2 or x > 3``."""
    trees = [part.tree for part in form.parts if part.tree is not None and _is_relation(part.tree)]
    if form.left or len(trees) < len(form.parts) or len(set().union(*(tree.free_symbols for tree in trees))) != 1:
        return False
    return bool(_OR.search(form.text)) and not _AND.search(_OR.sub("", form.text))


_OR = re.compile(r"(?:[,;]\s*)?(?:\\(?:text|mathrm|mbox)\s*\{\s*)?(?<![A-Za-z])or(?![A-Za-z])")
_AND = re.compile(r"[,;]|(?<![A-Za-z])and(?![A-Za-z])")
_RELATION = re.compile(r"[<>=]|\\(?:le|leq|ge|geq|lt|gt)(?![A-Za-z])")


def _same_relation(gold: _Form, answer: _Form) -> bool:
    """Equations written differently, and inequalities against intervals: math-verify solves them."""
    if not (_RELATION.search(gold.text) or _RELATION.search(answer.text)):
        return False
    if len(gold.text) + len(answer.text) > 200:
        return False
    left, right = _parse(gold.text), _parse(answer.text)
    return left is not None and right is not None and _equal(left, right)


def _is_relation(tree: sympy.Basic | sympy.MatrixBase) -> bool:
    return isinstance(tree, (sympy.core.relational.Relational, sympy.And))


def _same_scalar(gold: _Form, answer: _Form) -> bool:
    assert gold.tree is not None and answer.tree is not None
    if _is_relation(answer.tree) and not _is_relation(gold.tree):
        return False  # math-verify would take the right side: 3 for 2x + y = 3
    if gold.unit == "percent" or answer.unit == "percent":
        return _same_percent(gold, answer)
    if gold.unit and answer.unit and gold.unit != answer.unit:
        return False
    if gold.scale != answer.scale and isinstance(gold.tree, sympy.Expr) and isinstance(answer.tree, sympy.Expr):
        either = 1 in (gold.scale, answer.scale) and _equal(gold.tree, answer.tree)
        return either or _equal(gold.tree * gold.scale, answer.tree * answer.scale)
    return _equal(gold.tree, answer.tree)


def _same_percent(gold: _Form, answer: _Form) -> bool:
    if not isinstance(gold.tree, sympy.Expr) or not isinstance(answer.tree, sympy.Expr):
        return False
    if gold.unit == answer.unit or (gold.unit == "percent" and not answer.unit and _equal(gold.tree, answer.tree)):
        return _equal(gold.tree, answer.tree)
    if gold.unit == "percent":
        return not answer.unit and _equal(gold.tree / 100, answer.tree)
    if gold.unit:
        return False
    size = abs(sympy.N(gold.tree))
    large = bool(size.is_comparable and size >= 1)
    return _equal(gold.tree, answer.tree / 100) or (large and _equal(gold.tree, answer.tree))


_FOLDED = re.compile(r"[\d)}]\s*/\s*[\d({]|\\div(?![A-Za-z])|\\[dt]?binom|\\begin\s*\{vmatrix")
"""What the parser computes at once, so that the tree does not show it."""
_MIXED = re.compile(r"\d\s*\\[dtc]?frac\s*(?:\{\s*(\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))|\d\s+(\d+)\s*/\s*(\d+)")
_MIXED_HEAD = re.compile(r"\d\s*\\[dtc]?frac|\d\s+\d+\s*/")
_LONE_I = re.compile(r"(?<![\\A-Za-z])i(?![A-Za-z])|\\imath")


def _undone(form: _Form) -> bool:
    """Whether a computation is left to be done somewhere in an answer."""
    if form.parts:
        return any(_undone(part) for part in form.parts)
    if isinstance(form.tree, sympy.Expr) and _hides(form.tree, form.text):
        return True
    if isinstance(form.tree, sympy.Integer):
        return bool(_FOLDED.search(form.text))
    entries = form.tree.flat() if isinstance(form.tree, sympy.MatrixBase) else [form.tree]
    return any(isinstance(entry, sympy.Expr) and _computes(entry) for entry in entries)


def _hides(tree: sympy.Expr, text: str) -> bool:
    """Whether a sum or product was made of what is none by its looks: ``19\\frac{31}{1}`` and ``19 - 31i^2`` are 50."""
    proper = 0
    for found in _MIXED.finditer(text):
        over, under = (number for number in found.groups() if number)
        if int(over) >= int(under):
            return True
        proper += 1
    if tree.is_Number and len(_MIXED_HEAD.findall(text)) > proper:
        return True
    return not tree.has(sympy.I) and bool(_LONE_I.search(text))


def _computes(tree: sympy.Expr) -> bool:
    """Whether a part of it is a computation with numbers that comes to a number."""
    if tree.is_Atom or _power(tree):
        return False
    if isinstance(tree, sympy.Mul) and len(tree.args) == 2 and tree.args[0].is_Number and _power(tree.args[1]):
        return False  # 1.5 x 10^3, 3/4
    if isinstance(tree, (sympy.Add, sympy.Mul)) and sum(part.is_Number and abs(part) != 1 for part in tree.args) > 1:
        return True
    if not tree.free_symbols and tree.doit().is_Number:
        return True
    return any(_computes(part) for part in tree.args if isinstance(part, sympy.Expr))


def _power(tree: sympy.Basic) -> bool:
    """Whether it is a power of ten, or what divides in a fraction: a number as it is written."""
    if not isinstance(tree, sympy.Pow) or not isinstance(tree.base, sympy.Integer):
        return False
    return tree.exp == -1 or (tree.base == 10 and isinstance(tree.exp, sympy.Integer))


def _equal(gold: sympy.Basic | sympy.MatrixBase, answer: sympy.Basic | sympy.MatrixBase) -> bool:
    """math-verify's verdict, where two numbers (or two expressions at one point) are not far from each other anyway.

    The look at the numbers first saves SymPy's `simplify`, which can take minutes, on nearly all wrong answers; and
    math-verify compares decimals by rounding to 6 places, which makes equal whatever is near 0."""
    if isinstance(gold, sympy.Expr) and isinstance(answer, sympy.Expr):
        symbols = gold.free_symbols | answer.free_symbols
        expected, got = _at_a_point(gold, symbols), _at_a_point(answer, symbols)
        size, gap = abs(expected), abs(expected - got)
        named = isinstance(gold, sympy.Symbol) or isinstance(answer, sympy.Symbol)
        if not named and size.is_finite and gap.is_finite and size.is_comparable and gap.is_comparable:
            if gap > (1e-4 * size if size < 1e-2 else 1e-6 * (1 + size)):
                return False
    return bool(
        verify(gold, answer, strict=True, allow_set_relation_comp=True, timeout_seconds=None, raise_on_error=True)
    )
