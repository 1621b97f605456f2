# SPDX-License-Identifier: Apache-2.0
"""A fixed, public set of queries and responses, by which the library tells whether two tools behave alike.

Guarantees: never changed within a version of the card's form; a fingerprint is comparable with those of other runs.

Not covered: it says nothing about whether a tool is any good.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from verl_rlar.types import Kind, Message, Query

_ADD = {"test_list": ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"], "entry_point": "add"}
_IFEVAL = {"instruction_id_list": ["punctuation:no_comma", "detectable_format:title"], "kwargs": [{}, {}]}
_SCHEMA = {"json_schema": {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}}
_GERMAN = {"source": "The cat sleeps on the warm roof.", "source_lang": "en", "target_lang": "de"}

SETS: tuple[tuple[Kind, str, str | None, dict[str, Any], tuple[str, ...]], ...] = (
    (
        Kind.MATH,
        "What is 6 times 7?",
        "42",
        {},
        (
            "42",
            "42.0",
            "42.",
            "\\boxed{42}",
            "The answer is 41.",
            "The answer is 42 apples, not 41.",
            "42 or 43",
            "6 * 7 = 42\n#### 42",
            "#### 42\nBut 43 is right.",
            "\\frac{84}{2}",
            "4.2e1",
            "forty-two",
            "42%",
            "$42",
            "x = 42",
            "<think>42</think>",
            "",
        ),
    ),
    (
        Kind.MATH,
        "Simplify 2/4.",
        "\\frac{1}{2}",
        {},
        ("1/2", "0.5", "50%", "$\\frac{2}{4}$", "2", "<think>2</think> 1/2"),
    ),
    (Kind.MATH, "Where is x^2 < 4?", "(-2, 2)", {}, ("(-2,2)", "[-2, 2]", "-2 < x < 2", "(2, -2)", "-2, 2")),
    (
        Kind.MATH,
        "Solve x^2 = 2.",
        "\\pm\\sqrt{2}",
        {},
        ("\\pm\\sqrt2", "\\sqrt{2}, -\\sqrt{2}", "\\sqrt{2}", "1.414214"),
    ),
    (Kind.MATH, "How long is it?", "5 \\text{ cm}", {}, ("5 cm", "5", "5 km", "50 mm", "5\\text{ cm}", "5.001 cm")),
    (
        Kind.CHOICE,
        "What is the capital of France?\nA) Rome\nB) Paris\nC) Bonn",
        "B",
        {},
        ("B", "(b)", "The answer is (B).", "Paris", "A", "A or B", ""),
    ),
    (
        Kind.SHORT_TEXT,
        "Who wrote Faust?",
        "Johann Wolfgang von Goethe",
        {},
        (
            "Johann Wolfgang von Goethe",
            "Goethe",
            "Answer: johann wolfgang von goethe.",
            "It was Johann Wolfgang von Goethe who wrote it.",
            "Wolfgang Johann von Goethe",
            "not Johann Wolfgang von Goethe",
            "Friedrich Schiller",
            "",
        ),
    ),
    (
        Kind.TRANSLATION,
        "Translate the following text into German:\nThe cat sleeps on the warm roof.",
        "Die Katze schläft auf dem warmen Dach.",
        _GERMAN,
        (
            "Die Katze schläft auf dem warmen Dach.",
            "Auf dem warmen Dach schläft die Katze.",
            "The cat sleeps on the warm roof.",
            "Der Hund bellt.",
            "",
        ),
    ),
    (
        Kind.UNIT_TESTS,
        "Write a function add(a, b).",
        None,
        _ADD,
        (
            "def add(a, b):\n    return a + b",
            "def add(a, b):\n    return a - b",
            "def add(*a):\n    raise SystemExit",
            "def add(a, b):\n    return 3",
            "Here it is:\n```python\nadd = lambda a, b: b + a\n```",
            "",
        ),
    ),
    (
        Kind.CONSTRAINTS,
        "Write a line with a title in double angular brackets, without commas.",
        None,
        _IFEVAL,
        ("<<Spring>> It is warm.", "It is warm.", "<<Spring>> Warm, and dry.", "Warm, and dry.", ""),
    ),
    (
        Kind.JSON_SCHEMA,
        "Give a JSON object.",
        None,
        _SCHEMA,
        ('{"a": 1}', '```json\n{"a": 1}\n```', '{"a": "x"}', "{}", ""),
    ),
    (
        Kind.OPEN,
        "How do I keep bread fresh?",
        None,
        {},
        (
            "Keep it in a paper bag at room temperature, and freeze what you do not eat within two days.",
            "Bread.",
            "How do I keep bread fresh?",
            "Bread bread bread bread bread bread bread bread.",
            "",
        ),
    ),
)


def public_cases(kinds: frozenset[Kind]) -> Iterator[tuple[Query, str]]:
    """The queries and responses for some kinds."""
    for kind, prompt, reference, extra, responses in SETS:
        if kind in kinds:
            query = Query(messages=(Message(role="user", content=prompt),), reference=reference, extra=extra)
            for response in responses:
                yield query, response
