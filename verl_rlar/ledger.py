# SPDX-License-Identifier: Apache-2.0
"""The ledger: the durable record of every route and every score of a run, in one SQLite file.

Tables: ``scores`` (a row per response), ``routes`` (a row per decision), ``tools`` (specs by digest), ``texts``
(queries and responses, compressed, stored once by content), ``attempts`` (a row per start of training). `Ledger` writes
(the service is its only user in training), `read` opens a file for reading while a run goes on.

Guarantees: a call that has returned is durable against the death of any process, at any time (WAL; a power cut may cost
the last moments, as ``synchronous=NORMAL`` does not wait for the disk); each call is one transaction, so a reader never
sees half of it; a row that is sent twice stands there once; the schema has a version, and a file of another version is
refused by name.

Not covered: the file must lie on a local disk or one with working POSIX locks; SQLite's WAL does not work over NFS.
"""

from __future__ import annotations

import json
import sqlite3
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from verl_rlar.errors import LedgerError
from verl_rlar.types import Kind, Query, Route, RoutePart, Sample, Score, Snapshot, content_hash

SCHEMA_VERSION = 1
FILE_NAME = "ledger.sqlite"

_SCHEMA = """
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
"""


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
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                with self._transaction():
                    for statement in _SCHEMA.split(";"):
                        self._db.execute(statement)
                    self._db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
            else:
                _check_version(path, version)
            with self._transaction():
                self._db.execute("INSERT OR IGNORE INTO attempts (token, started) VALUES (?, ?)", (token, time.time()))
        self.attempt: int = self._db.execute("SELECT attempt FROM attempts WHERE token = ?", (token,)).fetchone()[0]

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._db.close()

    def add_tools(self, snapshot: Snapshot) -> None:
        """Keeps the specs of a snapshot's tools."""
        rows = [(t.digest, t.name, t.kind, json.dumps(asdict(t), default=sorted)) for t in snapshot.tools]
        with _explained(self.path), self._transaction():
            self._db.executemany("INSERT OR IGNORE INTO tools VALUES (?, ?, ?, ?)", rows)

    def route(self, query: Query, snapshot: Snapshot) -> Route | None:
        """The route that was decided for a query on a snapshot, or None."""
        with _explained(self.path):
            row = self._db.execute(
                "SELECT kind, covered, parts, reason FROM routes WHERE snapshot = ? AND query = ?",
                (snapshot.version, query.key),
            ).fetchone()
        if row is None:
            return None
        kind, covered, parts, reason = row
        parts = tuple(RoutePart(**part) for part in json.loads(parts))
        return Route(parts=parts, reason=reason, kind=Kind(kind), covered=bool(covered), snapshot=snapshot.version)

    def add_route(self, query: Query, route: Route) -> None:
        """Keeps a decision. The first one for a (snapshot, query) stays."""
        parts = json.dumps([asdict(part) for part in route.parts])
        values = (
            route.snapshot,
            query.key,
            route.name,
            route.kind.value,
            route.covered,
            parts,
            route.reason,
            time.time(),
        )
        with _explained(self.path), self._transaction():
            self._db.execute("INSERT OR IGNORE INTO routes VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)
            if self._store_texts:
                self._add_text(query.key, query_text(query))

    def add(self, rows: Iterable[Row]) -> None:
        """Keeps rows, all or none. A response that is already there is replaced."""
        with _explained(self.path), self._transaction():
            for row in rows:
                sample, score = row.sample, row.score
                sha = content_hash(sample.response)[:32] if self._store_texts else None
                if sha:
                    self._add_text(sha, sample.response)
                parts = json.dumps([asdict(part) for part in score.parts])
                values = (
                    *(self.attempt, sample.split, sample.step, sample.uid, sample.session),
                    *(sample.query.key, sample.query.data_source, row.route.snapshot, row.route.name),
                    *(score.outcome.value, score.value, row.sent, row.sent_as, score.reason),
                    *(parts, sha, row.received, row.seconds),
                )
                self._db.execute(f"INSERT OR REPLACE INTO scores VALUES ({', '.join('?' * len(values))})", values)

    def group(self, uid: str) -> dict[int, float | None]:
        """What is known of a GRPO group: by session, the value, or None for an unscored response."""
        with _explained(self.path):
            rows = self._db.execute(
                "SELECT session, value FROM scores WHERE attempt = ? AND uid = ?", (self.attempt, uid)
            ).fetchall()
        return dict(rows)

    def _add_text(self, sha: str, text: str) -> None:
        body = zlib.compress(text.encode("utf-8", "surrogatepass"))
        self._db.execute("INSERT OR IGNORE INTO texts VALUES (?, ?)", (sha, body))

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")


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
    with (
        _explained(file),
        closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True, timeout=10.0)) as db,
    ):
        _check_version(file, db.execute("PRAGMA user_version").fetchone()[0])
        db.row_factory = sqlite3.Row
        yield db


def _check_version(path: Path, version: Any) -> None:
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
