# SPDX-License-Identifier: Apache-2.0
"""verl's replay buffer, asked every tenth of a second.

Why: the trainer waits for finished prompts by polling every 2 s (verl/trainer/ppo/v1/replay_buffer.py:144), longer
than a whole step of a small model takes. Selected by ``trainer.v1.sampler.custom_sampler``; the group
``+rlar_device=cpu`` does it.

Not covered: verl gives a custom sampler no group filtering (``algorithm.filter_groups``) and no refill of failed
groups; drop the ``custom_sampler`` setting for those. The asynchronous trainers have another buffer class.
"""

from typing import Any

from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer


class FastReplayBuffer(ReplayBuffer):
    """`ReplayBuffer` of the synchronous trainer with a poll interval of 0.1 s."""

    def __init__(self, **kwargs: Any):
        super().__init__(**{"poll_interval": 0.1, **kwargs})
