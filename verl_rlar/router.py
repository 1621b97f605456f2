# SPDX-License-Identifier: Apache-2.0
"""Which tools score a query, decided by evidence on queries like it.

`Router` is the seam: one method, from a query and a snapshot to a route. `decide` is the decision itself, a function of
nothing but what it is given: the query's features and cluster, the snapshot, what is known of its tools
(`verl_rlar.competence`), and the settings. `FeatureRouter` hands it these. In this order:

1. A route that the settings declare (`rlar.routing.routes`) and whose conditions the query meets.
2. For the most specific kind of check that the row makes possible and that a competent tool is there for, the tool
   whose expected accuracy on such queries has the highest lower end; of alike ones the cheaper, then the faster, then
   the first in the library. A tool that `rlar.routing.prefer` names comes before all others.
3. A verifiable query goes to a rule or a verifier. A reward model may stand beside it (`rlar.routing.beside`), and
   takes its place only if it is better beyond doubt: the lower end of the one above the upper end of the other.
4. Where reward models decide, and labelled answers have shown that several of them together rank better than the best
   one, they score together, by learned weights.
5. Where evidence is thin (`open_question`: another tool may well be better in this cluster), the one that an LLM has
   advised for the cluster is taken, as long as evidence puts no other before it by more than `DOUBT`; and a single
   prompt for which it has advised another tool goes there. Advice is what `Competence.rulings` holds, so nothing
   waits for it; it never puts a reward model in a verifier's place.

`RouteCache` makes any router decide once per (snapshot, split, query), with all callers waiting for that decision.

Guarantees: a route is a function of the query, its cluster, the snapshot and what was known of it when it was first
used, and the split (training or validation), never of a response, a step or a data set's name (I2); weights may depend
on the step, and stand in the route as a schedule. The reason says which figures decided. A query that no competent tool
fits gets an explicit uncovered route, with the reason. Which of several tools applies is decided here, by their scopes:
a tool that abstains from a response later on makes it unscored, as another tool in its place would put two rulers into
one group.

Not covered: a second kind of check of a row (constraints on a math question) is reported by `rlar plan` but not scored
unless a declared route says so. Tools without a card are trusted by what they are, see `competence.TRUSTED`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from verl_rlar.clusters import Clusters
from verl_rlar.competence import NOTHING, Belief, Competence, Labelled
from verl_rlar.config import PartConfig, RouteConfig, RoutingConfig
from verl_rlar.errors import ConfigError
from verl_rlar.features import Features, describe
from verl_rlar.once import Once
from verl_rlar.types import Kind, Query, Route, RoutePart, Snapshot, Split, ToolSpec, content_hash

OPTIONS = 20
"""Most tools that one question names."""
FEW = 30.0
"""Prompts of evidence below which a tool is too weak only if it was wrong on most of them: so few cannot show that it
is good, either."""
SOME = 10.0
"""Prompts of evidence from which on a rule is too weak if it was wrong on most of them, however much it is trusted."""
DOUBT = 1.0
"""Standard deviations by which evidence may put another tool before the one that an LLM has advised: with one of them,
the advised one is still the better one once in six times. So evidence outweighs advice as it comes, see
`recipes/selection/thin.py`."""
MEMO = 10_000
"""Choices that are kept, by snapshot, kind and cluster; then they are made anew."""
REJECTED = 3
"""Most tools whose rejection a reason explains."""


class Router(Protocol):
    async def route(self, query: Query, snapshot: Snapshot, split: Split = "train") -> Route:
        """Decides which of the snapshot's tools score the responses to a query, in training or in validation."""
        ...


