# SPDX-License-Identifier: Apache-2.0
"""What runs beside the scoring path cannot hold it up, and nobody's group is taken by halves."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

import pytest
from conftest import make_query, make_sample

import verl_rlar.shadow
from verl_rlar.config import LifeConfig, ScoringConfig
from verl_rlar.errors import ServiceUnreachable, ToolError
from verl_rlar.exam.canaries import Canary
from verl_rlar.ledger import CanaryRow, ShadowRow
from verl_rlar.library import builtin_snapshot
from verl_rlar.scoring import Scorer
from verl_rlar.shadow import WAITING, Shadow
from verl_rlar.types import Kind, Outcome, Sample, Snapshot, ToolSpec, Verdict

SPEC = replace(builtin_snapshot().tool("final_answer"), name="newcomer")
SNAPSHOT = Snapshot(tools=builtin_snapshot().tools, shadows=(SPEC,))
CANARY = Canary(id="c", query=make_query(), response="41", expect="bad", value=0.0)


class Gated:
    """A runner that waits until it is let go; a response that says so breaks the tool."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.at_once = self.most_at_once = self.wrong = 0

    async def run(self, spec: ToolSpec, sample: Sample) -> Verdict:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await self.go.wait()
        self.at_once -= 1
        if sample.response == "broken":
            raise ToolError("broken")
        return Verdict(value=float(sample.response == "42"))


class Kept:
    """Who takes the results; out of reach for the first calls, if told so."""

    def __init__(self, out: int = 0) -> None:
        self.shadows: list[ShadowRow] = []
        self.canary_rows: list[CanaryRow] = []
        self.asked: list[int] = []
        self.out = out
        self.calls = 0

    async def canaries(self, step: int) -> tuple[tuple[ToolSpec, tuple[Canary, ...]], ...]:
        self.asked.append(step)
        return ((SPEC, (CANARY,)),)

    async def saw(self, shadows: tuple[ShadowRow, ...], canaries: tuple[CanaryRow, ...]) -> None:
        self.calls += 1
        if self.out:
            self.out -= 1
            raise ServiceUnreachable("the rlar service did not answer")
        self.shadows += shadows
        self.canary_rows += canaries


def make(runner: Gated, kept: Kept, **life: float) -> Shadow:
    return Shadow(LifeConfig().model_copy(update=life), Scorer(ScoringConfig(timeout_s=60), runner), kept)


async def test_responses_and_canaries_are_scored_one_at_a_time_and_kept_with_their_outcomes() -> None:
    runner, kept = Gated(), Kept()
    shadow = make(runner, kept)
    for session, text in enumerate(("42", "41", "broken")):
        shadow.scored(make_sample(text, step=3, uid="g", session=session), Kind.MATH, SNAPSHOT)
    assert kept.shadows == [], "nobody has waited for it"
    runner.go.set()
    await shadow.flush()
    assert [(row.session, row.score.value, row.score.outcome) for row in kept.shadows] == [
        (0, 1.0, Outcome.SCORED),
        (1, 0.0, Outcome.SCORED),
        (2, None, Outcome.FAILED),
    ]
    assert [(row.canary, row.step, row.score.value) for row in kept.canary_rows] == [("c", 3, 0.0)]
    assert kept.asked == [3] and runner.most_at_once == 1


async def test_a_canary_that_flips_is_asked_once_more() -> None:
    class Unsteady(Gated):
        async def run(self, spec: ToolSpec, sample: Sample) -> Verdict:
            self.most_at_once += 1
            return Verdict(value=float(self.most_at_once < self.wrong))

    for wrong, values in ((2, [0.0]), (9, [1.0])):
        runner, kept = Unsteady(), Kept()
        runner.wrong = wrong
        shadow = make(runner, kept)
        shadow.scored(make_sample(query=make_query(reference=None), step=1), Kind.OPEN, SNAPSHOT)
        await shadow.flush()
        assert [row.score.value for row in kept.canary_rows] == values and runner.most_at_once == 2


async def test_canaries_are_asked_for_and_scored_before_all_that_waits_in_the_shadow() -> None:
    runner, kept = Gated(), Kept()
    shadow = make(runner, kept)
    for number in range(WAITING + 1):
        shadow.scored(make_sample(uid=f"{number}", step=1), Kind.MATH, SNAPSHOT)
    for step in (2, 3):
        shadow.scored(make_sample(uid=f"{step}", step=step), Kind.MATH, Snapshot(tools=SNAPSHOT.tools))
        await asyncio.sleep(0.01)
    assert kept.asked == [1, 2, 3], "while the first call is under way"
    runner.go.set()
    while not kept.shadows:
        await asyncio.sleep(0.01)
    assert [row.step for row in kept.canary_rows] == [1, 2, 3] and len(kept.shadows) < WAITING
    await shadow.flush()
    assert len(kept.shadows) == WAITING and runner.most_at_once == 1


async def test_results_of_a_slow_tool_are_sent_before_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verl_rlar.shadow, "SENT_AFTER_S", 0.0)
    runner, kept = Gated(), Kept()
    shadow = make(runner, kept, canary_every=0)
    for session in range(2):
        shadow.scored(make_sample("42", session=session), Kind.MATH, SNAPSHOT)
    runner.go.set()
    await shadow.flush()
    assert [row.session for row in kept.shadows] == [0, 1] and kept.calls == 2


async def test_what_a_tool_in_the_shadow_is_not_for_it_does_not_score() -> None:
    runner, kept = Gated(), Kept()
    runner.go.set()
    shadow = make(runner, kept, canary_every=0)
    shadow.scored(make_sample(query=make_query(reference=None)), Kind.MATH, SNAPSHOT)
    shadow.scored(make_sample(), Kind.CHOICE, SNAPSHOT)
    await shadow.flush()
    assert (kept.shadows, kept.asked) == ([], [])


async def test_groups_are_taken_whole_or_not_at_all() -> None:
    runner, kept = Gated(), Kept()
    runner.go.set()
    shadow = make(runner, kept, shadow_share=0.5, canary_every=0)
    for group in range(40):
        for session in range(4):
            shadow.scored(make_sample(uid=f"{group}", session=session), Kind.MATH, SNAPSHOT)
    await shadow.flush()
    sizes = [sum(row.uid == f"{group}" for row in kept.shadows) for group in range(40)]
    assert set(sizes) == {0, 4} and 8 <= sizes.count(4) <= 32


async def test_what_there_is_no_room_for_is_left_out_counted_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    runner, kept = Gated(), Kept()
    shadow = make(runner, kept, canary_every=0)
    with caplog.at_level(logging.WARNING):
        for number in range(WAITING + 10):
            shadow.scored(make_sample(uid=f"{number}"), Kind.MATH, SNAPSHOT)
    assert shadow.left_out == 10 and len([r for r in caplog.records if "does not keep up" in r.message]) == 1
    runner.go.set()
    await shadow.flush()
    assert len(kept.shadows) == WAITING


async def test_a_service_that_is_away_costs_results_and_no_more(caplog: pytest.LogCaptureFixture) -> None:
    runner, kept = Gated(), Kept(out=1)
    runner.go.set()
    shadow = make(runner, kept, canary_every=0)
    shadow.scored(make_sample(uid="lost"), Kind.MATH, SNAPSHOT)
    await shadow.flush()
    assert "results of shadows and canaries were lost" in caplog.text
    shadow.scored(make_sample(uid="kept"), Kind.MATH, SNAPSHOT)
    await shadow.flush()
    assert [row.uid for row in kept.shadows] == ["kept"]
