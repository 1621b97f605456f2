# SPDX-License-Identifier: Apache-2.0
"""Rule `json_schema`: the answer is one JSON document that is valid under the row's schema.

What: the answer (thinking removed) must be one JSON document and nothing else, bare or in one ``` fence, and valid
under ``extra["json_schema"]`` (a mapping, or JSON text as parquet files carry it). 1 or 0.

Guarantees: strict JSON (RFC 8259): NaN, Infinity and repeated keys are refused; documents nested deeper than `DEPTH`
or longer than `SIZE` are refused before they are parsed; nothing is ever fetched: a schema with a remote ``$ref`` (or
one that is no schema) is the row's fault, and the rule abstains. ``format`` is an annotation, as the standard has it.

Not covered: whether the content is right. A reference document is not compared: ``{}`` is perfect under ``{}``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NoReturn

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError, best_match
from jsonschema.validators import validator_for
from referencing import Registry
from referencing.exceptions import Unresolvable

from verl_rlar.tools.rule import rule
from verl_rlar.tools.rules.format import answer_of
from verl_rlar.types import Kind, Sample, Verdict

DEPTH = 40
"""Deepest nesting that is parsed; a recursive schema over such a document stays within Python's stack."""
SIZE = 1_000_000
"""Most characters that are parsed."""
DIGITS = 1_000
"""Most digits of an integer."""


def parse_json(text: str) -> Any:
    """Parses one strict JSON document, bare or in one ``` fence.

    Raises:
        ValueError: It is no JSON, or too large, too deep, ambiguous (repeated keys), or not standard (NaN).
    """
    text = _unfenced(text.strip())
    if len(text) > SIZE:
        raise ValueError(f"longer than {SIZE:,} characters")
    if _depth(text) > DEPTH:
        raise ValueError(f"nested deeper than {DEPTH}")
    return json.loads(text, object_pairs_hook=_object, parse_constant=_constant, parse_int=_integer)


@rule(
    name="json_schema",
    kinds={Kind.JSON_SCHEMA},
    needs_reference=False,
    description="""1 if the answer is exactly one JSON document (bare or in one code fence) that is valid under the JSON
    schema in extra["json_schema"], else 0. Use it where the form of structured output is what counts; it does not
    compare the content with a reference. Abstains where the schema is missing, malformed, or refers to other files.""",
    misses=(
        "Content: any valid document passes, also an empty one where the schema allows it.",
        "A reference document is not compared with.",
        "format (date, email, uri, ...) is not checked.",
        "Correct JSON with prose around it scores 0 by design.",
    ),
)
def json_schema(sample: Sample) -> Verdict:
    """1 for a valid document, else 0 with the first fault as the reason."""
    schema = sample.query.extra.get("json_schema")
    if isinstance(schema, Mapping):
        schema = json.dumps(schema, default=_plain)
    if not isinstance(schema, str) or not schema.strip():
        return Verdict(value=None, reason='no schema in extra["json_schema"]')
    try:
        validator = _validator(schema)
    except (ValueError, SchemaError, RecursionError) as error:
        return Verdict(value=None, reason=f"unusable schema: {_short(error)}")
    try:
        document = parse_json(answer_of(sample.response))
    except ValueError as error:
        return Verdict(value=0.0, reason=f"not one JSON document: {_short(error)}")
    try:
        fault = best_match(validator.iter_errors(document))
    except Unresolvable as error:
        return Verdict(value=None, reason=f"unusable schema: reference is not fetched: {_short(error)}")
    except RecursionError:
        return Verdict(value=None, reason="unusable schema: it refers to itself without end")
    if fault is None:
        return Verdict(value=1.0, reason="valid")
    return Verdict(value=0.0, reason=f"invalid at {fault.json_path[:80]}: {_short(fault)}")


@lru_cache(maxsize=64)
def _validator(schema: str) -> Any:
    """The validator of a schema, with an empty registry: references within the schema only.

    Raises:
        ValueError: The schema is no JSON, or refers to another document.
        SchemaError: The schema is not valid under its own dialect.
    """
    parsed = json.loads(schema)
    if not isinstance(parsed, dict | bool):
        raise ValueError("a schema is an object")
    remote = _remote(parsed)
    if remote:
        raise ValueError(f"reference {remote[:80]!r} is not fetched")
    dialect = validator_for(parsed, default=Draft202012Validator)
    dialect.check_schema(parsed)
    return dialect(parsed, registry=Registry())


def _remote(schema: Any) -> str | None:
    """The first absolute reference in a schema that is not to the schema itself."""
    name = schema.get("$id") if isinstance(schema, dict) else None
    own = {name.rstrip("#")} if isinstance(name, str) else set()
    stack = [schema]
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            for key in ("$ref", "$dynamicRef", "$recursiveRef"):
                target = node.get(key)
                if isinstance(target, str) and "://" in target and target.split("#", 1)[0] not in own:
                    return target
            stack.extend(node.values())
        elif isinstance(node, list):
            stack.extend(node)
    return None


def _unfenced(text: str) -> str:
    """The inside of a ``` fence, if the text is one fence; else the text."""
    if not text.startswith("```") or not text.endswith("```") or len(text) < 6:
        return text
    head, newline, body = text[3:-3].partition("\n")
    if newline and head.strip().lower() in {"", "json", "json5", "jsonc"}:
        return body.strip()
    inside = text[3:-3]
    return inside[4:].strip() if inside[:4].lower() == "json" else inside.strip()


def _depth(text: str) -> int:
    """Deepest nesting of brackets outside strings; one pass."""
    depth = deepest = 0
    inside = escaped = False
    for char in text:
        if inside:
            if escaped:
                escaped = False
            elif char == "\\":
                escaped = True
            elif char == '"':
                inside = False
        elif char == '"':
            inside = True
        elif char in "[{":
            depth += 1
            if depth > deepest:
                deepest = depth
                if deepest > DEPTH:
                    break
        elif char in "]}":
            depth -= 1
    return deepest


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object repeats a key")
    return found


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _integer(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _plain(value: Any) -> Any:
    """Numpy arrays and scalars, as parquet readers give them, to plain Python."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise ValueError(f"{type(value).__name__} is not JSON")


def _short(error: Exception) -> str:
    return str(getattr(error, "message", error)).split("\n", 1)[0][:200]
