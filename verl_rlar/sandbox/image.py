# SPDX-License-Identifier: Apache-2.0
"""The image of the boxes: found by what it is made of, or built from the package's Dockerfile.

The recipe is the Dockerfile, the files of ``inside/``, the pinned libraries and the name of the base image; its hash is
the image's tag and label, so that another version of this package or of a library makes another image, and the same
recipe is built once per engine. The libraries come as wheels through pip's (or uv's) own configuration of indexes, on
the machine that runs this; the build itself has no network, and an engine on another machine needs none but for the
base image.

Guarantees: an image that is there is found in milliseconds, without the base; of several processes on a node one builds
and the others wait; what cannot be had is `ToolUnavailable`, with what to do. All files in it belong to root.

Not covered: removing images of earlier recipes (``docker image prune --all --filter label=verl_rlar.recipe``).
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import requests
from docker.errors import APIError, ContainerError, DockerException, ImageNotFound
from docker.types import LogConfig

from verl_rlar.config import SandboxConfig
from verl_rlar.errors import ToolUnavailable

REPOSITORY = "verl-rlar-box"
LABEL = "verl_rlar.recipe"
HERE = Path(__file__).parent
OLDEST_PYTHON = (3, 11)
OLDEST_GLIBC, NEWEST_TAG = (2, 17), (2, 28)
"""Wheels for glibc of these versions are taken (``manylinux_2_17`` to ``manylinux_2_28``); Debian 12 has 2.36."""
WHEELS_TIMEOUT_S = 600.0
BUILD_TIMEOUT_S = 900.0
LOCK_TIMEOUT_S = 1800.0

ESCAPES = re.compile(r"\x1b\[[0-9;]*m")

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Base:
    """What a base image is."""

    python: str
    """Version of its ``python3``, e.g. ``3.11``."""
    machine: str
    """``x86_64`` or ``aarch64``."""


def ensure_image(client: Any, config: SandboxConfig, *, progress: Progress | None = None) -> str:
    """The image of the boxes, which is pulled or built where it is missing.

    Args:
        client: `docker.DockerClient`.
        config: `image`, or `base` for the build.
        progress: Is told what is being done, a line at a time, where that takes seconds or minutes.

    Returns:
        The image's ID, ``sha256:...``.

    Raises:
        ToolUnavailable: It is not there and cannot be pulled or built.
    """
    say = progress or (lambda line: None)
    try:
        return _pulled(client, config.image, say) if config.image is not None else _built(client, config, say)
    except (DockerException, requests.exceptions.RequestException) as error:
        raise ToolUnavailable(f"the image of the boxes: the Docker engine failed: {_short(error)}") from error


def recipe_of(config: SandboxConfig) -> str:
    """SHA-256 of all that the image is made of, in hex."""
    sha = hashlib.sha256()
    for name, data in [*sorted(_files().items()), ("base", config.base.encode())]:
        sha.update(f"{name}\0{len(data)}\0".encode())
        sha.update(data)
    return sha.hexdigest()


def _files() -> dict[str, bytes]:
    """Files of the build's context by their paths in it, but for the libraries."""
    inside = [path for path in HERE.joinpath("inside").glob("*.py") if path.name != "__init__.py"]
    files = {f"inside/{path.name}": path.read_bytes() for path in [*inside, HERE / "values.py", HERE / "reading.py"]}
    return files | {name: HERE.joinpath(name).read_bytes() for name in ("Dockerfile", "requirements.txt")}


def _find(client: Any, name: str) -> Any:
    try:
        return client.images.get(name)
    except ImageNotFound:
        return None


def _pulled(client: Any, name: str, say: Progress) -> str:
    if image := _find(client, name):
        return str(image.id)
    _pull(client, name, "rlar.sandbox.image", say)
    if image := _find(client, name):
        return str(image.id)
    raise ToolUnavailable(f"{name} (rlar.sandbox.image) was pulled, and the engine does not have it")


