# SPDX-License-Identifier: Apache-2.0
"""Two ways to move along a long stream of items without holding it in memory.

`in_background` reads a blocking iterator (a file, a pipe) beside the event loop; `in_order` works on several items at
once and gives the results in the order of the items.

Guarantees: back-pressure (nothing is read before it is wanted, a bounded number of results is held); an exception of
the source or of the work reaches the caller; whoever leaves the loop early leaves no task behind.

Not covered: a source that blocks for ever keeps its thread, which is a daemon: the process can end all the same.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from queue import SimpleQueue
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


async def in_background(items: Iterable[Item]) -> AsyncIterator[Item]:
    """The items of a blocking iterable, each fetched in a thread when it is asked for."""
    loop = asyncio.get_running_loop()
    asked: SimpleQueue[asyncio.Future[Any] | None] = SimpleQueue()
    end = object()

    def answer(future: asyncio.Future[Any], item: Any, error: Exception | None) -> None:
        if future.cancelled():
            return
        if error is None:
            future.set_result(item)
        else:
            future.set_exception(error)

    def serve() -> None:
        iterator = iter(items)
        while (future := asked.get()) is not None:
            item, error = end, None
            try:
                item = next(iterator, end)
            except Exception as raised:  # carried over to whoever asked
                error = raised
            try:
                loop.call_soon_threadsafe(answer, future, item, error)
            except RuntimeError:  # the loop was closed meanwhile: nobody asks any more
                return

    threading.Thread(target=serve, name="rlar-reader", daemon=True).start()
    try:
        while True:
            future = loop.create_future()
            asked.put(future)
            item = await future
            if item is end:
                return
            yield item
    finally:
        asked.put(None)


async def in_order(
    work: Callable[[Item], Awaitable[Result]], items: AsyncIterator[Item], *, at_once: int, ahead: int = 64
) -> AsyncIterator[Result]:
    """The results of a piece of work on every item, in the order of the items, each as soon as those before are out.

    Args:
        work: What is done with an item.
        items: The items.
        at_once: How many are worked on at the same time.
        ahead: How many items may have been taken beyond the one whose result is given next.
    """
    slots = asyncio.Semaphore(at_once)
    started: asyncio.Queue[asyncio.Task[Result] | None] = asyncio.Queue(ahead)
    tasks: set[asyncio.Task[Result]] = set()

    async def one(item: Item) -> Result:
        async with slots:
            return await work(item)

    async def start() -> None:
        try:
            async for item in items:
                task = asyncio.ensure_future(one(item))
                tasks.add(task)
                await started.put(task)
        finally:
            await started.put(None)

    starter = asyncio.ensure_future(start())
    try:
        while (task := await started.get()) is not None:
            yield await task
            tasks.discard(task)
        await starter
    finally:
        starter.cancel()
        for task in tasks:
            task.cancel()
        while not started.empty():
            started.get_nowait()
        await asyncio.gather(starter, *tasks, return_exceptions=True)
