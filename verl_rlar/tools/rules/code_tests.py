# SPDX-License-Identifier: Apache-2.0
"""From a row to what is to be run: the forms in which data sets keep the tests of a program.

`plan_of` finds the tests in the columns `verl_rlar.features.TEST_COLUMNS`, else in the reference, and reads them as
one of

- `Streams`: texts on standard input and what is expected on standard output. ``{"inputs": [..], "outputs": [..]}``,
  ``[{"input": .., "output": ..}]``, LiveCodeBench's items with ``"testtype": "stdin"``; a list of lines counts as
  text.
- `Functions`: arguments of one function and what it is expected to give. The same forms with a ``fn_name`` (or
  ``"testtype": "functional"`` and a ``func_name`` in the item's or row's ``metadata``).
- `Program`: tests that are Python themselves. A text, a list of texts, or ``{"functional": text}``, with plain
  assertions, ``def check(candidate)``, functions ``test_*`` as for pytest, classes of unittest, or all of them.

A `Program` is rewritten once per row: each assertion becomes a case, imports of the program (``from solution import
f``) and its names become stand-ins, and the calls whose arguments are literals are collected, so that all their
answers can be fetched together. What the rewritten tests do when they run: `verl_rlar.tools.rules.code_judge`.

Guarantees: nothing of a row is executed here; whatever a row holds, the outcome is a plan or `BadTests`; a row
without a single case is `BadTests`; plans are immutable and plain.

Not covered: LiveCodeBench's compressed private tests (they are pickles); tests that look at what a program prints, or
that patch its modules (`BadTests`); fixtures of pytest.
"""

from __future__ import annotations

import ast
import builtins
import json
import re
import sys
import textwrap
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from verl_rlar.features import TEST_COLUMNS
from verl_rlar.sandbox import values
from verl_rlar.tools.rules import code_simple
from verl_rlar.types import Query

MAX_CODE = 2_000_000
"""Characters of tests or of a prompt that are read as Python; more is `BadTests`."""
MAX_CALLS = 2_000
"""Most calls that are fetched in advance."""
MAX_FETCHED = 4_000_000
"""Most characters of them, together."""
CACHED_CHARACTERS = 5_000_000
"""Characters of tests whose plans are kept: some thousand rows, so that those of a batch are read once."""
SHORT = 4_000
"""Characters of a row that is read where it stands; others are read in a thread, so that they hold nobody up."""
LONGEST_CACHED = 1_000_000
"""Rows whose tests are longer are read again for each response: they are rare and would fill the memory."""

SETUP_COLUMNS = ("test_imports", "test_setup_code", "setup_code")
"""Columns with code that is part of the tests, a text or a list of texts."""


class BadTests(ValueError):
    """The row's tests cannot be used; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Streams:
    """Tests of a whole program."""

    cases: tuple[tuple[str, str], ...]
    """Standard input and expected standard output."""
    checker: str | None = None
    """Source of a verifier that judges the output instead of a comparison."""


@dataclass(frozen=True, kw_only=True)
class Functions:
    """Tests of one function, by value."""

    name: str
    cases: tuple[tuple[tuple[Any, ...], Any], ...]
    """Arguments and expected result, JSON-like."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """Tests that are a program."""

    helpers: tuple[str, ...]
    """Run before the tests, each on its own: helpers out of the prompt, imports that the tests forgot."""
    tests: str
    """The rewritten tests."""
    entry: str
    """Name of the function or class under test; empty if the tests name it themselves."""
    target: Any
    """What a `check` is called with, in the notation of `verl_rlar.sandbox.values`; None without an entry point."""
    wanted: tuple[str, ...]
    """Names that the program should define."""
    names: tuple[str, ...]
    """Names that the tests use and that nothing but the program may define."""
    functions: tuple[str, ...]
    """Functions and classes of the tests that are to be run, after the text itself."""
    cases: Mapping[str, tuple[int, ...]]
    """Numbers of the cases in each of them (``Class.method``), and in the text itself (empty name)."""
    texts: tuple[str, ...]
    """Source text of each case."""
    calls: tuple[Any, ...]
    """Calls with literal arguments, in the notation of `verl_rlar.sandbox.values`, in their order."""
    keys: tuple[str, ...]
    """The same as text."""
    inner: tuple[str, ...]
    """Expressions that are parts of them."""
    simple: code_simple.Simple | None
    """The same tests without the need of a judge; None if they need one."""

    @cached_property
    def for_judge(self) -> dict[str, Any]:
        """What `verl_rlar.tools.rules.code_judge` gets of it."""
        return {
            "helpers": self.helpers,
            "tests": self.tests,
            "entry": self.entry,
            "target": self.target,
            "names": self.names,
            "functions": self.functions,
            "cases": self.cases,
            "calls": self.keys,
            "inner": self.inner,
        }


Plan = Streams | Functions | Program


@dataclass(frozen=True, kw_only=True)
class PromptCode:
    """The code in a prompt."""

    text: str
    """All of it, as it stands: what a completion continues."""
    preamble: str
    """What stands before the entry point: imports, helpers."""
    helpers: tuple[str, ...]
    """The imports, functions and constants of it that are complete, without classes: what tests may use."""


_plans: OrderedDict[str, tuple[Plan | str, PromptCode, int]] = OrderedDict()
_reading = threading.Lock()


def is_known(query: Query) -> bool:
    """Whether `plan_of` has the row's plan at hand; otherwise it takes a millisecond or more."""
    return query.key in _plans


