# SPDX-License-Identifier: Apache-2.0
"""Where code runs that we did not write (I6). `base` says what a sandbox does; `docker` and `fusion` do it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from verl_rlar.errors import ToolUnavailable
from verl_rlar.sandbox.base import GRACE_S, Answerer, BoxLost, End, Job, Ran, Sandbox

if TYPE_CHECKING:
    from verl_rlar.config import SandboxConfig

__all__ = ["GRACE_S", "Answerer", "BoxLost", "End", "Job", "Ran", "Sandbox", "check_reachable", "open_sandbox"]


def open_sandbox(config: SandboxConfig, *, progress: Callable[[str], None] | None = None) -> Sandbox:
    """The sandbox that the settings name; it is ready when it has been entered (``async with``).

    Args:
        config: Back-end, image, limits.
        progress: Takes a line of text now and then while an image is built or pulled.

    Raises:
        ConfigError: The back-end lacks a setting.
        ToolUnavailable: The settings say that there is none.
    """
    if config.backend == "docker":
        from verl_rlar.sandbox.docker import DockerSandbox

        return DockerSandbox(config, progress=progress)
    if config.backend == "sandbox_fusion":
        from verl_rlar.sandbox.fusion import FusionSandbox

        return FusionSandbox(config)
    raise ToolUnavailable("rlar.sandbox.backend=none: there is nowhere to run code")


def check_reachable(config: SandboxConfig) -> None:
    """Makes sure that the engine or server that the settings name answers.

    Raises:
        ConfigError: The back-end lacks a setting.
        ToolUnavailable: It does not answer; the message says what was tried and what to do.
    """
    if config.backend == "docker":
        from verl_rlar.sandbox.engine import connect

        connect(config).close()
    else:
        asyncio.run(_enter_and_leave(open_sandbox(config)))


async def _enter_and_leave(sandbox: Sandbox) -> None:
    async with sandbox:
        pass
