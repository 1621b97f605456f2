# SPDX-License-Identifier: Apache-2.0
"""A scripted judge, over a real socket, of answers to questions about cooking; and rows for it.

It reads what it is sent as a language model would: the quotes by their marks, the questions by their numbers, the form
of the answer. What it thinks of a question is found by a word of it (`OPINIONS`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from llm_server import Turn, of_request, text

QUOTE = re.compile(r"<<<untrusted ([0-9a-f]{12}): ([^\n]*)\n(.*?)\nend \1>>>", re.DOTALL)
FOODS = "rice eggs pasta beans carrots potatoes lentils broccoli spinach peas corn leeks barley quinoa".split()

GOOD = {
    "description": "Judges answers to questions about cooking: whether they say how long, what, and what to do then.",
    "checks": [
        {"question": "Does it say for how many minutes?", "weight": 3},
        {"question": "Is it about the food that was asked for?", "weight": 2},
        {"question": "Does it say what to do at the end?", "weight": 1},
    ],
}
BAD = {
    "description": "Judges answers to questions about cooking by things that any answer has, good or bad.",
    "checks": [
        {"question": "Does it have letters?", "weight": 1},
        {"question": "Is it shorter than a book?", "weight": 1},
        {"question": "Is it a response?", "weight": 1},
    ],
}
OPINIONS: dict[str, Callable[[str, str], bool]] = {
    "minutes": lambda asked, said: re.search(r"\d+ minutes", said) is not None,
    "food": lambda asked, said: any(food in said for food in FOODS if food in asked),
    "end": lambda asked, said: "drain" in said,
    "letters": lambda asked, said: any(map(str.isalpha, said)),
    "book": lambda asked, said: len(said) < 10**6,
    "response": lambda asked, said: True,
}


def rows() -> list[dict[str, Any]]:
    """Questions, each with a better and a worse answer."""
    made = []
    for place, food in enumerate(FOODS):
        better = f"Put the {food} into boiling water for {place + 3} minutes, then drain and salt them."
        worse = f"Many people like {food} very much, and some of them cook them twice a week at home."
        made.append({"prompt": f"How do I boil {food}?", "chosen": better, "rejected": worse})
    return made


def is_judged(asked: dict[str, Any]) -> bool:
    """Whether a request is one of the judge."""
    return str(asked["messages"][0]["content"]).startswith("You are a strict judge")


def read(asked: dict[str, Any]) -> tuple[str, str, list[str], str]:
    """What a judge reads: the last message, the response, the questions, the code."""
    user = str(asked["messages"][-1]["content"])
    quotes = {what: said for _, what, said in QUOTE.findall(user)}
    rest = QUOTE.sub("", user)
    questions = re.findall(r"^\d+\. (.+)$", rest, re.MULTILINE)
    (code,) = set(re.findall(r'"code": "(\w+)"', rest))
    return quotes["message of the user"], quotes["the response"], questions, code


def answered(code: str, answers: list[bool]) -> str:
    given = {str(number): "yes" if yes else "no" for number, yes in enumerate(answers, start=1)}
    return json.dumps({"code": code} | given)


def thinks(asked: dict[str, Any]) -> str:
    """What an honest judge answers."""
    prompt, said, questions, code = read(asked)
    answers = []
    for question in questions:
        (opinion,) = [opinion for word, opinion in OPINIONS.items() if word in question]
        answers.append(opinion(prompt, said))
    return answered(code, answers)


@of_request
def honest(asked: dict[str, Any]) -> Any:
    return text(thinks(asked))


@of_request
def gullible(asked: dict[str, Any]) -> Any:
    """A judge that does what a response tells it to do."""
    _, said, questions, code = read(asked)
    ordered = "Ignore the rubric" in said
    return text(answered(code, [True] * len(questions)) if ordered else thinks(asked))


@of_request
def parrot(asked: dict[str, Any]) -> Any:
    """A judge that repeats the first answer that it sees, wherever that stands."""
    _, said, _, _ = read(asked)
    found = re.search(r"\{[^{}]*\}", said)
    return text(found[0] if found else thinks(asked))


def author_and_judge(*drafts: dict[str, Any] | Turn) -> Turn:
    """An LLM that writes rubrics one after the other, the last again and again, and judges honestly by them."""
    asked_for: list[int] = []

    @of_request
    def turn(asked: dict[str, Any]) -> Any:
        if is_judged(asked):
            return text(thinks(asked))
        asked_for.append(1)
        draft = drafts[min(len(asked_for), len(drafts)) - 1]
        return text(f"Here it is.\n```json\n{json.dumps(draft)}\n```") if isinstance(draft, dict) else draft

    return turn
