# SPDX-License-Identifier: Apache-2.0
"""The service: what a run knows, in one place.

Reward workers are many and each response of a GRPO group lands on another one, so everything that they must agree on is
decided here: which tools are live at a step, the route of each prompt, and the mean of a group's scores. It is also the
only writer of the library and the ledger. `Service` is plain Python; a `Client` finds it, or starts it, as a named Ray
actor. What needs a sandbox or a served model runs in other actors, see `verl_rlar.nodes`.

Guarantees: a route is in the ledger before anybody gets it, so that a service that was killed and came back decides
nothing twice (while the disk is full it is kept in memory, and written before any row of it; a start of training with
other settings of routes decides anew); Ray starts a dead service again, or, where the process that started it is gone,
too, the first client that misses it; clients try until their deadline, so its death costs a moment; every wait has a
deadline; a full disk delays rows, it does not stop the training, and nobody waits for it. The code of a verifier
travels with its call, so a node needs neither the library's folder nor a memory of its own.

At a step boundary, before its prompts go out, tools change: what waits in the library's inbox is taken in, and what
`verl_rlar.life.Life` decides becomes an event. It watches every training response, what tools in the shadow gave, and
the canaries, which one reward worker per step is asked to score. What `verl_rlar.watch.Watch` finds odd about the run
is raised then, and what the settings say is done about it. Then `verl_rlar.fleet.Fleet` sees to it that the step's
reward models are served.

Reward workers may be many, and of a step's prompts each meets nearly all. So routes are decided while responses are
still generated, and a worker gets those of the step in one call, with the tools; what it has to ask beside while a call
is under way goes with the next one, and rows wait longer where the service is slow to take them. So more workers mean
fuller calls, not more of them.

Not covered: rows are sent to the service some `rlar.ledger.flush_s` later, off the scoring path: a reward worker that
is killed takes the rows of its last moments along (verl does not survive the death of a reward worker either)."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import time
import uuid
from collections import Counter, OrderedDict, deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from verl_rlar.advice import FILE_NAME as ADVICE_FILE
from verl_rlar.advice import Advice
from verl_rlar.adviser import Adviser
from verl_rlar.clusters import FILE_NAME as CLUSTERS_FILE
from verl_rlar.clusters import Clusters
from verl_rlar.competence import FOLDER_NAME, Store, read_labelled
from verl_rlar.config import RlarConfig
from verl_rlar.errors import (
    AgentError,
    LedgerError,
    LibraryError,
    ServiceUnreachable,
    StoppedByAlarm,
    ToolUnavailable,
    TooManyUnscored,
)
from verl_rlar.exam.canaries import Canary, from_json, public
from verl_rlar.fleet import WATCH, Fleet
from verl_rlar.inbox import take_in
from verl_rlar.ledger import FILE_NAME, CanaryRow, Ledger, Row, ShadowRow
from verl_rlar.library import CHANGES, Library, LibraryView, library_path
from verl_rlar.life import Decision, Life
from verl_rlar.metrics import StepMetrics, of_account
from verl_rlar.nodes import GONE, RECONNECT_S, Models, on_head_node, same_or
from verl_rlar.once import Once
from verl_rlar.purse import account_of, folder_of
from verl_rlar.router import FeatureRouter, RouteCache, settings_of
from verl_rlar.trusted import trusted_tools
from verl_rlar.types import Kind, Query, Route, Snapshot, Split, ToolScore, ToolSpec
from verl_rlar.watch import Alarm, Watch

if TYPE_CHECKING:
    from verl_rlar.reexam import Reexaminer

logger = logging.getLogger(__name__)

ACTOR_NAME = "rlar_service"
GROUPS_KEPT = 20_000
"""Number of latest groups whose values are kept in memory; older ones are read from the ledger."""
STEPS_KEPT = 8
"""Number of latest steps whose snapshots a client keeps."""
SOURCES_KEPT = 1_000
"""Number of tools whose code a client keeps."""
ROWS_WAITING = 100_000
"""Number of rows that a client keeps while the ledger cannot be written."""
ROWS_PER_CALL = 500
ROUTES_PER_CALL = 100
PAUSE = 9.0
"""How long a client gathers rows after it has sent some, in shares of the time that the service took for those."""
LONGEST_PAUSE_S = 0.25
CALLS_AT_ONCE = 1_000_000
"""Number of calls that the service takes in at the same time. Unscored responses wait inside for their siblings: with
less room than a step has responses, they would keep out those that they wait for, and everybody else."""
START_TIMEOUT_S = 300.0
"""How long the start of the service may take, imports included, in seconds."""


Question = tuple[Query, Snapshot, Split]
"""What a route is asked for."""


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


class Seeker(Protocol):
    """Who looks for tools during a run: `verl_rlar.acquirer.Acquirer`."""

    def saw(self, row: Row) -> None: ...

    def ask(self, kind: Kind, cluster: str, why: str) -> None: ...

    def begin_step(self, step: int, snapshot: Snapshot) -> None: ...


class Service:
    """See the module.

    Args:
        config: The settings of the run.
        token: Names this start of training, for the ledger and the library.
        models: Where reward models are served. None: in this Ray cluster, by the settings.
        seeker: Who looks for tools. None: `verl_rlar.acquirer`, if the settings say so.

    Raises:
        ConfigError: One of the user's own tools cannot be used, or the settings name a tool that is not there.
        DataError: The labelled answers that the settings name cannot be read.
        LibraryError, LedgerError: It cannot be opened.
    """

    def __init__(
        self, config: RlarConfig, token: str, models: Models | None = None, seeker: Seeker | None = None
    ) -> None:
        self._config = config
        self._token = token
        tools = trusted_tools(config)
        self._library = Library(library_path(config), wait_s=config.library.wait_s)
        self._library.begin(tools, token)
        self._ledger = Ledger(Path(config.run_dir) / FILE_NAME, token=token, store_texts=config.ledger.store_responses)
        self._life = self._watch_tools()
        self._watch = Watch(config.watch)
        self._watch_is_whole = False
        self._models = Models(config) if models is None else models
        self._fleet = Fleet(config, self._library, self._models)
        self._metrics = StepMetrics()
        self._reexaminer: Reexaminer | None = None
        if "re_exam" in config.watch.actions.model_dump().values():
            from verl_rlar.reexam import Reexaminer  # seconds of imports, which most runs do not need; so below

            self._reexaminer = Reexaminer(config, self._library.path)
        self._boundaries: dict[tuple[int, bool], asyncio.Task[None]] = {}
        """By step, and whether it is one for validation only: what is done before it."""
        self._canaries_given: set[int] = set()
        self._in_ledger: set[str] = set()
        labelled = read_labelled(Path(config.routing.labelled)) if config.routing.labelled else ()
        self._settings = settings_of(config.routing, labelled)
        self._advice = Advice(self._library.path / ADVICE_FILE)
        clusters = Clusters(self._library.path / CLUSTERS_FILE)
        self._competence = Store(
            self._library.card,
            labelled,
            self._library.path / FOLDER_NAME,
            exam_of=self._library.labelled,
            cluster_of=clusters.of,
            rulings=self._advice.of,
        )
        self._adviser = Adviser(config, clusters, self._advice, self._competence.of)
        self._acquirer: Seeker | None = seeker
        if seeker is None and config.acquire.enabled:
            from verl_rlar.acquirer import Acquirer

            self._acquirer = Acquirer(config, self._library.path, competence=self._competence.of, clusters=clusters)
        router = FeatureRouter(config.routing, self._competence.of, clusters)
        known = (self._library.spec(digest) for digest in self._library.digests())  # one of them may be live one day
        router.check(Snapshot(tools=(*(tool.spec for tool in tools), *known)))
        self._journal = _Journaled(router, self._ledger, self._adviser)
        self._routes = RouteCache(self._journal)
        self._expected: dict[tuple[int, Split], asyncio.Task[dict[str, Route]]] = {}
        """By step and split: the routes of its prompts, by `Query.key`."""
        self._groups: OrderedDict[str, Group] = OrderedDict()
        self._recent: deque[tuple[bool, str]] = deque(maxlen=config.scoring.unscored_window)
        _spare_collector()

    async def at(self, step: int) -> Snapshot:
        """The tools that are live at a step (I1). From now on that step does not change."""
        snapshot = replace(self._advice.on(self._library.snapshot(step), step), settings=self._settings)
        self._life.knows((*snapshot.tools, *snapshot.shadows))
        self._watch.knows((*snapshot.tools, *snapshot.shadows))
        self._competence.of(snapshot)  # from now on, what is known of these tools does not change either
        if snapshot.version not in self._in_ledger:
            try:
                self._ledger.add_tools(snapshot)
                self._in_ledger.add(snapshot.version)
            except LedgerError as error:
                logger.warning("the tools of step %d are not in the ledger yet: %s", step, error)
        return snapshot

    async def expect(self, step: int, split: Split, queries: Sequence[Query]) -> None:
        """Decides the routes of a step's prompts before their responses come; see `prepared`."""
        self._expected[step, split] = asyncio.get_running_loop().create_task(self._decide(step, split, queries))
        for old in sorted(self._expected, key=lambda key: key[0])[:-STEPS_KEPT]:
            del self._expected[old]

    async def _decide(self, step: int, split: Split, queries: Sequence[Query]) -> dict[str, Route]:
        distinct = {query.key: query for query in queries}
        try:
            snapshot = await self.at(step)
        except LibraryError as error:  # whoever scores will hear of it
            logger.warning("the routes of step %d are not decided yet: %s", step, error)
            return {}
        found = await self.routes([(query, snapshot, split) for query in distinct.values()])
        return {key: route for key, route in zip(distinct, found, strict=True) if isinstance(route, Route)}

    async def prepared(self, step: int, split: Split) -> tuple[Snapshot, dict[str, Route]]:
        """The tools that are live at a step, and the routes of the prompts that were expected, by `Query.key`. A route
        that is not among them is decided when it is asked for."""
        snapshot, expected = await self.at(step), self._expected.get((step, split))
        return snapshot, {} if expected is None else await asyncio.shield(expected)

    async def source(self, source_sha256: str) -> str | None:
        """The code of a tool, by its hash; None if it is not in the library."""
        return self._library.source_of(source_sha256)

    async def route(self, query: Query, snapshot: Snapshot, split: Split = "train") -> Route:
        """The route of a query on a snapshot, decided once (I2)."""
        return await self._routes.route(query, snapshot, split)

    async def routes(self, asked: Sequence[Question]) -> list[Route | BaseException]:
        """For each question its route, or what was raised."""
        return await asyncio.gather(*(self.route(*question) for question in asked), return_exceptions=True)

    async def record(self, rows: Sequence[Row]) -> None:
        """Wakes who waits for these rows, and puts them into the ledger.

        Raises:
            LedgerError: They could not be written; send them again.
        """
        for row in rows:
            self._group(row.sample.uid).set(row.sample.session, row.score.value)
        self._journal.write()
        self._ledger.add(rows)
        for row in rows:
            if row.sample.split == "train":
                self._recent.append((row.score.value is None, f"{row.route.name}: {row.score.reason}"))
                self._metrics.saw(row)
                if (
                    not row.route.snapshot
                ):  # we were not there to say which tools fit: that says nothing about the query
                    continue
                if self._acquirer is not None:
                    self._acquirer.saw(row)
                self._life.saw_response(
                    step=row.sample.step,
                    uid=row.sample.uid,
                    session=row.sample.session,
                    query=row.sample.query.key,
                    value=row.score.value if row.route.covered else None,
                    parts=map(_seen, row.score.parts),
                )
                if self._config.watch.enabled:
                    self._watch.saw_response(
                        step=row.sample.step,
                        uid=row.sample.uid,
                        session=row.sample.session,
                        query=row.sample.query.key,
                        cluster=row.route.cluster,
                        kind=row.route.kind,
                        covered=row.route.covered,
                        parts=map(_seen, row.score.parts),
                        text=row.sample.response,
                    )

    async def canaries(self, step: int) -> tuple[tuple[ToolSpec, tuple[Canary, ...]], ...]:
        """The canaries that are due at a step, by tool: of those in the shadow, and of those that scored lately. Given
        out once, to whoever asks first."""
        config = self._config.life
        if step in self._canaries_given or not config.canary_every or step % config.canary_every:
            return ()
        self._canaries_given = {given for given in self._canaries_given if given > step - 100} | {step}
        snapshot = LibraryView.snapshot(self._library, step)
        used = self._life.in_use(step + 1)
        tools = [*snapshot.shadows, *(tool for tool in snapshot.tools if tool.digest in used)]
        return tuple((tool, self._canaries_of(tool)) for tool in tools)

    async def saw(self, shadows: Sequence[ShadowRow], canaries: Sequence[CanaryRow]) -> None:
        """Keeps what tools in the shadow and canaries gave.

        Raises:
            LedgerError: It could not be written.
        """
        self._ledger.add_shadows(shadows)
        self._ledger.add_canaries(canaries)
        self._metrics.saw_shadows(shadows)
        for row in shadows:
            part = _seen(row.score)
            self._life.saw_shadow(step=row.step, uid=row.uid, session=row.session, part=part)
            if self._config.watch.enabled:  # else nobody would ever count it up, and forget it
                self._watch.saw_shadow(step=row.step, uid=row.uid, session=row.session, part=part)
        for seen in canaries:
            score = seen.score
            self._life.saw_canary(
                step=seen.step,
                digest=score.digest,
                canary=seen.canary,
                outcome=score.outcome.value,
                value=score.value,
            )

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

    async def begin_step(self, step: int, *, behind: int = 0, validate: bool = False) -> bool:
        """Called at each step boundary, before the step's prompts are sent out: changes the tools, trims the ledger,
        and sees to it that the step's reward models are served.

        Args:
            step: verl's ``global_steps``.
            behind: How many steps before it may still have responses to score: 0 with a synchronous trainer.
            validate: Whether the prompts are for validation: then no tool changes.

        Returns:
            Whether the step can begin; False if that takes longer than a call should: ask again.

        Raises:
            TooManyUnscored: The share of unscored responses in the window is above ``rlar.scoring.max_unscored``.
            StoppedByAlarm: An alarm was raised whose action is ``stop``.
            ToolUnavailable: See `Fleet.serve`.
        """
        task = self._boundaries.get((step, validate))
        if task is None:
            self._boundaries = dict(list(self._boundaries.items())[-2:])
            task = asyncio.get_running_loop().create_task(self._begin(step, behind, validate))
            self._boundaries[step, validate] = task
        await asyncio.wait([task], timeout=self._config.service_timeout_s / 2)
        if task.done():
            task.result()
        return task.done()

    async def _begin(self, step: int, behind: int, validate: bool) -> None:
        start = time.perf_counter()
        alarms: list[Alarm] = []
        if not validate:
            self._fleet.look()
            alarms = self._look_at_run(step, behind)
            self._change_and_trim(step, alarms)
            self._advise(step)
        await self._fleet.serve(step, behind)
        self._metrics.boundary_s += time.perf_counter() - start
        if not validate:
            self._seek_tools(step, alarms)
            self._check_unscored(step)
            self._check_alarms(step, alarms)

    async def metrics(self, step: int) -> dict[str, float]:
        """What was scored since the last call, for verl's logger; see `verl_rlar.metrics`."""
        now, before = (LibraryView.snapshot(self._library, at) for at in (step, max(0, step - 1)))
        tools = {"rlar/live": len(now.tools), "rlar/shadows": len(now.shadows)}
        models = [
            {tool.digest for tool in (*one.tools, *one.shadows) if tool.kind == "reward_model"} for one in (now, before)
        ]
        tools |= {"rlar/served": len(models[0]), "rlar/swaps": len(models[0] ^ models[1])}
        spent: dict[str, float] = {}
        if self._config.agents.url:
            try:
                spent = of_account(await asyncio.to_thread(account_of, folder_of(self._config)))
            except AgentError as error:
                logger.warning("%s", error)
        return self._metrics.take() | {name: float(n) for name, n in tools.items()} | spent | self._adviser.metrics()

    def _advise(self, step: int) -> None:
        """Takes up what an LLM has advised on routes, and has it asked."""
        snapshot = self._advice.on(LibraryView.snapshot(self._library, step), step)
        self._adviser.begin_step(step, snapshot, may_change=step >= self._library.next_step)

    def _look_at_run(self, step: int, behind: int) -> list[Alarm]:
        """What was raised before a step; it is in the log, in the ledger and among the metrics."""
        if not self._config.watch.enabled:
            return []
        try:
            if not self._watch_is_whole:
                self._restore_watch(step)
            for done, tallies in self._watch.close(step - behind):
                self._ledger.add_watched(done, ((*key, tally.as_json()) for key, tally in tallies.items()))
            standings = self._library.standings()
            used = {digest for digest, standing in standings.items() if standing.event in ("shadow", "live")}
            flipped = {digest: how for digest, how in self._life.flipped().items() if digest in used}
            alarms = self._watch.judge(step, flipped)
            self._ledger.add_alarms(alarm.as_row() for alarm in alarms)
        except LedgerError as error:  # a full disk: nothing is watched for, and the training goes on
            logger.warning("before step %d the run is not watched: %s", step, error)
            return []
        for alarm in alarms:
            self._metrics.alarms[alarm.sign] += 1
            about = " on ".join(one for one in (alarm.tool, alarm.cluster) if one) or "the run"
            examples = f"; groups {', '.join(alarm.examples)}" if alarm.examples else ""
            logger.warning(
                "before step %d: alarm %s (%s), %s: %s%s", step, alarm.sign, alarm.action, about, alarm.text, examples
            )
        return alarms

    def _restore_watch(self, step: int) -> None:
        """Takes up what was seen before this step, also by an earlier start of the training or of this service."""
        ledger = self._ledger
        for snapshot in (LibraryView.snapshot(self._library, at) for at in {self._library.handed_out, step}):
            self._watch.knows((*snapshot.tools, *snapshot.shadows))
        self._watch.restore(
            ledger.watched_before(step, self._watch.reach), ledger.clusters_before(step), ledger.alarms_before(step)
        )
        responses, shadows, _ = ledger.watched_since(ledger.last_watched() + 1)
        for at, uid, session, query, _, parts, kind, covered, cluster, text in responses:
            self._watch.saw_response(
                step=at,
                uid=uid,
                session=session,
                query=query,
                cluster=cluster,
                kind=Kind(kind),
                covered=bool(covered),
                parts=json.loads(parts),
                text=text,
            )
        for at, uid, session, digest, outcome, raw, value in shadows:
            part = {"digest": digest, "outcome": outcome, "raw": raw, "value": value}
            self._watch.saw_shadow(step=at, uid=uid, session=session, part=part)
        self._watch_is_whole = True

    def _seek_tools(self, step: int, alarms: Sequence[Alarm]) -> None:
        """Starts what is done beside the training: tools are looked for, and examined again."""
        for alarm in alarms:
            if alarm.action == "re_acquire" and self._acquirer is not None and alarm.kind is not None:
                self._acquirer.ask(alarm.kind, alarm.cluster, alarm.text)
            elif alarm.action == "re_exam" and self._reexaminer is not None and alarm.digest:
                self._reexaminer.ask(alarm.digest, alarm.text)
        if self._reexaminer is not None:
            self._reexaminer.begin_step(step)
        if self._acquirer is not None:
            self._acquirer.begin_step(step, self._advice.on(LibraryView.snapshot(self._library, step), step))

    def _check_alarms(self, step: int, alarms: Sequence[Alarm]) -> None:
        if stops := [alarm for alarm in alarms if alarm.action == "stop"]:
            seen = "; ".join(
                f"{alarm.sign}, {alarm.tool or alarm.cluster or 'the run'}: {alarm.text}" for alarm in stops
            )
            raise StoppedByAlarm(
                f"before step {step}: {seen}. rlar.watch.actions says stop; look at `rlar report`, mend it or set "
                "another action, and resume from the last checkpoint."
            )

    def _change_and_trim(self, step: int, alarms: Sequence[Alarm] = ()) -> None:
        try:
            self._change_tools(step, alarms)
            kept = self._config.ledger.keep_steps
            self._ledger.trim(
                before_step=None if kept is None else step - kept, max_bytes=self._config.ledger.max_gb * 2**30
            )
        except (LibraryError, LedgerError) as error:  # a full disk: the tools stay, and the training goes on
            logger.warning("step %d begins with the tools of before: %s", step, error)

    def _check_unscored(self, step: int) -> None:
        limit, recent = self._config.scoring.max_unscored, self._recent
        unscored = [reason for is_unscored, reason in recent if is_unscored]
        if limit < 1 and len(recent) == recent.maxlen and len(unscored) > limit * len(recent):
            worst = "; ".join(f"{count}x {reason}" for reason, count in Counter(unscored).most_common(3))
            raise TooManyUnscored(
                f"before step {step}: {len(unscored)} of the last {len(recent)} responses could not be scored (limit "
                f"rlar.scoring.max_unscored={limit:g}). Most frequent: {worst}. Mend the tool, or the data (`rlar "
                "plan` shows which rows no tool fits), or raise the limit; training resumes from the last checkpoint."
            )

    async def sleep(self) -> None:
        """Colocated placement: has the reward models give their memory back; see `Pool.sleep` for the errors."""
        if self._fleet.serves:
            await self._models.sleep()

    async def wake(self) -> None:
        """... and take it up again."""
        if self._fleet.serves:
            await self._models.wake()

    async def token(self) -> str:
        """What this start of training is named by; whoever starts the service again gives it the same."""
        return self._token

    async def pid(self) -> int:
        """The service's process id, for those who want to see it die."""
        return os.getpid()

    def close(self) -> None:
        """Lets another service have the library and the ledger."""
        self._library.close()
        self._ledger.close()

    def _change_tools(self, step: int, alarms: Sequence[Alarm] = ()) -> None:
        """Takes in what waits, and what `Life` and alarms decide; nothing for a step whose tools were handed out
        already."""
        if step < self._library.next_step:
            return
        before = len(self._library.events)
        for asked, said in take_in(self._library, self._fleet.admits):
            name = asked.digest if asked else "a file in the inbox that cannot be read"
            logger.warning("before step %d: %s, by %s: %s", step, name, asked.by if asked else "?", said)
        decisions = self._life.decide(step, self._library)
        gone = {decision.digest for decision in decisions}
        for alarm in alarms:
            if alarm.action == "quarantine" and alarm.digest and alarm.digest not in gone:
                gone.add(alarm.digest)
                where = f" on {alarm.cluster}" if alarm.cluster else ""
                why = f"alarm {alarm.sign}{where}: {alarm.text}"
                decisions.append(Decision(event="quarantined", digest=alarm.digest, why=why))
        for decision in decisions:
            try:
                event = self._library.append(
                    decision.event,
                    decision.digest,
                    by=WATCH,
                    why=decision.why,
                    step=step,
                    replaces=decision.replaces,
                    restores=decision.restores,
                )
            except LibraryError as error:
                logger.warning("before step %d: %s", step, error)
                continue
            logger.warning("before step %d: %s is %s: %s", step, event.tool, event.event, event.why)
        self._metrics.changes += sum(event.event in CHANGES for event in self._library.events[before:])

    def _watch_tools(self) -> Life:
        """Who watches the tools, with all that was seen in this start of training."""
        config, newest = self._config.life, self._library.handed_out
        snapshot = LibraryView.snapshot(self._library, newest)
        life = Life(config, self._ledger.canary_values())
        life.knows((*snapshot.tools, *snapshot.shadows))
        for tool in (*snapshot.tools, *snapshot.shadows):
            self._of_exam(tool, life)
        steps = config.shadow_patience if snapshot.shadows else config.window
        life.restore(*self._ledger.watched_since(newest - steps, texts=False))
        return life

    def _canaries_of(self, tool: ToolSpec) -> tuple[Canary, ...]:
        count = self._config.life.canaries
        chosen = self._of_exam(tool, self._life)[:count] or public(tool, count)
        return tuple(replace(canary, value=self._life.wanted(tool.digest, canary.id)) for canary in chosen)

    def _of_exam(self, tool: ToolSpec, life: Life) -> tuple[Canary, ...]:
        """The canaries of a tool's exam, of which `life` knows what they must get from now on."""
        kept = from_json(self._library.canaries(tool.digest))
        for canary in kept:
            if canary.value is not None:
                life.expect(tool.digest, canary.id, canary.value)
        return kept

    def _group(self, uid: str) -> Group:
        group = self._groups.get(uid)
        if group is None:
            group = self._groups[uid] = Group(self._ledger.group(uid))
            while len(self._groups) > GROUPS_KEPT:
                self._groups.popitem(last=False)
        return group


