# SPDX-License-Identifier: Apache-2.0
"""What is an LLM's advice worth while labelled answers are few? On the scorers and problems of RewardMATH.

    python recipes/selection/thin.py [--json]                 # the LLM's answers come from a recording
    python recipes/selection/thin.py --url http://127.0.0.1:8000/v1 --model NAME [--record FILE --note WHO]

`run.py` gives every way of choosing nine tenths of the labels, and then no question is left open. Here a cluster of
alike prompts is new: of each, 0, 2, 4 ... items are labelled, and no tool has a card. Each way says which tool judges
the items that are never labelled:

- *random*, *metadata only*, *oracle*: as in `run.py`;
- *best single*: the best one by the official rule on these labels; of equals the first in the library;
- *router*: `verl_rlar.router.decide` with the evidence of these labels;
- *router, LLM*: the same with an LLM's advice, which was asked for with these labels;
- *router, old advice*: the same with the advice that was asked for before there was a label: what a training goes by
  whose evidence grows after it has asked;
- *router, poor advice*: the same with the advice to take what has the best published figure: when does it fade?

The LLM is asked as in a training: `verl_rlar.adviser` sees the prompts come by and asks in a process of its own, over a
real socket, with the same prompt files; what comes back counts from the next step on. It is shown the tools' names,
`ABOUT` each of them, how often each was right so far, and eight problems; no answer, and no score.

The shipped recording (`CASSETTE`) was written by a large language model in a session, before it had looked at any
score; it wrote `ABOUT`, too. It may know what was published of these models, RewardMATH itself included. Questions with
fewer labels were answered first: those without a label are untouched by any figure, at the later ones it had seen what
the earlier ones show. From two labels on it drew the figures that it was shown towards what it had expected of each
tool before it saw any. Its tokens are counted by length, four characters each.

`REPEATS` times the labelled items and the library's order are drawn anew. Intervals: 95 %, bootstrap over repeats and
items, differences paired. Tokens are what the endpoint says, shared among all items. A tool that was chosen for a
cluster judges alone: there are too few labels for mixtures. Where no tool is competent an item counts as if all answers
had the same score.
The exit code is 0 only if for no number of labels the advice makes the router worse beyond doubt.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from endpoint import Endpoint
from pools import Pool, official, rewardmath
from rich.console import Console
from rich.progress import track
from rich.table import Table
from run import DATA, PUBLISHED, query_of

from verl_rlar.advice import Advice, Ruling
from verl_rlar.adviser import Adviser
from verl_rlar.agents.cassette import Cassette, Header, Player, Recorder, Tape
from verl_rlar.agents.prompting import prompt_files
from verl_rlar.clusters import Clusters
from verl_rlar.competence import Competence, Labelled, gather
from verl_rlar.config import RlarConfig, parse
from verl_rlar.errors import CassetteError, DataError
from verl_rlar.mixture import LEAST, Choice
from verl_rlar.router import decide
from verl_rlar.types import Kind, Route, Scope, Snapshot, ToolSpec

CASSETTE = Path(__file__).resolve().parents[2] / "tests" / "cassettes" / "advise_rewardmath.jsonl.gz"
TASK = "advice on 18 scorers of RewardMATH"
LABELS = (0, 2, 4, 8, 16, 32)
REPEATS = 5
BOOTSTRAPS = 2000
LLM, OLD, POOR = "router, LLM", "router, old advice", "router, poor advice"
ABOUT = {
    "ArmoRM": "Reward model RLHFlow/ArmoRM-Llama3-8B-v0.1: 8 B parameters; 19 objectives, weighed by a gate.",
    "Eurus-RM": "Reward model openbmb/Eurus-RM-7b: 7 B parameters; preferences on reasoning, chat and safety.",
    "beaver": "Reward model PKU-Alignment/beaver-7b-v2.0-reward: 7 B parameters; helpfulness in chats about safety.",
    "chatgpt": "GPT-3.5 Turbo, asked to rate an answer.",
    "gpt4": "GPT-4, asked to rate an answer.",
    "gpt4o": "GPT-4o, asked to rate an answer.",
    "grm_gemma": "Reward model Ray2333/GRM-Gemma-2B-sftreg: 2 B parameters; chat, regularised by its text loss.",
    "grm_llama3": "Reward model Ray2333/GRM-llama3-8B-sftreg: 8 B parameters; chat, regularised by its text loss.",
    "internlm2": "Reward model internlm/internlm2-7b-reward: 7 B parameters; 2.4 M preferences of dialogue, writing, "
    "code and mathematics, in English and Chinese.",
    "internlm2_20b": "Reward model internlm/internlm2-20b-reward: 20 B parameters; 2.4 M preferences of dialogue, "
    "writing, code and mathematics, in English and Chinese.",
    "llama3_70B": "Llama 3 70B Instruct, asked to rate an answer.",
    "llama3_8B": "Llama 3 8B Instruct, asked to rate an answer.",
    "oasst-rm": "Reward model OpenAssistant/oasst-rm-2.1-pythia-1.4b-epoch-2.5: 1.4 B parameters; chat.",
    "opus": "Claude 3 Opus, asked to rate an answer.",
    "prometheus_7B": "Evaluator prometheus-eval/prometheus-7b-v2.0: 7 B parameters; rates an answer by a rubric.",
    "prometheus_8x7B": "Evaluator prometheus-eval/prometheus-8x7b-v2.0: 47 B parameters; rates an answer by a rubric.",
    "skywork_llama3": "Reward model Skywork/Skywork-Reward-Llama-3.1-8B: 8 B parameters; 80,000 curated preferences.",
    "sonnet-3-5": "Claude 3.5 Sonnet, asked to rate an answer.",
}
"""By scorer, what a person would write who brings it in; the published figure is added (`PUBLISHED`)."""


def spec(tool: str) -> ToolSpec:
    about = f"{ABOUT.get(tool, '')} RewardBench, Reasoning: right on {PUBLISHED[tool]:.1%} of the pairs."
    return ToolSpec(
        name="".join(char if char.isalnum() else "_" for char in tool.lower()),
        kind="reward_model",
        target=tool,
        scope=Scope(kinds=frozenset({Kind.OPEN}), needs_reference=False),
        description=about.strip(),
    )


@dataclass(frozen=True)
class Draw:
    """One repeat: the library in its order, and the items in that in which they are labelled."""

    number: int
    snapshot: Snapshot
    order: Mapping[str, Sequence[int]]
    """By cluster, places of its items."""

    def labelled(self, count: int) -> list[int]:
        """A small cluster has half of its items labelled at most."""
        return [n for items in self.order.values() for n in items[: min(count, len(items) // 2)]]


def draws(pool: Pool, clusters: Sequence[str], repeats: int) -> list[Draw]:
    made = []
    for repeat in range(repeats):
        rng = np.random.default_rng(repeat)
        order: dict[str, list[int]] = defaultdict(list)
        for n in rng.permutation(len(pool.items)):
            order[clusters[n]].append(int(n))
        tools = [spec(pool.tools[n]) for n in rng.permutation(len(pool.tools))]
        made.append(Draw(repeat, Snapshot(tools=tuple(tools)), order))
    return made


def known(pool: Pool, draw: Draw, clusters: Sequence[str], count: int) -> Competence:
    """What the labels tell. Raw scores become ranks among an item's answers: without a calibration nothing else of
    them can be compared, and nothing else counts here."""
    found = []
    for n in draw.labelled(count):
        item, values = pool.items[n], [dict[str, float]() for _ in pool.items[n].right]
        for tool in draw.snapshot.tools:
            said = item.scores[tool.target]
            for value, one in zip(values, said, strict=True):
                value[tool.digest] = sum(other < one for other in said) / len(said)
        choice = Choice(values=tuple(values), right=item.right, cluster=clusters[n])
        found.append(Labelled(kind=Kind.OPEN, choice=choice))
    return gather(draw.snapshot.tools, {}, found)


def routes(
    pool: Pool,
    draw: Draw,
    clusters: Sequence[str],
    about: Competence,
    config: RlarConfig,
    advice: Sequence[Ruling] = (),
) -> list[Route]:
    about = replace(about, rulings=tuple(advice))
    return [
        decide(query_of(item), draw.snapshot, config.routing, cluster=cluster, competence=about)
        for item, cluster in zip(pool.items, clusters, strict=True)
    ]


async def asked(
    pool: Pool, draw: Draw, clusters: Clusters, about: Competence, config: RlarConfig
) -> tuple[tuple[Ruling, ...], dict[str, float]]:
    """What the LLM advises in a training whose first step visits every item; and the adviser's numbers."""
    advice = Advice()
    adviser = Adviser(config, clusters, advice, lambda snapshot: replace(about, rulings=advice.of(snapshot.advice)))
    ids = [clusters.of(query_of(item)) for item in pool.items]
    for item, route in zip(pool.items, routes(pool, draw, ids, about, config), strict=True):
        adviser.saw(query_of(item), route)
    adviser.begin_step(1, draw.snapshot, may_change=True)
    await adviser.idle()
    adviser.begin_step(2, draw.snapshot, may_change=True)
    return advice.rulings, adviser.metrics()


