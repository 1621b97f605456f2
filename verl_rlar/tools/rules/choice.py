# SPDX-License-Identifier: Apache-2.0
r"""Rule `multiple_choice`: does a response choose the right one of the listed options?

The reference is a letter (``C``, ``(C)``, ``C.``) or the text of an option. The options come from ``extra["choices"]``
or ``extra["options"]`` (a list of texts, a mapping from letter to text, or ARC's ``{"label": [...], "text": [...]}``),
else from lines such as ``B) Paris`` in the prompt. Without options, letters A to J are possible.

**Which choice counts**, from the text after the last ``</think>`` (none, if thinking has not ended): the last
``\boxed{}``; what the last "answer is", "answer:", "I choose", "option C is right" or the like names; the whole
response, if it is the text of an option; the last line, else the first, if it is a letter or starts like ``C)``; the
letters in brackets or bold in the last line. Options that are mentioned before are fine. A final statement that names
several options scores 0, and so do a list of options without a choice and an option's text under another option's
letter.

Guarantees: linear in the response, of which the last 200,000 characters are read. It abstains if the reference is
neither a letter of an option nor an option's text.

Not covered: see `misses` of the spec.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Mapping
from string import ascii_uppercase

from verl_rlar.sandbox.reading import TAIL, after_thinking, normalise, plain
from verl_rlar.tools.rule import rule
from verl_rlar.types import Kind, Query, Sample, Verdict

_LETTERS = ascii_uppercase[:10]
_OPTION_LINE = re.compile(r"^[ \t]*[(\[]?([A-Z])[).:\]][ \t]*(\S[^\n]*)", re.MULTILINE)
_ONLY_LETTER = re.compile(r"[\s(\[{*$.]*(?:option|choice|answer)?[\s(\[{*$]*([A-Za-z])[\s)\]}*$.:,!]*", re.IGNORECASE)
_BOX = re.compile(r"\\boxed\s*\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}")
_COMMAND = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_DELIMITER = re.compile(r"\\[()\[\]]|`|</?answer>|^#{1,6}[ \t]+", re.MULTILINE)
"""What stands around a letter and says nothing: ``\\(C\\)``, backticks, tags, ``#### C``."""
_PHRASE = re.compile(
    r"(?:answer|choice|option)(?:[ \t]+(?:to|for|of)\b[^\n:.]{0,80})?"
    r"(?:[ \t*_]*(?:\bis\b|\bwould be\b|\bmust be\b|\btherefore\b|\bthus\b|[:=]))+"
    r"(?:[ \t]+(?:option|choice|letter|answer))?[ \t*_]*\n?[ \t*_]*(?=([^\n]{0,600}))"
    r"|\bI(?:'d|[ \t]+would)?[ \t]+(?:choose|pick|select|go[ \t]+with)"
    r"(?:[ \t]+(?:option|choice|letter|answer))?[ \t:*_]*(?=([^\n]{0,600}))"
    r"|\b(?:option|choice|answer)[ \t]+[*_]*"
    r"(?=([(\[]?[A-Z][)\]]?)[*_]*[ \t]+is[ \t]+(?:the[ \t]+)?(?:correct|right)"
    r"(?=[ \t*_]*(?:[.!,;:\n]|\Z|(?:one|answer|choice|option|because|as|since)\b)))",  # not "is right about the date"
    re.IGNORECASE,
)
_NAMED = re.compile(r"[(\[*]{1,4}([A-Za-z])[)\].*]{1,4}|(?<![\w'’])([A-Z])(?![\w'’])|(?<![\w'’])([a-z])(?=\)|\.?\s*$)")
_MORE = re.compile(r"(?:[\s,/&]|\band\b|\bor\b|\balso\b)+", re.IGNORECASE)
_HEAD = re.compile(r"[\s(\[*$\"]*([A-Za-z])(?:[)\].:,*$\"]+(?=\s|$)|\s*[-–—]\s|\s*$)")


@rule(
    name="multiple_choice",
    kinds={Kind.CHOICE},
    description=r"""Multiple choice: whether the final answer of the response ("The answer is (C)", "**C**",
    "\boxed{C}", "C) Paris", a bare "c", or the option's own text) is the option of the reference. 1 or 0. Use it
    wherever one letter out of listed options is asked for.""",
    misses=(
        "It sees the final choice only: a lucky guess scores 1.",
        "Questions with several right letters are not for it: naming two scores 0.",
        "An option's text in other words than the list's is not recognised.",
        "A choice hidden in prose without 'answer is', brackets or bold ('so C must hold') is not found and scores 0.",
        "A negated statement ('the answer is not C, it is D') is read at its first letter.",
        "Phrases are English.",
    ),
)
def multiple_choice(sample: Sample) -> Verdict:
    """1.0 if the response chooses the reference's option, else 0.0; None if the reference is no option."""
    options = _options(sample.query)
    right = _letter_of_reference((sample.query.reference or "").strip(), options)
    if right is None:
        return Verdict(value=None, reason=f"the reference {(sample.query.reference or '')[:60]!r} is no listed option")
    chosen = _chosen(after_thinking(sample.response), options)
    if not chosen:
        return Verdict(value=0.0, reason="no choice found")
    if len(chosen) > 1:
        return Verdict(value=0.0, reason=f"several choices: {', '.join(sorted(chosen))}")
    return Verdict(value=float(chosen == {right}), reason=f"chose {min(chosen)}, right is {right}")


