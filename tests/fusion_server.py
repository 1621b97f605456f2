# SPDX-License-Identifier: Apache-2.0
"""A stand-in for a SandboxFusion server: its protocol over a real socket, its ways with processes, and its faults.

`FusionServer` takes ``POST /run_code`` and ``GET /v1/ping`` as bytedance/SandboxFusion of July 2026 does
(`sandbox/server/sandbox_api.py`, `sandbox/runners/base.py`), for language ``python`` and with ``isolation: none``. What
it is to run goes into a box of another `Sandbox`, as a program that does there what the server does on its machine
(`SERVER`): same limits, same odd way of reading output. So nothing that a test sends runs on this machine.

`faults` are scripted: the next requests are answered by them, one each.

Not covered: the real server's other languages, ``set_uid``, ``isolation: lite``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Any

from verl_rlar.config import SandboxConfig
from verl_rlar.sandbox.base import End, Job, Sandbox
from verl_rlar.sandbox.fusion import FusionSandbox

SERVER = r"""
import asyncio, base64, json, os, resource, subprocess, sys, tempfile, time

request = json.loads(sys.stdin.read())

async def output(stream):
    data = b""
    try:
        data = await asyncio.wait_for(stream.read(1024 * 1024), timeout=0.0001)
    except asyncio.TimeoutError:
        pass
    try:
        return data.decode()
    except Exception as error:
        return f"[DecodeError] {error}"

def limit():
    if request["memory_limit_MB"] > 0:
        size = request["memory_limit_MB"] << 20
        for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA, resource.RLIMIT_STACK):
            resource.setrlimit(kind, (size, resource.getrlimit(kind)[1]))

