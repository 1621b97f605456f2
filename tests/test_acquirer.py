# SPDX-License-Identifier: Apache-2.0
"""A training looks for tools by itself, beside its own work."""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import make_query
from test_competence import record, tool
from test_ledger import make_row

from verl_rlar.acquirer import Acquirer
from verl_rlar.competence import Competence
from verl_rlar.config import parse
from verl_rlar.errors import ConfigError
from verl_rlar.ledger import Row
from verl_rlar.types import Kind, Outcome, Route, RoutePart, Snapshot

TOOL = tool("somebody")
LIVE = Snapshot(tools=(TOOL,))


def row(
    kind: Kind, covered: bool, prompt: str = "How are you?", cluster: str = "", scored: bool = True, **extra: Any
) -> Row:
    made = make_row()
    route = Route(
        parts=(RoutePart(tool=TOOL.name, digest=TOOL.digest),) if covered else (),
        reason="somebody 0.7" if covered else f"uncovered: no tool for {kind.value}",
        kind=kind,
        covered=covered,
        snapshot="s",
        cluster=cluster,
    )
    made = made if scored else replace(made, score=replace(made.score, value=None, outcome=Outcome.FAILED))
    return replace(made, route=route, sample=replace(made.sample, query=make_query(prompt, None, **extra)))


def make_acquirer(folder: Path, work: str = "agents_at_work:acquires", **settings: Any) -> Acquirer:
    acquire = {"enabled": True, "labelled": ["answers.jsonl"], "window": 4, "share": 0.5, "again_after": 3}
    config = parse({"run_dir": str(folder), "acquire": acquire | settings})
    made = Acquirer(config, folder / "library", work)
    made.begin_step(0, LIVE)
    return made


async def finished(acquirer: Acquirer) -> None:
    assert acquirer._task is not None
    await asyncio.wait_for(acquirer._task, 300)


def started(folder: Path) -> list[dict[str, Any]]:
    """The orders of all that was started."""
    found = []
    for file in sorted((folder / "agents").glob("acquire-*.jsonl"), key=lambda path: path.stat().st_mtime_ns):
        found.append(json.loads(file.read_text().splitlines()[0])["order"])
    return found