class FeatureRouter:
    """Decides by features, cluster and evidence; see the module.

    Args:
        config: The settings.
        competence: What is known of a snapshot's tools.
        clusters: Where clusters are kept. None: they are not, and evidence is by kind alone.
    """

    def __init__(
        self,
        config: RoutingConfig,
        competence: Callable[[Snapshot], Competence] = lambda snapshot: NOTHING,
        clusters: Clusters | None = None,
    ) -> None:
        self._config = config
        self._competence = competence
        self._clusters = clusters
        self._memo: dict[tuple[Any, ...], _Chosen] = {}

    def check(self, snapshot: Snapshot) -> None:
        """Raises `ConfigError` if the settings name a tool that is not in the snapshot, or prefer one for a kind that
        it is not for."""
        named = [("fallback", self._config.fallback)]
        named += [(f"prefer.{kind.value}", name) for kind, name in self._config.prefer.items()]
        named += [("forbid", name) for name in self._config.forbid]
        for label, declared in self._config.routes.items():
            named += [(f"routes.{label}", name) for part in declared.parts for name in _names(part)]
        for label, name in named:
            if name is not None and name not in {tool.name for tool in snapshot.tools}:
                names = ", ".join(tool.name for tool in snapshot.tools)
                raise ConfigError(f"rlar.routing.{label}: there is no tool {name!r}; there are: {names}")
        for kind, name in self._config.prefer.items():
            of_name = [tool for tool in snapshot.tools if tool.name == name]
            if of_name and all(tool.gate or kind not in tool.scope.kinds for tool in of_name):
                raise ConfigError(
                    f"rlar.routing.prefer.{kind.value}: {name} is not for {kind.value}; a route of your own may "
                    "have it: rlar.routing.routes"
                )

    async def route(self, query: Query, snapshot: Snapshot, split: Split = "train") -> Route:
        features = describe(query)
        cluster = self._clusters.of(query, features) if self._clusters is not None else ""
        return decide(
            query,
            snapshot,
            self._config,
            split=split,
            features=features,
            cluster=cluster,
            competence=self._competence(snapshot),
            memo=self._memo,
        )


def settings_of(config: RoutingConfig, labelled: Sequence[Labelled] = ()) -> str:
    """The identity of what a run is told about routes, for `Snapshot.settings`: a route that was decided under other
    settings does not count under these. Empty: the defaults.

    Args:
        config: The settings.
        labelled: What the file says that they name.
    """
    told = config.model_dump(mode="json", exclude_defaults=True, exclude={"labelled", "prefer"})
    if preferred := {kind.value: name for kind, name in config.prefer.items() if name is not None}:
        told["prefer"] = preferred
    if "routes" in told:
        told["routes"] = list(told["routes"].items())  # their order counts
    if labelled:
        told["labelled"] = [asdict(one) for one in labelled]
    return content_hash(told)[:16] if told else ""


def decide(
    query: Query,
    snapshot: Snapshot,
    config: RoutingConfig,
    *,
    split: Split = "train",
    features: Features | None = None,
    cluster: str = "",
    competence: Competence = NOTHING,
    memo: dict[tuple[Any, ...], _Chosen] | None = None,
) -> Route:
    """The route of a query; see the module. The same arguments give the same route.

    Args:
        query: The query.
        snapshot: The tools that there are.
        config: The settings.
        split: Training or validation.
        features: `verl_rlar.features.describe` of the query. None: it is done here.
        cluster: Id of the query's cluster; empty: evidence is by kind alone.
        competence: What is known of these tools.
        memo: What was chosen for other queries under the same settings, to be looked up and added to.
    """
    features = describe(query) if features is None else features
    declared = _declared_route(query, snapshot, config, split, features, cluster)
    if declared is not None:
        return declared
    gates = [tool for tool in snapshot.tools if tool.gate and tool.name in features.gates] if features.gates else []
    rejected: list[str] = []
    for kind, evidence in features.kinds:
        chosen = _choose(kind, query, snapshot, config, cluster, competence, {} if memo is None else memo)
        if chosen.parts:
            if competence.rulings and (single := _single(query, snapshot, config, features, cluster, competence)):
                kind, chosen = single
                evidence = dict(features.kinds)[kind]
            reason = f"{kind.value}: {evidence}; {chosen.reason}"
            return _route(chosen.parts, gates, snapshot, cluster, kind=kind, covered=True, reason=reason)
        rejected += [chosen.reason] if chosen.reason else []
    kind, evidence = features.kinds[0]
    reason = f"uncovered: no tool for {kind.value} ({evidence})" + "".join(f"; {why}" for why in rejected)
    fallback = next((tool for tool in snapshot.tools if tool.name == config.fallback), None)
    if fallback is None:
        return Route(parts=(), reason=reason, kind=kind, covered=False, snapshot=snapshot.version, cluster=cluster)
    parts = (RoutePart(tool=fallback.name, digest=fallback.digest),)
    return _route(
        parts, gates, snapshot, cluster, kind=kind, covered=False, reason=f"{reason}; fallback: {fallback.name}"
    )


