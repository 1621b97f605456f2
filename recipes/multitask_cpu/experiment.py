# SPDX-License-Identifier: Apache-2.0
"""How large the experiment is, and verl's settings for one arm with one seed. All arms differ in their reward alone."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from arms import settings
from tasks import FAMILIES

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "quickstart"))

from quickstart import NOTED, SHARED, checkpoint


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large it is."""

    model: str
    steps: int
    batches: int
    """Different batches; more steps go over them again."""
    per_family: int
    held_out: int
    """Prompts of each family that are graded."""
    answers: int
    """Answers to each of them."""
    tokens: int
    group: int
    """Answers to each training prompt."""
    at_once: int
    """Answers that a CPU computes at once, in training; a GPU computes those of a whole step."""
    overrides: tuple[str, ...]


FULL = Size(
    model="smollm2",
    steps=32,
    batches=32,
    per_family=2,
    held_out=24,
    answers=8,
    tokens=40,
    group=6,
    at_once=6,  # a group: its prompt has one length, so there is little padding
    overrides=(
        "data.max_prompt_length=76",  # all prompts are shorter
        "actor_rollout_ref.actor.optim.lr=4e-5",
        "actor_rollout_ref.rollout.max_model_len=128",
    ),
)
QUICK = Size(
    model="tiny",
    steps=4,
    batches=2,
    per_family=1,
    held_out=2,
    answers=2,
    tokens=16,
    group=4,
    at_once=16,
    overrides=(
        "data.max_prompt_length=320",
        "actor_rollout_ref.actor.optim.lr=1e-3",
        "actor_rollout_ref.rollout.max_model_len=512",
    ),
)


def verls(
    size: Size, arm: str, seed: int, folder: Path, model: Path, *, begun: bool, answered: bool, gpu: bool = False
) -> tuple[tuple[str, ...], list[str]]:
    """What is switched on of ours, and the overrides of verl's configuration.

    Args:
        size: How large it is.
        arm: One of `arms.ARMS`.
        seed: Of the rollout; the data in the folder are of that seed, too.
        folder: The run folder.
        model: Folder of the policy.
        begun: Whether the run goes on from a checkpoint.
        answered: Whether the held-out prompts have been answered before the first step.
        gpu: Whether to train on a GPU.
    """
    prompts = size.per_family * len(FAMILIES)
    at_once = prompts * size.group if gpu else size.at_once
    switches, of_arm = settings(arm)
    return switches, [
        *SHARED,
        *size.overrides,
        *of_arm,
        # log-probabilities are the rollout's: a sixth of a step less, for all arms alike
        "algorithm.rollout_correction.bypass_mode=True",
        "actor_rollout_ref.rollout.calculate_log_probs=True",
        f"data.train_batch_size={prompts}",
        f"data.max_response_length={size.tokens}",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={prompts}",
        f"actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu={at_once}",
        f"actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu={at_once}",
        f"actor_rollout_ref.rollout.n={size.group}",
        f"actor_rollout_ref.rollout.val_kwargs.n={size.answers}",
        "actor_rollout_ref.rollout.val_kwargs.temperature=1.0",  # the policy as it is trained
        f"actor_rollout_ref.rollout.seed={seed}",
        f"actor_rollout_ref.model.path={model}",
        f"data.train_files={folder}/train.parquet",
        f"data.val_files={folder}/test.parquet",
        f"trainer.default_local_dir={folder}",
        f"trainer.validation_data_dir={folder}/answers",
        f"trainer.total_training_steps={size.steps}",
        f"trainer.resume_mode={'auto' if begun else 'disable'}",
        f"trainer.val_before_train={not answered}",
        f"trainer.test_freq={size.steps}",
        f"trainer.save_freq={size.steps if gpu else max(1, size.steps // 4)}",
        f"hydra.run.dir={folder}/hydra",
        *(on_gpu(switches) if gpu else ()),
    ]


def on_gpu(switches: tuple[str, ...]) -> list[str]:
    """What is different on a GPU, beside how many answers are computed at once; the gradient is the same sum."""
    modules = ["verl_rlar.cpu.one_gpu"]
    if "+rlar=default" in switches:
        modules = ["verl_rlar.plugin", "verl_rlar.modes", *modules]
    return [
        "trainer.device=cuda",
        "actor_rollout_ref.rollout.max_num_seqs=256",
        f"++ray_kwargs.ray_init.runtime_env.env_vars.VERL_USE_EXTERNAL_MODULES='{','.join(modules)}'",
    ]


def go_back(folder: Path) -> None:
    """To the checkpoint before the last step's: from the last one verl has no step to make, and so asks nothing."""
    last = checkpoint(folder)
    steps = [int(place.name.rpartition("_")[2]) for place in folder.glob("global_step_*")]
    noted = folder / NOTED
    if earlier := [step for step in steps if last is None or step < last]:
        noted.write_text(str(max(earlier)))
    else:
        noted.unlink()
