# SPDX-License-Identifier: Apache-2.0
"""Groups of responses to look at: the ones that are worth it first, and some that are drawn.

What is looked for, half of it in the last quarter of the training: groups with a failed call, with a caught cheat,
unscored ones, groups without variance, with both ends of the scale, the lowest and the highest ones, those that an
alarm names, those over which tools disagree, those with a response that was paid for many prompts; and a random draw,
to see what is usual.

Guarantees: the same ledger gives the same groups; they stay within a budget of bytes, whatever the texts are.

Not covered: a text that was trimmed or never stored is not there; the page says so.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

from verl_rlar.report.reading import Group, Reading, cut, parts_of, rounded

GROUPS = 240
"""Groups in a report, where nobody says otherwise."""
BYTES = 4_500_000
"""Of all groups together, as JSON."""
RESPONSES = 16
"""Most responses of a group that are shown."""
RESPONSE, TURN, REFERENCE, EXTRA, REASON = 3000, 3000, 1500, 1500, 500
"""Most characters of each."""

CONDITIONS: Mapping[str, str] = {
    "hacked": "hacked > 0",
    "failed": "failed > 0",
    "unscored": "scored = 0",
    "flat": "n > 1 AND scored = n AND low = high",
    "split": "low < 0.1 AND high > 0.9",
    "low": "scored > 0 AND high <= 0.1",
    "high": "scored > 0 AND low >= 0.9",
}
"""By tag, which groups are meant."""


def samples(
    reading: Reading, marks: Mapping[str, Mapping[Group, float]], *, groups: int = GROUPS, texts: bool = True
) -> list[dict[str, Any]]:
    """The groups, with their ``rank``: what is worth a look first.

    Args:
        reading: The ledger.
        marks: By tag, further groups that are worth a look, with how much.
        groups: Most groups.
        texts: Whether the texts of prompts and responses are wanted.
    """
    chosen = _chosen(reading, marks, groups)
    rows, shadows = reading.responses(chosen), reading.shadows(chosen)
    found: list[dict[str, Any]] = []
    left = BYTES
    for start in range(0, len(chosen), 50):
        some = chosen[start : start + 50]
        hashes = [row[name] for group in some for row in rows[group] for name in ("response", "query")]
        bodies = reading.texts(hashes) if texts else {}
        for group in some:
            if not rows[group]:
                continue
            made = _group(rows[group], shadows[group], bodies)
            made["tags"] = sorted(_tags(rows[group]) | {tag for tag in marks if group in marks[tag]})
            made["rank"] = len(found)
            left -= len(json.dumps(made, ensure_ascii=True))
            if left < 0:
                return found
            found.append(made)
    return found


def _chosen(reading: Reading, marks: Mapping[str, Mapping[Group, float]], most: int) -> list[Group]:
    """Group by group of each sort in turn, so that a tight budget has some of all."""
    points = reading.axes["train"].points or reading.axes["val"].points
    since = points[-max(1, len(points) // 4)][0]
    queues: list[list[Group]] = []
    share = max(4, most // 4)
    for condition in (*CONDITIONS.values(), "1"):
        sql = f"SELECT attempt, uid, step >= {int(since)} FROM grouped WHERE {condition}"
        of_all = [((attempt, uid), recent) for attempt, uid, recent in reading.db.execute(sql)]
        recent = reading.some([group for group, is_recent in of_all if is_recent], share)
        drawn = reading.some([group for group, _ in of_all], share)
        queues.append([group for pair in zip_longest(recent, drawn) for group in pair if group is not None])
    for marked in marks.values():
        queues.append(sorted(marked, key=lambda group: (-marked[group], group))[:share])
    found: dict[Group, None] = {}
    for turn in range(2 * share):
        for queue in queues:
            if turn < len(queue) and len(found) < most:
                found.setdefault(queue[turn])
    return list(found)


def _tags(rows: list[Any]) -> set[str]:
    """What the rows of a group are by themselves."""
    values = [row["value"] for row in rows if row["value"] is not None]
    outcomes = {row["outcome"] for row in rows}
    facts = {
        "hacked": "hacked" in outcomes,
        "failed": "failed" in outcomes,
        "unscored": not values,
        "flat": len(values) == len(rows) > 1 and min(values) == max(values),
        "split": bool(values) and min(values) < 0.1 and max(values) > 0.9,
        "low": bool(values) and max(values) <= 0.1,
        "high": bool(values) and min(values) >= 0.9,
    }
    return {tag for tag, holds in facts.items() if holds}


def _group(rows: list[Any], shadows: list[Any], bodies: Mapping[str, str]) -> dict[str, Any]:
    first = rows[0]
    values = [row["value"] for row in rows if row["value"] is not None]
    shown = rows
    if len(rows) > RESPONSES:
        ranked = sorted(rows, key=lambda row: -1.0 if row["value"] is None else row["value"])
        half = RESPONSES // 2
        shown = sorted(ranked[:half] + ranked[-half:], key=lambda row: row["session"])
    beside: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in shadows:
        beside[row["session"]].append(_part(dict(row)))
    return {
        "uid": cut(first["uid"], 60),
        "split": first["split"],
        "step": first["step"],
        "attempt": first["attempt"],
        "source": cut(first["data_source"], 120),
        "route": cut(first["route"], 200),
        "kind": first["kind"],
        "cluster": cut(first["cluster"] or "", 120),
        "covered": None if first["covered"] is None else bool(first["covered"]),
        "why": cut(first["route_reason"] or "", REASON),
        "n": len(rows),
        "mean": rounded(sum(values) / len(values)) if values else None,
        "low": rounded(min(values)) if values else None,
        "high": rounded(max(values)) if values else None,
        "prompt": _prompt(bodies.get(first["query"])),
        "responses": [_response(row, bodies, beside[row["session"]]) for row in shown],
    }


def _response(row: Any, bodies: Mapping[str, str], shadows: list[dict[str, Any]]) -> dict[str, Any]:
    text = bodies.get(row["response"] or "")
    return {
        "session": row["session"],
        "outcome": row["outcome"],
        "value": rounded(row["value"]),
        "sent": rounded(row["sent"]),
        "sent_as": row["sent_as"],
        "reason": cut(row["reason"], REASON),
        "seconds": rounded(row["seconds"], 5),
        "text": None if text is None else cut(text, RESPONSE),
        "length": None if text is None else len(text),
        "parts": [_part(part) for part in parts_of(row)[:8]],
        "shadows": shadows[:8],
    }


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    details = part.get("details")
    return {
        "tool": cut(part.get("tool"), 120),
        "digest": str(part.get("digest"))[:16],
        "outcome": str(part.get("outcome"))[:20],
        "raw": _number(part.get("raw")),
        "value": _number(part.get("value")),
        "reason": cut(part.get("reason") or "", REASON),
        "seconds": rounded(float(part.get("seconds") or 0.0), 5),
        "details": [[cut(name, 60), _number(value)] for name, value in list(details.items())[:12]]
        if isinstance(details, Mapping)
        else [],
    }


def _number(value: Any) -> float | None:
    return rounded(float(value)) if isinstance(value, int | float) else None


def _prompt(body: str | None) -> dict[str, Any] | None:
    if body is None:
        return None
    try:
        asked = json.loads(body)
        turns = [{"role": cut(turn["role"], 20), "text": cut(turn["content"], TURN)} for turn in asked["messages"][-6:]]
        extra = {name: value for name, value in asked["extra"].items() if value not in (None, "", [], {})}
        reference = asked["reference"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return {
        "turns": turns,
        "turns_left_out": len(asked["messages"]) - len(turns),
        "reference": None if reference is None else cut(reference, REFERENCE),
        "extra": cut(json.dumps(extra, ensure_ascii=False, indent=1), EXTRA) if extra else "",
    }