# --- By evidence ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Chosen:
    """Who scores queries of a kind, and why; no parts: nobody can."""

    parts: tuple[RoutePart, ...]
    reason: str


@dataclass(frozen=True)
class _Candidate:
    tool: ToolSpec
    belief: Belief
    place: int

    @property
    def said(self) -> str:
        return f"{self.tool.name} {self.belief.low:.3f} ({self.belief.source})"


def _choose(
    kind: Kind,
    query: Query,
    snapshot: Snapshot,
    config: RoutingConfig,
    cluster: str,
    competence: Competence,
    memo: dict[tuple[Any, ...], _Chosen],
) -> _Chosen:
    """Who scores a query as one of a kind. Of the query, only whether it has a reference matters (`ToolSpec.fits`)."""
    key = (snapshot.version, competence.version, kind, cluster, bool(query.reference))
    chosen = memo.get(key)
    if chosen is None:
        if len(memo) >= MEMO:
            memo.clear()
        chosen = memo[key] = _compare(kind, query, snapshot, config, cluster, competence)
    return chosen


@dataclass(frozen=True)
class _Field:
    """The tools that may score queries of a kind."""

    preferred: ToolSpec | None
    """The one that the settings name: then nothing else counts."""
    candidates: tuple[_Candidate, ...] = ()
    weak: tuple[_Candidate, ...] = ()
    """Examined, and not above chance."""
    rejected: tuple[str, ...] = ()
    """Why others may not, in words."""

    @property
    def models(self) -> tuple[_Candidate, ...]:
        return tuple(one for one in self.candidates if one.tool.opinion)

    @property
    def checks(self) -> tuple[_Candidate, ...]:
        return tuple(one for one in self.candidates if not one.tool.opinion)


def _field(
    kind: Kind, query: Query, snapshot: Snapshot, config: RoutingConfig, cluster: str, competence: Competence
) -> _Field:
    candidates: list[_Candidate] = []
    weak: list[_Candidate] = []
    rejected: list[str] = []
    here = competence.informed(kind, cluster)  # what is known of a tool elsewhere must not outweigh what was seen here
    for place, tool in enumerate(snapshot.tools):
        if tool.gate or kind not in tool.scope.kinds or not tool.fits(query):
            continue
        if tool.name == config.prefer.get(kind):
            return _Field(tool)
        belief = competence.believe(tool, kind, cluster, here=here)
        if tool.name in config.forbid:
            rejected.append(f"{tool.name} is in rlar.routing.forbid")
        elif competence.refuses(tool.digest, kind):
            rejected.append(f"{tool.name} was not tried enough on {kind.value}")
        elif _too_weak(belief, config.least):
            rejected.append(f"{tool.name} is too weak: {belief.low:.3f} at least, {belief.source}")
            weak.append(_Candidate(tool, belief, place))
        else:
            candidates.append(_Candidate(tool, belief, place))
    return _Field(None, tuple(candidates), tuple(weak), tuple(rejected))


def _too_weak(belief: Belief, least: float) -> bool:
    """Whether evidence says that a tool is not good enough. No trust in a rule outweighs that it was wrong wherever it
    was tried."""
    if not belief.known:
        return False
    seen = belief.mean if belief.seen is None else belief.seen
    if belief.prompts >= FEW:
        return belief.low < least or seen <= least
    return belief.mean < least or (belief.prompts >= SOME and seen < least)


