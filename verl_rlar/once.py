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

    def put(self, key: Key, value: Value) -> None:
        """Keeps a value that was made elsewhere, if there is none."""
        if key not in self._made:
            self._keep(key, asyncio.get_running_loop().create_future()).set_result(value)

    async def get(self, key: Key, make: Callable[[], Awaitable[Value]]) -> Value:
        """The value of a key. Raises what `make` raised."""
        found = self._made.get(key)
        if found is None:
            found = self._keep(key, asyncio.ensure_future(make()))
            found.add_done_callback(lambda done: self._forget_failed(key, done))
        else:
            self._made.move_to_end(key)
        return await asyncio.shield(found)

    def _keep(self, key: Key, made: asyncio.Future[Value]) -> asyncio.Future[Value]:
        self._made[key] = made
        while len(self._made) > self._size:
            self._made.popitem(last=False)
        return made

    def _forget_failed(self, key: Key, done: asyncio.Future[Value]) -> None:
        if (done.cancelled() or done.exception() is not None) and self._made.get(key) is done:
            del self._made[key]
