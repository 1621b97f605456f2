# SPDX-License-Identifier: Apache-2.0
"""Where no engine answers, the message says what was tried, what went wrong there, and what to do. No Docker needed."""

from __future__ import annotations

import asyncio
import http.server
import json
import os
import pickle
import shutil
import socket
import socketserver
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from verl_rlar.config import SandboxConfig
from verl_rlar.errors import ToolUnavailable
from verl_rlar.sandbox import BoxLost, End, Job
from verl_rlar.sandbox.docker import Box, _Connection
from verl_rlar.sandbox.engine import connect


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short name: a socket's path is limited to 108 bytes."""
    path = Path(tempfile.mkdtemp(prefix="rlar-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(autouse=True)
def no_docker_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    for name in ("DOCKER_HOST", "DOCKER_CONTEXT", "DOCKER_TLS_VERIFY", "DOCKER_CERT_PATH"):
        monkeypatch.delenv(name, raising=False)


def fault(environ: Mapping[str, str], timeout: float = 60.0) -> str:
    with pytest.raises(ToolUnavailable) as caught:
        connect(SandboxConfig(), timeout=timeout, environ=environ)
    return str(caught.value)


Answer = Callable[[http.server.BaseHTTPRequestHandler], None]


class Engine:
    """A stand-in for an engine, that speaks HTTP on a real Unix socket."""

    def __init__(self, path: Path, answer: Answer) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                answer(self)

            do_HEAD = do_GET

            def address_string(self) -> str:
                return "unix"

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
            daemon_threads = True

        self._server = Server(str(path), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    def __enter__(self) -> Engine:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def say(handler: http.server.BaseHTTPRequestHandler, status: int, body: bytes) -> None:
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def engine_says(handler: http.server.BaseHTTPRequestHandler) -> None:
    say(handler, 200, b"OK" if handler.path.endswith("_ping") else json.dumps({"ApiVersion": "1.41"}).encode())


def test_an_engine_that_answers_is_used(folder: Path) -> None:
    with Engine(folder / "s", engine_says):
        client = connect(SandboxConfig(), timeout=7, environ={"DOCKER_HOST": f"unix://{folder}/s"})
        assert client.ping()
        assert (client.api._version, client.api.timeout) == ("1.41", 7)
        client.close()


def test_a_rootless_engine_is_found_without_any_variable(folder: Path) -> None:
    if os.path.exists("/var/run/docker.sock"):
        pytest.skip("this machine has an engine at the usual place")
    with Engine(folder / "docker.sock", engine_says):
        connect(SandboxConfig(), environ={"XDG_RUNTIME_DIR": str(folder)}).close()


def test_a_missing_socket_is_told_with_all_ways_out(folder: Path) -> None:
    message = fault({"DOCKER_HOST": f"unix://{folder}/s"})
    assert f"unix://{folder}/s (DOCKER_HOST): there is no such socket" in message
    for way in (
        "docker.io",
        "usermod -aG docker",
        "dockerd-rootless-setuptool.sh install",
        "DOCKER_HOST=tcp://",
        "DOCKER_TLS_VERIFY",
        "ssh://",
        "rlar.sandbox.backend=sandbox_fusion",
        "rlar.sandbox.backend=none",
        "rlar doctor",
    ):
        assert way in message
    assert str(pickle.loads(pickle.dumps(ToolUnavailable(message)))) == message


def test_an_engine_that_was_named_is_never_replaced_by_another(folder: Path) -> None:
    with Engine(folder / "docker.sock", engine_says):
        message = fault({"DOCKER_HOST": f"unix://{folder}/s", "XDG_RUNTIME_DIR": str(folder)})
    assert "docker.sock" not in message.partition("Ways out")[0]


def test_a_socket_that_nobody_listens_on_is_refused(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/s")
    assert "connection refused: nothing listens there" in fault({"DOCKER_HOST": f"unix://{folder}/s"})


def test_a_port_that_nobody_listens_on_is_refused() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        message = fault({"DOCKER_HOST": f"tcp://127.0.0.1:{port}"})
    assert f"tcp://127.0.0.1:{port} (DOCKER_HOST): connection refused" in message and "another port" in message


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_socket_of_somebody_else_is_permission_denied(folder: Path) -> None:
    folder.chmod(0o711)
    reads, writes = os.pipe()
    with Engine(folder / "s", engine_says):
        os.chmod(folder / "s", 0o600 if os.getuid() == 0 else 0)
        child = os.fork()
        if not child:
            try:
                if os.getuid() == 0:
                    os.setgid(65534)
                    os.setuid(65534)
                connect(SandboxConfig(), environ={"DOCKER_HOST": f"unix://{folder}/s"})
            except BaseException as error:
                os.write(writes, f"{type(error).__name__}: {error}".encode())
            finally:
                os._exit(0)
        os.close(writes)
        with os.fdopen(reads) as pipe:
            message = pipe.read()
        os.waitpid(child, 0)
    assert message.startswith("ToolUnavailable")
    assert "permission denied" in message and f"belongs to {folder.owner()}:" in message


def test_an_engine_that_hangs_is_given_up_in_time(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/s")
        listener.listen()
        began = time.monotonic()
        message = fault({"DOCKER_HOST": f"unix://{folder}/s"}, timeout=0.3)
    assert "no answer within 0.3 s" in message
    assert time.monotonic() - began < 30


def test_an_engine_that_wants_tls_says_so(folder: Path) -> None:
    with Engine(folder / "s", lambda handler: say(handler, 400, b"Client sent an HTTP request to an HTTPS server.\n")):
        assert "Does it want TLS (DOCKER_TLS_VERIFY=1)?" in fault({"DOCKER_HOST": f"unix://{folder}/s"})


def test_an_engine_that_fails_is_quoted(folder: Path) -> None:
    with Engine(folder / "s", lambda handler: say(handler, 500, b'{"message": "the disk is full"}')):
        assert "it answered 500: the disk is full" in fault({"DOCKER_HOST": f"unix://{folder}/s"})


def test_what_is_no_engine_is_no_engine(folder: Path) -> None:
    with Engine(folder / "s", lambda handler: say(handler, 200, b"<html>")):
        assert "no Docker engine answers" in fault({"DOCKER_HOST": f"unix://{folder}/s"})


def test_certificates_that_are_not_there_are_named(tmp_path: Path) -> None:
    message = fault({"DOCKER_HOST": "tcp://127.0.0.1:1", "DOCKER_TLS_VERIFY": "1", "DOCKER_CERT_PATH": str(tmp_path)})
    assert str(tmp_path) in message and "ca.pem" in message


def test_certificates_that_are_none_are_a_tls_fault(tmp_path: Path) -> None:
    for name in ("ca.pem", "cert.pem", "key.pem"):
        (tmp_path / name).write_text("nothing")
    message = fault({"DOCKER_HOST": "tcp://127.0.0.1:1", "DOCKER_TLS_VERIFY": "1", "DOCKER_CERT_PATH": str(tmp_path)})
    assert "TLS" in message and "DOCKER_CERT_PATH" in message


def test_an_address_that_is_none_is_quoted() -> None:
    assert "gopher://nowhere" in fault({"DOCKER_HOST": "gopher://nowhere"})


def test_a_context_that_is_not_there_is_named() -> None:
    message = fault({"DOCKER_CONTEXT": "elsewhere"})
    assert "'elsewhere'" in message and "docker context ls" in message


def test_the_context_in_use_names_the_engine(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from docker.context import ContextAPI

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    ContextAPI.create_context("mine", host=f"unix://{folder}/s")
    assert f"unix://{folder}/s (Docker context 'mine')" in fault({"DOCKER_CONTEXT": "mine"})
    (tmp_path / "config.json").write_text('{"currentContext": "mine"}')
    assert f"unix://{folder}/s (Docker context 'mine')" in fault({})
    (tmp_path / "config.json").write_text('{"currentContext": "other"}')
    assert "no Docker context of the name in Docker's config.json" in fault({})


@pytest.mark.parametrize("backend", ["none", "sandbox_fusion"])
def test_other_back_ends_use_no_engine(backend: Any) -> None:
    with pytest.raises(ToolUnavailable, match=f"rlar.sandbox.backend={backend}"):
        connect(SandboxConfig(backend=backend))


@pytest.mark.parametrize("answers", [True, False])
async def test_only_where_the_engine_answers_is_silence_the_programs_doing(answers: bool) -> None:
    """Nothing comes from a box whose worker a program keeps from running, and none if the engine hangs."""

    class Engine:
        id = "box"

        @property
        def client(self) -> Engine:
            return self

        @property
        def api(self) -> Engine:
            return self

        def ping(self) -> bool:
            if not answers:
                raise OSError("timed out")
            return True

        def events(self, **_: Any) -> Any:
            raise OSError("timed out")

    ours, theirs = socket.socketpair()
    _, connection = await asyncio.get_running_loop().create_connection(_Connection, sock=ours)
    job = Job(mode="program", source="print(1)", seconds=0.05)
    try:
        if answers:
            assert (await Box(Engine(), connection).run(job, None)).end is End.TIMEOUT
        else:
            with pytest.raises(BoxLost, match="does not answer"):
                await Box(Engine(), connection).run(job, None)
    finally:
        theirs.close()
