# SPDX-License-Identifier: Apache-2.0
"""`ExportedTool`: one tool of a library, scoring outside a training: in plain verl, TRL, verifiers, or a notebook.

`rlar tools export TOOL FILE --as verl` (or trl, verifiers) writes a short file (`exported_file`) that holds the tool as
data, makes it an `ExportedTool`, and has the one function that the framework calls. It needs this package only.

Guarantees: the tool is what its digest says, and a rule's code is what its spec says, or the file does not load (I3).
A verifier's source stays text: it runs in a box, and without an engine the first call raises (I6). A failure of ours is
unscored, never 0 (I4): see `ExportedTool.verl`, `ExportedTool.trl` and `ExportedTool.verifiers` for what each framework
is given then. Every call ends within its deadline, however long the line before it (I7). Nothing is started before the
first call; calls may come from several threads and event loops, and from processes that were forked meanwhile; what was
started ends with its process.

Not covered: routing, ledger, and calibration beyond the tool's own; reward models need a server, and are not exported.
"""

from __future__ import annotations

import asyncio
import concurrent.futures.thread  # noqa: F401  its hook at exit must be older than ours, which needs its threads
import contextlib
import hashlib
import json
import keyword
import logging
import os
import re
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from enum import Enum
from typing import Any, TypeVar

from verl_rlar import __version__
from verl_rlar.config import RlarConfig, parse
from verl_rlar.errors import ConfigError, LibraryError, RlarError, ToolError, ToolUnavailable
from verl_rlar.library import spec_from_json, spec_to_json
from verl_rlar.rows import plain, query_of
from verl_rlar.scoring import Scorer
from verl_rlar.tools.boxed import BoxRunner
from verl_rlar.tools.rule import load_version
from verl_rlar.tools.runner import RuleRunner
from verl_rlar.types import Outcome, Sample, ToolScore, ToolSpec

logger = logging.getLogger(__name__)

DEADLINE_S = 600.0
"""How long a call may take, in seconds of wall time, with the start of processes and the wait in line."""
NEUTRAL = 0.5
"""What a framework gets for an unscored response where it wants a number."""
CLOSE_S = 30.0
"""How long the end of processes and boxes may take, in seconds; then they are left to end by themselves."""

REFERENCES = ("reference", "answer", "ground_truth", "solution")
"""Columns that may hold the reference, the first that does wins."""
PROMPTS = ("prompt", "question", "problem")
"""Keys of verl's ``extra_info`` that may hold the prompt."""
_ROW = ("data_source", "reward_model", "extra_info")
"""Columns that mean the same in every row (`verl_rlar.rows`)."""
_OF_VERL = frozenset({"num_turns", "rollout_reward_scores"})
"""Keys that verl's reward managers put into ``extra_info``."""
_OF_TRL = frozenset({"completion_ids", "environments"})
"""Lists that TRL's trainers add to the columns."""

T = TypeVar("T")

_at_exit: Callable[[Callable[[], None]], None] = threading._register_atexit  # type: ignore[attr-defined]
"""Calls a function when this process ends, also one of `multiprocessing`, and while threads still work: `atexit` comes
too late for that."""


class Target(str, Enum):
    """Where an exported tool is to be used."""

    SOURCE = "source"
    """Its code, byte by byte."""
    VERL = "verl"
    TRL = "trl"
    VERIFIERS = "verifiers"


