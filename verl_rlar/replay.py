# SPDX-License-Identifier: Apache-2.0
"""Replays a run from its ledger: what another tool, or another version, would have given; and compares two tools.

`rescore` asks a tool about stored responses. Where the stored route has a part of the tool's name, the tool takes the
place of that part, and the route is combined again with the stored scores of the other parts, by the code that
combines in training: weights, schedules and gates hold. Where it has none, the tool scores alone what it is for, and
leaves alone what it is not for. `compared` then says what verl would have made of it: an unscored response gets what it
gets in training (`rlar.scoring.on_unscored`), and `advantages` are those of verl's GRPO. `Tally` counts.

`diff_cases` and `diff_run` ask two tools the same things, and `agreement` says how far they agree.

Guarantees: the ledger and the library are read only. A response that cannot be replayed is counted with its reason, and
its group is left out of the comparison: a group that two rulers have measured says nothing. A tool that is asked again
in the very version that scored must say the same (`Rescored.reproduced`). One step is held in memory at a time.

Not covered: a rule runs with the code that is installed; its older versions stand in the library to be read, but code
runs outside a box only if it is installed. A run is not trained again: with other rewards its later responses would
have been others. Advantages are exact for verl's ``grpo`` without KL in the reward, up to the rounding of 32 bits.
"""

from __future__ import annotations

import heapq
import json
import math
import os
import re
import sqlite3
import statistics
import zlib
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from verl_rlar.config import RlarConfig, ScoringConfig
from verl_rlar.errors import ConfigError, DataError, LedgerError, LibraryError, ToolError, ToolUnavailable
from verl_rlar.exam.cases import Expect, read_cases
from verl_rlar.exam.evidence import Evidence, gather, screen
from verl_rlar.exam.subject import Subject
from verl_rlar.exam.subject import find as find_outside
from verl_rlar.exam.trial import SURE, Examination, OnProgress, examine
from verl_rlar.features import describe
from verl_rlar.ledger import FILE_NAME, read, stored_route, unpack
from verl_rlar.library import LibraryView, builtin_snapshot, spec_from_json
from verl_rlar.row_files import read_rows
from verl_rlar.scoring import ROUNDING, Scorer
from verl_rlar.streams import in_background, in_order
from verl_rlar.tools.boxed import BoxRunner
from verl_rlar.tools.rubric import RubricRunner
from verl_rlar.tools.rule import load_version
from verl_rlar.tools.runner import RuleRunner
from verl_rlar.tools.served import ServedModels
from verl_rlar.types import (
    Kind,
    Message,
    Outcome,
    Query,
    Route,
    RoutePart,
    Sample,
    Scope,
    Score,
    Snapshot,
    Split,
    ToolScore,
    ToolSpec,
)

SERVED_TOLERANCE = 1e-3
"""By so much the value of a reward model may differ when it is asked again: a response is computed in another batch."""
MODELS_AT_ONCE = 64
CHANGED = 1e-6
"""By so much two rewards, or advantages, differ."""
EPSILON = 1e-6
"""What verl's GRPO adds to the standard deviation."""
EXCERPT = 300
"""Most characters of a text in an example."""
LAST = 2**62
"""A step that no training reaches."""

Steps = tuple[int, int]
"""The first and the last one."""
How = Literal["in_place", "alone", "not_asked", "kept", "missing"]
"""``in_place``: the tool took the place of its part of the route. ``alone``: it scored instead of the route.
``not_asked``: another gate is shut, or the part has no weight at the step. ``kept``: the response was not to be
re-scored. ``missing``: it cannot be."""


# --- What is meant ----------------------------------------------------------------------------------------------------


def parse_steps(text: str | None) -> Steps:
    """The steps of ``7``, ``3..7``, ``3..`` or ``..7``; None: all.

    Raises:
        ConfigError: It is none of these, or the end is before the beginning.
    """
    if text is None:
        return 0, LAST
    match = re.fullmatch(r"(\d*)(\.\.)?(\d*)", text.strip(), re.ASCII)
    if match is None or not (match[1] or match[3]) or (match[3] and not match[2]):
        raise ConfigError(f"steps {text!r}: write 7, 3..7, 3.. or ..7")
    first = int(match[1] or 0)
    last = int(match[3] or LAST) if match[2] else first
    if last < first:
        raise ConfigError(f"steps {text!r}: the last step is before the first one")
    return min(first, LAST), min(last, LAST)


def run_folder(place: str) -> Path:
    """The folder with the ledger of a run: itself, or `rlar` in it; where there is none, reading it will say so.

    Raises:
        ConfigError: It is a file, and not the ledger.
    """
    path = Path(place)
    if path.is_file():
        if path.name != FILE_NAME:
            raise ConfigError(
                f"{path} is no ledger by its name, and {path.parent / FILE_NAME} is another file: give the folder of "
                f"a run; a copy of a ledger is read from a folder of its own, as {FILE_NAME}"
            )
        return path.parent
    return next((folder for folder in (path, path / "rlar") if (folder / FILE_NAME).is_file()), path)