class _Journaled:
    """A router whose decisions are in the ledger before they are known to anybody.

    While the ledger cannot be written, they are kept here, and `write` catches up.
    """

    def __init__(self, router: FeatureRouter, ledger: Ledger, adviser: Adviser) -> None:
        self._router = router
        self._ledger = ledger
        self._adviser = adviser
        self._unwritten: dict[tuple[str, Split, str], tuple[Query, Route]] = {}
        """By snapshot, split and query."""

    async def route(self, query: Query, snapshot: Snapshot, split: Split = "train") -> Route:
        route = await self._decided(query, snapshot, split)
        if split == "train":
            self._adviser.saw(query, route)
        return route

    async def _decided(self, query: Query, snapshot: Snapshot, split: Split) -> Route:
        key = (snapshot.version, split, query.key)
        if key in self._unwritten:
            return self._unwritten[key][1]
        known = self._ledger.route(query, snapshot, split)
        if known is not None:
            try:
                self._ledger.keep_query(query)
            except LedgerError as error:
                logger.warning("a query whose route was known has no text in the ledger: %s", error)
            return known
        route = await self._router.route(query, snapshot, split)
        self._unwritten[key] = (query, route)
        try:
            self.write()
        except LedgerError as error:
            logger.warning("%d routes wait for the ledger: %s", len(self._unwritten), error)
        return route

    def write(self) -> None:
        """Writes what waits.

        Raises:
            LedgerError: It still waits.
        """
        for key, (query, route) in list(self._unwritten.items()):
            self._ledger.add_route(query, route, key[1])
            del self._unwritten[key]


