# SPDX-License-Identifier: Apache-2.0
"""Finds reward models for a task on the hub by an LLM agent, and answers for what it brings.

`guided` starts the agent (`verl_rlar.agents.searcher`) in its process, takes its proposals as they come, and then looks
at each of them again itself: at its commit, through the gate, its number and its quotes. What stands is ranked by the
agent's number. Where the agent did not come to its end, or proposed nothing, the rest is filled up by metadata
(`verl_rlar.agents.scout`), and `Findings.by` says so.

Guarantees: there are findings whenever the hub answers, whatever the LLM does or does not do; nothing that the LLM or
a model's card says can bring a model in that the gate refuses, or change its receipts; with a cassette, no network is
used, and the findings are those of the recording.

Not covered: whether the agent's number is right. The exam is for that.
"""

from __future__ import annotations

import importlib.util
import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from verl_rlar.agents import session
from verl_rlar.agents.cassette import Cassette, Header, Tape, Traffic
from verl_rlar.agents.desk import fault_of, source_of
from verl_rlar.agents.prompting import prompt_files
from verl_rlar.agents.scout import (
    AgentRun,
    Brief,
    Evidence,
    Findings,
    OnProgress,
    Proposal,
    Refusal,
    proposal_of,
    scout,
)
from verl_rlar.config import AgentsConfig, HubConfig
from verl_rlar.errors import CassetteError, ConfigError, HubError
from verl_rlar.gate import check
from verl_rlar.hub import Hub, endpoint_of
from verl_rlar.repository import COMMIT
from verl_rlar.types import Query

SAMPLES = 4
"""Queries of the task that the agent is shown."""
WORK = "verl_rlar.agents.searcher:work"
SHAPING = (
    "temperature", "answer_tokens", "steps", "calls_per_step", "tokens", "quote_chars", "retries", "max_wait_s",
)  # fmt: skip
"""Settings of an agent on which its requests depend; a cassette brings its own."""


@dataclass(kw_only=True)
class _Told:
    """What an agent has told so far."""

    searches: int = 0
    found: set[str] = field(default_factory=set)
    looked_at: set[str] = field(default_factory=set)
    proposed: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    refused: dict[str, Refusal] = field(default_factory=dict)
    steps: int = 0
    tokens: int = 0

    def take(self, event: Mapping[str, Any]) -> None:
        match event["event"]:
            case "search":
                self.searches += 1
                self.found.update(event["found"])
            case "look":
                self.looked_at.add(event["repo"])
            case "proposed":
                self.proposed[event["repo"]] = event
            case "refused":
                refusal = Refusal(repo=event["repo"], commit=event["commit"], reasons=tuple(event["reasons"]))
                self.refused[refusal.repo] = refusal
            case "call":
                self.tokens = event["tokens"]
            case "step":
                self.steps = event["step"]


def guided(
    brief: Brief,
    queries: Sequence[Query],
    hub_config: HubConfig,
    config: AgentsConfig,
    *,
    folder: Path,
    most: int = 10,
    now: datetime | None = None,
    record: Path | None = None,
    note: str = "",
    replay: Path | None = None,
    on_progress: OnProgress | None = None,
) -> Findings:
    """Looks for models on the hub, by an LLM.

    Args:
        brief: What is looked for.
        queries: Some of the task's queries; the agent sees the first `SAMPLES`.
        hub_config: The settings under ``rlar.hub``.
        config: The settings under ``rlar.agents``.
        folder: Where the transcript goes.
        most: Most proposals.
        now: Ages of models are counted from then; None: the clock's time.
        record: Cassette to be written; it is not, and that is a fault, if the agent's process was killed or crashed.
        note: What the cassette says about who or what wrote the LLM's answers.
        replay: Cassette to be used instead of the network.
        on_progress: Called while it works.

    Raises:
        ConfigError: No LLM is configured, or the extra `agents` is not installed.
        CassetteError: What is replayed is not what was recorded, or the cassette cannot be read or written.
        HubError: The agent found nothing, and the hub does not answer.
        AgentError: There can be no transcript, or no process.
    """
    began = time.monotonic()
    progress = on_progress or (lambda *_: None)
    if not importlib.util.find_spec("smolagents"):
        raise ConfigError("an LLM drives agents by smolagents, which is not installed: pip install 'verl-rlar[agents]'")
    seed, cassette = secrets.token_hex(8), None
    now = now or datetime.now(timezone.utc)
    if replay:
        cassette = Cassette.read(replay)
        config, hub_config, now, seed = _as_recorded(cassette, brief, most, config, hub_config)
    if not config.url:
        raise ConfigError("no LLM is configured: set rlar.agents.url and rlar.agents.model")
    order = {
        "agents": config.model_dump(mode="json"),
        "hub": hub_config.model_dump(mode="json"),
        "brief": {
            "task": brief.task,
            "topics": brief.topics,
            "languages": brief.languages,
            "kinds": [kind.value for kind in brief.kinds],
        },
        "samples": [query.prompt for query in queries[:SAMPLES]],
        "most": most,
        "seed": seed,
        "record": bool(record),
        "replay": str(replay.absolute()) if replay else None,
        "purse": None if replay else str(folder.absolute()),
    }
    told = _Told()
    with ExitStack() as stack:
        tape = stack.enter_context(Tape(record, _header(order, now, note))) if record else None

        def on_event(event: session.Event) -> None:
            if event["event"] == "tape":
                if tape:
                    tape.add(event["line"])
                return
            told.take(event)
            progress("steps", told.steps, config.steps)
            progress("tokens", told.tokens, config.tokens)

        keys = (config.api_key_env, hub_config.token_env)
        ended = session.run(
            WORK,
            order,
            folder=folder,
            name="scout",
            wall_s=config.wall_s,
            secrets=keys,
            on_event=on_event,
        )
        faults = [] if ended.how == "done" else [f"the agent did not come to its end: {ended.detail}"]
        if tape and ended.how in ("time", "crash"):
            tape.drop()
            faults.append(f"{record} was not kept: the agent was killed amid its traffic, which cannot be replayed")
        traffic = Traffic(
            side="scout", add=tape.add if tape else None, cassette=cassette, secrets=session.secrets_of(*keys)
        )
        hub = stack.enter_context(Hub(hub_config, traffic.to("hub", endpoint_of(hub_config))))
        proposals, refused = _examined(brief, hub, told, now)
        run = AgentRun(
            model=config.model or "",
            how=ended.how,
            detail=ended.detail,
            steps=told.steps,
            tokens=told.tokens,
            seconds=ended.seconds,
            transcript=str(ended.transcript),
        )
        findings = Findings(
            brief=brief,
            by=_by(run, len(proposals)),
            searches=told.searches,
            found=len(told.found),
            looked_at=len(told.looked_at),
            proposals=tuple(proposals[:most]),
            refused=tuple(refused.values()),
            faults=tuple(faults),
            agent=run,
        )
        if (ended.how != "done" or not proposals) and len(proposals) < most:
            findings = _filled_up(findings, hub, most, now, on_progress)
    return replace(findings, seconds=time.monotonic() - began)


