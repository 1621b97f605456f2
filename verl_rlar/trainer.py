# SPDX-License-Identifier: Apache-2.0
"""Where verl's trainer tells us that a step begins.

verl hands each batch of prompts, in training and in validation, to an agent loop manager, and lets the user name its
class (``actor_rollout_ref.rollout.agent.agent_loop_manager_class``). Ours is verl's own, and does two things more
before the prompts go out: it marks them as training or validation, which a reward call cannot see otherwise, and gives
the service the chance to stop the run at this boundary.

Guarantees: prompts, sampling and order are verl's; an exception raised here ends the training with its message, where
one raised in a reward call would only drop a group.
"""

from __future__ import annotations

from typing import Any

from tensordict import TensorDict
from verl.trainer.ppo.v1 import AgentLoopManagerTQ
from verl.utils import tensordict_utils as tu

from verl_rlar.plugin import check
from verl_rlar.service import Client

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
        self._service.begin_step(int(prompts["global_steps"]), behind=self._behind, validate=validate)
        tu.assign_non_tensor_data(prompts, SPLIT_FIELD, "val" if validate else "train")
        if "__rollout_n__" in prompts:
            prompts[GROUP_SIZE_FIELD] = prompts["__rollout_n__"]
        super().generate_sequences(prompts)
