# SPDX-License-Identifier: Apache-2.0
"""The figures in the README still hold: each script reaches its goals, and prints one JSON object last."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "recipes" / "benchmarks"
SECTIONS = ("gsm8k", "math500", "ifeval_agreement", "ifbench_preferences", "translation_mqm")
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("command", ["routing.py", *(f"rules.py --only {section}" for section in SECTIONS)])
def test_a_benchmark_reaches_its_goals(command: str) -> None:
    if "ifeval" in command:
        pytest.importorskip("if_verifiable", reason="if-verifiable is not installed (extra `dev`)")
    script, *arguments = command.split()
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *arguments, "--json"], capture_output=True, text=True, timeout=800
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result) >= {"name", "figures", "goals", "ok"}
    assert result["ok"] and done.returncode == 0, result
