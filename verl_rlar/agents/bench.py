# SPDX-License-Identifier: Apache-2.0
"""Where a coder's drafts are tried, on our side: what it asks for, and what it is told.

A draft is read (never run here), its own cases are asked in a box, then the open cases of the exam, then, if all is
well, the whole exam with its sealed cases, which decides. A rubric has no cases of its own; its open cases are asked
without the looks of an exam, which the whole one has.

Guarantees: what the coder is told is made of its own words and of open cases; of the sealed ones it learns one bit,
once for each draft. A draft that is no Python, says unusable things about itself, contradicts its own cases, or does
what another draft did before is told so. Limits are those of the exam, and for answers that people labelled stricter
than the exam's of some kinds. There are no more tries than the settings allow, whatever the coder asks for.

Not covered: what a coder could make of the bits of many runs on the same data.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from verl_rlar.config import RlarConfig
from verl_rlar.errors import ConfigError, DataError, ToolError, ToolUnavailable
from verl_rlar.exam.cases import Case, Expect
from verl_rlar.exam.evidence import Evidence
from verl_rlar.exam.hall import Hall
from verl_rlar.exam.subject import Subject, verifier
from verl_rlar.exam.trial import Answer, Examination, OnProgress
from verl_rlar.tools.rubric import Rubric
from verl_rlar.types import Kind, Message, Query, Sample, ToolSpec, content_hash

MOST_SECONDS = 10.0
"""Longest deadline that a verifier may give itself, in seconds."""
SOURCE_CHARS = 40_000
LEAST_WORDS = 8
"""Words that a description must have."""
SORT_CHARS = 40
OWN_CASES = (3, 12)
REPEATS = 24
"""Open cases that are asked again to see whether a draft always says the same; the exam itself asks more."""
LABELLED = ("labelled_right", "labelled_wrong")
"""Sorts of cases that real answers make: these are shown rather than what was made of them."""
LABELS_WRONG = 0.02
"""Largest share of labelled answers that a verifier may judge wrongly."""
EXAMPLES = 6
"""Open queries that a coder is shown."""
LEAST_QUERIES = 3
"""Queries of which there must be so many open ones, and so many sealed ones."""

Form = Literal["verifier", "rubric"]
"""What is written."""
State = Literal["fault", "own_cases", "duplicate", "open", "sealed", "admitted"]
"""How far a version came: ``fault``: it is unusable; ``own_cases``: it contradicts its own cases; ``duplicate``: it
does what another draft did; ``open``: it fails on open cases; ``sealed``: on sealed ones; ``admitted``."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What became of one version of a draft."""

    draft: int
    version: int
    state: State
    why: str
    """In words."""
    cases: int = 0
    """Open cases that it was asked."""
    wrong: int = 0
    """How many of them it got wrong."""
    seconds_per_1000: float | None = None
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Admitted:
    """The tool that was admitted, with its exam."""

    subject: Subject
    examination: Examination
    draft: int
    version: int
    source: str
    """A verifier's module, or a rubric's JSON."""


