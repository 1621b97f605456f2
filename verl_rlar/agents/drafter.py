# SPDX-License-Identifier: Apache-2.0
"""The coder at work, in the agent's process: plans schemes, drafts a verifier by each, and repairs what fails.

A rubric (`verl_rlar.tools.rubric`) is written in the same way: a block of JSON instead of code, and instead of a plan
points of view that are ours (`VIEWS`).

It is a plain loop over an LLM and no agent with tools: the code is the answer, in a fenced block, which language models
write better than code inside of JSON; every turn has one outcome; and smolagents' `CodeAgent` would run what the model
writes here, where nothing of it may ever run. The LLM is the same `Llm` that drives the scout.

A draft's talk is kept short: the task, the last version, and what was wrong with it. It ends when the draft is
admitted, when it was let down by the sealed cases (one look for each draft, and no word about them), when its repairs
are used up or do not help, or when it does what another draft did before.

Guarantees: what the LLM writes is text here: it is searched for its one block of code, and handed to who started the
agent, who has it tried in a box. What the LLM reads of data, of a draft's own words and of errors is quoted.

Not covered: time, which `verl_rlar.agents.session` keeps.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from verl_rlar.agents.cassette import Cassette, Traffic
from verl_rlar.agents.journal import Talk
from verl_rlar.agents.llm import Llm
from verl_rlar.agents.prompting import render
from verl_rlar.agents.session import Emit, Stop, ask, secrets_of
from verl_rlar.config import AgentsConfig
from verl_rlar.errors import EndpointError
from verl_rlar.purse import OutOfTokens, Purse
from verl_rlar.quoting import Quoter, plain
from verl_rlar.tools.rubric import LEAST_CHECKS, MOST_CHECKS, MOST_WEIGHT

SCHEMES = ("exact rule", "program run", "constraint check", "metric", "decomposition")
"""What sorts of scheme there are."""
LEAST_SCHEMES, MOST_SCHEMES = 3, 5
IDEA_CHARS = 600
VIEWS = (
    "What does the one who asked need, and what do the better responses of the examples do that the worse ones do not?",
    "How do the worse responses of the examples go wrong? Ask whether a response is free of each of these faults.",
    "Substance alone: is what it says right, is all there that matters, is nothing there that does not belong?",
    "As an expert on the subject would check it, the most important thing first, with the weights that this has.",
)
"""From which a rubric is drafted, one after the other."""
IDLE = 3
"""Repairs in a row that do not help, after which a draft is given up."""
STAGES = ("fault", "own_cases", "open")
"""How far a version can come that may be repaired."""
_FENCE = re.compile(
    r"(?:^|(?<=</think>))[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)^[ \t]*```[ \t]*$", re.MULTILINE | re.DOTALL
)


def work(order: Mapping[str, Any], emit: Emit) -> None:
    """Plans, drafts and repairs until a draft is admitted or all are used up.

    Raises:
        Stop: A budget is used up, or the LLM does not answer.
        CassetteError: What is replayed is not what was recorded.
    """
    config = AgentsConfig(**order["agents"])
    assert config.url
    traffic = Traffic(
        side="agent",
        add=(lambda line: emit({"event": "tape", "line": line})) if order["record"] else None,
        cassette=Cassette.read(Path(order["replay"])) if order["replay"] else None,
        secrets=secrets_of(config.api_key_env),
    )
    purse = Purse(Path(order["purse"]), order["id"], config) if order["purse"] else None
    llm = Llm(config, traffic.to("llm", config.url), lambda call: emit({"event": "call", **call}), purse)
    talk = Talk(llm, config.steps, Path(order["journal"]) if order["journal"] else None)
    made = _Author if order["form"] == "rubric" else _Coder
    coder = made(config, talk, Quoter(order["seed"], config.quote_chars), order["task"], emit)
    try:
        coder.work()
    except OutOfTokens as error:
        raise Stop("tokens", str(error)) from None
    except EndpointError as error:
        raise Stop("endpoint", str(error)) from None
    finally:
        emit({"event": "talk", "asked": talk.asked, "recalled": talk.recalled, "tokens": llm.tokens})
        llm.close()


class _Coder:
    """See the module.

    Args:
        config: Budgets.
        talk: Asks the LLM.
        quoter: Quotes what is not ours.
        task: What `verl_rlar.agents.coder` tells of the task.
        emit: Takes the events.
    """

    prompts = "coder"
    """What the names of its prompt files begin with."""

    def __init__(self, config: AgentsConfig, talk: Talk, quoter: Quoter, task: Mapping[str, Any], emit: Emit) -> None:
        self._config, self._talk, self._quoter, self._emit = config, talk, quoter, emit
        self._system = self._introduction(task)
        examples = [quoter.quote(one, f"query {place}") for place, one in enumerate(task["examples"], start=1)]
        self._task = render(f"{self.prompts}_task.md", {**task, "examples": examples})

    def _introduction(self, task: Mapping[str, Any]) -> str:
        return render("coder.md", {"seconds": task["seconds"]})

    def _found(self, said: str) -> tuple[str | None, str]:
        """What an answer hands over, or what is wrong with the answer."""
        return code_of(said)

    def work(self) -> None:
        schemes = self._plan()
        for number in range(1, self._config.drafts + 1):
            if self._draft(number, schemes[(number - 1) % len(schemes)]):
                return

    def _plan(self) -> Sequence[Mapping[str, str]]:
        """The schemes, the best first; without a usable answer, one that leaves all open."""
        wanted = render("coder_plan.md", {"least": LEAST_SCHEMES, "most": MOST_SCHEMES, "kinds": SCHEMES})
        messages = [("system", self._system), ("user", f"{self._task}\n\n{wanted}")]
        faults: list[str] = []
        schemes: list[dict[str, str]] = []
        for _ in range(2):
            said = self._talk.ask(messages)
            schemes, fault = schemes_of(said)
            fault = self._fault(fault)
            if not fault:
                break
            faults.append(fault)
            messages = [*messages[:2], ("assistant", said or "(nothing)"), ("user", f"This is no plan: {fault}.")]
        else:
            schemes = [{"kind": "decomposition", "idea": "No plan was made: proceed as you see fit."}]
        self._emit({"event": "plan", "schemes": schemes, "faults": faults})
        return schemes

    def _fault(self, fault: str) -> str:
        """What is wrong with the last answer: if it was cut off, that, whatever else it seems to be."""
        if not fault or not self._talk.cut:
            return fault
        most = self._config.answer_tokens
        return f"it was cut off after {most:,} tokens (rlar.agents.answer_tokens), before its end: think and write less"

    def _draft(self, number: int, scheme: Mapping[str, str]) -> bool:
        """One draft with its repairs; whether it was admitted."""
        wanted = render(f"{self.prompts}_draft.md", self._wanted(number, scheme))
        first = [("system", self._system), ("user", f"{self._task}\n\n{wanted}")]
        messages, best, idle = first, (-1, 0), 0
        for version in range(1, self._config.repairs + 2):
            said = self._talk.ask(messages)
            source, fault = self._found(said)
            if source is None:
                fault = self._fault(fault)
                report: Mapping[str, Any] = {"state": "fault", "fault": fault, "wrong": None, "again": True}
                self._emit({"event": "fault", "draft": number, "version": version, "fault": fault})
            else:
                report = ask(self._emit, {"draft": number, "version": version, "source": source})
            if report["state"] == "admitted":
                return True
            if not report["again"]:
                return False
            reached = (STAGES.index(report["state"]), -(report["wrong"] or 0))
            best, idle = (reached, 0) if reached > best else (best, idle + 1)
            if idle >= IDLE:
                return False
            messages = [*first, ("assistant", said or "(nothing)"), ("user", self._told(report))]
        return False

    def _wanted(self, number: int, scheme: Mapping[str, str]) -> dict[str, Any]:
        return {"number": number, **scheme}

    def _told(self, report: Mapping[str, Any]) -> str:
        """What the LLM is told of a version that is not good enough."""
        quoted = [
            {**one, "case": self._quoter.quote(one["case"], "a case"), "said": self._quoter.quote(one["said"], "score")}
            for one in report.get("failures", ())
        ]
        fault, missed = report.get("fault") or "", "\n".join(report.get("missed", ()))
        return render(
            f"{self.prompts}_repair.md",
            {
                "fault": self._quoter.quote(fault, "what was wrong") if fault else "",
                "cases": report.get("cases", 0),
                "wrong": report.get("wrong") or 0,
                "missed": self._quoter.quote(missed, "what the exam found") if missed else "",
                "failures": quoted,
            },
        )


class _Author(_Coder):
    """Writes a rubric instead; see the module."""

    prompts = "rubric"

    def _introduction(self, task: Mapping[str, Any]) -> str:
        return render("rubric.md", {"least": LEAST_CHECKS, "most": MOST_CHECKS, "weight": MOST_WEIGHT})

    def _found(self, said: str) -> tuple[str | None, str]:
        return rubric_of(said)

    def _plan(self) -> Sequence[Mapping[str, str]]:
        schemes = [{"kind": "rubric", "idea": view} for view in VIEWS]
        self._emit({"event": "plan", "schemes": schemes, "faults": []})
        return schemes

    def _wanted(self, number: int, scheme: Mapping[str, str]) -> dict[str, Any]:
        return {"number": number, "idea": scheme["idea"]}


def rubric_of(said: str) -> tuple[str | None, str]:
    """The rubric in an answer, as text, or what is wrong with the answer."""
    blocks = [text for name, text in _FENCE.findall(_spoken(said)) if name.lower() in ("json", "")]
    if len(blocks) != 1:
        return None, f"there are {len(blocks)} blocks of JSON: write the whole rubric in one, between ```json and ```"
    return blocks[0], ""


def schemes_of(said: str) -> tuple[list[dict[str, str]], str]:
    """The schemes in an answer, and what is wrong with it; empty: nothing."""
    blocks = [text for name, text in _FENCE.findall(_spoken(said)) if name.lower() in ("json", "")]
    if len(blocks) != 1:
        return [], f"it has {len(blocks)} blocks of JSON instead of one"
    try:
        listed = json.loads(blocks[0])
    except (ValueError, RecursionError):
        return [], "its block is no JSON"
    if not isinstance(listed, list) or not LEAST_SCHEMES <= len(listed) <= MOST_SCHEMES:
        return [], f"it is no list of {LEAST_SCHEMES} to {MOST_SCHEMES} schemes"
    schemes = []
    for one in listed:
        kind, idea = (one.get("kind"), one.get("idea")) if isinstance(one, dict) else (None, None)
        if kind not in SCHEMES or not isinstance(idea, str) or not idea.strip():
            return [], f"each scheme is an object with a `kind` ({', '.join(SCHEMES)}) and an `idea`"
        schemes.append({"kind": kind, "idea": plain(idea, IDEA_CHARS, line=True)})
    return schemes, ""


def code_of(said: str) -> tuple[str | None, str]:
    """The verifier in an answer, or what is wrong with the answer.

    Where there are several blocks of Python, the one that defines ``score`` is meant, if there is only one.
    """
    named = [(name.lower(), text) for name, text in _FENCE.findall(_spoken(said))]
    blocks = [text for name, text in named if name in ("python", "py", "python3", "")]
    if len(blocks) > 1:
        blocks = [text for text in blocks if re.search(r"^def score\(", text, re.MULTILINE)]
        if len(blocks) != 1:
            return None, f"{len(blocks)} of the blocks of code define `score`; write one block with the whole module"
    if not blocks:
        return None, "there is no block of code: write the whole module in one block, between ```python and ```"
    return blocks[0], ""


def _spoken(said: str) -> str:
    """An answer without what its writer thought aloud before; what looks like that within a block of code stays."""
    said = said.replace("\r\n", "\n")
    bare = _FENCE.sub(lambda block: " " * len(block[0]), said)
    at = bare.rfind("</think>")
    if at < 0 and said.lstrip().startswith("<think>"):
        at = said.find("</think>")
    return said[at + len("</think>") :] if at >= 0 else said
