# SPDX-License-Identifier: Apache-2.0
"""Finds reward models for a task on the hub, without an LLM: by what the hub says about them.

`brief_of` turns a task in words and some of its queries into topics, words and languages; `scout` searches, lets the
gate judge every candidate, and ranks those that pass by topic, languages, use, age, size and way of scoring. Every
proposal comes with receipts: why, from where, under which licence, how large, how it scores, and the gate's report.

Guarantees: deterministic for what the hub says and `now`; no weights are downloaded; one candidate whose repository is
broken or gone does not stop the others, and some dozens of bad ones do not crowd out a good one; figures that a card
claims (benchmarks) count for nothing.

Not covered: whether a model is good at the task. Metadata cannot say: a model whose score is upside down, or one that
likes long answers, ranks like another one. The exam is for that. Topics are known in English.
"""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any, Literal

from verl_rlar.errors import HubError, HubRateLimited
from verl_rlar.features import describe
from verl_rlar.gate import Report, Scoring, check
from verl_rlar.hub import Hub, Search
from verl_rlar.repository import GIB, Facts, HubModel
from verl_rlar.types import Kind, Query

OnProgress = Callable[[str, int, int | None], None]
"""Called with a stage, what is done of it, and its total."""

BY = "metadata only; no LLM was used"

TOPICS: Mapping[str, tuple[str, ...]] = {
    "chat": ("chat", "dialogue", "dialog", "conversation", "helpful", "helpfulness", "general", "assistant"),
    "safety": ("safety", "safe", "harmless", "harmlessness", "harmful", "toxicity", "refusal", "moderation"),
    "math": ("math", "maths", "mathematics", "mathematical", "arithmetic", "gsm8k", "prm", "reasoning"),
    "code": ("code", "coding", "programming", "python", "program", "leetcode", "mbpp"),
    "translation": ("translation", "translate", "translations", "mt", "qe", "quality-estimation", "comet", "wmt"),
    "instructions": ("instruction", "instructions", "instruction-following", "ifeval", "constraints"),
    "facts": ("facts", "factuality", "factual", "truthful", "truthfulness", "hallucination", "qa"),
    "summaries": ("summary", "summaries", "summarisation", "summarization", "tldr"),
}
"""What a task can be about, with the words that show it."""
TOPIC_OF_KIND = {
    Kind.UNIT_TESTS: "code",
    Kind.CONSTRAINTS: "instructions",
    Kind.JSON_SCHEMA: "instructions",
    Kind.CHOICE: "facts",
    Kind.MATH: "math",
    Kind.TRANSLATION: "translation",
    Kind.SHORT_TEXT: "facts",
    Kind.OPEN: "chat",
}
LANGUAGES = {
    "arabic": "ar", "chinese": "zh", "czech": "cs", "dutch": "nl", "english": "en", "french": "fr", "german": "de",
    "hindi": "hi", "italian": "it", "japanese": "ja", "korean": "ko", "polish": "pl", "portuguese": "pt",
    "russian": "ru", "spanish": "es", "turkish": "tr", "ukrainian": "uk", "vietnamese": "vi",
}  # fmt: skip
"""Names of languages, by the hub's codes."""
PLAIN_WORDS = frozenset(
    "a an and are as at be by for from have how i in into is it my of on or our please that the their this to we what "
    "which with you your reward rewards model models score scores scoring task tasks data answers answer response "
    "responses good best better quality training train judge".split()
)
"""Words of a task that say nothing about its topic."""
SCORES = re.compile(
    r"(?<![a-z])(?:reward|rewards|rm|prm|orm|preference|preferences|judge|ranker|reranker|rlhf|quality[ -]estimation)"
    r"(?![a-z])|reward[ -]?model"
)
"""What shows in a name or tag that a model is made to score."""

WEIGHTS = {"topic": 0.45, "language": 0.15, "use": 0.2, "age": 0.1, "size": 0.05, "scoring": 0.05}
"""Shares of what a proposal is ranked by. Where the task names no language, `language` is left out."""
HALF_LIFE_YEARS = 1.0
SAMPLES = 256
"""Most queries that are looked at."""
LEAST_SHARE = 0.1
"""Share of the queries from which on a kind of query is part of the task."""
LOOKS = 64
"""Most models that are looked into; fewer, if twice as many as are wanted have passed."""

