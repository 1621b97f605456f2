# SPDX-License-Identifier: Apache-2.0
"""verl's reward manager: a finished response in, a number out, by way of service, route, tools and ledger.

verl calls `RlarRewardManager.run_single` in one of ``reward.num_workers`` Ray actors, picked at random, as soon as a
response is finished, while others are still being generated.

What verl gets for a response that could not be scored: verl needs a float for every response, and whatever float goes
out enters the baseline of its GRPO group. Three ways were weighed. Raising an exception makes verl's V1 trainer drop
the trajectory and pad the batch, so the siblings' baseline loses a member and the batch its shape. Masking the response
needs a trainer mode of our own, which would shut out verl's other modes. So the number is *bound late*: an unscored
response waits until all its siblings are known and goes out as the mean of the scored ones
(`rlar.scoring.on_unscored`). Then, in verl's own GRPO advantage,

- its own advantage is exactly 0: it moves nothing;
- the group's mean, and so the sign and the order of the siblings' advantages, are what they were without it;
- only the scale changes: a member at the mean adds nothing to the sum of squares but one to the count, so with k of n
  responses unscored the standard deviation shrinks, and the others' advantages grow, by the known factor
  sqrt((n - 1) / (n - k - 1)): 1.08 for one of eight. With ``algorithm.norm_adv_by_std_in_grpo=False`` not even that;
- a group with no scored response goes out as `rlar.scoring.neutral` throughout, so it has no gradient.

The wait costs nothing: the step cannot end before the siblings are there anyway; and it has a deadline
(`rlar.scoring.sibling_timeout_s`). RLOO's advantage is 0 likewise. Estimators that normalise over the whole batch
(REINFORCE++) or add the KL to the reward (``algorithm.use_kl_in_reward``) are not covered: there the number is merely
inconspicuous. With ``rollout.n=1`` verl's baseline is 0, so `neutral` should be 0 as well. In validation nothing waits:
`neutral` goes out, and ``rlar_scored`` tells it apart.

Guarantees: the same keys in every ``reward_extra_info``, whatever happened (verl reads the first sample's for all); no
exception leaves `run_single` for what a response, a tool or the service did; every wait has a deadline.

Not covered: of a trajectory with several outputs the last one is scored; images and audio do not reach the tools.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from typing import Any

from verl import DataProto
from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase

from verl_rlar.errors import ConfigError, ServiceUnreachable
from verl_rlar.ledger import Row
from verl_rlar.nodes import Boxes, Models
from verl_rlar.plugin import check
from verl_rlar.rows import COLUMNS, plain, query_of
from verl_rlar.scoring import Scorer
from verl_rlar.service import Client
from verl_rlar.shadow import Shadow
from verl_rlar.tools.rubric import RubricRunner
from verl_rlar.tools.runner import RuleRunner
from verl_rlar.trainer import GROUP_SIZE_FIELD, SPLIT_FIELD
from verl_rlar.trusted import trusted_snapshot
from verl_rlar.types import Kind, Outcome, Query, Route, Sample, Score, Snapshot

NEEDED_FIELDS = ("global_steps", "uid", "session_id", "raw_prompt")
"""What verl's V1 trainer sends along with every response."""
SHORT = 2_000
"""Responses of so many tokens at most are decoded at once, in less than a millisecond: the way to a thread and back
takes as much, where many come together. Longer ones would keep others waiting."""


