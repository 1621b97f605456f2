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
from collections.abc import Iterator, Mapping
from fractions import Fraction
from functools import lru_cache
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError, ValidationError, best_match
from jsonschema.validators import extend, validator_for
from referencing import Registry
from referencing.exceptions import Unresolvable

from verl_rlar.sandbox.reading import answer_of, parse_json
from verl_rlar.tools.rule import rule
from verl_rlar.types import Kind, Sample, Verdict


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
    bare = None
    if isinstance(schema, Mapping):
        schema, bare = (json.dumps(one, default=_plain) for one in (_without_filler(schema), _without_none(schema)))
    if not isinstance(schema, str) or not schema.strip():
        return Verdict(value=None, reason='no schema in extra["json_schema"]')
    try:
        try:
            validator = _validator(schema)
        except SchemaError:
            if bare in (None, schema):
                raise
            validator = _validator(bare)
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
    if isinstance(parsed, dict):
        parsed.pop("$schema", None)  # else references to the whole are checked by the dialect's own rules
    return extend(dialect, {"multipleOf": _multiple_of})(parsed, registry=Registry())


def _multiple_of(validator: Any, step: Any, number: Any, schema: Any) -> Iterator[ValidationError]:
    """19.99 is a multiple of 0.01, though not as a float."""
    if not validator.is_type(number, "number") or step != step:  # NaN, as pandas has what is missing
        return
    try:
        rest = Fraction(str(number)) % Fraction(str(step))
    except ValueError:  # 1e999 is read as infinity
        rest = Fraction(1)
    if rest:
        yield ValidationError(f"{number!r} is not a multiple of {step}")


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


def _without_none(value: Any) -> Any:
    """A schema without the keywords that are None: parquet gives every struct of a column all fields of all rows."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, Mapping):
        return {name: _without_none(item) for name, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, (list, tuple)) else value


def _without_filler(value: Any) -> Any:
    """A schema without a ``const`` of None beside a type that None is not of: parquet again, and a valid schema."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, Mapping):
        types = _without_filler(value.get("type"))
        filler = isinstance(types, (str, list)) and "null" not in types and value.get("const", types) is None
        return {name: _without_filler(item) for name, item in value.items() if not (filler and name == "const")}
    return [_without_filler(item) for item in value] if isinstance(value, (list, tuple)) else value


def _plain(value: Any) -> Any:
    """Numpy arrays and scalars, as parquet readers give them, to plain Python."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise ValueError(f"{type(value).__name__} is not JSON")


def _short(error: Exception) -> str:
    return str(getattr(error, "message", error)).split("\n", 1)[0][:200]
