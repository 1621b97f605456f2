# SPDX-License-Identifier: Apache-2.0
"""Which tool of a pool should judge which prompt? Ways of choosing, compared on saved scores of real reward models.

    python recipes/selection/run.py                       # 18 scorers on 240 problems of RewardMATH
    python recipes/selection/run.py --rewardbench2 FOLDER --prompts FILE --out results.json
    python recipes/selection/run.py --json                # prints one object last

FOLDER holds ``eval-set-scores`` of ``allenai/reward-bench-2-results``; see `pools.py` for its form.

Every way sees the labels of nine tenths of the items and judges the last tenth (ten folds, `REPEATS` times with other
folds; an item counts with its mean). On the nine tenths it may choose tools, learn calibrations, evidence and weights:

- *random*: any tool; *best single*: the best one by the official rule; *best per cluster*: for each cluster of prompts;
- *metadata only*: the one whose published figure for such tasks is the best, without a look at any label;
- *router*: `verl_rlar.router.decide`, with evidence and learned mixtures as in training; *router, one tool*: without
  mixtures; *calibrated mean*: all tools' calibrated values; *raw mean*: their scores as they are;
- *oracle*: for each item the tool that is right, if there is one: no way of choosing one tool can do better;
- *shuffled*: the router again, taught with labels that were dealt anew among the answers of each item.

An item counts by RewardBench 2's rule (right answer first; among several first ones its share), and by the paper's
(softmax above 0.5). Intervals: 95 %, bootstrap over items, differences paired. No LLM is asked: 0 tokens per item. A
training would ask one only where labelled answers leave open which tool is better; *left to an LLM* is the share of
items of which that is so. Where it is 0, the router with an LLM is the router; `thin.py` asks one where labels are few.
The exit code is 0 only if the router is above the best single tool by `GOAL`, with an interval that excludes 0.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pools import TIES, Item, Pool, leaderboard, official, rewardbench2, rewardmath, softmax_half
from rich.console import Console
from rich.progress import track
from rich.table import Table

from verl_rlar.calibration import Calibration, fit
from verl_rlar.clusters import Clusters
from verl_rlar.competence import Competence, Labelled, gather
from verl_rlar.config import RoutingConfig
from verl_rlar.errors import DataError
from verl_rlar.mixture import Choice, log_odds
from verl_rlar.router import decide, open_question
from verl_rlar.types import Kind, Message, Query, Route, Scope, Snapshot, ToolSpec

DATA = Path(__file__).resolve().parent.parent / "data" / "rewardmath_scores.jsonl.gz"
FOLDS = 10
REPEATS = 5
BOOTSTRAPS = 10_000
GOAL = 0.10
PUBLISHED = {
    "ArmoRM": 0.9735,
    "Eurus-RM": 0.8633,
    "beaver": 0.6887,
    "chatgpt": 0.5912,
    "gpt4": 0.8692,
    "gpt4o": 0.8661,
    "grm_gemma": 0.7684,
    "grm_llama3": 0.9229,
    "internlm2": 0.9453,
    "internlm2_20b": 0.9576,
    "llama3_70B": 0.7854,
    "llama3_8B": 0.6482,
    "oasst-rm": 0.7752,
    "opus": 0.7868,
    "prometheus_7B": 0.7648,
    "prometheus_8x7B": 0.774,
    "skywork_llama3": 0.962,
    "sonnet-3-5": 0.8469,
}
"""RewardBench 1, subset Reasoning, of AllenAI's leaderboard (ODC-BY), matched by name: what a scout could have read."""

Scores = tuple[float, ...]


@dataclass(frozen=True)
class Taught:
    """What was learned from the labels of some items."""

    calibrations: Mapping[str, Calibration]
    snapshot: Snapshot
    competence: Competence
    single: str
    by_cluster: Mapping[str, str]


def query_of(item: Item) -> Query:
    return Query(messages=(Message(role="user", content=item.prompt),))


def spec(tool: str, calibration: Calibration | None) -> ToolSpec:
    name = "".join(char if char.isalnum() else "_" for char in tool.lower())
    return ToolSpec(
        name=name,
        kind="reward_model",
        target=tool,
        scope=Scope(kinds=frozenset({Kind.OPEN}), needs_reference=False),
        description="Saved scores.",
        calibration=calibration,
    )


