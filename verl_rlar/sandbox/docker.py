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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from docker.errors import APIError, DockerException, NotFound

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
EVENT_S = 2.0
"""How long the engine may take to say that it is there, or that a box had no memory left, in seconds."""
_PINGS = ThreadPoolExecutor(4, thread_name_prefix="rlar-ping")
"""Asks whether the engine is there: other threads may all be busy with boxes, which says nothing about it."""
REMOVAL_S = 10.0
"""How long the engine may take to remove a box that has ended by itself, in seconds."""
FRAME_BYTES = 64 << 20
"""Most that one message of a box may have."""
MAX_OUTPUT = 1 << 30
"""A job may never write more, in bytes."""
ERRORS_BYTES = 4096
MAX_DEFAULT_BOXES = 16
LIBRARIES = ("numpy", "sympy", "regex", "sortedcontainers")
"""What the image has beside Python. A box loads those that its code names before its first job."""

_FRAME, _JOB, _END = struct.Struct(">I"), struct.Struct(">cdII"), struct.Struct(">cc?idI")
"""See ``inside/worker.py``."""
_NO_CODE = -1000
_ENDS = {end.value[:1].encode(): end for end in End}
_STREAM = struct.Struct(">BxxxI")
_IMPORT = re.compile(rf"^[ \t]*(?:import|from)[ \t]+({'|'.join(LIBRARIES)})\b", re.MULTILINE)
_uids = itertools.count(os.getpid() * 97)


class _Connection(asyncio.Protocol):
    """The messages of a box's first process, out of what the engine passes on of its output."""

    def __init__(self) -> None:
        self.lost = False
        self._transport: Any = None
        self._passed_on = bytearray()
        self._received = bytearray()
        self._errors = b""
        self._waiter: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def eof_received(self) -> None:
        self.lost = True
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = True
        self._wake()

    def data_received(self, data: bytes) -> None:
        passed_on = self._passed_on
        passed_on += data
        start = 0
        while len(passed_on) - start >= _STREAM.size:
            stream, size = _STREAM.unpack_from(passed_on, start)
            end = start + _STREAM.size + size
            if len(passed_on) < end:
                break
            part = passed_on[start + _STREAM.size : end]
            if stream == 2:
                self._errors = (self._errors + part)[-ERRORS_BYTES:]
            else:
                self._received += part
            start = end
        del passed_on[:start]
        if len(passed_on) + len(self._received) > FRAME_BYTES:
            self.abort()
        elif self._end():
            self._wake()

    def send(self, message: bytes) -> None:
        self._transport.write(_FRAME.pack(len(message)) + message)

    async def message(self) -> bytes:
        """The next message; from one task at a time.

        Raises:
            BoxLost: There is none, and will be none.
        """
        while not (end := self._end()):
            if self.lost:
                said = self._errors.decode("utf-8", "replace").strip().rpartition("\n")[2]
                raise BoxLost(f"a box is gone{': ' + said if said else ''}")
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        message = bytes(self._received[_FRAME.size : end])
        del self._received[:end]
        return message

    def abort(self) -> None:
        """Cuts the connection, which ends whoever waits for a message."""
        self.lost = True
        self._transport.abort()
        self._wake()

    def _end(self) -> int:
        """Where the first message ends, if it is there whole; else 0."""
        received = self._received
        if len(received) < _FRAME.size:
            return 0
        end = _FRAME.size + int(_FRAME.unpack_from(received)[0])
        return end if len(received) >= end else 0

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Box:
    """One container, and the connection to its first process. Made by `Box.start`."""

    def __init__(self, container: Any, connection: _Connection) -> None:
        self._container = container
        self._connection = connection
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
        _, connection = await asyncio.get_running_loop().create_connection(_Connection, sock=_plain(raw))
        return cls(container, connection)

    @property
    def usable(self) -> bool:
        return not (self._broken or self._connection.lost)

    async def prepare(self, modules: tuple[str, ...]) -> None:
        """Tells a blank box what to load; returns when it is ready for jobs.

        Raises:
            BoxLost: It does not answer.
        """
        with self._alarm(START_TIMEOUT_S):
            self._connection.send(" ".join(modules).encode())
            await self._connection.message()

    async def run(self, job: Job, answer: Answerer | None) -> Ran:
        """Runs one job; see `Sandbox.run`. Unless it returns in order, the box is broken."""
        loop = asyncio.get_running_loop()
        begun, since = loop.time(), time.time()
        end = begun + job.seconds
        broken, self._broken = self._broken, True
        try:
            with self._alarm(job.seconds + GRACE_S):
                self._connection.send(_payload(job))
                while (message := await self._connection.message())[:1] == b"a":
                    asked = message[1:].decode("utf-8", "replace")
                    reply = await reply_to(asked, answer, end - loop.time())
                    self._connection.send(json.dumps(reply).encode())
                if message[:1] != b"e" or len(message) < _END.size:
                    raise BoxLost(f"a box said {message[:40]!r} where a job's end was due")
        except BoxLost:
            if self._expired:
                if not await self._engine_answers():  # which is why nothing came: no doing of the program's
                    raise BoxLost("the Docker engine does not answer") from None
                return Ran(end=End.TIMEOUT, seconds=job.seconds + GRACE_S)
            if await self._out_of_memory(since):  # memory of nobody's own, so that the worker had to go: its doing
                return Ran(end=End.KILLED, seconds=min(loop.time() - begun, job.seconds))
            raise
        _, how, clean, code, seconds, size = _END.unpack_from(message)
        self._broken = broken or not clean
        return ended(
            job,
            _ENDS[how],
            exit_code=None if code == _NO_CODE else code,
            output=message[_END.size : _END.size + size].decode("utf-8", "replace"),
            errors=message[_END.size + size :].decode("utf-8", "replace"),
            seconds=seconds,
        )

    async def destroy(self) -> None:
        """Removes the container; never raises."""
        self._broken = True
        self._connection.abort()
        await asyncio.to_thread(_remove, self._container)

    async def _engine_answers(self) -> bool:
        try:
            ping = asyncio.get_running_loop().run_in_executor(_PINGS, self._container.client.api.ping)
            await asyncio.wait_for(ping, EVENT_S)
        except (DockerException, OSError, TimeoutError, asyncio.TimeoutError):
            return False
        return True

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
            return await asyncio.wait_for(asyncio.to_thread(look), 3 * EVENT_S)
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
        self._connection.abort()