class ExportedTool:
    """A tool out of a library; see the module.

    Args:
        text: The tool as JSON, see `to_text`.
        settings: Settings as under `rlar.*`; of use are ``scoring``, ``rules`` and ``sandbox``.
        deadline_s: See `DEADLINE_S`.

    Raises:
        LibraryError: The text is no tool, or not the one that its digest names.
        ToolUnavailable: It is a rule whose code is not installed here, or is another one.
        ConfigError: A setting is wrong.
    """

    def __init__(self, text: str, settings: Mapping[str, Any] | None = None, *, deadline_s: float = DEADLINE_S) -> None:
        self._arguments = text, settings, deadline_s
        self.spec, self._source = _read(text)
        self._config = parse(settings or {})
        self._deadline_s = deadline_s
        _check_code(self.spec)
        self._lock = threading.Lock()
        self._engine: _Engine | None = None
        self._of_parent: _Engine | None = None
        os.register_at_fork(after_in_child=self._forget)
        _at_exit(self.close)

    def __reduce__(self) -> Any:
        return _again, self._arguments

    def __repr__(self) -> str:
        return f"<ExportedTool {self.spec.name} ({self.spec.digest})>"

    # --- by hand ------------------------------------------------------------------------------------------------------

    def score(self, row: Mapping[str, Any], response: str) -> ToolScore:
        """Scores a response; blocks.

        Args:
            row: A row as `verl_rlar.rows` reads it: ``prompt`` or ``messages``, ``reference``, ``extra``, or verl's
                columns.
            response: The response's text.

        Returns:
            Outcome, reason, and a value in [0, 1] or None.

        Raises:
            DataError: The row cannot be read.
            ToolUnavailable: The tool cannot run here at all: no Docker engine, or the processes do not start.
        """
        return self.score_all([row], [response])[0]

    async def ascore(self, row: Mapping[str, Any], response: str) -> ToolScore:
        """The same, from an event loop."""
        sample = Sample(query=query_of(row), response=response)
        return (await asyncio.wrap_future(self._submit([sample])))[0]

    def score_all(self, rows: Sequence[Mapping[str, Any]], responses: Sequence[str]) -> list[ToolScore]:
        """Scores many responses at once; blocks until all are scored, or the deadline of the call has come.

        Raises:
            DataError, ToolUnavailable: See `score`.
        """
        samples = [Sample(query=query_of(row), response=text) for row, text in zip(rows, responses, strict=True)]
        return self._submit(samples).result()

    def close(self) -> None:
        """Ends the processes and boxes; a later call starts new ones. Called when the process ends, too."""
        with self._lock:
            engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    # --- frameworks ---------------------------------------------------------------------------------------------------

    def verl(
        self, data_source: Any, response: str, ground_truth: Any, extra_info: Any, neutral: float
    ) -> dict[str, Any]:
        """Scores as verl's reward managers (naive, dapo, limited) want it.

        verl does not hand the prompt over: it is taken from ``extra_info`` (a mapping, or one as JSON; `PROMPTS`), else
        it is empty.

        Returns:
            ``score``, `neutral` if unscored; ``rlar_scored``, 1.0 or 0.0; ``rlar_outcome``; ``rlar_tool``. verl keeps
            all of them beside the response.
        """
        extra = {name: value for name, value in _mapping(extra_info).items() if name not in _OF_VERL}
        prompt = next((extra[name] for name in PROMPTS if _is_prompt(extra.get(name))), "")
        row = {"prompt": prompt, "reference": ground_truth, "data_source": data_source, "extra_info": extra}
        score = self.score(row, response)
        return {
            "score": neutral if score.value is None else score.value,
            "rlar_scored": float(score.value is not None),
            "rlar_outcome": score.outcome.value,
            "rlar_tool": self.spec.name,
        }

    def trl(self, prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Any]) -> list[float | None]:
        """Scores a batch as TRL's trainers want it; prompts and completions are texts or lists of messages.

        Args:
            prompts: One for each completion.
            completions: What the policy wrote.
            columns: The data set's other columns, a list each: the reference (`REFERENCES`) and the rest; and what TRL
                adds.

        Returns:
            A value in [0, 1] for each, or None if unscored; such a completion has the advantage 0 in TRL 1.16, unless
            another reward function scored it.
        """
        lists = {name: column for name, column in columns.items() if isinstance(column, list) and name not in _OF_TRL}
        rows = [
            _row(prompt, {name: column[place] for name, column in lists.items()})
            for place, prompt in enumerate(prompts)
        ]
        scores = self.score_all(rows, [_last_text(completion) for completion in completions])
        values = [score.value for score in scores]
        if log_metric := columns.get("log_metric"):
            log_metric(f"{self.spec.name}/scored", sum(value is not None for value in values) / max(1, len(values)))
        return values

    async def verifiers(self, task: Any, trace: Any) -> float:
        """Scores a rollout as verifiers wants it since 0.4.

        Args:
            task: A ``TaskData``: the prompt, the reference (`REFERENCES`), and what else a derived class has.
            trace: The rollout's ``Trace``; its last reply is scored.

        Raises:
            ToolError: The response is unscored; verifiers takes that for an error of the rollout, not for a score.
        """
        score = await self.ascore(_row_of_task(task), trace.last_reply)
        if score.value is None:
            raise ToolError(f"{self.spec.name}: {score.outcome.value}: {score.reason}")
        return score.value

    async def rubric(self, prompt: Any, completion: Any, answer: Any, info: Any, state: Any) -> float:
        """Scores a rollout as a rubric of verifiers before 0.4 wants it.

        Returns:
            A value in [0, 1]. A rubric would make a silent 0 of an exception, so `NEUTRAL` if unscored; that is logged
            as an error, and the reason is in ``state["rlar_unscored"]``.
        """
        try:
            columns = dict(json.loads(info) if isinstance(info, str) else info or {})
            columns |= {} if answer in (None, "") else {"answer": answer}
            score = await self.ascore(_row(prompt, columns), _last_text(completion))
        except (RlarError, ValueError) as error:
            score = _unscored(self.spec, Outcome.FAILED, str(error))
        if score.value is not None:
            return score.value
        if state is not None:
            state["rlar_unscored"] = score.reason
        logger.error("%s: a response was not scored (%s); it counts %g", self.spec.name, score.outcome.value, NEUTRAL)
        return NEUTRAL

    # --- inside -------------------------------------------------------------------------------------------------------

    def _submit(self, samples: Sequence[Sample]) -> Future[list[ToolScore]]:
        with self._lock:
            if self._engine is None:
                self._engine = _Engine(self.spec, self._source, self._config, self._deadline_s)
            return self._engine.submit(self._engine.score_all(samples))

    def _forget(self) -> None:
        """In a forked child: the lock may be held, and the engine's thread is not here. It is kept, so that nothing of
        the parent's is closed along with it."""
        self._lock = threading.Lock()
        self._of_parent, self._engine = self._engine, None


