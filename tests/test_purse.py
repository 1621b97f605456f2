# SPDX-License-Identifier: Apache-2.0
"""The purse: one account for all agents of a run, with caps, a pace, and sums that are right to the token."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("smolagents", reason="smolagents is not installed (extra `agents`)")
from llm_server import LlmServer, says, text
from smolagents import ChatMessage, MessageRole

from verl_rlar.agents.llm import Llm
from verl_rlar.config import AgentsConfig
from verl_rlar.errors import AgentError, EndpointError
from verl_rlar.purse import OutOfTokens, Purse, account_of


class Clock:
    """Time that goes on only by sleeping, or when it is told to."""

    def __init__(self) -> None:
        self.now, self.slept = 1000.0, 0.0

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now, self.slept = self.now + seconds, self.slept + seconds


def purse(folder: Path, clock: Clock | None = None, task: str = "t", **settings: Any) -> Purse:
    clock = clock or Clock()
    return Purse(folder, task, AgentsConfig(**settings), clock=clock.time, sleep=clock.sleep)


def test_calls_of_a_minute_wait_for_the_pace(tmp_path: Path) -> None:
    clock = Clock()
    one, two = purse(tmp_path, clock, rpm=3), purse(tmp_path, clock, task="other", rpm=3)
    for account in (one, two, one):
        account.take(10)
        account.settle(10, 5)
        clock.now += 1
    assert clock.slept == 0
    two.take(10)
    assert 56.9 <= clock.slept <= 57.6, "until the first is a minute old"
    two.settle(10, 5)
    clock.now, clock.slept = clock.now - 3600, 0.0
    two.take(10)
    assert clock.slept == 0, "a clock that was set back does not make calls of the future wait for"


def test_tokens_of_a_minute_wait_for_the_pace(tmp_path: Path) -> None:
    clock = Clock()
    account = purse(tmp_path, clock, tpm=1000)
    account.take(5000)  # more than a minute may have: alone it goes, else it never would
    account.settle(400, 200)
    account.take(300)
    assert clock.slept == 0
    account.settle(300, 50)
    account.take(100)
    assert 59 <= clock.slept <= 61


@pytest.mark.parametrize(
    ("cap", "value"), [("run_calls", 2), ("run_tokens", 250), ("run_dollars", 0.00025), ("dollars", 0.00025)]
)
def test_a_cap_stops_the_call_that_would_exceed_it_and_names_itself(tmp_path: Path, cap: str, value: Any) -> None:
    account = purse(tmp_path, **{cap: value, "dollars_read": 1.0, "dollars_written": 1.0})
    for _ in range(2):
        account.take(100)
        account.settle(100, 20)
    with pytest.raises(OutOfTokens, match=rf"rlar\.agents\.{cap}\b.*raise it"):
        account.take(100)
    higher = purse(tmp_path, **{cap: 10 * value, "dollars_read": 1.0, "dollars_written": 1.0})
    higher.take(100)
    assert account.spent().calls == 3 and account.spent().dollars == pytest.approx(0.00034)


def test_money_of_a_task_is_its_own_and_seconds_are_the_runs(tmp_path: Path) -> None:
    clock = Clock()
    prices = {"dollars_read": 1e6, "dollars": 150.0, "run_s": 10.0}
    one, two = purse(tmp_path, clock, **prices), purse(tmp_path, clock, task="other", **prices)
    one.take(100)
    clock.now += 6
    one.settle(100, 0)
    with pytest.raises(OutOfTokens, match="dollars"):
        one.take(100)
    two.take(100)
    clock.now += 6
    two.settle(100, 0)
    with pytest.raises(OutOfTokens, match="run_s"):
        purse(tmp_path, clock, task="third", **prices).take(1)
    assert one.spent("t").dollars == 100 and one.spent().seconds == pytest.approx(12)


TAKES = """
import sys
from pathlib import Path
from verl_rlar.purse import Purse
from verl_rlar.config import AgentsConfig
account = Purse(Path(sys.argv[1]), sys.argv[2], AgentsConfig())
for _ in range(20):
    account.take(7)
    account.settle(7, 3)