class Bench:
    """See the module.

    Args:
        hall: Where exams are held.
        evidence: All cases, open and sealed.
        name: The tool's name.
        kinds: What it is for.
        origin: Who writes it.
        config: Limits.
        seed: Of the exam.
        form: What is tried.
        on_progress: Called while it is tried.
    """

    def __init__(
        self,
        hall: Hall,
        evidence: Evidence,
        *,
        name: str,
        kinds: frozenset[Kind],
        origin: str,
        config: RlarConfig,
        seed: int,
        form: Form = "verifier",
        on_progress: OnProgress = lambda *_: None,
    ) -> None:
        self._form = form
        self._hall, self._evidence, self._seed, self._progress = hall, evidence, seed, on_progress
        self._name, self._kinds, self._origin, self._config = name, kinds, origin, config
        few = {"queries": 1.0, "good": 1.0, "bad": 1.0}
        exam = config.exam
        self._open_exam = exam.model_copy(
            update={
                "limits": exam.limits.model_copy(update=few),
                "by_kind": {kind: {**limits, **few} for kind, limits in exam.by_kind.items()},
                "repeats": min(REPEATS, exam.repeats),
            }
        )
        kept = {case.id for case in evidence.cases if not case.sealed}
        cases = tuple(c for c in evidence.cases if c.id in kept and (not c.twin or c.twin in kept))
        self._open = replace(evidence, cases=cases)
        self.needs_reference = any(case.expect is Expect.ABSTAIN for case in evidence.cases)
        self._seen: dict[str, int] = {}
        self._looked: set[int] = set()
        self.trials: list[Trial] = []
        self.admitted: Admitted | None = None

    def check(self) -> None:
        """Sees that there is enough evidence to admit anything.

        Raises:
            DataError: There is not.
        """
        lacks = [self._lack(kind) for kind in sorted(self._kinds, key=lambda kind: kind.value)]
        if all(lacks):
            apart = "".join(
                f" {len(self._evidence.set_apart)} rows were set apart: {w}." for _, w in self._evidence.set_apart[:1]
            )
            raise DataError(
                f"too little evidence for any verifier to be admitted: {'; '.join(lacks)}.{apart} Give more rows "
                "(--data), labelled answers, or case files (--cases)"
            )

    def _lack(self, kind: Kind) -> str:
        """What there is too little of; empty if there is enough."""
        limits = self._config.exam.limits_of(kind)
        cases = [case for case in self._evidence.cases if case.kind is kind]
        sealed = len({case.query.key for case in cases if case.sealed})
        opened = len({case.query.key for case in cases if not case.sealed})
        good, bad = (sum(case.expect is expect for case in cases) for expect in (Expect.GOOD, Expect.BAD))
        counts: tuple[tuple[int, float, str], ...] = (
            (sealed, LEAST_QUERIES, "sealed queries"),
            (opened, LEAST_QUERIES, "open queries"),
            (sealed + opened, limits.queries, "queries"),
            (good, limits.good, "right answers"),
            (bad, limits.bad, "wrong answers"),
        )
        short = [f"{count} {what} (at least {least:g})" for count, least, what in counts if count < least]
        return f"{kind.value}: {', '.join(short)}" if short else ""

    def examples(self) -> list[dict[str, Any]]:
        """Some open queries, each with a right and a wrong answer as far as there are any."""
        found: dict[str, dict[str, Any]] = {}
        for case in sorted(self._open.cases, key=lambda case: case.sort not in LABELLED):  # stable: as the rows come
            one = found.setdefault(case.query.key, _shown(case.query))
            if case.expect is Expect.GOOD:
                one.setdefault("right response", case.response)
            if case.expect is Expect.BAD and case.response.strip():
                one.setdefault("wrong response", case.response)
        best = sorted(found.values(), key=lambda one: -len(one))
        return best[:EXAMPLES]

    async def answer(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """Tries a version of a draft, and says what the coder may know of it.

        Raises:
            ToolUnavailable: There is no sandbox.
        """
        draft, version, source = int(question["draft"]), int(question["version"]), str(question["source"])
        told: dict[str, Any] = {"state": "fault", "again": True, "wrong": None, "fault": ""}
        if self.admitted or len(self.trials) >= self._config.agents.drafts * (1 + self._config.agents.repairs):
            return told | {"again": False, "fault": "there are no more tries"}

        def note(state: State, why: str, **fields: Any) -> None:
            self.trials.append(Trial(draft=draft, version=version, state=state, why=why, source=source, **fields))

        try:
            subject, own = self._read(source) if self._form == "verifier" else (self._rubric(source), [])
        except ConfigError as error:
            note("fault", str(error))
            return told | {"fault": str(error)}
        if faults := await self._own(subject, own):
            note("own_cases", faults[0])
            return told | {"state": "own_cases", "fault": "\n".join(faults)}
        opened = await self._hall.examine(
            subject, self._open, seed=self._seed, config=self._open_exam, looks=False, on_progress=self._progress
        )
        card = opened.card
        figures = {
            "cases": len(self._open.cases),
            "wrong": card.failed_cases + len(self._open.cases) - len(opened.answers),
            "seconds_per_1000": card.figures["all"]["seconds_per_1000"].value,
        }
        told |= {"state": "open", "cases": figures["cases"], "wrong": figures["wrong"]}
        missed = [] if card.admitted else [_timeless(reason) for reason in card.reasons]
        values = [[a.case.id, a.score.outcome.value, _rounded(a.value)] for a in opened.answers]
        before = self._seen.setdefault(content_hash([values, missed]), draft)
        if before != draft and not card.stopped and not card.admitted:  # those that get all right are all alike
            note("duplicate", f"does what draft {before} did", **figures)
            return told | {"state": "duplicate", "again": False}
        if card.admitted and (fault := self._labels_missed(opened)):
            missed.append(fault)
        if missed:
            note("open", "; ".join(missed), **figures)
            told["missed"] = missed
            told["failures"] = self._failures(opened)
            return told
        if draft in self._looked:
            note("sealed", "its look at the sealed cases is used up", **figures)
            return told | {"state": "sealed", "again": False}
        self._looked.add(draft)
        whole = await self._hall.examine(subject, self._evidence, seed=self._seed, on_progress=self._progress)
        if fault := "; ".join(whole.card.reasons) if not whole.card.admitted else self._labels_missed(whole):
            note("sealed", fault, **figures)
            return told | {"state": "sealed", "again": False}
        note("admitted", f"passed on {whole.card.cases} cases", **figures)
        self.admitted = Admitted(subject=subject, examination=whole, draft=draft, version=version, source=source)
        return told | {"state": "admitted", "again": False}

    def _read(self, source: str) -> tuple[Subject, list[Mapping[str, Any]]]:
        """The tool in a source text, and its own cases.

        Raises:
            ConfigError: It is unusable; the message says why.
        """
        if len(source) > SOURCE_CHARS:
            raise ConfigError(f"the module has {len(source):,} characters; at most {SOURCE_CHARS:,} are taken")
        subject = verifier(source, name=self._name, kinds=self._kinds, origin=self._origin)
        spec = subject.spec
        if spec.scope.kinds != self._kinds:
            raise ConfigError("the module sets KINDS: leave that out, the task says what it is for")
        if spec.scope.needs_reference != self.needs_reference:
            raise ConfigError(f"NEEDS_REFERENCE must be {self.needs_reference}")
        if not 0 < spec.timeout_s <= MOST_SECONDS:
            raise ConfigError(f"TIMEOUT_S is {spec.timeout_s:g}; it must be above 0 and at most {MOST_SECONDS:g}")
        if len(spec.description.split()) < LEAST_WORDS:
            raise ConfigError(f"DESCRIPTION is missing or has fewer than {LEAST_WORDS} words")
        return subject, _own_cases(source)

    def _rubric(self, source: str) -> Subject:
        """The tool that judges by a rubric.

        Raises:
            ConfigError: It is none; the message says why.
        """
        if len(source) > SOURCE_CHARS:
            raise ConfigError(f"the rubric has {len(source):,} characters; at most {SOURCE_CHARS:,} are taken")
        agents, rubrics = self._config.agents, self._config.rubrics
        spec = Rubric.from_text(source).spec(
            name=self._name,
            kinds=self._kinds,
            model=agents.model or "",
            timeout_s=rubrics.timeout_s,
            origin=self._origin,
        )
        return Subject(spec=spec)

    def _labels_missed(self, examination: Examination) -> str:
        """See `labels_missed`; a rubric has no more to show than its exam wants, as any opinion."""
        return labels_missed(examination) if self._form == "verifier" else ""

    async def _own(self, subject: Subject, cases: Sequence[Mapping[str, Any]]) -> list[str]:
        """What a verifier says of its own cases that it should not say."""
        faults = []
        for number, one in enumerate(cases, start=1):
            query = Query(
                messages=(Message(role="user", content=str(one.get("prompt") or "")),),
                reference=one.get("reference"),
                extra=one.get("extra") or {},
            )
            try:
                verdict = await self._hall.run(subject, Sample(query=query, response=str(one["response"])))
            except ToolUnavailable:
                raise
            except (ToolError, ConnectionError) as error:
                faults.append(f"your own case {number} ({one['response'][:200]!r}): {error}")
                continue
            if _rounded(verdict.value) != _rounded(one["score"]):
                faults.append(
                    f"your own case {number} ({one['response'][:200]!r}): it said {_said(verdict.value)} "
                    f"({verdict.reason[:200]}), and you wanted {_said(one['score'])}"
                )
        return faults

    def _failures(self, opened: Examination) -> list[dict[str, Any]]:
        """Some open cases that a version got wrong, of every sort some."""
        by_id: dict[str, Answer] = {answer.case.id: answer for answer in opened.answers}
        shown = []
        for failing in opened.card.failing[: self._config.agents.shown]:
            answer = by_id[failing.id]
            case: Case = answer.case
            assert not case.sealed
            texts = _shown(case.query) | {"response": case.response}
            wanted = failing.wanted
            if case.expect is Expect.SAME and (twin := by_id.get(case.twin)):
                texts["as good as the response"] = twin.case.response
                wanted = f"the same as of the other response, which was {_said(twin.value)}"
            shown.append(
                {
                    "sort": re.sub(r"\W+", "_", failing.sort)[:SORT_CHARS],
                    "wanted": wanted,
                    "value": failing.outcome if answer.value is None else _said(answer.value),
                    "case": texts,
                    "said": answer.score.reason or "(no reason given)",
                }
            )
        return shown


def labels_missed(examination: Examination) -> str:
    """What a verifier makes wrong of labelled answers, or says nothing of, in words; empty if it is little enough.

    The exam's limits of some kinds have room for reward models, or for changed programs that happen to be right; what
    real answers were labelled as needs no such room.
    """
    answers = [answer for answer in examination.answers if _labelled(answer.case)]
    wrong = sum(answer.value is None or (answer.value >= 0.5) is not _good(answer) for answer in answers)
    if wrong <= LABELS_WRONG * len(answers):
        return ""
    return f"{wrong} of {len(answers)} labelled answers are judged wrongly; at most {LABELS_WRONG:.0%} may be"


def _labelled(case: Case) -> bool:
    """Whether people said whether it is right: in a row, or in a case file."""
    given = case.sort in LABELLED or case.origin.startswith("line ")
    return given and case.expect in (Expect.GOOD, Expect.BAD)


def _good(answer: Answer) -> bool:
    return answer.case.expect is Expect.GOOD


def draft_of_nothing(name: str, kinds: frozenset[Kind], form: Form = "verifier") -> ToolSpec:
    """The spec that evidence is gathered for before there is any verifier, or any rubric."""
    spec = verifier("def score(prompt, response, reference, extra): ...", name=name, kinds=kinds).spec
    if form == "verifier":
        return spec
    return replace(spec, kind="rubric", boxed=False, scope=replace(spec.scope, needs_reference=False))


def _own_cases(source: str) -> list[Mapping[str, Any]]:
    """The cases that a module gives for itself.

    Raises:
        ConfigError: There are none, or they cannot be used.
    """
    least, most = OWN_CASES
    wanted = f"UNIT_CASES must be a literal list of {least} to {most} dicts, each with `response` and `score`"
    cases: Any = None
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and any(getattr(to, "id", "") == "UNIT_CASES" for to in node.targets):
            try:
                cases = ast.literal_eval(node.value)
            except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
                raise ConfigError(wanted) from None
    if not isinstance(cases, (list, tuple)) or not least <= len(cases) <= most:
        raise ConfigError(wanted)
    for case in cases:
        if not isinstance(case, dict) or not isinstance(case.get("response"), str) or "score" not in case:
            raise ConfigError(wanted)
        score, reference, extra = case["score"], case.get("reference"), case.get("extra") or {}
        if not (score is None or (isinstance(score, (int, float)) and 0 <= score <= 1)):
            raise ConfigError(f"{wanted}; a score is a number from 0 to 1, or None")
        if not isinstance(reference, str | None) or not isinstance(extra, dict):
            raise ConfigError(f"{wanted}; `reference` is a text or None, `extra` is a dict")
    return list(cases)


def _shown(query: Query) -> dict[str, Any]:
    """A query as a coder sees it: what `score` will be given."""
    shown: dict[str, Any] = {"prompt": query.prompt}
    if query.reference is not None:
        shown["reference"] = query.reference
    return shown | ({"extra": dict(query.extra)} if query.extra else {})


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(float(value), 2) + 0.0


def _said(value: float | None) -> str:
    return "None" if value is None else f"{value:.3g}"


def _timeless(reason: str) -> str:
    """A reason without measured times, so that the same draft is told the same."""
    return "it is too slow" if "p95_s" in reason or "a call takes" in reason else reason
