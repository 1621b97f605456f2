# SPDX-License-Identifier: Apache-2.0
"""Batched sampling from a transformers causal language model on one device.

What: `Decoder.decode` takes prompts with a `Sampling` each and answers them together, one forward pass per token for
all: prompts are padded on the left, equal ones (a GRPO group) are read once, a row leaves the batch as soon as it is
finished, and further ones may join it meanwhile. `Decoder.load` replaces the weights.

Guarantees:
- Every request gets its own temperature, top_p, top_k, repetition penalty, length and stop conditions, whatever else
  is in the batch. Temperature 0 is greedy.
- The chance in a request is a function of its seed alone, not of its place in a batch or of the order of arrival.
  (Rounding differs a little with the padding, so two nearly equal candidates can still swap.)
- Log-probabilities are those of the distribution that was sampled from, as vLLM's
  ``logprobs_mode=processed_logprobs``, verl's default: after penalty, temperature, top_k and top_p. With top_p 1,
  top_k -1 and no penalty they are what verl's trainer computes for ``old_log_prob``, log_softmax(logits /
  temperature). ``raw_logprobs`` are log_softmax(logits).
- Ids that the tokenizer does not know (a padded vocabulary) are never sampled and have probability 0, as in verl's
  vLLM server.
- Weights: every parameter and buffer of the model must come, with its shape; of tied ones, one is enough.

Not covered: images, LoRA, quantized models, several devices, prefix caching, models with recurrent state (Mamba and
the like: they have no left padding). To a model with a sliding window nothing joins: it waits until the batch is done.
"""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from verl_rlar.errors import ConfigError

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "fp32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16}
LogprobsMode = Literal["processed_logprobs", "raw_logprobs"]