def _pull(client: Any, name: str, key: str, say: Progress) -> None:
    say(f"pulling {name}")
    fault: object = None
    try:
        last = ""
        pull = client.api.pull(
            name, tag=None if ":" in name.rpartition("/")[2] or "@" in name else "latest", stream=True, decode=True
        )
        for event in pull:
            fault = event.get("error") or fault
            status = event.get("status", "")
            if status != last and not event.get("progressDetail"):
                say(f"pulling {name}: {status}")
            last = status
    except (APIError, requests.exceptions.RequestException) as error:
        fault = error
    if fault is not None:
        raise ToolUnavailable(
            f"the image {name} ({key}) is not on the Docker engine and cannot be pulled: {_short(fault)}. Where the"
            f" engine reaches a registry: `docker pull {name}` shows what is wrong. Else bring it: `docker save {name}"
            f" | gzip > box.tar.gz` elsewhere, and `docker load < box.tar.gz` here; or name an image that the engine"
            " has: rlar.sandbox.base (to build on: Debian 12 or newer with Python 3.11 or newer) or"
            " rlar.sandbox.image (a box's whole image)"
        )


def _built(client: Any, config: SandboxConfig, say: Progress) -> str:
    recipe = recipe_of(config)
    tag = f"{REPOSITORY}:{recipe[:12]}"

    def there() -> str | None:
        image = _find(client, tag)
        return str(image.id) if image and image.labels.get(LABEL) == recipe else None

    if found := there():
        return found
    with _lock(f"{tag}@{client.api.base_url}", say):
        if found := there():  # built while we waited
            return found
        if not _find(client, config.base):
            _pull(client, config.base, "rlar.sandbox.base", say)
        base = _look_into(client, config.base)
        say(f"building {tag} on {config.base} (Python {base.python}, {base.machine}); once per engine, a minute or two")
        with tempfile.TemporaryDirectory(prefix="rlar-box-") as folder:
            _fetch_libraries(Path(folder), base, say)
            with tempfile.TemporaryFile() as context:
                _write_context(Path(folder), context)
                _build(client, context, tag, recipe, config.base, say)
    found = there()
    if found is None:
        raise ToolUnavailable(f"{tag} was built, and the engine does not have it with its label {LABEL}")
    return found


def _look_into(client: Any, base: str) -> Base:
    """Asks the base image's Python what it is."""
    code = "import json, platform as p, sys; print(json.dumps([sys.version_info[:2], p.machine(), p.libc_ver()]))"
    try:
        said = client.containers.run(
            base,
            ["-I", "-c", code],
            entrypoint=["python3"],
            network_mode="none",
            cap_drop=["ALL"],
            security_opt=["no-new-privileges:true"],
            read_only=True,
            mem_limit=256 << 20,
            pids_limit=16,
            user="65534:65534",
            log_config=LogConfig(type="json-file", config={"max-size": "1m"}),
            remove=True,
        )
        version, machine, (libc, libc_version) = json.loads(said)
        glibc = tuple(int(part) for part in libc_version.split(".")[:2])
    except (APIError, ContainerError, ValueError, TypeError) as error:
        raise ToolUnavailable(
            f"{base} (rlar.sandbox.base) cannot be built on: its `python3` does not run: {_short(error)}. Name an image"
            " of Debian 12 or newer with Python 3.11 or newer"
        ) from error
    if tuple(version) < OLDEST_PYTHON or libc != "glibc" or glibc < NEWEST_TAG:
        raise ToolUnavailable(
            f"{base} (rlar.sandbox.base) has Python {version[0]}.{version[1]} and {libc or 'no glibc'} {libc_version};"
            " needed are Python 3.11 and glibc 2.28 or newer, e.g. Debian 12"
        )
    return Base(python=f"{version[0]}.{version[1]}", machine=machine)


