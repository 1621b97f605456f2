# SPDX-License-Identifier: Apache-2.0
"""`Fleet`: which reward models are served when, so that the tools of a step are there when its responses come.

A model that a submission in the library's inbox would make live, or put into the shadow, is fetched and started *ahead*
of its step, beside what is served, while the training goes on; the submission waits until that is done. At the step
boundary `serve` makes the models of the step, and of earlier steps that still may score, the ones that are served: what
left is stopped after its last lease, and where there was no room beside it, what is new is started now, and the step
waits.

Guarantees: a model that cannot be served gets no say: its submission is refused, or its event is taken back at the
boundary, before its step's tools are handed out, with the reason in the library's log. The one exception is a model
that is live when the training starts: then it does not begin, since it would go on with another ruler than was asked
for.

Not covered: an asynchronous trainer needs room for the models of all steps that are still under way; a model that finds
none is refused. With ``placement: colocated`` nothing starts ahead, as the memory belongs to the training then.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from verl_rlar.config import RlarConfig
from verl_rlar.errors import LibraryError, RlarError, ToolError, ToolTimeout, ToolUnavailable
from verl_rlar.inbox import Submission, read, waiting
from verl_rlar.library import EventKind, Library, LibraryView, spec_from_json
from verl_rlar.types import ToolSpec

logger = logging.getLogger(__name__)

WATCH = "rlar"
"""Who it is that promotes and takes out tools, in the library's log."""


class Servers(Protocol):
    """Where models are served: `verl_rlar.nodes.Models`; see there."""

    async def ensure(self, specs: Sequence[ToolSpec]) -> Mapping[str, str]: ...

    async def prefetch(self, spec: ToolSpec) -> bool: ...


@dataclass(frozen=True, kw_only=True)
class _Coming:
    """A model that is started ahead."""

    spec: ToolSpec
    start: asyncio.Task[bool]


