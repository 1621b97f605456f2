# SPDX-License-Identifier: Apache-2.0
"""What a row is taken for, seen from the row alone."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import make_query

from verl_rlar.features import describe
from verl_rlar.row_files import read_rows
from verl_rlar.rows import query_of
from verl_rlar.types import Kind, Query

QUESTION = "What is it?"
OPTIONS = "Which is the capital of France?\nA) Rome\nB) Paris\nC) Bern"


def kind_of(reference: str | None, prompt: str = QUESTION, **extra: Any) -> Kind:
    return describe(make_query(prompt, reference, **extra)).kind


@pytest.mark.parametrize(
    "reference",
    [
        *(
            "42",
            "-3.5",
            ".35625",
            "1,234",
            "$18",
            "1.5e-3",
            "3/4",
            "50%",
            "50\\%",
            "25°",
            "16 students",
            "5 cm^2",
            "60 km/h",
        ),
        *("$18 per hour", "5 miles per hour", "12 square units", "8 cubic feet", "90^\\circ", "5 \\text{ cm}"),
        *(
            "864 \\mbox{ inches}^2",
            "\\$32,348",
            "11,\\! 111,\\! 100",
            "52_8",
            "2k",
            "3 + 4i",
            "x^3+3x-6",
            "p - q",
            "x=5",
        ),
        *("\\frac{3}{4}", "$\\frac{3}{4}$", "\\(\\pi\\)", "\\cot x", "-\\sqrt{3}", "y = 2x + 3", "10, 12"),
        *("(3, \\frac{\\pi}{2})", "(1,2)", "[0,1)", "(-\\infty,3]", "{1,2}", "\\{1,2\\}", "x \\in [-2,7]"),
        *("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\text{Evelyn}", "\\text{(C)}", "\\text{June 20}"),
        "She eats 3, so 9 are left. 9 * 2 = <<9*2=18>>18.\n#### 18",
        "By symmetry the two are equal, and adding them up gives us the total of \\boxed{7}.",
    ],
)
def test_numbers_units_latex_intervals_and_tuples_are_mathematics(reference: str) -> None:
    assert kind_of(reference) is Kind.MATH


@pytest.mark.parametrize(
    "reference",
    [
        "Paris",
        "K",
        "e",
        "12 Angry Men",
        "5 o'clock",
        "10:30",
        "C:\\Users\\bob",
        "No solution",
        "H2O",
        "C++",
        "T-shirt",
        "U.S.",
    ],
)
def test_names_and_words_are_short_texts(reference: str) -> None:
    assert kind_of(reference) is Kind.SHORT_TEXT


@pytest.mark.parametrize(
    "reference",
    [
        "Photosynthesis is how plants turn light, water and carbon dioxide into sugar and oxygen, in their leaves.",
        "光合作用是植物利用阳光将水和二氧化碳转化为糖和氧气的过程" * 6,
        "#### Introduction\nFirst one mixes the flour with the water, then one lets the dough rest until morning.",
        "The function $\\frac{1}{x}$ is not continuous at zero, because its limits there are infinite.",
        None,
    ],
)
def test_prose_and_nothing_are_open(reference: str | None) -> None:
    assert kind_of(reference) is Kind.OPEN


@pytest.mark.parametrize("reference", ["B", "(B)", "B.", "b"])
def test_a_letter_is_a_choice_where_the_prompt_lists_options(reference: str) -> None:
    assert kind_of(reference, OPTIONS) is Kind.CHOICE
    assert kind_of(reference, "Capital of France? (A) Rome (B) Paris (C) Bern") is Kind.CHOICE
    assert kind_of(reference, "Capital of France? A. Rome B. Paris C. Bern") is Kind.CHOICE
    assert kind_of(reference, QUESTION) is Kind.SHORT_TEXT, "without options a letter is a text"


def test_a_column_of_options_makes_a_choice_of_any_reference() -> None:
    assert kind_of("Paris", choices=["Rome", "Paris"]) is Kind.CHOICE
    assert kind_of("Paris", choices=[]) is Kind.SHORT_TEXT
    assert kind_of("Paris", choices=float("nan")) is Kind.SHORT_TEXT, "pandas writes missing lists as NaN"


@pytest.mark.parametrize("column", ["test", "tests", "test_list", "unit_tests", "input_output"])
def test_a_column_of_tests_makes_code(column: str) -> None:
    assert (
        kind_of(None, "def add(a, b):", **{column: "def check(candidate):\n    assert candidate(1, 2) == 3"})
        is Kind.UNIT_TESTS
    )
    assert kind_of(None, "def add(a, b):", **{column: ["assert add(1, 2) == 3"]}) is Kind.UNIT_TESTS
    assert kind_of("4", QUESTION, **{column: False}) is Kind.MATH, "a flag is no test"


@pytest.mark.parametrize(
    "reference",
    [
        {"inputs": ["1 2\n"], "outputs": ["3\n"]},
        {"fn_name": "add", "inputs": [[1, 2]], "outputs": [3]},
        [{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}],
        {"functional": "assert add(1, 2) == 3"},
        "assert add(1, 2) == 3\nassert add(2, 2) == 4",
        "def check(candidate):\n    assert candidate(1, 2) == 3",
        ["assert add(1, 2) == 3", "assert add(2, 2) == 4"],
        "class TestAdd(unittest.TestCase):\n    def test_a(self):\n        self.assertEqual(add(1, 2), 3)",
    ],
)
def test_tests_as_reference_make_code_and_nothing_else(reference: Any) -> None:
    row = {"prompt": "Add two numbers.", "reward_model": {"ground_truth": reference}}
    assert [kind for kind, _ in describe(query_of(row)).kinds] == [Kind.UNIT_TESTS]


@pytest.mark.parametrize(
    "prompt",
    [
        "Translate the following English text into German:\n\nGood morning.",
        "Translate to French: good morning",
        "Please provide a German translation of the sentence below.\nGood morning.",
        "I need help with translating this into Brazilian Portuguese: good morning",
    ],
)
def test_a_prompt_that_asks_for_a_translation_makes_one(prompt: str) -> None:
    assert kind_of("Guten Morgen.", prompt) is Kind.TRANSLATION


def test_a_column_with_the_target_language_makes_a_translation() -> None:
    assert kind_of("Guten Morgen.", "Good morning.", target_lang="de") is Kind.TRANSLATION


def test_the_word_translate_alone_makes_no_translation() -> None:
    assert kind_of("(3, \\text{and } 4)", "Translate the point (1,2) by two to Right and down.") is Kind.MATH
    assert kind_of("King James", "Which translation of the Bible is best known?") is Kind.SHORT_TEXT


def test_constraints_and_schemas_come_before_the_reference() -> None:
    both = describe(make_query(QUESTION, "42", instruction_id_list=["punctuation:no_comma"], kwargs=[{}]))
    assert [kind for kind, _ in both.kinds][:2] == [Kind.CONSTRAINTS, Kind.MATH]
    assert kind_of(None, json_schema={"type": "object"}) is Kind.JSON_SCHEMA


def test_constraints_survive_parquet_and_numpy(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    extra = {"instruction_id_list": ["punctuation:no_comma", "keywords:existence"], "kwargs": [{}, {"keywords": ["a"]}]}
    rows = [{"prompt": [{"role": "user", "content": "Write."}], "extra_info": extra} for _ in range(2)]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    frame = parquet.read_table(tmp_path / "rows.parquet").to_pandas()
    for row in (*(row for _, row in read_rows(str(tmp_path / "rows.parquet"))), *frame.to_dict("records")):
        assert isinstance(row, dict)
        assert describe(query_of(row)).kind is Kind.CONSTRAINTS


@pytest.mark.parametrize("name", ["openai/gsm8k", "humaneval", "translate to German", "", "multiple_choice"])
def test_renaming_the_data_source_changes_nothing(name: str) -> None:
    queries: list[Query] = [
        make_query(QUESTION, "42"),
        make_query(OPTIONS, "B"),
        make_query("Say hello.", None),
        make_query("Translate to German: hi", "Hallo zusammen"),
        make_query("def f():", None, test="assert f()"),
    ]
    for query in queries:
        assert describe(replace(query, data_source=name)) == describe(query)


def test_gates_are_what_the_row_demands() -> None:
    assert describe(make_query(QUESTION, "42")).gates == ()
    assert describe(make_query(QUESTION, "42", format="think")).gates == ("think_format",)
    assert describe(make_query(QUESTION, "42", max_words=0)).gates == ("length_limits",), "a limit of 0 is a limit"
    assert describe(make_query(QUESTION, "42", max_words=float("nan"))).gates == ()


@pytest.mark.parametrize(
    "unit", ["#", "####", "\n", "\n#### ", " ", "(", "\\a", "translate to ", "A. ", "{", '{"a":', "9", "$"]
)
def test_hostile_rows_take_linear_time(unit: str) -> None:
    text = unit * (1_000_000 // len(unit))
    start = time.process_time()
    describe(make_query(text, text))
    describe(make_query(text, "x" + text + "x"))
    assert time.process_time() - start < 5.0


def test_deep_json_as_reference_is_no_test_and_no_crash() -> None:
    assert kind_of(json.dumps({"inputs": 1})) is not Kind.UNIT_TESTS
    assert kind_of('{"a":' * 100_000) is Kind.OPEN
