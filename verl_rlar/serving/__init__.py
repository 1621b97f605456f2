# SPDX-License-Identifier: Apache-2.0
"""Reward models that are served: started, asked, watched, and exchanged between training steps. See `base` and `pool`.

This folder knows nothing of hubs and tools: a `ServedModel` is a folder on this machine, or an address.
"""

from verl_rlar.serving.base import (
    Conversation,
    Golden,
    How,
    RewardModelPool,
    Scored,
    ServedModel,
    WrongGolden,
)
from verl_rlar.serving.judging import Judge
from verl_rlar.serving.pool import GOLDEN_CONVERSATIONS, Pool, ReplicaState
from verl_rlar.serving.probe import PAIRS, Pair, Probed, probe

__all__ = [
    "GOLDEN_CONVERSATIONS",
    "PAIRS",
    "Conversation",
    "Golden",
    "How",
    "Judge",
    "Pair",
    "Pool",
    "Probed",
    "ReplicaState",
    "RewardModelPool",
    "Scored",
    "ServedModel",
    "WrongGolden",
    "probe",
]
