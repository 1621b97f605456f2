# SPDX-License-Identifier: Apache-2.0
"""``rollout.name=hf_cpu``: verl's rollout server on a transformers model, without vLLM.

What: `HFServer` is the Ray actor that verl's agent loops ask for completions; `HFReplica` starts it and refuses what
it cannot do; `HFWeightSender` runs in the training worker and sends it new weights. The decoding itself is
`decoder.py`.

Guarantees:
- The interface of verl's `vLLMHttpServer`: completions carry the version of the weights
  (``extra_fields["global_steps"]``); `HFServer.abort_all_requests` ends what runs with ``stop_reason="aborted"`` and
  what it has so far, and holds later requests back until `HFServer.resume_generation`.
- Requests that arrive while a batch runs join it, as far as there is room: never more than ``rollout.max_num_seqs``
  are at work. Each is answered as soon as it is finished.
- No request sees half of a weight update. Missing, unknown and misshapen weights are errors that name them.
- With the same ``rollout.seed`` the answers to a prompt under the same weights are the same, as a set.
- A setting that is not supported is refused when the rollout is made, by name.

Not covered: more than one training process, tensor or data parallelism, LoRA, images and video, quantization, expert
routing replay, disaggregated or separate rollout (``checkpoint_engine.backend`` other than naive), serving over HTTP.
"""

import asyncio
import logging
import os
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Awaitable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from verl.plugin.platform import get_platform
from verl.utils.device import get_device_name
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, TokenOutput

from verl_rlar.cpu.decoder import DTYPES, Completion, Decoder, Request, Sampling, request_seed
from verl_rlar.errors import ConfigError

logger = logging.getLogger(__name__)

_GATHER_S = 0.05
"""Requests are taken up together if none comes later than this after the one before it, in seconds. On a slow machine
those of a step come one by one; and the prompt of a group is read once for those that are taken up together."""
_START_TIMEOUT_S = 600.0
_PARK_TIMEOUT_S = 1800.0
"""Longest that a request waits for `HFServer.resume_generation`."""
_SYNC_TIMEOUT_S = 600.0
"""Longest that one part of a weight update may take, with the requests at work that have to end before."""


def refuse_unsupported(config: Any, model: Any, gpus_per_node: int) -> None:
    """Checks the rollout settings.

    Args:
        config: verl's ``RolloutConfig``.
        model: verl's model config (``actor_rollout_ref.model``).
        gpus_per_node: ``trainer.n_gpus_per_node``.

    Raises:
        ConfigError: Something that ``hf_cpu`` cannot do is asked for. The message names all such settings.
    """
    lora = model.get("lora", None) or {}
    rollout, actor = "actor_rollout_ref.rollout", "actor_rollout_ref.model"
    checks = (
        (gpus_per_node > 1, f"trainer.n_gpus_per_node={gpus_per_node}: it runs on one device; set it to 1"),
        (config.tensor_model_parallel_size > 1, f"{rollout}.tensor_model_parallel_size has to be 1"),
        (config.data_parallel_size > 1, f"{rollout}.data_parallel_size has to be 1"),
        (config.pipeline_model_parallel_size > 1, f"{rollout}.pipeline_model_parallel_size has to be 1"),
        (config.dtype not in DTYPES, f"{rollout}.dtype={config.dtype!r} has to be one of {sorted(DTYPES)}"),
        (config.quantization is not None, f"{rollout}.quantization has to be null"),
        (bool(config.qat) and config.qat.get("enable", False), f"{rollout}.qat.enable has to be False"),
        (
            config.logprobs_mode not in ("processed_logprobs", "raw_logprobs"),
            f"{rollout}.logprobs_mode={config.logprobs_mode!r} has to be processed_logprobs or raw_logprobs",
        ),
        (config.checkpoint_engine.backend != "naive", f"{rollout}.checkpoint_engine.backend has to be naive"),
        (config.enable_rollout_routing_replay, f"{rollout}.enable_rollout_routing_replay has to be False"),
        (config.disaggregation.enabled, f"{rollout}.disaggregation.enabled has to be False"),
        (bool(config.mtp) and config.mtp.enable_rollout, f"{actor}.mtp.enable_rollout has to be False"),
        (
            (model.get("lora_rank", 0) or 0) > 0 or (lora.get("rank", 0) or 0) > 0,
            f"{actor}.lora_rank and {actor}.lora.rank have to be 0: LoRA is not supported",
        ),
    )
    problems = [problem for wrong, problem in checks if wrong]
    if problems:
        raise ConfigError(
            f"actor_rollout_ref.rollout.name=hf_cpu cannot do what is configured: {'; '.join(problems)}. "
            "Change that, or use rollout.name=vllm (on this CPU: pip install 'verl-rlar[cpu-vllm]')."
        )


