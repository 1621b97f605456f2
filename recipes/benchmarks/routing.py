# SPDX-License-Identifier: Apache-2.0
"""Does every query go to the tool that verifies it, and does that pay? On all data sets of `recipes/data`.

    python recipes/benchmarks/routing.py [--answers 60] [--stream 20000] [--json]

*Routes*, in verl's columns. The right tool of each data set is written down here and nowhere in the package. Each row
is routed as it is, and once more with its data set renamed and through JSON, which may change nothing, not even the
reason or the cluster. The times are of whole decisions, cluster included. Open dialogue and preference prompts have no
tool: right is that they are reported as uncovered.

*Rewards*: labelled good and bad answers to up to ``--answers`` queries of each data set (0: none). Every tool of the
pool scores every answer, whatever it is for; a query counts with the share of its pairs of a good and a bad answer in
which the good one gets more, and where nothing is said, or the same of both, the pair counts half. Shown are the tool
that is best by itself (chosen in hindsight, which favours it), the router, and the oracle: for each query the tool that
is best there. The pool are the built-in rules; nothing in it can judge the preference data sets, so there all are at
chance, and figures are given with and without them. Answers: of real models with their labels (GSM8K, TED by human MQM,
at least 1 apart, IFBench, RM-Bench), else references against the exam's wrong answers. Code runs in boxes; where there
is no engine it is left out, and the goals for rewards are not judged. The interval is 95 %, bootstrap over queries,
paired.

*What an LLM costs*: a stream of ``--stream`` visits of prompts of all data sets (0: none), in steps of `PER_STEP`, with
a pool in which evidence is thin: beside the rules, verifiers and reward models for several kinds, each as good as the
next one. The clusters, the process that asks, the account of the tokens and the rulings are those of a training. The
LLM is a stand-in on the loopback: it always takes the last tool that it is offered, with an answer of usual length.
Tokens are counted by length, four characters each. A training's steps take much longer than an answer, so each step
waits for what was asked before it.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import os
import random
import re
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from verl_rlar.advice import Advice
from verl_rlar.adviser import Adviser
from verl_rlar.agents.counsel import TASK
from verl_rlar.clusters import Clusters
from verl_rlar.competence import Competence, Record
from verl_rlar.config import RoutingConfig, parse
from verl_rlar.dispatcher import Dispatcher
from verl_rlar.exam.generators import wrong_answers
from verl_rlar.library import builtin_snapshot
from verl_rlar.planning import gold_answer
from verl_rlar.purse import Purse
from verl_rlar.router import FeatureRouter
from verl_rlar.rows import query_of
from verl_rlar.streams import in_background, in_order
from verl_rlar.types import Kind, Outcome, Query, Route, RoutePart, Sample, Scope, Snapshot, ToolSpec

DATA = Path(__file__).resolve().parent.parent / "data"
GOALS = {
    "verifiable_to_right_tool": ">= 0.99",
    "changed_by_renaming": 0,
    "open_to_a_tool": 0,
    "gain_low": "> 0",
    "gap_closed": ">= 0.8",
    "milliseconds_per_decision_p50": "< 0.3",
    "llm_tokens_per_visit": "< 100",
    "llm_models_for_verifiers": 0,
}
WRONG = 4
"""Most wrong answers to a query that are made."""
UNCOVERED = "-"
PER_STEP = 64
"""Prompts of a step of the stream."""


def lines(name: str) -> Iterator[dict[str, Any]]:
    with (gzip.open if name.endswith(".gz") else open)(DATA / name, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def row(prompt: str, truth: str | None, **extra: Any) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": extra,
    }


def mixture() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Data set, its right tool, and a row, for every row there is."""
    for line in lines("gsm8k_test.jsonl.gz"):
        yield "gsm8k (steps, ####)", "final_answer", row(line["question"], line["answer"])
    for line in lines("gsm8k_train_short.jsonl.gz"):
        yield "gsm8k (number)", "final_answer", row(line["question"], line["answer"].rpartition("####")[2].strip())
    for line in lines("math500.jsonl.gz"):
        yield "math500", "final_answer", row(line["prompt"], line["answer"])
    for name in ("humaneval", "mbpp"):
        for line in lines(f"{name}.jsonl.gz"):
            extra = {"test": line["test"], "entry_point": line["entry_point"]}
            yield name, "unit_tests", row(line["prompt"], line.get("canonical_solution"), **extra)
    for line in lines("ifeval.jsonl.gz"):
        extra = {"instruction_id_list": line["instruction_id_list"], "kwargs": line["kwargs"]}
        yield "ifeval", "instruction_constraints", row(line["prompt"], "", **extra)
    for line in lines("ted_mqm_ende.jsonl.gz"):
        prompt = f"Translate the following text into German:\n{line['source']}"
        columns = {"source": line["source"], "source_lang": "en", "target_lang": "de"}
        yield "ted (columns)", "translation", row(prompt, line["reference"], **columns)
        yield "ted (prompt only)", "translation", row(prompt, line["reference"])
    for line in lines("mt_bench_questions.jsonl"):
        yield "mt_bench", UNCOVERED, row(line["turns"][0], None)
    for line in lines("ifbench_preferences.jsonl.gz"):
        yield "preference prompts", UNCOVERED, row(line["prompt"], None)


