# SPDX-License-Identifier: Apache-2.0
"""One job on a SandboxFusion server: the program that `verl_rlar.sandbox.fusion` sends there, as it stands.

The server runs it once, with `harness.py`, `values.py`, `reading.py`, `verifier_api.py`, `job.json` and `replies.jsonl`
beside it, and passes back `result.json`. It forks the job's process, in which the harness does what it does in a box of
ours; reads what that writes, up to a limit; ends it at its deadline; and reports like a box's worker, with one more
end: ``asks``. Nobody can answer while this runs, so it reads replies from a file, and where that has none left it ends;
the sender finds the answer, and runs it again with one reply more.

Guarantees: what the server does with a job's standard output and exit code does not matter (it mixes up much of it);
the job starts in an empty folder with an empty environment; the result carries a secret that comes on standard input
and is read after the fork, so it never was in the job's process or on the disk.

Not covered: other processes of the server's user, which can reach into this one if the server isolates nothing
(`isolation: none`, its default), and files that a job leaves outside of its folder there. Python 3.10 or newer.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import select
import shutil
import signal
import sys
import time
from typing import Any

STARTED = b"rlar: started\n"
FRESH = "RLAR_FRESH"
CHUNK = 1 << 16
STDERR_BYTES = 4096
STACK_BYTES = 8 << 20
END_S = 2.0
"""How long it tries to end what a job has started, in seconds."""
PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER = 4, 36

_prctl = ctypes.CDLL(None, use_errno=True).prctl


def text(data: bytes | bytearray) -> str:
    return data.decode("utf-8", "replace")


def nameless_file(content: bytes) -> int:
    """A descriptor that reads this."""
    with open("nameless", "wb") as file:
        file.write(content)
    descriptor = os.open("nameless", os.O_RDONLY)
    os.unlink("nameless")
    return descriptor


class Run:
    """One job at work: its process, and the pipes from it."""

    def __init__(self, job: dict[str, Any], replies: bytes) -> None:
        import harness

        self.mode = job["mode"]
        self.left = int(job["output_bytes"])
        self.asks: list[str] = []
        self.replies = replies.count(b"\n")
        self.streams: dict[int, bytearray] = {}
        """By the descriptor that we read: what came."""
        program = self.mode == "program"
        stdin = nameless_file(job["stdin"].encode("utf-8", "surrogatepass") if program else b"")
        answers = nameless_file(replies) if self.mode == "verifier" else -1
        self.output, output = os.pipe()
        self.errors, errors = os.pipe() if program else (-1, os.open(os.devnull, os.O_WRONLY))
        ready, prepared = os.pipe()
        go, self.go = os.pipe()
        self.streams = {descriptor: bytearray() for descriptor in (self.output, self.errors) if descriptor >= 0}
        self.pid = os.fork()
        if not self.pid:
            try:
                with contextlib.suppress(OSError):
                    os.setsid()
                _prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
                os.chdir("box")
                limit(resource.RLIMIT_AS, int(job["memory_bytes"]), for_good=True)
                os.write(prepared, b"!")
                os.read(go, 1)
                harness.child(job, stdin, output, errors, answers)
            finally:
                os._exit(70)
        for descriptor in (stdin, output, errors, answers, prepared, go):
            if descriptor >= 0:
                os.close(descriptor)
        if not os.read(ready, 1):
            sys.exit("the job's process cannot be prepared")
        try:
            self.process = os.pidfd_open(self.pid)
        except OSError:
            self.process = -1

    def start(self, seconds: float) -> None:
        self.deadline = time.monotonic() + seconds
        os.write(1, STARTED)
        os.write(self.go, b"!")

    def wait(self) -> str:
        """Reads until the job's process is gone, asks, its time is up, or it has written too much; says which."""
        poll = select.poll()
        for descriptor in (*self.streams, self.process):
            if descriptor >= 0:
                poll.register(descriptor, select.POLLIN)
        while True:
            left = self.deadline - time.monotonic()
            if left <= 0:
                return "timeout"
            ready = [descriptor for descriptor, _ in poll.poll((left if self.process >= 0 else 0.01) * 1000 + 1)]
            for descriptor in ready:
                if descriptor in self.streams and not self.read(descriptor):
                    poll.unregister(descriptor)
                if self.left < 0:
                    return "flooded"
            if len(self.asks) > self.replies:
                return "asks"
            if self.process in ready or (self.process < 0 and self.gone()):
                return "done"

    def gone(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def read(self, descriptor: int) -> bool:
        """Takes what is there to read; False at the end of the stream."""
        data = os.read(descriptor, CHUNK)
        self.left -= len(data)
        kept = self.streams[descriptor]
        kept += data
        if descriptor == self.errors:
            del kept[:-STDERR_BYTES]
        while self.mode == "verifier" and kept.startswith(b'{"ask"') and (end := kept.find(b"\n")) >= 0:
            self.asks.append(text(kept[:end]))
            del kept[: end + 1]
        return bool(data)

    def drain(self) -> None:
        """Reads what is left in the pipes of a process that is gone."""
        for descriptor in self.streams:
            os.set_blocking(descriptor, False)
            with contextlib.suppress(BlockingIOError):
                while self.left >= 0 and self.read(descriptor):
                    pass

    def end_processes(self, kill: bool) -> int | None:
        """Ends the job's process and all that it has started; its status, if it was not killed by us."""
        status = None if kill else os.waitpid(self.pid, 0)[1]
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        deadline = time.monotonic() + END_S
        while time.monotonic() < deadline:
            try:
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            except ChildProcessError:
                break  # whoever was orphaned became our child, and none is left
            for pid in children():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.001)
        return status