class RlarRewardManager(RewardManagerBase):
    """Scores each response by the tools that fit its query."""

    def __init__(self, config: Any, tokenizer: Any, compute_score: Any, **_: Any) -> None:
        super().__init__(config, tokenizer, compute_score)
        self._rlar = check(config)
        self._decode = tokenizer.decode
        self._group_size = int(config.actor_rollout_ref.rollout.n)
        self._service = Client(self._rlar)
        rules = tuple(tool.target for tool in trusted_snapshot(self._rlar).tools if not tool.boxed)
        self._runner = RuleRunner(self._rlar.rules, rules)
        boxes = Boxes(self._rlar.sandbox, self._service.source)
        rubrics = RubricRunner(self._rlar)
        self._scorer = Scorer(self._rlar.scoring, self._runner, boxes, Models(self._rlar), rubrics)
        self._shadow = Shadow(self._rlar.life, self._scorer, self._service)

    async def run_single(self, data: DataProto) -> dict[str, Any]:
        """Scores one trajectory.

        Args:
            data: Rows of one trajectory, the last of which is scored. ``batch["responses"]`` has shape
                (rows, response_length), padded on the right.

        Returns:
            ``reward_score``, a float in [0, 1], and ``reward_extra_info``, flat, always with the same keys.

        Raises:
            ConfigError: verl did not send what its V1 trainer sends.
        """
        received, start = time.time(), time.perf_counter()
        item = data[-1]
        if _length(item.batch, item.non_tensor_batch) <= SHORT:
            sample = self._sample(item.batch, item.non_tensor_batch)
        else:
            sample = await asyncio.to_thread(self._sample, item.batch, item.non_tensor_batch)
        try:
            snapshot = await self._service.at(sample.step, sample.split)
            route = await self._service.route(sample.query, snapshot, sample.split)
            score = await self._scorer.score(sample, route, snapshot)
        except ServiceUnreachable as error:
            snapshot = Snapshot(tools=())
            route = Route(parts=(), reason=str(error), kind=Kind.OPEN, covered=False, snapshot="")
            score = Score(value=None, outcome=Outcome.FAILED, reason=str(error))
        seconds = time.perf_counter() - start
        sent, sent_as = await self._number(sample, route, score)
        self._service.record(
            Row(sample=sample, route=route, score=score, sent=sent, sent_as=sent_as, received=received, seconds=seconds)
        )
        if sample.split == "train" and snapshot.tools:
            self._shadow.scored(sample, route.kind, snapshot)
        return {"reward_score": sent, "reward_extra_info": extra_info(route, score, seconds)}

    async def flush(self) -> None:
        """Returns when every row is in the ledger, and what tools in the shadow and canaries gave."""
        await self._service.flush()
        await self._shadow.flush()

    def sending(self) -> bool:
        """Whether rows are still on their way to the ledger. They go at once then."""
        return self._service.sending()

    def close(self) -> None:
        """Ends the processes for rules."""
        self._runner.close()

    async def _number(self, sample: Sample, route: Route, score: Score) -> tuple[float, str]:
        """The float that verl gets, and what it is; see the module."""
        if score.value is not None:
            return score.value, "value"
        hopeful = bool(route.parts) or not route.snapshot  # on a route without tools no sibling is scored either
        if hopeful and self._rlar.scoring.on_unscored == "siblings" and sample.split == "train":
            mean = await self._service.sibling_mean(sample.uid, sample.session, sample.group_size)
            if mean is not None:
                return mean, "siblings"
        return self._rlar.scoring.neutral, "neutral"

    def _sample(self, batch: Any, fields: Mapping[str, Any]) -> Sample:
        missing = [name for name in NEEDED_FIELDS if name not in fields]
        if missing:
            raise ConfigError(f"verl sent no {', '.join(missing)}; rewards need its V1 trainer (trainer.use_v1=True)")
        return Sample(
            query=self._query(fields),
            response=self._decode(batch["responses"][: _length(batch, fields)], skip_special_tokens=True),
            step=int(fields["global_steps"]),
            uid=str(fields["uid"]),
            session=int(fields["session_id"]),
            group_size=int(fields.get(GROUP_SIZE_FIELD, self._group_size)),
            split="val" if fields.get(SPLIT_FIELD) == "val" else "train",
        )

    def _query(self, fields: Mapping[str, Any]) -> Query:
        return query_of({name: plain(fields.get(name)) for name in COLUMNS})


def _length(batch: Any, fields: Mapping[str, Any]) -> int:
    """Number of tokens of a response, without what it is padded with."""
    length = fields.get("response_len")
    return int(batch["attention_mask"][-batch["responses"].shape[-1] :].sum() if length is None else length)


def extra_info(route: Route, score: Score, seconds: float) -> dict[str, Any]:
    """What goes into verl's dumps and validation metrics: numbers and texts, always the same keys."""
    return {
        "rlar_scored": float(score.value is not None),
        "rlar_failed": float(score.outcome is Outcome.FAILED),
        "rlar_hacked": float(score.outcome is Outcome.HACKED),
        "rlar_covered": float(route.covered),
        "rlar_seconds": seconds,
        "rlar_outcome": score.outcome.value,
        "rlar_tool": route.name,
        "rlar_parts": json.dumps({part.tool: part.value for part in score.parts}),
    }