def find_tool(name: str, library: LibraryView | None) -> Subject:
    """Finds a tool, and makes sure that it can run here.

    Args:
        name: Of a tool in the library: its name, its digest or the beginning of one, or ``name@digest``; a rule that is
            only named is meant as it is installed. Else see `verl_rlar.exam.subject.find`.
        library: The library of the run; None: there is none.

    Raises:
        ConfigError: There is no such tool, or its code is another one by now.
        LibraryError: The library is damaged.
    """
    wanted, at, version = name.partition("@")
    if name.endswith(".py") or ":" in name:
        return _runnable(find_outside(name))
    if library is None:
        if at:
            raise ConfigError(f"{name}: versions stand in the library of a run, and there is none here")
        return _runnable(find_outside(name))
    try:
        digest = library.find(version if at else name)
    except LibraryError as inside:
        if at:
            raise
        try:
            return _runnable(find_outside(name))
        except ConfigError as outside:
            raise ConfigError(f"{inside}. And outside of it: {outside}") from None
    spec = library.spec(digest)
    if spec.kind == "rule" and name == spec.name:
        return _runnable(find_outside(spec.target))  # in today's code: an older one cannot be run
    if at and (spec.name != wanted or not digest.startswith(version)):
        raise ConfigError(f"{name}: {digest} is a version of {spec.name}, not of {wanted}")
    return _runnable(Subject(spec=spec, source=(library.source(digest) or "") if spec.kind == "verifier" else ""))


def _runnable(subject: Subject) -> Subject:
    spec = subject.spec
    if spec.kind == "rule":
        try:
            load_version(spec)
        except ToolUnavailable:
            raise ConfigError(
                f"{spec.name} ({spec.digest}): the code of {spec.target} is another one by now, and a rule runs as it "
                f"is installed. Install the release that has it, or ask the code of today: {spec.target}"
            ) from None
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(f"{spec.name} ({spec.digest}): cannot import {spec.target}: {error}") from None
    return subject


class Bench:
    """Processes, boxes and servers in which tools are asked. Use as ``async with Bench(config, tools) as bench``.

    Args:
        config: The same settings as in training.
        tools: What will be asked. They are loaded when the context is entered, which is charged to no call.

    Raises:
        ToolUnavailable: A tool needs a sandbox, and there is none here, or the processes do not start.
    """

    def __init__(self, config: RlarConfig, tools: Sequence[Subject]) -> None:
        self.sources = {tool.spec.source_sha256: tool.source for tool in tools if tool.source}
        """Of verifiers, by `ToolSpec.source_sha256`. May grow."""
        self._config = config
        self._tools = tools
        self._boxes = BoxRunner(config.sandbox, self.sources)
        self._models = ServedModels(config.serving, config.hub)
        self._rubrics = RubricRunner(config)
        self._runner: RuleRunner | None = None

    async def __aenter__(self) -> Bench:
        targets = tuple(tool.spec.target for tool in self._tools if tool.spec.kind == "rule" and not tool.spec.boxed)
        self._runner = RuleRunner(self._config.rules, targets)
        self.scorer = Scorer(self._config.scoring, self._runner, self._boxes, self._models, self._rubrics)
        first = Sample(query=Query(messages=(Message(role="user", content="6 * 7?"),), reference="42"), response="42")
        try:
            for tool in self._tools:
                if tool.spec.boxed:
                    with suppress(ConnectionError):
                        await self._start_box(tool.spec, first)
                else:
                    await self.scorer.call(tool.spec, first)
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._close()

    async def _start_box(self, spec: ToolSpec, sample: Sample) -> None:
        try:
            await self._boxes.run(spec, sample)
        except ToolUnavailable:
            raise
        except ToolError:  # it will say so of every response
            pass

    async def _close(self) -> None:
        if self._runner is not None:
            self._runner.close()
        await self._boxes.close()
        await self._models.close()
        await self._rubrics.close()

    def at_once(self, *specs: ToolSpec) -> int:
        """How many responses to work on at the same time."""
        if all(spec.boxed for spec in specs):
            return self._config.sandbox.verifier_boxes or os.cpu_count() or 1
        if all(spec.opinion for spec in specs):
            return MODELS_AT_ONCE
        return self._config.rules.processes


