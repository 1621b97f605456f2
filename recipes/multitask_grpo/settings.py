# SPDX-License-Identifier: Apache-2.0
"""What is trained and how: the paper's set-up (arXiv 2603.00724) as overrides of stock verl 0.9.1, with reasons.

`command` gives the whole command line. What the paper's statements leave open or contradict is decided here, and said.

Guarantees: pure; the same choices give the same command.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Model:
    """A policy, as far as estimates need it; numbers are of its ``config.json``."""

    repo: str
    parameters: float
    layers: int
    hidden: int
    vocabulary: int
    kv_heads: int
    head: int
    """Size of an attention head."""
    response_tokens: int
    """Mean length of a response, from the paper's table of results."""
    gated: bool = False
    """Whether the hub wants its terms accepted first."""


MODELS = {
    "qwen3-8b": Model(
        repo="Qwen/Qwen3-8B",
        parameters=8.19e9,
        layers=36,
        hidden=4096,
        vocabulary=151_936,
        kv_heads=8,
        head=128,
        response_tokens=1064,
    ),
    "llama-3.1-8b": Model(
        repo="meta-llama/Llama-3.1-8B-Instruct",
        parameters=8.03e9,
        layers=32,
        hidden=4096,
        vocabulary=128_256,
        kv_heads=8,
        head=128,
        response_tokens=153,
        gated=True,
    ),
}
PROMPTS, RESPONSES, STEPS = 256, 8, 80
PROMPT_TOKENS, RESPONSE_TOKENS = 10_000, 5_000
MINI_BATCH = 64
"""Prompts of an optimizer step: 4 steps on each batch. The paper's table says 16, which in verl's terms would be 16
steps on each batch; its script says 64 of 128."""
GPU_GB = 80.0


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What whoever starts a run decides."""

    model: str = "qwen3-8b"
    """Key of `MODELS`."""
    path: str | None = None
    """Folder or repository of the weights in place of the model's own."""
    placement: str = "standalone"
    """Where reward models are served: on GPUs of their own, or on those of the training."""
    nodes: int = 1
    """Nodes that train."""
    gpus: int = 8
    """GPUs of each of them that train."""
    reward_gpus: int = 1
    """Standalone: GPUs that Ray sets aside for reward models, on each of `reward_nodes`."""
    reward_nodes: int = 1
    data: Path = Path("data")
    run: Path = Path("checkpoints/multitask")
    steps: int = STEPS
    mini_batch: int = MINI_BATCH
    seed: int = 1
    resume: bool = False
    start: int = 1
    """How many times the run was started, with this one; each has a file of verl's metrics."""
    library: Path | None = None
    """A library that `rlar build` has filled. None: the run's own, which begins with the built-in rules."""


def overrides(choices: Choices, extra: Sequence[str] = ()) -> list[str]:
    """verl's settings, in groups; see the comments."""
    model = MODELS[choices.model]
    colocated = choices.placement == "colocated"
    tokens = PROMPT_TOKENS + RESPONSE_TOKENS
    return [
        # The switch, and where the reward models are
        "+rlar=default",
        *(["+rlar_placement=colocated"] if colocated else []),
        # Data: as in the paper; rows that are too long are left out, and never cut
        f"data.train_files={choices.data}/train.parquet",
        f"data.val_files={choices.data}/val.parquet",
        f"data.train_batch_size={PROMPTS}",
        f"data.max_prompt_length={PROMPT_TOKENS}",
        f"data.max_response_length={RESPONSE_TOKENS}",
        "data.filter_overlong_prompts=True",
        "data.truncation=error",
        f"data.seed={choices.seed}",
        # GRPO, with the KL to the start as a loss: rewards stay what the tools gave
        "algorithm.adv_estimator=grpo",
        "algorithm.use_kl_in_reward=False",
        "actor_rollout_ref.actor.use_kl_loss=True",
        "actor_rollout_ref.actor.kl_loss_coef=1e-4",
        "actor_rollout_ref.actor.kl_loss_type=low_var_kl",
        "actor_rollout_ref.actor.entropy_coeff=0",
        # The policy, and how it learns
        f"actor_rollout_ref.model.path={choices.path or model.repo}",
        "actor_rollout_ref.model.use_remove_padding=True",
        "actor_rollout_ref.model.enable_gradient_checkpointing=True",
        "actor_rollout_ref.actor.strategy=fsdp2",  # the paper used Megatron; the sums are the same
        "actor_rollout_ref.actor.optim.lr=1e-6",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={choices.mini_batch}",
        "actor_rollout_ref.actor.use_dynamic_bsz=True",  # batches by tokens: no micro batch to tune
        f"actor_rollout_ref.actor.ppo_max_token_len_per_gpu={2 * tokens}",
        "actor_rollout_ref.ref.log_prob_use_dynamic_bsz=True",
        "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True",
        # Responses: vLLM, one engine per GPU, as a model of 8B fits one
        "actor_rollout_ref.rollout.name=vllm",
        f"actor_rollout_ref.rollout.n={RESPONSES}",
        "actor_rollout_ref.rollout.tensor_model_parallel_size=1",
        f"actor_rollout_ref.rollout.gpu_memory_utilization={0.5 if colocated else 0.7}",
        "actor_rollout_ref.rollout.val_kwargs.do_sample=True",
        "actor_rollout_ref.rollout.val_kwargs.temperature=1.0",
        "actor_rollout_ref.rollout.val_kwargs.top_p=0.7",
        "actor_rollout_ref.rollout.val_kwargs.top_k=50",
        # Reward models: nothing is set aside where the built-in rules are all there is, as they start when one is live
        "rlar.serving.backend=vllm",
        "rlar.serving.dtype=bfloat16",
        *(
            [
                f"rlar.serving.gpus={list(range(choices.gpus))}".replace(" ", ""),
                "rlar.serving.gpu_share=0.3",
                f"rlar.serving.nodes={choices.nodes}",
            ]
            if colocated
            else [f"rlar.serving.ray_gpus={choices.reward_gpus}", f"rlar.serving.nodes={choices.reward_nodes}"]
        ),
        *([f"rlar.library.path={choices.library}"] if choices.library else []),
        # The run
        "reward.num_workers=8",
        f"trainer.n_gpus_per_node={choices.gpus}",
        f"trainer.nnodes={choices.nodes}",
        f"trainer.total_training_steps={choices.steps}",
        "trainer.total_epochs=1000",  # steps decide: the paper's epochs and steps do not agree
        f"trainer.default_local_dir={choices.run}",
        f"trainer.validation_data_dir={choices.run}/validation",
        f"trainer.resume_mode={'auto' if choices.resume else 'disable'}",
        "trainer.save_freq=20",
        "trainer.max_actor_ckpt_to_keep=2",  # one is some 12 bytes per parameter
        "trainer.test_freq=10",
        "trainer.val_before_train=True",
        "trainer.logger=[console,file]",
        # verl empties the file that it finds: one for each start; told to Ray, as a joined cluster does not have our
        # environment
        f"++ray_kwargs.ray_init.runtime_env.env_vars.VERL_FILE_LOGGER_PATH={choices.run}/metrics.{choices.start}.jsonl",
        "trainer.project_name=rlar",
        f"trainer.experiment_name=multitask-{choices.model}",
        *extra,
    ]


def command(choices: Choices, extra: Sequence[str] = ()) -> list[str]:
    """The command line that trains, without the interpreter."""
    return ["-m", "verl.trainer.main_ppo", *overrides(choices, extra)]
