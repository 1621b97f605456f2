# SPDX-License-Identifier: Apache-2.0
"""Four families of short tasks that a small model can get better at, in verl's columns.

    constraints   a sentence about a topic, with one demand in IFEval's vocabulary; drawn here
    spelling      TED sentences in which pairs of letters have changed places, to be corrected; drawn here
    sums          additions of two small numbers
    json          a sentence with a name, an age and a city, to be given as JSON; drawn here, values in the schema

Every batch holds the same number of each, and the order is drawn from the seed: arms with one seed see the same prompts
in the same order. Rows for evaluation are the same for all seeds and are never trained on.

Guarantees: deterministic; only `recipes/data` is read.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

QUICKSTART = Path(__file__).resolve().parent.parent / "quickstart"
sys.path.insert(0, str(QUICKSTART))

from data import SOURCES  # noqa: E402

FAMILIES = ("constraints", "spelling", "sums", "json")
SENTENCE_CHARS = 70
NAMES = "Ada Ben Cleo Dan Eva Finn Gina Hugo Ines Jan Kira Leo Mia Nils Olga Paul Rosa Sven Tara Uwe".split()
CITIES = "Athens Berlin Cairo Dublin Essen Florence Geneva Hanoi Izmir Jena Kyoto Lima Madrid Nice Oslo Paris".split()
TOPICS = (
    "the sea, winter, a train, the moon, bread, a garden, music, rain, a horse, a bridge, coffee, a market, snow, wine,"
    " the sun, a kitchen, a library, birds, a mountain, a bicycle, summer, a boat, a clock, the stars, a dog, a forest,"
    " a school, a lamp, a village, the wind, an island, a painter, sleep, a window, an old house, tea, a storm, a road,"
    " a friend, a ship"
).split(", ")
HIGHLIGHTS = "detectable_format:number_highlighted_sections"
DEMANDS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("Do not use commas.", "punctuation:no_comma", {}),
    ("Use less than 10 words.", "length_constraints:number_words", {"relation": "less than", "num_words": 10}),
    ("Answer with exactly 2 bullet points like * this.", "detectable_format:number_bullet_lists", {"num_bullets": 2}),
    ("Highlight at least one word with asterisks, such as *word*.", HIGHLIGHTS, {"num_highlights": 1}),
    ("Add a title in double angular brackets, such as <<title>>.", "detectable_format:title", {}),
    ("At the end add a postscript with P.S.", "detectable_content:postscript", {"postscript_marker": "P.S."}),
)
"""What is asked for, in words and in IFEval's. The policy meets each of them now and then before it is trained, so that
there is something to learn from; not so with lower case, capitals, quotation marks and last words."""
Row = dict[str, Any]


def family(name: str) -> list[Row]:
    """All rows of a family, in an order of its own."""
    made_by = {"constraints": _constraints, "spelling": _spelling, "sums": _sums, "json": _json}
    rows = list(made_by[name](random.Random(name)))
    random.Random(f"{name} rows").shuffle(rows)
    columns = ("instruction_id_list", "kwargs", "json_schema")
    made = []
    for row in rows:
        prompt = {"prompt": row["prompt"][0]["content"]}  # for rewards that are functions: verl hands them none
        extra = dict.fromkeys(columns) | row["extra_info"] | prompt  # Arrow wants the same columns in all rows
        made.append(row | {"data_source": name, "extra_info": extra})
    return made


def _constraints(dice: random.Random) -> Iterator[Row]:
    for topic in TOPICS:
        for words, name, arguments in DEMANDS:
            demand = {"instruction_id_list": [name], "kwargs": json.dumps([arguments])}
            yield _row(f"Write one sentence about {topic}. {words}", "", **demand)


def _spelling(dice: random.Random) -> Iterator[Row]:
    for row in SOURCES["ted_en_de"]():
        words = row["extra_info"]["source"].split()
        if not 4 <= len(words) <= 12 or len(" ".join(words)) > SENTENCE_CHARS:
            continue
        long = [n for n, word in enumerate(words) if len(word) > 4]
        swapped = list(words)
        for n in dice.sample(long, min(2, len(long))):
            at = dice.randrange(1, len(words[n]) - 2)
            swapped[n] = words[n][:at] + words[n][at + 1] + words[n][at] + words[n][at + 2 :]
        if swapped != words:
            yield _row(f"Correct the spelling mistakes:\n{' '.join(swapped)}", " ".join(words))


def _sums(dice: random.Random) -> Iterator[Row]:
    for one in range(2, 13):
        for other in range(2, 13):
            yield _row(f"What is {one} + {other}? End with: The answer is <number>.", str(one + other))


def _json(dice: random.Random) -> Iterator[Row]:
    for _ in range(600):
        told: dict[str, Any] = {"name": dice.choice(NAMES), "age": dice.randint(18, 90), "city": dice.choice(CITIES)}
        asked = f"{told['name']} is {told['age']} years old and lives in {told['city']}. Give this as one JSON object "
        schema = {"type": "object", "required": list(told), "properties": {k: {"const": v} for k, v in told.items()}}
        yield _row(
            asked + 'with the keys "name", "age" (a number) and "city", and nothing else.',
            json.dumps(told),
            json_schema=json.dumps(schema),
        )


def _row(prompt: str, reference: str, **extra: Any) -> Row:
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "ability": "",
        "reward_model": {"style": "rule", "ground_truth": reference},
        "extra_info": extra,
    }


def rows(*, seed: int, batches: int, per_family: int, held_out: int) -> tuple[list[Row], list[Row]]:
    """Rows of a training, batch after batch, and those for evaluation.

    Raises:
        ValueError: A family has too few rows.
    """
    train: dict[str, list[Row]] = {}
    test: list[Row] = []
    for name in FAMILIES:
        all_rows = family(name)
        if len(all_rows) < held_out + per_family:
            raise ValueError(f"{name}: {len(all_rows)} rows are too few for {held_out} held out")
        test += all_rows[:held_out]
        pool = all_rows[held_out:]
        random.Random(f"{name} {seed}").shuffle(pool)
        train[name] = [pool[n % len(pool)] for n in range(batches * per_family)]
    mixed = [
        row
        for batch in range(batches)
        for name in FAMILIES
        for row in train[name][batch * per_family : (batch + 1) * per_family]
    ]
    return [_numbered(row, n) for n, row in enumerate(mixed)], [_numbered(row, n) for n, row in enumerate(test)]


def _numbered(row: Row, number: int) -> Row:
    return row | {"extra_info": row["extra_info"] | {"index": number}}