async def main():
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for name, content in request["files"].items():
            path = os.path.join(folder, name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as file:
                file.write(base64.b64decode(content))
        path = os.path.join(folder, "tmpcode.py")
        with open(path, "w", encoding="ascii") as file:
            file.write(request["code"])
        pipe = subprocess.PIPE
        environment = {"PATH": os.defpath, "SERVER_SECRET": "hunter2"}
        process = await asyncio.create_subprocess_exec(
            sys.executable, path, stdin=pipe, stdout=pipe, stderr=pipe, cwd=folder, env=environment, preexec_fn=limit
        )
        if request["stdin"] is not None:
            process.stdin.write(request["stdin"].encode())
        process.stdin.close()
        start = time.time()
        try:
            await asyncio.wait_for(process.wait(), timeout=request["run_timeout"])
            run = {"status": "Finished", "return_code": process.returncode}
        except asyncio.TimeoutError:
            run = {"status": "TimeLimitExceeded", "return_code": None}
        run["execution_time"] = time.time() - start
        run["stdout"], run["stderr"] = await output(process.stdout), await output(process.stderr)
        if process.returncode is None:
            process.kill()
        files = {}
        for name in request["fetch_files"]:
            path = os.path.join(folder, name)
            if os.path.isfile(path):
                with open(path, "rb") as file:
                    files[name] = base64.b64encode(file.read()).decode()
        good = run["status"] == "Finished" and run["return_code"] in (0, None)
        answer = {"status": "Success" if good else "Failed", "message": "", "compile_result": None, "run_result": run}
        sys.stdout.write(json.dumps({**answer, "executor_pod_name": None, "files": files}))
        sys.stdout.flush()
        os._exit(0)

asyncio.run(main())
"""

Fault = Callable[[asyncio.StreamWriter], Awaitable[None]]


def http(status: str, body: bytes = b"{}", kind: str = "application/json", **headers: str) -> bytes:
    """A whole answer."""
    lines = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", f"Content-Length: {len(body)}", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def says(status: str, body: bytes = b"{}", kind: str = "application/json", **headers: str) -> Fault:
    """Answers this, whatever was asked."""

    async def fault(writer: asyncio.StreamWriter) -> None:
        writer.write(http(status, body, kind, **headers))
        await writer.drain()

    return fault


def says_json(content: Any) -> Fault:
    return says("200 OK", json.dumps(content).encode())


def truncated() -> Fault:
    """Promises more than it sends."""

    async def fault(writer: asyncio.StreamWriter) -> None:
        writer.write(http("200 OK", b'{"status": "Success", "run_result": {}}')[:-10])
        await writer.drain()

    return fault


def hangs() -> Fault:
    """Never answers."""

    async def fault(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(3600)

    return fault


def floods(kind: str = "application/json") -> Fault:
    """Answers without an end."""

    async def fault(writer: asyncio.StreamWriter) -> None:
        writer.write(f'HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nConnection: close\r\n\r\n"'.encode())
        while True:
            writer.write(b"x" * (1 << 16))
            await writer.drain()

    return fault


class FusionServer:
    """See the module. Use as ``async with``.

    Args:
        sandbox: Where it runs what it is sent; None: whatever is not scripted is answered with HTTP 500.
    """

    def __init__(self, sandbox: Sandbox | None = None) -> None:
        self._sandbox = sandbox
        self.faults: deque[Fault | None] = deque()
        """What becomes of the next requests to ``/run_code``, one each; None: it is served."""
        self.requests: list[dict[str, Any]] = []
        """Bodies of the requests to ``/run_code``."""
        self.headers: list[dict[str, str]] = []
        """... and their headers, names in lower case."""
        self.ping: Fault = says("200 OK", b'"pong"')
        self.at_work = self.most_at_work = 0
        self._connections: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> FusionServer:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for task in self._connections:
            task.cancel()
        if self._connections:
            await asyncio.wait(self._connections)
        await self._server.wait_closed()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                request, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
                headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                method, path, _ = request.split()
                self.at_work += 1
                self.most_at_work = max(self.most_at_work, self.at_work)
                try:
                    await self._answer(method, path, headers, body, writer)
                finally:
                    self.at_work -= 1
        finally:
            writer.close()

    async def _answer(
        self, method: str, path: str, headers: dict[str, str], body: bytes, writer: asyncio.StreamWriter
    ) -> None:
        fault: Fault | None
        if (method, path) == ("GET", "/v1/ping"):
            fault = self.ping
        elif (method, path) != ("POST", "/run_code"):
            fault = says("404 Not Found", b'{"detail": "Not Found"}')
        else:
            self.requests.append(json.loads(body))
            self.headers.append(headers)
            fault = self.faults.popleft() if self.faults else None
            if fault is None:
                fault = says("500 Internal Server Error")
                if self._sandbox is not None:
                    fault = says_json(await self._run(self._sandbox, self.requests[-1]))
        await fault(writer)

    async def _run(self, sandbox: Sandbox, request: dict[str, Any]) -> dict[str, Any]:
        job = Job(
            mode="program",
            source=SERVER,
            stdin=json.dumps(request),
            seconds=request["run_timeout"] + 5,
            output_bytes=32 << 20,
        )
        ran = await sandbox.run(job)
        if ran.end is End.DONE and ran.exit_code == 0:
            answer: dict[str, Any] = json.loads(ran.stdout)
            return answer
        late = ran.end is End.TIMEOUT
        run = {"status": "TimeLimitExceeded" if late else "Finished", "return_code": ran.exit_code, "stdout": ""}
        return {"status": "Failed", "message": "", "run_result": {**run, "stderr": ran.stderr}, "files": {}}


@contextlib.asynccontextmanager
async def back_end(name: str, boxes: Sandbox, settings: SandboxConfig) -> AsyncIterator[Sandbox]:
    """A back-end by name: the boxes themselves, or a client of a stand-in server that runs everything in them."""
    if name == "docker":
        yield boxes
        return
    async with FusionServer(boxes) as server:
        async with FusionSandbox(settings.model_copy(update={"fusion_url": server.url})) as sandbox:
            yield sandbox
