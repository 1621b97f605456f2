# SPDX-License-Identifier: Apache-2.0
"""What runs on the nodes of a Ray cluster for a training: the boxes of each node, and the servers of reward models.

Both are named actors which reward workers share. `Boxes` is the way to those of the own node. `Models` is the way to
the `rlar.serving.nodes` actors with a pool of reward models each, on GPUs that Ray sets aside for them
(`rlar.serving.ray_gpus`: standalone placement) or that the actor model of the training has, too (`rlar.serving.gpus`
with ``placement: colocated``). Every pool serves all models, and a call goes to the least busy one.

Guarantees: an actor that died is started again, by Ray, or, where the process that started it is gone, too, by whoever
misses it first; calls try until their deadline, so its death costs a moment. Servers that are gone with it are started
when they are first asked for.

Not covered: one model spread over several nodes; pools that serve different models.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from verl_rlar.config import RlarConfig, SandboxConfig, ServingConfig
from verl_rlar.errors import ToolTimeout
from verl_rlar.sandbox import BoxLost
from verl_rlar.serving import ReplicaState
from verl_rlar.tools.boxed import BoxRunner
from verl_rlar.tools.served import ServedModels
from verl_rlar.types import Sample, ToolSpec, Verdict

logger = logging.getLogger(__name__)

BOXES_NAME, MODELS_NAME = "rlar_boxes", "rlar_models"
"""Beginnings of the actors' names."""
ACTOR_START_S = 60.0
"""How much longer than what it asks for a call may take, in seconds: its actor starts first."""
HEAD = "node:__internal_head__"
"""The resource that Ray gives its head node alone; there is 1 of it."""
HARDLY_ANY = 0.001
GONE = (ray.exceptions.RayActorError, ray.exceptions.ActorUnschedulableError)
"""What Ray raises for an actor that has died, or whose node has."""
RECONNECT_S = 0.2
"""Pause between two calls to an actor that does not answer, in seconds."""