def limit(kind: int, size: int, *, for_good: bool) -> None:
    """Limits something of this process and of all that it starts, in bytes."""
    hard = resource.getrlimit(kind)[1]
    size = size if hard == resource.RLIM_INFINITY else min(size, hard)
    resource.setrlimit(kind, (size, size if for_good else hard))


def children() -> list[int]:
    """Processes whose parent is this one."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError), open(f"/proc/{name}/stat") as file:
                if int(file.read().rpartition(")")[2].split()[1]) == os.getpid():
                    found.append(int(name))
    return found


def run(job: dict[str, Any], replies: bytes) -> dict[str, Any]:
    """Runs the job and cleans up after it."""
    attempt = Run(job, replies)
    secret = b""
    while part := os.read(0, 1 << 10):  # to the end: whoever looks later finds nothing
        secret += part
    start = time.monotonic()
    attempt.start(float(job["seconds"]))
    end = attempt.wait()
    seconds = time.monotonic() - start
    status = attempt.end_processes(kill=end != "done")
    if end == "done":
        attempt.drain()
        if attempt.left < 0:
            end = "flooded"
        elif len(attempt.asks) > attempt.replies:
            end = "asks"
        elif status is None or os.WIFSIGNALED(status):
            end = "killed"
    return {
        "secret": text(secret),
        "end": end,
        "asks": attempt.asks,
        "seconds": seconds,
        "exit_code": None if end in ("timeout", "flooded") or status is None else os.waitstatus_to_exitcode(status),
        "output": text(attempt.streams[attempt.output]),
        "errors": text(attempt.streams[attempt.errors]) if attempt.errors >= 0 else "",
    }


def main() -> None:
    if FRESH not in os.environ:  # without the server's environment, and with the same hashes in every round
        # an interpreter takes this for its threads' stacks when it starts; the server sets it to all of the memory
        limit(resource.RLIMIT_STACK, STACK_BYTES, for_good=False)
        kept = {"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", FRESH: "1"}
        os.execve(sys.executable, [sys.executable, "-B", "-X", "utf8", *sys.argv], kept)
    import harness  # noqa: F401
    import verifier_api

    os.environ.clear()
    box = os.path.abspath("box")
    os.environ.update(PATH=os.defpath, HOME=box, TMPDIR=box, LANG="C.UTF-8", OPENBLAS_NUM_THREADS="1")
    _prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    _prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    with open("job.json", encoding="utf-8") as file:
        job = json.load(file)
    if job["mode"] == "verifier" and verifier_api.may_read(job["source"]):
        import reading  # noqa: F401 - its file will be gone
    with open("replies.jsonl", "rb") as replies_file:
        replies = replies_file.read()
    for name in os.listdir():
        with contextlib.suppress(OSError):
            shutil.rmtree(name) if os.path.isdir(name) else os.unlink(name)
    os.mkdir("box")
    result = json.dumps(run(job, replies))
    with open("written", "x", encoding="ascii") as file:
        file.write(result)
    os.replace("written", "result.json")


if __name__ == "__main__":
    main()
