# SPDX-License-Identifier: Apache-2.0
"""Rules on the form of a response: gates, not bonuses.

What: two rules that answer 1 or 0 and are meant as gates of a route (`RoutePart.gate`): a response of the wrong form
scores 0 whatever its content; the right form alone earns nothing, so that there is nothing to farm.

- `think_format`: exactly one ``<think>...</think>`` block first, then the answer.
- `length_limits`: limits on words and characters of the answer.

Whether they are asked for is decided where routes are made: `think_format` by ``extra["format"] == "think"`` or by a
system prompt that demands the tags, `length_limits` by the presence of one of `LIMITS` in ``extra``.

All language rules score `answer_of` (`verl_rlar.sandbox.reading`), the part of a response that is meant for the reader.

Guarantees: no regular expression over the response, plain string searches only; linear time.

Not covered: whether the thought is a thought; other tags (``<thinking>``, ``<answer>``, channels of other templates).
"""

from __future__ import annotations

import math
from typing import Any

from verl_rlar.sandbox.reading import CLOSE, OPEN, answer_of
from verl_rlar.tools.rule import rule
from verl_rlar.types import Kind, Sample, Verdict

LIMITS = ("min_words", "max_words", "min_chars", "max_chars")
"""Keys of ``Query.extra`` that `length_limits` reads. Both ends are allowed values; None or NaN = no limit."""


@rule(
    name="think_format",
    kinds=frozenset(Kind),
    needs_reference=False,
    gate=True,
    description="""Gate: 1 if the response is exactly one non-empty <think>...</think> block followed by a non-empty
    answer, else 0. The opening tag may be missing where the chat template has already written it: extra["prefilled"]
    = true or false says so; without that key both forms pass.""",
    misses=(
        "A thought without sense ('<think>.</think>').",
        "A forgotten opening tag, where the row does not say whether the template writes it.",
        "Whether the thought has anything to do with the answer.",
    ),
)
def think_format(sample: Sample) -> Verdict:
    """1 for one well-formed block and an answer, else 0 with the first fault as the reason."""
    text = sample.response.strip()
    prefilled = sample.query.extra.get("prefilled")
    last = sample.query.messages[-1] if sample.query.messages else None
    if last is not None and last.role == "assistant" and last.content.rstrip().endswith(OPEN):
        prefilled = True
    opened = text.startswith(OPEN)
    body = text[len(OPEN) :] if opened else text
    thought, close, answer = body.partition(CLOSE)
    if not opened and prefilled is not None and not prefilled:
        reason = f"does not begin with {OPEN}"
    elif not close:
        reason = f"no {CLOSE}"
    elif OPEN in body or CLOSE in answer:
        reason = "more than one block"
    elif not thought.strip():
        reason = "nothing thought"
    elif not answer.strip():
        reason = "no answer after the block"
    else:
        return Verdict(value=1.0, reason="well-formed")
    return Verdict(value=0.0, reason=reason)


@rule(
    name="length_limits",
    kinds=frozenset(Kind),
    needs_reference=False,
    gate=True,
    description="""Gate: 1 if the answer (thinking not counted) keeps all of the limits min_words, max_words, min_chars
    and max_chars that the row's extra columns set, else 0. A word is what stands between white space and has a letter
    or digit. Abstains where the row sets no limit.""",
    misses=(
        "Padding: filler text up to a minimum counts.",
        "Words of languages without spaces: a Chinese or Thai paragraph is one word; limit its characters.",
    ),
)
def length_limits(sample: Sample) -> Verdict:
    """1 if every limit is kept, else 0 naming the first one that is broken."""
    limits: dict[str, float] = {}
    for key in LIMITS:
        raw = sample.query.extra.get(key)
        number = _number(raw)
        if number is not None:
            limits[key] = number
        elif raw is not None and not (isinstance(raw, float) and math.isnan(raw)):
            return Verdict(value=None, reason=f"extra[{key!r}] is no number: {str(raw)[:50]!r}")
    if not limits:
        return Verdict(value=None, reason=f"no limit set; known are {', '.join(LIMITS)}")
    answer = answer_of(sample.response)
    counts = {"words": count_words(answer) if any("words" in key for key in limits) else 0, "chars": len(answer)}
    details = {"chars": float(counts["chars"])} | ({"words": float(counts["words"])} if counts["words"] else {})
    for key, limit in limits.items():
        side, unit = key.split("_")
        if counts[unit] < limit if side == "min" else counts[unit] > limit:
            return Verdict(value=0.0, reason=f"{counts[unit]} {unit}, {key} is {limit:g}", details=details)
    return Verdict(value=1.0, reason="within all limits", details=details)


def count_words(text: str) -> int:
    """Number of white-space separated words with at least one letter or digit."""
    return sum(1 for word in text.split() if any(map(str.isalnum, word)))


def _number(raw: Any) -> float | None:
    """A finite number out of an int, a float, a numpy scalar or a numeric string; else None."""
    try:
        number = float(raw)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
