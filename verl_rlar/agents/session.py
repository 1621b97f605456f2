# SPDX-License-Identifier: Apache-2.0
"""One agent in a process of its own that can be killed at any time.

`run` starts the process, hands it its order, takes what it tells (`Event`), writes all of it into a transcript, and
says how it ended. The work itself is a function ``work(order, emit)`` in the agent's process; what it has found it
tells at once, by events, so that nothing of it is lost when it is killed. What it may not do itself, it asks for
(`ask`), and waits for the answer.

Guarantees:

- It ends in time: at `rlar.agents.wall_s` the process is killed with all that it started; so it is when whoever
  started it is interrupted, and it goes by itself when he is gone.
- Of the environment, it gets what `KEPT` names and the secrets that it is told to need, and no other. No secret's text
  stands in an event, a transcript or an error.
- The transcript (JSON lines, each with its time) is on the disk, line by line, also when the process was killed.
- An agent's text is never run, and `Ended` holds no more than what `work` told.

Not covered: limits of memory and network; the agents' own tools keep to what they may do. Code that an agent writes
belongs in a box.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, TextIO
from uuid import uuid4

from verl_rlar.errors import AgentError, RlarError

Event = dict[str, Any]
"""What an agent tells; ``event`` says which sort it is."""
Emit = Callable[[Event], None]
OnAsk = Callable[[Any, float], Any]
"""Answers what an agent asks: ``(question, seconds left) -> answer``, JSON-like; it may raise `Stop`."""
How = Literal["done", "steps", "tokens", "time", "endpoint", "crash"]
"""``done``: the agent said so. ``steps``, ``tokens``, ``time``: a budget was used up. ``endpoint``: its LLM did not
answer. ``crash``: its process ended by itself, or its work failed."""

KEPT = frozenset(
    "PATH HOME LANG LC_ALL TZ TMPDIR LD_LIBRARY_PATH SSL_CERT_FILE SSL_CERT_DIR HTTP_PROXY HTTPS_PROXY NO_PROXY "
    "ALL_PROXY http_proxy https_proxy no_proxy all_proxy HF_HOME HF_HUB_CACHE HF_ENDPOINT HF_HUB_OFFLINE".split()
)
SECRET = "[secret]"
LEAST_SECRET = 6
"""Characters from which on a secret is looked for in texts; a shorter one would be found everywhere."""
TAIL_BYTES = 2000
"""How much of what a process that crashed wrote to standard error is kept."""


class Stop(Exception):
    """Ends the work, in the agent's process.

    Args:
        how: As in `Ended`.
        detail: In words.
    """

    def __init__(self, how: How, detail: str = "") -> None:
        super().__init__(how, detail)
        self.how, self.detail = how, detail


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a session ended."""

    how: How
    detail: str
    """In words; empty if there is nothing to say."""
    seconds: float
    transcript: Path


def run(
    work: str,
    order: Mapping[str, Any],
    *,
    folder: Path,
    name: str,
    wall_s: float,
    secrets: Sequence[str],
    on_event: Emit,
    on_ask: OnAsk | None = None,
) -> Ended:
    """Runs one agent to its end.

    Args:
        work: What it does, as ``module:function``; called with the order and a function that takes events.
        order: What it is told; JSON-like, no secrets.
        folder: Where the transcript goes; made if missing.
        name: Start of the transcript's name.
        wall_s: Longest time, in seconds.
        secrets: Names of environment variables that it gets, where they are set.
        on_event: Called with every event, in order.
        on_ask: Answers its questions; None: it has none.

    Raises:
        RlarError: The work raised it: a fault of ours or the user's to mend, not of the agent.
        AgentError: There can be no transcript, or no process.
    """
    began = time.monotonic()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stamp = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%S")
        transcript = folder / f"{name}-{stamp}-{uuid4().hex[:6]}.jsonl"
        journal = open(transcript, "x", encoding="utf-8", buffering=1)
    except OSError as error:
        raise AgentError(f"no transcript can be kept in {folder}: {error.strerror or error}") from None

    def note(event: Event) -> None:
        journal.write(json.dumps({"at": round(time.monotonic() - began, 3), **event}, ensure_ascii=False) + "\n")

    with journal, tempfile.TemporaryFile() as errors, _process(secrets, errors) as process:
        note({"event": "order", "work": work, "order": dict(order)})
        told: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=_pass_on, args=(process.stdout, told), daemon=True).start()
        with suppress(OSError):  # it is gone already, which its end will tell
            process.stdin.write(json.dumps({"work": work, "order": dict(order)}) + "\n")
            process.stdin.flush()
        end: Event | None = None
        how: How = "time"
        while (left := began + wall_s - time.monotonic()) > 0:
            try:
                line = told.get(timeout=left)
            except queue.Empty:
                break
            if line is None:
                how = "crash"
                break
            try:
                event = json.loads(line)
            except ValueError:  # it died within a line
                continue
            if event["event"] == "end":
                end = event
                break
            if event["event"] != "tape":
                note(event)
            if event["event"] == "ask" and on_ask:
                try:
                    answer = on_ask(event["question"], began + wall_s - time.monotonic())
                except Stop as stop:
                    end = {"event": "end", "how": stop.how, "detail": stop.detail}
                    break
                note({"event": "answered", "answer": answer})
                with suppress(OSError):  # it is gone already
                    process.stdin.write(json.dumps(answer) + "\n")
                    process.stdin.flush()
                continue
            on_event(event)
        if end is None:
            detail = f"killed after {wall_s:g} s" if how == "time" else _last_words(process, errors, secrets)
            end = {"event": "end", "how": how, "detail": detail}
        note(end)
    if end["how"] == "fault":
        raise _fault(end)
    return Ended(how=end["how"], detail=end["detail"], seconds=time.monotonic() - began, transcript=transcript)


