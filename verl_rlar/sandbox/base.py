# SPDX-License-Identifier: Apache-2.0
"""What a sandbox does: it runs one piece of code that nobody trusts, and says how that ended.

A `Job` is such a piece of code with its input. There are three modes:

- ``program``: a whole program, as ``python program.py``: text on standard input, text on standard output;
- ``calls``: a module whose functions are called with given values, and whose results come back as plain values;
- ``verifier``: a module with a function ``score(prompt, response, reference, extra)`` that gives a number in [0, 1] or
  None. While it is at work, it may *ask* for something that only the host can give, such as a program to be run.

Verifiers and programs never share a box. Whatever a job says about itself is data: JSON of limited size, never pickle.

Guarantees (every back-end, kept by one conformance suite): what the code does (crash, exit, flood, hang) is a result
and no exception; a job ends within its ``seconds`` and `GRACE_S`, waiting for a box not counted; a job starts from the
same pristine process whatever ran before; nothing that it leaves behind (processes, files) is there for the next one.
"""

from __future__ import annotations

import asyncio
import gc
import json
import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import TracebackType
from typing import Any, Literal, Protocol

GRACE_S = 0.75
"""How much longer than its ``seconds`` a job may take until its box is destroyed, in seconds."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One piece of code to run."""

    mode: Literal["program", "calls", "verifier"]
    source: str
    """Python source text, hostile until proven otherwise."""
    seconds: float
    """Wall time that it may take from the moment it has a box."""
    stdin: str = ""
    """Mode ``program``: its standard input."""
    calls: tuple[Any, ...] = ()
    """Mode ``calls``: expressions in the notation of `verl_rlar.sandbox.values`, evaluated in this order in the
    module's namespace, each on its own: one that raises does not keep the next from being tried."""
    inputs: Mapping[str, Any] = field(default_factory=dict)
    """Mode ``verifier``: keyword arguments of ``score``, JSON-like."""
    output_bytes: int = 1 << 20
    """Most that it may write (standard output, error and answers together); more ends it."""


class End(str, Enum):
    """How a job ended."""

    DONE = "done"
    """By itself: the program exited, all calls were tried, the verifier answered or raised."""
    TIMEOUT = "timeout"
    """It was still at work after its ``seconds``, and was killed."""
    KILLED = "killed"
    """A signal (no memory left, a crash of the interpreter), or its process left before it had answered."""
    FLOODED = "flooded"
    """It wrote more than ``output_bytes``, and was killed."""


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What became of a job. All of it but `end` and the times is the code's own word: hostile data."""

    end: End
    exit_code: int | None = None
    """Exit code of its process; negative: the signal that ended it; None if it was killed from outside."""
    stdout: str = ""
    """Mode ``program``: standard output, as far as it came. Undecodable bytes are replaced."""
    stderr: str = ""
    """Mode ``program``: the last part of standard error."""
    answers: tuple[Any, ...] = ()
    """Mode ``calls``: one JSON object for each expression, as far as it came, see `verl_rlar.sandbox.values`; before
    them ``{"load_error": text}`` instead of all, if the module could not be loaded. Mode ``verifier``: at most one,
    ``{"value": number or null, "reason": text}`` or ``{"error": text}``."""
    forged: bool = False
    """It answered what our harness in the box cannot have written: it tampers."""
    seconds: float = 0.0
    """Wall time of the job itself."""
    queued: float = 0.0
    """Wall time of waiting for a box before that."""


class BoxLost(ConnectionError):
    """The box or the server went away under a job, or could not be started; worth one more try."""


Answerer = Callable[[Mapping[str, Any], float], Awaitable[Any]]
"""Answers what a verifier asks: ``(ask, seconds left) -> reply``, both JSON-like. The ask is hostile data; for one that
it does not want to answer it returns ``{"error": text}``."""