def _seen(score: ToolScore) -> dict[str, Any]:
    """A tool's score, as `Life` takes it."""
    return {"digest": score.digest, "outcome": score.outcome.value, "raw": score.raw, "value": score.value}


class Client:
    """A process's access to the service. Made when the service answers. Use from one event loop at a time, but for
    `begin_step`.

    Args:
        config: The settings of the run; whoever comes first starts the service with them.

    Raises:
        ServiceUnreachable: It did not start in time, or cannot, for example as its ledger cannot be opened.
    """

    def __init__(self, config: RlarConfig) -> None:
        self._config = config
        self._token = uuid.uuid4().hex
        self._actor = self._start()
        try:
            self._token = ray.get(self._actor.token.remote(), timeout=START_TIMEOUT_S)
        except ray.exceptions.RayActorError as error:
            raise ServiceUnreachable(f"the rlar service cannot start: {str(error).strip().splitlines()[-1]}") from error
        except ray.exceptions.GetTimeoutError as error:
            raise ServiceUnreachable(f"the rlar service did not start within {START_TIMEOUT_S:g} s") from error
        self._snapshots: Once[tuple[int, Split], Snapshot] = Once(STEPS_KEPT)
        self._sources: Once[str, str] = Once(SOURCES_KEPT)
        self._routes = RouteCache(RouteCalls(self._ask_routes))
        self._rows: deque[Row] = deque(maxlen=ROWS_WAITING)
        self._pause_s = 0.0
        self._hurry: asyncio.Event
        self._sender: asyncio.Task[None] | None = None
        _spare_collector()

    async def at(self, step: int, split: Split = "train") -> Snapshot:
        """The tools that are live at a step; asked once per step and split. The routes of the prompts that are expected
        come with them."""
        return await self._snapshots.get((step, split), partial(self._ask_prepared, step, split))

    def expect(self, step: int, split: Split, queries: Sequence[Query]) -> None:
        """See `Service.expect`. Does not wait, and does not matter if it fails."""
        self._actor.expect.remote(step, split, queries)

    async def route(self, query: Query, snapshot: Snapshot, split: Split = "train") -> Route:
        """See `Service.route`; asked once per query, snapshot and split."""
        return await self._routes.route(query, snapshot, split)

    async def canaries(self, step: int) -> tuple[tuple[ToolSpec, tuple[Canary, ...]], ...]:
        """See `Service.canaries`."""
        return cast(Any, await self._call("canaries", step, timeout_s=self._config.service_timeout_s))

    async def saw(self, shadows: tuple[ShadowRow, ...], canaries: tuple[CanaryRow, ...]) -> None:
        """See `Service.saw`."""
        await self._call("saw", shadows, canaries, timeout_s=self._config.service_timeout_s)

    async def source(self, source_sha256: str) -> str:
        """See `Service.source`; asked once per hash.

        Raises:
            ToolUnavailable: It is not in the library, or the service does not answer.
        """
        return await self._sources.get(source_sha256, partial(self._ask_source, source_sha256))

    async def sibling_mean(self, uid: str, session: int, group_size: int) -> float | None:
        """See `Service.sibling_mean`; None also if the service cannot be reached in time."""
        timeout_s = self._config.scoring.sibling_timeout_s
        try:
            return await self._call("sibling_mean", uid, session, group_size, timeout_s, timeout_s=timeout_s + 5.0)
        except ServiceUnreachable as error:
            logger.warning("%s", error)
            return None

    def record(self, row: Row) -> None:
        """Hands a row over; it is sent after ``rlar.ledger.flush_s``, later if the service is slow, and again until the
        service has taken it. What its query says stays here, unless tools are looked for: the ledger has it with the
        route."""
        if not self._config.acquire.enabled:
            row = replace(row, sample=replace(row.sample, query=row.sample.query.bare()))
        if len(self._rows) == ROWS_WAITING:
            logger.error("the ledger is behind by %d rows, the oldest is lost; see earlier warnings", ROWS_WAITING)
        self._rows.append(row)
        if self._sender is None or self._sender.done():
            self._hurry = asyncio.Event()
            self._sender = asyncio.get_running_loop().create_task(self._send())

    def sending(self) -> bool:
        """Whether rows that were handed over are still on their way to the ledger. They go at once then. May be called
        from any thread."""
        sender = self._sender
        if sender is None or sender.done():
            return False
        sender.get_loop().call_soon_threadsafe(self._hurry.set)
        return True

    async def flush(self) -> None:
        """Returns when every row that was handed over is in the ledger."""
        while self.sending() and self._sender is not None:
            await asyncio.shield(self._sender)

    def begin_step(self, step: int, *, behind: int = 0, validate: bool = False) -> None:
        """See `Service.begin_step`. Blocks, until the step's reward models are served; a service that cannot be reached
        is logged, as the step can do without.

        Raises:
            TooManyUnscored, ToolUnavailable: See there.
        """
        try:
            while not self._blocking("begin_step", step, behind=behind, validate=validate):
                logger.warning("step %d waits for its reward models", step)
        except ServiceUnreachable as error:
            logger.warning("step %d begins without its check: %s", step, error)

    def metrics(self, step: int) -> dict[str, float]:
        """See `Service.metrics`. Blocks.

        Raises:
            ServiceUnreachable: It does not answer.
        """
        return cast("dict[str, float]", self._blocking("metrics", step))

    def sleep(self) -> None:
        """See `Service.sleep`. Blocks.

        Raises:
            ServiceUnreachable: They may not have given back their memory.
            ToolError, ConnectionError: They have not.
        """
        self._blocking("sleep", seconds=self._config.serving.drain_timeout_s)

    def wake(self) -> None:
        """See `Service.wake`. Blocks. The errors of `sleep`."""
        self._blocking("wake", seconds=self._config.serving.start_timeout_s)

    def _blocking(self, method: str, *args: Any, seconds: float = 0.0, **options: Any) -> Any:
        """Calls the service, and raises what it raises."""
        try:
            answer = getattr(self._actor, method).remote(*args, **options)
            return ray.get(answer, timeout=self._config.service_timeout_s + seconds)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except (*GONE, ray.exceptions.GetTimeoutError) as error:
            self._actor = same_or(self._actor, self._start())
            raise ServiceUnreachable(f"the service does not answer `{method}` ({type(error).__name__})") from error

    def _start(self) -> Any:
        """The service. Started if there is none: Ray ends an actor for good with the process that started it, and then
        whoever misses it first starts it again, with the token that it had."""
        service: Any = ray.remote(Service)
        options = {"name": ACTOR_NAME, "get_if_exists": True, "max_restarts": -1, "max_concurrency": CALLS_AT_ONCE}
        there = on_head_node()  # where the ledger is then, also after the service was started again
        free = PlacementGroupSchedulingStrategy(cast(Any, None))  # of a group that whoever starts it is in
        started = service.options(num_cpus=0, resources=there, scheduling_strategy=free, **options)
        return started.remote(self._config, self._token)

    async def _send(self) -> None:
        loop = asyncio.get_running_loop()
        while self._rows:
            if len(self._rows) < ROWS_PER_CALL:
                with suppress(TimeoutError, asyncio.TimeoutError):
                    await asyncio.wait_for(self._hurry.wait(), max(self._config.ledger.flush_s, self._pause_s))
            batch = [self._rows.popleft() for _ in range(min(len(self._rows), ROWS_PER_CALL))]
            began = loop.time()
            try:
                await self._call("record", batch, timeout_s=self._config.service_timeout_s)
            except (LedgerError, ServiceUnreachable) as error:
                logger.warning("%d rows wait for the ledger: %s", len(batch) + len(self._rows), error)
                self._rows.extendleft(reversed(batch))
                await asyncio.sleep(1.0)
            else:
                self._pause_s = min(LONGEST_PAUSE_S, PAUSE * (loop.time() - began))

    async def _ask_prepared(self, step: int, split: Split) -> Snapshot:
        snapshot, routes = await self._call("prepared", step, split, timeout_s=self._config.service_timeout_s)
        for key, route in routes.items():
            self._routes.put(key, snapshot, split, route)
        return cast(Snapshot, snapshot)

    async def _ask_source(self, source_sha256: str) -> str:
        try:
            source = await self._call("source", source_sha256, timeout_s=self._config.service_timeout_s)
        except ServiceUnreachable as error:
            raise ToolUnavailable(str(error)) from None
        if source is None:
            raise ToolUnavailable(f"the source {source_sha256[:12]} is not in the library")
        return cast(str, source)

    async def _ask_routes(self, asked: Sequence[Question]) -> list[Route | BaseException]:
        found = await self._call("routes", asked, timeout_s=self._config.service_timeout_s)
        return cast("list[Route | BaseException]", found)

    async def _call(self, method: str, *args: Any, timeout_s: float) -> Any:
        """Calls the service; while it is dead and Ray starts it again, tries until the deadline."""
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout_s
        while True:
            try:
                return await asyncio.wait_for(getattr(self._actor, method).remote(*args), end - loop.time())
            except (*GONE, TimeoutError, asyncio.TimeoutError) as error:
                if loop.time() + RECONNECT_S >= end:
                    raise ServiceUnreachable(
                        f"the rlar service did not answer `{method}` within {timeout_s:g} s ({type(error).__name__})"
                    ) from error
                await asyncio.sleep(RECONNECT_S)
                self._actor = same_or(self._actor, self._start())


