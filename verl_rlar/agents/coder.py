# SPDX-License-Identifier: Apache-2.0
"""Writes a verifier for a task by an LLM agent, or a rubric where no program can check, and admits what passes.

`write` makes cases out of rows (`verl_rlar.exam`), starts the agent (`verl_rlar.agents.drafter`) in its process, and
tries what it drafts on our side (`verl_rlar.agents.bench`): in boxes, on open cases, and in the end on sealed ones. The
agent has no other way to run anything.

Guarantees: only a verifier that passed the whole exam is given back as admitted; sealed cases are in no prompt, no
transcript and no order to the agent; a run ends by itself, at a cap, at its wall clock, or when the endpoint is gone,
and says which; what was paid for is kept, so that the same call (with a higher cap, if it was one) goes on where the
last one was stopped; with a cassette, no network is used.

A rubric (`verl_rlar.tools.rubric`) is written where the rows have preferences only (`form_of`), or if it is asked for.
The same LLM writes it and judges by it; the judge reads the sealed cases, too, the author does not.

The built-in tools have no say on which gold can be trusted, as in `rlar exam`: a verifier is written where they fail.

Not covered: one run is one task, whose rows should be alike. A cassette of a rubric holds all that its judge was asked,
some hundreds of calls.
"""

from __future__ import annotations

import concurrent.futures
import importlib.util
import re
import secrets
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from anyio.from_thread import start_blocking_portal

from verl_rlar.agents import session
from verl_rlar.agents.bench import MOST_SECONDS, Admitted, Bench, Form, Trial, draft_of_nothing
from verl_rlar.agents.cassette import Cassette, Header, Tape, Traffic
from verl_rlar.agents.prompting import prompt_files
from verl_rlar.agents.scout import AgentRun
from verl_rlar.config import RlarConfig
from verl_rlar.errors import CassetteError, ConfigError, DataError, ToolUnavailable
from verl_rlar.exam.evidence import Evidence
from verl_rlar.exam.hall import Hall
from verl_rlar.exam.trial import OnProgress
from verl_rlar.features import describe
from verl_rlar.row_files import read_rows
from verl_rlar.rows import query_of
from verl_rlar.tools.rubric import RubricRunner
from verl_rlar.types import Kind, content_hash

PROMPTS: Mapping[Form, str] = {"verifier": "coder", "rubric": "rubric"}
"""What the names of the prompt files begin with."""
WORK = "verl_rlar.agents.drafter:work"
SHAPING = ("temperature", "answer_tokens", "steps", "tokens", "quote_chars", "drafts", "repairs", "shown")
"""Settings on which an agent's requests depend; a cassette brings its own."""
LEAST_SHARE = 0.1
"""Share of the rows from which on a kind of query is what a verifier is for."""
JUDGING = ("timeout_s", "answer_tokens", "quote_chars")
"""Settings on which what a judge is asked depends."""
NAME_CHARS = 40

OnEvent = Callable[[str, Any], None]


@dataclass(frozen=True, kw_only=True)
class Written:
    """What came of a task."""

    task: str
    name: str
    kinds: tuple[Kind, ...]
    cases: int
    sealed: int
    schemes: tuple[Mapping[str, str], ...]
    """The plan, the best first: ``kind`` and ``idea``, in the LLM's words."""
    trials: tuple[Trial, ...]
    """Every version of every draft, in order."""
    admitted: Admitted | None
    agent: AgentRun
    form: Form
    judged_calls: int
    """Calls of the judge, in trials of rubrics; not among the agent's."""
    judged_tokens: int
    """Tokens that they took."""
    recalled: int
    """Answers of the LLM that were kept from a run that was stopped; their tokens count, but were paid for then."""
    why: str
    """How it ended, in words."""

    @property
    def resumable(self) -> bool:
        """Whether the same call would go on from here, once a cap that stopped it is higher."""
        return self.admitted is None and self.agent.how != "done"

    def as_dict(self) -> dict[str, Any]:
        """JSON-like; without sources and cards."""
        trials = [{k: v for k, v in asdict(trial).items() if k != "source"} for trial in self.trials]
        tool = self.admitted and {"digest": self.admitted.examination.spec.digest, "draft": self.admitted.draft}
        return {
            "task": self.task,
            "name": self.name,
            "kinds": [kind.value for kind in self.kinds],
            "cases": self.cases,
            "sealed": self.sealed,
            "schemes": [dict(scheme) for scheme in self.schemes],
            "trials": trials,
            "admitted": tool,
            "agent": asdict(self.agent),
            "form": self.form,
            "judged_calls": self.judged_calls,
            "judged_tokens": self.judged_tokens,
            "recalled": self.recalled,
            "resumable": self.resumable,
            "why": self.why,
        }


