# SPDX-License-Identifier: Apache-2.0
"""The library: a folder with every tool that a run ever knew, and a log of what became of each.

    library.json              the version of this layout
    events.jsonl              one line per event: proposed, examined, rejected, shadow, live, retired, quarantined,
                              rolled_back; from which step on it counts, by whom and why; with a checksum
    tools/<digest>/           spec.json, source.py; after an exam card.json, card.md, transcript.json, canaries.json,
                              labelled.json
    inbox/                    what others ask of the writer, see `verl_rlar.inbox`
    clusters.jsonl            clusters of alike prompts, see `verl_rlar.clusters`
    advice.jsonl              what an LLM advised on routes, see `verl_rlar.advice`
    competence/               what was known of each snapshot's tools, see `verl_rlar.competence`
    steps.json                the newest step whose tools were handed out, and to which start of training
    lock                      names the process that writes

Which tools are live at a step is a fold of the events that count by then (`LibraryView.snapshot`). `Library` is the
writer (in training: the service), one at a time; `Library.read` opens the same folder for reading, in any number of
processes, on any node that sees the folder.

Guarantees:

- A step that was handed out stays as it is (I1): an event that changes what is live counts from a later step, or is
  refused; that holds for a run that goes back to an earlier checkpoint, too. The one exception are tools that need no
  exam (`Library.begin`): the code of a built-in rule that changed between two starts of a training is not there any
  more, so the new one counts from the first step of the new start, and the log says so.
- A digest is one content (I3): what stands under it is compared, not replaced. A verifier or reward model cannot become
  live or shadow without a card, nor after a failed exam; a rule cannot that `Library.begin` did not bring (I6).
- One name, one live tool; two tools that answered an exam alike are not live together (`same_behaviour`).
- Nothing that was acknowledged is lost (I8): files are written aside, synced and renamed before the event that names
  them; an event is one write and a sync. What a killed writer left of a line is ignored by readers and moved aside by
  the next writer. A disk that is full is an error, and the log stays whole. A damaged line is an error, never skipped.

Not covered: the lock is ``flock``; on a network file system without it, two writers on two nodes could meet. Steps are
those of one run: a library that is copied to another run keeps its tools, but its events count by the old run's steps.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from functools import cache
from math import inf
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args

from verl_rlar.calibration import Calibration
from verl_rlar.config import RlarConfig
from verl_rlar.errors import LibraryBusy, LibraryError
from verl_rlar.types import Kind, Scope, Snapshot, ToolSpec, content_hash

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
FOLDER_NAME = "library"
"""Name of the folder inside a run's folder."""
SCHEMA_FILE, EVENTS_FILE, STEPS_FILE, LOCK_FILE, TOOLS = "library.json", "events.jsonl", "steps.json", "lock", "tools"
SPEC, SOURCE, CARD, CARD_TEXT, TRANSCRIPT = "spec.json", "source.py", "card.json", "card.md", "transcript.json"
CANARIES, LABELLED = "canaries.json", "labelled.json"

EventKind = Literal["proposed", "examined", "rejected", "shadow", "live", "retired", "quarantined", "rolled_back"]
CHANGES = frozenset({"shadow", "live", "retired", "quarantined", "rolled_back"})
"""Events that change which tools score. The others are notes."""
OUT = CHANGES - {"shadow", "live"}
"""Changes that take a tool out."""
REGISTRARS = frozenset({"builtin", "user"})
"""Who makes tools live without an exam: this package, and the user's own code (`rlar.tools`, entry points)."""


def library_path(config: RlarConfig) -> Path:
    """Where a run with these settings has its library."""
    return Path(config.library.path) if config.library.path else Path(config.run_dir) / FOLDER_NAME


@cache
def builtin_snapshot(*, boxes: bool = True) -> Snapshot:
    """The built-in rules, in the order in which a router prefers them.

    Args:
        boxes: Whether there is a sandbox; without one, the tools that need it are left out.
    """
    from verl_rlar.tools.rules import BUILTIN  # seconds of imports, which a reader of a library does not need

    return Snapshot(tools=tuple(rule.spec for rule in BUILTIN if boxes or not rule.spec.boxed))


# --- What stands in the folder ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Event:
    """A line of the log."""

    seq: int
    """Number of the line, from 1."""
    time: str
    """When it was written, UTC, ISO 8601."""
    event: EventKind
    step: int
    """From which step on it counts; for notes, the step at which a change could have counted."""
    tool: str
    """Name of the tool."""
    digest: str
    by: str
    """``builtin`` or ``user`` for tools without an exam, else who wrote the event."""
    why: str
    """For a person. Foreign text may be quoted in it."""
    replaces: str | None = None
    """`live`: digest of the tool of this name whose place it takes. None: the name was free."""
    restores: str | None = None
    """`rolled_back`: digest that becomes live again. None: the name is free now."""
    card: str | None = None
    """`examined` (the exam was passed) and `rejected` (it was not): SHA-256 of ``card.json``."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What a tool is at a step."""

    tool: str
    digest: str
    event: EventKind
    """Its latest event; `retired` also for a tool that was replaced."""
    step: int
    """Since when."""
    by: str
    """Who says so."""
    why: str


