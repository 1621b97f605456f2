# SPDX-License-Identifier: Apache-2.0
"""The ledger: the durable record of every route and every score of a run, in one SQLite file.

Tables: ``scores`` (a row per response), ``routes`` (a row per decision), ``tools`` (specs by digest), ``texts``
(queries and responses, compressed, stored once by content), ``shadows`` (what tools without a say would have given),
``canaries`` (answers whose score is known, scored again), ``watched`` and ``alarms`` (what a step showed of each tool
in each cluster, and what was raised for it), ``attempts`` (a row per start of training). `Ledger` writes (the service
is its only user in training), `read` opens a file for reading while a run goes on.

Guarantees: a call that has returned is durable against the death of any process, at any time (WAL; a power cut may cost
the last moments, as ``synchronous=NORMAL`` does not wait for the disk); each call is one transaction, so a reader never
sees half of it; a row that is sent twice stands there once; the schema has a version: an older file is brought up by
the next writer, in one transaction, a newer one is refused by name. Texts of responses may give way (`Ledger.trim`),
rows never do.

Not covered: the file must lie on a local disk or one with working POSIX locks; SQLite's WAL does not work over NFS.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from verl_rlar.errors import LedgerError
from verl_rlar.types import Kind, Query, Route, RoutePart, Sample, Score, Snapshot, Split, ToolScore, content_hash

SCHEMA_VERSION = 4
FILE_NAME = "ledger.sqlite"

_FIRST = """
CREATE TABLE attempts (
    attempt INTEGER PRIMARY KEY, token TEXT NOT NULL UNIQUE, started REAL NOT NULL
);
CREATE TABLE tools (
    digest TEXT PRIMARY KEY, name TEXT NOT NULL, kind TEXT NOT NULL, spec TEXT NOT NULL
) WITHOUT ROWID;
"""
"""What version 2 has as version 1 had it."""
_SECOND = """
CREATE TABLE scores (
    attempt INTEGER NOT NULL, split TEXT NOT NULL, step INTEGER NOT NULL, uid TEXT NOT NULL, session INTEGER NOT NULL,
    query TEXT NOT NULL, data_source TEXT NOT NULL, snapshot TEXT NOT NULL, route TEXT NOT NULL,
    outcome TEXT NOT NULL, value REAL, sent REAL NOT NULL, sent_as TEXT NOT NULL, reason TEXT NOT NULL,
    parts TEXT NOT NULL, response TEXT, received REAL NOT NULL, seconds REAL NOT NULL,
    PRIMARY KEY (attempt, uid, session)
);
CREATE INDEX scores_by_step ON scores (split, step, attempt, uid, session, route, data_source, outcome, value, sent);
CREATE TABLE texts (
    sha TEXT PRIMARY KEY, body BLOB NOT NULL, step INTEGER
);
CREATE INDEX texts_by_step ON texts (step) WHERE step IS NOT NULL;
CREATE TABLE routes (
    snapshot TEXT NOT NULL, split TEXT NOT NULL, query TEXT NOT NULL, name TEXT NOT NULL, kind TEXT NOT NULL,
    covered INTEGER NOT NULL, parts TEXT NOT NULL, reason TEXT NOT NULL, decided REAL NOT NULL,
    PRIMARY KEY (snapshot, split, query)
) WITHOUT ROWID;
CREATE TABLE shadows (
    attempt INTEGER NOT NULL, uid TEXT NOT NULL, session INTEGER NOT NULL, digest TEXT NOT NULL, tool TEXT NOT NULL,
    step INTEGER NOT NULL, outcome TEXT NOT NULL, raw REAL, value REAL, reason TEXT NOT NULL, seconds REAL NOT NULL,
    PRIMARY KEY (attempt, uid, session, digest)
) WITHOUT ROWID;
CREATE INDEX shadows_by_step ON shadows (step);
CREATE TABLE canaries (
    attempt INTEGER NOT NULL, step INTEGER NOT NULL, digest TEXT NOT NULL, canary TEXT NOT NULL, tool TEXT NOT NULL,
    outcome TEXT NOT NULL, value REAL, reason TEXT NOT NULL,
    PRIMARY KEY (attempt, step, digest, canary)
) WITHOUT ROWID;
"""
"""What it has otherwise. ``scores`` and ``texts`` have row ids, so that those of a step lie together, to be read and to
be dropped. ``scores_by_step`` holds all that a curve over steps is made of: of a million rows, the table itself takes
many seconds to read."""
_THIRD = "ALTER TABLE routes ADD COLUMN cluster TEXT NOT NULL DEFAULT ''"
"""What version 3 has beside that: the cluster of a route's query; empty in what was decided before."""
_FOURTH = """
CREATE TABLE watched (
    attempt INTEGER NOT NULL, step INTEGER NOT NULL, digest TEXT NOT NULL, cluster TEXT NOT NULL, tally TEXT NOT NULL,
    PRIMARY KEY (attempt, step, digest, cluster)
) WITHOUT ROWID;
CREATE INDEX watched_by_cluster ON watched (cluster, step);
CREATE TABLE alarms (
    attempt INTEGER NOT NULL, step INTEGER NOT NULL, sign TEXT NOT NULL, digest TEXT NOT NULL, cluster TEXT NOT NULL,
    tool TEXT NOT NULL, action TEXT NOT NULL, text TEXT NOT NULL, figures TEXT NOT NULL, examples TEXT NOT NULL,
    PRIMARY KEY (attempt, step, sign, digest, cluster)
) WITHOUT ROWID;
"""
"""What version 4 has beside that: tallies and alarms of `verl_rlar.watch`, in JSON."""
ALARM_COUNTS = (
    "NOT EXISTS (SELECT 1 FROM watched WHERE watched.attempt > alarms.attempt AND watched.step < alarms.step)"
)
"""Of an alarm: that no later start of training has trained the steps again that it is about."""
_PAGE_BYTES = 8192
"""Size of a page of a new file; with larger ones less is read apart, with smaller ones less is written twice."""

