# SPDX-License-Identifier: Apache-2.0
"""Calibration: a tool's monotone map from its raw scores to [0, 1], learned from its answers in the exam.

Raw scores of unlike tools cannot be mixed: a reward model's logit of 12, a chrF of 61 and an error count of 3 share no
scale. After `fit`, a value is the estimated chance that the response is right where right and wrong ones are equally
many, whatever tool it came from and however many of either its exam had.

- A tool whose values already mean that (rules, verifiers) keeps them: `identity` maps its range linearly to [0, 1].
- Else the direction is detected (an error count: lower is better), and two monotone maps compete: *isotonic* regression
  (pool adjacent violators), and *quantile* bins with a monotone step through them. The one with the smaller log loss in
  cross-validation is taken; both losses stay with the result.

Guarantees: deterministic; monotone, and strictly so within the range that was seen, so that the order of the responses
of a group, and with it the advantages' signs, is what the tool said; values are in [0, 1]; beyond the range that was
seen the map is flat: a score that no answer of the exam had earns nothing on top (`verl_rlar.life` watches how many
there are).
Serialisable (`as_dict`, `from_dict`) without a change of any value. Standard library only: adjacent violators are a
dozen lines, and SciPy would be the largest dependency.

Not covered: drift. Where the policy's answers are unlike the exam's, the chance is that of the exam.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from verl_rlar.errors import DataError

LEAST = 10
"""Good and bad answers, of each, that a map is learned from at least."""
FOLDS = 5
SLOPE = 0.02
"""Share of a value that is its place in the seen range: so that no two raw scores in it become one."""
BINS = 20
"""Most bins of the quantile map."""
ROUND = 9
"""Decimals of what is stored."""

Pair = tuple[float, bool]
Weights = tuple[float, float]
"""Of a wrong and of a right answer; all together they weigh as much as there are answers, and half of it either."""
Knots = tuple[tuple[float, float], ...]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A monotone map from raw scores to [0, 1]: ``calibration(raw)``."""

    method: Literal["identity", "isotonic", "quantile"]
    lower_is_better: bool = False
    knots: Knots = ()
    """Raw score (its sign turned, if lower is better) and chance of being right; straight lines between them. Empty for
    ``identity``."""
    low: float = 0.0
    """Identity: raw score that maps to 0. Else: the lowest raw score that was seen."""
    high: float = 1.0
    """Identity: raw score that maps to 1. Else: the highest raw score that was seen."""
    losses: Mapping[str, float] = field(default_factory=dict)
    """Mean log loss in cross-validation, by method."""
    ranking: float | None = None
    """Share of pairs of a good and a bad answer that the raw scores rank rightly (ties count half); None: identity."""
    good: int = 0
    """Right answers that it was learned from."""
    bad: int = 0
    """Wrong answers that it was learned from."""

    def __call__(self, raw: float) -> float:
        """The value of a raw score.

        Args:
            raw: A finite number.
        """
        if self.method == "identity":
            return min(1.0, max(0.0, (raw - self.low) / (self.high - self.low)))
        seen = min(self.high, max(self.low, raw))
        place = (seen - self.low) / (self.high - self.low)
        place, x = (1.0 - place, -seen) if self.lower_is_better else (place, seen)
        return min(1.0, max(0.0, (1.0 - SLOPE) * _line(self.knots, x) + SLOPE * place))

    def covers(self, raw: float) -> bool:
        """Whether a raw score lies in the range that was seen."""
        return min(self.low, self.high) <= raw <= max(self.low, self.high)

    def as_dict(self) -> dict[str, Any]:
        """As JSON-like containers."""
        return asdict(self) | {"knots": [list(knot) for knot in self.knots], "losses": dict(self.losses)}

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Calibration:
        """What `as_dict` gave, also after JSON."""
        return cls(**{**tree, "knots": tuple((float(x), float(y)) for x, y in tree["knots"])})


def identity(low: float, high: float) -> Calibration:
    """The linear map of a tool's declared range, for a tool whose values already mean it.

    Args:
        low: Raw score that maps to 0.
        high: Raw score that maps to 1; below `low` if lower is better.
    """
    return Calibration(method="identity", low=low, high=high, lower_is_better=low > high)