def best_published(snapshot: Snapshot) -> ToolSpec:
    return max(snapshot.tools, key=lambda tool: PUBLISHED[tool.target])


def poor(draw: Draw, clusters: Sequence[str]) -> tuple[Ruling, ...]:
    """The advice of somebody who goes by published figures and never changes his mind."""
    tool = best_published(draw.snapshot).digest
    return tuple(
        Ruling(cluster=cluster, tool=tool, why="the best published figure", by="somebody", question="")
        for cluster in dict.fromkeys(clusters)
    )


@dataclass
class Result:
    """What came out."""

    repeats: int
    by_way: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)
    """By way and number of labels: per repeat and item, the official rule's result; NaN: it may be labelled."""
    tokens: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    """Per item and number of labels."""
    faults: int = 0
    """Questions that the LLM did not answer."""
    advised: dict[tuple[str, int], float] = field(default_factory=lambda: defaultdict(float))
    """By way and number of labels, the items whose route names advice as its reason, of all
    repeats."""


async def compare(
    pool: Pool, labels: Sequence[int], repeats: int, ask: Mapping[str, Any], at_once: int, console: Console
) -> Result:
    """All ways on all draws. The LLM is asked number of labels by number of labels.

    Args:
        pool: The tools and items.
        labels: Numbers of labelled items, rising, the first one 0.
        repeats: Number of draws.
        ask: The settings of `rlar.agents`.
        at_once: Draws for which it is asked at the same time.
        console: Where progress is shown.
    """
    clusters, gate = Clusters(), asyncio.Semaphore(at_once)
    ids = [clusters.of(query_of(item)) for item in pool.items]
    made = draws(pool, ids, repeats)
    result = Result(repeats)
    old: dict[int, tuple[Ruling, ...]] = {}

    async def one(draw: Draw, count: int) -> None:
        about = known(pool, draw, ids, count)
        async with gate:
            with tempfile.TemporaryDirectory() as folder:
                config = parse({"run_dir": folder, "agents": {"retries": 0, **ask}, "advice": {"odd": 0}})
                rulings, numbers = await asked(pool, draw, clusters, about, config)
        old.setdefault(draw.number, rulings)
        result.tokens[count] += numbers["rlar/advice/tokens"] / len(pool.items) / repeats
        result.faults += int(numbers["rlar/advice/faults"])
        advice = {"router": (), LLM: rulings, OLD: old[draw.number], POOR: poor(draw, ids)}
        by_way = {name: routes(pool, draw, ids, about, config, said) for name, said in advice.items()}
        judge(pool, draw, count, set(draw.labelled(max(labels))), by_way, result)

    for count in track(labels, "asking and choosing", console=console, transient=True):
        await asyncio.gather(*(one(draw, count) for draw in made))
    return result