_MIGRATIONS = {
    1: f"""
DROP INDEX scores_by_step;
ALTER TABLE scores RENAME TO old_scores;
ALTER TABLE texts RENAME TO old_texts;
ALTER TABLE routes RENAME TO old_routes;
{_SECOND}
INSERT INTO scores SELECT * FROM old_scores ORDER BY step;
INSERT INTO texts
    SELECT sha, body, latest.step
    FROM old_texts LEFT JOIN (SELECT response, MAX(step) AS step FROM scores GROUP BY response) AS latest
    ON response = sha ORDER BY latest.step;
INSERT INTO routes
    SELECT snapshot, split.name, query, old_routes.name, kind, covered, parts, reason, decided
    FROM old_routes, (SELECT 'train' AS name UNION ALL SELECT 'val') AS split;
DROP TABLE old_scores;
DROP TABLE old_texts;
DROP TABLE old_routes;
""",
    2: _THIRD,
    3: _FOURTH,
}
"""By version, what brings a file of it to the next one."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One response's entry."""

    sample: Sample
    route: Route
    score: Score
    sent: float
    """The number that verl got."""
    sent_as: str
    """``value`` (the score itself), ``siblings`` (the mean of the group's scored responses) or ``neutral``."""
    received: float
    """When the response came in, in seconds since the epoch."""
    seconds: float
    """Wall time from then until the number was known, in seconds; the wait for siblings is left out."""


@dataclass(frozen=True, kw_only=True)
class ShadowRow:
    """What a tool without a say gave for a response."""

    uid: str
    session: int
    step: int
    score: ToolScore


@dataclass(frozen=True, kw_only=True)
class CanaryRow:
    """What a tool gave for an answer whose score is known."""

    canary: str
    """Id of the canary, see `verl_rlar.canaries`."""
    step: int
    score: ToolScore


