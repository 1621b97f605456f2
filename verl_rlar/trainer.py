# SPDX-License-Identifier: Apache-2.0
"""Where verl's trainer tells us that a step begins.

verl hands each batch of prompts, in training and in validation, to an agent loop manager, and lets the user name its
class (``actor_rollout_ref.rollout.agent.agent_loop_manager_class``). Ours is verl's own, and does three things more:
before the prompts go out it marks them as training or validation, which a reward call cannot see otherwise, and gives
the service the chance to stop the run at this boundary; and while they are answered, it has the service decide their
routes, so that these are there when the first response comes.

Guarantees: prompts, sampling and order are verl's; an exception raised here ends the training with its message, where
one raised in a reward call would only drop a group.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from tensordict import NonTensorData, TensorDict
from verl.trainer.ppo.v1 import AgentLoopManagerTQ
from verl.utils import tensordict_utils as tu

from verl_rlar.errors import DataError
from verl_rlar.plugin import check
from verl_rlar.rows import COLUMNS, query_of
from verl_rlar.service import Client
from verl_rlar.types import Query, Split

SPLIT_FIELD = "rlar_split"
"""Field of each prompt: ``train`` or ``val``."""
GROUP_SIZE_FIELD = "rlar_group_size"
"""Field of each prompt: the number of its responses, where the data sets it (``__rollout_n__``)."""
UNBOUNDED = 8
"""Steps for which reward models are kept where verl lets responses come any number of steps later."""


def steps_behind(config: Any) -> int:
    """How many steps before the present one may still have responses to score, in verl's trainer mode."""
    v1 = config.trainer.v1
    if str(v1.trainer_mode).removeprefix("rlar_") == "sync":
        return 0
    return int(v1.sampler.max_off_policy_threshold or UNBOUNDED)


class RlarAgentLoopManager(AgentLoopManagerTQ):
    """verl's agent loop manager, which marks the prompts and guards the step boundary."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self._service = Client(check(config))
        self._behind = steps_behind(config)

    def generate_sequences(self, prompts: TensorDict) -> None:
        """See `AgentLoopManagerTQ.generate_sequences`.

        Raises:
            TooManyUnscored, ToolUnavailable: See `verl_rlar.service.Service.begin_step`.
        """
        validate = "validate" in prompts and bool(prompts["validate"])
        step = int(prompts["global_steps"])
        split: Split = "val" if validate else "train"
        self._service.begin_step(step, behind=self._behind, validate=validate)
        tu.assign_non_tensor_data(prompts, SPLIT_FIELD, split)
        if "__rollout_n__" in prompts:
            prompts[GROUP_SIZE_FIELD] = prompts["__rollout_n__"]
        super().generate_sequences(prompts)  # does not wait
        self._service.expect(step, split, queries_of(prompts))


def queries_of(prompts: TensorDict) -> list[Query]:
    """What the prompts of a batch ask, as reward workers will read it; without those that cannot be read."""
    columns = {name: field for name, field in prompts.items() if name in COLUMNS}
    queries = []
    for number in range(len(prompts)):
        cells = {name: field if isinstance(field, NonTensorData) else field[number] for name, field in columns.items()}
        row = {name: cell.data for name, cell in cells.items()}
        with suppress(DataError):
            queries.append(query_of(row))
    return queries
