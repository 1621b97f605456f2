# SPDX-License-Identifier: Apache-2.0
"""`StepMetrics`: what was scored since the last step, in the numbers that go into verl's own logger.

    rlar/responses                            how many were scored in training
    rlar/{scored,failed,abstained,hacked}     shares of them
    rlar/{mean,std}                           of the values of scored ones, in [0, 1]
    rlar/uncovered                            share of responses that no tool fits: unscored, or scored by the fallback
    rlar/same_groups                          share of groups all of whose values are the same: they have no gradient
    rlar/{p50_s,p95_s,most_s}                 seconds from a response until its score
    rlar/tool/NAME/...                        the same of each tool's calls; ``share``: per response
    rlar/tool/NAME/{tokens,dollars}           what its calls took, where the ledger says it: rubrics, reward models
    rlar/kind/KIND/...                        the same by what the query was taken for
    rlar/cluster/ID/...                       the same by its cluster, of the `CLUSTERS` largest ones
    rlar/shadow/NAME/...                      the same of tools without a say
    rlar/{live,shadows,changes,boundary_s}    tools at the step, events before it, seconds that it waited for them
    rlar/{served,swaps}                       reward models that the step has, and those of them that are new or gone
    rlar/alarms, rlar/alarms/SIGN             alarms before it, see `verl_rlar.watch`
    rlar/agents/{calls,tokens,dollars,wait_s} what agents and rubrics have spent since the run began (`verl_rlar.purse`)

Names are the ledger's: tools by name, kinds and outcomes by their values.

Guarantees: every number is finite, and what nothing can be said about is left out; it costs some microseconds per
response, and memory for those of one step.

Not covered: a service that was killed begins to count anew; the ledger has everything.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import fmean, pstdev
from typing import get_args

from verl_rlar.config import Sign
from verl_rlar.ledger import Row, ShadowRow
from verl_rlar.purse import Spent, cost_of
from verl_rlar.signs import flat
from verl_rlar.types import Outcome, ToolScore

CLUSTERS = 32
"""Most clusters of a step with numbers of their own."""


@dataclass
class _Tally:
    """Calls of one sort."""

    outcomes: Counter[Outcome] = field(default_factory=Counter)
    values: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    costs: list[tuple[float, float]] = field(default_factory=list)
    """Tokens and dollars."""

    def saw(self, outcome: Outcome, value: float | None, seconds: float) -> None:
        self.outcomes[outcome] += 1
        self.seconds.append(seconds)
        if value is not None:
            self.values.append(value)

    @property
    def calls(self) -> int:
        return len(self.seconds)

    def numbers(self, name: str) -> dict[str, float]:
        found = {f"{name}/{outcome.value}": self.outcomes[outcome] / self.calls for outcome in Outcome}
        if self.values:
            found |= {f"{name}/mean": fmean(self.values), f"{name}/std": pstdev(self.values)}
        if self.costs:
            found |= {f"{name}/tokens": sum(t for t, _ in self.costs), f"{name}/dollars": sum(d for _, d in self.costs)}
        ordered = sorted(self.seconds)
        at = lambda share: ordered[min(len(ordered) - 1, int(share * len(ordered)))]  # noqa: E731
        return found | {f"{name}/p50_s": at(0.5), f"{name}/p95_s": at(0.95), f"{name}/most_s": ordered[-1]}


class StepMetrics:
    """See the module. From one thread at a time."""

    def __init__(self) -> None:
        self.changes = 0
        """Events that changed what is live."""
        self.boundary_s = 0.0
        """Seconds for which steps waited for their tools."""
        self.alarms: Counter[str] = Counter()
        """Alarms by sign."""
        self._clear()

    def _clear(self) -> None:
        self.changes, self.boundary_s, self.alarms = 0, 0.0, Counter()
        self._all = _Tally()
        self._uncovered = 0
        self._tools: defaultdict[str, _Tally] = defaultdict(_Tally)
        self._kinds: defaultdict[str, _Tally] = defaultdict(_Tally)
        self._clusters: defaultdict[str, _Tally] = defaultdict(_Tally)
        self._shadows: defaultdict[str, _Tally] = defaultdict(_Tally)
        self._groups: defaultdict[str, list[float]] = defaultdict(list)

    def saw(self, row: Row) -> None:
        """Takes note of a training response."""
        score = row.score
        self._uncovered += not row.route.covered and bool(row.route.snapshot)  # without one, nobody was asked
        tallies = [self._all, self._kinds[row.route.kind.value]]
        if row.route.cluster:
            tallies.append(self._clusters[row.route.cluster])
        for tally in tallies:
            tally.saw(score.outcome, score.value, row.seconds)
        if score.value is not None:
            self._groups[row.sample.uid].append(score.value)
        self._parts(self._tools, score.parts)

    def saw_shadows(self, rows: Iterable[ShadowRow]) -> None:
        """Takes note of what tools without a say gave."""
        self._parts(self._shadows, (row.score for row in rows))

    def take(self) -> dict[str, float]:
        """The numbers since the last call."""
        found = {"rlar/changes": float(self.changes), "rlar/boundary_s": self.boundary_s}
        found |= {f"rlar/alarms/{sign}": float(self.alarms[sign]) for sign in get_args(Sign)}
        found["rlar/alarms"] = float(self.alarms.total())
        if total := self._all.calls:
            found |= {"rlar/responses": float(total), "rlar/uncovered": self._uncovered / total}
            found |= self._all.numbers("rlar")
            largest = sorted(self._clusters.items(), key=lambda item: (-item[1].calls, item[0]))[:CLUSTERS]
            sorts = {"tool": self._tools, "kind": self._kinds, "cluster": dict(largest), "shadow": self._shadows}
            for place, tallies in sorts.items():
                for name, tally in sorted(tallies.items()):
                    found[f"rlar/{place}/{name}/share"] = tally.calls / total
                    found |= tally.numbers(f"rlar/{place}/{name}")
        if groups := [values for values in self._groups.values() if len(values) > 1]:
            found["rlar/same_groups"] = sum(map(flat, groups)) / len(groups)
        self._clear()
        return found

    @staticmethod
    def _parts(tallies: defaultdict[str, _Tally], parts: Iterable[ToolScore]) -> None:
        for part in parts:
            tally = tallies[part.tool]
            tally.saw(part.outcome, part.value, part.seconds)
            if cost := cost_of(part.details):
                tally.costs.append(cost)


def of_account(account: Mapping[str, Spent]) -> dict[str, float]:
    """What agents and rubrics have spent, as numbers; by task it is `verl_rlar.purse.account_of`."""
    spent = account.values()
    return {
        "rlar/agents/calls": float(sum(one.calls for one in spent)),
        "rlar/agents/tokens": float(sum(one.tokens for one in spent)),
        "rlar/agents/dollars": sum((one.dollars for one in spent), 0.0),
        "rlar/agents/wait_s": sum((one.seconds for one in spent), 0.0),
    }
