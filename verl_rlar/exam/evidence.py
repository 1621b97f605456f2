# SPDX-License-Identifier: Apache-2.0
"""Cases out of rows of data, and the rows whose gold cannot be trusted.

From every row that the tool is for: a right answer made from its reference (`verl_rlar.planning.gold_answer`), answers
that the row labels (``response`` with ``is_correct``, ``correct`` or ``label``; ``chosen`` and ``rejected``), what the
generators make of a right answer, the right answer to another row, on some queries the attacks, and on some the right
answer with the reference taken away.

A tool that is examined on bad gold learns to reward what does not answer the question. So `gather` sets a row apart if
its gold is empty or says nothing ("N/A"), repeats the prompt, is in another language than the row asks for, is no
option of the question, has a length that no translation has, or is, as a longer text, the gold of other prompts, too;
and `screen` sets apart those whose right answers the majority of the tools in place reject. Rows that are set apart are
counted and named, and nothing is made of them.

Guarantees: a function of rows and seed; which rows are taken does not depend on their order.

Not covered: gold that fits its question's form and is wrong. Where no answer is labelled and only one tool is in place,
`screen` trusts it only if it runs the row's own tests.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from verl_rlar.errors import DataError
from verl_rlar.exam.attacks import attack_answers
from verl_rlar.exam.cases import Case, Expect, case, is_sealed
from verl_rlar.exam.generators import equal_answers, number_of, stated, wrong_answers
from verl_rlar.features import describe
from verl_rlar.planning import SUBJECTS, gold_answer
from verl_rlar.rows import query_of
from verl_rlar.scoring import Scorer
from verl_rlar.tools.rules.language import written_in
from verl_rlar.types import (
    Kind,
    Outcome,
    Query,
    Sample,
    ToolSpec,
    content_hash,
)

SAYS_NOTHING = frozenset({"n/a", "na", "none", "null", "nan", "nil", "?", "-", "unknown", "todo", "tbd", "no answer"})
REPEATED_FROM = 24
"""Letters and digits from which a gold answer that several prompts share is suspicious; short ones coincide."""
TRANSLATION_LENGTHS = (0.25, 4.0)
"""Length of a translation, in lengths of its source (from 30 characters)."""
ATTACKED = 3
"""Queries of each kind that are attacked."""
UNREFERENCED = 4
"""Queries that are asked again without their reference."""
AUTHORITIES = frozenset({Kind.UNIT_TESTS})
"""Kinds whose tools run the row's own tests: there, one tool's word is enough to doubt the gold."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a tool is examined on."""

    cases: tuple[Case, ...] = ()
    set_apart: tuple[tuple[str, str], ...] = ()
    """Where, and why, for every row whose gold is not trusted."""
    other_rows: int = 0
    """Rows that the tool is not for."""
    rows: int = 0
    """Rows that could be read."""
    bad: tuple[tuple[int, str], ...] = ()
    """Number and fault of each row that could not."""


@dataclass
class _Row:
    number: int
    query: Query
    kind: Kind
    gold: str | None
    labelled: list[tuple[str, bool]] = field(default_factory=list)

    @property
    def origin(self) -> str:
        return f"row {self.number}"


