# SPDX-License-Identifier: Apache-2.0
"""Watches a run: signs of a broken, a cheated or an outgrown reward, per tool and cluster of prompts, while it trains.

At each step boundary the steps that are over are counted up into `Tally`s, one per tool and cluster, and the tallies of
the latest ``rlar.watch.window`` steps are judged:

    failed, abstained    calls that failed; calls in which the tool said that it is not its business
    outside              raw scores outside the range of the tool's exam
    flat                 groups to all of whose responses it gave the same
    saturated            its mean is all but 1, or all but 0
    disagree             responses that another tool, of the route or in the shadow, sees otherwise
    length, format       correlation of its value with a response's length, or formatting, within groups
    copied               prompts whose best response is nearly the one that was paid for another prompt
    canary               an answer whose score is known got another one (`verl_rlar.life` finds it)
    new_cluster          a kind of prompt that was not there before has a share of the prompts
    drift                the clusters' shares are others than before: a G-test, and the stability index for its size

Each of them is an `Alarm` with its figures, its step, tool, cluster and examples' ids, and has an action in
``rlar.watch.actions``, which the service takes at the boundary, never in a step (I1).

Guarantees: alarms are a function of what was scored before the step, so a service that was killed, and a run that goes
on from a checkpoint, raise the same ones: tallies and alarms are in the ledger, and read from there (`Watch.restore`).
The same alarm comes again after ``again_after`` steps at the earliest. Counts are of prompts where responses of one
group would count the same thing many times. All but taking notes of a response is done at the boundary.

Not covered: a sign is no proof; what else it may mean stands in `verl_rlar.report.alarms`. A response that comes after
its step was counted up (more steps late than the trainer said) is left out. Without stored texts
(``rlar.ledger.store_responses``), a step during which the service was killed has no lengths, formats or copies.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from verl_rlar.config import Action, Sign, WatchConfig
from verl_rlar.signs import DISAGREE, PAID, flat, from_moments, g_test, likeness, marks, moments, psi
from verl_rlar.types import Kind, Outcome, ToolSpec

EXAMPLES = 4
"""Most groups that an alarm names."""
ALL = ""
"""Stands for all tools, where a digest stands otherwise, or for all clusters."""


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """Something to look at."""

    sign: Sign
    step: int
    """Before which step it was raised."""
    action: Action
    tool: str
    """Name of the tool; empty if it is about none."""
    digest: str
    cluster: str
    """Id of the cluster; empty if it is about all."""
    kind: Kind | None
    """What the cluster's prompts are taken for; of a drift, those whose share grew most. None: it is not known."""
    text: str
    """What was seen, with the figures, for a person. It quotes no text of the data."""
    figures: Mapping[str, float]
    examples: tuple[str, ...] = ()
    """Ids of groups in the ledger (``uid``)."""

    def as_row(self) -> tuple[int, str, str, str, str, str, str, str, str]:
        """For `Ledger.add_alarms`."""
        about = (self.step, self.sign, self.digest, self.cluster, self.tool, self.action, self.text)
        return (*about, json.dumps(dict(self.figures)), json.dumps(self.examples))


