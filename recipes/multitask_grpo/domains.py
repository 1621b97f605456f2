# SPDX-License-Identifier: Apache-2.0
"""The paper's four domains in verl's columns: from the hub for a training, or a sample out of `recipes/data`.

    python recipes/multitask_grpo/domains.py FOLDER [--revision gsm8k=COMMIT ...] [--limit N]

writes ``train.parquet``, ``val.parquet`` and ``test.parquet`` into the folder, and ``sources.json`` with what was taken
from where: repository, configuration, split, commit, rows. A second run into the same folder takes the same commits.

Each prompt says which form the answer is to have, as a reward for a form that nobody asked for measures the form; the
forms are those that `evaluate.py` checks. Prompts of ``val`` and ``test`` are never trained on; ``test`` are the public
test sets, ``val`` is cut from the training sets, so that nothing is chosen by the test sets.

Guarantees: what is taken from the hub is pinned: a source without a commit of 40 hex digits is resolved once, and the
commit is written down; only data files are read, no code of a repository runs; a column that is not there is an error
that names the set and the column.

Not covered: the hub could not be reached where this was written, so the sets' columns are as their cards describe them;
the converters were tried on rows of that form from `recipes/data`. Answers that the paper had a large model write
where a reference was missing are not made: dialogue has no reference here. FLORES+ wants its terms accepted on the hub.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parent.parent / "data"
SOURCES_FILE = "sources.json"
SEED = 0
Row = dict[str, Any]
Item = Mapping[str, Any]

NUMBER_FORM = "Reason step by step, and end with a line `#### <number>`."
BOXED_FORM = "Reason step by step, and put the final answer into \\boxed{}."
CODE_FORM = "Give the whole program in one ```python block."
TRANSLATION_FORM = "Give the translation and nothing else."


class DataFault(Exception):
    """A data set is not as expected; the message says which, and what to do."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A data set on the hub."""

    name: str
    """What ``data_source`` says; it decides nothing."""
    repo: str
    config: str | None
    split: str
    """Split that is trained on."""
    test: str | None
    """Split of the test set; None: the set has none, and its last rows are held out."""
    train_rows: int
    test_rows: int
    convert: Callable[[Item], Row | None]
    """A row of the set -> a row of verl's; None leaves it out."""
    domain: str


def row(name: str, prompt: list[dict[str, str]] | str, reference: str, /, **extra: Any) -> Row:
    """A row in verl's columns. All rows have the same further columns, as Arrow wants it."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    columns = {"source": None, "source_lang": None, "target_lang": None, "test": None, "entry_point": None}
    return {
        "data_source": name,
        "prompt": messages,
        "ability": name,
        "reward_model": {"style": "rule" if reference or extra.get("test") else "none", "ground_truth": reference},
        "extra_info": columns | extra,
    }


def gsm8k(item: Item) -> Row:
    return row("gsm8k", f"{item['question']}\n{NUMBER_FORM}", item["answer"].rpartition("####")[2].strip())


def math(item: Item) -> Row | None:
    """Hendrycks' MATH: the reference is the last box of the worked solution."""
    answer = item.get("answer") or last_box(item["solution"])
    return row("math", f"{item['problem']}\n{BOXED_FORM}", answer) if answer else None


def last_box(text: str) -> str | None:
    """The content of the last ``\\boxed{}`` of a text, braces balanced; None if there is none."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed{")
    for place in range(begin - 1, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[begin:place].strip() or None
    return None


_OF_NODES = re.compile(r"\b(?:list_node|tree_node|is_same_list|is_same_tree)\s*\(")
"""What tests of linked lists and trees call; it is in no column, so nothing could pass them."""


def leetcode(item: Item) -> Row | None:
    """The set grades ``prompt`` (imports), solution and ``test`` together, so whoever answers is shown the imports."""
    if _OF_NODES.search(item["test"]):
        return None
    if item.get("problem_description"):
        given = f"{item.get('prompt') or ''}\n{item['starter_code']}".strip("\n")
        asked = f"{item['problem_description']}\n\n```python\n{given}\n```"
    else:
        asked = item["query"]
    return row("leetcode", f"{asked}\n{CODE_FORM}", "", test=item["test"], entry_point=item["entry_point"])


LANGUAGES = {"zh": "Chinese", "de": "German", "en": "English", "fr": "French", "ja": "Japanese"}
FLORES = {"zh": "cmn_Hans", "de": "deu_Latn", "en": "eng_Latn", "fr": "fra_Latn", "ja": "jpn_Jpan"}
"""Configurations of FLORES+."""


def translation(source: str, item: Item) -> Row:
    """A pair: ``source``, ``reference``, ``from`` and ``to``."""
    into = LANGUAGES[item["to"]]
    prompt = f"Translate the following text from {LANGUAGES[item['from']]} into {into}. {TRANSLATION_FORM}\n"
    languages = {"source_lang": item["from"], "target_lang": item["to"]}
    return row(source, f"{prompt}\n{item['source']}", item["reference"], source=item["source"], **languages)


def ultrachat(item: Item) -> Row | None:
    """A dialogue up to the user's first turn: later ones answer what another model said."""
    messages = item["messages"]
    if not messages or messages[0]["role"] != "user" or not messages[0]["content"].strip():
        return None
    return row("ultrachat", messages[0]["content"].strip(), "")