def _compare(
    kind: Kind, query: Query, snapshot: Snapshot, config: RoutingConfig, cluster: str, competence: Competence
) -> _Chosen:
    field = _field(kind, query, snapshot, config, cluster, competence)
    if field.preferred is not None:
        return _Chosen((_part(field.preferred),), f"{field.preferred.name} as rlar.routing.prefer says")
    if not field.candidates:
        return _Chosen((), "; ".join(field.rejected[:REJECTED]))
    models, checks, weak = field.models, field.checks, field.weak
    ruling = competence.ruling(cluster)
    if ruling is not None:
        rivals = _rivals(field, kind, config, cluster, competence)
        advised = next((one for one in rivals if one.tool.digest == ruling.tool), None)
        if advised is not None and _may_lead(advised, rivals[0], kind, cluster, competence):
            others = ", ".join(one.said for one in rivals if one is not advised)
            said = (
                f"{advised.said} as {ruling.by} advised for this cluster ({ruling.why}), as evidence is thin: {others}"
            )
            return _Chosen((_part(advised.tool),), said)
    if not checks:
        return _of_models(models, weak, kind, config, cluster, competence)
    check = _best(checks, config.alike)
    if models:
        model = _best(models, config.alike)
        if kind is Kind.OPEN or model.belief.low > check.belief.high:
            if model.belief.low > check.belief.low:
                chosen = _of_models(models, weak, kind, config, cluster, competence)
                return _Chosen(chosen.parts, f"{chosen.reason}, above {check.said}")
        elif config.beside > 0:
            parts = _part(check.tool), replace(_part(model.tool), weight=config.beside)
            return _Chosen(parts, f"{_said(check, checks)}; beside it {model.said}")
    return _Chosen((_part(check.tool),), _said(check, checks))


def _best(candidates: Sequence[_Candidate], alike: float) -> _Candidate:
    """The one with the highest lower end; of those that are alike the cheaper, the faster (if all were timed), the
    first."""
    top = max(one.belief.low for one in candidates)
    near = [one for one in candidates if one.belief.low >= top - alike]
    timed = all(one.belief.seconds is not None for one in near)
    return min(near, key=lambda one: (one.belief.dollars or 0.0, one.belief.seconds if timed else 0.0, one.place))


def _of_models(
    models: Sequence[_Candidate],
    weak: Sequence[_Candidate],
    kind: Kind,
    config: RoutingConfig,
    cluster: str,
    competence: Competence,
) -> _Chosen:
    """One reward model, or the mixture that pays; in a mixture, one that is weak by itself may have its part."""
    blend = competence.blend(kind, cluster) if config.mixtures else None
    if blend is not None:
        by_digest = {one.tool.digest: one.tool for one in (*models, *weak)}
        if all(digest in by_digest for digest, _ in blend.weights):
            parts = tuple(
                replace(_part(by_digest[digest]), weight=weight, odds=True) for digest, weight in blend.weights
            )
            shown = " + ".join(f"{weight:.2f} {by_digest[digest].name}" for digest, weight in blend.weights)
            where = f"cluster {blend.cluster}" if blend.cluster else "its kind"
            gained = f"{blend.accuracy:.3f} on held-out prompts, best single {blend.best:.3f}"
            return _Chosen(parts, f"mixture of {where}, {blend.prompts} prompts: {shown}; {gained}")
    best = _best(models, config.alike)
    return _Chosen((_part(best.tool),), _said(best, models))


def _said(chosen: _Candidate, candidates: Sequence[_Candidate]) -> str:
    """Why, in figures: lower ends of the expected accuracy."""
    others = sorted((one for one in candidates if one is not chosen), key=lambda one: (-one.belief.low, one.place))
    return f"{chosen.said}" + (f", before {', '.join(one.said for one in others[:2])}" if others else "")


# --- By advice --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Option:
    """A tool that may be advised."""

    name: str
    digest: str
    sort: str
    """See `ToolSpec.kind`."""
    about: str
    """Its description. Foreign text, unless it is a rule."""
    known: str
    """What is known of it in the cluster, in figures."""


