# SPDX-License-Identifier: Apache-2.0
"""Weights of a mixture of tools, learned from labelled answers: which tools know something that the others do not?

A prompt with a right answer and some wrong ones is a choice among them. `fit` finds the weights that make the right
ones likeliest if an answer is chosen with probability proportional to exp(sum of weight x log-odds of the tool's
value): a conditional logit, which is the Plackett-Luce model of a first rank (McFadden 1974, Plackett 1975). The
weights of one cluster are drawn to those of its kind (ridge), the more so the fewer prompts it has.

Guarantees: no weight is negative, as a reward must not pay for being thought worse of by a tool; deterministic; the
best ridge, and the gain over the best single tool, come from prompts that the fit did not see (cross-validation over
prompts, the single tool chosen on the same other prompts), so `Mixture.gain_low` above 0 means that mixing pays; a tool
that adds nothing gets no weight, and costs nothing then.

Not covered: weights do not depend on the prompt beyond its cluster; a prompt without a value of every tool in the pool
is left out. Labelled answers of one style teach that style."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

EDGE = 0.01
"""Values nearer to 0 or 1 than this count as this: no single tool can be sure beyond all others."""
RIDGES = (0.3, 1.0, 3.0, 10.0)
"""Strengths of the pull to 0 that are tried, in prompts."""
TO_KIND = 10.0
"""Strength of the pull of a cluster's weights to those of its kind."""
FOLDS = 5
LEAST = 40
"""Fewest labelled prompts for a mixture; fewer for a cluster (`LEAST_OF_CLUSTER`), which has its kind to lean on."""
LEAST_OF_CLUSTER = 20
SMALLEST = 0.02
"""Share in the sum of the weights below which a tool is left out."""
Z = 1.645
"""Of the lower end of a gain: 95 % of the time it is more."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A prompt with labelled answers."""

    values: tuple[Mapping[str, float], ...]
    """For every answer, each tool's calibrated value in [0, 1], by the tool's digest or name."""
    right: tuple[bool, ...]
    """For every answer, whether it is right."""
    cluster: str = ""


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """What was learned."""

    weights: tuple[tuple[str, float], ...]
    """By tool, those above 0, the largest first. They are the log-odds' factors; as shares they sum to what they
    sum."""
    prompts: int
    """Prompts that it was learned from."""
    accuracy: float
    """How often, on prompts that were held out, the right answer ranked first (`rank_first`), in [0, 1]."""
    best: str
    """The tool that is best by itself."""
    best_accuracy: float
    """The same of the tool that is best on the prompts that were not held out."""
    gain_low: float
    """Lower end of the gain of mixing over the best single tool, paired over prompts."""


def log_odds(value: float) -> float:
    """ln(value / (1 - value)), with the value kept `EDGE` away from 0 and 1."""
    kept = min(1.0 - EDGE, max(EDGE, value))
    return math.log(kept / (1.0 - kept))


def pooled(parts: Sequence[tuple[float, float]]) -> float:
    """One value in [0, 1] out of weights and values: the odds' mean, geometric and weighted.

    Args:
        parts: Weight and value; the weights' sum is above 0.
    """
    total = sum(weight for weight, _ in parts)
    return 1.0 / (1.0 + math.exp(-sum(weight * log_odds(value) for weight, value in parts) / total))


def rank_first(scores: Sequence[float], right: Sequence[bool]) -> float:
    """Whether a right answer has the highest score: 1 or 0; among several highest, the share of right ones (so two that
    tie count half), as RewardBench 2 counts."""
    top = max(scores)
    firsts = [good for score, good in zip(scores, right, strict=True) if score >= top - 1e-12]
    return sum(firsts) / len(firsts)


def learn(choices: Sequence[Choice], tools: Sequence[str], *, least: int = LEAST) -> Mixture | None:
    """Learns the mixture of a kind, over all its clusters.

    Args:
        choices: Labelled prompts.
        tools: The pool.
        least: Fewest prompts.

    Returns:
        None if there are too few prompts with a value of every tool, or less than two tools.
    """
    problems = _problems(choices, tools)
    if len(problems) < least or len(tools) < 2:
        return None
    folds = [list(range(fold, len(problems), FOLDS)) for fold in range(FOLDS)]
    by_ridge: dict[float, dict[int, float]] = {ridge: {} for ridge in RIDGES}
    single: dict[int, float] = {}
    alone = np.array([[_first(p.odds[:, k], p.right) for k in range(len(tools))] for p in problems])
    for fold in folds:
        rest = sorted(set(range(len(problems))) - set(fold))
        best = int(alone[rest].mean(axis=0).argmax())
        learned = {ridge: fit([problems[n] for n in rest], ridge) for ridge in RIDGES}
        for n in fold:
            single[n] = float(alone[n, best])
            for ridge, weights in learned.items():
                by_ridge[ridge][n] = _first(problems[n].odds @ weights, problems[n].right)
    ridge = max(RIDGES, key=lambda r: (sum(by_ridge[r].values()), r))
    gains = np.array([by_ridge[ridge][n] - single[n] for n in range(len(problems))])
    weights = fit(problems, ridge)
    at = int(alone.mean(axis=0).argmax())
    return Mixture(
        weights=_named(weights, tools) or ((tools[at], 1.0),),
        prompts=len(problems),
        accuracy=sum(by_ridge[ridge].values()) / len(problems),
        best=tools[at],
        best_accuracy=sum(single.values()) / len(problems),
        gain_low=float(gains.mean() - Z * gains.std(ddof=1) / math.sqrt(len(gains))),
    )


