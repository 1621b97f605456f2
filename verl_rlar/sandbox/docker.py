# SPDX-License-Identifier: Apache-2.0
"""`DockerSandbox`: jobs in hardened containers that are already running.

A box is a container whose first process (`inside/worker.py`) forks for each job. The host speaks with it over the
attached standard input and output of the container, so nothing of the host is mounted, and an engine on another
machine works alike. Programs share a pool of boxes, one job at a time in each; a verifier has boxes of its own.

Guarantees: those of `Sandbox`; the engine is asked nothing while a job runs; a box whose worker does not answer in
time, or says that it could not clean up, or whose job was abandoned, is destroyed; a box that lacks one of the options
of `hardening` is never used. When this process dies, by whatever signal, its boxes see the end of their standard input
and go; what is left by a machine that went down is removed at the next start (`sweep`).

Not covered: holes in the kernel and the container runtime (`rlar.sandbox.runtime` takes a stronger one).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import json
import logging
import os
import re
import socket
import ssl
import struct
import threading
import time
import uuid
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from docker.errors import APIError, NotFound

from verl_rlar.config import SandboxConfig
from verl_rlar.errors import ToolUnavailable
from verl_rlar.sandbox.base import GRACE_S, Answerer, BoxLost, End, Job, Ran, ended, reply_to
from verl_rlar.sandbox.engine import connect
from verl_rlar.sandbox.hardening import container_options, verify_options
from verl_rlar.sandbox.image import Progress, ensure_image
from verl_rlar.sandbox.pool import Pool

logger = logging.getLogger(__name__)

LABEL = "verl_rlar.box"
"""Label of every container that is a box."""
HOST_LABEL, OWNER_LABEL = "verl_rlar.host", "verl_rlar.owner"
"""Labels that say whose box it is: the machine with its namespace of processes, and the process there."""
START_TIMEOUT_S = 60.0
"""How long a box may take to start, in seconds."""
EVENT_S = 0.5
"""How long the engine may take to say that a box had no memory left, in seconds."""
FRAME_BYTES = 64 << 20
"""Most that one message of a box may have."""
ERRORS_BYTES = 4096
MAX_DEFAULT_BOXES = 16
LIBRARIES = ("numpy", "sympy", "regex", "sortedcontainers")
"""What the image has beside Python. A box loads those that its code names before its first job."""

_FRAME = struct.Struct(">I")
_STREAM = struct.Struct(">BxxxI")
_IMPORT = re.compile(rf"^[ \t]*(?:import|from)[ \t]+({'|'.join(LIBRARIES)})\b", re.MULTILINE)
_uids = itertools.count(os.getpid() * 97)


class Box:
    """One container, and the connection to its first process. Made by `Box.start`."""

    def __init__(self, container: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._container = container
        self._reader = reader
        self._writer = writer
        self._received = bytearray()
        self._errors = bytearray()
        self._broken = False
        self._expired = False

    @classmethod
    async def start(cls, client: Any, config: SandboxConfig, image: str) -> Box:
        """Starts a blank box.

        Raises:
            BoxLost: The engine did not start it.
            ToolUnavailable: The engine did not take one of the options that keep it shut.
        """
        starting = asyncio.ensure_future(asyncio.to_thread(_create, client, config, image))
        try:
            container, raw = await asyncio.shield(starting)
        except asyncio.CancelledError:
            starting.add_done_callback(_remove_started)
            raise
        except (APIError, OSError) as error:
            raise BoxLost(f"the Docker engine did not start a box: {str(error)[:300]}") from error
        reader, writer = await asyncio.open_connection(sock=_plain(raw), limit=1 << 22)
        return cls(container, reader, writer)

    @property
    def usable(self) -> bool:
        return not (self._broken or self._reader.at_eof() or self._writer.is_closing())

    async def prepare(self, modules: tuple[str, ...]) -> None:
        """Tells a blank box what to load; returns when it is ready for jobs.

        Raises:
            BoxLost: It does not answer.
        """
        with self._alarm(START_TIMEOUT_S):
            self._send({"imports": modules})
            await self._message()

    async def run(self, job: Job, answer: Answerer | None) -> Ran:
        """Runs one job; see `Sandbox.run`. Unless it returns in order, the box is broken."""
        loop = asyncio.get_running_loop()
        begun, since = loop.time(), time.time()
        end = begun + job.seconds
        broken, self._broken = self._broken, True
        try:
            with self._alarm(job.seconds + GRACE_S):
                self._send(_payload(job))
                while "asks" in (message := await self._message()):
                    self._send(await reply_to(message["asks"], answer, end - loop.time()))
        except BoxLost:
            if self._expired:
                return Ran(end=End.TIMEOUT, seconds=job.seconds + GRACE_S)
            if await self._out_of_memory(since):  # memory of nobody's own, so that the worker had to go: its doing
                return Ran(end=End.KILLED, seconds=min(loop.time() - begun, job.seconds))
            raise
        self._broken = broken or not message["clean"]
        return ended(
            job,
            End(message["end"]),
            exit_code=message["exit_code"],
            output=message["output"],
            errors=message["errors"],
            seconds=message["seconds"],
        )

    async def destroy(self) -> None:
        """Removes the container; never raises."""
        self._broken = True
        self._writer.transport.abort()
        await asyncio.to_thread(_remove, self._container)

    async def _out_of_memory(self, since: float) -> bool:
        """Whether the engine says that the box had no memory left since then."""

        def look() -> bool:
            events = self._container.client.api.events(
                since=int(since),
                until=f"{time.time() + EVENT_S:.3f}",
                filters={"container": self._container.id, "event": "oom"},
                decode=True,
            )
            with contextlib.closing(events):
                return next(events, None) is not None

        try:
            return await asyncio.wait_for(asyncio.to_thread(look), 4 * EVENT_S)
        except (APIError, OSError, ValueError, TimeoutError, asyncio.TimeoutError):
            return False

    @contextlib.contextmanager
    def _alarm(self, seconds: float) -> Any:
        """Cuts the connection after so many seconds, which ends whoever waits for a message."""
        alarm = asyncio.get_running_loop().call_later(seconds, self._expire)
        try:
            yield
        finally:
            alarm.cancel()

    def _expire(self) -> None:
        self._expired = self._broken = True
        self._writer.transport.abort()

    def _send(self, message: Any) -> None:
        data = json.dumps(message).encode()
        self._writer.write(_FRAME.pack(len(data)) + data)

    async def _message(self) -> Any:
        """The next message of the box's first process."""
        received = self._received
        try:
            while len(received) < _FRAME.size or len(received) < _FRAME.size + _FRAME.unpack_from(received)[0]:
                stream, size = _STREAM.unpack(await self._reader.readexactly(_STREAM.size))
                data = await self._reader.readexactly(size)
                if stream == 2:
                    self._errors = (self._errors + data)[-ERRORS_BYTES:]
                else:
                    received += data
                if len(received) > FRAME_BYTES:
                    raise ConnectionError("too long a message")
            size = _FRAME.size + _FRAME.unpack_from(received)[0]
            message = json.loads(received[_FRAME.size : size])
            del received[:size]
            return message
        except (OSError, EOFError, ValueError) as error:
            self._broken = True
            said = self._errors.decode("utf-8", "replace").strip().rpartition("\n")[2]
            raise BoxLost(f"a box is gone ({type(error).__name__}){': ' + said if said else ''}") from None


