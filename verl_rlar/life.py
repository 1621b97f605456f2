# SPDX-License-Identifier: Apache-2.0
"""The life of a tool in a run: from the shadow to a say, and out again when it goes wrong.

    proposed -> examined -> shadow -> live -> retired, rolled back or quarantined

A tool that passed its exam scores live responses in the *shadow*, without a say. `Life` watches what it gives there,
beside what the tools in place give, and decides at a step boundary:

- it becomes *live* when it has scored enough, its calls do not fail, its values differ within groups about as often as
  those of the tools in place do, it ranks the responses of a group more like them than chance, and its canaries hold;
- it is *quarantined* when its calls fail, a canary flips, or it ranks against the tools in place;
- it is *retired* when it could not be judged within ``shadow_patience`` steps.

A live tool that came by an exam is watched on, over the latest ``window`` steps. It is *rolled back* (the tool whose
place it took comes back) when its calls fail; when too many raw scores lie outside the range of its exam; or when, in
its first steps, it gives one and the same value to everybody. A *canary* is an answer whose score is known: when it
gets another one, the tool is quarantined, a rule of ours like any other, and the reason names the steps in between.

Guarantees: decisions depend on what was scored only, so a service that was killed and comes back (`Life.restore`)
decides alike; each has its reason, with the figures in it. A tool that is trusted (built in, or the user's own) is
taken out for a flipped canary only: what else happens to it is seen in its outcomes (``rlar.scoring.max_unscored``).

Not covered: agreement is with the tools in place, right or wrong; where there are none (nothing is said, or a fallback
says it that no evidence is for), a tool becomes live on its exam, its variance and its canaries alone. A policy that
has learned all of a task gives a sound tool no variance either: after its first steps that is no fault.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from verl_rlar.config import LifeConfig
from verl_rlar.library import EventKind, LibraryView
from verl_rlar.signs import EQUAL, flat, ranked_alike, spread
from verl_rlar.types import Outcome, ToolSpec

IN_PLACE = ""
"""Stands for what the route gave as a whole, where a digest stands otherwise."""

Values = dict[str, dict[int, float]]
"""Of one group: by digest, then by session."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """A change of what is live, for `Library.append`."""

    event: EventKind
    digest: str
    why: str
    replaces: str | None = None
    restores: str | None = None


@dataclass
class _Step:
    """What was seen at one step."""

    calls: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """By digest: outcomes, and ``outside`` for raw scores outside the range of the exam."""
    groups: dict[str, Values] = field(default_factory=lambda: defaultdict(lambda: defaultdict(dict)))
    """By uid."""
    query: dict[str, str] = field(default_factory=dict)
    """Key of the query, by uid."""


class Life:
    """See the module. From one thread at a time.

    Args:
        config: When a tool gets a say, and when it loses it.
        baseline: By digest and canary, the value that it must have, as far as it is known.
    """

    def __init__(self, config: LifeConfig, baseline: Mapping[tuple[str, str], float] | None = None) -> None:
        self._config = config
        self._wanted = dict(baseline or {})
        self._steps: dict[int, _Step] = {}
        self._specs: dict[str, ToolSpec] = {}
        self._flipped: dict[str, tuple[int, str]] = {}
        """By digest: the earliest step at which a canary flipped; which one, and how."""
        self._held: dict[str, set[int]] = defaultdict(set)
        """By digest: the steps at which a canary held."""

    # --- What is seen ---

    def knows(self, specs: Iterable[ToolSpec]) -> None:
        """Tells it about tools, before their scores."""
        self._specs.update((spec.digest, spec) for spec in specs)

    def restore(
        self,
        responses: Iterable[tuple[Any, ...]],
        shadows: Iterable[tuple[Any, ...]],
        canaries: Iterable[tuple[Any, ...]],
    ) -> None:
        """Sees again what `Ledger.watched_since` has kept."""
        for step, uid, session, query, value, parts, _, covered, *_ in responses:
            given = value if covered else None
            self.saw_response(step=step, uid=uid, session=session, query=query, value=given, parts=json.loads(parts))
        for step, uid, session, digest, outcome, raw, value in shadows:
            part = {"digest": digest, "outcome": outcome, "raw": raw, "value": value}
            self.saw_shadow(step=step, uid=uid, session=session, part=part)
        for step, digest, canary, outcome, value in canaries:
            self.saw_canary(step=step, digest=digest, canary=canary, outcome=outcome, value=value)

    def saw_response(
        self, *, step: int, uid: str, session: int, query: str, value: float | None, parts: Iterable[Mapping[str, Any]]
    ) -> None:
        """A response of the training was scored.

        Args:
            step: Step of the training.
            uid: Its group.
            session: Its index in the group.
            query: Key of its query.
            value: What the route gave, in [0, 1]; None if it is unscored, or if no tool fits and a fallback gave it.
            parts: What each tool gave: ``digest``, ``outcome``, ``raw``, ``value``.
        """
        seen = self._step(step)
        seen.query[uid] = query
        if value is not None:
            seen.groups[uid][IN_PLACE][session] = value
        for part in parts:
            self._saw(seen, uid, session, part)

    def saw_shadow(self, *, step: int, uid: str, session: int, part: Mapping[str, Any]) -> None:
        """A tool in the shadow has scored a response; `part` as in `saw_response`."""
        self._saw(self._step(step), uid, session, part)

    def _saw(self, seen: _Step, uid: str, session: int, part: Mapping[str, Any]) -> None:
        digest = part["digest"]
        seen.calls[digest][Outcome(part["outcome"]).value] += 1
        learned = self._specs[digest].calibration if digest in self._specs else None
        if part["raw"] is not None and learned is not None:
            seen.calls[digest]["outside"] += not learned.covers(part["raw"])
        if part["value"] is not None:
            seen.groups[uid][digest][session] = part["value"]

    def expect(self, digest: str, canary: str, value: float) -> None:
        """Says what a canary must get."""
        self._wanted[digest, canary] = value

    def wanted(self, digest: str, canary: str) -> float | None:
        """What a canary must get; None if that is not known yet."""
        return self._wanted.get((digest, canary))

    def saw_canary(self, *, step: int, digest: str, canary: str, outcome: str, value: float | None) -> None:
        """A canary was scored. What one gets at first is what it must get from then on, unless `expect` has said so.

        A call that failed is no flip: it says nothing about the answer, and failures are counted by themselves.
        """
        if outcome == Outcome.FAILED.value:
            return
        key = (digest, canary)
        if key not in self._wanted:
            if value is not None:
                self._wanted[key] = value
            return
        wanted = self._wanted[key]
        if value is None or abs(value - wanted) > self._config.tolerance:
            got = "nothing" if value is None else f"{value:.3g}"
            flip = step, f"canary {canary} got {got} at step {step}, and must get {wanted:.3g}"
            self._flipped[digest] = min(flip, self._flipped.get(digest, flip))
        else:
            self._held[digest].add(step)

    def flipped(self) -> dict[str, str]:
        """By digest: which canary flipped, and how."""
        return {digest: how for digest, (_, how) in self._flipped.items()}

    def _step(self, step: int) -> _Step:
        seen = self._steps.setdefault(step, _Step())
        kept = max(self._config.window, self._config.shadow_patience) + 2
        if len(self._steps) > kept:
            del self._steps[min(self._steps)]
        return seen

    def in_use(self, step: int) -> frozenset[str]:
        """Digests of the tools that scored in the window before a step."""
        return frozenset(digest for at in self._window(step, self._config.window) for digest in self._steps[at].calls)

    # --- What is decided ---

    def decide(self, step: int, library: LibraryView) -> list[Decision]:
        """What changes at a step, by what was seen before it. The same again until the library says that it is so.

        Args:
            step: The step that is about to begin; its tools are not handed out yet.
            library: How things stand.
        """
        decisions: list[Decision] = []
        snapshot = LibraryView.snapshot(library, step)  # the writer's own would hand the step out
        named = {tool.name: tool.digest for tool in snapshot.tools}
        for digest, standing in library.standings(step).items():
            spec = library.spec(digest)
            if standing.event not in ("shadow", "live"):
                self._flipped.pop(digest, None)  # if it comes back, it is as good as new
            elif digest in self._flipped:
                decisions.append(Decision(event="quarantined", digest=digest, why=self._affected(digest, step)))
            elif standing.event == "shadow":
                decisions += self._judged(spec, standing.step, step, named.get(spec.name))
            elif spec.kind != "rule":
                decisions += self._watched(spec, standing.step, step, library)
        return decisions

    def _affected(self, digest: str, step: int) -> str:
        flip, how = self._flipped[digest]
        held = max((at for at in self._held[digest] if at < flip), default=None)  # at that step others may have held
        since = f"steps {held + 1} to {step - 1}" if held is not None else f"all steps up to {step - 1}"
        return f"{how}; its scores of {since} are in doubt (`rlar rescore`)"

    def _window(self, step: int, size: int) -> list[int]:
        return [at for at in sorted(self._steps) if step - size <= at < step]

    def _judged(self, spec: ToolSpec, since: int, step: int, live: str | None) -> list[Decision]:
        """What becomes of a tool in the shadow."""
        config, digest = self._config, spec.digest
        steps = [self._steps[at] for at in sorted(self._steps) if since <= at < step]
        seen = _Seen(steps, digest)

        def decided(event: EventKind, why: str) -> list[Decision]:
            return [Decision(event=event, digest=digest, why=why, replaces=live if event == "live" else None)]

        if fault := self._unhealthy(seen):
            return decided("quarantined", f"in the shadow {fault}")
        waits = ""
        if len([s for s in steps if digest in s.calls]) < config.shadow_steps or seen.calls < config.shadow_responses:
            waits = f"{seen.calls} responses in {len(steps)} steps, and it takes {config.shadow_responses} in "
            waits += f"{config.shadow_steps}"
        elif seen.pairs >= config.min_pairs and seen.agreement < config.min_agreement:
            return decided(
                "quarantined",
                f"in the shadow it ranks {seen.agreement:.2f} of {seen.pairs} pairs like the tools in place, and must "
                f"at least {config.min_agreement:g}",
            )
        elif not seen.varied or seen.varied < config.min_varied * seen.expected_varied:
            waits = (
                f"its values differ in {seen.varied} of {seen.groups} groups, those of the tools in place in "
                f"{seen.place_varied}"
            )
        if not waits:
            agrees = f"ranks {seen.agreement:.2f} of {seen.pairs} pairs like the tools in place"
            if seen.pairs < config.min_pairs:
                agrees = "the tools in place say too little to compare with"
            return decided(
                "live",
                f"{seen.calls} responses in the shadow since step {since}: {seen.failed} failed, its values differ in "
                f"{seen.varied} of {seen.groups} groups, {agrees}",
            )
        if step - since > config.shadow_patience:
            return decided("retired", f"it cannot be judged after {step - since} steps in the shadow: {waits}")
        return []

    def _watched(self, spec: ToolSpec, since: int, step: int, library: LibraryView) -> list[Decision]:
        """What becomes of a live tool that came by an exam."""
        config, digest = self._config, spec.digest
        steps = [self._steps[at] for at in self._window(step, config.window) if at >= since]
        seen = _Seen(steps, digest)
        fault = self._unhealthy(seen)
        young = step - since <= config.shadow_patience
        if not fault and young and len(seen.queries) >= config.saturated_queries and seen.spread <= EQUAL:
            fault = f"it gave {seen.some_value:.3g} to all {seen.calls} responses to {len(seen.queries)} prompts"
        if not fault:
            return []
        before = library.predecessor(digest, step)
        why = f"in the steps {max(since, step - config.window)} to {step - 1} {fault}"
        return [Decision(event="rolled_back", digest=digest, why=why, restores=before)]

    def _unhealthy(self, seen: _Seen) -> str:
        config = self._config
        if seen.calls < config.min_calls:
            return ""
        if seen.failed > config.max_failed * seen.calls:
            return f"{seen.failed} of {seen.calls} calls failed"
        if seen.outside > config.max_outside * seen.calls:
            return f"{seen.outside} of {seen.calls} raw scores lie outside the range of its exam"
        return ""


class _Seen:
    """What a tool did in some steps, in figures."""

    def __init__(self, steps: Iterable[_Step], digest: str) -> None:
        counts: Counter[str] = Counter()
        self.groups = self.varied = self.place_groups = self.place_varied = self.pairs = 0
        self.queries: set[str] = set()
        alike = 0
        values: list[float] = []
        for step in steps:
            counts.update(step.calls.get(digest, {}))
            for uid, group in step.groups.items():
                ours, place = group.get(digest, {}), group.get(IN_PLACE, {})
                values += ours.values()
                if ours:
                    self.queries.add(step.query.get(uid, uid))
                if len(ours) < 2:
                    continue
                self.groups += 1
                self.varied += not flat(ours.values())
                self.place_groups += len(place) > 1
                self.place_varied += not flat(place.values())
                pairs, same = ranked_alike(ours, place)
                self.pairs += pairs
                alike += same
        outcomes = {outcome.value for outcome in Outcome}
        self.calls = sum(count for name, count in counts.items() if name in outcomes)
        self.failed, self.outside = counts[Outcome.FAILED.value], counts["outside"]
        self.agreement = alike / self.pairs if self.pairs else 0.0
        self.expected_varied = self.place_varied if self.place_groups else self.groups
        self.spread = spread(values)
        self.some_value = values[0] if values else 0.0
