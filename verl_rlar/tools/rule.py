# SPDX-License-Identifier: Apache-2.0
"""`@rule`: makes a plain function a tool.

A rule is a trusted, importable function ``(Sample) -> Verdict``. It runs in a worker process with a deadline
(`verl_rlar.tools.runner`), so it may be slow or crash on hostile text, but it must not execute text of the response.

A module of rules that has something slow to load (a language model) does so in a function ``warm_up()``: it is called
when a worker process starts, so that no call's deadline pays for it.

    @rule(name="final_answer", kinds={Kind.MATH}, description="...", misses=("...",))
    def score(sample: Sample) -> Verdict: ...

    score.spec       # the ToolSpec
    score(sample)    # the function itself, undecorated

A rule that must run code of the response is a coroutine function, and gets a sandbox to run it in
(`verl_rlar.tools.boxed`):

    @rule(name="unit_tests", kinds={Kind.UNIT_TESTS}, boxed=True, description="...")
    async def unit_tests(sample: Sample, sandbox: Sandbox, config: SandboxConfig) -> Verdict: ...

A rule of your own becomes live by ``rlar.tools=["package.module:function"]`` or an entry point (`verl_rlar.trusted`).
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, Protocol, cast

from verl_rlar.config import SandboxConfig
from verl_rlar.errors import ToolUnavailable
from verl_rlar.sandbox import reading
from verl_rlar.sandbox.base import Sandbox
from verl_rlar.types import Kind, Sample, Scope, ToolSpec, Verdict


class Rule(Protocol):
    """A function that `rule` has described."""

    spec: ToolSpec

    def __call__(self, sample: Sample) -> Verdict: ...


class BoxedRule(Protocol):
    """A coroutine function that `rule` has described."""

    spec: ToolSpec

    async def __call__(self, sample: Sample, sandbox: Sandbox, config: SandboxConfig) -> Verdict: ...


def rule(
    *,
    name: str,
    kinds: Iterable[Kind],
    description: str,
    misses: tuple[str, ...] = (),
    needs_reference: bool = True,
    gate: bool = False,
    low: float = 0.0,
    high: float = 1.0,
    timeout_s: float = 5.0,
    boxed: bool = False,
) -> Callable[[Callable[..., Any]], Any]:
    """Describes a function as a tool; see `ToolSpec` for the fields.

    Returns:
        A decorator that makes the function a `Rule`, or a `BoxedRule`.

    Raises:
        ValueError: The function is not importable by name (a lambda, a nested function).
    """

    def describe(function: Callable[..., Any]) -> Any:
        if "<" in function.__qualname__:
            raise ValueError(
                f"rule {name!r}: {function.__qualname__} cannot be imported by name; define it at top level"
            )
        described = cast(Rule, function)
        described.spec = ToolSpec(
            name=name,
            kind="rule",
            target=f"{function.__module__}:{function.__qualname__}",
            scope=Scope(kinds=frozenset(kinds), needs_reference=needs_reference),
            description=" ".join(description.split()),
            misses=misses,
            gate=gate,
            low=low,
            high=high,
            timeout_s=timeout_s,
            boxed=boxed,
            origin="builtin" if function.__module__.partition(".")[0] == "verl_rlar" else "user",
            source_sha256=hashlib.sha256(source_of(function).encode()).hexdigest(),
        )
        return described

    return describe


def source_of(function: Callable[..., Any]) -> str:
    """What a rule is: the source of its module, and of `verl_rlar.sandbox.reading` if that reads with it."""
    module = inspect.getmodule(function)
    source = inspect.getsource(module) if module else inspect.getsource(function)
    if any(getattr(value, "__module__", None) == reading.__name__ for value in function.__globals__.values()):
        source += f"\n\n# --- {reading.__name__} ---\n\n{inspect.getsource(reading)}"
    return source


@cache
def load(target: str) -> Any:
    """Imports what a rule's ``target`` names, ``package.module:function``: a `Rule` or a `BoxedRule`."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def load_version(spec: ToolSpec) -> Any:
    """Imports a rule, in the version that its spec describes.

    Raises:
        ToolUnavailable: The code is another one by now: what it would answer is not this tool's answer (I3). Or it is
            no rule, so nothing may be imported for it (I6).
    """
    if spec.kind != "rule":
        raise ToolUnavailable(f"{spec.name}: a {spec.kind} does not run as a rule")
    function = load(spec.target)
    if function.spec.source_sha256 != spec.source_sha256:
        raise ToolUnavailable(
            f"{spec.name}: the code of {spec.target} changed since version {spec.digest}, which is to score here; "
            "a new start of the training takes the new code in"
        )
    return function
