# SPDX-License-Identifier: Apache-2.0
"""Values that are made once per key, however many ask for them at the same moment."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class Once(Generic[Key, Value]):
    """Makes a value when it is first asked for; who asks meanwhile waits for the same one. Use from one event loop.

    What fails is not kept: the next one who asks tries again. A caller that is cancelled does not end what others wait
    for.

    Args:
        size: Number of values that are kept; the least recently used goes first.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._made: OrderedDict[Key, asyncio.Future[Value]] = OrderedDict()

    async def get(self, key: Key, make: Callable[[], Awaitable[Value]]) -> Value:
        """The value of a key. Raises what `make` raised."""
        found = self._made.get(key)
        if found is None:
            found = self._made[key] = asyncio.ensure_future(make())
            found.add_done_callback(lambda done: self._forget_failed(key, done))
            while len(self._made) > self._size:
                self._made.popitem(last=False)
        else:
            self._made.move_to_end(key)
        return await asyncio.shield(found)

    def _forget_failed(self, key: Key, done: asyncio.Future[Value]) -> None:
        if (done.cancelled() or done.exception() is not None) and self._made.get(key) is done:
            del self._made[key]
