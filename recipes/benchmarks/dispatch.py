# SPDX-License-Identifier: Apache-2.0
"""What a response costs beside its tool: decoding, cached route, bookkeeping, hand-over to the ledger.

    python recipes/benchmarks/dispatch.py [--samples 2000] [--model FOLDER] [--json]
    python recipes/benchmarks/dispatch.py --scale [1000000] [--json]     # of the router alone; minutes

Runs the real reward manager on verl's own `DataProto`, with the real service in a real Ray, on GSM8K questions with
answers of real models. The only thing replaced is the tool: it answers at once, in the same process, so that what is
left is ours. Each question comes eight times (a GRPO group), so most routes are cached, as in training; the first visit
of a question is shown apart. Samples are scored one after the other, so no figure hides behind another.

What routing by evidence adds to the first visit of a prompt is measured apart, in this process: a decision with
clusters and with what is known of the tools, less the same without both.

``--scale`` routes that many distinct prompts among 500 tools with evidence, through the cache, and prints the time per
visit, the memory and the clusters after every tenth of them.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import random
import resource
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from hydra import compose, initialize_config_module
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tensordict import TensorDict
from transformers import AutoTokenizer
from verl import DataProto

from verl_rlar.clusters import Clusters
from verl_rlar.competence import Competence, Record
from verl_rlar.config import RoutingConfig
from verl_rlar.cpu.models import build_tiny
from verl_rlar.ledger import read
from verl_rlar.library import builtin_snapshot
from verl_rlar.reward_manager import RlarRewardManager
from verl_rlar.router import FeatureRouter, RouteCache
from verl_rlar.scoring import Scorer
from verl_rlar.types import Kind, Message, Query, Sample, Snapshot, ToolSpec, Verdict

ANSWERS = Path(__file__).parent.parent / "data" / "gsm8k_model_solutions.jsonl.gz"
GROUP = 8
GOALS = {"p50_ms": 1.0, "p99_ms": 5.0, "routing_adds_p50_ms": 0.3}
TOOLS = 500
"""Tools that are live in ``--scale``."""


class AtOnce:
    """A tool that costs nothing."""

    async def run(self, spec: ToolSpec, sample: Sample) -> Verdict:
        return Verdict(value=1.0)


def response(row: dict[str, Any], session: int, question: int, tokenizer: Any) -> DataProto:
    """A response as verl's agent loop sends it."""
    prompts = tokenizer(row["question"], return_tensors="pt")["input_ids"]
    responses = tokenizer(row["response"], return_tensors="pt")["input_ids"]
    mask = torch.ones(1, prompts.shape[1] + responses.shape[1], dtype=torch.int64)
    fields = {
        "raw_prompt": [{"role": "user", "content": row["question"]}],
        "data_source": "gsm8k",
        "reward_model": {"style": "rule", "ground_truth": row["ground_truth"].rpartition("A:")[2].strip()},
        "extra_info": {"index": question},
        "uid": f"question-{question}",
        "session_id": session,
        "global_steps": 1 + question // 64,
        "response_len": responses.shape[1],
        "rlar_split": "train",
    }
    arrays = {}
    for name, value in fields.items():
        arrays[name] = np.empty(1, dtype=object)
        arrays[name][0] = value
    batch = {"prompts": prompts, "responses": responses, "attention_mask": mask}
    return DataProto(batch=TensorDict(batch, batch_size=1), non_tensor_batch=arrays)


async def measure(manager: RlarRewardManager, data: list[DataProto]) -> list[float]:
    """Milliseconds of each call."""
    times = []
    for item in track(data, "scoring", console=Console(stderr=True), transient=True):
        start = time.perf_counter()
        await manager.run_single(item)
        times.append(1000 * (time.perf_counter() - start))
        await asyncio.sleep(0)  # lets the ledger's sender run, as between two responses in training
    await manager.flush()
    return times


def many_tools(count: int) -> tuple[Snapshot, Competence]:
    """The built-in rules and as many examined tools as are missing, of all kinds, with what their exams say."""
    rng = random.Random(0)
    tools, records = list(builtin_snapshot().tools), []
    kinds = list(Kind)
    while len(tools) < count:
        kind = kinds[len(tools) % len(kinds)]
        sort: Any = "reward_model" if kind is Kind.OPEN else "verifier"
        scope = replace(tools[0].scope, kinds=frozenset({kind}), needs_reference=False)
        number = len(tools)
        spec = ToolSpec(name=f"tool_{number}", kind=sort, target=f"t{number}", scope=scope, description="", boxed=True)
        tools.append(spec)
        records.append(Record(digest=spec.digest, kind=kind, prompts=100, right=rng.uniform(60, 99), seconds=0.1))
    return Snapshot(tools=tuple(tools)), Competence(records=tuple(records))


