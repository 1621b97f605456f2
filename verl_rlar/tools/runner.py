# SPDX-License-Identifier: Apache-2.0
"""`RuleRunner`: runs rules in worker processes that can be killed.

A rule is trusted code fed hostile text: a number tower, a pathological pattern or a 10 MB response can keep it busy for
hours, fill the memory or crash the interpreter. So each call runs in one of a few worker processes (pebble's pool),
with a deadline after which that process is killed and replaced, and with a cap on its address space. The processes are
started by loky, as fresh interpreters: the standard library's ways would fork the caller with all its threads, or
import the caller's main module (verl, Ray, torch) into each of them.

Most rules take a millisecond or two, and the way to a process and back takes as much, with all the threads that it
wakes. So calls that wait go together, as many as will be done in `TOGETHER_S`. If their process dies under them or one
holds up the others, each is made again by itself, so that nobody pays for another's fault.

Guarantees: `run` returns a `Verdict` or raises a `ToolError`; a caller that is cancelled frees its worker; one call's
damage (globals, memory, a crash) ends with its process at the latest; a pool that is broken (pebble gives one up when
a worker dies that has no call) is replaced by the next call; no worker outlives a caller that was killed by more than
the deadline of its call.

Not covered: this is no sandbox. Code that we did not write never runs here (I6).
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import logging
import math
import resource
import signal
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import resource_tracker
from types import TracebackType
from typing import Any, cast

from loky.backend import get_context
from pebble import ProcessExpired, ProcessPool

from verl_rlar.config import RulesConfig
from verl_rlar.errors import ToolError, ToolTimeout, ToolUnavailable
from verl_rlar.tools.rule import load, load_version
from verl_rlar.types import Sample, ToolSpec, Verdict

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 180.0
"""How long the start of the first worker may take, imports included, in seconds of wall time."""

TASKS_PER_PROCESS = 10_000
"""A worker is replaced after it was given calls so often, so that what libraries cache cannot grow for days."""

TOGETHER_S = 0.02
"""Calls go to a worker together if they take no longer than this in all, by what such calls took lately, in seconds."""

TOGETHER_LIMIT_S = 1.0
"""How long they may take in fact, in seconds, before each is made again by itself: one that hangs keeps the others no
longer than this, as their own deadlines run on."""

LATELY = 0.1
"""Weight of a rule's latest call in what its calls take."""


@dataclass(eq=False)
class _Call:
    """A rule on a sample, and who waits for it."""

    spec: ToolSpec
    sample: Sample
    answer: asyncio.Future[Verdict]
    alone: bool = False
    """Whether it went with others before, and one of them broke it off."""


