# SPDX-License-Identifier: Apache-2.0
"""The coder on tasks with hidden labelled answers: what was admitted, what it took, and how often it is right.

    python recipes/benchmarks/coder.py                                  # by the cassettes of tests/cassettes
    python recipes/benchmarks/coder.py --url http://127.0.0.1:8000/v1 --model NAME          # by a live LLM
    python recipes/benchmarks/coder.py --only units --url ... --model ... --record FOLDER   # and keep its traffic
    python recipes/benchmarks/coder.py --json                           # prints one object last

Each task has rows with labelled answers, which the coder and the exam get, and as many others, which only this script
sees. The exit code is 0 only if at least 80 % of the tasks end with an admitted verifier that is right on 99 % of
those.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import gzip
import json
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from verl_rlar.agents.bench import Admitted
from verl_rlar.agents.coder import Written, write
from verl_rlar.config import RlarConfig, parse
from verl_rlar.errors import CassetteError, ToolError
from verl_rlar.exam.hall import Hall
from verl_rlar.rows import query_of
from verl_rlar.types import Sample

ROOT = Path(__file__).resolve().parent.parent.parent
CASSETTES = ROOT / "tests" / "cassettes"
QUERIES = 30
"""Queries of a task, and as many hidden ones."""
RIGHT = 0.99
"""Share of the hidden answers on which a verifier must be right."""
GOALS = {"solved": ">= 0.8 of the tasks"}
Row = dict[str, Any]
CONSOLE = Console(stderr=True)


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task: its words, and rows with a labelled answer each (``is_correct``), those of the exam and hidden ones."""

    name: str
    words: str
    rows: Callable[[random.Random], Iterator[tuple[Any, Any, list[str], list[str]]]]
    """Queries: prompt, reference (a dict: further columns, and no reference), right responses, wrong responses."""
    queries: int = QUERIES

    def parts(self) -> tuple[list[Row], list[Row]]:
        """The rows that the coder gets, and the hidden ones; no query is in both."""
        found: dict[str, list[Row]] = {}
        for prompt, reference, right, wrong in self.rows(random.Random(self.name)):
            if prompt not in found:
                found[prompt] = [
                    {
                        "prompt": prompt,
                        **({"extra": reference} if isinstance(reference, dict) else {"reference": reference}),
                        "response": response,
                        "is_correct": correct,
                    }
                    for correct, responses in ((True, right), (False, wrong))
                    for response in responses
                ]
            if len(found) == 2 * self.queries:
                break
        listed = list(found.values())
        seen, hidden = listed[: self.queries], listed[self.queries :]
        return [row for rows in seen for row in rows], [row for rows in hidden for row in rows]


def gsm8k(rng: random.Random) -> Iterator[tuple[str, str, list[str], list[str]]]:
    """Real answers of four models."""
    with gzip.open(ROOT / "recipes" / "data" / "gsm8k_model_solutions.jsonl.gz", "rt", encoding="utf-8") as file:
        found: dict[str, list[Row]] = {}
        for line in file:
            row = json.loads(line)
            found.setdefault(row["question"], []).append(row)
    questions = sorted(found)
    rng.shuffle(questions)
    for question in questions:
        rows = found[question]
        reference = rows[0]["ground_truth"].rpartition("A:")[2].strip()
        right, wrong = ([r["response"] for r in rows if r["is_correct"] is label] for label in (True, False))
        yield question, reference, right, wrong


