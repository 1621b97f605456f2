# SPDX-License-Identifier: Apache-2.0
"""`Pool`: started boxes, handed out by what they have run before.

A box is *blank* when it is started, and belongs to one key (a verifier's hash, or what all programs share) from its
first job on. Whoever needs a box gets an idle one of its key, else a blank one, else waits in line while one is started
in the background or given back.

Guarantees: never more than ``size + spares`` boxes, those that are being started or destroyed included; a broken box is
destroyed and never handed out again, as is one whose preparation did not come to its end; a box that died while it was
idle is noticed before it is handed out; boxes are started and destroyed off the path of those who hold one; no key
starves (`RECYCLE_S`); leaving destroys all.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from verl_rlar.errors import ToolTimeout
from verl_rlar.sandbox.base import BoxLost

logger = logging.getLogger(__name__)

SPARE_PAUSE_S = 5.0
"""After a box that could not be started: how long none is started that nobody waits for, in seconds."""
RECYCLE_S = 1.0
"""How long the first in line waits until a box of another key is destroyed to make room, in seconds."""


class Pooled(Protocol):
    """What a pool needs to know of a box."""

    @property
    def usable(self) -> bool:
        """Whether it may be handed out: alive, and never caught misbehaving."""
        ...

    async def destroy(self) -> None:
        """Ends it; never raises."""
        ...


B = TypeVar("B", bound=Pooled)


@dataclass(eq=False)
class _Slot(Generic[B]):
    box: B
    key: Hashable = None
    """None: blank."""


@dataclass(eq=False)
class _Waiter(Generic[B]):
    key: Hashable
    since: float
    slot: asyncio.Future[_Slot[B]]


class Pool(Generic[B]):
    """See the module. Use from one event loop.

    Args:
        start: Starts a blank box.
        size: Most boxes that are in use at a time.
        spares: Blank boxes to keep ready beside them, for a new key or in place of one that is destroyed.
        queue_timeout_s: How long one may wait for a box, in seconds.
    """

    def __init__(self, start: Callable[[], Awaitable[B]], *, size: int, spares: int, queue_timeout_s: float) -> None:
        self._start_box = start
        self._size = size
        self._spares = spares
        self._queue_timeout_s = queue_timeout_s
        self._idle: deque[_Slot[B]] = deque()
        """The longest idle first."""
        self._used: set[_Slot[B]] = set()
        self._starting = 0
        self._no_spares_before = 0.0
        self._ending = 0
        self._waiting: deque[_Waiter[B]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self.waited = 0
        """Number of leases for which no box was ready."""

    @property
    def alive(self) -> int:
        """Number of boxes, those that are being started or destroyed included."""
        return len(self._idle) + len(self._used) + self._starting + self._ending

    async def warm_up(self, count: int) -> None:
        """Returns when that many boxes are started.

        Raises:
            BoxLost, ToolUnavailable: They cannot be started.
        """
        self._starting += count
        await asyncio.gather(*(self._start() for _ in range(count)))

    def fill(self, count: int) -> None:
        """Starts that many boxes in the background."""
        for _ in range(count):
            self._starting += 1
            self._spawn(self._start_quietly())

    @asynccontextmanager
    async def lease(self, key: Hashable, assign: Callable[[B], Awaitable[None]]) -> AsyncIterator[B]:
        """The right to use a box.

        Args:
            key: Whose box it must be.
            assign: Prepares a blank box for this key.

        Raises:
            ToolTimeout: None became free in time.
            BoxLost, ToolUnavailable: None can be started.
        """
        slot = self._take(key) or await self._wait(key)
        ready = slot.key is not None
        try:
            if not ready:
                slot.key = key
                self._tend()  # one spare fewer
                await assign(slot.box)
                ready = True
            yield slot.box
        finally:
            self._used.discard(slot)
            if ready:
                self._give(slot)
            else:  # whoever was to prepare it failed or was cancelled: what state it is in, nobody knows
                self._end(slot)
                self._tend()

    async def close(self) -> None:
        """Destroys all boxes; those who wait get `BoxLost`."""
        self._closed = True
        for waiter in self._waiting:
            if not waiter.slot.done():
                waiter.slot.set_exception(BoxLost("the sandbox is being closed"))
        self._waiting.clear()
        for slot in (*self._idle, *self._used):
            self._end(slot)
        self._idle.clear()
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _take(self, key: Hashable) -> _Slot[B] | None:
        """Takes an idle box of that key, else a blank one, into use; None: there is none, or enough are in use."""
        for dead in [slot for slot in self._idle if not slot.box.usable]:
            self._idle.remove(dead)
            self._end(dead)
        if len(self._used) >= self._size:
            return None
        for wanted in (key, None):
            slot = next((slot for slot in reversed(self._idle) if slot.key == wanted), None)
            if slot is not None:
                self._idle.remove(slot)
                self._used.add(slot)
                return slot
        return None

    async def _wait(self, key: Hashable) -> _Slot[B]:
        self.waited += 1
        loop = asyncio.get_running_loop()
        waiter = _Waiter[B](key, loop.time(), loop.create_future())
        alarm = loop.call_later(self._queue_timeout_s, self._late, waiter)
        self._waiting.append(waiter)
        self._tend()
        try:
            return await waiter.slot
        except asyncio.CancelledError:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
            elif not waiter.slot.cancelled() and not waiter.slot.exception():
                slot = waiter.slot.result()  # it came too late
                self._used.discard(slot)
                self._give(slot)
            raise
        finally:
            alarm.cancel()

    def _late(self, waiter: _Waiter[B]) -> None:
        if not waiter.slot.done():
            self._waiting.remove(waiter)
            error = ToolTimeout(
                f"no box became free within rlar.sandbox.queue_timeout_s={self._queue_timeout_s:g} s: all "
                f"{self._size} are at work; more of them: rlar.sandbox.program_boxes, rlar.sandbox.verifier_boxes"
            )
            waiter.slot.set_exception(error)

    def _give(self, slot: _Slot[B]) -> None:
        """Takes a box back, or a new one in, and hands it on."""
        first = self._waiting[0] if self._waiting else None
        last = len(self._used) + 1 == self._size
        if first and slot.key == first.key and last and not first.slot.done() and slot.box.usable and not self._closed:
            self._waiting.popleft()  # the usual case, and nothing else has changed
            self._used.add(slot)
            first.slot.set_result(slot)
            return
        passed_over = first is not None and slot.key not in (None, first.key) and self._age(first) > RECYCLE_S
        if self._closed or passed_over or not slot.box.usable:
            self._end(slot)
        else:
            self._idle.append(slot)
        self._tend()

    def _tend(self) -> None:
        """Serves who waits, starts what is missing, and destroys an idle box where no other has room."""
        if self._closed:
            return
        for waiter in list(self._waiting) if len(self._used) < self._size else ():
            if not waiter.slot.done() and (slot := self._take(waiter.key)):
                self._waiting.remove(waiter)
                waiter.slot.set_result(slot)
        blank = sum(slot.key is None for slot in self._idle)
        can_be_served = min(len(self._waiting), self._size - len(self._used))
        spares = self._spares if asyncio.get_running_loop().time() >= self._no_spares_before else 0
        wanted = can_be_served + spares - blank - self._starting
        room = self._size + self._spares - self.alive
        for _ in range(min(wanted, room)):
            self._starting += 1
            self._spawn(self._start_quietly())
        if can_be_served > 0 and self._idle and not (self._starting or self._ending):
            self._end(self._idle.popleft())  # the longest idle one, of a key that nobody waits for

    def _age(self, waiter: _Waiter[B]) -> float:
        return asyncio.get_running_loop().time() - waiter.since

    async def _start(self) -> None:
        try:
            box = await self._start_box()
        finally:
            self._starting -= 1
        self._give(_Slot(box))

    async def _start_quietly(self) -> None:
        try:
            await self._start()
        except Exception as error:  # the engine's and the socket's errors are of many kinds; the first in line gets it
            logger.warning("a box could not be started: %s", error)
            self._no_spares_before = asyncio.get_running_loop().time() + SPARE_PAUSE_S
            waiter = next((waiter for waiter in self._waiting if not waiter.slot.done()), None)
            if waiter is not None:
                self._waiting.remove(waiter)
                waiter.slot.set_exception(error)
                self._tend()

    def _end(self, slot: _Slot[B]) -> None:
        self._ending += 1
        self._spawn(self._destroy(slot))

    async def _destroy(self, slot: _Slot[B]) -> None:
        try:
            await slot.box.destroy()
        finally:
            self._ending -= 1
        self._tend()

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
