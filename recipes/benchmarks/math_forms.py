# SPDX-License-Identifier: Apache-2.0
r"""Equivalent forms and near misses of mathematical reference answers, for `rules.py`.

`forms(reference)` gives texts that a right and a wrong response could end in. What is equal and what is not is decided
by exact arithmetic on the parsed reference (rational coefficient, one square root, a power of pi) or by a hand-written
table for what this does not describe; nothing here asks math-verify, SymPy or the rule.

Covers every reference of `recipes/data/math500.jsonl.gz`; `forms` raises KeyError on one that it does not know, and
each reference gets at least six forms of either sort. Not covered: decimals of irrational numbers (never exactly
equal)."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction

AT_LEAST = 6
"""Forms of either sort that each reference gets."""


@dataclass(frozen=True, kw_only=True)
class Forms:
    """What a response may end in."""

    right: tuple[str, ...]
    """Whole responses that state an equal answer."""
    wrong: tuple[str, ...]
    """Whole responses that state another answer, near by."""


@dataclass(frozen=True)
class _Term:
    """The exact number c * sqrt(n) * pi^k."""

    c: Fraction
    n: int = 1
    k: int = 0

    def latex(self, frac: str = r"\frac") -> str:
        top, bottom = abs(self.c.numerator), self.c.denominator
        symbols = (rf"\sqrt{{{self.n}}}" if self.n > 1 else "") + (r"\pi" if self.k > 0 else "")
        upper = (str(top) if top != 1 or not symbols else "") + symbols
        lower = ("" if bottom == 1 and self.k < 0 else str(bottom)) + (r"\pi" if self.k < 0 else "")
        sign = "-" if self.c < 0 else ""
        return sign + (upper if lower == "1" else f"{frac}{{{upper}}}{{{lower}}}")

    def right(self) -> list[str]:
        """Other spellings of the same number, none of them `latex()` itself."""
        c, sign = abs(self.c), "-" if self.c < 0 else ""
        symbols = (rf"\sqrt{{{self.n}}}" if self.n > 1 else "") + (r"\pi" if self.k > 0 else "")
        out = []
        if self.n == 1 and self.k == 0:
            if c.denominator == 1:
                n = c.numerator
                out += [
                    f"{sign}{n}.0",
                    rf"\frac{{{sign}{2 * n}}}{{2}}",
                    f"{sign}{n}.00",
                    rf"{sign}\dfrac{{{3 * n}}}{{3}}",
                ]
                if n >= 1000:
                    out += [f"{sign}{n:,}", f"{sign}{n:,}".replace(",", "{,}"), f"{sign}{n:,}".replace(",", r",\!")]
            else:
                p, q = c.numerator, c.denominator
                out += [rf"{sign}\dfrac{{{p}}}{{{q}}}", rf"{sign}\tfrac{{{p}}}{{{q}}}", f"{sign}{p}/{q}"]
                out += [rf"{sign}\frac{{{2 * p}}}{{{2 * q}}}", rf"{sign}\frac {{{p}}} {{{q}}}"]
                if sign:
                    out += [rf"\frac{{-{p}}}{{{q}}}", rf"\frac{{{p}}}{{-{q}}}"]
                if p < 10 and q < 10:
                    out.append(rf"{sign}\frac{p}{q}")
                if p > q:
                    out.append(rf"{sign}{p // q}\frac{{{p % q}}}{{{q}}}")
                if decimal := _decimal(c):
                    out += [sign + decimal, sign + decimal + "0", sign + decimal.removeprefix("0")]
            return out
        out += [self.latex(r"\dfrac"), self.latex(r"\tfrac")] if self.c.denominator > 1 or self.k < 0 else []
        factor = "" if c.numerator == 1 else str(c.numerator)
        lower = str(c.denominator) if c.denominator > 1 else ""
        if self.k < 0:
            out += [
                rf"{sign}{factor or 1}/\pi",
                rf"{sign}{factor or 1} \cdot \frac{{1}}{{\pi}}",
                rf"{sign}{factor or 1}\pi^{{-1}}",
            ]
        else:
            out += [rf"{sign}{factor}{symbols}/{lower}" if lower else rf"{sign}{factor or 1} \cdot {symbols}"]
            out += [
                rf"{sign}\frac{{{factor or 1}}}{{{lower}}}{symbols}"
                if lower
                else rf"{sign}{symbols} \cdot {factor or 1}"
            ]
            out += [rf"{sign}\frac{{{2 * c.numerator}{symbols}}}{{{2 * c.denominator}}}"]
        if self.n > 1 and self.k == 0:
            inside = c * c * self.n
            body = str(inside) if inside.denominator == 1 else rf"\frac{{{inside.numerator}}}{{{inside.denominator}}}"
            out += [rf"{sign}\sqrt{{{body}}}", f"{sign}{factor}sqrt({self.n})" + (f"/{lower}" if lower else "")]
            out.append(rf"{sign}\frac{{{c.numerator * self.n}}}{{{lower}{symbols}}}")
        if self.k > 0:
            out.append(f"{sign}{factor}π" + (f"/{lower}" if lower else ""))
        return [form for form in out if form != self.latex()]

    def wrong(self) -> list[_Term]:
        """Other numbers near by, all different from this one."""
        c = self.c
        near = [replace(self, c=new) for new in (c + 1, c - 1, -c, 2 * c, 10 * c, c + 2, 3 * c)]
        if c.denominator > 1:
            near += [
                replace(self, c=Fraction(c.numerator + 1, c.denominator)),
                replace(self, c=Fraction(c.numerator, c.denominator + 1)),
            ]
        if c and self.n == 1 and self.k == 0:
            near.append(replace(self, c=1 / c))
        if abs(c) >= 10 and c.denominator == 1:
            near.append(replace(self, c=Fraction(int(c / 10))))  # the last digit is missing
            digits = str(abs(c.numerator))
            near.append(replace(self, c=Fraction(int(digits[:-2] + digits[-1] + digits[-2]))))
        if c.denominator == 1 and self.n == 1:
            near.append(replace(self, c=c + Fraction(1, 2)))
            near.append(replace(self, c=c + Fraction(1, 10)))
        if self.n > 1:
            near += [replace(self, n=self.n + 1), replace(self, n=1)]
        if self.k:
            near += [replace(self, k=0), replace(self, k=-self.k)]
        return [term for term in dict.fromkeys(near) if term != self and (term.c or term.n == 1)]


def _decimal(value: Fraction) -> str | None:
    """The decimal digits if they end after at most 8 places."""
    for places in range(1, 9):
        scaled = value * 10**places
        if scaled.denominator == 1:
            digits = str(scaled.numerator).rjust(places + 1, "0")
            return f"{digits[:-places]}.{digits[-places:]}"
    return None


_TOP = r"(\d*)(?:\\sqrt\{(\d+)\})?(\\pi)?"
_PATTERNS = (
    re.compile(rf"(-?){_TOP}"),
    re.compile(rf"(-?)\\[dt]?frac\{{?{_TOP}\}}?\{{?(\d*)(\\pi)?\}}?"),
)


def _term(text: str) -> _Term | None:
    """The number that a reference or a part of it spells, if it is one."""
    text = re.sub(r"\\[!,;]|\s|\\\$", "", text)
    if re.fullmatch(r"-?\d{1,3}(,\d{3})+", text):
        text = text.replace(",", "")
    if re.fullmatch(r"-?\d*\.\d+|-?\d+/\d+", text):
        return _Term(Fraction(text))
    if mixed := re.fullmatch(r"(\d+)\\frac\{(\d+)\}\{(\d+)\}", text):
        return _Term(int(mixed[1]) + Fraction(int(mixed[2]), int(mixed[3])))
    if short := re.fullmatch(r"(-?)\\frac(\d)(\d)", text):
        return _Term(Fraction(int(short[1] + short[2]), int(short[3])))
    if plain := _PATTERNS[0].fullmatch(text):
        sign, factor, root, pi = plain.groups()
        if factor or root or pi:
            return _Term(Fraction(int(sign + (factor or "1"))), int(root or 1), 1 if pi else 0)
    if fraction := _PATTERNS[1].fullmatch(text):
        sign, factor, root, pi, lower, lower_pi = fraction.groups()
        if (factor or root or pi) and (lower or lower_pi):
            k = (1 if pi else 0) - (1 if lower_pi else 0)
            return _Term(Fraction(int(sign + (factor or "1")), int(lower or 1)), int(root or 1), k)
    return None


BY_HAND: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    r"\text{Evelyn}": (
        ("Evelyn", r"\textbf{Evelyn}", r"\mathrm{Evelyn}", "evelyn", "EVELYN", r"\text{ Evelyn }"),
        (r"\text{Carla}", "Debra", r"\text{Evelyne}", r"\text{not Evelyn}", r"\text{Evelyn and Carla}", "5", "Eve"),
    ),
    r"\text{Navin}": (
        ("Navin", r"\textbf{Navin}", r"\mathrm{Navin}", "navin", "NAVIN", r"\text{ Navin }"),
        (r"\text{Luis}", "Ian", r"\text{Nav}", r"\text{not Navin}", r"\text{Navin or Luis}", "2", "Navina"),
    ),
    **{
        rf"\text{{({x})}}": (
            (f"({x})", x, rf"\text{{{x}}}", rf"\textbf{{({x})}}", rf"\mathrm{{({x})}}", rf"\mathbf{{{x}}}"),
            (*(rf"\text{{({y})}}" for y in "ABCDE" if y != x), r"\text{(A) and (B)}", "7", r"\text{(F)}"),
        )
        for x in "ABCDE"
    },
    r"3 \pm 2 \sqrt{2}": (
        (
            r"3+2\sqrt{2}, 3-2\sqrt{2}",
            r"\{3-2\sqrt{2}, 3+2\sqrt{2}\}",
            r"3-2\sqrt{2} \text{ or } 3+2\sqrt{2}",
            r"x = 3 \pm 2\sqrt{2}",
            r"3\pm\sqrt{8}",
            r"3 ± 2√2",
            r"\frac{6\pm 4\sqrt{2}}{2}",
        ),
        (
            r"3+2\sqrt{2}",
            r"3-2\sqrt{2}",
            r"2 \pm 3\sqrt{2}",
            r"-3 \pm 2\sqrt{2}",
            r"3 \pm 2\sqrt{3}",
            r"3 \pm \sqrt{2}",
            r"3+2\sqrt{2}, 3-2\sqrt{2}, 3",
            r"(3+2\sqrt{2}, 3-2\sqrt{2})",
        ),
    ),
    r"\{1\pm\sqrt{5},-2\}": (
        (
            r"\{-2, 1+\sqrt{5}, 1-\sqrt{5}\}",
            r"1-\sqrt{5}, -2, 1+\sqrt{5}",
            r"-2, 1 \pm \sqrt{5}",
            r"x=-2, x=1+\sqrt5, x=1-\sqrt5",
            r"\left\{ 1 \pm \sqrt{5}, -2 \right\}",
            r"-2, 1-\sqrt{5} \text{ and } 1+\sqrt{5}",
        ),
        (
            r"1\pm\sqrt{5}",
            r"\{1+\sqrt{5},-2\}",
            r"\{1\pm\sqrt{5},2\}",
            r"\{-1\pm\sqrt{5},-2\}",
            r"\{1\pm\sqrt{6},-2\}",
            r"-2",
            r"\{1\pm\sqrt{5},-2, 0\}",
        ),
    ),
    "y = 2x + 3": (
        (
            "y=3+2x",
            "y=2x+3",
            "2x+3",
            "y - 2x = 3",
            r"y = 2 \cdot x + 3",
            "2x - y + 3 = 0",
            r"y=2\left(x+\frac{3}{2}\right)",
        ),
        ("y = 2x - 3", "y = -2x + 3", "y = 3x + 2", "y = 2x + 4", "y = 2x", "x = 2y + 3", "2x + 4", "y=3"),
    ),
    "x=5": (
        ("5", "x = 5", "5 = x", r"x = \frac{10}{2}", "x=5.0", r"x=\,5", "$x$ = 5"),
        ("x=-5", "x=6", "x=4", "y=5", "x=50", r"x = \frac{1}{5}", "x=5, x=6", "5x"),
    ),
    "(a+5)(b+2)": (
        (
            "(b+2)(a+5)",
            "(5+a)(2+b)",
            "ab+2a+5b+10",
            r"(a+5)\cdot(b+2)",
            r"\left(a+5\right)\left(b+2\right)",
            "(a + 5)(b + 2)",
        ),
        ("(a+2)(b+5)", "(a-5)(b-2)", "(a+5)(b-2)", "(a+5)(b+3)", "ab+2a+5b", "(a+5)+(b+2)", "(a+5)(a+2)"),
    ),
    "-13x+3": (
        ("3-13x", "-13x + 3", r"-13\cdot x+3", "3 - 13 x", "-(13x-3)", r"-13\left(x-\frac{3}{13}\right)"),
        ("13x+3", "-13x-3", "-13x", "-12x+3", "-13x+4", "13x-3", "-13y+3", "3x-13"),
    ),
    r"\frac{11+9a}{20}": (
        (
            r"\frac{9a+11}{20}",
            r"\dfrac{11+9a}{20}",
            "(11+9a)/20",
            r"\frac{11}{20}+\frac{9a}{20}",
            r"\frac{9}{20}a+\frac{11}{20}",
            "0.55+0.45a",
            r"\frac{22+18a}{40}",
        ),
        (
            r"\frac{11-9a}{20}",
            r"\frac{9+11a}{20}",
            r"\frac{11+9a}{10}",
            r"\frac{20}{11+9a}",
            r"\frac{11+9b}{20}",
            r"\frac{11+8a}{20}",
            "11+9a",
        ),
    ),
    "5r^5": (
        ("5 r^5", "5r^{5}", r"5 \cdot r^5", "r^5*5", r"\frac{10r^5}{2}", "5r^2 r^3"),
        ("5r^4", "-5r^5", "r^5", "5r^6", "4r^5", "25r^5", "5x^5", "5^5r"),
    ),
    "3R^2": (
        ("3 R^2", "3R^{2}", r"3\cdot R^2", "R^2*3", r"\frac{6R^2}{2}", "3RR"),
        ("3R", "-3R^2", "R^2", "3R^3", "9R^2", "2R^2", r"3\pi R^2", "3x^2"),
    ),
    "x^8 + x^7 + x^6 + x^5 + x^4 + x^3 + x^2 + x + 1": (
        (
            "1+x+x^2+x^3+x^4+x^5+x^6+x^7+x^8",
            "x^8+x^7+x^6+x^5+x^4+x^3+x^2+x+1",
            "x^{8}+x^{7}+x^{6}+x^{5}+x^{4}+x^{3}+x^{2}+x+1",
            "(x^2+x+1)(x^6+x^3+1)",
            "x^8 + x^7 + x^6 + (x^5 + x^4 + x^3 + x^2 + x + 1)",
            "x(x^7+x^6+x^5+x^4+x^3+x^2+x+1)+1",
        ),
        (
            "x^8 + x^7 + x^6 + x^5 + x^4 + x^3 + x^2 + x",
            "x^8 + x^7 + x^6 + x^5 + x^4 + x^3 + x^2 + x - 1",
            "x^9 - 1",
            "x^8 + x^7 + x^6 + x^5 + x^4 + x^2 + x + 1",
            "x^8 - x^7 + x^6 - x^5 + x^4 - x^3 + x^2 - x + 1",
            "x^8+1",
            "y^8+y^7+y^6+y^5+y^4+y^3+y^2+y+1",
        ),
    ),
    r"\cot x": (
        (r"\cot(x)", r"\cot{x}", r"\frac{1}{\tan x}", r"\frac{\cos x}{\sin x}", "cot(x)", r"\cot\left(x\right)"),
        (r"\tan x", r"-\cot x", r"\cos x", r"\cot 2x", r"\cot^2 x", r"\frac{\sin x}{\cos x}", r"\cot y", "1"),
    ),
    r"18+2\pi": (
        (r"2\pi+18", r"2(9+\pi)", r"18 + 2 \pi", r"2(\pi + 9)", "18+2π", r"\frac{36+4\pi}{2}"),
        (r"18-2\pi", r"18+\pi", r"20\pi", r"18+2", r"2+18\pi", r"19+2\pi", r"18", r"2\pi"),
    ),
}
"""Answers that are no single number: equal spellings, then near misses."""

_UNITS = {
    r"90^\circ": (),  # degrees are generated; see _degrees
    r"864 \mbox{ inches}^2": (
        (
            r"864 \text{ inches}^2",
            r"864\text{ in}^2",
            "864 square inches",
            r"864 \mathrm{~in}^2",
            "864",
            r"864.0 \text{ square inches}",
        ),
        (
            r"864 \text{ feet}^2",
            r"864 \text{ inches}",
            r"864 \text{ cm}^2",
            r"864 \text{ in}^3",
            r"865 \text{ inches}^2",
            "-864",
            r"86 \text{ in}^2",
        ),
    ),
}


def _bases(digits: str, base: str) -> tuple[list[str], list[str]]:
    other = str(int(base) + 1)
    right = [
        rf"{digits}_{{{base}}}",
        rf"{digits}_{base}",
        rf"{digits}_{{\text{{{base}}}}}",
        rf"{digits} _{base}",
        rf"0{digits}_{base}",
    ]
    right += [rf"x={digits}_{{{base}}}"]
    near = [str(int(digits) + 1), str(int(digits) - 1), digits[::-1], digits + "0", digits[:-1], digits[0] + digits]
    wrong = [f"{near_by}_{{{base}}}" for near_by in dict.fromkeys(near) if near_by != digits]
    return right, [*wrong, f"{digits}_{{{other}}}", f"-{digits}_{{{base}}}"]


def _degrees(term: _Term) -> tuple[list[str], list[str]]:
    n = term.latex()
    right = [
        rf"{n}^\circ",
        rf"{n}^{{\circ}}",
        f"{n}°" if "frac" not in n else rf"{n}\text{{ degrees}}",
        rf"{n}\text{{ degrees}}",
    ]
    right += [n, rf"{n}\,^\circ", rf"x = {n}^\circ", rf"{n} \mathrm{{~degrees}}"]
    wrong = [rf"{near.latex()}^\circ" for near in term.wrong()[:6]]
    return right, [*wrong, rf"{n}\text{{ radians}}", rf"{n} \text{{ cm}}", rf"{n}\%"]


def _split(reference: str) -> tuple[str, list[str], str] | None:
    """Opening bracket, elements and closing bracket of a tuple, interval or matrix."""
    if matrix := re.fullmatch(r"\\begin\{pmatrix\}(.*)\\end\{pmatrix\}", reference):
        rows = [[cell.strip() for cell in row.split("&")] for row in matrix[1].split(r"\\")]
        return f"matrix{len(rows[0])}", [cell for row in rows for cell in row], ""
    bracketed = re.fullmatch(r"(?:\\left)?\s*([(\[])(.*?)(?:\\right)?\s*([)\]])", reference)
    return (bracketed[1], bracketed[2].split(","), bracketed[3]) if bracketed and "," in bracketed[2] else None


def _join(left: str, items: list[str], right: str) -> str:
    if left.startswith("matrix"):
        width = int(left[6:])
        rows = [" & ".join(items[i : i + width]) for i in range(0, len(items), width)]
        return r"\begin{pmatrix} " + r" \\ ".join(rows) + r" \end{pmatrix}"
    return f"{left}{', '.join(items)}{right}"


def _composite(left: str, items: list[str], right: str) -> tuple[list[str], list[str]]:
    """Forms of a tuple, an interval or a matrix, from those of its elements."""
    infinite = [bool(re.fullmatch(r"\s*-?\\infty\s*", item)) for item in items]
    terms = [None if never else _term(item) for item, never in zip(items, infinite, strict=True)]
    if any(term is None and not never for term, never in zip(terms, infinite, strict=True)):
        raise KeyError(_join(left, items, right))
    plain = [item.strip() if term is None else term.latex() for item, term in zip(items, terms, strict=True)]
    same = _join(left, plain, right)
    good, bad = [same], []
    if left.startswith("matrix"):
        good += [same.replace("pmatrix", "bmatrix"), same.replace(" ", ""), same.replace(r" \\ ", "\\\\\n")]
        good += [r"\left(" + same.replace("pmatrix", "array").replace("{array}", "{matrix}") + r"\right)"]
    else:
        good += [
            same.replace(" ", ""),
            rf"\left{left} {', '.join(plain)} \right{right}",
            same.replace(",", " ,"),
            same.replace(",", r",\,"),
        ]
    for i, term in enumerate(terms):
        if term is None:
            bad.append(
                _join(
                    left, [*plain[:i], plain[i].removeprefix("-") if "-" in plain[i] else "100", *plain[i + 1 :]], right
                )
            )
            continue
        good += [_join(left, [*plain[:i], form, *plain[i + 1 :]], right) for form in term.right()[:4]]
        bad += [_join(left, [*plain[:i], near.latex(), *plain[i + 1 :]], right) for near in term.wrong()[:5]]
    if len(set(plain)) > 1:
        bad.append(_join(left, [*plain[1:], plain[0]], right))  # coordinates swapped
    if left.startswith("matrix"):
        bad.append(_join(left, plain[:-1], right) if left == "matrix1" else _join("matrix1", plain, right))
    else:
        bad.append(_join(left, [*plain, "0"], right))
        bad.append(rf"\{{{', '.join(plain)}\}}")  # a set, not a tuple or an interval
        if any(infinite) or left == "[" or right == "]":  # an interval: open and closed differ
            flip = {"(": "[", "[": "(", ")": "]", "]": ")"}
            bad += [] if infinite[0] else [_join(flip[left], plain, right)]
            bad += [] if infinite[1] else [_join(left, plain, flip[right])]
            good += [rf"x \in {same}"]
    return good, bad


_RIGHT_WRAPPERS = (
    r"\boxed{{{}}}",
    "We add 17 and 4, then divide by 3.\nTherefore the value is $\\boxed{{{}}}$.",
    "The final answer is ${}$.",
    "Step 1: 3 + 4 = 7.\nStep 2: 7 - 2 = 5.\n#### {}",
    "**Answer:** ${}$",
    "<think>Maybe \\boxed{{11}}? No.</think>\nThe answer is \\({}\\).",
    "\\[ \\boxed{{ {} }} \\]\n\nLet me know if you want the other 2 ways to see this!",
    "{}",
    "So the answer is ${}$, which is what we wanted to find in step 3.",
)
_WRONG_WRAPPERS = (*_RIGHT_WRAPPERS[:7], _RIGHT_WRAPPERS[8])


def forms(reference: str) -> Forms:
    """Right and wrong responses for one reference.

    Raises:
        KeyError: The reference is of a kind that is not described here.
    """
    right, wrong = _endings(reference)
    if not any(char in reference for char in "=,;") and _term(reference):
        right = [*right, f"x = {right[0]}"]
    responses = [wrapper.format(reference) for wrapper in _RIGHT_WRAPPERS]
    responses += [_RIGHT_WRAPPERS[i % len(_RIGHT_WRAPPERS)].format(form) for i, form in enumerate(right)]
    misses = [_WRONG_WRAPPERS[i % len(_WRONG_WRAPPERS)].format(form) for i, form in enumerate(wrong)]
    # the right answer beside a wrong one is wrong
    if r"\pm" not in reference:
        misses += [rf"\boxed{{{reference}}} or \boxed{{{wrong[0]}}}", rf"The answer is ${reference}$ or ${wrong[1]}$."]
    result = Forms(right=tuple(dict.fromkeys(responses)), wrong=tuple(dict.fromkeys(misses)))
    if min(len(set(right)), len(set(wrong))) < AT_LEAST:
        raise KeyError(f"{reference}: too few forms ({len(set(right))} right, {len(set(wrong))} wrong)")
    return result


def _endings(reference: str) -> tuple[list[str], list[str]]:
    """Spellings of the reference, and of other answers."""
    if reference in BY_HAND:
        right, wrong = BY_HAND[reference]
        return list(right), list(wrong)
    if _UNITS.get(reference):
        right, wrong = _UNITS[reference]
        return list(right), list(wrong)
    if based := re.fullmatch(r"(\d+)_(\d)", reference):
        return _bases(based[1], based[2])
    if degrees := re.fullmatch(r"(.*?)(?:\^\\circ|\\text\{ degrees\})", reference):
        term = _term(degrees[1])
        if term is not None:
            return _degrees(term)
    if gaussian := re.fullmatch(r"(-?\d+)\s*\+\s*(\d+)i", reference):
        return _gaussian(int(gaussian[1]), int(gaussian[2]))
    if parts := _split(reference):
        return _composite(*parts)
    term = _term(reference)
    if term is None:
        raise KeyError(reference)
    right = [term.latex(), *term.right()]
    wrong = [near.latex() for near in term.wrong()]
    if reference.startswith(r"\$"):
        n = right[0]
        right = [rf"\${form}" for form in right] + [n, rf"{n} \text{{ dollars}}", rf"\${n}.00"]
        wrong = [rf"\${form}" if form[0] != "-" else form for form in wrong] + [
            rf"{n} \text{{ cents}}",
            rf"{n} \text{{ euros}}",
        ]
    elif term.n == 1 and term.k == 0:
        right += [rf"{right[0]} \text{{ units}}", rf"{right[0]}\text{{ cm}}"]
        wrong.append(rf"{right[0]}, {wrong[0]}")
        if term.c:
            wrong.append(rf"{right[0]}x")
    return right, wrong


def _gaussian(a: int, b: int) -> tuple[list[str], list[str]]:
    right = [
        f"{a}+{b}i",
        f"{b}i{a:+d}" if a < 0 else f"{b}i + {a}",
        rf"{a}+{b}\cdot i",
        rf"{a} + {b} i",
        f"z = {a}+{b}i",
    ]
    right += [rf"\frac{{{2 * a}+{2 * b}i}}{{2}}", f"{a}+i{b}" if b < 10 else f"{a}+i*{b}"]
    wrong = [
        f"{a}-{b}i",
        f"{-a}+{b}i",
        f"{b}+{a}i" if a > 0 and a != b else f"{a + 2}+{b}i",
        f"{a + 1}+{b}i",
        f"{a}+{b + 1}i",
    ]
    return right, [*wrong, f"{a}+{b}", f"{b}i", f"{a}", f"{-a}-{b}i"]
