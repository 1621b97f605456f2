# SPDX-License-Identifier: Apache-2.0
"""Rubrics: yes/no checks by which a language model judges a response that no program can judge.

A rubric is a few independent questions with weights, each answered by yes or no, where yes speaks for the response. Its
raw score is the weighted share of yes, in [0, 1]. It is a kind of tool of its own, not a verifier: a verifier is code
that runs in a box and says the same always, a rubric is text, and its value is a model's opinion (`ToolSpec.opinion`).
Nor is it a reward model: nothing of it is downloaded, served or given room on a device.

The spec holds all that makes the opinion: in `ToolSpec.serving` the questions with their weights, and the hash of the
judge's prompt files (`PROMPTS`); as its target the model. Another question, prompt or model is another tool, which has
its own exam to pass. Where the model is reached, what a call may take, and the caps and the pace that are shared with
all agents of the run, are under ``rlar.agents`` and ``rlar.rubrics``.

All questions go into one call, which costs a fraction of a call for each. What is judged is quoted between marks that
are drawn from a hash of all that is judged: no text can hold a hash of itself, so none can end its own quote, and the
same sample is the same request always. The judge must answer with one JSON object that repeats a code drawn likewise:
an answer that it merely copied out of the response does not have it.

Guarantees: a value is a number only if every question was answered by yes or no, in the form that is asked for; all
else is an error with its reason, never 0 (I4). A call ends within ``rlar.rubrics.queue_timeout_s`` and the spec's
`timeout_s`, retries included; an endpoint that is gone is left alone for a while, and calls fail at once meanwhile. No
more calls are under way at once than ``rlar.rubrics.at_once``; each is paid from the account of the run.

Not covered: a judge that is *persuaded* by what stands within the quote; how easily it is, the exam's attacks and looks
are there to find out. Images and audio. An endpoint that gives other answers to the same request: the exam refuses it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import re
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from verl_rlar import chat
from verl_rlar.config import RlarConfig
from verl_rlar.errors import (
    AgentError,
    CassetteError,
    ConfigError,
    EndpointError,
    ToolError,
    ToolTimeout,
    ToolUnavailable,
)
from verl_rlar.purse import OutOfTokens, Purse, folder_of
from verl_rlar.quoting import Quoter, plain
from verl_rlar.tools.boxed import within
from verl_rlar.types import Kind, Sample, Scope, ToolSpec, Verdict, content_hash

logger = logging.getLogger(__name__)

PROMPTS = ("rubric_judge.md", "rubric_judge_case.md")
"""What the judge is told: the system's message, and the user's."""
FOLDER = Path(__file__).parent.parent / "agents" / "prompts"
LEAST_CHECKS, MOST_CHECKS = 3, 10
QUESTION_CHARS = 300
MOST_WEIGHT = 5
LEAST_WORDS = 8
"""Words that a description must have."""
FAULTS = 3
"""Calls in a row without an answer, after which the endpoint is left alone for ``rlar.rubrics.pause_s``."""
ITS_FAULT = frozenset({400, 413, 422})
"""HTTP statuses that speak of one request, not of the endpoint: it is too long, for example."""
_FENCE = re.compile(r"```(?:json)?\s*\n(.*?)\n?```", re.DOTALL)
_SLOT = re.compile(r"\{\{ (\w+) \}\}")


@dataclass(frozen=True, kw_only=True)
class Check:
    """A question about a response."""

    question: str
    """Answered by yes or no; yes speaks for the response."""
    weight: float = 1.0
    """Share in the score, in proportion to the others'; above 0, at most `MOST_WEIGHT`."""


