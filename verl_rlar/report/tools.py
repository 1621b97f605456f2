# SPDX-License-Identifier: Apache-2.0
"""Of each tool: what it is, how it did in its exam, and what it did in the run.

Guarantees: a tool that only the ledger knows, and one whose files in the library are damaged, are shown as far as they
are known. Cards are read by their names, so that those of other releases are shown as far as they are alike.

Not covered: uses of tools are those of sampled rows (`verl_rlar.report.reading`), and say so.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from verl_rlar.calibration import Calibration, identity
from verl_rlar.errors import LibraryError, RlarError
from verl_rlar.exam.card import MEANING
from verl_rlar.library import REGISTRARS, LibraryView, spec_from_json
from verl_rlar.purse import cost_of
from verl_rlar.report.reading import Reading, cut, quantile, rounded
from verl_rlar.types import Outcome, ToolSpec

BINS = 20
"""Of a histogram of values."""
RAW_BINS = 24
CURVE = 80
"""Points of a calibration curve."""
REASONS = 6
"""Most reasons of a tool that are listed."""
CALLS = 3000
"""Most seconds of calls that are kept by tool, for percentiles."""
SOURCE = 60_000
"""Most characters of a source."""
SOURCES = 1_500_000
"""Most characters of all sources together."""
PAGES = 400
"""Most tools with a page; those go first that were used most."""
CHECKED_GROUPS = 600
"""Groups of tools in the shadow that are compared with the tools in place."""
PRICED = ("reward_model", "rubric")
"""Kinds of tools whose calls cost tokens."""
OUTCOMES = tuple(outcome.value for outcome in Outcome)


@dataclass
class Use:
    """What a tool did in sampled rows."""

    points: list[Counter[str]]
    """By point of the training's curves: outcomes."""
    totals: list[float]
    """By point: sum of the values."""
    valued: list[int]
    """By point: how many values."""
    outcomes: Counter[str] = field(default_factory=Counter)
    histogram: list[int] = field(default_factory=lambda: [0] * BINS)
    raws: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    spent: float = 0.0
    costs: list[float] = field(default_factory=lambda: [0.0, 0.0])
    """Tokens and dollars."""
    told: int = 0
    """Calls that say what they took."""
    checks: Counter[str] = field(default_factory=Counter)
    """Of a rubric: by question, how many times the answer was yes."""
    reasons: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Of unscored and hacked responses: outcome and reason."""

    def saw(self, part: Mapping[str, Any], point: int | None) -> None:
        """One call."""
        outcome, value = str(part.get("outcome")), part.get("value")
        self.outcomes[outcome] += 1
        seconds = float(part.get("seconds") or 0.0)
        self.spent += seconds
        if len(self.seconds) < CALLS or self.outcomes.total() % 16 == 0:
            self.seconds.append(seconds)
        if outcome != "scored" and len(self.reasons) < 500:
            self.reasons[outcome, cut(part.get("reason") or "", 200)] += 1
        if point is not None:
            self.points[point][outcome] += 1
        if isinstance(value, int | float):
            self.histogram[min(BINS - 1, max(0, int(value * BINS)))] += 1
            if point is not None:
                self.totals[point] += value
                self.valued[point] += 1
        details = part.get("details")
        if isinstance(details, Mapping) and details:
            if cost := _cost(details):
                self.told += 1
                self.costs = [had + more for had, more in zip(self.costs, cost, strict=True)]
            for name in details:
                if name.startswith("check_"):
                    self.checks[name] += details[name] == 1
        raw = part.get("raw")
        if isinstance(raw, int | float) and math.isfinite(raw) and len(self.raws) < CALLS:
            self.raws.append(float(raw))

    def as_dict(self, scale: float, kind: str) -> dict[str, Any]:
        """For the page; `scale`: calls in the run for each one here; `kind`: of the tool."""
        told = self.told and kind in PRICED
        calls = self.outcomes.total()
        return {
            "calls": round(calls * scale),
            "sampled": calls,
            "outcomes": {name: self.outcomes[name] for name in OUTCOMES},
            "mean": rounded(sum(self.totals) / max(1, sum(self.valued))) if any(self.valued) else None,
            "histogram": self.histogram,
            "raws": _raw_histogram(self.raws),
            "p50": rounded(quantile(self.seconds, 0.5), 6),
            "p95": rounded(quantile(self.seconds, 0.95), 6),
            "seconds": rounded(self.spent * scale, 3),
            "tokens": round(self.costs[0] * scale) if told else None,
            "dollars": rounded(self.costs[1] * scale, 4) if told else None,
            "means": [rounded(total / n) if n else None for total, n in zip(self.totals, self.valued, strict=True)],
            "points": {name: [point[name] for point in self.points] for name in OUTCOMES if self.outcomes[name]},
            "reasons": [
                {"outcome": outcome, "reason": reason, "n": n}
                for (outcome, reason), n in self.reasons.most_common(REASONS)
            ],
        }


class Uses:
    """Collects what tools did in sampled rows."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self.of: dict[str, Use] = {}
        """By digest."""
        self.names: dict[str, str] = {}

    def saw(self, row: Any, parts: list[dict[str, Any]]) -> None:
        point = self._reading.point("train", row["step"]) if row["split"] == "train" else None
        for part in parts:
            digest = str(part.get("digest"))
            self.names.setdefault(digest, str(part.get("tool")))
            self._use(digest).saw(part, point)

    def _use(self, digest: str) -> Use:
        if digest not in self.of:
            points = len(self._reading.axes["train"].points)
            self.of[digest] = Use([Counter() for _ in range(points)], [0.0] * points, [0] * points)
        return self.of[digest]


