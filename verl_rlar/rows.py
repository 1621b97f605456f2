# SPDX-License-Identifier: Apache-2.0
"""From a row of a data set to a `Query`: the one place that knows how rows are spelled.

Two spellings are read, and may be mixed: verl's columns (``prompt``, ``data_source``, ``reward_model.ground_truth``,
``extra_info``), as they stand in a parquet file and reach the reward manager, and the shorter one of JSON lines
(``messages`` or ``prompt``, ``reference``, ``data_source``, ``extra``).

Guarantees: the same row gives the same `Query.key` whichever way it came (parquet, numpy, JSON); what cannot be read is
a `DataError` that names the column.

Not covered: images and audio in messages are left out of the text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from verl_rlar.errors import DataError
from verl_rlar.types import Message, Query

COLUMNS = ("raw_prompt", "data_source", "reward_model", "extra_info")
"""The columns of verl's batches that make a query."""


def query_of(row: Mapping[str, Any]) -> Query:
    """Reads a query out of a row.

    Raises:
        DataError: There is no prompt, or a column has an unusable type.
    """
    prompt = next((row[name] for name in ("messages", "raw_prompt", "prompt") if row.get(name) is not None), None)
    if prompt is None:
        raise DataError(f"no `messages` or `prompt`{there_is(row)}")
    reward_model = plain(row.get("reward_model") or {})
    if not isinstance(reward_model, Mapping):
        raise DataError(f"`reward_model` is {type(reward_model).__name__}, not a mapping with `ground_truth`")
    extra: dict[str, Any] = {}
    for column in ("extra_info", "extra"):
        value = plain(row.get(column) or {})
        if not isinstance(value, Mapping):
            raise DataError(f"`{column}` is {type(value).__name__}, not a mapping")
        extra |= {name: item for name, item in value.items() if item is not None}
    reference = row.get("reference")
    return Query(
        messages=_messages(plain(prompt)),
        reference=_text(reward_model.get("ground_truth") if reference is None else plain(reference)),
        data_source=str(row.get("data_source") or ""),
        extra=extra,
    )


def there_is(row: Mapping[str, Any]) -> str:
    """The columns of a row, for a message about one that is not there."""
    return f"; there is {', '.join(map(str, row))}"[:200] if row else ""


def plain(value: Any) -> Any:
    """Plain containers and scalars out of numpy's, and of anything that has ``tolist`` or ``item``."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def _messages(prompt: Any) -> tuple[Message, ...]:
    if isinstance(prompt, str):
        return (Message(role="user", content=prompt),)
    if not isinstance(prompt, Sequence) or not prompt:
        raise DataError(f"the prompt is {type(prompt).__name__}, not a text or a list of messages")
    for turn in prompt:
        if not isinstance(turn, Mapping) or "role" not in turn:
            raise DataError(f"a message is {str(turn)[:80]!r}, not {{'role': ..., 'content': ...}}")
    return tuple(Message(role=str(turn["role"]), content=_content(turn.get("content"))) for turn in prompt)


def _content(content: Any) -> str:
    if isinstance(content, list):
        parts = (part.get("text") for part in content if isinstance(part, Mapping))
        return "".join(str(text) for text in parts if text is not None)  # Arrow gives an image a text, too: None
    return "" if content is None else str(content)


def _text(reference: Any) -> str | None:
    """A reference as text: None, NaN and the empty string mean that there is none; containers become JSON."""
    if reference is None or reference == "" or reference != reference:
        return None
    if isinstance(reference, (list, dict)):
        return json.dumps(reference, ensure_ascii=False)
    return str(reference)


def query_as_dict(query: Query) -> dict[str, Any]:
    """A query as JSON-like containers, as far as its columns are."""
    return {
        "messages": [{"role": message.role, "content": message.content} for message in query.messages],
        "reference": query.reference,
        "data_source": query.data_source,
        "extra": dict(query.extra),
    }


def query_from_dict(tree: Mapping[str, Any]) -> Query:
    """What `query_as_dict` gave.

    Raises:
        KeyError, TypeError: It is nothing of that sort.
    """
    messages = tuple(Message(**message) for message in tree["messages"])
    return Query(**{**tree, "messages": messages})
