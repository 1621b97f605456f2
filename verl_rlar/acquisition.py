# SPDX-License-Identifier: Apache-2.0
"""Fills the gaps of a data set: for queries that no tool fits, agents look for tools, and the exam decides.

    find_gaps    which kinds of query have no tool, how many rows that are, and what could be done about it
    acquire      has it done for one of them: the scout's proposals are brought to their exam one by one until one
                 passes; or the coder writes a verifier. In a training, `verl_rlar.acquirer` calls it

A verifiable kind (with a reference, tests, constraints, ...) goes to the coder, who needs an LLM; open dialogue goes to
the scout, who finds reward models by metadata where there is no LLM. Both need labelled answers: without any, no exam
says that a tool can tell right from wrong, and nothing is downloaded.

Guarantees: what comes back is a `Submission` with the record of its exam; nothing is written into a library here. What
was tried in vain is named, with its reasons. A gap that was filled is none any more, so the same work done again goes
on where it stopped.

Not covered: gaps are by kind of query, not by cluster.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from verl_rlar.admission import able, bring, draft, own_pairs, taken_names
from verl_rlar.config import RlarConfig
from verl_rlar.dispatcher import Dispatcher
from verl_rlar.errors import DataError, HubError, ModelRefused, ToolError
from verl_rlar.exam.hall import Hall
from verl_rlar.exam.subject import Subject
from verl_rlar.exam.trial import Examination
from verl_rlar.hub import Hub
from verl_rlar.inbox import Submission, record_of
from verl_rlar.library import EventKind, spec_to_json
from verl_rlar.rows import query_of
from verl_rlar.serving import Pool
from verl_rlar.snapshots import Snapshots
from verl_rlar.tools.reward_model import RewardModelRunner
from verl_rlar.types import Kind, Query, ToolSpec

Way = Literal["coder", "scout", "nobody"]
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


@dataclass(frozen=True, kw_only=True)
class Gap:
    """Queries that no tool fits."""

    kind: Kind
    rows: int
    share: float
    """Of all rows that can be read."""
    reason: str
    """Why no tool fits, for the most of them."""
    way: Way
    """Who could find one."""
    plan: str
    """What he would do, or why nobody can; in words."""
    queries: tuple[Query, ...]
    """The first ones, at most `SAMPLES`."""


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
        return {"kind": self.kind.value, "way": self.way, "tool": tool, "tried": tried, "why": self.why}


async def find_gaps(
    rows: Iterable[tuple[int, Mapping[str, Any] | DataError]], dispatcher: Dispatcher, config: RlarConfig
) -> tuple[int, tuple[Gap, ...]]:
    """Routes a data set, and says which queries no tool fits.

    Args:
        rows: Numbers and rows; those that cannot be read are left out.
        dispatcher: With the tools that there are.
        config: Says whether there is an LLM.

    Returns:
        Number of rows that can be read, and the gaps, the largest first.
    """
    total = 0
    counts: Counter[Kind] = Counter()
    reasons: dict[Kind, Counter[str]] = {}
    queries: dict[Kind, list[Query]] = {}
    for _, row in rows:
        try:
            if isinstance(row, DataError):
                raise row
            query = query_of(row)
        except DataError:
            continue
        total += 1
        route = await dispatcher.route(query)
        if route.covered:
            continue
        counts[route.kind] += 1
        reasons.setdefault(route.kind, Counter())[route.reason.partition(" (")[0]] += 1
        kept = queries.setdefault(route.kind, [])
        if len(kept) < SAMPLES:
            kept.append(query)
    return total, tuple(
        gap_of(kind, count, total, reasons[kind].most_common(1)[0][0], queries[kind], config)
        for kind, count in counts.most_common()
    )


def gap_of(kind: Kind, rows: int, total: int, reason: str, queries: Sequence[Query], config: RlarConfig) -> Gap:
    """A gap, with what could be done about it under these settings."""
    way, plan = _way(kind, config)
    return Gap(
        kind=kind, rows=rows, share=rows / total, reason=reason, way=way, plan=plan, queries=tuple(queries[:SAMPLES])
    )


def _way(kind: Kind, config: RlarConfig) -> tuple[Way, str]:
    agents, serving = config.agents, config.serving
    if kind is Kind.OPEN:
        who = f"{agents.model} ranks" if agents.url else "metadata rank"
        each = f"each at most {config.hub.max_gb:g} GiB, on {serving.backend}"
        return "scout", f"{who} reward models on the hub; the best ones are examined, {each}"
    if agents.url:
        cap = f"at most {agents.tokens:,} tokens" + (f", {agents.dollars:g} dollars" if agents.dollars else "")
        return "coder", f"{agents.model} writes a verifier: {cap}"
    return "nobody", "a verifier could be written, by an LLM: set agents.url and agents.model"


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
        task: What the queries are about, in words. Empty: `TASKS`.
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
    task = task or TASKS[gap.kind]
    if gap.way == "scout":
        return await _scouted(gap, data, config, task, models, taken, event, seed, on_progress)
    if gap.way == "coder":
        return await asyncio.to_thread(_written, gap, data, config, task, event, seed, on_progress)
    return Acquired(kind=gap.kind, way="nobody", tried=(), submission=None, why=gap.plan)


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
        return Acquired(kind=gap.kind, way="scout", tried=tuple(tried), submission=submission, why=why)

    tried: list[Tried] = []
    able(config.serving)
    async with Pool(config.serving) as pool:
        runner = RewardModelRunner(pool, Snapshots(config.hub).locate)
        async with Hall(config, runner) as hall:
            evidence = await hall.gather(data, (), draft([gap.kind]), seed=seed, screened=False)
            pairs = own_pairs(evidence)
            if not pairs:
                return ended(
                    f"no labelled answers to {gap.kind.value} queries, so no exam: give rows with `chosen` and "
                    "`rejected`, or `response` and `label`"
                )
            for name in await asyncio.to_thread(_proposed, gap, config, task, models, on_progress):
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
                    return ended(
                        f"{name} passed", submission_of(brought.subject, examination, config, event=event, why=task)
                    )
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


# --- The coder --------------------------------------------------------------------------------------------------------


def _written(
    gap: Gap,
    data: Sequence[str],
    config: RlarConfig,
    task: str,
    event: EventKind,
    seed: int,
    on_progress: OnProgress,
) -> Acquired:
    from verl_rlar.agents.coder import write

    folder = Path(config.agents.transcripts or Path(config.run_dir) / "agents")
    written = write(task, data, config, folder=folder, kinds=[gap.kind], seed=seed, on_progress=on_progress)
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
    return Acquired(kind=gap.kind, way="coder", tried=tried, submission=submission, why=written.why)


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