@dataclass(frozen=True, kw_only=True)
class Rubric:
    """See the module."""

    checks: tuple[Check, ...]
    description: str
    """What it judges, for the router and for people; one paragraph."""

    @staticmethod
    def from_text(text: str) -> Rubric:
        """The rubric in a JSON text: ``{"description": ..., "checks": [{"question": ..., "weight": ...}, ...]}``.

        Raises:
            ConfigError: It is none; the message says why.
        """
        try:
            tree = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"the rubric is no JSON: {error}") from None
        described, listed = (tree.get(name) for name in ("description", "checks")) if isinstance(tree, dict) else (0, 0)
        if not isinstance(described, str) or len(described.split()) < LEAST_WORDS:
            raise ConfigError(f"the rubric has no `description` of at least {LEAST_WORDS} words")
        if not isinstance(listed, list) or not LEAST_CHECKS <= len(listed) <= MOST_CHECKS:
            raise ConfigError(f"`checks` must be a list of {LEAST_CHECKS} to {MOST_CHECKS} questions")
        checks = []
        for number, one in enumerate(listed, start=1):
            found = one if isinstance(one, dict) else {}
            question, weight = found.get("question"), found.get("weight", 1)
            if not isinstance(question, str) or not 3 <= len(plain(question, 10**6, line=True)) <= QUESTION_CHARS:
                raise ConfigError(f"check {number} has no `question` of at most {QUESTION_CHARS} characters")
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight <= MOST_WEIGHT:
                raise ConfigError(f"check {number}: `weight` must be a number above 0 and at most {MOST_WEIGHT}")
            checks.append(Check(question=plain(question, QUESTION_CHARS, line=True), weight=float(weight)))
        if len({check.question.casefold() for check in checks}) < len(checks):
            raise ConfigError("two of the `checks` ask the same")
        return Rubric(checks=tuple(checks), description=" ".join(described.split()))

    @staticmethod
    def of(spec: ToolSpec) -> Rubric:
        """The rubric that a spec describes.

        Raises:
            ToolUnavailable: It describes none, or was made with other prompts of the judge than there are now.
        """
        try:
            described = spec.serving or {}
            checks = tuple(Check(question=str(text), weight=float(weight)) for text, weight in described["checks"])
            prompts = described["prompts"]
        except (LookupError, TypeError, ValueError) as error:
            raise ToolUnavailable(f"{spec.name}: it describes no rubric: {error!r}") from None
        if prompts != prompts_hash():
            raise ToolUnavailable(
                f"{spec.name}: the judge's prompts ({', '.join(PROMPTS)}) changed since its exam; examine it again"
            )
        return Rubric(checks=checks, description=spec.description)

    def spec(self, *, name: str, kinds: Collection[Kind], model: str, timeout_s: float, origin: str) -> ToolSpec:
        """The tool that judges by it.

        Args:
            name: The tool's name.
            kinds: What it is for.
            model: The judge's name at its endpoint.
            timeout_s: Deadline of a call, in seconds.
            origin: Who wrote it.
        """
        return ToolSpec(
            name=name,
            kind="rubric",
            target=model,
            scope=Scope(kinds=frozenset(kinds), needs_reference=False),
            description=self.description,
            misses=("what its questions do not ask about, and what the judge does not notice or believes too easily",),
            timeout_s=timeout_s,
            origin=origin,
            serving={"checks": [[one.question, one.weight] for one in self.checks], "prompts": prompts_hash()},
        )

    def request(self, digest: str, sample: Sample, quote_chars: int) -> tuple[list[dict[str, str]], str, bool]:
        """What the judge is sent, the code that its answer must repeat, and whether a text was cut.

        Args:
            digest: Of the tool.
            sample: What is judged.
            quote_chars: Characters at which each text is cut.
        """
        query = sample.query
        turns = [(turn.role, turn.content) for turn in query.messages]
        seed = content_hash([digest, turns, query.reference, sample.response])
        quoter = Quoter(seed, quote_chars)
        code = hashlib.sha256(f"code {seed}".encode()).hexdigest()[:10]
        judged = [quoter.quote(text, f"message of the {_role(role)}") for role, text in turns]
        if query.reference:
            judged.append(quoter.quote(query.reference, "a reference: what a right response says"))
        asked = "\n".join(f"{number}. {check.question}" for number, check in enumerate(self.checks, start=1))
        form = json.dumps({"code": code} | {str(number): "yes or no" for number in range(1, len(self.checks) + 1)})
        values = {
            "conversation": "\n\n".join(judged),
            "response": quoter.quote(sample.response, "the response"),
            "questions": asked,
            "code": code,
            "form": form,
        }
        cut = any(len(text) > quote_chars for _, text in (*turns, ("", sample.response)))
        system, user = (_SLOT.sub(lambda slot: values[slot[1]], _template(name)) for name in PROMPTS)
        return [{"role": "system", "content": system}, {"role": "user", "content": user}], code, cut

    def judged(self, answer: str, code: str) -> list[bool]:
        """The yes and no in a judge's answer.

        Raises:
            ToolError: It is not of the form that was asked for.
        """
        said = answer.rpartition("</think>")[2].strip()
        if fenced := _FENCE.fullmatch(said):
            said = fenced[1]
        numbers = [str(number) for number in range(1, len(self.checks) + 1)]
        ending = f"; the judge answered {answer[-120:]!r}"
        try:
            pairs: Any = json.loads(said, object_pairs_hook=lambda pairs: pairs)
        except (ValueError, RecursionError):
            raise ToolError(f"the judge's answer is no JSON{ending}") from None
        flat = isinstance(pairs, list) and all(isinstance(one, tuple) for one in pairs)
        if not flat or sorted(key for key, _ in pairs) != sorted(["code", *numbers]):
            raise ToolError(f"the judge's answer does not have each of {', '.join(['code', *numbers])} once{ending}")
        given = dict(pairs)
        if given["code"] != code:
            raise ToolError(f"the judge's answer does not repeat the code of this call{ending}")
        answers = [given[number].casefold() if isinstance(given[number], str) else given[number] for number in numbers]
        if odd := [number for number, one in zip(numbers, answers, strict=True) if one not in ("yes", "no")]:
            raise ToolError(f"the judge said neither yes nor no to {', '.join(odd)}{ending}")
        return [one == "yes" for one in answers]

    def verdict(self, answers: Sequence[bool]) -> tuple[float, str]:
        """The weighted share of yes, and the reason for a person."""
        total = sum(check.weight for check in self.checks)
        value = sum(check.weight for check, yes in zip(self.checks, answers, strict=True) if yes) / total
        against = [check.question for check, yes in zip(self.checks, answers, strict=True) if not yes]
        listed = "".join(f"; no: {question}" for question in against[:3]) + ("; ..." if len(against) > 3 else "")
        return min(1.0, value), f"yes to {sum(answers)} of {len(answers)}{listed}"