def is_short(query: Query) -> bool:
    """Whether `plan_of` takes some milliseconds at most."""
    columns = (query.extra.get(name) for name in (*TEST_COLUMNS, *SETUP_COLUMNS, "starter_code"))
    parts = [part for value in (query.prompt, query.reference, *columns) if value for part in _strings(value)]
    return sum(map(len, parts)) < SHORT


def _strings(value: Any) -> Iterable[str]:
    """A text, or the texts in a list; what else there is, is not short."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        return value
    return (" " * SHORT,)


def plan_of(query: Query) -> tuple[Plan, PromptCode]:
    """The tests of a row, and the code in its prompt. May be called by several threads.

    Raises:
        BadTests: There are none, or they cannot be read.
    """
    found = _plans.get(query.key)
    if found is None:
        with _reading:  # the responses of a group often come together; and see `_read_safely`
            found = _plans.get(query.key) or _read_safely(query)
            if found[2] < LONGEST_CACHED:
                _plans[query.key] = found
                while sum(size for *_, size in _plans.values()) > CACHED_CHARACTERS:
                    _plans.popitem(last=False)
    plan, prompt, _ = found
    if isinstance(plan, str):
        raise BadTests(plan)
    return plan, prompt


def _read_safely(query: Query) -> tuple[Plan | str, PromptCode, int]:
    """Plan, code and size of a row. `ast.parse` of Python 3.11 fails now and then while another thread is in it."""
    size = sum(map(len, map(str, (query.reference, *(query.extra.get(name) for name in TEST_COLUMNS)))))
    for _ in range(10):
        try:
            return *_read(query), size
        except SystemError:
            continue
    return *_read(query), size


def _read(query: Query) -> tuple[Plan | str, PromptCode]:
    prompt = PromptCode(text="", preamble="", helpers=())
    try:
        entry = _entry(query)
        tests = _tests(query)
        plan: Plan | None = _plan(tests, query)
        if plan is None:
            parts = [query.extra.get(column) for column in SETUP_COLUMNS]
            tree = _parse("\n".join(map(_lines, [part for part in parts if part])), "the tests' setup", empty=True)
            tree.body += _parse(_lines(tests), "the tests").body
            entry = entry or _tested(query, tree)
            prompt = prompt_code(_prompt(query), entry)
            plan = _Reader(tree, entry, prompt.helpers).program()
        else:
            prompt = prompt_code(_prompt(query), plan.name if isinstance(plan, Functions) else "")
        return plan, prompt
    except BadTests as error:
        return str(error), prompt
    except (RecursionError, MemoryError):
        return "the tests are nested too deeply", prompt


def _tests(query: Query) -> Any:
    """What holds the tests: code (a text, or a list of texts), or pairs (a dict, or a list of dicts)."""
    for name in TEST_COLUMNS:
        value = query.extra.get(name)
        if isinstance(value, (str, list, tuple, dict)) and value:
            return _data(value)
    if query.reference:
        return _data(query.reference)
    raise BadTests("the row has no tests")


def _data(value: Any) -> Any:
    """A column, with JSON in a text read."""
    if isinstance(value, str):
        if value.lstrip()[:1] not in ("{", "["):
            return value
        try:
            return _data(json.loads(value))
        except ValueError:
            pass
        except RecursionError:
            raise BadTests("the tests are nested too deeply") from None
        try:
            return _data(ast.literal_eval(value.strip()))
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            return value
    if isinstance(value, (list, tuple)):
        items = list(value)
        if items and all(isinstance(item, str) and item.lstrip()[:1] == "{" for item in items):
            return [_data(item) for item in items]
        return items
    if isinstance(value, Mapping) and isinstance(value.get("functional"), (str, list)):
        return value["functional"]
    return value


def _plan(tests: Any, query: Query) -> Streams | Functions | None:
    """Pairs as a plan; None if the tests are code."""
    if isinstance(tests, str):
        return None
    if isinstance(tests, list) and tests and all(isinstance(test, str) for test in tests):
        return None
    if isinstance(tests, dict):
        return _pairs(tests, query)
    if isinstance(tests, list) and tests and all(isinstance(test, dict) for test in tests):
        names = {_function_name(test, query) for test in tests}
        if any(not {"input", "output"} <= test.keys() for test in tests):
            raise BadTests("a test has no `input` or no `output`")
        if len(names) != 1:
            raise BadTests(f"the tests name several functions: {', '.join(sorted(map(str, names)))[:100]}")
        inputs, outputs = [test["input"] for test in tests], [test["output"] for test in tests]
        return _pairs({"inputs": inputs, "outputs": outputs, "fn_name": names.pop()}, query)
    if not tests:
        raise BadTests("the set of tests is empty")
    raise BadTests(f"the tests are {type(tests).__name__} of a form that is not known")


def _function_name(test: Mapping[str, Any], query: Query) -> str | None:
    """The function that an item tests; None: it tests a whole program."""
    if test.get("fn_name"):
        return str(test["fn_name"])
    if test.get("testtype") != "functional":
        return None
    for metadata in (test.get("metadata"), query.extra.get("metadata")):
        if isinstance(metadata, str):
            try:
                metadata = json.loads(metadata)
            except (ValueError, RecursionError):
                continue
        if isinstance(metadata, Mapping) and metadata.get("func_name"):
            return str(metadata["func_name"])
    raise BadTests("the tests are of a function, and do not name it (`metadata.func_name`)")


def _pairs(tests: Mapping[str, Any], query: Query) -> Streams | Functions:
    inputs, outputs = tests.get("inputs"), tests.get("outputs")
    if not isinstance(inputs, (list, tuple)) or not isinstance(outputs, (list, tuple)):
        raise BadTests("the tests have no lists `inputs` and `outputs`")
    if len(inputs) != len(outputs):
        raise BadTests(f"the tests have {len(inputs)} inputs and {len(outputs)} outputs")
    if not inputs:
        raise BadTests("the set of tests is empty")
    name = tests.get("fn_name")
    if name:
        if not isinstance(name, str) or not name.isidentifier():
            raise BadTests("the tests' `fn_name` is no name")
        return Functions(name=name, cases=tuple(map(_function_case, inputs, outputs)))
    checker = query.extra.get("checker")
    return Streams(
        cases=tuple((_lines(given), _lines(expected)) for given, expected in zip(inputs, outputs, strict=True)),
        checker=checker if isinstance(checker, str) and checker.strip() else None,
    )


def _lines(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, (list, tuple)) else "" if value is None else str(value)


def _function_case(given: Any, expected: Any) -> tuple[tuple[Any, ...], Any]:
    if isinstance(given, str):  # one argument a line
        return tuple(_literal(line) for line in given.splitlines() if line.strip()), _literal(expected)
    if not isinstance(given, (list, tuple)):
        raise BadTests("the arguments of a test are no list")
    return tuple(given), expected


def _literal(text: Any) -> Any:
    if not isinstance(text, str):
        return text
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            pass
    return text


def _parse(text: str, what: str, *, empty: bool = False) -> ast.Module:
    if not text.strip() and not empty:
        raise BadTests(f"{what}: there is nothing")
    if len(text) > MAX_CODE:
        raise BadTests(f"{what}: {len(text)} characters are too many")
    try:
        return _tree(text)
    except (SyntaxError, ValueError) as error:
        raise BadTests(f"{what} are no Python: {str(error)[:100]}") from None


def _tree(text: str) -> ast.Module:
    """Python as a tree; what it warns of (old escapes) is the data's business, and said nowhere.

    Raises:
        SyntaxError, ValueError: It is no Python.
        RecursionError, MemoryError: It is nested too deeply.
    """
    warnings.filterwarnings("ignore", module="rlar_tests$")  # replaces itself
    return ast.parse(text, "rlar_tests.py")


# the prompt


_FENCE = re.compile(r"^[ \t]*```[ \t]*(?:python3?|py)?[ \t]*\n(.*?)^[ \t]*```", re.MULTILINE | re.DOTALL)


def _code_in(prompt: str) -> Iterator[str]:
    """What may be the Python of a prompt: all, its fenced blocks, or those that are Python, as one may hold output."""
    yield prompt
    fences = _FENCE.findall(prompt)
    yield "\n\n".join(fences)
    yield "\n\n".join(text for text in fences if _completed(text) is not None)


def prompt_code(prompt: str, entry: str) -> PromptCode:
    """The Python in a prompt: the prompt itself (a completion task), or its fenced blocks.

    Args:
        prompt: Text of the user's turn.
        entry: Name of the function or class that is asked for; may be empty.
    """
    nothing = PromptCode(text="", preamble="", helpers=())
    if len(prompt) > MAX_CODE:
        return nothing
    for text in _code_in(prompt):
        tree = _completed(text)
        if tree is None or not any(isinstance(node, _DEFINITIONS + _IMPORTS) for node in tree.body):
            continue
        name = root_name(entry)
        last = next((node for node in tree.body if isinstance(node, _DEFINITIONS) and _defines(node, name)), None)
        first_line = min([last.lineno, *(item.lineno for item in last.decorator_list)]) if last else None
        lines = text.splitlines(keepends=True)
        helpers = [
            node
            for node in tree.body
            if (isinstance(node, _FUNCTIONS) and node is not last and not _is_stub(node))
            or isinstance(node, (*_IMPORTS, ast.Assign, ast.AnnAssign))
        ]
        behind = tree.body[tree.body.index(last) + 1 :] if last else tree.body
        given = "".join(_guarded(node) for node in behind if _is_given(node, name))
        return PromptCode(
            text=text,
            preamble="".join(lines[: first_line - 1] if first_line else ()) + given,
            helpers=tuple(map(ast.unparse, helpers)),
        )
    return nothing


def _is_given(node: ast.stmt, entry: str) -> bool:
    """Whether a statement of a prompt is something for the program to use: no example of its use, and nothing that
    hides a name of Python's own from it."""
    if isinstance(node, ast.Try):
        return all(_is_given(inner, entry) and isinstance(inner, _IMPORTS) for inner in node.body)
    if isinstance(node, ast.ImportFrom) and node.module == "__future__":
        return False
    if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
        return node.module not in ("math", "cmath", "numpy", "os")  # they have a `pow`, `sum` or `open`
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
        return not names & {entry, "input", "open", "sys", "exit", "quit"} and not _hides(node)
    given = isinstance(node, (*_IMPORTS, ast.ClassDef)) or (isinstance(node, _FUNCTIONS) and not _is_stub(node))
    return given and not _hides(node)


