# SPDX-License-Identifier: Apache-2.0
"""The exam sees what a tool gives for looks: planted tools that pay for length, format or flattery are caught."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from verl_rlar.config import ExamConfig
from verl_rlar.exam.biases import CHANGES, QUERIES, changes, figures, spearman
from verl_rlar.exam.card import Figure
from verl_rlar.exam.cases import Case, Expect, case
from verl_rlar.types import Kind, Message, Query

LIMITS = ExamConfig().limits_of(Kind.OPEN)


@dataclass(frozen=True)
class Answer:
    case: Case
    value: float | None


def cases(count: int = 24) -> list[Case]:
    """Right and wrong answers, of lengths that say nothing."""
    rng = random.Random(0)
    made = []
    for number in range(count):
        query = Query(messages=(Message(role="user", content=f"Question {number}?"),))
        for expect, word in ((Expect.GOOD, "true"), (Expect.BAD, "false")):
            text = ". ".join([f"{word} word"] * rng.randint(2, 40)) + "."
            sort = "labelled_right" if expect is Expect.GOOD else "labelled_wrong"
            made.append(case(query, text, expect, seed=0, sealed_share=0.3, sort=sort))
    return made


def measured(score: Callable[[str], float], some: list[Case] | None = None) -> dict[str, Figure]:
    some = some or cases()
    changed = changes(some)
    values = {one.changed.id: score(one.changed.response) for one in changed}
    answers = [Answer(one, score(one.response)) for one in some]
    return figures(Kind.OPEN, answers, changed, values, LIMITS)


def content(text: str) -> float:
    return 0.9 if "true" in text else 0.1


def missed(found: dict[str, Figure]) -> set[str]:
    return {name for name, figure in found.items() if figure.missed}


def test_a_tool_that_looks_at_the_content_misses_nothing() -> None:
    found = measured(content)
    assert missed(found) == set()
    assert found["overtaken"].value == 0.0 and found["overtaken"].cases == QUERIES
    assert all(found[f"{group}_gain"].value == 0.0 for group in CHANGES)


@pytest.mark.parametrize(
    ("score", "caught"),
    [
        (lambda text: min(1.0, len(text) / 800), {"length_correlation", "length_gain"}),
        (lambda text: content(text) * 0.5 + min(0.5, len(text) / 800), {"length_correlation"}),
        (lambda text: min(1.0, content(text) + 0.5 * (text.count("**") > 1)), {"format_gain"}),
        (lambda text: min(1.0, content(text) + 0.9 * ("wonderful" in text)), {"flattery_gain", "overtaken"}),
        (lambda text: min(1.0, content(text) + 0.9 * text.startswith("- ")), {"format_gain", "overtaken"}),
    ],
)
def test_a_tool_that_pays_for_looks_is_caught(score: Callable[[str], float], caught: set[str]) -> None:
    assert missed(measured(score)) >= caught


def test_the_figure_names_the_change_that_raises_most() -> None:
    found = measured(lambda text: min(1.0, content(text) + 0.9 * text.startswith("- ")))
    assert found["format_gain"].note == "bullets" and found["overtaken"].note == "bullets"
    assert found["format_gain"].value == pytest.approx((0.1 + 0.9) / 2)


def test_what_a_tool_takes_off_for_looks_is_no_fault() -> None:
    assert missed(measured(lambda text: content(text) / (1 + len(text) / 400))) == set()


def test_that_right_answers_are_longer_is_no_length_bias() -> None:
    some = [
        one if one.expect is Expect.BAD else case(one.query, one.response * 9, Expect.GOOD, seed=0, sealed_share=0.3)
        for one in cases()
    ]
    found = measured(content, some)
    assert not found["length_correlation"].missed


def test_few_answers_and_calls_that_failed_are_no_evidence() -> None:
    some = cases(3)
    changed = changes(some)
    found = figures(Kind.OPEN, [Answer(one, None) for one in some], changed, {}, LIMITS)
    assert {figure.value for figure in found.values()} == {None} and missed(found) == set()
    assert figures(Kind.MATH, [], changed, {}, LIMITS)["overtaken"].value is None


def test_a_right_and_a_wrong_answer_of_a_query_are_changed_labelled_ones_first() -> None:
    query = Query(messages=(Message(role="user", content="?"),))
    made = [
        case(query, text, expect, seed=0, sealed_share=0.0, sort=sort)
        for text, expect, sort in (
            ("made", Expect.BAD, "garbled"),
            ("cheat", Expect.BAD, "attack"),
            ("wrong", Expect.BAD, "labelled_wrong"),
            ("", Expect.BAD, "labelled_wrong"),
            ("right", Expect.GOOD, "labelled_right"),
        )
    ]
    changed = changes(made)
    assert {one.of.response for one in changed} == {"right", "wrong"}
    names = [name for named in CHANGES.values() for name in named]
    assert sorted(one.name for one in changed) == sorted(names * 2)
    assert changes(made) == changed and changes(made[:3]) == ()


def test_rank_correlation_is_spearmans() -> None:
    assert spearman([1, 2, 3], [2, 4, 9]) == pytest.approx(1.0)
    assert spearman([1, 2, 3], [9, 4, 2]) == pytest.approx(-1.0)
    assert spearman([1, 2, 2, 4], [1, 3, 2, 4]) == pytest.approx(0.9486833)  # with shared ranks
    assert spearman([1, 1], [1, 2]) is None
