# SPDX-License-Identifier: Apache-2.0
"""What a box may do, tried from inside on a real engine: every limit bites, and what programs need works.

The functions that begin with ``probe_`` run in a box, in a container with all options of `container_options`, and what
they return comes back as JSON. None of them connects to anything.
"""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from conftest import make_sandbox_config

from verl_rlar.config import SandboxConfig
from verl_rlar.sandbox.hardening import HOSTNAME, NOFILE, container_options, seccomp_profile, verify_options

UID = 61234
MIB = 1 << 20
EPERM, ENOSYS = 1, 38
LABELS = {"verl_rlar.test": "hardening"}


@dataclass(frozen=True, kw_only=True)
class Ended:
    said: Any
    """What the probe returned; None: it did not get that far."""
    output: str
    exit_code: int
    oom_killed: bool


Box = Callable[..., Ended]


def source_of(probe: Callable[[], Any]) -> str:
    return f"from __future__ import annotations\n{inspect.getsource(probe)}"


@pytest.fixture(scope="module")
def box(engine: Any, box_image: str) -> Box:
    """Runs a probe in a container of its own."""

    def run(
        probe: Callable[[], Any], *, seconds: float = 60, change: dict[str, Any] | None = None, **settings: Any
    ) -> Ended:
        code = f"{source_of(probe)}\nimport json\nprint('\\n' + json.dumps({probe.__name__}()))"
        config = make_sandbox_config(**settings)
        options = container_options(config, image=box_image, uid=UID, labels=LABELS) | {"auto_remove": False}
        options |= change or {}
        container = engine.containers.create(entrypoint=["python3", "-I", "-c"], command=[code], **options)
        try:
            stream = container.attach(stream=True)
            watchdog = threading.Timer(seconds, container.kill)
            container.start()
            watchdog.start()
            output = b"".join(stream).decode(errors="replace")
            watchdog.cancel()
            code = container.wait(timeout=30)["StatusCode"]
            container.reload()
            oom_killed = container.attrs["State"]["OOMKilled"]
        finally:
            container.remove(force=True)
        said = json.loads(output.splitlines()[-1]) if code == 0 else None
        return Ended(said=said, output=output, exit_code=code, oom_killed=oom_killed)

    return run


# --- The engine took every option -------------------------------------------------------------------------------------

SETTINGS = {"memory_mb": 128, "cpus": 0.5, "pids": 32, "tmp_mb": 16}
BREACHES: dict[str, dict[str, Any]] = {
    "OpenStdin": {"stdin_open": False},
    "StdinOnce": {"detach": True},
    "Tty": {"tty": True},
    "Hostname": {"hostname": "else"},
    "WorkingDir": {"working_dir": "/"},
    "AutoRemove": {"auto_remove": False},
    "NetworkMode": {"network_mode": "host"},
    "IpcMode": {"ipc_mode": "private"},
    "ReadonlyRootfs": {"read_only": False},
    "Privileged": {"privileged": True},
    "PublishAllPorts": {"publish_all_ports": True},
    "PidsLimit": {"pids_limit": None},
    "Memory is": {"mem_limit": "256m", "memswap_limit": "256m"},
    "MemorySwap": {"memswap_limit": "-1"},
    "NanoCpus": {"nano_cpus": None},
    "OomScoreAdj": {"oom_score_adj": None},
    "LogConfig": {"log_config": None},
    "User": {"user": "root"},
    "User is": {"user": "0:0"},
    "Tmpfs /tmp": {"tmpfs": {"/dev/shm": ""}},
    "Tmpfs /run": {"tmpfs": {"/run": ""}},
    "CapDrop": {"cap_drop": None},
    "CapAdd": {"cap_add": ["SYS_PTRACE"]},
    "Binds": {"volumes": {"/tmp": {"bind": "/host", "mode": "ro"}}},
    "Devices": {"devices": ["/dev/null:/dev/other:r"]},
    "PidMode": {"pid_mode": "host"},
    "UTSMode": {"uts_mode": "host", "hostname": None},
    "no-new-privileges": {"security_opt": [f"seccomp={seccomp_profile()}"]},
    "seccomp": {"security_opt": ["no-new-privileges:true"]},
    "unconfined": {"security_opt": ["no-new-privileges:true", "seccomp=unconfined"]},
    "ulimit core": {"ulimits": None},
    "ulimit fsize": {"ulimits": []},
}


