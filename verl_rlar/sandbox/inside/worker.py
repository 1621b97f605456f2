# SPDX-License-Identifier: Apache-2.0
"""The first process of a box: takes jobs on standard input, runs each in a process of its own, and reports.

It trusts nothing of what it runs. A job is a fork of this process, which never executes, compiles, unpickles or parses
anything that comes from a job: what a job writes is read as bytes, up to a limit, and passed on. At the end of a job,
every process in the box but this one is killed, in one go, and the temporary folder is emptied; a box in which that
fails says so and is thrown away. Jobs share this process's user, so it makes itself unreadable for them
(PR_SET_DUMPABLE); being the first process of its namespace, no signal of theirs can end or stop it; and the box's
seccomp profile refuses ptrace and every call that would reach into another process. And as a job is a fork, it could
find in its own memory what earlier jobs left in ours: so what comes from jobs, or is for them, is never on the heap but
in mappings (`Memory`), which are given back before the next fork.

Frames, in both directions: a length of four bytes (big endian) and as many bytes. From the host: the names of the
modules to load, once; then jobs, each a head (`JOB`), what stands on its standard input, and the rest as JSON, which
only the job's own process reads; and replies to what a job asks. To the host, told apart by their first byte: ``r``, it
is ready; ``a`` with what a job asks; ``e``, a job's end (`END`) with what it wrote, first as output, then as errors.
When standard input ends, the owner is gone: this process ends, and the box with it.

Fast is what touches little memory: after a fork, each page that is written costs a microsecond and more, in both
processes. Hence few objects here, and bytecode and bound symbols that were made before.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import mmap
import os
import select
import signal
import struct
import time

import harness

TMP = "/tmp"
SHM = "/dev/shm"
"""With `TMP`, all folders that a job can write."""
FRAME = struct.Struct(">I")
JOB = struct.Struct(">cdII")
"""First letter of the mode; seconds; most bytes that it may write; bytes of its standard input."""
END = struct.Struct(">cc?idI")
"""``e``; first letter of how it ended; whether the box is clean; exit code or `NO_CODE`; seconds; bytes of output."""
NO_CODE = -1000
CHUNK = 1 << 16
STDERR_BYTES = 4096
ASK = b'{"ask"'
"""How a line begins by which a verifier asks."""
QUIET_S = 0.005
"""Until then, a job's output stays in its pipes: most jobs are over by then, and nobody was woken for each line."""
PR_SET_DUMPABLE = 4
NOTHING = os.open(os.devnull, os.O_RDWR)

_prctl = ctypes.CDLL(None, use_errno=True).prctl