def _again(text: str, settings: Mapping[str, Any] | None, deadline_s: float) -> ExportedTool:
    return ExportedTool(text, settings, deadline_s=deadline_s)


class _Engine:
    """A thread with an event loop, and the processes or boxes that its first call starts."""

    def __init__(self, spec: ToolSpec, source: str | None, config: RlarConfig, deadline_s: float) -> None:
        self._spec = spec
        self._config = config
        self._deadline_s = deadline_s
        self._boxes = BoxRunner(config.sandbox, {} if source is None else {spec.source_sha256: source})
        self._rules: RuleRunner | None = None
        self._scorer: Scorer | None = None
        self._closing = False
        # as many at a time as can be worked on: a tool's own deadline is not for waiting in line
        boxes = config.sandbox.verifier_boxes if spec.kind == "verifier" else config.sandbox.program_boxes
        self._turns = asyncio.Semaphore((boxes or os.cpu_count() or 1) if spec.boxed else config.rules.processes)
        self._turns_taken: set[asyncio.Future[ToolScore]] = set()
        self._start = asyncio.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"rlar-{spec.name}", daemon=True)
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def score_all(self, samples: Sequence[Sample]) -> list[ToolScore]:
        end = self._loop.time() + self._deadline_s
        scorer = None
        if first := next((sample for sample in samples if self._spec.fits(sample.query)), None):
            scorer = await self._started(first)
        return await asyncio.gather(*(self._score(sample, scorer, end - self._loop.time()) for sample in samples))

    def close(self) -> None:
        with contextlib.suppress(RuntimeError, TimeoutError):
            self.submit(self._close()).result(CLOSE_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_S)
        if not self._thread.is_alive():
            self._loop.close()

    async def _score(self, sample: Sample, scorer: Scorer | None, seconds: float) -> ToolScore:
        if scorer is None or not self._spec.fits(sample.query):
            return _unscored(self._spec, Outcome.ABSTAINED, "there is no reference in this row")
        turn = asyncio.ensure_future(self._turn(sample, scorer))
        self._turns_taken.add(turn)
        turn.add_done_callback(self._turns_taken.discard)
        try:
            return await asyncio.wait_for(turn, max(0.0, seconds))
        except (TimeoutError, asyncio.TimeoutError):
            reason = f"not scored within {self._deadline_s:g} s, with the start and the wait in line (deadline_s)"
        except asyncio.CancelledError:
            if not self._closing:
                raise
            reason = "the tool is being closed"
        return _unscored(self._spec, Outcome.FAILED, reason)

    async def _turn(self, sample: Sample, scorer: Scorer) -> ToolScore:
        async with self._turns:
            return await scorer.call(self._spec, sample)

    async def _started(self, sample: Sample) -> Scorer:
        """What the tool runs in, started by the first call.

        Raises:
            ToolUnavailable: It does not start; the next call tries again.
        """
        async with self._start:
            if self._scorer is None and self._spec.boxed:
                try:  # a score would only say that it failed; this says that it cannot work
                    await asyncio.wait_for(self._boxes.run(self._spec, sample), self._deadline_s)
                except ToolUnavailable:
                    raise
                except (ToolError, ConnectionError, TimeoutError, asyncio.TimeoutError) as error:
                    logger.info("%s: the first call failed: %s", self._spec.name, error)
                self._scorer = Scorer(self._config.scoring, self._boxes, self._boxes)
            elif self._scorer is None:
                self._rules = RuleRunner(self._config.rules, (self._spec.target,))
                self._scorer = Scorer(self._config.scoring, self._rules)
            return self._scorer

    async def _close(self) -> None:
        self._closing = True
        for turn in self._turns_taken:
            turn.cancel()
        if self._rules is not None:
            self._rules.close()
        await self._boxes.close()
        calls = asyncio.all_tasks() - {asyncio.current_task()}
        for call in (await asyncio.wait(calls, timeout=1.0))[1] if calls else ():
            call.cancel()
            await asyncio.wait([call])


