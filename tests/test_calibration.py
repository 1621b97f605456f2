# SPDX-License-Identifier: Apache-2.0
"""Calibration: monotone, in [0, 1], deterministic, and fair between tools of unlike scales."""

from __future__ import annotations

import json
import math
import random
from itertools import pairwise

import planted
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_rlar.calibration import LEAST, Calibration, Pair, fit, identity, pool, rank_accuracy
from verl_rlar.errors import DataError

numbers = st.floats(-1e6, 1e6, allow_nan=False)
answers_of_both_sorts = st.tuples(
    st.lists(numbers, min_size=LEAST, max_size=40), st.lists(numbers, min_size=LEAST, max_size=40)
).map(lambda both: [(raw, True) for raw in both[0]] + [(raw, False) for raw in both[1]])


def drawn(seed: int, count: int = 400, *, scale: float = 1.0, shift: float = 0.0, skill: float = 1.5) -> list[Pair]:
    """Answers of a tool whose raw scores are normal, and higher by `skill` deviations for right answers."""
    rng = random.Random(seed)
    pairs = []
    for _ in range(count):
        right = rng.random() < 0.5
        pairs.append((shift + scale * rng.gauss(skill if right else 0.0, 1.0), right))
    return pairs


@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(1, 5)), min_size=1, max_size=9))
def test_pooling_gives_the_nearest_monotone_sequence(pairs: list[tuple[int, int]]) -> None:
    """Against the closed form: the largest, over starts, of the smallest mean, over ends."""
    values, weights = [float(v) for v, _ in pairs], [float(w) for _, w in pairs]

    def mean(a: int, b: int) -> float:
        return sum(v * w for v, w in pairs[a : b + 1]) / sum(w for _, w in pairs[a : b + 1])

    last = len(pairs)
    wanted = [max(min(mean(a, b) for b in range(i, last)) for a in range(i + 1)) for i in range(last)]
    assert pool(values, weights) == pytest.approx(wanted)


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=12), st.lists(st.integers(-5, 5), min_size=1, max_size=12))
def test_rank_accuracy_is_the_share_of_pairs(good: list[int], bad: list[int]) -> None:
    wins = [1.0 if g > b else 0.5 if g == b else 0.0 for g in good for b in bad]
    assert rank_accuracy(good, bad) == pytest.approx(sum(wins) / len(wins))


@settings(deadline=None, max_examples=60)
@given(answers_of_both_sorts, st.lists(numbers, min_size=2, max_size=20))
def test_a_map_is_monotone_and_in_range_everywhere(answers: list[Pair], raws: list[float]) -> None:
    if len({raw for raw, _ in answers}) == 1:
        return
    made = fit(answers)
    ordered = sorted(raws, reverse=made.lower_is_better)
    values = [made(raw) for raw in ordered]
    assert all(0.0 <= value <= 1.0 for value in values)
    assert all(a <= b + 1e-12 for a, b in pairwise(values))


def test_no_two_scores_in_the_seen_range_become_one() -> None:
    made = fit(drawn(1))
    steps = [made.low + (made.high - made.low) * i / 500 for i in range(501)]
    values = [made(raw) for raw in steps]
    assert all(a < b for a, b in pairwise(values))


def test_a_value_is_the_chance_of_being_right() -> None:
    made, fresh = fit(drawn(2, 2_000)), drawn(3, 4_000)
    for low in (0.0, 0.25, 0.5, 0.75):
        inside = [right for raw, right in fresh if low <= made(raw) < low + 0.25]
        assert low - 0.05 <= sum(inside) / len(inside) <= low + 0.30


def test_lower_is_better_is_detected() -> None:
    answers = [(-raw, right) for raw, right in drawn(4)]
    made = fit(answers)
    assert made.lower_is_better and made(-3.0) > made(0.0) > made(3.0)
    assert made.ranking == fit(drawn(4)).ranking


def test_calibration_is_deterministic_and_the_order_of_answers_does_not_matter() -> None:
    answers = drawn(5)
    assert fit(answers) == fit(answers[::-1])


def test_a_calibration_survives_json() -> None:
    for made in (fit(drawn(6)), identity(10.0, 0.0)):
        again = Calibration.from_dict(json.loads(json.dumps(made.as_dict())))
        assert again == made and again(0.3) == made(0.3)


def test_the_method_with_the_smaller_loss_is_taken() -> None:
    made = fit(drawn(7))
    assert made.losses[made.method] == min(made.losses.values()) < math.log(2)


def test_rules_keep_their_values_and_their_direction() -> None:
    spec = planted.error_rate.spec
    lower = identity(spec.low, spec.high)
    assert lower.method == "identity" and lower(8.0) == 0.0 and lower(2.0) == 0.75 and lower(0.0) == 1.0
    assert lower.covers(2.0) and not lower.covers(9.0)


@pytest.mark.parametrize(
    "answers", [[(1.0, True)] * 50, [(1.0, True), (1.0, False)] * 20, [(math.nan, True), (1.0, False)] * 20]
)
def test_without_evidence_there_is_no_calibration(answers: list[Pair]) -> None:
    with pytest.raises(DataError, match="calibration"):
        fit(answers)


def test_scores_outside_the_seen_range_are_flat_and_not_covered() -> None:
    made = fit(drawn(9))
    assert made(1e9) == made(made.high) and made(-1e9) == made(made.low)
    assert made.covers(0.5) and not made.covers(1e9) and not made.covers(-1e9)


def test_unlike_tools_mix_fairly_once_calibrated() -> None:
    """A logit, a share and an error count in one pool: right answers of one against wrong answers of the others."""
    scales = ({"scale": 6.0, "shift": 10.0}, {"scale": 0.1, "shift": 0.3}, {"scale": -3.0, "shift": 5.0})
    tools = [(fit(drawn(i, 600, **scale)), drawn(90 + i, 600, **scale)) for i, scale in enumerate(scales)]

    def accuracy(pairs: list[Pair]) -> float:
        return rank_accuracy([raw for raw, right in pairs if right], [raw for raw, right in pairs if not right])

    own = sum(accuracy([(made(raw), right) for raw, right in fresh]) for made, fresh in tools) / len(tools)
    mixed = accuracy([(made(raw), right) for made, fresh in tools for raw, right in fresh])
    raw_mix = accuracy([pair for _, fresh in tools for pair in fresh])
    assert mixed > own - 0.01
    assert raw_mix < own - 0.15
