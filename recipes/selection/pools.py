# SPDX-License-Identifier: Apache-2.0
"""Pools of tools with saved scores, and the official rules by which selections among them are counted.

Two sources:

- ``rewardmath``: JSON lines of ``problem``, ``right`` (index of the right answer) and ``scores{tool: [a number per
  answer]}``.
- ``rewardbench2``: a folder of AllenAI's ``eval-set-scores`` (one JSON object of columns per model: ``id``, ``subset``,
  ``scores``, ``num_correct``, ``model``), as the data set ``allenai/reward-bench-2-results`` has them. The right
  answers come first. The prompts, by which clusters are told, come from a file of ``allenai/reward-bench-2`` itself
  (JSON lines or parquet, columns ``id`` and ``prompt``); without it every prompt is in one cluster.

RewardBench 2 counts an item by whether the right answer has the highest score, divided by the number of answers that
share it (two that tie count half). Its subset Ties is counted as a whole, by `ties_score`.

Not covered: generative judges' files of RewardBench 2 hold ratings in other columns, and are refused by name.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_rlar.errors import DataError
from verl_rlar.mixture import rank_first
from verl_rlar.row_files import read_rows

TIES = "ties"
LEADERBOARD_COLUMNS = ("Factuality", "Precise IF", "Math", "Safety", "Focus", "Ties")


@dataclass(frozen=True, kw_only=True)
class Item:
    """A prompt with its answers and what each tool said of them."""

    id: str
    subset: str
    prompt: str
    """Empty: not known."""
    right: tuple[bool, ...]
    scores: Mapping[str, tuple[float, ...]]
    """By tool, a raw score for every answer."""


@dataclass(frozen=True, kw_only=True)
class Pool:
    tools: tuple[str, ...]
    items: tuple[Item, ...]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def rewardmath(path: Path) -> Pool:
    """RewardMATH's scores. Left out: judges that compared two answers (they knew which pair holds the right one), and
    scores by step of the solution, which are no score of an answer.

    Raises:
        DataError: The file cannot be read, or is of another form.
    """
    items = []
    try:
        for number, row in enumerate(_lines(path)):
            scores = {
                tool: tuple(map(float, values))
                for tool, values in row["scores"].items()
                if all(isinstance(value, int | float) for value in values)
            }
            count = len(next(iter(scores.values())))
            right = tuple(n == row["right"] for n in range(count))
            items.append(Item(id=str(number), subset="math", prompt=row.get("problem", ""), right=right, scores=scores))
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise DataError(f"{path} is no file of RewardMATH scores: {type(error).__name__}: {error}") from error
    return _whole(items, path)


def rewardbench2(folder: Path, prompts: Path | None = None) -> Pool:
    """RewardBench 2's saved scores of all models in a folder; of items, those that all of them have.

    Raises:
        DataError: A file cannot be read, or is of another form.
    """
    texts: dict[str, str] = {}
    if prompts is not None:
        for _, row in read_rows(str(prompts)):
            if isinstance(row, DataError):
                raise row
            texts[str(row["id"])] = str(row.get("prompt") or "")
    found: dict[str, dict[str, tuple[float, ...]]] = {}
    about: dict[str, tuple[str, int]] = {}
    for path in sorted(folder.rglob("*.json")):
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
            columns = zip(table["id"], table["subset"], table["scores"], table["num_correct"], strict=True)
            name = str(table["model"])
            for id_, subset, scores, correct in columns:
                found.setdefault(str(id_), {})[name] = tuple(map(_number, scores))
                about[str(id_)] = str(subset), int(correct)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} is no file of RewardBench 2's eval-set-scores: {type(error).__name__}: {error}"
            ) from error
    items = []
    for id_, scores in found.items():
        subset, correct = about[id_]
        count = len(next(iter(scores.values())))
        right = tuple(n < correct for n in range(count))
        items.append(Item(id=id_, subset=subset, prompt=texts.get(id_, ""), right=right, scores=scores))
    return _whole(items, folder)


def _number(value: Any) -> float:
    return float(value[0] if isinstance(value, list) else value)


def _whole(items: Sequence[Item], path: Path) -> Pool:
    """The items that every tool has scored, finitely and in full."""
    tools = sorted({tool for item in items for tool in item.scores})
    kept = [
        item
        for item in items
        if all(
            len(item.scores.get(tool, ())) == len(item.right) and all(map(math.isfinite, item.scores[tool]))
            for tool in tools
        )
    ]
    if len(kept) < 2 or len(tools) < 2:
        raise DataError(f"{path}: {len(kept)} items have scores of all {len(tools)} tools; at least 2 of either")
    return Pool(tools=tuple(tools), items=tuple(kept))


# --- How selections are counted ---------------------------------------------------------------------------------------


def official(scores: Sequence[float], right: Sequence[bool]) -> float:
    """RewardBench 2's result of an item outside of Ties."""
    return rank_first(scores, right)


