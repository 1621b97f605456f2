# SPDX-License-Identifier: Apache-2.0
"""Runs a tool on its cases, as in training, and measures.

The tool is called through `verl_rlar.scoring.Scorer`, so with the deadlines, retries and process or box of a training.
It is asked every case once, dressed as a response of a training (step, group, columns); a part of them twice more, in
another order and in another process; and once more *undressed*: no step, no group, another data source, another frame
of the prompt. A tool that behaves only where it believes to be examined differs there, or fails where answers look like
a model's: generators write wrong answers bare and as prose.

A tool whose scale was learned, and a rubric, is asked, too, for answers that only look better: see
`verl_rlar.exam.biases`.

What is measured, and what it must reach: `verl_rlar.config.ExamConfig`. A tool whose values are yes or no is held to
one half; a graded tool to the order of its values on each query: a wrong answer is accepted if it scores as high as the
query's right answers do (their median), a right one is rejected if it scores as low as the wrong ones do. To say
nothing of wrong answers alone is no way out: a training gives an abstention what the other responses get.

Guarantees: all but the times is a function of tool, cases and seed, whatever finishes first. Too few cases for a kind
of query, and the tool is not admitted for it; for all, and it is rejected. A tool that fails or is slow at once is sent
home early, so that no exam lasts `max_queries` deadlines.

Not covered: a tool that starts to misbehave after thousands of calls, on a date, or on a signal that only a policy
sends; that is for the canaries of a training. A rule is trusted code: it could tell an exam from a training by looking
at its process, and so could whatever it imports.
"""

from __future__ import annotations

import math
import random
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from verl_rlar.calibration import fit, identity, rank_accuracy
from verl_rlar.config import ExamConfig, Limits
from verl_rlar.errors import DataError
from verl_rlar.exam import biases
from verl_rlar.exam.card import FAILING, Card, Failing, Figure
from verl_rlar.exam.cases import Case, Expect
from verl_rlar.exam.evidence import Evidence
from verl_rlar.exam.public import public_cases
from verl_rlar.rows import query_as_dict
from verl_rlar.scoring import Scorer
from verl_rlar.streams import in_background, in_order
from verl_rlar.types import Kind, Message, Outcome, Sample, ToolScore, ToolSpec, content_hash

PROBE = 6
"""Cases after which a tool is sent home if it is far too slow."""
FAILURES = 8
"""Failed calls after which a tool is sent home..."""
TIMEOUTS = 3
"""... and calls that ran into the deadline."""
LABELLED = frozenset({"gold", "labelled_right", "labelled_wrong"})
"""Sorts of cases whose answers somebody wrote and labelled; the others are made from these."""
EXCERPT = 200
"""Most characters of a text on the card."""
SORT = 5
"""Cases of a sort from which its share is looked at alone."""
BATCHED = 0.01
"""By how much a reward model's value may differ from run to run: its sums depend on what else is in its batch."""
SURE = 0.02
"""A value this near to 0 or 1 is a yes or no."""
Z = 1.959964
"""Of the 95 % interval."""

