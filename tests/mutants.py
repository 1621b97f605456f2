# SPDX-License-Identifier: Apache-2.0
"""Programs of HumanEval and MBPP, mutants of them, and what a bare run says of either.

The bare run is what the data sets themselves do: program and tests together in one process, here a fork with limits. It
is fed references and their mutants only.
"""

from __future__ import annotations

import ast
import copy
import gzip
import json
import random
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent.parent / "recipes" / "data"

BROKEN = {
    "MBPP/64": "indentation was lost",
    "MBPP/160": "a text in the tests was rewritten: 'No solution' became 'No candidate'",
    "MBPP/367": "the tests' setup (`root`) was lost",
    "MBPP/596": "it wants the sizes of objects in another version of Python",
    "MBPP/601": "its class became one inside of the function, where the tests cannot reach it",
    "MBPP/607": "example values became part of the function, and replace its arguments",
    "MBPP/631": "example values became part of the function, and replace its argument",
    "MBPP/927": "the tests' setup (`root`) was lost",
    "MBPP/966": "indentation was lost",
}
"""References that fail their own tests, and why: all are broken in this conversion of the data."""

UNORDERED = {"MBPP/341", "MBPP/642"}
"""References that fail in a bare run because they take a set for ordered; in a box, its order may be another one."""

NAMED_CHECK = {"MBPP/56", "MBPP/349", "MBPP/899", "MBPP/967"}
"""References that fail in a bare run because the function is named `check`, as the one of the tests, which replaces it.
In boxes these two never meet, and the references pass."""


def problems(name: str) -> list[dict[str, Any]]:
    with gzip.open(DATA / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def reference(problem: dict[str, Any]) -> str:
    return str(problem["prompt"] + problem["canonical_solution"])


_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Lt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Div,
    ast.Mod: ast.FloorDiv,
}


def mutants(problem: dict[str, Any], count: int) -> Iterator[tuple[str, str]]:
    """So many mutants of a reference, each with a name: one change in the body of the function under test."""
    chance = random.Random(problem["task_id"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes
        tree = ast.parse(reference(problem))
    body = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == problem["entry_point"])
    sites = [
        (kind, number)
        for number, node in enumerate(ast.walk(body))
        for kind in ("constant", "comparison", "arithmetic", "return")
        if _mutate(copy.deepcopy(node), kind)
    ]
    for kind, number in chance.sample(sites, min(count, len(sites))):
        changed = copy.deepcopy(tree)
        function = next(n for n in changed.body if isinstance(n, ast.FunctionDef) and n.name == problem["entry_point"])
        _mutate(list(ast.walk(function))[number], kind)
        yield f"{problem['task_id']} {kind} {number}", ast.unparse(ast.fix_missing_locations(changed)) + "\n"


def _mutate(node: ast.AST, kind: str) -> bool:
    """Changes a node, if it is of a kind that can be changed so."""
    if kind == "constant" and isinstance(node, ast.Constant) and type(node.value) in (int, bool, float):
        node.value = not node.value if isinstance(node.value, bool) else node.value + 1
    elif kind == "comparison" and isinstance(node, ast.Compare) and type(node.ops[0]) in _COMPARISONS:
        node.ops[0] = _COMPARISONS[type(node.ops[0])]()
    elif kind == "arithmetic" and isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        node.op = _ARITHMETIC[type(node.op)]()
    elif kind == "return" and isinstance(node, ast.FunctionDef) and node.args.args:
        node.body.insert(0, ast.Return(ast.Name(node.args.args[0].arg, ast.Load())))
    else:
        return False
    return True


RUNNER = """
import json, os, resource, signal, sys

seconds = float(sys.argv[1])
for line in sys.stdin:
    program, tests, entry = json.loads(line)
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
        signal.setitimer(signal.ITIMER_REAL, seconds)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        silence = os.open(os.devnull, os.O_RDWR)
        for descriptor in range(3):
            os.dup2(silence, descriptor)
        try:
            exec(compile(program + "\\n" + tests + f"\\ncheck({entry})\\n", "bare.py", "exec"), {"__name__": "bare"})
        except BaseException:
            os._exit(1)
        os._exit(0)
    print(int(os.waitpid(child, 0)[1] == 0), flush=True)
"""


def bare_runs(programs: list[tuple[str, dict[str, Any]]], seconds: float) -> list[bool]:
    """Whether each program passes the tests of its problem in a bare run."""
    lines = "".join(json.dumps([program, p["test"], p["entry_point"]]) + "\n" for program, p in programs)
    command = [sys.executable, "-I", "-c", RUNNER, str(seconds)]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=True)
    return [line == "1" for line in done.stdout.split()]
