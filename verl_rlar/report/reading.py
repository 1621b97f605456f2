# SPDX-License-Identifier: Apache-2.0
"""A ledger, opened for one report: one state of it, the starts of training that count, and samples of its rows.

Guarantees: read only; all that is asked of a `Reading` sees the same state, however long it takes, and a training goes
on meanwhile; of what was trained more than once the latest start counts, and what an earlier one did from there on
does not; the same ledger gives the same samples.
What is counted over all rows comes out of one pass over an index, not over the rows themselves.

Not covered: a sample of rows is one of stretches of the file, so of moments of the training; where rows were written
again (a service that was killed), those moments count a little more.
"""

from __future__ import annotations

import heapq
import json
import random
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_rlar.errors import LedgerError
from verl_rlar.ledger import read, unpack

SEED = 20260301
POINTS = 240
"""Most points of a curve; more steps than that share points."""
ROWS = 60_000
"""Most rows whose parts are read; of more, a sample."""
STRETCH = 48
"""Rows that a sample takes side by side."""
AT_ONCE = 400
"""Values in one question."""

_GROUPED = """
CREATE TEMP TABLE grouped AS
SELECT split, step, attempt, uid, COALESCE(MIN(NULLIF(route, '-')), '-') AS route, MIN(data_source) AS data_source,
    COUNT(*) AS n, COUNT(value) AS scored, SUM(outcome = 'failed') AS failed, SUM(outcome = 'hacked') AS hacked,
    SUM(outcome = 'abstained') AS abstained, MIN(value) AS low, MAX(value) AS high, TOTAL(value) AS total,
    TOTAL(sent) AS sent
FROM scores GROUP BY split, step, attempt, uid
"""
_LEFT = "EXISTS (SELECT 1 FROM begun WHERE begun.attempt > {0}.attempt AND begun.step <= {0}.step)"
_CHOSEN = f"""
CREATE TEMP TABLE begun AS SELECT attempt, MIN(step) AS step FROM grouped WHERE split = 'train' GROUP BY attempt;
DELETE FROM grouped WHERE {_LEFT.format("grouped")};
CREATE TEMP TABLE chosen (split, step, attempt, PRIMARY KEY (split, step)) WITHOUT ROWID;
INSERT INTO chosen SELECT split, step, MAX(attempt) FROM grouped GROUP BY split, step;
DELETE FROM grouped WHERE attempt <>
    (SELECT c.attempt FROM chosen AS c WHERE c.split = grouped.split AND c.step = grouped.step);
CREATE INDEX temp.grouped_by_uid ON grouped (uid, attempt)
"""

Group = tuple[int, str]
"""Number of the start of training, and uid."""


@dataclass(frozen=True)
class Axis:
    """The steps of a curve."""

    points: tuple[tuple[int, int], ...]
    """First and last step of each point."""
    place: Mapping[int, int]
    """Index of its point, by step."""