class Fleet:
    """See the module. Use from one event loop.

    Args:
        config: The settings of the run.
        library: Whose tools; this process is its writer.
        servers: Where models are served.
    """

    def __init__(self, config: RlarConfig, library: Library, servers: Servers) -> None:
        self._config = config
        self._library = library
        self._servers = servers
        self._begun = False
        """Whether a step of this start has its models."""
        self._ready: dict[str, ToolSpec] = {}
        """Models that are served, by digest."""
        self._coming: dict[str, _Coming] = {}
        """By digest."""
        self._seen: set[str] = set()
        """Names of submissions that were looked at."""
        self._looking: asyncio.Task[None] | None = None
        self._retiring: asyncio.Task[None] | None = None

    @property
    def serves(self) -> bool:
        """Whether there is a model that is served, or started ahead."""
        return bool(self._ready or self._coming)

    # --- ahead of a step ---

    def look(self) -> None:
        """Starts what waits in the inbox, and goes on looking, for as long as the event loop runs."""
        if self._config.serving.placement == "colocated":
            return
        self._look()
        if self._looking is None:
            self._looking = asyncio.get_running_loop().create_task(self._keep_looking())

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(self._config.library.look_s)
            self._look()

    def _look(self) -> None:
        files = waiting(self._library.path)
        self._seen &= {file.name for file in files}
        for file in files:
            if file.name in self._seen:
                continue
            self._seen.add(file.name)
            try:
                spec = self._asked_for(read(file))
            except (RlarError, OSError, TypeError, ValueError, AttributeError, LookupError):
                continue  # whoever takes it in will say what is wrong with it
            if spec is not None and spec.digest not in self._ready and spec.digest not in self._coming:
                logger.warning("%s (%s) is started ahead of its step", spec.name, spec.target)
                start = asyncio.get_running_loop().create_task(self._servers.prefetch(spec))
                self._coming[spec.digest] = _Coming(spec=spec, start=start)

    def _asked_for(self, asked: Submission) -> ToolSpec | None:
        """The reward model that a submission wants to have a say, or to score in the shadow."""
        if asked.event not in ("live", "shadow") or (asked.exam is not None and not asked.exam.passed):
            return None
        spec = spec_from_json(asked.spec) if asked.spec is not None else self._library.spec(asked.digest)
        return spec if spec.kind == "reward_model" else None

    def admits(self, asked: Submission) -> bool:
        """Whether a submission can be taken in: False as long as its model is being started.

        Raises:
            LibraryError: Its model cannot be served.
        """
        coming = self._coming.get(asked.digest)
        if coming is None:
            return True
        if not coming.start.done():
            return False
        del self._coming[asked.digest]
        try:
            if coming.start.result():
                self._ready[asked.digest] = coming.spec
        except (ToolError, ConnectionError) as error:
            raise LibraryError(f"{coming.spec.name} cannot be served: {error}") from None
        return True

    # --- at a step ---

    async def serve(self, step: int, behind: int = 0) -> None:
        """Returns when the models of a step are served, or are not among its tools any more.

        Args:
            step: The step that is about to begin.
            behind: How many steps before it may still have responses to score.

        Raises:
            ToolUnavailable: At the start of the training, a model that is live cannot be served.
        """
        while True:
            wanted = {spec.digest: spec for spec in self._models(step, behind)}
            coming = {d: one.spec for d, one in self._coming.items()}
            if wanted.keys() <= self._ready.keys():
                if self._ready.keys() - wanted.keys() - coming.keys():
                    self._retire(wanted | coming)
                self._begun = True
                return
            new = ", ".join(spec.name for digest, spec in wanted.items() if digest not in self._ready)
            logger.warning("step %d waits for its reward models to be served; new: %s", step, new)
            try:
                refused = await self._servers.ensure(list((wanted | coming).values()))
            except (ToolTimeout, ConnectionError) as error:
                refused = {digest: str(error) for digest in wanted if digest not in self._ready}
            self._ready = {digest: spec for digest, spec in wanted.items() if digest not in refused}
            for digest in refused:
                self._coming.pop(digest, None)
            if not self._take_out(step, {digest: why for digest, why in refused.items() if digest in wanted}):
                self._begun = True
                return

    def _models(self, step: int, behind: int) -> Iterable[ToolSpec]:
        """The reward models of a step, and those of the steps before it; the most important ones first."""
        now = LibraryView.snapshot(self._library, step)  # the writer's own would hand the step out
        tools = [*now.tools, *now.shadows]
        for before in range(step - 1, max(step - behind, 0) - 1, -1):
            tools += LibraryView.snapshot(self._library, before).tools
        return (tool for tool in tools if tool.kind == "reward_model")

    def _retire(self, kept: Mapping[str, ToolSpec]) -> None:
        """Has what left stopped, while the step goes on."""

        async def ensure() -> None:
            try:
                await self._servers.ensure(list(kept.values()))
            except (ToolError, ConnectionError) as error:
                logger.warning("reward models that left are not stopped: %s", error)

        self._ready = {digest: spec for digest, spec in self._ready.items() if digest in kept}
        self._retiring = asyncio.get_running_loop().create_task(ensure())

    def _take_out(self, step: int, refused: Mapping[str, str]) -> bool:
        """Takes models that cannot be served out of a step; whether its tools are others now."""
        changed = False
        standings = self._library.standings(step)
        for digest, why in refused.items():
            standing = standings[digest]
            if standing.event == "live" and not self._begun:
                raise ToolUnavailable(
                    f"before step {step}: {standing.tool} ({digest}) is live and cannot be served: {why}. Mend that, "
                    f"or take it out by hand: rlar tools retire {standing.tool} --in {self._library.path}"
                )
            back = self._library.predecessor(digest, step) if standing.event == "live" else None
            event: EventKind = "rolled_back" if back else "quarantined"
            try:
                said = self._library.append(
                    event, digest, by=WATCH, why=f"it cannot be served: {why}", step=step, restores=back
                )
            except LibraryError as error:
                logger.error("before step %d: %s cannot be served: %s (%s)", step, standing.tool, why, error)
            else:
                logger.warning("before step %d: %s is %s: %s", step, said.tool, said.event, said.why)
                changed = True
        return changed
