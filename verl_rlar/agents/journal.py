# SPDX-License-Identifier: Apache-2.0
"""The answers that an LLM gave for one task, kept so that a run that was stopped can go on where it was.

A journal is a file of JSON lines: a head that says which order it is for and holds the seed of its quotes, then each
answer with the hash of what was asked. An agent that always does the same with the same answers goes on by starting
from the beginning: what was asked before costs nothing.

Guarantees: an answer is on the disk before it is used; a last line that was cut by a kill is left out; an answer is
given only to exactly what it was given to, in its place; where something else is asked, the rest of the journal is
dropped, on the disk, too; a journal of another order is not used.

Not covered: two runs of one order at the same time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smolagents import ChatMessage, MessageRole

from verl_rlar.agents.llm import Llm
from verl_rlar.agents.session import Stop
from verl_rlar.errors import AgentError
from verl_rlar.library import write_whole


def seed_of(path: Path, order: str, new: str) -> str:
    """The seed of a journal that is there; otherwise a journal is begun with a new one.

    Args:
        path: Its file.
        order: Which order it is for.
        new: Seed for a new one.

    Raises:
        AgentError: It cannot be read or written.
    """
    try:
        for line in _lines(path):
            if line.get("order") == order:
                return str(line["seed"])
            break
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"order": order, "seed": new}) + "\n", encoding="utf-8")
    except OSError as error:
        raise AgentError(f"{path} cannot be kept: {error.strerror or error}") from None
    return new


def _lines(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


class Talk:
    """Asks an LLM, or the journal.

    Args:
        llm: The LLM.
        most: Most answers, old and new.
        journal: The file; None: none is kept.
    """

    def __init__(self, llm: Llm, most: int, journal: Path | None = None) -> None:
        self._llm, self._most, self._path = llm, most, journal
        self.asked = 0
        self.recalled = 0
        """Answers, and those of them that came from the journal."""
        self.cut = False
        """Whether the last answer was cut off at its most tokens."""
        self._head, *self._kept = _lines(journal) if journal else [{}]
        self._write()  # without a line that was cut

    def ask(self, messages: Sequence[tuple[str, str]]) -> str:
        """What the LLM says to some messages, each of a role and a text.

        Raises:
            Stop: All calls are made.
            OutOfTokens: A budget is used up.
            EndpointError: There is no answer, or none of an LLM.
        """
        if self.asked >= self._most:
            raise Stop("steps", f"all {self._most} calls of the LLM are made (rlar.agents.steps)")
        key = hashlib.sha256(json.dumps(messages).encode()).hexdigest()
        if self.asked < len(self._kept) and self._kept[self.asked].get("key") == key:
            line = self._kept[self.asked]
            self._llm.tokens += line["tokens"]
            self.recalled += 1
        else:
            before = self._llm.tokens
            said = self._llm.generate([_message(role, text) for role, text in messages])
            line = {
                "key": key,
                "answer": str(said.content or ""),
                "tokens": self._llm.tokens - before,
                "cut": self._llm.cut,
            }
            dropped = self.asked < len(self._kept)
            self._kept[self.asked :] = [line]
            if dropped:
                self._write()
            elif self._path:
                with open(self._path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
        self.asked += 1
        self.cut = line.get("cut", False)
        return str(line["answer"])

    def _write(self) -> None:
        if self._path:
            lines = [json.dumps(line) + "\n" for line in (self._head, *self._kept)]
            write_whole(self._path, "".join(lines).encode())


def _message(role: str, text: str) -> ChatMessage:
    return ChatMessage(role=MessageRole(role), content=[{"type": "text", "text": text}])
