# SPDX-License-Identifier: Apache-2.0
"""What is known of how well each live tool tells right from wrong, by kind of query and cluster.

`Competence` is a value: what the router needs to know of a snapshot, and all of it. `gather` makes it of the exams'
cards, and of labelled answers that several tools have scored, which tell of clusters, and from which mixtures are
learned: those that exams have kept (`of_exams`), and those of a file. `Competence.believe` makes a belief of it: a Beta
posterior over the share of prompts on which the tool puts a right answer above a wrong one; the cluster's evidence
counts on top of its kind's, of which at most `FROM_KIND` prompts do. The same holds in a cluster of which nothing is
known of a verifier that was tried in others: it was written for those, and a rule is not outdone by what it does there.
Tools without a card are taken for what they are: `TRUSTED` rules, or `UNKNOWN`. Beside what was measured the trust in a
rule counts for `FROM_KIND` prompts (in a cluster with evidence of its own together with the kind's), and an exam with
too few cases takes none of it away.

    library/competence/<version of the snapshot>.json      made when that snapshot is first needed, and kept

Guarantees: JSON-like and of one hash; what was known of a snapshot stays as it was at first, whatever exams are taken
later, so that any past decision can be made again (`Store`); a card that says that a kind was not tried enough counts
as a refusal of that kind.

Not covered: a card's figures are of answers that were made for the exam; live answers may be harder. The evidence of a
cluster comes from labelled answers only, as cards do not know clusters; those of an exam are in its card, too, and so
count a second time, with `FROM_KIND` prompts at most.
"""

from __future__ import annotations

import json
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from verl_rlar.advice import Ruling
from verl_rlar.calibration import rank_accuracy
from verl_rlar.errors import DataError, LibraryError
from verl_rlar.library import write_whole
from verl_rlar.mixture import LEAST, Choice, adapt, learn
from verl_rlar.rows import query_from_dict
from verl_rlar.types import Kind, Query, Snapshot, ToolSpec, content_hash

logger = logging.getLogger(__name__)

FOLDER_NAME = "competence"
TRUSTED = (98.0, 2.0)
"""A built-in rule, or one of the user's own, without a card: as if it had been right on 98 of 100 prompts."""
UNKNOWN = (1.0, 1.0)
"""Any other tool of which nothing is known: as likely right as wrong."""
FROM_KIND = 20.0
"""Most prompts that the evidence of a kind counts for in one of its clusters."""
Z = 1.645
"""Width of a belief: 95 % lie above its lower end."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """What was measured of a tool on a kind of query, or on one of its clusters."""

    digest: str
    kind: Kind
    cluster: str = ""
    """Empty: the whole kind."""
    prompts: float
    """Different prompts that it was tried on."""
    right: float
    """On how many of these it puts a right answer above a wrong one; shares of pairs are added up."""
    seconds: float | None = None
    """Median time of a call. None: not measured."""
    dollars: float | None = None
    """Money for 1,000 calls. None: not known."""


@dataclass(frozen=True, kw_only=True)
class Blend:
    """A mixture of tools that is known to be better than the best of them."""

    kind: Kind
    cluster: str = ""
    """Empty: for the kind, where its cluster has none of its own."""
    weights: tuple[tuple[str, float], ...]
    """By digest, all above 0; factors of the log-odds of the tools' values."""
    prompts: int
    """Labelled prompts that it was learned from."""
    accuracy: float
    """How often it ranks a right answer first, on prompts that were held out."""
    best: float
    """The same of the best single tool."""
    gain_low: float
    """Lower end of the difference; above 0."""


@dataclass(frozen=True, kw_only=True)
class Belief:
    """How often a tool is right, as far as is known."""

    mean: float
    low: float
    """Lower end: 95 % of the belief lies above."""
    high: float
    """Upper end, likewise."""
    source: str
    """What it is made of, in words."""
    known: bool
    """Whether anything was measured."""
    prompts: float = 0.0
    """Prompts that it rests on, those of the kind as far as they count."""
    seen: float | None = None
    """Share of the prompts that it was tried on, those of the cluster if there are any, on which it was right: without
    any trust. None: nothing was measured."""
    seconds: float | None = None
    dollars: float | None = None

    @property
    def deviation(self) -> float:
        """Its standard deviation."""
        return (self.mean - self.low) / Z


