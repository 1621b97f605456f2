# SPDX-License-Identifier: Apache-2.0
"""The evolution benchmark: its stream keeps to its word, and its short form reaches the goals."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "recipes" / "evolution"
sys.path.append(str(FOLDER))  # at the end: another recipe has a `run.py`, too

from groups import Group
from stream import Stream, tasks

from verl_rlar.features import describe


def test_no_query_of_the_stream_is_in_an_exam_and_each_is_what_its_task_says() -> None:
    for task in tasks():
        exams, stream = ({item.query.key for item in items} for items in (task.labelled, task.stream))
        assert not exams & stream and len(stream) >= 100
        assert {describe(item.query).kind for item in task.stream} == {task.kind}
        assert all(not set(item.right) & set(item.wrong) for item in (*task.labelled, *task.stream))


def test_the_mixture_shifts_and_the_same_step_is_the_same_again() -> None:
    stream = Stream(tasks(), 5, 12)
    assert stream.shifts == [6, 11, 16] and len(stream.steps) == 20
    seen = [Counter(visit.task for visit in stream.at(step)) for step in stream.steps]
    assert set(seen[4]) == {"math"} and "demands" not in seen[14] and len(set().union(*seen[15:])) == 4
    assert stream.at(7) == stream.at(7)
    assert all(sum(right for _, right in visit.answers) == 2 == len(visit.answers) - 2 for visit in stream.at(18))


@pytest.mark.parametrize(
    ("sent", "accuracy", "gradient"),
    [
        ((1.0, 1.0, 0.0, 0.0), 1.0, "right"),
        ((0.0, 0.0, 1.0, 1.0), 0.0, "wrong"),
        ((0.5, 0.5, 0.5, 0.5), 0.5, "none"),
        ((1.0, 0.0, 1.0, 0.0), 0.5, "none"),
        ((1.0, 0.0, 0.5, 0.0), 0.625, "right"),
    ],
)
def test_a_group_counts_by_its_hidden_labels(sent: tuple[float, ...], accuracy: float, gradient: str) -> None:
    group = Group(1, "math", (True, True, False, False), sent, True)
    assert (group.accuracy, group.gradient) == (accuracy, gradient)


@pytest.mark.slow
@pytest.mark.docker
@pytest.mark.timeout(900)
def test_the_growing_library_ends_near_the_oracle_and_each_shift_is_seen(box_image: str) -> None:
    done = subprocess.run(
        [sys.executable, str(FOLDER / "run.py"), "--quick", "--json"], capture_output=True, text=True, timeout=800
    )
    assert done.stdout, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result) >= {"name", "figures", "goals", "ok"}
    assert result["ok"] and done.returncode == 0, result["figures"]