SCORING_TEXT: Mapping[Scoring, str] = {
    "one_logit": "one logit",
    "several_logits": "several logits",
    "process": "per step",
    "judge": "writes a verdict",
}
SCORING_FIT: Mapping[Scoring, float] = {"one_logit": 1.0, "several_logits": 0.6, "process": 0.4, "judge": 0.4}


@dataclass(frozen=True, kw_only=True)
class Brief:
    """What is looked for."""

    task: str
    topics: tuple[str, ...]
    """Of `TOPICS`; those of the task's words first."""
    words: tuple[str, ...] = ()
    """Further words of the task."""
    languages: tuple[str, ...] = ()
    """The hub's codes; empty if the task names none."""
    kinds: tuple[Kind, ...] = ()
    """Kinds of the queries, the most frequent first; empty without queries."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What speaks for a proposal, and where it stands."""

    source: str
    """``name``, ``tags``, ``card``, ``config``, ``hub`` or ``files``; ``agent``: an LLM's words."""
    quote: str
    """As it stands there: text that anybody may have written."""


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A model that passed the gate."""

    repo: str
    commit: str
    value: float
    """What it is ranked by, in [0, 1]."""
    parts: Mapping[str, float]
    """What that is made of, each in [0, 1]; see `WEIGHTS`."""
    why: str
    evidence: tuple[Evidence, ...]
    licence: str
    gib: float
    """Size of the weights, in GiB."""
    parameters: int
    scoring: Scoring
    labels: int | None
    """Outputs of its head; None if it has none."""
    report: Report
    by: Literal["metadata", "agent"] = "metadata"
    """What its `value` is: made of `parts`, or what an LLM gave it."""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A model that is not proposed."""

    repo: str
    commit: str
    """Empty if the hub did not say."""
    reasons: tuple[str, ...]
    report: Report | None = None
    """None: the hub did not let us look, or it was an agent who did."""


@dataclass(frozen=True, kw_only=True)
class AgentRun:
    """The work of an LLM on the way to some findings."""

    model: str
    how: str
    """As in `verl_rlar.agents.session.Ended`."""
    detail: str
    steps: int
    tokens: int
    seconds: float
    transcript: str
    """File with all that it was told and did."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What a scout brings home."""

    brief: Brief
    by: str
    """How it was ranked."""
    searches: int
    found: int
    """Different models that the searches gave."""
    looked_at: int
    proposals: tuple[Proposal, ...]
    """The best first."""
    refused: tuple[Refusal, ...]
    faults: tuple[str, ...] = ()
    """What went wrong on the way, without stopping it."""
    seconds: float = 0.0
    agent: AgentRun | None = None
    """None: no LLM was used."""

    def as_dict(self) -> dict[str, Any]:
        """The findings for JSON."""
        tree = asdict(self)
        for entry, item in zip(tree["proposals"], self.proposals, strict=True):
            entry["report"] = item.report.as_dict()
        for entry, refusal in zip(tree["refused"], self.refused, strict=True):
            entry["report"] = refusal.report.as_dict() if refusal.report else None
        return tree


def brief_of(task: str, queries: Iterable[Query] = ()) -> Brief:
    """Reads a task: what it is about, from its words and its queries.

    Args:
        task: The task in a few words, e.g. ``en-fr translation``.
        queries: Some of its queries; the first `SAMPLES` are looked at.
    """
    tokens = [token for token in re.split(r"[^a-z0-9]+", task.lower()) if token]
    joined = task.lower()
    topics = [topic for topic, shown in TOPICS.items() if any(w in tokens or ("-" in w and w in joined) for w in shown)]
    languages = [LANGUAGES[token] for token in tokens if token in LANGUAGES]
    codes = set(LANGUAGES.values())
    pairs = re.findall(r"\b([a-z]{2}) ?(?:->|[-\u2013>→]) ?([a-z]{2})\b", joined)
    languages += [code for pair in pairs if codes.issuperset(pair) for code in pair]
    kinds: Counter[Kind] = Counter()
    looked_at = 0
    for query in queries:
        if looked_at == SAMPLES:
            break
        looked_at += 1
        kinds[describe(query).kind] += 1
        columns = (query.extra.get("source_lang"), query.extra.get("target_lang"))
        named = [re.split(r"[^a-z]", name.strip().lower())[0] for name in columns if isinstance(name, str)]
        languages += [LANGUAGES.get(name, name) for name in named]
    frequent = [kind for kind, count in kinds.most_common() if count >= LEAST_SHARE * looked_at]
    if not topics:
        topics = [TOPIC_OF_KIND[kind] for kind in frequent] or ["chat"]
    known = {word for shown in TOPICS.values() for word in shown} | PLAIN_WORDS | LANGUAGES.keys()
    return Brief(
        task=task,
        topics=tuple(dict.fromkeys(topics)),
        words=tuple(dict.fromkeys(t for t in tokens if t not in known and t not in codes and len(t) > 2)),
        languages=tuple(dict.fromkeys(code for code in languages if code in codes)),
        kinds=tuple(frequent),
    )


