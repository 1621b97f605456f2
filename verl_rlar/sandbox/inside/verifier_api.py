# SPDX-License-Identifier: Apache-2.0
"""What a verifier can use beside Python and the image's libraries: ``import rlar`` inside a box.

Ten functions: two that ask the host (`run_program`, `builtin`), and `READERS`, which read text here; these are
functions of `verl_rlar.sandbox.reading`, with which our own rules read, too.

    import rlar

    def score(prompt, response, reference, extra):
        wanted = rlar.number(reference or "")
        if wanted is None:
            return None, "the reference is no number"
        return float(rlar.numbers(rlar.final_answer(response)) == [wanted])

Guarantees: the readers raise nothing and keep limits, whatever the text is; what the host is asked runs elsewhere, in
another box or in the processes of our rules, on texts that this verifier has anyway, within its deadline.

Not covered: the built-in tools that have programs run themselves cannot be wrapped; `run_program` can do that.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple, TextIO

READERS = ("answer_of", "final_answer", "number", "numbers", "plain", "normalise", "code_blocks", "find_json")
SENT = 200_000
"""Characters of a response that a built-in tool is asked about, from its end."""

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


def __getattr__(name: str) -> Any:
    """The readers, when they are first asked for: to load them takes some 10 ms, unless the box has them already."""
    if name not in READERS:
        raise AttributeError(f"rlar has no {name}; it has run_program, builtin, {', '.join(READERS)}")
    import reading

    return getattr(reading, name)


def may_read(source: str) -> bool:
    """Whether a source looks as if it used one of `READERS`."""
    return any(f"rlar.{name}" in source for name in READERS) or "from rlar" in source or "rlar as" in source


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


class Score(NamedTuple):
    """What a built-in tool said."""

    value: float | None
    """From 0 to 1; None: it cannot tell."""
    reason: str


def builtin(name: str, response: str, reference: str | None = None) -> Score:
    """Has a built-in tool score a text; prompt and extra columns are those of the row.

    Args:
        name: The tool, as a literal: that this verifier wraps it is read off its source, and stands in its spec.
        response: What it scores: the response, or a part of it; only its last `SENT` characters are looked at.
        reference: The right answer; None: the row's.

    Raises:
        RuntimeError: There is no such tool, the source does not name it as it must, or it failed.
    """
    return Score(*ask(kind="builtin", name=name, response=response[-SENT:], reference=reference))