async def routing_adds(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Milliseconds of routing by evidence on the first visit of a prompt, and what it adds to routing without."""
    snapshot, known = many_tools(12)
    prompts = dict.fromkeys(row["question"] for row in rows)
    queries = [Query(messages=(Message(role="user", content=text),), reference="42") for text in prompts]
    times: dict[str, list[float]] = {}
    for label, router in (
        ("without", FeatureRouter(RoutingConfig())),
        ("with", FeatureRouter(RoutingConfig(), lambda snapshot: known, Clusters())),
    ):
        times[label] = []
        for query in queries:
            _ = query.key
            start = time.perf_counter()
            await router.route(query, snapshot)
            times[label].append(1000 * (time.perf_counter() - start))
    p50, p99 = np.percentile(times["with"], (50, 99))
    return {
        "routing_p50_ms": float(p50),
        "routing_p99_ms": float(p99),
        "routing_adds_p50_ms": float(p50 - np.percentile(times["without"], 50)),
    }


async def scale(count: int, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Curves of time and memory over many distinct prompts."""
    snapshot, known = many_tools(TOOLS)
    clusters = Clusters()
    cache = RouteCache(FeatureRouter(RoutingConfig(), lambda snapshot: known, clusters))
    texts = list(dict.fromkeys(row["question"] for row in rows))
    rng = random.Random(0)
    table = Table("prompts", "p50 ms", "p99 ms", "memory MiB", "clusters", title=f"{TOOLS} tools", box=None)
    tenth = max(1, count // 10)
    curve: list[tuple[float, float]] = []
    for number in track(range(10), "routing", console=Console(stderr=True), transient=True):
        times = []
        for n in range(tenth):
            words = rng.choice(texts).split() + rng.choice(texts).split()
            text = " ".join(rng.sample(words, min(len(words), 40))) + f" {number * tenth + n}"
            query = Query(messages=(Message(role="user", content=text),), reference=rng.choice(("42", None, "a word")))
            start = time.perf_counter()
            await cache.route(query, snapshot)
            times.append(1000 * (time.perf_counter() - start))
        p50, p99 = np.percentile(times, (50, 99))
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        curve.append((float(p50), memory))
        table.add_row(f"{(number + 1) * tenth:,}", f"{p50:.3f}", f"{p99:.3f}", f"{memory:.0f}", str(len(clusters)))
    Console().print(table)
    (first, _), (last, memory) = curve[0], curve[-1]
    return {
        "prompts": 10 * tenth,
        "first_tenth_p50_ms": first,
        "last_tenth_p50_ms": last,
        "memory_mib": memory,
        "memory_growth_of_second_half_mib": memory - curve[4][1],
        "clusters": len(clusters),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2000, help="number of responses (default 2000)")
    parser.add_argument("--model", help="folder or name of the tokenizer (default: a small one, built on the spot)")
    parser.add_argument("--scale", type=int, nargs="?", const=1_000_000, help="route so many distinct prompts instead")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    args = parser.parse_args()
    with gzip.open(ANSWERS, "rt") as file:
        rows = [json.loads(line) for line in file]
    if args.scale:
        curves = asyncio.run(scale(args.scale, rows))
        flat = curves["last_tenth_p50_ms"] < 1.5 * curves["first_tenth_p50_ms"]
        if args.json:
            goals = {"last_tenth_p50_ms": "< 1.5 first_tenth_p50_ms"}
            print(json.dumps({"name": "dispatch at scale", "figures": curves, "goals": goals, "ok": flat}))
        return 0 if flat else 1
    with tempfile.TemporaryDirectory() as folder:
        if not args.model:
            build_tiny(Path(folder) / "model")
        tokenizer = AutoTokenizer.from_pretrained(args.model or f"{folder}/model")
        data = [
            response(rows[number // GROUP % len(rows)], number % GROUP, number // GROUP, tokenizer)
            for number in range(args.samples)
        ]
        overrides = ["+rlar=default", f"trainer.default_local_dir={folder}", f"actor_rollout_ref.rollout.n={GROUP}"]
        with initialize_config_module("verl.trainer.config", version_base=None):
            config = compose("ppo_trainer", overrides=overrides)
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="error")
        try:
            manager = RlarRewardManager(config=config, tokenizer=tokenizer, compute_score=None)
            manager._scorer = Scorer(manager._rlar.scoring, AtOnce())
            manager.loop.run_until_complete(measure(manager, data[:GROUP]))
            times = manager.loop.run_until_complete(measure(manager, data))
            manager.close()
            with read(Path(folder) / "rlar") as db:
                kept = db.execute("SELECT COUNT(*) FROM scores").fetchone()[0]
        finally:
            ray.shutdown()
    first, cached = np.array(times[::GROUP]), np.array([t for n, t in enumerate(times) if n % GROUP])
    lengths = [int(item.batch["responses"].shape[1]) for item in data]
    figures = {
        "p50_ms": float(np.percentile(cached, 50)),
        "p99_ms": float(np.percentile(cached, 99)),
        "first_visit_p50_ms": float(np.percentile(first, 50)),
        "first_visit_p99_ms": float(np.percentile(first, 99)),
        "response_tokens_p50": float(np.percentile(lengths, 50)),
        **asyncio.run(routing_adds(rows)),
        "samples": len(times),
        "ledger_rows": kept,
    }
    ok = all(figures[name] < goal for name, goal in GOALS.items()) and kept == len(times)
    table = Table("figure", "value", "goal", title="Dispatch, tool time excluded", box=None)
    for name, value in figures.items():
        table.add_row(name, f"{value:.3f}", f"< {GOALS[name]:g}" if name in GOALS else "")
    Console().print(table)
    if args.json:
        print(json.dumps({"name": "dispatch", "figures": figures, "goals": GOALS, "ok": ok}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
