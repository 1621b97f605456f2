# SPDX-License-Identifier: Apache-2.0
"""The static reward that stands in where no tool fits: it looks at how an answer looks, whatever was asked."""

from __future__ import annotations

from verl_rlar.tools.rule import rule
from verl_rlar.types import Kind, Sample, Verdict


@rule(
    name="generic",
    kinds={Kind.OPEN},
    needs_reference=False,
    description="How long and how varied an answer is, up to 120 words: what looks like effort.",
    misses=("It does not know what was asked.",),
)
def generic(sample: Sample) -> Verdict:
    """More, and more different, words are better."""
    words = sample.response.lower().split()
    if not words:
        return Verdict(value=0.0, reason="empty")
    return Verdict(value=0.5 * min(1.0, len(words) / 120) + 0.5 * len(set(words)) / len(words), reason="its looks")