def units(rng: random.Random) -> Iterator[tuple[str, str, list[str], list[str]]]:
    """Lengths, masses and times in another unit."""
    names = {"m": "metres", "km": "kilometres", "cm": "centimetres", "g": "grams", "kg": "kilograms"}
    names |= {"min": "minutes", "h": "hours", "s": "seconds"}
    ways = (("km", "m", 1000), ("m", "cm", 100), ("kg", "g", 1000), ("h", "min", 60), ("min", "s", 60))
    while True:
        source, target, factor = rng.choice(ways)
        number = rng.choice([rng.randint(2, 60), rng.randint(5, 99) / 4])
        value = number * factor
        text = f"{value:g}" if value < 1e5 else f"{value:.0f}"
        prompt = f"Convert {number:g} {names[source]} to {names[target]}. Give the number with its unit."
        right = [f"{text} {target}", f"That is {value:,g} {names[target]}." if value < 1e5 else f"{text}{target}"]
        right.append(f"1 {source} is {factor} {target}, so {number:g} {source} is {text} {target}.")
        wrong = [f"{text} {source}", f"It is {value * 10:.10g} {target}.", f"{text}", f"-{text} {target}"]
        wrong += [f"{value + 1:.10g} {names[target]}", f"{text} {target} or {value / 10:.10g} {target}"]
        yield prompt, f"{text} {target}", right, wrong


def dates(rng: random.Random) -> Iterator[tuple[str, str, list[str], list[str]]]:
    """A date some days before or after another one."""
    while True:
        start = date(2000, 1, 1) + timedelta(rng.randrange(9000))
        days = rng.choice([-1, 1]) * rng.randint(3, 400)
        end = start + timedelta(days)
        side = "after" if days > 0 else "before"
        prompt = f"Which date is {abs(days)} days {side} {start.isoformat()}?"

        def spelled(day: date) -> str:
            return f"{day.day} {day:%B} {day.year}"

        right = [f"It is {end.isoformat()}.", spelled(end)]
        right.append(f"{start.isoformat()} is the start.\nThe answer is {end:%B} {end.day}, {end.year}.")
        others = [end + timedelta(1), end - timedelta(1), end + timedelta(365), start]
        wrong = [f"It is {others[0].isoformat()}.", spelled(others[1]), f"The answer is {others[2].isoformat()}."]
        wrong += [f"{start.isoformat()}", f"{end.isoformat()} or {others[0].isoformat()}", f"{end.year}-{end.month:02}"]
        yield prompt, end.isoformat(), right, wrong


WORDS = "apple cedar fig grape iris kiwi lemon maple olive peach quince rose sage thyme violet walnut".split()


def sorting(rng: random.Random) -> Iterator[tuple[str, str, list[str], list[str]]]:
    """Words in alphabetical order."""
    while True:
        chosen = rng.sample(WORDS, rng.randint(4, 6))
        done = sorted(chosen)
        if chosen == done:
            continue
        swapped = [done[1], done[0], *done[2:]]
        other = next(word for word in WORDS if word not in chosen)
        prompt = f"Put these words in alphabetical order: {', '.join(chosen)}."
        right = [", ".join(done), "Sorted:\n" + "\n".join(f"- {word}" for word in done)]
        right.append("\n".join(f"{place}. {word.title()}" for place, word in enumerate(done, start=1)))
        wrong = [", ".join(swapped), ", ".join(done[:-1]), ", ".join(chosen), ", ".join([*done, other])]
        wrong += [", ".join(done[::-1]), ", ".join([*done, done[-1]]), f"{', '.join(done)}\nNo: {', '.join(swapped)}"]
        yield prompt, ", ".join(done), right, wrong


def solutions(rng: random.Random) -> Iterator[tuple[str, str, list[str], list[str]]]:
    """Both solutions of a quadratic equation, in any order."""
    while True:
        first, second = sorted(rng.sample([n for n in range(-12, 13) if n], 2))
        total, product = -(first + second), first * second
        terms = f"x^2 {'+' if total >= 0 else '-'} {abs(total)}x {'+' if product >= 0 else '-'} {abs(product)} = 0"
        if not total:
            continue
        prompt = f"Find all real solutions of {terms}. List them, separated by commas."
        right = [
            f"{second}, {first}",
            f"The solutions are x = {first} and x = {second}.",
            f"\\boxed{{{first}, {second}}}",
        ]
        wrong = [f"{first}", f"x = {second}", f"{first}, {second}, {second + 1}", f"{-first}, {-second}"]
        wrong += [f"The solutions are x = {first} and x = {second + 1}.", f"{first}, {first}"]
        if first == -second:
            continue
        yield prompt, f"{first}, {second}", right, wrong


