# SPDX-License-Identifier: Apache-2.0
"""verl's trainer modes, each with three things more: numbers about rewards in verl's own logger, in training as in
validation; reward models that sleep while the policy learns; and an end that waits for the last rows of the ledger.

    rlar_sync             verl's ``sync``; what ``+rlar=default`` sets
    rlar_colocate_async   verl's ``colocate_async``
    rlar_separate_async   verl's ``separate_async``

With ``+rlar_placement=colocated`` reward models share the GPUs of the training: they give their memory back when all
responses of a step are scored, before gradients are computed, and take it up again when the new weights are with the
rollout. Not with ``separate_async``, whose rollout never pauses.

Guarantees: the training is verl's, step by step; metrics that cannot be had are left out with a warning. While a step
computes gradients no colocated reward model holds its weights on a GPU: if they cannot be put to sleep, the step does
not go on, as it would run out of memory somewhere. They are woken whatever happens in between, and checked by their
golden scores.

Not covered: a GPU; colocated models were run on CPUs only.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

from verl.trainer.ppo.v1 import PPOTrainer, register_trainer
from verl.trainer.ppo.v1.trainer_colocate_async import PPOTrainerColocateAsync
from verl.trainer.ppo.v1.trainer_separate_async import PPOTrainerSeparateAsync
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from verl_rlar.errors import ServiceUnreachable
from verl_rlar.plugin import check
from verl_rlar.service import Client, await_rows

logger = logging.getLogger(__name__)


class _Rlar(PPOTrainer):
    """What all of them do more than verl's."""

    OF_VERL: str
    """The mode of verl's that it is: verl asks for it by name in some places."""

    def __init__(self, config: Any) -> None:
        self._rlar = check(config)
        self._colocated = self._rlar.serving.placement == "colocated"
        self._client: Client | None = None
        mode = config.trainer.v1.trainer_mode
        config = copy.deepcopy(config)
        config.trainer.v1.trainer_mode = self.OF_VERL
        super().__init__(config)
        config.trainer.v1.trainer_mode = mode  # for the workers, which check what they get

    @property
    def _service(self) -> Client:
        if self._client is None:
            self._client = Client(self._rlar)
        return self._client

    def fit(self, agent_loop_manager: Any) -> None:
        try:
            super().fit(agent_loop_manager)
        finally:
            await_rows(self.reward_loop_manager.reward_loop_workers, self._rlar.service_timeout_s)

    def on_sample_end(self) -> None:
        super().on_sample_end()
        if self._colocated:
            self._service.sleep()

    def on_step_end(self) -> None:
        try:
            super().on_step_end()
        finally:
            if self._colocated:
                self._service.wake()

    def _compute_metrics(self, batch: Any, metrics: Any, timing_raw: Any, global_steps: int, epoch: int) -> None:
        super()._compute_metrics(batch, metrics, timing_raw, global_steps, epoch)
        try:
            metrics.update(self._service.metrics(global_steps))
        except ServiceUnreachable as error:
            logger.warning("step %d has no metrics of rewards: %s", global_steps, error)


@register_trainer("rlar_sync")
class RlarTrainerSync(_Rlar, PPOTrainerSync):
    """verl's ``sync``; see the module."""

    OF_VERL = "sync"


@register_trainer("rlar_colocate_async")
class RlarTrainerColocateAsync(_Rlar, PPOTrainerColocateAsync):
    """verl's ``colocate_async``; see the module."""

    OF_VERL = "colocate_async"


@register_trainer("rlar_separate_async")
class RlarTrainerSeparateAsync(_Rlar, PPOTrainerSeparateAsync):
    """verl's ``separate_async``; see the module."""

    OF_VERL = "separate_async"