async def route_all(rows: list[tuple[str, str, dict[str, Any]]]) -> tuple[list[Route], list[Route], list[float]]:
    """The route of each row as it is, of each row renamed and through JSON, and milliseconds of each decision."""
    snapshot = builtin_snapshot()
    order = random.Random(0).sample(range(len(rows)), len(rows))  # as a mixture comes

    async def decided(queries: list[Query]) -> tuple[list[Route], list[float]]:
        router = FeatureRouter(RoutingConfig(), clusters=Clusters())
        routes: dict[int, Route] = {}
        times = []
        for n in order:
            _ = queries[n].key  # known before in training: whoever asks looks into a cache by it
            start = time.perf_counter()
            routes[n] = await router.route(queries[n], snapshot)
            times.append(1000 * (time.perf_counter() - start))
        return [routes[n] for n in range(len(queries))], times

    routes, times = await decided([query_of({**columns, "data_source": name}) for name, _, columns in rows])
    renamed = [query_of(json.loads(json.dumps({**columns, "data_source": "gsm8k"}))) for _, _, columns in rows]
    return routes, (await decided(renamed))[0], times


# --- What an LLM costs ------------------------------------------------------------------------------------------------


class StandIn(BaseHTTPRequestHandler):
    """An endpoint that takes the last tool of each question."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        said = asked["messages"][-1]["content"]
        tools = re.findall(r"^\d+\. `(\w+)`, a ", said if isinstance(said, str) else said[0]["text"], re.MULTILINE)
        why = "Such prompts ask for one thing that can be told right or wrong by itself, which is what this tool does."
        answer = {"name": "questions of one sort", "tool": tools[-1] if tools else None, "why": why, "elsewhere": []}
        message = {"role": "assistant", "content": json.dumps(answer)}
        body = json.dumps({"choices": [{"index": 0, "message": message}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def thin_pool() -> tuple[Snapshot, Competence]:
    """The rules, and tools of which exams say nearly the same."""
    tools, records = list(builtin_snapshot().tools), []
    kinds = (Kind.MATH, Kind.SHORT_TEXT, Kind.TRANSLATION, Kind.CONSTRAINTS, Kind.UNIT_TESTS)
    wanted = [("verifier", (kind,), 0.97 - n / 100) for kind in kinds for n in range(2)]
    wanted += [("reward_model", (*kinds, Kind.OPEN), 0.85 - n / 100) for n in range(4)]
    for number, (sort, of, share) in enumerate(wanted):
        about = "Looks at whether the response does what the prompt asks for, by a method of its own. " * 4
        name = f"{of[-1].value}_{sort}_{number}"
        scope = Scope(kinds=frozenset(of), needs_reference=False)
        spec = ToolSpec(name=name, kind=sort, target=name, scope=scope, description=about, boxed=sort == "verifier")
        tools.append(spec)
        records += [Record(digest=spec.digest, kind=kind, prompts=100, right=100 * share, seconds=0.1) for kind in of]
    return Snapshot(tools=tuple(tools)), Competence(records=tuple(records))


async def stream(rows: list[tuple[str, str, dict[str, Any]]], visits: int, console: Console) -> dict[str, float]:
    """What it costs to have an LLM asked about the routes of a training, by the account of its tokens."""
    queries = [query_of(columns) for _, _, columns in rows]
    tools, known = thin_pool()
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    times, models, advised, rng = [], 0, 0, random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        config = parse({"run_dir": folder, "agents": {"url": url, "model": "stand-in"}})
        clusters, advice = Clusters(Path(folder) / "clusters.jsonl"), Advice(Path(folder) / "advice.jsonl")
        taught: dict[str, Competence] = {}

        def competence(snapshot: Snapshot) -> Competence:
            if snapshot.advice not in taught:
                taught[snapshot.advice] = replace(known, rulings=advice.of(snapshot.advice))
            return taught[snapshot.advice]

        adviser = Adviser(config, clusters, advice, competence)
        router = FeatureRouter(config.routing, competence, clusters)
        progress = track(range(-(-visits // PER_STEP)), "routing", console=Console(stderr=True), transient=True)
        for step in progress:
            adviser.begin_step(step, advice.on(tools, step), may_change=True)
            await adviser.idle()
            snapshot = advice.on(tools, step)
            for query in rng.choices(queries, k=min(PER_STEP, visits - step * PER_STEP)):
                _ = query.key
                start = time.perf_counter()
                route = await router.route(query, snapshot)
                times.append(1000 * (time.perf_counter() - start))
                adviser.saw(query, route)
                advised += " advised for this " in route.reason
                by_model = tools.tool(route.parts[0].tool).kind == "reward_model" if route.parts else False
                models += by_model and route.kind is not Kind.OPEN
        spent = Purse(Path(folder) / "agents", TASK, config.agents).spent(TASK)
        server.shutdown()
        server.server_close()
        console.print(f"{visits:,} visits, {len(clusters)} clusters: {spent.calls} calls of the LLM", highlight=False)
        return {
            "llm_visits": visits,
            "llm_calls": spent.calls,
            "llm_tokens": spent.tokens,
            "llm_tokens_per_visit": spent.tokens / visits,
            "llm_visits_by_its_advice": advised / visits,
            "llm_models_for_verifiers": models,
            "llm_milliseconds_per_decision_p50": float(np.percentile(times, 50)),
        }


# --- Rewards ----------------------------------------------------------------------------------------------------------

Labelled = tuple[Query, list[str], list[str]]
"""A query, good answers, bad answers."""


def made(columns: dict[str, Any], kind: Kind, good: str | None = None) -> Labelled | None:
    """A reference against the exam's wrong answers to it."""
    query = query_of(columns)
    right = good if good is not None else gold_answer(query, kind)
    if right is None:
        return None
    wrong = list(dict.fromkeys(one.response for one in wrong_answers(query, kind, right, random.Random(query.key))))
    return query, [right], random.Random(query.key).sample(wrong, min(WRONG, len(wrong)))


