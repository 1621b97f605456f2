# SPDX-License-Identifier: Apache-2.0
"""What a reward worker does beside the scoring path: tools in the shadow score, and canaries are scored again.

Guarantees: nothing here can hold up, change or fail a response's score: it is done after the score went out, one call
at a time, by the same `Scorer` with the same deadlines; what does not fit into the queue is left out and counted.
Groups are taken whole or not at all, by their ids. Canaries go first, so a slow tool in the shadow holds them up by one
call at most, and none is left out. One that flips is asked once more.

Not covered: a shadow's calls share the node's boxes and servers with live ones.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Coroutine
from typing import Any, Protocol

from verl_rlar.config import LifeConfig
from verl_rlar.errors import LedgerError, ServiceUnreachable
from verl_rlar.exam.canaries import Canary
from verl_rlar.ledger import CanaryRow, ShadowRow
from verl_rlar.scoring import Scorer
from verl_rlar.types import Kind, Sample, Snapshot, ToolSpec, content_hash

logger = logging.getLogger(__name__)

WAITING = 2_000
"""Calls that wait at most."""
SENT_TOGETHER = 64
"""Results that are sent in one call at most."""
SENT_AFTER_S = 1.0
"""What there is by then is sent with the call that ends next, in seconds since the first of them was made."""


class Watcher(Protocol):
    """Who takes the results: `verl_rlar.service.Client`."""

    async def canaries(self, step: int) -> tuple[tuple[ToolSpec, tuple[Canary, ...]], ...]: ...

    async def saw(self, shadows: tuple[ShadowRow, ...], canaries: tuple[CanaryRow, ...]) -> None: ...


class Shadow:
    """See the module. Use from one event loop.

    Args:
        config: How much of it.
        scorer: Runs the tools.
        watcher: Says which canaries are due, and takes what came of it all.
    """

    def __init__(self, config: LifeConfig, scorer: Scorer, watcher: Watcher) -> None:
        self._config = config
        self._scorer = scorer
        self._watcher = watcher
        self._canaries: deque[tuple[ToolSpec, Sample, Canary]] = deque()
        self._calls: deque[tuple[ToolSpec, Sample]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._working: asyncio.Task[None] | None = None
        self._asked: set[int] = set()
        self.left_out = 0
        """Number of calls that there was no room for."""

    def scored(self, sample: Sample, kind: Kind, snapshot: Snapshot) -> None:
        """Takes note of a training response whose score went out."""
        if self._config.canary_every and sample.step not in self._asked:
            self._asked = {step for step in self._asked if step > sample.step - 8} | {sample.step}
            self._begin(self._fetch(sample.step))
        drawn = int(content_hash(sample.uid)[:8], 16) < self._config.shadow_share * 2**32
        for spec in snapshot.shadows if drawn else ():
            if kind in spec.scope.kinds and spec.fits(sample.query):
                self._put(spec, sample)

    async def flush(self) -> None:
        """Returns when nothing waits any more."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _put(self, spec: ToolSpec, sample: Sample) -> None:
        if len(self._calls) >= WAITING:
            if not self.left_out:
                logger.warning("%s does not keep up in the shadow: some responses are left out", spec.name)
            self.left_out += 1
            return
        self._calls.append((spec, sample))
        self._work()

    def _work(self) -> None:
        """Sees to it that calls are made."""
        if self._working is None or self._working.done():
            self._working = self._begin(self._all())

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _fetch(self, step: int) -> None:
        """Gets the canaries of a step, however much waits in the shadow."""
        try:
            due = await self._watcher.canaries(step)
        except (ServiceUnreachable, LedgerError) as error:
            logger.warning("canaries of step %d were not scored: %s", step, error)
            return
        self._canaries += ((spec, canary.sample(step), canary) for spec, canaries in due for canary in canaries)
        self._work()

    async def _all(self) -> None:
        while self._canaries or self._calls:
            try:
                await self._some()
            except (ServiceUnreachable, LedgerError) as error:
                logger.warning("results of shadows and canaries were lost: %s", error)

    async def _some(self) -> None:
        shadows: list[ShadowRow] = []
        canaries: list[CanaryRow] = []
        end = time.monotonic() + SENT_AFTER_S
        while (self._canaries or self._calls) and len(shadows) + len(canaries) < SENT_TOGETHER:
            if self._canaries:
                spec, sample, canary = self._canaries.popleft()
                score = await self._scorer.call(spec, sample)
                if canary.flips(score.value, self._config.tolerance):
                    score = await self._scorer.call(spec, sample)  # what a moment's overload did is no flip
                canaries.append(CanaryRow(canary=canary.id, step=sample.step, score=score))
            else:
                spec, sample = self._calls.popleft()
                score = await self._scorer.call(spec, sample)
                shadows.append(ShadowRow(uid=sample.uid, session=sample.session, step=sample.step, score=score))
            if time.monotonic() >= end:
                break
        await self._watcher.saw(tuple(shadows), tuple(canaries))
