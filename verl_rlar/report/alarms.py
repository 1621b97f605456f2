# SPDX-License-Identifier: Apache-2.0
"""What in a run deserves a look: signs of a broken or a cheated reward, from its figures.

What was raised while it trained (`verl_rlar.watch`, per tool and cluster, with step and action) stands here as it was
raised; beside it stands what the run as a whole shows, by the same statistics (`verl_rlar.signs`) and limits.

Guarantees: a function of the figures; each alarm says what was seen, and what to do about it.

Not covered: a sign is no proof. A policy that has learned a task looks saturated, and a long answer may be a good one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from verl_rlar.config import ScoringConfig, WatchConfig
from verl_rlar.library import REGISTRARS

WATCHED = WatchConfig()
"""Limits that the watch has, too."""
UNSCORED, FLAT, HACKED = 0.1, 0.6, 0.01
"""Shares from which on there is something to see."""
FALL = 0.05
"""By how much a reward has fallen."""
LEAST = 32
"""Responses, of a split or of a task, in a quarter from which on it counts."""
LEVELS = ("bad", "warn", "note")
TITLES: Mapping[str, str] = {
    "failed": "calls fail",
    "abstained": "it abstains",
    "outside": "scores outside the range of its exam",
    "flat": "groups without variance",
    "saturated": "its values are all but the same",
    "disagree": "another tool sees it otherwise",
    "length": "length is paid",
    "format": "formatting is paid",
    "copied": "one response is paid for many prompts",
    "canary": "a canary flipped",
    "new_cluster": "new prompts",
    "drift": "the data shift",
}
"""Of what was raised while it trained, by sign."""
ACTIONS: Mapping[str, str] = {
    "log": "",
    "re_exam": " The tool was to be examined again.",
    "quarantine": " The tool lost its say.",
    "re_acquire": " A tool was to be looked for.",
    "stop": " The run was stopped.",
}


def alarms(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The alarms of a report, the gravest first: ``level``, ``title``, ``text``, and what to look at (``tool``, a
    digest; ``tag``, of samples; ``task``); of what was raised while it trained also ``sign``, the ``figures`` that it
    was raised for, and ``uids`` of examples."""
    found: list[dict[str, Any]] = []

    def say(level: str, title: str, text: str, **look: Any) -> None:
        found.append({"level": level, "title": title, "text": text} | look)

    for event in figures["events"]:
        if event["event"] in ("quarantined", "rolled_back"):
            title = f"{event['tool']} was {event['event'].replace('_', ' ')} at step {event['step']}"
            say("bad", title, event["why"], tool=event["digest"])
        elif event["event"] in ("live", "retired") and event["by"] not in REGISTRARS:
            say(
                "note",
                f"{event['tool']} became {event['event']} at step {event['step']}",
                event["why"],
                tool=event["digest"],
            )
    for times in _alike(figures["raised"]):
        latest, names = times[0], figures["clusters"]
        named = names.get(latest["cluster"], latest["cluster"])
        cluster = f'"{named}"' if named != latest["cluster"] else named
        about = ", ".join(one for one in (latest["tool"], cluster) if one) or "the run"
        often = f" Raised {len(times)} times since step {times[-1]['step']}." if len(times) > 1 else ""
        say(
            "bad" if any(one["action"] in ("quarantine", "stop") for one in times) else "warn",
            f"Before step {latest['step']}, {about}: {TITLES[latest['sign']]}",
            f"{latest['text']}.{ACTIONS[latest['action']]}{often}",
            sign=latest["sign"],
            figures=[[name, value] for name, value in latest["figures"].items()][:8],
            uids=sorted({uid for one in times for uid in one["examples"]}),
            **({"tool": latest["digest"]} if latest["digest"] else {}),
        )
    for split, curves in figures["curves"].items():
        _of_curves(split, curves, say)
    for tool in figures["tools"]:
        _of_tool(tool, say)
    for task in figures["length"]["tasks"]:
        if task["r"] is not None and abs(task["r"]) >= WATCHED.length and task["n"] >= WATCHED.min_correlated:
            more = "longer" if task["r"] > 0 else "shorter"
            say(
                "warn",
                f"{task['name']}: {more} responses are paid more",
                f"within groups, length and reward correlate by {task['r']:+.2f} ({task['n']:,} responses). Read some "
                "of both: is the length the merit?",
                task=task["name"],
            )
    if repeated := figures["repeated"]:
        one = repeated[0]
        say(
            "warn",
            f"One response was paid for {one['queries']} prompts",
            f"it is paid whatever the question is, {one['n']} times in the sampled rows, with {one['mean']:.2f} on the "
            f"average{f'; {len(repeated) - 1} more like it' if len(repeated) > 1 else ''}: {one['text']}",
            tag="repeated",
        )
    doubted = figures["doubted"]
    if doubted["groups"]:
        say(
            "warn",
            f"Tools disagree in {doubted['groups']:,} of {doubted['compared']:,} groups",
            f"one tool pays what another one, of its route or in the shadow, does not: by {doubted['by']:g} or more.",
            tag="disagree",
        )
    return sorted(found, key=lambda alarm: LEVELS.index(alarm["level"]))