@pytest.mark.docker
def test_the_engine_takes_every_option(engine: Any, box_image: str) -> None:
    config = make_sandbox_config(**SETTINGS)
    container = engine.containers.create(**container_options(config, image=box_image, uid=UID, labels=LABELS))
    try:
        container.reload()
        host, own = container.attrs["HostConfig"], container.attrs["Config"]
        assert verify_options(container.attrs, config) == []
        # ... and the check means what it says
        assert host["Memory"] == host["MemorySwap"] == 128 * MIB
        assert (host["PidsLimit"], host["NanoCpus"]) == (32, 500_000_000)
        assert (host["CapDrop"], host["NetworkMode"], host["ReadonlyRootfs"]) == (["ALL"], "none", True)
        assert (own["User"], own["StdinOnce"]) == (f"{UID}:{UID}", True)
        assert not any(word in entry for entry in own["Env"] for word in ("PROXY", "proxy"))
        assert not container.attrs["Mounts"] and not host["Binds"]
        assert container.attrs["LogPath"] == ""
        assert "size=16777216" in host["Tmpfs"]["/tmp"]
    finally:
        container.remove(force=True)


@pytest.mark.docker
@pytest.mark.parametrize("name", BREACHES)
def test_an_option_that_the_engine_dropped_is_named(engine: Any, box_image: str, name: str) -> None:
    config = make_sandbox_config(**SETTINGS)
    options = container_options(config, image=box_image, uid=UID, labels=LABELS) | BREACHES[name]
    container = engine.containers.create(**options)
    try:
        container.reload()
        assert any(name in fault for fault in verify_options(container.attrs, config))
    finally:
        container.remove(force=True)


def test_nothing_at_all_is_no_hardened_box() -> None:
    assert len(verify_options({}, SandboxConfig())) > 15


def test_a_runtime_that_the_engine_dropped_is_named() -> None:
    config = SandboxConfig(runtime="runsc")
    assert "Runtime is 'runc' instead of 'runsc'" in verify_options({"HostConfig": {"Runtime": "runc"}}, config)


def test_a_box_never_runs_as_root() -> None:
    with pytest.raises(ValueError, match="root"):
        container_options(SandboxConfig(), image="image", uid=0, labels={})


# --- Who a box is, what it sees ---------------------------------------------------------------------------------------


def probe_identity() -> Any:
    import errno
    import os

    def attempt(function: Any, *arguments: Any) -> str:
        try:
            function(*arguments)
            return "allowed"
        except OSError as error:
            return errno.errorcode[error.errno or 0]

    status = dict(line.split(":\t", 1) for line in open("/proc/self/status").read().splitlines() if ":\t" in line)
    places = (
        "/",
        "/etc",
        "/opt/rlar",
        "/usr",
        "/var",
        "/dev",
        "/dev/pts",
        "/sys",
        "/proc/sys/kernel",
        "/sys/fs/cgroup",
    )
    return {
        "ids": [*os.getresuid(), *os.getresgid()],
        "groups": os.getgroups(),
        "status": {
            key: status[key].strip() for key in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs")
        },
        "seccomp": status["Seccomp"].strip(),
        "setuid": attempt(os.setuid, 0),
        "setgroups": attempt(os.setgroups, [0]),
        "networks": sorted(os.listdir("/sys/class/net")),
        "hostname": os.uname().nodename,
        "mounts": [line.split()[3:5] + line.split(" - ")[1].split()[:1] for line in open("/proc/self/mountinfo")],
        "writes": {
            place: attempt(os.open, place + "/x", os.O_CREAT | os.O_WRONLY) for place in places if os.path.isdir(place)
        },
        "mqueue": attempt(os.open, "/dev/mqueue/x", os.O_CREAT | os.O_WRONLY),
        "sysrq": attempt(os.open, "/proc/sysrq-trigger", os.O_WRONLY),
        "chown": attempt(os.chown, "/tmp", 0, 0),
        "mkfifo": attempt(os.mkfifo, "/tmp/fifo"),
        "engine": [
            path for path in ("/var/run/docker.sock", "/run/docker.sock", "/run/containerd") if os.path.exists(path)
        ],
        "processes": [name for name in os.listdir("/proc") if name.isdigit()],
        "oom_score_adj": open("/proc/self/oom_score_adj").read().strip(),
        "environment": sorted(os.environ),
    }


