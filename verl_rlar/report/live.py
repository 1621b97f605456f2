# SPDX-License-Identifier: Apache-2.0
"""Serves a report on this machine's loopback, for as long as somebody looks at a training.

    GET /<key>/             the page
    GET /<key>/data.json    its figures; 304 while nothing was scored and nothing happened in the library

Guarantees: it listens on 127.0.0.1 only; it answers only who knows the key, a random part of the address, so that the
other users of a machine do not read along, and only to its own name, so that no web page reaches it by a name of theirs
(DNS rebinding); the ledger is only read. Figures are made once for all who ask, not again until there is something new,
and, where they take long, most of the time not at all: the machine is the training's. If they cannot be made (the
ledger is being moved), the last ones stay in place.

Not covered: the traffic is not encrypted, which on the loopback nobody hears; from afar, go through ``ssh -L``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

from verl_rlar.errors import ConfigError, RlarError
from verl_rlar.ledger import FILE_NAME
from verl_rlar.library import EVENTS_FILE
from verl_rlar.report.page import as_data, policy, render

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
REFRESH_S = 5.0
"""Every how many seconds a page asks."""
REST = 4.0
"""For so many times the time that figures took, none are made."""


class Live:
    """A server of a report. Use as a context manager; it serves inside it.

    Args:
        gather: Makes the figures.
        watched: Files and folders; when one of them changes, the figures are made anew.
        port: Port; 0: any.
        refresh_s: Every how many seconds a page asks.
        rest: For so many times the time that figures took, none are made.

    Raises:
        ConfigError: The port is taken.
    """

    def __init__(
        self,
        gather: Callable[[], Mapping[str, Any]],
        watched: tuple[Path, ...],
        *,
        port: int = 0,
        refresh_s: float = REFRESH_S,
        rest: float = REST,
    ) -> None:
        self._gather, self._watched, self._refresh_s, self._rest = gather, watched, refresh_s, rest
        self._not_before = 0.0
        self._lock = threading.Lock()
        self._state: tuple[Any, ...] | None = None
        self._key = secrets.token_urlsafe(12)
        self._figures: Mapping[str, Any] = {}
        self.tag = ""
        """Names the figures that are served."""
        self.refresh()
        try:
            self._server = ThreadingHTTPServer((HOST, port), _handler(self))
        except OSError as error:
            raise ConfigError(f"cannot serve at {HOST}:{port}: {error}; choose another --port, or 0 for any") from None
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.2,), daemon=True)

    def __enter__(self) -> Live:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def join(self) -> None:
        """Waits until the server ends."""
        while self._thread.is_alive():
            self._thread.join(0.5)

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{HOST}:{self.port}{self.path}"

    @property
    def path(self) -> str:
        """Path of the page, which holds the key."""
        return f"/{self._key}/"

    def refresh(self) -> None:
        """Makes the figures, if there is something new, and nobody is at it.

        Raises:
            RlarError: They cannot be made, and there are none from before.
        """
        if time.monotonic() < self._not_before or not self._lock.acquire(blocking=False):
            return
        try:
            self._make(tuple(_changed(file) for file in self._watched))
        finally:
            self._lock.release()

    def _make(self, state: tuple[Any, ...]) -> None:
        if state == self._state:
            return
        start = time.monotonic()
        try:
            figures = self._gather()
        except RlarError as error:
            if not self._figures:
                raise
            logger.warning("the report keeps its figures: %s", error)
            return
        finally:
            self._not_before = time.monotonic() + self._rest * (time.monotonic() - start)
        said = {name: value for name, value in figures.items() if name != "made"}
        tag = hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:24]
        self._figures, self.tag, self._state = figures, f'"{tag}"', state

    def page(self) -> bytes:
        """The page with the latest figures; it asks for newer ones by itself."""
        return render(self._figures, live_s=self._refresh_s)

    def data(self) -> bytes:
        """The latest figures."""
        return as_data(self._figures).encode()


def watched(place: Path, library: Path | None) -> tuple[Path, ...]:
    """What changes when there is something new in a run."""
    file = place / FILE_NAME if place.is_dir() else place
    return (file, file.with_name(f"{file.name}-wal"), *((library / EVENTS_FILE,) if library else ()))


def _changed(file: Path) -> tuple[int, int] | None:
    try:
        stat = file.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size


def _handler(live: Live) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version, protocol_version = "rlar", "", "HTTP/1.1"
        timeout = 30

        def do_GET(self) -> None:
            name, _, _ = self.headers.get("Host", "").rpartition(":")  # the port is another one behind `ssh -L`
            if name not in (HOST, "localhost"):
                self._answer(HTTPStatus.FORBIDDEN, b"this server answers to its own name only\n")
            elif secrets.compare_digest(self.path.encode(), live.path.encode()):
                self._answer(HTTPStatus.OK, live.page(), "text/html; charset=utf-8")
            elif secrets.compare_digest(self.path.encode(), f"{live.path}data.json".encode()):
                live.refresh()
                if self.headers.get("If-None-Match") == live.tag:
                    self._answer(HTTPStatus.NOT_MODIFIED, b"")
                else:
                    self._answer(HTTPStatus.OK, live.data(), "application/json; charset=utf-8")
            else:
                self._answer(HTTPStatus.NOT_FOUND, b"nothing here: use the whole address that `rlar report` printed\n")

        def _answer(self, status: HTTPStatus, body: bytes, kind: str = "text/plain; charset=utf-8") -> None:
            self.send_response(status)
            for name, value in {
                "Content-Type": kind,
                "Content-Length": str(len(body)),
                "Content-Security-Policy": policy(live=True) + "; frame-ancestors 'none'",
                "ETag": live.tag,
                "Cache-Control": "no-store",
                "X-Content-Type-Options": "nosniff",
                "Referrer-Policy": "no-referrer",
                "Cross-Origin-Resource-Policy": "same-origin",
                "Cross-Origin-Opener-Policy": "same-origin",
            }.items():
                if status is not HTTPStatus.NOT_MODIFIED or name != "Content-Length":
                    self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Says nothing: the terminal is the user's."""

    return Handler
