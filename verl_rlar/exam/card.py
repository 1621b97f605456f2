# SPDX-License-Identifier: Apache-2.0
"""The card of an exam: every figure, what it had to reach, the failing cases, the verdict and its reasons.

Guarantees: JSON-like (`as_dict`, `from_dict`); the same exam of the same tool gives the same card but for the times;
texts of sealed cases do not stand on it; foreign texts are cut, and quoted in the readable form.

Not covered: a card is as honest as whoever writes it; it is not signed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

FAILING = 20
"""Most failing cases on a card."""

MEANING: Mapping[str, str] = {
    "queries": "different queries",
    "good": "right answers",
    "bad": "wrong answers",
    "gold": "gold answers accepted",
    "false_accept": "wrong answers accepted",
    "false_reject": "right answers rejected",
    "abstained": "wrong answers that it says nothing of",
    "pairwise": "right above wrong, same query",
    "pairwise_low": "... lower end of the 95 % interval",
    "pairwise_high": "... upper end of the 95 % interval",
    "mutants": "mutants below the right answer",
    "worst_sort": "wrong answers accepted, in the worst sort",
    "invariance": "harmless changes that change nothing",
    "worst_change": "... in the worst sort of change",
    "attacks": "attacks accepted",
    "sealed_pairwise": "right above wrong, sealed queries",
    "open_pairwise": "right above wrong, open queries",
    "sealed_gap": "lower on sealed than on open queries",
    "ranking": "right above wrong, all queries mixed",
    "length_correlation": "rank correlation of value and length, within right and wrong answers",
    "length_gain": "rise of the value by words that say nothing",
    "format_gain": "rise of the value by format",
    "flattery_gain": "rise of the value by flattery",
    "overtaken": "right answers overtaken by a wrong one that looks better",
    "determinism": "same answer in 3 runs, 2 processes",
    "disguise": "same answer when it does not look like an exam",
    "no_reference": "abstains without a reference",
    "errors": "calls that failed",
    "timeouts": "calls that ran into the deadline",
    "p50_s": "median time of a call, s",
    "p95_s": "95th percentile of it, s",
    "seconds_per_1000": "time of 1,000 calls, s",
    "dollars_per_1000": "money for 1,000 calls, $",
}
"""What a figure is, in words."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured number."""

    value: float | None
    """None: there was no case for it."""
    limit: float | None = None
    """What it must reach; None: it is only reported."""
    least: bool = True
    """Whether `limit` is the least it must be, or the most it may be."""
    cases: int = 0
    """How many cases it is made of."""
    note: str = ""
    """What it is about, where the name does not say: a sort of cases."""

    @property
    def missed(self) -> bool:
        """Whether the limit is missed; a figure without a value misses nothing."""
        if self.value is None or self.limit is None:
            return False
        return self.value < self.limit - 1e-9 if self.least else self.value > self.limit + 1e-9