def _hides(node: ast.stmt) -> bool:
    """Whether a statement gives a name of Python's own another meaning."""
    return not _BUILT_IN.isdisjoint(_bound([node] if isinstance(node, _DEFINITIONS) else ast.walk(node)))


_BUILT_IN = frozenset(dir(builtins))


def _guarded(node: ast.stmt) -> str:
    """A statement as text that cannot break the program it is put before."""
    return f"try:\n{textwrap.indent(ast.unparse(node), '    ')}\nexcept Exception:\n    pass\n"


_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_IMPORTS = (ast.Import, ast.ImportFrom)


def _completed(text: str) -> ast.Module | None:
    """A text as Python, if it is, or would be with a body for its last function."""
    if not re.search(r"^(?:async |def |class |import |from )", text, re.MULTILINE):
        return None
    for end in ("", "\n    pass\n", "\n        pass\n"):
        try:
            return _tree(text + end)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
    return None


def _prompt(query: Query) -> str:
    """The prompt, and the code that it starts from if that stands in a column of its own."""
    starter = query.extra.get("starter_code")
    return f"{query.prompt}\n```python\n{starter}\n```" if isinstance(starter, str) and starter else query.prompt


def root_name(entry: str) -> str:
    """``Solution`` for ``Solution().solve``."""
    return re.split(r"[.(]", entry, maxsplit=1)[0]


