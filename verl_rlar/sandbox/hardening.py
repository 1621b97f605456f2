# SPDX-License-Identifier: Apache-2.0
"""What a box may do: every option of its container, and the check that the engine took each of them.

Code in a box is code that nobody has read. It runs without a network, without capabilities, as a user that is not root
and cannot become it, on a root file system that cannot be written, under limits of memory, processes, CPU, files and
disk, and under a list of the system calls that are allowed (``seccomp.json``; what is not on it is refused).

Guarantees: `verify_options` names every option that an engine dropped, as some engines do without an error; a box that
lacks one is not used. Nothing here depends on the engine's own defaults.

Not covered: faults of the kernel itself. For these, name a runtime with a kernel of its own (``rlar.sandbox.runtime``:
gVisor's ``runsc``, Kata).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from docker.types import LogConfig, Ulimit

from verl_rlar.config import SandboxConfig

MIB = 1 << 20
HOSTNAME = "box"
SHM_BYTES = 1 * MIB
"""Size of a box's ``/dev/shm``: enough for the semaphores of `multiprocessing`."""
NOFILE = 1024
"""Open files of a process in a box. Below the usual hard limit of an engine, which cannot be exceeded."""
OOM_SCORE_ADJ = 500
"""Where the whole machine runs out of memory, a box goes before the training does. In -1000 to 1000."""
SECURITY = ("no-new-privileges:true",)
SECCOMP = Path(__file__).with_name("seccomp.json")


@cache
def seccomp_profile() -> str:
    """The allowed system calls, as the engine wants them: JSON text in one line, without the comments."""
    profile = json.loads(SECCOMP.read_text())
    for rule in profile["syscalls"]:
        del rule["comment"]
    return json.dumps(profile, separators=(",", ":"))


def container_options(config: SandboxConfig, *, image: str, uid: int, labels: Mapping[str, str]) -> dict[str, Any]:
    """Keyword arguments of docker's ``client.containers.create`` for a box.

    The box's standard input is open, and ends when the one connection that is attached to it ends (StdinOnce, which
    docker's package sets because `detach` is false): a box whose owner has died thus sees the end of its input. Then,
    or when it is killed, the engine removes it. There is no log: the driver ``none`` holds nothing on the host, while
    any other keeps what a box prints, and an attached connection gets the output all the same.

    Args:
        config: Limits and runtime.
        image: ID or name of the image.
        uid: User and group of all processes in the box. Not 0.
        labels: Marks that the box's owner finds it by.
    """
    if uid <= 0:
        raise ValueError(f"a box must not run as root, got uid {uid}")
    memory = config.memory_mb * MIB
    options: dict[str, Any] = {
        "image": image,
        "labels": dict(labels),
        # how its owner talks to it
        "stdin_open": True,
        "detach": False,
        "tty": False,
        "auto_remove": True,
        "init": False,
        "log_config": LogConfig(type="none"),
        # who it is
        "user": f"{uid}:{uid}",
        "hostname": HOSTNAME,
        "working_dir": "/tmp",
        "environment": {},
        "use_config_proxy": False,  # else the proxies of the user's ~/.docker/config.json would be its environment
        "healthcheck": {"test": ["NONE"]},
        # what it may do
        "cap_drop": ["ALL"],
        "security_opt": [*SECURITY, f"seccomp={seccomp_profile()}"],
        "privileged": False,
        "network_mode": "none",
        "ipc_mode": "none",
        # what it may write
        "read_only": True,
        "tmpfs": _tmpfs(config, uid),
        # how much
        "pids_limit": config.pids,
        "mem_limit": memory,
        "memswap_limit": memory,
        "oom_kill_disable": False,
        "oom_score_adj": OOM_SCORE_ADJ,
        "nano_cpus": _nano_cpus(config),
        "ulimits": [Ulimit(name=name, soft=limit, hard=limit) for name, limit in _ulimits(config).items()],
    }
    if config.runtime is not None:
        options["runtime"] = config.runtime
    return options


def _nano_cpus(config: SandboxConfig) -> int:
    return max(10_000_000, round(config.cpus * 1e9))  # an engine refuses less than 0.01 core


def _tmpfs(config: SandboxConfig, uid: int) -> dict[str, str]:
    common = f"rw,noexec,nosuid,nodev,mode=0700,uid={uid},gid={uid}"
    return {
        "/tmp": f"{common},size={config.tmp_mb * MIB},nr_inodes={max(1024, 64 * config.tmp_mb)}",
        "/dev/shm": f"{common},size={SHM_BYTES},nr_inodes=256",
    }


def _ulimits(config: SandboxConfig) -> dict[str, int]:
    # msgqueue: /dev/mqueue is a folder that anyone may write, and stays when a job has ended
    return {"core": 0, "fsize": config.tmp_mb * MIB, "msgqueue": 0, "nofile": NOFILE}