class Named:
    """An actor that is found by its name, and started by whoever misses it.

    Args:
        what: What it is, for messages.
        start: Starts it, or finds it; gives its handle. It must not know who holds this object: the actor ends when its
            handle is forgotten, and a circle would be forgotten later.
    """

    def __init__(self, what: str, start: Callable[[], Any]) -> None:
        self._what = what
        self._start = start
        self._handle: Any = None
        self.calls = 0
        """Number of calls that it has from here at the moment."""

    async def call(self, method: str, *args: Any, seconds: float) -> Any:
        """Calls it; while it is dead and is started again, tries until the deadline.

        Raises:
            ConnectionError: It is gone.
            ToolTimeout: It did not answer in time.
            Exception: What the call itself raised.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        self.calls += 1
        try:
            while True:
                if self._handle is None:
                    self._handle = self._start()
                try:
                    return await asyncio.wait_for(getattr(self._handle, method).remote(*args), end - loop.time())
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from None  # without the other process's traceback: a score's reason quotes it
                except GONE as error:
                    if loop.time() + RECONNECT_S >= end:
                        raise ConnectionError(f"{self._what} is gone ({type(error).__name__})") from None
                    await asyncio.sleep(RECONNECT_S)
                    self._handle = same_or(self._handle, self._start())
                except (TimeoutError, asyncio.TimeoutError):
                    raise ToolTimeout(f"{self._what} did not answer in {seconds:g} s") from None
        finally:
            self.calls -= 1


def same_or(held: Any, found: Any) -> Any:
    """Of two handles the first, as long as both are of one actor: Ray ends an actor when the handle that its start gave
    is forgotten, and one that was found by name does not count."""
    return held if held == found else found


# --- Boxes ------------------------------------------------------------------------------------------------------------


class _BoxActor:
    """`BoxRunner` as an actor: the boxes of one node. When it dies, its boxes see that and go."""

    def __init__(self, config: SandboxConfig) -> None:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
        self._sources: dict[str, str] = {}
        self._runner = BoxRunner(config, self._sources)

    async def run(self, spec: ToolSpec, sample: Sample, source: str | None) -> Verdict:
        if source is not None:
            self._sources[spec.source_sha256] = source
        return await self._runner.run(spec, sample)

    async def pid(self) -> int:
        return os.getpid()


class Boxes:
    """This node's boxes, for one reward worker: a runner of the tools that need a sandbox, shared by the node.

    The actor is started by the first call. `run` has the errors of `BoxRunner.run`.

    Args:
        config: Back-end, image, limits.
        source: Gives the code of a verifier by its hash, or raises `ToolUnavailable`: `Client.source`. The code goes
            along with each call (some KiB), so an actor that was started anew, on whatever node, lacks nothing.
    """

    def __init__(self, config: SandboxConfig, source: Callable[[str], Awaitable[str]]) -> None:
        self._config = config
        self._source = source
        self._actor = Named("this node's actor for boxes", partial(_start_boxes, config))

    async def run(self, spec: ToolSpec, sample: Sample) -> Verdict:
        """See `BoxRunner.run`."""
        source = await self._source(spec.source_sha256) if spec.kind == "verifier" else None
        seconds = self._config.queue_timeout_s + spec.timeout_s + ACTOR_START_S
        try:
            return await self._actor.call("run", spec, sample, source, seconds=seconds)
        except BoxLost:
            raise
        except ConnectionError as error:
            raise BoxLost(f"{spec.name}: {error}") from None


def _start_boxes(config: SandboxConfig) -> Any:
    node = ray.get_runtime_context().get_node_id()
    actor: Any = ray.remote(_BoxActor)
    return actor.options(
        name=f"{BOXES_NAME}_{node}",
        get_if_exists=True,
        max_restarts=-1,
        max_concurrency=10_000,
        num_cpus=0,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
    ).remote(config)


def on_head_node() -> dict[str, float]:
    """Resources for an actor that is to be on Ray's head node: one that asks for nothing may be put on any node, even
    by a soft `NodeAffinitySchedulingStrategy` for another one (seen with Ray 2.60)."""
    return {HEAD: HARDLY_ANY} if HEAD in ray.cluster_resources() else {}


def _place(serving: ServingConfig, number: int) -> Any:
    """The strategy for one of the actors for reward models. One that asks Ray for no GPU may be put on any node, also
    beside another: so it is said where."""
    if serving.ray_gpus:
        return "SPREAD"
    if serving.nodes == 1 and not serving.gpus:
        return "DEFAULT"
    alive = [node for node in ray.nodes() if node["Alive"]]
    able = [node for node in alive if serving.gpus and node["Resources"].get("GPU")] or alive
    return NodeAffinitySchedulingStrategy(sorted(node["NodeID"] for node in able)[number % len(able)], soft=False)


# --- Reward models ----------------------------------------------------------------------------------------------------


class _ModelActor(ServedModels):
    """`ServedModels` as an actor. When it dies, its servers see that and go."""

    def __init__(self, config: RlarConfig) -> None:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
        logging.getLogger("httpx").setLevel(logging.WARNING)
        gpus = tuple(int(gpu) for gpu in ray.get_gpu_ids())  # none, if Ray has set none aside
        super().__init__(config.serving.model_copy(update={"gpus": gpus} if gpus else {}), config.hub)

    async def pid(self) -> int:
        return os.getpid()


class Models:
    """The reward models of a run: a runner of tools of that kind, and the one who says which are served.

    The actors are started by the first call.

    Args:
        config: The settings of the run.
    """

    def __init__(self, config: RlarConfig) -> None:
        self._config = config
        self._pools = [
            Named(f"the actor for reward models {number}", partial(_start_models, config, number))
            for number in range(config.serving.nodes)
        ]

    async def run(self, spec: ToolSpec, sample: Sample) -> Verdict:
        """See `ServedModels.run`."""
        fewest = min(pool.calls for pool in self._pools)
        pool = random.choice([pool for pool in self._pools if pool.calls == fewest])
        seconds = spec.timeout_s + self._config.serving.start_timeout_s + ACTOR_START_S
        return await pool.call("run", spec, sample, seconds=seconds)

    async def ensure(self, specs: Sequence[ToolSpec]) -> dict[str, str]:
        """See `ServedModels.ensure`; a model is served everywhere, or it is refused.

        Raises:
            ConnectionError, ToolTimeout: An actor does not answer.
        """
        refused: dict[str, str] = {}
        for said in await asyncio.gather(*(self._change(pool, "ensure", specs) for pool in self._pools)):
            refused |= said
        return refused

    async def prefetch(self, spec: ToolSpec) -> bool:
        """See `ServedModels.prefetch`; and the errors of `ensure`."""
        return all(await asyncio.gather(*(self._change(pool, "prefetch", spec) for pool in self._pools)))

    async def sleep(self) -> None:
        """See `Pool.sleep`; the same errors, and those of `ensure`."""
        await asyncio.gather(*(self._change(pool, "sleep") for pool in self._pools))

    async def wake(self) -> None:
        """See `Pool.wake`; the errors of `ensure`."""
        await asyncio.gather(*(self._change(pool, "wake") for pool in self._pools))

    async def replicas(self) -> tuple[ReplicaState, ...]:
        """All servers, on all nodes. The errors of `ensure`."""
        found = await asyncio.gather(*(pool.call("replicas", seconds=ACTOR_START_S) for pool in self._pools))
        return tuple(state for of_pool in found for state in of_pool)

    async def _change(self, pool: Named, method: str, *args: Any) -> Any:
        serving = self._config.serving
        seconds = self._config.hub.download_timeout_s + serving.start_timeout_s + serving.drain_timeout_s
        return await pool.call(method, *args, seconds=seconds + ACTOR_START_S)


def _start_models(config: RlarConfig, number: int) -> Any:
    serving = config.serving
    actor: Any = ray.remote(_ModelActor)
    return actor.options(
        name=f"{MODELS_NAME}_{number}",
        get_if_exists=True,
        max_restarts=-1,
        max_concurrency=10_000,
        num_cpus=0,
        num_gpus=serving.ray_gpus,
        scheduling_strategy=_place(serving, number),
    ).remote(config)
