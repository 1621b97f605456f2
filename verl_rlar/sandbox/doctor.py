# SPDX-License-Identifier: Apache-2.0
"""Whether boxes work here, and whether their limits bite: what ``rlar doctor`` prints.

For Docker: the engine, what it can enforce, the image (which is built or pulled where it is missing), one box that is
asked about every limit from inside, and one program, run as in training. For SandboxFusion: one program on the server.

Guarantees: checks are made one after the other, and each is given as it is made; one that fails names what to do; where
the next ones cannot be made without it, they are left out. Nothing is left behind but the image.

Not covered: how many boxes the machine has room for under a training's load; isolation of a SandboxFusion server.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import requests
from docker.errors import APIError, DockerException

from verl_rlar.config import SandboxConfig
from verl_rlar.errors import ConfigError, RlarError, ToolUnavailable
from verl_rlar.sandbox import Job, open_sandbox
from verl_rlar.sandbox.docker import MAX_DEFAULT_BOXES, box_counts
from verl_rlar.sandbox.engine import connect
from verl_rlar.sandbox.hardening import MIB, container_options, verify_options
from verl_rlar.sandbox.image import ensure_image

GIB = 1 << 30
LEAST_FREE_BYTES = 2 * GIB
BOX_TIMEOUT_S = 60.0
UID = 64321
LABELS = {"verl_rlar.doctor": ""}
MOST_FORKS = 512


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at."""

    name: str
    ok: bool | None
    """None: a warning, boxes work all the same."""
    detail: str
    """What was found."""
    advice: str = ""
    """What to do about it, if it is not ok."""


def diagnose(config: SandboxConfig, *, progress: Callable[[str], None] | None = None) -> Iterator[Check]:
    """Makes all checks that fit the back-end.

    Args:
        config: The settings that a training would have.
        progress: Takes lines of text while the image is built or pulled.

    Raises:
        ConfigError: A setting that the back-end needs is wrong.
    """
    if config.backend == "none":
        yield Check(
            name="backend",
            ok=None,
            detail="none: rows whose tools need code to run will stay unscored",
            advice="right for data without such rows (`rlar plan` shows them); else rlar.sandbox.backend=docker",
        )
        return
    if config.backend == "sandbox_fusion":
        yield _job(config)
        return
    try:
        client = connect(config)
    except ToolUnavailable as error:
        tried, _, advice = str(error).partition("Ways out:\n")
        yield Check(name="engine", ok=False, detail=tried.strip(), advice=advice.rstrip())
        return
    try:
        yield from _docker(client, config, progress)
    except (DockerException, requests.exceptions.RequestException) as error:
        yield Check(name="engine", ok=False, detail=f"it failed: {error}", advice="look into the engine's own log")
    finally:
        client.close()


def _docker(client: Any, config: SandboxConfig, progress: Callable[[str], None] | None) -> Iterator[Check]:
    info = client.info()
    yield Check(
        name="engine",
        ok=True,
        detail=f"Docker {info['ServerVersion']}, API {client.api._version}, on {info.get('Name', '?')}:"
        f" {info['OperatingSystem']}, kernel {info['KernelVersion']}, {info['Architecture']}, {info['NCPU']} CPUs,"
        f" {info['MemTotal'] / GIB:.1f} GiB",
    )
    usable = True
    for check in engine_checks(info, config):
        usable = usable and check.ok is not False
        yield check
    yield _disk(info)
    yield _open_files(config)
    if not usable:
        return
    began = time.monotonic()
    try:
        image = ensure_image(client, config, progress=progress)
    except ToolUnavailable as error:
        yield Check(name="image", ok=False, detail=str(error), advice="mend this, then run `rlar doctor` again")
        return
    tags = client.images.get(image).tags
    yield Check(name="image", ok=True, detail=f"{tags[0] if tags else image}, after {time.monotonic() - began:.1f} s")
    sound = True
    for check in _box(client, config, image):
        sound = sound and check.ok is not False
        yield check
    if sound:
        yield _job(config)


