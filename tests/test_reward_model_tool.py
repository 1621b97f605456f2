# SPDX-License-Identifier: Apache-2.0
"""A reward model as a tool: its spec says how it is asked, and a failure of ours is never its score."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from conftest import make_query, make_sample

from verl_rlar.config import ScoringConfig
from verl_rlar.errors import ToolError, ToolTimeout, ToolUnavailable
from verl_rlar.library import spec_from_json, spec_to_json
from verl_rlar.scoring import Scorer
from verl_rlar.serving import Conversation, Golden, How, Scored, ServedModel
from verl_rlar.tools.reward_model import RewardModelRunner, served_model, serving, target
from verl_rlar.types import Kind, Message, Outcome, Sample, Scope, ToolSpec, Verdict

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SPEC = ToolSpec(
    name="tiny_reward",
    kind="reward_model",
    target=target("org/tiny", COMMIT),
    scope=Scope(kinds=frozenset({Kind.OPEN}), needs_reference=False),
    description="a tiny model",
    low=-10,
    high=10,
    serving=serving(How(sign=-1), golden=(Golden(conversation=(Message(role="user", content="a"),), value=0.5),)),
)


class NoRules:
    """A runner that must not be asked."""

    async def run(self, spec: ToolSpec, sample: Sample) -> Verdict:
        raise AssertionError(spec.name)


class Pool:
    """A pool whose model scores by length, or does what it is told."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.asked: list[tuple[ServedModel, Conversation, float]] = []

    async def ensure(self, models: Sequence[ServedModel]) -> None: ...

    async def prefetch(self, models: Sequence[ServedModel]) -> bool:
        return True

    @asynccontextmanager
    async def lease(self, model: ServedModel) -> AsyncIterator[None]:
        yield

    async def score(
        self, model: ServedModel, conversations: Sequence[Conversation], deadline: float
    ) -> tuple[Scored, ...]:
        self.asked += [(model, conversation, deadline) for conversation in conversations]
        if self.errors:
            raise self.errors.pop(0)
        rows = [((float(len(conversation[-1].content)),),) for conversation in conversations]
        return tuple(Scored(value=model.how.value(row), rows=row, tokens=7, truncated=True) for row in rows)


def runner(pool: Pool) -> RewardModelRunner:
    return RewardModelRunner(pool, lambda spec: f"/snapshots/{spec.target}")


def test_a_spec_without_a_model_is_the_tool_that_it_was_before_there_were_models() -> None:
    rule = replace(SPEC, kind="rule", target="a:b", serving=None)
    assert rule.digest == "75d4914bb6c03df4"
    assert hash(SPEC) == hash(replace(SPEC))


def test_another_way_to_ask_is_another_tool() -> None:
    digests = {
        replace(SPEC, serving=how).digest
        for how in (serving(How()), serving(How(sign=-1)), serving(How(form="plain")), serving(How(), "steps"))
    }
    assert len(digests) == 4


def test_a_spec_comes_back_from_the_library_as_it_was() -> None:
    again = spec_from_json(spec_to_json(SPEC))
    assert again == SPEC and again.digest == SPEC.digest
    assert served_model(again, "/x") == served_model(SPEC, "/x")


def test_a_spec_becomes_a_model_that_is_served() -> None:
    model = served_model(SPEC, "/snapshots/1")
    assert (model.name, model.revision, model.path) == (f"org/tiny@{COMMIT}", COMMIT, "/snapshots/1")
    assert model.how == How(sign=-1) and model.golden[0].value == 0.5
    far = served_model(replace(SPEC, serving=serving(How(), address="http://gpu:8000")))
    assert far.address == "http://gpu:8000" and far.path is None


@pytest.mark.parametrize(
    "changes",
    [
        {"serving": None},
        {"serving": {}},
        {"serving": {"how": {"form": "poem"}}},
        {"serving": {"how": {}, "golden": [{"value": 1}]}},
        {"serving": {"how": {}, "family": "oracle"}},
        {"target": "org/tiny"},
        {"kind": "rule"},
    ],
)
async def test_a_spec_that_is_of_no_use_fails_by_its_name(changes: dict[str, Any]) -> None:
    with pytest.raises(ToolUnavailable, match="tiny_reward: "):
        await runner(Pool()).run(replace(SPEC, **changes), make_sample())


async def test_the_model_sees_the_prompt_and_the_response_within_the_tools_deadline() -> None:
    pool = Pool()
    verdict = await runner(pool).run(SPEC, make_sample("four", make_query("2 + 2?")))
    ((model, conversation, deadline),) = pool.asked
    assert [(message.role, message.content) for message in conversation] == [("user", "2 + 2?"), ("assistant", "four")]
    assert (model.path, deadline) == (f"/snapshots/org/tiny@{COMMIT}", SPEC.timeout_s)
    assert verdict.value == -4.0 and verdict.details == {"tokens": 7.0, "truncated": 1.0}
    assert "cut" in verdict.reason


@pytest.mark.parametrize(
    ("errors", "outcome", "value"),
    [
        ((), Outcome.SCORED, 0.4),
        ((ConnectionError("its server is gone"),), Outcome.SCORED, 0.4),
        ((ConnectionError("gone"), ConnectionError("gone again")), Outcome.FAILED, None),
        ((ToolTimeout("late"),), Outcome.FAILED, None),
        ((ToolError("refused"),), Outcome.FAILED, None),
        ((asyncio.TimeoutError(),), Outcome.FAILED, None),
    ],
)
async def test_a_dead_server_costs_one_retry_and_no_failure_is_a_score(
    errors: tuple[Exception, ...], outcome: Outcome, value: float | None
) -> None:
    models = runner(Pool(*errors))
    score = await Scorer(ScoringConfig(), NoRules(), models=models).call(SPEC, make_sample("42"))
    assert (score.outcome, score.value) == (outcome, value)
