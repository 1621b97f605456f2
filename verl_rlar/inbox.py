# SPDX-License-Identifier: Apache-2.0
"""The inbox of a library: what others ask of the one process that writes it.

While a training runs, its service is the library's only writer, and everybody else (`rlar tools`, `rlar exam`, agents)
hands a `Submission` in: a tool, the record of its exam, and what should become of it. The service takes it in at the
next step boundary. Where nobody writes, whoever submits becomes the writer for a moment, and takes in first what waits
(`submit`).

    inbox/<time>-<id>.json          waiting
    inbox/done/<time>-<id>.json     taken in, with what came of it

Guarantees: what was handed in is whole or not there; it is taken in once and in order, also by a writer that was killed
meanwhile, as every step of it can be done twice; the library's own rules hold (`Library.append`): no exam, no say. A
submission that cannot be read or is refused is moved aside with the reason, and keeps nobody from the next one.

Not covered: whoever can write this folder can write the library; agents cannot, they hand their tools to us.
"""

from __future__ import annotations

import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_rlar.errors import LibraryBusy, LibraryError, RlarError
from verl_rlar.library import Event, EventKind, Library, spec_from_json, write_whole

if TYPE_CHECKING:
    from verl_rlar.exam.trial import Examination

logger = logging.getLogger(__name__)

FOLDER, DONE = "inbox", "done"
WAIT_S = 2.0
"""How long `submit` waits for another writer, in seconds: who writes longer than that is a training."""


@dataclass(frozen=True, kw_only=True)
class Exam:
    """The record of an exam; see `Library.put_exam`."""

    card: Mapping[str, Any]
    text: str
    transcript: Sequence[Any]
    canaries: Sequence[Mapping[str, Any]]
    passed: bool
    why: str
    labelled: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What somebody asks of a library."""

    digest: str
    by: str
    """Who asks."""
    why: str
    """For the log."""
    spec: Mapping[str, Any] | None = None
    """JSON of a tool to be taken in; None: it is there."""
    source: str | None = None
    """Its code."""
    exam: Exam | None = None
    """The record of its exam."""
    event: EventKind | None = None
    """What should become of it; None: nothing further. After an exam that was failed, nothing further comes of it."""
    step: int | None = None
    """From which step on. None: from the next one."""
    replace: bool = False
    """Whether it takes the place of the live tool of its name."""


def record_of(examination: Examination, canaries: int) -> Exam:
    """The record of an exam that was held.

    Args:
        examination: As `verl_rlar.exam.trial.examine` gives it.
        canaries: Most canaries that are kept: ``rlar.life.canaries``.
    """
    from verl_rlar.exam.canaries import of_exam, to_json  # the exam's imports take a second

    card = examination.card
    return Exam(
        card=card.as_dict(),
        text=card.markdown(),
        transcript=examination.transcript,
        canaries=to_json(of_exam(examination.answers, canaries)),
        labelled=examination.labelled,
        passed=card.admitted,
        why="; ".join(card.reasons) or f"passed on {card.cases} cases",
    )


def apply(library: Library, asked: Submission) -> Event | None:
    """Does what is asked.

    Returns:
        The event that changed what is live; None if there is none.

    Raises:
        LibraryError: It is not allowed, or cannot be written.
        DataError: The exam's canaries are none.
    """
    if asked.spec is not None:
        spec = spec_from_json(asked.spec)
        if spec.digest != asked.digest:
            raise LibraryError(f"{spec.name}: the spec has the digest {spec.digest}, not {asked.digest}")
        if spec.kind != "rule":
            library.propose(spec, asked.source, by=asked.by, why=asked.why)
        elif spec.digest not in library.digests():
            raise LibraryError(
                f"{spec.name} ({spec.digest}) is no tool of this library, or not in this version; rules come by "
                "rlar.tools, entry points, or with the package, at the start of a training"
            )
    if asked.exam is not None:
        from verl_rlar.exam.canaries import from_json  # the exam's imports take a second

        exam = asked.exam
        from_json(exam.canaries)
        library.put_exam(
            asked.digest,
            card=exam.card,
            text=exam.text,
            transcript=exam.transcript,
            canaries=exam.canaries,
            labelled=exam.labelled,
            passed=exam.passed,
            by=asked.by,
            why=exam.why,
        )
        if not exam.passed:
            return None
    if asked.event is None:
        return None
    standing = library.standings(library.next_step if asked.step is None else asked.step).get(asked.digest)
    if standing is not None and standing.event == asked.event:
        return None  # done before
    replaces = None
    if asked.event == "live" and asked.replace:
        live = {tool.name: tool.digest for tool in library.latest().tools}
        replaces = live.get(library.spec(asked.digest).name)
    return library.append(asked.event, asked.digest, by=asked.by, why=asked.why, step=asked.step, replaces=replaces)


def submit(path: Path, asked: Submission) -> Event | Path | None:
    """Does what is asked, or hands it in where another process writes the library.

    What a training that ended left waiting is older, and is done first.

    Returns:
        See `apply`; or the file that waits in the inbox.

    Raises:
        LibraryError: See `apply`.
    """
    try:
        with Library(path, wait_s=WAIT_S) as library:
            for older, said in take_in(library):
                what = f"{older.digest}, handed in by {older.by}," if older else "a file in the inbox"
                logger.warning("library %s: %s waited, and came first: %s", path, what, said)
            return apply(library, asked)
    except LibraryBusy:
        return hand_in(path, asked)


def hand_in(path: Path, asked: Submission) -> Path:
    """Puts something into the inbox of a library; its file."""
    file = path / FOLDER / f"{time.time_ns()}-{uuid.uuid4().hex[:8]}.json"
    write_whole(file, json.dumps(asdict(asked), default=str).encode())
    return file


def waiting(path: Path) -> tuple[Path, ...]:
    """What waits in the inbox of a library, the oldest first."""
    return tuple(sorted((path / FOLDER).glob("*.json")))


def take_in(
    library: Library, ready: Callable[[Submission], bool] = lambda asked: True
) -> Iterator[tuple[Submission | None, str]]:
    """Does what waits in the inbox, the oldest first.

    Args:
        library: Where.
        ready: Whether a submission can be taken in now; if not, it goes on waiting. Raises a `RlarError` to refuse it.

    Yields:
        What was asked (None if it could not be read), and what came of it, in words.
    """
    for file in waiting(library.path):
        asked: Submission | None = None
        try:
            asked = read(file)
            if not ready(asked):
                continue
            event = apply(library, asked)
            said = f"{event.event} from step {event.step} on" if event else "taken in"
        except (RlarError, OSError, TypeError, ValueError, AttributeError, LookupError) as error:  # fields of odd types
            said = f"refused: {error}"
        _put_away(file, said)
        yield asked, said


def read(file: Path) -> Submission:
    """A submission that waits.

    Raises:
        LibraryError: It is none.
        OSError: It is not there any more.
    """
    try:
        tree = json.loads(file.read_bytes())
        exam = tree.pop("exam", None)
        return Submission(**tree, exam=Exam(**exam) if exam else None)
    except (ValueError, TypeError, AttributeError) as error:
        raise LibraryError(f"{file}: this is no submission ({type(error).__name__}: {error})") from None


def _put_away(file: Path, said: str) -> None:
    """Moves a submission that was dealt with, so that it is not taken in again."""
    done = file.parent / DONE
    with suppress(OSError):  # a full disk; it is dealt with again, to the same end
        done.mkdir(exist_ok=True)
        (done / f"{file.stem}.txt").write_text(said + "\n")
        os.replace(file, done / file.name)