@pytest.mark.docker
def test_a_box_is_nobody_and_sees_nothing_of_the_host(box: Box) -> None:
    said = box(probe_identity).said
    assert said["ids"] == [UID] * 6
    assert set(said["groups"]) <= {UID}
    none = "0" * 16
    assert said["status"] == dict.fromkeys(("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"), none) | {
        "NoNewPrivs": "1"
    }
    assert said["seccomp"] == "2"
    assert (said["setuid"], said["setgroups"]) == ("EPERM", "EPERM")
    assert said["networks"] == ["lo"]
    assert said["hostname"] == HOSTNAME
    assert said["engine"] == []
    assert said["processes"] == ["1"]
    disks = {
        place: root
        for root, place, kind in said["mounts"]
        if kind in ("ext4", "xfs", "btrfs", "zfs", "fuse", "9p", "virtiofs")
    }
    assert set(disks) <= {"/etc/resolv.conf", "/etc/hostname", "/etc/hosts"}, "only what the engine itself writes"
    assert set(said["writes"].values()) <= {"EROFS", "EACCES", "ENOENT", "EPERM"}
    assert said["writes"]["/"] == said["writes"]["/etc"] == said["writes"]["/opt/rlar"] == "EROFS"
    assert said["mqueue"] == "EMFILE"
    assert said["sysrq"] in ("EROFS", "EACCES", "ENOENT")
    assert (said["chown"], said["mkfifo"]) == ("EPERM", "EPERM")
    assert said["oom_score_adj"] == "500"
    assert {name for name in said["environment"] if "PROXY" in name.upper()} == set()


# --- System calls -----------------------------------------------------------------------------------------------------


