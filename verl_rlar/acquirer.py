# SPDX-License-Identifier: Apache-2.0
"""`Acquirer`: has tools looked for while a training runs (`rlar.acquire`).

It keeps what the latest responses were to. Where a cluster without a competent tool (`verl_rlar.acquisition.shortfall`,
or one whose tools leave too much unscored) is a large enough share of them, the work of
`verl_rlar.acquisition.acquire` is started in a process of its own, with some of its queries: one at a time, the gap
first by which most is to be gained, each once, and `rlar.acquire.gaps` in all. Whoever watches the run may ask for one,
too (`ask`); that comes first.
What was admitted is handed in at the library's inbox, for the shadow: from there the tool goes its way like any other
(`verl_rlar.fleet`, `verl_rlar.life`).

Guarantees: the training never waits for it; the process has the lowest priority, ends at `rlar.acquire.wall_s`, and
with the service; a gap for which nothing was found is left for `again_after` steps; what came of each is in the log,
and all of it in a transcript beside those of agents.

Not covered: a service that comes back begins to count anew, and may look for the same once more. A model is examined on
the CPU, by the back-end `transformers`: GPUs belong to the training and to what is served.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from verl_rlar.acquisition import CHANCE, Gap, Shortfalls, acquire, shortfall
from verl_rlar.agents import session
from verl_rlar.clusters import Clusters
from verl_rlar.competence import NOTHING, Competence
from verl_rlar.config import RlarConfig, parse
from verl_rlar.errors import RlarError
from verl_rlar.inbox import hand_in
from verl_rlar.ledger import Row
from verl_rlar.library import LibraryView
from verl_rlar.types import Kind, Message, Query, Route, Snapshot

logger = logging.getLogger(__name__)

WORK = "verl_rlar.acquirer:work"
PASSED_ON = ("DOCKER_HOST", "DOCKER_TLS_VERIFY", "DOCKER_CERT_PATH", "OMP_NUM_THREADS")
"""Variables that the process gets beside those of an agent."""


class Acquirer:
    """See the module. Use from one event loop.

    Args:
        config: The settings of the run.
        library: Folder of the library.
        work: What is done in the process, as ``module:function``.
        competence: What is known of a snapshot's tools.
        clusters: Know their names.
    """

    def __init__(
        self,
        config: RlarConfig,
        library: Path,
        work: str = WORK,
        competence: Callable[[Snapshot], Competence] = lambda snapshot: NOTHING,
        clusters: Clusters | None = None,
    ) -> None:
        self._config = config
        self._competence = competence
        self._clusters = clusters
        self._library = library.resolve()
        self._work = work
        self._seen: deque[tuple[Query, Route, bool]] = deque(maxlen=config.acquire.window)
        """Of each of the latest responses: its query, its route, and whether it was scored."""
        self._tried: dict[str, int] = {}
        """By gap, the step at which a tool was looked for last."""
        self._worked_on = 0
        self._toolset, self._since = "", 0
        """The live tools, and the step from which on they are: what was routed before says nothing of them."""
        self._asked: dict[tuple[Kind, str], str] = {}
        """By kind and cluster, why a tool is to be looked for in any case."""
        self._task: asyncio.Task[None] | None = None

    def saw(self, row: Row) -> None:
        """Takes note of a training response."""
        if row.sample.step >= self._since:
            self._seen.append((row.sample.query, row.route, row.score.value is not None))

    def ask(self, kind: Kind, cluster: str, why: str) -> None:
        """Has a tool looked for, however small the share of these queries is, whatever scores them, and whenever that
        was tried last; within `rlar.acquire.gaps`.

        Args:
            kind: Their kind.
            cluster: Id of their cluster; empty: all of the kind.
            why: What was seen, for the log.
        """
        self._asked[kind, cluster] = why

    def begin_step(self, step: int, snapshot: Snapshot) -> None:
        """Starts what is due, if nothing is being done.

        Args:
            step: The step that begins.
            snapshot: Its tools.
        """
        config = self._config.acquire
        if self._toolset != snapshot.toolset:
            self._since = step
            self._seen.clear()
        self._toolset = snapshot.toolset
        if not config.enabled or (self._task is not None and not self._task.done()):
            return
        if self._worked_on >= config.gaps:
            return
        gap = self._asked_for(step)
        if gap is None and len(self._seen) == config.window:
            gap = self._gap(step, snapshot)
        if gap is not None:
            self._tried[_place(gap)] = step
            self._worked_on += 1
            logger.warning(
                "before step %d: %.0f %% of the responses are to %s without a competent tool: %s; the %s looks for one",
                step,
                100 * gap.share,
                gap.title,
                gap.reason,
                gap.way,
            )
            self._task = asyncio.get_running_loop().create_task(self._acquire(gap))

    def _asked_for(self, step: int) -> Gap | None:
        for (kind, cluster), why in list(self._asked.items()):
            found = Shortfalls()
            for query, route, _ in self._seen:
                mine = route.kind is kind and cluster in ("", route.cluster)
                found.add(query, kind, cluster, (1.0 - CHANCE, why) if mine else None)
            for gap in found.gaps(self._config, self._clusters, 0.0):
                del self._asked[kind, cluster]
                if gap.way != "nobody":
                    return gap
                logger.warning("before step %d: %s, %s: %s", step, gap.title, why, gap.plan)
        return None

    def _gap(self, step: int, snapshot: Snapshot) -> Gap | None:
        config = self._config.acquire
        arriving = {kind for tool in snapshot.shadows for kind in tool.scope.kinds}
        for gap in self._gaps(snapshot):
            if gap.kind in arriving:  # it may be that what is in the shadow fills it
                continue
            if step - self._tried.get(_place(gap), -config.again_after) < config.again_after:
                continue
            if gap.way != "nobody":
                return gap
            self._tried[_place(gap)] = step
            logger.warning("before step %d: %s have no competent tool: %s", step, gap.title, gap.plan)
        return None

    def _gaps(self, snapshot: Snapshot) -> tuple[Gap, ...]:
        config, competence = self._config.acquire, self._competence(snapshot)
        responses = Counter(route.cluster for _, route, _ in self._seen)
        unscored = Counter(route.cluster for _, route, scored in self._seen if not scored and route.covered)
        known: dict[Route, tuple[float, str] | None] = {}
        found = Shortfalls()
        for query, route, scored in self._seen:
            if route not in known:
                known[route] = shortfall(route, snapshot, competence, config.competent)
            short, left = known[route], unscored[route.cluster] / responses[route.cluster]
            if short is None and not scored and left >= config.unscored:
                short = 1.0 - CHANCE, f"{route.name} left responses unscored"
            found.add(query, route.kind, route.cluster, short)
        return found.gaps(self._config, self._clusters, config.share)

    async def _acquire(self, gap: Gap) -> None:
        told_of = asdict(gap) | {"kind": gap.kind.value}
        order = {
            "config": self._config.model_dump(mode="json"),
            "library": str(self._library),
            "gap": json.loads(json.dumps(told_of, default=str)),  # columns of rows may hold anything
        }
        secrets = [self._config.agents.api_key_env, self._config.hub.token_env, *PASSED_ON]
        folder = Path(self._config.agents.transcripts or Path(self._config.run_dir) / "agents")
        told: list[Mapping[str, Any]] = []
        try:
            ended = await asyncio.to_thread(
                session.run,
                self._work,
                order,
                folder=folder,
                name=f"acquire-{gap.kind.value}",
                wall_s=self._config.acquire.wall_s,
                secrets=secrets,
                on_event=told.append,
            )
        except RlarError as error:
            logger.warning("no tool for %s: %s", gap.title, error)
            return
        came = [event for event in told if event.get("event") == "acquired"]
        if came:
            said = f"{came[-1]['why']}" + (", and is handed in for the shadow" if came[-1]["tool"] else "")
        else:
            said = f"{ended.how}: {ended.detail}"
        logger.warning("%s: %s (transcript %s)", gap.title, said, ended.transcript)


def _place(gap: Gap) -> str:
    """What a gap is remembered by."""
    return gap.cluster or gap.kind.value


def work(order: Mapping[str, Any], emit: Callable[[dict[str, Any]], None]) -> None:
    """Looks for a tool, in a process of its own, and hands it in.

    Raises:
        RlarError: See `verl_rlar.acquisition.acquire`.
    """
    os.nice(19)
    config = parse(order["config"]).beside_training()
    told = order["gap"]
    queries = tuple(
        Query(**{**query, "messages": tuple(Message(**message) for message in query["messages"])})
        for query in told["queries"]
    )
    gap = Gap(**{**told, "kind": Kind(told["kind"]), "queries": queries})
    library = Path(order["library"])
    view = LibraryView(library)
    acquired = asyncio.run(
        acquire(
            gap,
            config.acquire.labelled,
            config,
            models=config.acquire.models,
            taken=[view.spec(digest) for digest in view.digests()],
            event="shadow",
        )
    )
    if acquired.submission is not None:
        hand_in(library, acquired.submission)
    emit({"event": "acquired", **acquired.as_dict()})