def engine_checks(info: Mapping[str, Any], config: SandboxConfig) -> Iterator[Check]:
    """What an engine can enforce, from what it says of itself (``docker info``)."""
    driver = info.get("Driver", "?")
    yield Check(
        name="storage driver",
        ok=None if driver == "vfs" else True,
        detail=driver,
        advice="vfs copies the whole image for every box: use overlay2" if driver == "vfs" else "",
    )
    rootless = any("name=rootless" in option for option in info.get("SecurityOptions") or ())
    version = info.get("CgroupVersion", "1")
    missing = [
        name
        for name, key in (("memory", "MemoryLimit"), ("pids", "PidsLimit"), ("cpu", "CpuCfsQuota"))
        if not info.get(key)
    ]
    yield Check(
        name="cgroups",
        ok=not missing,
        detail=f"version {version}, driver {info.get('CgroupDriver', '?')}"
        + (f"; no control of: {', '.join(missing)}" if missing else "; memory, pids and cpu are controlled"),
        advice=""
        if not missing
        else "rootless: cgroup v2 with systemd, and its controllers delegated to the user"
        " (`Delegate=cpu cpuset io memory pids` for user@.service)"
        if rootless
        else "boot the kernel with these controllers (`cgroup_enable=memory`), and mount them",
    )
    if not info.get("SwapLimit") and not missing:
        yield Check(
            name="swap",
            ok=None,
            detail="the engine cannot limit swap: a box may use some, and is then slow",
            advice="boot the kernel with `swapaccount=1`, use cgroup v2, or turn swap off",
        )
    options = [str(option) for option in info.get("SecurityOptions") or ()]
    seccomp = any("name=seccomp" in option for option in options)
    yield Check(
        name="seccomp",
        ok=seccomp,
        detail="supported" if seccomp else "the engine was built without it, or the kernel lacks it",
        advice="" if seccomp else "take an engine with seccomp: nothing else keeps system calls from a box",
    )
    layers = [
        name
        for name, word in (
            ("rootless", "name=rootless"),
            ("user namespaces", "name=userns"),
            ("AppArmor", "name=apparmor"),
        )
        if any(word in option for option in options)
    ]
    yield Check(name="more layers", ok=True, detail=", ".join(layers) or "none (rootless, user namespaces, AppArmor)")
    runtimes = sorted(name for name in info.get("Runtimes") or {} if "." not in name)
    wanted = config.runtime
    there = wanted is None or wanted in (info.get("Runtimes") or {})
    yield Check(
        name="runtime",
        ok=True if there else None if wanted and wanted.startswith("io.containerd.") else False,
        detail=f"{wanted or info.get('DefaultRuntime', '?')} (the engine has: {', '.join(runtimes)})",
        advice="" if there else "install it, name it in the engine's daemon.json, or unset rlar.sandbox.runtime",
    )
    count = sum(box_counts(config)) + config.spare_boxes
    needed, total = count * config.memory_mb * MIB, info.get("MemTotal") or 0
    yield Check(
        name="memory",
        ok=True if needed <= total else None,
        detail=f"{count} boxes of {config.memory_mb} MiB are {needed / GIB:.1f} of {total / GIB:.1f} GiB at the most",
        advice="" if needed <= total else "fewer boxes (rlar.sandbox.program_boxes, verifier_boxes) or smaller ones",
    )
    for warning in info.get("Warnings") or ():
        yield Check(
            name="engine's warning", ok=None, detail=warning.removeprefix("WARNING: "), advice="see `docker info`"
        )


def _disk(info: Mapping[str, Any]) -> Check:
    folder = info.get("DockerRootDir") or ""
    if not os.path.isdir(folder):
        return Check(name="disk", ok=True, detail=f"{folder} is not on this machine, or not visible")
    free = shutil.disk_usage(folder).free
    enough = free >= LEAST_FREE_BYTES
    return Check(
        name="disk",
        ok=True if enough else None,
        detail=f"{free / GIB:.1f} GiB are free in {folder}",
        advice="" if enough else f"the image needs about 0.5 GiB, and building it {LEAST_FREE_BYTES / GIB:.0f} GiB",
    )


def _open_files(config: SandboxConfig) -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    programs, verifiers = config.program_boxes or MAX_DEFAULT_BOXES + 1, config.verifier_boxes or MAX_DEFAULT_BOXES
    needed = 256 + 4 * (programs + verifiers + config.spare_boxes)
    enough = soft == resource.RLIM_INFINITY or soft >= needed
    return Check(
        name="open files",
        ok=True if enough else None,
        detail=f"this process may have {soft} (at most {hard}); boxes need about {needed}",
        advice="" if enough else f"ulimit -n {needed}",
    )


# --- A box, asked from inside -----------------------------------------------------------------------------------------

PROBE = """
import errno, json, os, signal, socket

def attempt(function, *arguments):
    try:
        function(*arguments)
        return "allowed"
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error.errno))

def first(*paths):
    for path in paths:
        try:
            return open(path).read().strip()
        except OSError:
            pass

status = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines() if ":" in line)
tmp = os.statvfs("/tmp")
said = {
    "user": os.getuid(),
    "capabilities": int(status["CapEff"], 16) | int(status["CapBnd"], 16),
    "no new privileges": int(status.get("NoNewPrivs", -1)),
    "system calls": int(status.get("Seccomp", -1)),
    "networks": sorted(line.split(":")[0].strip() for line in open("/proc/net/dev").read().splitlines()[2:]),
    "internet socket": attempt(socket.socket, socket.AF_INET),
    "packet socket": attempt(socket.socket, socket.AF_PACKET, socket.SOCK_RAW),
    "root file system": attempt(os.mkdir, "/opt/x"),
    "temporary files": tmp.f_blocks * tmp.f_frsize,
    "memory": first("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"),
    "becoming root": attempt(os.setuid, 0),
}
children = []
try:
    while len(children) < MOST_FORKS:
        child = os.fork()
        if not child:
            signal.pause()
            os._exit(0)
        children.append(child)
except OSError:
    pass
said["processes"] = 1 + len(children)
for child in children:
    os.kill(child, signal.SIGKILL)
print(json.dumps(said))
"""


