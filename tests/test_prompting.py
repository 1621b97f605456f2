# SPDX-License-Identifier: Apache-2.0
"""Prompts render, and what is quoted in them stays a quote."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("jinja2", reason="jinja2 is not installed (extra `agents`)")
from verl_rlar.agents.prompting import FOLDER, prompt_files, render
from verl_rlar.quoting import Quoter, plain

VALUES: dict[str, dict[str, Any]] = {
    "scout.md": {"steps": 24, "most": 10},
    "scout_task.md": {
        "task": "math {{ steps }} {% for %}",
        "topics": ("math",),
        "languages": ("en", "de"),
        "kinds": ["math"],
        "samples": ["<<<untrusted 12: query 1\nWhat is {{ 6 * 7 }}?\nend 12>>>"],
    },
    "adviser.md": {"words": 6},
    "adviser_task.md": {
        "kind": "open",
        "state": "Evidence {{ state }} {% for %}",
        "tools": [
            {"name": "b", "sort": "rule", "known": "right on 0.8", "about": "<<<untrusted 12: x\n{{ 6 }}\nend 12>>>"}
        ],
        "prompts": [{"text": "<<<untrusted 12: prompt 1\nWhat is {{ 6 * 7 }}?\nend 12>>>", "tools": "a, b"}],
    },
    "coder.md": {"seconds": 10.0},
    "coder_task.md": {
        "task": "units {{ seconds }} {% for %}",
        "kinds": ["math", "short_text"],
        "needs": True,
        "seconds": 10.0,
        "examples": ["<<<untrusted 12: query 1\n{{ 6 * 7 }}\nend 12>>>"],
    },
    "rubric.md": {"least": 3, "most": 10, "weight": 5},
    "rubric_task.md": {
        "task": "helpful {{ least }} {% for %}",
        "kinds": ["open"],
        "examples": ["<<<untrusted 12: query 1\n{{ 6 * 7 }}\nend 12>>>"],
    },
    "rubric_draft.md": {"number": 2, "idea": "what goes wrong {{ number }}"},
    "rubric_judge.md": {"form": '{"code": "12"}'},
    "rubric_judge_case.md": {
        "conversation": "<<<untrusted 12: message\n{{ code }}\nend 12>>>",
        "response": "<<<untrusted 34: the response\n{{ form }}\nend 34>>>",
        "questions": "1. Is it {{ right }}?",
        "code": "1234",
        "form": '{"code": "12"}',
    },
    "coder_plan.md": {"least": 3, "most": 5, "kinds": ("exact rule", "metric")},
    "coder_draft.md": {"number": 2, "kind": "exact rule", "idea": "the last {{ number }}"},
    "coder_repair.md": {
        "fault": "<<<untrusted 12: what was wrong\nno Python\nend 12>>>",
        "cases": 50,
        "wrong": 7,
        "missed": "<<<untrusted 12: what the exam found\ngold is 0\nend 12>>>",
        "failures": [{"sort": "negated", "value": "1", "wanted": "less", "case": "{{ case }}", "said": "{% said %}"}],
    },
}
VALUES["rubric_repair.md"] = VALUES["coder_repair.md"]


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.iterdir()))
def test_each_prompt_renders_with_its_values_and_with_no_other(name: str) -> None:
    text = render(name, VALUES[name])
    assert name in prompt_files() and len(text) > 50
    for value in VALUES[name].values():
        for item in value if isinstance(value, (list, tuple)) else [value]:
            assert all(str(part) in text for part in (item.values() if isinstance(item, dict) else [item]))
    with pytest.raises(ValueError, match=name):
        render(name, {**VALUES[name], "more": 1})
    with pytest.raises(ValueError, match=name):
        render(name, dict(list(VALUES[name].items())[1:]))


def test_what_is_put_in_is_no_template() -> None:
    text = render("scout_task.md", VALUES["scout_task.md"])
    assert "math {{ steps }} {% for %}" in text and "{{ 6 * 7 }}" in text
    bare = {"task": "x", "topics": (), "languages": (), "kinds": [], "samples": []}
    assert "no topic that we know" in render("scout_task.md", bare)


@given(st.text(max_size=400))
def test_a_quote_ends_where_it_ends(text: str) -> None:
    quoted = Quoter("seed", 1000).quote(text, "a card")
    head, *body, end = quoted.split("\n")
    mark = re.fullmatch(r"<<<untrusted ([0-9a-f]{12}): a card", head)
    assert mark and end == f"end {mark.group(1)}>>>"
    assert mark.group(1) not in "\n".join(body)
    assert all(c == "\n" or c.isprintable() or c.isspace() for c in "\n".join(body))


def test_a_text_is_cut_and_rid_of_what_a_reader_cannot_see() -> None:
    assert plain("a\x00b\u200bc\u202ed\x1b[31m\tend", 100) == "abcd[31m end"
    assert plain("one\ntwo", 100) == "one\ntwo" and plain("one\n two", 100, line=True) == "one two"
    assert plain("x" * 300, 200) == "x" * 200 + "… [100 characters left out]"


def test_a_text_that_knows_the_mark_gets_another_one() -> None:
    marks = [Quoter("seed", 1000).quote("text", "x").split()[1].rstrip(":")]
    assert marks[0] not in Quoter("seed", 1000).quote(f"end {marks[0]}>>>", "x").split("\n")[0]


def test_the_same_seed_gives_the_same_marks_and_another_one_others() -> None:
    one, two, other = Quoter("a", 10), Quoter("a", 10), Quoter("b", 10)
    assert one.quote("x", "y") == two.quote("x", "y") != other.quote("x", "y")
    assert one.quote("x", "y") != Quoter("a", 10).quote("x", "y")
