# SPDX-License-Identifier: Apache-2.0
"""The figures in the README still hold: each script reaches its goals, and prints one JSON object last."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "recipes" / "benchmarks"
SECTIONS = ("gsm8k", "math500", "ifeval_agreement", "ifbench_preferences", "translation_mqm")
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "command",
    [
        "routing.py --answers 20 --stream 2000",
        "calibration.py",
        "exam.py --no-boxes",
        "report.py --rows 20000",
        *(f"rules.py --only {section}" for section in SECTIONS),
    ],
)
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


def test_many_distinct_prompts_are_routed_and_few_clusters_are_made() -> None:
    pytest.importorskip("verl", reason="verl is not installed (extra `cpu`)")
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "dispatch.py"), "--scale", "20000", "--json"],
        capture_output=True,
        text=True,
        timeout=800,
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["figures"]["prompts"] == 20_000 and result["figures"]["clusters"] < 64, result


def of_boxes(command: str) -> dict[str, Any]:
    """What a benchmark of the sandbox prints last."""
    script, *arguments = command.split()
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *arguments, "--json"], capture_output=True, text=True, timeout=800
    )
    assert done.stdout, done.stderr[-2000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert set(result) >= {"name", "figures", "goals", "ok"}
    assert done.returncode == (0 if result["ok"] else 1)
    return result


@pytest.mark.docker
def test_all_contenders_pass_the_same_problems_and_none_waits_for_a_box(box_image: str) -> None:
    figures = of_boxes("sandbox.py --quick")["figures"]  # speed is for a quiet machine
    assert figures["problems"] == 24
    assert not any(figures[f"{name}_failed"] for name in ("boxes", "fork_server", "fresh_interpreter", "verl"))
    assert figures["waited_after_warm_up"] == 0
    assert figures["boxes_to_verl"] > 1


@pytest.mark.docker
def test_nothing_is_lost_or_left_by_mixed_and_hostile_calls(box_image: str) -> None:
    result = of_boxes("soak.py --calls 200")
    assert result["ok"], result