def _defines(node: ast.AST, name: str) -> bool:
    """Whether a definition is that of a name, or of a class with such a method."""
    inner = node.body if isinstance(node, ast.ClassDef) else []
    return any(isinstance(part, _DEFINITIONS) and part.name == name for part in (node, *inner))


def _is_stub(node: ast.AST) -> bool:
    """Whether a function has no body yet."""
    body = list(getattr(node, "body", []))
    return all(
        isinstance(part, (ast.Pass, ast.Raise)) or (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))
        for part in body
    )


def _entry(query: Query) -> str:
    for column in ("entry_point", "fn_name", "func_name", "function_name"):
        name = query.extra.get(column)
        if isinstance(name, str) and re.fullmatch(r"[^\W\d]\w*(?:\(\))?(?:\.[^\W\d]\w*)*", name.strip()):
            return name.strip()
    return ""


def _tested(query: Query, tests: ast.Module) -> str:
    """The entry point where no column names it: for a `check` the prompt's last function, else nothing."""
    if not any(isinstance(node, ast.FunctionDef) and node.name == "check" for node in tests.body):
        return ""
    for node in tests.body:  # check(f)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and _root(node.value.func) == "check":
            first = node.value.args[0] if node.value.args else None
            if isinstance(first, ast.Name):
                return first.id
    prompt = _prompt(query)[:MAX_CODE]
    for text in _code_in(prompt):
        tree = _completed(text)
        names = [node.name for node in tree.body if isinstance(node, _FUNCTIONS)] if tree else []
        if names:
            return names[-1]
    raise BadTests("nothing names the function that `check` is for: no column `entry_point`, no function in the prompt")


# tests that are Python


