# SPDX-License-Identifier: Apache-2.0
"""`FusionSandbox`: runs jobs on a SandboxFusion server (ByteDance), by HTTP.

A job is one request, ``POST /run_code`` in language ``python``: the program is `oneshot.py`, and the job is a file
beside it, so that no code is made by putting texts together. What came of it is in a file that the server passes back
(``fetch_files``), with a secret of the request in it. A verifier that asks is run again from the start, with the
replies that it has had so far, until it asks no more: it must be deterministic.

What the server itself says is used for little, since that of July 2026 (commit 469de08, tried) lets a program that
prints more than 128 KiB hang until its time limit, replaces all of an output that is not UTF-8, may lose output under
load, and calls it a success when no exit code came back. In order:

- a result with the secret: that is what became of the job;
- none, but the job had been started: the server's time limit is `End.TIMEOUT`, anything else is `End.KILLED`;
- none, and it had not been started; ``SandboxError``; no answer, HTTP 5xx, what is not the protocol: `BoxLost`;
- HTTP 429, or 503 with Retry-After: busy, which is waited for; HTTP 3xx and 4xx: `ToolUnavailable`.

Guarantees: those of `verl_rlar.sandbox.base`, as far as the server keeps jobs apart. Every request has a deadline, an
answer is read up to a limit, and requests at work are at most ``rlar.sandbox.program_boxes`` per process (None: 16).

Not covered: isolation is the server's. Its default (``isolation: none``) is none: a job can read, change and kill
whatever the server's user can, other jobs and the server included, and has the server's network. With ``lite`` it is a
chroot and namespaces, as root, in a privileged container. A job that takes the server down is `BoxLost`, not its own
fault. Files that it leaves outside of its folder stay, with ``none``. Its memory is limited by address space, to twice
``rlar.sandbox.memory_mb``, and not counted over its processes; ``cpus``, ``pids`` and ``tmp_mb`` are not kept, nor is a
verifier kept from starting processes where the server runs as root. A job whose caller has gone runs on to its end.
Libraries are the server's.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import logging
import math
import os
import secrets
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from verl_rlar.config import SandboxConfig
from verl_rlar.errors import ConfigError, ToolTimeout, ToolUnavailable
from verl_rlar.sandbox import oneshot
from verl_rlar.sandbox.base import Answerer, BoxLost, End, Job, Ran, ended, reply_to

logger = logging.getLogger(__name__)

REQUESTS = 16
"""Requests at work, if the settings do not say."""
ROUNDS = 64
"""Most questions of one verifier on one sample."""
START_S = 5.0
"""What the server grants a program beyond the job's seconds: to start, and to end what the job has left."""
HTTP_S = 10.0
"""How much longer than that a request may take, in seconds."""
BUSY_S, LONGEST_BUSY_S = 1.0, 10.0
"""Pause before a busy server is asked again, in seconds: if it does not say how long, and at most."""
RESULT = "result.json"
HERE = Path(__file__).parent
PROBE = Job(mode="program", source="print(input()[::-1])", stdin="ylno ecno", seconds=10.0)


@dataclass(frozen=True, kw_only=True)
class _Result:
    """What `oneshot.py` reports."""

    end: str
    """One of `End`, or ``asks``."""
    seconds: float = math.inf
    """Wall time of the job's process; infinite: not known, as its report was lost."""
    exit_code: int | None = None
    asks: tuple[str, ...] = ()
    output: str = ""
    errors: str = ""


