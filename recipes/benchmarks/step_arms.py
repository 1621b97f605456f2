# SPDX-License-Identifier: Apache-2.0
"""What `step.py` puts into verl's processes: a reward path that takes turns, step by step, between three arms.

    naive     verl's own `NaiveRewardManager`, with the built-in rule as its function; no step boundary, no numbers
    plugin    `RlarRewardManager` with all that ``+rlar=default`` does, for the same rule
    several   the same, three rules for each response

So all arms train the same policy in the same processes, and what changes from one step to the next is the arm alone.
Each block, a step of each arm, has the same prompts. Loaded by
``VERL_USE_EXTERNAL_MODULES``; `step.py` says in ``STEP_ARMS`` which arms there are.
"""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path
from typing import Any

import psutil
from tensordict import TensorDict
from verl import DataProto
from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase
from verl.experimental.reward_loop.reward_manager.naive import NaiveRewardManager
from verl.trainer.ppo.v1 import AgentLoopManagerTQ, register_trainer

from verl_rlar import plugin
from verl_rlar.modes import RlarTrainerSync, _Rlar
from verl_rlar.reward_manager import RlarRewardManager
from verl_rlar.tools.rules.math import final_answer
from verl_rlar.trainer import RlarAgentLoopManager
from verl_rlar.types import Message, Query, Sample

ARMS = tuple(os.environ["STEP_ARMS"].split(","))
RESPONSES, STEPS = "responses.{}.jsonl", "steps.jsonl"
"""Files in the run folder: one of each reward worker, and the trainer's."""
MANAGER = {"source": "importlib", "name": "Arms", "path": "pkg://step_arms"}

plugin.REWARD_MANAGER = MANAGER  # else the plugin refuses this one, as it should refuse everybody's but its own


def arm_of(step: int) -> str:
    """The arm of a step; steps count from 1. The orders of blocks are drawn, as what comes every few steps would always
    meet the same arm else; every second block has the one before in reverse, so that no arm comes first more often."""
    block, place = divmod(step - 1, len(ARMS))
    order = random.Random(block // 2).sample(ARMS, len(ARMS))
    return order[-1 - place if block % 2 else place]


def same_rule(data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any]) -> float:
    """The rule that the plugin takes for these rows, as a function for verl's own manager."""
    query = Query(messages=(Message(role="user", content=""),), reference=ground_truth)
    return final_answer(Sample(query=query, response=solution_str)).value or 0.0


class Arms(RewardManagerBase):
    """Scores each response by the arm of its step, and keeps when it came and when its score was known."""

    def __init__(self, config: Any, tokenizer: Any, compute_score: Any, **_: Any) -> None:
        super().__init__(config, tokenizer, compute_score)
        self._of_verl = NaiveRewardManager(config, tokenizer, same_rule)
        self._of_rlar = RlarRewardManager(config, tokenizer, compute_score)
        folder = Path(config.trainer.default_local_dir)
        self._file = open(folder / RESPONSES.format(os.getpid()), "a", buffering=1)

    async def run_single(self, data: DataProto) -> dict[str, Any]:
        received = time.time()
        step = int(data[-1].non_tensor_batch["global_steps"])
        manager = self._of_verl if arm_of(step) == "naive" else self._of_rlar
        value = float((await manager.run_single(data))["reward_score"])
        self._file.write(json.dumps({"step": step, "received": received, "done": time.time(), "value": value}) + "\n")
        return {"reward_score": value, "reward_extra_info": {"value": value}}

    async def flush(self) -> None:
        """Returns when the ledger has all rows."""
        await self._of_rlar.flush()

    def sending(self) -> bool:
        """See `RlarRewardManager.sending`."""
        return self._of_rlar.sending()


class ArmsAgentLoopManager(RlarAgentLoopManager):
    """The plugin's, but at the steps of verl's own arm verl's."""

    def generate_sequences(self, prompts: TensorDict) -> None:
        if arm_of(int(prompts["global_steps"])) == "naive":
            AgentLoopManagerTQ.generate_sequences(self, prompts)
        else:
            super().generate_sequences(prompts)


OF_THE_POLICY = ("old_log_prob", "ref", "update_actor", "update_weights")
"""verl's names for the parts of a step in which the policy computes and nothing is scored."""
SERVICE = "ray::Service"
OURS = ("ray::RewardLoopWorker", SERVICE)
"""How Ray names the processes that score: verl's reward workers, and the plugin's service."""


def processor_s(names: tuple[str, ...] = OURS) -> tuple[float, float]:
    """Processor time so far, in seconds: of all living processes of this session (the trainer, Ray, all workers), and
    of those whose name begins so, with their children."""
    spent: dict[int, float] = {}
    parents: dict[int, int] = {}
    named: set[int] = set()
    for process in psutil.process_iter(["cmdline", "ppid"]):
        try:
            if os.getsid(process.pid) == os.getsid(0):
                spent[process.pid] = sum(process.cpu_times()[:4])  # with that of children that have ended
                parents[process.pid] = process.info["ppid"]
                if (process.info["cmdline"] or [""])[0].startswith(names):
                    named.add(process.pid)
        except (psutil.Error, OSError):  # it has ended meanwhile
            continue
    of_named = [seconds for pid, seconds in spent.items() if pid in named or parents[pid] in named]
    return sum(spent.values()), sum(of_named)


@register_trainer("rlar_arms")
class ArmsTrainer(RlarTrainerSync):
    """The plugin's, but at the steps of verl's own arm verl's. Keeps what each step took, metrics included."""

    OF_VERL = "sync"

    def on_step_begin(self) -> None:
        self._began, self._spent = time.perf_counter(), processor_s()
        super().on_step_begin()

    def _compute_metrics(self, batch: Any, metrics: Any, timing_raw: Any, global_steps: int, epoch: int) -> None:
        if arm_of(global_steps) == "naive":
            super(_Rlar, self)._compute_metrics(batch, metrics, timing_raw, global_steps, epoch)
        else:
            super()._compute_metrics(batch, metrics, timing_raw, global_steps, epoch)
        everything, scoring = (now - before for now, before in zip(processor_s(), self._spent, strict=True))
        line = {
            "step": global_steps,
            "seconds": time.perf_counter() - self._began,
            "processor": everything,
            "scoring": scoring,
            "policy": sum(timing_raw.get(name, 0.0) for name in OF_THE_POLICY),
            "boundary": float(metrics.get("rlar/boundary_s", 0.0)),
        }
        with open(Path(self.config.trainer.default_local_dir) / STEPS, "a") as file:
            file.write(json.dumps(line) + "\n")
