# SPDX-License-Identifier: Apache-2.0
"""The ledger: what stands in it stays in it."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import make_query, make_sample

from verl_rlar.errors import LedgerError
from verl_rlar.ledger import FILE_NAME, Ledger, Row, read, unpack
from verl_rlar.types import Kind, Outcome, Route, RoutePart, Score, Snapshot

SNAPSHOT = Snapshot(tools=())
ROUTE = Route(
    parts=(RoutePart(tool="exact_match", digest="d" * 16),),
    reason="short_text: the reference has at most 12 words",
    kind=Kind.SHORT_TEXT,
    covered=True,
    snapshot=SNAPSHOT.version,
)


def make_row(*, value: float | None = 1.0, response: str = "42", **fields: Any) -> Row:
    outcome = Outcome.FAILED if value is None else Outcome.SCORED
    return Row(
        sample=make_sample(response, **fields),
        route=ROUTE,
        score=Score(value=value, outcome=outcome, reason=""),
        sent=0.5 if value is None else value,
        sent_as="neutral" if value is None else "value",
        received=1.0,
        seconds=0.1,
    )


def count(path: Path) -> int:
    with read(path) as db:
        return db.execute("SELECT COUNT(*) FROM scores").fetchone()[0]


def test_a_row_is_read_back_whole_while_the_writer_is_open(tmp_path: Path) -> None:
    with Ledger(tmp_path / FILE_NAME, token="run") as ledger:
        ledger.add_route(make_query(), ROUTE)
        ledger.add([make_row(uid="a", session=3, step=7, split="val", response="forty \udc80 two")])
        with read(tmp_path) as db:
            row = dict(db.execute("SELECT * FROM scores").fetchone())
            assert (row["uid"], row["session"], row["step"], row["split"]) == ("a", 3, 7, "val")
            assert (row["value"], row["sent"], row["sent_as"], row["outcome"]) == (1.0, 1.0, "value", "scored")
            body = db.execute("SELECT body FROM texts WHERE sha = ?", (row["response"],)).fetchone()["body"]
            assert unpack(body) == "forty \udc80 two"
            query = db.execute("SELECT body FROM texts WHERE sha = ?", (row["query"],)).fetchone()["body"]
            assert "What is 6 times 7?" in unpack(query)


def test_an_unscored_row_has_no_value_but_what_verl_got(tmp_path: Path) -> None:
    with Ledger(tmp_path / FILE_NAME, token="run") as ledger:
        ledger.add([make_row(uid="a", value=None)])
    with read(tmp_path) as db:
        row = db.execute("SELECT value, sent, sent_as FROM scores").fetchone()
    assert tuple(row) == (None, 0.5, "neutral")


def test_a_row_that_is_sent_twice_stands_there_once(tmp_path: Path) -> None:
    with Ledger(tmp_path / FILE_NAME, token="run") as ledger:
        ledger.add([make_row(uid="a"), make_row(uid="b")])
        ledger.add([make_row(uid="a")])
    assert count(tmp_path) == 2


def test_rows_are_added_all_or_none(tmp_path: Path) -> None:
    with Ledger(tmp_path / FILE_NAME, token="run") as ledger:

        def rows() -> Any:
            yield make_row(uid="a")
            raise RuntimeError("the second row is broken")

        with pytest.raises(RuntimeError):
            ledger.add(rows())
        assert count(tmp_path) == 0
        ledger.add([make_row(uid="a")])
    assert count(tmp_path) == 1


def test_the_first_decision_for_a_query_stays(tmp_path: Path) -> None:
    other = Route(parts=(), reason="changed its mind", kind=Kind.OPEN, covered=False, snapshot=SNAPSHOT.version)
    with Ledger(tmp_path / FILE_NAME, token="run") as ledger:
        assert ledger.route(make_query(), SNAPSHOT) is None
        ledger.add_route(make_query(), ROUTE)
        ledger.add_route(make_query(), other)
        assert ledger.route(make_query(), SNAPSHOT) == ROUTE


def test_a_new_start_is_a_new_attempt_and_a_writer_that_comes_back_goes_on_with_its_own(tmp_path: Path) -> None:
    attempts = []
    for token in ("first", "first", "second"):
        with Ledger(tmp_path / FILE_NAME, token=token) as ledger:
            ledger.add([make_row(uid="a")])
            attempts.append(ledger.attempt)
    assert attempts == [1, 1, 2]
    assert count(tmp_path) == 2


def test_a_group_is_known_by_session(tmp_path: Path) -> None:
    with Ledger(tmp_path / FILE_NAME, token="run") as ledger:
        ledger.add(
            [make_row(uid="g", session=0, value=0.25), make_row(uid="g", session=1, value=None), make_row(uid="h")]
        )
        assert ledger.group("g") == {0: 0.25, 1: None}


def test_without_texts_no_response_is_kept(tmp_path: Path) -> None:
    with Ledger(tmp_path / FILE_NAME, token="run", store_texts=False) as ledger:
        ledger.add_route(make_query(), ROUTE)
        ledger.add([make_row(uid="a", response="a secret of the user")])
    assert b"secret" not in (tmp_path / FILE_NAME).read_bytes()
    with read(tmp_path) as db:
        assert db.execute("SELECT COUNT(*) FROM texts").fetchone()[0] == 0


def test_a_ledger_of_another_schema_version_is_refused_by_both_sides(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    Ledger(path, token="run").close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version=99")
    db.close()
    with pytest.raises(LedgerError, match="schema version 99"):
        Ledger(path, token="run")
    with pytest.raises(LedgerError, match="schema version 99"), read(path):
        pass


def test_a_file_that_is_no_ledger_and_a_missing_one_are_named(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="there is no ledger at"), read(tmp_path):
        pass
    (tmp_path / FILE_NAME).write_text("not a database, though it is long enough to look like one " * 20)
    with pytest.raises(LedgerError, match=FILE_NAME):
        Ledger(tmp_path / FILE_NAME, token="run")


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_ledger import make_row
from verl_rlar.ledger import Ledger
with Ledger(Path(sys.argv[1]), token=sys.argv[2]) as ledger:
    for number in range(1_000_000):
        ledger.add([make_row(uid=str(number), session=session, response=str(number) * 50) for session in range(4)])
        print(number, flush=True)
"""


def test_no_acknowledged_row_is_lost_when_the_writer_is_killed_at_any_moment(tmp_path: Path) -> None:
    path, acknowledged = tmp_path / FILE_NAME, 0
    for attempt, rows_before_the_kill in enumerate([0, 1, 7, 40, 133]):
        script = WRITER.format(tests=str(Path(__file__).parent))
        command = [sys.executable, "-c", script, str(path), f"attempt {attempt}"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            lines = [writer.stdout.readline() for _ in range(rows_before_the_kill + 1)]
            os.kill(writer.pid, signal.SIGKILL)
            lines += writer.stdout.readlines()
        acknowledged += 4 * len([line for line in lines if line.endswith("\n")])
        with read(path) as db:
            assert db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
            kept = db.execute("SELECT COUNT(*) FROM scores").fetchone()[0]
            halves = db.execute("SELECT COUNT(*) c FROM scores GROUP BY attempt, uid HAVING c != 4").fetchall()
        assert kept >= acknowledged
        assert halves == [], "a transaction is kept whole or not at all"
        acknowledged = kept