@dataclass(frozen=True, kw_only=True)
class Trusted:
    """A tool that needs no exam."""

    spec: ToolSpec
    source: str
    """The text whose hash is `spec.source_sha256`."""
    by: Literal["builtin", "user"]


def spec_to_json(spec: ToolSpec) -> dict[str, Any]:
    """A spec as JSON-like values, for ``spec.json``."""
    scope = {"kinds": sorted(kind.value for kind in spec.scope.kinds), "needs_reference": spec.scope.needs_reference}
    learned = spec.calibration.as_dict() if spec.calibration else None
    values = asdict(spec) | {"scope": scope, "misses": list(spec.misses), "calibration": learned}
    wraps = values.pop("wraps")
    return values | ({"wraps": list(wraps)} if wraps else {})  # releases that did not have it read the others


def spec_from_json(values: Mapping[str, Any]) -> ToolSpec:
    """The inverse of `spec_to_json`.

    Raises:
        LibraryError: They are no spec, or one with fields of a newer release.
    """
    try:
        scope = values["scope"]
        kinds = frozenset(Kind(kind) for kind in scope["kinds"])
        changed = {
            "scope": Scope(kinds=kinds, needs_reference=scope["needs_reference"]),
            "misses": tuple(values["misses"]),
            "wraps": tuple(values.get("wraps", ())),
            "calibration": Calibration.from_dict(values["calibration"]) if values.get("calibration") else None,
        }
        return ToolSpec(**(dict(values) | changed))
    except (KeyError, TypeError, ValueError) as error:
        known = {f.name for f in fields(ToolSpec)}
        odd = sorted(set(values) - known) if isinstance(values, Mapping) else []
        hint = f"; fields of another release: {', '.join(odd)}" if odd else ""
        raise LibraryError(f"this is no spec of a tool ({type(error).__name__}: {error}){hint}") from None


def same_behaviour(card_a: Mapping[str, Any] | None, card_b: Mapping[str, Any] | None) -> bool:
    """Whether two tools gave the same answers in the same exam: both cards have a ``fingerprint``, and it is equal."""
    mark = card_a.get("fingerprint") if card_a else None
    return bool(mark) and card_b is not None and mark == card_b.get("fingerprint")


def encode(event: Event) -> bytes:
    """An event as a line of the log."""
    body = {name: value for name, value in asdict(event).items() if value is not None}
    return (json.dumps(body | {"sum": content_hash(body)[:16]}) + "\n").encode()


def decode(line: bytes, seq: int) -> Event:
    """The inverse of `encode`.

    Raises:
        LibraryError: The line is damaged, or is not number `seq`.
    """
    try:
        body = json.loads(line)
        checksum = body.pop("sum")
        event = Event(**body)
        whole = content_hash(body)[:16] == checksum and event.event in get_args(EventKind)
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole or event.seq != seq:
        raise LibraryError(
            f"line {seq} is damaged (it is no event, or its checksum or number is wrong). Lines before it are whole; "
            "restore the file from a copy, or cut it before this line and lose what came later"
        )
    return event


# --- The fold ---------------------------------------------------------------------------------------------------------


@dataclass
class _State:
    """What is live and in the shadow after some events."""

    live: dict[str, str] = field(default_factory=dict)
    """Digest by name."""
    shadow: dict[str, str] = field(default_factory=dict)
    """Name by digest."""
    last: dict[str, Event] = field(default_factory=dict)
    """The latest event that changed what is live, by name."""
    standing: dict[str, Standing] = field(default_factory=dict)
    """By digest."""
    place: dict[str, tuple[bool, int]] = field(default_factory=dict)
    """Where a name stands among the live tools: built-in ones first, then by its first event."""

    def order(self) -> list[str]:
        """Digests of the live tools."""
        return [self.live[name] for name in sorted(self.live, key=lambda name: self.place[name])]


def fold(events: Iterable[Event], step: float) -> _State:
    """What the events that count at a step make live. Never fails: whether an event is allowed is decided before.

    Events apply in the order of their steps, then of their lines (`_in_order`). An event of a registrar takes the place
    of the registrars' earlier lines on the same name that count from the same step or later: these are of a start of
    training whose code is not there any more.
    """
    state = _State()
    events = list(events)
    for event in events:
        if event.event not in CHANGES:
            state.standing[event.digest] = _standing(event, event.digest, event.event)
    newest: dict[str, int] = {}  # by name, the number of the latest line of a registrar among those applied so far
    for event in _in_order(events, step):
        if event.event in ("live", "rolled_back"):
            state.place.setdefault(event.tool, (event.by != "builtin", event.seq))
        if event.by in REGISTRARS:
            if newest.get(event.tool, 0) > event.seq:
                continue
            newest[event.tool] = event.seq
        _apply(state, event)
    return state