def probe_calls() -> Any:
    """Errors of system calls by name (0: allowed), with harmless arguments; ``ONLY`` names some of them."""
    import ctypes
    import os
    import platform
    import signal

    libc = ctypes.CDLL(None, use_errno=True)
    arm = platform.machine() == "aarch64"
    space = ctypes.create_string_buffer(4096)
    here, text = ctypes.byref(space), ctypes.c_char_p(b"/tmp/x")
    child = os.fork()
    if not child:
        signal.pause()
        os._exit(0)
    calls: dict[str, tuple[Any, ...]] = {  # number on x86_64, on aarch64, arguments
        "ptrace": (101, 117, 16, child, 0, 0),  # PTRACE_ATTACH
        "ptrace_traceme": (101, 117, 0x4206, child, 0, 0),  # PTRACE_SEIZE
        "process_vm_readv": (310, 270, child, here, 1, here, 1, 0),
        "process_vm_writev": (311, 271, child, here, 1, here, 1, 0),
        "process_madvise": (440, 440, -1, 0, 0, 0, 0),
        "pidfd_getfd": (438, 438, -1, 0, 0),
        "kcmp": (312, 272, child, child, 0, 0, 0),
        "prlimit64 of another": (302, 261, child, 7, 0, here),
        "prctl PR_SET_MM": (157, 167, 35, 1, 0, 0, 0),
        "prctl PR_SET_PTRACER": (157, 167, 0x59616D61, -1, 0, 0, 0),
        "memfd_create": (319, 279, text, 0),
        "memfd_secret": (447, 447, 0),
        "io_uring_setup": (425, 425, 1, here),
        "io_uring_enter": (426, 426, -1, 0, 0, 0, 0, 0),
        "io_uring_register": (427, 427, -1, 0, 0, 0),
        "io_setup": (206, 0, 1, here),
        "keyctl": (250, 219, 0, -3, 0),  # KEYCTL_GET_KEYRING_ID
        "add_key": (248, 217, ctypes.c_char_p(b"user"), text, text, 1, -2),
        "request_key": (249, 218, ctypes.c_char_p(b"user"), text, 0, 0),
        "clone with namespaces": (56, 220, 0x10000000 | 17, 0, 0, 0, 0),
        "unshare": (272, 97, 0x10000000),
        "setns": (308, 268, -1, 0),
        "mount": (165, 40, text, text, text, 0, 0),
        "umount2": (166, 39, text, 0),
        "fsopen": (430, 430, ctypes.c_char_p(b"tmpfs"), 0),
        "open_tree": (428, 428, -100, text, 0),
        "move_mount": (429, 429, -1, text, -1, text, 0),
        "pivot_root": (155, 41, text, text),
        "chroot": (161, 51, ctypes.c_char_p(b"/tmp")),
        "bpf": (321, 280, 0, here, 4096),
        "perf_event_open": (298, 241, here, 0, -1, -1, 0),
        "userfaultfd": (323, 282, 1),  # UFFD_USER_MODE_ONLY
        "shmget": (29, 194, 0, 4096, 0o1600),
        "semget": (64, 190, 0, 1, 0o1600),
        "msgget": (68, 186, 0, 0o1600),
        "mq_open": (240, 180, ctypes.c_char_p(b"x"), 0o102, 0o600, 0),
        "personality": (135, 92, 0x0040000),  # ADDR_NO_RANDOMIZE
        "mknodat": (259, 33, -100, text, 0o020600, 0x0103),
        "kexec_load": (246, 104, 0, 0, 0, 0),
        "init_module": (175, 105, here, 0, text),
        "finit_module": (313, 273, -1, text, 0),
        "delete_module": (176, 106, text, 0),
        "quotactl": (179, 60, 0, text, 0, 0),
        "swapon": (167, 224, text, 0),
        "swapoff": (168, 225, text),
        "clock_settime": (227, 112, 0, here),
        "clock_adjtime": (305, 266, 0, here),
        "settimeofday": (164, 170, here, 0),
        "sethostname": (170, 161, text, 1),
        "setdomainname": (171, 162, text, 1),
        "name_to_handle_at": (303, 264, -100, ctypes.c_char_p(b"/tmp"), here, here, 0),
        "open_by_handle_at": (304, 265, -100, here, 0),
        "fanotify_init": (300, 262, 0, 0),
        "inotify_init1": (294, 26, 0),
        "seccomp": (317, 277, 1, 0, 0),
        "syslog": (103, 116, 10, 0, 0),
        "reboot": (169, 142, 0, 0, 0, 0),
        "acct": (163, 89, 0),
        "lookup_dcookie": (212, 18, 0, here, 1),
        "mbind": (237, 235, 0, 0, 0, 0, 0, 0),
        "vmsplice": (278, 75, 0, here, 1, 0),
        "setxattr": (188, 5, ctypes.c_char_p(b"/tmp"), ctypes.c_char_p(b"user.x"), text, 1, 0),
        "socket of 64 bits": (41, 198, 1 << 32 | 2, 1, 0),
        "execveat": (322, 281, -1, text, 0, 0, 0),
        "sched_setscheduler": (144, 119, 0, 3, here),
        "clone3": (435, 435, here, 64),
        "openat2": (437, 437, -100, text, here, 24),
    }
    only = os.environ.get("ONLY", "").split(",")
    found = {}
    for name, (intel, aarch, *arguments) in calls.items():
        if only != [""] and name not in only:
            continue
        ctypes.set_errno(0)
        wide = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
        answer = libc.syscall(ctypes.c_long(aarch if arm else intel), *wide)
        found[name] = ctypes.get_errno() if answer == -1 else 0
        if name == "clone with namespaces" and answer == 0:
            os._exit(0)  # the clone itself
    families: dict[int, int] = {}
    for family in range(46):
        for kind in (1, 2, 3, 5):
            ctypes.set_errno(0)
            descriptor = libc.socket(family, kind, 0)
            families[family] = max(families.get(family, 0), ctypes.get_errno())
            if descriptor >= 0:
                os.close(descriptor)
                families[family] = 0
                break
    pair = (ctypes.c_int * 2)()
    ctypes.set_errno(0)
    tipc = ctypes.get_errno() if libc.socketpair(30, 1, 0, pair) else 0
    os.kill(child, signal.SIGKILL)
    return {"calls": found, "families": families, "socketpair": tipc}


