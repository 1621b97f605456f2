# SPDX-License-Identifier: Apache-2.0
"""Rules `multiple_choice`, `exact_match` and `token_f1`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_rlar.sandbox.reading import TAIL, normalise
from verl_rlar.tools.rules.choice import multiple_choice
from verl_rlar.tools.rules.text import exact_match, token_f1
from verl_rlar.types import Message, Query, Sample

CITIES = {"choices": ["London", "Berlin", "Paris", "Rome"]}


def sample(reference: str | None, response: str, extra: Mapping[str, Any] = CITIES, prompt: str = "") -> Sample:
    messages = (Message(role="user", content=prompt),)
    return Sample(query=Query(messages=messages, reference=reference, extra=extra), response=response)


@pytest.mark.parametrize(
    "response",
    [
        "C", "c", "(C)", "(c)", "C.", "**C**", "C) Paris", "C: Paris", "C - Paris", "Paris", "paris.", "Option C",
        "The answer is (C)", "The answer is C.", "The answer is c", "The answer is: **C**", "Answer: C", "Answer:\nC",
        "Answer: C) Paris", "The answer is Paris.", "The correct answer is **C) Paris**.",
        "the correct option is (C) Paris.",
        "The answer is option C because it is.", "The correct answer to the question is C", "I would choose C",
        r"The answer is \(C\)", r"The answer is \[C\]", "The answer is `C`.", "<answer>C</answer>", r"\(C\)",
        r"\boxed{C}", r"$\boxed{\text{C}}$", r"\boxed{\text{(C)}}", r"\boxed{C. Paris}", r"\boxed{Paris}",
        "(A) is wrong since it is in England, (B) is too far north. So the answer is (C).",
        "A) no\nB) no\nSo it must be **(C)**.", "A is in England, B in Germany.\n\nC",
        "C) Paris\n\nBecause London (A) is not in France.",
        "Option C is correct.", "So **option (C)** is the correct one, as A is in England.", "Answer c is right.",
        "The answer is C. Option A is right about the river only.", "The answer is C. Option A is correct if so.",
        "#### C", "A is in England.\n\n### (C) Paris", "Option A is correct? No: option C is correct.",
        "<think>A? B?</think>\nC", "A</think>C", "First I thought the answer is A. No: the answer is C.",
    ],
)  # fmt: skip
def test_the_choice_is_found(response: str) -> None:
    assert multiple_choice(sample("C", response)).value == 1.0
    assert multiple_choice(sample("B", response)).value == 0.0


@pytest.mark.parametrize(
    "response",
    [
        "", "I do not know", "A or C", "The answer is A or C", "The answer is C and D.", "(A) and (C)", "(C) (D)",
        "Answer: C, D",
        r"\boxed{A, C}", r"\boxed{C} or D? \boxed{A}", "A,B,C,D", "ABCD", "**A** **B** **C**", "A\nB\nC\nD",
        "C) London", "<think>The answer is C.", r"The answer is \(A\) or \(C\)", "<answer>A, C</answer>",
        "Option C is not correct.", "# A\n# B\n# C",
        "A) London\nB) Berlin\nC) Paris\nD) Rome", "The answer is C) Rome", "The answer is (A) (B) (C) (D)",
    ],
)  # fmt: skip
def test_no_choice_or_several_score_0(response: str) -> None:
    assert multiple_choice(sample("C", response)).value == 0.0


@pytest.mark.parametrize("reference", ["C", "(C)", "c", "C.", "Paris", "C) Paris", r"\text{(C)}"])
def test_the_reference_may_be_a_letter_or_the_text_of_an_option(reference: str) -> None:
    assert multiple_choice(sample(reference, "C")).value == 1.0
    assert multiple_choice(sample(reference, "A")).value == 0.0


@pytest.mark.parametrize("reference", [None, "", "E", "Madrid", "7"])
def test_a_reference_that_is_no_option_makes_it_abstain(reference: str | None) -> None:
    assert multiple_choice(sample(reference, "C")).value is None


@pytest.mark.parametrize(
    ("options", "reference", "right", "wrong"),
    [
        (["3", "-3", "5", "7"], "B", [r"\boxed{-3}", "The answer is -3", "B) -3", "B"], [r"\boxed{3}", "A) 3", "3"]),
        (["3", "-3", "5", "7"], "-3", [r"\boxed{-3}", r"\boxed{\text{B}}", "\u22123"], ["3", "A"]),
        (["15", "2", "3", "4"], "A", ["15", "A) 15"], ["1.5", r"\boxed{1.5}"]),
        (["x^2+1", "2x", "x", "1"], "A", ["x^2+1", "A) x^2+1"], ["x^2-1", r"\boxed{x^2-1}"]),
        (["C", "C++", "C#", "Ruby"], "B", ["The answer is C++.", "B) C++"], ["The answer is C#.", "D"]),
        (
            ["a well-being index", "and/or", "COVID-19", "T-cell"],
            "A",
            ["wellbeing index", "A - a well-being index"],
            ["D"],
        ),
        (["a well-being index", "and/or", "COVID-19", "T-cell"], "C", ["COVID19", "COVID-19."], ["andor"]),
        (["x^2 + 1", "x^3 + 1"], "A", ["x\u00b2 + 1", "The answer is x\u00b2 + 1."], ["x\u00b3 + 1"]),
        (["12 m\u00b2", "24 m\u00b2"], "12 m^2", ["12 m^2", "The answer is 12 m\u00b2."], ["24 m^2"]),
        (["-4", "4"], "A", ["The answer is - 4", "- 4", "-4"], ["4", "The answer is 4"]),
        (["Paris", "London"], "A", ["> **Paris**", "**Answer:** -> Paris", "A - Paris"], ["A -> London", "A = London"]),
    ],
)
def test_signs_tell_options_apart_and_hyphens_of_words_do_not(
    options: list[str], reference: str, right: list[str], wrong: list[str]
) -> None:
    for response in right:
        assert multiple_choice(sample(reference, response, {"choices": options})).value == 1.0, response
    for response in wrong:
        assert multiple_choice(sample(reference, response, {"choices": options})).value == 0.0, response


@pytest.mark.parametrize(
    ("choices", "reference", "response", "right"),
    [
        (["Paris", "London"], "B", "The answer is A) London.", False),
        (["Paris", "London"], "B", r"\boxed{A) London}", False),
        (["12", "15"], "B", "The answer is A. 15", False),
        (["Paris", "London"], "A", "The answer is A) Paris.", True),
        (["A lion", "A cat"], "A", "The answer is a lion.", True),
        (["15", "-15"], "A", "The answer is A - 15", True),
        (["15", "-15"], "A", "**A – 15**", True),
        (["-15", "15"], "B", "The answer is B – 15", True),
        (["H+", "OH-", "Na+", "Cl-"], "B", r"\boxed{OH^-}", True),
    ],
)
def test_the_first_letter_is_no_article_and_a_dash_no_minus(
    choices: list[str], reference: str, response: str, right: bool
) -> None:
    assert multiple_choice(sample(reference, response, {"choices": choices})).value == float(right)


@pytest.mark.parametrize(
    "extra",
    [
        {"choices": {"label": ["A", "B", "C", "D"], "text": ["London", "Berlin", "Paris", "Rome"]}},
        {"options": {"A": "London", "B": "Berlin", "C": "Paris", "D": "Rome"}},
        {"choices": ("A) London", "B) Berlin", "C) Paris", "D) Rome")},
    ],
)
def test_options_come_in_several_shapes(extra: Mapping[str, Any]) -> None:
    assert multiple_choice(sample("Paris", "C", extra)).value == 1.0


def test_options_are_read_from_the_prompt() -> None:
    prompt = "What is 2 + 2?\nA) 3\nB) 4\nC) 5"
    assert multiple_choice(sample("B", "4", {}, prompt)).value == 1.0
    assert multiple_choice(sample("D", "B", {}, prompt)).value is None


@settings(deadline=None)
@given(
    right=st.sampled_from("ABCD"),
    chosen=st.sampled_from("ABCD"),
    wrapper=st.sampled_from(["{}", "({})", "The answer is {}.", r"\boxed{{{}}}"]),
)
def test_exactly_the_right_letter_scores_1(right: str, chosen: str, wrapper: str) -> None:
    assert multiple_choice(sample(right, wrapper.format(chosen))).value == float(right == chosen)


HOSTILE = [
    "a ",
    "(",
    "A ",
    "(A) ",
    "answer ",
    "answer is ",
    "answer to ",
    "*",
    r"\boxed{",
    "the ",
    "\n",
    "A) x\n",
    "Answer:\n",
    "_ ",
]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("unit", HOSTILE)
def test_hostile_responses_get_a_verdict_in_bounded_time(unit: str) -> None:
    response = unit * (2 * TAIL // len(unit))
    assert multiple_choice(sample("C", response)).value == 0.0
    assert exact_match(sample("Paris", response)).value == 0.0
    assert token_f1(sample("Paris", response)).value == 0.0


@pytest.mark.parametrize(
    "response",
    ["The Eiffel Tower", "eiffel tower", "  Eiffel\ttower! ", "Ｅｉｆｆｅｌ Tower",
     "Long story.\nAnswer: the Eiffel Tower.", "**Answer:**\n\nThe Eiffel Tower", "Answer:\nEiffel Tower",
     "<answer>Eiffel Tower</answer>", "<think>hm</think>\n<answer> Eiffel Tower </answer>",
     r"So \boxed{\text{Eiffel Tower}}.", "<think>Big Ben?</think>Eiffel Tower"],
)  # fmt: skip
def test_exact_match_forgives_case_articles_punctuation_and_spaces(response: str) -> None:
    assert exact_match(sample("The Eiffel tower", response, {})).value == 1.0
    assert token_f1(sample("The Eiffel tower", response, {})).value == 1.0


def test_exact_match_does_not_forgive_words() -> None:
    for response in ("Eiffel", "Eiffel Tower Paris", "", "!", "Tower Eiffel"):
        assert exact_match(sample("Eiffel Tower", response, {})).value == 0.0


def test_any_of_several_accepted_answers_counts() -> None:
    assert exact_match(sample("USA", "United States", {"answers": ["United States", "US"]})).value == 1.0
    assert token_f1(sample("USA", "the US", {"answers": ["United States", "US"]})).value == 1.0


def test_a_reference_without_words_makes_it_abstain() -> None:
    for reference in (None, "", "...", "the"):
        assert exact_match(sample(reference, "x", {})).value is None
        assert token_f1(sample(reference, "x", {})).value is None


def test_token_f1_is_squads() -> None:
    verdict = token_f1(sample("the Eiffel Tower", "tower of Eiffel", {}))
    assert verdict.value == pytest.approx(0.8)
    assert verdict.details == {"precision": pytest.approx(2 / 3), "recall": 1.0}


@given(st.text(max_size=60), st.text(max_size=60))
def test_f1_is_symmetric_bounded_and_1_on_itself(left: str, right: str) -> None:
    if not normalise(left) or not normalise(right) or any(mark in left + right for mark in ("answer", "\\", "<")):
        return
    forth, back = token_f1(sample(left, right, {})).value, token_f1(sample(right, left, {})).value
    assert forth is not None and forth == pytest.approx(back) and 0.0 <= forth <= 1.0
    assert token_f1(sample(left, left, {})).value == pytest.approx(1.0)


@given(st.text(max_size=80))
def test_normalising_twice_changes_nothing(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("<answer>Paris</answer>\nWhat stands in the <answer> tag is final.", True),
        ("Rome <Answer>Paris</Answer>", True),
        ("<answer>Rome</answer> no: <answer>Paris</answer>", True),
        ("It is <answer>Paris", True),
        ("<answer>Paris</answer><answer>Rome</answer>", False),
    ],
)
def test_the_last_pair_of_answer_tags_holds_the_answer(response: str, right: bool) -> None:
    assert exact_match(sample("Paris", response, {})).value == float(right)