@dataclass(kw_only=True)
class _Told:
    """What an agent has told so far."""

    schemes: tuple[Mapping[str, str], ...] = ()
    faults: list[Trial] = field(default_factory=list)
    steps: int = 0
    tokens: int = 0
    recalled: int = 0

    def take(self, event: Mapping[str, Any]) -> None:
        match event["event"]:
            case "plan":
                self.schemes = tuple(event["schemes"])
            case "call":
                self.steps, self.tokens = self.steps + 1, event["tokens"]
            case "talk":
                self.steps, self.recalled, self.tokens = event["asked"], event["recalled"], event["tokens"]


def name_of(task: str) -> str:
    """A tool's name out of a task's words."""
    words = re.findall(r"[a-z0-9]+", task.lower())
    while len("_".join(words)) > NAME_CHARS and len(words) > 1:
        words.pop()
    return "_".join(words)[:NAME_CHARS] or "verifier"


def kinds_of(data: Sequence[str], case_files: Sequence[str]) -> frozenset[Kind]:
    """What the rows in some files are: every kind that is not rare.

    Raises:
        DataError: A file cannot be read, or no row can.
    """
    counts: Counter[Kind] = Counter()
    for path in (*data, *case_files):
        for _, row in read_rows(path):
            if not isinstance(row, DataError):
                try:
                    counts[describe(query_of(row)).kind] += 1
                except DataError:
                    continue
    if not counts:
        raise DataError(f"no row of {', '.join((*data, *case_files))} can be read")
    return frozenset(kind for kind, count in counts.items() if count >= LEAST_SHARE * counts.total())


def form_of(data: Sequence[str], case_files: Sequence[str], kinds: Collection[Kind]) -> Form:
    """What fits the rows in some files: a rubric where all that they say is which of two responses is the better one.

    Raises:
        DataError: A file cannot be read.
    """
    if case_files or set(kinds) != {Kind.OPEN}:
        return "verifier"
    preferred = 0
    for path in data:
        for _, row in read_rows(path):
            if isinstance(row, DataError):
                continue
            if any(row.get(name) is not None for name in ("is_correct", "correct", "label")):
                return "verifier"
            preferred += row.get("chosen") is not None and row.get("rejected") is not None
    return "rubric" if preferred else "verifier"