@dataclass
class Tally:
    """What was seen of one tool in one cluster, in one step or several; sums, so that tallies can be added."""

    counts: Counter[str] = field(default_factory=Counter)
    """``calls`` and the outcomes; ``raw`` and ``outside``; ``values``; ``groups`` and ``flat``; ``compared`` and
    ``disagree``."""
    total: float = 0.0
    """Sum of the values."""
    length: list[float] = field(default_factory=lambda: [0.0] * 4)
    """`verl_rlar.signs.moments` of length and value, about each group's means."""
    format: list[float] = field(default_factory=lambda: [0.0] * 4)
    """... of formatting and value."""
    best: list[tuple[str, str, list[int]]] = field(default_factory=list)
    """Of each group whose best response was paid and is long enough: uid, query, and `verl_rlar.signs.likeness`."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """Groups, by sign."""

    def add(self, other: Tally) -> None:
        """Takes up what another one has seen."""
        self.counts.update(other.counts)
        self.total += other.total
        self.length = [mine + theirs for mine, theirs in zip(self.length, other.length, strict=True)]
        self.format = [mine + theirs for mine, theirs in zip(self.format, other.format, strict=True)]
        self.best += other.best
        for sign, uids in other.examples.items():
            for uid in uids:
                self.example(sign, uid)

    def example(self, sign: str, uid: str) -> None:
        """Keeps a group as an example of a sign, if there are few."""
        kept = self.examples.setdefault(sign, [])
        if len(kept) < EXAMPLES and uid not in kept:
            kept.append(uid)

    def copies(self) -> list[str]:
        """Groups whose best response is nearly that of a group of another prompt."""
        queries: defaultdict[int, set[str]] = defaultdict(set)
        for _, query, bands in self.best:
            for band in bands:
                queries[band].add(query)
        return [uid for uid, _, bands in self.best if any(len(queries[band]) > 1 for band in bands)]

    def as_json(self) -> str:
        """For the ledger."""
        return json.dumps(vars(self))

    @classmethod
    def from_json(cls, text: str) -> Tally:
        """The inverse of `as_json`."""
        body = json.loads(text)
        best = [(uid, query, list(bands)) for uid, query, bands in body.pop("best")]
        return cls(counts=Counter(body.pop("counts")), best=best, **body)


Tallies = dict[tuple[str, str], Tally]
"""By digest and cluster. Of the digest `ALL`: the prompts of a cluster, whatever scored them: ``groups``,
``uncovered``."""


@dataclass
class _Response:
    text: str | None
    query: str
    parts: dict[str, Mapping[str, Any]]
    """By digest."""


@dataclass
class _Group:
    cluster: str = ""
    kind: Kind | None = None
    covered: bool = True
    responses: dict[int, _Response] = field(default_factory=dict)
    """By session."""
    shadows: dict[int, dict[str, Mapping[str, Any]]] = field(default_factory=dict)
    """By session and digest; they may come before the response."""

    def parts(self, session: int) -> dict[str, Mapping[str, Any]]:
        """What all tools gave for a response, by digest."""
        return {**self.shadows.get(session, {}), **self.responses[session].parts}


class Watch:
    """See the module. From one thread at a time.

    Args:
        config: What is watched for, and what is done about it.
    """

    def __init__(self, config: WatchConfig) -> None:
        self._config = config
        self._open: dict[int, dict[str, _Group]] = {}
        """Of steps that are not over: groups by uid."""
        self._steps: dict[int, Tallies] = {}
        """Of those that are, as far as they still matter."""
        self._first: dict[str, int] = {}
        """By cluster, the first step at which it was seen."""
        self._kinds: dict[str, Kind] = {}
        self._specs: dict[str, ToolSpec] = {}
        self._raised: dict[tuple[str, str, str], int] = {}
        """By sign, digest and cluster: the latest step before which it was raised."""
        self._drifted = -1
        """First step whose prompts count for the test of drift; those of earlier ones were before the latest one."""

    # --- What is seen ---

    def knows(self, specs: Iterable[ToolSpec]) -> None:
        """Tells it about tools, before their scores."""
        self._specs.update((spec.digest, spec) for spec in specs)

    def saw_response(
        self,
        *,
        step: int,
        uid: str,
        session: int,
        query: str,
        cluster: str,
        kind: Kind,
        covered: bool,
        parts: Iterable[Mapping[str, Any]],
        text: str | None,
    ) -> None:
        """A response of the training was scored.

        Args:
            step: Step of the training.
            uid: Its group.
            session: Its index in the group.
            query: Key of its query.
            cluster: Id of the query's cluster.
            kind: What the query was taken for.
            covered: Whether a tool fits it; else the fallback gave the value.
            parts: What each tool gave: ``digest``, ``outcome``, ``raw``, ``value``.
            text: The response; None: it is not known any more.
        """
        if step in self._steps:
            return
        group = self._open.setdefault(step, {}).setdefault(uid, _Group())
        group.cluster, group.kind, group.covered = cluster or kind.value, kind, covered
        group.responses[session] = _Response(
            text=text,
            query=query,
            parts={part["digest"]: part for part in parts},
        )

    def saw_shadow(self, *, step: int, uid: str, session: int, part: Mapping[str, Any]) -> None:
        """A tool in the shadow has scored a response; `part` as in `saw_response`."""
        if step not in self._steps:
            group = self._open.setdefault(step, {}).setdefault(uid, _Group())
            group.shadows.setdefault(session, {})[part["digest"]] = part

    def restore(
        self,
        tallies: Iterable[tuple[int, str, str, str]],
        clusters: Iterable[tuple[str, int]],
        alarms: Iterable[tuple[str, str, str, int]],
    ) -> None:
        """Forgets what it has seen, and takes up what the ledger has kept of the steps before; see `Ledger`.

        Args:
            tallies: Step, digest, cluster and tally of the steps that are over.
            clusters: Every cluster that was ever seen, and the first step at which it was.
            alarms: Sign, digest, cluster and step of what was raised.
        """
        self._open, self._steps, self._raised, self._drifted = {}, {}, {}, -1
        self._first = dict(clusters)
        for step, digest, cluster, tally in tallies:
            self._steps.setdefault(step, {})[digest, cluster] = Tally.from_json(tally)
        for sign, digest, cluster, step in sorted(alarms, key=lambda alarm: alarm[3]):
            self._note(sign, digest, cluster, step)

    # --- What becomes of it ---

    @property
    def reach(self) -> int:
        """How many steps back it looks."""
        return max(self._config.window, self._config.drift_before + self._config.drift_now)

    def close(self, step: int) -> Iterator[tuple[int, Tallies]]:
        """Counts up the steps before one, whose responses are all there; yields what the ledger should keep."""
        for done in sorted(at for at in self._open if at < step):
            groups = self._open.pop(done)
            if done in self._steps:
                continue
            tallies: defaultdict[tuple[str, str], Tally] = defaultdict(Tally)
            for uid, group in groups.items():
                if group.responses:
                    self._count(tallies, uid, group)
            self._steps[done] = dict(tallies)
            for digest, cluster in tallies:
                if digest == ALL:
                    self._first[cluster] = min(done, self._first.get(cluster, done))
            yield done, self._steps[done]
        for old in sorted(self._steps)[: -self.reach]:
            del self._steps[old]

    def _count(self, tallies: defaultdict[tuple[str, str], Tally], uid: str, group: _Group) -> None:
        whole = tallies[ALL, group.cluster]
        kind = (group.kind or Kind.OPEN).value
        whole.counts.update({"groups": 1, "uncovered": int(not group.covered), f"kind {kind}": 1})
        whole.example("new_cluster", uid)
        given = {session: group.parts(session) for session in sorted(group.responses)}
        digests = {digest for parts in given.values() for digest in parts}
        for digest in sorted(digests):
            tally = tallies[digest, group.cluster]
            spec = self._specs.get(digest)
            learned = spec.calibration if spec else None
            values: dict[int, float] = {}
            for session, parts in given.items():
                part = parts.get(digest)
                if part is None:
                    continue
                outcome = Outcome(part["outcome"]).value
                tally.counts.update(("calls", outcome))
                if outcome in ("failed", "abstained"):
                    tally.example(outcome, uid)
                if part["raw"] is not None and learned is not None:
                    tally.counts.update(raw=1, outside=int(not learned.covers(part["raw"])))
                    if not learned.covers(part["raw"]):
                        tally.example("outside", uid)
                if part["value"] is not None:
                    values[session] = part["value"]
            if spec is None or not spec.gate:  # a gate says the same to everybody who keeps to the form
                self._values(tally, uid, group, digest, values)

    def _values(self, tally: Tally, uid: str, group: _Group, digest: str, values: Mapping[int, float]) -> None:
        tally.total += sum(values.values())
        tally.counts["values"] += len(values)
        for session, value in values.items():
            others = [
                part["value"]
                for other, part in group.parts(session).items()
                if other != digest and part["value"] is not None and not self._is_gate(other)
            ]
            if others and group.covered:
                opposed = any(abs(value - other) >= DISAGREE for other in others)
                tally.counts.update(compared=1, disagree=int(opposed))
                if opposed:
                    tally.example("disagree", uid)
        if len(values) < 2:
            return
        tally.counts.update(groups=1, flat=int(flat(values.values())))
        if flat(values.values()):
            tally.example("flat", uid)
        else:
            texts = [(text, value) for session, value in values.items() if (text := group.responses[session].text)]
            for sums, size in ((tally.length, len), (tally.format, marks)):
                more = moments((float(size(text)), value) for text, value in texts)
                sums[:] = [mine + theirs for mine, theirs in zip(sums, more, strict=True)]
            tally.example("varied", uid)
        best = max(values, key=lambda session: (values[session], -session))
        if values[best] >= PAID and (bands := likeness(group.responses[best].text or "")):
            tally.best.append((uid, group.responses[best].query[:12], list(bands)))

    def _is_gate(self, digest: str) -> bool:
        spec = self._specs.get(digest)
        return spec is not None and spec.gate

    def judge(self, step: int, flipped: Mapping[str, str] | None = None) -> list[Alarm]:
        """What is to be looked at before a step; each of them is not raised again for a while.

        Args:
            step: The step that is about to begin; those before it are counted up.
            flipped: By digest of a tool in use: which canary flipped, and how.
        """
        window: defaultdict[tuple[str, str], Tally] = defaultdict(Tally)
        for at in sorted(self._steps)[-self._config.window :]:
            if at < step:
                for key, tally in self._steps[at].items():
                    window[key].add(tally)
        for (digest, cluster), tally in window.items():
            if digest == ALL:
                self._kinds[cluster] = Kind(max(_kinds(tally), key=lambda name: (_kinds(tally)[name], name)))
        found = list(self._of_shares(step))
        for (digest, cluster), tally in sorted(window.items()):
            if digest != ALL:
                found += self._of_tool(step, digest, cluster, tally)
        for digest, how in sorted((flipped or {}).items()):
            found.append(self._alarm("canary", step, digest, ALL, how, {}, ()))
        new = [alarm for alarm in found if self._is_new(alarm)]
        for alarm in new:
            self._note(alarm.sign, alarm.digest, alarm.cluster, step)
        return new

    def _is_new(self, alarm: Alarm) -> bool:
        before = self._raised.get((alarm.sign, alarm.digest, alarm.cluster))
        return before is None or alarm.step - before >= self._config.again_after or alarm.sign == "drift"

    def _note(self, sign: str, digest: str, cluster: str, step: int) -> None:
        self._raised[sign, digest, cluster] = step
        if sign == "drift":
            self._drifted = step - 1

    def _alarm(
        self,
        sign: Sign,
        step: int,
        digest: str,
        cluster: str,
        text: str,
        figures: Mapping[str, float],
        examples: Iterable[str],
    ) -> Alarm:
        spec = self._specs.get(digest)
        return Alarm(
            sign=sign,
            step=step,
            action=getattr(self._config.actions, sign),
            tool=spec.name if spec else digest,
            digest=digest,
            cluster=cluster,
            kind=self._kinds.get(cluster),
            text=text,
            figures={name: round(value, 6) for name, value in figures.items()},
            examples=tuple(examples)[:EXAMPLES],
        )

    def _of_tool(self, step: int, digest: str, cluster: str, tally: Tally) -> Iterator[Alarm]:
        config, counts = self._config, tally.counts

        def say(sign: Sign, text: str, examples: Iterable[str] | None = None, **figures: float) -> Alarm:
            shown = tally.examples.get(sign, ()) if examples is None else examples
            return self._alarm(sign, step, digest, cluster, text, figures, shown)

        def share(name: str, of: str) -> float:
            return counts[name] / counts[of] if counts[of] >= config.min_responses else 0.0

        if (seen := share("failed", "calls")) > config.failed:
            text = f"{counts['failed']} of {counts['calls']} calls failed"
            yield say("failed", text, share=seen, calls=counts["calls"])
        if (seen := share("abstained", "calls")) > config.abstained:
            text = f"it abstained from {counts['abstained']} of {counts['calls']} responses"
            yield say("abstained", text, share=seen, calls=counts["calls"])
        if (seen := share("outside", "raw")) > config.outside:
            text = f"{counts['outside']} of {counts['raw']} raw scores lie outside the range of its exam"
            yield say("outside", text, share=seen, calls=counts["raw"])
        if (seen := share("disagree", "compared")) > config.disagree:
            opposed = f"{counts['disagree']} of {counts['compared']}"
            text = f"another tool sees {opposed} responses otherwise, by {DISAGREE:g} or more"
            yield say("disagree", text, share=seen, compared=counts["compared"])
        if counts["groups"] >= config.min_groups and counts["flat"] > config.flat * counts["groups"]:
            text = f"it gave the same to all responses in {counts['flat']} of {counts['groups']} groups"
            yield say("flat", text, share=counts["flat"] / counts["groups"], groups=counts["groups"])
        scored = counts["values"]
        if scored >= config.min_responses and not config.saturated < tally.total / scored < 1 - config.saturated:
            mean = tally.total / scored
            text = f"its mean over {scored} responses is {mean:.3f}: learned, out of reach, or broken?"
            yield say("saturated", text, tally.examples.get("flat", ()), mean=mean, responses=scored)
        correlated: tuple[tuple[Sign, list[float], float, tuple[str, str]], ...] = (
            ("length", tally.length, config.length, ("longer", "shorter")),
            ("format", tally.format, config.format, ("more formatted", "plainer")),
        )
        for sign, (count, *sums), limit, words in correlated:
            r = from_moments(*sums)
            if r is not None and count >= config.min_correlated and abs(r) - 2 / math.sqrt(count) > limit:
                text = (
                    f"{words[r < 0]} responses are paid more: within groups, {sign} and its value correlate by "
                    f"{r:+.2f} ({count:.0f} responses)"
                )
                yield say(sign, text, tally.examples.get("varied", ()), r=r, responses=count)
        if len(tally.best) >= config.min_groups:
            copies = tally.copies()
            if len(copies) > config.copied * len(tally.best):
                text = (
                    f"in {len(copies)} of {len(tally.best)} groups the best response is nearly the one that was paid "
                    "for another prompt"
                )
                yield say("copied", text, copies, share=len(copies) / len(tally.best), groups=len(tally.best))

    def _of_shares(self, step: int) -> Iterator[Alarm]:
        seen = [at for at in sorted(self._steps) if at < step]
        yield from self._of_new_clusters(step, seen)
        yield from self._of_drift(step, [at for at in seen if at >= self._drifted])

    def _of_new_clusters(self, step: int, seen: list[int]) -> Iterator[Alarm]:
        config, now = self._config, seen[-self._config.drift_now :]
        prompts = _prompts(self._steps[at] for at in now)
        total = sum(prompts.values())
        for cluster, count in prompts.most_common():
            if count < max(config.new_prompts, config.new_share * total):
                return
            first = self._first.get(cluster, step)
            before = sum(_prompts(self._steps[at] for at in seen if at < first).values())
            if before < config.min_before or first < seen[-config.window :][0]:
                continue
            whole = Tally()
            for at in now:
                whole.add(self._steps[at].get((ALL, cluster), Tally()))
            uncovered = whole.counts["uncovered"]
            text = (
                f"{count} of the {total} prompts of the steps {now[0]} to {now[-1]} are of a cluster that was not "
                f"there before step {first}; no tool fits {uncovered} of them"
            )
            figures = {"prompts": count, "share": count / total, "uncovered": uncovered, "first": first}
            examples = whole.examples.get("new_cluster", ())
            alarm = self._alarm("new_cluster", step, ALL, cluster, text, figures, examples)
            needless = alarm.action == "re_acquire" and not uncovered
            yield replace(alarm, action="log") if needless else alarm

    def _of_drift(self, step: int, seen: list[int]) -> Iterator[Alarm]:
        config = self._config
        now, before = seen[-config.drift_now :], seen[: -config.drift_now][-config.drift_before :]
        old, new = (_prompts(self._steps[at] for at in steps) for steps in (before, now))
        all_old, all_new = sum(old.values()), sum(new.values())
        if all_old < config.min_before or all_new < config.min_groups:
            return
        p, size = g_test(old, new), psi(old, new)
        if p >= config.drift_p or size <= config.drift_psi:
            return
        shift = {one: new[one] / all_new - old[one] / all_old for one in {*old, *new}}
        moved = sorted(shift, key=lambda one: (-abs(shift[one]), one))[:3]
        words = ", ".join(f"{one} {old[one] / all_old:.0%} -> {new[one] / all_new:.0%}" for one in moved)
        text = (
            f"the clusters' shares of the steps {now[0]} to {now[-1]} are others than those of the steps {before[0]} "
            f"to {before[-1]}: {words} (p = {p:.1e}, stability index {size:.2f})"
        )
        latest = self._steps[now[-1]]
        examples = [
            uid
            for one in moved
            if shift[one] > 0 and (ALL, one) in latest
            for uid in latest[ALL, one].examples.get("new_cluster", ())[:2]
        ]
        figures = {"p": p, "psi": size, "prompts": all_new, "before": all_old}
        grown = max(shift, key=lambda one: (shift[one], one))
        yield replace(self._alarm("drift", step, ALL, ALL, text, figures, examples), kind=self._kinds.get(grown))


def _kinds(tally: Tally) -> dict[str, int]:
    return {name.removeprefix("kind "): count for name, count in tally.counts.items() if name.startswith("kind ")}


def _prompts(steps: Iterable[Tallies]) -> Counter[str]:
    """Prompts by cluster."""
    found: Counter[str] = Counter()
    for tallies in steps:
        for (digest, cluster), tally in tallies.items():
            if digest == ALL:
                found[cluster] += tally.counts["groups"]
    return found
