# SPDX-License-Identifier: Apache-2.0
"""The plan of a data set: which tool would score which rows, and whether those rewards can tell right from wrong.

`make_plan` reads the rows once and answers four questions before any GPU is rented:

- **Coverage.** How many rows does each tool score, for each kind of query? Which rows does none score?
- **Conflicts.** Do labels contradict each other, or do rows hold a check that nobody will run? See `Conflict`.
- **Dry score.** For each route (tools x data source), do gold answers win against garbage? A gold answer is made from
  the reference; garbage is an empty answer, "I don't know.", the gold answer to another row, the prompt itself, and
  random words. A route where gold does not win on at least `WIN_SHARE` of the sampled rows is an error (`Plan.errors`).
- **Faults.** Rows that cannot be read, with their numbers.

Guarantees: deterministic, and a function of the rows' order and content: the name of a data source only groups rows.
Memory grows by some 200 bytes per row (to find equal prompts), beside the sampled rows.

Not covered: the dry score runs the tools of a route without its gates, as gold answers are bare. Tests, constraints and
schemas tell what a good answer is without giving one: there is "no gold available", and such a route is never an error.
A gold answer in the form of a response of *your* model is not tried.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from verl_rlar.clusters import Clusters
from verl_rlar.config import RoutingConfig
from verl_rlar.dispatcher import Dispatcher
from verl_rlar.errors import DataError
from verl_rlar.features import describe
from verl_rlar.router import FeatureRouter
from verl_rlar.row_files import read_rows
from verl_rlar.rows import query_of
from verl_rlar.scoring import FULL_MARK
from verl_rlar.streams import in_background, in_order
from verl_rlar.types import Kind, Outcome, Query, Route, Sample, Score, Snapshot, Split, content_hash

WIN_SHARE = 0.75
"""Share of the sampled rows of a route on which gold must score more than every garbage answer. Not all: on 8 % of
GSM8K the prompt itself ends in the right number."""
EXAMPLES = 3
"""Most examples of anything."""
OTHERS = 16
"""Most different gold answers of a route that are kept, to be tried as wrong answers to other rows."""
EXCERPT = 160
"""Most characters of a prompt or reference in an example."""

PROGRAM_COLUMNS = ("canonical_solution", "solution", "code")
"""Columns that may hold a program that passes the row's tests."""

SUBJECTS: Mapping[Kind, str] = {
    Kind.UNIT_TESTS: "its tests",
    Kind.CONSTRAINTS: "its constraints",
    Kind.JSON_SCHEMA: "its schema",
    Kind.CHOICE: "its reference",
    Kind.TRANSLATION: "its reference",
    Kind.MATH: "its reference",
    Kind.SHORT_TEXT: "its reference",
}
"""What of a row each kind of check compares with. Kinds of one subject are readings of the same label, no conflict."""

WORDS = tuple(
    "table window river orange quickly seven under bright paper stone walk green often music corner letter simple "
    "garden market silver because bottle yellow mountain slowly between winter candle remember ticket".split()
)


@dataclass(frozen=True, kw_only=True)
class Example:
    """A row that shows what is meant."""

    line: int
    """Number of the row, from 1."""
    prompt: str
    """Beginning of the prompt. Foreign text."""
    note: str = ""
    """What about it."""


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """How gold and garbage answers scored on the sampled rows of a route."""

    rows: int
    """Number of sampled rows."""
    gold: float | None = None
    """Mean value of the gold answers that were scored; None if none was."""
    garbage: Mapping[str, float | None] = field(default_factory=dict)
    """Mean value for each sort of garbage; None if none was scored."""
    failed: int = 0
    """Rows where scoring gold failed (a deadline, something missing): our fault, so neither won nor lost."""
    wins: int | None = None
    """Rows where gold scored more than every garbage answer; None if there is no gold."""
    losers: tuple[Example, ...] = ()
    """Rows where it did not, and why; those where gold itself is at fault come first."""
    unusable: int = 0
    """Rows where the tool abstained on gold: it cannot use the reference."""
    weak: int = 0
    """Rows where gold was scored, with less than the full mark."""
    note: str = ""
    """Why there is no gold, or what went wrong."""

    @property
    def verdict(self) -> str:
        """``ok``; the errors ``lost`` and ``failed`` (gold could not be scored); ``no_gold``; ``not_run``."""
        if not self.rows:
            return "not_run"
        if self.wins is None:
            return "no_gold"
        if self.failed == self.rows:
            return "failed"
        return "ok" if self.wins >= WIN_SHARE * (self.rows - self.failed) else "lost"