def searches_of(brief: Brief) -> tuple[Search, ...]:
    """What is asked of the hub; several ways, as tags in the wild are poor."""
    searches = [
        Search(tags=("reward-model",)),
        Search(tags=("reward model",)),
        Search(words="reward"),
        Search(tags=("RLHF",), pipeline="text-classification"),
        Search(words="-RM", pipeline="text-classification"),
    ]
    for topic in brief.topics:
        searches.append(Search(words=topic, pipeline="text-classification"))
        if topic == "math":
            searches.append(Search(words="PRM"))
        if topic == "translation":
            searches += [Search(tags=("quality-estimation",)), Search(tags=("translation",), words="rank")]
    searches += [Search(words=f"{word}-reward") for word in brief.words[:3]]
    return tuple(searches)


def scout(
    brief: Brief,
    hub: Hub,
    *,
    most: int = 10,
    now: datetime | None = None,
    on_progress: OnProgress | None = None,
) -> Findings:
    """Looks for models on the hub.

    Args:
        brief: What is looked for.
        hub: The hub; its settings say what may pass.
        most: Most proposals.
        now: Ages of models are counted from then; None: the clock's time.
        on_progress: Called while it works.

    Raises:
        HubError: Not one search succeeded.
    """
    began = time.monotonic()
    searches = searches_of(brief)
    progress = on_progress or (lambda *_: None)
    progress("search", 0, None)
    results = hub.search(searches)
    now = now or datetime.now(timezone.utc)
    candidates = [facts for facts in results.models if SCORES.search(_labels(facts))]
    candidates.sort(key=lambda facts: (-_value(_parts(brief, facts, now), brief), facts.repo))
    faults = list(results.faults)
    proposals: list[Proposal] = []
    refused: list[Refusal] = []
    chosen = candidates[: max(LOOKS, 2 * most)]
    looked_at = 0
    for facts in chosen:
        if len(proposals) == 2 * most:
            break
        progress("look", looked_at, len(chosen))
        try:
            model = hub.inspect(facts.repo, facts.commit or None)
        except HubRateLimited as error:
            faults.append(f"{error}; {len(chosen) - looked_at} models were not looked at")
            break
        except HubError as error:
            refused.append(Refusal(repo=facts.repo, commit=facts.commit, reasons=(f"hub: {error}",)))
            continue
        finally:
            looked_at += 1
        report = check(model, hub.config)
        if report.ok:
            proposals.append(proposal_of(brief, model, report, now))
        else:
            refused.append(Refusal(repo=model.repo, commit=model.commit, reasons=report.reasons, report=report))
    proposals.sort(key=lambda proposal: (-proposal.value, proposal.repo))
    return Findings(
        brief=brief,
        by=BY,
        searches=len(searches),
        found=len(results.models),
        looked_at=looked_at,
        proposals=tuple(proposals[:most]),
        refused=tuple(refused),
        faults=tuple(faults),
        seconds=time.monotonic() - began,
    )


