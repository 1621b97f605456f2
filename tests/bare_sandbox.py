# SPDX-License-Identifier: Apache-2.0
"""A sandbox without walls: the harness of the boxes in a plain process, for tests that need no Docker.

It isolates nothing and is fed our own harmless programs only. What it is good for: the same modes, answers and ends as
a box's, in any place where Python runs.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from verl_rlar import sandbox
from verl_rlar.sandbox.base import Answerer, End, Job, Ran, read_answers

FOLDER = Path(sandbox.__file__).parent
START = """
import json, sys
sys.path[:0] = sys.argv[1:3]
import harness
with open(sys.argv[3], encoding="utf-8") as file:
    job = json.load(file)
harness.child(job, 0, int(sys.argv[4]), 2, int(sys.argv[5]))
"""


class BareSandbox:
    """See the module."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        """Every job that was run."""

    async def __aenter__(self) -> BareSandbox:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    async def run(self, job: Job, answer: Answerer | None = None) -> Ran:
        """See `Sandbox.run`."""
        self.jobs.append(job)
        with tempfile.TemporaryDirectory() as folder:
            return await self._run(job, answer, Path(folder))

    async def _run(self, job: Job, answer: Answerer | None, folder: Path) -> Ran:
        keys = ("mode", "source", "seconds", "output_bytes", "calls", "inputs")
        (folder / "job").write_text(json.dumps({key: getattr(job, key) for key in keys}), encoding="utf-8")
        (folder / "stdin").write_bytes(job.stdin.encode("utf-8", "surrogatepass"))
        output, theirs = os.pipe()
        their_replies, replies = os.pipe()
        started = time.monotonic()
        with open(folder / "stdin", "rb") as stdin, open(folder / "stderr", "w+b") as stderr:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", "-B", "-c", START, str(FOLDER / "inside"), str(FOLDER)),
                *(str(folder / "job"), str(theirs), str(their_replies)),
                stdin=stdin,
                stderr=stderr,
                pass_fds=(theirs, their_replies),
                cwd=folder,
            )
            os.close(theirs)
            os.close(their_replies)
            kept = bytearray()
            end = End.TIMEOUT
            try:
                end = await asyncio.wait_for(self._read(job, output, replies, answer, kept, started), job.seconds + 0.5)
            except (TimeoutError, asyncio.TimeoutError):
                pass
            finally:
                os.close(replies)
                if process.returncode is None and end is not End.DONE:
                    process.kill()
                code = await process.wait()
            stderr.seek(0)
            errors = stderr.read()[-4096:].decode("utf-8", "replace")
        seconds = time.monotonic() - started
        if end is End.DONE and code < 0:
            end = End.KILLED
        text = kept.decode("utf-8", "replace")
        exit_code = code if end in (End.DONE, End.KILLED) else None
        if job.mode == "program":
            return Ran(end=end, stdout=text, stderr=errors, exit_code=exit_code, seconds=seconds)
        answers, forged = read_answers(job, text)
        loaded = not (answers and job.mode == "calls" and "load_error" in answers[0])
        if end is End.DONE and loaded and len(answers) < (len(job.calls) if job.mode == "calls" else 1):
            end = End.KILLED
        return Ran(end=end, answers=answers, forged=forged, exit_code=exit_code, seconds=seconds)

    async def _read(
        self, job: Job, output: int, replies: int, answer: Answerer | None, kept: bytearray, started: float
    ) -> End:
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(output, "rb")
        )
        try:
            total = 0
            while data := await reader.read(1 << 16):
                total += len(data)
                if total > job.output_bytes:
                    return End.FLOODED
                kept += data
                while job.mode == "verifier" and kept.startswith(b'{"ask"') and b"\n" in kept:
                    line, _, rest = bytes(kept).partition(b"\n")
                    kept[:] = rest
                    reply: Any = {"error": "nothing is answered here"}
                    if answer is not None:
                        ask: Mapping[str, Any] = json.loads(line)["ask"]
                        reply = await answer(ask, started + job.seconds - time.monotonic())
                    os.write(replies, json.dumps(reply).encode() + b"\n")
            return End.DONE
        finally:
            transport.close()