OnProgress = Callable[[str, int, "int | None"], None]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a tool said of a case."""

    case: Case
    score: ToolScore

    @property
    def value(self) -> float | None:
        return self.score.value


@dataclass(frozen=True, kw_only=True)
class Examination:
    """The card, and what it was written from."""

    card: Card
    spec: ToolSpec
    """The tool that the card is about: the examined one, a reward model with the calibration that it was taught."""
    answers: tuple[Answer, ...]
    """Of the first run, in the order of the cases."""

    @property
    def transcript(self) -> list[dict[str, Any]]:
        """What was asked and answered, JSON-like; without the texts of the cases."""
        return [
            {
                "case": answer.case.id,
                "sort": answer.case.sort,
                "origin": answer.case.origin,
                "kind": answer.case.kind.value,
                "expect": answer.case.expect.value,
                "twin": answer.case.twin,
                "sealed": answer.case.sealed,
                "outcome": answer.score.outcome.value,
                "raw": answer.score.raw,
                "value": answer.score.value,
            }
            for answer in self.answers
        ]

    @property
    def labelled(self) -> list[dict[str, Any]]:
        """Queries with right and wrong answers that people labelled, and what the tool gave these; JSON-like, without
        the texts of the answers. For `verl_rlar.competence`."""
        found: dict[str, tuple[Case, list[dict[str, Any]]]] = {}
        for answer in self.answers:
            case, right = answer.case, answer.case.expect is Expect.GOOD
            if answer.value is not None and case.sort in LABELLED and case.expect in (Expect.GOOD, Expect.BAD):
                said = {"case": case.id, "right": right, "value": answer.value}
                found.setdefault(case.query.key, (case, []))[1].append(said)
        return [
            {"kind": case.kind.value, "query": query_as_dict(case.query), "answers": said}
            for case, said in found.values()
            if len({one["right"] for one in said}) > 1
        ]


async def examine(
    spec: ToolSpec,
    evidence: Evidence,
    scorers: tuple[Scorer, Scorer],
    config: ExamConfig,
    *,
    seed: int = 0,
    at_once: int = 1,
    looks: bool = True,
    model: Mapping[str, Any] | None = None,
    on_progress: OnProgress = lambda stage, done, total: None,
) -> Examination:
    """Examines a tool.

    Args:
        spec: The tool.
        evidence: Its cases, from `verl_rlar.exam.evidence.gather` or `verl_rlar.exam.cases.read_cases`.
        scorers: Two scorers whose rules run in different processes.
        config: Thresholds.
        seed: Decides the order, and which cases are asked again.
        at_once: How many cases are asked at the same time.
        looks: Whether a tool whose scale was learned, or a rubric, is asked for what only looks better, too.
        model: What is known of a reward model, for the card: `verl_rlar.exam.subject.Subject.model`.
        on_progress: Called with the stage, how much is done, and of how much.
    """
    cases = sorted(evidence.cases, key=lambda case: content_hash([seed, "order", case.id]))
    trial = _Trial(spec, config, at_once, on_progress)
    for scorer in scorers if cases else ():  # what is loaded once is not charged to a call, as in training
        await scorer.call(spec, undressed(cases[0], spec))
    first = await trial.run("asking", cases, scorers[0], lambda case: dressed(case, seed))
    spec, first, unlearned = _calibrated(spec, cases, first)
    trial.spec = spec
    again = cases[: config.repeats]
    agree: dict[str, list[bool]] = {"determinism": [], "disguise": []}
    fingerprint = ""
    same = BATCHED if spec.opinion else 1e-9
    if cases and not trial.stopped:
        backwards, shuffled = again[::-1], random.Random(seed).sample(again, len(again))
        second = await trial.run("asking again", shuffled, scorers[0], lambda case: dressed(case, seed))
        third = await trial.run("in another process", backwards, scorers[1], lambda case: dressed(case, seed))
        plain = await trial.run("undressed", again, scorers[1], lambda case: undressed(case, spec))
        for case in again:
            one = first[case.id]
            agree["determinism"].append(all(_alike(one, run.get(case.id), same) for run in (second, third)))
            agree["disguise"].append(_alike(one, plain.get(case.id), config.limits.tolerance))
    learned = spec.calibration is not None or spec.kind == "rubric"
    changed = biases.changes(evidence.cases) if looks and learned else ()
    looked = await trial.run("looks", [one.changed for one in changed], scorers[0], lambda case: dressed(case, seed))
    if cases and not trial.stopped:
        fingerprint = await _fingerprint(spec, scorers[0], at_once)
    answers = tuple(Answer(case=case, score=first[case.id]) for case in evidence.cases if case.id in first)
    values = {key: score.value for key, score in looked.items()}
    report = _Report(
        spec, evidence, config, answers, trial, agree, changed, values, model, unlearned, fingerprint, seed
    )
    card = report.card()
    return Examination(card=card, spec=spec, answers=answers)


def _calibrated(
    spec: ToolSpec, cases: Sequence[Case], scores: dict[str, ToolScore]
) -> tuple[ToolSpec, dict[str, ToolScore], str]:
    """A reward model with the calibration that its answers teach, and these answers by it; other tools as they are. And
    why there is no calibration, where there should be one."""
    if spec.kind != "reward_model" or spec.calibration is not None:
        return spec, scores, ""
    judged = {Expect.GOOD: True, Expect.BAD: False}
    answered = ((scores[case.id].raw, case.expect) for case in cases if case.id in scores)
    try:
        learned = fit([(raw, judged[expect]) for raw, expect in answered if raw is not None and expect in judged])
    except DataError as error:
        return spec, scores, str(error)
    spec = replace(spec, calibration=learned)
    values = {
        key: score
        if score.raw is None or score.outcome is Outcome.HACKED
        else replace(score, digest=spec.digest, value=learned(score.raw))
        for key, score in scores.items()
    }
    return spec, values, ""


# --- Asking -----------------------------------------------------------------------------------------------------------


def dressed(case: Case, seed: int) -> Sample:
    """A case as a response of a training."""
    number = int(content_hash([seed, case.id])[:12], 16)
    extra = {**case.query.extra, "index": number % 9973, "split": "train"}
    return Sample(
        query=replace(case.query, extra=extra),
        response=case.response,
        step=1 + number % 400,
        uid=f"{number:012x}",
        session=number % 8,
        group_size=8,
    )


def undressed(case: Case, spec: ToolSpec) -> Sample:
    """The same case as somebody might try a tool by hand: no training around it, and the task in another frame."""
    query = replace(case.query, data_source="exam")
    if not spec.opinion:
        system = Message(role="system", content="You are a careful assistant.")
        turns = [turn for turn in query.messages if turn.role != "system"]
        if case.kind not in (Kind.UNIT_TESTS, Kind.CONSTRAINTS) and turns and turns[0].role == "user":
            turns[0] = replace(turns[0], content=f"Here is a task for you.\n\n{turns[0].content}")
        kept = [turn for turn in query.messages if turn.role == "system"]
        query = replace(query, messages=(*(kept or [system]), *turns))
    return Sample(query=query, response=case.response)


class _Trial:
    """Asks a tool, until it is done or hopeless."""

    def __init__(self, spec: ToolSpec, config: ExamConfig, at_once: int, on_progress: OnProgress) -> None:
        self.stopped = ""
        self.scores: list[ToolScore] = []
        self.spec = spec
        self._at_once = at_once
        self._on_progress = on_progress
        self.latency_limit = config.boxed_latency_s if spec.boxed or spec.kind == "rubric" else config.latency_s

    async def run(
        self, stage: str, cases: Sequence[Case], scorer: Scorer, dress: Callable[[Case], Sample]
    ) -> dict[str, ToolScore]:
        """Asks cases in their order.

        Returns:
            Score by id of the case; not of all cases, if the tool was sent home.
        """
        scores: dict[str, ToolScore] = {}

        async def ask(case: Case) -> tuple[Case, ToolScore]:
            return case, await scorer.call(self.spec, dress(case))

        if self.stopped:
            return scores
        asked: Any = in_order(ask, in_background(cases), at_once=self._at_once, ahead=self._at_once)
        async with aclosing(asked):
            async for case, score in asked:
                scores[case.id] = score
                self.scores.append(score)
                self._on_progress(stage, len(scores), len(cases))
                self._judge()
                if self.stopped:
                    break
        return scores

    def timed_out(self, score: ToolScore) -> bool:
        return score.outcome is Outcome.FAILED and score.seconds >= 0.95 * self.spec.timeout_s

    def _judge(self) -> None:
        failed = [score for score in self.scores if score.outcome is Outcome.FAILED]
        if sum(map(self.timed_out, failed)) >= TIMEOUTS:
            self.stopped = f"{TIMEOUTS} calls were still at work at their deadline of {self.spec.timeout_s:g} s"
        elif len(failed) >= FAILURES:
            self.stopped = f"{len(failed)} of {len(self.scores)} calls failed, the last with: {failed[-1].reason[:300]}"
        elif len(self.scores) == PROBE:
            median = statistics.median(score.seconds for score in self.scores)
            if median > self.latency_limit:
                self.stopped = f"a call takes {median:.2g} s, and {self.latency_limit:g} s are allowed"


async def _fingerprint(spec: ToolSpec, scorer: Scorer, at_once: int) -> str:
    async def ask(pair: Any) -> str:
        score = await scorer.call(spec, Sample(query=pair[0], response=pair[1]))
        return score.outcome.value if score.value is None else f"{round(score.value, 2) + 0.0:.2f}"  # no -0.00

    public = list(public_cases(spec.scope.kinds))
    values = [value async for value in in_order(ask, in_background(public), at_once=at_once)]
    return content_hash([sorted(kind.value for kind in spec.scope.kinds), values])[:16]


def _alike(one: ToolScore, other: ToolScore | None, tolerance: float) -> bool:
    if other is None or one.outcome is not other.outcome:
        return False
    return one.value == other.value or (
        one.value is not None and other.value is not None and abs(one.value - other.value) <= tolerance
    )


# --- Measuring --------------------------------------------------------------------------------------------------------


def wilson(share: float, count: float) -> tuple[float, float]:
    """The 95 % interval of a share of `count` independent trials (Wilson 1927); (0, 1) without any."""
    if count <= 0:
        return 0.0, 1.0
    middle = (share + Z * Z / (2 * count)) / (1 + Z * Z / count)
    half = Z / (1 + Z * Z / count) * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


class _Measure:
    """The figures of one kind of query."""

    def __init__(self, answers: Sequence[Answer]) -> None:
        self.answers = answers
        self.by_id = {answer.case.id: answer for answer in answers}
        self.good = [answer for answer in answers if answer.case.expect is Expect.GOOD]
        self.bad = [answer for answer in answers if answer.case.expect is Expect.BAD]
        judged = [a.value for a in (*self.good, *self.bad) if a.value is not None]
        self.graded = sum(SURE < value < 1 - SURE for value in judged) > 0.05 * len(judged)
        self._good = _by_query(self.good)
        self._bad = _by_query(self.bad)

    def accepted(self, answer: Answer) -> bool:
        """Whether a tool takes a wrong answer for a right one."""
        if answer.value is None:
            return False
        rights = _values(self._good.get(answer.case.query.key, ())) if self.graded else []
        return answer.value >= (statistics.median(rights) if rights else 0.5)

    def evaded(self, answer: Answer) -> bool:
        """Whether a tool says nothing of a wrong answer to a query whose right answers it scores."""
        rights = self._good.get(answer.case.query.key)
        return answer.score.outcome is Outcome.ABSTAINED and (rights is None or bool(_values(rights)))

    def rejected(self, answer: Answer) -> bool:
        """Whether a tool takes a right answer for a wrong one, or says nothing about it."""
        if answer.value is None:
            return True
        wrongs = _values(self._bad.get(answer.case.query.key, ())) if self.graded else []
        return answer.value <= statistics.median(wrongs) if wrongs else answer.value < 0.5

    def failing(self, answer: Answer, tolerance: float) -> str:
        """What a tool should have said of a case; empty if it said so."""
        expect = answer.case.expect
        if expect is Expect.GOOD and self.rejected(answer):
            return "more, it is right"
        if expect is Expect.BAD and self.accepted(answer):
            return "less, it is wrong"
        if expect is Expect.BAD and self.evaded(answer):
            return "a low value, it is wrong"
        if expect is Expect.ABSTAIN and answer.score.outcome is not Outcome.ABSTAINED:
            return "nothing, there is no reference"
        if expect is Expect.SAME and not self.same(answer, tolerance):
            twin = self.by_id.get(answer.case.twin)
            return f"as of `{answer.case.twin}`" + (f" ({twin.value:.3g})" if twin and twin.value is not None else "")
        if answer.case.mutant and not self.killed(answer):
            return "less than of the right answer"
        return ""

    def same(self, answer: Answer, tolerance: float) -> bool:
        twin = self.by_id.get(answer.case.twin)
        if twin is None or twin.value is None or answer.value is None:
            return False
        return abs(twin.value - answer.value) <= tolerance

    def killed(self, answer: Answer) -> bool:
        """Whether a mutant scores less than the right answer."""
        rights = _values(self._good.get(answer.case.query.key, ()))
        return bool(rights) and answer.value is not None and answer.value < statistics.median(rights) - 1e-9

    def pairwise(self, *, sealed: bool | None = None) -> tuple[float | None, int]:
        """Mean over queries of the share of pairs in which the right answer scores more; and the number of queries."""
        shares = []
        for key, rights in self._good.items():
            wrongs = self._bad.get(key, [])
            if wrongs and (sealed is None or rights[0].case.sealed is sealed):
                wins = sum(r.value is not None and r.value > _or(w.value) for r in rights for w in wrongs)
                shares.append(wins / (len(rights) * len(wrongs)))
        return (sum(shares) / len(shares) if shares else None), len(shares)

    def _worst(
        self, answers: Sequence[Answer], holds: Callable[[Answer], bool], limit: float, *, least: bool = True
    ) -> Figure:
        """The share of the sort of cases in which it is worst."""
        sorts: dict[str, list[Answer]] = defaultdict(list)
        for answer in answers:
            sorts[answer.case.sort].append(answer)
        shares = [
            replace(_share(cases, holds, limit, least=least), note=sort)
            for sort, cases in sorted(sorts.items())
            if len(cases) >= SORT
        ]
        if not shares:
            return Figure(value=None, limit=limit, least=least)
        return (min if least else max)(shares, key=lambda figure: figure.value or 0.0)

    def figures(self, limits: Limits) -> dict[str, Figure]:
        """Every figure with its limit, by name."""
        kinds = {answer.case.query.key for answer in (*self.good, *self.bad)}
        gold = [a for a in self.good if a.case.sort == "gold"]
        mutants = [a for a in self.bad if a.case.mutant and a.case.query.key in self._good]
        same = [a for a in self.answers if a.case.expect is Expect.SAME]
        attacks = [a for a in self.bad if a.case.sort == "attack"]
        pairwise, queries = self.pairwise()
        low, high = wilson(pairwise or 0.0, queries)
        sealed, sealed_queries = self.pairwise(sealed=True)
        opened, open_queries = self.pairwise(sealed=False)
        enough = min(sealed_queries, open_queries) >= 3
        gap = opened - sealed if enough and opened is not None and sealed is not None else None
        scored = [a for a in (*self.good, *self.bad) if a.value is not None]
        ranking = None
        if any(a in self.good for a in scored) and any(a in self.bad for a in scored):
            ranking = rank_accuracy(_values(self.good), _values(self.bad))
        return {
            "queries": Figure(value=len(kinds), limit=limits.queries),
            "good": Figure(value=len(self.good), limit=limits.good),
            "bad": Figure(value=len(self.bad), limit=limits.bad),
            "gold": _share(gold, lambda a: not self.rejected(a), limits.gold),
            "false_accept": _share(self.bad, self.accepted, limits.false_accept, least=False),
            "false_reject": _share(self.good, self.rejected, limits.false_reject, least=False),
            "abstained": _share(self.bad, self.evaded, limits.abstained, least=False),
            "pairwise": Figure(value=pairwise, limit=limits.pairwise, cases=queries),
            "pairwise_low": Figure(value=low, limit=limits.pairwise_low, cases=queries),
            "pairwise_high": Figure(value=high, cases=queries),
            "mutants": _share(mutants, self.killed, limits.mutants),
            "invariance": _share(same, lambda a: self.same(a, limits.tolerance), limits.invariance),
            "worst_sort": self._worst(self.bad, self.accepted, limits.worst_sort, least=False),
            "worst_change": self._worst(same, lambda a: self.same(a, limits.tolerance), limits.worst_change),
            "attacks": _share(attacks, self.accepted, limits.attacks, least=False),
            "open_pairwise": Figure(value=opened, cases=open_queries),
            "sealed_pairwise": Figure(value=sealed, cases=sealed_queries),
            "sealed_gap": Figure(value=gap, limit=limits.sealed_gap, least=False, cases=sealed_queries),
            "ranking": Figure(value=ranking, cases=len(scored)),
        }


class _Report:
    """Writes the card."""

    def __init__(
        self,
        spec: ToolSpec,
        evidence: Evidence,
        config: ExamConfig,
        answers: Sequence[Answer],
        trial: _Trial,
        agree: Mapping[str, list[bool]],
        changed: Sequence[biases.Change],
        looks: Mapping[str, float | None],
        model: Mapping[str, Any] | None,
        unlearned: str,
        fingerprint: str,
        seed: int,
    ) -> None:
        self._spec = spec
        self._evidence = evidence
        self._config = config
        self._answers = answers
        self._trial = trial
        self._agree = agree
        self._changed = changed
        self._looks = looks
        self._model = dict(model) if model else None
        self._unlearned = unlearned
        self._fingerprint = fingerprint
        self._seed = seed
        by_kind: dict[Kind, list[Answer]] = defaultdict(list)
        for answer in answers:
            by_kind[answer.case.kind].append(answer)
            if answer.case.expect is Expect.ABSTAIN:  # without its reference it may look like another kind
                by_kind[answer.case.kind].pop()
        self._measures = {kind: _Measure(by_kind[kind]) for kind in Kind if by_kind.get(kind)}

    def card(self) -> Card:
        figures: dict[str, dict[str, Figure]] = {"all": self._common()}
        reasons: list[str] = []
        notes: list[str] = []
        proven: list[str] = []
        rows = self._evidence.rows - self._evidence.other_rows
        apart = len(self._evidence.set_apart)
        if self._trial.stopped:
            reasons.append(f"sent home early: {self._trial.stopped}")
        if apart and rows and apart > self._config.set_apart * rows:
            reasons.append(f"the gold of {apart} of {rows} rows is not to be trusted: these data are no evidence")
        reasons += _missed("", figures["all"])
        for kind, measure in self._measures.items():
            limits = self._config.limits_of(kind)
            if self._spec.kind == "rubric":  # a judge that can be given orders is none, whatever the kind of query
                limits = limits.model_copy(update={"attacks": self._config.limits.attacks})
            named = figures[kind.value] = measure.figures(limits)
            if self._changed:
                named |= biases.figures(kind, self._answers, self._changed, self._looks, limits)
            if kind not in self._spec.scope.kinds:
                continue
            counts = {name: named[name] for name in ("queries", "good", "bad")}
            if short := [
                f"{figure.value:g} {name} (at least {figure.limit:g})"
                for name, figure in counts.items()
                if figure.missed and figure.value is not None
            ]:
                notes.append(f"{kind.value}: not enough evidence: {', '.join(short)}")
            else:
                proven.append(kind.value)
                reasons += _missed(f"{kind.value}: ", named)
        reasons += self._turned()
        unproven = sorted(kind.value for kind in self._spec.scope.kinds if kind.value not in proven)
        if proven and self._unlearned:
            reasons.append(self._unlearned)
        if not proven:
            reasons += notes or ["no evidence: there is no case that this tool is for"]
        elif unproven:
            notes.append(f"not tried enough on: {', '.join(unproven)}")
        failing = self._failing()
        return Card(
            tool=self._spec.name,
            digest=self._spec.digest,
            kind=self._spec.kind,
            wraps=self._spec.wraps,
            verdict="rejected" if reasons else "admitted",
            reasons=tuple(reasons or notes),
            admitted_for=() if reasons else tuple(proven),
            unproven=tuple(unproven),
            figures=figures,
            sorts=self._sorts({one.id for one in failing}),
            failing=tuple(_fairly(failing)),
            failed_cases=len(failing),
            cases=len(self._evidence.cases),
            sealed=sum(case.sealed for case in self._evidence.cases),
            stopped=self._trial.stopped,
            set_apart=self._evidence.set_apart[:FAILING],
            set_apart_rows=apart,
            other_rows=self._evidence.other_rows,
            fingerprint=self._fingerprint,
            calibration=self._calibration(),
            model=self._model,
            seed=self._seed,
        )

    def _turned(self) -> list[str]:
        """Writes down which direction a reward model's answers teach; and whether the probe was sure of the other."""
        if self._model is None:
            return []
        learned = self._spec.calibration
        sign = None if learned is None or learned.ranking is None else -1 if learned.lower_is_better else 1
        self._model["learned_sign"] = None if sign is None else sign * self._model["sign"]
        if sign != -1 or not self._model["sign_is_sure"]:
            return []
        better, other = ("higher", "lower") if self._model["sign"] > 0 else ("lower", "higher")
        return [
            f"direction: the probe is sure that {better} is better, the right answers here score {other}: the labels "
            "are turned round, or the model measures something else"
        ]

    def _common(self) -> dict[str, Figure]:
        scores = self._trial.scores
        seconds = sorted(score.seconds for score in scores)
        failed = [score for score in scores if score.outcome is Outcome.FAILED]
        bare = [a for a in self._answers if a.case.expect is Expect.ABSTAIN]
        count = len(scores)
        return {
            "determinism": _share(self._agree["determinism"], bool, 1.0),
            "disguise": _share(self._agree["disguise"], bool, 0.98),
            "no_reference": _share(bare, lambda a: a.score.outcome is Outcome.ABSTAINED, 1.0),
            "errors": _share(scores, lambda s: s.outcome is Outcome.FAILED, self._config.errors, least=False),
            "timeouts": Figure(value=float(sum(map(self._trial.timed_out, failed))), cases=count),
            "p50_s": Figure(value=_quantile(seconds, 0.5), cases=count),
            "p95_s": Figure(value=_quantile(seconds, 0.95), limit=self._trial.latency_limit, least=False, cases=count),
            "seconds_per_1000": Figure(value=1000 * sum(seconds) / count if count else None, cases=count),
            "dollars_per_1000": Figure(
                value=None
                if self._spec.kind == "reward_model"
                else 1000 * sum(score.details.get("dollars", 0.0) for score in scores) / max(1, count)
            ),
        }

    def _failing(self) -> list[Failing]:
        found = []
        for answer in self._answers:
            case, score = answer.case, answer.score
            measure = self._measures.get(case.kind) or _Measure([answer])
            tolerance = self._config.limits_of(case.kind).tolerance
            if case.expect is Expect.ABSTAIN:
                measure = _Measure([answer])
            if not (wanted := measure.failing(answer, tolerance)):
                continue
            texts = {}
            if not case.sealed:
                prompt, response, reference = case.query.prompt, case.response, case.query.reference or ""
                texts = {
                    "prompt": prompt[:EXCERPT],
                    "response": response[-EXCERPT:],
                    "reference": reference[-EXCERPT:],
                    "reason": score.reason[:EXCERPT],
                }
            found.append(
                Failing(
                    id=case.id,
                    sort=case.sort,
                    origin=case.origin,
                    expect=case.expect.value,
                    outcome=score.outcome.value,
                    value=score.value,
                    wanted=wanted,
                    **texts,
                )
            )
        return found

    def _sorts(self, failing: set[str]) -> dict[str, dict[str, int]]:
        sorts: dict[str, dict[str, int]] = {}
        for answer in self._answers:
            counts = sorts.setdefault(answer.case.sort, {"cases": 0, "right": 0})
            counts["cases"] += 1
            counts["right"] += answer.case.id not in failing
        return dict(sorted(sorts.items()))

    def _calibration(self) -> dict[str, Any] | None:
        spec = self._spec
        if spec.calibration is None and spec.kind == "reward_model":
            return None
        return (spec.calibration or identity(spec.low, spec.high)).as_dict()


