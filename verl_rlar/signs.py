# SPDX-License-Identifier: Apache-2.0
"""The statistics by which a reward is watched: one definition each, for whoever watches a run, decides on a tool's
life, counts for verl's logger or makes a report.

Guarantees: pure functions of their arguments, the same in every process; linear in the length of a text.

Not covered: `likeness` looks at words; a paraphrase is another text to it.
"""

from __future__ import annotations

import itertools
import math
import re
import zlib
from collections.abc import Iterable, Mapping

import numpy as np

EQUAL = 1e-9
"""Values that differ by less are the same."""
PAID = 0.8
"""Value from which on a response counts as paid."""
DISAGREE = 0.5
"""By how much the values of two tools for one response differ that are of two minds."""
LIKE_WORDS = 12
"""Words from which on a text can be like another one; shorter answers are alike because the questions are."""
LIKE_HEAD = 4000
"""Characters of a text that are looked at."""
SHINGLE, HASHES, BANDS = 3, 8, 2

_WORD = re.compile(r"\w+")
_MARKS = re.compile(r"^[ \t]*(?:[-*+•][ \t]|\d{1,2}[.)][ \t]|#{1,6}[ \t]|```|\|)|\*\*[^*\n]+\*\*", re.MULTILINE)
_ODD = np.random.default_rng(20260301).integers(1, 2**31, size=HASHES, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


def spread(values: Iterable[float]) -> float:
    """Largest minus smallest; 0 if there are none."""
    values = list(values)
    return max(values) - min(values) if values else 0.0


def flat(values: Iterable[float]) -> bool:
    """Whether all values are the same, so that GRPO has no gradient."""
    return spread(values) <= EQUAL


def ranked_alike(ours: Mapping[int, float], theirs: Mapping[int, float]) -> tuple[int, int]:
    """Of the pairs of responses to one prompt that both rank: how many there are, and how many are ranked alike.

    Args:
        ours: Values by session.
        theirs: Those of somebody else.
    """
    pairs = alike = 0
    for one, other in itertools.combinations(sorted(ours.keys() & theirs.keys()), 2):
        mine, other_mine = ours[one] - ours[other], theirs[one] - theirs[other]
        if min(abs(mine), abs(other_mine)) > EQUAL:
            pairs += 1
            alike += (mine > 0) == (other_mine > 0)
    return pairs, alike


def moments(pairs: Iterable[tuple[float, float]]) -> tuple[int, float, float, float]:
    """Number of pairs, and the sums of squares xx, yy and xy about their means: those of several groups can be added,
    and are then about each group's own means."""
    pairs = list(pairs)
    if not pairs:
        return 0, 0.0, 0.0, 0.0
    mean_x, mean_y = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
    xx = sum((x - mean_x) ** 2 for x, _ in pairs)
    yy = sum((y - mean_y) ** 2 for _, y in pairs)
    xy = sum((x - mean_x) * (y - mean_y) for x, y in pairs)
    return len(pairs), xx, yy, xy


def from_moments(xx: float, yy: float, xy: float) -> float | None:
    """Pearson's correlation, in [-1, 1]; None where one side does not vary."""
    return xy / math.sqrt(xx * yy) if xx > 1e-12 and yy > 1e-12 else None


def correlation(pairs: Iterable[tuple[float, float]]) -> tuple[float | None, int]:
    """Pearson's correlation, and of how many pairs; None for fewer than three, or where one side does not vary."""
    count, xx, yy, xy = moments(pairs)
    return (from_moments(xx, yy, xy) if count >= 3 else None), count


def marks(text: str) -> int:
    """How much a text is formatted: its bullets, numbers, headings, fences, tables' rows and words in bold."""
    return sum(1 for _ in _MARKS.finditer(text[:LIKE_HEAD]))


def likeness(text: str) -> tuple[int, ...]:
    """Numbers by which near copies are found: texts that share one of them are nearly the same.

    A min-hash over three words at a time, in `BANDS` bands: texts with 90 % of these in common are found in about nine
    of ten cases, texts with half of them in one of eight, with a third in one of fifty. Empty for a short text.
    """
    words = _WORD.findall(text[:LIKE_HEAD].lower())
    if len(words) < LIKE_WORDS:
        return ()
    shingles = {" ".join(words[at : at + SHINGLE]) for at in range(len(words) - SHINGLE + 1)}
    codes = np.fromiter((zlib.crc32(one.encode("utf-8", "surrogatepass")) for one in shingles), dtype=np.uint64)
    mixed = (codes[:, None] * _ODD[None, :]) % np.uint64(4294967291)  # a prime: each column is another order of them
    least = mixed.min(axis=0)
    size = HASHES // BANDS
    return tuple(zlib.crc32(least[band * size : (band + 1) * size].tobytes()) * BANDS + band for band in range(BANDS))


def g_test(before: Mapping[str, int], now: Mapping[str, int], *, expected: float = 2.0) -> float:
    """How likely counts as unlike as these are, or more so, if both come from the same shares.

    Args:
        before: Counts by name.
        now: Other ones, each of independent observations.
        expected: Names of which fewer are expected in either, if nothing has changed, count together.

    Returns:
        The p-value of the likelihood ratio (G), by its chi-square distribution; 1 where there is nothing to test.
    """
    total_before, total_now = sum(before.values()), sum(now.values())
    total = total_before + total_now
    if not total_before or not total_now:
        return 1.0
    cells: list[tuple[int, int]] = []
    rest = (0, 0)
    for name in sorted({*before, *now}):
        cell = (before.get(name, 0), now.get(name, 0))
        if sum(cell) * min(total_before, total_now) / total < expected:
            rest = (rest[0] + cell[0], rest[1] + cell[1])
        else:
            cells.append(cell)
    if sum(rest):
        cells.append(rest)
    if len(cells) < 2:
        return 1.0
    g = 0.0
    for cell in cells:
        for count, whole in zip(cell, (total_before, total_now), strict=True):
            if count:
                g += 2 * count * math.log(count * total / (sum(cell) * whole))
    return _beyond(g, len(cells) - 1)


def _beyond(x: float, degrees: int) -> float:
    """Chance of a chi-square of so many degrees of freedom above `x`."""
    half = x / 2
    if half <= 0:
        return 1.0
    total, term = (0.0, 0.0) if degrees % 2 == 0 else (math.erfc(math.sqrt(half)), math.log(4 * half / math.pi) / 2)
    for at in range(degrees // 2):
        total += math.exp(term - half)  # a logarithm: of thousands of degrees the term itself is no float
        term += math.log(half / (at + (1 if degrees % 2 == 0 else 1.5)))
    return min(total, 1.0)


def psi(before: Mapping[str, int], now: Mapping[str, int]) -> float:
    """Population stability index of two lots of counts, half an observation added to each; 0: the same shares. 0.1 is
    commonly called small, 0.25 large."""
    names = {*before, *now}
    if not names:
        return 0.0
    total_before, total_now = (sum(counts.values()) + 0.5 * len(names) for counts in (before, now))
    found = 0.0
    for name in sorted(names):
        old, new = (before.get(name, 0) + 0.5) / total_before, (now.get(name, 0) + 0.5) / total_now
        found += (new - old) * math.log(new / old)
    return found
