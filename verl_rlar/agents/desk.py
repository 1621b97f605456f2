# SPDX-License-Identifier: Apache-2.0
"""What an agent that looks for models may do: search, look, read, propose. No more; and no LLM is in here.

Every answer is a text for an LLM. What is done is told as events: ``search``, ``look``, ``refused``, ``proposed``.

Guarantees: only what the gate passes can be proposed, at the commit that it judged, with a number in [0, 1], a reason
and quotes that stand in the model's card, config, tags or name; everything else is turned down with the reason. What is
from the hub is quoted (`verl_rlar.agents.prompting`); a card that the gate refuses is not shown at all. Nothing is
downloaded but headers and texts; faults of the hub are answers, not errors.

Not covered: whether a proposal is good.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from verl_rlar.agents.session import Emit
from verl_rlar.errors import HubError
from verl_rlar.gate import Report, check
from verl_rlar.hub import Hub, Search
from verl_rlar.quoting import Quoter, plain
from verl_rlar.repository import GIB, HubModel

ROWS = 20
"""Most models of one search that are shown."""
TAGS = 12
WHY_CHARS, QUOTE_CHARS, LEAST_QUOTE, MOST_QUOTES = 600, 300, 2, 6


class Desk:
    """See the module.

    Args:
        hub: The hub; its settings say what may pass.
        quoter: Quotes what is from it.
        most: Most proposals.
        emit: Takes the events.
    """

    def __init__(self, hub: Hub, quoter: Quoter, most: int, emit: Emit) -> None:
        self._hub, self._quoter, self._most, self._emit = hub, quoter, most, emit
        self._looked: dict[str, tuple[HubModel, Report]] = {}
        self._proposed: set[str] = set()

    def search(self, words: str | None, tag: str | None, pipeline: str | None, sort: str | None) -> str:
        """Models on the hub that meet all conditions."""
        search = Search(
            words=plain(words or "", 100, line=True),
            tags=(plain(tag, 100, line=True),) if tag else (),
            pipeline=plain(pipeline or "", 100, line=True),
            sort=sort if sort in ("likes", "created_at", "last_modified") else "downloads",
        )
        if not (search.words or search.tags or search.pipeline):
            return "Turned down: name words, a tag or a pipeline."

        def find() -> str:
            models = self._hub.search([search]).models
            self._emit({"event": "search", "found": [facts.repo for facts in models]})
            rows = [
                {
                    "repo": facts.repo,
                    "downloads": facts.downloads,
                    "likes": facts.likes,
                    "modified": facts.modified[:10],
                    "licence": facts.licence,
                    "languages": facts.languages[:TAGS],
                    "tags": facts.tags[:TAGS],
                }
                for facts in models[:ROWS]
            ]
            head = f"{len(models)} models" + (f", the first {ROWS} of them" if len(models) > ROWS else "")
            lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
            return f"{head}:\n{self._quoter.quote(lines, 'what the hub lists')}" if rows else "0 models."

        return self._try(find)

    def info(self, repo: str) -> str:
        """What a model is, and what the gate says."""

        def tell() -> str:
            model, report = self._look(repo)
            facts = model.facts
            known = {
                "repo": model.repo,
                "commit": model.commit,
                "architecture": report.architecture,
                "scores by": report.scoring,
                "outputs": report.labels,
                "parameters": report.parameters,
                "type": report.dtype,
                "weights in GiB": round(report.weight_bytes / GIB, 4),
                "licence": report.licence,
                "languages": facts.languages[:TAGS],
                "tags": facts.tags[: 4 * TAGS],
                "downloads in the last month": facts.downloads,
                "likes": facts.likes,
                "created": facts.created[:10],
                "modified": facts.modified[:10],
                "files": [file.path for file in model.files[: 4 * TAGS]],
            }
            return f"{self._verdict(report)}\n{self._quoter.quote(known, 'what it is')}"

        return self._try(tell)

    def card(self, repo: str) -> str:
        """A model's card."""

        def read() -> str:
            model, report = self._look(repo)
            if not next(found for found in report.checks if found.name == "card").ok:
                return f"The gate refuses its card, so that is not shown.\n{self._verdict(report)}"
            return self._quoter.quote(model.card or "(there is none)", f"the card of {model.repo}")

        return self._try(read)

    def config(self, repo: str) -> str:
        """A model's config."""

        def read() -> str:
            model, _ = self._look(repo)
            return self._quoter.quote(_config(model), f"the config of {model.repo}")

        return self._try(read)

    def propose(self, repo: str, fit: float, why: str, quotes: Sequence[Any]) -> str:
        """Proposes a model, or changes what was said about it."""

        def take() -> str:
            model, report = self._look(repo)
            if not report.ok:
                return f"Turned down.\n{self._verdict(report)}"
            if fault := fault_of(model, fit, why, quotes):
                return f"Turned down, {model.repo}: {fault}."
            if model.repo not in self._proposed and len(self._proposed) == self._most:
                return f"Turned down, {model.repo}: {self._most} are proposed, the most that are wanted."
            self._proposed.add(model.repo)
            self._emit(
                {
                    "event": "proposed",
                    "repo": model.repo,
                    "commit": model.commit,
                    "fit": float(fit),
                    "why": plain(why, WHY_CHARS, line=True),
                    "quotes": list(quotes),
                }
            )
            return f"Taken: {model.repo} with {float(fit):.2f}. {len(self._proposed)} of at most {self._most}."

        return self._try(take)

    def _look(self, repo: str) -> tuple[HubModel, Report]:
        """A model, looked into once."""
        if repo not in self._looked:
            model = self._hub.inspect(repo)
            report = check(model, self._hub.config)
            self._looked[repo] = model, report
            self._emit({"event": "look", "repo": model.repo})
            if not report.ok:
                self._refused(model.repo, model.commit, report.reasons)
        return self._looked[repo]

    def _refused(self, repo: str, commit: str, reasons: Sequence[str]) -> None:
        self._emit({"event": "refused", "repo": repo, "commit": commit, "reasons": list(reasons)})

    def _verdict(self, report: Report) -> str:
        if report.ok:
            return f"{report.repo}: the gate lets it pass."
        why = self._quoter.quote(list(report.reasons), "why")
        return f"{report.repo}: the gate refuses it, so it cannot be proposed.\n{why}"

    def _try(self, work: Callable[[], str]) -> str:
        try:
            return work()
        except HubError as error:
            return f"The hub did not answer with that.\n{self._quoter.quote(str(error), 'its fault')}"


