# SPDX-License-Identifier: Apache-2.0
"""Canaries: answers whose score is known, which are scored again, as live ones are, while a training runs.

A tool that passed an exam has canaries from it, right and wrong answers that it told apart; they stand with its card. A
tool that needs no exam has some of the public set; what it gives for them at first is what it must give later on.

Guarantees: a function of the exam's answers, or of the tool's scope; a canary looks like a response of the training.

Not covered: a tool that knows its canaries, as it has seen them before.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from verl_rlar.errors import DataError
from verl_rlar.exam.cases import Expect
from verl_rlar.exam.public import public_cases
from verl_rlar.exam.trial import Answer
from verl_rlar.ledger import query_text
from verl_rlar.rows import query_of
from verl_rlar.types import Outcome, Query, Sample, ToolSpec, content_hash


@dataclass(frozen=True, kw_only=True)
class Canary:
    """See the module."""

    id: str
    """16 hex digits of a hash of the content."""
    query: Query
    response: str
    """Foreign text."""
    expect: str
    """``good``, ``bad``, or empty where nobody has said."""
    value: float | None = None
    """What the tool gave in the exam, in [0, 1]; None: what it gives at first."""

    def flips(self, value: float | None, tolerance: float) -> bool:
        """Whether a value (None: the tool abstains, or failed) is another one than it must be."""
        return self.value is not None and (value is None or abs(value - self.value) > tolerance)

    def sample(self, step: int) -> Sample:
        """The canary as a response of a training step."""
        number = int(content_hash([self.id, step])[:12], 16)
        return Sample(
            query=self.query,
            response=self.response,
            step=step,
            uid=f"{number:012x}",
            session=number % 8,
            group_size=8,
        )


def of_exam(answers: Sequence[Answer], count: int) -> tuple[Canary, ...]:
    """Canaries out of an exam: right and wrong answers that the tool told apart, sealed ones first, of many queries.

    Args:
        answers: What the tool said of its cases.
        count: Most of them; half are right answers, half wrong ones.
    """
    chosen: list[Answer] = []
    for expect, share in ((Expect.GOOD, (count + 1) // 2), (Expect.BAD, count // 2)):
        told = [
            answer
            for answer in answers
            if answer.case.expect is expect
            and answer.score.outcome is Outcome.SCORED
            and answer.value is not None
            and (answer.value >= 0.5) == (expect is Expect.GOOD)
        ]
        told.sort(key=lambda answer: (not answer.case.sealed, answer.case.id))
        firsts = {answer.case.query.key: answer for answer in told[::-1]}  # one of every query
        chosen += sorted(firsts.values(), key=lambda answer: (not answer.case.sealed, answer.case.id))[:share]
    return tuple(
        Canary(
            id=answer.case.id,
            query=answer.case.query,
            response=answer.case.response,
            expect=answer.case.expect.value,
            value=answer.value,
        )
        for answer in chosen
    )


def public(spec: ToolSpec, count: int) -> tuple[Canary, ...]:
    """Canaries of a tool that had no exam: cases of the public set, from all of its kinds of query."""
    cases = list(public_cases(spec.scope.kinds))
    count = min(count, len(cases))
    chosen = [cases[number * (len(cases) - 1) // max(1, count - 1)] for number in range(count)]
    return tuple(
        Canary(id=content_hash([query.key, response])[:16], query=query, response=response, expect="")
        for query, response in chosen
    )


def to_json(canaries: Iterable[Canary]) -> list[dict[str, Any]]:
    """As JSON-like values."""
    return [
        {
            "id": one.id,
            "query": json.loads(query_text(one.query)),
            "response": one.response,
            "expect": one.expect,
            "value": one.value,
        }
        for one in canaries
    ]


def from_json(values: Iterable[Mapping[str, Any]]) -> tuple[Canary, ...]:
    """The inverse of `to_json`.

    Raises:
        DataError: They are no canaries.
    """
    try:
        return tuple(
            Canary(
                id=str(one["id"]),
                query=query_of(one["query"]),
                response=str(one["response"]),
                expect=str(one["expect"]),
                value=None if one["value"] is None else float(one["value"]),
            )
            for one in values
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"these are no canaries ({type(error).__name__}: {error})") from None