def adapt(choices: Sequence[Choice], kind: Mixture, tools: Sequence[str]) -> tuple[tuple[str, float], ...] | None:
    """The weights of one cluster, drawn to those of its kind.

    Args:
        choices: Labelled prompts of the cluster.
        kind: The mixture of the kind.
        tools: The same pool.

    Returns:
        None if there are too few prompts: the kind's weights hold.
    """
    problems = _problems(choices, tools)
    if len(problems) < LEAST_OF_CLUSTER:
        return None
    known = dict(kind.weights)
    centre = np.array([known.get(tool, 0.0) for tool in tools])
    return _named(fit(problems, TO_KIND, centre), tools) or None


# --- The fit ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A prompt's answers as numbers: log-odds, answers x tools; and which are right."""

    odds: np.ndarray
    right: np.ndarray


def _problems(choices: Sequence[Choice], tools: Sequence[str]) -> list[Problem]:
    found = []
    for choice in choices:
        whole = all(tool in values for values in choice.values for tool in tools)
        if whole and any(choice.right) and not all(choice.right):
            odds = np.array([[log_odds(values[tool]) for tool in tools] for values in choice.values])
            found.append(Problem(odds, np.array(choice.right, dtype=bool)))
    return found


def _first(scores: np.ndarray, right: np.ndarray) -> float:
    return float(right[scores >= scores.max() - 1e-12].mean())


def _named(weights: np.ndarray, tools: Sequence[str]) -> tuple[tuple[str, float], ...]:
    kept = [(tool, round(float(w), 6)) for tool, w in zip(tools, weights, strict=True) if w > SMALLEST * weights.sum()]
    return tuple(sorted(kept, key=lambda pair: (-pair[1], pair[0])))


def fit(problems: Sequence[Problem], ridge: float, centre: np.ndarray | None = None) -> np.ndarray:
    """The weights, at least 0, that make the right answers likeliest, less ``ridge / 2`` times the squared distance
    from `centre` (None: 0). A projected Newton method on a concave function; ends within 100 steps.

    Args:
        problems: At least one. Each right answer counts as a choice among itself and the wrong ones.
        ridge: Above 0.
        centre: A weight of at least 0 for each tool.
    """
    rows = [
        np.concatenate([p.odds[n : n + 1], p.odds[~p.right]]) for p in problems for n in np.flatnonzero(p.right)
    ]  # the chosen one comes first
    most, tools = max(map(len, rows)), rows[0].shape[1]
    odds = np.zeros((len(rows), most, tools))
    there = np.zeros((len(rows), most), dtype=bool)
    for n, row in enumerate(rows):
        odds[n, : len(row)], there[n, : len(row)] = row, True
    start = np.zeros(tools) if centre is None else centre.astype(float)

    def chances(weights: np.ndarray) -> tuple[float, np.ndarray]:
        utility = np.where(there, odds @ weights, -np.inf)
        utility -= utility.max(axis=1, keepdims=True)
        mass = np.exp(utility)
        total = mass.sum(axis=1)
        gain = float((utility[:, 0] - np.log(total)).sum() - ridge / 2 * ((weights - start) ** 2).sum())
        return gain, mass / total[:, None]

    weights = start.copy()
    value, chance = chances(weights)
    for _ in range(100):
        mean = np.einsum("na,nak->nk", chance, odds)
        slope = (odds[:, 0] - mean).sum(axis=0) - ridge * (weights - start)
        spread = np.einsum("na,nak,nal->kl", chance, odds, odds) - mean.T @ mean + ridge * np.eye(tools)
        free = (weights > 0) | (slope > 0)
        step = np.zeros(tools)
        if free.any():
            step[free] = np.linalg.solve(spread[np.ix_(free, free)], slope[free])
        size, moved = 1.0, weights
        while size > 1e-6:
            moved = np.maximum(weights + size * step, 0.0)
            value_there, chance_there = chances(moved)
            if value_there >= value:
                break
            size /= 2
        else:
            break
        change = float(np.abs(moved - weights).max())
        weights, value, chance = moved, value_there, chance_there
        if change < 1e-7:
            break
    return weights