def _unscored(spec: ToolSpec, outcome: Outcome, reason: str) -> ToolScore:
    return ToolScore(tool=spec.name, digest=spec.digest, outcome=outcome, raw=None, value=None, reason=reason)


# --- rows -------------------------------------------------------------------------------------------------------------


def _row(prompt: Any, columns: Mapping[str, Any]) -> dict[str, Any]:
    """A row for `verl_rlar.rows` out of a prompt and columns of any name."""
    columns = {name: value for name, value in plain(columns).items() if value is not None and value != ""}
    row = {name: columns.pop(name) for name in _ROW if name in columns}
    reference = next((columns.pop(name) for name in REFERENCES if name in columns), None)
    more = columns.pop("extra", {})
    extra = columns | (dict(more) if isinstance(more, Mapping) else {"extra": more})
    return row | {"prompt": _turns(prompt), "reference": reference, "extra": extra}


def _mapping(extra_info: Any) -> dict[str, Any]:
    """verl's ``extra_info``: a mapping, or one as JSON; what is neither stands in it under that name."""
    values = plain(extra_info)
    if isinstance(values, str):
        with contextlib.suppress(ValueError):
            values = json.loads(values)
    return dict(values or {}) if values is None or isinstance(values, Mapping) else {"extra_info": values}


def _is_prompt(value: Any) -> bool:
    """Whether it is a text or messages, and not empty."""
    if isinstance(value, list):
        return bool(value) and all(isinstance(turn, Mapping) and "role" in turn for turn in value)
    return isinstance(value, str) and value != ""


