# SPDX-License-Identifier: Apache-2.0
"""`Dispatcher`: the router, the tools and the scorer of a training run in one process, without verl, Ray or a ledger.

For whoever scores outside a training: `rlar score`, `rlar plan`, notebooks, tests.

Guarantees: the same snapshot, routing rule, deadlines and scores as in training with the same settings; the start of
the worker processes is not charged to the first call's deadline; leaving the context ends all worker processes.

Not covered: nothing is recorded, and an unscored sample has no siblings whose mean could stand in for it.
"""

from __future__ import annotations

import asyncio
from types import TracebackType

from verl_rlar.config import RlarConfig
from verl_rlar.errors import ToolUnavailable
from verl_rlar.library import builtin_snapshot
from verl_rlar.router import FeatureRouter, RouteCache
from verl_rlar.scoring import Scorer
from verl_rlar.tools.runner import RuleRunner
from verl_rlar.types import Message, Query, Route, Sample, Score, Snapshot

START_S = 120.0
"""Deadline of the start of the worker processes, in seconds: they import all the rules."""


class Dispatcher:
    """Routes queries and scores samples. Use as ``async with Dispatcher(config) as dispatcher``.

    Args:
        config: The same settings as under `rlar.*` in training.
        snapshot: The live tools; None: the built-in ones.

    Raises:
        ConfigError: The settings name a tool that is not live.
    """

    def __init__(self, config: RlarConfig, snapshot: Snapshot | None = None) -> None:
        self.snapshot = builtin_snapshot() if snapshot is None else snapshot
        self.at_once = config.rules.processes
        """How many samples to score at the same time: with more, some would spend their deadline in the queue."""
        router = FeatureRouter(config.routing)
        router.check(self.snapshot)
        self._routes = RouteCache(router, size=10_000)
        self._runner = RuleRunner(config.rules, tuple(tool.target for tool in self.snapshot.tools))
        self._scorer = Scorer(config.scoring, self._runner)
        self._ready: asyncio.Future[None] | None = None

    async def __aenter__(self) -> Dispatcher:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._ready is not None:
            self._ready.cancel()
        self._runner.close()

    async def route(self, query: Query) -> Route:
        """Decides which tools score the responses to a query. Starts no process."""
        return await self._routes.route(query, self.snapshot)

    async def score(self, sample: Sample, route: Route | None = None) -> Score:
        """Scores a sample by a route; None: by the route of its query.

        Raises:
            ToolUnavailable: The worker processes do not start.
        """
        if self._ready is None:
            self._ready = asyncio.ensure_future(self._start())
        await asyncio.shield(self._ready)
        return await self._scorer.score(sample, route or await self.route(sample.query), self.snapshot)

    async def _start(self) -> None:
        """Returns when the workers have imported their rules: once each has been called, whatever it answered."""
        sample = Sample(query=Query(messages=(Message(role="user", content=""),)), response="")
        calls = (self._runner.run(self.snapshot.tools[0], sample) for _ in range(self.at_once))
        try:
            await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), START_S)
        except (TimeoutError, asyncio.TimeoutError):
            raise ToolUnavailable(f"the worker processes of the rules did not start within {START_S:g} s") from None