def _in_order(events: Iterable[Event], step: float) -> Iterator[Event]:
    """The changes that count at a step, as they apply. What takes a tool out takes the place of what was planned for it
    before, from a later step on."""
    counting = [event for event in events if event.event in CHANGES and event.step <= step]
    taken_out: dict[str, int] = {}  # by digest, the number of the latest such line so far
    for event in sorted(counting, key=lambda event: (event.step, event.seq)):
        if taken_out.get(event.digest, 0) > event.seq:
            continue
        if event.event in OUT and event.by not in REGISTRARS:
            taken_out[event.digest] = event.seq
        yield event


def _standing(event: Event, digest: str, as_event: EventKind) -> Standing:
    return Standing(tool=event.tool, digest=digest, event=as_event, step=event.step, by=event.by, why=event.why)


def _apply(state: _State, event: Event) -> None:
    def stands(digest: str, as_event: EventKind) -> None:
        state.standing[digest] = _standing(event, digest, as_event)

    def make_live(digest: str) -> None:
        before = state.live.get(event.tool)
        if before not in (None, digest):
            assert before is not None
            stands(before, "retired")
        state.live[event.tool] = digest
        stands(digest, "live")

    live = state.live.get(event.tool) == event.digest
    if event.event == "shadow":
        state.shadow[event.digest] = event.tool
        stands(event.digest, "shadow")
    elif event.event == "live":
        state.shadow.pop(event.digest, None)
        make_live(event.digest)
        state.last[event.tool] = event
    elif live or event.digest in state.shadow:
        state.shadow.pop(event.digest, None)
        stands(event.digest, event.event)
        if live:
            del state.live[event.tool]
            state.last[event.tool] = event
            if event.event == "rolled_back" and event.restores:
                make_live(event.restores)


# --- Reading ----------------------------------------------------------------------------------------------------------