class Memory(mmap.mmap):
    """Private memory outside the heap. `close` it: then nobody finds in his copy of this process what was in it."""

    def __new__(cls, size: int) -> Memory:
        return super().__new__(cls, -1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def fill(room: memoryview) -> None:
    """Reads from the host; at the end of the stream this process ends."""
    while room:
        count = os.readv(0, [room])
        if not count:
            os._exit(0)
        room = room[count:]


def read_frame(more: int = 0) -> Memory:
    """The next frame, with room for some bytes behind it."""
    head = bytearray(FRAME.size)
    fill(memoryview(head))
    (size,) = FRAME.unpack(head)
    frame = Memory(size + more)
    fill(memoryview(frame)[:size])
    return frame


def write_all(descriptor: int, *parts: bytes | memoryview) -> None:
    views = [memoryview(part) for part in parts if part]
    while views:
        count = os.writev(descriptor, views)
        while views and count >= len(views[0]):
            count -= len(views.pop(0))
        if count:
            views[0] = views[0][count:]


def send(*parts: bytes | memoryview) -> None:
    write_all(1, FRAME.pack(sum(map(len, parts))), *parts)


class Stream:
    """What came from a job by one of its pipes."""

    def __init__(self, most: int) -> None:
        self.memory = Memory(most + CHUNK)
        self.size = 0

    def read(self, descriptor: int) -> int:
        """Takes what is there to read; the number of bytes."""
        count = os.readv(descriptor, [memoryview(self.memory)[self.size : self.size + CHUNK]])
        self.size += count
        return count

    def drop(self, count: int) -> None:
        """Forgets so many of the first bytes."""
        self.size -= count
        self.memory.move(0, count, self.size)

    def view(self) -> memoryview:
        return memoryview(self.memory)[: self.size]


class Rank:
    """Which process the kernel ends first where the box is out of memory: a job's, before the worker.

    A process inherits its rank. So this one has the highest for the moment of a fork, when there is no other to be
    spared for; a file that stays open is all that takes.
    """

    HIGHEST = b"1000"

    def __init__(self) -> None:
        try:
            self.descriptor = os.open("/proc/self/oom_score_adj", os.O_RDWR)
            self.own = os.pread(self.descriptor, 16, 0)
            self.set(self.HIGHEST)
            self.set(self.own)
        except OSError:  # a runtime with a kernel of its own may not have it
            self.descriptor = -1

    def set(self, rank: bytes) -> None:
        if self.descriptor >= 0:
            os.pwrite(self.descriptor, rank, 0)


RANK = Rank()


class Run:
    """One job at work: its process, and the pipes to it."""

    def __init__(self, frame: Memory) -> None:
        self.mode, seconds, self.left, size = JOB.unpack_from(frame)
        self.streams: dict[int, Stream] = {}
        """By the descriptor that we read: what came."""
        program = self.mode == b"p"
        stdin = self._stdin(memoryview(frame)[JOB.size : JOB.size + size]) if program else NOTHING
        output, their_output = os.pipe()
        errors, their_errors = os.pipe() if program else (-1, NOTHING)
        replies, self.replies = os.pipe() if self.mode == b"v" else (-1, -1)
        self.deadline = time.monotonic() + seconds
        RANK.set(RANK.HIGHEST)
        self.pid = os.fork()
        if not self.pid:
            try:
                _prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
                harness.child(harness.read(frame[JOB.size + size :]), stdin, their_output, their_errors, replies)
            finally:
                os._exit(70)
        RANK.set(RANK.own)
        for descriptor in (stdin, their_output, their_errors, replies):
            if descriptor > NOTHING:
                os.close(descriptor)
        self.output, self.errors = output, errors
        frame.close()
        self.streams[output] = Stream(self.left)
        if errors >= 0:
            self.streams[errors] = Stream(STDERR_BYTES)
        self.process = os.pidfd_open(self.pid)
        self.asking = False
        """A question was passed on, and its reply has not come."""
        self.unsent: Memory | None = None
        """A reply that the verifier has not taken whole."""
        self.taken = 0
        """Bytes of it that it has."""
        if self.replies >= 0:
            os.set_blocking(self.replies, False)

    def _stdin(self, content: memoryview) -> int:
        """A file with the program's input, already without a name."""
        path = os.path.join(TMP, "stdin")
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        write_all(descriptor, content)
        os.close(descriptor)
        descriptor = os.open(path, os.O_RDONLY)
        os.unlink(path)
        return descriptor

    def wait(self) -> str:
        """Reads until the job's process is gone, its time is up, or it has written too much; says which."""
        poll = select.poll()
        if self.mode != b"v":
            poll.register(self.process, select.POLLIN)
            if poll.poll(1000 * min(QUIET_S, max(self.deadline - time.monotonic(), 0))):
                return "done"
        for descriptor in (*self.streams, self.process):
            poll.register(descriptor, select.POLLIN)
        if self.mode == b"v":
            poll.register(0, select.POLLIN)
        while True:
            left = self.deadline - time.monotonic()
            if left <= 0:
                return "timeout"
            ready = [descriptor for descriptor, _ in poll.poll(left * 1000 + 1)]
            for descriptor in ready:
                if descriptor in self.streams and not self.read(descriptor):
                    poll.unregister(descriptor)
                if self.left < 0:
                    return "flooded"
            if 0 in ready:
                self.unsent, self.taken, self.asking = read_frame(1), 0, False
                self.unsent[-1:] = b"\n"
                poll.register(self.replies, select.POLLOUT)
            if self.replies in ready and self.reply():
                poll.unregister(self.replies)
            if self.process in ready:
                return "done"
            if self.mode == b"v":
                self.pass_on()

    def read(self, descriptor: int) -> bool:
        """Takes what is there to read; False at the end of the stream."""
        stream = self.streams[descriptor]
        count = stream.read(descriptor)
        self.left -= count
        if descriptor == self.errors and stream.size > STDERR_BYTES:
            stream.drop(stream.size - STDERR_BYTES)
        return bool(count)

    def pass_on(self) -> None:
        """Sends what a verifier asks, one question at a time; what stays at the end is not its harness's word."""
        kept = self.streams[self.output]
        if self.asking or self.unsent is not None or kept.memory[: len(ASK)] != ASK:
            return
        if (end := kept.memory.find(b"\n", 0, kept.size)) >= 0:
            self.asking = True
            send(b"a", kept.view()[:end])
            kept.drop(end + 1)

    def reply(self) -> bool:
        """Writes what the verifier takes now of a reply; whether that was the rest."""
        assert self.unsent is not None
        try:
            self.taken += os.write(self.replies, memoryview(self.unsent)[self.taken :])
        except BlockingIOError:
            pass
        except OSError:  # its reader is gone
            self.taken = len(self.unsent)
        if self.taken < len(self.unsent):
            return False
        self.unsent.close()
        self.unsent = None
        return True

    def drain(self) -> None:
        """Reads what is left in the pipes of a process that is gone."""
        for descriptor in self.streams:
            os.set_blocking(descriptor, False)
            try:
                while self.left >= 0 and self.read(descriptor):
                    pass
            except BlockingIOError:
                pass

    def close(self) -> None:
        for descriptor in (*self.streams, self.process, self.replies):
            if descriptor >= 0:
                os.close(descriptor)

    def forget(self) -> None:
        """Gives back all memory that had to do with the job."""
        for stream in self.streams.values():
            stream.memory.close()
        if self.unsent is not None:
            self.unsent.close()


def run(frame: Memory) -> None:
    """Runs one job, cleans up after it, and tells the host."""
    start = time.monotonic()
    attempt = Run(frame)
    end = attempt.wait()
    seconds = time.monotonic() - start
    status = end_processes(attempt.pid, kill=end != "done")
    if end == "done":
        attempt.drain()
        if attempt.left < 0:
            end = "flooded"
        elif status is None or os.WIFSIGNALED(status):
            end = "killed"
    code = NO_CODE if end in ("timeout", "flooded") or status is None else os.waitstatus_to_exitcode(status)
    attempt.close()
    if attempt.asking:
        read_frame().close()  # the reply that it did not wait for is no job
    clean = empty(TMP) and empty(SHM)
    output = attempt.streams[attempt.output]
    parts = [stream.view() for stream in attempt.streams.values()]
    send(END.pack(b"e", end[:1].encode(), clean, code, seconds, output.size), *parts)
    del parts
    attempt.forget()


def end_processes(pid: int, *, kill: bool) -> int | None:
    """Ends every process in the box but this one; the status of the job's own, if it was not killed by us."""
    status = None if kill else os.waitpid(pid, 0)[1]
    while True:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return status  # none is left: whoever was orphaned became our child
        os.kill(-1, signal.SIGKILL)  # all at once: none can fork meanwhile
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return status


def empty(folder: str) -> bool:
    """Whether a folder is empty, or could be emptied; it is its owner's again."""
    try:
        os.chmod(folder, 0o700)  # a job may have shut it
        names = os.listdir(folder)
        if not names:
            return True
        import shutil  # not before: what is loaded here makes each fork slower

        for name in names:
            path = os.path.join(folder, name)
            if os.path.isdir(path) and not os.path.islink(path):
                os.chmod(path, 0o700)
                shutil.rmtree(path, ignore_errors=True)
            else:
                os.unlink(path)
        return not os.listdir(folder)
    except (OSError, RecursionError):
        return False


def main() -> None:
    _prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    os.chdir(TMP)
    for name in read_frame()[:].decode().split("\0")[0].split():
        importlib.import_module(name)
    harness.warm_up()
    gc.collect()
    gc.freeze()  # forks share these pages
    send(b"r")
    while True:
        run(read_frame())