ANSWERS_ENOSYS = {"clone3", "openat2"}
"""The C library takes an older call where it gets this."""
REFUSED_WITHOUT_PRIVILEGES = {
    "prlimit64 of another",
    "memfd_create",
    "keyctl",
    "unshare",
    "clone with namespaces",
    "shmget",
    "semget",
    "msgget",
    "personality",
    "ptrace",
    "process_vm_readv",
    "inotify_init1",
    "name_to_handle_at",
}
"""Calls that any user may make where there is no profile, so that their refusal is the profile's doing."""


@pytest.mark.docker
def test_calls_that_reach_out_of_a_process_are_refused(box: Box) -> None:
    said = box(probe_calls).said
    wrong = {
        name: error for name, error in said["calls"].items() if error != (ENOSYS if name in ANSWERS_ENOSYS else EPERM)
    }
    assert wrong == {}
    assert {family for family, error in said["families"].items() if error != EPERM} == {"1"}, "AF_UNIX alone"
    assert said["socketpair"] == EPERM


@pytest.mark.docker
def test_it_is_the_profile_that_refuses_them(box: Box) -> None:
    only = {"ONLY": ",".join(REFUSED_WITHOUT_PRIVILEGES)}
    open_box = {"security_opt": ["no-new-privileges:true", "seccomp=unconfined"], "environment": only}
    said = box(probe_calls, change=open_box).said
    assert {name for name in REFUSED_WITHOUT_PRIVILEGES if said["calls"][name] == EPERM} == set()
    assert {said["families"][family] for family in ("2", "10", "16")} == {0}


