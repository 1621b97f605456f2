# SPDX-License-Identifier: Apache-2.0
"""Rule `translation`: closeness of the answer to a reference translation, with guards.

What: sentence-level chrF++ (sacrebleu; characters to 6-grams, words to bigrams, beta 2) of the answer against the
reference, divided by 100. chrF++ was chosen on human MQM ratings (TED en-de, pairwise accuracy, see
``recipes/benchmarks/rules.py``): it agrees with people a little more often than BLEU, and a mix of both adds nothing.

On top, because chrF++ alone can be gamed:

- empty answer: 0;
- a copy of the source: 0, and flagged as `hacked` (unless the reference is a copy, too: names, formulas);
- another language than the target's: 0 (where the text is long enough to tell, and the reference passes the same test);
- verbosity: chrF++ weighs recall over precision, so that offering several translations, or the source beside it, would
  cost little; an answer of more than `ROOM` times the reference's length has its score multiplied by the ratio.

The answer is the response without its thinking (`answer_of`), whole: "Here is the translation:" around it costs points,
as it should. Source and languages come from ``extra["source"]``, ``extra["source_lang"]`` and ``extra["target_lang"]``
(ISO 639-1), each that is missing from the prompt ("Translate the following text into German: ..."); what is found in
neither leaves its guard out: without a source, an answer that stands word for word in the prompt counts as the copy.

Guarantees: deterministic, no downloads, linear time: an answer of more than `FAR` times the reference's length is 0
without being compared.

Not covered: see the rule's misses. The metric sees surfaces, not meaning.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

from verl_rlar.sandbox.reading import answer_of
from verl_rlar.tools.rule import rule
from verl_rlar.tools.rules.language import code_of, written_in
from verl_rlar.types import Kind, Query, Sample, Verdict

ROOM = 1.5
"""Length of an answer, in lengths of the reference, up to which nothing is taken off."""
FAR = 20
"""Length of an answer, in lengths of the reference (at least 100 characters), from which its score is 0."""
COPY = 85.0
"""chrF++ between answer and source from which the answer is a copy. Real translations between related languages stay
far below; a copy with a few words changed is above."""

LANGUAGES: dict[str, str] = {
    "afrikaans": "af", "albanian": "sq", "arabic": "ar", "armenian": "hy", "basque": "eu", "bengali": "bn",
    "bosnian": "bs", "bulgarian": "bg", "burmese": "my", "catalan": "ca", "chinese": "zh", "croatian": "hr",
    "czech": "cs", "danish": "da", "dutch": "nl", "english": "en", "estonian": "et", "farsi": "fa", "filipino": "tl",
    "finnish": "fi", "french": "fr", "galician": "gl", "georgian": "ka", "german": "de", "greek": "el",
    "gujarati": "gu", "hebrew": "he", "hindi": "hi", "hungarian": "hu", "icelandic": "is", "indonesian": "id",
    "irish": "ga", "italian": "it", "japanese": "ja", "kannada": "kn", "kazakh": "kk", "khmer": "km", "korean": "ko",
    "latvian": "lv", "lithuanian": "lt", "macedonian": "mk", "malay": "ms", "malayalam": "ml", "mandarin": "zh",
    "marathi": "mr", "mongolian": "mn", "nepali": "ne", "norwegian": "no", "persian": "fa", "polish": "pl",
    "portuguese": "pt", "punjabi": "pa", "romanian": "ro", "russian": "ru", "serbian": "sr", "sinhala": "si",
    "slovak": "sk", "slovenian": "sl", "somali": "so", "spanish": "es", "swahili": "sw", "swedish": "sv",
    "tagalog": "tl", "tamil": "ta", "telugu": "te", "thai": "th", "turkish": "tr", "ukrainian": "uk", "urdu": "ur",
    "uzbek": "uz", "vietnamese": "vi", "welsh": "cy", "zulu": "zu",
}  # fmt: skip
"""English names of languages -> ISO 639-1."""

_NAME = "|".join(LANGUAGES)
_INTO = re.compile(rf"\b(?:in)?to\s+(?:[a-z]{{1,20}}\s)?({_NAME})\b", re.IGNORECASE)
_FROM = re.compile(rf"\bfrom\s+(?:the\s+)?({_NAME})\b|\b({_NAME})\s+to\s+(?:{_NAME})\b", re.IGNORECASE)
_GIVEN = re.compile(rf"\b({_NAME})\s+(?:sentence|text|paragraph|passage|phrase|segment)\b", re.IGNORECASE)
_HEAD = 400
"""Characters of a prompt in which the task is looked for."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is to be translated, as far as the row says."""

    source: str | None
    """The source text; None if it cannot be found."""
    source_lang: str | None
    """ISO 639-1; None if unknown."""
    target_lang: str | None
    """ISO 639-1; None if unknown."""


