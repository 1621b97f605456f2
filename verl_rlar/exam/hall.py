# SPDX-License-Identifier: Apache-2.0
"""Where exams are held: the processes and boxes for them, and what they are held on, from files.

Guarantees: a rule is examined in two worker processes of the same sort as in training; what runs code that we did not
write goes to boxes, or fails with the reason (I6); leaving a hall ends all that it started.

Not covered: several exams at the same time in one hall measure each other's load.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType

from verl_rlar.config import ExamConfig, RlarConfig
from verl_rlar.errors import DataError, ToolError, ToolUnavailable
from verl_rlar.exam.cases import Case, read_cases
from verl_rlar.exam.evidence import Evidence, gather, screen
from verl_rlar.exam.subject import Subject
from verl_rlar.exam.trial import Examination, OnProgress, examine
from verl_rlar.library import builtin_snapshot
from verl_rlar.row_files import read_rows
from verl_rlar.scoring import Runner, Scorer
from verl_rlar.tools.boxed import BoxRunner
from verl_rlar.tools.rubric import RubricRunner
from verl_rlar.tools.runner import RuleRunner
from verl_rlar.types import Sample, ToolSpec, Verdict

logger = logging.getLogger(__name__)


class Hall:
    """Holds exams, one after the other. Use as ``async with Hall(config) as hall``.

    Args:
        config: The same settings as in training.
        models: Runs reward models. None: none is examined.
        rubrics: Has rubrics judged, and is closed with the hall. None: one by the settings.
    """

    def __init__(self, config: RlarConfig, models: Runner | None = None, rubrics: RubricRunner | None = None) -> None:
        self._config = config
        self._models = models
        self._sources: dict[str, str] = {}
        self._runners: list[RuleRunner] = []
        self._boxes = BoxRunner(config.sandbox, self._sources)
        self._rubrics = rubrics or RubricRunner(config)

    async def __aenter__(self) -> Hall:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for runner in self._runners:
            runner.close()
        await self._boxes.close()
        await self._rubrics.close()

    def scorers(self) -> tuple[Scorer, Scorer]:
        """Two scorers with a worker process each, and common boxes. The first call waits for the processes.

        Raises:
            ToolUnavailable: The worker processes do not start.
        """
        while len(self._runners) < 2:
            self._runners.append(RuleRunner(self._config.rules.model_copy(update={"processes": 1})))
        first, second = (
            Scorer(self._config.scoring, runner, self._boxes, self._models, self._rubrics) for runner in self._runners
        )
        return first, second

    async def open_boxes(self) -> None:
        """Starts the boxes, before anything is paid for that will need them.

        Raises:
            ToolUnavailable: There is no sandbox here.
        """
        await self._boxes.start()

    async def screen(self, evidence: Evidence, spec: ToolSpec, on_progress: OnProgress = lambda *_: None) -> Evidence:
        """Sets apart the rows whose gold the built-in tools reject; the examined one has no say."""
        boxes = self._config.sandbox.backend != "none"
        judges = [tool for tool in builtin_snapshot(boxes=boxes).tools if tool.target != spec.target]
        first, _ = self.scorers()
        return await screen(evidence, first, judges, on_progress=lambda *done: on_progress("screening gold", *done))

    async def examine(
        self,
        subject: Subject,
        evidence: Evidence,
        *,
        seed: int = 0,
        config: ExamConfig | None = None,
        looks: bool = True,
        on_progress: OnProgress = lambda *_: None,
    ) -> Examination:
        """Examines a tool.

        Args:
            subject: The tool.
            evidence: What it is examined on.
            seed: See `verl_rlar.exam.trial.examine`.
            config: Thresholds; None: those of the hall's settings.
            looks: See `verl_rlar.exam.trial.examine`.
            on_progress: Called with the stage, how much is done, and of how much.

        Raises:
            ToolUnavailable: It needs a sandbox or an LLM, and there is none here, or the LLM did not answer: that is no
                verdict on the tool.
        """
        spec = subject.spec
        if subject.source:
            self._sources[spec.source_sha256] = subject.source
        if spec.boxed and evidence.cases:
            if self._config.sandbox.backend == "none":
                raise ToolUnavailable(f"{spec.name} needs a sandbox to be examined in (rlar.sandbox.backend is none)")
            first = evidence.cases[0]
            try:
                await self._boxes.run(spec, Sample(query=first.query, response=first.response))
            except ToolUnavailable:
                raise
            except (ToolError, ConnectionError) as error:  # the exam will say what it is worth
                logger.info("%s: the first call failed: %s", spec.name, error)
        if spec.kind == "rubric":
            self._rubrics.check(spec)
        faults = self._rubrics.faults
        at_once = self._config.rubrics.at_once if spec.kind == "rubric" else 2 if spec.boxed else 1
        examination = await examine(
            spec,
            evidence,
            self.scorers(),
            config or self._config.exam,
            seed=seed,
            at_once=at_once,
            looks=looks,
            model=subject.model,
            on_progress=on_progress,
        )
        if spec.kind == "rubric" and not examination.card.admitted:
            if self._rubrics.spent_up:
                raise ToolUnavailable(f"{spec.name}: {self._rubrics.spent_up}")
            if missed := self._rubrics.faults - faults:
                raise ToolUnavailable(f"{spec.name}: the LLM did not answer {missed} calls of its exam; is it well?")
        return examination

    async def gather(
        self,
        data: Sequence[str],
        case_files: Sequence[str],
        spec: ToolSpec,
        *,
        seed: int = 0,
        screened: bool = True,
        on_progress: OnProgress = lambda *_: None,
    ) -> Evidence:
        """What a tool is examined on, from files of rows and of cases.

        Args:
            data: Files of rows.
            case_files: Files of cases.
            spec: The tool.
            seed: See `verl_rlar.exam.evidence.gather`.
            screened: Whether the built-in tools have a say on which gold can be trusted.
            on_progress: See `examine`.

        Raises:
            DataError: A file cannot be read, or a case file is wrong, or two of them have the same id for other cases.
        """
        exam = self._config.exam
        evidence, taken = Evidence(), dict[str, tuple[str, Case]]()
        for path in data:
            more = gather(read_rows(path), spec, queries=exam.max_queries, seed=seed, sealed_share=exam.sealed_share)
            evidence = _join(evidence, await self.screen(more, spec, on_progress) if screened else more)
        for path in case_files:
            cases = read_cases(read_rows(path), seed=seed, sealed_share=exam.sealed_share, name=path)
            for case in cases:
                file, other = taken.setdefault(case.id, (path, case))
                if _asked(other) != _asked(case):
                    raise DataError(
                        f"{path}, {case.origin}: the id {case.id!r} is taken by another case of {file}, "
                        f"{other.origin}; give one of them another id"
                    )
            evidence = _join(evidence, Evidence(cases=cases))
        return evidence

    async def run(self, subject: Subject, sample: Sample) -> Verdict:
        """Runs a verifier once.

        Raises:
            ToolError: See `verl_rlar.tools.boxed.BoxRunner.run`.
        """
        self._sources[subject.spec.source_sha256] = subject.source
        return await self._boxes.run(subject.spec, sample)


def _asked(case: Case) -> tuple[object, ...]:
    return case.query, case.response, case.expect, case.twin


def _join(one: Evidence, other: Evidence) -> Evidence:
    cases = {case.id: case for case in (*one.cases, *other.cases)}
    return replace(
        one,
        cases=tuple(cases.values()),
        set_apart=(*one.set_apart, *other.set_apart),
        other_rows=one.other_rows + other.other_rows,
        rows=one.rows + other.rows,
        bad=(*one.bad, *other.bad),
    )