class DockerSandbox:
    """The default back-end; see the module and `Sandbox`. Use from one event loop.

    Args:
        config: Back-end, image, limits.
        progress: Takes a line of text now and then while the image is built or pulled.
    """

    def __init__(self, config: SandboxConfig, *, progress: Progress | None = None) -> None:
        self._config = config
        self._progress = progress
        self._client: Any = None
        self._image = ""
        boxes = min(os.cpu_count() or 1, MAX_DEFAULT_BOXES)
        self._sizes = config.program_boxes or boxes, config.verifier_boxes or boxes
        self._programs, self._verifiers = (
            Pool[Box](self._start_box, size=size, spares=config.spare_boxes, queue_timeout_s=config.queue_timeout_s)
            for size in self._sizes
        )

    async def __aenter__(self) -> DockerSandbox:
        """Connects, builds or pulls the image, removes what dead runs left, and starts the boxes: two at once, the
        others in the background."""
        self._client = await asyncio.to_thread(connect, self._config)
        try:
            self._image = await asyncio.to_thread(ensure_image, self._client, self._config, progress=self._progress)
            await asyncio.to_thread(sweep, self._client)
            await asyncio.gather(self._programs.warm_up(1), self._verifiers.warm_up(1))
            async with self._programs.lease(*self._key("program", "")):
                pass  # it is ready for the first program
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        self._programs.fill(self._sizes[0] - 1)
        self._verifiers.fill(self._sizes[1] - 1)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.gather(self._programs.close(), self._verifiers.close())
        await asyncio.to_thread(self._client.close)

    async def run(self, job: Job, answer: Answerer | None = None) -> Ran:
        """See `Sandbox.run`."""
        loop = asyncio.get_running_loop()
        asked = loop.time()
        pool = self._verifiers if job.mode == "verifier" else self._programs
        async with pool.lease(*self._key(job.mode, job.source)) as box:
            queued = loop.time() - asked
            ran = await box.run(job, answer)
        return replace(ran, queued=queued)

    @property
    def boxes(self) -> int:
        """Number of boxes, those that are being started or destroyed included."""
        return self._programs.alive + self._verifiers.alive

    @property
    def waited(self) -> int:
        """Number of jobs for which no box was ready."""
        return self._programs.waited + self._verifiers.waited

    def _key(self, mode: str, source: str) -> tuple[tuple[str, ...], Any]:
        """Whose box a job needs, and how a blank one becomes that."""
        libraries = tuple(sorted(set(_IMPORT.findall(source))))
        modules = (*libraries, "verifier_api") if mode == "verifier" else libraries
        owner = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest() if mode == "verifier" else ""
        return (owner, *libraries), lambda box: box.prepare(modules)

    async def _start_box(self) -> Box:
        return await Box.start(self._client, self._config, self._image)


