# SPDX-License-Identifier: Apache-2.0
"""Which tools score a query, decided from the query's own features.

`Router` is the seam: one method, from a query and a snapshot to a route. `FeatureRouter` is the first one: it needs no
LLM and no evidence, and takes the first live tool whose scope covers the most specific kind of check that the row makes
possible. `RouteCache` makes any router decide once per (snapshot, query), with all callers waiting for that decision.

Guarantees: a route is a function of the query and the snapshot, never of a response, a step or a data set's name (I2);
a query that no tool fits gets an explicit uncovered route, with the reason.

Not covered: tools are not compared by evidence; a second kind of check of a row (constraints on a math question) is
reported by `rlar plan` but not scored.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import Protocol

from verl_rlar.config import RoutingConfig
from verl_rlar.errors import ConfigError
from verl_rlar.features import describe
from verl_rlar.types import Kind, Query, Route, RoutePart, Snapshot, ToolSpec


class Router(Protocol):
    async def route(self, query: Query, snapshot: Snapshot) -> Route:
        """Decides which of the snapshot's tools score the responses to a query."""
        ...


class FeatureRouter:
    """Routes by what the row makes checkable."""

    def __init__(self, config: RoutingConfig) -> None:
        self._config = config

    def check(self, snapshot: Snapshot) -> None:
        """Raises `ConfigError` if the settings name a tool that is not in the snapshot."""
        for key, name in [("fallback", self._config.fallback), *self._config.prefer.items()]:
            label = f"prefer.{key.value}" if isinstance(key, Kind) else key
            if name is not None and name not in {tool.name for tool in snapshot.tools}:
                names = ", ".join(tool.name for tool in snapshot.tools)
                raise ConfigError(f"rlar.routing.{label}: there is no tool {name!r}; there are: {names}")

    async def route(self, query: Query, snapshot: Snapshot) -> Route:
        features = describe(query)
        gates = [tool for tool in snapshot.tools if tool.gate and tool.name in features.gates]
        for kind, evidence in features.kinds:
            if scorer := self._scorer(kind, query, snapshot):
                return _route(scorer, gates, snapshot, kind=kind, covered=True, reason=f"{kind.value}: {evidence}")
        kind, evidence = features.kinds[0]
        reason = f"uncovered: no tool for {kind.value} ({evidence})"
        fallback = next((tool for tool in snapshot.tools if tool.name == self._config.fallback), None)
        if fallback is None:
            return Route(parts=(), reason=reason, kind=kind, covered=False, snapshot=snapshot.version)
        return _route(fallback, gates, snapshot, kind=kind, covered=False, reason=f"{reason}; fallback")

    def _scorer(self, kind: Kind, query: Query, snapshot: Snapshot) -> ToolSpec | None:
        fitting = [
            tool
            for tool in snapshot.tools
            if not tool.gate and kind in tool.scope.kinds and (query.reference or not tool.scope.needs_reference)
        ]
        preferred = self._config.prefer.get(kind)
        return next((tool for tool in fitting if tool.name == preferred), fitting[0] if fitting else None)


def _route(
    scorer: ToolSpec, gates: list[ToolSpec], snapshot: Snapshot, *, kind: Kind, covered: bool, reason: str
) -> Route:
    parts = [RoutePart(tool=gate.name, digest=gate.digest, weight=0.0, gate=True) for gate in gates]
    parts.append(RoutePart(tool=scorer.name, digest=scorer.digest))
    return Route(parts=tuple(parts), reason=reason, kind=kind, covered=covered, snapshot=snapshot.version)


class RouteCache:
    """A router that decides once per (snapshot, query); callers that come meanwhile wait for the same decision.

    A decision that fails is not kept: the next caller tries again. Bounded: the least recently used is forgotten.
    """

    def __init__(self, router: Router, *, size: int = 100_000) -> None:
        self._router = router
        self._size = size
        self._routes: OrderedDict[tuple[str, str], asyncio.Future[Route]] = OrderedDict()

    async def route(self, query: Query, snapshot: Snapshot) -> Route:
        key = (snapshot.version, query.key)
        decision = self._routes.get(key)
        if decision is None:
            decision = self._routes[key] = asyncio.ensure_future(self._router.route(query, snapshot))
            decision.add_done_callback(lambda done: self._forget_failed(key, done))
            while len(self._routes) > self._size:
                self._routes.popitem(last=False)
        else:
            self._routes.move_to_end(key)
        return await asyncio.shield(decision)

    def _forget_failed(self, key: tuple[str, str], done: asyncio.Future[Route]) -> None:
        if (done.cancelled() or done.exception() is not None) and self._routes.get(key) is done:
            del self._routes[key]
