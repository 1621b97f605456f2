# SPDX-License-Identifier: Apache-2.0
"""Fills the gaps of a data set: where no tool is competent, agents look for tools, and the exam decides.

    find_gaps    which clusters of queries have no competent tool, what is lost by that, what could be done about it
    acquire      has it done for one of them: the scout's proposals are brought to their exam one by one until one
                 passes; or an LLM writes a verifier or a rubric. In a training, `verl_rlar.acquirer` calls it

A cluster is a gap (`shortfall`) if no tool fits it; if the lower end of what is known of its tool there is below
`rlar.acquire.competent`; and, in a training, if its tools leave too many of its responses unscored. What is to be
gained is its share of the rows times the *headroom*: by how much the share of pairs of answers that are put in the
right order could rise, where chance is 0.5. Clusters that are small each count together, by kind of query.

A verifiable kind (with a reference, tests, constraints, ...) goes to the coder, who needs an LLM; open dialogue goes to
the scout, who finds reward models by metadata where there is no LLM. Where there is one, and no reward model passed, or
before any is looked for (`rlar.acquire.rubrics`), the author writes a rubric (`verl_rlar.tools.rubric`), by which the
same LLM judges. All need labelled answers: without any, no exam says that a tool can tell right from wrong, and nothing
is downloaded.

Guarantees: what comes back is a `Submission` with the record of its exam; nothing is written into a library here. What
was tried in vain is named, with its reasons. A gap that was filled is none any more, so the same work done again goes
on where it stopped.

Not covered: exams are by kind of query, so a tool that was found for a cluster is examined on labelled answers to all
of its kind; labelled answers with values (`rlar.routing.labelled`) tell how good it is in its cluster. What a declared
route, or a preferred tool, scores is no gap, however weak that tool is.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from verl_rlar.admission import able, bring, draft, own_pairs, taken_names
from verl_rlar.chat import CHARS_PER_TOKEN
from verl_rlar.clusters import Clusters
from verl_rlar.competence import Competence
from verl_rlar.config import RlarConfig
from verl_rlar.dispatcher import Dispatcher
from verl_rlar.errors import ConfigError, DataError, HubError, ModelRefused, ToolError, ToolUnavailable
from verl_rlar.exam.hall import Hall
from verl_rlar.exam.subject import Subject
from verl_rlar.exam.trial import Examination
from verl_rlar.hub import Hub
from verl_rlar.inbox import Submission, record_of
from verl_rlar.library import EventKind, spec_to_json
from verl_rlar.purse import folder_of
from verl_rlar.router import by_settings
from verl_rlar.rows import query_of
from verl_rlar.serving import Pool
from verl_rlar.snapshots import Snapshots
from verl_rlar.tools.reward_model import RewardModelRunner
from verl_rlar.tools.rubric import Check, Rubric
from verl_rlar.types import Kind, Message, Query, Route, Sample, Snapshot, ToolSpec

Way = Literal["coder", "scout", "author", "nobody"]
OnProgress = Callable[[str, int, int | None], None]

SAMPLES = 16
"""Queries of a gap that are kept, for those who look for tools."""
BY = "acquisition"
"""Who it is that brings tools, in the library's log."""
TASKS: Mapping[Kind, str] = {
    Kind.UNIT_TESTS: "a program that passes its tests",
    Kind.CONSTRAINTS: "a response that keeps to the constraints of its prompt",
    Kind.JSON_SCHEMA: "a JSON document that fits its schema",
    Kind.CHOICE: "the right choice among several",
    Kind.MATH: "the right result of a mathematical problem",
    Kind.TRANSLATION: "a good translation",
    Kind.SHORT_TEXT: "the right short answer",
    Kind.OPEN: "helpful answers in an open dialogue",
}
"""What a kind of query is about, where nobody says it better."""


TYPICAL = Rubric(
    checks=tuple(Check(question=f"{number}. {'Is each thing that it says true? ' * 4}") for number in range(1, 6)),
    description="",
)
"""A rubric of the usual size, to estimate what one costs."""
PROMPT_CHARS, RESPONSE_CHARS = 200, 800
"""Length of a prompt of which nothing is known, and of a response."""
JUDGED_TOKENS = 30
"""What a judge writes."""
CHANCE = 0.5
"""Pairs of answers that are put in the right order where nobody looks at them."""


