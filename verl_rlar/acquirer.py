# SPDX-License-Identifier: Apache-2.0
"""`Acquirer`: has tools looked for while a training runs (`rlar.acquire`).

It counts what the latest responses were to. Where a kind of query without a tool is a large enough share of them, the
work of `verl_rlar.acquisition.acquire` is started in a process of its own, one at a time, with some of these queries.
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

from verl_rlar.acquisition import SAMPLES, Gap, acquire, gap_of
from verl_rlar.agents import session
from verl_rlar.config import RlarConfig, parse
from verl_rlar.errors import RlarError
from verl_rlar.inbox import hand_in
from verl_rlar.ledger import Row
from verl_rlar.library import LibraryView
from verl_rlar.types import Kind, Message, Query

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
    """

    def __init__(self, config: RlarConfig, library: Path, work: str = WORK) -> None:
        self._config = config
        self._library = library.resolve()
        self._work = work
        self._seen: deque[tuple[Kind, bool, str, Query]] = deque(maxlen=config.acquire.window)
        """Of each of the latest responses: its kind, whether a tool fits it, the route's reason, and its query."""
        self._tried: dict[Kind, int] = {}
        """By kind, the step at which a tool was looked for last."""
        self._asked: dict[Kind, str] = {}
        """By kind, why a tool is to be looked for in any case."""
        self._task: asyncio.Task[None] | None = None

    def saw(self, row: Row) -> None:
        """Takes note of a training response."""
        self._seen.append((row.route.kind, row.route.covered, row.route.reason, row.sample.query))

    def ask(self, kind: Kind, cluster: str, why: str) -> None:
        """Has a tool looked for, for a kind of query, however small its share is and whenever it was tried last.

        Args:
            kind: Which kind.
            cluster: Id of the cluster that it is about.
            why: What was seen, for the log.
        """
        self._asked[kind] = f"{cluster}: {why}"

    def begin_step(self, step: int) -> None:
        """Starts what is due, if nothing is being done."""
        if not self._config.acquire.enabled or (self._task is not None and not self._task.done()):
            return
        gap = self._gap(step)
        if gap is not None:
            self._tried[gap.kind] = step
            logger.warning(
                "before step %d: %.0f %% of the responses are to %s queries %s: the %s looks for one",
                step,
                100 * gap.share,
                gap.kind.value,
                self._asked.pop(gap.kind, None) or "without a tool",
                gap.way,
            )
            self._task = asyncio.get_running_loop().create_task(self._acquire(gap))

    def _gap(self, step: int) -> Gap | None:
        config = self._config.acquire
        counts = Counter(kind for kind, covered, _, _ in self._seen if not covered)
        due = [kind for kind in self._asked if any(of is kind for of, *_ in self._seen)]
        if len(self._seen) == config.window:
            for kind, count in counts.most_common():
                tried = self._tried.get(kind, -config.again_after)
                if count >= config.share * len(self._seen) and step - tried >= config.again_after:
                    due.append(kind)
        for kind in dict.fromkeys(due):
            least = not counts[kind]  # asked for although a tool fits: what it is needed for, the alarm knows
            mine = {query.key: (query, why) for of, fits, why, query in self._seen if of is kind and fits is least}
            queries, reasons = zip(*list(mine.values())[:SAMPLES], strict=True)
            count = counts[kind] or sum(of is kind for of, *_ in self._seen)
            gap = gap_of(kind, count, len(self._seen), reasons[0], queries, self._config)
            if gap.way != "nobody":
                return gap
            self._tried[kind] = step
            self._asked.pop(kind, None)
            logger.warning("before step %d: %s queries have no tool: %s", step, kind.value, gap.plan)
        return None

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
            logger.warning("no tool for %s queries: %s", gap.kind.value, error)
            return
        came = [event for event in told if event.get("event") == "acquired"]
        if came:
            said = f"{came[-1]['why']}" + (", and is handed in for the shadow" if came[-1]["tool"] else "")
        else:
            said = f"{ended.how}: {ended.detail}"
        logger.warning("%s queries: %s (transcript %s)", gap.kind.value, said, ended.transcript)


def work(order: Mapping[str, Any], emit: Callable[[dict[str, Any]], None]) -> None:
    """Looks for a tool, in a process of its own, and hands it in.

    Raises:
        RlarError: See `verl_rlar.acquisition.acquire`.
    """
    os.nice(19)
    config = parse(order["config"])
    serving = {"backend": "transformers", "placement": "standalone", "gpus": (), "ray_gpus": 0}
    config = config.model_copy(update={"serving": config.serving.model_copy(update=serving)})
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
