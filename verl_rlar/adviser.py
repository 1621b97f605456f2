# SPDX-License-Identifier: Apache-2.0
"""`Adviser`: has an LLM asked about routes while a training runs (`rlar.advice`), never on the scoring path.

It takes note of the prompts that are routed. Between two steps it looks at the clusters that have enough of them, the
largest first: which tools does evidence leave it open between (`verl_rlar.router.open_question`)? These questions go to
the LLM in a process of their own (`verl_rlar.agents.counsel`), a batch at a time. What comes back becomes a `Ruling` at
the first step boundary after it (`verl_rlar.advice`); until then, and wherever there is none, evidence decides.

A cluster is asked about once for each set of tools that it is open between; the same answer gives it a readable name,
and may send single prompts of those that were shown elsewhere. Prompts that differ from their cluster are gathered, and
asked about together, `ODD_QUESTIONS` times at most. So the LLM is paid by the cluster, not by the visit.

Guarantees: no route ever waits for it; a step's rulings are on the disk before its tools are handed out, and never
change (I1); an answer is taken up only if it names a tool of the question, which has passed all that a route asks for;
where a verifier fits a verifiable prompt, no reward model is in the question; no response is ever seen. An LLM that
does not answer is a line in the log and a number in the metrics, and is asked again after `rlar.advice.again_after`
steps; `rlar.advice.tokens` is kept over all starts of a run.

Not covered: a service that is killed forgets which prompts it saw, and answers that had not reached a boundary; it asks
for these again. Whether the LLM is right: exams and labelled answers outweigh it as they come.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import secrets
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from verl_rlar.advice import Advice, Ruling
from verl_rlar.agents import session
from verl_rlar.clusters import Clusters
from verl_rlar.competence import Competence
from verl_rlar.config import RlarConfig
from verl_rlar.errors import LibraryError, RlarError
from verl_rlar.features import describe
from verl_rlar.quoting import plain
from verl_rlar.router import OpenQuestion, Option, alternatives, open_question
from verl_rlar.types import Query, Route, Snapshot, content_hash

logger = logging.getLogger(__name__)

WORK = "verl_rlar.agents.counsel:work"
BATCH = 16
"""Most questions that one process asks."""
ODD_QUESTIONS = 2
"""Most questions about odd prompts of one cluster."""
NAME_CHARS = 60
WHY_CHARS = 200


@dataclass
class _Seen:
    """What was seen of a cluster."""

    count: int = 0
    queries: dict[str, Query] = field(default_factory=dict)
    """The first ones, by key."""
    odd: dict[str, Query] = field(default_factory=dict)
    """Some that differ from it."""


@dataclass(frozen=True, kw_only=True)
class _Question:
    """What is asked about a cluster."""

    id: str
    cluster: str
    odd: bool
    rivals: tuple[Option, ...]
    queries: tuple[Query, ...]
    alternatives: tuple[tuple[Option, ...], ...]
    """By query: where it may go alone; empty: it stays."""
    told: Mapping[str, Any]
    """The question, JSON-like."""


class Adviser:
    """See the module. Use from one event loop.

    Args:
        config: The settings of the run.
        clusters: The run's.
        advice: The run's.
        competence: What is known of a snapshot's tools.
        work: What is done in the process, as ``module:function``.
    """

    def __init__(
        self,
        config: RlarConfig,
        clusters: Clusters,
        advice: Advice,
        competence: Callable[[Snapshot], Competence],
        work: str = WORK,
    ) -> None:
        self._config = config
        self._clusters = clusters
        self._advice = advice
        self._competence = competence
        self._work = work
        self._on = config.advice.enabled and config.agents.url is not None
        if self._on and importlib.util.find_spec("smolagents") is None:
            self._on = False
            logger.warning(
                "no LLM is asked about routes: pip install 'verl-rlar[agents]', or rlar.advice.enabled=False"
            )
        self._seen: dict[str, _Seen] = {}
        self._asked = {ruling.question for ruling in advice.rulings}
        """Questions that were answered, or are under way."""
        self._answered: dict[str, str] = {}
        """By cluster, the set of tools for which nothing is left to be asked about it as a whole."""
        self._came: list[tuple[_Question, Mapping[str, Any], str]] = []
        """Answers that wait for a boundary: question, answer, fault."""
        self._task: asyncio.Task[None] | None = None
        self._not_before = 0
        self._numbers: Counter[str] = Counter()

    def saw(self, query: Query, route: Route) -> None:
        """Takes note of a prompt that was routed. Costs microseconds."""
        if not self._on or "#" not in route.cluster:
            return
        seen = self._seen.setdefault(route.cluster, _Seen())
        seen.count += 1
        if query.key in seen.queries:
            return
        if len(seen.queries) < self._config.advice.prompts:
            seen.queries[query.key] = query
        elif len(seen.odd) < self._config.advice.odd and self._clusters.odd(query):
            seen.odd[query.key] = query

    def begin_step(self, step: int, snapshot: Snapshot, *, may_change: bool) -> None:
        """Takes up what was answered, and starts what is due.

        Args:
            step: The step that is about to begin.
            snapshot: Its tools, with the advice of before.
            may_change: Whether the step's tools are not handed out yet.
        """
        if not self._on:
            return
        if may_change and self._came:
            self._take_up(step)
        if (self._task is None or self._task.done()) and not self._came and step >= self._not_before:
            batch = self._due(snapshot)
            if batch:
                self._asked.update(question.id for question in batch)
                self._task = asyncio.get_running_loop().create_task(self._ask(batch, step))

    async def idle(self) -> None:
        """Returns when nothing is being asked."""
        if self._task is not None:
            await asyncio.wait([self._task])

    def metrics(self) -> dict[str, float]:
        """Numbers for verl's logger, since the start: questions that were answered, rulings that count, faults, and the
        tokens of the run. Empty if no LLM is asked."""
        if not self._on:
            return {}
        rulings = sum(bool(ruling.tool) for ruling in self._counting().values())
        numbers = {name: float(self._numbers[name]) for name in ("answers", "faults", "tokens")}
        return {f"rlar/advice/{name}": value for name, value in (numbers | {"rulings": float(rulings)}).items()}

    # --- Asking -------------------------------------------------------------------------------------------------------

    def _due(self, snapshot: Snapshot) -> list[_Question]:
        competence = self._competence(snapshot)
        due: list[_Question] = []
        for cluster, seen in sorted(self._seen.items(), key=lambda item: (-item[1].count, item[0])):
            if len(seen.queries) < self._config.advice.prompts:
                continue
            question = None
            if self._answered.get(cluster) != snapshot.toolset:
                question = self._question(cluster, seen, snapshot, competence)
                if question is None:
                    self._answered[cluster] = snapshot.toolset
            if question is None:
                question = self._odd_question(cluster, seen, snapshot, competence)
            if question is not None:
                due.append(question)
                if len(due) == BATCH:
                    break
        return due

    def _question(self, cluster: str, seen: _Seen, snapshot: Snapshot, competence: Competence) -> _Question | None:
        queries = tuple(seen.queries.values())
        is_open = open_question(queries[0], snapshot, self._config.routing, cluster, competence)
        digests = sorted(option.digest for option in is_open.rivals) if is_open else []
        id = content_hash([cluster, digests])[:16]
        if is_open is None or id in self._asked:
            return None
        return self._made(id, cluster, is_open, queries, snapshot, competence)

    def _odd_question(self, cluster: str, seen: _Seen, snapshot: Snapshot, competence: Competence) -> _Question | None:
        if not self._config.advice.odd or len(seen.odd) < self._config.advice.odd:
            return None
        of_cluster = [ruling for ruling in self._advice.rulings if ruling.cluster == cluster]
        whole = {ruling.question for ruling in of_cluster if not ruling.query}
        if len({ruling.question for ruling in of_cluster if ruling.query} - whole) >= ODD_QUESTIONS:
            return None
        queries, id = tuple(seen.odd.values()), content_hash([cluster, sorted(seen.odd)])[:16]
        if id in self._asked:
            return None
        closed = OpenQuestion(kind=describe(queries[0]).kind, rivals=(), covered=True)
        made = self._made(id, cluster, closed, queries, snapshot, competence, odd=True)
        if any(made.alternatives):
            return made
        seen.odd.clear()  # wherever they might go, there is one tool for each
        return None

    def _made(
        self,
        id: str,
        cluster: str,
        is_open: OpenQuestion,
        queries: tuple[Query, ...],
        snapshot: Snapshot,
        competence: Competence,
        *,
        odd: bool = False,
    ) -> _Question:
        may = [alternatives(query, snapshot, self._config.routing, cluster, competence) for query in queries]
        may = [options if len(options) > 1 else () for options in may]
        told = {
            "id": id,
            "kind": is_open.kind.value,
            "covered": is_open.covered,
            "odd": odd,
            "tools": [
                {"name": one.name, "sort": one.sort.replace("_", " "), "known": one.known, "about": one.about}
                for one in is_open.rivals
            ],
            "prompts": [
                {"text": query.prompt, "tools": [one.name for one in options]}
                for query, options in zip(queries, may, strict=True)
            ],
        }
        return _Question(
            id=id, cluster=cluster, odd=odd, rivals=is_open.rivals, queries=queries, alternatives=tuple(may), told=told
        )

    async def _ask(self, batch: list[_Question], step: int) -> None:
        config = self._config
        folder = Path(config.agents.transcripts or Path(config.run_dir) / "agents")
        order = {
            "agents": config.agents.model_dump(mode="json"),
            "questions": [question.told for question in batch],
            "tokens": config.advice.tokens,
            "purse": str(folder.absolute()),
            "seed": secrets.token_hex(8),
        }
        by_id = {question.id: question for question in batch}
        told: list[Mapping[str, Any]] = []
        fault = ""
        try:
            ended = await asyncio.to_thread(
                session.run,
                self._work,
                order,
                folder=folder,
                name="advice",
                wall_s=config.advice.wall_s,
                secrets=[config.agents.api_key_env],
                on_event=told.append,
            )
            fault = "" if ended.how == "done" else f"{ended.how}: {ended.detail}"
        except RlarError as error:
            fault = str(error)
        for event in told:
            if event["event"] == "advised":
                self._came.append((by_id.pop(event["question"]), event["answer"], event["fault"]))
            elif event["event"] == "spent":
                self._numbers["tokens"] = event["tokens"]
        if fault:
            self._numbers["faults"] += 1
            self._not_before = step + config.advice.again_after
            logger.warning("the LLM was not heard on %d of %d clusters (%s)", len(by_id), len(batch), fault)
        for question in by_id.values():
            self._asked.discard(question.id)

    # --- Taking up ----------------------------------------------------------------------------------------------------

    def _take_up(self, step: int) -> None:
        rulings: list[Ruling] = []
        new: list[Ruling] = []
        for question, answer, fault in self._came:
            if fault:
                self._numbers["faults"] += 1
                logger.warning("the LLM gave no answer on the cluster %s: %s", question.cluster, fault)
                rulings += self._kept(question)
            else:
                made = self._rulings(question, answer)
                rulings += made
                new += made
        try:
            self._advice.add(rulings, step)
        except LibraryError as error:
            logger.warning("before step %d: %s", step, error)
            return
        for question, answer, _ in self._came:
            name = plain(str(answer.get("name") or ""), NAME_CHARS, line=True)
            if name and not question.odd:
                self._clusters.rename(question.cluster, name)
            if question.odd and question.cluster in self._seen:
                self._seen[question.cluster].odd.clear()
        self._numbers["answers"] += len(self._came)
        self._came.clear()
        for ruling in new:
            if ruling.tool:
                place = f"{'a prompt of ' if ruling.query else ''}cluster {ruling.cluster}"
                logger.warning("before step %d: %s advises a tool for %s", step, ruling.by, place)

    def _kept(self, question: _Question) -> list[Ruling]:
        """Where there was no answer: none, so that it is not asked again; and then what counted before, as it was."""
        made, counting = self._rulings(question, {}), self._counting()
        return [*made, *(counting[place] for one in made if (place := one.query or one.cluster) in counting)]

    def _counting(self) -> dict[str, Ruling]:
        """By cluster or prompt, the latest ruling."""
        return {one.query or one.cluster: one for one in self._advice.rulings}

    def _rulings(self, question: _Question, answer: Mapping[str, Any]) -> list[Ruling]:
        """What may count of an answer. An answer that advises nothing is kept, too: it is not asked for again."""
        model = self._config.agents.model or ""

        def ruling(tool: str, why: str, query: str = "") -> Ruling:
            said = plain(why, WHY_CHARS, line=True)
            return Ruling(cluster=question.cluster, query=query, tool=tool, why=said, by=model, question=question.id)

        made: dict[str, Ruling] = {}
        if not question.odd:
            rivals = {option.name: option.digest for option in question.rivals}
            made[""] = ruling(rivals.get(str(answer.get("tool") or ""), ""), str(answer.get("why") or ""))
        else:
            made |= {query.key: ruling("", "", query.key) for query in question.queries}
        for one in answer.get("elsewhere") or ():
            place = one["prompt"] - 1
            if 0 <= place < len(question.queries):
                may = {option.name: option.digest for option in question.alternatives[place]}
                if digest := may.get(one["tool"]):
                    key = question.queries[place].key
                    made[key] = ruling(digest, one["why"], key)
        return list(made.values())