def write(
    task: str,
    data: Sequence[str],
    config: RlarConfig,
    *,
    folder: Path,
    case_files: Sequence[str] = (),
    name: str = "",
    kinds: Collection[Kind] = (),
    form: Form | None = None,
    seed: int = 0,
    record: Path | None = None,
    note: str = "",
    replay: Path | None = None,
    on_event: OnEvent = lambda kind, what: None,
    on_progress: OnProgress = lambda *_: None,
) -> Written:
    """Has a verifier, or a rubric, written, tried and examined.

    Args:
        task: The task, in words.
        data: Files of its rows.
        config: All settings; those of the LLM are under ``rlar.agents``.
        folder: Where transcripts, journal and account are kept.
        case_files: Files of cases, see `verl_rlar.exam.cases`.
        name: Name of the tool; empty: made from the task.
        kinds: What it is for; empty: what the rows are.
        form: What is to be written; None: see `form_of`.
        seed: Of the exam.
        record: Cassette to be written.
        note: What the cassette says about who or what wrote the LLM's answers.
        replay: Cassette to be used instead of the network.
        on_event: Told ``("plan", schemes)`` and ``("trial", Trial)`` as they come.
        on_progress: Called while drafts are tried.

    Raises:
        ConfigError: No LLM is configured, the extra `agents` is not installed, or no sandbox.
        DataError: The data cannot be read, or are too little evidence.
        CassetteError: What is replayed is not what was recorded, or the cassette cannot be read or written.
        ToolUnavailable: The sandbox cannot be started.
        AgentError: There can be no transcript, no journal, or no process.
    """
    if not importlib.util.find_spec("smolagents"):
        raise ConfigError("an LLM writes verifiers by smolagents, and that is missing: pip install 'verl-rlar[agents]'")
    scope = frozenset(kinds) or kinds_of(data, case_files)
    form = form or form_of(data, case_files, scope)
    if form == "verifier" and config.sandbox.backend == "none":
        raise ConfigError("verifiers are tried in boxes, but rlar.sandbox.backend is none; see `rlar doctor`")
    agents, quoting, cassette = config.agents, secrets.token_hex(8), None
    now = datetime.now(timezone.utc)
    if replay:
        cassette = Cassette.read(replay)
        config, quoting = _as_recorded(cassette, task, form, config)
        agents = config.agents
    if not agents.url:
        raise ConfigError("no LLM is configured: set rlar.agents.url and rlar.agents.model")
    name, told = name or name_of(task), _Told()
    taped: list[Tape] = []
    with ExitStack() as stack:
        account = Path(stack.enter_context(tempfile.TemporaryDirectory())) if replay else folder
        traffic = Traffic(
            side="scout",
            add=(lambda line: taped[0].add(line)) if record else None,
            cassette=cassette,
            secrets=session.secrets_of(agents.api_key_env),
        )
        judge = RubricRunner(
            config,
            tokens=config.rubrics.exam_tokens,
            folder=account,
            transport=traffic.in_loop("judge", agents.url),
        )
        portal = stack.enter_context(start_blocking_portal())
        hall = stack.enter_context(portal.wrap_async_context_manager(Hall(config, rubrics=judge)))
        nothing = draft_of_nothing(name, scope, form)
        evidence: Evidence = portal.call(
            lambda: hall.gather(data, case_files, nothing, seed=seed, screened=False, on_progress=on_progress)
        )
        facts = {"task": task, "kinds": sorted(kind.value for kind in scope)}
        identity = content_hash(
            [facts, name, seed, sorted(case.id for case in evidence.cases), prompt_files(PROMPTS[form]), agents.model]
            + [getattr(agents, key) for key in SHAPING if key not in ("steps", "tokens", "drafts", "repairs")]
        )[:12]
        judge.task = identity
        bench = Bench(
            hall, evidence, name=name, kinds=scope, origin=f"write-{identity}", config=config, seed=seed, form=form,
            on_progress=on_progress,
        )  # fmt: skip
        bench.check()
        if form == "verifier":
            portal.call(hall.open_boxes)
        journal = None if record or replay else folder / f"write-{identity}.journal.jsonl"
        if journal:
            from verl_rlar.agents.journal import seed_of

            quoting = seed_of(journal, identity, quoting)
        order = {
            "id": identity,
            "agents": agents.model_dump(mode="json"),
            "form": form,
            "task": {
                **facts,
                **({"needs": bench.needs_reference, "seconds": MOST_SECONDS} if form == "verifier" else {}),
                "examples": bench.examples(),
            },
            "seed": quoting,
            "record": bool(record),
            "replay": str(replay.absolute()) if replay else None,
            "journal": str(journal.absolute()) if journal else None,
            "purse": None if replay else str(folder.absolute()),
        }
        if record:
            taped.append(stack.enter_context(Tape(record, _header(order, config, now, note))))
        broken: list[Exception] = []

        def on_tell(event: session.Event) -> None:
            if event["event"] == "tape":
                for tape in taped:
                    tape.add(event["line"])
                return
            told.take(event)
            if event["event"] == "plan":
                on_event("plan", told.schemes)
            if event["event"] == "fault":
                trial = Trial(draft=event["draft"], version=event["version"], state="fault", why=event["fault"])
                bench.trials.append(trial)
                on_event("trial", trial)
            on_progress("tokens", told.tokens, agents.tokens)

        def on_ask(question: Any, left: float) -> Any:
            before = len(bench.trials)
            future = portal.start_task_soon(bench.answer, question)
            try:
                answer = future.result(max(left, 0.0))
            except concurrent.futures.TimeoutError:
                future.cancel()
                raise session.Stop("time", f"a draft was still on trial after {agents.wall_s:g} s") from None
            except ToolUnavailable as error:
                if form == "rubric":
                    raise session.Stop("tokens" if judge.spent_up else "endpoint", str(error)) from None
                broken.append(error)
                raise session.Stop("crash", str(error)) from None
            for trial in bench.trials[before:]:
                on_event("trial", trial)
            return answer

        ended = session.run(
            WORK,
            order,
            folder=folder,
            name=f"write-{identity}",
            wall_s=agents.wall_s,
            secrets=(agents.api_key_env,),
            on_event=on_tell,
            on_ask=on_ask,
        )
        if broken:
            raise broken[0]
        if journal and (ended.how == "done" or bench.admitted):
            journal.unlink(missing_ok=True)
    run = AgentRun(
        model=agents.model or "",
        how=ended.how,
        detail=ended.detail,
        steps=told.steps,
        tokens=told.tokens,
        seconds=ended.seconds,
        transcript=str(ended.transcript),
    )
    return Written(
        task=task,
        name=name,
        kinds=tuple(sorted(scope, key=lambda kind: kind.value)),
        cases=len(evidence.cases),
        sealed=sum(case.sealed for case in evidence.cases),
        schemes=told.schemes,
        trials=tuple(bench.trials),
        admitted=bench.admitted,
        agent=run,
        form=form,
        judged_calls=judge.calls,
        judged_tokens=judge.read + judge.written,
        recalled=told.recalled,
        why=_why(bench, run),
    )


