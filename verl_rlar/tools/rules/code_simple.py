# SPDX-License-Identifier: Apache-2.0
"""Unit tests that need no judge: assertions that compare the program's answers with literals.

Most tests are of this kind: `check`, functions ``test_*`` and plain lines with nothing but assertions, made of calls of
the program with literal arguments, literals, comparisons, ``and``, ``or``, ``not``, differences of numbers, and a few
builtin functions. `read` makes checks of such tests once per row, and `Simple.judge` evaluates them on the fetched
answers, here and in microseconds instead of in a box.

Guarantees: nothing of a row is executed: a check is made of this module's own functions. The outcome is the judge's
(`verl_rlar.tools.rules.code_judge`) to the letter, or None, and then the judge must be asked: whatever is not plain,
not small (`MAX_ITEMS`, `MAX_CHARACTERS`; `MAX_HASHED` for what is hashed, as hostile keys may all collide), or not
known here, is None. So no answer keeps the host busy for long.

Not covered: variables, loops, ``with``, ``try``; those are the judge's.
"""

from __future__ import annotations

import ast
import importlib
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from verl_rlar.sandbox import values

MAX_ITEMS = 10_000
"""Values in all answers together."""
MAX_CHARACTERS = 100_000
"""Characters of texts in them."""
MAX_HASHED = 200
"""Members of sets and keys of dicts in all answers together, and of a set that is made of one."""
MAX_DEPTH = 50
MAX_NUMBER = 2**1024

_MODULES = frozenset("bisect collections copy functools heapq itertools json math random re string typing".split())
"""What tests may import: it is there, and to import it changes nothing."""


class _Unsure(Exception):
    """The judge must be asked."""


class _Failed(Exception):
    """A call of the program has no value; the text says why, in the judge's words."""


class _Answers:
    """What the program has answered, and what of it is used up."""

    def __init__(self, keys: Sequence[str], answers: Sequence[Any], *, partial: bool) -> None:
        self._left: dict[str, list[Any]] = {}
        for key, answer in zip(keys, answers, strict=False):
            self._left.setdefault(key, []).append(answer)
        self._partial = partial
        self._items, self._characters, self._hashed = MAX_ITEMS, MAX_CHARACTERS, MAX_HASHED
        self.used = 0

    def take(self, key: str) -> Any:
        """The value of the next call like this.

        Raises:
            _Failed: It has none.
            _Unsure: It was not fetched, or is not small and plain.
        """
        left = self._left.get(key)
        if not left:
            raise _Unsure
        answer = left.pop(0)
        self.used += 1
        if "stopped" in answer:
            if self._partial:
                raise _Unsure  # the judge may go on
            raise _Failed(str(answer["stopped"])[:200])
        if "raised" in answer:
            name = "" if answer["raised"] == "AssertionError" else answer["raised"]
            raise _Failed(f"{name}: {str(answer['text'])[:200]}".strip(": "))
        content = answer["value"]
        if content is None or type(content) in (bool, int, float):
            return content
        self._measure(content, MAX_DEPTH)
        try:
            return values.decode(content)
        except values.NotData:
            raise _Unsure from None

    def _measure(self, content: Any, depth: int) -> None:
        """Counts what is in a value."""
        self._items -= 1
        if isinstance(content, str):
            self._characters -= len(content)
        elif isinstance(content, list):
            if not depth or len(content) > self._items:
                raise _Unsure
            for part in content:
                self._measure(part, depth - 1)
        elif isinstance(content, dict):
            if not depth or len(content) != 1:
                raise _Unsure
            ((tag, inner),) = content.items()
            if tag in ("set", "frozenset", "dict") and isinstance(inner, list):
                self._hashed -= len(inner)
            elif tag not in ("tuple", "int", "float"):
                raise _Unsure
            self._measure(inner, depth - 1)
        if self._items < 0 or self._characters < 0 or self._hashed < 0:
            raise _Unsure


_Value = Callable[[_Answers], Any]
"""An expression, as a function of the answers."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the tests say."""

    passed: int
    cases: int
    failed: tuple[int, str] | None
    """Number of the first case that failed, and why; None if none did."""


@dataclass(frozen=True, kw_only=True)
class Simple:
    """Tests as checks."""

    checks: tuple[tuple[int, _Value, str], ...]
    """Number of a case, what it asserts, and the message beside it, in the order in which they run."""

    def judge(self, keys: Sequence[str], answers: Sequence[Any], *, partial: bool) -> Outcome | None:
        """What the judge would say.

        Args:
            keys: The calls that were asked, as text.
            answers: The program's answers to them, as far as they came; hostile, and not nested deeply.
            partial: Whether to go on after a failed case.

        Returns:
            None: the judge must be asked.
        """
        known = _Answers(keys, answers, partial=partial)
        passed, failed = 0, None
        try:
            for number, check, message in self.checks:
                why = ""
                try:
                    if not check(known):
                        why = message.strip(": ") or "not so"
                except _Failed as failure:
                    why = str(failure) or "not so"
                except (TypeError, ValueError, ArithmeticError, LookupError) as error:
                    why = f"{type(error).__name__}: {str(error)[:200]}".strip(": ")
                if not why:
                    passed += 1
                    continue
                if not known.used:
                    return None  # it is the tests' own fault
                failed = failed or (number, why)
                if not partial:
                    break
        except (_Unsure, RecursionError):
            return None
        return Outcome(passed=passed, cases=len(self.checks), failed=failed) if known.used else None