# --- What stands in the ledger ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A response as the ledger has it."""

    attempt: int
    """Number of the start of training, from 1."""
    step: int
    uid: str
    """Of its GRPO group."""
    session: int
    """Its place in the group."""
    data_source: str
    sample: Sample | None
    """None: its text, or its query's, is not there (any more)."""
    route: Route | None
    """None: there was none, as the service did not answer."""
    score: Score
    """What it got then."""
    sent: float
    """The number that verl got for it."""

    @property
    def kind(self) -> Kind | None:
        """What its query was taken for; None: nobody knows."""
        if self.route is not None:
            return self.route.kind
        return describe(self.sample.query).kind if self.sample else None


def attempts(
    db: sqlite3.Connection, steps: Steps, *, split: Split = "train", attempt: int | None = None
) -> dict[int, int]:
    """The start of training whose responses count, by step, in rising order.

    Args:
        db: An open ledger.
        steps: Which steps.
        split: Training or validation.
        attempt: The start; None: for each step the latest one that has it.

    Raises:
        LedgerError: There is no response in those steps.
    """
    wanted = "split = ? AND (? IS NULL OR attempt = ?)"
    sql = f"SELECT step, MAX(attempt) FROM scores WHERE {wanted} AND step BETWEEN ? AND ? GROUP BY step ORDER BY step"
    found = {row[0]: row[1] for row in db.execute(sql, (split, attempt, attempt, *steps))}
    if not found:
        sql = f"SELECT MIN(step), MAX(step) FROM scores WHERE {wanted}"
        first, last = db.execute(sql, (split, attempt, attempt)).fetchone()
        of = f"{split} response" + (f" of attempt {attempt}" if attempt is not None else "")
        if first is None:
            starts = ", ".join(str(row[0]) for row in db.execute("SELECT attempt FROM attempts ORDER BY attempt"))
            raise LedgerError(f"the ledger has no {of}; there are attempts {starts or '(none)'}")
        raise LedgerError(f"the ledger has no {of} in those steps; it has steps {first} to {last}")
    return found


def responses(db: sqlite3.Connection, step: int, attempt: int, split: Split = "train") -> list[Stored]:
    """The responses of a step, group by group."""
    rows = db.execute(
        "SELECT scores.*, texts.body AS text, queries.body AS asked FROM scores "
        "LEFT JOIN texts ON texts.sha = scores.response LEFT JOIN texts AS queries ON queries.sha = scores.query "
        "WHERE split = ? AND scores.step = ? AND attempt = ? ORDER BY uid, session",
        (split, step, attempt),
    ).fetchall()
    sizes = Counter(row["uid"] for row in rows)
    routes: dict[tuple[str, str], Route | None] = {}
    found = []
    for row in rows:
        key = (row["snapshot"], row["query"])
        if key not in routes:
            routes[key] = stored_route(db, row["snapshot"], split, row["query"])
        found.append(
            Stored(
                attempt=attempt,
                step=step,
                uid=row["uid"],
                session=row["session"],
                data_source=row["data_source"],
                sample=_sample(row, sizes[row["uid"]]),
                route=routes[key],
                sent=row["sent"],
                score=Score(
                    value=row["value"],
                    outcome=Outcome(row["outcome"]),
                    reason=row["reason"],
                    parts=tuple(
                        ToolScore(**{**part, "outcome": Outcome(part["outcome"])}) for part in json.loads(row["parts"])
                    ),
                ),
            )
        )
    return found


def _sample(row: sqlite3.Row, group_size: int) -> Sample | None:
    if row["text"] is None or row["asked"] is None:
        return None
    try:
        response, asked = unpack(row["text"]), json.loads(unpack(row["asked"]))
        messages = tuple(Message(role=turn["role"], content=turn["content"]) for turn in asked["messages"])
    except (zlib.error, ValueError, KeyError, TypeError):  # a damaged text is a text that is gone
        return None
    query = Query(messages=messages, reference=asked["reference"], data_source=row["data_source"], extra=asked["extra"])
    return Sample(
        query=query,
        response=response,
        step=row["step"],
        uid=row["uid"],
        session=row["session"],
        group_size=group_size,
        split=row["split"],
    )


# --- Re-scoring -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Rescored:
    """A stored response, and what another tool makes of it."""

    stored: Stored
    how: How
    why: str = ""
    """Why it was kept or is missing, for a person."""
    score: Score | None
    """What it would have got; of a response that is kept, what it got; None: it cannot be said."""
    reproduced: bool | None = None
    """Whether the version that scored then says the same now. None: it is another version, or it failed."""
    failed: bool = False
    """Whether it could not be re-scored: it is missing, or a tool that was asked now has failed."""
    rewards: tuple[float, float] | None = None
    """What verl gets for it: then and now. None: its group is left out, see the module."""
    advantages: tuple[float, float] | None = None
    """The same through verl's GRPO; None also in validation, where there are none."""

    @property
    def asked(self) -> bool:
        """Whether the tool was asked."""
        return self.how in ("in_place", "alone")

    @property
    def change(self) -> float:
        """By how much verl's number would have changed."""
        return abs(self.rewards[1] - self.rewards[0]) if self.rewards else 0.0


