# SPDX-License-Identifier: Apache-2.0
"""The service: what a run knows, in one place. The only file that imports ray.

Reward workers are many and each response of a GRPO group lands on another one, so everything that they must agree on is
decided here: which tools are live at a step, the route of each prompt, and the mean of a group's scores. It is also the
only writer of the ledger. `Service` is plain Python; a `Client` finds it, or starts it, as a named Ray actor.

Guarantees: a route is in the ledger before anybody gets it, so that a service that was killed and came back decides
nothing twice; Ray starts a dead service again and clients try until their deadline, so its death costs a moment; every
wait has a deadline; a full disk delays rows, it does not stop the training.

Not covered: the tools of a run are those it started with (they will change at step boundaries, `at` is that seam). Rows
are sent to the service within `rlar.ledger.flush_s`, off the scoring path: a reward worker that is killed takes the
rows of its last moments along (verl does not survive the death of a reward worker either)."""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from collections import Counter, OrderedDict, deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from verl_rlar.config import RlarConfig
from verl_rlar.errors import LedgerError, ServiceUnreachable, TooManyUnscored
from verl_rlar.ledger import FILE_NAME, Ledger, Row
from verl_rlar.library import builtin_snapshot
from verl_rlar.router import FeatureRouter, RouteCache
from verl_rlar.types import Query, Route, Snapshot

logger = logging.getLogger(__name__)

ACTOR_NAME = "rlar_service"
GROUPS_KEPT = 20_000
"""Number of latest groups whose values are kept in memory; older ones are read from the ledger."""
STEPS_KEPT = 8
"""Number of latest steps whose snapshots a client keeps."""
ROWS_WAITING = 100_000
"""Number of rows that a client keeps while the ledger cannot be written."""
ROWS_PER_CALL = 500
START_TIMEOUT_S = 300.0
"""How long the start of the service may take, imports included, in seconds."""
RECONNECT_S = 0.2
"""Pause between two calls to a service that does not answer, in seconds."""


class Group:
    """The values of one GRPO group, as they come in."""

    def __init__(self, known: dict[int, float | None]) -> None:
        self.values = known
        """By session: the value, or None for an unscored response."""
        self.changed = asyncio.Event()

    def set(self, session: int, value: float | None) -> None:
        self.values[session] = value
        self.changed.set()
        self.changed = asyncio.Event()

    def mean(self) -> float | None:
        scored = [value for value in self.values.values() if value is not None]
        return sum(scored) / len(scored) if scored else None


class Service:
    """See the module.

    Args:
        config: The settings of the run.
        token: Names this start of training, for the ledger.
    """

    def __init__(self, config: RlarConfig, token: str) -> None:
        self._config = config
        self._snapshot = builtin_snapshot()
        self._ledger = Ledger(Path(config.run_dir) / FILE_NAME, token=token, store_texts=config.ledger.store_responses)
        self._ledger.add_tools(self._snapshot)
        router = FeatureRouter(config.routing)
        router.check(self._snapshot)
        self._routes = RouteCache(_Journaled(router, self._ledger))
        self._groups: OrderedDict[str, Group] = OrderedDict()
        self._recent: deque[tuple[bool, str]] = deque(maxlen=config.scoring.unscored_window)

    async def at(self, step: int) -> Snapshot:
        """The tools that are live at a step (I1)."""
        return self._snapshot

    async def route(self, query: Query, snapshot: Snapshot) -> Route:
        """The route of a query on a snapshot, decided once (I2)."""
        return await self._routes.route(query, snapshot)

    async def record(self, rows: Sequence[Row]) -> None:
        """Puts rows into the ledger, and wakes who waits for them.

        Raises:
            LedgerError: They could not be written; send them again.
        """
        self._ledger.add(rows)
        for row in rows:
            self._group(row.sample.uid).set(row.sample.session, row.score.value)
            if row.sample.split == "train":
                self._recent.append((row.score.value is None, f"{row.route.name}: {row.score.reason}"))

    async def sibling_mean(self, uid: str, session: int, group_size: int, timeout_s: float) -> float | None:
        """Reports a response as unscored, and waits until all its siblings are known.

        Returns:
            The mean of the scored siblings. None if none was scored, or if they are not all known in time.
        """
        group = self._group(uid)
        group.set(session, None)
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout_s
        while len(group.values) < group_size:
            try:
                await asyncio.wait_for(group.changed.wait(), end - loop.time())
            except (TimeoutError, asyncio.TimeoutError):
                logger.warning(
                    "group %s: %d of %d responses known after %g s", uid, len(group.values), group_size, timeout_s
                )
                return None
        return group.mean()

    async def begin_step(self, step: int) -> None:
        """Called at each step boundary, before the step's prompts are sent out.

        Raises:
            TooManyUnscored: The share of unscored responses in the window is above ``rlar.scoring.max_unscored``.
        """
        limit, recent = self._config.scoring.max_unscored, self._recent
        unscored = [reason for is_unscored, reason in recent if is_unscored]
        if limit < 1 and len(recent) == recent.maxlen and len(unscored) > limit * len(recent):
            worst = "; ".join(f"{count}x {reason}" for reason, count in Counter(unscored).most_common(3))
            raise TooManyUnscored(
                f"before step {step}: {len(unscored)} of the last {len(recent)} responses could not be scored (limit "
                f"rlar.scoring.max_unscored={limit:g}). Most frequent: {worst}. Mend the tool, or the data (`rlar "
                "plan` shows which rows no tool fits), or raise the limit; training resumes from the last checkpoint."
            )

    async def pid(self) -> int:
        """The service's process id, for those who want to see it die."""
        return os.getpid()

    def _group(self, uid: str) -> Group:
        group = self._groups.get(uid)
        if group is None:
            group = self._groups[uid] = Group(self._ledger.group(uid))
            while len(self._groups) > GROUPS_KEPT:
                self._groups.popitem(last=False)
        return group