def labelled(*, code: bool) -> dict[str, list[Labelled]]:
    """By data set, queries with labelled answers."""
    found: dict[str, list[Labelled | None]] = defaultdict(list)
    answers: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in lines("gsm8k_model_solutions.jsonl.gz"):
        answers[line["question"]].append(line)
    for question, given in answers.items():
        truth = given[0]["ground_truth"].rpartition("A:")[2].strip()
        good, bad = ([one["response"] for one in given if one["is_correct"] is right] for right in (True, False))
        found["gsm8k, models"].append((query_of(row(question, truth)), good, bad))
    for line in lines("math500.jsonl.gz"):
        found["math500"].append(made(row(line["prompt"], line["answer"]), Kind.MATH))
    for line in lines("short_answers.jsonl"):
        found["short answers"].append(made(row(line["question"], line["answer"]), Kind.SHORT_TEXT))
        options = "\n".join(f"{letter}) {text}" for letter, text in zip("ABCD", line["choices"], strict=True))
        asked = row(f"{line['question']}\n{options}", line["letter"], choices=line["choices"])
        found["choices"].append(made(asked, Kind.CHOICE))
    for line in lines("ted_mqm_ende.jsonl.gz"):
        columns = {"source": line["source"], "source_lang": "en", "target_lang": "de"}
        query = query_of(row(f"Translate into German:\n{line['source']}", line["reference"], **columns))
        ranked = sorted(line["outputs"].values(), key=lambda output: output["mqm"])
        good = [output["text"] for output in ranked if output["mqm"] <= ranked[0]["mqm"]]
        bad = [output["text"] for output in ranked if output["mqm"] >= ranked[0]["mqm"] + 1]
        found["ted, human MQM"].append((query, good, bad))
    for line in lines("ifbench_preferences.jsonl.gz"):
        found["open: ifbench"].append((query_of(row(line["prompt"], None)), line["chosen"], line["rejected"]))
    for line in lines("reward_preferences.jsonl.gz"):
        found["open: rm-bench"].append((query_of(row(line["prompt"], None)), [line["chosen"]], [line["rejected"]]))
    for name in ("humaneval", "mbpp") if code else ():
        for line in lines(f"{name}.jsonl.gz"):
            columns = row(line["prompt"], None, test=line["test"], entry_point=line["entry_point"])
            if line.get("canonical_solution"):
                program = f"```python\n{line['prompt']}{line['canonical_solution']}\n```"
                found[name].append(made(columns, Kind.UNIT_TESTS, program))
    return {name: [one for one in many if one and one[1] and one[2]] for name, many in found.items()}


