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
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable
from typing import Protocol, cast

from verl_rlar.types import Kind, Sample, Scope, ToolSpec, Verdict


class Rule(Protocol):
    """A function that `rule` has described."""

    spec: ToolSpec

    def __call__(self, sample: Sample) -> Verdict: ...


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
    origin: str = "builtin",
) -> Callable[[Callable[[Sample], Verdict]], Rule]:
    """Describes a function as a tool; see `ToolSpec` for the fields.

    Raises:
        ValueError: The function is not importable by name (a lambda, a nested function).
    """

    def describe(function: Callable[[Sample], Verdict]) -> Rule:
        if "<" in function.__qualname__:
            raise ValueError(
                f"rule {name!r}: {function.__qualname__} cannot be imported by name; define it at top level"
            )
        module = inspect.getmodule(function)
        source = inspect.getsource(module) if module else inspect.getsource(function)
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
            origin=origin,
            source_sha256=hashlib.sha256(source.encode()).hexdigest(),
        )
        return described

    return describe
