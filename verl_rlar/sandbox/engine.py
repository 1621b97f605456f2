# SPDX-License-Identifier: Apache-2.0
"""Finds a Docker engine, or says why there is none and how to get one.

The address comes from ``DOCKER_HOST`` (with ``DOCKER_TLS_VERIFY`` and ``DOCKER_CERT_PATH``), else from the Docker
context in use (``DOCKER_CONTEXT``, or the one that ``docker context use`` chose), else it is the usual socket of a
rootful engine, else of a rootless one.

Guarantees: an engine that does not answer is `ToolUnavailable` within ``timeout`` seconds per address that is tried;
the message names what was tried, what went wrong there, and the ways out. An engine that was named and does not answer
is never replaced by another one.

Not covered: whether the engine keeps a box's limits; `verl_rlar.sandbox.doctor` looks into that.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker
import requests
from docker.context import ContextAPI
from docker.errors import APIError, ContextException, DockerException, TLSParameterError
from docker.utils import kwargs_from_env

from verl_rlar.config import SandboxConfig
from verl_rlar.errors import ToolUnavailable

TIMEOUT_S = 60.0
"""Default for how long a call to the engine may take, in seconds."""
PING_TIMEOUT_S = 15.0
"""How long an engine may take to answer for the first time, in seconds."""

ROOTFUL = "unix:///var/run/docker.sock"
WAYS_OUT = """\
Ways out:
  - an engine on this machine: your distribution's package (docker.io, docker-ce, moby-engine), then
    `usermod -aG docker $USER` and a new login
  - without root: `dockerd-rootless-setuptool.sh install`, then `export DOCKER_HOST=unix://$XDG_RUNTIME_DIR/docker.sock`
  - on another machine: `export DOCKER_HOST=tcp://HOST:2376 DOCKER_TLS_VERIFY=1 DOCKER_CERT_PATH=FOLDER`, or
    `export DOCKER_HOST=ssh://USER@HOST`
  - a cluster without engines: a SandboxFusion server, `rlar.sandbox.backend=sandbox_fusion` and
    `rlar.sandbox.fusion_url=http://HOST:8080`
  - data without rows that need code to run: `rlar.sandbox.backend=none`
`rlar doctor` checks the result."""


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where an engine may be."""

    url: str
    """``unix://``, ``tcp://``, ``ssh://`` or ``npipe://``."""
    source: str
    """What named it, for messages."""
    tls: Any = None
    """`docker.tls.TLSConfig`, or None: plain."""


def connect(config: SandboxConfig, *, timeout: float = TIMEOUT_S, environ: Mapping[str, str] = os.environ) -> Any:
    """Connects to the engine.

    Args:
        config: Its backend must be ``docker``; nothing else is read here.
        timeout: How long any call to the engine may take, in seconds. The first answer must come within
            `PING_TIMEOUT_S` of these.
        environ: The variables that name the engine.

    Returns:
        A `docker.DockerClient` whose engine has answered. The caller closes it.

    Raises:
        ToolUnavailable: No engine answers; the message says what was tried and what to do.
    """
    if config.backend != "docker":
        raise ToolUnavailable(f"no Docker engine is used with rlar.sandbox.backend={config.backend}")
    faults = []
    for address in addresses(environ):
        try:
            return _connect(address, timeout)
        except (DockerException, OSError, requests.exceptions.RequestException) as error:
            faults.append(f"  - {address.url} ({address.source}): {explain(error, address, timeout)}")
    raise ToolUnavailable("\n".join(["no Docker engine answers. Tried:", *faults, WAYS_OUT]))