SOURCES = (
    Source(
        name="gsm8k",
        repo="openai/gsm8k",
        config="main",
        split="train",
        test="test",
        train_rows=1500,
        test_rows=1319,
        convert=gsm8k,
        domain="math",
    ),
    Source(
        name="math",
        repo="EleutherAI/hendrycks_math",
        config="*",
        split="train",
        test="test",
        train_rows=1500,
        test_rows=500,
        convert=math,
        domain="math",
    ),
    Source(
        name="leetcode",
        repo="newfacade/LeetCodeDataset",
        config=None,
        split="train",
        test="test",
        train_rows=2585,
        test_rows=223,
        convert=leetcode,
        domain="code",
    ),
    Source(
        name="flores",
        repo="openlanguagedata/flores_plus",
        config="pairs",
        split="dev",
        test="devtest",
        train_rows=3000,
        test_rows=300,
        convert=lambda item: translation("flores", item),
        domain="translation",
    ),
    Source(
        name="ultrachat",
        repo="HuggingFaceH4/ultrachat_200k",
        config=None,
        split="train_sft",
        test="test_sft",
        train_rows=2500,
        test_rows=200,
        convert=ultrachat,
        domain="dialogue",
    ),
)
"""What the paper trains on (arXiv 2603.00724, its table of data), with its numbers of rows."""
HELD_OUT = 0.02
"""Share of the training rows of each set that are kept for validation."""


# --- From the hub -----------------------------------------------------------------------------------------------------


def prepare(folder: Path, revisions: Mapping[str, str], limit: int | None = None) -> dict[str, int]:
    """Writes the three files, and what they were made of.

    Args:
        folder: Where; made if missing.
        revisions: Commits by the sets' names.
        limit: Most rows of each set. None: as in the paper.

    Returns:
        Number of rows by file.

    Raises:
        DataFault: A set cannot be had, or is not as expected.
    """
    import pandas
    from huggingface_hub import HfApi

    folder.mkdir(parents=True, exist_ok=True)
    before = json.loads((folder / SOURCES_FILE).read_text()) if (folder / SOURCES_FILE).exists() else {}
    parts: dict[str, list[Row]] = {"train": [], "val": [], "test": []}
    taken: dict[str, Any] = {}
    for source in SOURCES:
        commit = revisions.get(source.name) or before.get(source.name, {}).get("commit")
        if commit is None:
            commit = HfApi().dataset_info(source.repo).sha
        if not re.fullmatch(r"[0-9a-f]{40}", str(commit)):
            raise DataFault(f"{source.name}: {commit!r} is no commit; give 40 hex digits, --revision {source.name}=...")
        made = {}
        for part, split, most in (("train", source.split, source.train_rows), ("test", source.test, source.test_rows)):
            wanted = min(most, limit or most)
            converted = convert(source, items_of(source, split, commit), wanted)
            made[part] = converted
        cut = max(1, round(HELD_OUT * len(made["train"])))
        parts["val"] += made["train"][:cut]
        parts["train"] += made["train"][cut:]
        parts["test"] += made["test"]
        numbers = {part: len(rows) for part, rows in made.items()}
        taken[source.name] = {"repo": source.repo, "config": source.config, "commit": commit, "rows": numbers}
    for part, rows in parts.items():
        random.Random(SEED).shuffle(rows)
        pandas.DataFrame(numbered(rows, part)).to_parquet(folder / f"{part}.parquet")
    (folder / SOURCES_FILE).write_text(json.dumps(taken, indent=2) + "\n")
    return {part: len(rows) for part, rows in parts.items()}


