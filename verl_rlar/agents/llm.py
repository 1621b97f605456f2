# SPDX-License-Identifier: Apache-2.0
"""The LLM behind an OpenAI-compatible endpoint, as smolagents wants it.

Guarantees:

- Every call has a deadline for each try, from first byte to last; an answer has a largest size. HTTP 429 and 5xx are
  tried again, here and nowhere else; a pause that the endpoint asks for is kept, or the call fails at once.
- No call is made that would exceed the budget of tokens, as far as texts tell (four characters to a token); then
  `OutOfTokens` is raised. Where an endpoint does not say what a call took, that is estimated in the same way.
- With a `verl_rlar.purse.Purse`, every try is paid from it, and waits for the pace of the run.
- Every call is told to `on_call`, those that failed too; neither that nor an error holds the key.
- What comes back is taken apart with care: a message is text and some calls of tools, with identifiers of ours, or
  `EndpointError` says what it is instead.

Not covered: streaming, images, endpoints that speak other than ``/chat/completions``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import httpx
from smolagents import ChatMessage, MessageRole, Model, TokenUsage
from smolagents.models import ChatMessageToolCall, ChatMessageToolCallFunction
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt

from verl_rlar import chat
from verl_rlar.config import AgentsConfig
from verl_rlar.errors import EndpointError
from verl_rlar.purse import OutOfTokens, Purse


class Llm(Model):
    """See the module.

    Args:
        config: The settings; `url` and `model` are set.
        transport: What carries the requests; None: the network.
        on_call: Told of every call, with what it took and what came of it.
        purse: What pays; None: nothing but `rlar.agents.tokens` is counted.
    """

    def __init__(
        self,
        config: AgentsConfig,
        transport: httpx.BaseTransport | None = None,
        on_call: Callable[[Mapping[str, Any]], None] = lambda _: None,
        purse: Purse | None = None,
    ) -> None:
        assert config.url and config.model
        super().__init__(model_id=config.model, flatten_messages_as_text=True)
        self.config, self._on_call, self._purse = config, on_call, purse
        self.calls, self.tokens = 0, 0
        self.cut = False
        """Whether the last answer was cut off at its most tokens."""
        self._most = "max_tokens"
        self._client = httpx.Client(headers=chat.headers(config), timeout=config.timeout_s, transport=transport)
        self._at = chat.address(config)

    def close(self) -> None:
        self._client.close()

    def generate(
        self,
        messages: list[ChatMessage],
        stop_sequences: list[str] | None = None,
        response_format: dict[str, str] | None = None,
        tools_to_call_from: list[Any] | None = None,
        **kwargs: Any,
    ) -> ChatMessage:
        """One call.

        Raises:
            OutOfTokens: It would exceed a budget; it was not made.
            EndpointError: There is no answer, or none of an LLM.
        """
        asked = self._prepare_completion_kwargs(
            messages=messages,
            stop_sequences=stop_sequences,
            response_format=response_format,
            tools_to_call_from=tools_to_call_from,
            **kwargs,
        )
        body = {"model": self.model_id, self._most: self.config.answer_tokens, **asked}
        if self.config.temperature is not None:
            body["temperature"] = self.config.temperature
        expected = len(_encoded(body)) // chat.CHARS_PER_TOKEN
        if self.tokens + expected > self.config.tokens:
            raise OutOfTokens(
                f"{self.tokens:,} tokens are used, and the next call would take some {expected:,}; "
                f"rlar.agents.tokens is {self.config.tokens:,}"
            )
        self.calls += 1
        record: dict[str, Any] = {"call": self.calls, "tries": 0}
        began = time.monotonic()
        try:
            reply = self._asked(body, record, expected)
            message, usage = self._message(reply, expected)
            self.cut = chat.cut_off(reply)
            self.tokens += usage.input_tokens + usage.output_tokens
            if self._purse:
                self._purse.settle(usage.input_tokens, usage.output_tokens)
            record |= {"read": usage.input_tokens, "written": usage.output_tokens, "answer": reply["choices"][0]}
            return message
        except EndpointError as error:
            record["error"] = str(error)
            raise
        finally:
            self._on_call(record | {"seconds": round(time.monotonic() - began, 3), "tokens": self.tokens})

    # --- HTTP ---------------------------------------------------------------------------------------------------------

    def _asked(self, body: dict[str, Any], record: dict[str, Any], expected: int) -> dict[str, Any]:
        """Asks, and asks again where that may help."""

        def wait(state: RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            assert isinstance(error, chat.Busy)
            return error.pause_s(state.attempt_number, self.config.max_wait_s)

        def ask() -> dict[str, Any]:
            if self._purse:
                self._purse.take(expected)
            record["tries"] += 1
            try:
                return self._post(_encoded(body))
            except chat.Renamed:
                if not chat.rename(body):
                    raise
                self._most = chat.NEWER
                return ask()

        stop = stop_after_attempt(1 + self.config.retries)
        try:
            return Retrying(stop=stop, wait=wait, retry=retry_if_exception_type(chat.Busy), reraise=True)(ask)
        except chat.Busy as last:
            raise last.error from None

    def _post(self, content: bytes) -> dict[str, Any]:
        deadline = time.monotonic() + self.config.timeout_s
        body = bytearray()
        try:
            with self._client.stream(
                "POST", self._at, content=content, headers={"content-type": "application/json"}
            ) as response:
                for chunk in response.iter_raw():
                    body += chunk
                    if len(body) > chat.REPLY_BYTES:
                        raise chat.too_large(self._at)
                    if time.monotonic() > deadline:
                        raise httpx.ReadTimeout("deadline")
        except httpx.TimeoutException:
            raise EndpointError(
                f"{self._at} did not answer within {self.config.timeout_s:g} s; raise rlar.agents.timeout_s, or see "
                "whether it is well"
            ) from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise EndpointError(f"{self._at} cannot be reached ({error}); check rlar.agents.url") from None
        return chat.reply_of(self._at, response.status_code, response.headers, bytes(body), self.config)

    # --- what came ----------------------------------------------------------------------------------------------------

    def _message(self, reply: Mapping[str, Any], expected: int) -> tuple[ChatMessage, TokenUsage]:
        said, text = chat.message_of(self._at, reply)
        try:
            calls = [
                ChatMessageToolCall(
                    id=f"call_{self.calls:03}_{place:02}",
                    type="function",
                    function=ChatMessageToolCallFunction(
                        name=str(call["function"]["name"]), arguments=call["function"].get("arguments") or {}
                    ),
                )
                for place, call in enumerate((said.get("tool_calls") or [])[: self.config.calls_per_step])
            ]
        except (KeyError, IndexError, TypeError, AttributeError):
            raise chat.no_message(self._at, reply) from None
        read, written = chat.usage_of(reply, said, expected)
        tokens = TokenUsage(input_tokens=read, output_tokens=written)
        answer = ChatMessage(
            role=MessageRole.ASSISTANT, content=text, tool_calls=calls or None, raw=None, token_usage=tokens
        )
        return answer, tokens


def _encoded(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, ensure_ascii=False).encode()
