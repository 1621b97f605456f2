# SPDX-License-Identifier: Apache-2.0
"""`Dispatcher`: the router, the tools and the scorer of a training run in one process, without verl, Ray or a ledger.

For whoever scores outside a training: `rlar score`, `rlar plan`, notebooks, tests.

Guarantees: the same snapshot, routing rule, deadlines and scores as in training with the same settings; the start of
worker processes and servers is not charged to the first call's deadline; leaving the context ends all of them.

Not covered: nothing is recorded, and an unscored sample has no siblings whose mean could stand in for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

from verl_rlar.clusters import Clusters
from verl_rlar.competence import NOTHING, Competence
from verl_rlar.config import RlarConfig
from verl_rlar.router import FeatureRouter, RouteCache
from verl_rlar.scoring import Scorer
from verl_rlar.tools.boxed import BoxRunner
from verl_rlar.tools.rubric import RubricRunner
from verl_rlar.tools.runner import RuleRunner
from verl_rlar.tools.served import ServedModels
from verl_rlar.trusted import trusted_snapshot
from verl_rlar.types import Query, Route, Sample, Score, Snapshot


class Dispatcher:
    """Routes queries and scores samples. Use as ``async with Dispatcher(config) as dispatcher``.

    Args:
        config: The same settings as under `rlar.*` in training.
        snapshot: The live tools; None: the built-in ones and the user's own, without those that need a sandbox if there
            is to be none.
        sources: Source text of every verifier among them, by `ToolSpec.source_sha256`.
        competence: What is known of these tools; see `verl_rlar.competence`.
        clusters: Clusters to go by, such as those of a library. None: new ones, whose ids are not those of a training.

    Raises:
        ConfigError: The settings name a tool that is not live, or one of the user's own cannot be used.
    """

    def __init__(
        self,
        config: RlarConfig,
        snapshot: Snapshot | None = None,
        sources: Mapping[str, str] | None = None,
        competence: Competence = NOTHING,
        clusters: Clusters | None = None,
    ) -> None:
        self.snapshot = trusted_snapshot(config) if snapshot is None else snapshot
        self.at_once = config.rules.processes
        """How many samples to score at the same time: with more, some would spend their deadline in the queue."""
        self.competence = competence
        self.clusters = Clusters() if clusters is None else clusters
        router = FeatureRouter(config.routing, lambda snapshot: competence, self.clusters)
        router.check(self.snapshot)
        self._config = config
        self._routes = RouteCache(router, size=10_000)
        self._runner: RuleRunner | None = None
        self._boxes = BoxRunner(config.sandbox, sources)
        self._models = ServedModels(config.serving, config.hub)
        self._rubrics = RubricRunner(config)

    async def __aenter__(self) -> Dispatcher:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._runner is not None:
            self._runner.close()
        await self._boxes.close()
        await self._models.close()
        await self._rubrics.close()

    async def route(self, query: Query) -> Route:
        """Decides which tools score the responses to a query. Starts no process."""
        return await self._routes.route(query, self.snapshot)

    async def score(self, sample: Sample, route: Route | None = None) -> Score:
        """Scores a sample by a route; None: by the route of its query. The first call waits for the worker processes.

        Raises:
            ToolUnavailable: The worker processes do not start.
        """
        if self._runner is None:
            rules = tuple(tool.target for tool in self.snapshot.tools if tool.kind == "rule" and not tool.boxed)
            self._runner = RuleRunner(self._config.rules, rules)
        scorer = Scorer(self._config.scoring, self._runner, self._boxes, self._models, self._rubrics)
        return await scorer.score(sample, route or await self.route(sample.query), self.snapshot)