def _why(bench: Bench, run: AgentRun) -> str:
    if bench.admitted:
        return f"draft {bench.admitted.draft} was admitted in version {bench.admitted.version}"
    if run.how == "done":
        drafts = len({trial.draft for trial in bench.trials})
        return f"none of {drafts} drafts was admitted"
    said = {
        "steps": "a budget is used up",
        "tokens": "a budget is used up",
        "endpoint": "the LLM does not answer",
        "time": "the time is up",
        "crash": "the agent broke",
    }
    first = "raise the cap, then " if run.how in ("steps", "tokens") else ""
    return f"stopped, as {said.get(run.how, run.how)}: {run.detail}; {first}the same command goes on from here"


def _as_recorded(cassette: Cassette, task: str, form: Form, config: RlarConfig) -> tuple[RlarConfig, str]:
    """The settings under which a cassette was recorded, and its seed.

    Raises:
        CassetteError: It is for another task, or with other prompts, or of another agent.
    """
    header = cassette.header
    cassette.check(prompt_files())
    if header.settings.get("agent") != "coder":
        raise CassetteError(f"{cassette.path} was not recorded by `rlar write`")
    if header.task != task:
        raise CassetteError(f"{cassette.path} was recorded for the task {header.task!r}, not for {task!r}")
    judging = header.settings.get("rubrics")
    if (judging is not None) is not (form == "rubric"):
        raise CassetteError(f"{cassette.path} was not recorded while a {form} was written")
    shaping = {name: header.settings["agents"][name] for name in SHAPING}
    agents = config.agents.model_copy(update={"url": header.llm, "model": header.model, **shaping})
    rubrics = config.rubrics.model_copy(update={name: judging[name] for name in JUDGING} if judging else {})
    return config.model_copy(update={"agents": agents, "rubrics": rubrics}), header.seed


def _header(order: Mapping[str, Any], config: RlarConfig, now: datetime, note: str) -> Header:
    agents, form = order["agents"], order["form"]
    settings = {"agent": "coder", "agents": {name: agents[name] for name in SHAPING}}
    if form == "rubric":
        settings["rubrics"] = {name: getattr(config.rubrics, name) for name in JUDGING}
    return Header(
        recorded=now.isoformat(),
        note=note,
        llm=agents["url"],
        model=agents["model"],
        hub="",
        task=order["task"]["task"],
        settings=settings,
        seed=order["seed"],
        prompts=prompt_files(PROMPTS[form]),
    )