def softmax_half(scores: Sequence[float], right: Sequence[bool]) -> float:
    """The RLAR paper's rule: 1 if the softmax of the scores gives the right answers more than half."""
    top = max(scores)
    masses = [math.exp(score - top) for score in scores]
    good = sum(mass for mass, is_right in zip(masses, right, strict=True) if is_right)
    return float(good / sum(masses) > 0.5)


def ties_score(items: Sequence[Item], scores: Sequence[Sequence[float]]) -> float:
    """RewardBench 2's score of the subset Ties. Ids are ``ref:N`` (one right answer) and ``tied:N`` (several).

    30 % each: how often all right answers are above all wrong ones, in tied and in reference prompts; 20 % each: how
    often the spread among right answers is smaller than their distance from the wrong ones, in the tied prompt, and in
    the worse of both; and a hundredth of how much smaller. So it may reach 1.01, as upstream.
    """
    stats: dict[str, dict[str, tuple[bool, float, float]]] = {"ref": {}, "tied": {}}
    for item, said in zip(items, scores, strict=True):
        sort, _, number = item.id.partition(":")
        good = [score for score, is_right in zip(said, item.right, strict=True) if is_right]
        bad = [score for score, is_right in zip(said, item.right, strict=True) if not is_right]
        distance = min(good) - max(bad)
        stats["ref" if sort == "ref" else "tied"][number] = distance > 0, max(good) - min(good), distance

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values) if values else 0.0

    both = [number for number in stats["tied"] if number in stats["ref"]]
    preferred, hard, margins = [], [], []
    for number in both:
        _, spread, distance = stats["tied"][number]
        worse = min(distance, stats["ref"][number][2])
        preferred.append(float(distance > spread))
        hard.append(float(worse > spread))
        margins.append(math.tanh(worse / spread - 1) if spread else math.copysign(1.0, worse) if worse else 0.0)
    return (
        0.3 * mean([float(accurate) for accurate, _, _ in stats["tied"].values()])
        + 0.3 * mean([float(accurate) for accurate, _, _ in stats["ref"].values()])
        + 0.2 * mean(preferred)
        + 0.2 * mean(hard)
        + 0.01 * mean(margins)
    )


def leaderboard(name: str, pool: Pool, scores: Sequence[Sequence[float]]) -> dict[str, Any]:
    """A results file as the leaderboard has them: model, type, and a figure for every subset."""
    result: dict[str, Any] = {"model": name, "model_type": "Router of saved scores", "chat_template": "tokenizer"}
    for subset in sorted({item.subset for item in pool.items}):
        pairs = [(item, said) for item, said in zip(pool.items, scores, strict=True) if item.subset == subset]
        if subset.lower() == TIES:
            result[subset] = ties_score([item for item, _ in pairs], [said for _, said in pairs])
        else:
            result[subset] = sum(official(said, item.right) for item, said in pairs) / len(pairs)
    return result
