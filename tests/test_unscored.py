# SPDX-License-Identifier: Apache-2.0
"""An outage must not bend the gradient: shown on verl's own GRPO advantage (I4)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

core_algos = pytest.importorskip("verl.trainer.ppo.core_algos", reason="verl is not installed")

RESPONSE_LENGTH = 3


def advantages(rewards: list[float], *, norm_by_std: bool = True) -> torch.Tensor:
    """verl's GRPO advantages of one group, shape (n,)."""
    n = len(rewards)
    token_rewards = torch.zeros(n, RESPONSE_LENGTH)
    token_rewards[:, -1] = torch.tensor(rewards)
    result, _ = core_algos.compute_grpo_outcome_advantage(
        token_level_rewards=token_rewards,
        response_mask=torch.ones(n, RESPONSE_LENGTH),
        index=np.array(["group"] * n, dtype=object),
        norm_adv_by_std_in_grpo=norm_by_std,
    )
    return result[:, -1]


def bound_late(scores: list[float | None], neutral: float = 0.5) -> list[float]:
    """What the reward manager sends for a group with unscored responses."""
    scored = [score for score in scores if score is not None]
    fill = sum(scored) / len(scored) if scored else neutral
    return [fill if score is None else score for score in scores]


values = st.lists(st.integers(0, 20).map(lambda n: n / 20), min_size=3, max_size=12)


@settings(deadline=None, max_examples=200)
@given(values=values, lost=st.integers(0, 11))
def test_one_outage_leaves_sign_order_and_mean_of_the_others_and_scales_them_by_a_known_factor(
    values: list[float], lost: int
) -> None:
    lost %= len(values)
    n, others = len(values), values[:lost] + values[lost + 1 :]
    assume(max(others) - min(others) > 0.01)
    scores: list[float | None] = [None if i == lost else value for i, value in enumerate(values)]
    with_outage, without = advantages(bound_late(scores)), advantages(others)
    kept = torch.cat([with_outage[:lost], with_outage[lost + 1 :]])
    assert abs(with_outage[lost]) < 1e-4
    assert torch.equal(torch.argsort(kept, stable=True), torch.argsort(without, stable=True))
    assert abs(kept.mean()) < 1e-4
    torch.testing.assert_close(kept, without * math.sqrt((n - 1) / (n - 2)), rtol=1e-3, atol=1e-3)


def test_without_normalisation_by_the_standard_deviation_the_others_are_as_they_were() -> None:
    others = [0.0, 0.25, 1.0]
    with_outage = advantages(bound_late([None, *others]), norm_by_std=False)
    torch.testing.assert_close(with_outage[1:], advantages(others, norm_by_std=False), rtol=0, atol=1e-6)
    assert abs(with_outage[0]) < 1e-6


def test_the_scale_grows_by_the_factor_that_the_docstring_states() -> None:
    scored = [0.0, 0.2, 0.4, 0.6, 1.0]
    kept = advantages(bound_late([None, *scored, None, None]))[1:6]
    torch.testing.assert_close(kept, advantages(scored) * math.sqrt(7 / 4), rtol=1e-4, atol=1e-4)


def test_a_wholly_failed_group_gives_no_gradient() -> None:
    assert torch.equal(advantages(bound_late([None] * 4)), torch.zeros(4))


def test_a_group_with_one_scored_response_gives_no_gradient() -> None:
    assert advantages(bound_late([None, 1.0, None, None])).abs().max() < 1e-4


def test_a_zero_in_place_of_an_outage_would_bend_it() -> None:
    honest, bent = advantages([1.0, 1.0, 0.5]), advantages([0.0, 1.0, 1.0, 0.5])
    assert honest[2] < 0 and bent[3] < 0 < bent[1]
    assert not torch.equal(torch.sign(honest[:2]), torch.sign(bent[[0, 1]])), (
        "the lost answer is pushed down for our fault"
    )
