# SPDX-License-Identifier: Apache-2.0
"""The rule `json_schema` and the gates `think_format` and `length_limits`."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_rlar.sandbox.reading import DEPTH, SIZE, answer_of, parse_json
from verl_rlar.tools.rules.format import count_words, length_limits, think_format
from verl_rlar.tools.rules.json_schema import json_schema
from verl_rlar.types import Kind, Message, Query, Sample, Verdict

SCHEMA = {
    "type": "object",
    "required": ["name", "age"],
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}, "mail": {"format": "email"}},
    "additionalProperties": False,
}
VALID = '{"name": "Ada", "age": 36}'


def check(response: str, schema: Any = SCHEMA) -> Verdict:
    return json_schema(Sample(query=Query(messages=(), extra={"json_schema": schema}), response=response))


@pytest.mark.parametrize(
    "response",
    [
        VALID,
        f" \n{VALID}\n",
        f"```json\n{VALID}\n```",
        f"```\n{VALID}\n```",
        f"```JSON {VALID}```",
        f"<think>{{</think>{VALID}",
    ],
)
def test_a_valid_document_passes_bare_or_fenced(response: str) -> None:
    assert check(response).value == 1.0


@pytest.mark.parametrize(
    "response",
    [
        "",
        "Here it is: " + VALID,
        VALID + VALID,
        f"{VALID}\nDone.",
        f"```json\n{VALID}\n```\n```json\n{VALID}\n```",
        '{"name": "Ada"}',
        '{"name": "Ada", "age": -1}',
        '{"name": "Ada", "age": 36, "x": 1}',
        '{"name": "Ada", "age": 36, "age": 37}',
        '{"name": "Ada", "age": NaN}',
        '{"name": "Ada", "age": Infinity}',
        "{'name': 'Ada', 'age': 36}",
        '{"name": "Ada", "age": 36,}',
        "null",
        "```",
        "``````",
    ],
)
def test_whatever_is_not_one_valid_document_fails(response: str) -> None:
    assert check(response).value == 0.0


def test_a_number_that_no_float_holds_is_the_responses_fault() -> None:
    assert check("1e999", {"type": "number", "multipleOf": 0.5}).value == 0.0
    assert check("1e9", {"type": "number", "multipleOf": 0.5}).value == 1.0


@pytest.mark.parametrize(("step", "good", "bad"), [(0.01, "19.99", "19.995"), (0.01, "0.07", "0.075"), (3, "9", "10")])
def test_a_decimal_is_a_multiple_as_it_is_written(step: float, good: str, bad: str) -> None:
    assert check(good, {"multipleOf": step}).value == 1.0
    assert check(bad, {"multipleOf": step}).value == 0.0
    assert check('"text"', {"multipleOf": step}).value == 1.0, "it is about numbers"


def test_schemas_of_several_rows_survive_parquet(tmp_path: Path) -> None:
    """Arrow gives each struct the fields of all."""
    one = {"properties": {"name": {"type": "string"}}, "additionalProperties": False}
    two = {"properties": {"city": {"type": "string", "minLength": 2}}}
    pd.DataFrame({"schema": [one, two]}).to_parquet(tmp_path / "rows.parquet")
    read_one, read_two = pd.read_parquet(tmp_path / "rows.parquet")["schema"]
    assert read_one["properties"]["city"] is None
    assert [check(text, read_one).value for text in ('{"name": "Ada"}', '{"name": 1}', '{"x": 1}')] == [1, 0, 0]
    assert [check(text, read_two).value for text in ('{"city": "Ulm"}', '{"city": "U"}', '{"x": 1}')] == [1, 0, 1]
    assert check("null", {"const": None}).value == 1.0, "which means something where it is valid"
    assert check("1", {"const": None}).value == 0.0


def test_format_is_not_checked() -> None:
    assert check('{"name": "Ada", "age": 36, "mail": "no mail"}').value == 1.0


@pytest.mark.parametrize(
    "schema",
    [json.dumps(SCHEMA), {"enum": np.array([1, 2])}, '{"enum": [1, 2]}'],
)
def test_a_schema_may_be_text_or_hold_numpy(schema: Any) -> None:
    assert check("1" if "enum" in schema and schema != json.dumps(SCHEMA) else VALID, schema).value == 1.0


@pytest.mark.parametrize(
    "schema",
    [
        None,
        "",
        "{",
        "[]",
        "3",
        3,
        {"type": "strin"},
        {"pattern": "("},
        {"properties": {"a": {"$ref": "https://example.org/schema.json"}}},
        {"$ref": "other.json"},
        {"$ref": "file:///etc/passwd"},
        {"$ref": "#/$defs/missing"},
        {"$ref": "#"},
    ],
)
def test_an_unusable_schema_is_abstained_from_never_scored(schema: Any) -> None:
    assert check('{"a": 1}', schema).value is None


def test_a_remote_reference_is_not_fetched() -> None:
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"{}")

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        base = f"http://127.0.0.1:{server.server_port}"
        for schema in (
            {"$ref": f"{base}/s.json"},
            {"$id": f"{base}/main.json", "$ref": "s.json"},
            {"$schema": f"{base}/s"},
        ):
            verdict = check('{"a": 1}', schema)
            assert verdict.value is None or "$schema" in schema
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert asked == []


def test_references_within_a_schema_work_down_to_the_deepest_document() -> None:
    schema = {"$ref": "#/$defs/n", "$defs": {"n": {"anyOf": [{"type": "integer"}, {"items": {"$ref": "#/$defs/n"}}]}}}
    assert check("[" * DEPTH + "1" + "]" * DEPTH, schema).value == 1.0
    assert check("[" * (DEPTH + 1) + "1" + "]" * (DEPTH + 1), schema).value == 0.0


@pytest.mark.parametrize(
    "response",
    [
        "[" * 5_000_000,
        '{"a":' * 2_000_000,
        "[" * 100_000 + "]" * 100_000,
        "9" * 900_000,
        '"' + "\\" * 900_000,
        '{"name": "' + "x" * 10_000_000 + '"}',
        "`" * 1_000_000,
        "1e999999999",
    ],
    ids=["open brackets", "open objects", "deep", "huge integer", "backslashes", "10 MB", "backticks", "huge exponent"],
)
def test_hostile_documents_score_0_and_break_nothing(response: str) -> None:
    assert check(response, {"type": "object"}).value == 0.0


def test_brackets_in_strings_are_not_nesting() -> None:
    assert parse_json(json.dumps("[" * 1000)) == "[" * 1000
    assert parse_json(json.dumps('\\"[' * 100)) == '\\"[' * 100
    with pytest.raises(ValueError, match="longer"):
        parse_json(" 1" + "0" * SIZE)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@settings(max_examples=100, deadline=None)
@given(_JSON)
def test_every_document_that_json_writes_is_read_back(document: Any) -> None:
    assert parse_json(json.dumps(document)) == document
    assert parse_json(f"```json\n{json.dumps(document, indent=1)}\n```") == document


def think(response: str, *messages: Message, **extra: Any) -> float | None:
    return think_format(Sample(query=Query(messages=messages, extra=extra), response=response)).value


@pytest.mark.parametrize(
    ("response", "value"),
    [
        ("<think>Two and two.</think>Four.", 1.0),
        ("  <think>\nTwo and two.\n</think>\n\nFour.\n", 1.0),
        ("Two and two.</think>Four.", 1.0),
        ("", 0.0),
        ("Four.", 0.0),
        ("<think>Two and two.", 0.0),
        ("<think></think>Four.", 0.0),
        ("<think> \n </think>Four.", 0.0),
        ("</think>Four.", 0.0),
        ("<think>Two.</think>", 0.0),
        ("<think>Two.</think>  \n", 0.0),
        ("<think>a</think>b<think>c</think>d", 0.0),
        ("<think>a</think>b</think>c", 0.0),
        ("<think><think>a</think>b", 0.0),
        ("Well. <think>a</think>b", 0.0),
        ("a <think> b</think>c", 0.0),
        ("<think>a</think>b <think>", 0.0),
        ("<think>" * 100_000, 0.0),
        ("</think>" * 1_000_000, 0.0),
    ],
)
def test_think_format_wants_one_block_and_an_answer(response: str, value: float) -> None:
    assert think(response) == value


def test_a_template_that_writes_the_opening_tag_is_taken_into_account() -> None:
    inside, whole = "Two and two.</think>Four.", "<think>Two and two.</think>Four."
    assert think(inside, prefilled=True) == 1.0
    assert think(inside, prefilled=False) == 0.0
    assert think(whole, prefilled=False) == 1.0
    opened = Message(role="assistant", content="<think>\n")
    assert think(inside, Message(role="user", content="2+2?"), opened, prefilled=False) == 1.0


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("<think>a</think> b ", "b"),
        ("a</think>b", "b"),
        ("just this", "just this"),
        ("<think>never ends", ""),
        ("I like <think> tags", "I like <think> tags"),
    ],
)
def test_the_answer_is_what_follows_the_thinking(response: str, answer: str) -> None:
    assert answer_of(response) == answer


def limits(response: str, **extra: Any) -> Verdict:
    return length_limits(Sample(query=Query(messages=(), extra=extra), response=response))


@pytest.mark.parametrize(
    ("extra", "value"),
    [
        ({"min_words": 3}, 1.0),
        ({"min_words": 4}, 0.0),
        ({"max_words": 3}, 1.0),
        ({"max_words": 2}, 0.0),
        ({"min_chars": 15, "max_chars": 15}, 1.0),
        ({"max_chars": 14}, 0.0),
        ({"min_chars": 16}, 0.0),
        ({"min_words": np.int64(3), "max_words": None, "max_chars": float("nan")}, 1.0),
        ({"max_words": "2"}, 0.0),
        ({}, None),
        ({"max_words": None}, None),
        ({"max_words": "few"}, None),
    ],
)
def test_length_limits_are_inclusive_and_absent_ones_do_not_count(extra: dict[str, Any], value: float | None) -> None:
    assert limits("<think>not counted at all here</think> one two - three ", **extra).value == value


def test_a_broken_limit_is_named_with_the_count() -> None:
    verdict = limits("one two", max_words=1)
    assert "max_words" in verdict.reason
    assert verdict.details["words"] == 2.0
    assert count_words(" - one, two! ... 3 ") == 3


def test_ten_megabytes_are_measured() -> None:
    assert limits("word " * 2_000_000, max_words=100).value == 0.0


@pytest.mark.parametrize("gate", [think_format, length_limits])
def test_gates_fit_every_kind_of_query_and_need_no_reference(gate: Any) -> None:
    assert gate.spec.scope.kinds == frozenset(Kind)
    assert not gate.spec.scope.needs_reference
    assert gate.spec.misses


@pytest.mark.parametrize(
    ("schema", "document", "valid"),
    [
        ({"type": "object", "properties": {"status": {"type": "string", "const": None}}}, '{"status": "ok"}', True),
        ({"type": ["string", "null"], "const": None}, '"a"', False),
        ({"type": "number", "multipleOf": float("nan")}, "3", True),
        (
            {
                "$schema": "https://json-schema.org/draft/2020-12/schema",
                "type": "array",
                "items": {"anyOf": [{"type": "number", "multipleOf": 0.01}, {"$ref": "#"}]},
            },
            "[[19.99]]",
            True,
        ),
    ],
)
def test_what_parquet_fills_in_demands_nothing_and_references_to_the_whole_know_decimals(
    schema: dict[str, Any], document: str, valid: bool
) -> None:
    query = Query(messages=(), extra={"json_schema": schema})
    assert json_schema(Sample(query=query, response=document)).value == float(valid)