def _as_recorded(
    cassette: Cassette, brief: Brief, most: int, config: AgentsConfig, hub_config: HubConfig
) -> tuple[AgentsConfig, HubConfig, datetime, str]:
    """The settings under which a cassette was recorded.

    Raises:
        CassetteError: It is for another task, or with other prompts.
    """
    header = cassette.header
    cassette.check(prompt_files())
    if header.task != brief.task:
        raise CassetteError(f"{cassette.path} was recorded for the task {header.task!r}, not for {brief.task!r}")
    if header.settings["most"] != most:
        raise CassetteError(f"{cassette.path} was recorded for at most {header.settings['most']} proposals, not {most}")
    shaping = {name: value for name, value in header.settings["agents"].items() if name in SHAPING}
    return (
        config.model_copy(update={"url": header.llm, "model": header.model, **shaping}),
        hub_config.model_copy(update={"endpoint": header.hub, "offline": False, "results": header.settings["results"]}),
        datetime.fromisoformat(header.recorded),
        header.seed,
    )


def _header(order: Mapping[str, Any], now: datetime, note: str) -> Header:
    agents, hub = order["agents"], order["hub"]
    return Header(
        recorded=now.isoformat(),
        note=note,
        llm=agents["url"],
        model=agents["model"],
        hub=endpoint_of(HubConfig(**hub)),
        task=order["brief"]["task"],
        settings={
            "most": order["most"],
            "results": hub["results"],
            "agents": {name: agents[name] for name in SHAPING},
        },
        seed=order["seed"],
        prompts=prompt_files("scout"),
    )


def _examined(brief: Brief, hub: Hub, told: _Told, now: datetime) -> tuple[list[Proposal], dict[str, Refusal]]:
    """What stands of an agent's proposals, the best first, and what is refused."""
    proposals: list[Proposal] = []
    refused = dict(told.refused)
    for repo, said in told.proposed.items():
        reasons: tuple[str, ...]
        report = None
        commit = str(said["commit"])
        try:
            if not COMMIT.fullmatch(commit):
                raise HubError(f"{commit[:80]!r} is no commit")
            model = hub.inspect(repo, commit)
            report = check(model, hub.config)
            fault = fault_of(model, said["fit"], said["why"], said["quotes"])
            reasons = report.reasons or ((f"proposal: {fault}",) if fault else ())
        except HubError as error:
            reasons = (f"hub: {error}",)
        if reasons:
            refused[repo] = Refusal(repo=repo, commit=commit, reasons=reasons, report=report)
            continue
        assert report
        shown = [Evidence(source="agent", quote=said["why"])]
        shown += [Evidence(source=source_of(quote, model) or "", quote=quote) for quote in said["quotes"]]
        base = proposal_of(brief, model, report, now)
        facts = tuple(item for item in base.evidence if item.source in ("hub", "files"))
        proposals.append(replace(base, value=round(said["fit"], 4), by="agent", evidence=(*shown, *facts)))
    proposals.sort(key=lambda proposal: -proposal.value)
    return proposals, refused


def _by(run: AgentRun, proposals: int) -> str:
    if not proposals:
        why = "proposed nothing that stands" if run.how == "done" else f"did not come so far ({run.how})"
        return f"metadata only; an LLM ({run.model}) {why}"
    if run.how == "done":
        return f"an LLM ({run.model}), of what the gate lets pass"
    return f"an LLM ({run.model}) as far as it came ({run.how}), of what the gate lets pass; then by metadata only"


def _filled_up(findings: Findings, hub: Hub, most: int, now: datetime, on_progress: OnProgress | None) -> Findings:
    """Findings with what metadata say behind them."""
    try:
        more = scout(findings.brief, hub, most=most, now=now, on_progress=on_progress)
    except HubError as error:
        if not findings.proposals:
            raise
        return replace(findings, faults=(*findings.faults, str(error)))
    have = {proposal.repo for proposal in findings.proposals}
    proposals = (*findings.proposals, *(proposal for proposal in more.proposals if proposal.repo not in have))
    refused = {refusal.repo: refusal for refusal in (*findings.refused, *more.refused)}
    return replace(
        findings,
        searches=findings.searches + more.searches,
        found=max(findings.found, more.found),
        looked_at=max(findings.looked_at, more.looked_at),
        proposals=proposals[:most],
        refused=tuple(refused.values()),
        faults=(*findings.faults, *more.faults),
    )
