# SPDX-License-Identifier: Apache-2.0
"""The judge of unit tests: runs the tests in a verifier box, with stand-ins for the names of the program.

The host sends the text of this file as a verifier (`verl_rlar.sandbox.base.Job`); it is never imported by the host.
The tests are real Python in this process; the program is not here. A call of one of its names is looked up among the
answers that were fetched in advance, or asked of the host, which has it evaluated in the program's own box; what
comes back is plain data. So nothing that the program defines (``__eq__``, a patched module, an exit) has any say in a
comparison.

An object that cannot cross the wall stays in the program's box; here it is a `Remote` that knows how it came about.
Objects can change, so whatever was done to one of them is done again, in order, before the next question about one.

Guarantees: standard library, `rlar` and `values` only; `score` raises nothing for what tests do, and says whether a
failure is the program's or the tests' own (`Broken`).

Not covered: functions and objects of the tests' own as arguments; what a call changes in its arguments, unless the call
is a statement of its own; global state of the program between calls that were not fetched together; equality of two
objects of the program's classes is what these classes say.
"""

from __future__ import annotations

import builtins
import json
import operator
import random
import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import rlar
import values


class Broken(BaseException):
    """The tests are at fault, or need what a judge cannot do."""


class Stopped(BaseException):
    """The program hung, crashed or flooded while it was asked."""


class Raised(Exception):
    """An exception of a class that the program defines itself."""


class Ended(RuntimeError):
    """The program raised StopIteration, which no test speaks of; as itself it would end a `map` of the tests early."""


RAISED: dict[str, type[BaseException]] = {}
"""Classes that stand for the program's exceptions, by name."""


def raised_class(name: str) -> type[BaseException]:
    """What an exception of that name is, here."""
    if name not in RAISED:
        known: Any = getattr(builtins, name, None)
        exception = isinstance(known, type) and issubclass(known, BaseException)
        RAISED[name] = known if exception else type(name, (Raised,), {})
    return RAISED[name]


def raised(name: str, text: str) -> BaseException:
    """An exception of the program's, to be raised here; its text is the program's, whatever its class makes of it."""
    kind = Ended if name in ("StopIteration", "StopAsyncIteration") and not state.stops else raised_class(name)
    kind = type(kind.__name__, (kind,), {"__str__": lambda self: text})
    error = kind.__new__(kind)
    error.args = (text,)
    error.from_program = True  # type: ignore[attr-defined]
    return error


class State:
    """What is known so far."""

    partial = False
    answers: dict[str, list[Any]]
    """Answers that were fetched, by expression, in order."""
    inner: set[str]
    """Expressions that are parts of those: they need no answer of their own."""
    touched: list[Any]
    """What was done to objects in the program's box, in order; the n-th is known there as ``#n``."""
    checked = 0
    """How many of these are known not to have failed when they were first done."""
    passed = cases = used = 0
    failed: tuple[int | None, str] | None = None
    stopped = False
    stops = False
    """Whether the tests speak of StopIteration."""
    seen: set[int]


state = State()


def dumps(expression: Any) -> str:
    return json.dumps(expression, separators=(",", ":"))


class Remote:
    """A name, an attribute or an object in the program's box."""

    __slots__ = ("_index", "_lazy", "_tree")

    def __init__(self, tree: dict[str, Any], index: int | None = None, *, lazy: bool = False) -> None:
        object.__setattr__(self, "_tree", tree)  # how it came about
        object.__setattr__(self, "_index", index)  # its place in `State.touched`, once it has one
        object.__setattr__(self, "_lazy", lazy)  # not asked yet: it may still turn out to be a plain value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        owner, name = self._tree.get("attr", (None, ""))
        if name in _TELLING and not all(map(may_know, [owner] * len(args), args)):
            raise TypeError(f"{name}: only a value has a say in this")
        tree = {"call": [self, [half(arg) for arg in args], {name: half(arg) for name, arg in kwargs.items()}]}
        return result(tree)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return result({"attr": [self, name]})

    def __setattr__(self, name: str, value: Any) -> None:
        here("setattr", self, name, value)

    def __eq__(self, other: Any) -> Any:
        mine = known(self)
        if type(mine) is not Remote:
            return mine == other
        if not has_remote(half(other, strict=False)):
            return False  # an object of the program's is no plain value, whatever its class says
        return Remote({"attr": [mine, "__eq__"]})(other) is True

    def __ne__(self, other: Any) -> Any:
        return not self == other

    def __hash__(self) -> int:
        return hash(known(self)) if type(known(self)) is not Remote else here("hash", self)

    def __bool__(self) -> bool:
        mine = known(self)
        return bool(mine) if type(mine) is not Remote else here("bool", mine)

    def __iter__(self) -> Any:
        mine = known(self)
        if type(mine) is not Remote:
            return iter(mine)
        listed = here("list", mine)
        return iter(
            [operator.getitem(listed, number) for number in range(len(listed))] if type(listed) is Remote else listed
        )

    def __repr__(self) -> str:
        mine = known(self)
        return repr(mine) if type(mine) is not Remote else here("repr", mine)

    def __str__(self) -> str:
        mine = known(self)
        return str(mine) if type(mine) is not Remote else here("str", mine)

    def __instancecheck__(self, value: Any) -> bool:
        if type(value) is not Remote or type(known(value)) is not Remote:
            return False
        return here("isinstance", value, self) is True

    def __contains__(self, item: Any) -> bool:
        mine = known(self)
        if type(mine) is not Remote:
            return item in mine
        try:
            if may_know(mine, item):
                return Remote({"attr": [mine, "__contains__"]})(item) is True
        except AttributeError:
            pass
        return any(item == each for each in mine)