def addresses(environ: Mapping[str, str] = os.environ) -> Iterator[Address]:
    """Where to look for an engine: the one that was named, else the usual places.

    Raises:
        ToolUnavailable: What names an engine is itself wrong: a context that is not there, certificates not found.
    """
    try:
        tls = kwargs_from_env(dict(environ) or {"": ""}).get("tls")
        if url := environ.get("DOCKER_HOST"):
            yield Address(url=url, source="DOCKER_HOST", tls=tls)
            return
        context = ContextAPI.get_context(environ.get("DOCKER_CONTEXT"))
    except TLSParameterError as error:
        detail = str(error).split(" TLS configurations should map")[0]
        raise ToolUnavailable(
            f"the certificates for the Docker engine cannot be used: {detail} Look at DOCKER_TLS_VERIFY and at"
            f" DOCKER_CERT_PATH={environ.get('DOCKER_CERT_PATH') or '(unset: ~/.docker)'}, a folder that must hold"
            " ca.pem, cert.pem and key.pem"
        ) from None
    except ContextException as error:
        raise ToolUnavailable(f"the Docker context in use cannot be read: {error}. See `docker context ls`") from None
    if context is None:
        name = environ.get("DOCKER_CONTEXT")
        which = f"{name!r} (DOCKER_CONTEXT)" if name else "of the name in Docker's config.json"
        raise ToolUnavailable(f"there is no Docker context {which}. See `docker context ls`")
    if context.Name != "default":
        yield Address(url=context.Host, source=f"Docker context {context.Name!r}", tls=context.TLSConfig)
        return
    yield Address(url=ROOTFUL, source="the usual socket")
    if folder := environ.get("XDG_RUNTIME_DIR"):
        yield Address(url=f"unix://{folder}/docker.sock", source="the socket of a rootless engine")


def _connect(address: Address, timeout: float) -> Any:
    base: dict[str, Any] = {"base_url": address.url, "use_ssh_client": address.url.startswith("ssh://")}
    if address.tls is not None:
        base["tls"] = address.tls
    first = docker.DockerClient(version="auto", timeout=min(timeout, PING_TIMEOUT_S), **base)
    try:
        first.ping()
        version = first.api._version
    finally:
        first.close()
    return docker.DockerClient(version=version, timeout=timeout, **base)


def explain(error: BaseException, address: Address, timeout: float) -> str:
    """What went wrong with an address that had so many seconds to answer, in a line."""
    chain = list(_chain(error))
    path = address.url.removeprefix("unix://") if address.url.startswith("unix://") else None
    for cause in chain:
        if isinstance(cause, FileNotFoundError):
            return "there is no such socket: no engine runs here, or it listens elsewhere" if path else str(cause)
        if isinstance(cause, PermissionError):
            return f"permission denied: this user may not use the socket{_owner(path)}"
        if isinstance(cause, ConnectionRefusedError):
            return "connection refused: nothing listens there, the engine has ended" + (
                "" if path else ", or it listens on another port"
            )
        if isinstance(cause, ssl.SSLError):
            return f"TLS failed ({cause.reason or cause}): the engine's certificate does not fit DOCKER_CERT_PATH"
        if isinstance(cause, (TimeoutError, requests.exceptions.Timeout)):
            seconds = min(timeout, PING_TIMEOUT_S)
            return f"no answer within {seconds:g} s: the engine hangs, or a firewall drops what is sent"
        if isinstance(cause, APIError):
            said = f"it answered {cause.status_code}: {cause.explanation}"
            return f"{said}. Does it want TLS (DOCKER_TLS_VERIFY=1)?" if "HTTPS" in said else said
    text = " ".join(str(chain[-1]).split())
    return f"{type(chain[-1]).__name__}: {text[:300]}"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what led to it, the innermost last; urllib3 keeps the innermost in ``args`` and ``reason``."""
    seen: set[int] = set()
    todo: list[Any] = [error]
    while todo:
        cause = todo.pop(0)
        if not isinstance(cause, BaseException) or id(cause) in seen:
            continue
        seen.add(id(cause))
        yield cause
        todo += [cause.__cause__, cause.__context__, getattr(cause, "reason", None), *cause.args]


def _owner(path: str | None) -> str:
    try:
        return f", which belongs to {Path(path).owner()}:{Path(path).group()}" if path else ""
    except (OSError, KeyError):
        return ""