def _fetch_libraries(folder: Path, base: Base, say: Progress) -> None:
    """Fills ``lib/`` with wheels that fit the base image; nothing of them runs here."""
    library = folder / "lib"
    library.mkdir()
    wanted = HERE / "requirements.txt"
    say("fetching " + ", ".join(line for line in wanted.read_text().split("\n") if line and line[0] != "#"))
    # uv writes bytecode only where it is asked to, pip unless it is asked not to
    if importlib.util.find_spec("pip") is not None:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-compile"]
        command += ["--progress-bar", "off", "--only-binary=:all:", "--implementation", "cp"]
        minors = range(NEWEST_TAG[1], OLDEST_GLIBC[1] - 1, -1)
        for platform in [*(f"manylinux_2_{minor}" for minor in minors), "manylinux2014"]:
            command += ["--platform", f"{platform}_{base.machine}"]
    elif uv := shutil.which("uv"):
        command = [uv, "pip", "install", "--quiet", "--only-binary=:all:"]
        command += ["--python-platform", f"{base.machine}-manylinux_2_28"]
    else:
        raise ToolUnavailable(
            f"the image of the boxes cannot be built: {sys.executable} has no pip, and there is no uv on PATH. Install"
            f" one (`{sys.executable} -m ensurepip`), or name an image that is built already: rlar.sandbox.image"
        )
    command += ["--python-version", base.python, "--no-deps", "--target", str(library), "--requirement", str(wanted)]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=WHEELS_TIMEOUT_S,
        )
        fault = done.stderr.strip()[-800:] if done.returncode else ""
    except subprocess.TimeoutExpired:
        fault = f"it was still at work after {WHEELS_TIMEOUT_S:g} s"
    if fault:
        raise ToolUnavailable(
            "the libraries of the boxes cannot be fetched from a package index (for Python"
            f" {base.python} on {base.machine}): {fault}\nName an image that is built already: rlar.sandbox.image"
        )


def _write_context(folder: Path, out: IO[bytes]) -> None:
    """The build's context as a tar file: world-readable, root's, without times."""
    with tarfile.open(fileobj=out, mode="w") as tar:

        def add(name: str, data: bytes) -> None:
            entry = tarfile.TarInfo(name)
            entry.mode, entry.size = 0o644, len(data)
            tar.addfile(entry, io.BytesIO(data))

        for name, data in sorted(_files().items()):
            add(name, data)
        for path in sorted(folder.joinpath("lib").rglob("*")):
            parts = path.relative_to(folder).parts
            if path.is_file() and parts[1] != "bin" and "__pycache__" not in parts and not _is_test(parts):
                add("/".join(parts), path.read_bytes())
    out.seek(0)


def _is_test(parts: tuple[str, ...]) -> bool:
    return parts[1] == "sympy" and "tests" in parts  # a third of it


def _build(client: Any, context: IO[bytes], tag: str, recipe: str, base: str, say: Progress) -> None:
    events = client.api.build(
        fileobj=context,
        custom_context=True,
        decode=True,
        tag=tag,
        buildargs={"BASE": base},
        labels={LABEL: recipe},
        network_mode="none",
        rm=True,
        forcerm=True,
        timeout=BUILD_TIMEOUT_S,
    )
    lines = []
    for event in events:
        if line := ESCAPES.sub("", str(event.get("stream") or "")).strip():
            lines.append(line)
            if line.startswith("Step "):
                say(line if len(line) < 80 else f"{line[:77]}...")
        if error := event.get("error"):
            log = "\n".join(lines[-12:])
            raise ToolUnavailable(f"building {tag} on {base} (rlar.sandbox.base) failed: {error.strip()}\n{log}")


@contextmanager
def _lock(name: str, say: Progress) -> Iterator[None]:
    """Held by one process of this user on this node; the others wait."""
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"verl-rlar-{os.getuid()}-{digest}.lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        told = False
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ToolUnavailable(
                        f"another process has been building the image of the boxes for {LOCK_TIMEOUT_S:g} s ({path})"
                    ) from None
                if not told:
                    told = True
                    say("another process on this node builds the image of the boxes; waiting for it")
                time.sleep(0.1)
        yield
    finally:
        os.close(descriptor)  # which unlocks it; the file stays, so that all lock the same one


def _short(error: object) -> str:
    text = error.explanation if isinstance(error, APIError) and error.explanation else str(error)
    if isinstance(error, ContainerError) and isinstance(error.stderr, bytes):
        text = error.stderr.decode(errors="replace")
    return " ".join(str(text).split())[-500:]