@dataclass(frozen=True, kw_only=True)
class StepReplay:
    """A step's responses, re-scored."""

    step: int
    attempt: int
    responses: tuple[Rescored, ...]


class _Replay(Scorer):
    """A scorer that asks one tool, and of the others only those whose score is not known already."""

    def __init__(self, scorer: Scorer, spec: ToolSpec, known: Mapping[str, ToolScore]) -> None:
        self._scorer = scorer  # whose settings and processes count: the base class has none here
        self._spec = spec
        self._known = known
        self.said: ToolScore | None = None
        self.failed = False

    async def call(self, spec: ToolSpec, sample: Sample) -> ToolScore:
        asked = spec.digest == self._spec.digest
        if not asked and spec.name in self._known:
            return self._known[spec.name]
        score = await self._scorer.call(spec, sample)
        self.failed |= score.outcome is Outcome.FAILED
        if asked:
            self.said = score
        return score


class _Rescorer:
    def __init__(
        self, bench: Bench, tool: Subject, db: sqlite3.Connection, library: LibraryView | None, failed_only: bool
    ) -> None:
        self._bench = bench
        self._spec = tool.spec
        self._db = db
        self._library = library
        self._failed_only = failed_only
        self._specs: dict[str, ToolSpec] = {}

    async def one(self, stored: Stored) -> Rescored:
        spec, sample, route = self._spec, stored.sample, stored.route
        if self._failed_only and stored.score.value is not None:
            return Rescored(stored=stored, how="kept", why="it was scored", score=stored.score)
        in_place = route is not None and any(part.tool == spec.name for part in route.parts)
        if not in_place and stored.kind is not None and stored.kind not in spec.scope.kinds:
            why = f"{spec.name} is not for {stored.kind.value}"
            return Rescored(stored=stored, how="kept", why=why, score=stored.score)
        if sample is None:
            return _missing(stored, "its text is not in the ledger")
        if not in_place and not spec.fits(sample.query):
            why = f"{spec.name} is not for queries without a reference"
            return Rescored(stored=stored, how="kept", why=why, score=stored.score)
        known = {part.tool: part for part in stored.score.parts}
        if route is None or not in_place:
            known = {}
            alone = (RoutePart(tool=spec.name, digest=spec.digest),)
            kind = stored.kind or Kind.OPEN
            route = Route(parts=alone, reason="instead of the route", kind=kind, covered=True, snapshot="")
        try:
            snapshot = Snapshot(tools=tuple(spec if p.tool == spec.name else self._version(p) for p in route.parts))
        except LibraryError as error:
            return _missing(stored, str(error))
        replay = _Replay(self._bench.scorer, spec, known)
        score = await replay.score(sample, route, snapshot)
        if replay.said is None:
            return Rescored(
                stored=stored, how="not_asked", why="a gate is shut, or its part has no weight", score=score
            )
        return Rescored(
            stored=stored,
            how="in_place" if in_place else "alone",
            score=score,
            reproduced=_reproduced(spec, known.get(spec.name), replay.said, stored.score, score),
            failed=replay.failed,
        )

    def _version(self, part: RoutePart) -> ToolSpec:
        """The spec of a part in the version that scored then.

        Raises:
            LibraryError: It is nowhere.
        """
        digest = part.digest
        if digest not in self._specs:
            row = self._db.execute("SELECT spec FROM tools WHERE digest = ?", (digest,)).fetchone()
            if self._library is not None and digest in self._library.digests():
                spec = self._library.spec(digest)
                if spec.kind == "verifier" and (source := self._library.source(digest)):
                    self._bench.sources[spec.source_sha256] = source
            elif row is not None:
                spec = spec_from_json(json.loads(row["spec"]))
            else:
                raise LibraryError(f"{part.tool} ({digest}) of its route is neither in the library nor in the ledger")
            self._specs[digest] = spec
        return self._specs[digest]


def _missing(stored: Stored, why: str) -> Rescored:
    return Rescored(stored=stored, how="missing", why=why, score=None, failed=True)


def _reproduced(spec: ToolSpec, then: ToolScore | None, now: ToolScore, old: Score, new: Score) -> bool | None:
    if then is None or then.digest != now.digest or Outcome.FAILED in (then.outcome, now.outcome):
        return None
    tolerance = SERVED_TOLERANCE if spec.opinion else ROUNDING

    def same(one: float | None, other: float | None) -> bool:
        return one == other or (one is not None and other is not None and abs(one - other) <= tolerance)

    return then.outcome is now.outcome and same(then.value, now.value) and same(old.value, new.value)


