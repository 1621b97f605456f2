# SPDX-License-Identifier: Apache-2.0
"""Two nodes: what reward workers agree on does not depend on the node that they are on.

Ray's own `Cluster` makes two nodes of this machine, each with a raylet and an object store of its own; network and
disks are not two, so nothing here is about those.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest

pytest.importorskip("verl", reason="verl is not installed (extra `cpu`)")
pytestmark = pytest.mark.slow

import ray
from conftest import make_sample
from hub_repos import build
from hub_server import HubServer
from hydra import compose, initialize_config_module
from omegaconf import DictConfig
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from test_reward_manager import NO_SANDBOX, data
from test_train_models import REPO, chat_reward

from verl_rlar.config import HubConfig, parse
from verl_rlar.cpu.models import build_tiny
from verl_rlar.hub import Hub
from verl_rlar.ledger import read
from verl_rlar.library import Library, library_path
from verl_rlar.nodes import MODELS_NAME, Models, Named, _place
from verl_rlar.plugin import check
from verl_rlar.service import ACTOR_NAME
from verl_rlar.trusted import trusted_tools

TOOL = """
from verl_rlar.errors import ToolUnavailable
from verl_rlar.tools.rule import rule
from verl_rlar.types import Kind, Sample, Verdict


@rule(name="stern", kinds={Kind.MATH}, description="1 if the response is the reference, letter by letter.")
def stern(sample: Sample) -> Verdict:
    if sample.response == "lost":
        raise ToolUnavailable("stern: out of order")
    return Verdict(value=float(sample.response == sample.query.reference))
"""
"""A user's rule, which fails on one response."""
GONE = 10
"""The step from which on `stern` is not live any more; the built-in rule is taken then, which is not as stern."""
GROUP = 4


class _Manager:
    """A reward manager as verl's reward worker has it: in an actor, made there."""

    def __init__(self, config: DictConfig) -> None:
        from transformers import AutoTokenizer

        from verl_rlar.reward_manager import RlarRewardManager

        self._tokenizer = AutoTokenizer.from_pretrained(config.actor_rollout_ref.model.path)
        self._manager = RlarRewardManager(config=config, tokenizer=self._tokenizer, compute_score=None)

    async def score(self, response: str, uid: str, session: int, step: int) -> tuple[float, str]:
        """The number that verl gets, and the route's name."""
        sample = data(self._tokenizer, response, uid=uid, session_id=session, global_steps=step)
        result = await self._manager.run_single(sample)
        await self._manager.flush()
        return result["reward_score"], result["reward_extra_info"]["rlar_tool"]

    async def node(self) -> str:
        return ray.get_runtime_context().get_node_id()


class _Somewhere:
    async def node(self) -> str:
        return ray.get_runtime_context().get_node_id()


def _start_somewhere(number: int) -> Any:
    made: Any = ray.remote(_Somewhere)
    place = _place(parse({"serving": {"nodes": 2}}).serving, number)
    options = {"name": f"somewhere_{number}", "get_if_exists": True, "max_restarts": -1, "num_cpus": 0}
    return made.options(scheduling_strategy=place, **options).remote()