class Ledger:
    """The ledger of a run, open for writing. Use as a context manager, from one thread at a time.

    Args:
        path: The file; made, with its folders, if missing.
        token: Names this start of training. A writer that comes back with the same token goes on with the same attempt.
        store_texts: Whether queries and responses are kept.

    Raises:
        LedgerError: The file is of another schema version, is damaged, or cannot be written.
    """

    def __init__(self, path: Path, *, token: str, store_texts: bool = True) -> None:
        self.path = path
        self._store_texts = store_texts
        with _explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=10.0, isolation_level=None, check_same_thread=False)
            self._db.execute(f"PRAGMA page_size={_PAGE_BYTES}")
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            with self._transaction():
                self._bring_up()
                self._db.execute("INSERT OR IGNORE INTO attempts (token, started) VALUES (?, ?)", (token, time.time()))
        self.attempt: int = self._db.execute("SELECT attempt FROM attempts WHERE token = ?", (token,)).fetchone()[0]

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._db.close()

    def _bring_up(self) -> None:
        """Makes the schema, or brings an older one up."""
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, *_MIGRATIONS):
            _check_version(self.path, version)
            return
        whole = [_FIRST, _SECOND, _THIRD, _FOURTH]
        made = whole if version == 0 else [_MIGRATIONS[n] for n in range(version, SCHEMA_VERSION)]
        for statement in ";".join(made).split(";"):
            self._db.execute(statement)
        self._db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")

    def add_tools(self, snapshot: Snapshot) -> None:
        """Keeps the specs of a snapshot's tools, those in the shadow included."""
        tools = (*snapshot.tools, *snapshot.shadows)
        rows = [(t.digest, t.name, t.kind, json.dumps(asdict(t), default=sorted)) for t in tools]
        with _explained(self.path), self._transaction():
            self._db.executemany("INSERT OR IGNORE INTO tools VALUES (?, ?, ?, ?)", rows)

    def route(self, query: Query, snapshot: Snapshot, split: Split = "train") -> Route | None:
        """The route that was decided for a query on a snapshot, or None."""
        with _explained(self.path):
            return stored_route(self._db, snapshot.version, split, query.key)

    def add_route(self, query: Query, route: Route, split: Split = "train") -> None:
        """Keeps a decision. The first one for a (snapshot, split, query) stays."""
        parts = json.dumps([asdict(part) for part in route.parts])
        values = (
            route.snapshot,
            split,
            query.key,
            route.name,
            route.kind.value,
            route.covered,
            parts,
            _utf8(route.reason),
            time.time(),
            route.cluster,
        )
        with _explained(self.path), self._transaction():
            self._db.execute("INSERT OR IGNORE INTO routes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", values)
            if self._store_texts:
                self._add_text(query.key, query_text(query))

    def keep_query(self, query: Query) -> None:
        """Keeps the text of a query whose route was decided when texts were not stored."""
        if not self._store_texts:
            return
        with _explained(self.path):
            if self._db.execute("SELECT 1 FROM texts WHERE sha = ?", (query.key,)).fetchone() is None:
                with self._transaction():
                    self._add_text(query.key, query_text(query))

    def add(self, rows: Iterable[Row]) -> None:
        """Keeps rows, all or none. A response that is already there is replaced."""
        with _explained(self.path), self._transaction():
            for row in rows:
                sample, score = row.sample, row.score
                sha = content_hash(sample.response)[:32] if self._store_texts else None
                if sha:
                    self._add_text(sha, sample.response, sample.step)
                parts = json.dumps([vars(part) for part in score.parts])
                values = (
                    *(self.attempt, sample.split, sample.step, sample.uid, sample.session),
                    *(sample.query.key, _utf8(sample.query.data_source), row.route.snapshot, row.route.name),
                    *(score.outcome.value, score.value, row.sent, row.sent_as, _utf8(score.reason)),
                    *(parts, sha, row.received, row.seconds),
                )
                self._db.execute(f"INSERT OR REPLACE INTO scores VALUES ({', '.join('?' * len(values))})", values)

    def add_shadows(self, rows: Sequence[ShadowRow]) -> None:
        """Keeps what tools in the shadow gave, all or none."""
        head = [(self.attempt, row.uid, row.session, row.score.digest) for row in rows]
        values = [(*keys, *_of_tool(row.step, row.score)) for keys, row in zip(head, rows, strict=True)]
        with _explained(self.path), self._transaction():
            self._db.executemany("INSERT OR REPLACE INTO shadows VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", values)

    def add_canaries(self, rows: Iterable[CanaryRow]) -> None:
        """Keeps what canaries got, all or none."""
        values = []
        for row in rows:
            tool, step, outcome, _, value, reason, _ = _of_tool(row.step, row.score)
            values.append((self.attempt, step, row.score.digest, row.canary, tool, outcome, value, reason))
        with _explained(self.path), self._transaction():
            self._db.executemany("INSERT OR REPLACE INTO canaries VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)

    def watched_since(
        self, step: int, *, texts: bool = True
    ) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]], list[tuple[Any, ...]]]:
        """What this start of training has scored from a step on: for those who watch the tools and were restarted.
        Responses that came while no service answered are left out.

        Args:
            step: The first step.
            texts: Whether responses are read, too: those of some steps may be gigabytes.

        Returns:
            Step, uid, session, query, value, parts (JSON), kind, whether a tool fits, cluster and text (None if it is
            gone, or not read) of training responses; step, uid, session, digest, outcome, raw score and value in the
            shadow; step, digest, canary, outcome and value of canaries.
        """
        found = []
        for sql in (
            "SELECT scores.step, uid, session, scores.query, value, scores.parts, COALESCE(kind, 'open'), "
            f"COALESCE(covered, 1), COALESCE(cluster, ''), {'body' if texts else 'NULL'} FROM scores "
            "LEFT JOIN routes ON routes.snapshot = scores.snapshot AND routes.split = scores.split "
            "AND routes.query = scores.query LEFT JOIN texts ON texts.sha = scores.response "
            "WHERE attempt = ? AND scores.split = 'train' AND scores.step >= ? AND scores.snapshot <> '' "
            "ORDER BY scores.step",
            "SELECT step, uid, session, digest, outcome, raw, value FROM shadows WHERE attempt = ? AND step >= ? "
            "ORDER BY step",
            "SELECT step, digest, canary, outcome, value FROM canaries WHERE attempt = ? AND step >= ? ORDER BY step",
        ):
            with _explained(self.path):
                found.append(self._db.execute(sql, (self.attempt, step)).fetchall())
        responses = [(*row[:-1], None if row[-1] is None else unpack(row[-1])) for row in found[0]]
        return responses, found[1], found[2]

    def add_watched(self, step: int, tallies: Iterable[tuple[str, str, str]]) -> None:
        """Keeps what a step showed of each tool in each cluster: digest, cluster and tally, in JSON; all or none."""
        values = [(self.attempt, step, *one) for one in tallies]
        with _explained(self.path), self._transaction():
            self._db.executemany("INSERT OR REPLACE INTO watched VALUES (?, ?, ?, ?, ?)", values)

    def watched_before(self, step: int, steps: int) -> list[tuple[int, str, str, str]]:
        """Step, digest, cluster and tally of the `steps` latest steps before one; of each, of its latest training."""
        sql = (
            "WITH latest AS (SELECT step, MAX(attempt) AS attempt FROM watched WHERE step < ? GROUP BY step "
            "ORDER BY step DESC LIMIT ?) SELECT step, digest, cluster, tally FROM latest JOIN watched USING (step, "
            "attempt) ORDER BY step"
        )
        with _explained(self.path):
            return self._db.execute(sql, (step, steps)).fetchall()

    def last_watched(self) -> int:
        """The latest step of this start of training that is in ``watched``; -1 if there is none."""
        sql = "SELECT MAX(step) FROM watched WHERE attempt = ?"
        with _explained(self.path):
            found = self._db.execute(sql, (self.attempt,)).fetchone()[0]
        return -1 if found is None else int(found)

    def clusters_before(self, step: int) -> list[tuple[str, int]]:
        """Every cluster that was seen before a step, and the first step at which it was."""
        sql = "SELECT cluster, MIN(step) FROM watched WHERE step < ? GROUP BY cluster"
        with _explained(self.path):
            return self._db.execute(sql, (step,)).fetchall()

    def add_alarms(self, alarms: Iterable[tuple[int, str, str, str, str, str, str, str, str]]) -> None:
        """Keeps alarms: step, sign, digest, cluster, tool, action, text, figures and examples (both JSON)."""
        values = [(self.attempt, *alarm) for alarm in alarms]
        with _explained(self.path), self._transaction():
            self._db.executemany("INSERT OR REPLACE INTO alarms VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", values)

    def alarms_before(self, step: int) -> list[tuple[str, str, str, int]]:
        """Sign, digest, cluster and step of the alarms that were raised before a step, but for those of a training that
        was given up for a later one at an earlier step."""
        sql = f"SELECT sign, digest, cluster, step FROM alarms WHERE step < ? AND {ALARM_COUNTS} ORDER BY step"
        with _explained(self.path):
            return self._db.execute(sql, (step,)).fetchall()

    def canary_values(self) -> dict[tuple[str, str], float]:
        """By digest and canary, the first value that was recorded in any start of training."""
        sql = "SELECT digest, canary, value FROM canaries WHERE value IS NOT NULL ORDER BY attempt DESC, step DESC"
        with _explained(self.path):
            return {(digest, canary): value for digest, canary, value in self._db.execute(sql)}

    def trim(self, *, before_step: int | None, max_bytes: float) -> int:
        """Drops the texts of responses that no row of a later step has: the rows stay, and cannot be replayed.

        Args:
            before_step: Texts that were last used before this step go; None: none for that reason.
            max_bytes: Where the file holds more, the oldest steps' texts go, until it does not or few are left.

        Returns:
            Number of texts that went.
        """
        dropped = 0
        with _explained(self.path):
            if before_step is not None:
                with self._transaction():
                    dropped += self._db.execute("DELETE FROM texts WHERE step < ?", (before_step,)).rowcount
            while self._used_bytes() > max_bytes:
                oldest, newest = self._db.execute(
                    "SELECT MIN(step), MAX(step) FROM texts WHERE step IS NOT NULL"
                ).fetchone()
                if oldest is None or oldest == newest:
                    break
                with self._transaction():
                    dropped += self._db.execute("DELETE FROM texts WHERE step <= ?", (oldest,)).rowcount
        return dropped

    def _used_bytes(self) -> int:
        pages, free, size = (
            self._db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
        )
        return int((pages - free) * size)

    def group(self, uid: str) -> dict[int, float | None]:
        """What is known of a GRPO group: by session, the value, or None for an unscored response."""
        with _explained(self.path):
            rows = self._db.execute(
                "SELECT session, value FROM scores WHERE attempt = ? AND uid = ?", (self.attempt, uid)
            ).fetchall()
        return dict(rows)

    def _add_text(self, sha: str, text: str, step: int | None = None) -> None:
        """Keeps a text; of a response, with the latest step that has it."""
        body = zlib.compress(text.encode("utf-8", "surrogatepass"))
        sql = "INSERT INTO texts VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET step = MAX(step, excluded.step)"
        self._db.execute(sql, (sha, body, step))

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")


