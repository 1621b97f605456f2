# SPDX-License-Identifier: Apache-2.0
"""A scripted coder: it hands in verifiers that lie in `drafts/`, a bad one first, through the real exam and inbox.

It starts where the run's watch asks for a tool (`new_cluster`), or where a tenth of the latest responses is to a kind
of query without a tool. One exam is held beside each step, of one draft; what passed is handed in for the shadow and
goes its way like any other tool. No LLM is asked: a run can be repeated, and costs no tokens.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from verl_rlar.acquisition import submission_of
from verl_rlar.config import RlarConfig
from verl_rlar.exam.hall import Hall
from verl_rlar.exam.subject import verifier
from verl_rlar.inbox import hand_in
from verl_rlar.ledger import Row
from verl_rlar.types import Kind

DRAFTS = Path(__file__).resolve().parent / "drafts"
SCRIPT: Mapping[Kind, tuple[str, ...]] = {
    Kind.UNIT_TESTS: ("code_parses", "code_runs"),
    Kind.TRANSLATION: ("translation_length", "translation_ngrams"),
    Kind.OPEN: ("demands_counts", "demands_all"),
}
"""By kind of query, what the coder comes up with, in this order, until one passes its exam."""
WINDOW, SHARE = 64, 0.1


@dataclass(frozen=True, kw_only=True)
class Try:
    """A draft at its exam."""

    step: int
    kind: Kind
    draft: str
    admitted: bool
    why: str
    asked: bool
    """Whether an alarm asked for it first."""


class ScriptedCoder:
    """See the module; a `verl_rlar.service.Seeker`. Use from one event loop.

    Args:
        config: The settings of the run.
        library: Folder of its library.
        labelled: By kind of query, the file of labelled answers that the exam is made from.
    """

    def __init__(self, config: RlarConfig, library: Path, labelled: Mapping[Kind, Path]) -> None:
        self._config, self._library, self._labelled = config, library, labelled
        self._seen: deque[Kind | None] = deque(maxlen=WINDOW)
        self._wanted: dict[Kind, bool] = {}
        """Kinds that a tool is sought for, and whether an alarm asked for it."""
        self._left: dict[Kind, list[str]] = {kind: list(drafts) for kind, drafts in SCRIPT.items()}
        self._task: asyncio.Task[None] | None = None
        self.tries: list[Try] = []

    def saw(self, row: Row) -> None:
        self._seen.append(None if row.route.covered else row.route.kind)

    def ask(self, kind: Kind, cluster: str, why: str) -> None:
        self._wanted.setdefault(kind, True)

    def begin_step(self, step: int, *_: object) -> None:
        for kind, count in Counter(self._seen).items():
            if kind is not None and count >= SHARE * WINDOW:
                self._wanted.setdefault(kind, False)
        due: Sequence[Kind] = [kind for kind in self._wanted if self._left.get(kind)]
        if due and (self._task is None or self._task.done()):
            self._task = asyncio.get_running_loop().create_task(self._write(step, due[0]))

    async def settled(self) -> None:
        """Returns when no exam is being held."""
        if self._task is not None:
            await self._task

    async def _write(self, step: int, kind: Kind) -> None:
        draft = self._left[kind].pop(0)
        subject = verifier((DRAFTS / f"{draft}.py").read_text(), name=draft, kinds=[kind], origin="scripted")
        async with Hall(self._config) as hall:
            evidence = await hall.gather([str(self._labelled[kind])], (), subject.spec, screened=False)
            examination = await hall.examine(subject, evidence)
        card = examination.card
        if card.admitted:
            self._left[kind] = []
        hand_in(self._library, submission_of(subject, examination, self._config, event="shadow", why=kind.value))
        self.tries.append(
            Try(
                step=step,
                kind=kind,
                draft=draft,
                admitted=card.admitted,
                why="; ".join(card.reasons) or f"passed on {card.cases} cases",
                asked=self._wanted[kind],
            )
        )