@contextmanager
def _process(secrets: Sequence[str], errors: Any) -> Iterator[Any]:
    """The agent's process, which does not outlive the block."""
    environment = {key: value for key, value in os.environ.items() if key in KEPT or key in secrets}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONSAFEPATH": "1"}
    environment |= {"RLAR_SECRETS": ",".join(secrets), "PYTHONUTF8": "1"}
    command = [sys.executable, "-c", "from verl_rlar.agents.session import inside; inside()"]
    try:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
            encoding="utf-8",
        )
    except OSError as error:
        raise AgentError(f"no process can be started for an agent: {error.strerror or error}") from None
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):
                pipe.close()  # type: ignore[union-attr]


def _pass_on(lines: TextIO, told: queue.SimpleQueue[str | None]) -> None:
    with suppress(OSError, ValueError):  # it was closed
        for line in lines:
            told.put(line)
    told.put(None)


def _last_words(process: Any, errors: Any, secrets: Sequence[str]) -> str:
    process.wait()
    errors.seek(max(0, errors.seek(0, os.SEEK_END) - TAIL_BYTES))
    words = _hide(errors.read().decode("utf-8", "replace").strip(), secrets)
    return f"its process ended with code {process.returncode}: {words.splitlines()[-1] if words else 'no word'}"


def _fault(end: Event) -> RlarError:
    from verl_rlar import errors

    kind = getattr(errors, end["kind"], AgentError)
    return kind(end["detail"]) if issubclass(kind, RlarError) else AgentError(end["detail"])


# --- in the agent's process -------------------------------------------------------------------------------------------


def inside() -> None:
    """The main function of an agent's process."""
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no event
    names = os.environ.pop("RLAR_SECRETS", "").split(",")
    lock = threading.Lock()

    def emit(event: Event) -> None:
        with lock:
            pipe.write(_hide(json.dumps(event, default=str), names) + "\n")
            pipe.flush()

    told = json.loads(sys.stdin.readline())
    threading.Thread(target=_go_with_parent, daemon=True).start()
    end: Event = {"event": "end", "how": "done", "detail": ""}
    try:
        module, _, function = told["work"].partition(":")
        getattr(importlib.import_module(module), function)(told["order"], emit)
    except Stop as stop:
        end |= {"how": stop.how, "detail": stop.detail}
    except RlarError as error:
        end |= {"how": "fault", "kind": type(error).__name__, "detail": str(error)}
    with suppress(BrokenPipeError):
        emit(end)


_answers: queue.SimpleQueue[Any] = queue.SimpleQueue()


def ask(emit: Emit, question: Any) -> Any:
    """Asks who started the agent, and waits for the answer. Both are JSON-like."""
    emit({"event": "ask", "question": question})
    return _answers.get()


def _go_with_parent() -> None:
    for line in sys.stdin:
        _answers.put(json.loads(line))
    os._exit(1)


def secrets_of(*names: str) -> tuple[str, ...]:
    """The secrets in some environment variables; those that are too short to be any are left out."""
    found = (os.environ.get(name, "") for name in names)
    return tuple(secret for secret in found if len(secret) >= LEAST_SECRET)


def _hide(text: str, names: Sequence[str]) -> str:
    """A text without the secrets in some environment variables."""
    for secret in secrets_of(*names):
        text = text.replace(json.dumps(secret)[1:-1], SECRET).replace(secret, SECRET)
    return text
