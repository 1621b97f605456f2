# SPDX-License-Identifier: Apache-2.0
"""The rule `instruction_constraints`: every kind of constraint, rows as parquet gives them, hostile answers."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_rlar.tools.rules.instruction import (
    CHECKS,
    bullets,
    capital_words,
    count_keyword,
    highlights,
    instruction_constraints,
    placeholders,
    sentences,
)
from verl_rlar.tools.rules.language import written_in
from verl_rlar.types import Kind, Message, Query, Sample, Verdict

PROSE = "The old harbour was quiet in the morning. Two boats came back, and the gulls followed them home."
GERMAN = "Der alte Hafen war am Morgen ganz ruhig. Zwei Boote kamen zurück und die Möwen folgten ihnen nach Hause."


def score(response: str, *constraints: tuple[str, Any]) -> Verdict:
    extra = {"instruction_id_list": [name for name, _ in constraints], "kwargs": [args for _, args in constraints]}
    return instruction_constraints(Sample(query=Query(messages=(), extra=extra), response=response))


CASES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    ("keywords:existence", {"keywords": ["harbour", "two boats"]}, [PROSE], [PROSE.replace("harbour", "harbours")]),
    (
        "keywords:frequency",
        {"keyword": "war", "frequency": 2, "relation": "at least"},
        ["War is war, always.", "The _war_ before the war's end."],
        ["A war is a warm reward for warlords.", "is_war and war_crime and one war"],
    ),
    (
        "keywords:frequency",
        {"keyword": "war", "frequency": 2, "relation": "less than"},
        ["A war is a warm reward.", PROSE],
        ["War, war."],
    ),
    ("keywords:forbidden_words", {"forbidden_words": ["rock"]}, [PROSE, "A rocket flies."], ["You Rock!", "_rock_ it"]),
    (
        "keywords:letter_frequency",
        {"letter": "#", "let_frequency": 2, "let_relation": "at least"},
        ["a # b #"],
        ["a # b"],
    ),
    (
        "keywords:letter_frequency",
        {"letter": "Z", "let_frequency": 1, "let_relation": "less than"},
        [PROSE],
        ["A zoo."],
    ),
    ("language:response_language", {"language": "de"}, [GERMAN], [PROSE, f"{GERMAN}\n{PROSE}", "1 2 3"]),
    ("language:response_language", {"language": "ko"}, ["모든 인간은 태어날 때부터 자유롭다."], [PROSE]),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, ["One.\n***\nTwo."], ["One.\n\nTwo.", "a***b***c"]),
    ("length_constraints:number_words", {"num_words": 4, "relation": "at least"}, ["one two three four"], ["one two"]),
    ("length_constraints:number_words", {"num_words": 4, "relation": "less than"}, ["one two"], ["one two three four"]),
    ("length_constraints:number_words", {"num_words": 4, "relation": "exactly"}, ["a b c d"], ["a b c", "a b c d e"]),
    ("length_constraints:number_words", {"num_words": 4, "relation": "at most"}, ["a b c d"], ["a b c d e"]),
    ("length_constraints:number_words", {"num_words": 4, "relation": "more than"}, ["a b c d e"], ["a b c d"]),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": "at least"},
        [PROSE],
        ["Only one, Mr. X."],
    ),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "less than"}, ["See e.g. this."], [PROSE]),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "weekend"},
        ["One.\n\nWeekend is near.", "One.\n\n\n\n**Weekend** is near.", 'One.\n\n"Weekend," he said.'],
        ["Weekend is near.\n\nOne.", "One.\n\nWeekends are near.", "One.\n\nTwo.\n\nWeekend.", "One. Weekend"],
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.S."},
        ["Bye now.\n\nP.S. I like it.", "Bye now. p. s. I do."],
        ["Bye now.", "Bye now.\nP.S.", "Bye now.\nP.P.S. I do.", "Help. S. is a letter."],
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.P.S"},
        ["Bye now.\nP.P.S. More of it.", "Bye now.\nP.P.S More"],
        ["Bye now.\nP.S. More", "We help. P.S. More"],
    ),
    (
        "detectable_content:number_placeholders",
        {"num_placeholders": 2},
        ["Dear [name], come to [place]."],
        ["Dear [name].", "[] [] [ ] and more"],
    ),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        ["So:\n* one\n* two", "So:\n- one\n-two\n---\n**bold** text\n-5 degrees"],
        ["So:\n* one", "So:\n* one\n* two\n- three", "So:\n*\n*", "*one* and\n*two*"],
    ),
    ("detectable_format:title", {}, ["<<Joy>>\nText", "a << Joy >> b"], ["<Joy> text", "<<>> text", "<<Joy\n>> text"]),
    (
        "detectable_format:constrained_response",
        {},
        ["My answer is no.", "Well. My answer is maybe."],
        ["my answer is no", "My answer is yes. My answer is no.", PROSE],
    ),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ["Some *light* and **more light** here.", "*a b*, ***c***"],
        ["* **One** only", "2 * 3 * 4 * 5 is 120", "one *two\nthree* *four* five", "** ** ****"],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        ["Section 1\nfoo\nSection 2\nbar", "**Section 1**: a\n## Section 2: b"],
        ["Section 1\nfoo", "Section 1\nSection 1\nfoo", "section 1\nsection 2"],
    ),
    (
        "detectable_format:json_format",
        {},
        ['{"a": [1, 2]}', '```json\n{"a": 1}\n```', '["text"]'],
        ["Here: {}", '"a quoted sentence"', "1", '{"a": NaN}', "{'a': 1}", '{"a": 1, "a": 2}', '{"a": 1'],
    ),
    (
        "combination:repeat_prompt",
        {"prompt_to_repeat": "Write a poem."},
        ["Write a poem.\nRoses are red.", "write a POEM. Roses"],
        ["Write a poem.", "Sure! Write a poem. Roses", "Roses"],
    ),
    (
        "combination:two_responses",
        {},
        ["One answer.\n******\nAnother answer.", "******\nOne******Two"],
        ["One answer.", "Same.\n******\nSame.", "a\n******\nb\n******\nc", "a\n******\n******\nb"],
    ),
    ("change_case:english_capital", {}, [PROSE.upper()], [PROSE, GERMAN.upper(), PROSE.upper() + " ok"]),
    ("change_case:english_lowercase", {}, [PROSE.lower()], [PROSE, GERMAN.lower()]),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 3, "capital_relation": "at least"},
        ["I saw NASA's STATE-OF-THE-ART lab.", "WE (THE) NEW ones"],
        ["I saw NASA only.", "A-B-C STATE-OF-THE-ART"],
    ),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "less than"},
        ["I saw it.", "only lower case"],
        ["I saw NASA."],
    ),
    (
        "startend:end_checker",
        {"end_phrase": "So what is next?"},
        ["Well. so what is next?", '"Well. So what is next?"'],
        [PROSE],
    ),
    ("startend:end_checker", {"end_phrase": "What fun!”"}, ["He said “What fun!”"], ["He said “What fun!"]),
    ("startend:quotation", {}, [f'"{PROSE}"', f"“{PROSE}”"], [PROSE, f'"{PROSE}', f"'{PROSE}'"]),
    ("punctuation:no_comma", {}, ["No such sign here.", "positive"], [PROSE, "在中国，我们", "one، two"]),
]


@pytest.mark.parametrize(("name", "arguments", "good", "bad"), CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)])
def test_each_kind_tells_satisfying_from_violating_answers(
    name: str, arguments: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    for response, wanted in [(r, 1.0) for r in good] + [(r, 0.0) for r in bad]:
        verdict = score(response, (name, arguments))
        assert verdict.value == wanted, (response, verdict)
        assert verdict.details[name] == wanted


def test_all_25_kinds_of_ifeval_are_tested_here() -> None:
    assert {case[0] for case in CASES} == set(CHECKS)
    assert len(CHECKS) == 25


@pytest.mark.parametrize(
    "response", ["", "  \n\t ", "...", "***", "😀", "a", "aaaaaa", "a a a", "bla bla bla", "<think>no"]
)
def test_a_degenerate_answer_satisfies_nothing_not_even_what_only_forbids(response: str) -> None:
    everything = [(name, arguments) for name, arguments, _, _ in CASES]
    verdict = score(response, *everything)
    assert verdict.value == 0.0
    assert verdict.details["loose"] == 0.0


def test_a_prompt_that_is_handed_back_satisfies_nothing() -> None:
    prompt = "Write one sentence about a village. At the end add a postscript with P.S."
    extra = {"instruction_id_list": ["detectable_content:postscript"], "kwargs": [{"postscript_marker": "P.S."}]}
    query = Query(messages=(Message(role="user", content=prompt),), extra=extra)

    def said(response: str) -> Verdict:
        return instruction_constraints(Sample(query=query, response=response))

    for response in (prompt, f"  **{prompt.upper()}**\n", f"<think>Hm.</think>{prompt}"):
        verdict = said(response)
        assert verdict.value == verdict.details["loose"] == 0.0
        assert "repeats the prompt" in verdict.reason
    assert said("A village slept. P.S. It snowed.").value == 1.0
    assert said(f"{prompt} It snowed.").value == 1.0  # says something


def test_an_answer_of_one_real_word_is_not_degenerate() -> None:
    assert score("positive", ("punctuation:no_comma", {})).value == 1.0
    assert score("是", ("punctuation:no_comma", {})).value == 1.0


def test_the_value_is_the_share_and_the_details_name_each_constraint() -> None:
    verdict = score(
        PROSE,
        ("punctuation:no_comma", {}),
        ("keywords:existence", {"keywords": ["gulls"]}),
        ("punctuation:no_comma", {}),
    )
    assert verdict.value == pytest.approx(1 / 3)
    assert verdict.details["punctuation:no_comma"] == verdict.details["punctuation:no_comma#2"] == 0.0
    assert verdict.details["keywords:existence"] == 1.0
    assert verdict.details["all"] == 0.0
    assert "punctuation:no_comma" in verdict.reason


def test_the_loose_reading_forgives_a_first_line_and_asterisks_and_the_strict_value_does_not() -> None:
    verdict = score("Sure, here it is:\nNo such sign in here.", ("punctuation:no_comma", {}))
    assert (verdict.value, verdict.details["loose"], verdict.details["loose_all"]) == (0.0, 1.0, 1.0)
    verdict = score("**My answer is** yes.", ("detectable_format:constrained_response", {}))
    assert (verdict.value, verdict.details["loose_all"]) == (0.0, 1.0)


def test_thinking_is_not_part_of_the_answer() -> None:
    assert score("<think>one, two</think>No such sign.", ("punctuation:no_comma", {})).value == 1.0
    assert score("one, two</think>No such sign.", ("punctuation:no_comma", {})).value == 1.0
    assert score("<think>No such sign", ("punctuation:no_comma", {})).value == 0.0


WANTED = [{"keywords": ["gulls", "boats"]}, {"num_words": 5, "relation": "at least"}]
IDS = ["keywords:existence", "length_constraints:number_words"]
PADDED = [
    {"keywords": np.array(["gulls", "boats"], dtype=object), "num_words": None, "relation": None},
    {"keywords": None, "num_words": np.float64(5.0), "relation": "at least", "letter": float("nan")},
]


@pytest.mark.parametrize(
    ("ids", "kwargs"),
    [
        (IDS, WANTED),
        (np.array(IDS, dtype=object), np.array(PADDED, dtype=object)),
        (tuple(IDS), tuple(PADDED)),
        (json.dumps(IDS), json.dumps(WANTED)),
        (IDS, [json.dumps(entry) for entry in WANTED]),
        (IDS, np.array([json.dumps(entry) for entry in WANTED], dtype=object)),
    ],
    ids=["lists", "numpy with None and NaN", "tuples", "JSON text", "list of JSON texts", "numpy of JSON texts"],
)
def test_rows_are_understood_in_every_form_that_parquet_gives_them(ids: Any, kwargs: Any) -> None:
    query = Query(messages=(), extra={"instruction_id_list": ids, "kwargs": kwargs})
    verdict = instruction_constraints(Sample(query=query, response=PROSE))
    assert verdict.value == 1.0, verdict
    assert instruction_constraints(Sample(query=query, response="Some gulls.")).value == 0.0


@pytest.mark.parametrize("kwargs", [None, [None], [{}], np.array([None], dtype=object), {}])
def test_a_constraint_without_arguments_needs_none(kwargs: Any) -> None:
    query = Query(messages=(), extra={"instruction_id_list": ["punctuation:no_comma"], "kwargs": kwargs})
    assert instruction_constraints(Sample(query=query, response="No sign.")).value == 1.0


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({}, "instruction_id_list"),
        ({"instruction_id_list": []}, "instruction_id_list"),
        ({"instruction_id_list": ["count:unknown"], "kwargs": [{}]}, "count:unknown"),
        ({"instruction_id_list": ["keywords:existence"], "kwargs": [{}]}, "keywords"),
        ({"instruction_id_list": ["keywords:existence"], "kwargs": [{}, {}]}, "kwargs"),
        ({"instruction_id_list": ["keywords:existence"], "kwargs": "not json"}, "kwargs"),
        ({"instruction_id_list": ["keywords:existence"], "kwargs": [3]}, "kwargs"),
        ({"instruction_id_list": [IDS[1]], "kwargs": [{"num_words": "many", "relation": "at least"}]}, "num_words"),
        ({"instruction_id_list": [IDS[1]], "kwargs": [{"num_words": 5, "relation": "around"}]}, "relation"),
        (
            {"instruction_id_list": [IDS[1]], "kwargs": [{"num_words": float("inf"), "relation": "at least"}]},
            "num_words",
        ),
        ({"instruction_id_list": ["language:response_language"], "kwargs": [{"language": "xx"}]}, "'xx'"),
    ],
)
def test_a_row_that_cannot_be_read_is_abstained_from_and_named_never_scored_0(
    extra: dict[str, Any], named: str
) -> None:
    verdict = instruction_constraints(Sample(query=Query(messages=(), extra=extra), response=PROSE))
    assert verdict.value is None
    assert named in verdict.reason


def test_nothing_from_the_row_is_a_regular_expression() -> None:
    assert score("It costs (a lot", ("keywords:existence", {"keywords": ["(a lot"]})).value == 1.0
    assert score("anything goes", ("keywords:existence", {"keywords": [".*"]})).value == 0.0
    assert score("a" * 5000 + "b", ("keywords:existence", {"keywords": ["(a+)+$"]})).value == 0.0
    assert (
        score("A+ 1\nA+ 2", ("detectable_format:multiple_sections", {"section_spliter": "A+", "num_sections": 2})).value
        == 1
    )


@pytest.mark.parametrize(
    "piece",
    [
        "[",
        "<<",
        "*",
        "* ",
        "\n",
        " \n",
        ".",
        ". ",
        "! ",
        ",",
        "{",
        '"',
        "P.S",
        "_",
        "***",
        "Section ",
        "a.",
        "“",
        "-\n",
    ],
)
def test_hostile_repetition_is_read_in_linear_time(piece: str) -> None:
    everything = [(name, arguments) for name, arguments, _, _ in CASES]
    response = piece * (150_000 // len(piece)) + "x y"
    assert score(response, *everything).value is not None


def test_ten_megabytes_are_read() -> None:
    response = (PROSE + "\n") * (10_000_000 // len(PROSE))
    wanted = {"num_words": 300, "relation": "at least"}
    verdict = score(response, ("length_constraints:number_words", wanted), ("punctuation:no_comma", {}))
    assert verdict.value == 0.5


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=400))
def test_any_text_gets_a_share_and_loose_is_never_below_strict(text: str) -> None:
    verdict = score(text, *[(name, arguments) for name, arguments, _, _ in CASES])
    assert verdict.value is not None
    assert 0.0 <= verdict.value <= verdict.details["loose"] <= 1.0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("Mr. Smith went to Washington, D.C. yesterday. He is back.", 2),
        ("1. One\n2. Two\n3. Three", 1),
        ("It is 3.5 m long... maybe! Right?!", 2),
        ('He said "Go." Then he left.', 2),
        ("J. R. R. Tolkien wrote it.", 1),
        ("By J.D. Salinger. A book of the U.S. Army, Inc. and others.", 2),
        ("They live in the U.S. The others do not. It was 6 a.m. Nobody spoke.", 4),
        ('"R.P.M." by R.E.M. is a song.', 1),
        ("1... Nf6 is a move.", 1),
        ("**Bold end.** Next one", 2),
        ("Ends with an emoji! 🎉", 1),
        ("你好。世界！", 2),
        ("", 0),
        ("?! ...", 0),
    ],
)
def test_sentences_end_where_a_reader_would_say(text: str, number: int) -> None:
    assert len(sentences(text)) == number


def test_counting_functions_agree_with_their_descriptions() -> None:
    assert count_keyword("Mom's mom, moment, mom-like", "mom") == 3
    assert count_keyword("我爱中国。中国大。", "中国") == 2
    assert highlights("* a *b* c\n**d** ****e****") == 3
    assert bullets("- a\n+ b\n* c\n---\n- \n*d*") == 3
    assert placeholders("[a] [b[c] [] [d\n]") == 2
    assert capital_words("I'm in the U.S. with NASA/ESA, OK? 42 (A)") == 5


@pytest.mark.parametrize(
    ("text", "language", "told"),
    [
        (PROSE, "en", True),
        (PROSE, "de", False),
        (GERMAN, "de-AT", True),
        (PROSE, "ru", False),
        ("Ok", "th", False),
        ("Yes.", "de", None),
        ("12345", "en", None),
        (PROSE, "xx", None),
        ("これは日本語の文章です。", "ja", True),
        ("これは日本語の文章です。", "zh", False),
    ],
)
def test_languages_are_told_or_left_open(text: str, language: str, told: bool | None) -> None:
    assert written_in(text, language) is told


def test_the_spec_says_what_the_rule_is_for() -> None:
    spec = instruction_constraints.spec
    assert spec.scope.kinds == {Kind.CONSTRAINTS}
    assert not spec.scope.needs_reference
    assert (spec.low, spec.high) == (0.0, 1.0)
    assert spec.misses


def test_the_prompt_plays_no_part() -> None:
    extra = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    query = Query(messages=(Message(role="user", content="Use, many, commas"),), extra=extra)
    assert instruction_constraints(Sample(query=query, response="None here.")).value == 1.0
