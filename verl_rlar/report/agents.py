# SPDX-License-Identifier: Apache-2.0
"""What agents did during a run, what they and rubrics spent, and what an LLM advised on routes.

Guarantees: nothing is written; an account, a transcript or a file of advice that is missing or damaged is left out.

Not covered: what else stands in a transcript (each call, each draft): it is named, to be read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from verl_rlar.advice import FILE_NAME as ADVICE_FILE
from verl_rlar.advice import Advice, Ruling
from verl_rlar.errors import AgentError, LibraryError
from verl_rlar.library import LibraryView
from verl_rlar.purse import account_of
from verl_rlar.report.reading import cut, rounded

RUNS = 60
"""Most agents' runs that are listed, the latest."""
TASKS = 60
"""Most tasks of the account that are listed, the dearest."""
RULINGS = 200
"""Most pieces of advice, the latest."""
TAIL = 200_000
"""Bytes at the end of a transcript that are read."""
NAMED = {"rubrics": "rubrics", "advice": "advice on routes"}
"""Tasks of the account that are no single agent's."""
_NAME = re.compile(r"(?P<name>[\w-]+)-(?P<at>\d{8}T\d{6})-[0-9a-f]{6}")


def spending(folder: Path) -> list[dict[str, Any]]:
    """By task, the dearest first: who, calls of the LLM, tokens, dollars, seconds waited."""
    try:
        account = account_of(folder)
    except AgentError:
        return []
    dearest = sorted(account.items(), key=lambda item: (-item[1].tokens, item[0]))[:TASKS]
    return [
        {"who": NAMED.get(task) or ("scout" if task.startswith("scout-") else "coder"), "task": cut(task, 60)}
        | {"calls": spent.calls, "read": spent.read, "written": spent.written}
        | {"dollars": rounded(spent.dollars, 6), "seconds": rounded(spent.seconds, 2)}
        for task, spent in dearest
    ]


def runs(folder: Path) -> list[dict[str, Any]]:
    """What each agent did, the latest first: its name, when it began, how it ended, what came of it, its transcript."""
    named = [(match, path) for path in folder.glob("*.jsonl") if (match := _NAME.fullmatch(path.stem))]
    named.sort(key=lambda one: (one[0]["at"], one[1].name), reverse=True)
    return [_run(match, path) for match, path in named[:RUNS]]


def _run(match: re.Match[str], path: Path) -> dict[str, Any]:
    events = _last_events(path)
    end: Mapping[str, Any] = next((one for one in reversed(events) if one.get("event") == "end"), {})
    came: Mapping[str, Any] = next((one for one in reversed(events) if one.get("event") == "acquired"), {})
    tool = came.get("tool")
    return {
        "agent": cut(match["name"], 60),
        "time": datetime.strptime(match["at"], "%Y%m%dT%H%M%S").isoformat(),
        "how": cut(end.get("how") or "no end: it runs, or was killed", 60),
        "seconds": rounded(float(end["at"]), 1) if isinstance(end.get("at"), int | float) else None,
        "gap": cut(came.get("cluster") or came.get("kind") or "", 120),
        "tool": cut(tool["name"], 120) if isinstance(tool, Mapping) and "name" in tool else "",
        "digest": cut(tool["digest"], 16) if isinstance(tool, Mapping) and "digest" in tool else "",
        "reason": cut(came.get("why") or end.get("detail") or "", 400),
        "transcript": path.name,
    }


def _last_events(path: Path) -> list[dict[str, Any]]:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL))
            lines = file.read().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:  # the first one is cut, or it was killed within the last one
            continue
        if isinstance(event, dict):
            found.append(event)
    return found


def advice(library: LibraryView | None) -> list[dict[str, Any]]:
    """What an LLM advised, the latest first: from which step on, for which cluster, which tool, why, by whom."""
    if library is None:
        return []
    try:
        kept = Advice(library.path / ADVICE_FILE, writes=False)
    except LibraryError:
        return []
    first: dict[Ruling, int] = {}  # one that stays as no answer came is in the file again
    for step, one in zip(kept.steps, kept.rulings, strict=True):
        if one.tool:
            first.setdefault(one, step)
    dated = [(step, one) for one, step in first.items()]
    return [
        {"step": step, "cluster": cut(one.cluster, 120), "single": bool(one.query), "digest": cut(one.tool, 16)}
        | {"reason": cut(one.why, 300), "by": cut(one.by, 120)}
        for step, one in reversed(dated[-RULINGS:])
    ]
