# SPDX-License-Identifier: Apache-2.0
"""The figures of a report: plain, JSON-like values out of a run's ledger and library.

`gather` returns a tree with

    run          place, starts of training, rows, groups, steps, what was sampled, whether texts are there
    curves       by split: steps, all, outcomes, groups, tasks, routes, uncovered; a point is one step or a few
    flow         data source, cluster, kind of query, tools: responses and their mean
    clusters     names of clusters, by id
    advice       what an LLM advised on routes
    tools        a page each, see `verl_rlar.report.tools`; sources, by the hash that a page names; tools_left_out
    events       what happened in the library
    raised       alarms that were raised during the training, by `verl_rlar.watch`
    alarms       these and what the whole run shows, see `verl_rlar.report.alarms`
    costs        seconds, tokens and dollars by tool
    agents       what agents and rubrics spent, by task, and what agents did
    length       length of responses, and what it pays
    repeated, doubted    signs of cheats
    samples      see `verl_rlar.report.samples`

Guarantees: nothing is written; the same run gives the same figures. Counts, outcomes, rewards and groups are of all
responses; what needs the parts of a score (calls of each tool, seconds, kinds of query) is of `ROWS` sampled rows in
larger runs, and scaled. Names and texts are the run's own: foreign, cut, and not escaped here.

Not covered: tokens and dollars of tools are those of calls that were scored, as the ledger has no others; the account
of the agents, which is of rubrics, too, has all. Prices are those that were configured when a call was made.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from verl_rlar import __version__
from verl_rlar.clusters import FILE_NAME as CLUSTERS_FILE
from verl_rlar.clusters import Clusters
from verl_rlar.config import LifeConfig
from verl_rlar.errors import LibraryError
from verl_rlar.ledger import ALARM_COUNTS
from verl_rlar.library import LibraryView
from verl_rlar.report.agents import advice, runs, spending
from verl_rlar.report.alarms import alarms
from verl_rlar.report.reading import Group, Reading, cut, opened, parts_of, rounded
from verl_rlar.report.samples import GROUPS, samples
from verl_rlar.report.tools import Uses, book, changes, is_gate, shadowed, specs_of
from verl_rlar.signs import DISAGREE, PAID, correlation

SERIES = 16
"""Most tasks, and most routes, with a curve of their own."""
OTHERS = "(others)"
PROMPTS = 4
"""Prompts for which one response was paid, from which on it is a sign."""
RAISED = 200
"""Most alarms of the training that are shown."""
QUOTING = frozenset({"prompt", "reference", "response", "reason"})
"""Names of values that are, or may quote, texts."""
MEASURED = 600
"""Groups whose texts are measured."""
COUNTS = ("n", "scored", "failed", "hacked", "abstained", "groups", "many", "flat", "total", "sent")


def gather(
    place: Path,
    library: LibraryView | None,
    *,
    agents: Path | None = None,
    groups: int = GROUPS,
    texts: bool = True,
    tolerance: float = LifeConfig().tolerance,
) -> dict[str, Any]:
    """See the module.

    Args:
        place: The ledger, or the folder that holds it.
        library: The run's library; None: there is none, and pages of tools hold what the ledger has.
        agents: Folder of the agents' transcripts and account; None: ``agents`` beside the ledger.
        groups: Most groups of responses to look at.
        texts: Whether texts are wanted: of prompts, responses and sources, of an exam's cases, and reasons, which may
            quote any of them.
        tolerance: By how much a canary may differ (`rlar.life.tolerance`); the ledger does not have the run's own.

    Raises:
        LedgerError: There is no ledger, or none that can be read, or nothing in it yet.
    """
    with opened(place) as reading:
        specs = specs_of(reading, library)
        seen = _Seen(Uses(reading))
        for row in reading.sampled():
            seen.saw(row, specs)
        scale = reading.rows / max(1, seen.rows)
        pages, sources = book(reading, library, specs, seen.uses, scale, tolerance)
        in_shadow = shadowed(reading, MEASURED)
        pages = pages if texts else _silent(pages)
        raised = _raised(reading)
        marks = {
            "alarm": _examples(reading, raised),
            "disagree": seen.disagree | _against_shadows(reading, in_shadow),
            "repeated": seen.repeats(),
        }
        beside = agents or (place.parent if place.is_file() else place) / "agents"
        did = {"spent": spending(beside), "runs": runs(beside)}
        figures: dict[str, Any] = {
            "version": 1,
            "release": __version__,
            "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "run": _run(reading, place, library, seen.rows),
            "curves": {split: _curves(reading, split) for split in ("train", "val") if reading.axes[split].points},
            "flow": seen.flows(scale),
            "clusters": _names(library) if texts else {},
            "advice": advice(library) if texts else _silent(advice(library)),
            "tools": pages,
            "tools_left_out": max(0, len({*specs, *seen.uses.of}) - len(pages)),
            "sources": sources if texts else {},
            "events": changes(library),
            "raised": raised,
            "costs": _costs(pages),
            "agents": did if texts else _silent(did),
            "length": _length(reading) if texts else {"tasks": [], "points": []},
            "repeated": seen.repeated_texts(reading) if texts else [],
            "doubted": {
                "groups": len(marks["disagree"]),
                "compared": len(seen.compared | set(in_shadow)),
                "by": DISAGREE,
            },
        }
        figures["alarms"] = alarms(figures)
        found = samples(reading, marks, groups=groups, texts=texts)
        figures["samples"] = found if texts else _silent(found)
        figures["run"]["texts"] = any(one["prompt"] or one["responses"][0]["text"] for one in figures["samples"])
    return figures


def _silent(value: Any) -> Any:
    """Figures without texts that are, or may quote, the data's or the policy's."""
    if isinstance(value, dict):
        return {name: "" if name in QUOTING and isinstance(one, str) else _silent(one) for name, one in value.items()}
    return [_silent(one) for one in value] if isinstance(value, list) else value


# --- Sampled rows -----------------------------------------------------------------------------------------------------


@dataclass
class _Seen:
    """What is collected in one pass over sampled rows."""

    uses: Uses
    rows: int = 0
    flow: dict[tuple[str, ...], list[float]] = field(default_factory=lambda: defaultdict(lambda: [0, 0, 0.0]))
    """By data source, cluster, kind and route: responses, scored ones, sum of values."""
    compared: set[Group] = field(default_factory=set)
    """Groups in which more than one tool gave a value."""
    disagree: dict[Group, float] = field(default_factory=dict)
    paid: dict[str, dict[str, Group]] = field(default_factory=lambda: defaultdict(dict))
    """By response: by query for which it was paid, the group."""
    times: dict[str, list[float]] = field(default_factory=lambda: defaultdict(lambda: [0, 0.0]))

    def saw(self, row: Any, specs: Mapping[str, Any]) -> None:
        self.rows += 1
        parts = parts_of(row)
        self.uses.saw(row, parts)
        value = row["value"]
        kind = row["kind"] or "unknown"
        cell = self.flow[cut(row["data_source"], 120), cut(row["cluster"] or kind, 120), kind, cut(row["route"], 200)]
        cell[0] += 1
        if value is not None:
            cell[1] += 1
            cell[2] += value
        judges = [part for part in parts if not is_gate(specs.get(str(part.get("digest"))))]
        said = [part["value"] for part in judges if part.get("value") is not None]
        group = (row["attempt"], row["uid"])
        if len(said) > 1:
            self.compared.add(group)
        if len(said) > 1 and max(said) - min(said) >= DISAGREE:
            self.disagree[group] = max(self.disagree.get(group, 0.0), max(said) - min(said))
        if value is not None and value >= PAID and row["response"] and row["split"] == "train":
            self.paid[row["response"]].setdefault(row["query"], group)
            times = self.times[row["response"]]
            times[0] += 1
            times[1] += value

    def flows(self, scale: float) -> list[dict[str, Any]]:
        return [
            {"source": source, "cluster": cluster, "kind": kind, "route": route, "n": round(n * scale)}
            | {"scored": round(scored * scale), "mean": rounded(total / scored) if scored else None}
            for (source, cluster, kind, route), (n, scored, total) in sorted(
                self.flow.items(), key=lambda item: (-item[1][0], item[0])
            )
        ][:200]

    def _suspects(self) -> list[str]:
        found = [sha for sha, queries in self.paid.items() if len(queries) >= PROMPTS]
        return sorted(found, key=lambda sha: -len(self.paid[sha]))[:5]

    def repeats(self) -> dict[Group, float]:
        return {group: float(len(self.paid[sha])) for sha in self._suspects() for group in self.paid[sha].values()}

    def repeated_texts(self, reading: Reading) -> list[dict[str, Any]]:
        texts = reading.texts(self._suspects())
        return [
            {"queries": len(self.paid[sha]), "n": int(self.times[sha][0])}
            | {"mean": rounded(self.times[sha][1] / self.times[sha][0]), "text": cut(texts.get(sha, ""), 200)}
            for sha in self._suspects()
        ]


def _against_shadows(reading: Reading, groups: list[Group]) -> dict[Group, float]:
    """Groups in which a tool in the shadow and the tools in place are of two minds."""
    found: dict[Group, float] = {}
    in_place = reading.responses(groups)
    for group, rows in reading.shadows(groups).items():
        values = {row["session"]: row["value"] for row in in_place[group]}
        for row in rows:
            theirs = values.get(row["session"])
            if row["value"] is not None and theirs is not None and abs(row["value"] - theirs) >= DISAGREE:
                found[group] = max(found.get(group, 0.0), abs(row["value"] - theirs))
    return found


def _raised(reading: Reading) -> list[dict[str, Any]]:
    """The latest alarms of the training, the newest first."""
    sql = (
        f"SELECT step, sign, digest, cluster, tool, action, text, figures, examples FROM alarms WHERE {ALARM_COUNTS} "
        "GROUP BY step, sign, digest, cluster HAVING attempt = MAX(attempt) ORDER BY step DESC, sign LIMIT ?"
    )
    return [
        {name: row[name] for name in ("step", "sign", "digest", "action")}
        | {"tool": cut(row["tool"], 120), "cluster": cut(row["cluster"], 120), "text": cut(row["text"], 600)}
        | {"figures": json.loads(row["figures"]), "examples": json.loads(row["examples"])}
        for row in reading.db.execute(sql, (RAISED,))
    ]


def _examples(reading: Reading, raised: Iterable[Mapping[str, Any]]) -> dict[Group, float]:
    """Groups that alarms name, the latest alarms first."""
    found: dict[Group, float] = {}
    for alarm in raised:
        for uid in alarm["examples"]:
            for group in reading.db.execute("SELECT attempt, uid FROM grouped WHERE uid = ?", (uid,)):
                found.setdefault(tuple(group), float(alarm["step"]))
    return found


def _names(library: LibraryView | None) -> dict[str, str]:
    """Names of clusters, by id."""
    if library is None:
        return {}
    try:
        known = Clusters(library.path / CLUSTERS_FILE, writes=False).all()
    except LibraryError:  # damaged, or of another embedding: ids say what they can
        return {}
    return {cluster.id: cut(cluster.name, 120) for cluster in known}


# --- All rows ---------------------------------------------------------------------------------------------------------


def _run(reading: Reading, place: Path, library: LibraryView | None, sampled: int) -> dict[str, Any]:
    starts = reading.db.execute("SELECT attempt, started FROM attempts ORDER BY attempt").fetchall()
    of_start: dict[int, list[int]] = defaultdict(list)
    for (split, step), attempt in reading.chosen.items():
        if split == "train":
            of_start[attempt].append(step)
    return {
        "place": cut(place.absolute(), 400),
        "name": cut((place.absolute().parent if place.name == "rlar" else place.absolute()).name, 120),
        "rows": reading.rows,
        "groups": reading.groups,
        "sampled": sampled,
        "library": library is not None,
        "starts": [
            {
                "attempt": row["attempt"],
                "started": datetime.fromtimestamp(row["started"], timezone.utc).isoformat(timespec="seconds"),
                "steps": [min(of_start[row["attempt"]]), max(of_start[row["attempt"]])]
                if of_start[row["attempt"]]
                else None,
            }
            for row in starts[-20:]
        ],
        "splits": {
            split: {
                "steps": len([1 for of, _ in reading.chosen if of == split]),
                "first": axis.points[0][0],
                "last": axis.points[-1][1],
            }
            for split, axis in reading.axes.items()
            if axis.points
        },
    }


def _curves(reading: Reading, split: str) -> dict[str, Any]:
    points = len(reading.axes[split].points)
    cells: dict[tuple[str, str], list[Counter[str]]] = {}
    sql = (
        "SELECT step, data_source, route, SUM(n), SUM(scored), SUM(failed), SUM(hacked), SUM(abstained), COUNT(*), "
        "SUM(n > 1), SUM(n > 1 AND scored = n AND low = high), TOTAL(total), TOTAL(sent) "
        "FROM grouped WHERE split = ? GROUP BY step, data_source, route"
    )
    for step, source, route, *counts in reading.db.execute(sql, (split,)):
        key = (cut(source, 120), cut(route, 200))
        line = cells.setdefault(key, [Counter() for _ in range(points)])
        line[reading.point(split, step) or 0].update(dict(zip(COUNTS, counts, strict=True)))
    whole = _summed(cells.values(), points)
    by_source = _grouped(cells, 0, points)
    by_route = _grouped(cells, 1, points)
    sql = (  # what came while no service answered has no route either, and failed; all of this is in the index
        "SELECT COUNT(*) FROM chosen CROSS JOIN scores USING (split, step, attempt) "
        "WHERE split = ? AND route = '-' AND outcome <> 'failed'"
    )
    uncovered = reading.db.execute(sql, (split,)).fetchone()[0]
    return {
        "steps": [list(point) for point in reading.axes[split].points],
        "all": _series(whole),
        "outcomes": {
            "scored": [point["scored"] - point["hacked"] for point in whole],
            **{name: [point[name] for point in whole] for name in ("hacked", "failed", "abstained")},
        },
        "groups": {name: [point[name] for point in whole] for name in ("groups", "many", "flat")},
        "tasks": [{"name": name} | _series(line) for name, line in by_source],
        "routes": [{"name": name} | _series(line) for name, line in by_route],
        "uncovered": int(uncovered),
    }


def _summed(lines: Iterable[list[Counter[str]]], points: int) -> list[Counter[str]]:
    total: list[Counter[str]] = [Counter() for _ in range(points)]
    for line in lines:
        for place, counts in enumerate(line):
            total[place].update(counts)
    return total


def _grouped(
    cells: Mapping[tuple[str, str], list[Counter[str]]], side: int, points: int
) -> list[tuple[str, list[Counter[str]]]]:
    """By data source or by route: the largest ones, and the others together."""
    lines: dict[str, list[list[Counter[str]]]] = defaultdict(list)
    for key, line in cells.items():
        lines[key[side]].append(line)
    found = {name: _summed(of_name, points) for name, of_name in lines.items()}
    ranked = sorted(found, key=lambda name: (-sum(point["n"] for point in found[name]), name))
    kept = [(name, found[name]) for name in ranked[:SERIES]]
    if ranked[SERIES:]:
        kept.append((OTHERS, _summed([found[name] for name in ranked[SERIES:]], points)))
    return kept


def _series(line: list[Counter[str]]) -> dict[str, Any]:
    return {
        "n": [point["n"] for point in line],
        "scored": [point["scored"] for point in line],
        "mean": [rounded(point["total"] / point["scored"]) if point["scored"] else None for point in line],
        "sent": [rounded(point["sent"] / point["n"]) if point["n"] else None for point in line],
        "flat": [rounded(point["flat"] / point["many"]) if point["many"] else None for point in line],
        "unscored": [rounded(1 - point["scored"] / point["n"]) if point["n"] else None for point in line],
    }


def _costs(pages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for page in pages:
        for how in ("use", "shadow"):
            one = page[how]
            if one and one["seconds"]:
                calls = one["calls"] if how == "use" else one["n"]
                found.append(
                    {"tool": page["name"], "digest": page["digest"], "how": how, "calls": calls}
                    | {"seconds": one["seconds"], "p50": one.get("p50"), "p95": one.get("p95")}
                    | {"tokens": one.get("tokens"), "dollars": one.get("dollars")}
                )
    return sorted(found, key=lambda one: -one["seconds"])


def _length(reading: Reading) -> dict[str, Any]:
    """Characters of responses, over the steps, and how far they go with the reward within groups."""
    sql = "SELECT attempt, uid FROM grouped WHERE split = 'train' AND n > 1"
    groups = reading.some([(attempt, uid) for attempt, uid in reading.db.execute(sql)], MEASURED)
    rows = reading.responses(groups)
    texts = reading.texts(row["response"] for group in groups for row in rows[group])
    points: list[list[int]] = [[] for _ in reading.axes["train"].points]
    pairs: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for group in groups:
        sizes = [(len(texts[row["response"]]), row) for row in rows[group] if row["response"] in texts]
        for size, row in sizes:
            points[reading.point("train", row["step"]) or 0].append(size)
        valued = [(size, row["value"]) for size, row in sizes if row["value"] is not None]
        if len({value for _, value in valued}) > 1:
            mean_size = sum(size for size, _ in valued) / len(valued)
            mean_value = sum(value for _, value in valued) / len(valued)
            name = cut(rows[group][0]["data_source"], 120)
            pairs[name] += [(size - mean_size, value - mean_value) for size, value in valued]
    tasks = []
    for name, of_task in sorted(pairs.items(), key=lambda item: -len(item[1]))[:SERIES]:
        r, n = correlation(of_task)
        tasks.append({"name": name, "r": rounded(r, 3), "n": n})
    return {"tasks": tasks, "points": [rounded(sum(sizes) / len(sizes), 1) if sizes else None for sizes in points]}