def _labels(facts: Facts) -> str:
    """The name and tags of a model, in lower case."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])|[_./]", "-", facts.repo.partition("/")[2])
    return " ".join((name, *facts.tags)).lower()


def _shown(words: Iterable[str], text: str) -> str | None:
    """The first of some words that stands in a text."""
    return next((word for word in words if re.search(rf"(?<![a-z0-9]){re.escape(word)}(?![a-z0-9])", text)), None)


def _parts(
    brief: Brief, facts: Facts, now: datetime, model: HubModel | None = None, report: Report | None = None
) -> dict[str, float]:
    """What speaks for a model, each in [0, 1]; without a look into it, only what the search says."""
    labels, card = _labels(facts), model.card.lower() if model else ""
    wanted = [TOPICS[topic] for topic in brief.topics] + [(word,) for word in brief.words]
    met = [1.0 if _shown(words, labels) else 0.5 if _shown(words, card) else 0.0 for words in wanted]
    spoken = {code[:2].lower() for code in facts.languages} | {tag for tag in facts.tags if len(tag) == 2}
    parts = {
        "topic": sum(met) / len(met),
        "language": sum(code in spoken for code in brief.languages) / max(1, len(brief.languages)),
        "use": min(1.0, 0.75 * math.log10(1 + facts.downloads) / 6 + 0.25 * math.log10(1 + facts.likes) / 3),
        "age": 0.5 ** (_age_years(facts, now) / HALF_LIFE_YEARS),
    }
    if report and report.scoring and report.parameters:
        largest = 1e10
        parts["size"] = min(1.0, max(0.0, math.log10(report.parameters / 1e6) / math.log10(largest / 1e6)))
        parts["scoring"] = SCORING_FIT[report.scoring]
    return parts


def _age_years(facts: Facts, now: datetime) -> float:
    try:
        then = datetime.fromisoformat((facts.modified or facts.created).replace("Z", "+00:00"))
    except ValueError:
        return 10.0
    then = then if then.tzinfo else then.replace(tzinfo=timezone.utc)
    return min(10.0, max(0.0, (now - then).total_seconds() / (365.25 * 86400)))


def _value(parts: Mapping[str, float], brief: Brief) -> float:
    weights = {name: WEIGHTS[name] for name in parts if brief.languages or name != "language"}
    return sum(weight * parts[name] for name, weight in weights.items()) / sum(weights.values())


def proposal_of(brief: Brief, model: HubModel, report: Report, now: datetime) -> Proposal:
    """What metadata say for a model that passed the gate."""
    assert report.scoring and report.parameters is not None
    facts = model.facts
    parts = _parts(brief, facts, now, model, report)
    evidence = [*_evidence(brief, model)]
    named = ", ".join(dict.fromkeys(item.quote for item in evidence if item.source in ("name", "tags")))
    reasons = [
        _match(named, evidence),
        f"{facts.downloads:,} downloads in the last month, {facts.likes:,} likes",
        f"last changed {facts.modified[:10] or 'at an unknown time'}",
        f"scores by {SCORING_TEXT[report.scoring]}",
    ]
    evidence += [
        Evidence(source="hub", quote=f"downloads {facts.downloads}, likes {facts.likes}, modified {facts.modified}"),
        Evidence(source="files", quote=f"{report.architecture}, {report.parameters} parameters, {report.dtype}"),
    ]
    return Proposal(
        repo=model.repo,
        commit=model.commit,
        value=round(_value(parts, brief), 4),
        parts={name: round(part, 4) for name, part in parts.items()},
        why="; ".join(reasons),
        evidence=tuple(evidence),
        licence=report.licence,
        gib=report.weight_bytes / GIB,
        parameters=report.parameters,
        scoring=report.scoring,
        labels=report.labels,
        report=report,
    )


def _match(named: str, evidence: Sequence[Evidence]) -> str:
    if named:
        return f"its name and tags say {named}"
    return "its card is about this task" if evidence else "nothing says that it is about this task"


def _evidence(brief: Brief, model: HubModel) -> Iterable[Evidence]:
    """Where topics, words and languages of the brief stand."""
    name, tags = _labels(Facts(repo=model.repo, commit="")), [tag.lower() for tag in model.facts.tags]
    for words in (*(TOPICS[topic] for topic in brief.topics), *((word,) for word in brief.words)):
        if word := _shown(words, name):
            yield Evidence(source="name", quote=word)
        if tag := next((tag for tag in tags if _shown(words, tag)), None):
            yield Evidence(source="tags", quote=tag)
        sentences = re.split(r"(?<=[.!?])\s+|\n", re.sub(r"\A---\n.*?\n---\n", "", model.card, flags=re.DOTALL))
        if sentence := next((sentence for sentence in sentences if _shown(words, sentence.lower())), None):
            yield Evidence(source="card", quote=sentence.strip()[:200])
    for code in brief.languages:
        if code in model.facts.languages or code in tags:
            yield Evidence(source="tags", quote=code)