TOPICS = "rain trains bread winter chess rivers music gardens winds letters".split()


def sentences(rng: random.Random) -> Iterator[tuple[str, dict[str, Any], list[str], list[str]]]:
    """Demands in words of our own: so many words, one that must be there, no comma."""
    while True:
        topic, must, count = rng.choice(TOPICS), rng.choice(WORDS), rng.randint(5, 11)
        if topic == must:
            continue
        prompt = (
            f"Write about {topic} in exactly {count} words, with the word '{must}' among them and without any comma."
        )

        def made(length: int, *words: str) -> str:
            said = [
                *words,
                *rng.choices("we all know that this is old and quiet here today".split(), k=length - len(words)),
            ]
            rng.shuffle(said)
            return " ".join(said).capitalize() + "."

        right = [made(count, topic, must), made(count, must), made(count, topic, must).rstrip(".") + "!"]
        whole = made(count, topic, must).split()
        wrong = [
            made(count + 1, topic, must),
            made(count - 1, must),
            made(count, topic),
            made(count, topic, f"{must}s"),
        ]
        wrong.append(" ".join([f"{whole[0]},", *whole[1:]]))
        yield prompt, {}, right, wrong


def programs(rng: random.Random) -> Iterator[tuple[str, dict[str, Any], list[str], list[str]]]:
    """Functions of MBPP, and what is nearly one."""
    with gzip.open(ROOT / "recipes" / "data" / "mbpp.jsonl.gz", "rt", encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    rng.shuffle(lines)
    for line in lines:
        name = line["entry_point"]
        head = next((part for part in line["prompt"].split("\n") if part.startswith(f"def {name}(")), "")
        if not (head and line.get("canonical_solution") and of_literals(line["test"])):
            continue
        whole = line["prompt"].strip("\n") + "\n" + line["canonical_solution"].rstrip() + "\n"
        wrong = [f"{head}\n    return None\n", f"{head}\n    import sys\n    sys.exit(0)\n", "I would use a loop."]
        wrong.append(f"```python\n{head}\n    print('all tests passed')\n```")
        wrong.append(f"{head}\n    return {first_value(line['test'])!r}\n")
        extra = {"test": line["test"], "entry_point": name}
        yield line["prompt"], extra, [whole, f"```python\n{whole}```"], wrong


def first_value(test: str) -> object:
    """What the first test wants."""
    compared = next(node.test for node in ast.walk(ast.parse(test)) if isinstance(node, ast.Assert))
    assert isinstance(compared, ast.Compare)
    return ast.literal_eval(compared.comparators[0])


def of_literals(test: str) -> bool:
    """Whether tests compare calls with literals, and do nothing else."""
    asserts = [node.test for node in ast.walk(ast.parse(test)) if isinstance(node, ast.Assert)]
    for compared in asserts:
        if not isinstance(compared, ast.Compare) or not isinstance(compared.ops[0], ast.Eq):
            return False
        try:
            if ast.literal_eval(compared.comparators[0]) is None:
                return False
        except ValueError:
            return False
    return bool(asserts) and "import" not in test


def extraction(rng: random.Random) -> Iterator[tuple[str, str, list[str], list[str]]]:
    """Three facts of a sentence as JSON."""
    names, cities = "Ada Ben Cleo Dan Eva Finn Gia Hugo".split(), "Lima Oslo Rome Cairo Quito Delhi Paris Seoul".split()
    while True:
        first, city, age = rng.choice(names), rng.choice(cities), rng.randint(18, 80)
        name = f"{first} {rng.choice(['Lopez', 'Smith', 'Weber', 'Costa'])}"
        true = {"name": name, "age": age, "city": city}
        prompt = f'Give name, age and city as JSON: "{name} is {age} and has lived in {city} for ten years."'
        right = [f"```json\n{json.dumps(true, indent=2)}\n```", json.dumps(dict(reversed(true.items())))]
        right.append(f"Here is the JSON:\n{json.dumps(true)}")
        wrong = [
            json.dumps(true | {"age": age + 1}),
            json.dumps(true | {"city": first}),
            json.dumps(true | {"job": "x"}),
        ]
        wrong += [json.dumps({"name": name, "age": age}), json.dumps(true | {"age": str(age)}), str(true)]
        wrong.append(f"{json.dumps(true)}\n{json.dumps(true | {'age': age - 1})}")
        yield prompt, json.dumps(true), right, wrong


def intervals(rng: random.Random) -> Iterator[tuple[str, str, list[str], list[str]]]:
    """The solutions of an inequality as an interval, in LaTeX or not."""
    while True:
        low, shift = rng.randint(-20, 15), rng.randint(1, 9)
        high = low + rng.randint(2, 12)
        closed_low, closed_high = rng.random() < 0.5, rng.random() < 0.5
        signs = ("\\le" if closed_low else "<", "\\le" if closed_high else "<")
        left, close = "[" if closed_low else "(", "]" if closed_high else ")"
        other_left, other_close = "(" if closed_low else "[", ")" if closed_high else "]"
        prompt = f"Solve ${low + shift} {signs[0]} x + {shift} {signs[1]} {high + shift}$. Give an interval."
        right = [f"$x \\in \\left{left}{low}, {high}\\right{close}$", f"The answer is ${left}{low},{high}{close}$."]
        right.append(f"We subtract {shift}.\n\\boxed{{{left}{low}, {high}{close}}}")
        wrong = [
            f"{other_left}{low}, {high}{close}",
            f"${left}{low}, {high}{other_close}$",
            f"{left}{low}, {high + 1}{close}",
        ]
        wrong += [f"{left}{low + shift}, {high + shift}{close}", f"{left}{high}, {low}{close}", f"{low}, {high}"]
        wrong.append(f"{left}{low}, {high}{close} or {other_left}{low}, {high}{close}")
        yield prompt, f"{left}{low}, {high}{close}", right, wrong


def stdin(rng: random.Random) -> Iterator[tuple[str, dict[str, Any], list[str], list[str]]]:
    """Programs that read numbers and print one."""
    tests = {"even": "n % 2 == 0", "odd": "n % 2 == 1", "positive": "n > 0", "negative": "n < 0"}
    tests |= {"divisible by 3": "n % 3 == 0", "greater than 4": "n > 4", "less than 7": "n < 7"}
    ways = {"sum": "sum(kept)", "maximum": "max(kept, default=0)", "minimum": "min(kept, default=0)"}
    ways |= {"number": "len(kept)", "sum of squares": "sum(n * n for n in kept)"}
    chosen = [(way, test) for way in ways for test in tests]
    rng.shuffle(chosen)
    for way, test in chosen:
        prompt = (
            f"Write a program that reads integers from one line and prints the {way} of those that are {test}, or 0."
        )
        lists = [[rng.randint(-9, 15) for _ in range(rng.randint(3, 8))] for _ in range(4)]

        def solved(numbers: list[int], way: str = way, test: str = test) -> int:
            kept = [n for n in numbers if eval(tests[test], {"n": n})]  # of our own texts above
            return int(eval(ways[way], {"kept": kept}))

        outputs = [solved(numbers) for numbers in lists]
        if len(set(outputs)) < 3:
            continue
        cases = {"inputs": [" ".join(map(str, ns)) + "\n" for ns in lists], "outputs": [f"{out}\n" for out in outputs]}
        read = "numbers = list(map(int, input().split()))\n"
        whole = f"{read}kept = [n for n in numbers if {tests[test]}]\nprint({ways[way]})\n"
        right = [whole, f"This reads and prints.\n\n```python\n{whole}```\n"]
        wrong = [
            f"{read}kept = numbers[1:]\nprint({ways[way]} + 1)\n",
            f"print({outputs[0]})\n",
            "import sys\nsys.exit(0)\n",
        ]
        wrong += [whole.replace("print(", "print('It is', "), "I would use a loop.", f"print(*{outputs}, sep='\\n')\n"]
        yield prompt, {"test_cases": cases}, right, wrong


TERMS = {
    "valve": ("Absperrventil", ("Hahn", "Klappe")),
    "pump": ("Tauchpumpwerk", ("Pumpe", "Tauchpumpe")),
    "gearbox": ("Getriebegehäuse", ("Getriebe", "Zahnradkasten")),
    "sensor": ("Messwertgeber", ("Sensor", "Fühler")),
    "filter": ("Feinstaubsieb", ("Filter", "Luftfilter")),
    "display": ("Anzeigefeld", ("Bildschirm", "Display")),
}
"""A glossary: the English word, what it must be called in German, and what it is usually called."""
USES = (
    (
        "Check the {a} before you switch on the {b}.",
        ("Bitte {a} prüfen, bevor {b} eingeschaltet wird.", "Erst die Prüfung des {a}s, dann {b} einschalten."),
    ),
    (
        "The {a} next to the {b} must be replaced every year.",
        ("Jedes Jahr muss das neue {a} neben {b} eingesetzt werden.", "Neben {b} ist jährlich {a} auszutauschen."),
    ),
    (
        "Never open the {a} while the {b} is hot.",
        ("Niemals {a} öffnen, solange {b} heiß ist.", "Solange {b} heiß ist, darf {a} nie geöffnet werden."),
    ),
    (
        "If the {a} is wet, clean the {b} with a dry cloth.",
        ("Falls {a} nass ist, {b} mit einem trockenen Tuch reinigen.", "Ist {a} nass, so wird {b} trocken gereinigt."),
    ),
)
"""English sentences about two things, with two translations each."""


def terminology(rng: random.Random) -> Iterator[tuple[str, dict[str, Any], list[str], list[str]]]:
    """Translations into German that must call two things as a glossary says."""
    while True:
        source, (first, second) = rng.choice(USES)
        a, b = rng.sample(sorted(TERMS), 2)
        (term_a, usual_a), (term_b, usual_b) = TERMS[a], TERMS[b]
        english = source.format(a=a, b=b)
        prompt = f'Translate into German: "{english}" Glossary: {a} = {term_a}; {b} = {term_b}.'
        other_a, other_b = rng.choice(usual_a), rng.choice(usual_b)
        right = [first.format(a=term_a, b=term_b), second.format(a=term_a, b=term_b)]
        right.append(f"Hier ist die Übersetzung:\n\n{rng.choice((first, second)).format(a=term_a, b=term_b)}")
        wrong = [first.format(a=other_a, b=term_b), second.format(a=term_a, b=other_b)]
        wrong += [second.format(a=other_a, b=other_b), first.format(a=a, b=term_b), f"{term_a}, {term_b}"]
        wrong += [source.format(a=term_a, b=term_b), first.format(a=f"{term_a}deckel", b=term_b)]
        wrong.append(f"{first.format(a=term_a, b=term_b)} Oder: {second.format(a=other_a, b=other_b)}")
        yield prompt, {"glossary": {a: term_a, b: term_b}}, right, wrong


TASKS = (
    Task(name="gsm8k", words="the final number of a worked solution is that of the reference", rows=gsm8k),
    Task(name="units", words="a quantity is the right number in the unit that is asked for", rows=units),
    Task(name="dates", words="a date, however it is written, is that of the reference", rows=dates),
    Task(name="sorting", words="the words of the prompt are listed in the reference's order, each once", rows=sorting),
    Task(name="solutions", words="all solutions are listed, in any order, and no other number", rows=solutions),
    Task(name="sentences", words="a text keeps the demands of its prompt: words, a word, no comma", rows=sentences),
    Task(name="programs", words="the function passes its tests, and does not cheat", rows=programs, queries=16),
    Task(
        name="extraction",
        words="the response is JSON with the three facts of the prompt, and no other",
        rows=extraction,
    ),
    Task(name="intervals", words="an interval with the right ends, each open or closed as it must be", rows=intervals),
    Task(name="stdin", words="the program prints what its tests expect for their inputs", rows=stdin, queries=14),
    Task(
        name="terminology",
        words="a German translation calls things as the prompt's glossary says, each term as a word of its own",
        rows=terminology,
    ),
)


def config_of(arguments: argparse.Namespace, folder: Path) -> RlarConfig:
    """The settings of a run."""
    base = os.environ.get("RLAR_TEST_BASE")
    agents: dict[str, Any] = {"url": arguments.url, "model": arguments.model, "wall_s": 3600}
    return parse(
        {
            "run_dir": str(folder),
            "agents": {**agents, "timeout_s": 900},
            "exam": {"max_queries": QUERIES, "repeats": 24},
            "sandbox": {"base": base} if base else {},
        }
    )


def written(task: Task, arguments: argparse.Namespace, folder: Path) -> Written:
    """Runs the coder on a task."""
    rows, _ = task.parts()
    file = folder / f"{task.name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    replay = None if arguments.url else Path(arguments.cassettes) / f"write_{task.name}.jsonl"
    if replay and not replay.exists():
        raise CassetteError(f"there is no cassette {replay}; give --url and --model")
    return write(
        task.words,
        [str(file)],
        config_of(arguments, folder),
        folder=folder / "agents",
        name=task.name,
        record=Path(arguments.record) / f"write_{task.name}.jsonl" if arguments.record else None,
        note=arguments.note,
        replay=replay,
        on_event=lambda kind, what: CONSOLE.print(f"{task.name}: {kind} {getattr(what, 'state', '')}", highlight=False),
    )


async def accuracy(admitted: Admitted, rows: list[Row], config: RlarConfig) -> float:
    """Share of labelled answers on which a verifier is right."""
    right = 0
    async with Hall(config) as hall:
        for row in rows:
            try:
                verdict = await hall.run(admitted.subject, Sample(query=query_of(row), response=row["response"]))
            except ToolError:
                continue
            right += verdict.value is not None and (verdict.value >= 0.5) is row["is_correct"]
    return right / len(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=[task.name for task in TASKS], help="Repeatable.")
    parser.add_argument("--url", help="Base address of an OpenAI-compatible endpoint.")
    parser.add_argument("--model")
    parser.add_argument("--cassettes", default=str(CASSETTES), help="Where cassettes are, without --url.")
    parser.add_argument("--record", help="Folder for new cassettes.")
    parser.add_argument("--note", default="", help="What they say about who wrote the answers.")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    chosen = [task for task in TASKS if not arguments.only or task.name in arguments.only]
    table = Table("task", "schemes", "versions", "tokens", "cases", "sealed", "came to", "right on hidden", box=None)
    figures: dict[str, Any] = {"tasks": len(chosen), "solved": 0}
    with tempfile.TemporaryDirectory() as place:
        for task in chosen:
            came = written(task, arguments, Path(place))
            _, hidden = task.parts()
            right = 0.0
            if came.admitted:
                right = asyncio.run(accuracy(came.admitted, hidden, config_of(arguments, Path(place))))
            figures["solved"] += right >= RIGHT
            figures[task.name] = {
                "schemes": len(came.schemes),
                "versions": len(came.trials),
                "tokens": came.agent.tokens,
                "admitted": came.admitted is not None,
                "wraps": [one.partition("@")[0] for one in came.admitted.subject.spec.wraps] if came.admitted else [],
                "hidden_answers": len(hidden),
                "right": round(right, 4),
            }
            cells = (len(came.schemes), len(came.trials), came.agent.tokens, came.cases, came.sealed, came.why)
            table.add_row(task.name, *map(str, cells), f"{right:.4f} of {len(hidden)}" if came.admitted else "-")
    Console(width=160).print(table)
    ok = figures["solved"] >= 0.8 * len(chosen)
    if arguments.json:
        print(json.dumps({"name": "coder", "figures": figures, "goals": GOALS, "ok": ok}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