@dataclass(frozen=True, kw_only=True)
class OpenQuestion:
    """What an LLM may say about a cluster."""

    kind: Kind
    rivals: tuple[Option, ...]
    """The tool that evidence puts first, and those that may well be better. Empty: evidence decides, or none fits."""
    covered: bool
    """Whether a tool fits at all."""


def open_question(
    query: Query, snapshot: Snapshot, config: RoutingConfig, cluster: str, competence: Competence
) -> OpenQuestion | None:
    """What is open about the routes of a cluster; None if the settings decide.

    Evidence is thin where the upper end of what may be believed of another tool lies above the lower end of the first
    one's, with the kind's evidence counted as in `Competence.believe` with ``here``. Rules that were not examined are
    not weighed against each other: their order is their makers'.

    Args:
        query: One of the cluster.
        snapshot: The tools that there are.
        config: The settings.
        cluster: Its id.
        competence: What is known of the tools.
    """
    features = describe(query)
    if _declared_route(query, snapshot, config, "train", features, cluster):
        return None
    for kind, _ in features.kinds:
        field = _field(kind, query, snapshot, config, cluster, competence)
        if field.preferred is not None:
            return None
        if field.candidates:
            rivals = _rivals(field, kind, config, cluster, competence)
            return OpenQuestion(kind=kind, rivals=tuple(map(_option, rivals)), covered=True)
    return OpenQuestion(kind=features.kind, rivals=(), covered=False)


def by_settings(route: Route) -> bool:
    """Whether the settings chose a route's tools, and not evidence or advice."""
    return route.covered and "rlar.routing." in route.reason


def alternatives(
    query: Query, snapshot: Snapshot, config: RoutingConfig, cluster: str, competence: Competence
) -> tuple[Option, ...]:
    """The tools that could score a single prompt, whatever its cluster's tool is: those that `decide` would take on
    advice; of rules that were not examined the first of each kind of check. Empty if the settings decide."""
    features = describe(query)
    fields = [(kind, _field(kind, query, snapshot, config, cluster, competence)) for kind, _ in features.kinds]
    if any(field.preferred for _, field in fields):
        return ()
    found = []
    for _, field in fields:
        rules = [one for one in field.candidates if _unexamined(one)]
        found += [one for one in field.candidates if one not in rules[1:]]
    if features.verifiable and any(not one.tool.opinion for one in found):
        found = [one for one in found if not one.tool.opinion]
    ranked = sorted({one.tool.digest: one for one in found}.values(), key=lambda one: (-one.belief.low, one.place))
    return tuple(map(_option, ranked[:OPTIONS]))


def _rivals(
    field: _Field, kind: Kind, config: RoutingConfig, cluster: str, competence: Competence
) -> tuple[_Candidate, ...]:
    """The first one by evidence, and those that may well be better, the likeliest first; none if evidence decides."""
    group = field.candidates if kind is Kind.OPEN else field.checks or field.models
    if len(group) < 2 or (config.mixtures and field.models == group and competence.blend(kind, cluster)):
        return ()
    best = _best(group, config.alike)

    def here(one: _Candidate) -> Belief:
        return competence.believe(one.tool, kind, cluster, here=True)

    low, order = here(best).low, _unexamined(best)  # the order of rules is their makers'
    rivals = [one for one in group if one is not best and here(one).high >= low and not (order and _unexamined(one))]
    rivals.sort(key=lambda one: (-one.belief.low, one.place))
    return (best, *rivals[: OPTIONS - 1]) if rivals else ()


def _may_lead(advised: _Candidate, best: _Candidate, kind: Kind, cluster: str, competence: Competence) -> bool:
    """Whether a tool that was advised may stand before the first one by evidence: if that is not far behind."""
    mine, other = (competence.believe(one.tool, kind, cluster, here=True) for one in (advised, best))
    return other.mean - mine.mean <= DOUBT * math.hypot(mine.deviation, other.deviation)


def _unexamined(one: _Candidate) -> bool:
    return one.tool.kind == "rule" and not one.belief.known


def _option(one: _Candidate) -> Option:
    return Option(
        name=one.tool.name,
        digest=one.tool.digest,
        sort=one.tool.kind,
        about=one.tool.description,
        known=one.belief.source,
    )


