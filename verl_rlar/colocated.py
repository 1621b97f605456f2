# SPDX-License-Identifier: Apache-2.0
"""Trainer modes of verl in which reward models share the GPUs of the training: ``+rlar_placement=colocated``.

They are verl's own, and do one thing more: reward models give their memory back when all responses of a step are
scored, before gradients are computed, and take it up again when the new weights are with the rollout.

    rlar_sync             verl's ``sync``
    rlar_colocate_async   verl's ``colocate_async``

Guarantees: while a step computes gradients no reward model holds its weights on a GPU: if they cannot be put to sleep,
the step does not go on, as it would run out of memory somewhere. They are woken whatever happens in between, and
checked by their golden scores.

Not covered: ``separate_async``, whose rollout never pauses: use GPUs of their own (`rlar.serving.ray_gpus`). Not run on
a GPU yet.
"""

from __future__ import annotations

import copy
from typing import Any

from verl.trainer.ppo.v1 import PPOTrainer, register_trainer
from verl.trainer.ppo.v1.trainer_colocate_async import PPOTrainerColocateAsync
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from verl_rlar.plugin import check
from verl_rlar.service import Client


class _Colocated(PPOTrainer):
    """What both modes do more than verl's."""

    OF_VERL: str
    """The mode of verl's that it is: verl asks for it by name in some places."""

    def __init__(self, config: Any) -> None:
        self._rlar = check(config)
        self._service: Client | None = None
        config = copy.deepcopy(config)
        config.trainer.v1.trainer_mode = self.OF_VERL
        super().__init__(config)

    @property
    def _models(self) -> Client:
        if self._service is None:
            self._service = Client(self._rlar)
        return self._service

    def on_sample_end(self) -> None:
        super().on_sample_end()
        self._models.sleep()

    def on_step_end(self) -> None:
        try:
            super().on_step_end()
        finally:
            self._models.wake()


@register_trainer("rlar_sync")
class RlarTrainerSync(_Colocated, PPOTrainerSync):
    """verl's ``sync``; see the module."""

    OF_VERL = "sync"


@register_trainer("rlar_colocate_async")
class RlarTrainerColocateAsync(_Colocated, PPOTrainerColocateAsync):
    """verl's ``colocate_async``; see the module."""

    OF_VERL = "colocate_async"
