# SPDX-License-Identifier: Apache-2.0
"""`Reexaminer`: has tools examined again while a training runs, when an alarm asks for it (``re_exam``).

The exam is the one of `rlar exam`, on ``rlar.acquire.labelled``, in a process of its own, one at a time. Its record
is handed in at the library's inbox; a tool that does not pass any more is to be quarantined at the next step boundary.

Guarantees: the training never waits for it; the process has the lowest priority, ends at ``rlar.acquire.wall_s``, and
with the service; a tool waits once, however many alarms ask for it; what came of it is in the log. A tool is taken out
only by what it said of enough answers with labels that can be trusted: not for being slow beside a training, nor for
calls that fail (`life` and `watch` see to these), nor where there are too few answers or bad ones. It keeps the kinds
of query that it passed for, also where there are no answers of all of them here.

Not covered: a service that comes back has forgotten what waited. A reward model is examined on the CPU, by the back-end
`transformers`.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from verl_rlar.agents import session
from verl_rlar.config import RlarConfig, parse
from verl_rlar.errors import DataError, RlarError
from verl_rlar.exam.card import Card
from verl_rlar.exam.evidence import Evidence
from verl_rlar.exam.hall import Hall
from verl_rlar.exam.subject import Subject, find
from verl_rlar.inbox import Submission, hand_in, record_of
from verl_rlar.library import LibraryView
from verl_rlar.serving import Pool
from verl_rlar.snapshots import Snapshots
from verl_rlar.tools.reward_model import RewardModelRunner

logger = logging.getLogger(__name__)

WORK = "verl_rlar.reexam:work"
BY = "re-exam"
"""Who it is that examines, in the library's log."""
PASSED_ON = ("DOCKER_HOST", "DOCKER_TLS_VERIFY", "DOCKER_CERT_PATH", "OMP_NUM_THREADS")
"""Variables that the process gets beside those of an agent."""


class Reexaminer:
    """See the module. Use from one event loop.

    Args:
        config: The settings of the run.
        library: Folder of the library.
    """

    def __init__(self, config: RlarConfig, library: Path) -> None:
        self._config = config
        self._library = library.resolve()
        self._waiting: dict[str, str] = {}
        """By digest, why."""
        self._task: asyncio.Task[None] | None = None

    def ask(self, digest: str, why: str) -> None:
        """Has a tool examined again, when its turn comes."""
        if not self._config.acquire.labelled:
            logger.warning("%s cannot be examined again: rlar.acquire.labelled names no labelled answers", digest)
            return
        self._waiting.setdefault(digest, why)

    def begin_step(self, step: int) -> None:
        """Starts what waits, if nothing is being done."""
        if self._waiting and (self._task is None or self._task.done()):
            digest, why = next(iter(self._waiting.items()))
            del self._waiting[digest]
            logger.warning("before step %d: %s is examined again: %s", step, digest, why)
            self._task = asyncio.get_running_loop().create_task(self._examine(digest, why))

    async def settled(self) -> None:
        """Returns when nothing is being done."""
        if self._task is not None:
            await asyncio.wait([self._task])

    async def _examine(self, digest: str, why: str) -> None:
        order = {
            "config": self._config.model_dump(mode="json"),
            "library": str(self._library),
            "digest": digest,
            "why": why,
        }
        told: list[Mapping[str, Any]] = []
        try:
            ended = await asyncio.to_thread(
                session.run,
                WORK,
                order,
                folder=Path(self._config.agents.transcripts or Path(self._config.run_dir) / "agents"),
                name=f"reexam-{digest}",
                wall_s=self._config.acquire.wall_s,
                secrets=[self._config.agents.api_key_env, self._config.hub.token_env, *PASSED_ON],
                on_event=told.append,
            )
        except RlarError as error:
            logger.warning("%s was not examined again: %s", digest, error)
            return
        said = next((str(event["said"]) for event in told if event.get("event") == "examined"), None)
        logger.warning("%s: %s (transcript %s)", digest, said or f"{ended.how}: {ended.detail}", ended.transcript)


def work(order: Mapping[str, Any], emit: Callable[[dict[str, Any]], None]) -> None:
    """Examines a tool, in a process of its own, and hands in what came of it.

    Raises:
        RlarError: It could not be examined.
    """
    os.nice(19)
    config = parse(order["config"]).beside_training()
    path, digest = Path(order["library"]), order["digest"]
    emit({"event": "examined", "said": asyncio.run(_again(path, digest, order["why"], config))})


async def _again(path: Path, digest: str, why: str, config: RlarConfig) -> str:
    library = LibraryView(path)
    spec = library.spec(digest)
    before = library.card(digest)
    if spec.kind == "rule":
        subject = find(spec.target)
        if subject.spec.digest != digest:
            raise DataError(f"{spec.name}: its code is another one than when the run began")
    else:
        subject = Subject(spec=spec, source=library.source(digest) or "", model=(before or {}).get("model"))
    async with AsyncExitStack() as stack:
        models = None
        if spec.kind == "reward_model":
            pool = await stack.enter_async_context(Pool(config.serving))
            models = RewardModelRunner(pool, Snapshots(config.hub).locate)
            await pool.ensure([models.model(spec)])
        hall = await stack.enter_async_context(Hall(config, models))
        evidence = await hall.gather(config.acquire.labelled, (), spec)
        patient = {"boxed_latency_s": config.acquire.wall_s}
        examination = await hall.examine(subject, evidence, config=config.exam.model_copy(update=patient))
    card = examination.card
    if says_nothing := _says_nothing(card, evidence, config.exam.set_apart):
        return f"its exam says nothing: {says_nothing}"
    if card.admitted:
        verdict = f"passed again on {card.cases} cases"
    else:
        verdict = f"does not pass any more: {'; '.join(card.reasons)}"
    narrower = card.admitted and not set(card.unproven) <= set((before or {}).get("unproven") or ())
    if examination.spec.digest == digest and not narrower:  # calibrated anew, the record is another tool's
        record = record_of(examination, config.life.canaries)
        hand_in(path, Submission(digest=digest, by=BY, why=why, exam=record))
    if not card.admitted:
        hand_in(path, Submission(digest=digest, by=BY, why=f"{why}; {verdict}", event="quarantined"))
    return verdict


def _says_nothing(card: Card, evidence: Evidence, set_apart: float) -> str:
    """Why a failed exam is none of the tool's fault, in words; empty: it is, or it was not failed."""
    rows = evidence.rows - evidence.other_rows
    if card.admitted:
        return ""
    calls = card.figures["all"]
    if card.stopped or calls["errors"].missed or calls["timeouts"].value:
        return card.stopped or f"{calls['errors'].value or 0.0:.1%} of its calls failed"
    if len(evidence.set_apart) > set_apart * rows:
        return f"the gold of {len(evidence.set_apart)} of {rows} labelled rows is not to be trusted"
    tried = [name for name in card.figures if name != "all" and name not in card.unproven]
    return "" if tried else "there are too few labelled answers of its kinds"