class Reading:
    """See the module; `opened` makes it.

    Attributes:
        db: The open ledger. The temporary table ``grouped`` has a row per GRPO group that counts, ``chosen`` the start
            of training that counts by split and step, ``begun`` the first training step of each start.
    """

    def __init__(self, db: sqlite3.Connection, place: Path) -> None:
        self.db = db
        self.dice = random.Random(SEED)
        db.execute("PRAGMA temp_store=MEMORY")
        db.execute("PRAGMA cache_size=-65536")
        if db.in_transaction:
            db.commit()
        db.isolation_level = None
        db.execute("BEGIN")
        db.execute(_GROUPED)
        for statement in _CHOSEN.split(";"):
            db.execute(statement)
        self.rows = int(db.execute("SELECT TOTAL(n) FROM grouped").fetchone()[0])
        self.groups: int = db.execute("SELECT COUNT(*) FROM grouped").fetchone()[0]
        self.chosen = {(split, step): attempt for split, step, attempt in db.execute("SELECT * FROM chosen")}
        if not self.rows:
            raise LedgerError(f"the ledger at {place} has no scored response yet; come back after the first step")
        self.axes = {split: _axis([s for of, s in self.chosen if of == split]) for split in ("train", "val")}

    def point(self, split: str, step: int) -> int | None:
        """Index of the point of a curve that a step belongs to; None: the step has no response."""
        axis = self.axes.get(split)
        return None if axis is None else axis.place.get(step)

    def canaries(self) -> sqlite3.Cursor:
        """Digest, canary, step, outcome and value of each canary of a step that counts, in that order of steps."""
        sql = f"SELECT digest, canary, step, outcome, value FROM canaries WHERE NOT {_LEFT.format('canaries')}"
        return self.db.execute(f"{sql} ORDER BY attempt, step")

    def sampled(self) -> Iterator[sqlite3.Row]:
        """Rows with their parts and their kind of query: all, or `ROWS` of them, spread evenly over the training."""
        sql = (
            "SELECT scores.split, scores.step, attempt, uid, session, scores.query, data_source, route, outcome, "
            "value, scores.parts, response, scores.seconds, scores.reason, "
            "routes.kind AS kind, routes.covered AS covered, routes.cluster AS cluster "
            "FROM scores LEFT JOIN routes ON routes.snapshot = scores.snapshot AND routes.split = scores.split "
            "AND routes.query = scores.query WHERE scores.rowid BETWEEN ? AND ?"
        )
        first, last = self.db.execute("SELECT MIN(rowid), MAX(rowid) FROM scores").fetchone()
        stretches = [(first, last)]
        if last - first >= ROWS:
            count = ROWS // STRETCH
            wide = (last - first + 1) / count
            starts = [first + int(n * wide + self.dice.random() * (wide - STRETCH)) for n in range(count)]
            stretches = [(start, start + STRETCH - 1) for start in starts]
        for stretch in stretches:
            for row in self.db.execute(sql, stretch):
                if self.chosen.get((row["split"], row["step"])) == row["attempt"]:
                    yield row

    def some(self, found: Iterable[Group], most: int) -> list[Group]:
        """At most so many groups, drawn by their ids: those that were drawn stay so while others come."""
        return heapq.nsmallest(most, found, key=lambda group: (zlib.crc32(f"{SEED} {group}".encode()), group))

    def responses(self, groups: Iterable[Group]) -> dict[Group, list[sqlite3.Row]]:
        """All rows of some groups, in the order of the sessions."""
        sql = (
            "SELECT scores.*, routes.kind AS kind, routes.covered AS covered, routes.reason AS route_reason, "
            "routes.cluster AS cluster "
            "FROM scores LEFT JOIN routes ON routes.snapshot = scores.snapshot AND routes.split = scores.split "
            "AND routes.query = scores.query WHERE attempt = ? AND uid = ? ORDER BY session"
        )
        return {group: self.db.execute(sql, group).fetchall() for group in groups}

    def shadows(self, groups: Iterable[Group]) -> dict[Group, list[sqlite3.Row]]:
        """What tools in the shadow gave for the responses of some groups."""
        sql = "SELECT * FROM shadows WHERE attempt = ? AND uid = ? ORDER BY session, tool"
        return {group: self.db.execute(sql, group).fetchall() for group in groups}

    def texts(self, hashes: Iterable[str | None]) -> dict[str, str]:
        """Texts by their hash; those that are not there (any more) are left out."""
        wanted = [sha for sha in dict.fromkeys(hashes) if sha]
        found: dict[str, str] = {}
        for start in range(0, len(wanted), AT_ONCE):
            some = wanted[start : start + AT_ONCE]
            sql = f"SELECT sha, body FROM texts WHERE sha IN ({', '.join('?' * len(some))})"
            for sha, body in self.db.execute(sql, some):
                try:
                    found[sha] = unpack(body)
                except (zlib.error, ValueError):  # a damaged text is a text that is gone
                    continue
        return found


@contextmanager
def opened(place: Path) -> Iterator[Reading]:
    """Opens a ledger.

    Args:
        place: The file, or the folder that holds it.

    Raises:
        LedgerError: There is none, it is of another schema version or damaged, or nothing was scored yet.
    """
    with read(place) as db:
        try:
            yield Reading(db, place)
        except sqlite3.OperationalError as error:
            raise LedgerError(f"the ledger at {place}: {error}; was it written by another release?") from error


def _axis(steps: list[int]) -> Axis:
    steps = sorted(steps)
    wide = max(1, -(-len(steps) // POINTS))
    chunks = [steps[start : start + wide] for start in range(0, len(steps), wide)]
    return Axis(
        points=tuple((chunk[0], chunk[-1]) for chunk in chunks),
        place={step: number for number, chunk in enumerate(chunks) for step in chunk},
    )


# --- Values for the page ----------------------------------------------------------------------------------------------


def cut(text: Any, most: int) -> str:
    """A foreign text, shortened in its middle: how it begins and how it ends say most."""
    text = str(text)
    if len(text) <= most:
        return text
    head = most * 2 // 3
    return f"{text[:head]}\n[... {len(text) - most:,} characters left out ...]\n{text[-(most - head) :]}"


def rounded(value: float | None, digits: int = 4) -> float | None:
    """A number of few digits; None where it is none."""
    return None if value is None or value != value or abs(value) == float("inf") else round(value, digits)


def quantile(values: list[float], share: float) -> float | None:
    """A quantile of unsorted values; None if there are none."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else None


def parts_of(row: sqlite3.Row) -> list[dict[str, Any]]:
    """What each tool gave for a response."""
    try:
        return [part for part in json.loads(row["parts"]) if isinstance(part, dict)]
    except ValueError:
        return []