class Nodes:
    """A reward manager on each of two nodes.

    Args:
        cluster: The nodes.
        config: verl's.
    """

    def __init__(self, cluster: Cluster, config: DictConfig) -> None:
        self._cluster = cluster
        self._config = config
        self._nodes = list(cluster.worker_nodes)
        self.run = Path(config.rlar.run_dir)
        self.head = cluster.head_node.node_id
        self.there = self._manager(self._nodes[0].node_id)  # the first one: so it is the one that starts the service
        self.here = self._manager(cluster.head_node.node_id)

    def _manager(self, node: str) -> Any:
        made: Any = ray.remote(_Manager)
        manager = made.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
            self._config
        )
        assert ray.get(manager.node.remote(), timeout=300) == node
        return manager

    async def group(self, uid: str, responses: list[str], step: int) -> list[tuple[float, str]]:
        """Scores a group, every other response on the other node."""
        return await asyncio.gather(
            *(
                asyncio.wait_for((self.there if session % 2 else self.here).score.remote(text, uid, session, step), 200)
                for session, text in enumerate(responses)
            )
        )

    def rows(self, uid: str) -> list[dict[str, Any]]:
        with read(self.run) as db:
            sql = "SELECT * FROM scores WHERE uid = ? ORDER BY session"
            return [dict(row) for row in db.execute(sql, (uid,))]

    async def take_one_away(self) -> None:
        """Ends a node at once; returns when Ray has seen that."""
        gone = self._nodes[0].node_id
        await asyncio.to_thread(self._cluster.remove_node, self._nodes[0], allow_graceful=False)

        async def seen() -> None:
            while any(node["Alive"] and node["NodeID"] == gone for node in ray.nodes()):
                await asyncio.sleep(0.1)

        await asyncio.wait_for(seen(), 100)
        with pytest.raises(ray.exceptions.RayActorError):
            await self.there.node.remote()


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    folder = tmp_path_factory.mktemp("nodes")
    build_tiny(folder / "model")
    (folder / "modules").mkdir()
    (folder / "modules" / "users_rules.py").write_text(TOOL)
    overrides = [
        *("+rlar=default", f"trainer.default_local_dir={folder}", f"actor_rollout_ref.rollout.n={GROUP}"),
        *(f"actor_rollout_ref.model.path={folder}/model", "rlar.tools=['users_rules:stern']"),
        *("rlar.routing.prefer.math=stern", "rlar.service_timeout_s=120", *NO_SANDBOX),
    ]
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=overrides)
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as ours:
        patch.setenv("RAY_TMPDIR", ours)  # `Cluster` leaves its address there, for whoever calls `ray.init()` next
        patch.syspath_prepend(str(folder / "modules"))
        settings = check(config)
        with Library(library_path(settings)) as library:
            library.begin(trusted_tools(settings), "before")
            stern = library.find("stern")
            library.append("retired", stern, by="ada", why="too stern", step=GONE)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
        cluster.add_node(num_cpus=4)
        path = f"{folder / 'modules'}:{Path(__file__).parent}"
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # pytest's name of it is none that nodes know
        ray.init(address=cluster.address, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": path}})
        try:
            yield Nodes(cluster, config)
        finally:
            ray.shutdown()
            cluster.shutdown()


async def test_a_group_that_is_scored_on_two_nodes_has_one_route_and_one_version(nodes: Nodes) -> None:
    assert await nodes.group("a", ["5", "6", "5", "5."], step=3) == [
        (1.0, "stern"),
        (0.0, "stern"),
        (1.0, "stern"),
        (0.0, "stern"),
    ]
    rows = nodes.rows("a")
    assert [row["session"] for row in rows] == [0, 1, 2, 3]
    for name in ("snapshot", "route", "query"):
        assert len({row[name] for row in rows}) == 1
    with read(nodes.run) as db:
        made = db.execute("SELECT COUNT(*) FROM routes WHERE query = ?", (rows[0]["query"],)).fetchone()[0]
    assert made == 1, "it was decided once"


async def test_the_service_and_its_ledger_are_on_the_head_node_whoever_started_it(nodes: Nodes) -> None:
    await nodes.group("where", ["5", "6"], step=3)
    service: Any = ray.get_actor(ACTOR_NAME)
    there = await service.__ray_call__.remote(lambda self: ray.get_runtime_context().get_node_id())
    assert there == nodes.head


async def test_a_response_that_one_node_cannot_score_gets_the_mean_of_its_siblings_on_both(nodes: Nodes) -> None:
    results = await nodes.group("b", ["5", "lost", "6", "5"], step=3)
    assert [value for value, _ in results] == [1.0, pytest.approx(2 / 3), 0.0, 1.0]
    assert [row["sent_as"] for row in nodes.rows("b")] == ["value", "siblings", "value", "value"]
    results = await nodes.group("c", ["lost", "5", "lost", "6"], step=3)
    assert [value for value, _ in results] == [0.5, 1.0, 0.5, 0.0]


async def test_a_straggler_of_an_older_step_is_scored_by_that_steps_tools_on_any_node(nodes: Nodes) -> None:
    early = asyncio.gather(
        nodes.here.score.remote("5.", "late", 0, GONE - 1), nodes.there.score.remote("6", "late", 1, GONE - 1)
    )
    assert await early == [(0.0, "stern"), (0.0, "stern")]
    for step in (GONE, GONE + 1):
        results = await nodes.group(f"new {step}", ["5", "5.", "5", "5."], step=step)
        assert results == [(1.0, "final_answer")] * 4
    late = asyncio.gather(
        nodes.there.score.remote("5.", "late", 2, GONE - 1), nodes.here.score.remote("5", "late", 3, GONE - 1)
    )
    assert await late == [(0.0, "stern"), (1.0, "stern")]
    assert len({row["snapshot"] for row in nodes.rows("late")}) == 1
    assert {row["snapshot"] for row in nodes.rows("late")}.isdisjoint(row["snapshot"] for row in nodes.rows("new 10"))


async def test_reward_models_are_served_on_both_nodes_and_a_dead_pool_comes_back(nodes: Nodes, tmp_path: Path) -> None:
    build(tmp_path / "hub", only=(REPO,))
    with HubServer(tmp_path / "hub") as server:
        hub = {"endpoint": server.url, "cache_dir": str(tmp_path / "cache"), "offline": False}
        with Hub(HubConfig(**hub)) as client:
            commit = client.inspect(REPO).commit
        models = Models(parse({"hub": hub, "serving": {"nodes": 2, "threads": 1}}))
        spec = chat_reward(commit)
        assert await models.ensure([spec, chat_reward("f" * 40)]) == {chat_reward("f" * 40).digest: ANY}
        values = {(await models.run(spec, make_sample("No."))).value for _ in range(30)}  # each by either of the two
        assert len(values) == 1, "both give the same number"
        first, second = await models.replicas()
        assert first.ready and second.ready and first.pid != second.pid and min(first.scored, second.scored) > 0
        actors = [ray.get_actor(f"{MODELS_NAME}_{number}") for number in range(2)]
        pids = await asyncio.gather(*(actor.pid.remote() for actor in actors))
        os.kill(pids[0], signal.SIGKILL)
        again = await asyncio.gather(*(models.run(spec, make_sample("No.")) for _ in range(8)))
        assert [verdict.value for verdict in again] == pytest.approx([*values] * 8, abs=2e-4), "now in batches"
        assert await models.ensure([]) == {}
        while await models.replicas():
            await asyncio.sleep(0.05)


async def test_when_the_node_that_started_the_service_goes_the_other_one_goes_on_with_the_same_tools(
    nodes: Nodes,
) -> None:
    await nodes.group("left", ["5", "6"], step=GONE - 1)
    before = nodes.rows("left")
    actors = [Named("it", partial(_start_somewhere, number)) for number in range(2)]
    assert len({await actor.call("node", seconds=200) for actor in actors}) == 2, "each on a node of its own"
    await nodes.take_one_away()

    async def moved() -> None:
        while {await actor.call("node", seconds=200) for actor in actors} != {nodes.head}:
            await asyncio.sleep(0.1)  # a process may answer for a moment after its node has gone

    await asyncio.wait_for(moved(), 200)
    rest = [await nodes.here.score.remote(text, "left", session, GONE - 1) for session, text in ((2, "5"), (3, "5."))]
    assert rest == [(1.0, "stern"), (0.0, "stern")]
    assert await nodes.here.score.remote("5.", "next", 0, GONE + 2) == (1.0, "final_answer")
    rows = nodes.rows("left")
    assert rows[:2] == before, "what it had acknowledged is there"
    assert len({(row["snapshot"], row["route"]) for row in rows}) == 1 and len(rows) == 4
    assert {row["attempt"] for row in rows} == {1}