def _row_of_task(task: Any) -> dict[str, Any]:
    """A row out of a task of verifiers, a pydantic model derived from its ``TaskData``."""
    base = next((kind for kind in type(task).__mro__ if kind.__name__ == "TaskData"), None)
    values = task.model_dump(mode="json")
    prompt = values.get("prompt") or ""
    if system := values.get("system_prompt"):
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        prompt = [{"role": "system", "content": system}, *turns]
    known = set(getattr(base, "model_fields", ()))
    return _row(prompt, {name: value for name, value in values.items() if name not in known})


def _last_text(completion: Any) -> str:
    """The text of a completion: itself, or its last message."""
    return query_of({"prompt": _turns(completion)}).messages[-1].content if completion else ""


def _turns(messages: Any) -> Any:
    """Messages as mappings; verifiers has them as pydantic models."""
    if not isinstance(messages, list):
        return messages
    return [turn.model_dump(mode="json") if hasattr(turn, "model_dump") else turn for turn in messages]


# --- files ------------------------------------------------------------------------------------------------------------


def to_text(spec: ToolSpec, source: str | None) -> str:
    """A tool as JSON: digest, spec, and for a verifier the lines of its source. It can stand in a raw string of Python:
    it is ASCII, has no three quotes in a row, and does not end in a backslash.

    Raises:
        ConfigError: It is a reward model or a rubric.
    """
    if spec.opinion:
        what = "reward model" if spec.kind == "reward_model" else "rubric"
        raise ConfigError(f"{spec.name} is a {what}, which needs a server: it is not exported")
    lines = (source or "").splitlines(keepends=True) if spec.kind == "verifier" else []
    return json.dumps({"digest": spec.digest, "spec": spec_to_json(spec), "source": lines}, indent=1, ensure_ascii=True)


def _read(text: str) -> tuple[ToolSpec, str | None]:
    """The inverse of `to_text`, checked."""
    try:
        values = json.loads(text)
        spec, digest, source = spec_from_json(values["spec"]), values["digest"], "".join(values["source"])
    except (ValueError, KeyError, TypeError) as error:
        raise LibraryError(f"this is no exported tool ({type(error).__name__}: {error}); export it again") from None
    if spec.digest != digest:
        raise LibraryError(
            f"{spec.name}: the exported spec has the digest {spec.digest}, not {digest}: it was changed, or comes from "
            "a release whose specs have other fields. Export the tool again"
        )
    if spec.kind == "rule":
        return spec, None
    if hashlib.sha256(source.encode()).hexdigest() != spec.source_sha256:
        raise LibraryError(f"{spec.name}: the exported source is not the one that its spec names: it was changed")
    return spec, source


def _check_code(spec: ToolSpec) -> None:
    """Raises `ToolUnavailable` if a rule is not installed here, or is another one."""
    if spec.kind == "rule":
        try:
            load_version(spec)
        except (ImportError, AttributeError) as error:
            raise ToolUnavailable(
                f"{spec.name}: cannot import {spec.target} ({error}); install the package that has it"
            ) from None


def exported_file(
    spec: ToolSpec, source: str | None, target: Target, config: RlarConfig, *, examined: bool = True
) -> str:
    """The text of a Python file with which a tool scores in a framework.

    Args:
        spec: The tool.
        source: Its source, needed for a verifier.
        target: The framework.
        config: Settings; those that differ from the defaults go into the file.
        examined: Whether it passed its exam, or needs none; if not, the file says so.

    Raises:
        ConfigError: It is a reward model, or its name or target is no name in Python.
        ToolUnavailable: It is a rule whose code is not installed here, or is another one: the file would not load.
    """
    names = [spec.name, *re.split("[.:]", spec.target)]
    if odd := next((name for name in names if not name.isidentifier() or keyword.iskeyword(name)), None):
        raise ConfigError(f"the tool {spec.name!r} cannot be exported: {odd!r} is no name of a function or module")
    _check_code(spec)
    module = spec.target.partition(":")[0]
    needs = _ANY if spec.kind != "rule" else _BUILT_IN if module.startswith("verl_rlar.") else _TRUSTED
    settings = config.model_dump(mode="json", exclude_defaults=True, include={"scoring", "rules", "sandbox"})
    return _FILES[target].format(
        name=spec.name,
        digest=spec.digest,
        version=__version__,
        needs=needs.format(module=module, version=__version__)
        + (_BOXED if spec.boxed else "")
        + ("" if examined else _UNEXAMINED),
        neutral=NEUTRAL,
        tool=to_text(spec, source),
        settings=settings,
    )


