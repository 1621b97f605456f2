# SPDX-License-Identifier: Apache-2.0
"""What a response costs beside its tool: decoding, cached route, bookkeeping, hand-over to the ledger.

    python recipes/benchmarks/dispatch.py [--samples 2000] [--model FOLDER] [--json]

Runs the real reward manager on verl's own `DataProto`, with the real service in a real Ray, on GSM8K questions with
answers of real models. The only thing replaced is the tool: it answers at once, in the same process, so that what is
left is ours. Each question comes eight times (a GRPO group), so most routes are cached, as in training; the first visit
of a question is shown apart. Samples are scored one after the other, so no figure hides behind another.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import sys
import tempfile
import time
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

from verl_rlar.cpu.models import build_tiny
from verl_rlar.ledger import read
from verl_rlar.reward_manager import RlarRewardManager
from verl_rlar.scoring import Scorer
from verl_rlar.types import Sample, ToolSpec, Verdict

ANSWERS = Path(__file__).parent.parent / "data" / "gsm8k_model_solutions.jsonl.gz"
GROUP = 8
GOALS = {"p50_ms": 1.0, "p99_ms": 5.0}


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2000, help="number of responses (default 2000)")
    parser.add_argument("--model", help="folder or name of the tokenizer (default: a small one, built on the spot)")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    args = parser.parse_args()
    with gzip.open(ANSWERS, "rt") as file:
        rows = [json.loads(line) for line in file]
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