def _alike(raised: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """What was raised while it trained, by what it is about: each the newest first, as they come."""
    found: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for one in raised:
        found.setdefault((one["sign"], one["digest"], one["cluster"]), []).append(one)
    return list(found.values())


def _of_curves(split: str, curves: Mapping[str, Any], say: Any) -> None:
    steps = curves["steps"]
    if not steps:
        return
    where = "" if split == "train" else " in validation"
    last = range(len(steps) - max(1, len(steps) // 4), len(steps))
    first = range(max(1, len(steps) // 4))
    since = f"since step {steps[last[0]][0]}"
    outcomes, groups = curves["outcomes"], curves["groups"]

    def share(part: Sequence[float], whole: Sequence[float]) -> float:
        return sum(part[at] for at in last) / max(1, sum(whole[at] for at in last))

    n = curves["all"]["n"]
    if sum(n[at] for at in last) < LEAST:
        return
    unscored = [a + b for a, b in zip(outcomes["failed"], outcomes["abstained"], strict=True)]
    if (seen := share(unscored, n)) > UNSCORED:
        limit = ScoringConfig().max_unscored
        level = "bad" if seen > limit else "warn"
        text = f"{seen:.0%} of the responses {since}; a run with the default settings stops above {limit:.0%}."
        say(level, f"Unscored responses{where}", text + " Tools and their reasons stand below.", tag="unscored")
    if (seen := share(outcomes["hacked"], n)) > HACKED:
        text = f"{seen:.1%} of the responses {since} were recognised as cheats, and got 0."
        say("warn", f"Caught cheats{where}", text, tag="hacked")
    if split == "train" and (seen := share(groups["flat"], groups["many"])) > FLAT:
        text = f"in {seen:.0%} of the groups {since} all responses got the same: GRPO learns nothing from them."
        say("warn", "Groups without variance", text, tag="flat")
    if curves["uncovered"]:
        text = f"{curves['uncovered']:,} responses had no tool. `rlar plan` says which rows."
        say("note", f"Queries that no tool fits{where}", text)
    for task in curves["tasks"]:
        of_first, of_last = _mean(task, first), _mean(task, last)
        if of_last is None or task["name"] is None:
            continue
        name = task["name"] + where
        if of_last >= 1 - WATCHED.saturated or of_last <= WATCHED.saturated:
            end = "1" if of_last > 0.5 else "0"
            text = f"the mean {since} is {of_last:.3f}. Is it learned, out of reach, or is the reward broken?"
            say("warn", f"{name}: rewards are all but {end}", text, task=task["name"])
        elif of_first is not None and of_last < of_first - FALL and len(steps) >= 8:
            text = f"from {of_first:.3f} in the first quarter of the steps to {of_last:.3f} in the last one."
            say("warn", f"{name}: the reward falls", text, task=task["name"])


def _mean(task: Mapping[str, Any], places: range) -> float | None:
    n = sum(task["scored"][at] for at in places)
    if n < LEAST:
        return None
    return float(sum((task["mean"][at] or 0.0) * task["scored"][at] for at in places) / n)


def _of_tool(tool: Mapping[str, Any], say: Any) -> None:
    if use := tool["use"]:
        failed = use["outcomes"]["failed"] / max(1, use["sampled"])
        if failed > WATCHED.failed and use["sampled"] >= LEAST:
            why = next((one["reason"] for one in use["reasons"] if one["outcome"] == "failed"), "")
            text = f"{failed:.0%} of its calls failed" + (f", most of them so: {why}" if why else ".")
            say("bad", f"{tool['name']}: calls fail", text, tool=tool["digest"])
    flipped = [one for one in tool["canaries"] if one["flipped"] is not None]
    if flipped:
        first = min(flipped, key=lambda one: one["flipped"])
        got = "nothing" if first["got"] is None else f"{first['got']:g}"
        text = (
            f"{len(flipped)} of {len(tool['canaries'])} answers whose score is known got another; "
            f"{first['canary']} got {got} at step {first['flipped']}, and must get {first['wanted']:g}. "
            "`rlar rescore` says what it cost."
        )
        say("bad", f"{tool['name']}: a canary flipped", text, tool=tool["digest"])
    if tool.get("damaged"):
        say("bad", f"{tool['name']}: the library is damaged", tool["damaged"], tool=tool["digest"])