def fault_of(model: HubModel, fit: Any, why: Any, quotes: Any) -> str:
    """What is wrong with a proposal of a model that passed the gate; empty if nothing is."""
    if isinstance(fit, bool) or not isinstance(fit, (int, float)) or not (math.isfinite(fit) and 0 <= fit <= 1):
        return "`fit` is no number from 0 to 1"
    if not isinstance(why, str) or not plain(why, WHY_CHARS, line=True):
        return "`why` is empty"
    if not isinstance(quotes, (list, tuple)) or not 1 <= len(quotes) <= MOST_QUOTES:
        return f"`quotes` are no list of 1 to {MOST_QUOTES} texts"
    for quote in quotes:
        if not isinstance(quote, str) or not LEAST_QUOTE <= len(quote) <= QUOTE_CHARS:
            return f"a quote is no text of {LEAST_QUOTE} to {QUOTE_CHARS} characters"
        if not source_of(quote, model):
            return f"{plain(quote, 80, line=True)!r} stands in none of its card, config, tags and name"
    return ""


def source_of(quote: str, model: HubModel) -> str | None:
    """Where a quote stands; None: nowhere. Spaces and line ends count as one space."""
    wanted = _joined(quote)
    if not wanted:
        return None
    if wanted in model.facts.tags:  # which may stand in the card's head, too
        return "tags"
    texts = {"card": model.card, "tags": "\n".join(model.facts.tags), "name": model.repo, "config": _config(model)}
    return next((source for source, text in texts.items() if wanted in _joined(text)), None)


def _config(model: HubModel) -> str:
    return json.dumps(model.config, ensure_ascii=False, indent=1) if model.config is not None else "(there is none)"


def _joined(text: str) -> str:
    return plain(text, len(text), line=True)
