# SPDX-License-Identifier: Apache-2.0
"""The reward manager on verl's own `DataProto`, with the real service in a real Ray."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("verl", reason="verl is not installed (extra `cpu`)")
pytestmark = pytest.mark.slow

import numpy as np
import ray
import torch
from conftest import make_query, make_sandbox_config, none_left
from hydra import compose, initialize_config_module
from llm_server import LlmServer, dies
from omegaconf import DictConfig
from rubrics import GOOD, honest
from tensordict import TensorDict
from test_library import make_spec, sha
from verl import DataProto
from verl.experimental.reward_loop.reward_loop import RewardLoopWorker, migrate_legacy_reward_impl
from verl.utils import tensordict_utils as tu

from verl_rlar import reward_manager
from verl_rlar.cpu.models import build_tiny
from verl_rlar.errors import ConfigError
from verl_rlar.exam.canaries import Canary, to_json
from verl_rlar.ledger import read
from verl_rlar.library import Library
from verl_rlar.nodes import BOXES_NAME
from verl_rlar.reward_manager import RlarRewardManager
from verl_rlar.service import ACTOR_NAME, await_rows
from verl_rlar.tools.rubric import Rubric
from verl_rlar.trainer import queries_of
from verl_rlar.types import Kind, Scope


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("model")
    build_tiny(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


NO_SANDBOX = ("rlar.sandbox.backend=sandbox_fusion", "rlar.sandbox.fusion_url=http://127.0.0.1:9")
"""Settings of a server that is not there."""


@pytest.fixture
def config(tmp_path: Path, request: pytest.FixtureRequest) -> DictConfig:
    overrides = ["+rlar=default", f"trainer.default_local_dir={tmp_path}", "actor_rollout_ref.rollout.n=3"]
    overrides += getattr(request, "param", NO_SANDBOX)
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=[*overrides, "rlar.service_timeout_s=120"])


@pytest.fixture
def manager(config: DictConfig, tokenizer: Any) -> Iterator[RlarRewardManager]:
    made = RlarRewardManager(config=config, tokenizer=tokenizer, compute_score=None, reward_router_address=None)
    yield made
    made.close()
    ray.kill(ray.get_actor(ACTOR_NAME))


def data(tokenizer: Any, response: str, *, prompt: str = "2+3?", truth: Any = "5", **fields: Any) -> DataProto:
    """One response as verl's V1 agent loop sends it: padded on the right, a row of each field."""
    responses = tokenizer(response, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    prompts = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    padded = torch.tensor([responses + [0] * 7])
    mask = torch.tensor([[1] * (len(prompts) + len(responses)) + [0] * 7])
    batch = {"prompts": torch.tensor([prompts]), "responses": padded, "attention_mask": mask}
    row = {
        "raw_prompt": [{"role": "user", "content": prompt}],
        "data_source": "arithmetic",
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": {"index": 0},
        "uid": "group",
        "session_id": 0,
        "global_steps": 4,
        "response_len": len(responses),
        "rlar_split": "train",
    } | fields
    arrays = {}
    for name, value in row.items():
        arrays[name] = np.empty(1, dtype=object)
        arrays[name][0] = value
    return DataProto(batch=TensorDict(batch, batch_size=1), non_tensor_batch=arrays)


def rows(config: DictConfig) -> list[dict[str, Any]]:
    with read(Path(config.rlar.run_dir)) as db:
        return [dict(row) for row in db.execute("SELECT * FROM scores ORDER BY uid, session")]


async def test_a_response_is_decoded_routed_scored_and_kept(
    manager: RlarRewardManager, config: DictConfig, tokenizer: Any
) -> None:
    result = await manager.run_single(data(tokenizer, "The answer is 5."))
    assert result["reward_score"] == 1.0
    assert result["reward_extra_info"]["rlar_tool"] == "final_answer"
    assert (await manager.run_single(data(tokenizer, "It is 6.", session_id=1)))["reward_score"] == 0.0
    await manager.flush()
    kept = rows(config)
    assert [(row["step"], row["session"], row["value"], row["sent_as"]) for row in kept] == [
        (4, 0, 1.0, "value"),
        (4, 1, 0.0, "value"),
    ]


async def test_the_trainer_reads_out_of_a_batch_what_the_reward_manager_reads_out_of_a_response(
    manager: RlarRewardManager,
) -> None:
    rows = [
        {
            "raw_prompt": [{"role": "user", "content": f"What is {number} + 1?"}] * (1 + number % 2),
            "data_source": "arithmetic",
            "reward_model": {
                "style": "rule",
                "ground_truth": (str(number + 1), None, np.array(["a", "b"]))[number % 3],
            },
            "extra_info": {"index": number, "tests": np.array([number]), "nested": {"a": None, "b": [1.5]}},
        }
        for number in range(6)
    ]
    columns = {name: np.empty(len(rows), dtype=object) for name in rows[0]}
    for name, column in columns.items():
        column[:] = [row[name] for row in rows]
    batch = tu.get_tensordict(columns)
    tu.assign_non_tensor_data(batch, "global_steps", 3)
    expected = [manager._query({name: np.array([value])[0] for name, value in row.items()}) for row in rows]
    assert [query.key for query in queries_of(batch)] == [query.key for query in expected]
    assert queries_of(batch) == expected
    tu.assign_non_tensor_data(batch, "data_source", "one for all")
    assert {query.data_source for query in queries_of(batch)} == {"one for all"}
    columns["raw_prompt"][2] = []
    assert len(queries_of(tu.get_tensordict(columns))) == 5, "what is no prompt is for the reward call to say"


async def test_a_long_response_is_scored_like_a_short_one(
    manager: RlarRewardManager, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reward_manager, "SHORT", 0)  # all are decoded in a thread
    assert (await manager.run_single(data(tokenizer, "The answer is 5.")))["reward_score"] == 1.0
    with pytest.raises(ConfigError, match="global_steps"):
        sample = data(tokenizer, "5")
        del sample.non_tensor_batch["global_steps"]
        await manager.run_single(sample)


async def test_all_results_have_the_same_flat_keys_whatever_happened(
    manager: RlarRewardManager, tokenizer: Any
) -> None:
    samples = [
        data(tokenizer, "5"),
        data(tokenizer, "", session_id=1),
        data(tokenizer, "hello", truth=None, uid="open", rlar_split="val"),
        data(tokenizer, "print()", truth="assert f(1) == 2", uid="code", rlar_split="val"),
    ]
    results = await asyncio.gather(*(manager.run_single(sample) for sample in samples))
    schemas = [{key: type(value) for key, value in result["reward_extra_info"].items()} for result in results]
    assert schemas[1:] == schemas[:-1]
    assert set(schemas[0].values()) <= {float, str}
    outcomes = [result["reward_extra_info"]["rlar_outcome"] for result in results]
    assert outcomes == ["scored", "scored", "abstained", "failed"]


DOCKER = (f"rlar.sandbox.base={make_sandbox_config().base}", "rlar.sandbox.program_boxes=1")


@pytest.mark.docker
@pytest.mark.usefixtures("box_image")
@pytest.mark.parametrize("config", [DOCKER], indirect=True, ids=["docker"])
async def test_code_is_scored_by_the_boxes_of_the_node_and_their_death_costs_a_moment(
    manager: RlarRewardManager, engine: Any, tokenizer: Any
) -> None:
    right, wrong = "def f(x): return x + 1", "def f(x): return x"

    async def values() -> list[float]:
        samples = [data(tokenizer, text, truth="assert f(1) == 2", uid=text) for text in (right, wrong)]
        return [result["reward_score"] for result in await asyncio.gather(*map(manager.run_single, samples))]

    assert await values() == [1.0, 0.0]
    node = ray.get_runtime_context().get_node_id()
    actor = ray.get_actor(f"{BOXES_NAME}_{node}")
    os.kill(ray.get(actor.pid.remote()), signal.SIGKILL)
    assert await values() == [1.0, 0.0]
    ray.kill(ray.get_actor(f"{BOXES_NAME}_{node}"))
    assert await asyncio.to_thread(none_left, engine)


@pytest.mark.docker
@pytest.mark.usefixtures("box_image")
@pytest.mark.parametrize("config", [(*DOCKER, "rlar.routing.prefer.math=checker")], indirect=True, ids=["docker"])
async def test_a_verifier_of_the_library_scores_in_a_box_of_the_node_and_its_code_survives_the_actors(
    config: DictConfig, tokenizer: Any
) -> None:
    source = "def score(prompt, response, reference, extra):\n    return 0.75 if reference in response else 0.25\n"
    spec = make_spec(source_sha256=sha(source))
    with Library(Path(config.rlar.run_dir) / "library") as library:
        library.propose(spec, source, by="coder", why="math")
        library.put_exam(spec.digest, card={}, text="", transcript=[], passed=True, by="exam", why="passed")
        library.append("live", spec.digest, by="exam", why="passed", step=0)
    manager = RlarRewardManager(config=config, tokenizer=tokenizer, compute_score=None, reward_router_address=None)
    try:
        for number, victim in enumerate((f"{BOXES_NAME}_{ray.get_runtime_context().get_node_id()}", ACTOR_NAME, "")):
            samples = [data(tokenizer, text, uid=f"{text}{number}") for text in ("5", "6")]
            results = await asyncio.gather(*map(manager.run_single, samples))
            assert [result["reward_score"] for result in results] == [0.75, 0.25]
            assert results[0]["reward_extra_info"]["rlar_tool"] == "checker"
            if victim:
                os.kill(ray.get(ray.get_actor(victim).pid.remote()), signal.SIGKILL)
        await manager.flush()
    finally:
        manager.close()
        for name in (ACTOR_NAME, f"{BOXES_NAME}_{ray.get_runtime_context().get_node_id()}"):
            ray.kill(ray.get_actor(name))


async def test_a_rubric_of_the_library_judges_and_an_endpoint_that_dies_is_no_score(
    config: DictConfig, tokenizer: Any
) -> None:
    made = Rubric.from_text(json.dumps(GOOD))
    spec = made.spec(name="cooking", kinds={Kind.OPEN}, model="scripted", timeout_s=60, origin="coder")
    with Library(Path(config.rlar.run_dir) / "library") as library:
        library.propose(spec, None, by="coder", why="open")
        library.put_exam(spec.digest, card={}, text="", transcript=[], passed=True, by="exam", why="passed")
        library.append("live", spec.digest, by="exam", why="passed", step=0)
    texts = ("Boil the rice for 9 minutes, then drain it.", "Boil the rice for 9 minutes.", "I like rice.")
    with LlmServer([honest, honest, dies()]) as server:
        config.rlar.agents.url, config.rlar.agents.model = server.url, "scripted"
        manager = RlarRewardManager(config=config, tokenizer=tokenizer, compute_score=None, reward_router_address=None)
        try:
            results = [
                await manager.run_single(
                    data(tokenizer, text, prompt="How do I boil rice?", truth=None, uid=text, rlar_split="val")
                )
                for text in texts
            ]
            await manager.flush()
        finally:
            manager.close()
            ray.kill(ray.get_actor(ACTOR_NAME))
    told = [result["reward_extra_info"] for result in results]
    assert [one["rlar_tool"] for one in told] == ["cooking"] * 3
    assert [one["rlar_outcome"] for one in told] == ["scored", "scored", "failed"]
    assert [result["reward_score"] for result in results[:2]] == [1.0, pytest.approx(5 / 6)]
    assert [row["value"] for row in rows(config)].count(None) == 1, "it is unscored, not 0"


SHORT_LIFE = ("rlar.life.shadow_steps=2", "rlar.life.shadow_responses=6", "rlar.life.min_calls=3")


@pytest.mark.docker
@pytest.mark.usefixtures("box_image")
@pytest.mark.parametrize("config", [(*DOCKER, *SHORT_LIFE)], indirect=True, ids=["docker"])
async def test_a_verifier_scores_in_the_shadow_until_it_has_a_say_and_its_canaries_are_scored_each_step(
    config: DictConfig, tokenizer: Any
) -> None:
    source = "def score(prompt, response, reference, extra):\n    return 0.75 if reference in response else 0.25\n"
    spec = make_spec(scope=Scope(kinds=frozenset({Kind.MATH})), source_sha256=sha(source))
    with Library(Path(config.rlar.run_dir) / "library") as library:
        library.propose(spec, source, by="coder", why="math")
        canary = Canary(id="c1", query=make_query(), response="41", expect="bad", value=0.25)
        record: dict[str, Any] = {"card": {}, "text": "", "transcript": [], "canaries": to_json([canary])}
        library.put_exam(spec.digest, **record, passed=True, by="exam", why="passed")
        library.append("shadow", spec.digest, by="exam", why="passed", step=1)
    manager = RlarRewardManager(config=config, tokenizer=tokenizer, compute_score=None, reward_router_address=None)
    try:
        for step in range(1, 4):
            await asyncio.to_thread(manager._service.begin_step, step)
            samples = [
                data(tokenizer, text, uid=f"{step}", session_id=session, global_steps=step)
                for session, text in enumerate(("5", "6", "5"))
            ]
            results = await asyncio.gather(*map(manager.run_single, samples))
            assert [result["reward_score"] for result in results] == [1.0, 0.0, 1.0], "it has no say over final_answer"
            await manager.flush()
    finally:
        manager.close()
        for name in (ACTOR_NAME, f"{BOXES_NAME}_{ray.get_runtime_context().get_node_id()}"):
            ray.kill(ray.get_actor(name))
    with read(Path(config.rlar.run_dir)) as db:
        shadows = db.execute("SELECT step, session, value FROM shadows ORDER BY step, session").fetchall()
        canaries = db.execute("SELECT step, tool, value FROM canaries WHERE tool = 'checker' ORDER BY step").fetchall()
    assert [tuple(row) for row in shadows] == [
        (step, session, value) for step in (1, 2) for session, value in enumerate((0.75, 0.25, 0.75))
    ]
    assert [tuple(row) for row in canaries] == [(step, "checker", 0.25) for step in (1, 2, 3)]
    last = Library.read(Path(config.rlar.run_dir) / "library").events[-1]
    assert (last.event, last.step, last.by) == ("live", 3, "rlar") and "6 responses in the shadow" in last.why


async def test_an_unscored_response_goes_out_as_the_mean_of_its_siblings(
    manager: RlarRewardManager, config: DictConfig, tokenizer: Any
) -> None:
    """The same query for all three; the outage is the tool's deadline on one response."""
    answers = ["5", "6", "5" * 3]
    outage = data(tokenizer, answers[2], session_id=2)
    scorer, manager._scorer = manager._scorer, _Outage(manager._scorer, lost="555")
    results = await asyncio.gather(
        manager.run_single(data(tokenizer, answers[0])),
        manager.run_single(data(tokenizer, answers[1], session_id=1)),
        manager.run_single(outage),
    )
    manager._scorer = scorer
    assert [result["reward_score"] for result in results] == [1.0, 0.0, 0.5]
    await manager.flush()
    assert [(row["value"], row["sent_as"]) for row in rows(config)] == [
        (1.0, "value"),
        (0.0, "value"),
        (None, "siblings"),
    ]


class _Outage:
    """A scorer whose tool is out for one response."""

    def __init__(self, scorer: Any, lost: str) -> None:
        self._scorer = scorer
        self._lost = lost

    async def score(self, sample: Any, route: Any, snapshot: Any) -> Any:
        if sample.response != self._lost:
            return await self._scorer.score(sample, route, snapshot)
        from verl_rlar.types import Outcome, Score

        return Score(value=None, outcome=Outcome.FAILED, reason="final_answer: still at work after 5 s")


async def test_a_killed_service_costs_a_moment_and_no_row(
    manager: RlarRewardManager, config: DictConfig, tokenizer: Any
) -> None:
    await manager.run_single(data(tokenizer, "5", uid="before"))
    await manager.flush()
    for number in range(3):
        os.kill(await manager._service._call("pid", timeout_s=120), signal.SIGKILL)
        samples = [
            data(tokenizer, "5", prompt=f"{number}?", uid=f"{number}", session_id=session) for session in range(3)
        ]
        results = await asyncio.gather(*map(manager.run_single, samples))
        assert [result["reward_score"] for result in results] == [1.0] * 3
    await manager.flush()
    assert len(rows(config)) == 1 + 9
    with read(Path(config.rlar.run_dir)) as db:
        assert db.execute("SELECT COUNT(*) FROM attempts").fetchone()[0] == 1


@pytest.mark.parametrize("config", [(*NO_SANDBOX, "rlar.ledger.flush_s=3600")], indirect=True)
def test_a_training_ends_when_its_last_rows_are_in_the_ledger(config: DictConfig, tokenizer: Any) -> None:
    config.actor_rollout_ref.model.path = tokenizer.name_or_path
    config = migrate_legacy_reward_impl(config)
    workers = [ray.remote(RewardLoopWorker).remote(config) for _ in range(2)]
    try:
        samples = [data(tokenizer, "5", session_id=session) for session in range(3)]
        asked = [worker.compute_score.remote(sample) for worker, sample in zip(workers * 2, samples, strict=False)]
        assert [result["reward_score"] for result in ray.get(asked, timeout=300)] == [1.0] * 3
        assert rows(config) == []  # they wait for an hour
        await_rows(workers, 120)
        assert [row["session"] for row in rows(config)] == [0, 1, 2]
        ray.kill(workers[0])
        await_rows(workers, 120)  # says so, and does not hang
    finally:
        for worker in workers:
            ray.kill(worker)
        with suppress(ValueError):  # it has ended with the worker that had started it
            ray.kill(ray.get_actor(ACTOR_NAME))


def test_the_garbage_collector_leaves_out_what_is_imported_where_scores_are_made(
    config: DictConfig, tokenizer: Any
) -> None:
    config.actor_rollout_ref.model.path = tokenizer.name_or_path
    worker = ray.remote(RewardLoopWorker).remote(migrate_legacy_reward_impl(config))
    try:
        ray.get(worker.compute_score.remote(data(tokenizer, "5")), timeout=300)
        actors = (worker, ray.get_actor(ACTOR_NAME))
        left_out = ray.get([actor.__ray_call__.remote(lambda _: gc.get_freeze_count()) for actor in actors])
        assert min(left_out) > 10_000
        assert gc.get_freeze_count() == 0, "this process is nobody's but the caller's"
    finally:
        ray.kill(ray.get_actor(ACTOR_NAME))
        ray.kill(worker)


async def test_what_verls_legacy_trainer_does_not_send_is_named(manager: RlarRewardManager, tokenizer: Any) -> None:
    sample = data(tokenizer, "5")
    del sample.non_tensor_batch["global_steps"]
    with pytest.raises(ConfigError, match=r"no global_steps.*trainer\.use_v1=True"):
        await manager.run_single(sample)