_NEUTRAL = {
    "n": 1,
    "min_p": 0.0,
    "min_tokens": 0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "prompt_logprobs": None,
}
"""Further sampling parameters of vLLM, with the value that asks for nothing: the only one that is taken here."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How one request is to be sampled; the names and meanings of vLLM's ``SamplingParams``."""

    max_tokens: int
    """Most tokens to generate, at least 1."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    """In (0, 1]: sample among the likeliest tokens that together have this probability."""
    top_k: int = -1
    """Sample among this many likeliest tokens; -1 or 0: among all."""
    repetition_penalty: float = 1.0
    """Logits of tokens in prompt or answer are divided (if positive) or multiplied (if negative) by it."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer. The token that completes one is kept."""
    stop_token_ids: frozenset[int] = frozenset()
    """Tokens that end the answer, besides the model's end-of-sequence tokens. The token is kept."""
    ignore_eos: bool = False
    """Go on after an end-of-sequence token."""
    seed: int | None = None
    """Seed of this request's random numbers; None: the caller of `Decoder.decode` chose one."""

    def __post_init__(self) -> None:
        for name, fine, wanted in (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("top_k", self.top_k >= -1, "-1 or 0 (all tokens) or more"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0 (1.0 is none)"),
        ):
            if not fine:
                raise ConfigError(f"hf_cpu: sampling parameter {name}={getattr(self, name)!r} has to be {wanted}.")

    @classmethod
    def parse(cls, params: Mapping[str, Any], *, max_tokens: int, limit: int, ignore_eos: bool = False) -> "Sampling":
        """Reads the sampling parameters of a verl rollout request.

        Args:
            params: As verl's agent loops send them; ``logprobs`` is not read here.
            max_tokens: Most new tokens if the request does not say.
            limit: Most new tokens that fit into the model's context.
            ignore_eos: If the request does not say.

        Raises:
            ConfigError: A parameter is unknown, out of range or not supported; the message names it.
        """
        given = {name: value for name, value in params.items() if name != "logprobs"}
        for name, nothing in _NEUTRAL.items():
            if given.pop(name, nothing) not in (nothing, None):
                raise ConfigError(
                    f"hf_cpu does not support the sampling parameter {name}: leave it out, or use rollout.name=vllm."
                )
        alias = given.pop("max_new_tokens", None)  # SGLang's name, which verl accepts too
        wanted = given.pop("max_tokens", None) or alias or max_tokens
        stop = given.pop("stop", None) or ()
        values = {
            "max_tokens": max(1, min(int(wanted), limit)),
            "temperature": float(given.pop("temperature", 1.0)),
            "top_p": float(given.pop("top_p", 1.0)),
            "top_k": int(given.pop("top_k", -1)),
            "repetition_penalty": float(given.pop("repetition_penalty", 1.0)),
            "stop": (stop,) if isinstance(stop, str) else tuple(stop),
            "stop_token_ids": frozenset(given.pop("stop_token_ids", None) or ()),
            "ignore_eos": bool(given.pop("ignore_eos", ignore_eos)),
            "seed": given.pop("seed", None),
        }
        if given:
            raise ConfigError(
                f"hf_cpu does not know the sampling parameters {sorted(given)}: leave them out, or use "
                "rollout.name=vllm."
            )
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to be answered."""

    prompt: tuple[int, ...]
    """Token ids, at least one."""
    sampling: Sampling
    seed: int
    """Of this request's random numbers, unless `Sampling.seed` is set."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """The answer to a `Request`."""

    tokens: tuple[int, ...]
    """Generated token ids, with the token that ended the answer."""
    logprobs: tuple[float, ...]
    """Natural log-probability of each token."""
    aborted: bool
    """Whether the answer was cut short by the caller's ``stopped``."""


@dataclass
class _Row:
    """A request at work."""

    request: Request
    noise: torch.Tensor
    """Uniform numbers in [0, 1), one per token: [max_tokens], float64."""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    done: bool = False

    def completion(self) -> Completion:
        return Completion(tokens=tuple(self.tokens), logprobs=tuple(self.logprobs), aborted=not self.done)


@dataclass
class _Batch:
    """Rows at work, and what the model knows of them, padded on the left."""

    rows: list[_Row]
    logits: torch.Tensor
    """Of each row's next token: [rows, vocabulary], float32."""
    mask: torch.Tensor
    """[rows, width]"""
    positions: torch.Tensor
    """Of each row's latest token: [rows, 1]."""
    cache: DynamicCache

    def keep(self, left: list[int]) -> None:
        """Drops the other rows, and the columns that none of these needs."""
        index = torch.tensor(left, device=self.mask.device)
        self.rows = [self.rows[i] for i in left]
        self.logits, self.mask, self.positions = self.logits[index], self.mask[index], self.positions[index]
        self.cache.batch_select_indices(index)
        if self.joinable and (unused := int(self.mask.any(0).int().argmax())):
            self.mask = self.mask[:, unused:]
            for layer in cast("list[Any]", self.cache.layers):
                layer.keys, layer.values = layer.keys[..., unused:, :], layer.values[..., unused:, :]

    @property
    def joinable(self) -> bool:
        """Whether the cache holds all columns: one with a sliding window does not."""
        return all(type(layer) is DynamicLayer for layer in self.cache.layers)

    def join(self, other: "_Batch") -> None:
        """Takes the rows of another batch, whose next tokens are known as well."""
        width = max(self.mask.shape[1], other.mask.shape[1])
        self.rows += other.rows
        self.logits = torch.cat([self.logits, other.logits])
        self.mask = torch.cat([pad(mask, (width - mask.shape[1], 0)) for mask in (self.mask, other.mask)])
        self.positions = torch.cat([self.positions, other.positions])
        for mine, theirs in zip(self.cache.layers, other.cache.layers, strict=True):
            for name in ("keys", "values"):
                both = (getattr(layer, name) for layer in (mine, theirs))
                padded = [pad(tensor, (0, 0, width - tensor.shape[-2], 0)) for tensor in both]
                setattr(mine, name, torch.cat(padded))


class Decoder:
    """A model and its tokenizer, ready to decode. Not thread-safe: one call at a time.

    Args:
        model: In evaluation mode, on one device.
        tokenizer: The model's.
        logprobs_mode: See the module's docstring.

    Raises:
        ConfigError: The model carries recurrent state.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        logprobs_mode: LogprobsMode = "processed_logprobs",
    ):
        if getattr(model, "_is_stateful", False):
            raise ConfigError(
                f"hf_cpu cannot decode {type(model).__name__}: it carries recurrent state. Use rollout.name=vllm."
            )
        self.model, self.tokenizer, self.logprobs_mode = model, tokenizer, logprobs_mode
        eos = model.generation_config.eos_token_id if model.generation_config else None
        self.eos = {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id} - {None}
        self._vocabulary = len(tokenizer)  # counted anew by every call of len: a fifth of the time of a token
        self._tensors = model.state_dict()  # shares the model's memory
        self._loaded: set[str] = set()
        self._device = model.device

    @classmethod
    def from_folder(
        cls,
        path: str,
        *,
        tokenizer_path: str | None = None,
        dtype: str = "float32",
        device: str = "cpu",
        trust_remote_code: bool = False,
        logprobs_mode: LogprobsMode = "processed_logprobs",
    ) -> "Decoder":
        """Loads a model folder (or a hub id that is in the local cache).

        Raises:
            ConfigError: The dtype is not supported; the message names those that are.
        """
        if dtype not in DTYPES:
            raise ConfigError(f"hf_cpu: actor_rollout_ref.rollout.dtype={dtype!r} has to be one of {sorted(DTYPES)}.")
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_path or path, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[dtype], trust_remote_code=trust_remote_code)
        torch.nn.Module.to(model, device)
        return cls(model.eval(), tokenizer, logprobs_mode=logprobs_mode)

    @property
    def context(self) -> int:
        """Most tokens of prompt and answer together that the model was made for."""
        return self.model.config.get_text_config().max_position_embeddings

    # -- decoding -----------------------------------------------------------------------------------------------------
    @torch.inference_mode()
    def decode(
        self,
        requests: Sequence[Request],
        stopped: Callable[[], bool] = lambda: False,
        joining: Callable[[int], Sequence[Request]] = lambda at_work: (),
        finished: Callable[[int, Completion], None] = lambda number, completion: None,
    ) -> tuple[Completion, ...]:
        """Answers the requests together.

        Args:
            requests: At least one.
            stopped: Asked once per token; True ends all answers as they are.
            joining: Asked after each token: which further requests join, where so many are at work. None at work: what
                does not join now is not answered.
            finished: Told each answer as soon as it is finished, with its place in what is returned.

        Returns:
            One completion per request, in their order, those that joined last.
        """
        rows = [_Row(request, _uniform(request)) for request in requests]
        batch = self._read(rows)
        places = {id(row): place for place, row in enumerate(rows)}
        while not stopped():
            tokens = self._sample(batch.logits, batch.rows)
            for row in batch.rows:
                if row.done:
                    finished(places[id(row)], row.completion())
            left = [i for i, row in enumerate(batch.rows) if not row.done]
            if left:
                if len(left) < len(batch.rows):
                    tokens = tokens[self._tensor(left)]
                    batch.keep(left)
                self._forward(batch, tokens)
            if (not left or batch.joinable) and (more := joining(len(left))):
                new = [_Row(request, _uniform(request)) for request in more]
                places |= {id(row): len(rows) + place for place, row in enumerate(new)}
                rows += new
                if left:
                    batch.join(self._read(new))
                else:
                    batch = self._read(new)
            elif not left:
                break
        return tuple(row.completion() for row in rows)

    def _read(self, rows: list[_Row]) -> _Batch:
        """Reads the prompts of rows, equal ones (a GRPO group's) once."""
        prompts = list(dict.fromkeys(row.request.prompt for row in rows))
        width = max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, prompt in enumerate(prompts):
            ids[i, width - len(prompt) :] = torch.tensor(prompt)
            mask[i, width - len(prompt) :] = 1
        ids, mask = ids.to(self._device), mask.to(self._device)
        positions = (mask.cumsum(1) - 1).clamp_(min=0)
        cache = DynamicCache(config=self.model.config)
        logits = self._logits(ids, mask, positions, cache)
        place = {prompt: i for i, prompt in enumerate(prompts)}
        of = self._tensor([place[row.request.prompt] for row in rows])
        cache.batch_select_indices(of)
        return _Batch(list(rows), logits[of], mask[of], positions[of, -1:], cache)

    def _forward(self, batch: _Batch, tokens: torch.Tensor) -> None:
        """Shows the model each row's latest token."""
        batch.positions = batch.positions + 1
        batch.mask = torch.cat([batch.mask, batch.mask.new_ones(len(batch.rows), 1)], dim=1)
        batch.logits = self._logits(tokens[:, None], batch.mask, batch.positions, batch.cache)

    def _logits(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: DynamicCache
    ) -> torch.Tensor:
        """Logits of the next tokens: [rows, vocabulary], float32."""
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float()

    def _sample(self, logits: torch.Tensor, rows: list[_Row]) -> torch.Tensor:
        """Draws the next token of each row and notes it there.

        Args:
            logits: [rows, vocabulary], float32; changed in place.

        Returns:
            The tokens: [rows], int64.
        """
        samplings = [row.request.sampling for row in rows]
        logits[:, self._vocabulary :] = -torch.inf
        raw = logits.log_softmax(-1) if self.logprobs_mode == "raw_logprobs" else None
        for i, (row, sampling) in enumerate(zip(rows, samplings, strict=True)):
            if sampling.repetition_penalty != 1.0:
                seen = self._tensor(sorted({*row.request.prompt, *row.tokens}))
                old = logits[i, seen]
                penalty = sampling.repetition_penalty
                logits[i, seen] = torch.where(old > 0, old / penalty, old * penalty)
        greedy = self._tensor([sampling.temperature == 0 for sampling in samplings])
        logits /= self._tensor([sampling.temperature or 1.0 for sampling in samplings])[:, None]
        _keep_likeliest(logits, samplings)
        logprobs = logits.log_softmax(-1)
        # Inverse of the cumulative distribution: one uniform number per token, whatever the size of the vocabulary.
        cumulative = logprobs.exp().double().cumsum(-1)
        noise = torch.stack([row.noise[len(row.tokens)] for row in rows]).to(self._device)[:, None] * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, noise, right=True)[:, 0]
        tokens = torch.where(greedy, logits.argmax(-1), drawn)
        chosen = (logprobs if raw is None else raw).gather(1, tokens[:, None])[:, 0]
        for row, token, logprob in zip(rows, tokens.tolist(), chosen.tolist(), strict=True):
            row.tokens.append(token)
            row.logprobs.append(logprob)
            row.done = self._finished(row)
        return tokens

    def _tensor(self, values: list[Any]) -> torch.Tensor:
        return torch.tensor(values, device=self._device)

    def _finished(self, row: _Row) -> bool:
        sampling, token = row.request.sampling, row.tokens[-1]
        if len(row.tokens) >= sampling.max_tokens or token in sampling.stop_token_ids:
            return True
        if token in self.eos and not sampling.ignore_eos:
            return True
        if sampling.stop:
            # A text of n characters is completed by one of the last n tokens or so; 8 more for multi-byte characters.
            tail = self.tokenizer.decode(row.tokens[-max(map(len, sampling.stop)) - 8 :], skip_special_tokens=True)
            return any(text in tail for text in sampling.stop)
        return False

    # -- weights ------------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor], *, last: bool) -> None:
        """Copies new weights into the model, possibly in several parts. They are cast to the model's dtype.

        Args:
            tensors: By the names of the model's ``state_dict()``.
            last: Whether the model is complete with this part.

        Raises:
            ConfigError: A tensor is unknown, has another shape or, after the last part, is missing. The message names
                it. The model is of no use then.
        """
        for name, tensor in tensors.items():
            own = self._tensors.get(name)
            if own is None:
                raise ConfigError(
                    f"hf_cpu: the trainer sent the weight {name!r}, which {type(self.model).__name__} does not have. "
                    "Trainer and rollout have to use one architecture (actor_rollout_ref.model.path)."
                )
            if own.shape != tensor.shape:
                raise ConfigError(
                    f"hf_cpu: the trainer sent {name!r} as {tuple(tensor.shape)}; the rollout has {tuple(own.shape)}."
                )
            own.copy_(tensor)
            self._loaded.add(name)
        if last:
            loaded, self._loaded = self._loaded, set()
            # Tied tensors are one piece of memory under two names.
            fresh = {self._tensors[name].data_ptr() for name in loaded}
            missing = [n for n, own in self._tensors.items() if n not in loaded and own.data_ptr() not in fresh]
            if missing:
                shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
                raise ConfigError(f"hf_cpu: the trainer did not send {len(missing)} weights of the model: {shown}.")


def request_seed(seed: int, version: int | None, prompt: Sequence[int], occurrence: int) -> int:
    """Seed of a request that came without one.

    The n-th request for a prompt under one version of the weights always has the same seed, in whatever order requests
    arrive: the answers to a GRPO group are the same from run to run, as a set.

    Args:
        seed: Of the rollout.
        version: Of the weights; None before the first update.
        prompt: Token ids.
        occurrence: How many requests for this prompt came before, under these weights.
    """
    text = f"{seed}|{version}|{occurrence}|{','.join(map(str, prompt))}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def _uniform(request: Request) -> torch.Tensor:
    seed = request.seed if request.sampling.seed is None else request.sampling.seed
    noise = torch.rand(request.sampling.max_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return noise.clamp_(max=1 - 2**-40)  # so that rounding cannot lead past the last token


def _keep_likeliest(logits: torch.Tensor, samplings: list[Sampling]) -> None:
    """Sets what top_k and top_p exclude to minus infinity, in place."""
    for i, sampling in enumerate(samplings):
        if sampling.temperature == 0 or (sampling.top_p == 1 and sampling.top_k <= 0):
            continue
        ordered, order = logits[i].sort(descending=True)
        if 0 < sampling.top_k < len(ordered):
            ordered[sampling.top_k :] = -torch.inf
        if sampling.top_p < 1:
            before = ordered.softmax(-1).cumsum(-1).roll(1)
            before[0] = 0  # the likeliest token always stays
            ordered[before >= sampling.top_p] = -torch.inf
        logits[i, order] = ordered
