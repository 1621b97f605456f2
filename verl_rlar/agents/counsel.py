# SPDX-License-Identifier: Apache-2.0
"""Asks an LLM about clusters of prompts: which tool, what name, and which single prompts go elsewhere. It runs in the
agent's process.

Guarantees: one call for each question, and one more where the answer was none (`read`); each answer is told at once; it
ends before a call that would exceed `rlar.advice.tokens`, over all starts of the run, or a cap of the purse.

Not covered: whether what is advised may be: `verl_rlar.adviser` sees to that, outside of this process.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from verl_rlar.agents.journal import Talk
from verl_rlar.agents.llm import Llm
from verl_rlar.agents.prompting import render
from verl_rlar.agents.session import Emit, Stop
from verl_rlar.config import AgentsConfig
from verl_rlar.errors import EndpointError
from verl_rlar.purse import OutOfTokens, Purse
from verl_rlar.quoting import Quoter

TASK = "advice"
"""What the purse counts it by."""
PROMPT_CHARS = 400
"""Characters of a prompt that the LLM sees."""
ABOUT_CHARS = 500
"""... and of a tool's description."""
NAME_WORDS = 6
"""Most words of a cluster's name."""
ANSWER_TOKENS = 600
"""Most tokens of an answer, unless `rlar.agents.answer_tokens` is less. LLMs that think aloud need more room than that
for their thoughts: see `THINKING`."""
THINKING = 4
"""Times as many tokens that the second try gets, where the first answer was cut off before its end."""

_OBJECT = re.compile(r"\{.*\}", re.DOTALL)
_THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)


def work(order: Mapping[str, Any], emit: Emit) -> None:
    """Asks all questions of an order.

    Raises:
        Stop: A budget is used up, or the LLM does not answer.
    """
    os.nice(10)
    config = AgentsConfig(**order["agents"])
    answer_tokens = min(config.answer_tokens, ANSWER_TOKENS)
    quoter = Quoter(order["seed"], ABOUT_CHARS)
    purse = Purse(Path(order["purse"]), TASK, config)
    left = int(order["tokens"]) - purse.spent(TASK).tokens
    llm = Llm(
        config.model_copy(update={"tokens": max(1, min(config.tokens, left)), "answer_tokens": answer_tokens}),
        on_call=lambda call: emit({"event": "call", **call}),
        purse=purse,
    )
    talk = Talk(llm, 2 * len(order["questions"]))
    system = render("adviser.md", {"words": NAME_WORDS})
    try:
        for question in order["questions"]:
            task = render("adviser_task.md", _quoted(question, quoter))
            messages = [("system", system), ("user", task)]
            said = talk.ask(messages)
            answer, fault = read(said)
            if fault:
                llm.config = llm.config.model_copy(update={"answer_tokens": THINKING * answer_tokens})
                more = ("user", f"This is no answer: {fault}. Answer with the JSON object only.")
                answer, fault = read(talk.ask([*messages, ("assistant", said[-2000:] or "(nothing)"), more]))
                llm.config = llm.config.model_copy(update={"answer_tokens": answer_tokens})
            emit({"event": "advised", "question": question["id"], "answer": answer, "fault": fault})
    except OutOfTokens as error:
        raise Stop("tokens", str(error)) from None
    except EndpointError as error:
        raise Stop("endpoint", str(error)) from None
    finally:
        llm.close()
        spent = purse.spent(TASK)
        emit({"event": "spent", "calls": spent.calls, "tokens": spent.tokens})


def _quoted(question: Mapping[str, Any], quoter: Quoter) -> dict[str, Any]:
    prompts, all_of_them = [], [tool["name"] for tool in question["tools"]]
    for place, prompt in enumerate(question["prompts"], start=1):
        text = prompt["text"]
        if len(text) > PROMPT_CHARS:  # what is asked stands at the beginning or at the end
            text = f"{text[: PROMPT_CHARS // 2]} [...] {text[-PROMPT_CHARS // 2 :]}"
        same = len(all_of_them) > 2 and sorted(prompt["tools"]) == sorted(all_of_them)
        may = "any of these tools" if same else ", ".join(prompt["tools"])
        prompts.append({"text": quoter.quote(text, f"prompt {place}"), "tools": may})
    tools = [{**tool, "about": quoter.quote(tool["about"], "what it says of itself")} for tool in question["tools"]]
    return {"kind": question["kind"], "state": _state(question), "tools": tools, "prompts": prompts}


def _state(question: Mapping[str, Any]) -> str:
    """What is decided, in a sentence."""
    if question["tools"]:
        return "Evidence leaves open which of these tools is best."
    if question["odd"]:
        return "The cluster's tool is decided. These prompts are those that differ most from the others in it."
    if question["covered"]:
        return "The cluster's tool is decided by evidence: `tool` is null."
    return "No tool fits these prompts yet: `tool` is null. The name tells others what to look for."


def read(said: str) -> tuple[dict[str, Any], str]:
    """An answer, as far as it is one; and what is wrong with it, in words (empty: nothing)."""
    found = _OBJECT.search(_THOUGHT.sub("", said))
    try:
        tree = json.loads(found[0]) if found else None
    except (ValueError, RecursionError):
        tree = None
    if not isinstance(tree, dict):
        return {}, "there is no JSON object in it"
    if not isinstance(tree.get("name"), str) or not isinstance(tree.get("tool"), str | None):
        return {}, "`name` must be a text, and `tool` a text or null"
    elsewhere = tree.get("elsewhere") or []
    if not isinstance(elsewhere, Sequence) or not all(isinstance(one, dict) for one in elsewhere):
        return {}, "`elsewhere` must be a list of objects"
    listed = [
        {"prompt": one["prompt"], "tool": one["tool"], "why": str(one.get("why") or "")}
        for one in elsewhere
        if type(one.get("prompt")) is int and isinstance(one.get("tool"), str)
    ]
    answer = {"name": tree["name"], "tool": tree.get("tool"), "why": str(tree.get("why") or ""), "elsewhere": listed}
    return answer, ""