def _of_tool(step: int, score: ToolScore) -> tuple[Any, ...]:
    return score.tool, step, score.outcome.value, score.raw, score.value, _utf8(score.reason[:500]), score.seconds


def _utf8(text: str) -> str:
    """A text that SQLite takes: a reason may quote half a pair of surrogates out of a response's JSON."""
    return text.encode("utf-8", "backslashreplace").decode()


def stored_route(db: sqlite3.Connection, snapshot: str, split: str, query: str) -> Route | None:
    """The route that was decided for a query (its key) on a snapshot (its version), or None."""
    row = db.execute(
        "SELECT kind, covered, parts, reason, cluster FROM routes WHERE snapshot = ? AND split = ? AND query = ?",
        (snapshot, split, query),
    ).fetchone()
    if row is None:
        return None
    kind, covered, parts, reason, cluster = row
    made = tuple(
        RoutePart(**{**part, "schedule": tuple((step, weight) for step, weight in part.get("schedule", ()))})
        for part in json.loads(parts)
    )
    return Route(parts=made, reason=reason, kind=Kind(kind), covered=bool(covered), snapshot=snapshot, cluster=cluster)


def query_text(query: Query) -> str:
    """A query as the ledger keeps it: JSON."""
    body = {"messages": [asdict(m) for m in query.messages], "reference": query.reference, "extra": dict(query.extra)}
    return json.dumps(body, ensure_ascii=False, default=str)