def teach(pool: Pool, items: Sequence[Item], right: Sequence[tuple[bool, ...]], clusters: Mapping[str, str]) -> Taught:
    """Learns from labelled items; `right` are the labels, which for the control are not the items' own."""
    maps: dict[str, Calibration] = {}
    for tool in pool.tools:
        try:
            said = [item.scores[tool] for item in items]
            maps[tool] = fit(
                [pair for one, good in zip(said, right, strict=True) for pair in zip(one, good, strict=True)]
            )
        except DataError:  # all scores are the same
            continue
    specs = {tool: spec(tool, maps[tool]) for tool in maps}
    snapshot = Snapshot(tools=tuple(specs.values()))
    results: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    labelled = []
    for item, good in zip(items, right, strict=True):
        cluster = clusters[item.id]
        for tool in pool.tools:
            results[cluster][tool] += official(item.scores[tool], good)
        values = [{specs[t].digest: maps[t](item.scores[t][n]) for t in specs} for n in range(len(good))]
        labelled.append(Labelled(kind=Kind.OPEN, choice=Choice(values=tuple(values), right=good, cluster=cluster)))

    def best(of: Sequence[str]) -> str:
        return max(pool.tools, key=lambda tool: sum(results[cluster][tool] for cluster in of))

    return Taught(
        calibrations=maps,
        snapshot=snapshot,
        competence=gather(snapshot.tools, {}, labelled),
        single=best(list(results)),
        by_cluster={cluster: best([cluster]) for cluster in results},
    )


def routed(item: Item, taught: Taught, cluster: str, config: RoutingConfig) -> tuple[Route, Scores]:
    """The router's decision, and what its tools say together. For ranks a mixture's weights need not sum to 1; for the
    softmax they are the log-odds' factors."""
    route = decide(query_of(item), taught.snapshot, config, cluster=cluster, competence=taught.competence)
    if len(route.parts) == 1:
        return route, item.scores[taught.snapshot.tool(route.parts[0].tool).target]
    said = []
    for n in range(len(item.right)):
        total = 0.0
        for part in route.parts:
            tool = taught.snapshot.tool(part.tool).target
            total += part.weight * log_odds(taught.calibrations[tool](item.scores[tool][n]))
        said.append(total)
    return route, tuple(said)


def ways(pool: Pool, published: Mapping[str, float]) -> dict[str, Callable[[Item, Taught, str], Scores]]:
    """The ways of choosing that give one score per answer."""
    mixed, alone = RoutingConfig(), RoutingConfig(mixtures=False)

    def mean_of(values: Sequence[Sequence[float]]) -> Scores:
        return tuple(sum(column) / len(column) for column in zip(*values, strict=True))

    def calibrated(item: Item, taught: Taught, cluster: str) -> Scores:
        values = mean_of([list(map(taught.calibrations[t], item.scores[t])) for t in taught.calibrations])
        return tuple(map(log_odds, values))

    made: dict[str, Callable[[Item, Taught, str], Scores]] = {
        "best single": lambda item, taught, cluster: item.scores[taught.single],
        "best per cluster": lambda item, taught, cluster: item.scores[taught.by_cluster.get(cluster, taught.single)],
        "router, one tool": lambda item, taught, cluster: routed(item, taught, cluster, alone)[1],
        "router": lambda item, taught, cluster: routed(item, taught, cluster, mixed)[1],
        "calibrated mean": calibrated,
        "raw mean": lambda item, taught, cluster: mean_of([item.scores[tool] for tool in pool.tools]),
    }
    if known := [tool for tool in pool.tools if tool in published]:
        choice = max(known, key=lambda tool: published[tool])
        made["metadata only"] = lambda item, taught, cluster: item.scores[choice]
    return made


@dataclass
class Outcome:
    """By way of choosing: per item, the mean over repeats."""

    official: dict[str, np.ndarray]
    softmax: dict[str, np.ndarray]
    said: dict[str, list[Scores]]
    """Of the last repeat."""
    routes: dict[str, int]
    left_open: float
    """Share of the items about whose routes an LLM would be asked."""


def compare(pool: Pool, published: Mapping[str, float], repeats: int, console: Console) -> Outcome:
    made = ways(pool, published)
    names = [*made, "random", "oracle", "shuffled"]
    result = Outcome(
        {n: np.zeros(len(pool.items)) for n in names}, {n: np.zeros(len(pool.items)) for n in names}, {}, {}, 0.0
    )
    routes: dict[str, int] = defaultdict(int)
    for repeat in track(range(repeats), "choosing", console=console, transient=True):
        rng = np.random.default_rng(repeat)
        order = rng.permutation(len(pool.items))
        result.said = {name: [() for _ in pool.items] for name in [*made, "shuffled"]}
        for fold in range(FOLDS):
            tested = sorted(order[fold::FOLDS])
            known = sorted(set(range(len(pool.items))) - set(tested))
            clusters = Clusters()  # the labels are not looked at, but neither are the prompts of the items to come
            ids = {pool.items[n].id: clusters.of(query_of(pool.items[n])) for n in (*known, *tested)}
            items = [pool.items[n] for n in known]
            taught = teach(pool, items, [item.right for item in items], ids)
            dealt = [tuple(bool(x) for x in rng.permutation(item.right)) for item in items]
            misled = teach(pool, items, dealt, ids)
            for n in tested:
                item = pool.items[n]
                cluster = ids[item.id]
                for name, way in made.items():
                    result.said[name][n] = way(item, taught, cluster)
                result.said["shuffled"][n] = made["router"](item, misled, cluster)
                routes[routed(item, taught, cluster, RoutingConfig())[0].name] += 1
                asked = open_question(query_of(item), taught.snapshot, RoutingConfig(), cluster, taught.competence)
                result.left_open += bool(asked and asked.rivals) / (len(pool.items) * repeats)
                for rule, into in ((official, result.official), (softmax_half, result.softmax)):
                    for name in result.said:
                        into[name][n] += rule(result.said[name][n], item.right) / repeats
                    each = [rule(item.scores[tool], item.right) for tool in pool.tools]
                    into["random"][n] += sum(each) / len(each) / repeats
                    into["oracle"][n] += max(each) / repeats
    result.routes = dict(routes)
    return result


def interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % of the means of samples drawn with replacement."""
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(BOOTSTRAPS)]
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rewardmath", type=Path, default=DATA, help="file of RewardMATH scores")
    parser.add_argument("--rewardbench2", type=Path, help="folder of RewardBench 2's saved scores, in place of it")
    parser.add_argument("--prompts", type=Path, help="RewardBench 2 itself: its prompts")
    parser.add_argument("--out", type=Path, help="write the router's results file in the leaderboard's form")
    parser.add_argument("--repeats", type=int, default=REPEATS, help=f"times ten folds (default {REPEATS})")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    arguments = parser.parse_args()
    console = Console(width=110)
    try:
        if arguments.rewardbench2:
            whole, published = rewardbench2(arguments.rewardbench2, arguments.prompts), {}
        else:
            whole, published = rewardmath(arguments.rewardmath), PUBLISHED
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    outcome = compare(whole, published, arguments.repeats, Console(stderr=True))
    plain = np.array([item.subset.lower() != TIES for item in whole.items])
    figures = report(whole, outcome, plain, console)
    if arguments.out:
        results = leaderboard("verl_rlar router", whole, outcome.said["router"])
        arguments.out.write_text(json.dumps(results, indent=4, sort_keys=True) + "\n")
    ok = figures["gain"] >= GOAL and figures["gain_low"] > 0
    goals = {"gain": f">= {GOAL:g}", "gain_low": "> 0"}
    if arguments.json:
        print(json.dumps({"name": "selection", "figures": figures, "goals": goals, "ok": ok}))
    return 0 if ok else 1


def report(pool: Pool, outcome: Outcome, plain: np.ndarray, console: Console) -> dict[str, Any]:
    """Prints the table; the figures by name."""
    single, oracle = outcome.official["best single"][plain], outcome.official["oracle"][plain]
    gap = float(oracle.mean() - single.mean())
    table = Table(
        "way", "rank first", "95 %", "over best single", "95 %, paired", "gap closed", "softmax > 0.5", box=None
    )
    figures: dict[str, Any] = {"items": int(plain.sum()), "tools": len(pool.tools), "tokens_per_item": 0}
    figures["left_to_an_llm"] = outcome.left_open
    for name, values in sorted(outcome.official.items(), key=lambda pair: pair[1][plain].mean()):
        mine = values[plain]
        (low, high), (worse, better) = interval(mine), interval(mine - single)
        closed = float(mine.mean() - single.mean()) / gap if gap > 0 else math.nan
        soft = float(outcome.softmax[name][plain].mean())
        table.add_row(
            name,
            f"{mine.mean():.3f}",
            f"{low:.3f} to {high:.3f}",
            f"{mine.mean() - single.mean():+.3f}",
            f"{worse:+.3f} to {better:+.3f}",
            f"{closed:.0%}",
            f"{soft:.3f}",
        )
        key = name.replace(", ", "_").replace(" ", "_")
        figures[key] = float(mine.mean())
        figures[f"{key}_softmax"] = soft
        figures[f"{key}_gap_closed"] = closed
        if name == "router":
            figures |= {"gain": float(mine.mean() - single.mean()), "gain_low": worse, "gain_high": better}
    console.print(f"{len(pool.tools)} tools, {int(plain.sum())} items, {FOLDS} folds", highlight=False)
    console.print(table)
    if not plain.all():
        ties = [item for item in pool.items if item.subset.lower() == TIES]
        for name in ("best single", "router"):
            said = [s for item, s in zip(pool.items, outcome.said[name], strict=True) if item.subset.lower() == TIES]
            figures[f"{name.replace(' ', '_')}_ties"] = leaderboard(
                name, Pool(tools=pool.tools, items=tuple(ties)), said
            )[ties[0].subset]
            console.print(f"Ties, {name}: {figures[f'{name.replace(chr(32), chr(95))}_ties']:.3f}", highlight=False)
    console.print(f"Left to an LLM: {outcome.left_open:.0%}", highlight=False)
    frequent = sorted(outcome.routes.items(), key=lambda pair: -pair[1])[:5]
    total = sum(outcome.routes.values())
    console.print("Most frequent routes:", *(f"  {count / total:.0%} {name}" for name, count in frequent), sep="\n")
    return figures


if __name__ == "__main__":
    sys.exit(main())