_ANY = "`pip install verl-rlar`."
_BUILT_IN = """`pip install verl-rlar=={version}`: the rule of another release may be another one, and does not load."""
_TRUSTED = """`pip install verl-rlar`, and the module `{module}` as it is: if it changes it does not load."""
_BOXED = """ And a Docker engine: it runs code
that nobody may have read. That is data here and runs in a box only; without an engine the first call raises."""
_UNEXAMINED = "\n\nIt passed no exam: nobody knows what it scores."

_TOOL = """
SETTINGS = {settings!r}  # as under rlar.*

TOOL = ExportedTool(
    r\"\"\"
{tool}
\"\"\",
    SETTINGS,
)
"""

_VERL = (
    '''"""The reward tool `{name}` ({digest}) for verl, exported by verl-rlar {version}.

Needs {needs}

    python -m verl.trainer.main_ppo ... reward.custom_reward_function.path=THIS_FILE

A response that could not be scored counts NEUTRAL, or +reward.custom_reward_function.reward_kwargs.neutral=NUMBER, and
its `rlar_scored` is 0. For the reward managers naive, dapo and limited (which makes a 0 of an exception); `batch` and
`prime` call differently. verl hands no prompt over: it is looked for in extra_info (prompt, question, problem).
"""

from verl_rlar.export import ExportedTool

NEUTRAL = {neutral}
'''
    + _TOOL
    + """

def compute_score(data_source, solution_str, ground_truth, extra_info=None, neutral=NEUTRAL, **_):
    return TOOL.verl(data_source, solution_str, ground_truth, extra_info, neutral)
"""
)

_TRL = (
    '''"""The reward tool `{name}` ({digest}) for TRL, exported by verl-rlar {version}.

Needs {needs}

    from THIS_FILE import reward
    trainer = GRPOTrainer(..., reward_funcs=[reward])

A column `reference`, `answer`, `ground_truth` or `solution` is the reference, the others go to the tool as they are. A
response that could not be scored is None: where no other reward function scored it either, TRL 1.16 gives it the
advantage 0, and warns.
"""

from verl_rlar.export import ExportedTool
'''
    + _TOOL
    + """

def reward(prompts, completions, **columns):
    return TOOL.trl(prompts, completions, columns)


reward.__name__ = TOOL.spec.name
"""
)

_VERIFIERS = (
    '''"""The reward tool `{name}` ({digest}) for verifiers, exported by verl-rlar {version}.

Needs {needs}

    vf.TaskConfig(rewards={{"{name}": vf.RewardFunctionConfig(fn="THIS_FILE.py:reward")}})   # verifiers 0.4
    vf.Rubric(funcs=[reward])                                                        # before 0.4

A field `reference`, `answer`, `ground_truth` or `solution` of the task is the reference, its others go to the tool as
they are. A response that could not be scored raises, which verifiers records as an error of the rollout. A rubric would
make a 0 of that, so there it counts {neutral}, is logged, and the reason is in state["rlar_unscored"].
"""

from verl_rlar.export import ExportedTool
'''
    + _TOOL
    + """

async def reward(task=None, trace=None, prompt=None, completion=None, answer=None, info=None, state=None):
    if trace is not None:
        return await TOOL.verifiers(task, trace)
    return await TOOL.rubric(prompt, completion, answer, info, state)


reward.__name__ = TOOL.spec.name
"""
)

_FILES = {Target.VERL: _VERL, Target.TRL: _TRL, Target.VERIFIERS: _VERIFIERS}