def _spare_collector() -> None:
    """Lets Python's garbage collector leave out all that is there by now, where this is an actor's process: after verl
    and torch were imported, a full collection stops everything for half a second, every thousand responses or so."""
    if ray.is_initialized() and ray.get_runtime_context().get_actor_id() and not gc.get_freeze_count():
        gc.collect()  # what is garbage by now would stay for good
        gc.freeze()


def await_rows(workers: Sequence[Any], timeout_s: float) -> None:
    """Waits until the rows of verl's reward workers are in the ledger; a warning says if some may never be. Blocks.

    Args:
        workers: Ray's handles of ``RewardLoopWorker``.
        timeout_s: How long, in seconds.
    """
    why, end = "the service does not take them in time", time.monotonic() + timeout_s
    try:
        while time.monotonic() < end:
            asked = [worker.__ray_call__.remote(_sending) for worker in workers]
            if not any(ray.get(asked, timeout=max(1.0, end - time.monotonic()))):
                return
            time.sleep(0.02)
    except ray.exceptions.RayError as error:
        why = str(error)
    logger.warning("the last rows of the run may be missing in the ledger: %s", why)


def _sending(worker: Any) -> bool:
    return bool(worker.reward_manager.sending())


class RouteCalls:
    """A router that asks another one for several routes at once: what comes while a call is under way waits for the
    next one.

    Args:
        ask: Answers some questions, each with a route or with what is to be raised; or raises it for all, and for
            those that wait.
    """

    def __init__(self, ask: Callable[[Sequence[Question]], Awaitable[Sequence[Route | BaseException]]]) -> None:
        self._ask = ask
        self._waiting: deque[tuple[Question, asyncio.Future[Route]]] = deque()
        self._calls: asyncio.Task[None] | None = None

    async def route(self, query: Query, snapshot: Snapshot, split: Split = "train") -> Route:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Route] = loop.create_future()
        self._waiting.append(((query, snapshot, split), answer))
        if self._calls is None or self._calls.done():
            self._calls = loop.create_task(self._call())
        return await answer

    async def _call(self) -> None:
        while self._waiting:
            batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), ROUTES_PER_CALL))]
            try:
                found = await self._ask([question for question, _ in batch])
            except Exception as error:  # nobody waits for a second call that would fail in the same way
                batch += self._waiting
                self._waiting.clear()
                found = [error] * len(batch)
            for (_, answer), route in zip(batch, found, strict=True):
                if answer.done():  # whoever asked has given up
                    continue
                if isinstance(route, BaseException):
                    answer.set_exception(route)
                else:
                    answer.set_result(route)