def fit(answers: Sequence[Pair]) -> Calibration:
    """Learns a map.

    Args:
        answers: Raw score and whether the response was right; at least `LEAST` of either.

    Raises:
        DataError: There are too few answers, a raw score is not finite, or all are the same.
    """
    good = [raw for raw, right in answers if right]
    bad = [raw for raw, right in answers if not right]
    if min(len(good), len(bad)) < LEAST:
        raise DataError(
            f"calibration needs {LEAST} right and {LEAST} wrong answers, there are {len(good)} and {len(bad)}: "
            "examine the tool on more queries"
        )
    if not all(map(math.isfinite, (*good, *bad))):
        raise DataError("calibration: a raw score is not finite")
    low, high = min(*good, *bad), max(*good, *bad)
    if low == high:
        raise DataError(f"calibration: every raw score is {low!r}")
    ranking = rank_accuracy(good, bad)
    lower = ranking < 0.5
    pairs = sorted((-raw if lower else raw, right) for raw, right in answers)
    makers = {"isotonic": _isotonic, "quantile": _quantile}
    weights = len(pairs) / (2 * len(bad)), len(pairs) / (2 * len(good))
    losses = {name: round(_cross_validated(maker, pairs, weights), ROUND) for name, maker in makers.items()}
    method: Literal["isotonic", "quantile"] = "isotonic" if losses["isotonic"] <= losses["quantile"] else "quantile"
    return Calibration(
        method=method,
        lower_is_better=lower,
        knots=tuple((round(x, ROUND), round(y, ROUND)) for x, y in makers[method](pairs, weights)),
        low=low,
        high=high,
        losses=losses,
        ranking=max(ranking, 1.0 - ranking),
        good=len(good),
        bad=len(bad),
    )


def rank_accuracy(good: Sequence[float], bad: Sequence[float]) -> float:
    """Share of all pairs of a good and a bad score in which the good one is higher; ties count half; in [0, 1]."""
    ordered = sorted(bad)
    total, at, wins = len(good) * len(bad), 0, 0.0
    below = 0
    for score in sorted(good):
        while below < len(ordered) and ordered[below] < score:
            below += 1
        at = max(at, below)
        while at < len(ordered) and ordered[at] <= score:
            at += 1
        wins += below + 0.5 * (at - below)
    return wins / total


# --- The maps ---------------------------------------------------------------------------------------------------------


def pool(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The non-decreasing sequence that is nearest to `values` in weighted squares (pool adjacent violators)."""
    blocks: list[tuple[float, float, int]] = []  # mean, weight, length
    for value, weight in zip(values, weights, strict=True):
        length = 1
        while blocks and blocks[-1][0] >= value:
            mean, mass, before = blocks.pop()
            value, weight = (mean * mass + value * weight) / (mass + weight), mass + weight
            length += before
        blocks.append((value, weight, length))
    return [mean for mean, _, length in blocks for _ in range(length)]


Bin = tuple[float, float, float]
"""Weighted: sum of the raw scores, right answers, answers."""


def _isotonic(pairs: Sequence[Pair], weights: Weights) -> Knots:
    ties: list[Bin] = []
    last: float | None = None
    for x, right in pairs:
        if x != last:
            ties.append((0.0, 0.0, 0.0))
            last = x
        ties[-1] = _plus(ties[-1], (weights[right] * x, weights[right] * right, weights[right]))
    means = pool([right / count for _, right, count in ties], [count for _, _, count in ties])
    blocks: list[Bin] = []
    before: float | None = None
    for mean, tie in zip(means, ties, strict=True):
        if mean != before:
            blocks.append((0.0, 0.0, 0.0))
            before = mean
        blocks[-1] = _plus(blocks[-1], tie)
    return _knots(blocks)


def _quantile(pairs: Sequence[Pair], weights: Weights) -> Knots:
    size = len(pairs) / min(BINS, max(2, math.isqrt(len(pairs))))
    bins: list[Bin] = [(0.0, 0.0, 0.0)]
    last: float | None = None
    for x, right in pairs:
        if bins[-1][2] >= size and x != last:
            bins.append((0.0, 0.0, 0.0))
        bins[-1] = _plus(bins[-1], (weights[right] * x, weights[right] * right, weights[right]))
        last = x
    return _knots(bins)


def _plus(one: Bin, other: Bin) -> Bin:
    return one[0] + other[0], one[1] + other[1], one[2] + other[2]


def _knots(bins: Sequence[Bin]) -> Knots:
    """Centre and chance of every bin, drawn by one answer towards a half: no chance is 0 or 1, small bins say less."""
    chances = pool([(right + 0.5) / (count + 1) for _, right, count in bins], [count for _, _, count in bins])
    return tuple((total / count, chance) for (total, _, count), chance in zip(bins, chances, strict=True))


def _line(knots: Knots, x: float) -> float:
    at = bisect_right(knots, (x, math.inf))
    if at == 0 or at == len(knots):
        return knots[0 if at == 0 else -1][1]
    (x0, y0), (x1, y1) = knots[at - 1], knots[at]
    return y0 + (y1 - y0) * ((x - x0) / (x1 - x0))


def _cross_validated(maker: Any, pairs: Sequence[Pair], weights: Weights) -> float:
    """Mean weighted log loss over folds; every fifth answer in the order of the scores is in a fold, of either sort."""
    numbered: list[tuple[int, Pair]] = []
    for wanted in (False, True):
        numbered += list(enumerate(pair for pair in pairs if pair[1] is wanted))
    loss = 0.0
    for fold in range(FOLDS):
        knots = maker(sorted(pair for number, pair in numbered if number % FOLDS != fold), weights)
        for number, (x, right) in numbered:
            if number % FOLDS == fold:
                chance = min(1 - 1e-6, max(1e-6, _line(knots, x)))
                loss -= weights[right] * math.log(chance if right else 1.0 - chance)
    return loss / len(pairs)