def _options(query: Query) -> dict[str, str]:
    """Letter to text (empty where it is not known)."""
    given = next((query.extra[name] for name in ("choices", "options") if query.extra.get(name) is not None), None)
    if isinstance(given, Mapping):
        if "text" in given:
            texts = [str(text) for text in given["text"]]
            labels = [str(label).upper() for label in given.get("label", ())]
            if len(labels) != len(texts) or not all(label in ascii_uppercase for label in labels):
                labels = list(ascii_uppercase[: len(texts)])
            return dict(zip(labels, texts, strict=False))
        if given and all(re.fullmatch(r"[A-Za-z]", str(letter)) for letter in given):
            return {str(letter).upper(): str(text) for letter, text in given.items()}
    elif isinstance(given, Iterable) and not isinstance(given, (str, bytes)):
        texts = [
            re.sub(rf"^\s*\(?{letter}[).:]\s*", "", str(text))
            for letter, text in zip(ascii_uppercase, given, strict=False)
        ]
        if texts:
            return dict(zip(ascii_uppercase, texts, strict=False))
    listed = {m[1]: m[2] for m in _OPTION_LINE.finditer(query.prompt[-TAIL:])}
    return listed if len(listed) >= 2 else dict.fromkeys(_LETTERS, "")


def _letter_of_reference(reference: str, options: dict[str, str]) -> str | None:
    by_text = _by_text(reference, options)
    if by_text is not None:
        return by_text
    letter = _ONLY_LETTER.fullmatch(_COMMAND.sub(r"\1", reference)) or _HEAD.match(reference)
    return letter[1].upper() if letter and letter[1].upper() in options else None


def _by_text(text: str, options: dict[str, str]) -> str | None:
    """The one option whose text this is."""
    if _LETTER_A.match(text):  # which `normalise` would take for an article
        return None
    wanted = normalise(text)
    found = [letter for letter, option in options.items() if option and normalise(option) == wanted]
    if found:
        found = [letter for letter in found if _signs(options[letter]) == _signs(text)]
    return found[0] if wanted and len(found) == 1 else None


_HYPHEN = re.compile(r"(?<=[^\W\d_][^\W\d_])[-/](?=\s*[^\W_])|(?<=[^\W_])[-/](?=[^\W\d_][^\W\d_])")
"""In a word, where it may as well be a space."""
_LETTER_A = re.compile(r"[\s(\[*]*[Aa](?:[)\]}.:](?=\s|$)|\s+[-–—=](?=[\s>]))")
"""The letter of the first option, before its text."""
_SIGN = re.compile(r"[-+/=<>#]|(?<=\d)[.:](?=\d)|(?<!\d)\.(?=\d)")


_LETTER_FIRST = re.compile(r"^\W*\w[)\]}.:,;]*\s*(?:[-=]>|=|/|[-–—]\s)?\s*")
"""The letter of an option, and what may stand between it and the option's text."""


def _signs(text: str) -> list[str]:
    """What `normalise` drops and mathematics or a name needs: -3 is not 3, nor 1.5 15, nor C++ C."""
    text = re.sub(r"^(?:[-=]?>|=|-(?=\s+[^\W\d]))\s*", "", plain(text))  # a bullet, a quotation, an arrow
    return _SIGN.findall(_HYPHEN.sub(" ", re.sub(r"(?<![\w)])-\s+(?=\d)", "-", text)))


def _chosen(text: str, options: dict[str, str]) -> set[str]:
    """The letters that the final statement names."""
    text = _DELIMITER.sub("", text)
    if boxes := deque(_BOX.finditer(text), maxlen=1):
        return _statement(boxes[0][1], options)
    stated: set[str] = set()
    for phrase in _PHRASE.finditer(text):
        stated = _statement(phrase[phrase.lastindex or 0], options) or stated
    if stated:
        return stated
    if len(text) < 2_000 and (by_text := _by_text(text, options)):
        return {by_text}
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        return set()
    heads = [_head(line, options) for line in lines]
    named = set().union(*heads)
    if heads[-1]:
        return named if len(lines) > 1 and heads[-2] else heads[-1]  # the end of a list of options is no choice
    if heads[0] and heads[0] == named:
        return heads[0]
    return {m[1].upper() for m in _NAMED.finditer(lines[-1][-2_000:]) if m[1] and m[1].upper() in options}


def _head(line: str, options: dict[str, str]) -> set[str]:
    """The letters at the head of a line such as ``C``, ``(C)``, ``C) Paris`` or ``(A) and (C)``."""
    line = line[:2_000]
    return _statement(line, options) if _ONLY_LETTER.fullmatch(line) or _HEAD.match(line) else set()


def _statement(text: str, options: dict[str, str]) -> set[str]:
    """The letters at the head of a statement such as ``(C) Paris`` or ``A or B``; the text of an option counts too."""
    text = re.sub(r"[*_$\"]", "", _COMMAND.sub(r"\1", text[:2_000])).strip()
    text = re.sub(r"^(?:option|choice|answer)\s+", "", text, flags=re.IGNORECASE)
    by_text = _by_text(text, options)
    if by_text:
        return {by_text}
    found: set[str] = set()
    at = 0
    while named := _NAMED.match(text, at):
        letter = (named[1] or named[2] or named[3]).upper()
        if letter not in options:
            break
        found.add(letter)
        more = _MORE.match(text, named.end())
        if more is None:
            break
        at = more.end()
    if len(found) == 1 and (rest := _LETTER_FIRST.sub("", text)) and (other := _by_text(rest, options)):
        found.add(other)
    return found
