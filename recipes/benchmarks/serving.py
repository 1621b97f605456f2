# SPDX-License-Identifier: Apache-2.0
"""What the pool of reward models gives, against calling transformers one by one; and what an exchange of models costs.

    python recipes/benchmarks/serving.py [--seconds 4] [--threads 1] [--dtype T] [--only PART] [--quick] [--json]

Two random models, made on the spot: a tiny one of 0.3 million parameters, where what surrounds the model counts, and a
small one of 11 million, where the model itself does. Each is asked for responses of three lengths by three numbers of
clients, each of which sends its next response when the last one is scored. The naive way is what one writes first: in
one process, behind a lock, tokenize and call the model for one response. It has the same number of threads as the
pool's server, so that what differs is batching and the cost of the way, not the share of the machine; it computes in
float32, and so does the pool unless told otherwise (`--dtype bfloat16`, for CPUs that compute in it). Last, groups of 8
responses of 64 tokens to a prompt of 256, as GRPO has them: the pool computes a shared prompt once. How much batches
and bfloat16 can bring on this processor at most is measured by itself (``bound_*``).

The exchange: at a step boundary, model B takes the place of A while A is being asked. Exposed are the seconds from the
boundary until B can score, without and with `prefetch` during the step before; and those of sleep and wake. Where there
is no room for both: with A's server stopped and B's started, and with B's weights taken up in place.

Where vLLM is installed (extra `cpu-vllm`), the pool with that back-end is compared with plain ``vllm serve``: the same
conversations sent to ``/classify`` of the same server by hand, in turn, at all lengths and numbers of clients. `--only
vllm` measures only that.

On an H100: ``python recipes/benchmarks/serving.py --gpu``. All of it is vLLM in bfloat16 on the first GPU then, with a
small model and one of 1.2 billion parameters, against transformers one by one on the same GPU. That was not run yet.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import itertools
import json
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Qwen2Config, Qwen2ForSequenceClassification

from verl_rlar.config import ServingConfig
from verl_rlar.cpu.models import build_tiny
from verl_rlar.serving import Conversation, Golden, How, Pool, ServedModel
from verl_rlar.serving.vllm import VllmClient
from verl_rlar.types import Message

LENGTHS = (32, 128, 512)
CLIENTS = (1, 8, 64)
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4},
    "small": {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6},
    "billion": {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 24, "num_attention_heads": 16},
}
STEP_S = 60.0
"""Length of a training step that the cost of an exchange is put in relation to, in seconds; a short one."""
GOALS = {
    "tiny_groups_gain": 1.5,
    "tiny_32_tokens_64_clients_gain": 1.3,
    "least_gain_of_64_clients": 0.8,
    "exposed_share_with_prefetch": 0.01,
}
"""On a CPU. There, batches save what a call costs beside its arithmetic, and no arithmetic: a small model on long texts
gains next to nothing, unless they share their prompt, and the gain of 4 that a GPU is to reach is out of reach."""
GPU_GOALS = {"gain_over_naive_billion": 4.0, "exposed_share_with_prefetch": 0.01}
VLLM_GOALS = {"share_of_plain_vllm": 0.95}
Score = Callable[[Conversation], Awaitable[float]]


def build(folder: Path, size: str, seed: int) -> ServedModel:
    """A random model of that size."""
    path = folder / f"{size}-{seed}"
    tokenizer = AutoTokenizer.from_pretrained(build_tiny(folder / "policy"))
    torch.manual_seed(seed)
    config = Qwen2Config(
        **SIZES[size],
        vocab_size=len(tokenizer),
        num_key_value_heads=2,
        num_labels=1,
        max_position_embeddings=1024,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    Qwen2ForSequenceClassification(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return ServedModel(name=f"bench/{path.name}@1", revision="1", path=str(path), how=How(max_length=1024))


def letters(seed: str, tokens: int) -> str:
    """Letters of which each is a token."""
    chosen = random.Random(seed)
    return "".join(chosen.choices("abcdefghijklmnopqrstuvwxyz", k=tokens))


def conversations(tokens: int, count: int = 512) -> list[Conversation]:
    """Different texts of about that many tokens, which begin differently."""
    return [
        (
            Message(role="user", content="What?"),
            Message(role="assistant", content=letters(f"{tokens} {number}", tokens - 20)),
        )
        for number in range(count)
    ]


def groups(tokens: int = 64, prompt: int = 256, size: int = 8, count: int = 512) -> list[Conversation]:
    """Responses to shared prompts, one group after the other, as GRPO has them."""
    return [
        (
            Message(role="user", content=letters(f"prompt {number // size}", prompt)),
            Message(role="assistant", content=letters(f"answer {number}", tokens)),
        )
        for number in range(count)
    ]


async def measure(score: Score, texts: list[Conversation], clients: int, seconds: float) -> tuple[float, list[float]]:
    """Samples per second, and the latency of each in ms."""
    for one in texts[: min(clients, 8)]:
        await score(one)
    times: list[float] = []
    order = itertools.count()
    start = time.perf_counter()

    async def client() -> None:
        while time.perf_counter() - start < seconds:
            before = time.perf_counter()
            await score(texts[next(order) % len(texts)])
            times.append(time.perf_counter() - before)

    await asyncio.gather(*(client() for _ in range(clients)))
    return len(times) / (time.perf_counter() - start), [1000 * one for one in times]


async def in_turn(
    one: Score, other: Score, texts: list[Conversation], clients: int, seconds: float
) -> list[tuple[float, list[float]]]:
    """`measure` of two ways, twice each and in turn, so that whoever else uses the machine disturbs both alike."""
    rates: list[list[float]] = [[], []]
    times: list[list[float]] = [[], []]
    for way in (0, 1, 1, 0):
        rate, found = await measure((one, other)[way], texts, clients, seconds / 2)
        rates[way].append(rate)
        times[way] += found
    return [(statistics.mean(rates[way]), times[way]) for way in (0, 1)]


def serving(args: argparse.Namespace, **more: Any) -> ServingConfig:
    """How the pool serves."""
    if args.gpu:
        return ServingConfig(backend="vllm", gpus=(0,), dtype="bfloat16", **more)
    return ServingConfig(threads=args.threads, dtype=args.dtype, **more)


def naive(model: ServedModel, gpu: bool) -> Score:
    """The way one writes first."""
    tokenizer = AutoTokenizer.from_pretrained(str(model.path))
    device, dtype = ("cuda:0", torch.bfloat16) if gpu else ("cpu", torch.float32)
    network = AutoModelForSequenceClassification.from_pretrained(str(model.path), dtype=dtype).eval().to(device)
    lock = asyncio.Lock()

    def one(text: Conversation) -> float:
        turns = [{"role": message.role, "content": message.content} for message in text]
        inputs = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)
        with torch.inference_mode():
            return float(network(**inputs.to(device)).logits[0, 0])

    async def score(text: Conversation) -> float:
        async with lock:
            return await asyncio.to_thread(one, text)

    return score


def pooled(pool: Pool, model: ServedModel) -> Score:
    async def score(text: Conversation) -> float:
        return (await pool.score(model, (text,), 300))[0].value

    return score


def percentiles(times: list[float]) -> tuple[float, float]:
    """p50 and p99."""
    cuts = statistics.quantiles(times, n=100, method="inclusive") if len(times) > 1 else times * 99
    return cuts[49], cuts[98]


async def throughput(size: str, args: argparse.Namespace, folder: Path, table: Table) -> dict[str, float]:
    """The pool against the naive way."""
    model, figures, gains = build(folder, size, 0), {}, []
    lengths, clients = (LENGTHS, CLIENTS) if not args.quick else (LENGTHS[:2], CLIENTS[::2])
    async with Pool(serving(args)) as pool:
        await pool.ensure([model])
        by_hand, by_pool = naive(model, args.gpu), pooled(pool, model)
        text = conversations(100)[0]
        apart = abs(await by_hand(text) - await by_pool(text))
        cells = [(length, count) for length in lengths for count in clients]
        for length, count in track(cells, f"{size} model", console=Console(stderr=True), transient=True):
            texts = conversations(length)
            (slow, slow_times), (fast, fast_times) = await in_turn(by_hand, by_pool, texts, count, args.seconds)
            p50, p99 = percentiles(fast_times)
            naive_p50, naive_p99 = percentiles(slow_times)
            name = f"{size}_{length}_tokens_{count}_clients"
            figures |= {
                f"{name}_per_s": fast,
                f"{name}_naive_per_s": slow,
                f"{name}_p50_ms": p50,
                f"{name}_p99_ms": p99,
            }
            figures |= {
                f"{name}_naive_p50_ms": naive_p50,
                f"{name}_naive_p99_ms": naive_p99,
                f"{name}_gain": fast / slow,
            }
            if count == max(clients):
                gains.append(fast / slow)
            row = (size, length, count, f"{fast:.0f}", f"{slow:.0f}", f"{fast / slow:.2f}", f"{p50:.1f}", f"{p99:.1f}")
            table.add_row(*map(str, row), f"{naive_p50:.1f}", f"{naive_p99:.1f}")
        (slow, _), (fast, _) = await in_turn(by_hand, by_pool, groups(), 64, args.seconds)
        table.add_row(size, "256 + 64", "64", f"{fast:.0f}", f"{slow:.0f}", f"{fast / slow:.2f}")
        figures |= {
            f"{size}_groups_per_s": fast,
            f"{size}_groups_naive_per_s": slow,
            f"{size}_groups_gain": fast / slow,
        }
    return figures | {
        f"gain_over_naive_{size}": statistics.geometric_mean(gains),
        f"least_gain_{size}": min(gains),
        f"largest_difference_{size}": apart,
    }


def bound(folder: Path) -> dict[str, float]:
    """What batches and bfloat16 can bring at most: tokens per second of processor time of the small model itself, by
    one thread, against one text of that length at a time in float32. Other work on the machine hardly disturbs it."""
    model, figures = build(folder, "small", 0), {}
    networks = {
        name: AutoModelForSequenceClassification.from_pretrained(str(model.path), dtype=getattr(torch, name)).eval()
        for name in ("float32", "bfloat16")
    }

    def rate(name: str, texts: int, tokens: int) -> float:
        ids, best = torch.randint(5, 90, (texts, tokens)), math.inf
        with torch.inference_mode():
            for _ in range(8):
                start = time.process_time()
                networks[name](input_ids=ids)
                best = min(best, time.process_time() - start)
        return ids.numel() / best

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for tokens in LENGTHS:
        alone = rate("float32", 1, tokens)
        for name in networks:
            figures[f"bound_{tokens}_tokens_{name}"] = rate(name, max(1, 1024 // tokens), tokens) / alone
    torch.set_num_threads(threads)
    return figures


async def load(pool: Pool, model: ServedModel, text: Conversation) -> None:
    """A client that asks without end."""
    async with pool.lease(model):
        while True:
            await pool.score(model, (text,), 60)


async def exchange(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """What a step boundary with a new model costs."""
    size = "billion" if args.gpu else "small"
    first, second = build(folder, size, 0), build(folder, size, 1)
    text = conversations(128)[0]
    figures: dict[str, float] = {}
    for name in ("without_prefetch", "with_prefetch"):
        async with Pool(serving(args, sleep=True)) as pool:
            await pool.ensure([first])
            clients = [asyncio.ensure_future(load(pool, first, text)) for _ in range(4)]
            if name == "with_prefetch":
                start = time.perf_counter()
                assert await pool.prefetch([second])
                figures["prefetch_s"] = time.perf_counter() - start
            for client in clients:
                client.cancel()
            await asyncio.gather(*clients, return_exceptions=True)
            start = time.perf_counter()
            await pool.ensure([second])
            await pool.score(second, (text,), 60)
            figures[f"exposed_s_{name}"] = time.perf_counter() - start
            if name == "with_prefetch":
                start = time.perf_counter()
                await pool.sleep()
                figures["sleep_s"] = time.perf_counter() - start
                start = time.perf_counter()
                await pool.wake()
                figures["wake_s"] = time.perf_counter() - start
    if not args.gpu:  # there, room for one is room for several
        figures |= await in_place(serving(args, memory_gb=0.7), first, second, text)
    figures["exposed_share_with_prefetch"] = figures["exposed_s_with_prefetch"] / STEP_S
    figures["exposed_share_without_prefetch"] = figures["exposed_s_without_prefetch"] / STEP_S
    return figures


async def in_place(
    config: ServingConfig, first: ServedModel, second: ServedModel, text: Conversation
) -> dict[str, float]:
    """What it costs to exchange models of one shape where there is room for one only."""
    figures: dict[str, float] = {}
    pids = []
    async with Pool(config) as pool:
        known = []
        for model in (first, second):
            start = time.perf_counter()
            await pool.ensure([model])
            (scored,) = await pool.score(model, (text,), 60)
            figures["exposed_s_no_room_restart"] = time.perf_counter() - start  # of the second one, in the end
            known.append(replace(model, golden=(Golden(conversation=text, value=scored.value),)))
        times = []
        for model in (*known, *known):
            start = time.perf_counter()
            await pool.ensure([model])
            (scored,) = await pool.score(model, (text,), 60)
            times.append(time.perf_counter() - start)
            assert abs(scored.value - model.golden[0].value) < 1e-3
            pids.append(pool.replicas()[0].pid)
    assert len(set(pids)) == 1, "a server was started"
    return figures | {"exposed_s_no_room_in_place": statistics.median(times)}


async def plain_vllm(args: argparse.Namespace, folder: Path, table: Table) -> dict[str, float]:
    """The pool with vLLM against the same conversations sent to the same server by hand."""
    model = build(folder, "billion" if args.gpu else "small", 0)
    config = serving(args) if args.gpu else ServingConfig(backend="vllm", threads=args.threads, batch_tokens=4096)
    figures: dict[str, float] = {}
    lengths, clients = (LENGTHS, CLIENTS) if not args.quick else (LENGTHS[:2], CLIENTS[::2])
    start = time.perf_counter()
    async with Pool(config) as pool:
        await pool.ensure([model])
        figures["vllm_start_s"] = time.perf_counter() - start
        client = VllmClient(model.name, str(pool.replicas()[0].address), model.key)

        async def by_hand(text: Conversation) -> float:
            turns = [{"role": message.role, "content": message.content} for message in text]
            body = {"messages": turns, "add_generation_prompt": False}
            return float((await client.outputs([body], False, 60))[0][0])

        try:
            by_pool, text = pooled(pool, model), conversations(100)[0]
            assert abs(await by_hand(text) - await by_pool(text)) < 1e-2
            for length in lengths:
                for count in clients:
                    texts = conversations(length)
                    (plain, _), (ours, times) = await in_turn(by_hand, by_pool, texts, count, args.seconds)
                    p50, p99 = percentiles(times)
                    name = f"vllm_{length}_tokens_{count}_clients"
                    figures |= {f"{name}_per_s": ours, f"{name}_plain_per_s": plain, f"{name}_share": ours / plain}
                    figures |= {f"{name}_p50_ms": p50, f"{name}_p99_ms": p99}
                    row = ("vllm", length, count, f"{ours:.0f}", f"{plain:.0f}", f"{ours / plain:.2f}")
                    table.add_row(*map(str, row), f"{p50:.1f}", f"{p99:.1f}")
        finally:
            await client.close()
    shares = [figures[name] for name in figures if name.endswith("_share")]
    return figures | {
        "share_of_plain_vllm": statistics.geometric_mean(shares),
        "least_share_of_plain_vllm": min(shares),
    }


async def run(args: argparse.Namespace, folder: Path, table: Table) -> tuple[dict[str, float], dict[str, float]]:
    figures: dict[str, float] = {}
    if args.only in (None, "throughput"):
        sizes = ("small", "billion") if args.gpu else ("tiny", "small") if not args.quick else ("tiny",)
        for size in sizes:
            figures |= await throughput(size, args, folder, table)
        figures["least_gain_of_64_clients"] = min(figures[name] for name in figures if name.startswith("least_gain"))
    if args.only == "bound" or (args.only is None and not args.gpu):
        figures |= bound(folder)
    if args.only in (None, "exchange"):
        figures |= await exchange(args, folder)
    goals = {name: goal for name, goal in (GPU_GOALS if args.gpu else GOALS).items() if name in figures}
    if args.only in (None, "vllm") and importlib.util.find_spec("vllm") is not None:
        figures |= await plain_vllm(args, folder, table)
        goals |= VLLM_GOALS
    return figures, goals


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=4.0, help="for each figure")
    parser.add_argument("--threads", type=int, default=1, help="of the server, and of the naive way")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the pool's weights")
    parser.add_argument("--gpu", action="store_true", help="all of it with vLLM on the first GPU")
    parser.add_argument("--only", choices=("throughput", "bound", "exchange", "vllm"), help="one part of it")
    parser.add_argument("--quick", action="store_true", help="a part of it")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    columns = ("model", "tokens", "clients", "per s", "other", "gain", "p50 ms", "p99 ms", "other p50", "other p99")
    table = Table(*columns, title="Reward models, against transformers one by one, or plain vLLM", box=None)
    with tempfile.TemporaryDirectory() as folder:
        figures, goals = asyncio.run(run(args, Path(folder), table))
    ok = all(figures[name] <= goal if "exposed" in name else figures[name] >= goal for name, goal in goals.items())
    console = Console()
    console.print(table)
    summary = Table("figure", "value", "goal", box=None)
    for name, value in figures.items():
        if name in goals or "tokens" not in name or "bound" in name:
            sign = "<" if "exposed" in name else ">="
            summary.add_row(name, f"{value:.3f}", f"{sign} {goals[name]:g}" if name in goals else "")
    console.print(summary)
    if args.json:
        wanted: dict[str, Any] = {
            name: f"{'<=' if 'exposed' in name else '>='} {goal:g}" for name, goal in goals.items()
        }
        print(json.dumps({"name": "serving", "figures": figures, "goals": wanted, "ok": ok}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