class RuleRunner:
    """A pool of worker processes for rules. Made when its workers are ready: that takes seconds, once.

    Use as ``with RuleRunner(config, targets) as runner``; leaving kills all workers. Use from one event loop at a time.

    Args:
        config: Number of processes and their memory.
        targets: The rules that will be called, as ``package.module:function``; their modules are imported when a worker
            starts, so that no call pays for it.

    Raises:
        ToolUnavailable: The processes did not start.
    """

    def __init__(self, config: RulesConfig, targets: tuple[str, ...] = ()) -> None:
        self._config = config
        self._targets = targets
        self._closed = False
        self._waiting: deque[_Call] = deque()
        self._feeders: set[asyncio.Task[None] | None] = set()
        """A task for each worker that is at work."""
        self._under_way: set[Future[Any]] = set()
        self._seconds: dict[str, float] = {}
        """What a call takes, by the rule's digest."""
        self._pool = self._made()
        try:
            self._start(targets).result(START_TIMEOUT_S)
        except BaseException as error:
            self.close()
            if not isinstance(error, Exception):
                raise  # Ctrl-C
            raise ToolUnavailable(
                f"the processes for rules did not start within {START_TIMEOUT_S:g} s: {error!r}; is "
                f"rlar.rules.memory_gb={config.memory_gb:g} too little?"
            ) from error

    def _start(self, targets: tuple[str, ...]) -> Future[None]:
        """Starts the pool. Its threads and processes inherit that Ctrl-C is not for them: a worker that dies of it
        while it starts would look like a fault."""
        resource_tracker.ensure_running()  # else the pool starts it, and that unblocks SIGINT
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return cast("Future[None]", self._pool.schedule(_start_worker, args=(0, targets)))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def __enter__(self) -> RuleRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kills all workers; calls under way are failed."""
        self._closed = True
        for call in tuple(self._under_way):
            call.cancel()  # pebble would leave it as it is
        self._pool.stop()
        self._pool.join()

    async def run(self, spec: ToolSpec, sample: Sample) -> Verdict:
        """Runs one rule on one sample.

        Raises:
            ToolTimeout: The rule was at work for `spec.timeout_s` seconds; its process was killed.
            ToolUnavailable: The rule says that what it needs is missing, or its code is another one by now.
            ToolError: The rule raised, used too much memory, or answered something that is no verdict.
            ConnectionError: The worker process died under the call (killed, segmentation fault), or the pool broke; it
                is worth one more try.
        """
        loop = asyncio.get_running_loop()
        call = _Call(spec, sample, loop.create_future())
        self._waiting.append(call)
        if len(self._feeders) < self._config.processes:
            self._feeders.add(loop.create_task(self._feed()))
        return await call.answer

    async def _feed(self) -> None:
        """Gives a worker calls as long as some wait."""
        try:
            while calls := self._next():
                await self._make(calls)
        finally:
            self._feeders.discard(asyncio.current_task())

    def _next(self) -> list[_Call]:
        """The calls that go together next: those that wait longest, at most a worker's share of all."""
        calls: list[_Call] = []
        share, seconds = math.ceil(len(self._waiting) / self._config.processes), 0.0
        while self._waiting and len(calls) < share:
            call = self._waiting[0]
            if not call.answer.done():  # else whoever asked has given up
                seconds += math.inf if call.alone else self._seconds.get(call.spec.digest, math.inf)
                if calls and seconds > TOGETHER_S:
                    break
                calls.append(call)
            self._waiting.popleft()
        return calls

    async def _make(self, calls: Sequence[_Call]) -> None:
        """Makes calls in one worker, and answers who waits for them."""
        try:
            work = self._schedule(calls)
        except Exception as error:  # the pool cannot be started anew, or was ended
            _fail(calls, error)
            return
        self._under_way.add(work)
        work.add_done_callback(self._under_way.discard)
        done = asyncio.wrap_future(work)

        def given_up(_: asyncio.Future[Verdict]) -> None:
            if all(call.answer.done() for call in calls):
                done.cancel()  # which frees the worker

        for call in calls:
            call.answer.add_done_callback(given_up)
        try:
            await asyncio.wait([done])
        finally:
            done.cancel()
        if done.cancelled():
            _fail(calls, ToolUnavailable("the processes for rules were ended"))
        elif (failure := done.exception()) is None:
            for call, (answer, seconds) in zip(calls, done.result(), strict=True):
                before = self._seconds.get(call.spec.digest, seconds)
                self._seconds[call.spec.digest] = before + LATELY * (seconds - before)
                if call.answer.done():
                    continue
                if isinstance(answer, Verdict):
                    call.answer.set_result(answer)
                else:
                    call.answer.set_exception(_as_tool_error(call.spec, answer))
        elif len(calls) == 1:
            _fail(calls, failure)
        else:
            for call in calls:
                call.alone = True
                self._seconds[call.spec.digest] = call.spec.timeout_s  # so the next ones go by themselves, for a while
            self._waiting.extendleft(reversed(calls))

    def _made(self) -> ProcessPool:
        return ProcessPool(
            max_workers=self._config.processes,
            max_tasks=TASKS_PER_PROCESS,
            initializer=_start_worker,
            initargs=(int(self._config.memory_gb * 2**30), self._targets),
            context=get_context("loky"),
        )

    def _schedule(self, calls: Sequence[_Call]) -> Future[list[tuple[Verdict | Exception, float]]]:
        if self._closed:
            raise ToolUnavailable("the processes for rules were ended")
        args = ([(call.spec, call.sample) for call in calls],)
        limits = [call.spec.timeout_s for call in calls]
        timeout_s = min(limits if len(limits) == 1 else [*limits, TOGETHER_LIMIT_S])
        try:
            return self._pool.schedule(_calls, args=args, timeout=timeout_s)
        except RuntimeError as error:  # pebble has given the pool up, and never takes it into use again
            logger.warning("the processes for rules are started anew: %s", error)
            threading.Thread(target=self._pool.join, name="rlar-broken-pool", daemon=True).start()  # ends its workers
            self._pool = self._made()
            return self._pool.schedule(_calls, args=args, timeout=timeout_s)


