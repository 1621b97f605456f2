# SPDX-License-Identifier: Apache-2.0
"""What was scored at a step, as numbers for verl's logger."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import make_sample
from test_ledger import make_row

from verl_rlar.config import AgentsConfig
from verl_rlar.ledger import Row, ShadowRow
from verl_rlar.metrics import CLUSTERS, StepMetrics, of_account
from verl_rlar.purse import Purse, account_of
from verl_rlar.types import Outcome, Score, ToolScore


def call(tool: str, value: float | None, outcome: Outcome = Outcome.SCORED, seconds: float = 0.1) -> ToolScore:
    return ToolScore(
        tool=tool, digest=f"of {tool}", outcome=outcome, raw=value, value=value, reason="", seconds=seconds, details={}
    )


def row(uid: str, session: int, *parts: ToolScore, **score: Any) -> Row:
    made = Score(**({"value": parts[0].value, "outcome": parts[0].outcome, "reason": "", "parts": parts} | score))
    return replace(make_row(uid=uid, session=session), score=made, seconds=0.1 * (session + 1))


def test_rewards_outcomes_and_latencies_are_counted_by_tool_and_kind() -> None:
    metrics = StepMetrics()
    metrics.saw(row("a", 0, call("exact", 1.0), call("length", 0.5)))
    metrics.saw(row("a", 1, call("exact", 0.0)))
    metrics.saw(row("b", 0, call("exact", 1.0)))
    metrics.saw(row("b", 1, call("exact", 1.0)))
    metrics.saw(row("c", 0, call("exact", None, Outcome.FAILED)))
    found = metrics.take()
    assert found["rlar/responses"] == 5
    assert (found["rlar/scored"], found["rlar/failed"]) == (0.8, 0.2)
    assert (found["rlar/mean"], found["rlar/std"]) == (0.75, pytest.approx(math.sqrt(3) / 4))
    assert found["rlar/same_groups"] == 0.5, "b; of c nothing can be said"
    assert (found["rlar/tool/length/share"], found["rlar/tool/length/mean"]) == (0.2, 0.5)
    assert (found["rlar/tool/exact/share"], found["rlar/tool/exact/failed"]) == (1.0, 0.2)
    kind = make_row(uid="a").route.kind.value
    assert found[f"rlar/kind/{kind}/mean"] == 0.75
    assert found["rlar/p50_s"] == pytest.approx(0.1) and found["rlar/most_s"] == pytest.approx(0.2)
    assert all(math.isfinite(value) for value in found.values())


def test_the_numbers_are_of_what_came_since_the_last_time() -> None:
    metrics = StepMetrics()
    metrics.saw(row("a", 0, call("exact", 1.0)))
    metrics.changes, metrics.boundary_s = 2, 1.5
    metrics.alarms.update(["drift", "flat", "flat"])
    first, second = metrics.take(), metrics.take()
    assert (first["rlar/changes"], first["rlar/boundary_s"], first["rlar/responses"]) == (2.0, 1.5, 1.0)
    assert (first["rlar/alarms"], first["rlar/alarms/flat"], first["rlar/alarms/canary"]) == (3.0, 2.0, 0.0)
    assert {name for name in second if not name.startswith("rlar/alarms")} == {"rlar/changes", "rlar/boundary_s"}
    assert set(second.values()) == {0.0}


def test_what_no_tool_fits_is_counted_whoever_scores_it_all_the_same() -> None:
    metrics = StepMetrics()
    left = row("a", 0, call("fallback", 1.0))
    metrics.saw(replace(left, route=replace(left.route, covered=False)))
    for session in range(1, 4):
        metrics.saw(row("a", session, call("exact", 1.0)))
    assert metrics.take()["rlar/uncovered"] == 0.25


def test_tools_without_a_say_are_counted_by_themselves() -> None:
    metrics = StepMetrics()
    metrics.saw(row("a", 0, call("exact", 1.0)))
    sample = make_sample("x")
    metrics.saw_shadows(
        ShadowRow(uid="a", session=n, step=sample.step, score=call("new", None, Outcome.ABSTAINED)) for n in range(2)
    )
    found = metrics.take()
    assert (found["rlar/shadow/new/abstained"], found["rlar/shadow/new/share"]) == (1.0, 2.0)
    assert "rlar/shadow/new/mean" not in found, "of which nothing can be said"


def test_tokens_and_dollars_are_summed_up_by_tool_where_the_ledger_has_them() -> None:
    metrics = StepMetrics()
    paid = {"check_1": 1.0, "tokens_read": 300.0, "tokens_written": 20.0, "dollars": 0.002}
    for session in range(2):
        metrics.saw(row("a", session, replace(call("rubric", 1.0), details=paid), call("exact", 1.0)))
    metrics.saw(row("b", 0, call("rubric", None, Outcome.FAILED)))
    metrics.saw(row("b", 1, replace(call("model", 0.5), details={"tokens": 70.0, "truncated": 0.0})))
    found = metrics.take()
    assert (found["rlar/tool/rubric/tokens"], found["rlar/tool/rubric/dollars"]) == (640.0, 0.004)
    assert found["rlar/tool/model/tokens"] == 70.0 and "rlar/tool/exact/tokens" not in found


@pytest.mark.parametrize(
    "details",
    [{"tokens": 120.0}, {"tokens": math.nan, "truncated": 0.0}, {"tokens_read": 1.0, "tokens_written": math.inf}],
)
def test_a_rules_own_tokens_are_no_cost_and_neither_is_what_is_no_number(details: dict[str, float]) -> None:
    metrics = StepMetrics()
    metrics.saw(row("a", 0, replace(call("mine", 1.0), details=details)))
    assert not any(name.endswith(("/tokens", "/dollars")) for name in metrics.take())


def test_what_agents_spent_is_what_their_account_says(tmp_path: Path) -> None:
    assert of_account(account_of(tmp_path)) == {
        f"rlar/agents/{name}": 0.0 for name in ("calls", "tokens", "dollars", "wait_s")
    }
    config = AgentsConfig(dollars_read=2.0, dollars_written=10.0)
    for task in ("advice", "rubrics"):
        purse = Purse(tmp_path, task, config)
        purse.take(100)
        purse.settle(120, 30)
    found = of_account(account_of(tmp_path))
    assert (found["rlar/agents/calls"], found["rlar/agents/tokens"]) == (2.0, 300.0)
    assert found["rlar/agents/dollars"] == pytest.approx(2 * (120 * 2 + 30 * 10) / 1e6)


def test_the_largest_clusters_have_numbers_of_their_own() -> None:
    metrics = StepMetrics()
    for number in range(CLUSTERS + 5):
        for session in range(1 + (number == 7)):
            of = row(f"{number}", session, call("exact", 1.0))
            metrics.saw(replace(of, route=replace(of.route, cluster=f"math/number#{number}")))
    found = metrics.take()
    assert found["rlar/cluster/math/number#7/mean"] == 1.0
    assert found["rlar/cluster/math/number#7/share"] == 2 / (CLUSTERS + 6)
    assert sum(name.startswith("rlar/cluster/") and name.endswith("/share") for name in found) == CLUSTERS
