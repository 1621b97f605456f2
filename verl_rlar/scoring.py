# SPDX-License-Identifier: Apache-2.0
"""Runs a route's tools on a sample and makes one score of their verdicts.

Guarantees: `Scorer.score` always returns within ``timeout_s`` (plus scheduling; where a tool needs a sandbox, or is a
reward model or a rubric, within what its runner grants to each try), and never raises for what a tool or a response
does; a value is a finite float in [0, 1]; a missing part makes the whole score unscored (I4), it is never re-weighted
away, so that all responses of a group are measured alike (I2).

How parts combine: the gates are asked first; each must give its threshold (1 by default), or the value is 0 and the
other parts are not asked. Then the other parts that have a weight at this step are asked together, and their values are
averaged by weight; those of a learned mixture by their log-odds. A caught cheat in any part makes the value 0 with
outcome ``hacked``. Otherwise ``failed`` beats ``abstained``.

The only retry of the package is here: an infrastructure error is tried again ``retries`` times.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Protocol

from verl_rlar.config import ScoringConfig
from verl_rlar.errors import ToolError, ToolUnavailable
from verl_rlar.mixture import pooled
from verl_rlar.types import Outcome, Route, RoutePart, Sample, Score, Snapshot, ToolScore, ToolSpec, Verdict

ROUNDING = 1e-9
"""By so much less than its threshold a gate is passed, too."""
FULL_MARK = 1.0 - ROUNDING
"""A value from which on an answer has all there is to have."""


class Runner(Protocol):
    """What runs tools: `verl_rlar.tools.runner.RuleRunner`, `verl_rlar.tools.boxed.BoxRunner`,
    `verl_rlar.tools.reward_model.RewardModelRunner` or `verl_rlar.tools.rubric.RubricRunner`; see there for errors."""

    async def run(self, spec: ToolSpec, sample: Sample) -> Verdict: ...


class Scorer:
    """Scores samples by routes.

    Args:
        config: Deadline and retries.
        runner: Runs the rules.
        boxes: Runs the tools that need a sandbox. They wait in line for a box, so their deadline is the runner's.
            None: there is none.
        models: Runs reward models, by their own deadlines, too. None: none is served here.
        rubrics: Has rubrics judged, by their own deadlines, too. None: there is no LLM for it here.
    """

    def __init__(
        self,
        config: ScoringConfig,
        runner: Runner,
        boxes: Runner | None = None,
        models: Runner | None = None,
        rubrics: Runner | None = None,
    ) -> None:
        self._config = config
        self._runner = runner
        self._boxes = boxes
        self._models = models
        self._rubrics = rubrics

    async def score(self, sample: Sample, route: Route, snapshot: Snapshot) -> Score:
        """Scores one sample by a route that was decided on this snapshot."""
        start = time.perf_counter()
        if not route.parts:
            return Score(value=None, outcome=Outcome.ABSTAINED, reason=route.reason)
        pairs: list[tuple[RoutePart, ToolScore]] = []
        for wanted in (
            [part for part in route.parts if part.gate],
            [part for part in route.parts if not part.gate and part.weight_at(sample.step) > 0],
        ):
            if all(_passed(part, score) for part, score in pairs):  # else nothing behind the gates counts
                calls = [self.call(snapshot.tool(part.tool), sample) for part in wanted]
                scores = [await calls[0]] if len(calls) == 1 else await asyncio.gather(*calls)
                pairs += zip(wanted, scores, strict=True)
        return combine(pairs, step=sample.step, seconds=time.perf_counter() - start)

    async def call(self, spec: ToolSpec, sample: Sample) -> ToolScore:
        """Scores one sample by one tool; see the module for the guarantees."""
        start = time.perf_counter()
        try:
            limit = None if spec.boxed or spec.opinion else self._config.timeout_s
            verdict = _plain(spec, await asyncio.wait_for(self._run(spec, sample), limit))
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
        runner, what = self._runner_of(spec)
        if runner is None:
            raise ToolUnavailable(f"{spec.name}: there is no {what}")
        for _ in range(self._config.retries):
            with suppress(ConnectionError):
                return await runner.run(spec, sample)
        return await runner.run(spec, sample)

    def _runner_of(self, spec: ToolSpec) -> tuple[Runner | None, str]:
        """What runs a tool, and what is missing if nothing does."""
        if spec.boxed:
            return self._boxes, "sandbox here (rlar.sandbox.backend)"
        if spec.kind == "reward_model":
            return self._models, "server of reward models here"
        if spec.kind == "rubric":
            return self._rubrics, "LLM for rubrics here"
        return self._runner, "process for rules here"


def _plain(spec: ToolSpec, verdict: Verdict) -> Verdict:
    """A verdict in Python's own floats and text: a tool may have answered in numpy's or torch's.

    Raises:
        ToolError: What should be a number is none.
    """
    try:
        value = None if verdict.value is None else float(verdict.value)
        details = {str(name): float(number) for name, number in verdict.details.items()}
    except (TypeError, ValueError, OverflowError, AttributeError) as error:
        raise ToolError(f"{spec.name}: answered something else than numbers: {str(error)[:300]}") from None
    return replace(verdict, value=value, reason=str(verdict.reason), details=details)


def _judge(spec: ToolSpec, verdict: Verdict) -> tuple[Outcome, float | None, float | None, str]:
    """Outcome, raw score, value in [0, 1] and reason of a verdict; a score that is none is the tool's failure."""
    raw = verdict.value
    if raw is None:
        return Outcome.ABSTAINED, None, None, verdict.reason
    in_range = spec.calibration is not None or min(spec.low, spec.high) <= raw <= max(spec.low, spec.high)
    if not math.isfinite(raw) or not in_range:
        reason = f"{spec.name}: answered {raw!r}, outside its range [{spec.low:g}, {spec.high:g}]"
        return Outcome.FAILED, None, None, reason
    if verdict.hacked:
        return Outcome.HACKED, raw, 0.0, verdict.reason
    value = spec.calibration(raw) if spec.calibration else (raw - spec.low) / (spec.high - spec.low)
    return Outcome.SCORED, raw, value, verdict.reason