async def rescore(
    run: Path,
    tool: Subject,
    config: RlarConfig,
    *,
    library: LibraryView | None = None,
    steps: Steps = (0, LAST),
    split: Split = "train",
    attempt: int | None = None,
    failed_only: bool = False,
    norm: bool = True,
    on_progress: OnProgress = lambda stage, done, total: None,
) -> AsyncIterator[StepReplay]:
    """Re-scores the stored responses of a run, step by step.

    Args:
        run: The ledger, or its folder.
        tool: Who scores now.
        config: The settings of the run.
        library: Its library; None: there is none.
        steps: Which steps.
        split: Training or validation.
        attempt: Which start of training; None: for each step the latest one that has it.
        failed_only: Only responses that were unscored then; the others keep their value.
        norm: ``algorithm.norm_adv_by_std_in_grpo`` of the run.
        on_progress: Called with the stage, how many responses are done, and of how many.

    Raises:
        LedgerError: There is no ledger, or it has nothing of those steps.
        ToolUnavailable: The tool needs a sandbox, and there is none here.
    """
    with read(run) as db:
        wanted = attempts(db, steps, split=split, attempt=attempt)
        total, done = _count(db, wanted, split), 0
        async with Bench(config, [tool]) as bench:
            rescorer = _Rescorer(bench, tool, db, library, failed_only)
            for step, of_attempt in wanted.items():
                answers: list[Rescored] = []
                stored = in_background(responses(db, step, of_attempt, split))
                work: Any = in_order(rescorer.one, stored, at_once=bench.at_once(tool.spec))
                async with aclosing(work):
                    async for answer in work:
                        answers.append(answer)
                        done += 1
                        on_progress("re-scoring", done, total)
                yield StepReplay(
                    step=step, attempt=of_attempt, responses=compared(answers, config.scoring, split=split, norm=norm)
                )


def _count(db: sqlite3.Connection, wanted: Mapping[int, int], split: Split) -> int:
    sql = "SELECT COUNT(*) FROM scores WHERE split = ? AND step = ? AND attempt = ?"
    return sum(db.execute(sql, (split, step, attempt)).fetchone()[0] for step, attempt in wanted.items())


# --- What verl makes of it --------------------------------------------------------------------------------------------


def advantages(rewards: Sequence[float], *, norm: bool = True) -> list[float]:
    """The advantages of one group, as of verl's ``compute_grpo_outcome_advantage``.

    Args:
        rewards: One number per response.
        norm: ``algorithm.norm_adv_by_std_in_grpo``.
    """
    count = len(rewards)
    if count > 1 and min(rewards) == max(rewards):
        return [0.0] * count
    mean = math.fsum(rewards) / count if count > 1 else 0.0
    deviation = math.sqrt(math.fsum((r - mean) ** 2 for r in rewards) / (count - 1)) if count > 1 else 1.0
    return [(reward - mean) / (deviation + EPSILON) if norm else reward - mean for reward in rewards]


def numbers(values: Sequence[float | None], scoring: ScoringConfig, split: Split = "train") -> list[float]:
    """What verl gets for the responses of a group: the values, and for unscored ones what stands in for them."""
    scored = [value for value in values if value is not None]
    by_siblings = bool(scored) and scoring.on_unscored == "siblings" and split == "train"
    stand_in = sum(scored) / len(scored) if by_siblings else scoring.neutral
    return [stand_in if value is None else value for value in values]


def compared(
    answers: Sequence[Rescored], scoring: ScoringConfig, *, split: Split = "train", norm: bool = True
) -> tuple[Rescored, ...]:
    """A step's responses with their rewards and advantages, then and now; in the order in which they come."""
    groups: dict[str, list[int]] = defaultdict(list)
    for place, answer in enumerate(answers):
        groups[answer.stored.uid].append(place)
    made = list(answers)
    for places in groups.values():
        then = [answers[place].stored.score.value for place in places]
        scores = [answers[place].score for place in places]
        now = [score.value for score in scores if score is not None]
        if len(now) < len(then):
            continue
        sent = [answers[place].stored.sent for place in places]
        rewards = [sent, sent if now == then else numbers(now, scoring, split)]
        gains = [_gains(values, sent, norm) for values, sent in zip((then, now), rewards, strict=True)]
        for n, place in enumerate(places):
            made[place] = replace(
                answers[place],
                rewards=(rewards[0][n], rewards[1][n]),
                advantages=(gains[0][n], gains[1][n]) if split == "train" else None,
            )
    return tuple(made)


def _gains(values: Sequence[float | None], rewards: Sequence[float], norm: bool) -> list[float]:
    if all(value is None for value in values):
        return [0.0] * len(values)  # a group with nothing scored has no gradient
    return advantages(rewards, norm=norm)


