# SPDX-License-Identifier: Apache-2.0
"""`ServedModels`: the reward models that one process serves, from the spec of a tool to its verdict on a sample.

In training, an actor on each serving node holds one (`verl_rlar.nodes`); outside of it, whoever scores does, in his own
process. A model is served when `ensure` or `prefetch` says so, or else when it is first asked for.

Guarantees: a snapshot that is not on this node is fetched by its commit, after the gate has let it pass once more; a
start that failed is not tried again before the next `ensure`; leaving the context ends every server.

Not covered: other nodes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from types import TracebackType

from verl_rlar.config import HubConfig, ServingConfig
from verl_rlar.errors import ToolUnavailable
from verl_rlar.serving import Pool, ReplicaState, ServedModel
from verl_rlar.snapshots import Snapshots
from verl_rlar.tools.reward_model import RewardModelRunner, served_model
from verl_rlar.types import Sample, ToolSpec, Verdict

logger = logging.getLogger(__name__)


class ServedModels:
    """See the module. A runner, see `RewardModelRunner.run`. Use from one event loop, as ``async with``.

    Args:
        serving: Where and how models are served.
        hub: Where snapshots come from.
    """

    def __init__(self, serving: ServingConfig, hub: HubConfig) -> None:
        self._config = serving
        self._snapshots = Snapshots(hub)
        self._pool = Pool(serving)
        self._models: dict[str, ServedModel] = {}
        """By digest of the spec."""
        self._starts: dict[str, asyncio.Task[bool]] = {}
        """By digest, the starts of models that were asked for without having been ensured."""
        self._runner = RewardModelRunner(self._pool, lambda spec: self._models[spec.digest].path or "")

    async def __aenter__(self) -> ServedModels:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends every server."""
        for start in self._starts.values():
            start.cancel()
        await asyncio.gather(*self._starts.values(), return_exceptions=True)
        await self._pool.close()

    async def ensure(self, specs: Sequence[ToolSpec]) -> dict[str, str]:
        """Makes these the models that are served; returns when they are ready.

        Args:
            specs: Those of every step that still may score, the most important ones first.

        Returns:
            Why a model cannot be served, by digest of its spec: it cannot be had or started, or there is no room for
            all of them together (I5). The others are served.
        """
        self._starts.clear()
        refused: dict[str, str] = {}
        wanted: dict[str, ServedModel] = {}
        for spec in specs:
            try:
                wanted[spec.digest] = await self._model(spec)
            except ToolUnavailable as error:
                refused[spec.digest] = str(error)
        try:
            await self._pool.ensure(list(wanted.values()))
        except ToolUnavailable:  # of one of them, or of all together: one by one, those that run already first
            kept: list[ServedModel] = []
            for digest, model in sorted(wanted.items(), key=lambda item: not self._pool.serves(item[1])):
                try:
                    await self._pool.ensure([*kept, model])
                    kept.append(model)
                except ToolUnavailable as error:
                    refused[digest] = str(error)
        return refused

    async def prefetch(self, spec: ToolSpec) -> bool:
        """Fetches and starts a model that will be wanted soon.

        Returns:
            Whether it is ready; False if there is no room beside what is served.

        Raises:
            ToolUnavailable: It cannot be served.
        """
        return await self._pool.prefetch([await self._model(spec)])

    async def run(self, spec: ToolSpec, sample: Sample) -> Verdict:
        """See `RewardModelRunner.run`. What is not served yet is started first, if there is room; the deadline of the
        call counts from when the model can be asked, which may take ``start_timeout_s``."""
        model = await self._model(spec)
        if not self._pool.serves(model):
            if spec.digest not in self._starts:
                self._starts[spec.digest] = asyncio.create_task(self._pool.prefetch([model]))
            if not await asyncio.shield(self._starts[spec.digest]):
                raise ToolUnavailable(f"{spec.name}: it is not served, and there is no room for it beside what is")
        await self._pool.ready(model, self._config.start_timeout_s)
        return await self._runner.run(spec, sample)

    async def sleep(self) -> None:
        """See `Pool.sleep`."""
        start = time.perf_counter()
        await self._pool.sleep()
        logger.info("%d reward models sleep, after %.2f s", len(self._pool.replicas()), time.perf_counter() - start)

    async def wake(self) -> None:
        """See `Pool.wake`."""
        start = time.perf_counter()
        await self._pool.wake()
        logger.info("%d reward models are awake, after %.2f s", len(self._pool.replicas()), time.perf_counter() - start)

    def replicas(self) -> tuple[ReplicaState, ...]:
        """See `Pool.replicas`."""
        return self._pool.replicas()

    async def _model(self, spec: ToolSpec) -> ServedModel:
        model = self._models.get(spec.digest)
        if model is None:
            address = (spec.serving or {}).get("address")
            path = None if address else await asyncio.to_thread(self._snapshots.have, spec)
            model = self._models[spec.digest] = served_model(spec, path)
        return model
