# SPDX-License-Identifier: Apache-2.0
"""A stand-in for an LLM: a real HTTP server that speaks ``/v1/chat/completions`` and answers by a script.

A script is a list of turns, one for each request, the last one again and again: calls of tools (`calls`), a text
(`text`), what `hub_server` calls a fault (`says`, `hangs`), or a function of the request that gives one of these.
`LlmServer.requests` holds what was asked.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

Reply = Callable[["Handler"], None]
Turn = Reply | Callable[[dict[str, Any]], Reply]
Call = tuple[str, Any]
"""A tool's name and its arguments; a text is sent as it is."""


def calls(*wanted: Call, content: str | None = None, usage: tuple[int, int] | None = (100, 20)) -> Reply:
    """Calls tools. All calls get the same identifier, as some endpoints do it."""
    listed = [
        {
            "id": "call",
            "type": "function",
            "function": {"name": name, "arguments": given if isinstance(given, str) else json.dumps(given)},
        }
        for name, given in wanted
    ]
    return _message({"role": "assistant", "content": content, "tool_calls": listed}, usage)


def text(content: str, usage: tuple[int, int] | None = (100, 20)) -> Reply:
    """Says something, and calls nothing."""
    return _message({"role": "assistant", "content": content}, usage)


def _message(message: dict[str, Any], usage: tuple[int, int] | None) -> Reply:
    reply: dict[str, Any] = {"object": "chat.completion", "choices": [{"index": 0, "message": message}]}
    if usage:
        reply["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)}
    return says(200, json.dumps(reply).encode())


def says(status: int, body: bytes = b"{}", **headers: str) -> Reply:
    """Answers this."""
    return lambda handler: handler.reply(status, body, headers)


def hangs(until: threading.Event) -> Reply:
    """Does not answer before something happens."""

    def reply(handler: Handler) -> None:
        until.wait(60)
        handler.close_connection = True

    return reply


def dies() -> Reply:
    """Closes the connection without an answer, and so does everything after it."""

    def reply(handler: Handler) -> None:
        handler.server.stand_in.dead = True
        handler.close_connection = True

    return reply


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        stand_in = self.server.stand_in
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with stand_in.lock:
            if stand_in.dead:
                self.close_connection = True
                return
            place = len(stand_in.requests)
            stand_in.requests.append(asked)
            stand_in.headers.append({name.lower(): value for name, value in self.headers.items()})
        turn = stand_in.script[min(place, len(stand_in.script) - 1)]
        if getattr(turn, "of_request", False):
            turn = turn(asked)  # type: ignore[assignment, arg-type]
        turn(self)  # type: ignore[arg-type]

    def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def of_request(turn: Callable[[dict[str, Any]], Reply]) -> Turn:
    """Marks a function that looks at the request."""
    turn.of_request = True  # type: ignore[attr-defined]
    return turn


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    stand_in: LlmServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients are killed; that is part of the tests."""


@dataclass
class LlmServer:
    """See the module. Use as ``with``."""

    script: Sequence[Turn]
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    """Names in lower case."""
    dead: bool = False

    def __enter__(self) -> LlmServer:
        self.lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), Handler)
        self._server.stand_in = self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)
