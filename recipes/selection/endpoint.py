# SPDX-License-Identifier: Apache-2.0
"""An LLM's endpoint on the loopback, behind which is a recording, or a live endpoint whose answers may be recorded.

What asks it is the adviser of a training, in its own process, over a real socket. Quotes in a question bear a random
mark (`verl_rlar.quoting`), another one each time; here all of them become the same one, so that the same question can
be found in a recording. A question that is not there is an error that names it, in `Endpoint.faults`.
"""

from __future__ import annotations

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

import httpx

from verl_rlar.errors import CassetteError

MARK = re.compile(r"<<<untrusted ([0-9a-f]+):")
SAME = "0" * 12


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        status, body = self.server.owner.answered(content, self.headers.get("Authorization"))
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    owner: Endpoint


class Endpoint:
    """Use as ``with Endpoint(...) as endpoint``; it is at `url`.

    Args:
        behind: Base address of the live endpoint, or of the one that was recorded.
        transport: What carries the questions on: a `verl_rlar.agents.cassette.Player`, or a `Recorder`; None: the
            network.
        timeout_s: Longest wait for an answer of the live endpoint, in seconds.
    """

    def __init__(self, behind: str, transport: httpx.BaseTransport | None, timeout_s: float = 300.0) -> None:
        self._client = httpx.Client(transport=transport, timeout=timeout_s)
        self._at = f"{behind.rstrip('/')}/chat/completions"
        self.faults: list[str] = []

    def answered(self, content: bytes, key: str | None) -> tuple[int, bytes]:
        """Status and body of the answer to a question."""
        text = content.decode()
        for mark in set(MARK.findall(text)):
            text = text.replace(mark, SAME)
        headers = {"content-type": "application/json", **({"authorization": key} if key else {})}
        try:
            reply = self._client.post(self._at, content=text.encode(), headers=headers)
            return reply.status_code, reply.content
        except (CassetteError, httpx.HTTPError) as error:
            self.faults.append(f"{type(error).__name__}: {error}")
            return 502, json.dumps({"error": {"message": self.faults[-1]}}).encode()

    def __enter__(self) -> Endpoint:
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.owner = self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)
        self._client.close()
