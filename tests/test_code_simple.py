# SPDX-License-Identifier: Apache-2.0
"""Tests without a judge (`verl_rlar.tools.rules.code_simple`) end as with one, on real rows and made-up answers."""

from __future__ import annotations

import copy
import gzip
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from verl_rlar import sandbox
from verl_rlar.tools import rules
from verl_rlar.tools.rules.code_tests import Program, is_known, plan_of
from verl_rlar.types import Message, Query

DATA = Path(__file__).parent.parent / "recipes" / "data"
JUDGE = """
import json, os, sys, types
sys.path.append(sys.argv[1])
code = compile(open(sys.argv[2]).read(), "code_judge.py", "exec")
import values
rlar = types.ModuleType("rlar")
asks = []
def ask(**question):
    asks.append(question)
    raise KeyboardInterrupt("the judge asks")
rlar.ask = ask
sys.modules["rlar"] = rlar
out, sys.stdout = sys.stdout, open(os.devnull, "w")
for line in sys.stdin:
    job = json.loads(line)
    if "program" in job:  # a reference solution, which may run here
        module = types.ModuleType("program")
        reply = []
        try:
            exec(job["program"], module.__dict__)
        except SyntaxError:  # one of MBPP's
            job["calls"] = []
        for call in job["calls"]:
            try:
                reply.append({"value": values.encode(values.evaluate(call, module.__dict__))})
            except Exception as error:
                reply.append({"raised": type(error).__name__, "text": str(error)})
    else:
        code_judge = types.ModuleType("code_judge")
        exec(code, code_judge.__dict__)
        value, text = code_judge.score(job["plan"], job["answers"], job["partial"])
        reply = [value, json.loads(text), len(asks)]
        asks.clear()
    out.write(json.dumps(reply) + "\\n")
    out.flush()
"""
ODD: tuple[Any, ...] = (
    {"value": None},
    {"value": True},
    {"value": 0},
    {"value": 1.5},
    {"value": "a"},
    {"value": []},
    {"value": {"float": "nan"}},
    {"value": {"int": hex(2**70)}},
    {"value": {"tuple": [1, [2, "x"]]}},
    {"value": {"set": [1, 2]}},
    {"value": {"dict": [["a", 1]]}},
    {"value": {"dict": [[[], 1]]}},
    {"value": {"opaque": "Thing"}},
    {"value": {"iterator": [1, 2]}},
    {"value": {"nothing": 1}},
    {"value": {"tuple": 3}},
    {"raised": "ValueError", "text": "no: "},
    {"raised": "AssertionError", "text": ""},
    {"raised": "NameError", "text": "name 'x' is not defined"},
    {"raised": "SystemExit", "text": "1"},
    {"raised": "Own", "text": "own"},
    {"stopped": "the program took too long"},
)


class Judge:
    """The real judge, in a process of its own."""

    def __init__(self) -> None:
        paths = [str(Path(sandbox.__file__).parent), str(Path(rules.__file__).parent / "code_judge.py")]
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-c", JUDGE, *paths], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def close(self) -> None:
        self._process.communicate()

    def ask(self, **job: Any) -> Any:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(job).encode() + b"\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    real = Judge()
    yield real
    real.close()


def plan(tests: str, entry: str = "f", prompt: str = "Write f.") -> Program:
    query = Query(messages=(Message(role="user", content=prompt),), extra={"test": tests, "entry_point": entry})
    found, _ = plan_of(query)
    assert isinstance(found, Program)
    return found


def agree(judge: Judge, program: Program, answers: list[Any], *, partial: bool) -> bool:
    """Whether the tests were judged without the judge; fails if it says something else."""
    assert program.simple is not None
    outcome = program.simple.judge(program.keys, copy.deepcopy(answers), partial=partial)
    if outcome is None:
        return False
    value, counts, asked = judge.ask(plan=program.for_judge, answers=answers, partial=partial)
    if asked:  # the members of a set have another order there
        return True
    mine = (float(outcome.failed is None), outcome.passed, outcome.cases, list(outcome.failed or ()) or None)
    assert mine == (value, counts["passed"], counts["cases"], counts["failed"]), (program.tests, answers)
    return True


