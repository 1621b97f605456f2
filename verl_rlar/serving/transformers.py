# SPDX-License-Identifier: Apache-2.0
"""The back-end ``transformers``: a process of its own for each server, on the CPU. The embedded default.

The process (`verl_rlar.serving.server`) is a fresh interpreter whose environment is an allow-list, with a home folder
of its own that is empty: no token, no key, no cache of this user is in its reach by name. One end of a socket pair is
all that ties it to us; JSON lines cross it, in both directions, many calls at a time.

Guarantees: whatever it does ends as an answer, `ToolTimeout`, `ToolError` or, where the process is gone, as
`ConnectionError`; its death is noticed at once; `stop` kills it; it ends when this process does.

Not covered: the process runs as this user, and can read what this user can. What it reads is a vetted folder.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from verl_rlar.config import ServingConfig
from verl_rlar.errors import ToolError, ToolTimeout, ToolUnavailable
from verl_rlar.serving.base import Answer, Conversation, How, ServedModel
from verl_rlar.serving.homes import Home
from verl_rlar.serving.placing import Need, parameters

logger = logging.getLogger(__name__)

ENVIRONMENT = (
    *("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH", "LD_PRELOAD", "VIRTUAL_ENV", "PYTHONHASHSEED"),
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "KMP_AFFINITY", "CUDA_HOME", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"),
)
"""Variables that a server inherits."""
LINE_BYTES = 1 << 28
PROCESS_BYTES = 512 << 20
"""Memory of a server beside the weights: interpreter, libraries, one batch of a small model."""
BYTES = {"auto": 4, "float32": 4, "bfloat16": 2, "float16": 2}
BATCH_TOKENS = 1024
"""Tokens of a batch from which on a CPU gives no more of them per second (measured: from 500 to 1000)."""
STOP_S = 10.0
"""How long a killed process may take to be gone, in seconds."""


def environment(home: str, inherited: Sequence[str] = ENVIRONMENT) -> dict[str, str]:
    """The environment of a server: nothing that is not named here.

    Args:
        home: An empty folder.
        inherited: Variables that it takes from this process.
    """
    package = str(Path(__file__).parents[2])
    kept = {name: os.environ[name] for name in inherited if name in os.environ}
    return kept | {
        "HOME": home,
        "HF_HOME": home,
        "TMPDIR": home,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH")))),
        "PYTHONUNBUFFERED": "1",
        "OMP_WAIT_POLICY": "passive",  # spinning threads take the CPUs from whoever else computes here
    }


def as_lists(conversations: Sequence[Conversation]) -> list[list[list[str]]]:
    """Conversations as they cross the socket."""
    return [[[message.role, message.content] for message in conversation] for conversation in conversations]


class ServerProcess:
    """A running `verl_rlar.serving.server`. Made by `start`."""

    def __init__(self, process: subprocess.Popen[bytes], home: Home, name: str) -> None:
        self._process = process
        self._home = home
        self._name = name
        self._calls: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._number = 0
        self._closed = asyncio.Event()
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self.about: Mapping[str, Any] = {}
        """What the server said of its model when it was ready."""

    @classmethod
    async def start(cls, name: str, settings: Mapping[str, Any], seconds: float) -> ServerProcess:
        """Starts one, and returns when its model is loaded.

        Args:
            name: The model's, for messages.
            settings: See `Model`, `Batcher`; without the socket.
            seconds: How long it may take.

        Raises:
            ToolUnavailable: It cannot load the model.
            ToolTimeout: It was not ready in time.
            ConnectionError: It died on the way.
        """
        home = await asyncio.to_thread(Home.make)
        ours, theirs = socket.socketpair()
        argument = json.dumps(dict(settings) | {"socket": theirs.fileno()})
        try:
            with open(f"{home.path}/log", "wb") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "verl_rlar.serving.server", argument],
                    pass_fds=(theirs.fileno(), home.lock),
                    env=environment(home.path),
                    cwd=home.path,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
        except BaseException:
            ours.close()
            home.remove()
            raise
        finally:
            theirs.close()
        server = cls(process, home, name)
        try:
            reader, server._writer = await asyncio.open_connection(sock=ours, limit=LINE_BYTES)
            first = asyncio.ensure_future(reader.readline())
            await asyncio.wait([first], timeout=seconds)
            if not first.done():
                first.cancel()
                raise ToolTimeout(f"{name}: its server was not ready within rlar.serving.start_timeout_s={seconds:g} s")
            said = json.loads(first.result() or b"{}")
            if "failed" in said:
                raise ToolUnavailable(f"{name} cannot be loaded: {said['failed']}")
            if "ready" not in said:
                raise ConnectionError(f"{name}: its server ended while it started: {server.last_words()}")
            server.about = said["ready"]
            server._reading = asyncio.ensure_future(server._read(reader))
        except BaseException:
            await server.stop()
            raise
        if not server.about["network_blocked"]:
            logger.warning("%s: this kernel cannot take the network from its server; only Python's calls are", name)
        return server

    @property
    def pid(self) -> int:
        return self._process.pid

    async def call(self, message: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Asks the server something.

        Raises:
            ToolTimeout: No answer in time; the server need not go on with it.
            ConnectionError: The server is gone.
            ToolError: It says that it cannot.
        """
        writer = self._writer
        if writer is None or self._closed.is_set():
            raise self._lost()
        self._number += 1
        number = self._number
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._calls[number] = answer
        line = json.dumps(dict(message) | {"id": number}).encode() + b"\n"
        try:
            writer.write(line)
            await asyncio.wait([answer], timeout=max(seconds, 0))
            if not answer.done():
                raise ToolTimeout(f"{self._name}: no answer within {seconds:g} s")
            said = answer.result()
        finally:
            self._calls.pop(number, None)
            if not answer.done():
                answer.cancel()
                writer.write(json.dumps({"cancel": number}).encode() + b"\n")
        if "error" in said:
            raise ToolError(f"{self._name}: {said['error']}")
        return said

    async def gone(self) -> None:
        """Returns when the server is gone."""
        await self._closed.wait()

    def last_words(self) -> str:
        """The end of what it wrote."""
        try:
            text = Path(self._home.path, "log").read_bytes()[-600:].decode("utf-8", "replace").strip()
        except OSError:
            text = ""
        return text or "it wrote nothing"

    async def stop(self) -> None:
        """Kills it, with all that it started."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        try:
            await asyncio.to_thread(self._process.wait, STOP_S)
        except subprocess.TimeoutExpired:
            logger.warning("%s: its server %d does not go away", self._name, self.pid)
        if self._reading is not None:
            await asyncio.wait([self._reading])
        if self._writer is not None:
            self._writer.close()
        self._end()
        self._home.remove()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while line := await reader.readline():
                said = json.loads(line)
                answer = self._calls.get(said["id"])
                if answer is not None and not answer.done():
                    answer.set_result(said)
        except (ConnectionError, ValueError) as error:  # a torn line: it is dying
            logger.debug("%s: %s", self._name, error)
        finally:
            self._end()

    def _end(self) -> None:
        self._closed.set()
        for answer in self._calls.values():
            if not answer.done():
                answer.set_exception(self._lost())

    def _lost(self) -> ConnectionError:
        return ConnectionError(f"{self._name}: its server {self.pid} is gone")


class TransformersReplica:
    """A server of one model; see the module and `Replica`."""

    def __init__(self, server: ServerProcess, config: ServingConfig) -> None:
        self._server = server
        self._config = config

    @staticmethod
    def needs(model: ServedModel, config: ServingConfig) -> list[Need]:
        """What its replicas take up.

        Raises:
            ToolUnavailable: Its folder holds no whole safetensors.
        """
        assert model.path is not None
        size = parameters(model.path) * BYTES[config.dtype] + PROCESS_BYTES
        return [Need(name=model.name, key=model.key, devices=1, bytes_each=size)] * config.replicas

    @classmethod
    async def start(cls, model: ServedModel, config: ServingConfig, devices: tuple[str, ...]) -> TransformersReplica:
        """Starts a server. Raises what `ServerProcess.start` raises."""
        settings = {
            "path": model.path,
            "family": model.family,
            "weights": True,
            "dtype": config.dtype,
            "threads": config.threads or max(1, (os.cpu_count() or 1) // 2),
            "batch_tokens": config.batch_tokens or BATCH_TOKENS,
            "batch_wait_s": config.batch_wait_s,
        }
        return cls(await ServerProcess.start(model.name, settings, config.start_timeout_s), config)

    @property
    def pid(self) -> int:
        return self._server.pid

    async def ask(self, how: How, conversations: Sequence[Conversation], seconds: float) -> list[Answer]:
        message = {"ask": how.to_json(), "conversations": as_lists(conversations)}
        said = await self._server.call(message, seconds)
        return [_answer(how, item) for item in said["answers"]]

    async def check(self, seconds: float) -> None:
        said = await self._server.call({"ping": True}, seconds)
        if said["busy_s"] > self._config.stuck_s:
            raise ToolTimeout(f"a batch has been computed for {said['busy_s']:.0f} s (rlar.serving.stuck_s)")

    async def gone(self) -> None:
        await self._server.gone()

    async def sleep(self, seconds: float) -> None:
        await self._server.call({"sleep": True}, seconds)

    async def wake(self, seconds: float) -> None:
        await self._server.call({"wake": True}, seconds)

    async def reload(self, model: ServedModel, seconds: float) -> None:
        await self._server.call({"reload": model.path}, seconds)

    async def stop(self) -> None:
        await self._server.stop()


def _answer(how: How, item: Mapping[str, Any]) -> Answer:
    if "error" in item:
        return Answer(error=item["error"])
    if "words" in item:
        return Answer.written(how, item["words"], item["finished"], item["tokens"], item["truncated"])
    return Answer(rows=tuple(map(tuple, item["rows"])), tokens=item["tokens"], truncated=item["truncated"])