def unpack(body: bytes) -> str:
    """The text of a ``texts.body``."""
    return zlib.decompress(body).decode("utf-8", "surrogatepass")


@contextmanager
def read(path: Path) -> Iterator[sqlite3.Connection]:
    """Opens a ledger for reading; `path` is the file or the folder that holds it. A run may be writing meanwhile.

    Raises:
        LedgerError: There is no ledger, or it is of another schema version or damaged.
    """
    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        raise LedgerError(f"there is no ledger at {file}; give the folder `rlar` inside the run's checkpoint folder")
    if not os.access(file, os.R_OK):
        raise LedgerError(f"{file}: Permission denied; may you read it?")
    how = "mode=ro"
    if not os.access(file.parent, os.W_OK) and not file.with_name(f"{file.name}-wal").exists():
        how += "&immutable=1"  # nobody writes it, and SQLite could not make the files that WAL needs to look
    with (
        _explained(file),
        closing(sqlite3.connect(f"{file.absolute().as_uri()}?{how}", uri=True, timeout=10.0)) as db,
    ):
        _check_version(file, db.execute("PRAGMA user_version").fetchone()[0])
        db.row_factory = sqlite3.Row
        yield db


def _check_version(path: Path, version: Any) -> None:
    if version in _MIGRATIONS:
        raise LedgerError(
            f"{path} has schema version {version}, this release of verl_rlar reads version {SCHEMA_VERSION}; the next "
            f'training on it brings it up, or: python -c "from pathlib import Path; from verl_rlar.ledger import '
            f"Ledger; Ledger(Path('{path}'), token='brought up').close()\""
        )
    if version == 0:
        raise LedgerError(f"{path} is no ledger, or one that is just being made: try again in a moment")
    if version != SCHEMA_VERSION:
        raise LedgerError(
            f"{path} has schema version {version}, this release of verl_rlar reads version {SCHEMA_VERSION}; "
            "use the release that wrote it, or another run folder"
        )


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise LedgerError(f"ledger {path}: {error}; is the disk full, or not local, or the file damaged?") from error