class LibraryView:
    """A library, open for reading; see the module. Use from one thread at a time. Nothing stays open between calls.

    Args:
        path: The folder.

    Raises:
        LibraryError: There is no library, it is of another version, or its log is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._events: list[Event] = []
        self._offset = 0
        self._specs: dict[str, ToolSpec] = {}
        self._check_schema()
        self.refresh()

    @property
    def events(self) -> Sequence[Event]:
        """All events that were read so far, in the order of the log."""
        return tuple(self._events)

    def refresh(self) -> int:
        """Reads what was appended since the last time; a torn last line is left for the next time.

        Returns:
            Number of events in all.

        Raises:
            LibraryError: The log cannot be read, or a line is damaged.
        """
        with _explained(self.path):
            try:
                found = self._read_from(self._offset, len(self._events))
            except LibraryError:
                if not self._offset:
                    raise
                found = None  # a writer took back a line that it could not sync, and wrote another one
            if found is None:
                self._events, self._offset = [], 0
                found = self._read_from(0, 0) or ([], 0)
        events, size = found
        self._events += events
        self._offset += size
        return len(self._events)

    def _read_from(self, offset: int, known: int) -> tuple[list[Event], int] | None:
        """Events behind an offset, and the size of their lines; None if the file is shorter than that."""
        file = self.path / EVENTS_FILE
        if not file.exists():
            return [], 0
        with open(file, "rb") as log:
            if os.fstat(log.fileno()).st_size < offset:
                return None
            log.seek(offset)
            data = log.read()
        whole = data[: data.rfind(b"\n") + 1]
        try:
            return [decode(line, known + n) for n, line in enumerate(whole.split(b"\n")[:-1], 1)], len(whole)
        except LibraryError as error:
            raise LibraryError(f"{file}: {error}") from None

    @property
    def handed_out(self) -> int:
        """The newest step whose tools a training got; -1 if there is none yet."""
        return int(self._steps().get("handed_out", -1))

    def snapshot(self, step: int, *, seq: int | None = None) -> Snapshot:
        """The tools that are live at a step. For a step that was not handed out yet, as things stand.

        Args:
            step: verl's ``global_steps``.
            seq: Look at the first so many events of the log only. None: at all.

        Raises:
            LibraryError: The spec of one of them is damaged.
        """
        state = fold(self._events[:seq], step)
        return Snapshot(
            tools=tuple(self.spec(digest) for digest in state.order()),
            shadows=tuple(self.spec(digest) for digest in state.shadow),
        )

    def latest(self) -> Snapshot:
        """The tools that are live when all events count. Hands nothing out."""
        return Snapshot(tools=tuple(self.spec(digest) for digest in fold(self._events, inf).order()))

    def standings(self, step: int | None = None) -> dict[str, Standing]:
        """What each tool is, by digest, in the order of the log.

        Args:
            step: At which step; None: when all events count.
        """
        return fold(self._events, inf if step is None else step).standing

    def digests(self) -> tuple[str, ...]:
        """All digests that an event names, in the order of the log."""
        return tuple(dict.fromkeys(event.digest for event in self._events))

    def find(self, name: str) -> str:
        """The digest that a person means by a name, a digest or the beginning of one.

        Of several tools of one name it is the live one, else the one in the shadow, else the latest.

        Raises:
            LibraryError: None, or several, are meant.
        """
        standings = self.standings()
        found = [digest for digest in standings if digest == name or (len(name) >= 4 and digest.startswith(name))]
        named = [standing for standing in standings.values() if standing.tool == name]
        if len(found) == 1 and not named:
            return found[0]
        for wanted in ("live", "shadow"):
            if of_state := [standing.digest for standing in named if standing.event == wanted]:
                return of_state[-1]
        if named:
            latest = {event.digest: event.seq for event in self._events}
            return max((standing.digest for standing in named), key=lambda digest: latest[digest])
        if found:
            raise LibraryError(f"{name!r} is the beginning of {len(found)} digests: {', '.join(found)}")
        names = sorted({standing.tool for standing in standings.values()})
        raise LibraryError(f"{self.path}: there is no tool {name!r}; there are: {', '.join(names) or 'none'}")

    def spec(self, digest: str) -> ToolSpec:
        """The spec of a digest.

        Raises:
            LibraryError: It is not there, or is not what its digest says.
        """
        spec = self._specs.get(digest)
        if spec is None:
            values = self._json(digest, SPEC)
            if values is None:
                raise LibraryError(f"{self._file(digest, SPEC)} is missing; the library is not whole")
            try:
                spec = spec_from_json(values)
            except LibraryError as error:
                raise LibraryError(f"{self._file(digest, SPEC)}: {error}") from None
            if spec.digest != digest:
                raise LibraryError(
                    f"{self._file(digest, SPEC)}: its content has the digest {spec.digest}; it was changed by hand, or "
                    "by a release whose specs have other fields"
                )
            self._specs[digest] = spec
        return spec

    def source(self, digest: str) -> str | None:
        """The code of a tool; None if there is none here (a reward model).

        Raises:
            LibraryError: It is not the code that the spec names.
        """
        data = self._bytes(digest, SOURCE)
        if data is None:
            return None
        if hashlib.sha256(data).hexdigest() != self.spec(digest).source_sha256:
            raise LibraryError(f"{self._file(digest, SOURCE)} is not the code that its spec names: it was changed")
        return data.decode()

    def source_of(self, source_sha256: str) -> str | None:
        """The code with a hash (`ToolSpec.source_sha256`); None if no tool here has it."""
        for digest in self.digests():
            if self.spec(digest).source_sha256 == source_sha256:
                return self.source(digest)
        return None

    def card(self, digest: str) -> dict[str, Any] | None:
        """The record of a tool's latest exam; None if it had none."""
        return self._json(digest, CARD)

    def card_text(self, digest: str) -> str | None:
        """The same for a person."""
        data = self._bytes(digest, CARD_TEXT)
        return None if data is None else data.decode()

    def canaries(self, digest: str) -> list[dict[str, Any]]:
        """Answers of a tool's latest exam whose score is known, JSON-like; empty if there are none."""
        return list(self._json(digest, CANARIES) or ())

    def labelled(self, digest: str) -> list[dict[str, Any]]:
        """Labelled answers of a tool's latest exam with its values, see `verl_rlar.exam.trial.Examination.labelled`."""
        return list(self._json(digest, LABELLED) or ())

    def passed(self, digest: str) -> bool:
        """Whether a tool passed its latest exam, and the card of that exam is here."""
        exams = [event for event in self._events if event.digest == digest and event.card is not None]
        data = self._bytes(digest, CARD)
        if not exams or data is None or exams[-1].event != "examined":
            return False
        return exams[-1].card == hashlib.sha256(data).hexdigest()

    def may_return(self, digest: str) -> bool:
        """Whether a tool may have a say again: it needs no exam, or passed its latest one."""
        return self.spec(digest).kind == "rule" or self.passed(digest)

    def predecessor(self, digest: str, step: int) -> str | None:
        """The version that a live tool took the place of, if a rollback at a step may bring it back: it is still
        retired (not in the shadow, say), and did not fail an exam meanwhile."""
        became = [one for one in self._events if (one.digest, one.event) == (digest, "live") and one.step <= step]
        before = became[-1].replaces if became else None
        if before is None or self.standings(step)[before].event != "retired" or not self.may_return(before):
            return None
        return before

    def _file(self, digest: str, name: str) -> Path:
        return self.path / TOOLS / digest / name

    def _bytes(self, digest: str, name: str) -> bytes | None:
        with _explained(self.path), suppress(FileNotFoundError):
            return self._file(digest, name).read_bytes()
        return None

    def _json(self, digest: str, name: str) -> Any:
        data = self._bytes(digest, name)
        try:
            return None if data is None else json.loads(data)
        except ValueError as error:
            raise LibraryError(f"{self._file(digest, name)} is damaged: {error}") from None

    def _steps(self) -> dict[str, Any]:
        with _explained(self.path), suppress(FileNotFoundError):
            return dict(json.loads((self.path / STEPS_FILE).read_bytes()))
        return {}

    def _check_schema(self) -> None:
        version = _schema(self.path)
        if version is None:
            raise LibraryError(
                f"there is no library at {self.path}; give a run's folder (`rlar` inside its checkpoint folder) or the "
                f"folder `{FOLDER_NAME}` in it"
            )
        if version < SCHEMA_VERSION:
            raise LibraryError(
                f"{self.path} has the layout of version {version}, this release reads {SCHEMA_VERSION}; whoever opens "
                "it for writing (the next training on it, or `rlar tools add`) brings it up"
            )