def specs_of(reading: Reading, library: LibraryView | None) -> dict[str, ToolSpec | dict[str, Any]]:
    """By digest, in the order of the library and then of the ledger; as it stands there where it cannot be read."""
    found: dict[str, ToolSpec | dict[str, Any]] = {}
    kept = {row["digest"]: row for row in reading.db.execute("SELECT digest, name, kind, spec FROM tools")}
    for digest in (*(library.digests() if library else ()), *kept):
        if digest in found:
            continue
        try:
            if library and digest in library.digests():
                found[digest] = library.spec(digest)
                continue
        except LibraryError:
            pass
        if digest in kept:
            row = kept[digest]
            try:
                found[digest] = spec_from_json(json.loads(row["spec"]))
            except (RlarError, ValueError):
                found[digest] = {"name": row["name"], "kind": row["kind"]}
        else:
            found[digest] = {"name": digest, "kind": "unknown"}
    return found


def book(
    reading: Reading,
    library: LibraryView | None,
    specs: Mapping[str, ToolSpec | dict[str, Any]],
    uses: Uses,
    scale: float,
    tolerance: float,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """A page for each tool, and the sources by their hash."""
    standings = library.standings() if library else {}
    shadows, canaries = _shadows(reading), _canaries(reading, library, tolerance)
    sources: dict[str, str] = {}
    pages = []
    for digest in dict.fromkeys((*specs, *uses.of)):
        spec = specs.get(digest) or {"name": uses.names.get(digest, digest), "kind": "unknown"}
        page: dict[str, Any] = {"digest": digest, **_facts(spec)}
        standing = standings.get(digest)
        page["state"] = standing.event if standing else "unknown"
        page["since"] = standing.step if standing else None
        page["why"] = cut(standing.why, 600) if standing else ""
        page["events"] = _events(library, digest)
        use = uses.of.get(digest)
        page["use"] = use.as_dict(scale, page["kind"]) if use else None
        page["checks"] = _checks(spec, use)
        page["shadow"] = shadows.get(digest)
        page["canaries"] = canaries.get(digest, [])
        card = None
        if library and standing:
            try:
                card = library.card(digest)
                page["source"] = _source(library, digest, spec, sources)
            except LibraryError as error:
                page["damaged"] = cut(error, 600)
        page["card"] = _card(card) if isinstance(card, dict) else None
        page["calibration"] = _curve(card, spec)
        pages.append(page)
    pages.sort(key=_rank)
    kept = pages[:PAGES]
    return kept, {sha: text for sha, text in sources.items() if any(page.get("source") == sha for page in kept)}


def _rank(page: Mapping[str, Any]) -> tuple[bool, int]:
    """Sound tools that nobody has asked are the last ones."""
    flipped = any(one["flipped"] is not None for one in page["canaries"])
    standing = page["state"] in ("live", "shadow", "quarantined", "rolled_back")
    return not (page["use"] or page["shadow"] or flipped or standing), -(page["use"] or {"calls": 0})["calls"]


def _facts(spec: ToolSpec | dict[str, Any]) -> dict[str, Any]:
    if isinstance(spec, dict):
        return {"name": cut(spec["name"], 120), "kind": cut(spec["kind"], 40), "kinds": [], "misses": []}
    return {
        "name": cut(spec.name, 120),
        "kind": spec.kind,
        "target": cut(spec.target, 300),
        "kinds": sorted(kind.value for kind in spec.scope.kinds),
        "needs_reference": spec.scope.needs_reference,
        "description": cut(spec.description, 2000),
        "misses": [cut(missed, 400) for missed in spec.misses[:20]],
        "gate": spec.gate,
        "low": rounded(spec.low),
        "high": rounded(spec.high),
        "timeout_s": rounded(spec.timeout_s),
        "boxed": spec.boxed,
        "origin": cut(spec.origin, 200),
        "serving": cut(json.dumps(spec.serving, indent=1, default=str), 3000) if spec.serving else None,
    }


def _cost(details: Mapping[str, Any]) -> tuple[float, float] | None:
    try:
        return cost_of(details)
    except (TypeError, ValueError):
        return None


def _checks(spec: ToolSpec | dict[str, Any], use: Use | None) -> list[dict[str, Any]]:
    """Of a rubric: its questions, their weights, and the share of yes in sampled rows."""
    if not isinstance(spec, ToolSpec) or spec.kind != "rubric":
        return []
    try:
        asked = [(str(question), float(weight)) for question, weight in (spec.serving or {})["checks"]]
    except (LookupError, TypeError, ValueError):
        return []
    answered = use.outcomes["scored"] if use else 0
    return [
        {"question": cut(question, 400), "weight": rounded(weight)}
        | {"yes": rounded(use.checks[f"check_{number}"] / answered) if use and answered else None}
        for number, (question, weight) in enumerate(asked, start=1)
    ]


def _events(library: LibraryView | None, digest: str) -> list[dict[str, Any]]:
    found = [
        {"time": event.time[:19], "step": event.step, "by": cut(event.by, 60), "why": cut(event.why, 600)}
        | {"event": event.event if event.digest == digest else f"{event.event}, in its place {event.digest}"}
        for event in (library.events if library else ())
        if digest in (event.digest, event.replaces)
    ]
    return found[-40:]


def changes(library: LibraryView | None) -> list[dict[str, Any]]:
    """The library's events that a curve is marked with: all that happened after its beginning."""
    return [
        {"step": event.step, "event": event.event, "tool": cut(event.tool, 120), "digest": event.digest}
        | {"by": cut(event.by, 60), "why": cut(event.why, 600), "time": event.time[:19]}
        for event in (library.events if library else ())
        if not (event.by in REGISTRARS and event.step == 0)
    ][-400:]


def _source(library: LibraryView, digest: str, spec: ToolSpec | dict[str, Any], sources: dict[str, str]) -> str | None:
    sha = spec.source_sha256 if isinstance(spec, ToolSpec) else ""
    if sha not in sources:
        text = library.source(digest)
        if text is None or sum(map(len, sources.values())) > SOURCES:
            return None
        sources[sha] = cut(text, SOURCE)
    return sha


# --- The exam ---------------------------------------------------------------------------------------------------------


def _card(card: Mapping[str, Any]) -> dict[str, Any]:
    def listed(name: str, most: int) -> list[Any]:
        value = card.get(name)
        return list(value)[:most] if isinstance(value, list | tuple) else []

    figures: list[dict[str, Any]] = []
    for kind, named in _items(card.get("figures")):
        for name, one in _items(named):
            if not isinstance(one, Mapping):
                continue
            value, limit, least = _number(one.get("value")), _number(one.get("limit")), bool(one.get("least", True))
            off = None if value is None or limit is None else (limit - value if least else value - limit)
            figures.append(
                {"kind": cut(kind, 40), "name": cut(name, 60), "meaning": MEANING.get(name, cut(name, 60))}
                | {"value": value, "limit": limit, "least": least, "cases": _number(one.get("cases"))}
                | {"note": cut(one.get("note") or "", 120), "missed": off is not None and off > 1e-9}
            )
    texts = ("id", "sort", "origin", "expect", "outcome", "wanted", "prompt", "response", "reference", "reason")
    return {
        "verdict": cut(card.get("verdict") or "unknown", 40),
        "reasons": [cut(reason, 600) for reason in listed("reasons", 30)],
        "admitted_for": [cut(kind, 60) for kind in listed("admitted_for", 20)],
        "unproven": [cut(kind, 60) for kind in listed("unproven", 20)],
        "cases": _number(card.get("cases")),
        "sealed": _number(card.get("sealed")),
        "failed_cases": _number(card.get("failed_cases")),
        "stopped": cut(card.get("stopped") or "", 400),
        "figures": figures[:200],
        "sorts": [
            {"sort": cut(sort, 120), "cases": _number(count.get("cases")), "right": _number(count.get("right"))}
            for sort, count in _items(card.get("sorts"))
            if isinstance(count, Mapping)
        ][:80],
        "failing": [
            {name: cut(case.get(name) or "", 800) for name in texts} | {"value": _number(case.get("value"))}
            for case in listed("failing", 20)
            if isinstance(case, Mapping)
        ],
    }


def _items(value: Any) -> list[tuple[str, Any]]:
    return [(str(name), one) for name, one in value.items()] if isinstance(value, Mapping) else []


def _number(value: Any) -> float | None:
    return rounded(value, 6) if isinstance(value, int | float) else None


def _curve(card: Mapping[str, Any] | None, spec: ToolSpec | dict[str, Any]) -> dict[str, Any] | None:
    """The map from raw scores to [0, 1], as points."""
    learned: Calibration | None = None
    if card and isinstance(card.get("calibration"), Mapping):
        try:
            learned = Calibration.from_dict(card["calibration"])
        except (TypeError, ValueError, KeyError):
            learned = None
    if learned is None and isinstance(spec, ToolSpec):
        learned = spec.calibration or identity(spec.low, spec.high)
    if learned is None or not math.isfinite(learned.high - learned.low) or learned.low == learned.high:
        return None
    step = (learned.high - learned.low) / (CURVE - 1)
    raws = [learned.low + n * step for n in range(CURVE)]
    return {
        "method": learned.method,
        "points": [[rounded(raw, 6), rounded(learned(raw))] for raw in raws],
        "losses": [[name, _number(loss)] for name, loss in learned.losses.items()],
        "ranking": _number(learned.ranking),
        "good": learned.good,
        "bad": learned.bad,
        "lower_is_better": learned.lower_is_better,
    }


def _raw_histogram(raws: list[float]) -> dict[str, Any] | None:
    if not raws:
        return None
    low, high = min(raws), max(raws)
    if low == high:
        return {"low": rounded(low, 6), "high": rounded(high, 6), "bins": [len(raws)]}
    bins = [0] * RAW_BINS
    for raw in raws:
        bins[min(RAW_BINS - 1, int((raw - low) / (high - low) * RAW_BINS))] += 1
    return {"low": rounded(low, 6), "high": rounded(high, 6), "bins": bins}


# --- Shadow and canaries ----------------------------------------------------------------------------------------------


def _shadows(reading: Reading) -> dict[str, dict[str, Any]]:
    """By digest, what it gave without a say, and how far it ranks responses like the tools in place."""
    found: dict[str, dict[str, Any]] = {}
    points = len(reading.axes["train"].points)
    for digest, step, outcome, count, total, valued, seconds in reading.db.execute(
        "SELECT digest, s.step, outcome, COUNT(*), TOTAL(value), COUNT(value), TOTAL(seconds) FROM shadows AS s "
        "JOIN chosen AS c ON c.split = 'train' AND c.step = s.step AND c.attempt = s.attempt "
        "GROUP BY digest, s.step, outcome"
    ):
        one = found.setdefault(
            digest,
            {"n": 0, "first": step, "last": step, "outcomes": dict.fromkeys(OUTCOMES, 0), "seconds": 0.0}
            | {"pairs": 0, "alike": 0, "_t": [0.0] * points, "_n": [0] * points},
        )
        one["n"] += count
        one["first"], one["last"] = min(one["first"], step), max(one["last"], step)
        one["outcomes"][outcome] = one["outcomes"].get(outcome, 0) + count
        one["seconds"] += seconds
        point = reading.point("train", step)
        if point is not None:
            one["_t"][point] += total
            one["_n"][point] += valued
    for one in found.values():
        totals, counts = one.pop("_t"), one.pop("_n")
        one["means"] = [rounded(total / n) if n else None for total, n in zip(totals, counts, strict=True)]
        one["seconds"] = rounded(one["seconds"], 3)
    for group, rows in reading.shadows(shadowed(reading, CHECKED_GROUPS)).items():
        in_place = {row["session"]: row["value"] for row in reading.responses([group])[group]}
        values: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for row in rows:
            theirs = in_place.get(row["session"])
            if row["value"] is not None and theirs is not None:
                values[row["digest"]].append((row["value"], theirs))
        for digest, pairs in values.items():
            for number, (mine, theirs) in enumerate(pairs):
                for other_mine, other_theirs in pairs[:number]:
                    if abs(mine - other_mine) > 1e-9 and abs(theirs - other_theirs) > 1e-9 and digest in found:
                        found[digest]["pairs"] += 1
                        found[digest]["alike"] += (mine > other_mine) == (theirs > other_theirs)
    return found


def shadowed(reading: Reading, most: int) -> list[tuple[int, str]]:
    """Groups that count and that a tool in the shadow scored; at most so many, drawn."""
    sql = (
        "SELECT DISTINCT s.attempt, s.uid FROM shadows AS s "
        "JOIN grouped AS g ON g.uid = s.uid AND g.attempt = s.attempt"
    )
    return reading.some([(attempt, uid) for attempt, uid in reading.db.execute(sql)], most)


def _canaries(reading: Reading, library: LibraryView | None, tolerance: float) -> dict[str, list[dict[str, Any]]]:
    """By digest, what became of each answer whose score is known."""
    found: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    wanted = _wanted(reading, library)
    for digest, canary, step, outcome, value in reading.canaries():
        one = found[digest].setdefault(
            canary,
            {"canary": cut(canary, 60), "wanted": wanted.get((digest, canary), value), "n": 0, "failed": 0}
            | {"first": step, "last": step, "flipped": None, "got": None, "latest": None},
        )
        one["n"] += 1
        one["last"], one["latest"] = step, rounded(value)
        if outcome == "failed":
            one["failed"] += 1
            continue
        if one["wanted"] is None:
            one["wanted"] = value
        off = one["wanted"] is not None and (value is None or abs(value - one["wanted"]) > tolerance)
        if off and one["flipped"] is None:
            one["flipped"], one["got"] = step, rounded(value)
    for canaries in found.values():
        for one in canaries.values():
            one["wanted"] = rounded(one["wanted"])
    return {digest: list(canaries.values()) for digest, canaries in found.items()}


def _wanted(reading: Reading, library: LibraryView | None) -> dict[tuple[str, str], float]:
    """What a canary's exam says that it must get."""
    found = {}
    for (digest,) in reading.db.execute("SELECT DISTINCT digest FROM canaries").fetchall() if library else ():
        try:
            of_exam = library.canaries(digest) if library else []
        except LibraryError:
            continue
        for one in of_exam:
            if isinstance(one, Mapping) and isinstance(one.get("value"), int | float):
                found[digest, str(one.get("id"))] = float(one["value"])
    return found


def is_gate(spec: ToolSpec | dict[str, Any] | None) -> bool:
    """Whether a tool only says whether a response may score."""
    return isinstance(spec, ToolSpec) and spec.gate