def alone(tool: ToolSpec) -> Route:
    part = RoutePart(tool=tool.name, digest=tool.digest)
    return Route(parts=(part,), reason="by itself", kind=Kind.OPEN, covered=True, snapshot="")


def share(good: list[float | None], bad: list[float | None]) -> float:
    """Share of pairs in which the good answer gets more; no value, or the same, counts half."""
    pairs = [0.5 if a is None or b is None or a == b else float(a > b) for a in good for b in bad]
    return sum(pairs) / len(pairs)


async def rewards(most: int, console: Console) -> dict[str, Any]:
    """Accuracy of the rewards, by way and over all queries."""
    base = {"base": os.environ["RLAR_TEST_BASE"]} if os.environ.get("RLAR_TEST_BASE") else {}
    config = parse({"sandbox": base})
    async with Dispatcher(config) as dispatcher:
        code = await _has_engine(dispatcher)
        if not code:
            console.print("no engine for boxes: code is left out", style="yellow")
        pool = [tool for tool in dispatcher.snapshot.tools if not tool.gate and (code or not tool.boxed)]
        chosen = []
        for name, many in labelled(code=code).items():
            chosen += [(name, *one) for one in random.Random(0).sample(many, min(most, len(many)))]
        routes = [await dispatcher.route(query) for _, query, _, _ in chosen]
        jobs = [
            (n, place, Sample(query=query, response=text), route)
            for n, (_, query, good, bad) in enumerate(chosen)
            for place, text in enumerate((*good, *bad))
            for route in (routes[n], *map(alone, pool))
        ]

        async def score(job: tuple[int, int, Sample, Route]) -> tuple[int, int, str, float | None]:
            n, place, sample, route = job
            which = "router" if route.reason != "by itself" else route.name
            return n, place, which, (await dispatcher.score(sample, route)).value

        values: dict[tuple[int, str], dict[int, float | None]] = defaultdict(dict)
        progress = track(range(len(jobs)), "scoring", console=Console(stderr=True), transient=True)
        ticks = iter(progress)
        async for n, place, which, value in in_order(score, in_background(jobs), at_once=dispatcher.at_once):
            values[n, which][place] = value
            next(ticks, None)
        list(ticks)
    by_way: dict[str, np.ndarray] = {}
    for which in ("router", *(tool.name for tool in pool)):
        shares = []
        for n, (_, _, good, bad) in enumerate(chosen):
            said = [values[n, which][place] for place in range(len(good) + len(bad))]
            shares.append(share(said[: len(good)], said[len(good) :]))
        by_way[which] = np.array(shares)
    tools = [tool.name for tool in pool]
    single = max(tools, key=lambda name: float(by_way[name].mean()))
    by_way["oracle"] = np.max([by_way[name] for name in tools], axis=0)
    by_way["best single"] = by_way[single]
    return _report_rewards([name for name, *_ in chosen], by_way, single, console) | {"with_code": code}


