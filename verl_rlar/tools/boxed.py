# SPDX-License-Identifier: Apache-2.0
"""`BoxRunner`: runs the tools that need a sandbox, in one process for all reward workers of a node.

Two kinds of tool come here: a rule of ours that has a program of the response run (`verl_rlar.tools.rules.code`), and
a verifier, which is code that we did not write and runs in a box itself (`verl_rlar.tools.verifier`).

Guarantees: `run` ends within ``rlar.sandbox.queue_timeout_s`` plus the tool's ``timeout_s`` plus `GRACE_S`; what the
policy's program does is a verdict, what goes wrong with us is an error. The sandbox is started by the first call that
needs it, as are two processes for the built-in rules that verifiers wrap; leaving the context ends both. If the sandbox
cannot be started, every call says why, and the next one tries again after `RETRY_S`.

Not covered: a caller that is cancelled gives its boxes up to be destroyed.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Coroutine, Mapping
from types import TracebackType
from typing import Any, TypeVar, cast

from verl_rlar.config import RulesConfig, SandboxConfig
from verl_rlar.errors import ToolError, ToolTimeout, ToolUnavailable
from verl_rlar.sandbox import GRACE_S, Sandbox, open_sandbox
from verl_rlar.tools.rule import BoxedRule, load_version
from verl_rlar.tools.runner import RuleRunner
from verl_rlar.tools.verifier import verify, wrappable
from verl_rlar.types import Sample, ToolSpec, Verdict

logger = logging.getLogger(__name__)

WRAPPED = RulesConfig(processes=2)
"""Processes for the built-in rules that verifiers wrap."""
RETRY_S = 30.0
"""How long a sandbox that could not be started is not tried again, in seconds."""


T = TypeVar("T")


async def within(seconds: float, work: Coroutine[Any, Any, T]) -> T:
    """Waits for so long, without a task of its own where Python can do that (from 3.11 on).

    Raises:
        TimeoutError, asyncio.TimeoutError: It was not enough.
    """
    if sys.version_info < (3, 11):
        return await asyncio.wait_for(work, seconds)
    async with asyncio.timeout(seconds):
        return await work


def _brief(error: ToolUnavailable) -> str:
    """What is wrong with the sandbox, in a line; the log has it whole."""
    return " ".join(str(error).split("\n")[:2]) + "; `rlar doctor` says what to do"


class BoxRunner:
    """See the module. Use as ``async with BoxRunner(config) as runner``, from one event loop.

    Args:
        config: Back-end, image, limits.
        sources: Source text of every verifier that may be called, by `ToolSpec.source_sha256`.
    """

    def __init__(self, config: SandboxConfig, sources: Mapping[str, str] | None = None) -> None:
        self._config = config
        self._sources = {} if sources is None else sources
        self._starting: asyncio.Task[Sandbox] | None = None
        self._rules: asyncio.Task[RuleRunner] | None = None

    async def __aenter__(self) -> BoxRunner:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the sandbox and the processes for rules, as far as they were started."""
        rules, self._rules = self._rules, None
        if rules is not None:
            await asyncio.wait([rules])
            if rules.exception() is None:
                await asyncio.to_thread(rules.result().close)
        starting, self._starting = self._starting, None
        if starting is None:
            return
        if not starting.done():
            starting.cancel()
        await asyncio.wait([starting])
        if not starting.cancelled() and starting.exception() is None:
            await starting.result().__aexit__(None, None, None)

    async def start(self) -> None:
        """Starts the sandbox, which the first call would do otherwise.

        Raises:
            ToolUnavailable: There is no sandbox here.
        """
        try:
            await self._sandbox()
        except ToolUnavailable as error:
            raise ToolUnavailable(_brief(error)) from None

    async def run(self, spec: ToolSpec, sample: Sample) -> Verdict:
        """Runs one tool on one sample.

        Raises:
            ToolTimeout: No box was free in time, or the tool did not end in time.
            ToolUnavailable: There is no sandbox here.
            ToolError: The tool broke, or answered something that is no verdict.
            ConnectionError: A box was lost under the call; worth one more try.
        """
        limit = self._config.queue_timeout_s + spec.timeout_s + GRACE_S
        try:
            return await within(limit, self._run(spec, sample))
        except (TimeoutError, asyncio.TimeoutError):
            raise ToolTimeout(
                f"{spec.name}: still at work after {spec.timeout_s:g} s and rlar.sandbox.queue_timeout_s="
                f"{self._config.queue_timeout_s:g} s"
            ) from None
        except (ToolError, ConnectionError):
            raise
        except Exception as error:  # the boundary to tools: whatever they raise is a broken tool, not a score
            raise ToolError(f"{spec.name}: {type(error).__name__}: {str(error)[:300]}") from error

    async def _run(self, spec: ToolSpec, sample: Sample) -> Verdict:
        try:
            sandbox = await self._sandbox()
        except ToolUnavailable as error:  # this becomes the reason of every score
            raise ToolUnavailable(f"{spec.name}: {_brief(error)}") from None
        if spec.kind == "verifier":
            source = self._sources.get(spec.source_sha256)
            if source is None:
                raise ToolUnavailable(f"{spec.name}: its source {spec.source_sha256[:12]} is not in the library")
            return await verify(spec, source, sample, sandbox, self._config, await self._rules_for(spec))
        return await cast(BoxedRule, load_version(spec))(sample, sandbox, self._config)

    async def _rules_for(self, spec: ToolSpec) -> RuleRunner | None:
        """What runs the rules that a verifier wraps; the first time, that takes seconds."""
        if not spec.wraps:
            return None
        if self._rules is None or (self._rules.done() and self._rules.exception()):
            targets = tuple(rule.target for rule in wrappable().values())
            self._rules = asyncio.create_task(asyncio.to_thread(RuleRunner, WRAPPED, targets))
        return await asyncio.shield(self._rules)

    async def _sandbox(self) -> Sandbox:
        if self._starting is None:
            self._starting = asyncio.ensure_future(self._start())
            self._starting.add_done_callback(self._forget_failed)
        return await asyncio.shield(self._starting)

    async def _start(self) -> Sandbox:
        sandbox = open_sandbox(self._config, progress=lambda line: logger.info("%s", line))
        return await sandbox.__aenter__()

    def _forget_failed(self, done: asyncio.Task[Sandbox]) -> None:
        if not done.cancelled() and done.exception() is not None:
            logger.error("the sandbox could not be started: %s", done.exception())
            asyncio.get_running_loop().call_later(RETRY_S, self._forget, done)

    def _forget(self, failed: asyncio.Task[Sandbox]) -> None:
        if self._starting is failed:
            self._starting = None
