# SPDX-License-Identifier: Apache-2.0
"""The pool of boxes, on boxes that are not containers: who gets which, and what becomes of the broken ones."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager

import pytest

from verl_rlar.errors import ToolTimeout
from verl_rlar.sandbox import BoxLost
from verl_rlar.sandbox.pool import Pool


class Box:
    def __init__(self, number: int) -> None:
        self.number = number
        self.usable = True
        self.destroyed = False
        self.keys: list[Hashable] = []

    async def destroy(self) -> None:
        await asyncio.sleep(0)
        self.usable = False
        self.destroyed = True


class Engine:
    """Starts boxes, and keeps them in sight."""

    def __init__(self) -> None:
        self.boxes: list[Box] = []
        self.fails = 0
        self._numbers = itertools.count()
        self.most = 0
        self.pool: Pool[Box] | None = None

    async def start(self) -> Box:
        await asyncio.sleep(0)
        if self.fails:
            self.fails -= 1
            raise BoxLost("the engine is down")
        box = Box(next(self._numbers))
        self.boxes.append(box)
        self.most = max(self.most, sum(not box.destroyed for box in self.boxes))
        return box


@pytest.fixture
def engine() -> Engine:
    return Engine()


@asynccontextmanager
async def pool(
    engine: Engine, size: int = 2, spares: int = 1, queue_timeout_s: float = 5.0
) -> AsyncIterator[Pool[Box]]:
    made = Pool(engine.start, size=size, spares=spares, queue_timeout_s=queue_timeout_s)
    try:
        yield made
    finally:
        await made.close()
        assert all(box.destroyed for box in engine.boxes), "leaving destroys all"
        assert made.alive == 0


@asynccontextmanager
async def lease(pool: Pool[Box], key: str) -> AsyncIterator[Box]:
    async def assign(box: Box) -> None:
        box.keys.append(key)

    async with pool.lease(key, assign) as box:
        assert box.keys == [key], "a box belongs to one key"
        assert box.usable
        yield box


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_box_is_used_again_by_the_same_key_and_never_by_another(engine: Engine) -> None:
    async with pool(engine) as boxes:
        seen: dict[str, set[int]] = {"a": set(), "b": set()}
        for key in "abababab":
            async with lease(boxes, key) as box:
                seen[key].add(box.number)
        assert len(seen["a"]) == len(seen["b"]) == 1 and seen["a"] != seen["b"]


async def test_an_engine_that_starts_no_box_is_not_asked_for_a_spare_after_each_job(engine: Engine) -> None:
    async with pool(engine, size=1) as boxes:
        await boxes.warm_up(1)
        await settle()
        engine.fails = failures = 1000
        for _ in range(50):  # the first of which takes the spare
            async with lease(boxes, "a"):
                pass
            await settle()
        assert 0 < failures - engine.fails <= 2
        engine.fails = 0


async def test_after_the_warm_up_nobody_waits_for_a_start(engine: Engine) -> None:
    async with pool(engine, size=3) as boxes:
        await boxes.warm_up(3)
        for key in ("a", "b", "c", "a", "b", "c"):
            async with lease(boxes, key):
                pass
        assert boxes.waited == 0


async def test_never_more_boxes_than_size_and_spares(engine: Engine) -> None:
    async with pool(engine, size=3, spares=2) as boxes:

        async def work(number: int) -> None:
            async with lease(boxes, f"key {number % 7}") as box:
                await asyncio.sleep(0)
                box.usable = number % 5 != 0

        await asyncio.gather(*(work(number) for number in range(300)))
        assert engine.most <= 5


async def test_a_broken_box_is_destroyed_and_never_handed_out_again(engine: Engine) -> None:
    async with pool(engine, size=1, spares=0) as boxes:
        async with lease(boxes, "a") as first:
            first.usable = False
        await settle()
        assert first.destroyed
        async with lease(boxes, "a") as second:
            assert second is not first


async def test_a_box_whose_preparation_was_cancelled_or_failed_is_never_handed_out(engine: Engine) -> None:
    begun = asyncio.Event()

    async def never(box: Box) -> None:
        begun.set()
        await asyncio.Event().wait()

    async def fails(box: Box) -> None:
        raise BoxLost("it does not answer")

    async with pool(engine, size=1, spares=0) as made:

        async def first() -> None:
            async with made.lease("a", never):
                raise AssertionError("it was never ready")

        task = asyncio.create_task(first())
        await begun.wait()
        task.cancel()
        await asyncio.wait([task])
        with pytest.raises(BoxLost, match="does not answer"):
            async with made.lease("a", fails):
                pass
        async with lease(made, "a") as box:
            assert box.number == 2
        assert [one.destroyed for one in engine.boxes] == [True, True, False]


async def test_a_box_that_died_while_idle_is_noticed(engine: Engine) -> None:
    async with pool(engine) as boxes:
        async with lease(boxes, "a") as first:
            pass
        first.usable = False
        async with lease(boxes, "a") as second:
            assert second is not first
        await settle()
        assert first.destroyed


async def test_a_spare_takes_the_place_of_a_broken_box_at_once(engine: Engine) -> None:
    async with pool(engine, size=1, spares=1) as boxes:
        async with lease(boxes, "a") as first:
            await settle()
            first.usable = False
        waited = boxes.waited
        async with lease(boxes, "a"):
            assert boxes.waited == waited


async def test_who_waits_is_served_in_order(engine: Engine) -> None:
    order: list[int] = []
    async with pool(engine, size=1, spares=0) as boxes:

        async def work(number: int) -> None:
            async with lease(boxes, "a"):
                order.append(number)
                await asyncio.sleep(0)

        await asyncio.gather(*(work(number) for number in range(20)))
    assert order == list(range(20))


async def test_an_idle_box_of_another_key_makes_room(engine: Engine) -> None:
    async with pool(engine, size=1, spares=0) as boxes:
        async with lease(boxes, "a") as first:
            pass
        async with lease(boxes, "b"):
            assert first.destroyed


async def test_a_key_that_is_passed_over_gets_its_box_in_the_end(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("verl_rlar.sandbox.pool.RECYCLE_S", 0.0)
    done: list[str] = []
    async with pool(engine, size=1, spares=0) as boxes:

        async def work(key: str) -> None:
            async with lease(boxes, key):
                await asyncio.sleep(0)
                done.append(key)

        await asyncio.gather(work("a"), work("b"), *(work("a") for _ in range(50)))
    assert done.index("b") < 10


async def test_waiting_has_a_deadline_and_the_message_says_what_to_raise(engine: Engine) -> None:
    async with pool(engine, size=1, spares=0, queue_timeout_s=0.01) as boxes, lease(boxes, "a"):
        with pytest.raises(ToolTimeout, match=r"rlar\.sandbox\.program_boxes"):
            async with lease(boxes, "a"):
                pass


async def test_a_caller_that_leaves_the_line_takes_no_box_along(engine: Engine) -> None:
    async with pool(engine, size=1, spares=0) as boxes:
        async with lease(boxes, "a"):
            left = asyncio.ensure_future(lease(boxes, "a").__aenter__())
            await settle()
        left.cancel()  # its box has just been handed over
        with pytest.raises(asyncio.CancelledError):
            await left
        async with lease(boxes, "a"):
            assert boxes.alive == 1


async def test_a_caller_that_has_left_the_line_is_passed_over(engine: Engine) -> None:
    async with pool(engine, size=1, spares=0) as boxes:
        async with lease(boxes, "a"):
            left, stays = (asyncio.ensure_future(lease(boxes, "a").__aenter__()) for _ in range(2))
            await settle()
            left.cancel()  # and its turn comes before it is told
        await asyncio.wait_for(stays, 1)
        assert left.cancelled()


async def test_an_engine_that_fails_is_the_error_of_those_who_wait_and_no_endless_loop(engine: Engine) -> None:
    engine.fails = 3
    async with pool(engine, size=2, spares=1) as boxes:
        with pytest.raises(BoxLost, match="the engine is down"):
            async with lease(boxes, "a"):
                pass
        await settle()
        assert engine.fails <= 2
        engine.fails = 0
        async with lease(boxes, "a"):
            pass


async def test_closing_answers_who_waits(engine: Engine) -> None:
    async with pool(engine, size=1, spares=0) as boxes:
        async with lease(boxes, "a"):
            waiting = asyncio.ensure_future(lease(boxes, "a").__aenter__())
            await settle()
            await boxes.close()
            with pytest.raises(BoxLost, match="closed"):
                await waiting