def items_of(source: Source, split: str | None, commit: str) -> Iterator[Item]:
    """The rows of a split, in an order that is drawn with a seed.

    Raises:
        DataFault: There is no such configuration or split.
    """
    from datasets import get_dataset_config_names, load_dataset

    def load(config: str | None) -> list[Item]:
        try:
            return list(load_dataset(source.repo, config, split=split, revision=commit))
        except ValueError as error:  # a configuration or split that is not there (any more)
            raise DataFault(
                f"{source.name} ({source.repo}) at {commit[:12]}, configuration {config}, split {split}: {error}; "
                f"--revision {source.name}=COMMIT takes an older one"
            ) from None

    if source.config == "pairs":
        items = list(pairs({language: load(config) for language, config in FLORES.items()}))
    elif source.config == "*":
        names = get_dataset_config_names(source.repo, revision=commit)
        items = list(itertools.chain.from_iterable(map(load, names)))
    else:
        items = load(source.config)
    random.Random(SEED).shuffle(items)
    yield from items


def pairs(texts: Mapping[str, Iterable[Item]]) -> Iterator[Item]:
    """All ordered pairs of languages over the same sentences."""
    by_id = {language: {item["id"]: item["text"] for item in items} for language, items in texts.items()}
    shared = sorted(set.intersection(*(set(known) for known in by_id.values())))
    for number, (source, into) in itertools.product(shared, itertools.permutations(sorted(by_id), 2)):
        yield {"from": source, "to": into, "source": by_id[source][number], "reference": by_id[into][number]}


def convert(source: Source, items: Iterable[Item], most: int) -> list[Row]:
    """The first rows that can be used.

    Raises:
        DataFault: A column is missing, or nothing is left.
    """
    made: list[Row] = []
    for item in items:
        try:
            converted = source.convert(item)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataFault(
                f"{source.name} ({source.repo}) has no usable column {error}; its columns are {sorted(item)}. Another "
                f"commit may have it: --revision {source.name}=COMMIT"
            ) from error
        if converted is not None:
            made.append(converted)
        if len(made) == most:
            break
    if not made:
        raise DataFault(f"{source.name} ({source.repo}): no row can be used")
    return made


def numbered(rows: Iterable[Row], part: str) -> list[Row]:
    return [row | {"extra_info": row["extra_info"] | {"split": part, "index": n}} for n, row in enumerate(rows)]


# --- A sample without a network ---------------------------------------------------------------------------------------


def sample(rows: int = 8) -> dict[str, list[Row]]:
    """Rows of each set by its name, from `recipes/data`, through the same converters. LeetCode is stood in for by
    HumanEval, FLORES by TED talks, UltraChat by MT-Bench."""
    items: dict[str, Iterator[Item]] = {
        "gsm8k": lines("gsm8k_train_short.jsonl.gz"),
        "math": ({"problem": one["prompt"].rpartition("\n")[0], **one} for one in lines("math500.jsonl.gz")),
        "leetcode": ({"query": one["prompt"], **one} for one in lines("humaneval.jsonl.gz")),
        "flores": ({"from": "en", "to": "de", **one} for one in lines("ted_mqm_ende.jsonl.gz")),
        "ultrachat": (
            {"messages": [{"role": "user", "content": one["turns"][0]}]} for one in lines("mt_bench_questions.jsonl")
        ),
    }
    return {source.name: convert(source, items[source.name], rows) for source in SOURCES}


def lines(name: str) -> Iterator[Item]:
    opened = gzip.open if name.endswith(".gz") else open
    with opened(DATA / name, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the files go")
    parser.add_argument("--revision", action="append", default=[], metavar="SET=COMMIT", help="pins a set; repeatable")
    parser.add_argument("--limit", type=int, help="most rows of each set (default: as in the paper)")
    args = parser.parse_args(argv)
    revisions = dict(pair.partition("=")[::2] for pair in args.revision)
    if unknown := set(revisions) - {source.name for source in SOURCES}:
        parser.error(f"no set is called {', '.join(sorted(unknown))}; there are {[s.name for s in SOURCES]}")
    try:
        written = prepare(args.folder, revisions, args.limit)
    except (DataFault, ImportError, OSError) as error:
        print(f"domains: {error}", file=sys.stderr)
        return 2
    for part, count in written.items():
        print(f"{args.folder / part}.parquet: {count:,} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