def box_counts(config: SandboxConfig) -> tuple[int, int]:
    """Most boxes that are at work at a time: for programs, and for verifiers.

    By default one per processor; of programs one more, so that none idles while an answer and the next job are under
    way.
    """
    processors = min(os.cpu_count() or 1, MAX_DEFAULT_BOXES)
    return config.program_boxes or processors + 1, config.verifier_boxes or processors


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
        self._sizes = box_counts(config)
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
        modules = (*libraries, "verifier_api", "reading") if mode == "verifier" else libraries
        owner = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest() if mode == "verifier" else ""
        return (owner, *libraries), lambda box: box.prepare(modules)

    async def _start_box(self) -> Box:
        return await Box.start(self._client, self._config, self._image)


def _payload(job: Job) -> bytes:
    stdin = job.stdin.encode("utf-8", "surrogatepass") if job.mode == "program" else b""
    message: dict[str, Any] = {"mode": job.mode, "source": job.source, "seconds": job.seconds}
    if job.mode == "calls":
        message["calls"] = job.calls
    elif job.mode == "verifier":
        message["inputs"] = job.inputs
    head = _JOB.pack(job.mode[:1].encode(), job.seconds, min(job.output_bytes, MAX_OUTPUT), len(stdin))
    return head + stdin + json.dumps(message).encode()


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
            return
        with contextlib.suppress(DockerException, OSError):  # it ended by itself, and the engine is at it
            container.wait(condition="removed", timeout=REMOVAL_S)


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