class Tally:
    """Counts what re-scoring changed: of a step, or of all.

    Args:
        examples: How many of the largest changes are kept.
    """

    def __init__(self, examples: int = 0) -> None:
        self.responses = 0
        self.how: Counter[str] = Counter()
        self.why: Counter[str] = Counter()
        """Why responses were kept or are missing."""
        self.outcomes: Counter[tuple[str, str]] = Counter()
        """Of responses that the tool was asked about: then, now."""
        self.failed = 0
        """Responses that could not be re-scored, those that are missing included."""
        self.reproduced: Counter[bool] = Counter()
        self.odd: list[Rescored] = []
        """Examples of what is not reproducible."""
        self.changes: list[Rescored] = []
        """Examples of the largest changes."""
        self._examples = examples
        self._compared = self._changed = self._groups = self._left_out = self._reranked = 0
        self._sums = [0.0, 0.0]
        self._gains: tuple[list[float], list[float]] = ([], [])

    def add(self, step: StepReplay) -> None:
        groups: dict[str, list[Rescored]] = defaultdict(list)
        for one in step.responses:
            groups[one.stored.uid].append(one)
            self.responses += 1
            self.how[one.how] += 1
            self.failed += one.failed
            if one.why:
                self.why[one.why] += 1
            if one.asked and one.score is not None:
                self.outcomes[one.stored.score.outcome.value, one.score.outcome.value] += 1
            if one.reproduced is not None:
                self.reproduced[one.reproduced] += 1
                if not one.reproduced and len(self.odd) < self._examples:
                    self.odd.append(one)
            if one.rewards is not None:
                self._compared += 1
                self._changed += one.change > CHANGED
                self._sums = [total + reward for total, reward in zip(self._sums, one.rewards, strict=True)]
            if one.advantages is not None:
                for all_of_them, gain in zip(self._gains, one.advantages, strict=True):
                    all_of_them.append(gain)
        for group in groups.values():
            rewards = [one.rewards for one in group if one.rewards is not None]
            self._groups += 1
            self._left_out += len(rewards) < len(group)
            self._reranked += _reranked(rewards)
        changed = [one for one in step.responses if one.change > CHANGED]
        self.changes = heapq.nlargest(self._examples, [*self.changes, *changed], key=lambda one: one.change)

    def figures(self) -> dict[str, Any]:
        """All counts, JSON-like; None where there is nothing to make a figure of."""
        count = self._compared
        then, now = self._gains
        pairs = list(zip(then, now, strict=True))
        return {
            "responses": self.responses,
            "rescored": self.how["in_place"] + self.how["alone"],
            **{name: self.how[name] for name in ("in_place", "alone", "not_asked", "kept", "missing")},
            "failed": self.failed,
            "outcomes": {f"{old} -> {new}": n for (old, new), n in sorted(self.outcomes.items())},
            "reproducible": self.reproduced[True],
            "not_reproducible": self.reproduced[False],
            "compared": count,
            "old_mean": self._sums[0] / count if count else None,
            "new_mean": self._sums[1] / count if count else None,
            "changed": self._changed / count if count else None,
            "groups": self._groups,
            "groups_left_out": self._left_out,
            "groups_reranked": self._reranked,
            "flipped": sum(_sign(a) * _sign(b) < 0 for a, b in pairs) / len(pairs) if pairs else None,
            "mean_advantage_change": sum(abs(a - b) for a, b in pairs) / len(pairs) if pairs else None,
            "advantage_correlation": pearson(pairs),
        }


def _sign(value: float) -> int:
    return (value > CHANGED) - (value < -CHANGED)


def _reranked(rewards: Sequence[tuple[float, float]]) -> bool:
    """Whether two responses are in another order now than then."""
    return any(
        _sign(one[0] - other[0]) != _sign(one[1] - other[1])
        for n, one in enumerate(rewards)
        for other in rewards[n + 1 :]
    )