@dataclass(frozen=True, kw_only=True)
class RouteGroup:
    """All rows of one data source that go to the same tools."""

    tool: str
    """`Route.name`; ``-`` for rows that no tool scores."""
    data_source: str
    rows: int
    kinds: Mapping[str, int]
    """Rows of each kind of query."""
    dry: DryRun


@dataclass(frozen=True, kw_only=True)
class Uncovered:
    """Rows that no tool fits, for one reason."""

    kind: str
    reason: str
    rows: int
    examples: tuple[Example, ...]
    fallback: str = "-"
    """The tool that scores them all the same (`rlar.routing.fallback`); ``-``: they stay unscored."""


@dataclass(frozen=True, kw_only=True)
class ClusterGroup:
    """All rows of a cluster of alike queries."""

    id: str
    """See `verl_rlar.clusters`. The id is of this plan, not of a training."""
    name: str
    rows: int
    tools: Mapping[str, int]
    """Rows by `Route.name`, the most frequent first."""
    reason: str
    """Why the first of its rows goes where it goes."""


@dataclass(frozen=True, kw_only=True)
class Conflict:
    """Labels that contradict each other or their use.

    The sorts: ``different_references`` (equal prompts, different references), ``unscored_check`` (a row makes several
    kinds of check possible, and only one is scored), ``mixed_source`` (one data source, several kinds of query),
    ``failed_gold`` (scoring a gold answer failed), ``unusable_reference`` (the chosen tool abstains on a gold answer),
    ``weak_gold`` (gold does not get the full mark on a row, in a route where it wins on the whole).
    """

    sort: str
    what: str
    """In words."""
    rows: int
    examples: tuple[Example, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """See the module."""

    rows: int
    """Rows that could be read."""
    bad: tuple[tuple[int, str], ...]
    """Number and fault of each row that could not."""
    verifiable: int
    """Rows that say what a right answer is: tests, constraints, a schema, or a reference of a checkable kind."""
    verified: int
    """... and go to a tool for that kind of check."""
    unread_references: int
    """Rows with a reference of no checkable kind (prose)."""
    tools: Mapping[str, int]
    """Rows of each tool."""
    kinds: Mapping[str, int]
    """Rows of each kind of query."""
    routes: tuple[RouteGroup, ...]
    """In the order of their first rows."""
    clusters: tuple[ClusterGroup, ...]
    """The largest first."""
    uncovered: tuple[Uncovered, ...]
    conflicts: tuple[Conflict, ...]

    @property
    def coverage(self) -> float:
        """Share of the verifiable rows that are verified; 1 if there are none."""
        return self.verified / self.verifiable if self.verifiable else 1.0

    @property
    def errors(self) -> tuple[RouteGroup, ...]:
        """The routes where gold does not win, or could not be scored at all."""
        return tuple(group for group in self.routes if group.dry.verdict in ("lost", "failed"))


async def make_plan(
    rows: Iterable[tuple[int, Mapping[str, Any] | DataError]],
    dispatcher: Dispatcher,
    *,
    sample: int = 64,
    on_progress: Callable[[str, int, int | None], None] = lambda stage, done, total: None,
) -> Plan:
    """Plans a data set.

    Args:
        rows: Numbered rows, as `verl_rlar.row_files.read_rows` gives them.
        dispatcher: What routes and scores.
        sample: Most rows per route that are dry-scored; 0: none.
        on_progress: Called with the name of the stage, how much is done, and of how much (None: not known).

    Raises:
        DataError: The rows cannot be read at all.
    """
    survey = _Survey(sample)
    async for number, row in in_background(rows):
        try:
            if isinstance(row, DataError):
                raise row
            query = query_of(row)
        except DataError as error:
            survey.bad.append((number, str(error)))
        else:
            survey.add(number, query, await dispatcher.route(query))
        on_progress("routing", survey.rows + len(survey.bad), None)
    jobs = [job for group in survey.groups.values() for job in group.jobs()]
    on_progress("routing", survey.rows + len(survey.bad), survey.rows + len(survey.bad))
    if jobs:
        on_progress("dry scoring", 0, len(jobs))  # the start of the workers takes a while

    async def run(job: _Job) -> tuple[_Job, Score]:
        return job, await dispatcher.score(Sample(query=job.row.query, response=job.response), _ungated(job.row.route))

    done = 0
    async for job, score in in_order(run, in_background(jobs), at_once=dispatcher.at_once):
        job.row.scores[job.answer] = score
        done += 1
        on_progress("dry scoring", done, len(jobs))
    return survey.plan(dispatcher.clusters)


def first_boxed_row(
    path: str, config: RoutingConfig, snapshot: Snapshot, split: Split, *, prompt_key: str = "prompt"
) -> int | None:
    """Number of the first row of a file whose route has a tool that needs a sandbox; None: there is no such row.

    Args:
        prompt_key: The column that verl takes for the prompt (``data.prompt_key``).

    Raises:
        DataError: The file cannot be read, or none of its rows.
    """
    router = FeatureRouter(config)

    async def search() -> int | None:
        read, bad = 0, ""
        for number, row in read_rows(path):
            try:
                if isinstance(row, DataError):
                    raise row
                query = query_of({**row, "messages": row.get(prompt_key)})
            except DataError as error:  # what becomes of one bad row is not decided here
                bad = bad or f"row {number}: {error}"
                continue
            read += 1
            route = await router.route(query, snapshot, split)
            if any(snapshot.tool(part.tool).boxed for part in route.parts):
                return number
        if bad and not read:
            raise DataError(f"none of its rows can be read, {bad}")
        return None

    return asyncio.run(search())


# --- Gathering --------------------------------------------------------------------------------------------------------


@dataclass
class _Row:
    """A sampled row."""

    number: int
    query: Query
    route: Route
    scores: dict[str, Score] = field(default_factory=dict)

    def example(self, note: str = "") -> Example:
        return _example(self.number, self.query, note)


@dataclass
class _Job:
    row: _Row
    answer: str
    response: str


class _Group:
    """The rows of a route, and a fair sample of them."""

    def __init__(self, sample: int) -> None:
        self.rows = 0
        self.kinds: Counter[str] = Counter()
        self.sample: list[_Row] = []
        self._others: dict[str, str] = {}
        self._size = sample
        self._random = random.Random(0)

    def add(self, row: _Row) -> None:
        self.rows += 1
        self.kinds[row.route.kind.value] += 1
        if row.route.covered and len(self._others) < OTHERS and (gold := gold_answer(row.query, row.route.kind)):
            self._others.setdefault(_stated(gold), gold)
        if len(self.sample) < self._size:
            self.sample.append(row)
        elif (place := self._random.randrange(self.rows)) < self._size:
            self.sample[place] = row

    def jobs(self) -> Iterable[_Job]:
        """Every answer to be scored, for every sampled row; nothing where no tool scores."""
        self.sample.sort(key=lambda row: row.number)
        for row in self.sample:
            if row.route.covered:
                gold = gold_answer(row.query, row.route.kind)
                if gold is not None:
                    yield _Job(row, "gold", gold)
                    if self.rows > 1:
                        other = self._other(row, gold)
                        yield _Job(row, "other_reference" if other != gold else "only_reference", other)
                yield from (_Job(row, sort, text) for sort, text in _garbage(row))

    def _other(self, row: _Row, gold: str) -> str:
        """The gold answer to another row: a different one, unless all rows have the same."""
        others = [other for stated, other in self._others.items() if stated != _stated(gold)]
        return others[row.number % len(others)] if others else gold

    def dry_run(self) -> DryRun:
        rows = [row for row in self.sample if row.scores]
        if not rows:
            return DryRun(rows=0)
        sorts = dict.fromkeys(sort for row in rows for sort in row.scores if sort != "gold")
        garbage = {sort: _mean(row.scores[sort] for row in rows if sort in row.scores) for sort in sorts}
        failure = next((s.reason for row in rows for s in row.scores.values() if s.outcome is Outcome.FAILED), "")
        with_gold = [row for row in rows if "gold" in row.scores]
        if not with_gold:
            note = "no gold available" + (f"; {failure}" if failure else "")
            return DryRun(rows=len(rows), garbage=garbage, note=note)
        golds = [row.scores["gold"] for row in with_gold]
        failed = sum(gold.outcome is Outcome.FAILED for gold in golds)
        losses = [(row, why) for row in with_gold if (why := _why_gold_loses(row))]
        losses.sort(key=lambda loss: loss[0].scores["gold"].value or 0.0)
        unusable = sum(gold.outcome is Outcome.ABSTAINED for gold in golds)
        return DryRun(
            rows=len(with_gold),
            gold=_mean(golds),
            garbage=garbage,
            failed=failed,
            wins=len(with_gold) - len(losses) - failed,
            losers=tuple(row.example(why) for row, why in losses[:EXAMPLES]),
            unusable=unusable,
            weak=sum((gold.value or 0.0) < FULL_MARK for gold in golds) - unusable - failed,
            note=failure,
        )


class _Tally:
    """A count with examples."""

    def __init__(self) -> None:
        self.rows = 0
        self.examples: list[Example] = []

    def add(self, number: int, query: Query, note: str = "") -> None:
        self.rows += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(_example(number, query, note))


class _Survey:
    """What is gathered while the rows go by."""

    def __init__(self, sample: int) -> None:
        self.rows = self.verifiable = self.verified = self.unread = 0
        self.bad: list[tuple[int, str]] = []
        self.groups: dict[tuple[str, str], _Group] = {}
        self._sample = sample
        self._tools: Counter[str] = Counter()
        self._kinds: Counter[str] = Counter()
        self._clusters: dict[str, tuple[Counter[str], str]] = {}
        self._uncovered: dict[tuple[str, str, str], _Tally] = {}
        self._unscored: dict[str, _Tally] = {}
        self._contradictions = _Tally()
        self._references: dict[bytes, tuple[bytes, int]] = {}
        self._sources: dict[str, dict[str, _Tally]] = {}

    def add(self, number: int, query: Query, route: Route) -> None:
        features = describe(query)
        self.rows += 1
        self.verifiable += features.verifiable
        self.verified += features.verifiable and route.covered
        self.unread += query.reference is not None and not features.verifiable
        self._tools[route.name] += 1
        self._kinds[route.kind.value] += 1
        key = (route.name, query.data_source)
        self.groups.setdefault(key, _Group(self._sample)).add(_Row(number, query, route))
        self._clusters.setdefault(route.cluster, (Counter(), route.reason))[0][route.name] += 1
        if not route.covered:
            tally = self._uncovered.setdefault((route.kind.value, route.reason, route.name), _Tally())
            tally.add(number, query, f"reference: {_excerpt(query.reference)}" if query.reference else "")
        self._compare_labels(number, query)
        scored = SUBJECTS.get(route.kind)
        if left := [kind for kind, _ in features.kinds if SUBJECTS.get(kind) not in (None, scored)]:
            names = ", ".join(f"{SUBJECTS[kind]} ({kind.value})" for kind in left)
            what = f"rows are scored by {scored} ({route.kind.value}); a check by {names} is possible and not scored"
            self._unscored.setdefault(what, _Tally()).add(number, query)
        if query.data_source:
            kinds = self._sources.setdefault(query.data_source, {})
            kinds.setdefault(route.kind.value, _Tally()).add(number, query, route.reason)

    def _compare_labels(self, number: int, query: Query) -> None:
        if query.reference is None:
            return
        prompt = _digest([(message.role, message.content) for message in query.messages])
        reference = _digest(query.reference)
        first, at = self._references.setdefault(prompt, (reference, number))
        if first != reference:
            note = f"reference {_excerpt(query.reference)}, another one in row {at}"
            self._contradictions.add(number, query, note)

    def plan(self, clusters: Clusters) -> Plan:
        routes = tuple(
            RouteGroup(tool=tool, data_source=source, rows=group.rows, kinds=dict(group.kinds), dry=group.dry_run())
            for (tool, source), group in self.groups.items()
        )
        return Plan(
            rows=self.rows,
            bad=tuple(self.bad),
            verifiable=self.verifiable,
            verified=self.verified,
            unread_references=self.unread,
            tools=dict(self._tools.most_common()),
            kinds=dict(self._kinds.most_common()),
            routes=routes,
            clusters=tuple(
                ClusterGroup(
                    id=id, name=clusters.name(id), rows=tools.total(), tools=dict(tools.most_common()), reason=reason
                )
                for id, (tools, reason) in sorted(self._clusters.items(), key=lambda item: -item[1][0].total())
            ),
            uncovered=tuple(
                Uncovered(kind=kind, reason=reason, rows=tally.rows, examples=tuple(tally.examples), fallback=tool)
                for (kind, reason, tool), tally in self._uncovered.items()
            ),
            conflicts=tuple(self._conflicts(routes)),
        )

    def _conflicts(self, routes: tuple[RouteGroup, ...]) -> Iterable[Conflict]:
        def conflict(sort: str, what: str, tally: _Tally) -> Conflict:
            return Conflict(sort=sort, what=what, rows=tally.rows, examples=tuple(tally.examples))

        if self._contradictions.rows:
            yield conflict("different_references", "equal prompts have different references", self._contradictions)
        for what, tally in self._unscored.items():
            yield conflict("unscored_check", what, tally)
        for source, kinds in self._sources.items():
            if len(kinds) > 1:
                ordered = sorted(kinds.items(), key=lambda item: -item[1].rows)
                shares = ", ".join(f"{tally.rows} {kind}" for kind, tally in ordered)
                rest = [tally for _, tally in ordered[1:]]
                examples = tuple(example for tally in rest for example in tally.examples)[:EXAMPLES]
                what = f"data_source {source!r} holds queries of several kinds: {shares}"
                minority = sum(tally.rows for tally in rest)
                yield Conflict(sort="mixed_source", what=what, rows=minority, examples=examples)
        for group in routes:
            dry, where = group.dry, f"{group.tool} on data_source {group.data_source!r}"
            if dry.failed:
                what = f"{where}: scoring the gold answer failed on {dry.failed} of {dry.rows} sampled rows: {dry.note}"
                yield Conflict(sort="failed_gold", what=what, rows=dry.failed)
            if dry.unusable:
                what = f"{where}: cannot use the reference of {dry.unusable} of {dry.rows} sampled rows"
                yield Conflict(sort="unusable_reference", what=what, rows=dry.unusable, examples=dry.losers)
            if dry.verdict == "ok" and dry.weak:
                what = f"{where}: the gold answer does not get the full mark on {dry.weak} of {dry.rows} sampled rows"
                yield Conflict(sort="weak_gold", what=what, rows=dry.weak, examples=dry.losers)


# --- Answers ----------------------------------------------------------------------------------------------------------


def gold_answer(query: Query, kind: Kind) -> str | None:
    """A right answer to a query, made from its reference or its program; None where the row does not hold one."""
    if kind is Kind.UNIT_TESTS:
        return next((program for name in PROGRAM_COLUMNS if isinstance(program := query.extra.get(name), str)), None)
    if query.reference is None or SUBJECTS.get(kind) != SUBJECTS[Kind.MATH]:
        return None
    letter = re.fullmatch(r"\(?([A-Za-z])\)?\.?", query.reference.strip()) if kind is Kind.CHOICE else None
    return f"The answer is ({letter[1].upper()})." if letter else query.reference


def _garbage(row: _Row) -> Iterable[tuple[str, str]]:
    """Answers that must not win: sort and text."""
    yield "empty", ""
    yield "i_dont_know", "I don't know."
    yield "prompt", row.query.prompt
    yield "random_words", " ".join(random.Random(row.number).choices(WORDS, k=12))


def _stated(gold: str) -> str:
    """What a worked solution states in the end, so that equal answers by different ways count as equal."""
    final = re.split(r"####|\\boxed", gold)[-1]
    return "".join(filter(str.isalnum, final.casefold()))


def _why_gold_loses(row: _Row) -> str:
    """Why gold does not score more than all garbage; empty if it does, or if it could not be scored by our fault."""
    gold = row.scores["gold"]
    if gold.outcome is Outcome.FAILED:
        return ""
    about = f"reference {_excerpt(row.query.reference)}: "
    if gold.value is None:
        return f"{about}gold is unscored ({gold.outcome.value}: {gold.reason})"
    garbage = {sort: score.value for sort, score in row.scores.items() if sort != "gold" and score.value is not None}
    best = max(garbage, key=lambda sort: garbage[sort], default=None)
    if best is None or gold.value > garbage[best]:
        return ""
    return f"{about}gold scores {gold.value:.3g} ({gold.reason}), garbage ({best}) {garbage[best]:.3g}"


def _ungated(route: Route) -> Route:
    return replace(route, parts=tuple(part for part in route.parts if not part.gate))


def _mean(scores: Iterable[Score]) -> float | None:
    values = [score.value for score in scores if score.value is not None]
    return sum(values) / len(values) if values else None


def _digest(value: Any) -> bytes:
    return bytes.fromhex(content_hash(value))[:16]


def _excerpt(text: str | None) -> str:
    """A text on one line, cut."""
    line = " ".join((text or "")[: 4 * EXCERPT].split())
    return repr(line if len(line) <= EXCERPT else line[: EXCERPT - 1] + "…")


def _example(number: int, query: Query, note: str = "") -> Example:
    prompt = " ".join(query.prompt[: 4 * EXCERPT].split())[:EXCERPT]
    return Example(line=number, prompt=prompt, note=note)
