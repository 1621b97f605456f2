# SPDX-License-Identifier: Apache-2.0
"""What it takes to score by a reward model: which model, how a conversation becomes a number, and who does it.

A `ServedModel` is a model's weights (a local folder at a pinned commit, or the address of a server that somebody else
runs) with a `How`: the form in which the conversation is put, what is done about system prompt, BOS and EOS, where a
long text is cut, and which of the model's outputs counts with which sign. A `RewardModelPool` keeps models running and
scores conversations by them. Behind it stand `Replica`s, the processes or servers of one back-end.

Guarantees: a score is a *raw* logit, never squashed by a sigmoid or softmax that hides its scale; a score that is no
finite number is an error; models with the same `ServedModel.key` share their servers, whatever their `How`.

Not covered: models that need code of their own (``trust_remote_code``), pickled weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from statistics import fmean
from typing import Any, Literal, Protocol

from verl_rlar.errors import ConfigError, ToolError
from verl_rlar.serving.judging import Judge
from verl_rlar.types import Message, content_hash

Conversation = tuple[Message, ...]
"""A prompt's messages, oldest first, and the response that is to be scored as the last one, role ``assistant``."""
Rows = Sequence[Sequence[float]]
"""A model's raw outputs for one conversation: one row for the whole of it, or one for each of its steps."""

Family = Literal["sequence", "steps", "judge"]
"""``sequence``: one row of outputs for a conversation (sequence classification: one logit or several, decoders,
encoder rankers, quality estimation). ``steps``: one for each step of the response (process reward models: token
classification). ``judge``: one number, out of what a language model says (see `verl_rlar.serving.judging`)."""

CHARS_PER_TOKEN = 64
"""A message keeps at most this many characters for each token of `How.max_length`, so that a text of many megabytes is
not sent, nor split into tokens, only to be thrown away."""


@dataclass(frozen=True, kw_only=True)
class How:
    """How a conversation becomes one number."""

    form: Literal["chat", "plain", "pair"] = "chat"
    """``chat``: by the model's own chat template. ``plain``: the texts, with blank lines in between. ``pair``: prompt
    and response as the two segments of an encoder."""
    system: str | None = None
    """System prompt in place of the conversation's own. None: as in the conversation. Empty: none at all."""
    bos: bool | None = None
    """Whether exactly one BOS token begins the sequence, or none. None: as template or tokenizer have it, once."""
    eos: bool | None = None
    """Whether exactly one EOS token ends the sequence, or none. None: as template or tokenizer have it."""
    max_length: int = 2048
    """Most tokens of a sequence, all included; with the answer of a ``judge``."""
    truncation: Literal["left", "right"] = "left"
    """The side of the sequence from which tokens are cut; of a ``pair``, the prompt is cut first. Of what a ``judge``
    is asked, the longest message is cut first, and nothing of the template."""
    head: int = 0
    """Column of the outputs that counts."""
    against: int | None = None
    """Column that is taken off from it: for two labels, the log-odds. None: nothing is."""
    sign: Literal[1, -1] = 1
    """-1: the model gives less for better."""
    step_token: str = "\n\n"
    """Family ``steps``: text that ends each step, and at whose last token the model is read."""
    over_steps: Literal["min", "mean", "last"] = "min"
    """Family ``steps``: how the steps' values become one."""
    judge: Judge | None = None
    """Family ``judge``: what it is asked, and how the number is read. None: another family."""

    def value(self, rows: Rows) -> float:
        """The score, out of a model's raw outputs.

        Raises:
            ToolError: There is no such output, or it is no finite number.
        """
        try:
            values = [
                self.sign * (row[self.head] - (0.0 if self.against is None else row[self.against])) for row in rows
            ]
            value = {"min": min(values), "mean": fmean(values), "last": values[-1]}[self.over_steps]
        except (LookupError, ValueError, TypeError):
            raise ToolError(
                f"outputs of {len(rows)} rows and {len(rows[0]) if rows else 0} columns have no column {self.head}"
                + ("" if self.against is None else f" or no column {self.against}")
            ) from None
        if not math.isfinite(value):
            raise ToolError(f"the model gave {value!r}, which is no score")
        return value

    def clipped(self, conversation: Conversation) -> Conversation:
        """The conversation with the part of huge messages cut off that cannot count, see `CHARS_PER_TOKEN`."""
        most = self.max_length * CHARS_PER_TOKEN
        if all(len(message.content) <= most for message in conversation):
            return conversation
        cut = slice(-most, None) if self.truncation == "left" else slice(most)
        return tuple(Message(role=message.role, content=message.content[cut]) for message in conversation)

    def to_json(self) -> dict[str, Any]:
        """As plain values; without `judge` where there is none."""
        return {name: value for name, value in asdict(self).items() if name != "judge" or value is not None}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> How:
        """The inverse of `to_json`; what is not given takes its default.

        Raises:
            ConfigError: They describe no way to score.
        """
        odd = sorted(set(values) - {field.name for field in fields(How)})
        if odd:
            raise ConfigError(f"unknown in a description of how a model scores: {', '.join(odd)}")
        judge = values.get("judge")
        how = How(**{**values, "judge": None if judge is None else Judge.from_json(judge)})
        allowed = {
            "form": ("chat", "plain", "pair"),
            "truncation": ("left", "right"),
            "sign": (1, -1),
            "over_steps": ("min", "mean", "last"),
        }
        for name, choices in allowed.items():
            if getattr(how, name) not in choices:
                raise ConfigError(f"{name} of how a model scores is {getattr(how, name)!r}, not one of {choices}")
        if how.max_length < 8:
            raise ConfigError(f"max_length of how a model scores is {how.max_length}: at least 8 tokens are needed")
        if how.judge is not None and how.form == "pair":
            raise ConfigError("a judge is asked as chat or plain text, not as a pair")
        if how.judge is not None and how.judge.writes >= how.max_length:
            raise ConfigError(
                f"answer_tokens of a judge, {how.judge.writes}, leaves no room in max_length={how.max_length}"
            )
        return how


