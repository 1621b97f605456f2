# SPDX-License-Identifier: Apache-2.0
"""What rules and verifiers read responses with, outside of any box; `test_sandbox.py` has the same inside of one."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl_rlar.sandbox import reading
from verl_rlar.sandbox.inside.verifier_api import READERS, may_read
from verl_rlar.sandbox.reading import DEPTH, MOST_NUMBERS, code_blocks, final_answer, find_json, number, numbers, plain
from verl_rlar.tools.rule import Rule, source_of
from verl_rlar.tools.rules import BUILTIN


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1,234.5 and -3, +4", ["1234.5", "-3", "4"]),
        ("x = \u22123 and x=11.", ["-3", "11"]),
        ("[-4,0) 3,11,12", ["-4", "0", "3", "11", "12"]),
        (r"-\frac{3}{4} \dfrac12 3/4.", ["-3/4", "1/2", "3/4"]),
        ("50% 5 per cent 12.5 \\%", ["1/2", "1/20", "1/8"]),
        (r"1.5e3 2E-2 1.5 \times 10^{3} 2×10^3", ["1500", "1/50", "1500", "2000"]),
        (r"-$5 $-5 \$1,000.50 £3", ["-5", "-5", "1000.5", "3"]),
        ("$1{,}042$ 1\\,042 1\u202f042", ["1042", "1042", "1042"]),
        ("2004-04-23, 5-3", ["2004", "4", "23", "5", "3"]),
        ("3½ 10² .5", ["3", "1/2", "10", "2", "1/2"]),
        ("x2 v1.2 none", []),
        ("1,0423", ["1", "423"]),
    ],
)
def test_numbers_are_read_exactly(text: str, values: list[str]) -> None:
    assert numbers(text) == [Fraction(value) for value in values]


@pytest.mark.parametrize("text", ["9" * 5000, "1e9999999999", "1e-999", "1/0", "0." + "1" * 400])
def test_a_number_beyond_the_limits_equals_nothing_and_is_not_left_out(text: str) -> None:
    found = numbers(f"42 or {text}")
    assert found[0] == 42 and len(found) == 2 and math.isnan(found[1]) and found[1:] != numbers(text)
    assert number(text) is None and number("the 42 of it") == 42 and number("1 or 2") is None and number("") is None


@given(st.fractions(max_denominator=10**6))
def test_a_fraction_is_read_back(value: Fraction) -> None:
    assert numbers(f"so it is {value}.") == [value]


@given(st.text())
def test_nothing_raises(text: str) -> None:
    for name in READERS:
        getattr(reading, name)(text)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("<think>42</think>\nI do not know.", "I do not know."),
        (r"<think> \boxed{3}", ""),
        ("It is 3.\n#### 42", "42"),
        (r"\boxed{3} and \boxed{11}", "3, 11"),
        (r"\boxed{\frac{1}{2}} is mine", r"\frac{1}{2}"),
        ("**Answer:** 42 or 45.", "42 or 45."),
        ("The answer is April 23rd, 2004.\n\nGoodbye, 7 times.", "April 23rd, 2004."),
        ("The answer is:\n\\[\n  x = 42\n\\]\nGoodbye.", "x = 42"),
        ("Solution:\nIt was 41 before.\nNow it is 42.", "Now it is 42."),
        ("The solution is 42.\nGoodbye.", "42."),
        ("First this.\n\n It is -42.\n", "It is -42."),
        ("", ""),
    ],
)
def test_what_a_response_states_in_the_end(response: str, answer: str) -> None:
    assert final_answer(response) == answer


@pytest.mark.parametrize(
    ("text", "documents"),
    [
        ('{"a": 1}', [{"a": 1}]),
        ('Here:\n{"a": {"b": "}"}} and [1, 2].', [{"a": {"b": "}"}}, [1, 2]]),
        ('```json\n{"a": 1}\n```\nNot {"b": 2}.', [{"a": 1}]),
        ('```\n{"a": 1}\n{"b": 2}\n```', []),
        ("{'a': [1]}", []),
        ('{"a": 1, "a": 2} {"a": NaN}', []),
        ("[" * (DEPTH + 1) + "]" * (DEPTH + 1), []),
        ("{" * 100_000, []),
        ('{"a": "', []),
        ("42", []),
    ],
)
def test_json_in_a_text(text: str, documents: list[Any]) -> None:
    assert find_json(text) == documents


def test_code_in_a_text() -> None:
    text = "```python\nx\n```\n~~~\ny\n~~~\n```js\nz\n```\n```py\nw"
    assert code_blocks(text) == ["x\n", "y\n", "w\n"] and code_blocks(text, "JS") == ["y\n", "z\n"]


def test_one_spelling() -> None:
    assert plain("It\u2019s  \u201cFINE\u201d \u2014\nok\u200b \ufb01") == 'it\'s "fine" - ok fi'


def test_there_is_an_end_to_it() -> None:
    assert len(numbers("1 " * 3 * MOST_NUMBERS)) == MOST_NUMBERS
    assert len(find_json("[] " * 1000)) == reading.MOST_ITEMS


def test_what_a_verifier_reads_with_is_known_before() -> None:
    for source in ("import rlar\nrlar.number('1')", "from rlar import plain", "import rlar as r"):
        assert may_read(source)
    assert not may_read("import rlar\nrlar.run_program('1')")


@pytest.mark.parametrize("rule", BUILTIN, ids=lambda rule: rule.spec.name)
def test_what_a_rule_reads_with_is_a_part_of_its_identity(rule: Rule) -> None:
    source = source_of(rule)
    assert inspect.getsource(reading) in source
    assert inspect.getsource(importlib.import_module(rule.spec.target.partition(":")[0])) in source
    assert rule.spec.source_sha256 == hashlib.sha256(source.encode()).hexdigest()
