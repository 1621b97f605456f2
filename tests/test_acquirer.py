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
from test_ledger import make_row

from verl_rlar.acquirer import Acquirer
from verl_rlar.config import parse
from verl_rlar.errors import ConfigError
from verl_rlar.ledger import Row
from verl_rlar.types import Kind, Route


def row(kind: Kind, covered: bool, prompt: str = "How are you?", **extra: Any) -> Row:
    made = make_row()
    route = Route(parts=(), reason=f"uncovered: no tool for {kind.value}", kind=kind, covered=covered, snapshot="s")
    return replace(made, route=route, sample=replace(made.sample, query=make_query(prompt, None, **extra)))


def make_acquirer(folder: Path, work: str = "agents_at_work:acquires", **settings: Any) -> Acquirer:
    acquire = {"enabled": True, "labelled": ["answers.jsonl"], "window": 4, "share": 0.5, "again_after": 3}
    config = parse({"run_dir": str(folder), "acquire": acquire | settings})
    return Acquirer(config, folder / "library", work)


async def finished(acquirer: Acquirer) -> None:
    assert acquirer._task is not None
    await asyncio.wait_for(acquirer._task, 60)


def started(folder: Path) -> list[dict[str, Any]]:
    """The orders of all that was started."""
    found = []
    for file in sorted((folder / "agents").glob("acquire-*.jsonl")):
        found.append(json.loads(file.read_text().splitlines()[0])["order"])
    return found


async def test_a_gap_that_is_large_enough_is_worked_on_once_in_a_while(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    acquirer = make_acquirer(tmp_path)
    for number in range(3):
        acquirer.saw(row(Kind.OPEN, False, f"Question {number}?", odd=Path("/x")))
    acquirer.begin_step(1)
    assert acquirer._task is None, "the window is not full"
    acquirer.saw(row(Kind.MATH, True))
    with caplog.at_level(logging.WARNING):
        acquirer.begin_step(2)
        acquirer.begin_step(2)
        await finished(acquirer)
    (order,) = started(tmp_path)
    assert (order["gap"]["kind"], order["gap"]["rows"], order["gap"]["way"]) == ("open", 3, "scout")
    assert [query["messages"][0]["content"] for query in order["gap"]["queries"]] == [
        f"Question {number}?" for number in range(3)
    ]
    assert "75 % of the responses are to open queries without a tool: the scout looks for one" in caplog.text
    assert "open queries: nothing for open (transcript" in caplog.text
    acquirer.begin_step(4)
    assert len(started(tmp_path)) == 1
    acquirer.begin_step(5)
    await finished(acquirer)
    assert len(started(tmp_path)) == 2


async def test_a_small_gap_or_one_that_nobody_can_fill_starts_nothing(tmp_path: Path) -> None:
    acquirer = make_acquirer(tmp_path)
    for covered in (False, True, True, True):
        acquirer.saw(row(Kind.OPEN, covered))
    acquirer.begin_step(1)
    for _ in range(4):
        acquirer.saw(row(Kind.UNIT_TESTS, False))
    acquirer.begin_step(2)  # there is no LLM that could write a verifier
    assert acquirer._task is None and started(tmp_path) == []


@pytest.mark.parametrize(("work", "said"), [("fails", "the hub is away"), ("dies", "crash: ")])
async def test_what_goes_wrong_in_the_process_is_a_line_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, work: str, said: str
) -> None:
    acquirer = make_acquirer(tmp_path, f"agents_at_work:{work}")
    for _ in range(4):
        acquirer.saw(row(Kind.OPEN, False))
    with caplog.at_level(logging.WARNING):
        acquirer.begin_step(1)
        await finished(acquirer)
    assert said in caplog.text


def test_nothing_is_looked_for_without_evidence_for_an_exam() -> None:
    with pytest.raises(ConfigError, match="nothing gets a say without an exam"):
        parse({"acquire": {"enabled": True}})