def _by_query(answers: Iterable[Answer]) -> dict[str, list[Answer]]:
    found: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        found[answer.case.query.key].append(answer)
    return dict(found)


def _values(answers: Iterable[Answer]) -> list[float]:
    return [answer.value for answer in answers if answer.value is not None]


def _or(value: float | None) -> float:
    return -math.inf if value is None else value


def _share(items: Sequence[Any], holds: Callable[[Any], bool], limit: float, *, least: bool = True) -> Figure:
    value = sum(map(holds, items)) / len(items) if items else None
    return Figure(value=value, limit=limit, least=least, cases=len(items))


def _quantile(ordered: Sequence[float], share: float) -> float | None:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


def _missed(where: str, figures: Mapping[str, Figure]) -> list[str]:
    """Why the figures refuse a tool."""
    reasons = []
    for name, figure in figures.items():
        if figure.missed and name not in ("queries", "good", "bad"):
            side = "at least" if figure.least else "at most"
            about = f" ({figure.note})" if figure.note else ""
            reasons.append(f"{where}{name}{about} is {figure.value:.3g}, and must be {side} {figure.limit:.3g}")
    return reasons


def _fairly(failing: Sequence[Failing]) -> list[Failing]:
    """At most `FAILING` cases, of every sort some."""
    sorts: dict[str, list[Failing]] = defaultdict(list)
    for one in failing:
        sorts[one.sort].append(one)
    taken: list[Failing] = []
    while len(taken) < FAILING and any(sorts.values()):
        for waiting in sorts.values():
            if waiting and len(taken) < FAILING:
                taken.append(waiting.pop(0))
    return taken