_LIBRARIES = frozenset(
    "PIL bs4 dateutil freezegun hypothesis lxml matplotlib mpmath networkx numpy pandas parameterized pytest pytz "
    "regex requests scipy sklearn sortedcontainers sympy torch typing_extensions yaml".split()
)
"""Modules that are not the program's; a judge has some of them."""
_FORGOTTEN = {
    "np": "import numpy as np",
    "numpy": "import numpy",
    "pytest": "import pytest",
    "pd": "import pandas as pd",
    **dict.fromkeys(("Counter", "OrderedDict", "defaultdict", "deque", "namedtuple"), "from collections import {}"),
    **dict.fromkeys(("isclose", "sqrt", "pi", "inf", "floor", "ceil"), "from math import {}"),
    **dict.fromkeys(("List", "Dict", "Tuple", "Set", "Optional", "Any", "Union", "Callable"), "from typing import {}"),
    **dict.fromkeys(("permutations", "combinations", "product", "chain"), "from itertools import {}"),
    **dict.fromkeys(("datetime", "date", "timedelta"), "from datetime import {}"),
    "Decimal": "from decimal import Decimal",
    "Fraction": "from fractions import Fraction",
    "reduce": "from functools import reduce",
    "deepcopy": "from copy import deepcopy",
}
"""Names that tests take from the program's imports in a bare run; what is expected must not be made by the program."""
_OUTSIDE = frozenset(
    {
        "capsys",
        "capfd",
        "caplog",
        "redirect_stdout",
        "redirect_stderr",
        "monkeypatch",
        "patch",
        "Mock",
        "MagicMock",
        "getsource",
    }
)
"""Names that only make sense where tests and program share a process."""
_CHECKS = re.compile(r"assert|fail(?!ureException)|raises")
_BUILTINS = frozenset(dir(builtins))
_FOLDED = {
    name: getattr(builtins, name)
    for name in (
        "set",
        "frozenset",
        "tuple",
        "list",
        "dict",
        "float",
        "int",
        "str",
        "bool",
        "complex",
        "bytes",
        "bytearray",
    )
}


def _root(node: ast.AST) -> str | None:
    """The name that a chain of attributes and calls starts with."""
    while isinstance(node, (ast.Attribute, ast.Call)):
        node = node.value if isinstance(node, ast.Attribute) else node.func
    return node.id if isinstance(node, ast.Name) else None