class Sandbox(Protocol):
    """Runs jobs. Use as ``async with``: entering makes it ready, leaving ends all that it started."""

    async def run(self, job: Job, answer: Answerer | None = None) -> Ran:
        """Runs one job.

        Args:
            job: What to run.
            answer: Answers what a verifier asks; None: whatever it asks is refused.

        Raises:
            BoxLost: Our fault, not the job's: the box, the engine or the server went away.
            ToolTimeout: No box became free within ``rlar.sandbox.queue_timeout_s``.
            ToolUnavailable: There is no engine or server, or it cannot do what is needed.
        """
        ...

    async def __aenter__(self) -> Sandbox: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


async def reply_to(line: str, answer: Answerer | None, left: float) -> Any:
    """The reply to what a verifier asks.

    Args:
        line: Its question, hostile: a JSON object with the key ``ask``.
        answer: Who answers; None: nobody.
        left: Seconds until the verifier's deadline.
    """
    try:
        ask = json.loads(line)["ask"]
    except (ValueError, RecursionError, TypeError, LookupError):
        return {"error": "not a question"}
    if answer is None or not isinstance(ask, dict):
        return {"error": "nothing is answered here"}
    try:
        return await asyncio.wait_for(answer(ask, left), max(left, 0.0))
    except asyncio.TimeoutError:
        return {"error": "no time left"}


def ended(
    job: Job,
    end: End,
    *,
    exit_code: int | None,
    output: str,
    errors: str,
    seconds: float,
    queued: float = 0.0,
) -> Ran:
    """What became of a job, told from what a back-end has seen of its process.

    Args:
        job: The job.
        end: How the process ended.
        exit_code: See `Ran`.
        output: What it wrote: to standard output, or, but for mode ``program``, as answers. Hostile.
        errors: The last part of what it wrote to standard error.
        seconds: Wall time of the job.
        queued: Wall time of waiting before.
    """
    if job.mode == "program":
        return Ran(end=end, exit_code=exit_code, stdout=output, stderr=errors, seconds=seconds, queued=queued)
    answers, forged = read_answers(job, output)
    expected = 1 if job.mode == "verifier" else len(job.calls)
    loaded = not (answers and "load_error" in answers[0])
    if end is End.DONE and loaded and len(answers) < expected:
        end = End.KILLED  # it left before it had answered
    return Ran(end=end, exit_code=exit_code, answers=answers, forged=forged, seconds=seconds, queued=queued)


def read_answers(job: Job, output: str) -> tuple[tuple[Any, ...], bool]:
    """What a job of mode ``calls`` or ``verifier`` has answered, one JSON object a line.

    Args:
        job: The job.
        output: All that came out of its process, hostile. A last line without its end is not looked at.

    Returns:
        The answers up to the first one that our harness cannot have written, and whether there is such a one.
    """
    answers: list[Any] = []
    collects = gc.isenabled()
    gc.disable()  # else a million empty lists hold the event loop up five times as long
    try:
        for line in output.split("\n")[:-1]:
            answer = _decode(line)
            if not _well_formed(job, answer, len(answers)):
                return tuple(answers), True
            answers.append(answer)
    except (ValueError, RecursionError, OverflowError):
        return tuple(answers), True
    finally:
        if collects:
            gc.enable()
    return tuple(answers), False


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


_decode = json.JSONDecoder(parse_constant=_refuse).decode


def _well_formed(job: Job, answer: Any, number: int) -> bool:
    if not isinstance(answer, dict):
        return False
    if job.mode == "verifier":
        value = answer.get("value")
        if _texts(answer, "error"):
            return number == 0
        scored = answer.keys() == {"value", "reason"} and isinstance(answer["reason"], str)
        return number == 0 and scored and (value is None or (type(value) in (int, float) and math.isfinite(value)))
    if number == 0 and _texts(answer, "load_error"):
        return True
    return number < len(job.calls) and (answer.keys() == {"value"} or _texts(answer, "raised", "text"))


def _texts(answer: Mapping[str, Any], *names: str) -> bool:
    """Whether an object has these fields and no other, all of them texts."""
    return answer.keys() == set(names) and all(isinstance(value, str) for value in answer.values())