@dataclass(frozen=True, kw_only=True)
class Golden:
    """A conversation whose score is known."""

    conversation: Conversation
    value: float
    """Raw score by the model's `How`."""


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A reward model, where it is, and how it is asked."""

    name: str
    """``repo@revision``, for people and messages."""
    revision: str
    """Commit of the snapshot."""
    path: str | None = None
    """Folder of the snapshot: safetensors, config, tokenizer. None: it is served at `address`."""
    address: str | None = None
    """``http://host:port`` of a vLLM server that somebody else runs. None: it is started from `path`."""
    family: Family = "sequence"
    how: How = How()
    golden: tuple[Golden, ...] = ()
    """What a server must answer before it is used. Empty: what the first one that started answered."""

    def __post_init__(self) -> None:
        if (self.path is None) == (self.address is None):
            raise ConfigError(f"{self.name}: a reward model has either a folder or an address")
        if (self.family == "judge") != (self.how.judge is not None):
            raise ConfigError(f"{self.name}: family {self.family} and How.judge do not go together: a judge has both")

    @cached_property
    def key(self) -> str:
        """Identity of the weights: models with the same one share their servers."""
        return content_hash([self.name, self.revision, self.path, self.address, self.family])[:16]


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A model's answer about one conversation."""

    value: float
    """Raw score, by `How`."""
    rows: tuple[tuple[float, ...], ...]
    """The outputs it was made of."""
    tokens: int = 0
    """Length of the sequence. 0: unknown."""
    truncated: bool = False
    """Whether something was cut off."""
    words: str = ""
    """What a judge wrote. Empty: nothing."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a replica gives for one conversation."""

    rows: tuple[tuple[float, ...], ...] = ()
    tokens: int = 0
    truncated: bool = False
    words: str = ""
    error: str = ""
    """Why there is no output; empty if there is one."""

    @staticmethod
    def written(how: How, words: str, finished: bool, tokens: int = 0, truncated: bool = False) -> Answer:
        """What a judge that writes gives: the rating in its words, or why there is none."""
        assert how.judge is not None
        try:
            rows = ((how.judge.rating(words, finished),),)
        except ToolError as error:
            return Answer(error=str(error))
        return Answer(rows=rows, tokens=tokens, truncated=truncated, words=words)


class Replica(Protocol):
    """One running server of one model. Used from one event loop."""

    @property
    def pid(self) -> int | None:
        """Process id; None for a server that somebody else runs."""
        ...

    async def ask(self, how: How, conversations: Sequence[Conversation], seconds: float) -> list[Answer]:
        """The model's outputs.

        Raises:
            ToolTimeout: No answer in time.
            ConnectionError: The server went away.
            ToolError: It refuses, or answers nonsense.
        """
        ...

    async def check(self, seconds: float) -> None:
        """Returns if the server is well; raises what `ask` raises."""
        ...

    async def gone(self) -> None:
        """Returns when the server is found to be gone."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Gives the memory of the weights back. Raises what `ask` raises."""
        ...

    async def wake(self, seconds: float) -> None:
        """Takes the weights up again. Raises what `ask` raises."""
        ...

    async def reload(self, model: ServedModel, seconds: float) -> None:
        """Takes up the weights of another model of the same `verl_rlar.serving.placing.shape`, in place of its own.

        Raises what `ask` raises; it is then of no use any more."""
        ...

    async def stop(self) -> None:
        """Ends it; never raises."""
        ...


class RewardModelPool(Protocol):
    """Keeps reward models running, and scores by them. Use as ``async with``, from one event loop."""

    async def ensure(self, models: Sequence[ServedModel]) -> None:
        """Makes these the models that are served: returns when all of them are ready.

        What is new is started before what left is stopped, as far as the memory allows; what left is stopped when its
        last lease is given back. Where there is no room for both, a server of a model that left may take up the weights
        of a new one of the same shape.

        Args:
            models: Those of every step that still may score.

        Raises:
            ToolUnavailable: They do not fit into the given memory together (I5), or one of them cannot be started;
                then the models of before go on being served, unless they had to make room.
        """
        ...

    async def prefetch(self, models: Sequence[ServedModel]) -> bool:
        """Starts models that will be ensured soon, beside those that are served; False if there is no room for all."""
        ...

    def lease(self, model: ServedModel) -> AbstractAsyncContextManager[None]:
        """The right to score by a model until the end of the block, also if it leaves meanwhile.

        Raises:
            ToolUnavailable: It is not among the models that were ensured.
        """
        ...

    async def score(
        self, model: ServedModel, conversations: Sequence[Conversation], deadline: float
    ) -> tuple[Scored, ...]:
        """Scores conversations.

        Args:
            model: By which model, and how.
            conversations: What; in any number.
            deadline: Seconds from now, waiting included.

        Raises:
            ToolTimeout: Not all were scored in time.
            ToolUnavailable: The model is not served.
            ConnectionError: Its server died under the call; worth one more try.
            ToolError: The model cannot score one of them.
        """
        ...


class WrongGolden(ToolError):
    """A server does not answer what is known to be right: its weights or its template are not what they should be."""
