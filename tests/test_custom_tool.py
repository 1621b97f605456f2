# SPDX-License-Identifier: Apache-2.0
"""The recipe for tools of one's own, run as it stands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "custom_tool"
EXPECTED = (1.0, 0.0, 0.0, 1.0, 0.0, None)
"""Values of `answers.jsonl`."""


def run(*arguments: str, run_dir: Path, code: int = 0) -> str:
    """What `run.sh` prints, with this environment's commands."""
    environment = os.environ | {
        "RLAR_RUN": str(run_dir),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    command = ["bash", str(RECIPE / "run.sh"), "--no-install", *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert ran.returncode == code, ran.stdout + ran.stderr
    return ran.stdout


def value(text: str) -> float | None:
    return None if text == "-" else float(text)


@pytest.mark.slow
def test_the_rule_passes_its_exam_and_scores(tmp_path: Path) -> None:
    said = run("rule", run_dir=tmp_path)
    assert "# clock_time (" in said and "): admitted" in said
    scored = said.partition("a few answers\n")[2].splitlines()[1:]
    assert tuple(value(line.split("\t")[1]) for line in scored) == EXPECTED
    assert {line.split("\t")[3] for line in scored} == {"clock_time"}
    assert list(tmp_path.iterdir()) == [], "it needs no library"


@pytest.mark.slow
@pytest.mark.docker
def test_the_verifier_passes_the_same_exam_in_a_box_and_scores_by_its_exported_file(
    tmp_path: Path, box_image: str
) -> None:
    base = os.environ.get("RLAR_TEST_BASE")
    settings = ("--set", f"sandbox.base={base}") if base else ()
    for _ in range(2):  # a second run adds an exam
        said = run("verifier", *settings, run_dir=tmp_path)
        assert "# clock_verifier (" in said and "): admitted" in said
        scored = said.rpartition("by a file for TRL\n")[2].splitlines()
        assert tuple(value(line.split()[0]) for line in scored) == EXPECTED


def test_wrong_arguments_are_explained(tmp_path: Path) -> None:
    assert "[rule | verifier]" in run("both", run_dir=tmp_path, code=2)


def test_every_file_that_the_readme_names_is_there() -> None:
    text = (RECIPE / "README.md").read_text()
    for name in ("run.sh", "clock.py", "clock_verifier.py", "cases.jsonl", "answers.jsonl", "score_exported.py"):
        assert name in text and (RECIPE / name).is_file()
    cases = (RECIPE / "cases.jsonl").read_text().splitlines()
    prompts = {json.loads(line)["prompt"] for line in cases}
    assert f"{len(cases)} answers to {len(prompts)} questions" in " ".join(text.split())
