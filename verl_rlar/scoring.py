# SPDX-License-Identifier: Apache-2.0
"""Runs a route's tools on a sample and makes one score of their verdicts.

Guarantees: `Scorer.score` always returns within ``timeout_s`` (plus scheduling; where a tool needs a sandbox, within
what `BoxRunner` grants to each try), and never raises for what a tool or a response does; a value is a finite float in
[0, 1]; a missing part makes the whole score unscored (I4), it is never re-weighted away, so that all responses of a
group are measured alike (I2).

How parts combine: every gate must give 1, or the value is 0; the other parts are added by weight. A caught cheat in any
part makes the value 0 with outcome ``hacked``. Otherwise ``failed`` beats ``abstained``.

The only retry of the package is here: an infrastructure error is tried again ``retries`` times.
"""

from __future__ import annotations

import asyncio
import math
import time
from typing import Protocol

from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt

from verl_rlar.config import ScoringConfig
from verl_rlar.errors import ToolError, ToolUnavailable
from verl_rlar.types import Outcome, Route, Sample, Score, Snapshot, ToolScore, ToolSpec, Verdict

FULL_MARK = 1.0 - 1e-9
"""A gate is passed from this value on."""


class Runner(Protocol):
    """What runs tools: `verl_rlar.tools.runner.RuleRunner` or `verl_rlar.tools.boxed.BoxRunner`; see there for the
    errors."""

    async def run(self, spec: ToolSpec, sample: Sample) -> Verdict: ...


class Scorer:
    """Scores samples by routes.

    Args:
        config: Deadline and retries.
        runner: Runs the rules.
        boxes: Runs the tools that need a sandbox. They wait in line for a box, so their deadline is the runner's.
            None: there is none.
    """

    def __init__(self, config: ScoringConfig, runner: Runner, boxes: Runner | None = None) -> None:
        self._config = config
        self._runner = runner
        self._boxes = boxes

    async def score(self, sample: Sample, route: Route, snapshot: Snapshot) -> Score:
        """Scores one sample by a route that was decided on this snapshot."""
        start = time.perf_counter()
        if not route.parts:
            return Score(value=None, outcome=Outcome.ABSTAINED, reason=route.reason)
        parts = await asyncio.gather(*(self._tool_score(sample, snapshot.tool(part.tool)) for part in route.parts))
        return combine(route, tuple(parts), seconds=time.perf_counter() - start)

    async def _tool_score(self, sample: Sample, spec: ToolSpec) -> ToolScore:
        start = time.perf_counter()
        try:
            limit = None if spec.boxed else self._config.timeout_s
            verdict = await asyncio.wait_for(self._run(spec, sample), limit)
            outcome, raw, value, reason = _judge(spec, verdict)
            details = verdict.details
        except (ToolError, ConnectionError, TimeoutError, asyncio.TimeoutError) as error:
            outcome, raw, value, details = Outcome.FAILED, None, None, {}
            reason = str(error) or f"{spec.name}: no answer within rlar.scoring.timeout_s={self._config.timeout_s:g} s"
        seconds = time.perf_counter() - start
        return ToolScore(
            tool=spec.name,
            digest=spec.digest,
            outcome=outcome,
            raw=raw,
            value=value,
            reason=reason,
            seconds=seconds,
            details=details,
        )

    async def _run(self, spec: ToolSpec, sample: Sample) -> Verdict:
        retrying = AsyncRetrying(
            stop=stop_after_attempt(1 + self._config.retries),
            retry=retry_if_exception_type(ConnectionError),
            reraise=True,
        )
        runner = self._boxes if spec.boxed else self._runner
        if runner is None:
            raise ToolUnavailable(f"{spec.name}: there is no sandbox here (rlar.sandbox.backend)")
        return await retrying(runner.run, spec, sample)


def _judge(spec: ToolSpec, verdict: Verdict) -> tuple[Outcome, float | None, float | None, str]:
    """Outcome, raw score, value in [0, 1] and reason of a verdict; a score that is none is the tool's failure."""
    raw = verdict.value
    if raw is None:
        return Outcome.ABSTAINED, None, None, verdict.reason
    if not math.isfinite(raw) or not min(spec.low, spec.high) <= raw <= max(spec.low, spec.high):
        reason = f"{spec.name}: answered {raw!r}, outside its range [{spec.low:g}, {spec.high:g}]"
        return Outcome.FAILED, None, None, reason
    if verdict.hacked:
        return Outcome.HACKED, raw, 0.0, verdict.reason
    return Outcome.SCORED, raw, (raw - spec.low) / (spec.high - spec.low), verdict.reason


def combine(route: Route, parts: tuple[ToolScore, ...], *, seconds: float) -> Score:
    """One score out of a route's parts, given in the route's order; see the module for the rules."""

    def result(value: float | None, outcome: Outcome, reason: str) -> Score:
        return Score(value=value, outcome=outcome, reason=reason, parts=parts, seconds=seconds)

    for outcome in (Outcome.FAILED, Outcome.ABSTAINED):
        if missing := next((part for part in parts if part.outcome is outcome), None):
            return result(None, outcome, missing.reason)
    if cheat := next((part for part in parts if part.outcome is Outcome.HACKED), None):
        return result(0.0, Outcome.HACKED, cheat.reason)
    pairs = [(part, score, score.value or 0.0) for part, score in zip(route.parts, parts, strict=True)]
    if shut := next((score for part, score, value in pairs if part.gate and value < FULL_MARK), None):
        return result(0.0, Outcome.SCORED, f"gate {shut.tool}: {shut.reason}")
    value = sum(part.weight * value for part, _, value in pairs if not part.gate)
    reason = "; ".join(score.reason for part, score, _ in pairs if not part.gate and score.reason)
    return result(min(1.0, max(0.0, value)), Outcome.SCORED, reason)