"""


def test_processes_share_it_and_nothing_is_lost(tmp_path: Path) -> None:
    command = [sys.executable, "-c", TAKES, str(tmp_path)]
    workers = [subprocess.Popen([*command, f"t{number}"]) for number in range(3)]
    assert [worker.wait(120) for worker in workers] == [0, 0, 0]
    spent = Purse(tmp_path, "", AgentsConfig()).spent()
    assert (spent.calls, spent.read, spent.written) == (60, 420, 180)
    assert Purse(tmp_path, "", AgentsConfig()).spent("t1").tokens == 200


def test_what_the_endpoint_says_is_what_was_spent_to_the_token(tmp_path: Path) -> None:
    used = [(101, 7), (2003, 11), (5, 0)]
    script = [
        text("a", usage=used[0]),
        says(500),
        text("b", usage=used[1]),
        says(429),
        text("c", usage=used[2]),
        says(400),
    ]
    with LlmServer(script) as server:
        config = AgentsConfig(url=server.url, model="x", retries=2, max_wait_s=0)
        account = Purse(tmp_path, "t", config)
        llm = Llm(config, purse=account)
        asked = [ChatMessage(role=MessageRole.USER, content=[{"type": "text", "text": "hello"}])]
        for _ in used:
            llm.generate(asked)
        spent = account.spent()
        assert (spent.read, spent.written) == (sum(r for r, _ in used), sum(w for _, w in used))
        assert (spent.calls, llm.tokens) == (5, spent.tokens) and spent.calls == len(server.requests)
        with pytest.raises(EndpointError):
            llm.generate(asked)
        assert len(server.requests) == 6, "HTTP 400 is not tried again"
        assert account.spent().calls == 6
        stopped = AgentsConfig(url=server.url, model="x", run_calls=6)
        with pytest.raises(OutOfTokens):
            Llm(stopped, purse=Purse(tmp_path, "t", stopped)).generate(asked)
        assert len(server.requests) == 6
        llm.close()


def test_a_cap_costs_a_call_no_more_after_many_of_them(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "spending.sqlite")) as old, old:  # as an earlier release made it
        old.execute(
            "CREATE TABLE calls (id INTEGER PRIMARY KEY, task TEXT NOT NULL, at REAL NOT NULL, read INTEGER NOT NULL, "
            "written INTEGER NOT NULL, dollars REAL NOT NULL, seconds REAL NOT NULL)"
        )
        calls = [("t" if number % 4 else "other", 1.0, 500, 50, 0.25, 1.0) for number in range(200_000)]
        old.executemany(
            "INSERT INTO calls (task, at, read, written, dollars, seconds) VALUES (?, ?, ?, ?, ?, ?)", calls
        )
    before = account_of(tmp_path)
    assert (before["t"].calls, before["other"].dollars) == (150_000, 12_500)
    took = []
    for caps in ({}, {"run_dollars": 1e9, "dollars": 1e9, "dollars_read": 1.0}):
        account = purse(tmp_path, **caps)
        assert account.spent("other") == before["other"]
        start = time.process_time()
        for _ in range(40):
            account.take(500)
            account.settle(500, 50)
        took.append(time.process_time() - start)
    assert took[1] < 15 * took[0], "it is not as if each call added up all the others"
    spent = account.spent()
    assert (spent.calls, spent.read, spent.written) == (200_080, 200_080 * 500, 200_080 * 50)
    assert account_of(tmp_path)["t"].calls == 150_080


def test_a_folder_that_cannot_be_written_is_an_error_of_agents(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(AgentError, match="cannot be written"):
        purse(tmp_path / "file" / "folder")
    (tmp_path / "spending.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(AgentError, match="cannot be used"):
        purse(tmp_path)
