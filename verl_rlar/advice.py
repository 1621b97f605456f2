# SPDX-License-Identifier: Apache-2.0
"""What an LLM has advised on routes, and from which step on it counts.

A `Ruling` is advice for a cluster of alike prompts, or for a single prompt: which tool, or a readable name, or neither
(it was asked, and evidence decides). The router takes one up only where evidence is thin, see `verl_rlar.router`.

    library/advice.jsonl        one line for each ruling, in the order of the steps from which they count

Guarantees: what counts at a step is what was written for it and the steps before, so a run that is resumed sees what
the first run saw (I1); `Advice.on` puts the identity of these rulings into the snapshot, and by that into whatever is
kept by snapshot: routes, caches, ledger (I2). A line that a killed writer left unfinished is cut off; whoever wrote it
had not told anybody of it. Without rulings a snapshot is what it was.

Not covered: whether the advice is good. Who asks for it, and checks it, is `verl_rlar.adviser`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from verl_rlar.errors import LibraryError
from verl_rlar.types import Snapshot, content_hash

FILE_NAME = "advice.jsonl"


@dataclass(frozen=True, kw_only=True)
class Ruling:
    """A piece of advice. A later one for the same cluster, or the same prompt, takes its place."""

    cluster: str
    """Id of the cluster, see `verl_rlar.clusters`."""
    query: str = ""
    """Key of the single prompt that it is for; empty: for the cluster."""
    tool: str = ""
    """Digest of the tool that is advised; empty: none, evidence decides."""
    why: str = ""
    """In the LLM's words, on one line. Foreign text."""
    by: str
    """The LLM."""
    question: str
    """Identity of what was asked: 16 hex digits."""


class Advice:
    """All rulings of a run. Use from one thread at a time.

    Args:
        path: The file; None: nothing is kept.
        writes: Whether the file is written; if not, what is added is known to this process only.

    Raises:
        LibraryError: The file cannot be read, or is damaged.
    """

    def __init__(self, path: Path | None = None, *, writes: bool = True) -> None:
        self._path = path if writes else None
        self._rulings: list[Ruling] = []
        self._steps: list[int] = []
        self._ids: dict[str, int] = {"": 0}
        """By the identity of what the first rulings advise: how many they are."""
        self._id_at: list[tuple[int, str]] = []
        """Steps at which rulings were added, in rising order, and the identity from then on."""
        if path is not None:
            self._restore(path)

    @property
    def rulings(self) -> tuple[Ruling, ...]:
        """All, in the order of their steps."""
        return tuple(self._rulings)

    @property
    def steps(self) -> tuple[int, ...]:
        """By ruling, the step from which on it counts."""
        return tuple(self._steps)

    def on(self, snapshot: Snapshot, step: int | None = None) -> Snapshot:
        """The snapshot of a step, with the identity of the rulings that count there; None: of all there are."""
        known = next((id for since, id in reversed(self._id_at) if step is None or since <= step), "")
        return replace(snapshot, advice=known) if known else snapshot

    def of(self, id: str) -> tuple[Ruling, ...]:
        """The rulings of an identity.

        Raises:
            LibraryError: It is none of this file's.
        """
        if id not in self._ids:
            raise LibraryError(f"advice.jsonl: advice {id!r} is not in it; restore the file from a copy")
        return tuple(self._rulings[: self._ids[id]])

    def add(self, rulings: Sequence[Ruling], step: int) -> None:
        """Keeps rulings, which count from a step on; that step is not handed out yet.

        Raises:
            LibraryError: They cannot be written; then they do not count. Or earlier ones count from a later step on.
        """
        if not rulings:
            return
        if self._steps and step < self._steps[-1]:
            raise LibraryError(f"advice for step {step}: there is advice for step {self._steps[-1]} already")
        if self._path is not None:
            self._append(self._path, rulings, step)
        self._take(rulings, step)

    def _take(self, rulings: Iterable[Ruling], step: int) -> None:
        for ruling in rulings:
            self._rulings.append(ruling)
            self._steps.append(step)
        counts = {one.query or one.cluster: one for one in self._rulings}
        advised = {place: asdict(one) for place, one in counts.items() if one.tool}
        id = content_hash(advised)[:16] if advised else ""
        self._ids.setdefault(id, len(self._rulings))
        if self._id_at and self._id_at[-1][0] == step:
            self._id_at.pop()
        self._id_at.append((step, id))

    @staticmethod
    def _append(path: Path, rulings: Sequence[Ruling], step: int) -> None:
        lines = "".join(json.dumps({"step": step, **asdict(one)}) + "\n" for one in rulings)
        try:
            with path.open("ab") as file:
                whole = file.tell()
                try:
                    file.write(lines.encode())
                    file.flush()
                    os.fsync(file.fileno())
                except OSError:
                    os.truncate(path, whole)
                    raise
        except OSError as error:
            raise LibraryError(f"{path} cannot be written: {error}") from error

    def _restore(self, path: Path) -> None:
        try:
            data = path.read_bytes() if path.exists() else b""
            whole = data[: data.rfind(b"\n") + 1]
            if whole != data and self._path is not None:
                os.truncate(path, len(whole))
        except OSError as error:
            raise LibraryError(f"{path}: {error}") from error
        found: list[tuple[int, Ruling]] = []
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                body: dict[str, Any] = json.loads(line)
                step = int(body.pop("step"))
                found.append((step, Ruling(**{name: str(value) for name, value in body.items()})))
                if len(found) > 1 and step < found[-2][0]:
                    raise ValueError("an earlier step")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise LibraryError(
                    f"{path}, line {number} is damaged ({type(error).__name__}); restore the file from a copy"
                ) from None
        for step in dict.fromkeys(step for step, _ in found):
            self._take([ruling for at, ruling in found if at == step], step)
