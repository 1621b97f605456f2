# SPDX-License-Identifier: Apache-2.0
"""The coder's talk with an LLM, without boxes: what the journal keeps, and answers that were cut off."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("smolagents", reason="smolagents is not installed (extra `agents`)")
from llm_server import LlmServer, Reply, says, text

from verl_rlar.agents.drafter import _Coder, code_of
from verl_rlar.agents.journal import Talk, seed_of
from verl_rlar.agents.llm import Llm
from verl_rlar.config import AgentsConfig
from verl_rlar.errors import EndpointError
from verl_rlar.quoting import Quoter

TASK = {"task": "the sum", "kinds": ["math"], "needs": True, "seconds": 10, "examples": []}


@pytest.fixture
def server() -> Iterator[LlmServer]:
    with LlmServer([text("no code")]) as server:
        yield server


def cut(content: str) -> Reply:
    choice = {"message": {"role": "assistant", "content": content}, "finish_reason": "length"}
    return says(200, json.dumps({"choices": [choice]}).encode())


def drafted(server: LlmServer, journal: Path, **settings: Any) -> tuple[Talk, list[Any]]:
    """Plans and drafts until all repairs are used up, or the endpoint answers no more."""
    config = AgentsConfig(url=server.url, model="m", **settings)
    seed_of(journal, "order", "seed")
    llm, told = Llm(config), list[Any]()
    talk = Talk(llm, config.steps, journal)
    try:
        _Coder(config, talk, Quoter("seed", 2000), TASK, told.append).work()
    except EndpointError:
        pass
    finally:
        llm.close()
    return talk, told


def test_what_was_paid_for_once_is_not_paid_again_after_another_course_was_taken(
    server: LlmServer, tmp_path: Path
) -> None:
    journal = tmp_path / "j.jsonl"
    drafted(server, journal, drafts=2, repairs=1)
    assert len(server.requests) == 6, "two tries of a plan, and two versions of two drafts"
    server.script = [text("still no code")] * 7 + [says(401)]
    assert drafted(server, journal, drafts=2, repairs=2)[0].recalled == 4
    asked = len(server.requests)
    again, _ = drafted(server, journal, drafts=2, repairs=2)
    assert again.recalled == again.asked == 5 and len(server.requests) == asked + 1
    assert len(journal.read_text().splitlines()) == 1 + 5
    assert [path.name for path in tmp_path.iterdir()] == ["j.jsonl"]


def test_an_answer_that_was_cut_off_is_called_that_and_the_setting_is_named(server: LlmServer, tmp_path: Path) -> None:
    server.script = [cut("<think>\nHow are numbers read?")]
    for _ in range(2):  # asked, and recalled
        talk, told = drafted(server, tmp_path / "j.jsonl", drafts=1, repairs=1, answer_tokens=2048)
        faults = [*told[0]["faults"], *(event["fault"] for event in told[1:])]
        assert len(faults) == 4 and set(faults) == {
            "it was cut off after 2,048 tokens (rlar.agents.answer_tokens), before its end: think and write less"
        }
    assert talk.recalled == len(server.requests) == 4
    assert "cut off after 2,048 tokens" in server.requests[3]["messages"][-1]["content"]


def test_an_answer_that_was_cut_off_after_its_code_is_taken(server: LlmServer, tmp_path: Path) -> None:
    llm = Llm(AgentsConfig(url=server.url, model="m"))
    talk = Talk(llm, 2)
    server.script = [cut("```python\nx\n```\nThis")]
    assert code_of(talk.ask([("user", "Go on")])) == ("x\n", "") and talk.cut
    llm.close()


def test_the_code_of_an_answer_with_the_line_ends_of_windows_is_found() -> None:
    assert code_of("Here:\r\n\r\n```python\r\nx = 1\r\n```\r\n") == ("x = 1\n", "")