def probe_32_bits() -> Any:
    """Makes a socket by the system calls of 32-bit programs, whose numbers are others; gives how the process ended."""
    import ctypes
    import mmap
    import os
    import platform

    if platform.machine() != "x86_64":
        return None
    code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    # mov eax, 359 (socket); mov ebx, 2; mov ecx, 1; xor edx, edx; int 0x80; ret -- with rbx kept
    code.write(bytes.fromhex("53 b867010000 bb02000000 b901000000 31d2 cd80 5b c3"))
    call = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))
    child = os.fork()
    if not child:
        os._exit(0 if call() >= 0 else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.docker
def test_calls_by_their_32_bit_numbers_end_the_process(box: Box) -> None:
    said = box(probe_32_bits).said
    assert said is None or said < 0  # by a signal


def test_the_profile_allows_by_name_and_refuses_the_rest() -> None:
    profile = json.loads(seccomp_profile())
    assert (profile["defaultAction"], profile["defaultErrnoRet"]) == ("SCMP_ACT_ERRNO", EPERM)
    assert {arch["architecture"] for arch in profile["archMap"]} == {"SCMP_ARCH_X86_64", "SCMP_ARCH_AARCH64"}
    assert not any(arch["subArchitectures"] for arch in profile["archMap"]), "32-bit calls have numbers of their own"
    free = [
        name
        for rule in profile["syscalls"]
        if rule["action"] == "SCMP_ACT_ALLOW" and not rule.get("args")
        for name in rule["names"]
    ]
    bound = {name for rule in profile["syscalls"] if rule.get("args") for name in rule["names"]}
    assert len(free) == len(set(free)) and not bound & set(free), "a rule without conditions would undo the others"
    assert bound == {
        "clone", "getsockopt", "ioctl", "personality", "prctl", "prlimit64", "sched_setaffinity", "setpriority",
        "setsockopt", "socket", "socketpair",
    }  # fmt: skip


# --- Limits -----------------------------------------------------------------------------------------------------------


def probe_limits() -> Any:
    import errno
    import mmap
    import os
    import resource
    import signal
    import sys

    said: dict[str, Any] = {}

    def attempt(function: Any, *arguments: Any) -> str:
        try:
            function(*arguments)
            return "allowed"
        except OSError as error:
            return errno.errorcode[error.errno or 0]

    descriptors: list[int] = []
    try:
        while True:
            descriptors.append(os.dup(0))
    except OSError as error:
        said["nofile"] = [errno.errorcode[error.errno or 0], len(descriptors)]
    for descriptor in descriptors:
        os.close(descriptor)
    with open("/tmp/large", "wb") as file:
        said["fsize"] = attempt(os.pwrite, file.fileno(), b"x", 1 << 30)
    written = 0
    try:
        for number in range(64):
            with open(f"/tmp/disk{number}", "wb", buffering=0) as file:
                for _ in range(4):
                    written += file.write(bytes(1 << 20))
    except OSError as error:
        said["disk"] = [errno.errorcode[error.errno or 0], written]
    for name in os.listdir("/tmp"):
        os.unlink(f"/tmp/{name}")
    files = 0
    try:
        while files < 100_000:
            os.close(os.open(f"/tmp/inode{files}", os.O_CREAT | os.O_WRONLY))
            files += 1
    except OSError as error:
        said["inodes"] = [errno.errorcode[error.errno or 0], files]
    for name in os.listdir("/tmp"):
        os.unlink(f"/tmp/{name}")
    with open("/tmp/script", "w") as script:
        script.write(f"#!{sys.executable}\n")
    os.chmod("/tmp/script", 0o700)
    said["noexec"] = attempt(os.execv, "/tmp/script", ["/tmp/script"])
    with open("/tmp/script", "rb") as code:
        said["noexec map"] = attempt(
            lambda: mmap.mmap(code.fileno(), 4, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC)
        )
    said["core"] = resource.getrlimit(resource.RLIMIT_CORE)
    with open("/dev/shm/x", "wb", buffering=0) as file:
        said["shm"] = attempt(file.write, bytes(2 << 20)), os.fstat(file.fileno()).st_size
    os.unlink("/dev/shm/x")
    children = []
    try:
        while True:
            child = os.fork()
            if not child:
                signal.pause()
                os._exit(0)
            children.append(child)
    except OSError as error:
        said["pids"] = [errno.errorcode[error.errno or 0], len(children)]
    for child in children:
        os.kill(child, signal.SIGKILL)
    return said


@pytest.mark.docker
def test_files_disk_and_processes_are_limited(box: Box) -> None:
    said = box(probe_limits, **SETTINGS).said
    assert said["nofile"][0] == "EMFILE" and NOFILE - 8 < said["nofile"][1] < NOFILE
    assert said["fsize"] == "EFBIG"
    assert said["disk"][0] == "ENOSPC" and 15 * MIB <= said["disk"][1] <= 16 * MIB
    assert said["inodes"][0] == "ENOSPC" and said["inodes"][1] <= 1024
    assert (said["noexec"], said["noexec map"]) == ("EACCES", "EPERM")
    assert said["core"] == [0, 0]
    assert said["shm"][1] <= MIB
    assert said["pids"] == ["EAGAIN", 31]


def probe_fork_bomb() -> Any:
    import os

    while True:
        try:
            os.fork()
        except OSError:
            pass


@pytest.mark.docker
def test_a_fork_bomb_stays_in_its_box_and_can_be_killed(engine: Any, box_image: str) -> None:
    config = make_sandbox_config(**SETTINGS)
    options = container_options(config, image=box_image, uid=UID, labels=LABELS)
    code = f"{source_of(probe_fork_bomb)}\nprobe_fork_bomb()"
    container = engine.containers.create(entrypoint=["python3", "-I", "-c"], command=[code], **options)
    try:
        container.start()
        time.sleep(1)
        assert len(container.top()["Processes"]) <= 32
        began = time.monotonic()
        container.kill()
        wait_until_gone(engine, container.id)
        assert time.monotonic() - began < 20
    finally:
        remove(engine, container.id)


def wait_until_gone(engine: Any, container: str) -> None:
    deadline = time.monotonic() + 30
    while engine.containers.list(all=True, filters={"id": container}, ignore_removed=True):
        assert time.monotonic() < deadline, "the engine did not remove the container"
        time.sleep(0.05)


def remove(engine: Any, container: str) -> None:
    for left in engine.containers.list(all=True, filters={"id": container}, ignore_removed=True):
        left.remove(force=True)


def probe_memory() -> Any:
    held = []
    while True:
        held.append(bytearray(b"x" * (1 << 20)))


@pytest.mark.docker
def test_a_box_out_of_memory_is_killed(box: Box) -> None:
    ended = box(probe_memory, memory_mb=64, tmp_mb=16)
    assert (ended.exit_code, ended.oom_killed) == (137, True)


def probe_files_in_memory() -> Any:
    for number in range(100):
        with open(f"/tmp/{number}", "wb", buffering=0) as file:
            file.write(bytes(1 << 20))


@pytest.mark.docker
def test_temporary_files_count_as_memory(box: Box) -> None:
    ended = box(probe_files_in_memory, memory_mb=64, tmp_mb=128)
    assert (ended.exit_code, ended.oom_killed) == (137, True)


def probe_cpu() -> Any:
    import time

    began = time.monotonic()
    while time.monotonic() - began < 1.5:
        pass
    return time.process_time() / 1.5


@pytest.mark.docker
def test_the_share_of_a_cpu_is_limited(box: Box) -> None:
    assert box(probe_cpu, cpus=0.25).said < 0.5


# --- What must work ---------------------------------------------------------------------------------------------------


def probe_features() -> Any:
    import asyncio
    import ctypes
    import multiprocessing
    import os
    import resource
    import selectors
    import shutil
    import signal
    import socket
    import sqlite3
    import subprocess
    import sys
    import tempfile
    import threading
    import time
    from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

    sys.path.insert(0, "/opt/rlar/lib")
    said: dict[str, Any] = {}

    thread = threading.Thread(target=lambda: said.update(thread=True))
    thread.start()
    thread.join()
    with ThreadPoolExecutor(4) as threads:
        said["threads"] = list(threads.map(abs, [-1, 2]))
    with multiprocessing.Pool(2) as pool:
        said["pool"] = pool.map(abs, [-1, 2])
    with ProcessPoolExecutor(2) as processes:
        said["processes"] = list(processes.map(abs, [-1, 2]))
    with multiprocessing.Manager() as manager:
        said["manager"] = list(manager.list([1]))
    python = [sys.executable, "-c", "import numpy; print(numpy.arange(3).sum(), input())"]
    environment = {"PYTHONPATH": "/opt/rlar/lib", "OPENBLAS_NUM_THREADS": "1"}
    said["subprocess"] = subprocess.run(
        python, input="x\n", capture_output=True, text=True, timeout=20, env=environment, start_new_session=True
    ).stdout

    async def waits() -> list[Any]:
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", "print(6)", stdout=subprocess.PIPE)
        out, _ = await process.communicate()
        return await asyncio.gather(asyncio.sleep(0.01, 5), asyncio.to_thread(int, out))

    said["asyncio"] = asyncio.run(waits())
    with tempfile.TemporaryDirectory() as folder, tempfile.NamedTemporaryFile("w+") as file:
        file.write("text")
        file.flush()
        shutil.copy2(file.name, f"{folder}/copy")
        shutil.move(f"{folder}/copy", f"{folder}/moved")
        os.symlink(f"{folder}/moved", f"{folder}/link")
        said["tempfile"] = open(f"{folder}/link").read()
        with sqlite3.connect(f"{folder}/db") as base:
            said["sqlite"] = base.execute("select 6 * 7").fetchone()[0]
        base.close()
    left, right = socket.socketpair()
    with left, right, selectors.DefaultSelector() as selector:
        selector.register(right, selectors.EVENT_READ)
        left.sendall(b"x")
        said["unix sockets"] = len(selector.select(1))
    compare = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(lambda value: value + 1)
    said["callback"] = compare(1)
    rung: list[int] = []
    signal.signal(signal.SIGALRM, lambda number, frame: rung.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    time.sleep(0.05)
    said["alarm"] = len(rung)
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_CPU, (1, 1))
        while True:
            pass
    descriptor = os.pidfd_open(child)
    said["pidfd"] = os.waitid(os.P_PIDFD, descriptor, os.WEXITED).si_status
    os.sched_setaffinity(0, os.sched_getaffinity(0))
    import mpmath
    import numpy
    import regex
    import sortedcontainers
    import sympy

    said["numpy"] = float(numpy.linalg.det(numpy.eye(64) @ numpy.eye(64)))
    said["sympy"] = str(sympy.solve("x**2 - 4"))
    said["others"] = [str(mpmath.mpf(1)), regex.findall(r"\p{L}", "a1"), list(sortedcontainers.SortedList([2, 1]))]
    said["versions"] = {module.__name__: module.__version__ for module in (mpmath, numpy, sortedcontainers, sympy)}
    return said


@pytest.mark.docker
def test_what_programs_need_works(box: Box) -> None:
    ended = box(probe_features)
    assert ended.said, ended.output
    assert ended.said | {"versions": None} == {
        "thread": True,
        "threads": [1, 2],
        "pool": [1, 2],
        "processes": [1, 2],
        "manager": [1],
        "subprocess": "3 x\n",
        "asyncio": [5, 6],
        "tempfile": "text",
        "sqlite": 42,
        "unix sockets": 1,
        "callback": 2,
        "alarm": 1,
        "pidfd": 9,
        "numpy": 1.0,
        "sympy": "[-2, 2]",
        "others": ["1.0", ["a"], [1, 2]],
        "versions": None,
    }


OWNER = """
import json, sys
from verl_rlar.config import SandboxConfig
from verl_rlar.sandbox.engine import connect
from verl_rlar.sandbox.hardening import container_options
image, uid = sys.argv[1:]
client = connect(SandboxConfig())
options = container_options(SandboxConfig(), image=image, uid=int(uid), labels={})
code = "import sys; print('ready', flush=True); sys.stdin.read()"
container = client.containers.create(entrypoint=["python3", "-I", "-c"], command=[code], **options)
attached = container.attach_socket(params={"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1})
container.start()
attached.read(8)
print(container.id, attached.read(5).decode(), flush=True)
sys.stdin.read()
"""


@pytest.mark.docker
def test_a_box_whose_owner_was_killed_ends_and_is_removed(engine: Any, box_image: str) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, box_image, str(UID)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with owner:
        assert owner.stdout
        container, said = owner.stdout.readline().split()
        try:
            assert said == "ready"
            assert engine.containers.list(filters={"id": container})
            owner.kill()
            wait_until_gone(engine, container)
        finally:
            owner.kill()
            remove(engine, container)