@dataclass(frozen=True, kw_only=True)
class Names:
    """What the names in the tests mean."""

    key: Callable[[ast.Call, str], str | None]
    """A call of the program with literal arguments, as text; None if it is something else. The text is the name of the
    parameter that stands for the program there."""
    fold: Callable[[ast.AST], Any]
    """The value of an expression out of literals; `ValueError` if it is none."""
    program: Callable[[str], bool]
    """Whether a name is the program's."""
    brings: Callable[[ast.Import | ast.ImportFrom], bool]
    """Whether an import is of the program, and of nothing else."""
    own: frozenset[str]
    """Names that the tests or what surrounds them bind themselves."""
    starred: bool
    """Whether anything binds names that nobody knows (``import *``)."""


class _NotSimple(Exception):
    """The tests need the judge."""


def read(tree: ast.Module, functions: Sequence[str], target: str, names: Names) -> Simple | None:
    """Checks out of tests; None if they are not simple.

    Args:
        tree: The tests, as they are in the row.
        functions: Names of the functions that are to be run after the text itself.
        target: The program's name that `check` is called with.
        names: What names mean.
    """
    try:
        return Simple(checks=tuple(_Tests(functions, target, names).checks(tree)))
    except (_NotSimple, RecursionError):
        return None


class _Tests:
    def __init__(self, functions: Sequence[str], target: str, names: Names) -> None:
        self.functions = functions
        self.target = target
        self.names = names
        self.count = 0
        """Cases so far, in the order of the text."""
        self.defined: dict[str, list[tuple[int, _Value, str]]] = {}
        self.called: set[str] = set()

    def checks(self, tree: ast.Module) -> list[tuple[int, _Value, str]]:
        found: list[tuple[int, _Value, str]] = []
        for node in tree.body:
            if isinstance(node, ast.FunctionDef):
                self.define(node)
            elif isinstance(node, ast.Assert):
                found.append(self.case(node, ""))
            elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                found += self.call(node.value)
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                self.bring(node)
            elif isinstance(node, ast.Assign):
                self.assign(node)
            elif not _idle(node):
                raise _NotSimple
        if self.defined.keys() != {*self.functions, *self.called}:
            raise _NotSimple
        return found + [check for name in self.functions for check in self.defined[name]]

    def define(self, node: ast.FunctionDef) -> None:
        arguments = node.args
        plain = not (node.decorator_list or arguments.vararg or arguments.kwarg or arguments.kwonlyargs)
        parameters = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
        if not plain or arguments.defaults or len(parameters) != (node.name == "check"):
            raise _NotSimple
        if node.name in self.defined or self.names.program(node.name):
            raise _NotSimple
        parameter = parameters[0] if parameters else ""
        found = [self.case(part, parameter) for part in node.body if isinstance(part, ast.Assert)]
        if not found or not all(isinstance(part, ast.Assert) or _idle(part) for part in node.body):
            raise _NotSimple
        self.defined[node.name] = found

    def call(self, node: ast.Call) -> list[tuple[int, _Value, str]]:
        """``check(f)`` or ``test()``, once."""
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        right = [self.target] if name == "check" else []
        if node.keywords or [getattr(argument, "id", None) for argument in node.args] != right:
            raise _NotSimple
        if name in self.called or name not in self.defined or name in self.functions:
            raise _NotSimple
        self.called.add(name)
        return self.defined[name]

    def bring(self, node: ast.Import | ast.ImportFrom) -> None:
        """An import that succeeds, and binds nothing of the program's."""
        if self.names.brings(node):
            return
        for alias in node.names:
            if isinstance(node, ast.Import):
                known = alias.name in _MODULES
            elif node.level or node.module not in _MODULES:
                known = False
            else:
                known = hasattr(importlib.import_module(node.module), alias.name)
            if not known or self.names.program(alias.asname or alias.name):
                raise _NotSimple

    def assign(self, node: ast.Assign) -> None:
        """A literal for a name that nothing uses here."""
        if not all(isinstance(target, ast.Name) and not self.names.program(target.id) for target in node.targets):
            raise _NotSimple
        if any(isinstance(target, ast.Name) and target.id in self.defined for target in node.targets):
            raise _NotSimple
        self.fold(node.value)

    def case(self, node: ast.Assert, parameter: str) -> tuple[int, _Value, str]:
        message = node.msg.value if isinstance(node.msg, ast.Constant) else ""
        self.count += 1
        return self.count - 1, self.value(node.test, parameter), str(message)[:200]

    # expressions

    def fold(self, node: ast.AST) -> Any:
        try:
            return self.names.fold(node)
        except ValueError:
            raise _NotSimple from None

    def value(self, node: ast.expr, parameter: str) -> _Value:
        if isinstance(node, ast.Call):
            key = self.names.key(node, parameter)
            return (lambda answers: answers.take(key)) if key is not None else self.builtin(node, parameter)
        if isinstance(node, ast.Compare):
            return self.comparison(node, parameter)
        if isinstance(node, ast.BoolOp):
            parts = [self.value(part, parameter) for part in node.values]
            return _any(parts) if isinstance(node.op, ast.Or) else _all(parts)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            inner = self.value(node.operand, parameter)
            return lambda answers: not inner(answers)
        if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Sub, ast.Add)):
            try:
                return self.constant(node)
            except _NotSimple:
                left, right = self.value(node.left, parameter), self.value(node.right, parameter)
                operation = operator.sub if isinstance(node.op, ast.Sub) else operator.add
                return lambda answers: operation(_number(left(answers)), _number(right(answers)))
        return self.constant(node)

    def constant(self, node: ast.expr) -> _Value:
        called = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
        if called and (self.names.starred or called & self.names.own or any(map(self.names.program, called))):
            raise _NotSimple
        value = self.fold(node)
        return lambda answers: value

    def comparison(self, node: ast.Compare, parameter: str) -> _Value:
        first = self.value(node.left, parameter)
        steps = []
        for sign, right in zip(node.ops, node.comparators, strict=True):
            single = isinstance(right, ast.Constant) and (right.value is None or isinstance(right.value, bool))
            if isinstance(sign, (ast.Is, ast.IsNot)) and not single:
                raise _NotSimple  # identity is not for values that were copied
            steps.append((_SIGNS[type(sign)], self.value(right, parameter)))
        if len(steps) == 1:
            ((compare, second),) = steps
            return lambda answers: compare(first(answers), second(answers))

        def chain(answers: _Answers) -> Any:
            left, good = first(answers), True
            for compare, value in steps:
                right = value(answers)
                good = compare(left, right)
                if not good:
                    return good
                left = right
            return good

        return chain

    def builtin(self, node: ast.Call, parameter: str) -> _Value:
        """A call of one of the functions in `_BUILTINS`, or a literal such as ``set([1])``."""
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name not in _BUILTINS or self.names.starred or name in self.names.own or self.names.program(name):
            raise _NotSimple
        try:
            return self.constant(node)
        except _NotSimple:
            pass
        function, most = _BUILTINS[name]
        if node.keywords or not 1 <= len(node.args) <= most or any(isinstance(arg, ast.Starred) for arg in node.args):
            raise _NotSimple
        arguments = [self.value(arg, parameter) for arg in node.args]
        return lambda answers: function(*(argument(answers) for argument in arguments))