def _bound(nodes: Iterable[ast.AST]) -> set[str]:
    """Names that these nodes bind."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, _DEFINITIONS):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, ast.ExceptHandler) and node.name:
            names.add(node.name)
    return names


class _Reader(ast.NodeTransformer):
    """Rewrites tests, and collects what they ask of the program."""

    def __init__(self, tree: ast.Module, entry: str, helpers: tuple[str, ...]) -> None:
        self.tree = tree
        self.nodes = list(ast.walk(tree))
        """All of it, as it is before it is rewritten."""
        self.entry = root_name(entry)
        self.target = _expression_of(entry)
        self.helpers = helpers
        self.texts: list[str] = []
        self.cases: dict[str, list[int]] = {}
        self.place: list[str] = []
        self.guarded = 0
        """Depth of ``try`` with handlers: what fails there may be meant to."""
        self.solution: dict[str, str] = {}
        """Names under which the program's names are imported."""
        self.modules: set[str] = set()
        """Names under which the program itself is imported."""
        self.calls: list[Any] = []
        self.size = 0
        self.inner: set[str] = set()
        self.candidate = ""
        """The parameter of `check`, while inside it."""

    def program(self) -> Program:
        around = list(ast.walk(ast.parse("\n".join(self.helpers))))
        loaded = dict.fromkeys(
            node.id for node in (*self.nodes, *around) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
        )
        used = {getattr(node, "attr", getattr(node, "id", getattr(node, "arg", None))) for node in self.nodes}
        if outside := sorted(_OUTSIDE & used | ({"sys.stdout"} if "stdout" in used else set())):
            raise BadTests(f"the tests use {', '.join(outside)}, but never share a process with the program")
        self.bound = _bound(self.nodes)
        functions = self._functions()
        self.find_imports()
        own = (self.bound - self.solution.keys() - self.modules) | (_bound(around) - {self.entry})
        self.free = {name for name in loaded if name not in own and name not in _BUILTINS} | {self.entry} - {""}
        forgotten = [line for name in loaded if (line := self._forgotten(name, own))]
        starred = any(
            alias.name == "*"
            for node in (*self.nodes, *around)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        )
        simple = self._simple(functions, frozenset(own), starred)
        body = self.visit_body(self.tree.body, "")
        try:
            tests = ast.unparse(ast.Module(body=body, type_ignores=[]))
            compile(tests, "rlar_tests.py", "exec", dont_inherit=True)
        except (ValueError, SyntaxError) as error:
            raise BadTests(f"the tests are no Python: {str(error)[:100]}") from None
        if self.entry:
            wanted = [self.entry]
        else:
            called = {_root(node.func) for node in ast.walk(self.tree) if isinstance(node, ast.Call)}
            wanted = [name for name in loaded if name in self.free and name in called]
        names = [name for name in loaded if name not in _BUILTINS]
        keys = tuple(map(_key, self.calls))
        return Program(
            helpers=(*forgotten, *self.helpers),
            tests=tests,
            entry=self.entry,
            target=self.target,
            wanted=tuple([*wanted, *self.solution.values()]),
            names=tuple(dict.fromkeys([*names, *([self.entry] if self.entry else [])])),
            functions=tuple(functions),
            cases={name: tuple(numbers) for name, numbers in self.cases.items()},
            texts=tuple(self.texts),
            calls=tuple(self.calls),
            keys=keys,
            inner=tuple(self.inner),
            simple=simple if self.inner.isdisjoint(keys) else None,  # which of two like calls is meant?
        )

    def _simple(self, functions: list[str], own: frozenset[str], starred: bool) -> code_simple.Simple | None:
        """The tests without a judge, if they are of that kind."""

        def key(node: ast.Call, candidate: str) -> str | None:
            before, self.candidate = self.candidate, candidate
            try:
                return _key(self.expression(node)) if self._name(_root(node)) else None
            except _NoLiteral:
                return None
            finally:
                self.candidate = before

        names = code_simple.Names(
            key=key,
            fold=_folded,
            program=lambda name: self._name(name) is not None,
            brings=lambda node: (
                isinstance(node, ast.ImportFrom) and self._is_program(node.module, node.level, node.names)
            ),
            own=own,
            starred=starred,
        )
        return code_simple.read(self.tree, functions, self.entry, names)

    def _functions(self) -> list[str]:
        """What is to be run beside the text itself."""
        called = {
            _root(node.value.func)
            for node in self.tree.body
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Name)
        }
        found = []
        for node in self.tree.body:
            if isinstance(node, _FUNCTIONS) and node.name not in called:
                if node.name == "check" and len(node.args.args) == 1 and self.entry:
                    found.append(node.name)
                elif node.name.startswith("test"):
                    if isinstance(node, ast.AsyncFunctionDef):
                        raise BadTests("the tests are coroutines")
                    known = any("parametrize" in ast.dump(mark) for mark in node.decorator_list)
                    needed = len(node.args.args) - len(node.args.defaults)
                    if needed and not known:
                        raise BadTests(f"{node.name} takes a fixture")
                    found.append(node.name)
            elif isinstance(node, ast.ClassDef):
                bases = {getattr(base, "attr", getattr(base, "id", "")) for base in node.bases}
                if any(base.endswith("TestCase") for base in bases) or node.name.startswith("Test"):
                    found.append(node.name)
        return list(dict.fromkeys(found))

    def find_imports(self) -> None:
        for node in self.nodes:
            if isinstance(node, ast.ImportFrom) and self._is_program(node.module, node.level, node.names):
                self.solution |= {alias.asname or alias.name: alias.name for alias in node.names if alias.name != "*"}
            elif isinstance(node, ast.Import):
                self.modules |= {
                    alias.asname or alias.name for alias in node.names if self._is_program(alias.name, 0, [])
                }

    def _is_program(self, module: str | None, level: int, names: Iterable[ast.alias]) -> bool:
        if level or (self.entry and any(alias.name == self.entry for alias in names)):
            return True
        root = (module or "").split(".")[0]
        return root not in sys.stdlib_module_names and root not in _LIBRARIES

    def _forgotten(self, name: str, own: set[str]) -> str:
        """The import that the tests rely on the program for, if it is one that we know."""
        if name in own or name in self.solution or name == self.entry or name in _BUILTINS:
            return ""
        if name in _FORGOTTEN:
            self.free.discard(name)
            return _FORGOTTEN[name].format(name)
        called = any(
            isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name
            for node in self.nodes
        )
        if name in sys.stdlib_module_names and not called:
            self.free.discard(name)
            return f"import {name}"
        return ""

    # rewriting

    def visit_body(self, body: list[ast.stmt], name: str) -> list[Any]:
        self.place.append(name)
        new: list[Any] = []
        for node in body:
            visited = self.visit(node)
            new += visited if isinstance(visited, list) else [visited] if visited is not None else []
        self.place.pop()
        return new or [ast.Pass()]

    def _case(self, node: ast.stmt, text: str) -> ast.stmt:
        number = len(self.texts)
        self.texts.append(text[:300])
        self.cases.setdefault(self.place[-1], []).append(number)
        case = ast.Call(func=ast.Name("__case__", ast.Load()), args=[ast.Constant(number)], keywords=[])
        return ast.copy_location(ast.With(items=[ast.withitem(context_expr=case)], body=[node]), node)

    def visit_Assert(self, node: ast.Assert) -> Any:
        text = _text(node.test)
        self.collect(node.test)
        if node.msg is not None and not isinstance(node.msg, ast.Constant):
            node.msg = None  # it would ask the program once more
        return node if self.guarded else self._case(node, text)

    def visit_Expr(self, node: ast.Expr) -> Any:
        call = node.value
        if not isinstance(call, ast.Call):
            return node
        if ast.unparse(call.func) in ("unittest.main", "pytest.main"):
            return ast.Pass()
        text = _text(call)
        self.collect(call)
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        if isinstance(call.func, ast.Attribute) and _CHECKS.match(name):
            return node if self.guarded else self._case(node, text)
        if name not in ("exec", "eval", "super") and not any(isinstance(arg, ast.Starred) for arg in call.args):
            node.value = ast.Call(
                func=ast.Name("__discard__", ast.Load()), args=[call.func, *call.args], keywords=call.keywords
            )
        return node

    def visit_With(self, node: ast.With) -> Any:
        for item in node.items:
            self.collect(item.context_expr)
        first = node.items[0].context_expr
        raises = isinstance(first, ast.Call) and re.match(r"raises|assert", getattr(first.func, "attr", ""))
        if not raises:
            node.body = self.visit_body(node.body, self.place[-1])
            return node
        text = _text(first)
        self.guarded += 1
        node.body = self.visit_body(node.body, self.place[-1])
        self.guarded -= 1
        return node if self.guarded else self._case(node, text)

    def visit_Try(self, node: ast.Try) -> Any:
        self.guarded += bool(node.handlers)
        node.body = self.visit_body(node.body, self.place[-1])
        self.guarded -= bool(node.handlers)
        for handler in node.handlers:
            handler.body = self.visit_body(handler.body, self.place[-1])
        for name in ("orelse", "finalbody"):
            if getattr(node, name):
                setattr(node, name, self.visit_body(getattr(node, name), self.place[-1]))
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> Any:
        place = self.place[-1]
        if len(self.place) == 1:
            name = node.name
        elif len(self.place) == 2 and self.in_class:
            name = f"{place}.{node.name}"
        else:
            name = place
        before = self.candidate
        if node.name == "check" and len(self.place) == 1 and len(node.args.args) == 1 and self.entry:
            self.candidate = node.args.args[0].arg
        outer, self.in_class = self.in_class, False
        node.body = self.visit_body(node.body, name)
        self.candidate, self.in_class = before, outer
        return node

    in_class = False

    def visit_ClassDef(self, node: ast.ClassDef) -> Any:
        outer, self.in_class = self.in_class, len(self.place) == 1
        node.body = self.visit_body(node.body, node.name)
        self.in_class = outer
        return node

    def visit_Import(self, node: ast.Import) -> Any:
        kept = [alias for alias in node.names if not self._is_program(alias.name, 0, [])]
        new: list[Any] = [ast.Import(names=kept)] if kept else []
        for alias in node.names:
            if alias not in kept:
                new.append(_assign((alias.asname or alias.name).split(".")[0], ast.Name("__program__", ast.Load())))
        return new

    def visit_ImportFrom(self, node: ast.ImportFrom) -> Any:
        if node.module == "__future__":
            return None
        if not self._is_program(node.module, node.level, node.names):
            return node
        return [
            _assign(
                alias.asname or alias.name,
                ast.Call(func=ast.Name("__remote__", ast.Load()), args=[ast.Constant(alias.name)], keywords=[]),
            )
            for alias in node.names
            if alias.name != "*"
        ]

    def generic_visit(self, node: ast.AST) -> ast.AST:
        """Statements: their expressions are searched for calls, their blocks are rewritten."""
        for field, value in ast.iter_fields(node):
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                setattr(node, field, self.visit_body(value, self.place[-1]))
            elif isinstance(value, list):
                for item in value:
                    if isinstance(item, ast.expr):
                        self.collect(item)
                    elif isinstance(item, ast.AST) and not isinstance(item, ast.expr):
                        self.generic_visit(item)
            elif isinstance(value, ast.expr):
                self.collect(value)
        return node

    # calls with literal arguments

    def collect(self, node: ast.AST) -> None:
        """Collects the calls in an expression, the innermost ones as parts of the outer ones, in their order."""
        if isinstance(node, (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
            return  # run any number of times
        if isinstance(node, ast.Call) and self._name(_root(node)):
            try:
                expression = self.expression(node)
                key = _key(expression)
            except _NoLiteral:
                pass
            else:
                if len(self.calls) < MAX_CALLS and self.size + len(key) <= MAX_FETCHED:
                    self.calls.append(expression)
                    self.size += len(key)
                    self.inner.update(_key(part) for part in _parts(expression) if part is not expression)
                return
        for child in ast.iter_child_nodes(node):
            self.collect(child)

    def _name(self, name: str | None) -> Any:
        """The program's name behind a name of the tests, as an expression; None if it is none."""
        if name is None:
            return None
        if name == self.candidate:
            return self.target
        if name in self.solution:
            return {"name": self.solution[name]}
        return {"name": name} if name in self.free or name in self.modules else None

    def expression(self, node: ast.AST) -> Any:
        """An expression out of literals and names of the program, in the notation of values.

        Raises:
            _NoLiteral: It has something else in it.
        """
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", "")
            if name in _FOLDED and name not in self.bound:
                return values.encode(_folded(node), _refuse)
            if any(keyword.arg is None for keyword in node.keywords):
                raise _NoLiteral
            return {
                "call": [
                    self.function(node.func),
                    [self.expression(arg) for arg in node.args],
                    {str(keyword.arg): self.expression(keyword.value) for keyword in node.keywords},
                ]
            }
        if isinstance(node, ast.List):
            return [self.expression(item) for item in node.elts]
        if isinstance(node, ast.Tuple):
            return {"tuple": [self.expression(item) for item in node.elts]}
        if isinstance(node, ast.Name) and node.id in _BUILTINS and node.id not in self.bound:
            return {"name": node.id}
        return values.encode(_folded(node), _refuse)

    def function(self, node: ast.AST) -> Any:
        if isinstance(node, ast.Name):
            name = self._name(node.id)
            if name is None:
                raise _NoLiteral
            return name
        if isinstance(node, ast.Attribute) and not node.attr.startswith("__"):
            if isinstance(node.value, ast.Name) and node.value.id in self.modules:
                return {"name": node.attr}
            if isinstance(node.value, ast.Call):
                # Stack().pop(), but not f(1).startswith("x"): what f gives must be a value to have a say in that
                if not (isinstance(node.value.func, ast.Name) and node.value.func.id[:1].isupper()):
                    raise _NoLiteral
                owner = self.expression(node.value)
            else:
                owner = self.function(node.value)
            return {"attr": [owner, node.attr]}
        raise _NoLiteral


class _NoLiteral(ValueError):
    """An expression is not made of literals."""


def _refuse(value: Any) -> Any:
    raise _NoLiteral


def _expression_of(entry: str) -> Any:
    """``Solution().solve`` in the notation of values; None for an empty text."""
    expression: Any = None
    for part in entry.split(".") if entry else ():
        name = part.removesuffix("()")
        expression = {"name": name} if expression is None else {"attr": [expression, name]}
        expression = {"call": [expression, [], {}]} if part.endswith("()") else expression
    return expression


def _text(node: ast.AST) -> str:
    return ast.unparse(node)[:300]


def _key(expression: Any) -> str:
    return json.dumps(expression, separators=(",", ":"))


def _assign(name: str, value: ast.expr) -> ast.stmt:
    return ast.Assign(targets=[ast.Name(name, ast.Store())], value=value, lineno=1)


def _parts(expression: Any) -> Iterator[Any]:
    """The calls and attributes in an expression."""
    if isinstance(expression, list):
        for part in expression:
            yield from _parts(part)
    elif isinstance(expression, dict):
        if "call" in expression or "attr" in expression:
            yield expression
        for part in expression.values():
            yield from _parts(part)


def _folded(node: ast.AST) -> Any:
    """The value of an expression out of literals.

    Raises:
        _NoLiteral: It is none, or would be large.
    """
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, (ast.List, ast.Tuple)):
        return (list if isinstance(node, ast.List) else tuple)(map(_folded, node.elts))
    try:
        if isinstance(node, ast.Set):
            return set(map(_folded, node.elts))
        if isinstance(node, ast.Dict) and None not in node.keys:
            return {_folded(key): _folded(value) for key, value in zip(node.keys, node.values, strict=True) if key}
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
            value = _folded(node.operand)
            return -value if isinstance(node.op, ast.USub) else +value
        if isinstance(node, ast.BinOp):
            return _operation(node.op, _folded(node.left), _folded(node.right))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords and len(node.args) <= 1:
            arguments = list(map(_folded, node.args))
            if node.func.id in _FOLDED and not isinstance(next(iter(arguments), None), (int, float, type(None))):
                return _FOLDED[node.func.id](*arguments)
    except (TypeError, ValueError, ArithmeticError):
        raise _NoLiteral from None
    raise _NoLiteral


def _operation(operator: ast.operator, left: Any, right: Any) -> Any:
    numbers = all(isinstance(value, (int, float)) and abs(value) < 2**64 for value in (left, right))
    if numbers and isinstance(operator, ast.Add):
        return left + right
    if numbers and isinstance(operator, ast.Sub):
        return left - right
    if isinstance(operator, ast.Mult):
        if numbers:
            return left * right
        text, count = (left, right) if isinstance(right, int) else (right, left)
        if isinstance(text, (str, list, tuple)) and isinstance(count, int) and len(text) * count <= 100_000:
            return text * count
    if numbers and isinstance(operator, ast.Pow) and isinstance(left, int) and 0 <= right <= 64:
        return left**right
    raise _NoLiteral
