# SPDX-License-Identifier: Apache-2.0
"""What `recipes/benchmarks/step.py` makes of its times; the trainings themselves are for a quiet machine."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

STEP = Path(__file__).parent.parent / "recipes" / "benchmarks" / "step.py"


@pytest.fixture(scope="module")
def step() -> ModuleType:
    spec = importlib.util.spec_from_file_location("step_benchmark", STEP)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_a_step_waits_from_the_first_of_the_last_responses_to_the_last_score(step: ModuleType) -> None:
    assert step.last_wait([(10.0, 10.5)]) == 0.5
    together = [(10.1, 10.3), (10.0, 10.6), (10.25, 10.4)]
    assert step.last_wait(together) == pytest.approx(0.6)
    # what was scored while others were still generated holds nothing up, unless its score is the last one
    assert step.last_wait([(5.0, 5.2), *together]) == pytest.approx(0.6)
    assert step.last_wait([(5.0, 11.0), *together]) == pytest.approx(1.0)


def test_an_interval_has_the_median_in_it_and_is_the_same_each_time(step: ModuleType) -> None:
    values = [0.1 * number for number in range(31)]
    middle, low, high = step.interval(values)
    assert middle == pytest.approx(1.5) and low < middle < high
    assert step.interval(values) == (middle, low, high)


@pytest.mark.parametrize(
    ("low", "high", "says", "fine"),
    [(-0.01, 0.01, "reached", True), (0.03, 0.05, "missed", False), (0.01, 0.05, "not decided", False)],
)
def test_a_goal_that_an_interval_holds_is_not_decided(
    step: ModuleType, low: float, high: float, says: str, fine: bool
) -> None:
    figures = {"plugin_added_share": (low + high) / 2, "plugin_added_share_low": low, "plugin_added_share_high": high}
    ok, said = step.verdict(figures)
    assert ok is fine and says in said[0]
    assert not step.verdict({**figures, "missing_rows": 1})[0]


def test_scaling_is_no_worse_only_if_the_whole_interval_says_so(step: ModuleType) -> None:
    def figures(low: float, high: float) -> dict[str, float]:
        kept = {"scaling_kept_4": 1.0, "scaling_kept_4_low": low, "scaling_kept_4_high": high}
        return kept | {"processor_growth_4_low": 0.9, "processor_growth_4_high": 1.1}

    assert "no worse" in step.verdict(figures(1.0, 1.1))[1][0]
    assert "not decided" in step.verdict(figures(0.8, 1.2))[1][0]
    assert ": worse" in step.verdict(figures(0.7, 0.9))[1][0] and not step.verdict(figures(0.7, 0.9))[0]
