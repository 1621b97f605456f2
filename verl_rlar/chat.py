# SPDX-License-Identifier: Apache-2.0
"""What an OpenAI-compatible endpoint is asked, and what its answers mean, whoever carries them.

For the agents' LLM (`verl_rlar.agents.llm`, from threads) and for rubrics (`verl_rlar.tools.rubric`, from an event
loop).

Guarantees: an error says what was asked, what came, and what to do; it never holds the key. HTTP 429 and 5xx are
`Busy`, unless the endpoint wants a longer pause than `rlar.agents.max_wait_s`.

Not covered: the connection itself, deadlines, retries: they are the caller's.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any

from verl_rlar.config import AgentsConfig
from verl_rlar.errors import EndpointError

NEWER = "max_completion_tokens"
"""What newer models of OpenAI's call the most tokens of an answer; they refuse ``max_tokens``."""
REPLY_BYTES = 4 * 2**20
"""Largest answer that is read."""
CHARS_PER_TOKEN = 4
"""Where nothing else tells the tokens of a text."""
_NEWER_WANTED = re.compile(rf"use\W{{1,4}}{NEWER}".encode(), re.IGNORECASE)


class Busy(Exception):
    """The endpoint does not answer now; it may a little later."""

    def __init__(self, error: EndpointError, wait_s: float | None) -> None:
        super().__init__(error)
        self.error, self.wait_s = error, wait_s

    def pause_s(self, attempt: int, most: float) -> float:
        """How long to wait before the next try, in seconds: as the endpoint says, or ever longer."""
        return min(most, 0.5 * 2**attempt if self.wait_s is None else self.wait_s)


class Renamed(EndpointError):
    """The endpoint wants `NEWER` instead of ``max_tokens``."""


def rename(body: dict[str, Any]) -> bool:
    """Gives the most tokens of an answer their newer name; False: they have it already."""
    if "max_tokens" not in body:
        return False
    body[NEWER] = body.pop("max_tokens")
    return True


def address(config: AgentsConfig) -> str:
    """Where questions go."""
    return f"{(config.url or '').rstrip('/')}/chat/completions"


def headers(config: AgentsConfig) -> dict[str, str]:
    """What goes with every question."""
    key = os.environ.get(config.api_key_env)
    return {"accept-encoding": "identity", **({"authorization": f"Bearer {key}"} if key else {})}


def too_large(at: str) -> EndpointError:
    """An answer was longer than `REPLY_BYTES`."""
    return EndpointError(f"{at} answered with more than {REPLY_BYTES >> 20} MiB")


def reply_of(at: str, status: int, got: Mapping[str, str], body: bytes, config: AgentsConfig) -> dict[str, Any]:
    """The JSON object in an answer.

    Args:
        at: Who answered.
        status: The HTTP status.
        got: The answer's headers.
        body: The answer.
        config: Settings.

    Raises:
        Busy: It may be asked again.
        Renamed: It may be asked again after `rename`.
        EndpointError: It is no answer.
    """
    if status != 200:
        said = "".join(c if c.isprintable() else " " for c in body.decode("utf-8", "replace"))[:300]
        error = EndpointError(f"{at} answered with HTTP {status}: {said}")
        if status in (401, 403):
            error = EndpointError(f"{at} does not let us in (HTTP {status}); check {config.api_key_env}")
        if wants_newer(status, body):
            error = Renamed(str(error))
        if status == 429 or status >= 500:
            text = got.get("retry-after", "").strip()
            wait_s = float(text[:9]) if text.isdecimal() else None
            if wait_s is None or wait_s <= config.max_wait_s:
                raise Busy(error, wait_s)
        raise error
    try:
        reply = json.loads(body)
    except (ValueError, RecursionError):
        reply = None
    if not isinstance(reply, dict):
        raise EndpointError(f"{at} answered with no JSON object: is it an OpenAI-compatible endpoint?")
    return reply


def wants_newer(status: int, body: bytes | bytearray) -> bool:
    """Whether an endpoint refuses a request for the name of a field only, see `Renamed`."""
    return status == 400 and _NEWER_WANTED.search(body) is not None


def message_of(at: str, reply: Mapping[str, Any]) -> tuple[Mapping[str, Any], str | None]:
    """The message in an answer, and its text.

    Raises:
        EndpointError: There is none.
    """
    try:
        said = reply["choices"][0]["message"]
        text = said.get("content")
        if isinstance(text, list):
            text = "".join(part["text"] for part in text if part["type"] == "text")
        if not isinstance(text, str | None):
            raise TypeError
    except (KeyError, IndexError, TypeError, AttributeError):
        raise no_message(at, reply) from None
    return said, text


def cut_off(reply: Mapping[str, Any]) -> bool:
    """Whether an answer that has a message was cut off at its most tokens."""
    return bool(reply["choices"][0].get("finish_reason") == "length")


def no_message(at: str, reply: Mapping[str, Any]) -> EndpointError:
    """An answer is not that of an LLM."""
    return EndpointError(f"{at} answered with no message of an LLM: {str(reply)[:200]!r}")


def usage_of(reply: Mapping[str, Any], said: Mapping[str, Any], expected: int) -> tuple[int, int]:
    """Tokens read and written, as the endpoint says, or else estimated.

    Args:
        reply: The answer.
        said: Its message.
        expected: Tokens that it should have read.
    """
    usage = reply.get("usage")
    names = ("prompt_tokens", "completion_tokens")
    counts = [usage.get(name) if isinstance(usage, dict) else None for name in names]
    read, written = (count if type(count) is int and count >= 0 else None for count in counts)
    return (
        expected if read is None else read,
        len(str(said)) // CHARS_PER_TOKEN if written is None else written,
    )
