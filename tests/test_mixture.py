# SPDX-License-Identifier: Apache-2.0
"""Weights of mixtures: what they are learned from, and when a mixture is one."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest

from verl_rlar.mixture import Choice, Problem, adapt, fit, learn, log_odds, pooled, rank_first


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def choices(count: int, strength: dict[str, float], seed: int = 0, cluster: str = "", answers: int = 4) -> list[Choice]:
    """Prompts whose answers each tool judges by itself: the right one is better by its strength, in spreads."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        right = rng.randrange(answers)
        values = tuple(
            {tool: sigmoid(rng.gauss(good * (n == right), 1.0)) for tool, good in strength.items()}
            for n in range(answers)
        )
        made.append(Choice(values=values, right=tuple(n == right for n in range(answers)), cluster=cluster))
    return made


def first(made: list[Choice], weights: dict[str, float]) -> float:
    hits = [
        rank_first([sum(w * log_odds(v[t]) for t, w in weights.items()) for v in one.values], one.right) for one in made
    ]
    return sum(hits) / len(hits)


def test_the_weights_are_those_that_make_the_right_answers_likeliest() -> None:
    rng = np.random.default_rng(0)
    problems = [Problem(rng.normal(size=(5, 3)), np.arange(5) == 0) for _ in range(80)]
    for one in problems:
        one.odds[0] += (1.0, 0.3, -0.5)
    ridge = 2.0

    def likelihood(weights: np.ndarray) -> float:
        total = -ridge / 2 * float((weights**2).sum())
        for one in problems:
            utility = one.odds @ weights
            total += float(utility[0] - np.log(np.exp(utility).sum()))
        return total

    found = fit(problems, ridge)
    assert found[2] == 0.0, "a tool that is wrong more often than not is left out, not turned round"
    best = likelihood(found)
    for _ in range(300):
        assert likelihood(np.maximum(found + rng.normal(0, 0.02, 3), 0.0)) <= best + 1e-9


def test_tools_that_err_independently_are_better_together_and_that_is_known_before() -> None:
    strength = {"a": 1.2, "b": 1.1, "c": 1.0, "noise": 0.0}
    made = learn(choices(200, strength), list(strength))
    assert made is not None and made.gain_low > 0
    weights = dict(made.weights)
    assert weights.keys() >= {"a", "b", "c"} and weights.get("noise", 0.0) < 0.3 * weights["c"]
    fresh = choices(400, strength, seed=1)
    assert first(fresh, weights) > first(fresh, {made.best: 1.0}) + 0.1
    assert made.accuracy == pytest.approx(first(fresh, weights), abs=0.08), "what it says of held-out prompts is true"


def test_where_mixing_brings_nothing_no_gain_is_claimed() -> None:
    claims = 0
    for seed in range(10):
        made = learn(choices(80, {"good": 1.5, "noise": 0.0, "more noise": 0.0}, seed), ["good", "noise", "more noise"])
        assert made is not None
        claims += made.gain_low > 0
    assert claims <= 1


def test_labels_that_are_shuffled_teach_nothing() -> None:
    strength = {"a": 1.5, "b": 1.5}
    rng = random.Random(0)
    mixed = [replace(one, right=tuple(rng.sample(one.right, len(one.right)))) for one in choices(200, strength)]
    made = learn(mixed, list(strength))
    assert made is not None and made.accuracy < 0.35 and made.gain_low <= 0.05


def test_the_order_of_tools_and_the_run_change_nothing() -> None:
    made = choices(100, {"a": 1.0, "b": 0.8})
    one, other = learn(made, ["a", "b"]), learn(made, ["b", "a"])
    assert one is not None and other is not None and learn(made, ["a", "b"]) == one
    assert [name for name, _ in one.weights] == [name for name, _ in other.weights]
    assert [w for _, w in one.weights] == pytest.approx([w for _, w in other.weights], abs=1e-4)


def test_too_few_prompts_or_values_that_are_missing_are_no_evidence() -> None:
    assert learn(choices(39, {"a": 1.0, "b": 1.0}), ["a", "b"]) is None
    assert learn(choices(100, {"a": 1.0}), ["a"]) is None
    assert learn(choices(100, {"a": 1.0}), ["a", "b"]) is None
    unlabelled = [replace(one, right=(False,) * 4) for one in choices(100, {"a": 1.0, "b": 1.0})]
    assert learn(unlabelled, ["a", "b"]) is None


def test_a_cluster_has_weights_of_its_own_drawn_to_those_of_its_kind() -> None:
    tools = ["a", "b"]
    kind = learn(choices(200, {"a": 1.2, "b": 1.2}), tools)
    assert kind is not None
    other_way = choices(400, {"a": 0.0, "b": 1.5}, seed=2)

    def share(count: int) -> float:
        weights = dict(adapt(other_way[:count], kind, tools) or ())
        return weights.get("a", 0.0) / sum(weights.values())

    assert adapt(other_way[:19], kind, tools) is None
    whole = dict(kind.weights)["a"] / sum(weight for _, weight in kind.weights)
    assert whole > share(25) > share(100) > share(400)


def test_odds_are_pooled_by_weight_and_no_tool_is_sure_beyond_all_others() -> None:
    assert pooled([(1.0, 0.8)]) == pytest.approx(0.8)
    assert pooled([(2.0, 0.8), (2.0, 0.2)]) == pytest.approx(0.5)
    assert pooled([(3.0, 0.7), (1.0, 0.7)]) == pytest.approx(0.7)
    assert 0.4 < pooled([(1.0, 0.0), (1.0, 0.99)]) < 0.6


def test_a_tie_at_the_top_counts_by_its_share_of_right_answers() -> None:
    assert rank_first([2, 1, 0], [True, False, False]) == 1.0
    assert rank_first([1, 2, 0], [True, False, False]) == 0.0
    assert rank_first([2, 2, 0], [True, False, False]) == 0.5
    assert rank_first([2, 2, 2, 2], [True, False, False, False]) == 0.25