def verify_options(inspected: Mapping[str, Any], config: SandboxConfig) -> list[str]:
    """Every option of `container_options` that the engine did not take, in words; none: the box may be used.

    Args:
        inspected: What the engine says of the created container (``container.attrs``).
        config: The settings that its options were made of.
    """
    return list(_missing(inspected, config))


def _missing(inspected: Mapping[str, Any], config: SandboxConfig) -> Iterator[str]:
    own, host = inspected.get("Config") or {}, inspected.get("HostConfig") or {}
    memory = config.memory_mb * MIB

    def differs(values: Mapping[str, Any], key: str, wanted: Any) -> Iterator[str]:
        found = values.get(key)
        if found != wanted:
            yield f"{key} is {found!r} instead of {wanted!r}"

    wanted_own = {"OpenStdin": True, "StdinOnce": True, "Tty": False, "Hostname": HOSTNAME, "WorkingDir": "/tmp"}
    for key, value in wanted_own.items():
        yield from differs(own, key, value)
    wanted_host = {
        "AutoRemove": True,
        "NetworkMode": "none",
        "IpcMode": "none",
        "ReadonlyRootfs": True,
        "Privileged": False,
        "PublishAllPorts": False,
        "PidsLimit": config.pids,
        "Memory": memory,
        "MemorySwap": memory,
        "NanoCpus": _nano_cpus(config),
        "OomScoreAdj": OOM_SCORE_ADJ,
    }
    for key, value in wanted_host.items():
        yield from differs(host, key, value)
    if host.get("OomKillDisable"):
        yield "OomKillDisable is on: a box out of memory would stand still instead of being killed"
    if config.runtime is not None:
        yield from differs(host, "Runtime", config.runtime)
    log = (host.get("LogConfig") or {}).get("Type")
    if log != "none":
        yield f"LogConfig is {log!r} instead of 'none'"
    yield from _missing_user(own, host, config)
    if [name.removeprefix("CAP_") for name in host.get("CapDrop") or ()] != ["ALL"]:
        yield f"CapDrop is {host.get('CapDrop')!r} instead of ['ALL']"
    for key in ("CapAdd", "Binds", "Mounts", "VolumesFrom", "Devices", "DeviceRequests", "DeviceCgroupRules", "Links"):
        if host.get(key):
            yield f"{key} is {host[key]!r} instead of nothing"
    for key in ("PidMode", "UTSMode"):
        if host.get(key) == "host":
            yield f"{key} is the host's"
    if inspected.get("Mounts"):
        yield f"the image brings volumes, which are disk of the host: {inspected['Mounts']!r}"
    yield from _missing_security(host)
    limits = {limit["Name"].lower(): (limit["Soft"], limit["Hard"]) for limit in host.get("Ulimits") or ()}
    for name, limit in _ulimits(config).items():
        if limits.get(name) != (limit, limit):
            yield f"ulimit {name} is {limits.get(name)!r} instead of {limit}"


def _missing_user(own: Mapping[str, Any], host: Mapping[str, Any], config: SandboxConfig) -> Iterator[str]:
    uid, colon, gid = str(own.get("User") or "").partition(":")
    if not (uid.isdecimal() and int(uid) > 0 and colon and gid == uid):
        yield f"User is {own.get('User')!r} instead of a number that is not 0, twice"
        return
    found = host.get("Tmpfs") or {}
    for path, wanted in _tmpfs(config, int(uid)).items():
        if set(str(found.get(path)).split(",")) != set(wanted.split(",")):
            yield f"Tmpfs {path} is {found.get(path)!r} instead of {wanted!r}"
    for path in sorted(set(found) - {"/tmp", "/dev/shm"}):
        yield f"Tmpfs {path} was not asked for"


def _missing_security(host: Mapping[str, Any]) -> Iterator[str]:
    found = [str(option) for option in host.get("SecurityOpt") or ()]
    if not any(option in ("no-new-privileges", "no-new-privileges:true", "no-new-privileges=true") for option in found):
        yield "no-new-privileges is off"
    seccomp = next((option.partition("=")[2] for option in found if option.startswith("seccomp=")), "")
    try:
        same = json.loads(seccomp) == json.loads(seccomp_profile())
    except ValueError:
        same = False
    if not same:
        yield f"the seccomp profile is {seccomp[:60]!r} instead of our own"
    if any("unconfined" in option or option == "label=disable" for option in found):
        yield f"SecurityOpt {found!r} turns a protection off"
    for key in ("MaskedPaths", "ReadonlyPaths"):
        if key in host and not host[key]:
            yield f"{key} is empty: parts of /proc and /sys that concern the host are open"
