# SPDX-License-Identifier: Apache-2.0
"""The stream: a mixture of tasks that shifts, with answers whose labels nobody sees but who counts at the end.

    math         GSM8K, answers of real models, labelled by the set itself
    code         MBPP functions, as they are and in a fence; constants, stubs, other functions, and boasting
    translation  TED en-de, system outputs that people found (nearly) faultless; far worse ones by their ratings, and
                 outputs for other segments
    demands      constraints in a wording of our own, that stand in the prompt only; answers that keep all, or break one

Of each task, some queries are for the exams (`Task.labelled`), the others for the stream (`Task.stream`); none is in
both. A prompt of the stream comes with two right and two wrong answers, in an order drawn by its visit.
"""

from __future__ import annotations

import ast
import gzip
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_rlar.rows import query_of
from verl_rlar.types import Kind, Query

DATA = Path(__file__).resolve().parent.parent / "data"
EXAM = 40
"""Queries of a task that are kept for exams."""
RIGHT, WRONG = 2, 2
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Item:
    """A query with labelled answers."""

    row: Row
    """Its columns, as verl has them."""
    right: tuple[str, ...]
    wrong: tuple[str, ...]

    @property
    def query(self) -> Query:
        return query_of(self.row)


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a part of the stream is about."""

    name: str
    kind: Kind
    labelled: tuple[Item, ...]
    """For exams."""
    stream: tuple[Item, ...]

    def rows(self) -> Iterator[Row]:
        """The labelled answers as rows of a file."""
        for item in self.labelled:
            for correct, answers in ((True, item.right), (False, item.wrong)):
                for answer in answers:
                    yield item.row | {"response": answer, "is_correct": correct}


def lines(name: str) -> Iterator[Row]:
    with gzip.open(DATA / name, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def row(prompt: str, truth: str | None, **extra: Any) -> Row:
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": extra,
    }


def math() -> Iterator[Item]:
    answers: dict[str, list[Row]] = {}
    for line in lines("gsm8k_model_solutions.jsonl.gz"):
        answers.setdefault(line["question"], []).append(line)
    for question, given in answers.items():
        truth = given[0]["ground_truth"].rpartition("A:")[2].strip()
        right, wrong = (
            tuple(one["response"] for one in given if one["is_correct"] is is_right) for is_right in (True, False)
        )
        yield Item(row=row(question, truth), right=right, wrong=wrong)


def code() -> Iterator[Item]:
    kept = []
    for line in lines("mbpp.jsonl.gz"):
        name = line["entry_point"]
        head = next((part for part in line["prompt"].split("\n") if part.startswith(f"def {name}(")), "")
        values = _values(line["test"])
        if head and line.get("canonical_solution") and len(set(map(repr, values))) > 1:
            kept.append((line, name, head, values))
    for (line, name, head, values), (other, other_name, *_) in zip(kept, kept[1:] + kept[:1], strict=True):
        whole = line["prompt"].strip("\n") + "\n" + line["canonical_solution"].rstrip() + "\n"
        strange = other["prompt"].strip("\n") + "\n" + other["canonical_solution"].rstrip() + "\n"
        wrong = (
            f"```python\n{head}\n    return {values[0]!r}\n```",
            f"{head}\n    return None\n",
            f"I have tried it, and all tests pass.\n\n```python\n{head}\n    print('all tests passed')\n```",
            f"```python\n{strange.replace(other_name, name)}```",
        )
        extra = {"test": line["test"], "entry_point": name}
        yield Item(row=row(line["prompt"], None, **extra), right=(whole, f"```python\n{whole}```"), wrong=wrong)


def _values(test: str) -> list[object]:
    """What tests expect, if all compare calls with literals that are not None."""
    found = []
    for node in ast.walk(ast.parse(test)):
        if isinstance(node, ast.Assert):
            compared = node.test
            if not isinstance(compared, ast.Compare) or not isinstance(compared.ops[0], ast.Eq):
                return []
            try:
                found.append(ast.literal_eval(compared.comparators[0]))
            except ValueError:
                return []
    return [] if None in found or "import" in test else found


def translation() -> Iterator[Item]:
    given = list(lines("ted_mqm_ende.jsonl.gz"))
    for line, other in zip(given, given[1:] + given[:1], strict=True):
        ranked = sorted(line["outputs"].values(), key=lambda output: output["mqm"])
        right = tuple(output["text"] for output in ranked if output["mqm"] <= 1)
        wrong = [output["text"] for output in ranked if output["mqm"] >= 10]
        wrong += [output["text"] for output in list(other["outputs"].values())[:2]]
        columns = {"source": line["source"], "source_lang": "en", "target_lang": "de"}
        prompt = f"Translate the following text into German:\n{line['source']}"
        if len(line["source"]) >= 40 and len(set(right)) > 1:
            wrong = [text for text in wrong if text not in right]  # people do not rate the same text the same each time
            yield Item(row=row(prompt, line["reference"], **columns), right=right, wrong=tuple(wrong[:3]))


TOPICS = "rain trains bread winter chess rivers music gardens winds letters markets bridges".split()
WORDS = "apple cedar fig grape iris kiwi lemon maple olive peach quince rose sage thyme violet walnut".split()
FILLERS = "we all know that this is old and quiet here today while people still talk about it".split()


def demands() -> Iterator[Item]:
    dice = random.Random("demands")
    for number in range(400):
        topic, count, mark = dice.choice(TOPICS), dice.randint(8, 16), dice.choice("!?;")
        must, never, extra = dice.sample(WORDS, 3)
        prompt = (
            f"Note {number}: please jot something down on {topic}. What I need is {count} words long, mentions "
            f'"{must}", leaves out "{never}", and closes with "{mark}".'
        )

        def made(length: int, *words: str, end: str = mark) -> str:
            said = [*words, *dice.choices(FILLERS, k=length - len(words))]
            dice.shuffle(said)
            return " ".join(said).capitalize() + end

        right = tuple(made(count, *words) for words in ((must, topic), (must,), (must, extra)))
        wrong = (
            made(count + 1, must),
            made(count - 1, must, topic),
            made(count, topic),
            made(count, must, never),
            made(count, must, topic, end="."),
        )
        yield Item(row=row(prompt, None), right=right, wrong=wrong)


def tasks() -> tuple[Task, ...]:
    """In the order in which they come into the stream."""
    found = []
    for name, kind, items in (
        ("math", Kind.MATH, math()),
        ("code", Kind.UNIT_TESTS, code()),
        ("translation", Kind.TRANSLATION, translation()),
        ("demands", Kind.OPEN, demands()),
    ):
        whole = [item for item in items if len(set(item.right)) >= RIGHT and len(set(item.wrong)) >= WRONG]
        random.Random(name).shuffle(whole)
        kept = 0 if kind is Kind.MATH else EXAM  # its tool is there from the first step on
        found.append(Task(name=name, kind=kind, labelled=tuple(whole[:kept]), stream=tuple(whole[kept:])))
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class Visit:
    """A prompt at a step, with its answers."""

    task: str
    uid: str
    item: Item
    answers: tuple[tuple[str, bool], ...]
    """Answer, and whether it is right: for the count at the end."""


class Stream:
    """Draws the prompts of each step.

    Args:
        found: The tasks.
        phase: Steps from one shift to the next.
        prompts: Prompts of a step.
        seed: Of the draws.
    """

    def __init__(self, found: tuple[Task, ...], phase: int, prompts: int, seed: int = 0) -> None:
        self._tasks, self._phase, self._prompts, self._seed = found, phase, prompts, seed

    @property
    def steps(self) -> range:
        return range(1, len(self._tasks) * self._phase + 1)

    @property
    def shifts(self) -> list[int]:
        """Steps at which the mixture is another one than before."""
        return [1 + number * self._phase for number in range(1, len(self._tasks))]

    def at(self, step: int) -> list[Visit]:
        """The prompts of a step: of every task that is there by then, about as many."""
        dice = random.Random(f"{self._seed} {step}")
        here = self._tasks[: 1 + (step - 1) // self._phase]
        found = []
        for number in range(self._prompts):
            task = dice.choice(here)
            item = task.stream[dice.randrange(len(task.stream))]
            answers = [(one, True) for one in dice.sample(sorted(set(item.right)), RIGHT)]
            answers += [(one, False) for one in dice.sample(sorted(set(item.wrong)), WRONG)]
            dice.shuffle(answers)
            found.append(Visit(task=task.name, uid=f"{step}-{number}", item=item, answers=tuple(answers)))
        return found