def _schema(path: Path) -> int | None:
    """Version of a library's layout; None if there is none.

    Raises:
        LibraryError: It is newer than this release, or cannot be read.
    """
    file = path / SCHEMA_FILE
    with _explained(path):
        try:
            version = json.loads(file.read_bytes())["schema"]
        except FileNotFoundError:
            return None
        except (KeyError, TypeError):
            raise LibraryError(f"{file} names no schema version: this is no library, or a damaged one") from None
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise LibraryError(
            f"{path} has the layout of version {version}, this release of verl_rlar knows up to {SCHEMA_VERSION}; use "
            "the release that wrote it, or a newer one"
        )
    return version


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        hint = "the disk, or a quota, is full" if full else "is the folder readable and writable for you?"
        raise LibraryError(f"library {path}: {error}; {hint}") from error
    except ValueError as error:
        raise LibraryError(f"library {path}: a file is damaged: {error}") from error


# --- Writing ----------------------------------------------------------------------------------------------------------


class Library(LibraryView):
    """A library, open for writing; see the module. Use as a context manager, from one thread at a time.

    Args:
        path: The folder; made, with the folders above, if missing.
        wait_s: How long to wait for another writer to go, in seconds.

    Raises:
        LibraryError: Somebody else writes; it is of a newer version, damaged, or cannot be written.
    """

    def __init__(self, path: Path, *, wait_s: float = 0.0) -> None:
        path = Path(path)
        self._log = -1
        with _explained(path):
            path.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(path, wait_s)
        try:
            self._open(path)
        except BaseException:
            self.close()
            raise

    def _open(self, path: Path) -> None:
        version = _schema(path)
        with _explained(path):
            if version is None:
                (path / TOOLS).mkdir(exist_ok=True)
                write_whole(path / SCHEMA_FILE, _pretty({"schema": SCHEMA_VERSION, "made_by": "verl_rlar"}))
            for older in range(SCHEMA_VERSION if version is None else version, SCHEMA_VERSION):
                MIGRATIONS[older](path)
            self._log = os.open(path / EVENTS_FILE, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            _cut_torn_line(path, self._log)
            _sync_folder(path)
        super().__init__(path)
        steps = self._steps()
        self._handed_out = int(steps.get("handed_out", -1))
        self._start = str(steps.get("start", ""))
        self._pending: tuple[tuple[Trusted, ...], str] | None = None

    @staticmethod
    def read(path: Path) -> LibraryView:
        """Opens a library for reading; see `LibraryView`."""
        return LibraryView(path)

    def __enter__(self) -> Library:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Lets the next writer in."""
        for name in ("_log", "_lock"):
            if (descriptor := getattr(self, name)) >= 0:
                os.close(descriptor)
            setattr(self, name, -1)

    @property
    def handed_out(self) -> int:
        """See `LibraryView.handed_out`."""
        return self._handed_out

    @property
    def next_step(self) -> int:
        """The earliest step from which a change can count."""
        return self._handed_out + 1

    def begin(self, tools: Iterable[Trusted], start: str) -> None:
        """Makes the tools that need no exam live, as they are now.

        In a library that handed out nothing yet they count from step 0. Else what changed since counts from the first
        step that this start of training asks for. A tool that a person retired stays so; one that was quarantined stays
        so until its code changes. Within one start nothing changes: a service that was killed and comes back goes on
        with the tools of before.

        Args:
            tools: All of them, in their order; what is not among them any more is retired.
            start: Names this start of training.

        Raises:
            LibraryError: It cannot be written.
        """
        tools = tuple(tools)
        for tool in tools:
            self._put_tool(tool.spec, tool.source)
        self._pending = (tools, start) if start != self._start else None
        if self._handed_out < 0:
            self._register(0)

    def snapshot(self, step: int, *, seq: int | None = None) -> Snapshot:
        """See `LibraryView.snapshot`. With the call the step counts as handed out."""
        if seq is None:
            if self._pending is not None:
                if self._handed_out >= 0:
                    self._register(step)
                self._start, self._pending = self._pending[1], None
                self._hand_out(max(step, self._handed_out))
            elif step > self._handed_out:
                self._hand_out(step)
        return super().snapshot(step, seq=seq)

    def propose(self, spec: ToolSpec, source: str | None, *, by: str, why: str) -> bool:
        """Takes a tool in; its exam comes later.

        Returns:
            Whether it is new here.

        Raises:
            LibraryError: The source is not the one that the spec names, a verifier is not for a box, or it cannot be
                written.
        """
        if spec.kind == "verifier" and (not spec.boxed or source is None):
            raise LibraryError(f"{spec.name} ({spec.digest}): a verifier has a source, and runs in a box (`boxed`)")
        new = spec.digest not in self.digests()
        self._put_tool(spec, source)
        if new:
            self.append("proposed", spec.digest, by=by, why=why)
        return new

    def put_exam(
        self,
        digest: str,
        *,
        card: Mapping[str, Any],
        text: str,
        transcript: Any,
        passed: bool,
        by: str,
        why: str,
        canaries: Sequence[Mapping[str, Any]] = (),
        labelled: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Keeps an exam's record, and says how it ended: `examined` or `rejected`.

        The card of an earlier exam stays, as ``card-<hash>.json``.

        Args:
            digest: The tool.
            card: The card, JSON-like.
            text: The same for a person.
            transcript: What was asked and answered, JSON-like.
            passed: Whether the tool was admitted.
            by: Who says so.
            why: For a person.
            canaries: Answers whose score is known, JSON-like.
            labelled: Labelled answers with the tool's values, JSON-like.

        Raises:
            LibraryError: The tool is unknown, or it cannot be written.
        """
        self._known(digest)
        data = _pretty(card)
        before = self._bytes(digest, CARD)
        with _explained(self.path):
            if before is not None and before != data:
                mark = hashlib.sha256(before).hexdigest()[:8]
                for name in (CARD, CARD_TEXT, TRANSCRIPT):
                    old = self._bytes(digest, name)
                    stem, _, ending = name.partition(".")
                    if old is not None:
                        write_whole(self._file(digest, f"{stem}-{mark}.{ending}"), old)
            write_whole(self._file(digest, TRANSCRIPT), _pretty(transcript))
            write_whole(self._file(digest, CANARIES), _pretty(list(canaries)))
            write_whole(self._file(digest, LABELLED), _pretty(list(labelled)))
            write_whole(self._file(digest, CARD_TEXT), text.encode("utf-8", "backslashreplace"))
            write_whole(self._file(digest, CARD), data)
        ended: EventKind = "examined" if passed else "rejected"
        self.append(ended, digest, by=by, why=why, card=hashlib.sha256(data).hexdigest())

    def append(
        self,
        event: EventKind,
        digest: str,
        *,
        by: str,
        why: str,
        step: int | None = None,
        replaces: str | None = None,
        restores: str | None = None,
        card: str | None = None,
    ) -> Event:
        """Appends an event. When this returns, it is on the disk.

        Args:
            event: What happened.
            digest: To which tool; `propose` took it in.
            by: Who says so.
            why: For a person.
            step: From which step on it counts. None: the next one that is not handed out yet.
            replaces: `live`: the digest of the live tool of the same name that goes.
            restores: `rolled_back`: the digest that comes back.
            card: See `Event.card`.

        Raises:
            LibraryError: It is not allowed; the message says what stands against it. Or it cannot be written.
        """
        tool = self._known(digest).name
        line = Event(
            seq=len(self._events) + 1,
            time=datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            event=event,
            step=self.next_step if step is None else step,
            tool=tool,
            digest=digest,
            by=by,
            why=why,
            replaces=replaces,
            restores=restores,
            card=card,
        )
        if by in REGISTRARS:
            raise LibraryError(f"{tool}: {by!r} is for tools that need no exam; say who you are")
        if event in CHANGES:
            self._check(line)
        self._write_events([line])
        return line

    def _check(self, event: Event) -> None:
        """Raises `LibraryError` if a change is not allowed."""
        what = f"{event.tool} ({event.digest}) cannot become {event.event} at step {event.step}"
        if event.step <= self._handed_out:
            raise LibraryError(
                f"{what}: the tools of step {self._handed_out} are handed out already, and a step never changes; the "
                f"earliest is step {self.next_step}"
            )
        later = [old for old in _in_order(self._events, inf) if old.tool == event.tool and old.step > event.step]
        if event.event in OUT:
            later = [old for old in later if old.restores == event.digest]
        if later:
            raise LibraryError(f"{what}: event {later[0].seq} counts from step {later[0].step} on; choose a later step")
        state = fold(self._events, event.step)
        live = state.live.get(event.tool)
        if event.event in ("live", "shadow"):
            if live == event.digest:
                raise LibraryError(f"{what}: it is live")
            if self.spec(event.digest).kind == "rule":
                if not any(old.by in REGISTRARS and old.digest == event.digest for old in self._events):
                    raise LibraryError(
                        f"{what}: a rule runs outside a box, so only this package and the user can name one "
                        "(rlar.tools, or an entry point)"
                    )
            elif not self.passed(event.digest):
                reason = "it was rejected" if self.card(event.digest) else "it has no card"
                raise LibraryError(f"{what}: {reason}. A tool needs an exam before it scores: `rlar exam`")
            card = self.card(event.digest)
            for other in [*state.live.values(), *state.shadow]:
                if other not in (event.digest, event.replaces) and same_behaviour(card, self.card(other)):
                    raise LibraryError(
                        f"{what}: in the exam it gave the same answers as {self.spec(other).name} ({other}), which is "
                        f"{state.standing[other].event}; retire that one first, or drop this one"
                    )
        elif live != event.digest and event.digest not in state.shadow:
            raise LibraryError(f"{what}: it is neither live nor in the shadow then")
        if event.event == "live" and event.replaces != live:
            if live is None:
                raise LibraryError(f"{what}: {event.replaces} is not live under that name, so it cannot be replaced")
            raise LibraryError(
                f"{what}: another tool is live under that name ({live}); say that this one replaces it, or choose "
                "another name"
            )
        if event.restores is not None:
            if not self.may_return(event.restores):
                raise LibraryError(f"{what}: {event.restores} cannot come back, it did not pass its latest exam")
            before = state.standing.get(event.restores)
            if live != event.digest or before is None or (before.tool, before.event) != (event.tool, "retired"):
                raise LibraryError(f"{what}: {event.restores} cannot come back in its place, it was not live there")

    def _register(self, step: int) -> None:
        """Writes what `begin` found changed, to count from a step on."""
        if self._pending is None:
            return
        tools, _ = self._pending
        state = fold(self._events, step)
        wanted = {tool.spec.name: tool for tool in tools}
        lines: list[Event] = []

        def add(event: EventKind, spec: ToolSpec, by: str, why: str, replaces: str | None = None) -> None:
            now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
            line = Event(
                seq=len(self._events) + len(lines) + 1,
                time=now,
                event=event,
                step=step,
                tool=spec.name,
                digest=spec.digest,
                by=by,
                why=why,
                replaces=replaces,
            )
            lines.append(line)

        by_registrars = [event for event in self._events if event.by in REGISTRARS]
        registered = {event.digest for event in by_registrars}
        later = {event.tool for event in by_registrars if event.step > step}
        for name, event in {event.tool: event for event in by_registrars}.items():
            live = state.live.get(name)
            if name not in wanted and (live in registered or name in later):
                where = (
                    "this release, or there is no sandbox" if event.by == "builtin" else "rlar.tools and entry points"
                )
                add("retired", self.spec(live or event.digest), event.by, f"not in {where} any more")
        for name, tool in wanted.items():
            live, last = state.live.get(name), state.last.get(name)
            if last is not None and last.by not in REGISTRARS:  # somebody decided about it meanwhile
                if live is not None and live not in registered:
                    continue
                if live is None and (last.event == "retired" or last.digest == tool.spec.digest):
                    continue
            if live != tool.spec.digest or name in later:
                why = "at the start" if live is None else "its code or description changed"
                add("live", tool.spec, tool.by, why, live if live != tool.spec.digest else None)
        if lines:
            self._write_events(lines)

    def _hand_out(self, step: int) -> None:
        self._handed_out = step
        try:
            write_whole(self.path / STEPS_FILE, _pretty({"handed_out": step, "start": self._start}))
        except OSError as error:  # as long as this process lives it knows; the next step writes it again
            logger.warning("library %s: that step %d was handed out could not be noted: %s", self.path, step, error)

    def _known(self, digest: str) -> ToolSpec:
        if not self._file(digest, SPEC).exists():
            raise LibraryError(f"{self.path}: no tool has the digest {digest!r}; propose it first")
        return self.spec(digest)

    def _put_tool(self, spec: ToolSpec, source: str | None) -> None:
        if source is not None:
            data = source.encode()
            if hashlib.sha256(data).hexdigest() != spec.source_sha256:
                raise LibraryError(f"{spec.name} ({spec.digest}): the source is not the one that the spec names")
            self._put(spec.digest, SOURCE, data)
        if self._file(spec.digest, SPEC).exists():
            self.spec(spec.digest)  # which has this digest, or raises
        else:
            self._put(spec.digest, SPEC, _pretty(spec_to_json(spec)))

    def _put(self, digest: str, name: str, data: bytes) -> None:
        """Writes a file that never changes."""
        there = self._bytes(digest, name)
        if there is None:
            with _explained(self.path):
                write_whole(self._file(digest, name), data)
        elif there != data:
            raise LibraryError(
                f"{self._file(digest, name)} has another content than what is to stand there; a digest is one content, "
                "so this file was changed"
            )

    def _write_events(self, events: Sequence[Event]) -> None:
        """Appends lines: all of them, or none."""
        if self._log < 0:
            raise LibraryError(f"library {self.path}: it is closed")
        data = b"".join(encode(event) for event in events)
        with _explained(self.path):
            try:
                if os.write(self._log, data) < len(data):
                    raise OSError(errno.ENOSPC, "only a part of an event could be written")
                os.fsync(self._log)
            except OSError:
                try:
                    os.ftruncate(self._log, self._offset)
                    os.fsync(self._log)
                except OSError:
                    self.close()  # what is on the disk is not known; the next writer will see
                raise
        self._events += events
        self._offset += len(data)


def _lock(path: Path, wait_s: float) -> int:
    """Takes a library's lock; it is free again when this process ends, however it ends."""
    descriptor = os.open(path / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    end = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() < end:
                time.sleep(0.05)
                continue
            holder = os.pread(descriptor, 1000, 0).decode(errors="replace").strip() or "a process without a name"
            os.close(descriptor)
            raise LibraryBusy(
                f"library {path}: it is being written by {holder}. There is one writer at a time: in training that is "
                "the service; wait until it ends, or read"
            ) from None
        except OSError:
            os.close(descriptor)
            raise
    since = datetime.now(timezone.utc).isoformat(timespec="seconds")
    with suppress(OSError):  # a full disk; the name is for messages only
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode(), 0)
    return descriptor


def _cut_torn_line(path: Path, log: int) -> None:
    """Moves what a killed writer left of a line into a file of its own."""
    size = os.fstat(log).st_size
    data = os.pread(log, size, 0)
    whole = data.rfind(b"\n") + 1
    if whole < size:
        torn = data[whole:]
        write_whole(path / f"torn-{whole}-{hashlib.sha256(torn).hexdigest()[:8]}", torn)
        os.ftruncate(log, whole)
        os.fsync(log)


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file so that it is there whole or not at all."""
    if not path.parent.is_dir():
        path.parent.mkdir(parents=True)
        _sync_folder(path.parent.parent)
    aside = path.with_name(f".{path.name}.tmp")
    with open(aside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _pretty(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, default=str) + "\n").encode()


# --- Older layouts ----------------------------------------------------------------------------------------------------


def _from_version_0(path: Path) -> None:
    """Version 0: ``specs/<name>.json`` (a spec, and its ``source`` where it has one), ``log.jsonl`` without digests.

    May be killed at any moment and run again: the new files are made first, the version is raised last.
    """
    digests = {}
    for file in sorted((path / "specs").glob("*.json")):
        values = json.loads(file.read_bytes())
        source = values.pop("source", None)
        spec = spec_from_json(values)
        digests[spec.name] = spec.digest
        if source is not None:
            write_whole(path / TOOLS / spec.digest / SOURCE, source.encode())
        write_whole(path / TOOLS / spec.digest / SPEC, _pretty(spec_to_json(spec)))
    lines = []
    data = (path / "log.jsonl").read_bytes() if (path / "log.jsonl").exists() else b""
    for seq, line in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), 1):
        old = json.loads(line)
        event = Event(
            seq=seq,
            time=datetime.fromtimestamp(old["time"], timezone.utc).isoformat(timespec="milliseconds"),
            event=old["event"],
            step=old["step"],
            tool=old["tool"],
            digest=digests[old["tool"]],
            by=old["by"],
            why=old["why"],
        )
        lines.append(encode(event))
    (path / TOOLS).mkdir(exist_ok=True)
    write_whole(path / EVENTS_FILE, b"".join(lines))
    write_whole(path / SCHEMA_FILE, _pretty({"schema": 1, "made_by": "verl_rlar", "migrated_from": 0}))
    kept = path / "version-0"
    kept.mkdir(exist_ok=True)
    for name in ("specs", "log.jsonl"):
        if (path / name).exists():
            os.replace(path / name, kept / name)


MIGRATIONS: Mapping[int, Callable[[Path], None]] = {0: _from_version_0}
"""By version, what brings a library of it to the next one."""
