# SPDX-License-Identifier: Apache-2.0
"""What the agents of a run, and its rubrics, spend on their LLM: one account for all of them, with its caps and pace.

Agents are processes of their own, as are the workers in which rubrics judge (`verl_rlar.tools.rubric`); what they share
is a SQLite file in the folder of the agents' transcripts (`folder_of`). Each try of a call takes from it first, with
what it is expected to read, and settles when its usage is known.

Guarantees: no call is begun that would exceed a cap of the task's money, or of the run's calls, tokens, money or
seconds (`verl_rlar.config.AgentsConfig`), as far as is known then; a call waits while the last minute is full (`rpm`,
`tpm`), across processes; what was settled adds up to what the endpoint said, to the token. A try that never came to its
end counts with what it was expected to read, also if its process was killed; one that was refused and made again does
not.

Not covered: how long an answer will be, before it is there: a cap can be exceeded by one answer. Folders without
working locks (NFS). What a power cut does to the account.
"""

from __future__ import annotations

import math
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_rlar.config import AgentsConfig, RlarConfig
from verl_rlar.errors import AgentError

FILE = "spending.sqlite"
MINUTE_S = 60.0
_TOLD = (("tokens_read", "tokens_written"), ("tokens", "truncated"))
"""What the details of a rubric hold, and those of a reward model."""
LOOK_S = 0.5
"""Longest pause between two looks at the account, in seconds."""
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS calls (id INTEGER PRIMARY KEY, task TEXT NOT NULL, at REAL NOT NULL, "
    "read INTEGER NOT NULL, written INTEGER NOT NULL, dollars REAL NOT NULL, seconds REAL NOT NULL)",
    "CREATE INDEX IF NOT EXISTS calls_at ON calls (at)",
)
_SUMMED = (
    "CREATE TABLE sums (task TEXT PRIMARY KEY, calls INTEGER NOT NULL, read INTEGER NOT NULL, "
    "written INTEGER NOT NULL, dollars REAL NOT NULL, seconds REAL NOT NULL)",
    "INSERT INTO sums SELECT task, COUNT(*), SUM(read), SUM(written), SUM(dollars), SUM(seconds) FROM calls "
    "GROUP BY task",
    "CREATE TRIGGER call_begun AFTER INSERT ON calls BEGIN "
    "INSERT INTO sums VALUES (new.task, 1, new.read, new.written, new.dollars, new.seconds) "
    "ON CONFLICT (task) DO UPDATE SET calls = calls + 1, read = read + new.read, written = written + new.written, "
    "dollars = dollars + new.dollars, seconds = seconds + new.seconds; END",
    "CREATE TRIGGER call_told AFTER UPDATE ON calls BEGIN "
    "UPDATE sums SET read = read + new.read - old.read, written = written + new.written - old.written, "
    "dollars = dollars + new.dollars - old.dollars, seconds = seconds + new.seconds - old.seconds "
    "WHERE task = new.task; END",
)
"""What an account has beside that: its sums, as the calls of a long training are too many to be added up for each."""


def folder_of(config: RlarConfig) -> Path:
    """Where the agents of a run keep their transcripts, and their account."""
    return Path(config.agents.transcripts or Path(config.run_dir) / "agents")


class OutOfTokens(AgentError):
    """The next call would exceed a budget; it was not made."""


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What was spent."""

    calls: int
    """Tries of calls."""
    read: int
    written: int
    dollars: float
    seconds: float
    """Time waited for answers."""

    @property
    def tokens(self) -> int:
        return self.read + self.written


def cost_of(details: Mapping[str, Any]) -> tuple[float, float] | None:
    """Tokens that a tool's call took (read and written), and dollars, by the details of its score; None: they do not
    say. Rubrics tell ``tokens_read``, ``tokens_written`` and ``dollars``, reward models ``tokens`` and ``truncated``; a
    rule's own ``tokens`` are no cost, and neither is what is no finite number."""
    told = next((names for names in _TOLD if all(name in details for name in names)), None)
    if told is None:
        return None
    tokens = sum(float(details[name]) for name in told if name.startswith("tokens"))
    dollars = float(details.get("dollars", 0.0))
    return (tokens, dollars) if math.isfinite(tokens) and math.isfinite(dollars) else None


def account_of(folder: Path) -> dict[str, Spent]:
    """What was spent by task, of an account that may be in use; nothing is written.

    Args:
        folder: Where it is kept; without one there, nothing was spent.

    Raises:
        AgentError: It cannot be read.
    """
    path = folder / FILE
    if not path.is_file():
        return {}
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=30)) as account:
            asked = f"SELECT task, {_SUMS} FROM sums GROUP BY task"
            if not _summed(account):  # of an earlier release, and nobody has used it since
                asked = "SELECT task, COUNT(*), TOTAL(read), TOTAL(written), TOTAL(dollars), TOTAL(seconds) FROM calls "
                asked += "GROUP BY task"
            return {task: _spent(sums) for task, *sums in account.execute(asked)}
    except sqlite3.Error as error:
        raise AgentError(f"the account of the agents, {path}, cannot be read: {error}") from None


_SUMS = "TOTAL(calls), TOTAL(read), TOTAL(written), TOTAL(dollars), TOTAL(seconds)"


def _summed(account: sqlite3.Connection) -> bool:
    return account.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'sums'").fetchone() is not None


def _spent(sums: Sequence[Any]) -> Spent:
    calls, read, written, dollars, seconds = sums
    return Spent(calls=int(calls), read=int(read), written=int(written), dollars=dollars, seconds=seconds)