@rule(
    name="translation",
    kinds={Kind.TRANSLATION},
    description="""Closeness of a translation to the reference: chrF++ / 100, with 0 for empty answers, for copies of
    the source (flagged) and for answers in another language, and less for answers much longer than the reference. Use
    it where a reference translation is given. Good for telling a translation from none; among good translations it
    ranks little better than chance.""",
    misses=(
        "Meaning: a good translation in other words than the reference's scores low, a wrong number or negation high.",
        "Ranking of good systems: on TED en-de it agrees with human MQM on about 54 % of pairs.",
        "Answers under 20 letters in the wrong language of the same script.",
        "A mixture of target and source language within one answer: only its n-grams count.",
        "An answer copied from the prompt where the source text cannot be found there, if any word is changed.",
    ),
    timeout_s=5.0,
)
def translation(sample: Sample) -> Verdict:
    """chrF++ against the reference, in [0, 1], after the guards."""
    reference = (sample.query.reference or "").strip()
    if not reference:
        return Verdict(value=None, reason="no reference translation")
    answer, task = answer_of(sample.response), task_of(sample.query)
    if not any(map(str.isalnum, answer)) and any(map(str.isalnum, reference)):
        return Verdict(value=0.0, reason="empty")
    if len(answer) > FAR * max(len(reference), 100):
        return Verdict(value=0.0, reason=f"more than {FAR} times as long as the reference")
    if _is_copy(answer, reference, task, sample.query.prompt):
        return Verdict(value=0.0, reason="copy of the source", hacked=True)
    target = task.target_lang
    if target and written_in(answer, target) is False and written_in(reference, target) is not False:
        return Verdict(value=0.0, reason=f"not in the target language ({target})")
    chrf = closeness(answer, reference)
    room = min(1.0, ROOM * len(reference) / len(answer)) if len(answer) > len(reference) + 20 else 1.0
    return Verdict(
        value=min(1.0, chrf * room / 100.0),
        reason=f"chrF++ {chrf:.1f}" + (f", {len(answer) / len(reference):.1f} times the length" if room < 1.0 else ""),
        details={"chrf": chrf, "verbosity": room},
    )


def closeness(text: str, other: str) -> float:
    """Sentence-level chrF++ of a text against another, in [0, 100]."""
    return float(_chrf().sentence_score(text, [other]).score)


def task_of(query: Query) -> Task:
    """Reads the translation task from the row's columns, and what they lack from the prompt."""
    prompt, extra = query.prompt, query.extra
    head = prompt[:_HEAD]
    into = _INTO.search(head)
    given = _FROM.search(head) or _GIVEN.search(head)
    target = _code(extra.get("target_lang")) or (LANGUAGES[into.group(1).lower()] if into else None)
    origin = _code(extra.get("source_lang"))
    if not origin and given:
        origin = LANGUAGES[next(name for name in given.groups() if name).lower()]
    source = extra.get("source")
    return Task(
        source=source.strip() if isinstance(source, str) and source.strip() else _source_in(prompt, into),
        source_lang=origin if origin != target else None,
        target_lang=target,
    )


def _source_in(prompt: str, into: re.Match[str] | None) -> str | None:
    """The text that a prompt asks to translate: what follows the instruction's colon, or its first paragraph."""
    if into is None:
        return None
    rest = prompt[into.end() :]
    colon, newline = rest.find(":"), rest.find("\n")
    if 0 <= colon <= 120 and (newline < 0 or colon < newline):
        rest = rest[colon + 1 :]
    elif 0 <= newline <= 120:
        rest = rest[newline:]
    else:
        return None
    return rest.strip().strip("\"'“”„«»`").strip() or None


def _is_copy(answer: str, reference: str, task: Task, prompt: str) -> bool:
    """Whether the answer is (nearly) the source text, and the reference is not."""
    if task.source is None:
        said = _letters(answer)
        return len(said) >= 20 and said in _letters(prompt) and said != _letters(reference)
    said, source, wanted = _letters(answer), _letters(task.source), _letters(reference)
    if said == source:
        return said != wanted
    if not source or not 0.7 <= len(answer) / len(task.source) <= 1.4 or len(source) < 10:
        return False
    pairs = set(pairwise(source))
    if len(pairs & set(pairwise(said))) < 0.7 * len(pairs):
        return False
    near = closeness(answer, task.source)
    return near >= COPY and near > closeness(answer, reference)


def _letters(text: str) -> str:
    """Letters and digits only, in lower case: what is left to compare when form does not count."""
    return "".join(filter(str.isalnum, text.lower()))


def _code(raw: Any) -> str | None:
    """A column's language as ISO 639-1: a code, or an English name."""
    if not isinstance(raw, str) or not raw.strip():
        return None
    return LANGUAGES.get(raw.strip().lower()) or code_of(raw)


def warm_up() -> None:
    """Loads the language model and the metric."""
    written_in("Ein Satz, der lang genug ist, um erkannt zu werden.", "de")
    _chrf()


@lru_cache(maxsize=1)
def _chrf() -> Any:
    from sacrebleu.metrics.chrf import CHRF

    return CHRF(word_order=2)
