# SPDX-License-Identifier: Apache-2.0
"""What a run needs, by sums that are printed with their assumptions: memory of a GPU, and time of a step.

Nothing here was measured: no GPU was at hand. The sums are the usual ones, and on the safe side where they round.

    optimizer  16 bytes per parameter (float32 weights, gradients, two moments), sharded over all GPUs that train; 12
               while responses are written, as verl drops the gradients
    reference  none on a GPU: with FSDP2 verl keeps it in the host's memory, 4 bytes per parameter, sharded likewise
    gathered   one layer and the embeddings in bfloat16, as FSDP puts them together
    activations with checkpointing: a bfloat16 state per layer and token, one layer's inside
    logits     of a whole micro batch and their gradients, in bfloat16
    rollout    what vLLM is given; its weights (2 bytes per parameter), the rest for keys and values
    time       6 x parameters x tokens for a gradient, a third more for checkpointing, 2 for each log-probability

Guarantees: pure; every number says its unit.
"""

from __future__ import annotations

from dataclasses import dataclass

from settings import GPU_GB, MODELS, PROMPT_TOKENS, PROMPTS, RESPONSE_TOKENS, RESPONSES, Choices

GIB = 2**30
FLOPS = 989e12
"""Of an H100 in bfloat16, dense, per second."""
UTILISATION = 0.35
"""Share of it that training reaches."""
ROLLOUT_TOKENS_S = 2500.0
"""Tokens that vLLM writes per second and GPU, many at a time."""
PROMPT_MEAN = 300
"""Mean length of a prompt, in tokens."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Of a run."""

    memory: dict[str, float]
    """GiB of a GPU that trains, by what holds it."""
    peak: float
    """GiB while gradients are computed; vLLM has given its memory back."""
    rollout: float
    """GiB while responses are written, with reward models that share the GPU."""
    kv_tokens: int
    """Tokens for whose keys and values there is room on a GPU."""
    step_s: dict[str, float]
    """Seconds of a step, by its parts."""
    fits: bool
    """Whether both fit a GPU."""
    assumptions: tuple[str, ...]


def estimate(choices: Choices, gpu_gb: float = GPU_GB) -> Estimate:
    model, gpus = MODELS[choices.model], choices.nodes * choices.gpus
    colocated = choices.placement == "colocated"
    tokens = 2 * (PROMPT_TOKENS + RESPONSE_TOKENS)
    layer = (model.parameters - 2 * model.vocabulary * model.hidden) / model.layers
    memory = {
        "weights, gradients, optimizer": 16 * model.parameters / gpus / GIB,
        "gathered": 2 * (2 * layer + 2 * model.vocabulary * model.hidden) / GIB,
        "activations": 2 * tokens * model.hidden * (model.layers + 16) / GIB,
        "logits": 2 * 2 * tokens * model.vocabulary / GIB,
    }
    share = 0.5 if colocated else 0.7
    kept = 12 * model.parameters / gpus / GIB
    weights = 2 * model.parameters / GIB
    kv = 2 * 2 * model.layers * model.kv_heads * model.head
    responses = PROMPTS * RESPONSES
    worked = responses * (PROMPT_MEAN + model.response_tokens)
    speed = gpus * FLOPS * UTILISATION
    step = {
        "responses": responses * model.response_tokens / (gpus * ROLLOUT_TOKENS_S),
        "log-probabilities": 2 * 2 * model.parameters * worked / speed,
        "gradients": 8 * model.parameters * worked / speed,
        "weights to the rollout": 5.0,
    }
    rollout = share * gpu_gb + kept + (0.3 * gpu_gb if colocated else 0.0)
    peak = sum(memory.values())
    return Estimate(
        memory=memory,
        peak=peak,
        rollout=rollout,
        kv_tokens=max(0, int((share * gpu_gb - weights - 4) * GIB / kv)),
        step_s=step,
        fits=max(peak, rollout) <= gpu_gb,
        assumptions=(
            f"{gpus} GPUs of {gpu_gb:g} GiB, {FLOPS / 1e12:g} TFLOP/s at {UTILISATION:.0%}",
            f"{4 * model.parameters / choices.nodes / GIB:.0f} GiB of each node's memory for the reference model",
            f"{ROLLOUT_TOKENS_S:g} tokens written per second and GPU",
            f"responses of {model.response_tokens} tokens on average (the paper's), prompts of {PROMPT_MEAN}",
            "rewards hidden behind the responses; what is exposed comes on top (README, Figures)",
        ),
    )