class Purse:
    """The account, as one agent sees it.

    Args:
        folder: Where it is kept; made if missing.
        task: What the agent works on; its money is counted by this name, over all its tries.
        config: Caps, prices, pace.
        clock: Seconds since the epoch.
        sleep: Waits.
    """

    def __init__(
        self,
        folder: Path,
        task: str,
        config: AgentsConfig,
        *,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._path, self._task, self._config = folder / FILE, task, config
        self._clock, self._sleep = clock, sleep
        self._open: int | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self._account() as account:
                for statement in (*_SCHEMA, *(() if _summed(account) else _SUMMED)):
                    account.execute(statement)
        except OSError as error:
            raise AgentError(f"{self._path} cannot be written: {error.strerror or error}") from None

    def take(self, expected: int) -> None:
        """Begins a try of a call, when the pace lets it.

        Args:
            expected: Tokens that it will read.

        Raises:
            OutOfTokens: A cap would be exceeded.
            AgentError: The account cannot be read or written.
        """
        while wait := self.try_take(expected):
            self._sleep(wait)

    def try_take(self, expected: int) -> float:
        """Begins a try of a call, if the pace lets it now.

        Returns:
            0: it is begun. Else in how many seconds to ask again.

        Raises:
            OutOfTokens, AgentError: See `take`.
        """
        self._end(refused=True)
        with self._account() as account:
            self._check(account, expected)
            wait = self._wait(account, expected)
            if not wait:
                row = (self._task, self._clock(), expected, 0, self._dollars(expected, 0), 0.0)
                columns = "task, at, read, written, dollars, seconds"
                cursor = account.execute(f"INSERT INTO calls ({columns}) VALUES (?, ?, ?, ?, ?, ?)", row)
                self._open = cursor.lastrowid
        return min(wait, LOOK_S)

    def settle(self, read: int, written: int) -> None:
        """Says what the last try took."""
        with self._account() as account:
            account.execute(
                "UPDATE calls SET read = ?, written = ?, dollars = ? WHERE id = ?",
                (read, written, self._dollars(read, written), self._open),
            )
        self._end()

    def lose(self) -> None:
        """Says that the last try never came to its end: it counts with what it was expected to read."""
        self._end()

    def spent(self, task: str | None = None) -> Spent:
        """What was spent on a task; None: on all of the run."""
        with self._account() as account:
            return self._spent(account, task)

    def _end(self, *, refused: bool = False) -> None:
        """Keeps the time that the last try took; one that is made again was refused, and no token was used."""
        if self._open is not None:
            more = ", read = 0, dollars = 0" if refused else ""
            with self._account() as account:
                account.execute(f"UPDATE calls SET seconds = ? - at{more} WHERE id = ?", (self._clock(), self._open))
            self._open = None

    @contextmanager
    def _account(self) -> Iterator[sqlite3.Connection]:
        """The account, nobody else's meanwhile."""
        try:
            connection = sqlite3.connect(self._path, timeout=30, isolation_level=None)
            try:
                connection.execute(
                    "PRAGMA synchronous = OFF"
                )  # a rubric's calls are many; a kill loses nothing so, either
                connection.execute("BEGIN IMMEDIATE")
                yield connection
                connection.execute("COMMIT")
            finally:
                connection.close()
        except sqlite3.Error as error:
            raise AgentError(f"the account of the agents, {self._path}, cannot be used: {error}") from None

    def _spent(self, account: sqlite3.Connection, task: str | None) -> Spent:
        where, values = ("WHERE task = ?", (task,)) if task is not None else ("", ())
        return _spent(account.execute(f"SELECT {_SUMS} FROM sums {where}", values).fetchone())

    def _dollars(self, read: int, written: int) -> float:
        return (read * self._config.dollars_read + written * self._config.dollars_written) / 1e6

    def _check(self, account: sqlite3.Connection, expected: int) -> None:
        config, money = self._config, self._dollars(expected, 0)
        limits = (config.dollars, config.run_dollars, config.run_calls, config.run_tokens, config.run_s)
        if all(limit is None for limit in limits):
            return  # no need to sum up what a long training has spent
        run, task = self._spent(account, None), self._spent(account, self._task)
        caps = (
            ("dollars", task.dollars, money, config.dollars),
            ("run_dollars", run.dollars, money, config.run_dollars),
            ("run_calls", run.calls, 1, config.run_calls),
            ("run_tokens", run.tokens, expected, config.run_tokens),
            ("run_s", run.seconds, 0, config.run_s),
        )
        for name, had, more, cap in caps:
            if cap is not None and (had + more > cap or had > cap or (not more and had >= cap)):
                raise OutOfTokens(
                    f"{had:,.6g} are spent and the next call takes some {more:,.6g} more; rlar.agents.{name} is "
                    f"{cap:,.6g}: raise it to go on"
                )

    def _wait(self, account: sqlite3.Connection, expected: int) -> float:
        """Seconds until the pace lets a call begin, if nothing else happens; 0: now."""
        now, config = self._clock(), self._config
        if config.rpm is None and config.tpm is None:
            return 0.0
        query = "SELECT at, read + written FROM calls WHERE at > ? AND at <= ? ORDER BY at DESC"
        recent = account.execute(query, (now - MINUTE_S, now)).fetchall()  # the clock may have been set back since
        tokens = expected
        for place, (at, took) in enumerate(recent, start=1):
            tokens += took
            full = config.rpm is not None and place >= config.rpm
            if full or (config.tpm is not None and tokens > config.tpm):
                return max(at + MINUTE_S - now, 0.001)
        return 0.0