def _single(
    query: Query,
    snapshot: Snapshot,
    config: RoutingConfig,
    features: Features,
    cluster: str,
    competence: Competence,
) -> tuple[Kind, _Chosen] | None:
    """What was advised for a single prompt, if it may be."""
    ruling = competence.ruling(query.key)
    if ruling is None or ruling.tool not in {
        one.digest for one in alternatives(query, snapshot, config, cluster, competence)
    }:
        return None
    tool = next(tool for tool in snapshot.tools if tool.digest == ruling.tool)
    kind = next(kind for kind, _ in features.kinds if kind in tool.scope.kinds)
    return kind, _Chosen((_part(tool),), f"{tool.name} as {ruling.by} advised for this prompt ({ruling.why})")


# --- Routes -----------------------------------------------------------------------------------------------------------


def _part(tool: ToolSpec) -> RoutePart:
    return RoutePart(tool=tool.name, digest=tool.digest)


def _route(
    scorers: tuple[RoutePart, ...],
    gates: list[ToolSpec],
    snapshot: Snapshot,
    cluster: str,
    *,
    kind: Kind,
    covered: bool,
    reason: str,
) -> Route:
    parts = [RoutePart(tool=gate.name, digest=gate.digest, weight=0.0, gate=True) for gate in gates]
    return Route(
        parts=(*parts, *scorers),
        reason=reason,
        kind=kind,
        covered=covered,
        snapshot=snapshot.version,
        cluster=cluster,
    )


def _declared_route(
    query: Query, snapshot: Snapshot, config: RoutingConfig, split: Split, features: Features, cluster: str
) -> Route | None:
    """The first route of the settings whose conditions the query meets."""
    for name, declared in config.routes.items():
        if (
            declared.split in (None, split)
            and (not declared.kinds or features.kind in declared.kinds)
            and (not declared.clusters or cluster.startswith(declared.clusters))
            and all(query.extra.get(column) is not None for column in declared.columns)
            and (route := _declared(name, declared, query, features.kind, snapshot))
        ):
            return replace(route, cluster=cluster)
    return None


def _declared(name: str, declared: RouteConfig, query: Query, kind: Kind, snapshot: Snapshot) -> Route | None:
    """The route that the settings declare; None if one of its parts has no live tool for the query."""
    live = {tool.name: tool for tool in snapshot.tools}
    parts = []
    for part in declared.parts:
        names = [named for named in _names(part) if named in live]
        fitting = [named for named in names if kind in live[named].scope.kinds and live[named].fits(query)]
        chosen = next(iter(names if isinstance(part.tool, str) else fitting), None)
        if chosen is None:
            return None
        parts.append(
            RoutePart(
                tool=chosen,
                digest=live[chosen].digest,
                weight=0.0 if part.gate else part.knots[0][1],
                schedule=() if part.gate or len(part.knots) == 1 else part.knots,
                gate=part.gate,
                threshold=part.threshold,
            )
        )
    reason = f"{kind.value}: declared as rlar.routing.routes.{name}"
    return Route(parts=tuple(parts), reason=reason, kind=kind, covered=True, snapshot=snapshot.version)


def _names(part: PartConfig) -> tuple[str, ...]:
    return (part.tool,) if isinstance(part.tool, str) else part.tool


class RouteCache:
    """A router that decides once per (snapshot, split, query); callers that come meanwhile wait for that decision. See
    `verl_rlar.once` for what is kept."""

    def __init__(self, router: Router, *, size: int = 100_000) -> None:
        self._router = router
        self._routes: Once[tuple[str, str, str], Route] = Once(size)

    async def route(self, query: Query, snapshot: Snapshot, split: Split = "train") -> Route:
        key = (snapshot.version, split, query.key)
        return await self._routes.get(key, lambda: self._router.route(query, snapshot, split))

    def put(self, query_key: str, snapshot: Snapshot, split: Split, route: Route) -> None:
        """Keeps a route that was decided elsewhere."""
        self._routes.put((snapshot.version, split, query_key), route)
