# SPDX-License-Identifier: Apache-2.0
"""The scout as an LLM agent: smolagents' loop with the tools of the desk. It runs in the agent's process.

Guarantees: it has the tools below and no other; it ends after `rlar.agents.steps` answers of the LLM without asking for
a last word; its final answer ends it and counts for nothing, as what was proposed was told when it was proposed.

Not covered: time, which `verl_rlar.agents.session` keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from smolagents import ActionStep, LogLevel, Tool, ToolCallingAgent
from smolagents.utils import AgentError as LoopError

from verl_rlar.agents.cassette import Cassette, Traffic
from verl_rlar.agents.desk import Desk
from verl_rlar.agents.llm import Llm
from verl_rlar.agents.prompting import render
from verl_rlar.agents.session import Emit, Stop, secrets_of
from verl_rlar.config import AgentsConfig, HubConfig
from verl_rlar.errors import CassetteError, EndpointError
from verl_rlar.hub import Hub, endpoint_of
from verl_rlar.purse import OutOfTokens, Purse
from verl_rlar.quoting import Quoter, plain

REPO = {"type": "string", "description": "The model, as OWNER/NAME."}
SHOWN_CHARS = 1000
"""Characters of the final answer that the transcript keeps."""


class DeskTool(Tool):
    """A tool of the desk: smolagents' description of it, and what it does."""

    skip_forward_signature_validation = True
    output_type = "string"

    def __init__(self, name: str, description: str, inputs: Mapping[str, Any], work: Callable[..., str]) -> None:
        self.name, self.description, self.inputs = name, description, dict(inputs)
        self.work = work
        self.faults: list[CassetteError] = []
        """What ends the run, as it is not for the LLM to mend; all tools of a desk share it."""
        super().__init__()

    def forward(self, *given: Any, **named: Any) -> str:
        named |= dict(zip(self.inputs, given, strict=False))
        try:
            return self.work(*(named.get(name) for name in self.inputs))
        except CassetteError as error:
            self.faults.append(error)
            raise


def tools_of(desk: Desk) -> list[DeskTool]:
    """The tools, as an LLM sees them."""

    def maybe(text: str) -> dict[str, Any]:
        return {"type": "string", "description": text, "nullable": True}

    tools = [
        DeskTool(
            "search_models",
            "Finds models on the hub that meet all conditions given, most used first. Give at least one.",
            {
                "words": maybe("Part of the model's name, e.g. `reward` or `math`."),
                "tag": maybe("One tag, e.g. `reward-model`, `RLHF`, `translation`, `math`."),
                "pipeline": maybe("The hub's name of the task, e.g. `text-classification`."),
                "sort": maybe("`downloads`, `likes`, `created_at` or `last_modified`."),
            },
            desk.search,
        ),
        DeskTool(
            "model_info",
            "Tells whether the gate lets a model pass, or why not; architecture, how it scores, size, licence, use.",
            {"repo": REPO},
            desk.info,
        ),
        DeskTool("read_card", "Reads the card of a model.", {"repo": REPO}, desk.card),
        DeskTool("read_config", "Reads the config of a model.", {"repo": REPO}, desk.config),
        DeskTool(
            "propose",
            "Proposes a model that the gate lets pass. Proposing it again replaces what you said before.",
            {
                "repo": REPO,
                "fit": {"type": "number", "description": "How well it fits the task, from 0 to 1; the highest first."},
                "why": {"type": "string", "description": "Your reason, in a sentence or two."},
                "quotes": {
                    "type": "array",
                    "items": {"type": "string"},
                    "description": "1 to 6 passages of its card, config, tags or name, letter by letter.",
                },
            },
            desk.propose,
        ),
    ]
    for tool in tools:
        tool.faults = tools[0].faults
    return tools


def work(order: Mapping[str, Any], emit: Emit) -> None:
    """Looks for models until the LLM says that it is done.

    Raises:
        Stop: A budget is used up, or the LLM does not answer.
        CassetteError: What is replayed is not what was recorded.
    """
    config, hub_config = AgentsConfig(**order["agents"]), HubConfig(**order["hub"])
    assert config.url
    traffic = Traffic(
        side="agent",
        add=(lambda line: emit({"event": "tape", "line": line})) if order["record"] else None,
        cassette=Cassette.read(Path(order["replay"])) if order["replay"] else None,
        secrets=secrets_of(config.api_key_env, hub_config.token_env),
    )
    quoter = Quoter(order["seed"], config.quote_chars)
    samples = [quoter.quote(text, f"query {place}") for place, text in enumerate(order["samples"], start=1)]
    purse = Purse(Path(order["purse"]), f"scout-{order['seed']}", config) if order["purse"] else None
    llm = Llm(config, traffic.to("llm", config.url), lambda call: emit({"event": "call", **call}), purse)
    with Hub(hub_config, traffic.to("hub", endpoint_of(hub_config))) as hub:
        tools = tools_of(Desk(hub, quoter, order["most"], emit))
        agent = _agent(config, llm, tools, order["most"], emit)
        task = render("scout_task.md", {**order["brief"], "samples": samples})
        try:
            answer = agent.run(task)
        except LoopError as error:
            cause = error.__cause__
            if isinstance(cause, OutOfTokens):
                raise Stop("tokens", str(cause)) from None
            if isinstance(cause, EndpointError):
                raise Stop("endpoint", str(cause)) from None
            raise cause or error from None
        finally:
            llm.close()
    emit({"event": "answer", "text": plain(str(answer), SHOWN_CHARS)})


def _agent(config: AgentsConfig, llm: Llm, tools: Sequence[DeskTool], most: int, emit: Emit) -> ToolCallingAgent:
    def after(step: ActionStep) -> None:
        emit(
            {
                "event": "step",
                "step": step.step_number,
                "calls": [{"tool": call.name, "arguments": call.arguments} for call in step.tool_calls or ()],
                "observations": step.observations,
                "error": str(step.error) if step.error else None,
            }
        )
        if tools[0].faults:
            raise tools[0].faults[0]
        if step.step_number >= config.steps and not step.is_final_answer and step.model_output_message:
            raise Stop("steps", f"it used all its {config.steps} steps (rlar.agents.steps)")

    system = render("scout.md", {"steps": config.steps, "most": most})
    unused = {
        "planning": dict.fromkeys(("initial_plan", "update_plan_pre_messages", "update_plan_post_messages"), ""),
        "managed_agent": dict.fromkeys(("task", "report"), ""),
        "final_answer": dict.fromkeys(("pre_messages", "post_messages"), ""),
    }
    return ToolCallingAgent(
        tools=list(tools),
        model=llm,
        prompt_templates={"system_prompt": f"{{% raw %}}{system}{{% endraw %}}", **unused},
        max_steps=config.steps + 1,
        max_tool_threads=1,
        step_callbacks=[after],
        verbosity_level=LogLevel.OFF,
    )