def _role(role: str) -> str:
    return role if role in ("system", "user", "assistant", "tool") else "user"


@cache
def prompts_hash() -> str:
    """Hash of what the judge is told."""
    return content_hash([[name, (FOLDER / name).read_text("utf-8")] for name in PROMPTS])[:16]


@cache
def _template(name: str) -> str:
    return re.sub(r"\A\{#.*?#\}\n", "", (FOLDER / name).read_text("utf-8"), flags=re.DOTALL).strip()


class RubricRunner:
    """Has a language model judge by rubrics. Use from one event loop, as ``async with``; a runner, see `run`.

    Args:
        config: Settings of a run; the model is that of ``rlar.agents``.
        tokens: Most tokens, read and written, for all its calls. None: no limit but those of the run.
        folder: Where the account of the run is; None: as the settings say.
        transport: What carries the requests; None: the network.
    """

    def __init__(
        self,
        config: RlarConfig,
        *,
        tokens: int | None = None,
        folder: Path | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._agents, self._config, self._folder = config.agents, config.rubrics, folder or folder_of(config)
        self._most, self._transport = tokens, transport
        self.task = ""
        """By which name its calls stand in the account; its money counts with that name's. Empty: what is spent is no
        agent's task, so the cap of a single task's money does not hold."""
        self._client: httpx.AsyncClient | None = None
        self._places: asyncio.Semaphore | None = None
        self._purses: list[Purse] = []
        self._row, self._resume, self._last = 0, 0.0, ""
        self._most_tokens = "max_tokens"
        self.calls = self.read = self.written = 0
        """Calls that were answered, and the tokens that they took."""
        self.faults = 0
        """Calls that the endpoint did not answer."""
        self.spent_up = ""
        """Which cap refused a call; empty: none did."""

    async def __aenter__(self) -> RubricRunner:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes its connections."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    def check(self, spec: ToolSpec) -> None:
        """Sees whether a rubric can be judged by here.

        Raises:
            ToolUnavailable: No LLM is configured, or another one than the rubric was made for.
        """
        if not self._agents.url:
            raise ToolUnavailable(f"{spec.name}: no LLM is configured: set rlar.agents.url and rlar.agents.model")
        if spec.target != self._agents.model:
            raise ToolUnavailable(
                f"{spec.name}: it judges by the model {spec.target!r}, as in its exam, and rlar.agents.model is "
                f"{self._agents.model!r}; set that, or have the rubric examined again"
            )

    async def run(self, spec: ToolSpec, sample: Sample) -> Verdict:
        """Judges one sample.

        Raises:
            ToolTimeout: There was no answer in time.
            ToolUnavailable: There is no LLM here, it does not answer, or a cap is reached.
            ToolError: What it answered is not of the form that is asked for.
            CassetteError: A recording is replayed, and it does not hold this call.
        """
        self.check(spec)
        rubric = Rubric.of(spec)
        if (left := self._resume - time.monotonic()) > 0:
            raise ToolUnavailable(f"{spec.name}: {self._last}; the LLM is asked again in {left:.0f} s")
        messages, code, cut = rubric.request(spec.digest, sample, self._config.quote_chars)
        body: dict[str, Any] = {
            "model": spec.target,
            "messages": messages,
            self._most_tokens: self._config.answer_tokens,
        }
        if self._agents.temperature is not None:
            body["temperature"] = 0.0
        limit = self._config.queue_timeout_s + spec.timeout_s
        try:
            text, complete, read, written = await within(limit, self._in_line(body, spec.timeout_s))
        except (TimeoutError, asyncio.TimeoutError):
            raise ToolTimeout(
                f"{spec.name}: no answer within {spec.timeout_s:g} s and "
                f"rlar.rubrics.queue_timeout_s={self._config.queue_timeout_s:g} s"
            ) from None
        except OutOfTokens as error:
            self.spent_up = str(error)
            raise ToolUnavailable(f"{spec.name}: {error}") from None
        except CassetteError:
            raise  # no fault of the judge: what is replayed is not what was recorded
        except AgentError as error:
            raise ToolUnavailable(f"{spec.name}: {error}") from None
        try:
            answers = rubric.judged(text, code)
        except ToolError as error:
            cut_off = "" if complete else f"; it was cut off at rlar.rubrics.answer_tokens={self._config.answer_tokens}"
            raise ToolError(f"{spec.name}: {error}{cut_off}") from None
        value, reason = rubric.verdict(answers)
        details = {f"check_{number}": float(yes) for number, yes in enumerate(answers, start=1)}
        dollars = (read * self._agents.dollars_read + written * self._agents.dollars_written) / 1e6
        details |= {"tokens_read": float(read), "tokens_written": float(written), "dollars": dollars}
        if cut:
            details["truncated"], reason = 1.0, f"{reason}, of a text that was cut"
        return Verdict(value=value, reason=reason, details=details)

    async def _in_line(self, body: dict[str, Any], timeout_s: float) -> tuple[str, bool, int, int]:
        """Waits for a place, asks, and settles: the answer, whether it is complete, and the tokens read and written."""
        if self._places is None:
            self._places = asyncio.Semaphore(self._config.at_once)
        async with self._places:
            purse = self._purses.pop() if self._purses else await asyncio.to_thread(self._new_purse)
            answer = await self._asked(body, timeout_s, purse)
            self._purses.append(purse)  # one under which a call was cut off is not used again
            return answer

    def _new_purse(self) -> Purse:
        agents = self._agents if self.task else self._agents.model_copy(update={"dollars": None})
        return Purse(self._folder, self.task or "rubrics", agents)

    async def _asked(self, body: dict[str, Any], timeout_s: float, purse: Purse) -> tuple[str, bool, int, int]:
        """Asks, and asks again where that may help."""
        at, expected = chat.address(self._agents), len(_encoded(body)) // chat.CHARS_PER_TOKEN
        used = self.read + self.written
        if self._most is not None and used + expected > self._most:
            raise OutOfTokens(
                f"{used:,} tokens are used by the judge, and the next call would take some {expected:,}; the limit is "
                f"{self._most:,}"
            )
        attempt = 0
        while True:
            attempt += 1
            while wait := await asyncio.to_thread(purse.try_take, expected):
                await asyncio.sleep(wait)
            try:
                reply = await within(timeout_s, self._post(at, _encoded(body)))
                said, text = chat.message_of(at, reply)
                break
            except chat.Busy as busy:
                if attempt <= self._agents.retries:
                    await asyncio.sleep(busy.pause_s(attempt, self._agents.max_wait_s))
                    continue
                error = busy.error
            except (TimeoutError, asyncio.TimeoutError, httpx.TimeoutException):
                error = EndpointError(f"{at} did not answer within {timeout_s:g} s")
            except (httpx.HTTPError, httpx.InvalidURL) as broken:
                error = EndpointError(f"{at} cannot be reached ({broken!r}); check rlar.agents.url")
            except EndpointError as answered:
                if isinstance(answered, chat.Renamed) and chat.rename(body):
                    self._most_tokens = chat.NEWER
                    continue
                error = answered
            await asyncio.to_thread(purse.lose)
            self._fault(error)
            raise error
        read, written = chat.usage_of(reply, said, expected)
        self.calls, self.read, self.written = self.calls + 1, self.read + read, self.written + written
        self._row = 0
        await asyncio.to_thread(purse.settle, read, written)
        return text or "", not chat.cut_off(reply), read, written

    async def _post(self, at: str, content: bytes) -> dict[str, Any]:
        if self._client is None:
            limits = httpx.Limits(max_connections=self._config.at_once)
            self._client = httpx.AsyncClient(
                headers=chat.headers(self._agents), timeout=None, limits=limits, transport=self._transport
            )
        body = bytearray()
        async with self._client.stream(
            "POST", at, content=content, headers={"content-type": "application/json"}
        ) as response:
            async for chunk in response.aiter_raw():
                body += chunk
                if len(body) > chat.REPLY_BYTES:
                    raise chat.too_large(at)
        if response.status_code in ITS_FAULT and not chat.wants_newer(response.status_code, body):
            raise _Refused(f"{at} refused this request with HTTP {response.status_code}: {bytes(body[:200])!r}")
        return chat.reply_of(at, response.status_code, response.headers, bytes(body), self._agents)

    def _fault(self, error: EndpointError) -> None:
        """Notes that the endpoint did not answer; one that is gone is left alone for a while."""
        if isinstance(error, _Refused):
            return  # a text that is too long for the judge must not take it away from the others
        self.faults, self._row, self._last = self.faults + 1, self._row + 1, str(error)
        if self._row >= FAULTS:
            self._resume = time.monotonic() + self._config.pause_s
            logger.error("rubrics pause for %g s, as their LLM does not answer: %s", self._config.pause_s, error)


def _encoded(body: dict[str, Any]) -> bytes:
    return json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")


class _Refused(EndpointError):
    """The endpoint is well, and refuses this one request."""
