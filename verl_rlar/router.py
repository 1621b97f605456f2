# SPDX-License-Identifier: Apache-2.0
"""Which tools score a query, decided from the query's own features.

`Router` is the seam: one method, from a query and a snapshot to a route. `FeatureRouter` is the first one: it needs no
LLM and no evidence. A route that the settings declare (`rlar.routing.routes`) and whose conditions the query meets
comes first; else it is the first live tool whose scope covers the most specific kind of check that the row makes
possible.
`RouteCache` makes any router decide once per (snapshot, split, query), with all callers waiting for that decision.

Guarantees: a route is a function of the query, the snapshot and the split (training or validation), never of a
response, a step or a data set's name (I2); weights may depend on the step, and stand in the route as a schedule. A
query that no tool fits gets an explicit uncovered route, with the reason. Which of several tools applies is decided
here, by their scopes: a tool that abstains from a response later on makes it unscored, as another tool in its place
would put two rulers into one group.

Not covered: tools are not compared by evidence; a second kind of check of a row (constraints on a math question) is
reported by `rlar plan` but not scored unless a declared route says so.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import Protocol

from verl_rlar.config import PartConfig, RouteConfig, RoutingConfig
from verl_rlar.errors import ConfigError
from verl_rlar.features import describe
from verl_rlar.types import Kind, Query, Route, RoutePart, Snapshot, Split, ToolSpec


class Router(Protocol):
    async def route(self, query: Query, snapshot: Snapshot, split: Split = "train") -> Route:
        """Decides which of the snapshot's tools score the responses to a query, in training or in validation."""
        ...


class FeatureRouter:
    """Routes by what the settings declare, else by what the row makes checkable."""

    def __init__(self, config: RoutingConfig) -> None:
        self._config = config

    def check(self, snapshot: Snapshot) -> None:
        """Raises `ConfigError` if the settings name a tool that is not in the snapshot."""
        named = [("fallback", self._config.fallback)]
        named += [(f"prefer.{kind.value}", name) for kind, name in self._config.prefer.items()]
        for label, declared in self._config.routes.items():
            named += [(f"routes.{label}", name) for part in declared.parts for name in _names(part)]
        for label, name in named:
            if name is not None and name not in {tool.name for tool in snapshot.tools}:
                names = ", ".join(tool.name for tool in snapshot.tools)
                raise ConfigError(f"rlar.routing.{label}: there is no tool {name!r}; there are: {names}")

    async def route(self, query: Query, snapshot: Snapshot, split: Split = "train") -> Route:
        features = describe(query)
        for name, declared in self._config.routes.items():
            if (
                declared.split in (None, split)
                and (not declared.kinds or features.kind in declared.kinds)
                and all(query.extra.get(column) is not None for column in declared.columns)
                and (route := _declared(name, declared, query, features.kind, snapshot))
            ):
                return route
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
        fitting = [tool for tool in snapshot.tools if not tool.gate and kind in tool.scope.kinds and tool.fits(query)]
        preferred = self._config.prefer.get(kind)
        return next((tool for tool in fitting if tool.name == preferred), fitting[0] if fitting else None)


def _route(
    scorer: ToolSpec, gates: list[ToolSpec], snapshot: Snapshot, *, kind: Kind, covered: bool, reason: str
) -> Route:
    parts = [RoutePart(tool=gate.name, digest=gate.digest, weight=0.0, gate=True) for gate in gates]
    parts.append(RoutePart(tool=scorer.name, digest=scorer.digest))
    return Route(parts=tuple(parts), reason=reason, kind=kind, covered=covered, snapshot=snapshot.version)


def _declared(name: str, declared: RouteConfig, query: Query, kind: Kind, snapshot: Snapshot) -> Route | None:
    """The route that the settings declare; None if one of its parts has no live tool for the query."""
    live = {tool.name: tool for tool in snapshot.tools}
    parts = []
    for part in declared.parts:
        names = [named for named in _names(part) if named in live]
        fitting = [named for named in names if kind in live[named].scope.kinds and live[named].fits(query)]
        chosen = next(iter(names if isinstance(part.tool, str) else fitting), None)
        if chosen is None:
            return None
        parts.append(
            RoutePart(
                tool=chosen,
                digest=live[chosen].digest,
                weight=0.0 if part.gate else part.knots[0][1],
                schedule=() if part.gate or len(part.knots) == 1 else part.knots,
                gate=part.gate,
                threshold=part.threshold,
            )
        )
    reason = f"{kind.value}: declared as rlar.routing.routes.{name}"
    return Route(parts=tuple(parts), reason=reason, kind=kind, covered=True, snapshot=snapshot.version)


def _names(part: PartConfig) -> tuple[str, ...]:
    return (part.tool,) if isinstance(part.tool, str) else part.tool


class RouteCache:
    """A router that decides once per (snapshot, split, query); callers that come meanwhile wait for that decision.

    A decision that fails is not kept: the next caller tries again. Bounded: the least recently used is forgotten.
    """

    def __init__(self, router: Router, *, size: int = 100_000) -> None:
        self._router = router
        self._size = size
        self._routes: OrderedDict[tuple[str, str, str], asyncio.Future[Route]] = OrderedDict()

    async def route(self, query: Query, snapshot: Snapshot, split: Split = "train") -> Route:
        key = (snapshot.version, split, query.key)
        decision = self._routes.get(key)
        if decision is None:
            decision = self._routes[key] = asyncio.ensure_future(self._router.route(query, snapshot, split))
            decision.add_done_callback(lambda done: self._forget_failed(key, done))
            while len(self._routes) > self._size:
                self._routes.popitem(last=False)
        else:
            self._routes.move_to_end(key)
        return await asyncio.shield(decision)

    def _forget_failed(self, key: tuple[str, str, str], done: asyncio.Future[Route]) -> None:
        if (done.cancelled() or done.exception() is not None) and self._routes.get(key) is done:
            del self._routes[key]