def _idle(node: ast.stmt) -> bool:
    return isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))


def _any(parts: list[_Value]) -> _Value:
    def check(answers: _Answers) -> Any:
        value: Any = None
        for part in parts:
            value = part(answers)
            if value:
                break
        return value

    return check


def _all(parts: list[_Value]) -> _Value:
    def check(answers: _Answers) -> Any:
        value: Any = None
        for part in parts:
            value = part(answers)
            if not value:
                break
        return value

    return check


_SIGNS: Mapping[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.In: lambda left, right: left in right,
    ast.NotIn: lambda left, right: left not in right,
}


def _number(value: Any) -> Any:
    """A number that is not large, as it is."""
    if type(value) is float or (type(value) in (int, bool) and -MAX_NUMBER < value < MAX_NUMBER):
        return value
    raise _Unsure


def _on(function: Callable[..., Any], *kinds: type, most: int = MAX_ITEMS) -> Callable[..., Any]:
    """A function for arguments of known kinds."""

    def checked(value: Any) -> Any:
        if type(value) not in kinds or len(value) > most:
            raise _Unsure
        return function(value)

    return checked


_CONTAINERS = (list, tuple, set, frozenset, dict, str)


def _numeric(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *numbers: function(*map(_number, numbers))


_BUILTINS: Mapping[str, tuple[Callable[..., Any], int]] = {
    "abs": (_numeric(abs), 1),
    "round": (_numeric(round), 2),
    "len": (_on(len, *_CONTAINERS), 1),
    "list": (_on(list, *_CONTAINERS), 1),
    "tuple": (_on(tuple, *_CONTAINERS), 1),
    "sorted": (_on(sorted, *_CONTAINERS), 1),
    "set": (_on(set, *_CONTAINERS, most=MAX_HASHED), 1),
}
"""Functions by name, each with the largest number of its arguments."""