@dataclass(frozen=True, kw_only=True)
class Gap:
    """Queries without a competent tool."""

    kind: Kind
    cluster: str
    """Id of their cluster; empty: several small ones of that kind."""
    name: str
    """Of the cluster, for people."""
    rows: int
    share: float
    """Of all rows that can be read."""
    headroom: float
    """See the module; in [0, 0.5]."""
    reason: str
    """Why no tool is competent, for the most of them."""
    way: Way
    """Who could find one."""
    plan: str
    """What he would do, or why nobody can; in words."""
    task: str
    """What the queries are about, for him."""
    queries: tuple[Query, ...]
    """The first ones, at most `SAMPLES`."""

    @property
    def gain(self) -> float:
        """What is to be gained, in [0, 0.5]."""
        return self.share * self.headroom

    @property
    def title(self) -> str:
        """What it is, in words."""
        return f"{self.kind.value} queries ({self.name})" if self.name else f"{self.kind.value} queries"


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A tool that was brought to its exam, or did not get there."""

    name: str
    verdict: Literal["admitted", "rejected", "refused"]
    why: str


@dataclass(frozen=True, kw_only=True)
class Acquired:
    """What came of the work on a gap."""

    kind: Kind
    cluster: str
    """See `Gap`."""
    name: str
    way: Way
    tried: tuple[Tried, ...]
    submission: Submission | None
    """The tool that was admitted, for `verl_rlar.inbox.submit`; None if none was."""
    why: str

    def as_dict(self) -> dict[str, Any]:
        """JSON-like, without the record of the exam."""
        tool = None
        if self.submission is not None and self.submission.spec is not None:
            tool = {"name": self.submission.spec["name"], "digest": self.submission.digest}
        tried = [asdict(one) for one in self.tried]
        which = {"kind": self.kind.value, "cluster": self.cluster, "name": self.name}
        return {**which, "way": self.way, "tool": tool, "tried": tried, "why": self.why}


def shortfall(route: Route, snapshot: Snapshot, competence: Competence, competent: float) -> tuple[float, str] | None:
    """The headroom of a route, and why; None if its tools are competent, or the settings name them.

    Args:
        route: The route.
        snapshot: The tools that there are.
        competence: What is known of them.
        competent: `rlar.acquire.competent`.
    """
    if not route.covered:
        return 1.0 - CHANCE, route.reason.partition(" (")[0]
    scorers = [part for part in route.parts if not part.gate]
    if by_settings(route) or any(part.odds for part in scorers):  # a mixture is better than any tool by itself
        return None
    main = max(scorers, key=lambda part: part.weight)
    tool = next((tool for tool in snapshot.tools if tool.digest == main.digest), None)
    if tool is None:
        return 1.0 - CHANCE, f"{main.tool} is not live any more"
    here = competence.informed(route.kind, route.cluster)  # as the router believes
    belief = competence.believe(tool, route.kind, route.cluster, here=here)
    if not belief.known or belief.low >= competent:
        return None
    return 1.0 - max(belief.low, CHANCE), f"{tool.name} is weak: {belief.low:.2f} at least, {belief.source}"


class Shortfalls:
    """What falls short among queries that go by."""

    def __init__(self) -> None:
        self.total = 0
        self._found: dict[tuple[Kind, str], _Found] = {}

    def add(self, query: Query, kind: Kind, cluster: str, short: tuple[float, str] | None) -> None:
        """Takes note of a query, and of the headroom of its route with the reason, if there is any."""
        self.total += 1
        if short is not None:
            self._found.setdefault((kind, cluster), _Found()).add(query, *short)

    def gaps(self, config: RlarConfig, clusters: Clusters | None, least: float) -> tuple[Gap, ...]:
        """The gaps with at least this share of all queries, those first by which most is to be gained.

        Args:
            config: Says whether there is an LLM.
            clusters: Know their names.
            least: The share; in [0, 1].
        """
        whole: dict[tuple[Kind, str], _Found] = {}
        small: dict[tuple[Kind, str], _Found] = {}
        for (kind, cluster), found in self._found.items():
            if cluster and found.rows >= least * self.total:
                whole[kind, cluster] = found
            else:
                small.setdefault((kind, ""), _Found()).join(found)
        gaps = []
        for (kind, cluster), found in (whole | small).items():
            if found.rows < least * self.total:
                continue
            known = clusters.get(cluster) if clusters is not None else None
            way, plan = _way(kind, config)
            gaps.append(
                Gap(
                    kind=kind,
                    cluster=cluster,
                    name=known.name if known else cluster,
                    rows=found.rows,
                    share=found.rows / self.total,
                    headroom=found.headroom / found.rows,
                    reason=found.reasons.most_common(1)[0][0],
                    way=way,
                    plan=plan,
                    task=TASKS[kind] + (f": {known.name.partition(': ')[2]}" if known and known.named else ""),
                    queries=tuple(found.queries.values()),
                )
            )
        return tuple(sorted(gaps, key=lambda gap: (-gap.gain, gap.kind.value, gap.cluster)))


class _Found:
    def __init__(self) -> None:
        self.rows = 0
        self.headroom = 0.0
        self.reasons: Counter[str] = Counter()
        self.queries: dict[str, Query] = {}

    def add(self, query: Query, headroom: float, reason: str) -> None:
        self.rows += 1
        self.headroom += headroom
        self.reasons[reason] += 1
        if len(self.queries) < SAMPLES:
            self.queries[query.key] = query

    def join(self, other: _Found) -> None:
        self.rows += other.rows
        self.headroom += other.headroom
        self.reasons.update(other.reasons)
        for key, query in other.queries.items():
            if len(self.queries) < SAMPLES:
                self.queries[key] = query


async def find_gaps(
    rows: Iterable[tuple[int, Mapping[str, Any] | DataError]],
    dispatcher: Dispatcher,
    config: RlarConfig,
    least: float = 0.0,
    on_bad: Callable[[int, str], None] = lambda number, error: None,
) -> tuple[int, tuple[Gap, ...]]:
    """Routes a data set, and says which clusters of queries have no competent tool.

    Args:
        rows: Numbers and rows; those that cannot be read are left out.
        dispatcher: With the tools that there are, and what is known of them.
        config: Says whether there is an LLM, and what is competent.
        least: Share of the rows from which on a cluster is a gap by itself, and small ones of a kind are together.
        on_bad: Called with the number of a row that cannot be read, and why.

    Returns:
        Number of rows that can be read, and the gaps, those first by which most is to be gained.
    """
    found = Shortfalls()
    for number, row in rows:
        try:
            if isinstance(row, DataError):
                raise row
            query = query_of(row)
        except DataError as error:
            on_bad(number, str(error))
            continue
        route = await dispatcher.route(query)
        short = shortfall(route, dispatcher.snapshot, dispatcher.competence, config.acquire.competent)
        found.add(query, route.kind, route.cluster, short)
    return found.total, found.gaps(config, dispatcher.clusters, least)


def _way(kind: Kind, config: RlarConfig) -> tuple[Way, str]:
    agents, serving = config.agents, config.serving
    cap = f"at most {agents.tokens:,} tokens" + (f", {agents.dollars:g} dollars" if agents.dollars else "")
    rubric = f"{agents.model} writes a rubric, and judges by it: {cap}, and {config.rubrics.exam_tokens:,} for its exam"
    if kind is Kind.OPEN:
        if rubrics_are_written(kind, config) == "first":
            return "author", rubric
        who = f"{agents.model} ranks" if agents.url else "metadata rank"
        each = f"each at most {config.hub.max_gb:g} GiB, on {serving.backend}"
        plan = f"{who} reward models on the hub; the best ones are examined, {each}"
        return "scout", plan + (f"; if none passes, {rubric}" if rubrics_are_written(kind, config) == "after" else "")
    if agents.url:
        return "coder", f"{agents.model} writes a verifier: {cap}"
    return "nobody", "a verifier could be written, by an LLM: set agents.url and agents.model"


def remedy(kind: Kind, config: RlarConfig) -> str:
    """What would be done about a gap of this kind, with what it may cost; in words."""
    _, plan = _way(kind, config)
    each = f", then about {judging_tokens():,} for each scored response"
    return plan + (each if rubrics_are_written(kind, config) != "never" else "")


def rubrics_are_written(kind: Kind, config: RlarConfig) -> Literal["after", "first", "never"]:
    """Whether rubrics are written for a kind of query; see `rlar.acquire.rubrics`."""
    return config.acquire.rubrics if kind is Kind.OPEN and config.agents.url else "never"


def most_tokens(kind: Kind, config: RlarConfig) -> int:
    """Most tokens that may be spent on a gap, by an LLM that looks, writes and is examined."""
    if not config.agents.url:
        return 0
    rubrics = rubrics_are_written(kind, config)
    exam = 0 if rubrics == "never" else config.rubrics.exam_tokens
    return config.agents.tokens * (2 if rubrics == "after" else 1) + exam


def judging_tokens(queries: Collection[Query] = ()) -> int:
    """About how many tokens a rubric takes for a response to such queries, read and written."""
    asked = tuple(queries) or (Query(messages=(Message(role="user", content="?" * PROMPT_CHARS),)),)
    read = 0
    for query in asked:
        sample = Sample(query=query, response="!" * RESPONSE_CHARS)
        messages, _, _ = TYPICAL.request("", sample, 10**6)
        read += sum(len(message["content"]) for message in messages)
    return round(read / len(asked) / CHARS_PER_TOKEN) + JUDGED_TOKENS


async def acquire(
    gap: Gap,
    data: Sequence[str],
    config: RlarConfig,
    *,
    task: str = "",
    models: int = 3,
    taken: Collection[ToolSpec] = (),
    event: EventKind = "shadow",
    seed: int = 0,
    on_progress: OnProgress = lambda *_: None,
) -> Acquired:
    """Looks for a tool for a gap.

    Args:
        gap: Which one.
        data: Files of rows with labelled answers, or references, of that kind; others in them do not matter.
        config: All settings.
        task: What the queries are about, in words. Empty: `Gap.task`.
        models: Most models of the scout's that are examined.
        taken: The tools that there are, whose names are taken.
        event: What is to become of a tool that was admitted.
        seed: Of the exam.
        on_progress: Called while it works.

    Raises:
        ConfigError, ToolUnavailable: Something that is needed (an extra, a sandbox, an endpoint) is missing.
        DataError: The data cannot be read.
        HubError: The hub cannot be asked at all.
        AgentError: An agent cannot be started.
    """
    task = task or gap.task
    if gap.way == "nobody":
        return _acquired(gap, (), None, gap.plan)
    if gap.way == "coder":
        return await asyncio.to_thread(_written, gap, data, config, task, "verifier", event, seed, on_progress)
    if gap.way == "author":
        return await asyncio.to_thread(_written, gap, data, config, task, "rubric", event, seed, on_progress)
    rubric = rubrics_are_written(gap.kind, config) == "after"
    try:
        scouted = await _scouted(gap, data, config, task, models, taken, event, seed, on_progress)
    except (HubError, ToolUnavailable) as error:
        if not rubric:
            raise
        away = Tried(name="reward models", verdict="refused", why=str(error))
        scouted = _acquired(gap, (away,), None, "no reward model could be looked for")
    if scouted.submission is not None or not rubric:
        return scouted
    try:
        written = await asyncio.to_thread(_written, gap, data, config, task, "rubric", event, seed, on_progress)
    except (ConfigError, DataError) as error:
        written = _acquired(gap, (Tried(name="a rubric", verdict="refused", why=str(error)),), None, str(error))
    why = f"{scouted.why}; a rubric: {written.why}"
    return replace(written, way="author", tried=(*scouted.tried, *written.tried), why=why)


def _acquired(gap: Gap, tried: Sequence[Tried], submission: Submission | None, why: str) -> Acquired:
    return Acquired(
        kind=gap.kind,
        cluster=gap.cluster,
        name=gap.name,
        way=gap.way,
        tried=tuple(tried),
        submission=submission,
        why=why,
    )


# --- The scout --------------------------------------------------------------------------------------------------------


async def _scouted(
    gap: Gap,
    data: Sequence[str],
    config: RlarConfig,
    task: str,
    models: int,
    taken: Collection[ToolSpec],
    event: EventKind,
    seed: int,
    on_progress: OnProgress,
) -> Acquired:
    def ended(why: str, submission: Submission | None = None) -> Acquired:
        return _acquired(gap, tried, submission, why)

    tried: list[Tried] = []
    able(config.serving)
    async with Hall(config) as hall:
        evidence = await hall.gather(data, (), draft([gap.kind]), seed=seed, screened=False)
    pairs = own_pairs(evidence)
    if not pairs:
        return ended(
            f"no labelled answers to {gap.kind.value} queries, so no exam: give rows with `chosen` and "
            "`rejected`, or `response` and `label`"
        )
    live = {tool.target for tool in taken}
    for name in await asyncio.to_thread(_proposed, gap, config, task, models, on_progress):
        if name in live:
            tried.append(Tried(name=name, verdict="refused", why="it is in the library already"))
            continue
        async with AsyncExitStack() as stack:  # a pool for each: the one before has given its room back
            pool = await stack.enter_async_context(Pool(config.serving))
            hall = await stack.enter_async_context(Hall(config, RewardModelRunner(pool, Snapshots(config.hub).locate)))
            try:
                with Hub(config.hub) as hub:
                    brought = await bring(
                        name,
                        hub,
                        pool,
                        config,
                        kinds=[gap.kind],
                        pairs=pairs,
                        taken=taken_names(taken, name),
                        on_progress=on_progress,
                    )
                examination = await hall.examine(brought.subject, evidence, seed=seed, on_progress=on_progress)
            except (ModelRefused, HubError, ToolError) as error:
                tried.append(Tried(name=name, verdict="refused", why=str(error)))
                continue
        card = examination.card
        if card.admitted:
            tried.append(Tried(name=name, verdict="admitted", why=f"passed on {card.cases} cases"))
            return ended(f"{name} passed", submission_of(brought.subject, examination, config, event=event, why=task))
        tried.append(Tried(name=name, verdict="rejected", why="; ".join(card.reasons)))
    return ended(f"none of {len(tried)} models passed" if tried else "the scout proposes nothing")


def _proposed(gap: Gap, config: RlarConfig, task: str, models: int, on_progress: OnProgress) -> list[str]:
    from verl_rlar.agents.guided import guided
    from verl_rlar.agents.scout import brief_of, scout

    brief = brief_of(task, gap.queries)
    if config.agents.url:
        folder = Path(config.agents.transcripts or Path(config.run_dir) / "agents")
        findings = guided(
            brief, gap.queries, config.hub, config.agents, folder=folder, most=models, on_progress=on_progress
        )
    else:
        with Hub(config.hub) as hub:
            findings = scout(brief, hub, most=models, on_progress=on_progress)
    return [f"{proposal.repo}@{proposal.commit}" for proposal in findings.proposals]


# --- The coder, and the author of rubrics -----------------------------------------------------------------------------


def _written(
    gap: Gap,
    data: Sequence[str],
    config: RlarConfig,
    task: str,
    form: Literal["verifier", "rubric"],
    event: EventKind,
    seed: int,
    on_progress: OnProgress,
) -> Acquired:
    from verl_rlar.agents.coder import write

    written = write(
        task,
        data,
        config,
        folder=folder_of(config),
        kinds=[gap.kind],
        form=form,
        seed=seed,
        on_progress=on_progress,
    )
    tried = tuple(
        Tried(name=f"draft {trial.draft}, version {trial.version}", verdict="rejected", why=trial.state)
        for trial in written.trials
        if trial.state != "admitted"
    )
    submission = None
    if written.admitted:
        admitted = written.admitted
        submission = submission_of(admitted.subject, admitted.examination, config, event=event, why=task)
        cases = admitted.examination.card.cases
        tried += (Tried(name=written.name, verdict="admitted", why=f"passed on {cases} cases"),)
    judged = f" ({written.judged_tokens:,} tokens for its trials)" if form == "rubric" else ""
    return _acquired(gap, tried, submission, written.why + judged)


def submission_of(
    subject: Subject, examination: Examination, config: RlarConfig, *, event: EventKind | None, why: str
) -> Submission:
    """A tool with the record of its exam, for a library."""
    spec = examination.spec
    return Submission(
        digest=spec.digest,
        spec=spec_to_json(spec),
        source=subject.source or None,
        by=BY,
        why=f"looked for: {why}",
        exam=record_of(examination, config.life.canaries),
        event=event,
        replace=True,
    )