def _fail(calls: Sequence[_Call], error: BaseException) -> None:
    for call in calls:
        if not call.answer.done():
            call.answer.set_exception(_as_tool_error(call.spec, error))


def _as_tool_error(spec: ToolSpec, error: BaseException) -> Exception:
    """What `RuleRunner.run` raises for what a call or its process came to."""
    if isinstance(error, (TimeoutError, asyncio.TimeoutError)):
        return ToolTimeout(f"{spec.name}: still at work after {spec.timeout_s:g} s")
    if isinstance(error, ProcessExpired):
        return ConnectionError(f"{spec.name}: its process died with exit code {error.exitcode}")
    if isinstance(error, BrokenProcessPool):
        return ConnectionError(f"{spec.name}: the processes for rules broke ({error})")
    if isinstance(error, ToolError):
        return error
    if isinstance(error, MemoryError):
        return ToolError(f"{spec.name}: needed too much memory (rlar.rules.memory_gb)")
    # the boundary to rules: whatever they raise is a broken tool, not a score
    return ToolError(f"{spec.name}: {type(error).__name__}: {str(error)[:300]}")


ORPHAN_S = 5.0
"""How long after its deadline a call may go on where nobody is left to kill it, in seconds."""


def _start_worker(memory_bytes: int, targets: tuple[str, ...]) -> None:
    """Limits this process's memory (0: as it is), imports the rules, and lets their modules load what they need."""
    if memory_bytes:
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for target in targets:
        load(target)
        warm_up = getattr(importlib.import_module(target.partition(":")[0]), "warm_up", None)
        if warm_up:
            warm_up()
    gc.freeze()  # what is there now stays, so the garbage collector need not look through it again and again


def _calls(calls: Sequence[tuple[ToolSpec, Sample]]) -> list[tuple[Verdict | Exception, float]]:
    """Of each call its verdict, or what it raised, and how long it took, in seconds."""
    answers: list[tuple[Verdict | Exception, float]] = []
    for spec, sample in calls:
        began = time.perf_counter()
        try:
            answer: Verdict | Exception = _call(spec, sample)
        except Exception as error:
            answer = error
        answers.append((answer, time.perf_counter() - began))
    return answers


def _call(spec: ToolSpec, sample: Sample) -> Verdict:
    # the pool kills this process at the deadline; this kills it if the pool itself was killed meanwhile
    signal.setitimer(signal.ITIMER_REAL, spec.timeout_s + ORPHAN_S)
    try:
        verdict = load_version(spec)(sample)
        if asyncio.iscoroutine(verdict):
            verdict = asyncio.run(verdict)
    except BaseException as error:  # what it raises may not survive the way back, or end whoever awaits it
        if type(error) in (ToolError, ToolUnavailable):
            raise
        if isinstance(error, MemoryError):
            raise MemoryError from None
        raise ToolError(f"{spec.name}: {type(error).__name__}: {str(error)[:300]}") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if not isinstance(verdict, Verdict):
        raise TypeError(f"answered {type(verdict).__name__} instead of a Verdict")
    return verdict
