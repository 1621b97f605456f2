# SPDX-License-Identifier: Apache-2.0
"""How far a training took a policy: KL from the trained policy to the one it began with, on the trained one's answers.

At every token of an answer, and after its last one, both models' whole distributions are compared: the sum of
p log(p / q) in nats, p the trained policy's. What is reported is the mean over all these places of all answers,
computed on the CPU in float32.

Not covered: answers are texts, as verl keeps them, and are tokenised again: rarely, other tokens than were sampled.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def divergence(base: Path, checkpoint: Path, talks: Iterable[tuple[str, str]]) -> float:
    """Mean KL per token, in nats, at least 0.

    Args:
        base: Folder of the model that the training began with.
        checkpoint: verl's checkpoint of one process: the folder with ``model_world_size_1_rank_0.pt``.
        talks: Prompts and answers; at least one.

    Raises:
        FileNotFoundError: There is no such checkpoint.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(base)
    before = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    after = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    # a checkpoint of our own run: verl keeps its tensors in wrappers that need pickle
    state = torch.load(checkpoint / "model_world_size_1_rank_0.pt", map_location="cpu", weights_only=False)
    after.load_state_dict({name: getattr(value, "_local_tensor", value).float() for name, value in state.items()})
    total, places = 0.0, 0
    with torch.inference_mode():
        for prompt, answer in talks:
            asked = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
            )
            said = tokenizer(answer, add_special_tokens=False)["input_ids"]
            both = torch.tensor([asked + said])
            p, q = (model(both).logits[0, len(asked) - 1 :].log_softmax(-1) for model in (after, before))
            total += float((p.exp() * (p - q)).sum())
            places += len(p)
    return max(0.0, total / places)  # rounding can lead below 0 where nothing was learned