class _Journaled:
    """A router whose decisions are in the ledger before they are known to anybody."""

    def __init__(self, router: FeatureRouter, ledger: Ledger) -> None:
        self._router = router
        self._ledger = ledger

    async def route(self, query: Query, snapshot: Snapshot) -> Route:
        known = self._ledger.route(query, snapshot)
        if known is not None:
            return known
        route = await self._router.route(query, snapshot)
        self._ledger.add_route(query, route)
        return route


class Client:
    """A process's access to the service. Made when the service answers. Use from one event loop, but for `begin_step`.

    Args:
        config: The settings of the run; whoever comes first starts the service with them.

    Raises:
        ServiceUnreachable: It did not start in time, or cannot, for example as its ledger cannot be opened.
    """

    def __init__(self, config: RlarConfig) -> None:
        self._config = config
        service: Any = ray.remote(Service)
        options = {"name": ACTOR_NAME, "get_if_exists": True, "max_restarts": -1, "max_concurrency": 10_000}
        self._actor = service.options(num_cpus=0, **options).remote(config, uuid.uuid4().hex)
        try:
            ray.get(self._actor.pid.remote(), timeout=START_TIMEOUT_S)
        except ray.exceptions.RayActorError as error:
            raise ServiceUnreachable(f"the rlar service cannot start: {str(error).strip().splitlines()[-1]}") from error
        except ray.exceptions.GetTimeoutError as error:
            raise ServiceUnreachable(f"the rlar service did not start within {START_TIMEOUT_S:g} s") from error
        self._snapshots: dict[int, Snapshot] = {}
        self._routes = RouteCache(_Remote(self))
        self._rows: deque[Row] = deque(maxlen=ROWS_WAITING)
        self._sender: asyncio.Task[None] | None = None

    async def at(self, step: int) -> Snapshot:
        """See `Service.at`; asked once per step."""
        snapshot = self._snapshots.get(step)
        if snapshot is None:
            snapshot = self._snapshots[step] = await self._call("at", step, timeout_s=self._config.service_timeout_s)
            for old in sorted(self._snapshots)[:-STEPS_KEPT]:
                del self._snapshots[old]
        return snapshot

    async def route(self, query: Query, snapshot: Snapshot) -> Route:
        """See `Service.route`; asked once per query and snapshot."""
        return await self._routes.route(query, snapshot)

    async def sibling_mean(self, uid: str, session: int, group_size: int) -> float | None:
        """See `Service.sibling_mean`; None also if the service cannot be reached in time."""
        timeout_s = self._config.scoring.sibling_timeout_s
        try:
            return await self._call("sibling_mean", uid, session, group_size, timeout_s, timeout_s=timeout_s + 5.0)
        except ServiceUnreachable as error:
            logger.warning("%s", error)
            return None

    def record(self, row: Row) -> None:
        """Hands a row over; it is sent within ``rlar.ledger.flush_s``, and again until the service has taken it."""
        if len(self._rows) == ROWS_WAITING:
            logger.error("the ledger is behind by %d rows, the oldest is lost; see earlier warnings", ROWS_WAITING)
        self._rows.append(row)
        if self._sender is None or self._sender.done():
            self._sender = asyncio.get_running_loop().create_task(self._send())

    async def flush(self) -> None:
        """Returns when every row that was handed over is in the ledger."""
        while self._sender is not None and not self._sender.done():
            await asyncio.shield(self._sender)

    def begin_step(self, step: int) -> None:
        """See `Service.begin_step`. Blocks; a service that cannot be reached is logged, as the step can do without.

        Raises:
            TooManyUnscored: See there.
        """
        try:
            ray.get(self._actor.begin_step.remote(step), timeout=self._config.service_timeout_s)
        except TooManyUnscored:
            raise
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
            logger.warning("step %d begins without its check: the service does not answer (%s)", step, error)

    async def _send(self) -> None:
        while self._rows:
            await asyncio.sleep(self._config.ledger.flush_s)
            batch = [self._rows.popleft() for _ in range(min(len(self._rows), ROWS_PER_CALL))]
            try:
                await self._call("record", batch, timeout_s=self._config.service_timeout_s)
            except (LedgerError, ServiceUnreachable) as error:
                logger.warning("%d rows wait for the ledger: %s", len(batch) + len(self._rows), error)
                self._rows.extendleft(reversed(batch))
                await asyncio.sleep(1.0)

    async def _call(self, method: str, *args: Any, timeout_s: float) -> Any:
        """Calls the service; while it is dead and Ray starts it again, tries until the deadline."""
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout_s
        while True:
            try:
                return await asyncio.wait_for(getattr(self._actor, method).remote(*args), end - loop.time())
            except (ray.exceptions.RayActorError, TimeoutError, asyncio.TimeoutError) as error:
                if loop.time() + RECONNECT_S >= end:
                    raise ServiceUnreachable(
                        f"the rlar service did not answer `{method}` within {timeout_s:g} s ({type(error).__name__})"
                    ) from error
                await asyncio.sleep(RECONNECT_S)


class _Remote:
    """The service as a router, for a client's cache."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def route(self, query: Query, snapshot: Snapshot) -> Route:
        client = self._client
        return await client._call("route", query, snapshot, timeout_s=client._config.service_timeout_s)
