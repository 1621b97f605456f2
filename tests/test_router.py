# SPDX-License-Identifier: Apache-2.0
"""Routes that the settings declare, and how their parts make a score."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from conftest import make_query, make_sample

from verl_rlar.config import RoutingConfig, ScoringConfig, parse
from verl_rlar.errors import ConfigError
from verl_rlar.library import builtin_snapshot
from verl_rlar.router import FeatureRouter, RouteCache
from verl_rlar.scoring import Scorer
from verl_rlar.types import Kind, Outcome, Query, Route, RoutePart, Sample, Snapshot, ToolSpec, Verdict

SNAPSHOT = builtin_snapshot()


def routing(**routes: Any) -> RoutingConfig:
    return parse({"routing": {"routes": routes}}).routing


async def route(config: RoutingConfig, query: Query, split: Any = "train", snapshot: Snapshot = SNAPSHOT) -> Route:
    router = FeatureRouter(config)
    router.check(snapshot)
    return await RouteCache(router).route(query, snapshot, split)


async def test_a_declared_route_comes_before_what_the_row_makes_checkable() -> None:
    config = routing(mix={"kinds": ["math"], "parts": [{"tool": "final_answer", "weight": 3}, {"tool": "exact_match"}]})
    made = await route(config, make_query())
    assert [(part.tool, part.weight) for part in made.parts] == [("final_answer", 3.0), ("exact_match", 1.0)]
    assert made.covered and made.kind is Kind.MATH and "rlar.routing.routes.mix" in made.reason
    other = await route(config, make_query("Who wrote Faust?", "Goethe"))
    assert [part.tool for part in other.parts] != [part.tool for part in made.parts]


async def test_training_and_validation_may_have_routes_of_their_own() -> None:
    config = routing(strict={"split": "val", "parts": [{"tool": "exact_match"}]})
    assert (await route(config, make_query(), "train")).name == "final_answer"
    assert (await route(config, make_query(), "val")).name == "exact_match"


async def test_a_route_may_ask_for_columns_that_a_row_must_have() -> None:
    config = routing(marked={"columns": ["strict"], "parts": [{"tool": "exact_match"}]})
    assert (await route(config, make_query())).name == "final_answer"
    assert (await route(config, make_query(strict=True))).name == "exact_match"


async def test_of_several_tools_the_first_one_applies_that_fits_the_query() -> None:
    config = routing(first={"parts": [{"tool": ["unit_tests", "final_answer", "exact_match"]}]})
    assert (await route(config, make_query())).name == "final_answer"
    assert (await route(config, make_query("Who wrote Faust?", "Goethe"))).name == "exact_match"
    assert "first" not in (await route(config, make_query("How are you?", None))).reason, "none of them fits"


async def test_a_declared_route_whose_tool_is_gone_gives_way() -> None:
    config = routing(mix={"kinds": ["math"], "parts": [{"tool": "final_answer"}, {"tool": "exact_match"}]})
    left = Snapshot(tools=tuple(tool for tool in SNAPSHOT.tools if tool.name != "exact_match"))
    assert (await RouteCache(FeatureRouter(config)).route(make_query(), left)).name == "final_answer"


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"parts": [{"tool": "exact_mach"}]}, r"rlar\.routing\.routes\.mix.*'exact_mach'"),
        ({"parts": [{"tool": "exact_match", "gate": True}]}, "a route needs a part that is no gate"),
        ({"parts": [{"tool": "exact_match", "weight": {"0": 0.0}}]}, "a route needs a part that is no gate"),
        ({"parts": [{"tool": "exact_match", "weight": -1}]}, "a weight is a finite number of at least 0"),
        ({"parts": []}, "at least 1 item"),
        ({"kind": ["math"], "parts": [{"tool": "exact_match"}]}, r"unknown key rlar\.routing\.routes\.mix\.kind, did"),
        ({"parts": [{"tool": "x", "wait": 1}]}, r"unknown key rlar\.routing\.routes\.mix\.parts\.0\.wait, did you"),
    ],
)
async def test_what_is_wrong_with_a_declared_route_is_named(declared: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        await route(routing(mix=declared), make_query())


# --- Scoring ----------------------------------------------------------------------------------------------------------


class Values:
    """A runner whose tools give the values that stand in their names; counts its calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    async def run(self, spec: ToolSpec, sample: Sample) -> Verdict:
        self.calls.append(spec.name)
        said = spec.name.rpartition("_")[2]
        return Verdict(value=None if said == "none" else float(said) / 100, reason=spec.name)


def named(name: str) -> ToolSpec:
    return replace(SNAPSHOT.tool("final_answer"), name=name)


async def scored(step: int, *parts: RoutePart) -> tuple[Any, list[str]]:
    snapshot = Snapshot(tools=tuple(named(part.tool) for part in parts))
    made = Route(parts=parts, reason="", kind=Kind.MATH, covered=True, snapshot=snapshot.version)
    runner = Values()
    return await Scorer(ScoringConfig(), runner).score(make_sample(step=step), made, snapshot), runner.calls


def of(tool: str, **fields: Any) -> RoutePart:
    return RoutePart(tool=tool, digest=named(tool).digest, **fields)


async def test_weights_are_shares_whatever_they_sum_to() -> None:
    score, _ = await scored(0, of("a_100", weight=3.0), of("b_0", weight=1.0))
    assert score.value == pytest.approx(0.75)


async def test_parts_of_a_learned_mixture_are_pooled_by_their_log_odds() -> None:
    score, _ = await scored(0, of("a_80", weight=2.0, odds=True), of("b_20", weight=1.0, odds=True))
    assert score.value == pytest.approx(1 / (1 + 4 ** (-1 / 3)))
    score, _ = await scored(0, of("a_80", weight=2.0), of("b_20", weight=1.0))
    assert score.value == pytest.approx(0.6)


@pytest.mark.parametrize(("step", "value"), [(0, 1.0), (10, 1.0), (15, 2 / 3), (20, 0.5), (99, 0.5)])
async def test_a_weight_moves_with_the_step_and_a_tool_without_one_is_not_asked(step: int, value: float) -> None:
    score, calls = await scored(step, of("a_100"), of("b_0", schedule=((10, 0.0), (20, 1.0))))
    assert score.value == pytest.approx(value)
    assert calls == (["a_100"] if step <= 10 else ["a_100", "b_0"])


async def test_behind_a_gate_that_is_shut_no_tool_is_asked() -> None:
    score, calls = await scored(0, of("a_100"), of("gate_40", gate=True, weight=0.0, threshold=0.5))
    assert (score.value, score.outcome, calls) == (0.0, Outcome.SCORED, ["gate_40"])
    assert "gate gate_40" in score.reason
    score, calls = await scored(0, of("a_70"), of("gate_60", gate=True, weight=0.0, threshold=0.5))
    assert (score.value, calls) == (0.7, ["gate_60", "a_70"])


async def test_a_gate_that_says_nothing_makes_the_response_unscored() -> None:
    score, calls = await scored(0, of("a_100"), of("gate_none", gate=True, weight=0.0))
    assert (score.value, score.outcome, calls) == (None, Outcome.ABSTAINED, ["gate_none"])


async def test_a_missing_part_is_never_weighted_away() -> None:
    score, _ = await scored(0, of("a_100", weight=0.99), of("b_none", weight=0.01))
    assert (score.value, score.outcome) == (None, Outcome.ABSTAINED)