def judge(
    pool: Pool, draw: Draw, count: int, kept: set[int], by_way: Mapping[str, Sequence[Route]], result: Result
) -> None:
    """Counts how all ways do on a draw's items but those that are kept for labels."""
    labelled = [pool.items[n] for n in draw.labelled(count)]
    names = [tool.target for tool in draw.snapshot.tools]
    single = max(names, key=lambda name: sum(official(item.scores[name], item.right) for item in labelled))
    published = best_published(draw.snapshot).target
    for n, item in enumerate(pool.items):
        if n in kept:
            continue
        each = {tool: official(item.scores[tool], item.right) for tool in names}
        said = {"random": sum(each.values()) / len(each), "oracle": max(each.values())}
        said |= {"best single": each[single], "metadata only": each[published]}
        for name, made in by_way.items():
            parts = made[n].parts
            said[name] = each[draw.snapshot.tool(parts[0].tool).target] if parts else sum(item.right) / len(item.right)
            result.advised[name, count] += "advised" in made[n].reason
        for name, value in said.items():
            table = result.by_way.setdefault((name, count), np.full((result.repeats, len(pool.items)), np.nan))
            table[draw.number, n] = value


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % of the means where repeats and items are drawn with replacement."""
    rng = np.random.default_rng(0)
    repeats, items = values.shape
    means = []
    for _ in range(BOOTSTRAPS):
        drawn = values[rng.integers(0, repeats, repeats)][:, rng.integers(0, items, items)]
        means.append(np.nanmean(drawn))
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def report(result: Result, labels: Sequence[int], console: Console) -> dict[str, float]:
    """Prints the table; the figures by name and number of labels."""
    names = ("random", "metadata only", "best single", "router", POOR, OLD, LLM, "oracle")
    table = Table("labelled items", *map(str, labels), box=None)
    figures: dict[str, float] = {}

    def key(name: str, count: int) -> str:
        return f"{name.replace(', ', '_').replace(' ', '_').lower()}_{count}"

    def share(name: str, count: int) -> float:
        return result.advised[name, count] / int(np.isfinite(result.by_way[name, count]).sum())

    for name in names:
        means = [float(np.nanmean(result.by_way[name, count])) for count in labels]
        figures |= {key(name, count): mean for count, mean in zip(labels, means, strict=True)}
        table.add_row(name, *(f"{mean:.3f}" for mean in means))
    for name in (LLM, OLD, POOR):
        shown = []
        for count in labels:
            gain = result.by_way[name, count] - result.by_way["router", count]
            low, high = interval(gain)
            mean = float(np.nanmean(gain))
            figures |= {f"{key(name, count)}_gain": mean, f"{key(name, count)}_gain_low": low}
            figures[f"{key(name, count)}_gain_high"] = high
            shown.append(f"{mean:+.3f} ({low:+.3f} to {high:+.3f})")
        table.add_row(f"{name}: over router", *shown)
        table.add_row(f"{name}: items that follow it", *(f"{share(name, count):.0%}" for count in labels))
    table.add_row("tokens per item", *(f"{result.tokens[count]:.1f}" for count in labels))
    figures |= {f"tokens_per_item_{count}": result.tokens[count] for count in labels}
    console.print(f"{result.repeats} repeats; official rule, on items that are never labelled", highlight=False)
    console.print(table)
    figures["unanswered"] = result.faults
    if result.faults:
        console.print(f"Questions that the LLM did not answer: {result.faults}", highlight=False)
    return figures


@contextmanager
def voice(arguments: argparse.Namespace) -> Iterator[tuple[Endpoint, dict[str, Any]]]:
    """The endpoint that answers, and the settings of `rlar.agents` under which it is asked.

    Raises:
        CassetteError: The recording cannot be read, or was made with other prompt files.
    """
    with ExitStack() as stack:
        if not arguments.url:
            cassette = Cassette.read(arguments.cassette)
            cassette.check(prompt_files())
            header, player = cassette.header, Player(cassette, side="agent", peer="judge", base=cassette.header.llm)
            yield stack.enter_context(Endpoint(header.llm, player)), {"model": header.model}
            return
        transport = None
        if arguments.record:
            header = Header(
                recorded=datetime.now(timezone.utc).isoformat(),
                note=arguments.note,
                llm=arguments.url,
                model=arguments.model,
                hub="",
                task=TASK,
                settings={},
                seed="",
                prompts=prompt_files("adviser"),
            )
            tape = stack.enter_context(Tape(arguments.record, header))
            transport = Recorder(tape.add, side="agent", peer="judge", base=arguments.url)
        live = {"model": arguments.model, "timeout_s": arguments.timeout + 5}
        yield stack.enter_context(Endpoint(arguments.url, transport, arguments.timeout)), live


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", default=",".join(map(str, LABELS)), help="numbers of labelled items, with commas")
    parser.add_argument("--repeats", type=int, default=REPEATS, help=f"how often they are drawn (default {REPEATS})")
    parser.add_argument("--cassette", type=Path, default=CASSETTE, help="the recording that answers")
    parser.add_argument("--url", help="an OpenAI-compatible endpoint that answers, in place of it")
    parser.add_argument("--model", default="", help="its model; a key stands in the environment (RLAR_LLM_API_KEY)")
    parser.add_argument("--timeout", type=float, default=300.0, help="longest wait for an answer, seconds")
    parser.add_argument("--record", type=Path, help="keep its answers in this recording")
    parser.add_argument("--note", default="", help="who or what answered, for the recording")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    arguments = parser.parse_args()
    labels = sorted({0, *map(int, arguments.labels.split(","))})
    if labels[-1] >= LEAST:
        parser.error(f"--labels: from {LEAST} on the router learns mixtures; see run.py")
    if arguments.url and not arguments.model:
        parser.error("--url needs --model")
    logging.getLogger("verl_rlar").setLevel(logging.ERROR)
    try:
        pool = rewardmath(DATA)
        with voice(arguments) as (endpoint, settings):
            ask = {"url": endpoint.url, **settings}
            at_once = arguments.repeats if arguments.url else 1
            result = asyncio.run(compare(pool, labels, arguments.repeats, ask, at_once, Console(stderr=True)))
            if endpoint.faults:
                raise CassetteError(endpoint.faults[0])
    except (DataError, CassetteError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    figures = report(result, labels, Console(width=170))
    worst = min(figures[f"router_llm_{count}_gain_high"] for count in labels)
    if arguments.json:
        goals = {"worst_gain_high": ">= 0"}
        figures["worst_gain_high"] = worst
        print(json.dumps({"name": "selection, few labels", "figures": figures, "goals": goals, "ok": worst >= 0}))
    return 0 if worst >= 0 else 1


if __name__ == "__main__":
    sys.exit(main())
