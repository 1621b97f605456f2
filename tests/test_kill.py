# SPDX-License-Identifier: Apache-2.0
"""I8, with I1 and I2 beside it: any process may be killed at any time, and nothing that counts is lost or changed.

`recipes/benchmarks/kill.py` does it and says what it looks at; here it does so a few times, in CI.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent.parent / "recipes" / "benchmarks" / "kill.py"
pytestmark = pytest.mark.slow


def killed(*arguments: str) -> dict[str, Any]:
    """Figures of some rounds without a fault."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments, "--json"], capture_output=True, text=True, timeout=800
    )
    assert done.stdout, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert result["ok"] and done.returncode == 0, result
    figures: dict[str, Any] = result["figures"]
    return figures


def test_a_killed_writer_of_the_ledger_or_the_library_loses_nothing_that_it_acknowledged() -> None:
    figures = killed("--rounds", "20", "--only", "ledger", "--only", "library")
    assert figures["ledger_acknowledged"] > 100 and figures["library_acknowledged"] > 5


def test_a_training_whose_processes_are_killed_loses_nothing_and_goes_on_bit_by_bit() -> None:
    pytest.importorskip("verl", reason="verl is not installed (extra `cpu`)")
    only = [word for kind in ("service", "worker", "boxes", "driver") for word in ("--only", kind)]
    figures = killed("--rounds", "1", *only)
    assert (figures["service_kills"], figures["worker_kills"], figures["driver_kills"]) == (1, 1, 1)
    if os.environ.get("CI") == "true" or os.environ.get("REQUIRE_DOCKER") == "1":
        assert figures["boxes_kills"] == 1
    assert figures["acknowledged_rows"] > 100 and figures["scored_again_after_a_restart"] > 0
    assert figures["unscored"] == 0