def _payload(job: Job) -> dict[str, Any]:
    message: dict[str, Any] = {
        "mode": job.mode,
        "source": job.source,
        "seconds": job.seconds,
        "output_bytes": job.output_bytes,
    }
    if job.mode == "program":
        message["stdin"] = job.stdin
    elif job.mode == "calls":
        message["calls"] = job.calls
    else:
        message["inputs"] = job.inputs
    return message


def _create(client: Any, config: SandboxConfig, image: str) -> tuple[Any, Any]:
    """Creates, attaches to, checks and starts a container. Blocks for about half a second."""
    uid = 10_000 + next(_uids) % 50_000
    labels = {LABEL: "1", HOST_LABEL: _host(), OWNER_LABEL: _owner(os.getpid())}
    options = container_options(config, image=image, uid=uid, labels=labels)
    container = client.containers.create(**options, name=f"rlar-{uuid.uuid4().hex[:12]}")
    try:
        raw = container.attach_socket(params={"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1})
        container.start()
        container.reload()
        missing = verify_options(container.attrs, config)
        if missing:
            raise ToolUnavailable(
                f"the engine did not take all that keeps a box shut: {'; '.join(missing)}. `rlar doctor` tells more."
            )
    except BaseException:
        _remove(container)
        raise
    return container, raw


def _remove_started(starting: asyncio.Future[tuple[Any, Any]]) -> None:
    if not starting.cancelled() and starting.exception() is None:
        asyncio.get_running_loop().run_in_executor(None, _remove, starting.result()[0])


def _remove(container: Any) -> None:
    try:
        container.remove(force=True)
    except NotFound:
        pass
    except (APIError, OSError) as error:
        if "already in progress" not in str(error):
            logger.warning("box %s could not be removed: %s", container.name, str(error)[:200])


def sweep(client: Any) -> int:
    """Removes the boxes of processes of this machine that are gone; how many there were."""
    found = client.containers.list(all=True, filters={"label": [LABEL, f"{HOST_LABEL}={_host()}"]}, ignore_removed=True)
    orphans = [box for box in found if not _lives(box.labels.get(OWNER_LABEL, ""))]
    for box in orphans:
        _remove(box)
    if orphans:
        logger.warning("removed %d boxes that an earlier run had left", len(orphans))
    return len(orphans)


def _host() -> str:
    """This machine since it was started, and the namespace of process ids that we are in."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}:{os.stat('/proc/self/ns/pid').st_ino}"


def _owner(pid: int) -> str:
    """A process, told apart from later ones with the same number by its time of start.

    Raises:
        OSError: It is no more.
    """
    state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    if state in "ZX":
        raise ProcessLookupError(pid)
    return f"{pid}:{fields[18]}"


def _lives(owner: str) -> bool:
    pid = owner.partition(":")[0]
    try:
        return pid.isdigit() and _owner(int(pid)) == owner
    except OSError:
        return False


def _plain(raw: Any) -> socket.socket:
    """A socket that asyncio can use for what the SDK gives, which may be wrapped (TLS, ssh)."""
    inner = getattr(raw, "_sock", raw)
    if isinstance(inner, socket.socket) and not isinstance(inner, ssl.SSLSocket):
        return socket.socket(fileno=os.dup(inner.fileno()))
    ours, theirs = socket.socketpair()

    def pump(receive: Any, send: Any, end: Any) -> None:
        with contextlib.suppress(OSError, ValueError):
            while data := receive(1 << 16):
                send(data)
        with contextlib.suppress(OSError, ValueError):
            end()

    def end_attach() -> None:
        with contextlib.suppress(OSError, ValueError):
            inner.shutdown(socket.SHUT_RDWR)
        raw.close()

    send = getattr(inner, "sendall", None) or inner.send
    threading.Thread(target=pump, args=(inner.recv, theirs.sendall, theirs.close), daemon=True).start()
    threading.Thread(target=pump, args=(theirs.recv, send, end_attach), daemon=True).start()
    return ours
