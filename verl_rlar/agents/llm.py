# SPDX-License-Identifier: Apache-2.0
"""The LLM behind an OpenAI-compatible endpoint, as smolagents wants it.

Guarantees:

- Every call has a deadline for each try, from first byte to last; an answer has a largest size. HTTP 429 and 5xx are
  tried again, here and nowhere else; a pause that the endpoint asks for is kept, or the call fails at once.
- No call is made that would exceed the budget of tokens, as far as texts tell (four characters to a token); then
  `OutOfTokens` is raised. Where an endpoint does not say what a call took, that is estimated in the same way.
- With a `verl_rlar.agents.purse.Purse`, every try is paid from it, and waits for the pace of the run.
- Every call is told to `on_call`, those that failed too; neither that nor an error holds the key.
- What comes back is taken apart with care: a message is text and some calls of tools, with identifiers of ours, or
  `EndpointError` says what it is instead.

Not covered: streaming, images, endpoints that speak other than ``/chat/completions``.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import httpx
from smolagents import ChatMessage, MessageRole, Model, TokenUsage
from smolagents.models import ChatMessageToolCall, ChatMessageToolCallFunction
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt

from verl_rlar.config import AgentsConfig
from verl_rlar.errors import AgentError, EndpointError

if TYPE_CHECKING:
    from verl_rlar.agents.purse import Purse

REPLY_BYTES = 4 * 2**20
CHARS_PER_TOKEN = 4


class OutOfTokens(AgentError):
    """The next call would exceed the budget."""


class _TryAgain(Exception):
    def __init__(self, error: EndpointError, wait_s: float | None) -> None:
        super().__init__(error)
        self.error, self.wait_s = error, wait_s


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
        key = os.environ.get(config.api_key_env)
        self._client = httpx.Client(
            headers={"accept-encoding": "identity", **({"authorization": f"Bearer {key}"} if key else {})},
            timeout=config.timeout_s,
            transport=transport,
        )
        self._at = f"{config.url.rstrip('/')}/chat/completions"

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
        body = {"model": self.model_id, "max_tokens": self.config.answer_tokens, **asked}
        if self.config.temperature is not None:
            body["temperature"] = self.config.temperature
        content = json.dumps(body, ensure_ascii=False).encode()
        expected = len(content) // CHARS_PER_TOKEN
        if self.tokens + expected > self.config.tokens:
            raise OutOfTokens(
                f"{self.tokens:,} tokens are used, and the next call would take some {expected:,}; "
                f"rlar.agents.tokens is {self.config.tokens:,}"
            )
        self.calls += 1
        record: dict[str, Any] = {"call": self.calls, "tries": 0}
        began = time.monotonic()
        try:
            reply = self._asked(content, record, expected)
            message, usage = self._message(reply, expected)
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

    def _asked(self, content: bytes, record: dict[str, Any], expected: int) -> dict[str, Any]:
        """Asks, and asks again where that may help."""

        def wait(state: RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            asked = error.wait_s if isinstance(error, _TryAgain) else None
            return min(self.config.max_wait_s, 0.5 * 2**state.attempt_number if asked is None else asked)

        def ask() -> dict[str, Any]:
            if self._purse:
                self._purse.take(expected)
            record["tries"] += 1
            return self._post(content)

        stop = stop_after_attempt(1 + self.config.retries)
        try:
            return Retrying(stop=stop, wait=wait, retry=retry_if_exception_type(_TryAgain), reraise=True)(ask)
        except _TryAgain as last:
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
                    if len(body) > REPLY_BYTES:
                        raise EndpointError(f"{self._at} answered with more than {REPLY_BYTES >> 20} MiB")
                    if time.monotonic() > deadline:
                        raise httpx.ReadTimeout("deadline")
        except httpx.TimeoutException:
            raise EndpointError(
                f"{self._at} did not answer within {self.config.timeout_s:g} s; raise rlar.agents.timeout_s, or see "
                "whether it is well"
            ) from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise EndpointError(f"{self._at} cannot be reached ({error}); check rlar.agents.url") from None
        self._check(response, bytes(body))
        try:
            reply = json.loads(body)
        except (ValueError, RecursionError):
            reply = None
        if not isinstance(reply, dict):
            raise EndpointError(f"{self._at} answered with no JSON object: is it an OpenAI-compatible endpoint?")
        return reply

    def _check(self, response: httpx.Response, body: bytes) -> None:
        status = response.status_code
        if status == 200:
            return
        said = "".join(c if c.isprintable() else " " for c in body.decode("utf-8", "replace"))[:300]
        error = EndpointError(f"{self._at} answered with HTTP {status}: {said}")
        if status in (401, 403):
            error = EndpointError(f"{self._at} does not let us in (HTTP {status}); check {self.config.api_key_env}")
        if status == 429 or status >= 500:
            text = response.headers.get("retry-after", "").strip()
            wait_s = float(text[:9]) if text.isdecimal() else None
            if wait_s is None or wait_s <= self.config.max_wait_s:
                raise _TryAgain(error, wait_s)
        raise error

    # --- what came ----------------------------------------------------------------------------------------------------

    def _message(self, reply: Mapping[str, Any], expected: int) -> tuple[ChatMessage, TokenUsage]:
        try:
            said = reply["choices"][0]["message"]
            text = said.get("content")
            wanted = said.get("tool_calls") or []
            calls = [
                ChatMessageToolCall(
                    id=f"call_{self.calls:03}_{place:02}",
                    type="function",
                    function=ChatMessageToolCallFunction(
                        name=str(call["function"]["name"]), arguments=call["function"].get("arguments") or {}
                    ),
                )
                for place, call in enumerate(wanted[: self.config.calls_per_step])
            ]
            if not isinstance(text, str | None):
                raise TypeError
        except (KeyError, IndexError, TypeError, AttributeError):
            raise EndpointError(f"{self._at} answered with no message of an LLM: {str(reply)[:200]!r}") from None
        usage = reply.get("usage")
        counts = [
            usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")
        ]
        read, written = (count if type(count) is int and count >= 0 else None for count in counts)
        tokens = TokenUsage(
            input_tokens=expected if read is None else read,
            output_tokens=len(str(said)) // CHARS_PER_TOKEN if written is None else written,
        )
        answer = ChatMessage(
            role=MessageRole.ASSISTANT, content=text, tool_calls=calls or None, raw=None, token_usage=tokens
        )
        return answer, tokens
