# SPDX-License-Identifier: Apache-2.0
"""The ledger: what stands in it stays in it."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import zlib
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import make_query, make_sample

from verl_rlar.errors import LedgerError
from verl_rlar.ledger import FILE_NAME, SCHEMA_VERSION, CanaryRow, Ledger, Row, ShadowRow, query_text, read, unpack
from verl_rlar.types import Kind, Outcome, Query, Route, RoutePart, Score, Snapshot, ToolScore

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


def count_as_somebody(path: Path, said: Any) -> None:
    if os.getuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    said.send(count(path))


def test_a_finished_run_is_read_by_somebody_who_may_not_write_its_folder() -> None:
    folder = Path(tempfile.mkdtemp())  # pytest's own is closed to others
    with Ledger(folder / FILE_NAME, token="run") as ledger:
        ledger.add([make_row()])
    folder.chmod(0o555)
    fork = multiprocessing.get_context("fork")
    rows, said = fork.Pipe(duplex=False)
    reader = fork.Process(target=count_as_somebody, args=(folder, said))
    try:
        reader.start()
        said.close()
        assert rows.recv() == 1
    finally:
        reader.join()
        folder.chmod(0o755)
        shutil.rmtree(folder)


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


# --- What tools in the shadow gave, and canaries ----------------------------------------------------------------------


def tool_score(value: float | None = 0.25, *, digest: str = "d" * 16, reason: str = "looked") -> ToolScore:
    outcome = Outcome.FAILED if value is None else Outcome.SCORED
    raw = None if value is None else 10 * value
    return ToolScore(tool="checker", digest=digest, outcome=outcome, raw=raw, value=value, reason=reason, seconds=0.5)


def test_what_a_tool_in_the_shadow_gave_is_read_back_whole(tmp_path: Path) -> None:
    with Ledger(tmp_path / FILE_NAME, token="run") as ledger:
        rows = [ShadowRow(uid="g", session=n, step=7, score=tool_score(value)) for n, value in enumerate((0.1, None))]
        ledger.add_shadows(rows)
        ledger.add_shadows(rows[:1])
    with read(tmp_path) as db:
        kept = [tuple(row) for row in db.execute("SELECT * FROM shadows ORDER BY session")]
    assert kept == [
        (1, "g", 0, "d" * 16, "checker", 7, "scored", 1.0, 0.1, "looked", 0.5),
        (1, "g", 1, "d" * 16, "checker", 7, "failed", None, None, "looked", 0.5),
    ]


def test_what_a_canary_got_is_read_back_whole(tmp_path: Path) -> None:
    with Ledger(tmp_path / FILE_NAME, token="run") as ledger:
        ledger.add_canaries(
            CanaryRow(canary=f"c{n}", step=3, score=tool_score(value)) for n, value in ((0, 1), (1, None))
        )
    with read(tmp_path) as db:
        kept = [tuple(row) for row in db.execute("SELECT * FROM canaries ORDER BY canary")]
    assert kept == [
        (1, 3, "d" * 16, "c0", "checker", "scored", 1.0, "looked"),
        (1, 3, "d" * 16, "c1", "checker", "failed", None, "looked"),
    ]


def test_shadow_rows_are_added_all_or_none(tmp_path: Path) -> None:
    good, bad = (ShadowRow(uid="g", session=n, step=1, score=tool_score()) for n in range(2))
    with Ledger(tmp_path / FILE_NAME, token="run") as ledger:
        with pytest.raises(LedgerError):
            ledger.add_shadows([good, replace(bad, uid=None)])  # type: ignore[arg-type]
        with read(tmp_path) as db:
            assert db.execute("SELECT COUNT(*) FROM shadows").fetchone()[0] == 0


def test_who_watches_the_tools_gets_this_starts_training_rows_from_a_step_on(tmp_path: Path) -> None:
    with Ledger(tmp_path / FILE_NAME, token="first") as ledger:
        ledger.add([make_row(uid="old", step=9)])
        ledger.add_shadows([ShadowRow(uid="old", session=0, step=9, score=tool_score())])
        ledger.add_canaries([CanaryRow(canary="c", step=9, score=tool_score())])
    with Ledger(tmp_path / FILE_NAME, token="second") as ledger:
        for step in (5, 4, 3):
            ledger.add([make_row(uid=f"g{step}", step=step), make_row(uid=f"v{step}", step=step, split="val")])
            ledger.add_shadows([ShadowRow(uid=f"g{step}", session=0, step=step, score=tool_score())])
            ledger.add_canaries([CanaryRow(canary="c", step=step, score=tool_score())])
        key = make_query().key
        ledger.add_route(make_query(), replace(ROUTE, cluster="short_text#3", covered=False))
        rest = (key, 1.0, "[]", "short_text", 0, "short_text#3", make_row().sample.response)
        assert ledger.watched_since(4) == (
            [(4, "g4", 0, *rest), (5, "g5", 0, *rest)],
            [(step, f"g{step}", 0, "d" * 16, "scored", 2.5, 0.25) for step in (4, 5)],
            [(step, "d" * 16, "c", "scored", 0.25) for step in (4, 5)],
        )
        assert [row[-1] for row in ledger.watched_since(4, texts=False)[0]] == [None, None]
        assert ledger.watched_since(6) == ([], [], [])


def test_a_canarys_value_is_the_first_one_that_was_ever_recorded(tmp_path: Path) -> None:
    for token, steps in (("first", ((4, 0.1), (5, 0.2))), ("second", ((2, 0.3), (3, 0.4)))):
        with Ledger(tmp_path / FILE_NAME, token=token) as ledger:
            for step, value in steps:
                ledger.add_canaries([CanaryRow(canary="a", step=step, score=tool_score(value))])
            ledger.add_canaries([CanaryRow(canary="b", step=1, score=tool_score(None))])
            known = ledger.canary_values()
    assert known == {("d" * 16, "a"): 0.1}


def test_each_split_has_its_own_route_for_a_query(tmp_path: Path) -> None:
    other = replace(ROUTE, reason="validation asks for more")
    with Ledger(tmp_path / FILE_NAME, token="run") as ledger:
        ledger.add_route(make_query(), ROUTE, "train")
        assert ledger.route(make_query(), SNAPSHOT, "val") is None
        ledger.add_route(make_query(), other, "val")
        assert ledger.route(make_query(), SNAPSHOT, "train") == ROUTE
        assert ledger.route(make_query(), SNAPSHOT, "val") == other


def test_a_weight_that_changes_with_the_step_is_read_back(tmp_path: Path) -> None:
    part = RoutePart(tool="exact_match", digest="d" * 16, schedule=((0, 0.0), (100, 0.3)), gate=True, threshold=0.5)
    with Ledger(tmp_path / FILE_NAME, token="run") as ledger:
        ledger.add_route(make_query(), replace(ROUTE, parts=(part,)))
        found = ledger.route(make_query(), SNAPSHOT)
    assert found is not None and found.parts == (part,)


# --- Texts that give way ----------------------------------------------------------------------------------------------


def texts(path: Path) -> list[str]:
    """The texts of responses that are still there."""
    with read(path) as db:
        return sorted(unpack(row[0]) for row in db.execute("SELECT body FROM texts WHERE step IS NOT NULL"))


def test_texts_of_old_steps_go_and_rows_and_queries_never(tmp_path: Path) -> None:
    with Ledger(tmp_path / FILE_NAME, token="run") as ledger:
        ledger.add_route(make_query(), ROUTE)
        ledger.add([make_row(uid=f"g{step}", step=step, response=f"answer {step}") for step in range(1, 5)])
        assert ledger.trim(before_step=None, max_bytes=float("inf")) == 0
        assert ledger.trim(before_step=3, max_bytes=float("inf")) == 2
    assert texts(tmp_path) == ["answer 3", "answer 4"]
    assert count(tmp_path) == 4
    with read(tmp_path) as db:
        assert db.execute("SELECT COUNT(*) FROM texts WHERE sha = ?", (make_query().key,)).fetchone()[0] == 1


def test_a_text_that_a_later_step_used_again_stays(tmp_path: Path) -> None:
    with Ledger(tmp_path / FILE_NAME, token="run") as ledger:
        ledger.add([make_row(uid="a", step=5, response="again"), make_row(uid="b", step=1, response="once")])
        ledger.add([make_row(uid="c", step=2, response="again")])
        assert ledger.trim(before_step=5, max_bytes=float("inf")) == 1
        assert texts(tmp_path) == ["again"]
        ledger.add([make_row(uid="d", step=6, response="once")])
        assert ledger.trim(before_step=6, max_bytes=float("inf")) == 1
    assert texts(tmp_path) == ["once"]


def test_a_ledger_that_is_too_large_loses_the_oldest_steps_texts_until_it_is_not(tmp_path: Path) -> None:
    noise = random.Random(0)
    with Ledger(tmp_path / FILE_NAME, token="run") as ledger:
        for step in range(1, 21):
            bodies = [noise.randbytes(20_000).hex() for _ in range(10)]
            ledger.add([make_row(uid=f"{step} {n}", step=step, response=body) for n, body in enumerate(bodies)])
        assert ledger.trim(before_step=None, max_bytes=1e7) == 0
        dropped = ledger.trim(before_step=None, max_bytes=2e6)
        assert ledger.trim(before_step=None, max_bytes=2e6) == 0, "once it fits it stays as it is"
        with read(tmp_path) as db:
            left = [row[0] for row in db.execute("SELECT DISTINCT step FROM texts ORDER BY step")]
            kept = db.execute("SELECT COUNT(*) FROM texts").fetchone()[0]
        assert left == list(range(left[0], 21)) and 5 < left[0] < 20
        assert dropped + kept == 200
        assert ledger.trim(before_step=None, max_bytes=0) == kept - 10, "the newest step's texts stay"
    assert count(tmp_path) == 200


def test_a_file_whose_old_texts_are_dropped_stops_growing(tmp_path: Path) -> None:
    noise, sizes = random.Random(0), []
    path = tmp_path / FILE_NAME
    with Ledger(path, token="run") as ledger:
        for step in range(1, 61):
            bodies = [noise.randbytes(2_000).hex() for _ in range(50)]
            ledger.add([make_row(uid=f"{step} {n}", step=step, response=body) for n, body in enumerate(bodies)])
            ledger.trim(before_step=step - 9, max_bytes=float("inf"))
            sizes.append(path.stat().st_size)
    rows = 600 * 50  # bytes that a step's rows themselves take, at most
    assert sizes[-1] - sizes[29] < 30 * rows, "a step's texts take more than 100,000 bytes"


# --- Version 1 --------------------------------------------------------------------------------------------------------

VERSION_1 = """
CREATE TABLE attempts (
    attempt INTEGER PRIMARY KEY, token TEXT NOT NULL UNIQUE, started REAL NOT NULL
);
CREATE TABLE tools (
    digest TEXT PRIMARY KEY, name TEXT NOT NULL, kind TEXT NOT NULL, spec TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE texts (
    sha TEXT PRIMARY KEY, body BLOB NOT NULL
) WITHOUT ROWID;
CREATE TABLE routes (
    snapshot TEXT NOT NULL, query TEXT NOT NULL, name TEXT NOT NULL, kind TEXT NOT NULL, covered INTEGER NOT NULL,
    parts TEXT NOT NULL, reason TEXT NOT NULL, decided REAL NOT NULL,
    PRIMARY KEY (snapshot, query)
) WITHOUT ROWID;
CREATE TABLE scores (
    attempt INTEGER NOT NULL, split TEXT NOT NULL, step INTEGER NOT NULL, uid TEXT NOT NULL, session INTEGER NOT NULL,
    query TEXT NOT NULL, data_source TEXT NOT NULL, snapshot TEXT NOT NULL, route TEXT NOT NULL,
    outcome TEXT NOT NULL, value REAL, sent REAL NOT NULL, sent_as TEXT NOT NULL, reason TEXT NOT NULL,
    parts TEXT NOT NULL, response TEXT, received REAL NOT NULL, seconds REAL NOT NULL,
    PRIMARY KEY (attempt, uid, session)
) WITHOUT ROWID;
CREATE INDEX scores_by_step ON scores (split, step);
PRAGMA user_version = 1;
"""


def question(number: int) -> Query:
    return make_query(f"What is {number} times 7?", str(7 * number))


def make_version_1(path: Path, *, queries: int = 3) -> dict[str, list[tuple[Any, ...]]]:
    """A ledger of version 1: two starts of training, two responses to each query, one of them the same one at all
    steps.

    Returns:
        Its rows, texts and routes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    db = sqlite3.connect(path)
    db.executescript("PRAGMA journal_mode=WAL;" + VERSION_1)
    db.executemany("INSERT INTO attempts VALUES (?, ?, ?)", [(1, "first", 1.0), (2, "second", 2.0)])
    db.execute("INSERT INTO tools VALUES (?, 'exact_match', 'rule', '{}')", ("d" * 16,))
    part = f'[{{"tool": "exact_match", "digest": "{"d" * 16}", "weight": 1.0}}]'
    for number in range(queries):
        query = question(number)
        route = (SNAPSHOT.version, query.key, "exact_match", "short_text", 1, part, ROUTE.reason, 3.0)
        db.execute("INSERT INTO routes VALUES (?, ?, ?, ?, ?, ?, ?, ?)", route)
        for sha, text in ((query.key, query_text(query)), (f"own {number}", f"{number} " * 50), ("same", "42")):
            body = zlib.compress(text.encode())
            db.execute("INSERT OR IGNORE INTO texts VALUES (?, ?)", (sha, body))
        for session, sha in enumerate((f"own {number}", "same")):
            db.execute(
                "INSERT INTO scores VALUES (2, ?, ?, ?, ?, ?, 'test', ?, 'exact_match', 'scored', ?, 1.0, 'value', "
                "'compared', '[]', ?, 4.0, 0.1)",
                ("train", number, f"g{number}", session, query.key, SNAPSHOT.version, session / 2, sha),
            )
    db.commit()
    kept = contents(db)
    db.close()
    return kept


def contents(db: sqlite3.Connection) -> dict[str, list[tuple[Any, ...]]]:
    """What a file of version 1 knows, as far as one of version 2 has it too."""
    wanted = {
        "attempts": "SELECT * FROM attempts WHERE attempt <= 2 ORDER BY attempt",
        "tools": "SELECT * FROM tools ORDER BY digest",
        "texts": "SELECT sha, body FROM texts ORDER BY sha",
        "scores": "SELECT * FROM scores ORDER BY attempt, uid, session",
    }
    return {name: [tuple(row) for row in db.execute(sql)] for name, sql in wanted.items()}


def test_a_file_of_version_1_is_brought_up_by_its_next_writer_with_all_that_it_has(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    before = make_version_1(path)
    with Ledger(path, token="third") as ledger:
        assert ledger.attempt == 3
        for number in range(3):
            for split in ("train", "val"):
                assert ledger.route(question(number), SNAPSHOT, split) == ROUTE  # type: ignore[arg-type]
        with read(path) as db:
            assert contents(db) == before
            steps = dict(db.execute("SELECT sha, step FROM texts").fetchall())
            assert db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        assert steps == {question(n).key: None for n in range(3)} | {f"own {n}": n for n in range(3)} | {"same": 2}
        ledger.add([make_row(uid="new", step=3)])
        ledger.add_shadows([ShadowRow(uid="new", session=0, step=3, score=tool_score())])
        ledger.add_canaries([CanaryRow(canary="c", step=3, score=tool_score())])
        assert ledger.trim(before_step=2, max_bytes=float("inf")) == 2, "the text that step 2 used again stays"
    assert count(path) == 6 + 1


def test_a_file_of_version_2_is_brought_up_and_its_routes_have_no_cluster(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    with Ledger(path, token="first") as ledger:
        ledger.add_route(make_query(), ROUTE)
    with closing(sqlite3.connect(path)) as db:
        db.execute("ALTER TABLE routes DROP COLUMN cluster")
        db.execute("DROP TABLE watched")
        db.execute("DROP TABLE alarms")
        db.execute("PRAGMA user_version=2")
    clustered = replace(ROUTE, cluster="short_text#3")
    with Ledger(path, token="second") as ledger:
        assert ledger.route(make_query(), SNAPSHOT) == ROUTE
        ledger.add_route(make_query("Another?"), clustered)
        assert ledger.route(make_query("Another?"), SNAPSHOT) == clustered


def test_what_was_watched_and_raised_is_that_of_the_latest_training_of_each_step(tmp_path: Path) -> None:
    def alarm(step: int) -> tuple[int, str, str, str, str, str, str, str, str]:
        return (step, "length", "d", "c", "tool", "log", "text", "{}", "[]")

    with Ledger(tmp_path / FILE_NAME, token="first") as ledger:
        for step in range(1, 7):
            ledger.add_watched(step, [("", f"c{step}", "{}"), ("d", "c", f'{{"of": {step}}}')])
        ledger.add_alarms([alarm(3), alarm(6)])
        assert (ledger.last_watched(), len(ledger.watched_before(9, 4))) == (6, 8)
    with Ledger(tmp_path / FILE_NAME, token="second") as ledger:  # from the checkpoint of step 4
        assert ledger.last_watched() == -1
        assert [row[:3] for row in ledger.watched_before(5, 2)] == [
            *((3, "", "c3"), (3, "d", "c")),
            *((4, "", "c4"), (4, "d", "c")),
        ]
        assert [step for *_, step in ledger.alarms_before(9)] == [3, 6]
        ledger.add_watched(5, [("", "c5", "{}"), ("d", "c", "again")])
        assert [step for *_, step in ledger.alarms_before(9)] == [3], "what is trained again is raised again"
        assert [row[3] for row in ledger.watched_before(6, 1)] == ["{}", "again"]
        assert dict(ledger.clusters_before(4)) == {"c1": 1, "c2": 2, "c3": 3, "c": 1}


def test_a_file_that_was_brought_up_has_the_same_schema_as_a_new_one(tmp_path: Path) -> None:
    def schema(path: Path) -> list[tuple[str, str]]:
        Ledger(path, token="run").close()
        with read(path) as db:
            found = db.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY name")
            return [(name, " ".join(sql.replace('"', "").split())) for name, sql in found]

    make_version_1(tmp_path / "old" / FILE_NAME)
    assert schema(tmp_path / "old" / FILE_NAME) == schema(tmp_path / "new" / FILE_NAME)


def test_a_reader_of_a_file_of_version_1_is_told_what_brings_it_up(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    make_version_1(path)
    with pytest.raises(LedgerError, match=rf"version 1, .* reads version {SCHEMA_VERSION}; .*python -c") as caught:
        with read(path):
            pass
    command = str(caught.value).partition('python -c "')[2].removesuffix('"')
    subprocess.run([sys.executable, "-c", command], check=True, timeout=60)
    assert count(path) == 6


MIGRATOR = """
import os, signal, sqlite3, sys
from pathlib import Path
from verl_rlar.ledger import Ledger

class Killed(Ledger):
    def _bring_up(self):
        left = int(sys.argv[2])
        def work():
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return 0
        self._db.set_progress_handler(work, 1000)
        super()._bring_up()

Killed(Path(sys.argv[1]), token="third").close()
"""
"""Brings a ledger up, and is killed after so many thousand instructions of SQLite's machine."""


def test_a_migration_that_is_killed_at_any_moment_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    before, kills, thousands = make_version_1(path, queries=3000), 0, 1
    while True:
        done = subprocess.run([sys.executable, "-c", MIGRATOR, str(path), str(thousands)], timeout=60)
        db = sqlite3.connect(path)
        version = db.execute("PRAGMA user_version").fetchone()[0]
        assert db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        assert contents(db) == before
        names = {row[0] for row in db.execute("SELECT name FROM sqlite_master")}
        db.close()
        assert names.isdisjoint({"old_scores", "old_texts", "old_routes"})
        if done.returncode == 0:
            break
        assert (done.returncode, version) == (-signal.SIGKILL, 1)
        kills, thousands = kills + 1, 3 * thousands
    assert version == SCHEMA_VERSION
    assert kills >= 4


# --- Size -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_a_report_asks_is_answered_at_once_and_no_row_is_lost_on_the_way() -> None:
    pytest.importorskip("ray", reason="Ray is not installed (extra `cpu`)")
    script = Path(__file__).parent.parent / "recipes" / "benchmarks" / "ledger.py"
    command = [sys.executable, str(script), "--rows", "20000", "--samples", "300", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    figures = json.loads(done.stdout.splitlines()[-1])["figures"]
    assert figures["rows_lost"] == figures["rows_lost_by_trim"] == 0
    assert figures["slowest_question_cpu_s"] < 2 and figures["trim_a_step_cpu_s"] < 1
    assert figures["texts_dropped"] > 1000 and figures["grown_to_bare"] < 1.1
