# SPDX-License-Identifier: Apache-2.0
"""What a verifier can use beside Python and the image's libraries: ``import rlar`` inside a box.

A verifier that has a program run::

    import rlar

    def score(prompt, response, reference, extra):
        ran = rlar.run_program(response, stdin=extra["stdin"])
        return float(ran.end == "done" and ran.stdout.strip() == reference)
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple, TextIO

_send: Callable[[dict[str, Any]], None]
_replies: TextIO


def connect(send: Callable[[dict[str, Any]], None], replies: TextIO) -> None:
    """Called by the harness, once."""
    global _send, _replies
    _send, _replies = send, replies


def ask(**question: Any) -> Any:
    """Asks the host for something that it offers, and waits for the reply.

    Raises:
        RuntimeError: The host does not answer this.
    """
    _send({"ask": question})
    reply = json.loads(_replies.readline())
    if isinstance(reply, dict) and "error" in reply:
        raise RuntimeError(reply["error"])
    return reply


class Program(NamedTuple):  # a dataclass takes 8 ms to import
    """What became of a program."""

    end: str
    """``done`` (it exited), ``timeout``, ``killed`` or ``flooded``."""
    exit_code: int | None
    stdout: str
    stderr: str
    """The last part of it."""


def run_program(source: str, stdin: str = "", seconds: float | None = None) -> Program:
    """Runs a whole Python program in another box.

    Args:
        source: Its text.
        stdin: What it reads on standard input.
        seconds: Its wall time; None: ``rlar.sandbox.program_timeout_s``.
    """
    reply = ask(kind="program", source=source, stdin=stdin, seconds=seconds)
    return Program(reply["end"], reply["exit_code"], reply["stdout"], reply["stderr"])