def _passed(gate: RoutePart, score: ToolScore) -> bool:
    return score.outcome is Outcome.SCORED and (score.value or 0.0) >= gate.threshold - ROUNDING


def combine(pairs: Sequence[tuple[RoutePart, ToolScore]], *, step: int, seconds: float) -> Score:
    """One score out of what a route's tools said; see the module for the rules.

    Args:
        pairs: The parts that were run, with their scores.
        step: verl's ``global_steps``, for weights that depend on it.
        seconds: Wall time of it all.
    """
    parts = tuple(score for _, score in pairs)

    def result(value: float | None, outcome: Outcome, reason: str) -> Score:
        return Score(value=value, outcome=outcome, reason=reason, parts=parts, seconds=seconds)

    if cheat := next((part for part in parts if part.outcome is Outcome.HACKED), None):
        return result(0.0, Outcome.HACKED, cheat.reason)
    for outcome in (Outcome.FAILED, Outcome.ABSTAINED):
        if missing := next((part for part in parts if part.outcome is outcome), None):
            return result(None, outcome, missing.reason)
    if shut := next((score for part, score in pairs if part.gate and not _passed(part, score)), None):
        return result(0.0, Outcome.SCORED, f"gate {shut.tool}: {shut.reason}")
    weighted = [(part.weight_at(step), score.value or 0.0) for part, score in pairs if not part.gate]
    odds = all(part.odds for part, _ in pairs if not part.gate)
    total = sum(weight for weight, _ in weighted)
    if total <= 0:
        return result(None, Outcome.ABSTAINED, f"no tool of the route has a weight at step {step}")
    reason = "; ".join(score.reason for part, score in pairs if not part.gate and score.reason)
    value = pooled(weighted) if odds else sum(weight * value for weight, value in weighted) / total
    return result(min(1.0, max(0.0, value)), Outcome.SCORED, reason)