def gather(
    rows: Iterable[tuple[int, Mapping[str, Any] | DataError]],
    spec: ToolSpec,
    *,
    queries: int,
    seed: int = 0,
    sealed_share: float = 0.3,
) -> Evidence:
    """Makes the cases for a tool out of a data set.

    Args:
        rows: Numbered rows, as `verl_rlar.row_files.read_rows` gives them.
        spec: The tool. A gate gets nothing: whether a format is right is said by case files only.
        queries: Most queries of each kind.
        seed: Decides which rows are taken, what is changed, and what is sealed.
        sealed_share: Share of the queries that are sealed.
    """
    bad: list[tuple[int, str]] = []
    found: dict[str, _Row] = {}
    read = other = 0
    for number, raw in rows:
        try:
            if isinstance(raw, DataError):
                raise raw
            query = query_of(raw)
        except DataError as error:
            bad.append((number, str(error)))
            continue
        read += 1
        kind = describe(query).kind
        if kind not in spec.scope.kinds or spec.gate:
            other += 1
            continue
        row = found.setdefault(query.key, _Row(number, query, kind, gold_answer(query, kind)))
        row.labelled += [pair for pair in _labelled(raw) if pair not in row.labelled]
    apart: list[tuple[str, str]] = []
    trusted: dict[Kind, list[_Row]] = defaultdict(list)
    shared = _shared(found.values())
    for row in found.values():
        if row.gold is None and not row.labelled:
            other += 1
        elif fault := _fault(row, shared):
            apart.append((row.origin, fault))
        else:
            trusted[row.kind].append(row)
    cases: dict[str, Case] = {}
    for kind_rows in trusted.values():
        kind_rows.sort(key=lambda row: content_hash([seed, row.query.key]))
        golds: dict[bool, list[str]] = {True: [], False: []}  # by seal: an open case tells no sealed answer
        for row in kind_rows:
            if row.gold is not None:
                golds[is_sealed(row.query, seed=seed, share=sealed_share)].append(row.gold)
        for place, row in enumerate(kind_rows[:queries]):
            others = golds[is_sealed(row.query, seed=seed, share=sealed_share)]
            for made in _cases(row, others, spec, place, seed, sealed_share):
                cases.setdefault(made.id, made)
    return Evidence(cases=tuple(cases.values()), set_apart=tuple(apart), other_rows=other, rows=read, bad=tuple(bad))


def _labelled(row: Mapping[str, Any]) -> Iterable[tuple[str, bool]]:
    response = row.get("response")
    label = next((row[name] for name in ("is_correct", "correct", "label") if row.get(name) is not None), None)
    if isinstance(response, str) and label in (True, False):
        yield response, bool(label)
    for name, good in (("chosen", True), ("rejected", False)):
        texts = row.get(name)
        if isinstance(texts, list) and texts and isinstance(texts[-1], Mapping):  # a conversation: its last turn
            texts = texts[-1].get("content")
        for text in [texts] if isinstance(texts, str) else texts or ():
            if isinstance(text, str):
                yield text, good


def _cases(
    row: _Row, golds: Sequence[str], spec: ToolSpec, place: int, seed: int, sealed_share: float
) -> Iterable[Case]:
    rng = random.Random(content_hash([seed, row.query.key]))

    def make(response: str, expect: Expect, sort: str, query: Query = row.query, **fields: Any) -> Case:
        fields = {"origin": row.origin, "sort": sort} | fields
        return case(query, response, expect, seed=seed, sealed_share=sealed_share, **fields)

    good = row.gold if row.gold is not None else next((text for text, right in row.labelled if right), None)
    known = {text for text, right in row.labelled if right} | {good}
    if row.gold is not None:
        yield make(row.gold, Expect.GOOD, "gold")
    for text, right in row.labelled:
        yield make(text, Expect.GOOD if right else Expect.BAD, "labelled_right" if right else "labelled_wrong")
    if good is None:
        return
    twin = make(good, Expect.GOOD, "gold")
    for made in equal_answers(row.query, row.kind, good, rng):
        yield make(made.response, Expect.SAME, made.sort, twin=twin.id)
    for made in wrong_answers(row.query, row.kind, good, rng):
        if made.response not in known:
            yield make(made.response, Expect.BAD, made.sort, mutant=made.mutant)
    others = [other for other in golds if _differs(other, good)]
    if others:
        yield make(rng.choice(others), Expect.BAD, "other_reference")
    if place < ATTACKED and row.kind is not Kind.CONSTRAINTS:
        for mode, text in attack_answers(row.query):
            if row.kind is not Kind.JSON_SCHEMA or text.startswith("```"):
                yield make(text, Expect.BAD, "attack", origin=f"attack {mode}")
    if place < UNREFERENCED and spec.scope.needs_reference and SUBJECTS.get(row.kind) == "its reference":
        bare = replace(row.query, reference=None)
        yield make(good, Expect.ABSTAIN, "no_reference", query=bare, sealed=twin.sealed)