@dataclass(frozen=True, kw_only=True)
class Competence:
    """All that is known of a snapshot's tools. Empty: nothing."""

    records: tuple[Record, ...] = ()
    refused: tuple[tuple[str, Kind], ...] = ()
    """Tools, by digest, and kinds that their exams did not try enough."""
    blends: tuple[Blend, ...] = ()
    rulings: tuple[Ruling, ...] = ()
    """What an LLM advised, in the order in which it did."""

    @cached_property
    def version(self) -> str:
        """Identity of what is known: 16 hex digits."""
        return content_hash(self.as_dict())[:16]

    @cached_property
    def _by_tool(self) -> dict[tuple[str, Kind, str], Record]:
        return {(record.digest, record.kind, record.cluster): record for record in self.records}

    @cached_property
    def _refused(self) -> frozenset[tuple[str, Kind]]:
        return frozenset(self.refused)

    @cached_property
    def _rulings(self) -> dict[str, Ruling]:
        return {ruling.query or ruling.cluster: ruling for ruling in self.rulings}

    @cached_property
    def _blends(self) -> dict[tuple[Kind, str], Blend]:
        return {(blend.kind, blend.cluster): blend for blend in self.blends}

    @cached_property
    def _informed(self) -> frozenset[tuple[Kind, str]]:
        return frozenset((record.kind, record.cluster) for record in self.records if record.cluster)

    @cached_property
    def _placed(self) -> frozenset[tuple[str, Kind]]:
        return frozenset((record.digest, record.kind) for record in self.records if record.cluster)

    def informed(self, kind: Kind, cluster: str) -> bool:
        """Whether anything was measured in a cluster itself."""
        return (kind, cluster) in self._informed

    def blend(self, kind: Kind, cluster: str) -> Blend | None:
        """The mixture for a cluster, else the one for its kind."""
        return self._blends.get((kind, cluster)) or self._blends.get((kind, ""))

    def ruling(self, place: str) -> Ruling | None:
        """What was advised for a cluster, by its id, or for a single prompt, by its key; None if no tool was."""
        ruling = self._rulings.get(place) if place else None
        return ruling if ruling is not None and ruling.tool else None

    def refuses(self, digest: str, kind: Kind) -> bool:
        """Whether a tool's exam did not try it on a kind."""
        return (digest, kind) in self._refused

    def believe(self, tool: ToolSpec, kind: Kind, cluster: str = "", *, here: bool = False) -> Belief:
        """What to believe of a tool on a kind of query, in a cluster.

        Args:
            tool: The tool.
            kind: The kind.
            cluster: The cluster; empty: the kind as a whole.
            here: Whether the kind's evidence counts for `FROM_KIND` prompts at most, also where there is none of the
                cluster: how sure one can be that it holds there. So it always is for a verifier that was tried in
                other clusters.
        """
        whole = self._by_tool.get((tool.digest, kind, ""))
        part = self._by_tool.get((tool.digest, kind, cluster)) if cluster else None
        if whole is None and part is None:
            trusted = tool.kind == "rule"
            right, wrong = TRUSTED if trusted else UNKNOWN
            share = min(1.0, FROM_KIND / (right + wrong)) if here else 1.0
            source = "trusted, not examined" if trusted else "not examined on this kind"
            return _belief(share * right, share * wrong, source, None)
        here = here or (tool.kind == "verifier" and bool(cluster) and (tool.digest, kind) in self._placed)
        trust = TRUSTED if tool.kind == "rule" else UNKNOWN
        measured = [record for record in (whole, part) if record is not None]
        as_good = all(one.right * sum(trust) >= trust[0] * one.prompts for one in measured)
        beside = FROM_KIND  # what trust, and what the kind's evidence counts for
        if trust is TRUSTED and whole is not None and (part or here):
            beside /= 2  # both are of the kind
        share = 1.0 if trust is TRUSTED and as_good and not here else min(1.0, beside / sum(trust))
        right, wrong = prior = share * trust[0], share * trust[1]
        if whole is not None:
            share = min(1.0, beside / whole.prompts) if (part or here) and whole.prompts > 0 else 1.0
            right, wrong = right + share * whole.right, wrong + share * (whole.prompts - whole.right)
        source = f"right on {whole.right / whole.prompts:.3f} of {whole.prompts:g} prompts" if whole else ""
        if part is not None:
            right, wrong = right + part.right, wrong + part.prompts - part.right
            source = f"right on {part.right / part.prompts:.3f} of {part.prompts:g} prompts of its cluster"
        return _belief(right, wrong, source, part or whole, prior)

    def as_dict(self) -> dict[str, Any]:
        """As JSON-like containers."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Competence:
        """What `as_dict` gave."""
        return cls(
            records=tuple(Record(**{**one, "kind": Kind(one["kind"])}) for one in tree["records"]),
            refused=tuple((digest, Kind(kind)) for digest, kind in tree["refused"]),
            blends=tuple(
                Blend(**{**one, "kind": Kind(one["kind"]), "weights": tuple((d, w) for d, w in one["weights"])})
                for one in tree["blends"]
            ),
            rulings=tuple(Ruling(**one) for one in tree.get("rulings", ())),
        )


NOTHING = Competence()
"""Nothing is known."""


def _belief(
    right: float, wrong: float, source: str, record: Record | None, prior: tuple[float, float] = UNKNOWN
) -> Belief:
    mean = right / (right + wrong)
    half = Z * math.sqrt(mean * (1.0 - mean) / (right + wrong + 1.0))
    return Belief(
        mean=mean,
        low=max(0.0, mean - half),
        high=min(1.0, mean + half),
        source=source,
        known=record is not None,
        prompts=right + wrong - sum(prior) if record else 0.0,
        seen=record.right / record.prompts if record and record.prompts else None,
        seconds=record.seconds if record else None,
        dollars=record.dollars if record else None,
    )


# --- Where it comes from ----------------------------------------------------------------------------------------------


def of_card(card: Mapping[str, Any], digest: str) -> tuple[list[Record], list[tuple[str, Kind]]]:
    """What an exam's card says: its pairwise accuracy by kind, time and money; and the kinds that it did not try.

    Args:
        card: `verl_rlar.exam.card.Card.as_dict`. What is missing is not known.
        digest: The tool.
    """
    figures = card.get("figures") or {}

    def value(kind: str, name: str, what: str = "value") -> Any:
        return ((figures.get(kind) or {}).get(name) or {}).get(what)

    records = []
    for kind in Kind:
        share, prompts = value(kind.value, "pairwise"), value(kind.value, "pairwise", "cases") or 0
        if share is not None and prompts > 0 and kind.value not in (card.get("unproven") or ()):
            records.append(
                Record(
                    digest=digest,
                    kind=kind,
                    prompts=float(prompts),
                    right=float(share) * prompts,
                    seconds=value("all", "p50_s"),
                    dollars=value("all", "dollars_per_1000"),
                )
            )
    known = {kind.value for kind in Kind}
    return records, [(digest, Kind(kind)) for kind in card.get("unproven") or () if kind in known]


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """A labelled prompt that several tools have scored."""

    kind: Kind
    choice: Choice


def read_labelled(path: Path) -> tuple[Labelled, ...]:
    """Reads labelled answers: JSON lines of ``kind``, ``cluster`` (may be missing) and ``answers``, each of which has
    ``right`` and ``values``, by a tool's digest or name its calibrated value in [0, 1].

    Raises:
        DataError: The file or a line of it cannot be read.
    """
    found: list[Labelled] = []
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                answers = row["answers"]
                values = tuple({str(t): float(v) for t, v in answer["values"].items()} for answer in answers)
                if not all(0 <= v <= 1 for one in values for v in one.values()):
                    raise ValueError("a value is not in [0, 1]")
                choice = Choice(
                    values=values,
                    right=tuple(bool(answer["right"]) for answer in answers),
                    cluster=str(row.get("cluster") or ""),
                )
                found.append(Labelled(kind=Kind(row["kind"]), choice=choice))
    except OSError as error:
        raise DataError(f"labelled answers {path}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"labelled answers {path}, line {len(found) + 1}: {type(error).__name__}: {error}") from None
    return tuple(found)


def of_exams(
    exams: Mapping[str, Sequence[Mapping[str, Any]]], cluster_of: Callable[[Query], str] = lambda query: ""
) -> tuple[Labelled, ...]:
    """The labelled answers of exams, with the values of all tools whose exams had the same ones.

    Args:
        exams: By digest, what `verl_rlar.exam.trial.Examination.labelled` gave.
        cluster_of: A query -> the id of its cluster.
    """
    queries: dict[str, tuple[Kind, Query]] = {}
    right: dict[str, dict[str, bool]] = defaultdict(dict)
    values: dict[str, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for digest, kept in exams.items():
        for one in kept:
            query = query_from_dict(one["query"])
            queries.setdefault(query.key, (Kind(one["kind"]), query))
            for answer in one["answers"]:
                right[query.key][answer["case"]] = bool(answer["right"])
                values[query.key][answer["case"]][digest] = float(answer["value"])
    return tuple(
        Labelled(
            kind=kind,
            choice=Choice(
                values=tuple(values[key][case] for case in right[key]),
                right=tuple(right[key].values()),
                cluster=cluster_of(query),
            ),
        )
        for key, (kind, query) in queries.items()
    )


def gather(
    tools: Sequence[ToolSpec],
    cards: Mapping[str, Mapping[str, Any]],
    labelled: Sequence[Labelled] = (),
) -> Competence:
    """What is known of tools.

    Args:
        tools: The live ones.
        cards: The exams' cards, by digest, of those that were examined.
        labelled: Labelled answers with values of some of them, by digest or name. They are evidence of clusters, of
            kinds that no card speaks of, and for mixtures of reward models. One that is weak by itself may be a part
            of a mixture: it has weight only as far as it knows what the others do not.
    """
    records: list[Record] = []
    refused: list[tuple[str, Kind]] = []
    trusted = {tool.digest for tool in tools if tool.kind == "rule"}
    for digest, card in cards.items():
        measured, not_tried = of_card(card, digest)
        records += measured
        refused += not_tried if digest not in trusted else []  # what too few answers said takes no trust away
    choices: dict[Kind, list[Choice]] = defaultdict(list)
    for one in labelled:
        pool = [tool for tool in tools if one.kind in tool.scope.kinds and not tool.gate]
        choices[one.kind].append(_by_digest(one.choice, pool))
    carded = {(record.digest, record.kind) for record in records}
    for kind, named in choices.items():
        counted = _counted(kind, named)
        records += [one for one in counted if one.cluster or (one.digest, kind) not in carded]
    known = Competence(records=tuple(records), refused=tuple(refused))
    blends = [
        blend
        for kind, named in choices.items()
        for blend in _blends(
            kind,
            named,
            [
                tool
                for tool in tools
                if tool.opinion  # what rules and verifiers say is not an opinion
                and not known.refuses(tool.digest, kind)
                and any(tool.digest in values for choice in named for values in choice.values)
            ],
        )
    ]
    return Competence(records=known.records, refused=known.refused, blends=tuple(blends))


def _counted(kind: Kind, choices: Sequence[Choice]) -> list[Record]:
    """How often each tool puts a right answer above a wrong one, of all prompts and in each cluster. Ties: half."""
    shares: dict[tuple[str, str], list[float]] = defaultdict(list)
    for choice in choices:
        answers = list(zip(choice.values, choice.right, strict=True))
        for digest in {digest for values in choice.values for digest in values}:
            good = [values[digest] for values, right in answers if right and digest in values]
            bad = [values[digest] for values, right in answers if not right and digest in values]
            if good and bad:
                share = rank_accuracy(good, bad)
                for cluster in {"", choice.cluster}:
                    shares[digest, cluster].append(share)
    return [
        Record(digest=digest, kind=kind, cluster=cluster, prompts=float(len(found)), right=sum(found))
        for (digest, cluster), found in sorted(shares.items())
    ]


def _blends(kind: Kind, choices: Sequence[Choice], pool: Sequence[ToolSpec]) -> list[Blend]:
    """The mixture of a kind and those of its clusters, if mixing pays: if its gain over the best single tool is more
    than 0 on prompts that were held out."""
    digests = _together(choices, [tool.digest for tool in pool])
    made = learn(choices, digests)
    if made is None or made.gain_low <= 0 or len(made.weights) < 2:
        return []
    by_cluster: dict[str, list[Choice]] = defaultdict(list)
    for choice in choices:
        by_cluster[choice.cluster].append(choice)
    weights = {"": (made.weights, made.prompts)}
    for cluster, members in sorted(by_cluster.items()):
        if cluster and (own := adapt(members, made, digests)):
            weights[cluster] = own, len(members)
    return [
        Blend(
            kind=kind,
            cluster=cluster,
            weights=own,
            prompts=prompts,
            accuracy=made.accuracy,
            best=made.best_accuracy,
            gain_low=made.gain_low,
        )
        for cluster, (own, prompts) in weights.items()
    ]


def _together(choices: Sequence[Choice], pool: Sequence[str]) -> list[str]:
    """The tools of a pool without those, that have scored the fewest of these answers, for whose sake too few prompts
    would be left to learn from."""

    def scored(tool: str) -> int:
        return sum(all(tool in values for values in choice.values) for choice in choices)

    def whole(tools: Sequence[str]) -> int:
        return sum(all(tool in values for values in choice.values for tool in tools) for choice in choices)

    left = list(pool)
    while len(left) > 2 and whole(left) < LEAST:
        left.remove(min(left, key=scored))
    return left


def _by_digest(choice: Choice, pool: Sequence[ToolSpec]) -> Choice:
    def values(named: Mapping[str, float]) -> dict[str, float]:
        found = {tool.digest: named.get(tool.digest, named.get(tool.name)) for tool in pool}
        return {digest: value for digest, value in found.items() if value is not None}

    return Choice(values=tuple(map(values, choice.values)), right=choice.right, cluster=choice.cluster)


class Store:
    """What is known of each snapshot, made once.

    Args:
        card_of: A tool's digest -> its exam's card, or None.
        labelled: Labelled answers; see `gather`.
        folder: Where it is kept for the next start; None: nowhere.
        exam_of: A tool's digest -> the labelled answers of its exam, see `of_exams`.
        cluster_of: A query -> the id of its cluster.
        rulings: The identity of a snapshot's advice -> what was advised, see `verl_rlar.advice.Advice.of`.
    """

    def __init__(
        self,
        card_of: Callable[[str], Mapping[str, Any] | None],
        labelled: Sequence[Labelled] = (),
        folder: Path | None = None,
        *,
        exam_of: Callable[[str], Sequence[Mapping[str, Any]]] = lambda digest: (),
        cluster_of: Callable[[Query], str] = lambda query: "",
        rulings: Callable[[str], tuple[Ruling, ...]] = lambda id: (),
    ) -> None:
        self._exam_of = exam_of
        self._cluster_of = cluster_of
        self._rulings = rulings
        self._card_of = card_of
        self._labelled = labelled
        self._folder = folder
        self._suffix = f"-{content_hash([asdict(one) for one in labelled])[:8]}" if labelled else ""
        self._known: dict[str, Competence] = {}

    def of(self, snapshot: Snapshot) -> Competence:
        """What is known of a snapshot: what was known when it was asked for first, with these labelled answers.

        Raises:
            LibraryError: What was kept is damaged. That it cannot be written is logged: it holds until the next start.
        """
        known = self._known.get(snapshot.version)
        if known is None:
            known = self._of_tools(snapshot)
            if snapshot.advice:
                known = replace(known, rulings=self._rulings(snapshot.advice))
            self._known[snapshot.version] = known
        return known

    def _of_tools(self, snapshot: Snapshot) -> Competence:
        known = self._known.get(snapshot.toolset) or self._kept(snapshot.toolset)
        if known is None:
            known = self._make(snapshot)
            self._keep(snapshot.toolset, known)
        self._known[snapshot.toolset] = known
        return known

    def _make(self, snapshot: Snapshot) -> Competence:
        cards = {tool.digest: self._card_of(tool.digest) for tool in snapshot.tools}
        examined = {digest: card for digest, card in cards.items() if card is not None}
        answers = {tool.digest: self._exam_of(tool.digest) for tool in snapshot.tools}
        for tool in snapshot.tools:
            too_few = examined.get(tool.digest, {}).get("unproven") or ()
            if tool.kind == "rule" and too_few:
                answers[tool.digest] = [one for one in answers[tool.digest] if one["kind"] not in too_few]
        exams = of_exams(answers, self._cluster_of)
        return gather(snapshot.tools, examined, (*self._labelled, *exams))

    def _kept(self, version: str) -> Competence | None:
        if self._folder is None:
            return None
        path = self._folder / f"{version}{self._suffix}.json"
        try:
            return Competence.from_dict(json.loads(path.read_bytes()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LibraryError(f"{path} is damaged ({error}); deleted, it is made again of the cards") from error

    def _keep(self, version: str, known: Competence) -> None:
        if self._folder is None:
            return
        try:
            write_whole(
                self._folder / f"{version}{self._suffix}.json", json.dumps(known.as_dict(), indent=1).encode() + b"\n"
            )
        except OSError as error:
            logger.warning("what is known of the tools of snapshot %s could not be kept: %s", version, error)
