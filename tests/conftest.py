# SPDX-License-Identifier: Apache-2.0
"""Shared by all tests: samples, the planted rules that workers must be able to import, and a real Docker engine.

Tests marked ``docker`` need an engine; ``tests/engine.sh`` brings one. Where there is none they are skipped with the
reason, but in CI (``CI=true`` or ``REQUIRE_DOCKER=1``) that is a failure.

With ``-n 2`` (pytest-xdist; ``tests/run.sh`` with two cores or more) a file's tests stay together in one process,
each with an engine of its own. The files in `RAY` are as one file: two clusters at once would ask for more memory than
a small machine has.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from verl_rlar.config import SandboxConfig
from verl_rlar.errors import ToolUnavailable
from verl_rlar.types import Message, Query, Sample

ENGINES = os.environ.get("RLAR_TEST_ENGINES", "").split()
if ENGINES and "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["DOCKER_HOST"] = ENGINES[int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")) % len(ENGINES)]
sys.path.insert(0, str(Path(__file__).parent))  # worker processes import `planted` from here
os.environ.setdefault("RAY_raylet_start_wait_time_s", "300")  # 30 s are not enough on a busy machine
os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "300")
signal.signal(signal.SIGINT, signal.default_int_handler)  # where a shell started us with `&`, children would ignore it
hypothesis.settings.register_profile(  # how long an example takes says more about the machine than about the code
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")


# --- Order ------------------------------------------------------------------------------------------------------------

RAY = ("train_models", "train", "kill", "drill", "multitask_cpu", "nodes", "reward_manager")
"""Files whose tests start Ray, without ``test_``."""
LONG = (*RAY, "attacks", "code_cheats", "coder", "benchmarks", "serving", "admission")
"""Files that take longest: they come first when two processes share the work, so that neither is left with one; those
that wait for deadlines beside those that compute."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        names = [f"test_{name}" for name in LONG]
        items.sort(key=lambda item: names.index(item.path.stem) if item.path.stem in names else len(names))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        """By file, those that use Ray as one."""

        def _split_scope(self, nodeid: str) -> str:
            file = str(super()._split_scope(nodeid))
            return "Ray" if Path(file).stem.removeprefix("test_") in RAY else file

    return Files(config, log) if config.getoption("dist") == "loadfile" else None


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, Any, Any]:
    """Halves of surrogate pairs, which hostile texts have, cannot be sent from one process to another."""
    report = yield
    sent = json.loads(json.dumps(report, ensure_ascii=False).encode(errors="replace"))
    if isinstance(report.get("longrepr"), tuple):  # of a test that was skipped; JSON has none
        sent["longrepr"] = tuple(sent["longrepr"])
    return sent


# --- Samples ----------------------------------------------------------------------------------------------------------


def make_query(prompt: str = "What is 6 times 7?", reference: str | None = "42", **extra: Any) -> Query:
    return Query(messages=(Message(role="user", content=prompt),), reference=reference, data_source="test", extra=extra)


def make_sample(response: str = "42", query: Query | None = None, **fields: Any) -> Sample:
    return Sample(query=query or make_query(), response=response, **fields)


@pytest.fixture
def query() -> Callable[..., Query]:
    return make_query


@pytest.fixture
def sample() -> Callable[..., Sample]:
    return make_sample


# --- Docker -----------------------------------------------------------------------------------------------------------


def make_sandbox_config(**settings: Any) -> SandboxConfig:
    """Settings whose base image is the one that `tests/engine.sh` makes, if it made one."""
    base = {"base": os.environ["RLAR_TEST_BASE"]} if os.environ.get("RLAR_TEST_BASE") else {}
    return SandboxConfig(**(base | settings))


@pytest.fixture(scope="session")
def sandbox_config() -> SandboxConfig:
    return make_sandbox_config()


@pytest.fixture(scope="session")
def engine(sandbox_config: SandboxConfig) -> Iterator[Any]:
    """A client of a real Docker engine."""
    from verl_rlar.sandbox.engine import connect

    try:
        client = connect(sandbox_config)
    except ToolUnavailable as error:
        if os.environ.get("CI") == "true" or os.environ.get("REQUIRE_DOCKER") == "1":
            pytest.fail(str(error))
        pytest.skip(str(error).partition("Ways out")[0].strip().replace("\n", " "))
    yield client
    client.close()


@pytest.fixture(scope="session")
def box_image(engine: Any, sandbox_config: SandboxConfig) -> str:
    """ID of the boxes' image, built if this engine does not have it."""
    from verl_rlar.sandbox.image import ensure_image

    return ensure_image(engine, sandbox_config)


def none_left(engine: Any) -> bool:
    """Whether the boxes of processes that are gone go, too. One that was killed between creating a box and starting it
    leaves it to the next run of anybody, who sweeps."""
    from verl_rlar.sandbox.docker import LABEL, sweep

    for _ in range(300):
        sweep(engine)
        if not engine.containers.list(all=True, filters={"label": LABEL}, ignore_removed=True):
            return True
        time.sleep(0.1)
    return False