async def test_a_gap_that_is_large_enough_is_worked_on_once_in_a_while(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    acquirer = make_acquirer(tmp_path)
    for number in range(3):
        acquirer.saw(row(Kind.OPEN, False, f"Question {number}?", odd=Path("/x")))
    acquirer.begin_step(1, LIVE)
    assert acquirer._task is None, "the window is not full"
    acquirer.saw(row(Kind.MATH, True))
    with caplog.at_level(logging.WARNING):
        acquirer.begin_step(2, LIVE)
        acquirer.begin_step(2, LIVE)
        await finished(acquirer)
    (order,) = started(tmp_path)
    assert (order["gap"]["kind"], order["gap"]["rows"], order["gap"]["way"]) == ("open", 3, "scout")
    assert [query["messages"][0]["content"] for query in order["gap"]["queries"]] == [
        f"Question {number}?" for number in range(3)
    ]
    said = "75 % of the responses are to open queries without a competent tool: uncovered: no tool for open; the scout"
    assert said in caplog.text
    assert "open queries: nothing for open (transcript" in caplog.text
    acquirer.begin_step(4, LIVE)
    assert len(started(tmp_path)) == 1
    acquirer.begin_step(5, LIVE)
    await finished(acquirer)
    assert len(started(tmp_path)) == 2


async def test_routes_of_before_say_nothing_of_tools_that_went_live_since(tmp_path: Path) -> None:
    acquirer = make_acquirer(tmp_path)
    acquirer.begin_step(1, LIVE)
    for _ in range(4):
        acquirer.saw(row(Kind.OPEN, False))
    acquirer.begin_step(2, Snapshot(tools=(TOOL, tool("found"))))  # which fills the gap
    assert acquirer._task is None
    acquirer.saw(row(Kind.OPEN, False))  # of step 1, and late
    acquirer.begin_step(3, Snapshot(tools=(TOOL, tool("found"))))
    assert acquirer._task is None and started(tmp_path) == []


async def test_a_small_gap_or_one_that_nobody_can_fill_starts_nothing(tmp_path: Path) -> None:
    acquirer = make_acquirer(tmp_path)
    for covered in (False, True, True, True):
        acquirer.saw(row(Kind.OPEN, covered))
    acquirer.begin_step(1, LIVE)
    for _ in range(4):
        acquirer.saw(row(Kind.UNIT_TESTS, False))
    acquirer.begin_step(2, LIVE)  # there is no LLM that could write a verifier
    assert acquirer._task is None and started(tmp_path) == []


async def test_the_gap_by_which_most_is_to_be_gained_comes_first_and_each_cluster_once(tmp_path: Path) -> None:
    known = Competence(
        records=(
            record(TOOL, 0.95, cluster="open#1"),
            record(TOOL, 0.45, cluster="open#2"),  # it scores, and no better than chance
            record(TOOL, 0.57, 100, cluster="open#3"),
        )
    )
    config = parse(
        {
            "run_dir": str(tmp_path),
            "acquire": {"enabled": True, "labelled": ["x"], "window": 20, "share": 0.1, "again_after": 50, "gaps": 3},
        }
    )
    acquirer = Acquirer(config, tmp_path / "library", "agents_at_work:acquires", lambda snapshot: known)
    acquirer.begin_step(0, LIVE)
    for cluster, count in (("open#1", 7), ("open#2", 3), ("open#3", 4), ("open#4", 1), ("open#5", 1)):
        for _ in range(count):
            acquirer.saw(row(Kind.OPEN, cluster not in ("open#4", "open#5"), cluster=cluster))
    for number in range(4):  # half of them fail
        acquirer.saw(row(Kind.MATH, True, cluster="math#1", scored=number % 2 > 0))
    acquirer.begin_step(1, Snapshot(tools=(TOOL,), shadows=(tool("arriving"),)))
    assert acquirer._task is None, "of math nobody can write a verifier; for open queries one is in the shadow"
    for step in range(2, 8):
        acquirer.begin_step(step, LIVE)
        if acquirer._task is not None:
            await finished(acquirer)
    gaps = [order["gap"] for order in started(tmp_path)]
    assert [(gap["cluster"], gap["rows"], round(gap["headroom"], 2)) for gap in gaps] == [
        ("open#3", 4, 0.5),
        ("open#2", 3, 0.5),
        ("", 2, 0.5),
    ]
    assert [gap["reason"].split(":")[0] for gap in gaps] == ["somebody is weak", "somebody is weak", "uncovered"]


async def test_a_cluster_whose_tools_leave_it_unscored_is_a_gap(tmp_path: Path) -> None:
    acquirer = make_acquirer(tmp_path, share=0.25, unscored=0.5)
    for number in range(4):
        acquirer.saw(row(Kind.OPEN, True, cluster="open#1", scored=number > 1))
    acquirer.begin_step(1, LIVE)
    await finished(acquirer)
    (order,) = started(tmp_path)
    assert order["gap"]["reason"] == "somebody left responses unscored" and order["gap"]["rows"] == 2


@pytest.mark.parametrize(("work", "said"), [("fails", "the hub is away"), ("dies", "crash: ")])
async def test_what_goes_wrong_in_the_process_is_a_line_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, work: str, said: str
) -> None:
    acquirer = make_acquirer(tmp_path, f"agents_at_work:{work}")
    for _ in range(4):
        acquirer.saw(row(Kind.OPEN, False))
    with caplog.at_level(logging.WARNING):
        acquirer.begin_step(1, LIVE)
        await finished(acquirer)
    assert said in caplog.text


def test_nothing_is_looked_for_without_evidence_for_an_exam() -> None:
    with pytest.raises(ConfigError, match="nothing gets a say without an exam"):
        parse({"acquire": {"enabled": True}})


def test_no_model_is_refused_for_being_slow_beside_a_training() -> None:
    """Its server has the lowest priority then, and what the training leaves of the processors."""
    acquire = {"enabled": True, "labelled": ["x"], "wall_s": 60.0}
    before = parse({"acquire": acquire, "serving": {"backend": "vllm", "gpus": [0]}})
    beside = before.beside_training()
    assert (beside.exam.latency_s, beside.serving.backend, beside.serving.gpus) == (60.0, "transformers", ())
    assert beside.exam.model_copy(update={"latency_s": before.exam.latency_s}) == before.exam, "all else holds"
