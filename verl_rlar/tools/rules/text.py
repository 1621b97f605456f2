# SPDX-License-Identifier: Apache-2.0
r"""Rules `exact_match` and `token_f1`: a short free-form answer against a short reference, as in SQuAD.

Both compare after `normalise`: Unicode NFKC and case folding, then punctuation, the articles a/an/the and surplus
spaces are dropped. This is SQuAD 1.1's normalisation (Rajpurkar et al. 2016, arXiv 1606.05250, `evaluate-v1.1.py`),
with all Unicode punctuation and symbols instead of ASCII's, and case folding instead of lower case.

The response counts from its last ``</think>`` on, thinking that has not ended does not; of a ``\boxed{}``, or of a last
line that starts with "Answer:", only the content counts.

Guarantees: linear in the response, of which only the last 200,000 characters are read; a reference that is empty after
normalisation makes the rule abstain. Several accepted answers can stand in ``extra["answers"]`` (a list of texts,
beside the reference): the best one counts.

Not covered: see `misses` of the specs. Texts without spaces between words (Chinese, Japanese, Thai) are one token.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Iterable

from verl_rlar.sandbox.reading import after_thinking, normalise
from verl_rlar.tools.rule import rule
from verl_rlar.types import Kind, Query, Sample, Verdict

_STATED = re.compile(r"^[ \t>*_#]*(?:final[ \t]+)?answer[ \t*_]*:[\s*_]*([^\s*_][^\n]*)", re.IGNORECASE | re.MULTILINE)
_BOX = re.compile(r"\\boxed\s*\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}")
_COMMAND = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")


_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)


def _tagged(text: str) -> str:
    """What the last pair of answer tags holds; without a pair what follows an open one; else all."""
    begin, held = None, None
    for tag in _TAG.finditer(text):
        if not tag[1]:
            begin = tag.end()
        elif begin is not None:
            begin, held = None, text[begin : tag.start()]
    return held if held is not None else text[begin or 0 :]


def stated_answer(response: str) -> str:
    r"""The part of a response that counts: what it boxes or states after "Answer:", else all after ``</think>``."""
    text = after_thinking(response)
    text = _tagged(text)
    stated = deque(_BOX.finditer(text), maxlen=1) or deque(_STATED.finditer(text), maxlen=1)
    return _COMMAND.sub(r"\1", stated[0][1] if stated else text)


def _references(query: Query) -> list[str]:
    """The normalised references, without empty ones."""
    more = query.extra.get("answers")
    texts = [query.reference or ""]
    if isinstance(more, Iterable) and not isinstance(more, (str, bytes, dict)):
        texts += [text for text in more if isinstance(text, str)]
    return [normal for normal in map(normalise, texts) if normal]


@rule(
    name="exact_match",
    kinds={Kind.SHORT_TEXT},
    description="""Exact match with a short reference answer after SQuAD's normalisation (case, punctuation, articles,
    spaces, Unicode compatibility forms). 1 or 0. Use it for names, dates and short phrases with one right wording.""",
    misses=(
        "A synonym, an abbreviation, another date format or a spelled-out number scores 0.",
        "An answer with a sentence around it scores 0 unless it is boxed or follows 'Answer:'.",
        "Signs and symbols are dropped, so -5 matches 5 and C++ matches C: numbers belong to final_answer.",
    ),
)
def exact_match(sample: Sample) -> Verdict:
    """1.0 if the stated answer equals the reference after `normalise`, else 0.0; None without a usable reference."""
    references = _references(sample.query)
    if not references:
        return Verdict(value=None, reason="the reference has no words")
    answer = normalise(stated_answer(sample.response))
    if not answer:
        return Verdict(value=0.0, reason="the answer is empty")
    right = answer in references
    return Verdict(
        value=float(right), reason="same text" if right else f"{answer[:60]!r} is not {references[0][:60]!r}"
    )


@rule(
    name="token_f1",
    kinds={Kind.SHORT_TEXT},
    description="""SQuAD's token F1 with a short reference answer: the harmonic mean of precision and recall of words,
    after normalisation. In [0, 1]. Use it where part of the wording may differ and partial credit makes sense.""",
    misses=(
        "It counts words, not meaning: 'not guilty' against 'guilty' scores 0.67.",
        "The order of words is free.",
        "A synonym scores 0; a long right answer loses precision.",
        "Common words of reference and response earn credit though the answer is wrong.",
    ),
)
def token_f1(sample: Sample) -> Verdict:
    """SQuAD F1 in [0, 1] of the stated answer and the best reference; None without a usable reference."""
    references = _references(sample.query)
    if not references:
        return Verdict(value=None, reason="the reference has no words")
    answer = Counter(normalise(stated_answer(sample.response)).split())
    best = max((_f1(Counter(reference.split()), answer) for reference in references), key=lambda scores: scores[2])
    precision, recall, f1 = best
    return Verdict(value=f1, reason=f"F1 {f1:.2f}", details={"precision": precision, "recall": recall})


def _f1(reference: Counter[str], answer: Counter[str]) -> tuple[float, float, float]:
    """Precision, recall and F1 of two bags of words."""
    common = (reference & answer).total()
    if not common:
        return 0.0, 0.0, 0.0
    precision, recall = common / answer.total(), common / reference.total()
    return precision, recall, 2 * precision * recall / (precision + recall)