@dataclass(eq=False)
class _Waiting:
    """A request in the queue."""

    id: str
    request: Request
    answer: "asyncio.Future[TokenOutput]"

    def settle(self, result: TokenOutput | Exception) -> None:
        """Answers the request, unless whoever asked has gone."""
        if self.answer.done():
            return
        if isinstance(result, Exception):
            self.answer.set_exception(result)
        else:
            self.answer.set_result(result)


_NOTHING = Completion(tokens=(), logprobs=(), aborted=True)


class HFServer:
    """The rollout server: queues requests, decodes them together, takes weight updates in between.

    Args:
        decoder: What answers.
        seed: Of the requests that bring none.
        prompt_length: ``rollout.prompt_length``, in tokens; with `response_length` the default length of an answer.
        response_length: ``rollout.response_length``, in tokens.
        max_model_len: Most tokens of prompt and answer; None: what the model was made for.
        max_num_seqs: Most requests at work at once.
        ignore_eos: Default of the requests.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        seed: int = 0,
        prompt_length: int,
        response_length: int,
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        ignore_eos: bool = False,
    ):
        self.decoder, self.seed, self.ignore_eos = decoder, seed, ignore_eos
        self.prompt_length, self.response_length, self.max_num_seqs = prompt_length, response_length, max_num_seqs
        self.max_model_len = max_model_len or decoder.context
        if self.max_model_len > decoder.context:
            raise ConfigError(
                f"actor_rollout_ref.rollout.max_model_len={self.max_model_len} is more than the {decoder.context} "
                "tokens that the model was made for: lower it."
            )
        self.global_steps: int | None = None
        self._occurrences: Counter[tuple[int, ...]] = Counter()
        self._queue: deque[_Waiting] = deque()
        self._came = 0.0
        """When the latest request came."""
        self._running: list[_Waiting] = []
        self._model = asyncio.Lock()  # held by a batch, or from the first to the last part of a weight update
        self._wanted = 0
        """How many wait for the batch to end: nothing joins it then."""
        self._updating = False
        self._worker: asyncio.Task[None] | None = None
        self._stop = threading.Event()
        self._open = asyncio.Event()
        self._open.set()
        self._rejecting = False

    # -- completions --------------------------------------------------------------------------------------------------
    async def generate(
        self,
        prompt_ids: list[int],
        sampling_params: dict[str, Any],
        request_id: str,
        image_data: Any = None,
        video_data: Any = None,
        audio_data: Any = None,
        mm_processor_kwargs: Any = None,
        priority: int = 0,
    ) -> TokenOutput:
        """Answers one prompt. Signature and result are those of verl's ``vLLMHttpServer.generate``; no priorities.

        Raises:
            ConfigError: The request asks for something unsupported, or its prompt does not fit.
            TimeoutError: Generation was paused and not resumed for half an hour.
        """
        if any(data is not None and len(data) for data in (image_data, video_data, audio_data)):
            raise ConfigError("hf_cpu answers text only; for images, video and audio use rollout.name=vllm.")
        prompt = tuple(int(token) for token in prompt_ids)
        limit = self.max_model_len - len(prompt)
        if not prompt or limit < 1:
            raise ConfigError(
                f"hf_cpu: a prompt of {len(prompt)} tokens leaves no room in a context of {self.max_model_len}: lower "
                "data.max_prompt_length or raise actor_rollout_ref.rollout.max_model_len."
            )
        default = min(self.response_length, self.prompt_length + self.response_length - len(prompt))
        sampling = Sampling.parse(sampling_params, max_tokens=max(1, default), limit=limit, ignore_eos=self.ignore_eos)
        while not self._open.is_set():
            if self._rejecting:
                return self._output(_NOTHING)
            await _within(_PARK_TIMEOUT_S, self._open.wait(), "waiting for generation to be resumed")
        seed = request_seed(self.seed, self.global_steps, prompt, self._occurrences[prompt])
        self._occurrences[prompt] += 1
        request = Request(prompt=prompt, sampling=sampling, seed=seed)
        waiting = _Waiting(request_id, request, asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        self._came = time.monotonic()
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        output = await waiting.answer
        if not sampling_params.get("logprobs", False):
            output.log_probs = None
        return output

    async def _work(self) -> None:
        """Answers until the queue is empty."""
        while self._queue:
            while self._queue and not self._gathered(0):
                await asyncio.sleep(_GATHER_S)
            async with self._model:
                if batch := self._admitted(0):  # an abort may have emptied the queue meanwhile
                    await self._answer(batch)

    async def _answer(self, batch: list[_Waiting]) -> None:
        """Answers requests, and those that join them."""
        loop = asyncio.get_running_loop()

        async def admit(at_work: int) -> list[Request]:
            more = self._admitted(at_work)
            batch.extend(more)
            return [waiting.request for waiting in more]

        def joining(at_work: int) -> list[Request]:
            if self._wanted or not self._gathered(at_work):
                return []
            return asyncio.run_coroutine_threadsafe(admit(at_work), loop).result()

        def finished(number: int, completion: Completion) -> None:
            loop.call_soon_threadsafe(batch[number].settle, self._output(completion))

        requests = [waiting.request for waiting in batch]
        self._running = batch
        try:
            completions = await asyncio.to_thread(self.decoder.decode, requests, self._stop.is_set, joining, finished)
            for waiting, completion in zip(batch, completions, strict=True):
                waiting.settle(self._output(completion))
        except Exception as error:
            for waiting in batch:
                waiting.settle(error)
        finally:
            self._running = []

    def _gathered(self, at_work: int) -> bool:
        """Whether requests wait for which there is room, and no further one comes; from any thread."""
        room, waiting = self.max_num_seqs - at_work, len(self._queue)
        return 0 < room <= waiting or (0 < min(room, waiting) and time.monotonic() - self._came >= _GATHER_S)

    def _admitted(self, at_work: int) -> list[_Waiting]:
        """The requests that are taken up next."""
        return [self._queue.popleft() for _ in range(min(self.max_num_seqs - at_work, len(self._queue)))]

    def _output(self, completion: Completion) -> TokenOutput:
        return TokenOutput(
            token_ids=list(completion.tokens),
            log_probs=list(completion.logprobs),
            stop_reason="aborted" if completion.aborted else "completed",
            extra_fields={"global_steps": self.global_steps},
        )

    # -- control ------------------------------------------------------------------------------------------------------
    async def abort_all_requests(self, reset_prefix_cache: bool = True, reject_request: bool = False) -> dict[str, Any]:
        """Ends all requests as they are, and admits no other before `resume_generation`.

        Args:
            reset_prefix_cache: Without meaning: there is none.
            reject_request: Whether later requests come back aborted instead of waiting.

        Returns:
            ``aborted_count`` and ``request_ids``.
        """
        self._open.clear()
        self._rejecting = reject_request
        ids = [waiting.id for waiting in (*self._running, *self._queue) if not waiting.answer.done()]
        while self._queue:
            self._queue.popleft().settle(self._output(_NOTHING))
        self._stop.set()
        try:
            await _within(_SYNC_TIMEOUT_S, self._model.acquire(), "waiting for the aborted requests to end")
            self._model.release()
        finally:
            self._stop.clear()
        return {"aborted_count": len(ids), "request_ids": ids}

    async def resume_generation(self) -> None:
        """Admits requests again, those that wait first."""
        self._rejecting = False
        self._open.set()

    async def load_weights(self, arrays: dict[str, np.ndarray], last: bool, global_steps: int | None) -> None:
        """Takes one part of a weight update. From the first to the last part no request is decoded.

        Args:
            arrays: By name of the weight; memory that Ray shares with the sender, only read.
            last: Whether the update is complete with this part.
            global_steps: Version of the weights; None: as before.

        Raises:
            ConfigError: See `Decoder.load`.
            TimeoutError: The requests at work did not end in time.
        """
        if not self._updating:
            self._wanted += 1
            try:
                await _within(_SYNC_TIMEOUT_S, self._model.acquire(), "waiting for the requests at work to end")
            finally:
                self._wanted -= 1
            self._updating = True
        complete = False
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
                tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
            await asyncio.to_thread(self.decoder.load, tensors, last=last)
            complete = last
        except BaseException:
            complete = True
            raise
        finally:
            if complete:
                self._updating = False
                self._model.release()
        if last and global_steps is not None:
            self.global_steps = global_steps
            self._occurrences.clear()

    async def ready(self) -> bool:
        """Answers when the model is loaded."""
        return True

    async def _nothing(self, *args: Any, **kwargs: Any) -> None:
        """Weights and KV cache stay where they are, and there is no profiler."""

    wake_up = sleep = clear_kv_cache = release_kv_cache = resume_kv_cache = start_profile = stop_profile = _nothing


class HFServerActor(HFServer):
    """`HFServer` on the model that verl's configs name.

    Args:
        config: verl's ``RolloutConfig``.
        model: verl's model config.
        replica_rank: Added to the seed.
    """

    def __init__(self, config: Any, model: Any, replica_rank: int):
        super().__init__(
            Decoder.from_folder(
                model["path"],
                tokenizer_path=model.get("tokenizer_path"),
                dtype=config.dtype,
                device=get_device_name(),
                trust_remote_code=bool(model.get("trust_remote_code", False)),
                logprobs_mode=config.logprobs_mode,
            ),
            seed=config.seed + replica_rank,
            prompt_length=config.prompt_length,
            response_length=config.response_length,
            max_model_len=config.max_model_len,
            max_num_seqs=config.max_num_seqs,
            ignore_eos=config.ignore_eos,
        )


class HFReplica(RolloutReplica):
    """Starts the one server of a run (verl's `RolloutReplicaRegistry`)."""

    async def launch_servers(self) -> None:
        """Starts the server and waits until its model is loaded.

        Raises:
            ConfigError: See `refuse_unsupported`.
            TimeoutError: The model was not loaded within ten minutes.
        """
        refuse_unsupported(self.config, self.model_config, self.gpus_per_node)
        if self.is_reward_model or self.is_teacher_model:
            raise ConfigError("hf_cpu serves the policy only: set the name of the other rollout to vllm.")
        # Ray hides an accelerator from actors that do not ask for a share of it; the trainer's worker has it all.
        shown = {"env_vars": {name: "1" for name in get_platform().ray_noset_envvars()}}
        server: Any = (
            ray.remote(HFServerActor)
            .options(name=_server_name(self.replica_rank), max_concurrency=self.max_concurrency, runtime_env=shown)
            .remote(self.config, self.model_config, self.replica_rank)
        )
        await _within(_START_TIMEOUT_S, server.ready.remote(), "loading the model of the rollout")
        self.servers = [server]
        self._server_handle, self._server_address = server, f"hf-cpu-{self.replica_rank}:0"


class HFWeightSender(BaseRollout):
    """The training worker's side: sends new weights to the server (verl's ``_ROLLOUT_REGISTRY``)."""

    def __init__(self, config: Any, model_config: Any, device_mesh: Any, replica_rank: int = -1):
        super().__init__(config, model_config, device_mesh)
        self.rank = int(os.environ["RANK"]) if replica_rank == -1 else replica_rank

    async def resume(self, tags: list[str]) -> None:
        """Nothing was released."""

    async def release(self) -> None:
        """The weights stay in memory."""

    @torch.no_grad()
    async def update_weights(  # type: ignore[override]
        self,
        weights: Iterable[tuple[str, torch.Tensor]],
        global_steps: int | None = None,
        wire_format: str = "named_tensors",
        **kwargs: Any,
    ) -> None:
        """Sends all weights, in parts of ``checkpoint_engine.update_weights_bucket_megabytes``.

        Raises:
            ConfigError: The update is no full set of named tensors, or see `Decoder.load`.
            TimeoutError: The server did not take a part within ten minutes.
        """
        if wire_format != "named_tensors" or kwargs.get("peft_config") is not None:
            raise ConfigError(
                "hf_cpu takes full weights only: set actor_rollout_ref.model.lora_rank=0 and "
                "actor_rollout_ref.rollout.checkpoint_engine.backend=naive."
            )
        server = ray.get_actor(_server_name(self.rank))
        limit = self.config.checkpoint_engine.update_weights_bucket_megabytes << 20

        async def send(last: bool) -> None:
            reply: Any = server.load_weights.remote(part, last, global_steps)
            await _within(_SYNC_TIMEOUT_S, reply, "sending weights to the rollout")

        start, size, total = time.monotonic(), 0, 0
        part: dict[str, np.ndarray] = {}
        for name, tensor in weights:
            tensor = tensor.detach()
            if tensor.dtype == torch.bfloat16:  # numpy has no such type
                tensor = tensor.float()
            if part and size + tensor.nbytes > limit:
                await send(last=False)
                part, size = {}, 0
            part[name] = tensor.cpu().numpy()
            size += tensor.nbytes
            total += tensor.nbytes
        await send(last=True)
        logger.info("hf_cpu: sent %.1f MB of weights in %.2f s", total / 1e6, time.monotonic() - start)


def _server_name(replica_rank: int) -> str:
    return f"hf_cpu_server_{replica_rank}_0"


async def _within(seconds: float, awaitable: Awaitable[Any], what: str) -> Any:
    """Awaits with a deadline.

    Raises:
        TimeoutError: With a message that says what took too long.
    """
    try:
        return await asyncio.wait_for(awaitable, seconds)
    except asyncio.TimeoutError:
        raise TimeoutError(f"hf_cpu: {what} took more than {seconds:.0f} s.") from None