def _differs(one: str, other: str) -> bool:
    """Whether two gold answers surely say different things."""
    first, second = number_of(stated(one)), number_of(stated(other))
    if first is not None and second is not None:
        return first != second
    return (first is None) == (second is None) and _letters(stated(one)) != _letters(stated(other))


def _letters(text: str) -> str:
    return "".join(filter(str.isalnum, text.casefold()))


# --- Gold that cannot be trusted --------------------------------------------------------------------------------------


def _shared(rows: Iterable[_Row]) -> frozenset[str]:
    counts = Counter(_letters(row.gold) for row in rows if row.gold is not None and row.kind is not Kind.CHOICE)
    return frozenset(text for text, count in counts.items() if count > 1 and len(text) >= REPEATED_FROM)


def _fault(row: _Row, shared: frozenset[str]) -> str:
    """Why the gold of a row cannot be trusted; empty if nothing speaks against it."""
    if {text for text, good in row.labelled if good} & {text for text, good in row.labelled if not good}:
        return "the same answer is labelled right and wrong"
    if row.gold is None:
        return ""
    gold, prompt, extra = row.gold.strip(), row.query.prompt, row.query.extra
    if (not any(map(str.isalnum, gold)) and row.kind is not Kind.MATH) or gold.casefold() in SAYS_NOTHING:
        return "the gold answer says nothing"
    if _letters(gold) in shared:
        return "other prompts have the same gold answer"
    if len(gold) >= REPEATED_FROM and _letters(gold) == _letters(prompt):
        return "the gold answer repeats the prompt"
    if row.kind is Kind.TRANSLATION:
        target, source = extra.get("target_lang"), extra.get("source")
        if isinstance(target, str) and written_in(gold, target) is False:
            return f"the gold answer is not in the language that is asked for ({target})"
        if isinstance(source, str) and len(source) >= 30:
            if _letters(gold) == _letters(source):
                return "the gold answer repeats the source"
            if not TRANSLATION_LENGTHS[0] <= len(gold) / len(source) <= TRANSLATION_LENGTHS[1]:
                return f"the gold answer has {len(gold) / len(source):.2g} times the length of the source"
    if row.kind is Kind.CHOICE:
        options = extra.get("choices") or extra.get("options")
        letter = re.search(r"\(([A-Z])\)", gold)
        if letter and isinstance(options, (list, tuple)) and ord(letter[1]) - ord("A") >= len(options):
            return f"the gold answer is {letter[1]}, and there are {len(options)} options"
    return ""


async def screen(
    evidence: Evidence,
    scorer: Scorer,
    established: Sequence[ToolSpec],
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evidence:
    """Sets apart the rows whose right answers the tools in place reject.

    Args:
        evidence: What `gather` has found.
        scorer: Runs the tools.
        established: The tools in place, without the one that is examined.
        on_progress: Called with the number of queries that are done, and of all.
    """
    good: dict[str, list[Case]] = defaultdict(list)
    for made in evidence.cases:
        if made.expect is Expect.GOOD:
            good[made.query.key].append(made)
    doubted: dict[str, str] = {}
    for done, (key, cases) in enumerate(good.items()):
        kind = cases[0].kind
        judges = [spec for spec in established if kind in spec.scope.kinds and not spec.gate]
        votes = [await scorer.call(spec, Sample(query=c.query, response=c.response)) for spec in judges for c in cases]
        counted = [vote for vote in votes if vote.outcome in (Outcome.SCORED, Outcome.HACKED)]
        against = [vote for vote in counted if (vote.value or 0.0) < 0.5]
        if len(against) > len(counted) / 2 and (len(counted) >= 2 or kind in AUTHORITIES):
            names = ", ".join(sorted({vote.tool for vote in against}))
            doubted[key] = f"{len(against)} of {len(counted)} votes reject its right answers ({names})"
        on_progress(done + 1, len(good))
    apart = [(cases[0].origin, doubted[key]) for key, cases in good.items() if key in doubted]
    left = tuple(made for made in evidence.cases if made.query.key not in doubted)
    kept = {made.id for made in left}
    left = tuple(made for made in left if not made.twin or made.twin in kept)
    return replace(evidence, cases=left, set_apart=(*evidence.set_apart, *apart))