class FusionSandbox:
    """See the module. Use as ``async with``, from one event loop.

    Args:
        config: `fusion_url`, `fusion_token_env`, `program_boxes`, `memory_mb`, `queue_timeout_s`.

    Raises:
        ConfigError: There is no address, or it is none, or the token's variable is not set.
    """

    def __init__(self, config: SandboxConfig) -> None:
        if not config.fusion_url:
            raise ConfigError(
                "rlar.sandbox.backend=sandbox_fusion needs rlar.sandbox.fusion_url, e.g. http://host:8080"
            )
        self._url = config.fusion_url.rstrip("/").removesuffix("/run_code")  # verl's own setting ends so
        if not self._url.startswith(("http://", "https://")):
            raise ConfigError(f"rlar.sandbox.fusion_url: {config.fusion_url!r} does not start with http:// or https://")
        self._headers = {"Accept-Encoding": "identity"}
        if config.fusion_token_env is not None:
            token = os.environ.get(config.fusion_token_env)
            if not token:
                raise ConfigError(f"rlar.sandbox.fusion_token_env: {config.fusion_token_env} is not set")
            self._headers["Authorization"] = f"Bearer {token}"
        self._memory_bytes = 2 * config.memory_mb << 20
        self._queue_timeout_s = config.queue_timeout_s
        self._size = config.program_boxes or REQUESTS
        self._code = HERE.joinpath("oneshot.py").read_text("utf-8")
        paths = [HERE / name for name in ("values.py", "reading.py", "inside/harness.py", "inside/verifier_api.py")]
        self._files = {path.name: _base64(path.read_bytes()) for path in paths}
        self._client: httpx.AsyncClient | None = None
        self._slots = asyncio.Semaphore(self._size)
        self._at_work: set[asyncio.Task[Any]] = set()

    async def __aenter__(self) -> FusionSandbox:
        self._client = httpx.AsyncClient(headers=self._headers, limits=httpx.Limits(max_connections=None))
        try:
            await self._check()
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        logger.warning(
            "code that nobody has checked runs on %s: how safe that is, its own settings decide. SandboxFusion's "
            "default (`isolation: none`) is no sandbox",
            self._url,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        client, self._client = self._client, None
        for task in self._at_work:
            task.cancel()
        if self._at_work:
            await asyncio.wait(self._at_work)
        if client is not None:
            await client.aclose()

    async def run(self, job: Job, answer: Answerer | None = None) -> Ran:
        """See `verl_rlar.sandbox.base.Sandbox`."""
        loop = asyncio.get_running_loop()
        begun, spent = loop.time(), 0.0
        asks: tuple[str, ...] = ()
        replies: list[str] = []

        def queued() -> float:
            return max(loop.time() - begun - spent, 0.0)

        def broken(error: str) -> Ran:
            return Ran(end=End.DONE, answers=({"error": error},), seconds=spent, queued=queued())

        while True:
            result = await self._once(job, job.seconds - spent, replies)
            spent += result.seconds
            at_end = result.end in ("asks", End.DONE.value)  # else it may not have come that far
            if result.asks[: len(asks)] != asks[: None if at_end else len(result.asks)]:
                return broken(_CHANGED)
            if result.end != "asks":
                break
            if loop.time() - begun > job.seconds + self._queue_timeout_s + START_S + HTTP_S:
                raise BoxLost(f"{self._url} is too slow for a verifier with {len(result.asks)} questions")
            if len(replies) == ROUNDS:
                return broken(f"more than {ROUNDS} questions on one sample")
            asks = result.asks[: len(asks) + 1]
            asked = loop.time()
            reply = await reply_to(asks[-1], answer, job.seconds - spent)
            spent += loop.time() - asked
            replies.append(json.dumps(reply))
        return ended(
            job,
            End(result.end),
            exit_code=result.exit_code,
            output=result.output,
            errors=result.errors,
            seconds=spent,
            queued=queued(),
        )

    async def _check(self) -> None:
        """Whether a SandboxFusion server is there, and can do what is needed."""
        what = f"rlar.sandbox.fusion_url: {self._url}"
        hint = (
            "Start one (`docker run -p 127.0.0.1:8080:8080` with an image of github.com/bytedance/SandboxFusion), or "
            "set rlar.sandbox.backend=docker"
        )
        try:
            await self._ask("GET", "/v1/ping", b"", seconds=HTTP_S, limit=1 << 10)
            ran = await self.run(PROBE)
        except (BoxLost, ToolTimeout) as error:
            raise ToolUnavailable(f"{what} is not a SandboxFusion server that can be used: {error}. {hint}") from error
        if ran.end is not End.DONE or ran.stdout != "once only\n":
            raise ToolUnavailable(
                f"{what}: a trial program ended as `{ran.end.value}` with exit code {ran.exit_code} and printed "
                f"{ran.stdout[:80]!r}: {ran.stderr[-300:]}. {hint}"
            )

    async def _once(self, job: Job, seconds: float, replies: list[str]) -> _Result:
        """Runs a job, or a verifier up to its first question that has no reply yet."""
        if seconds <= 0:
            return _Result(end=End.TIMEOUT.value, seconds=0.0)
        task = {
            "mode": job.mode,
            "source": job.source,
            "seconds": seconds,
            "stdin": job.stdin,
            "calls": job.calls,
            "inputs": dict(job.inputs),
            "output_bytes": job.output_bytes,
            "memory_bytes": self._memory_bytes,
        }
        secret = secrets.token_hex(16)
        begun = asyncio.get_running_loop().time()
        body = {
            "code": self._code,
            "language": "python",
            "compile_timeout": START_S,
            "run_timeout": seconds + START_S,
            "memory_limit_MB": self._memory_bytes >> 20,
            "stdin": secret,
            "files": {
                **self._files,
                "job.json": _base64(json.dumps(task).encode()),
                "replies.jsonl": _base64("".join(f"{reply}\n" for reply in replies).encode()),
            },
            "fetch_files": [RESULT],
        }
        content = await self._ask(
            "POST",
            "/run_code",
            json.dumps(body).encode(),
            seconds=seconds + START_S + HTTP_S,
            limit=8 * job.output_bytes + (4 << 20),  # JSON of control characters, in base64; and the server's own
        )
        result = _read(content, secret)
        return replace(result, seconds=min(result.seconds, asyncio.get_running_loop().time() - begun))

    async def _ask(self, method: str, path: str, body: bytes, *, seconds: float, limit: int) -> bytes | None:
        """Makes a request when there is a slot, again while the server is busy.

        Args:
            seconds: Deadline of one request.
            limit: Most bytes of an answer; None is returned for a longer one.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._queue_timeout_s
        late = ToolTimeout(
            f"{self._url} had no time within rlar.sandbox.queue_timeout_s={self._queue_timeout_s:g} s; requests at "
            f"work: at most {self._size} per process (rlar.sandbox.program_boxes)"
        )
        try:
            await asyncio.wait_for(self._slots.acquire(), self._queue_timeout_s)
        except asyncio.TimeoutError:
            raise late from None
        try:
            while True:
                if self._client is None:
                    raise BoxLost("the sandbox is closed")
                request = asyncio.ensure_future(self._send(self._client, method, path, body, limit))
                self._at_work.add(request)
                request.add_done_callback(self._at_work.discard)
                try:
                    answer = await asyncio.wait_for(request, seconds)
                except asyncio.TimeoutError:
                    raise BoxLost(f"{self._url}{path} did not answer within {seconds:g} s") from None
                except asyncio.CancelledError:
                    if self._client is None and request.cancelled():
                        raise BoxLost("the sandbox is being closed") from None
                    raise
                if not isinstance(answer, float):
                    return answer
                if loop.time() + answer > deadline:
                    raise late
                await asyncio.sleep(answer)
        finally:
            self._slots.release()

    async def _send(
        self, client: httpx.AsyncClient, method: str, path: str, body: bytes, limit: int
    ) -> bytes | float | None:
        """One request. Returns the answer, None for one that is too long, or how long to wait for a busy server."""
        where = f"{self._url}{path}"
        try:
            async with client.stream(
                method, where, content=body, headers={"Content-Type": "application/json"}, timeout=None
            ) as response:
                code = response.status_code
                retry = response.headers.get("Retry-After")
                if code == 429 or (code == 503 and retry is not None):
                    return min(float(retry), LONGEST_BUSY_S) if retry and retry.isdecimal() else BUSY_S
                kind = response.headers.get("Content-Type", "").split(";")[0].strip()
                content = bytearray()
                async for part in response.aiter_raw():
                    content += part
                    if len(content) > limit:
                        break
        except (httpx.TransportError, httpx.StreamError) as error:
            raise BoxLost(f"{where}: {type(error).__name__}: {error}") from error
        except (httpx.InvalidURL, UnicodeError) as error:
            raise ToolUnavailable(f"rlar.sandbox.fusion_url: {self._url}: {error}") from error
        if 300 <= code < 500:
            hint = _HINTS.get(code, "")
            raise ToolUnavailable(f"{where} answered HTTP {code}{hint}: {_short(content.decode(errors='replace'))}")
        if code != 200:
            raise BoxLost(f"{where} answered HTTP {code}: {_short(content.decode(errors='replace'))}")
        if kind != "application/json":
            raise BoxLost(f"{where} answered {kind or 'no kind of content'} instead of JSON")
        return None if len(content) > limit else bytes(content)


_CHANGED = "it asked something else when it was run again: a verifier must be deterministic"
_HINTS = {
    401: " (rlar.sandbox.fusion_token_env names the variable with a token)",
    403: " (rlar.sandbox.fusion_token_env names the variable with a token)",
    404: " (is rlar.sandbox.fusion_url the address of a SandboxFusion server?)",
    413: " (the job is larger than what a proxy lets through)",
}


def _read(content: bytes | None, secret: str) -> _Result:
    """What became of a job, by what the server has answered."""
    if content is None:
        return _Result(end=End.FLOODED.value)  # ours is never so long
    try:
        answer = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BoxLost(f"the SandboxFusion server's answer is not JSON: {error}") from None
    if not isinstance(answer, dict):
        raise BoxLost("the SandboxFusion server's answer is not an object")
    status, run, files = answer.get("status"), answer.get("run_result"), answer.get("files")
    if status not in ("Success", "Failed") or not isinstance(run, dict):
        message = _short(answer.get("message"))
        raise BoxLost(f"the SandboxFusion server answered status {status!r} without a run: {message}")
    if result := _own(files.get(RESULT) if isinstance(files, dict) else None, secret):
        return result
    if not str(run.get("stdout")).startswith(oneshot.STARTED.decode()):
        raise BoxLost(
            f"the SandboxFusion server did not start the job: {run.get('status')}, exit code {run.get('return_code')}: "
            + _short(run.get("stderr"))
        )
    if run.get("status") == "TimeLimitExceeded":
        return _Result(end=End.TIMEOUT.value)
    code = run.get("return_code")
    return _Result(end=End.KILLED.value, exit_code=code if type(code) is int else None)


def _own(encoded: Any, secret: str) -> _Result | None:
    """The result in a file that came back, if it is our program's."""
    try:
        said = json.loads(base64.b64decode(encoded, validate=True))
        if not secrets.compare_digest(str(said["secret"]).encode(), secret.encode()):
            return None
        end, code = str(said["end"]), said["exit_code"]
        return _Result(
            end=end if end == "asks" else End(end).value,
            seconds=max(float(said["seconds"]), 0.0),
            exit_code=code if type(code) is int else None,
            asks=tuple(str(ask) for ask in said["asks"]),
            output=str(said["output"]),
            errors=str(said["errors"]),
        )
    except (binascii.Error, LookupError, TypeError, ValueError, RecursionError):
        return None


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _short(text: object) -> str:
    return " ".join(str(text).split())[-300:]