@pytest.mark.slow
@pytest.mark.parametrize(("name", "share"), [("humaneval", 0.85), ("mbpp", 0.98)])
def test_real_tests_are_judged_as_the_judge_does_whatever_the_program_answers(
    judge: Judge, name: str, share: float
) -> None:
    with gzip.open(DATA / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    dice = random.Random(0)
    simple = 0
    for row in rows:
        program = plan(row["test"], row["entry_point"], row["prompt"])
        if program.simple is None:
            continue
        source = f"{row['prompt']}{row['canonical_solution']}\n"
        right = judge.ask(program=source, calls=program.calls)
        if not right:
            continue
        simple += agree(judge, program, right, partial=False)
        for number in range(4):
            answers = list(right)
            for _ in range(dice.randint(1, 2)):
                answers[dice.randrange(len(answers))] = dice.choice([*ODD, *right])
            if not number:
                answers = [*answers[: dice.randrange(len(answers) + 1)], {"stopped": "the program left"}]
            agree(judge, program, answers, partial=bool(number % 2))
    assert simple >= share * len(rows)


@pytest.mark.parametrize(
    "tests",
    [
        "assert f(1) == 2\nassert f(2) == 3, 'not three'",
        "def check(candidate):\n    assert candidate(1) == 2\n    assert not candidate(2)\ncheck(f)",
        "def test_a():\n    'one'\n    assert f(1) == 2\ndef test_b():\n    assert f(1) != 3 and f(2) is None",
        "assert f(1) < 2 <= f(2) or f(3)\nassert True",
        "assert abs(f(1) - 2) < 1e-6\nassert round(f(2), 2) == 0.5\nassert len(f(3)) == 2",
        "assert sorted(f(1)) == [1, 2] and set(f(2)) == {1, 2}\nassert 1 in f(3)\nassert f(4) not in (1, 2)",
        "from typing import List\nimport math\nassert tuple(f([1, 2])) == (1, [2, 'x'])\nassert f(x=1) == set([1, 2])",
        "from solution import f\nassert f(f(1)) == 2\nassert f(2) is True",
    ],
)
def test_simple_forms_are_judged_as_the_judge_does(judge: Judge, tests: str) -> None:
    program = plan(tests)
    assert program.simple is not None
    dice = random.Random(0)
    done = 0
    for number in range(300):
        answers = [dice.choice(ODD) for _ in program.calls]
        done += agree(judge, program, answers, partial=bool(number % 2))
    assert done > 20


@pytest.mark.parametrize(
    "tests",
    [
        "x = f(1)\nassert x == 2",
        "assert f(f(1)) == 2\nassert f(1) == 3",
        "for n in range(3):\n    assert f(n) == n",
        "import pandas\nassert f(1) == 2",
        "from math import nothing\nassert f(1) == 2",
        "from math import gcd as f\nassert f(1, 2) == 1",
        "def abs(x):\n    return 0\nassert abs(f(1)) == 0",
        "from numpy import *\nassert abs(f(1)) == 0",
        "assert f(1) is f(1)",
        "assert f(1) % 2 == 0",
        "assert f(1) == open('x')",
        "def test(x=1):\n    assert f(1) == 1",
        "def test():\n    assert f(1) == 1\ntest()\ntest()",
        "try:\n    assert f(1) == 1\nexcept ValueError:\n    pass",
    ],
)
def test_what_is_not_simple_is_the_judges(tests: str) -> None:
    assert plan(tests).simple is None


def test_large_or_colliding_answers_are_the_judges_at_once() -> None:
    program = plan("assert f(1) == 2\nassert set(f(2)) == {1}")
    assert program.simple is not None
    nested: Any = 1
    for _ in range(200):
        nested = [nested]
    for content in (
        [0] * 1_000_000,
        "a" * 1_000_000,
        {"set": [{"int": hex(n * (2**61 - 1))} for n in range(50_000)]},
        {"dict": [[n, n] for n in range(50_000)]},
        nested,
    ):
        start = time.process_time()
        assert program.simple.judge(program.keys, [{"value": content}, {"value": [1]}], partial=False) is None
        assert time.process_time() - start < 1.0
    colliding = [{"int": hex(n * (2**61 - 1))} for n in range(5_000)]
    assert program.simple.judge(program.keys, [{"value": 2}, {"value": colliding}], partial=False) is None


def test_rows_can_be_read_by_several_threads_at_once() -> None:
    with gzip.open(DATA / "humaneval.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    queries = [
        Query(
            messages=(Message(role="user", content=row["prompt"]),),
            extra={"test": row["test"], "entry_point": row["entry_point"], "thread": number},
        )
        for row in rows[:60]
        for number in range(2)
    ]
    with ThreadPoolExecutor(8) as threads:
        for found, _ in threads.map(plan_of, queries * 2):
            assert isinstance(found, Program)
    assert all(map(is_known, queries))