_TELLING = frozenset("startswith endswith issubset issuperset isdisjoint index count find equals".split())
"""Methods of values that are told what is expected."""


def may_know(owner: Any, other: Any) -> bool:
    """Whether an object of the program's may be asked how it compares with something.

    A result that is an object of a class of the program's own would pass ``abs(result - expected) < 1e-6`` by a
    ``__sub__`` that lies. So it learns of no plain value in this way, unless the tests have made it themselves, by the
    name of a class: then such operators may be what they test.
    """
    return type(owner) is not Remote or type(other) is Remote or is_made(owner)


def is_made(remote: Remote) -> bool:
    """Whether an object was made by the name of a class, or by operators on such a one."""
    while "call" in remote._tree:
        function = remote._tree["call"][0]
        if type(function) is not Remote:
            return False
        if "name" in function._tree:
            return bool(function._tree["name"][:1].isupper())
        owner, name = function._tree.get("attr", (None, ""))
        if type(owner) is not Remote or not name.startswith("__"):
            return False
        remote = owner
    return False


_ASKING = frozenset(("__getitem__", "__setitem__", "__delitem__", "__round__"))
"""Operators whose operand says nothing about what is expected."""


def _operators() -> None:
    def unary(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def method(self: Remote, *args: Any) -> Any:
            mine = known(self)
            if type(mine) is not Remote:
                return function(mine, *args)
            if name not in _ASKING and not all(may_know(mine, arg) for arg in args):
                raise TypeError(f"{name}: only a value has a say in this")
            return Remote({"attr": [mine, name]})(*args)

        return method

    for name in (
        "lt",
        "le",
        "gt",
        "ge",
        "add",
        "sub",
        "mul",
        "truediv",
        "floordiv",
        "mod",
        "pow",
        "and_",
        "or_",
        "xor",
    ):
        dunder = f"__{name.rstrip('_')}__"
        setattr(Remote, dunder, unary(dunder, getattr(operator, name)))
        if name not in ("lt", "le", "gt", "ge"):
            reflected = f"__r{name.rstrip('_')}__"
            swapped = getattr(operator, name)
            setattr(Remote, reflected, unary(reflected, lambda a, b, swapped=swapped: swapped(b, a)))
    for name in ("getitem", "setitem", "delitem", "neg", "pos", "invert", "abs", "index"):
        setattr(Remote, f"__{name}__", unary(f"__{name}__", getattr(operator, name)))
    for name in ("len", "int", "float", "complex", "round", "reversed"):
        setattr(Remote, f"__{name}__", unary(f"__{name}__", getattr(builtins, name)))


_operators()


def half(value: Any, *, strict: bool = True) -> Any:
    """A value in the notation of `values`, with every `Remote` as it is."""

    def opaque(item: Any) -> Any:
        if type(item) is Remote or not strict:
            return item
        name = getattr(item, "__name__", "")
        if isinstance(name, str) and name and getattr(builtins, name, None) is item:
            return Remote({"name": name})  # str, sum: the same in every process
        raise Broken(f"the tests hand over a {type(item).__name__}, which cannot leave their process")

    if type(value) is Remote:
        return value
    return values.encode(value, opaque)


def has_remote(tree: Any) -> bool:
    if isinstance(tree, (list, tuple)):
        return any(map(has_remote, tree))
    return has_remote(list(tree.values())) if isinstance(tree, dict) else type(tree) is Remote


def plain(tree: Any) -> Any:
    """The expression without memory: every object as it was made."""
    if type(tree) is Remote:
        return {"name": f"#{tree._index}"} if tree._index is not None else plain(tree._tree)
    if isinstance(tree, list):
        return [plain(part) for part in tree]
    return {name: plain(part) for name, part in tree.items()} if isinstance(tree, dict) else tree


def pinned(tree: Any) -> Any:
    """The expression with every object as the one that it is."""
    if type(tree) is Remote:
        if tree._index is not None:
            return {"name": f"#{tree._index}"}
        expression = pinned(tree._tree)
        if "call" not in tree._tree:
            return expression
        state.touched.append(expression)
        object.__setattr__(tree, "_index", len(state.touched) - 1)
        return {"name": f"#{tree._index}"}
    if isinstance(tree, list):
        return [pinned(part) for part in tree]
    return {name: pinned(part) for name, part in tree.items()} if isinstance(tree, dict) else tree


def result(tree: dict[str, Any]) -> Any:
    """The value of a call or an attribute: fetched already, put off, or asked for."""
    key = dumps(plain(tree))
    fetched = state.answers.get(key)
    if fetched:
        return taken(tree, fetched.pop(0))
    return Remote(tree, lazy=True) if key in state.inner else asked(tree)


def asked(tree: dict[str, Any]) -> Any:
    """The value of a call or an attribute, from the program's box."""
    expression = pinned(tree)
    on_object = '"#' in dumps(expression)
    calls = [*state.touched, expression] if on_object else [expression]
    reply = rlar.ask(kind="calls", calls=calls)
    answers = reply["answers"]
    if len(answers) < len(calls):
        return taken(tree, {"stopped": str(reply["stopped"])})
    made, state.checked = answers[state.checked : len(state.touched)] if on_object else [], len(state.touched)
    for answer in made:  # objects that nobody has asked for before
        if "raised" in answer:
            taken(tree, answer)
    index = None
    if on_object and "call" in tree:  # it may have changed the object
        index = state.checked
        state.touched.append(expression)
        state.checked += 1
    return taken(tree, answers[-1], index)


def taken(tree: dict[str, Any], answer: dict[str, Any], index: int | None = None) -> Any:
    """What an answer is, here."""
    state.used += 1
    if "stopped" in answer:
        state.stopped = True
        raise Stopped(answer["stopped"])
    if "raised" in answer:
        raise raised(str(answer["raised"]), str(answer["text"]))
    content = answer["value"]
    if content is None or type(content) in (bool, int, float, str):
        return content
    try:
        if "opaque" in dumps(content) and has_opaque(content):
            return Remote(tree, index)
        return values.decode(content)
    except (values.NotData, RecursionError) as error:
        raise raised("ValueError", f"an answer that is no value: {error}") from None


def has_opaque(content: Any) -> bool:
    if isinstance(content, list):
        return any(map(has_opaque, content))
    return isinstance(content, dict) and ("opaque" in content or any(map(has_opaque, content.values())))


def known(remote: Remote) -> Any:
    """The value that was put off, or the `Remote` itself if it cannot cross."""
    if not remote._lazy:
        return remote
    value = asked(pinned(remote) if "call" in remote._tree else remote._tree)
    if type(value) is not Remote:
        return value
    object.__setattr__(remote, "_lazy", False)
    return remote


def here(function: str, *args: Any) -> Any:
    """A builtin function of an object, from the program's box."""
    return asked({"call": [Remote({"name": function}), [half(arg) for arg in args], {}]})


def discard(function: Any, *args: Any, **kwargs: Any) -> None:
    """A call whose result nobody wants: what it changes in its arguments is brought back."""
    changing = [arg for arg in args if type(arg) in (list, dict, set, bytearray)]
    if type(function) is not Remote or not changing:
        function(*args, **kwargs)
        return
    places = {}
    for arg in changing:
        state.touched.append(half(arg))
        places[id(arg)] = Remote({"call": []}, len(state.touched) - 1)
    asked(
        {
            "call": [
                function,
                [places.get(id(arg)) or half(arg) for arg in args],
                {k: half(v) for k, v in kwargs.items()},
            ]
        }
    )
    for arg in changing:
        new = asked(pinned(places[id(arg)]))
        if type(new) is not type(arg):
            continue
        if isinstance(arg, (list, bytearray)):
            arg[:] = new
        else:
            arg.clear()
            arg.update(new)


class Case:
    """``with Case(n): assert ...``: one case of the tests."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if isinstance(error, Broken):
            return False
        state.seen.add(self.number)
        state.cases += 1
        if error is None:
            state.passed += 1
            return False
        note(error, self.number)
        error.counted = True  # type: ignore[attr-defined]
        return state.partial


def shown(text: str, most: int) -> str:
    """The beginning of a hostile text, with letters only that take no more room in JSON."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:most])


def note(error: BaseException, number: int | None) -> None:
    """Keeps the first failure.

    Raises:
        Broken: It is the tests' own.
    """
    own = isinstance(error, (NameError, ImportError, SyntaxError, SystemExit)) or not state.used
    own = own and not (isinstance(error, UnboundLocalError) and state.used)  # what the program raised was caught there
    if own and not isinstance(error, (AssertionError, Stopped)) and not hasattr(error, "from_program"):
        raise Broken(f"{type(error).__name__}: {str(error)[:200]}")
    if state.failed is None:
        try:
            text = shown(str(error), 200)
        except BaseException:
            text = ""
        name = "" if isinstance(error, (AssertionError, Stopped)) else shown(type(error).__name__, 100)
        state.failed = (number, f"{name}: {text}".strip(": ") or "not so")


def unit(cases: list[int], function: Callable[[], Any]) -> bool:
    """Runs a part of the tests; whether it ran to its end."""
    cases_before, used_before = state.cases, state.used
    try:
        function()
    except Broken:
        raise
    except BaseException as error:
        unseen = len(set(cases) - state.seen)
        if not hasattr(error, "counted"):
            note(error, None)
            unseen = max(unseen, 1)
        state.cases += unseen
        return False
    if state.cases == cases_before and state.used > used_before:
        state.passed += 1  # it has no assertion; to get through is its only case
        state.cases += 1
    return True


def units(namespace: dict[str, Any], plan: dict[str, Any]) -> bool:
    """Runs all of the tests; whether all ran to their end."""
    code = compile(plan["tests"], "tests.py", "exec", dont_inherit=True)
    cases = plan["cases"]
    ended = unit(cases.get("", []), lambda: exec(code, namespace))
    left = (
        [(name, run) for name in plan["functions"] for name, run in runs(namespace, name, plan["target"])]
        if ended
        else []
    )
    if not ended:
        unrun = {number for name, numbers in cases.items() if name for number in numbers}
        state.cases += len(unrun - state.seen)
    for number, (name, run) in enumerate(left):
        if not unit(cases.get(name, []), run):
            ended = False
            if not state.partial:
                unrun = {case for later, _ in left[number + 1 :] for case in cases.get(later, [])}
                state.cases += len(unrun - state.seen - set(cases.get(name, [])))
                return False
    return ended


def runs(namespace: dict[str, Any], name: str, target: Any) -> list[tuple[str, Callable[[], Any]]]:
    """The runs that a function or class of tests stands for, each with the name of its cases."""
    function = namespace[name]
    if name == "check":
        return [(name, lambda: function(stand_in(target)))]
    if not isinstance(function, type):
        return [(name, partial(function, **kwargs)) for kwargs in getattr(function, "parameters", [{}])]
    prepared: list[bool] = []

    def run(method: str, kwargs: dict[str, Any]) -> None:
        base = getattr(sys.modules.get("unittest"), "TestCase", ())
        case: Any = function(method) if issubclass(function, base) else function()
        if not prepared:
            prepared.append(True)
            hook(function, "setUpClass", "setup_class")
        hook(case, "setUp", "setup_method")
        getattr(case, method)(**kwargs)
        hook(case, "tearDown", "teardown_method")

    return [
        (f"{name}.{method}", partial(run, method, kwargs))
        for method in vars(function)
        if method.startswith("test")
        for kwargs in getattr(vars(function)[method], "parameters", [{}])
    ]


def hook(owner: Any, *names: str) -> None:
    for name in names:
        getattr(owner, name, lambda: None)()


def score(plan: dict[str, Any], answers: list[Any], partial: bool) -> tuple[float | None, str]:
    """Runs the tests.

    Args:
        plan: What the host has made of them (`verl_rlar.tools.rules.code_tests.Program`).
        answers: What the program has answered to ``plan["calls"]``, as far as it came.
        partial: Whether to go on after a failed case.

    Returns:
        Whether all was passed (None: the tests are broken), and JSON with the counts and the first failure.
    """
    state.partial, state.answers, state.inner, state.touched, state.seen = partial, {}, set(plan["inner"]), [], set()
    state.stops = "StopIteration" in plan["tests"]
    for key, answer in zip(plan["calls"], answers, strict=False):
        state.answers.setdefault(key, []).append(answer)
    random.seed(0)
    sys.modules["pytest"] = small_pytest()
    namespace: dict[str, Any] = {"__name__": "tests", "__builtins__": builtins}
    broken, ended = "", False
    try:
        for part in plan["helpers"]:
            try:
                exec(compile(part, "prompt.py", "exec", dont_inherit=True), namespace)
            except Exception:  # what needs it will say so
                pass
        for name in plan["names"]:
            if name == plan["entry"] or name not in namespace:
                exception = name.endswith(("Error", "Exception")) and name != plan["entry"]
                namespace[name] = raised_class(name) if exception else Remote({"name": name})
        namespace.update(__case__=Case, __discard__=discard, __program__=Program(), __remote__=remote)
        ended = units(namespace, plan)
    except Broken as error:
        broken = str(error)
    except BaseException as error:
        broken = f"{type(error).__name__}: {str(error)[:200]}"
    if not broken and not state.used:
        broken = "the tests never call the program"
    good = ended and not state.stopped and state.cases > 0 and not (partial and state.failed)
    counts = {"passed": state.passed, "cases": state.cases, "failed": state.failed, "broken": shown(broken, 300)}
    return (None if broken else float(good)), json.dumps(counts, ensure_ascii=False)


def stand_in(expression: Any) -> Remote:
    """What stands for a name, an attribute or a call without arguments."""
    if "name" in expression:
        return Remote(expression)
    if "attr" in expression:
        return Remote({"attr": [stand_in(expression["attr"][0]), expression["attr"][1]]}, lazy=True)
    return Remote({"call": [stand_in(expression["call"][0]), [], {}]}, lazy=True)


def remote(name: str) -> Any:
    return raised_class(name) if name.endswith(("Error", "Exception")) else Remote({"name": name})


class Program:
    """Stands for the program as a module."""

    def __getattr__(self, name: str) -> Any:
        return remote(name)


class _Raises:
    def __init__(self, expected: Any, match: str | None = None) -> None:
        self.expected, self.match, self.value = expected, match, None

    def __enter__(self) -> _Raises:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if isinstance(error, (Broken, Stopped)):
            return False
        assert error is not None, f"did not raise {self.expected}"
        if not isinstance(error, self.expected):
            return False
        if self.match is not None:
            import re

            assert re.search(self.match, str(error)), f"{str(error)[:100]!r} does not match"
        self.value, self.type = error, kind
        return True


class _Approx:
    """A number, or numbers in a list, a tuple or a dict, within a tolerance."""

    def __init__(self, expected: Any, rel: float | None = None, abs: float | None = None, nan_ok: bool = False) -> None:
        self.expected, self.rel, self.abs, self.nan_ok = expected, rel, abs, nan_ok

    def __eq__(self, other: Any) -> bool:
        return self.near(self.expected, other)

    __hash__ = None  # type: ignore[assignment]

    def near(self, expected: Any, other: Any) -> bool:
        if isinstance(expected, dict):
            same = isinstance(other, dict) and expected.keys() == other.keys()
            return same and all(self.near(value, other[key]) for key, value in expected.items())
        if isinstance(expected, (list, tuple)):
            same = isinstance(other, (list, tuple)) and len(expected) == len(other)
            return same and all(map(self.near, expected, other))
        if expected == other:
            return True
        if not all(isinstance(number, (int, float, complex)) for number in (expected, other)):
            return False
        if expected != expected or other != other:
            return self.nan_ok and expected != expected and other != other
        if builtins.abs(expected) == float("inf") or builtins.abs(other) == float("inf"):
            return False
        absolute = 1e-12 if self.abs is None else self.abs
        relative = (1e-6 if self.abs is None else 0.0) if self.rel is None else self.rel
        return builtins.abs(expected - other) <= max(absolute, relative * builtins.abs(expected))

    def __repr__(self) -> str:
        return f"approx({self.expected!r})"


class _Mark:
    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: args[0] if len(args) == 1 and callable(args[0]) else lambda test: test

    def parametrize(self, names: Any, rows: Any, **_: Any) -> Any:
        names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)

        def mark(test: Any) -> Any:
            old = getattr(test, "parameters", [{}])
            rows_ = [[row] if len(names) == 1 else row for row in rows]
            test.parameters = [{**kwargs, **dict(zip(names, row, strict=True))} for row in rows_ for kwargs in old]
            return test

        return mark


def small_pytest() -> ModuleType:
    """What of pytest tests of a function use."""

    def missing(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise Broken(f"the tests use pytest.{name}, which the judge does not have")

    def fail(reason: str = "", pytrace: bool = True) -> None:
        raise AssertionError(reason)

    module: Any = ModuleType("pytest")
    module.raises, module.approx, module.mark, module.fail = _Raises, _Approx, _Mark(), fail
    module.__getattr__ = missing
    return module
