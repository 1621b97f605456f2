# SPDX-License-Identifier: Apache-2.0
"""A case: a query, a response, and what a tool must say of it.

A case file has one JSON object per line: a row as `rlar score` takes it, with a `response`, and

- ``expect``: ``good``, ``bad``, ``abstain``, or ``same_as:<id>`` (the same score as that case);
- ``id``: a name for ``same_as``; if absent, a hash of the content;
- ``sort``: what is wrong or different about the response, in one word; ``sealed``: true keeps it from agents.

Guarantees: the same content has the same id everywhere. Whether a case is sealed depends on its query alone (by a hash
that is keyed with the seed), so that all cases of a sealed query are sealed, and nothing is learned about it from open
ones.

Not covered: that whoever holds the data and the seed can work out what is sealed; an agent gets neither.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from verl_rlar.errors import DataError
from verl_rlar.features import describe
from verl_rlar.rows import query_of
from verl_rlar.types import Kind, Query, content_hash

SAME_AS = "same_as:"


class Expect(str, Enum):
    """What a tool must say of a response."""

    GOOD = "good"
    """It is right."""
    BAD = "bad"
    """It is wrong."""
    SAME = "same"
    """The same as of another response, of which it differs in something that does not matter."""
    ABSTAIN = "abstain"
    """Nothing: there is nothing to go by."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """See the module."""

    id: str
    """16 hex digits of a hash of the content, or the name in a case file."""
    query: Query
    response: str
    """Foreign text."""
    expect: Expect
    twin: str = ""
    """For `Expect.SAME`: id of the case that must have the same score."""
    sort: str = "given"
    """What sort of case it is: the generator's name, ``gold``, ``labelled``, ..."""
    origin: str = ""
    """Where it comes from: ``row 17``, ``attack 9``, ..."""
    mutant: bool = False
    """Whether the response is a right one with one thing wrong: these make the mutation score."""
    sealed: bool = False
    """Whether it is kept from agents, and from the text of a card."""

    @property
    def kind(self) -> Kind:
        """The query's kind."""
        return describe(self.query).kind


def case(query: Query, response: str, expect: Expect, *, seed: int, sealed_share: float, **fields: Any) -> Case:
    """A case with its id and its seal: the given one (``sealed``), or by its query if that is None."""
    sealed = fields.pop("sealed", None)
    return Case(
        id=content_hash([query.key, response, expect.value, fields.get("twin", "")])[:16],
        query=query,
        response=response,
        expect=expect,
        sealed=is_sealed(query, seed=seed, share=sealed_share) if sealed is None else sealed,
        **fields,
    )


def is_sealed(query: Query, *, seed: int, share: float) -> bool:
    """Whether the cases of a query are sealed."""
    digest = hashlib.blake2b(query.key.encode(), key=str(seed).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def read_cases(
    rows: Iterable[tuple[int, Mapping[str, Any] | DataError]],
    *,
    seed: int = 0,
    sealed_share: float = 0.3,
    name: str = "",
) -> tuple[Case, ...]:
    """The cases of a case file.

    Args:
        rows: Numbered rows, as `verl_rlar.row_files.read_rows` gives them.
        seed: Key of the seal.
        sealed_share: Share of the queries whose cases are sealed.
        name: Of the file, for messages.

    Raises:
        DataError: A row is no case; ids repeat; or ``same_as`` names no case. The message names the line.
    """
    at = f"{name}, line" if name else "line"
    cases: dict[str, tuple[int, Case]] = {}
    for number, row in rows:
        try:
            made = _case(row, number, seed, sealed_share)
        except DataError as error:
            raise DataError(f"{at} {number}: {error}") from None
        if made.id in cases and made != cases[made.id][1]:
            raise DataError(f"{at} {number}: the id {made.id!r} is taken by line {cases[made.id][0]}")
        cases.setdefault(made.id, (number, made))
    for number, made in cases.values():
        if made.expect is Expect.SAME and (made.twin not in cases or cases[made.twin][1].expect is Expect.SAME):
            raise DataError(f"{at} {number}: {SAME_AS}{made.twin} names no case with a verdict of its own")
    return tuple(made for _, made in cases.values())


def _case(row: Mapping[str, Any] | DataError, number: int, seed: int, sealed_share: float) -> Case:
    if isinstance(row, DataError):
        raise row
    response, expected = row.get("response"), row.get("expect")
    if not isinstance(response, str):
        raise DataError("no `response`, or it is no text")
    twin = expected.removeprefix(SAME_AS) if isinstance(expected, str) and expected.startswith(SAME_AS) else ""
    if not twin and expected not in ("good", "bad", "abstain"):
        raise DataError(
            ("no `expect`" if expected is None else f"`expect` is {expected!r}")
            + f"; it must be good, bad, abstain or {SAME_AS}<id>"
        )
    fields = {"sort": str(row.get("sort") or "given"), "origin": f"line {number}", "twin": twin}
    made = case(
        query_of(row),
        response,
        Expect.SAME if twin else Expect(expected),
        seed=seed,
        sealed_share=sealed_share,
        sealed=True if row.get("sealed") else None,
        **fields,
    )
    name = row.get("id")
    if name is None:
        return made
    return Case(**{**{key: getattr(made, key) for key in made.__dataclass_fields__}, "id": str(name)})
