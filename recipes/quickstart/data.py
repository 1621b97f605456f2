# SPDX-License-Identifier: Apache-2.0
"""The quickstart's prompts: four real data sets, cut to what a small model can learn from, in verl's columns.

Every training batch holds the same mixture (`Profile.mixture`), and the file is read in order, so that an epoch is
`Profile.batches` steps; the first and the last epoch of a run therefore see the same prompts and can be compared.
Prompts for validation are never trained on.

The cuts are by length, and for IFEval by constraint (`REACHABLE`): with answers of a few dozen tokens a demand
for 400 words, or for JSON, is never met, so that no response of a group is better than another and nothing is learned.

Guarantees: deterministic; only files in ``recipes/data`` are read (origins and licences: ``recipes/data/README.md``).
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parent.parent / "data"

REACHABLE = {
    "detectable_format:number_bullet_lists": lambda num_bullets: num_bullets <= 4,
    "keywords:existence": lambda keywords: len(keywords) <= 2,
    "keywords:forbidden_words": lambda forbidden_words: True,
    "keywords:letter_frequency": lambda letter, let_frequency, let_relation: (
        let_relation != "at least" or let_frequency <= 6
    ),
    "length_constraints:number_sentences": lambda num_sentences, relation: relation != "at least" or num_sentences <= 4,
    "length_constraints:number_words": lambda num_words, relation: relation != "at least" or num_words <= 40,
    "punctuation:no_comma": lambda: True,
}
"""IFEval's constraints, by their arguments, that SmolLM2-135M meets now and then in an answer of a few dozen tokens.

Left out is what it never met in trials of 20 to 60 answers each (all lowercase, quotation marks, titles) or met in less
than a tenth of them (all capitals, highlights).
"""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """How much of what goes into a run."""

    mixture: dict[str, int]
    """Prompts of each data set in a training batch."""
    batches: int
    """Training batches in an epoch."""
    validation: dict[str, int]
    """Prompts of each data set in the validation file."""
    prompt_chars: int
    """Longest prompt, in characters."""


def write(profile: Profile, folder: Path) -> tuple[Path, Path]:
    """Writes ``train.parquet`` and ``val.parquet``.

    Returns:
        The two files.

    Raises:
        ValueError: A data set has fewer fitting prompts than the profile asks for.
    """
    import pandas

    folder.mkdir(parents=True, exist_ok=True)
    files = (folder / "train.parquet", folder / "val.parquet")
    for file, split in zip(files, rows(profile), strict=True):
        pandas.DataFrame(split).to_parquet(file)
    return files


def rows(profile: Profile) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows for training, batch after batch, and those for validation."""
    train: dict[str, list[dict[str, Any]]] = {}
    val: list[dict[str, Any]] = []
    for name, source in SOURCES.items():
        fitting = [row for row in source() if len(row["prompt"][0]["content"]) <= profile.prompt_chars]
        random.Random(0).shuffle(fitting)
        held_out, wanted = profile.validation[name], profile.mixture[name] * profile.batches
        if len(fitting) < held_out + profile.mixture[name]:
            raise ValueError(f"{name}: {len(fitting)} prompts of at most {profile.prompt_chars} characters are too few")
        val += fitting[:held_out]
        pool = fitting[held_out:]
        train[name] = [pool[i % len(pool)] for i in range(wanted)]
    mixed = [
        row
        for batch in range(profile.batches)
        for name, share in profile.mixture.items()
        for row in train[name][batch * share : (batch + 1) * share]
    ]
    return _numbered(mixed, "train"), _numbered(val, "val")


def _gsm8k() -> Iterator[dict[str, Any]]:
    for line in _lines("gsm8k_train_short"):
        prompt = f"{line['question']}\nAnswer briefly and end with: The answer is <number>."
        yield _row("gsm8k", prompt, line["answer"].split("####")[-1].strip())


def _math() -> Iterator[dict[str, Any]]:
    for line in _lines("math500"):
        yield _row("math", line["prompt"].replace("reason step by step, and ", ""), line["answer"])


def _ifeval() -> Iterator[dict[str, Any]]:
    for line in _lines("ifeval"):
        constraints = zip(line["instruction_id_list"], line["kwargs"], strict=True)
        if all(name in REACHABLE and REACHABLE[name](**arguments) for name, arguments in constraints):
            # Arrow would give every mapping all the keys of all rows, so the arguments travel as JSON
            kwargs = json.dumps(line["kwargs"])
            yield _row("ifeval", line["prompt"], "", instruction_id_list=line["instruction_id_list"], kwargs=kwargs)


def _ted() -> Iterator[dict[str, Any]]:
    for line in _lines("ted_mqm_ende"):
        if len(line["source"]) >= 20:
            prompt = f"Translate the following text into German:\n{line['source']}"
            languages = {"source_lang": "en", "target_lang": "de"}
            yield _row("ted_en_de", prompt, line["reference"], source=line["source"], **languages)


SOURCES = {"ifeval": _ifeval, "ted_en_de": _ted, "gsm8k": _gsm8k, "math": _math}
"""The data sets, by the name that ``data_source`` has."""


def _row(data_source: str, prompt: str, reference: str, **extra: Any) -> dict[str, Any]:
    return {
        "data_source": data_source,
        "prompt": [{"role": "user", "content": prompt}],
        "ability": data_source,
        "reward_model": {"style": "rule", "ground_truth": reference},
        "extra_info": extra,
    }


def _numbered(split: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [row | {"extra_info": row["extra_info"] | {"split": name, "index": i}} for i, row in enumerate(split)]


def _lines(name: str) -> Iterator[dict[str, Any]]:
    with gzip.open(DATA / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)
