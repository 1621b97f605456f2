# SPDX-License-Identifier: Apache-2.0
"""The nouns of the system: frozen values that every other module passes around.

A `Sample` (one response to be scored) is sent by a `Route` to one or more tools, each described by a `ToolSpec`; every
tool answers with a `Verdict`, and the scorer turns the verdicts into one `Score`.

Guarantees: every value is immutable, keyword-only, picklable, and free of tensors; whatever is
identified by content (`Query.key`, `ToolSpec.digest`) has the same identity in every process and on every machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from functools import cached_property
from typing import Any, Literal

from verl_rlar.calibration import Calibration

Split = Literal["train", "val"]
"""Training or validation."""
UNKEYED = frozenset({"index", "split", "need_tools_kwargs", "interaction_kwargs", "tools_kwargs"})
"""Keys of `Query.extra` that say where a row comes from, not what is asked: they do not enter `Query.key`."""


def content_hash(value: Any) -> str:
    """Hex SHA-256 of a JSON-like value; the order of keys does not matter. Other objects count by their ``str``."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _without_none(value: Any) -> Any:
    """A value without the fields that are None: parquet adds those to nested columns."""
    if isinstance(value, Mapping):
        return {name: _without_none(item) for name, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a chat."""

    role: str
    """``system``, ``user``, ``assistant`` or ``tool``."""
    content: str
    """Text of the turn. Parts that are no text (images, audio) are left out."""


@dataclass(frozen=True, kw_only=True)
class Query:
    """What is asked, and what is known about a right answer: all that a route may depend on (I2)."""

    messages: tuple[Message, ...]
    """The prompt as chat messages, oldest first."""
    reference: str | None = None
    """The ground truth as text; None if the data set has none."""
    data_source: str = ""
    """Name of the data set. A hint for people: no decision depends on it."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further columns of the row (tests, constraints, languages, ...), JSON-like."""

    @cached_property
    def key(self) -> str:
        """Identity of the query: the same for every response of a GRPO group, in every epoch and process."""
        extra = _without_none({name: value for name, value in self.extra.items() if name not in UNKEYED})
        return content_hash([[(m.role, m.content) for m in self.messages], self.reference, extra])[:32]

    def bare(self) -> Query:
        """The same query by its identity and data set alone, without all that it says: unit tests can be megabytes."""
        bare = replace(self, messages=(), reference=None, extra={})
        bare.__dict__["key"] = self.key
        return bare

    @property
    def prompt(self) -> str:
        """Text of the last user turn; the empty string if there is none."""
        return next((m.content for m in reversed(self.messages) if m.role == "user"), "")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One response to be scored."""

    query: Query
    response: str
    """The decoded response, special tokens removed."""
    step: int = 0
    """verl's ``global_steps`` (0 outside training). Decides which tools are live."""
    uid: str = ""
    """verl's id of the GRPO group, new for every visit of a prompt; empty outside training."""
    session: int = 0
    """Index within the group, from 0."""
    group_size: int = 1
    """Number of responses in the group, as far as known when the sample was made."""
    split: Split = "train"


class Kind(str, Enum):
    """What makes a query checkable. Found by `verl_rlar.features` from the query alone."""

    UNIT_TESTS = "unit_tests"
    """Code with tests to run."""
    CONSTRAINTS = "constraints"
    """Instruction constraints in IFEval's vocabulary."""
    JSON_SCHEMA = "json_schema"
    """An answer that must be valid under a given JSON schema."""
    CHOICE = "choice"
    """One letter out of the listed options."""
    MATH = "math"
    """A final answer that is a number or a mathematical expression."""
    TRANSLATION = "translation"
    """A translation with a reference translation."""
    SHORT_TEXT = "short_text"
    """A short free-form reference answer."""
    OPEN = "open"
    """None of the above: nothing in the row says what is right."""


@dataclass(frozen=True, kw_only=True)
class Scope:
    """Which queries a tool is for."""

    kinds: frozenset[Kind]
    """The kinds of query that the tool checks."""
    needs_reference: bool = True
    """Whether the tool abstains where a query has no reference."""


@dataclass(frozen=True, kw_only=True)
class ToolSpec:
    """A tool's immutable, content-addressed description (I3)."""

    name: str
    """Unique within a snapshot; lower case, words joined by ``_``."""
    kind: Literal["rule", "verifier", "reward_model", "rubric"]
    target: str
    """What runs. A rule: ``package.module:function``. A reward model: ``repo@commit``. A rubric: its judge's name."""
    scope: Scope
    description: str
    """What it measures and when to use it, in one paragraph. Routers and people read this."""
    misses: tuple[str, ...] = ()
    """What it is known not to catch, one plain sentence each."""
    wraps: tuple[str, ...] = ()
    """Of a verifier: the built-in tools that it asks, each as ``NAME@DIGEST``, read off its source; no others."""
    gate: bool = False
    """A gate says whether a response may score at all; it never adds to a score."""
    low: float = 0.0
    """Raw score that maps to 0."""
    high: float = 1.0
    """Raw score that maps to 1."""
    timeout_s: float = 5.0
    """Deadline of one call, in seconds of wall time; the call is killed then."""
    boxed: bool = False
    """Whether it runs code that we did not write, and so needs a sandbox."""
    origin: str = "builtin"
    """Who made it: ``builtin``, ``user``, or the id of an agent's transcript."""
    source_sha256: str = ""
    """Hash of the code behind `target`, so that changed code is a changed tool."""
    calibration: Calibration | None = None
    """Map from raw scores to [0, 1] that an exam has taught; None: linear from `low` to `high`."""
    serving: Mapping[str, Any] | None = field(default=None, hash=False)
    """How a reward model is served and asked, JSON-like; see `verl_rlar.tools.reward_model`. Of a rubric: what it asks,
    see `verl_rlar.tools.rubric`. None: it is neither."""

    @cached_property
    def digest(self) -> str:
        """Identity of this version of the tool: 16 hex digits."""
        fields = asdict(self) | {"scope": [sorted(k.value for k in self.scope.kinds), self.scope.needs_reference]}
        for name in ("calibration", "serving", "wraps"):
            if fields[name] in (None, ()):
                del fields[name]  # as in releases that did not have it
        return content_hash(fields)[:16]

    @property
    def opinion(self) -> bool:
        """Whether its value is what a model thinks, and no check: that of a reward model or a rubric."""
        return self.kind in ("reward_model", "rubric")

    def fits(self, query: Query) -> bool:
        """Whether it can score a query as far as its reference goes; the kind is for the router to say."""
        return bool(query.reference) or not self.scope.needs_reference


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The tools that are live at a step. It never changes (I1)."""

    tools: tuple[ToolSpec, ...]
    shadows: tuple[ToolSpec, ...] = ()
    """Tools that score beside these without a say, until they have shown what they are worth."""
    advice: str = ""
    """Identity of the advice on routes that counts, see `verl_rlar.advice`. Empty: there is none."""
    settings: str = ""
    """Identity of the settings by which routes are decided. Empty: the defaults."""

    @cached_property
    def version(self) -> str:
        """Identity of the set of live tools, and of the advice and the settings of routes among them: 16 hex digits."""
        marks = [self.advice, self.settings] if self.settings else [self.advice] if self.advice else []
        return content_hash([self.toolset, *marks])[:16] if marks else self.toolset

    @cached_property
    def toolset(self) -> str:
        """Identity of the set of live tools: 16 hex digits."""
        return content_hash(sorted(tool.digest for tool in self.tools))[:16]

    def tool(self, name: str) -> ToolSpec:
        """The tool of that name.

        Raises:
            KeyError: No such tool is live.
        """
        for tool in self.tools:
            if tool.name == name:
                return tool
        raise KeyError(f"no tool named {name!r} is live; live are: {', '.join(t.name for t in self.tools)}")


@dataclass(frozen=True, kw_only=True)
class RoutePart:
    """One tool of a route."""

    tool: str
    """Name of the tool."""
    digest: str
    """Its version (I2: one version of each tool in a group)."""
    weight: float = 1.0
    """Share in the combined score, in proportion to the other parts' weights. A gate has weight 0."""
    schedule: tuple[tuple[int, float], ...] = ()
    """Weight by step, in rising order: linear between two steps, flat before the first and after the last one. Empty:
    always `weight`."""
    gate: bool = False
    """A gate must give `threshold`, or the whole score is 0; it adds nothing itself."""
    threshold: float = 1.0
    """Least value that passes a gate, in [0, 1]."""
    odds: bool = False
    """Part of a learned mixture: values are pooled by their log-odds, see `verl_rlar.mixture.pooled`. Of the parts of
    a route that have a weight, all are, or none counts as one."""

    def weight_at(self, step: int) -> float:
        """The weight at a step."""
        if not self.schedule:
            return self.weight
        before = [knot for knot in self.schedule if knot[0] <= step]
        after = [knot for knot in self.schedule if knot[0] > step]
        if not before or not after:
            return (before[-1] if before else after[0])[1]
        (first, low), (last, high) = before[-1], after[0]
        return low + (high - low) * (step - first) / (last - first)


@dataclass(frozen=True, kw_only=True)
class Route:
    """Which tools score a prompt, and why."""

    parts: tuple[RoutePart, ...]
    """Empty if no tool fits: every response of the prompt is then unscored."""
    reason: str
    """Why, for a person."""
    kind: Kind
    """What the query was taken for."""
    covered: bool
    """False if no tool fits and the configured fallback was taken."""
    snapshot: str
    """`Snapshot.version` that the route was decided on."""
    cluster: str = ""
    """Id of the query's cluster, see `verl_rlar.clusters`. Empty: clusters are not kept."""

    @property
    def name(self) -> str:
        """The tools' names, joined; ``-`` for an empty route."""
        return "+".join(part.tool for part in self.parts) or "-"


class Outcome(str, Enum):
    """How a tool's or a route's work on a sample ended."""

    SCORED = "scored"
    ABSTAINED = "abstained"
    """The tool says: not my business. Unscored."""
    FAILED = "failed"
    """Our fault: deadline, crash, something missing. Unscored."""
    HACKED = "hacked"
    """A known cheat was caught: the score is 0, and flagged."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A tool's own answer about one sample."""

    value: float | None
    """Raw score in the tool's own range; None = the tool abstains."""
    reason: str = ""
    """Why, for a person; short. It may quote the response: hostile text, never executed or rendered unescaped."""
    hacked: bool = False
    """A known cheat was recognised; `value` must be the tool's `low`."""
    details: Mapping[str, float] = field(default_factory=dict)
    """Named partial results, for people and metrics."""


@dataclass(frozen=True, kw_only=True)
class ToolScore:
    """What became of one tool's call."""

    tool: str
    digest: str
    outcome: Outcome
    raw: float | None
    """In the tool's own range; None if unscored."""
    value: float | None
    """In [0, 1]; None if unscored."""
    reason: str = ""
    seconds: float = 0.0
    """Wall time of the call, with waiting and retries."""
    details: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Score:
    """The result for one sample."""

    value: float | None
    """In [0, 1]; None = unscored. A failure of ours is never a number (I4)."""
    outcome: Outcome
    reason: str
    parts: tuple[ToolScore, ...] = ()
    seconds: float = 0.0
    """Wall time of all the route's tools."""