def _box(client: Any, config: SandboxConfig, image: str) -> Iterator[Check]:
    code = PROBE.replace("MOST_FORKS", str(min(MOST_FORKS, config.pids + 8)))
    began = time.monotonic()
    options = container_options(config, image=image, uid=UID, labels=LABELS)
    try:
        container = client.containers.create(entrypoint=["python3", "-I", "-c"], command=[code], **options)
    except APIError as error:
        yield Check(
            name="box",
            ok=False,
            detail=f"the engine refused to make one: {error.explanation}",
            advice="take Docker Engine 20.10 or newer; look at rlar.sandbox.runtime",
        )
        return
    try:
        dropped = verify_options(container.attrs, config)
        yield Check(
            name="box's options",
            ok=not dropped,
            detail="; ".join(dropped) or "the engine took all of them",
            advice="this engine drops options without an error: take Docker Engine (podman is none)" if dropped else "",
        )
        if dropped:
            return
        output = _output(container)
        said = json.loads(output.decode(errors="replace").splitlines()[-1])
    except (APIError, ValueError, IndexError) as error:
        detail = (
            error.explanation if isinstance(error, APIError) else output.decode(errors="replace")[-400:] or "silence"
        )
        yield Check(name="box", ok=False, detail=f"it does not run: {detail}", advice="see the engine's log")
        return
    finally:
        _remove(container)
    yield Check(name="box", ok=True, detail=f"made, asked and ended in {time.monotonic() - began:.2f} s")
    yield from limit_checks(said, config)


def _output(container: Any) -> bytes:
    """Runs a created container to its end."""
    stream = container.attach(stream=True)
    watchdog = threading.Timer(BOX_TIMEOUT_S, container.kill)
    watchdog.start()
    try:
        container.start()
        return b"".join(stream)
    finally:
        watchdog.cancel()


def _remove(container: Any) -> None:
    try:
        container.remove(force=True)
    except APIError as error:
        if error.status_code not in (404, 409):  # gone, or on its way
            raise


def limit_checks(said: Mapping[str, Any], config: SandboxConfig) -> Iterator[Check]:
    """Judges what a box said about its limits."""
    memory = said["memory"]
    size = config.tmp_mb * MIB
    verdicts = {
        "user": (said["user"] not in (0, None), f"uid {said['user']}"),
        "capabilities": (said["capabilities"] == 0, f"{said['capabilities']:#x}"),
        "becoming root": (said["becoming root"] == "EPERM", said["becoming root"]),
        "no new privileges": (said["no new privileges"] == 1, str(said["no new privileges"])),
        "system calls": (said["system calls"] == 2, f"seccomp mode {said['system calls']}"),
        "networks": (said["networks"] == ["lo"], " ".join(said["networks"])),
        "internet socket": (said["internet socket"] == "EPERM", said["internet socket"]),
        "packet socket": (said["packet socket"] == "EPERM", said["packet socket"]),
        "root file system": (said["root file system"] == "EROFS", said["root file system"]),
        "temporary files": (said["temporary files"] <= size, f"{said['temporary files'] / MIB:g} MiB"),
        "processes": (said["processes"] <= config.pids, f"{said['processes']} at once"),
        "memory": (
            memory == str(config.memory_mb * MIB) if memory else None,
            f"{int(memory) / MIB:g} MiB" if memory and memory.isdecimal() else str(memory),
        ),
    }
    for name, (ok, found) in verdicts.items():
        advice = ""
        if ok is not True:
            advice = "this limit does not hold from inside: do not run code here; name another engine or runtime"
            if config.runtime is not None:
                advice += (
                    f" (a runtime with a kernel of its own, as {config.runtime} may be, answers some of this itself)"
                )
        yield Check(name=f"box: {name}", ok=ok, detail=found, advice=advice)


# --- A program, as in training ----------------------------------------------------------------------------------------


def _job(config: SandboxConfig) -> Check:
    try:
        begun, seconds, said = asyncio.run(_run_program(config))
    except ConfigError:
        raise
    except (RlarError, OSError, asyncio.TimeoutError) as error:
        return Check(name="program", ok=False, detail=f"{type(error).__name__}: {error}", advice="see the message")
    return Check(
        name="program",
        ok=said == "42\n",
        detail=f"answered {said!r} in {1000 * seconds:.1f} ms, {begun:.1f} s after the start"
        + (f" ({config.fusion_url})" if config.backend == "sandbox_fusion" else ""),
        advice="" if said == "42\n" else "the answer is not '42\\n': try another image",
    )


async def _run_program(config: SandboxConfig) -> tuple[float, float, str]:
    one = config.model_copy(update={"program_boxes": 1, "verifier_boxes": 1, "spare_boxes": 0})
    began = time.monotonic()
    async with open_sandbox(one) as sandbox:
        begun = time.monotonic() - began
        job = Job(mode="program", source="print(6 * int(input()))", stdin="7\n", seconds=10)
        ran = await asyncio.wait_for(sandbox.run(job), BOX_TIMEOUT_S)
        return begun, ran.seconds, ran.stdout