def pearson(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Pearson's correlation; None for fewer than two pairs, or where one side is always the same."""
    try:
        return statistics.correlation([a for a, _ in pairs], [b for _, b in pairs])
    except statistics.StatisticsError:
        return None


def kendall(groups: Iterable[Sequence[tuple[float, float]]]) -> float | None:
    """Kendall's tau-b over all pairs within groups; None where one side ties all of them."""
    agree = left = right = 0
    for group in groups:
        for n, one in enumerate(group):
            for other in group[n + 1 :]:
                a, b = _sign(one[0] - other[0]), _sign(one[1] - other[1])
                agree += a * b
                left += a != 0
                right += b != 0
    return agree / math.sqrt(left * right) if left and right else None


# --- Two tools --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Pair:
    """What two tools say of one response."""

    on: Literal["cases", "run"]
    id: str
    """Of the case, or step, group and place of the response."""
    kind: Kind
    query: str
    """`Query.key`."""
    expect: str = ""
    """What a case demands."""
    prompt: str
    """Its beginning; foreign text, as is the next. Both are empty for a sealed case."""
    response: str
    """Its end."""
    scores: tuple[ToolScore, ToolScore]

    @property
    def values(self) -> tuple[float, float] | None:
        """None: one of them gave none."""
        a, b = (score.value for score in self.scores)
        return None if a is None or b is None else (a, b)

    @property
    def gap(self) -> float:
        """How far they are apart."""
        return abs(self.values[0] - self.values[1]) if self.values else 0.0


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far two tools agree on one kind of query."""

    pairs: int
    """Responses that both were asked about."""
    both: int
    """Those that both scored; shares and correlations are about these."""
    only_first: int
    only_second: int
    graded: bool
    """Whether one of them grades, or both say yes or no."""
    agreed: int
    """Yes or no: both from 1/2 on, or both below. Graded: within the tolerance of the exam."""
    pearson: float | None
    """Of the values."""
    kendall: float | None
    """Tau-b over pairs of responses to the same query: their order is what GRPO sees."""


@dataclass(frozen=True, kw_only=True)
class CasesDiff:
    """Two tools on the cases of an exam."""

    pairs: tuple[Pair, ...]
    """Cases that both were asked; without those that ask for no verdict."""
    exams: tuple[Examination, Examination]
    evidence: Evidence


def common_scope(a: ToolSpec, b: ToolSpec) -> Scope:
    """What both tools are for.

    Raises:
        ConfigError: Nothing.
    """
    kinds = a.scope.kinds & b.scope.kinds
    if not kinds:
        named = (f"{t.name} is for {' '.join(sorted(k.value for k in t.scope.kinds))}" for t in (a, b))
        raise ConfigError(f"there is nothing to compare: {', '.join(named)}")
    return Scope(kinds=kinds, needs_reference=a.scope.needs_reference and b.scope.needs_reference)


async def diff_cases(
    tools: tuple[Subject, Subject],
    bench: Bench,
    config: RlarConfig,
    *,
    data: Sequence[str] = (),
    case_files: Sequence[str] = (),
    seed: int = 0,
    on_progress: OnProgress = lambda stage, done, total: None,
) -> CasesDiff:
    """Asks two tools the same cases, as an exam does, but each case once.

    Args:
        tools: The tools.
        bench: Where they run.
        config: Settings.
        data: Files of rows to make cases of the kinds that both tools are for.
        case_files: Files of cases.
        seed: See `verl_rlar.exam.trial.examine`.
        on_progress: Called with the stage, how much is done, and of how much.

    Raises:
        ConfigError: There is no kind of query that both are for.
        DataError: A file cannot be read, a case file is wrong, or there is no case.
    """
    first, second = (tool.spec for tool in tools)
    spec = replace(first, scope=common_scope(first, second), gate=first.gate or second.gate)
    boxes = config.sandbox.backend != "none"
    judges = [t for t in builtin_snapshot(boxes=boxes).tools if t.target not in (first.target, second.target)]
    exam = config.exam.model_copy(update={"repeats": 0, "latency_s": math.inf, "boxed_latency_s": math.inf})
    evidence = Evidence()
    for path in data:
        rows = read_rows(path)
        more = gather(rows, spec, queries=exam.max_queries, seed=seed, sealed_share=exam.sealed_share)
        more = await screen(more, bench.scorer, judges, on_progress=lambda *done: on_progress("screening gold", *done))
        evidence = replace(
            evidence,
            cases=(*evidence.cases, *more.cases),
            set_apart=(*evidence.set_apart, *more.set_apart),
            bad=(*evidence.bad, *more.bad),
        )
    for path in case_files:
        made = read_cases(read_rows(path), seed=seed, sealed_share=exam.sealed_share, name=path)
        evidence = replace(evidence, cases=(*evidence.cases, *made))
    evidence = replace(evidence, cases=tuple({case.id: case for case in evidence.cases}.values()))
    if not evidence.cases:
        why = (
            f"; the first row that cannot be read is line {evidence.bad[0][0]}: {evidence.bad[0][1]}"
            if evidence.bad
            else ""
        )
        files = ", ".join((*data, *case_files))
        raise DataError(f"no case that both {first.name} and {second.name} are for could be made of {files}{why}")
    exams = []
    for tool in tools:
        about = _stage(on_progress, tool.spec)
        at_once = bench.at_once(tool.spec) if tool.spec.boxed else 1
        scorers = (bench.scorer, bench.scorer)
        exams.append(await examine(tool.spec, evidence, scorers, exam, seed=seed, at_once=at_once, on_progress=about))
    said = [{answer.case.id: answer.score for answer in exam.answers} for exam in exams]
    pairs = tuple(
        Pair(
            on="cases",
            id=case.id,
            kind=case.kind,
            query=case.query.key,
            expect=case.expect.value + (f" as {case.twin}" if case.twin else ""),
            prompt="" if case.sealed else case.query.prompt[:EXCERPT],
            response="" if case.sealed else case.response[-EXCERPT:],
            scores=(said[0][case.id], said[1][case.id]),
        )
        for case in evidence.cases
        if case.expect is not Expect.ABSTAIN and case.id in said[0] and case.id in said[1]
    )
    return CasesDiff(pairs=pairs, exams=(exams[0], exams[1]), evidence=evidence)


def _stage(on_progress: OnProgress, spec: ToolSpec) -> OnProgress:
    return lambda stage, done, total: on_progress(f"{spec.name} {spec.digest[:4]}: {stage}", done, total)


async def diff_run(
    run: Path,
    tools: tuple[Subject, Subject],
    bench: Bench,
    *,
    steps: Steps = (0, LAST),
    split: Split = "train",
    attempt: int | None = None,
    on_progress: OnProgress = lambda stage, done, total: None,
) -> tuple[list[Pair], Counter[str]]:
    """Asks two tools about the stored responses of a run that both are for.

    Args:
        run: The ledger, or its folder.
        tools: The tools.
        bench: Where they run.
        steps: Which steps.
        split: Training or validation.
        attempt: Which start of training; None: for each step the latest one that has it.
        on_progress: Called with the stage, how many responses are done, and of how many.

    Returns:
        What they said, and the number of responses that were left out, by the reason: ``missing`` (the text is not in
        the ledger) or ``other`` (of a kind that not both are for).

    Raises:
        ConfigError: There is no kind of query that both are for.
        LedgerError: There is no ledger, or it has nothing of those steps.
    """
    scope = common_scope(*(tool.spec for tool in tools))
    left_out: Counter[str] = Counter()
    pairs: list[Pair] = []

    async def ask(stored: Stored) -> Pair | str:
        kind, sample = stored.kind, stored.sample
        if kind is not None and kind not in scope.kinds:
            return "other"
        if sample is None or kind is None:
            return "missing"
        if not all(tool.spec.fits(sample.query) for tool in tools):
            return "other"
        scores = [await bench.scorer.call(tool.spec, sample) for tool in tools]
        return Pair(
            on="run",
            id=f"step {stored.step}, {stored.uid}, {stored.session}",
            kind=kind,
            query=sample.query.key,
            prompt=sample.query.prompt[:EXCERPT],
            response=sample.response[-EXCERPT:],
            scores=(scores[0], scores[1]),
        )

    with read(run) as db:
        wanted = attempts(db, steps, split=split, attempt=attempt)
        total, done = _count(db, wanted, split), 0
        for step, of_attempt in wanted.items():
            stored = in_background(responses(db, step, of_attempt, split))
            work: Any = in_order(ask, stored, at_once=bench.at_once(*(tool.spec for tool in tools)))
            async with aclosing(work):
                async for found in work:
                    done += 1
                    on_progress("stored responses", done, total)
                    if isinstance(found, str):
                        left_out[found] += 1
                    else:
                        pairs.append(found)
    return pairs, left_out


def agreement(pairs: Sequence[Pair], tolerance: float) -> Agreement:
    """How far two tools agree.

    Args:
        pairs: What they said, of one kind of query.
        tolerance: By how much graded values may differ.
    """
    values = [pair.values for pair in pairs if pair.values is not None]
    sides = [[pair.scores[side].value for pair in pairs] for side in (0, 1)]
    graded = any(_graded([value for value in side if value is not None]) for side in sides)
    groups: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for pair in pairs:
        if pair.values is not None:
            groups[pair.query].append(pair.values)
    return Agreement(
        pairs=len(pairs),
        both=len(values),
        only_first=sum(a is not None and b is None for a, b in zip(*sides, strict=True)),
        only_second=sum(a is None and b is not None for a, b in zip(*sides, strict=True)),
        graded=graded,
        agreed=sum(abs(a - b) <= tolerance if graded else (a >= 0.5) == (b >= 0.5) for a, b in values),
        pearson=pearson(values),
        kendall=kendall(groups.values()),
    )


def better(exams: tuple[Examination, Examination], kind: Kind) -> Literal["first", "second"] | None:
    """Which tool puts right answers above wrong ones more often, by 95 % intervals that do not meet; None: neither."""
    sides = [exam.card.figures.get(kind.value, {}) for exam in exams]
    ends = [
        [side[name].value if name in side else None for name in ("pairwise_low", "pairwise_high")] for side in sides
    ]
    (low_a, high_a), (low_b, high_b) = ends
    if low_a is None or high_a is None or low_b is None or high_b is None:
        return None
    return "first" if low_a > high_b else "second" if low_b > high_a else None


def _graded(values: Sequence[float]) -> bool:
    return sum(SURE < value < 1 - SURE for value in values) > 0.05 * len(values)


def quantile(values: Iterable[float], share: float) -> float | None:
    """The value below which that share of all lies; None without any."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None