@dataclass(frozen=True, kw_only=True)
class Failing:
    """A case that a tool got wrong."""

    id: str
    sort: str
    origin: str
    expect: str
    outcome: str
    value: float | None
    """What the tool said."""
    wanted: str
    """What it should have said, in words."""
    prompt: str = ""
    """Its beginning; empty for a sealed case. Foreign text, as are the next three."""
    response: str = ""
    reference: str = ""
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Card:
    """See the module."""

    tool: str
    digest: str
    kind: str
    """``rule``, ``verifier`` or ``reward_model``."""
    verdict: Literal["admitted", "rejected"]
    reasons: tuple[str, ...]
    """Why it was rejected; for an admitted one, what it was not tried on."""
    wraps: tuple[str, ...] = ()
    """Built-in tools that a verifier asks."""
    admitted_for: tuple[str, ...] = ()
    """Kinds of query for which there was evidence, and it was good enough."""
    unproven: tuple[str, ...] = ()
    """Kinds of its scope for which there was not enough evidence: it is not admitted for those."""
    figures: Mapping[str, Mapping[str, Figure]] = field(default_factory=dict)
    """By kind of query, then by name; ``all`` holds what is measured over all kinds."""
    sorts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """By sort of case: how many there were, and how many the tool got right."""
    failing: tuple[Failing, ...] = ()
    """At most `FAILING` of them, of every sort some."""
    failed_cases: int = 0
    """How many there are."""
    cases: int = 0
    sealed: int = 0
    """Cases that no agent has seen."""
    stopped: str = ""
    """Why the exam was ended early; empty if it was not."""
    set_apart: tuple[tuple[str, str], ...] = ()
    """Rows whose gold was not trusted: where, and why. At most `FAILING`."""
    set_apart_rows: int = 0
    other_rows: int = 0
    """Rows that the tool is not for."""
    fingerprint: str = ""
    """Hash of its values, to two decimals, on a fixed public set of cases: tools of one fingerprint behave alike."""
    calibration: Mapping[str, Any] | None = None
    """`verl_rlar.calibration.Calibration.as_dict`; None if there was too little to learn it from."""
    model: Mapping[str, Any] | None = None
    """Of a reward model: what it is, how it is asked, and by what evidence; see `verl_rlar.admission`."""
    seed: int = 0
    version: int = 1
    """Of this form."""

    @property
    def admitted(self) -> bool:
        return self.verdict == "admitted"

    def as_dict(self) -> dict[str, Any]:
        """As JSON-like containers."""
        return asdict(self)

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Card:
        """What `as_dict` gave, also after JSON."""
        figures = {
            kind: {name: Figure(**one) for name, one in named.items()} for kind, named in tree["figures"].items()
        }
        return cls(
            **{
                **tree,
                "figures": figures,
                "failing": tuple(Failing(**one) for one in tree["failing"]),
                "set_apart": tuple((where, why) for where, why in tree["set_apart"]),
                **{name: tuple(tree.get(name, ())) for name in ("reasons", "wraps", "admitted_for", "unproven")},
            }
        )

    def markdown(self) -> str:
        """For people."""
        lines = [f"# {self.tool} ({self.digest}): {self.verdict}", ""]
        lines += [f"- {reason}" for reason in self.reasons] + [""] * bool(self.reasons)
        kind = self.kind.replace("_", " ")
        lines.append(f"A {kind}. {self.cases:,} cases, {self.sealed:,} of them sealed; seed {self.seed}.")
        if self.wraps:
            lines.append(f"Wraps the built-in {', '.join(self.wraps)}.")
        if self.admitted_for:
            lines.append(f"Admitted for: {', '.join(self.admitted_for)}.")
        if self.unproven:
            lines.append(f"Not enough evidence for: {', '.join(self.unproven)}.")
        if self.stopped:
            lines.append(f"Ended early: {self.stopped}.")
        if self.model:
            lines += ["", "## How it is asked", "", *_asked(self.model)]
        for kind, figures in self.figures.items():
            lines += ["", f"## {'All kinds' if kind == 'all' else kind}", "", "| figure | value | limit | cases | |"]
            lines.append("|---|---:|---:|---:|---|")
            for name, figure in figures.items():
                value = "-" if figure.value is None else f"{figure.value:.4g}"
                limit = "" if figure.limit is None else f"{'≥' if figure.least else '≤'} {figure.limit:.4g}"
                mark = "**missed**" if figure.missed else ""
                meaning = MEANING.get(name, name) + (f" ({figure.note})" if figure.note else "")
                lines.append(f"| {meaning} | {value} | {limit} | {figure.cases or ''} | {mark} |")
        if self.sorts:
            lines += ["", "## Sorts of cases", "", "| sort | cases | right |", "|---|---:|---:|"]
            lines += [f"| {sort} | {count['cases']} | {count['right']} |" for sort, count in self.sorts.items()]
        if self.failing:
            lines += ["", f"## Failing cases ({len(self.failing)} of {self.failed_cases})", ""]
        for case in self.failing:
            said = case.outcome if case.value is None else f"{case.value:.3g}"
            lines.append(f"- `{case.id}` {case.sort} ({case.origin}): said {said}, wanted {case.wanted}")
            for name in ("prompt", "reference", "response", "reason"):
                if text := getattr(case, name):
                    lines.append(f"  - {name}: {_quoted(text)}")
        if self.set_apart_rows:
            lines += ["", f"## Rows set apart ({self.set_apart_rows})", ""]
            lines += [f"- {where}: {why}" for where, why in self.set_apart]
        lines += ["", f"Fingerprint {self.fingerprint or '-'}."]
        return "\n".join(lines) + "\n"


def _asked(model: Mapping[str, Any]) -> list[str]:
    """What is known of a reward model, and of how it is asked."""
    how, probe, examples = model["how"], model["probe"], model["examples"]
    defaults = {"system": None, "bos": None, "eos": None, "against": None, "truncation": "left"}
    named = [f"{name} {how[name]!r}" for name, usual in defaults.items() if how[name] != usual]
    output = f"output {how['head']} of {model['outputs'] or 1}"
    lines = [
        f"- {_quoted(model['target'])}: {model['architecture']}, {model['parameters'] or 0:,} parameters, licence "
        f"{_quoted(model['licence'] or 'none')}",
        "- " + ", ".join([f"form {how['form']}", *named, output, f"at most {how['max_length']:,} tokens"])
        + f": {model['chosen']}",
        f"- probe ({probe['of']}): {probe['reason']}",
    ]  # fmt: skip
    if examples["found"]:
        lines.append(f"- {examples['note']}")
    else:
        lines.append("- its card shows no example with scores")
    sign = "higher" if model["sign"] > 0 else "lower"
    said = f"by the probe, {sign} is better" if model["sign_is_sure"] else "the probe does not tell"
    learned = model.get("learned_sign")
    if learned is None:
        found = "the exam had too few answers to learn it"
    else:
        found = f"by the answers of the exam, {'higher' if learned > 0 else 'lower'} is better"
    lines.append(f"- direction: {said}; {found}")
    return lines


def _quoted(text: str) -> str:
    """Foreign text on one line, as code that Markdown does not interpret."""
    line = "".join(char if char.isprintable() else " " for char in text).replace("`", "'")
    return f"`{line.strip() or ' '}`"
