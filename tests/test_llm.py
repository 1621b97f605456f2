# SPDX-License-Identifier: Apache-2.0
"""The LLM's endpoint, over a real socket: answers, budgets, retries, and everything that is no answer."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest

pytest.importorskip("smolagents", reason="smolagents is not installed (extra `agents`)")
from llm_server import LlmServer, Turn, calls, dies, hangs, of_request, says, text
from smolagents import ChatMessage, MessageRole

from verl_rlar.agents.llm import Llm
from verl_rlar.config import AgentsConfig, parse
from verl_rlar.errors import ConfigError, EndpointError
from verl_rlar.purse import OutOfTokens

HELLO = [ChatMessage(role=MessageRole.USER, content=[{"type": "text", "text": "Hello"}])]


def ask(*script: Turn, times: int = 1, **settings: Any) -> tuple[ChatMessage, list[Any], LlmServer, Llm]:
    told: list[Any] = []
    with LlmServer(script) as server:
        config = AgentsConfig(**{"url": server.url, "model": "m", "max_wait_s": 0.0, **settings})
        llm = Llm(config, on_call=told.append)
        try:
            for _ in range(times):
                answer = llm.generate(HELLO)
        finally:
            llm.close()
    return answer, told, server, llm


def test_an_answer_comes_with_calls_under_our_names_and_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLAR_LLM_API_KEY", "sk-planted-key")
    answer, told, server, llm = ask(calls(("a", {"x": 1}), ("b", "{"), content="thinking"))
    assert answer.content == "thinking" and answer.tool_calls
    assert [(call.id, call.function.name) for call in answer.tool_calls] == [("call_001_00", "a"), ("call_001_01", "b")]
    assert (llm.tokens, told[0]["read"], told[0]["written"], told[0]["tries"]) == (120, 100, 20, 1)
    asked = server.requests[0]
    assert asked["messages"] == [{"role": "user", "content": "Hello"}]
    assert (asked["model"], asked["max_tokens"], asked["temperature"]) == ("m", 4096, 0.0)
    assert server.headers[0]["authorization"] == "Bearer sk-planted-key" and "planted" not in str(told)


def test_without_a_key_none_is_sent_and_without_a_temperature_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RLAR_LLM_API_KEY", raising=False)
    _, _, server, _ = ask(text("hi"), temperature=None)
    assert "authorization" not in server.headers[0] and "temperature" not in server.requests[0]


def test_no_more_tools_are_called_than_allowed() -> None:
    answer, *_ = ask(calls(*[("a", {})] * 30), calls_per_step=3)
    assert answer.tool_calls and len(answer.tool_calls) == 3


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_endpoint_is_asked_again(status: int) -> None:
    answer, told, server, _ = ask(says(status), says(status), text("hi"))
    assert answer.content == "hi" and told[0]["tries"] == len(server.requests) == 3


def test_it_is_not_asked_for_ever_nor_before_it_wants() -> None:
    with pytest.raises(EndpointError, match="HTTP 500"):
        ask(says(500), retries=2)
    with pytest.raises(EndpointError, match="HTTP 429"):
        ask(says(429, Retry_After="900"), text("too early"), max_wait_s=1.0)


UNSUPPORTED = (
    b"Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
)


def newer(asked: dict[str, Any]) -> Any:
    """An endpoint that wants the newer name."""
    return says(400, UNSUPPORTED) if "max_tokens" in asked else text("hi")


def test_an_endpoint_that_wants_max_completion_tokens_gets_them_from_then_on() -> None:
    _, told, server, _ = ask(of_request(newer), times=2)
    assert [sorted({"max_tokens", "max_completion_tokens"} & asked.keys()) for asked in server.requests] == [
        ["max_tokens"], ["max_completion_tokens"], ["max_completion_tokens"],
    ]  # fmt: skip
    assert server.requests[1]["max_completion_tokens"] == 4096 and [call["tries"] for call in told] == [2, 1]
    with pytest.raises(EndpointError, match="HTTP 400: Unsupported"):
        ask(says(400, UNSUPPORTED), says(400, UNSUPPORTED), text("a third try"))


def test_an_answer_may_come_in_parts_and_thoughts_are_left_out() -> None:
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}]
    parts += [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    answer, *_ = ask(says(200, json.dumps({"choices": [{"message": {"content": parts}}]}).encode()))
    assert answer.content == "hello"


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        (says(400, b"no such model"), "no such model"),
        (says(401), "RLAR_LLM_API_KEY"),
        (says(200, b"<html>"), "no JSON object"),
        (says(200, b"[]"), "no JSON object"),
        (says(200, b'{"choices": []}'), "no message of an LLM"),
        (says(200, b'{"choices": [{"message": {"content": 7}}]}'), "no message of an LLM"),
        (says(200, b'{"choices": [{"message": {"content": [7]}}]}'), "no message of an LLM"),
        (says(200, b'{"choices": [{"message": {"content": [{"type": "text"}]}}]}'), "no message of an LLM"),
        (says(200, b'{"choices": [{"message": {"content": "", "tool_calls": [{"function": 1}]}}]}'), "no message"),
        (says(200, b" " * (5 * 2**20)), "more than 4 MiB"),
        (dies(), "cannot be reached"),
    ],
)
def test_what_is_no_answer_is_an_error_at_once(turn: Turn, reason: str) -> None:
    with pytest.raises(EndpointError, match=reason):
        ask(turn, text("a second try"))


def test_an_endpoint_that_hangs_has_a_deadline() -> None:
    over = threading.Event()
    with pytest.raises(EndpointError, match=r"within 0\.5 s"):
        try:
            ask(hangs(over), timeout_s=0.5)
        finally:
            over.set()


def test_the_budget_of_tokens_ends_before_the_call_that_would_exceed_it() -> None:
    with pytest.raises(OutOfTokens, match=r"rlar\.agents\.tokens is 250"):
        ask(text("hi"), times=9, tokens=250)
    _, _, server, llm = ask(text("hi"), times=2, tokens=300)
    assert llm.tokens == 240 and len(server.requests) == 2


def test_tokens_are_estimated_where_an_endpoint_does_not_count() -> None:
    _, told, _, llm = ask(text("x" * 400, usage=None))
    assert llm.tokens > 100 and told[0]["written"] >= 100


@pytest.mark.parametrize(
    ("tree", "reason"),
    [
        ({"url": "localhost:8000", "model": "m"}, "no address"),
        ({"url": "http://me:password@host/v1", "model": "m"}, "holds a password"),
        ({"url": "http://host/v1"}, "which model"),
        ({"step": 3}, "did you mean steps"),
        ({"dollars": 1}, r"dollars: it never holds while nothing has a price; set agents\.dollars_read"),
        ({"run_dollars": 10, "dollars_read": 0, "dollars_written": 0}, "run_dollars: it never holds"),
    ],
)
def test_settings_are_checked(tree: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as told:
        parse({"agents": tree})
    assert "me:password" not in str(told.value) and "Value error" not in str(told.value)


def test_a_cap_of_money_holds_with_one_price() -> None:
    assert parse({"agents": {"run_dollars": 10, "dollars_written": 2}}).agents.run_dollars == 10