def _report_rewards(names: list[str], by_way: dict[str, np.ndarray], single: str, console: Console) -> dict[str, Any]:
    table = Table("data set", "queries", f"best single ({single})", "router", "oracle", box=None)
    sets = list(dict.fromkeys(names))
    which = np.array(names)
    checkable = np.array([not name.startswith("open") for name in names])
    ways = ("best single", "router", "oracle")
    for label, at in [(name, which == name) for name in sets] + [("checkable", checkable), ("all", which != "")]:
        table.add_row(label, str(int(at.sum())), *(f"{by_way[way][at].mean():.3f}" for way in ways))
    console.print(table)
    gain = by_way["router"] - by_way["best single"]
    rng = np.random.default_rng(0)
    means = [gain[rng.integers(0, len(gain), len(gain))].mean() for _ in range(5000)]
    best, router, oracle = (float(by_way[way].mean()) for way in ways)
    return {
        "reward_queries": len(names),
        "reward_best_single": best,
        "reward_router": router,
        "reward_oracle": oracle,
        "reward_router_checkable": float(by_way["router"][checkable].mean()),
        "reward_best_single_checkable": float(by_way["best single"][checkable].mean()),
        "gain": float(gain.mean()),
        "gain_low": float(np.quantile(means, 0.025)),
        "gain_high": float(np.quantile(means, 0.975)),
        "gap_closed": (router - best) / (oracle - best),
    }


async def _has_engine(dispatcher: Dispatcher) -> bool:
    """Whether a program can be run here."""
    columns = row("Write f.", None, test="def check(candidate):\n    assert candidate(1) == 1", entry_point="f")
    tool = dispatcher.snapshot.tool("unit_tests")
    sample = Sample(query=query_of(columns), response="```python\ndef f(x):\n    return x\n```")
    return (await dispatcher.score(sample, alone(tool))).outcome is Outcome.SCORED


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=60, help="most queries of each data set (default 60)")
    parser.add_argument("--stream", type=int, default=20_000, help="visits with an LLM asked (default 20000)")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    arguments = parser.parse_args()
    rows = list(mixture())
    decided, again, times = asyncio.run(route_all(rows))
    routes = [route.name for route in decided]
    taken: dict[tuple[str, str], Counter[str]] = {}
    for (name, right, _), route in zip(rows, routes, strict=True):
        taken.setdefault((name, right), Counter())[route] += 1
    table = Table("data set", "rows", "right tool", "went to", box=None)
    for (name, right), counts in taken.items():
        went = ", ".join(f"{tool} {count}" for tool, count in counts.most_common())
        table.add_row(name, str(counts.total()), right, went)
    Console().print(table)
    verifiable = [right == route for (_, right, _), route in zip(rows, routes, strict=True) if right != UNCOVERED]
    figures = {
        "rows": len(rows),
        "verifiable": len(verifiable),
        "verifiable_to_right_tool": sum(verifiable) / len(verifiable),
        "open_to_a_tool": sum(r == UNCOVERED != t for (_, r, _), t in zip(rows, routes, strict=True)),
        "changed_by_renaming": sum(a != b for a, b in zip(decided, again, strict=True)),
        "clusters": len({route.cluster for route in decided}),
        "milliseconds_per_decision_p50": float(np.percentile(times, 50)),
        "milliseconds_per_decision_p99": float(np.percentile(times, 99)),
    }
    ok = figures["verifiable_to_right_tool"] >= 0.99 and not figures["changed_by_renaming"] + figures["open_to_a_tool"]
    ok = ok and figures["milliseconds_per_decision_p50"] < 0.3
    if arguments.stream:
        figures |= asyncio.run(stream(rows, arguments.stream, Console()))
        ok = ok and figures["llm_tokens_per_visit"] < 100 and not figures["llm_models_for_verifiers"]
    if arguments.answers:
        figures |= asyncio.run(rewards(arguments.answers, Console()))
        if figures["with_code"]:  # without it, what one rule can do is most of what there is to do
            ok = ok and figures["gain_low"] > 0 and figures["gap_closed"] >= 0.8
    Console().print(*(f"{name}: {value:.4g}" for name, value in figures.items()), sep="\n", highlight=False)
    if arguments.json:
        print(json.dumps({"name": "routing", "figures": figures, "goals": GOALS, "ok": ok}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
