# SPDX-License-Identifier: Apache-2.0
"""Rule `instruction_constraints`: how many of the row's constraints the answer satisfies.

What: the 25 kinds of constraint of IFEval (Zhou et al. 2023, arXiv 2311.07911), written anew from the sentences that
the paper's appendix puts into the prompts ("Your response must contain exactly 3 bullet points ..."). A row lists them
as IFEval's data does: ``extra["instruction_id_list"]`` and ``extra["kwargs"]``, one mapping for each, where None, NaN,
numpy arrays and JSON text are all understood, as they come out of parquet files.

Value: the *share* of constraints that the answer satisfies, strictly (a dense signal for RL). Details: 0/1 for every
constraint by its id (a repeated id gets ``#2``, ...), ``all`` (1 if all are satisfied: IFEval's prompt-level strict
accuracy), ``loose`` and ``loose_all`` (the same share and conjunction under IFEval's loose reading: a constraint also
counts when it holds without the first line, the last line, both, or the asterisks).

The answer is the response without its thinking (`answer_of`). A degenerate answer satisfies nothing, not even what
forbids or limits only ("no commas"): one without any letter or digit, of a single character again and again, of the
same word at least three times and nothing else, or of the prompt's own words and no other: the sentence that asks for a
title in brackets shows one, and a policy does learn to hand it back (`recipes/multitask_cpu`).

Where IFEval's program and IFEval's sentence differ, the sentence counts; each such difference is listed, with real
cases, by ``recipes/benchmarks/rules.py``:

- a keyword is a whole word, not a piece of one ("war" is not in "toward"); a possessive ending is allowed;
- bullets are markdown bullets, so ``---`` and ``*emphasis*`` at the start of a line are none;
- a highlight is counted once, and is text, not the bullet in front of it; an empty placeholder ``[]`` is none;
- sections are counted by different numbers, so a mention of "Section 2" does not add one;
- JSON is an object or an array, in standard JSON; a quoted sentence is none;
- one of the three fixed answers, not several; after a repeated prompt or a P.S. something has to follow;
- the first word may be in bold, and empty paragraphs do not shift the numbering;
- typographic double quotation marks are quotation marks; commas of other scripts are commas;
- "the ENTIRE response" is in a language only if no longer line or paragraph is in another one.

Beyond IFEval's ``less than`` and ``at least``, the relations ``more than``, ``at most`` and ``exactly`` are understood.

Guarantees: deterministic; no downloads; every check takes time linear in the response; nothing from the row is used as
a regular expression. An unknown id, or arguments that cannot be read, make the rule abstain and name them: the row's
fault is never the response's.

Not covered: sense. Text that satisfies the letter of every constraint and says nothing scores 1. Sentences are split by
rules for English (`sentences`), which other languages only share in part.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from verl_rlar.sandbox.reading import answer_of, parse_json
from verl_rlar.tools.rule import rule
from verl_rlar.tools.rules.language import is_known, written_in
from verl_rlar.types import Kind, Sample, Verdict

LOOSE_SIZE = 100_000
"""Most characters of an answer that is also read loosely (eight more passes); beyond it, loose is strict."""


class UnusableConstraint(ValueError):
    """A constraint of the row cannot be checked: unknown id, missing or unreadable argument."""


@dataclass(frozen=True, kw_only=True)
class Constraint:
    """One constraint of a row."""

    id: str
    """As in IFEval, for example ``keywords:existence``."""
    arguments: Mapping[str, Any]
    """Its arguments, as plain Python values; None and NaN are left out."""


@rule(
    name="instruction_constraints",
    kinds={Kind.CONSTRAINTS},
    needs_reference=False,
    description="""Share of the row's instruction constraints (all 25 kinds of IFEval: lengths, keywords, formats,
    cases, languages, ...) that the answer satisfies strictly. Use it where the row lists constraints in IFEval's
    vocabulary. It checks form only: combine it with a tool that reads the content where that matters too.""",
    misses=(
        "Content: nonsense that satisfies every constraint scores 1.",
        "Stuffing: keywords, bullets, placeholders or letters that are merely listed count.",
        "Brevity: two words keep 'no commas', 'less than 50 words' and other constraints that only forbid or limit.",
        "Inflected keywords ('sneakers' for 'sneaker') do not count.",
        "Sentences of other languages than English, and in text without punctuation, are counted roughly.",
        "Answers of a few words or of names only: their language is guessed (a list of countries passed as German).",
        "Two languages mixed within one line pass if the demanded one prevails.",
        "C++ or shell code with << and >> in one line counts as a title.",
    ),
)
def instruction_constraints(sample: Sample) -> Verdict:
    """The share of satisfied constraints."""
    try:
        constraints = constraints_of(sample.query.extra)
        answer = answer_of(sample.response).replace("\r\n", "\n")
        parrots = _repeats(answer, sample.query.prompt)
        answer = "" if parrots else answer
        strict = [satisfies(answer, constraint) for constraint in constraints]
        loose = list(strict)
        for variant in _loosened(answer) if not all(strict) and len(answer) <= LOOSE_SIZE else ():
            for i, constraint in enumerate(constraints):
                loose[i] = loose[i] or satisfies(variant, constraint)
    except UnusableConstraint as error:
        return Verdict(value=None, reason=str(error))
    details: dict[str, float] = {}
    for constraint, kept in zip(constraints, strict, strict=True):
        same = sum(name.split("#")[0] == constraint.id for name in details)
        details[constraint.id + (f"#{same + 1}" if same else "")] = float(kept)
    broken = [name for name, kept in details.items() if not kept]
    details |= {"all": float(all(strict)), "loose": sum(loose) / len(loose), "loose_all": float(all(loose))}
    reason = f"{sum(strict)} of {len(strict)} satisfied" + (f"; not: {', '.join(broken)}" if broken else "")
    reason += "; it repeats the prompt and says no more" if parrots else ""
    return Verdict(value=sum(strict) / len(strict), reason=reason, details=details)


def constraints_of(extra: Mapping[str, Any]) -> tuple[Constraint, ...]:
    """The constraints that a row lists.

    Args:
        extra: ``Query.extra`` with ``instruction_id_list`` and ``kwargs``.

    Raises:
        UnusableConstraint: None listed, an unknown id, or lists of different lengths.
    """
    ids, arguments = _plain(extra.get("instruction_id_list")), _plain(extra.get("kwargs"))
    ids = [ids] if isinstance(ids, str) else ids
    if not isinstance(ids, list) or not ids or not all(isinstance(name, str) for name in ids):
        raise UnusableConstraint('extra["instruction_id_list"] lists no constraint')
    unknown = [name for name in ids if name not in CHECKS]
    if unknown:
        raise UnusableConstraint(f"unknown constraint {unknown[0][:80]!r}")
    if arguments is None:
        arguments = [None] * len(ids)
    elif isinstance(arguments, dict):
        arguments = [arguments]
    if not isinstance(arguments, list) or len(arguments) != len(ids):
        raise UnusableConstraint(f'extra["kwargs"] does not list one mapping for each of {len(ids)} constraints')
    if not all(entry is None or isinstance(entry, dict) for entry in arguments):
        raise UnusableConstraint('extra["kwargs"] holds something that is no mapping')
    return tuple(
        Constraint(id=name, arguments={k: v for k, v in (entry or {}).items() if v is not None})
        for name, entry in zip(ids, arguments, strict=True)
    )


def satisfies(answer: str, constraint: Constraint) -> bool:
    """Whether an answer (thinking removed) satisfies one constraint, strictly.

    Raises:
        UnusableConstraint: An argument is missing or unreadable.
    """
    return not _is_degenerate(answer) and CHECKS[constraint.id](answer, _Arguments(constraint))


class _Arguments:
    """Typed access to the arguments of a constraint; whatever is wrong with one is an `UnusableConstraint`."""

    def __init__(self, constraint: Constraint) -> None:
        self._constraint = constraint

    def text(self, name: str) -> str:
        value = self._constraint.arguments.get(name)
        if not isinstance(value, str) or not value.strip():
            raise self._unusable(name, "a text")
        return value

    def texts(self, name: str) -> list[str]:
        value = self._constraint.arguments.get(name)
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not value or not all(isinstance(v, str) and v.strip() for v in value):
            raise self._unusable(name, "a list of texts")
        return value

    def number(self, name: str) -> int:
        value = self._constraint.arguments.get(name)
        try:
            number = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            raise self._unusable(name, "a whole number") from None
        if isinstance(value, bool) or not number.is_integer():
            raise self._unusable(name, "a whole number")
        return int(number)

    def holds(self, count: int, number: str, relation: str = "relation") -> bool:
        """Whether a count stands in the demanded relation to the demanded number."""
        wanted = self.number(number)
        match " ".join(self.text(relation).lower().split()):
            case "less than":
                return count < wanted
            case "at least":
                return count >= wanted
            case "more than":
                return count > wanted
            case "at most":
                return count <= wanted
            case "exactly":
                return count == wanted
        raise self._unusable(relation, "'less than', 'at least', 'more than', 'at most' or 'exactly'")

    def _unusable(self, name: str, wanted: str) -> UnusableConstraint:
        found = str(self._constraint.arguments.get(name))[:50]
        return UnusableConstraint(f"{self._constraint.id}: argument {name!r} must be {wanted}, not {found!r}")


Check = Callable[[str, _Arguments], bool]


# Text


_WORD = re.compile(r"\w+")
_APOSTROPHES = "'’ʼ"


def _says_something(text: str) -> bool:
    return any(map(str.isalnum, text))


def _is_degenerate(text: str) -> bool:
    """Whether a text says nothing: no letter or digit, one character only, or one word at least three times only."""
    first, number = "", 0
    for match in _WORD.finditer(text):
        word = match.group().lower()
        if first and word != first:
            return False
        first, number = word, number + 1
    return number == 0 or number >= 3 or (len(set(first)) == 1 and not _spaceless(first[0]) and not first.isdigit())


def _repeats(answer: str, prompt: str) -> bool:
    """Whether an answer has the words of the prompt and no other."""
    words = _WORD.findall(answer.lower())
    return bool(words) and words == _WORD.findall(prompt.lower())


def _spaceless(char: str) -> bool:
    """Whether a character is of a script that writes words without spaces (Chinese, Japanese, Thai, Khmer, ...)."""
    spans = (("\u0e00", "\u0eff"), ("\u1000", "\u109f"), ("\u1780", "\u17ff"), ("\u2e80", "\U0010ffff"))
    return any(first <= char <= last for first, last in spans)


def count_keyword(text: str, keyword: str) -> int:
    """How often a keyword or phrase occurs as whole words, in any case; a possessive ending may follow.

    Hyphens bound words, and underscores that emphasise (``_word_``); those of a name (``is_word``) do not. In scripts
    without spaces every occurrence counts.
    """
    text, keyword = text.lower(), keyword.strip().lower()
    free_left, free_right = (not keyword[i].isalnum() or _spaceless(keyword[i]) for i in (0, -1))
    count, start = 0, text.find(keyword)
    while start >= 0:
        end = start + len(keyword)
        left = free_left or not _goes_on(text[max(0, start - 2) : start][::-1])
        right = free_right or not _goes_on(text[end : end + 2])
        count += left and right
        start = text.find(keyword, end if left and right else start + 1)
    return count


def _goes_on(beside: str) -> bool:
    """Whether a word goes on in the (up to two) characters beside it, the nearest first."""
    return beside[:1].isalnum() or (beside[:1] == "_" and beside[1:].isalnum())


_ABBREVIATIONS = frozenset(
    "mr mrs ms dr prof rev hon sr jr st mt ft gen col lt sgt capt cpt gov sen rep pres vs etc e.g i.e cf al ca approx"
    " no nos vol vols pp fig figs eq sec ch ed eds dept est inc ltd co corp bros u.s u.k u.n d.c a.m p.m ph.d m.d b.a"
    " m.a b.s m.s jan feb mar apr jun jul aug sep sept oct nov dec mon tue wed thu fri ave blvd rd min max p.s p.p.s"
    .split()
)  # fmt: skip
_MAY_END = frozenset("etc a.m p.m no".split())
"""Abbreviations that may end a sentence: they do unless the next word begins in lower case."""
_BEFORE_NAMES = frozenset("inc ltd co corp jr sr u.s u.k u.n d.c ph.d m.d b.a m.a al est".split())
"""Abbreviations that often stand before a name ("the U.S. Department"): they end a sentence before `_STARTERS` only."""
_STARTERS = frozenset(
    "the this that these those it he she they we you i a an in on at for as if when while after before since there"
    " here but and so or yet however also then thus therefore although his her its their our my your what who how why"
    .split()
)  # fmt: skip
_END = re.compile(r"(?<![.!?؟…])([.!?]+|[؟…]+)([\"'”’»›)\]}*_`]*)(?=\s|$)|[。！？।۔]+")
_TOKEN = 40


def sentences(text: str) -> list[str]:
    """Splits English text into sentences by fixed rules.

    A sentence ends at ``.``, ``!``, ``?`` (or their kin in other scripts), with closing quotes, brackets or asterisks,
    before white space or the end, except after abbreviations (Mr., e.g.), initials (J. R. R.), list numbers at the
    start of a line (``3.``), and, for ``...`` and abbreviations like "etc.", before a word in lower case. A line break
    alone ends no sentence: a heading or bullet without punctuation belongs to what follows, as in Punkt, which IFEval
    uses.
    """
    found: list[str] = []
    start = 0
    for match in _END.finditer(text):
        if match.group(1) is not None and not _ends(text, start, match):
            continue
        sentence = text[start : match.end()]
        start = match.end()
        if _says_something(sentence):
            found.append(sentence.strip())
    if _says_something(text[start:]):
        found.append(text[start:].strip())
    return found


def _ends(text: str, start: int, match: re.Match[str]) -> bool:
    """Whether the punctuation of a match ends the sentence that began at `start`."""
    marks, closers, at = match.group(1), match.group(2), match.start()
    if not marks.startswith(".") and marks != "…":
        return True
    after = text[match.end() : match.end() + _TOKEN].lstrip().lstrip("\"'“‘«(*_[")
    lower_follows = after[:1].islower()
    before = text[max(start, at - _TOKEN) : at]
    line = before.rsplit("\n", 1)[-1]
    word = (line.split() or [""])[-1].lstrip("\"'“‘«([*_#-").lower()
    if line.strip(" \t*#>_-([").lower() == word and (word.isdigit() or (len(word) == 1 and word.isalpha())):
        return False  # a list number: "3." at the start of a line
    if len(marks) > 1 or marks == "…":
        return not lower_follows
    if closers and not set(closers) <= set("*_`"):
        return not lower_follows
    if not word:
        return _says_something(before)
    if word in _MAY_END:
        return not lower_follows
    if word in _BEFORE_NAMES or re.fullmatch(r"[a-z](?:\.[a-z])+", word):
        following = _WORD.match(after)
        return following is None or (not lower_follows and following.group().lower() in _STARTERS)
    if word in _ABBREVIATIONS:
        return False
    if len(word) == 1 and word.isalpha() and word != "i":
        return False  # an initial
    return not (lower_follows and word.replace(".", "").isalpha() and "." in word)


def highlights(text: str) -> int:
    """Number of stretches that markdown emphasises with asterisks: ``*one*``, ``**two**``, ``***three***``.

    Both ends are on one line; emphasis begins before and ends after a character that is no white space.
    """
    count = 0
    for line in text.split("\n"):
        line = line.lstrip()
        if line[:1] == "*" and line[1:2].isspace():
            line = line[2:]
        opened = -1
        for run in _RUN.finditer(line):
            opens = run.end() < len(line) and not line[run.end()].isspace()
            closes = run.start() > 0 and not line[run.start() - 1].isspace()
            if opened >= 0 and closes:
                count += _says_something(line[opened : run.start()])
                opened = -1
            elif opens:
                opened = run.end()
    return count


_RUN = re.compile(r"\*+")


def bullets(text: str) -> int:
    """Number of markdown bullets: lines that begin with ``*``, ``-`` or ``+`` and go on with text.

    The space after the sign may be missing (``-item``), but not where the line then reads as something else: a rule
    (``---``), emphasis (``**bold**``, ``*emphasis*``) or a number (``-5``).
    """
    count = 0
    for line in text.split("\n"):
        line = line.strip()
        sign, rest = line[:1], line[1:]
        if sign not in ("*", "-", "+") or not _says_something(rest):
            continue
        if rest[0].isspace():
            count += 1
        elif sign == "-":
            count += rest[0].isalpha() or rest[0] in "*[\"'`("
        elif sign == "*":
            count += rest[0].isalnum() and "*" not in rest
    return count


def placeholders(text: str) -> int:
    """Number of bracketed stretches with text in them, such as ``[address]``, each within one line."""
    count = 0
    for line in text.split("\n"):
        start = line.find("[")
        while start >= 0:
            end = line.find("]", start + 1)
            if end < 0:
                break
            count += _says_something(line[start + 1 : end])
            start = line.find("[", end + 1)
    return count


_CLITIC = re.compile(r"(?:['’](?:s|m|d|re|ve|ll|S|M|D|RE|VE|LL)|n['’]t|N['’]T)$")
_CAPITAL_TOKEN = re.compile(r"(?:[^\s—–…()\[\]{}<>\"“”;:,@#$%&?!*`|=+~^\\]|[:,](?=\d))+")


def capital_words(text: str) -> int:
    """Number of words without a lower-case letter: "NASA", "I", "U.S.", "STATE-OF-THE-ART" (one), "I'm" (its "I")."""
    count = 0
    for match in _CAPITAL_TOKEN.finditer(text):
        token = match.group()
        if token.islower() or token == token.lower():
            continue
        for word in token.split("--"):
            count += _CLITIC.sub("", word.strip("'‘’._-/:,")).isupper()
    return count


def _lines_with(text: str, opening: str, closing: str) -> Iterator[str]:
    """What stands between the first `opening` and the last `closing` of each line that has both."""
    for line in text.split("\n"):
        start, end = line.find(opening), line.rfind(closing)
        if 0 <= start and start + len(opening) < end:
            yield line[start + len(opening) : end]


# Checks: one for each of IFEval's 25 kinds, in the order of the paper's table


def _keywords_existence(text: str, args: _Arguments) -> bool:
    return all([count_keyword(text, word) > 0 for word in args.texts("keywords")])


def _keywords_frequency(text: str, args: _Arguments) -> bool:
    return args.holds(count_keyword(text, args.text("keyword")), "frequency")


def _forbidden_words(text: str, args: _Arguments) -> bool:
    return not any([count_keyword(text, word) > 0 for word in args.texts("forbidden_words")])


def _letter_frequency(text: str, args: _Arguments) -> bool:
    return args.holds(text.lower().count(args.text("letter").strip().lower()), "let_frequency", "let_relation")


def _response_language(text: str, args: _Arguments) -> bool:
    language = args.text("language")
    if not is_known(language):
        raise UnusableConstraint(f"language:response_language: nobody here knows the language {language[:20]!r}")
    return _entirely_in(text, language)


def _entirely_in(text: str, language: str) -> bool:
    """Whether the text as a whole, and each of its first 100 longer lines and paragraphs, is in a language."""
    if written_in(text, language) is not True:
        return False
    parts = (part for by in ("\n", "\n\n") for part in text[:100_000].split(by)[:1000])
    longer = (part for part in parts if sum(map(str.isalpha, part[:400])) >= 60)
    return all(written_in(part, language) is not False for part, _ in zip(longer, range(100), strict=False))


def _number_sentences(text: str, args: _Arguments) -> bool:
    return args.holds(len(sentences(text)), "num_sentences")


def _number_paragraphs(text: str, args: _Arguments) -> bool:
    paragraphs = text.split("***")
    inner_blank = any(not part.strip() for part in paragraphs[1:-1])
    return not inner_blank and sum(1 for part in paragraphs if part.strip()) == args.number("num_paragraphs")


def _number_words(text: str, args: _Arguments) -> bool:
    return args.holds(sum(1 for _ in _WORD.finditer(text)), "num_words")


def _nth_paragraph_first_word(text: str, args: _Arguments) -> bool:
    paragraphs = [part for part in text.split("\n\n") if part.strip()]
    nth, first_word = args.number("nth_paragraph"), args.text("first_word").strip().lower()
    if len(paragraphs) != args.number("num_paragraphs") or not 1 <= nth <= len(paragraphs):
        return False
    start = paragraphs[nth - 1].strip().lower()
    if not start.startswith(first_word):
        start = start.lstrip("\"'“”‘’*_#([<> \t")
    following = start[len(first_word) :]
    return start.startswith(first_word) and (not following or not (following[0].isalnum() or following[0] in "-_"))


def _number_placeholders(text: str, args: _Arguments) -> bool:
    return placeholders(text) >= args.number("num_placeholders")


def _postscript(text: str, args: _Arguments) -> bool:
    marker = args.text("postscript_marker").strip().lower()
    letters = [char for char in marker if char.isalnum()]
    if letters in (["p", "s"], ["p", "p", "s"]):  # "P.S.", "P. S.", "P.P.S": spaces within do not matter
        dots = r"(?<![\w.])" + r"\.[ \t]?".join(letters) + (r"\." if marker.endswith(".") else r"(?!\w)")
        found = re.search(dots, text.lower())
        return found is not None and _says_something(text.lower()[found.end() :])
    _, mark, rest = text.lower().partition(marker)
    return bool(mark) and _says_something(rest)


def _number_bullet_lists(text: str, args: _Arguments) -> bool:
    return bullets(text) == args.number("num_bullets")


def _constrained_response(text: str, args: _Arguments) -> bool:
    return sum(option in text for option in ("My answer is yes.", "My answer is no.", "My answer is maybe.")) == 1


def _number_highlighted_sections(text: str, args: _Arguments) -> bool:
    return highlights(text) >= args.number("num_highlights")


def _multiple_sections(text: str, args: _Arguments) -> bool:
    mark = re.escape(args.text("section_spliter").strip())
    numbers = {match.group(1).lstrip("0") for match in re.finditer(rf"(?<!\w){mark}\s?(\d{{1,6}})(?!\d)", text)}
    return len(numbers) >= args.number("num_sections")


def _json_format(text: str, args: _Arguments) -> bool:
    try:
        return isinstance(parse_json(text), dict | list)
    except ValueError:
        return False


def _title(text: str, args: _Arguments) -> bool:
    return any(_says_something(title) for title in _lines_with(text, "<<", ">>"))


def _two_responses(text: str, args: _Arguments) -> bool:
    parts = text.split("******")
    if any(not part.strip() for part in parts[1:-1]):
        return False
    said = [part.strip() for part in parts if part.strip()]
    return len(said) == 2 and said[0] != said[1] and all(map(_says_something, said))


def _repeat_prompt(text: str, args: _Arguments) -> bool:
    text, prompt = text.strip().lower(), args.text("prompt_to_repeat").strip().lower()
    return text.startswith(prompt) and _says_something(text[len(prompt) :])


def _end_checker(text: str, args: _Arguments) -> bool:
    said, phrase = text.strip().lower(), args.text("end_phrase").strip().lower()
    return said.endswith(phrase) or said.strip('"“”').endswith(phrase)


def _quotation(text: str, args: _Arguments) -> bool:
    text = text.strip()
    return len(text) > 2 and (text[0] == text[-1] == '"' or (text[0] in "“„" and text[-1] in "”“"))


def _capital_word_frequency(text: str, args: _Arguments) -> bool:
    return args.holds(capital_words(text), "capital_frequency", "capital_relation")


def _english_capital(text: str, args: _Arguments) -> bool:
    return text.isupper() and written_in(text.lower(), "en") is not False


def _english_lowercase(text: str, args: _Arguments) -> bool:
    return text.islower() and written_in(text, "en") is not False


def _no_comma(text: str, args: _Arguments) -> bool:
    return not any(comma in text for comma in ",，،、﹐︐‚")


CHECKS: dict[str, Check] = {
    "keywords:existence": _keywords_existence,
    "keywords:frequency": _keywords_frequency,
    "keywords:forbidden_words": _forbidden_words,
    "keywords:letter_frequency": _letter_frequency,
    "language:response_language": _response_language,
    "length_constraints:number_paragraphs": _number_paragraphs,
    "length_constraints:number_words": _number_words,
    "length_constraints:number_sentences": _number_sentences,
    "length_constraints:nth_paragraph_first_word": _nth_paragraph_first_word,
    "detectable_content:postscript": _postscript,
    "detectable_content:number_placeholders": _number_placeholders,
    "detectable_format:number_bullet_lists": _number_bullet_lists,
    "detectable_format:title": _title,
    "detectable_format:constrained_response": _constrained_response,
    "detectable_format:number_highlighted_sections": _number_highlighted_sections,
    "detectable_format:multiple_sections": _multiple_sections,
    "detectable_format:json_format": _json_format,
    "combination:repeat_prompt": _repeat_prompt,
    "combination:two_responses": _two_responses,
    "change_case:english_capital": _english_capital,
    "change_case:english_lowercase": _english_lowercase,
    "change_case:capital_word_frequency": _capital_word_frequency,
    "startend:end_checker": _end_checker,
    "startend:quotation": _quotation,
    "punctuation:no_comma": _no_comma,
}
"""The check of each of IFEval's 25 kinds of constraint."""


def _loosened(answer: str) -> Iterator[str]:
    """IFEval's looser readings: without the first line, the last line, both; each also without asterisks."""
    lines = answer.split("\n")
    parts = [answer, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    for part in parts:
        yield part
        yield part.replace("*", "")


def _plain(value: Any) -> Any:
    """A value as JSON would have it: numpy to Python, tuples to lists, JSON text parsed, NaN to None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return value
    if isinstance(value, Mapping):
        return {str(k): _value(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return _value(value)


def _value(value: Any) -> Any:
    """An argument: numpy to Python, NaN to None; text stays text, whatever it looks like."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_value(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value
