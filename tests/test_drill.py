# SPDX-License-Identifier: Apache-2.0
"""What breaks around a training costs no reward but those that it was needed for, and none is lost.

`recipes/benchmarks/drill.py` breaks everything; here what no other test does: the disk is full, the LLM fails. Killed
processes: `test_kill.py`, `test_train_models.py`; a node that leaves: `test_nodes.py`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("verl", reason="verl is not installed (extra `cpu`)")
pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent.parent / "recipes" / "benchmarks" / "drill.py"


def test_a_full_disk_and_an_llm_that_fails_cost_nothing_else() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--only", "llm_500", "--only", "disk", "--json"],
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.stdout, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["ok"] and done.returncode == 0, done.stdout
    figures = result["figures"]
    assert figures["faults"] + figures["left_out"] == 2, "without root there is no small disk"
    assert (figures["changed_values"], figures["uncounted"], figures["lost_rows"]) == (0, 0, 0)
    assert figures["llm_500_unscored"] > 0 and figures.get("disk_unscored", 0) == 0
