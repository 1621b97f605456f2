# SPDX-License-Identifier: Apache-2.0
"""What is examined: a built-in rule by its name, a function of the user's, or a verifier in a file.

Guarantees: a file's code is read as text, and parsed for constants; it is never imported or run here (I6). The user's
own functions are trusted, and imported.

A verifier's file may say at top level ``KINDS = ("math",)`` (what it is for), ``NEEDS_REFERENCE = True``,
``TIMEOUT_S = 5.0`` and ``DESCRIPTION = "..."``; they must be literals. So must the names of the built-in tools that it
wraps (``rlar.builtin``), which its spec lists.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from verl_rlar.errors import ConfigError
from verl_rlar.library import builtin_snapshot
from verl_rlar.tools.rule import load
from verl_rlar.tools.verifier import wrapped
from verl_rlar.types import Kind, Scope, ToolSpec

CHECKED = frozenset(Kind) - {Kind.OPEN}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A tool, and what it takes to run it."""

    spec: ToolSpec
    source: str = ""
    """A verifier's source text; empty for a rule."""
    model: Mapping[str, Any] | None = field(default=None, hash=False)
    """What is known of a reward model and of how it is asked (`verl_rlar.admission`), JSON-like, for the card."""


def find(name: str, kinds: Collection[Kind] = ()) -> Subject:
    """Finds a tool.

    Args:
        name: The name of a built-in tool; ``package.module:function``; or the path of a verifier, ``*.py``.
        kinds: For a verifier that does not say what it is for.

    Raises:
        ConfigError: There is no such tool, or it does not describe itself.
    """
    if name.endswith(".py"):
        try:
            return verifier(Path(name).read_text("utf-8"), name=Path(name).stem, kinds=kinds)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the verifier {name}: {getattr(error, 'strerror', None) or error}") from None
    if ":" not in name:
        snapshot = builtin_snapshot()
        try:
            return Subject(spec=snapshot.tool(name))
        except KeyError:
            known = ", ".join(tool.name for tool in snapshot.tools)
            raise ConfigError(
                f"no tool {name!r}: give a built-in one ({known}), package.module:function, or a verifier's file (*.py)"
                + (f"; a folder with a reward model is ./{name}" if Path(name).is_dir() else "")
            ) from None
    try:
        function = load(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"cannot import {name}: {error}") from None
    spec = getattr(function, "spec", None)
    if not isinstance(spec, ToolSpec):
        raise ConfigError(f"{name} does not say what it is for: decorate it with verl_rlar.tools.rule.rule")
    return Subject(spec=spec)


def verifier(source: str, *, name: str, kinds: Collection[Kind] = (), origin: str = "user") -> Subject:
    """The tool in a verifier's source text.

    Raises:
        ConfigError: It is no Python, has no top-level function ``score``, or says unusable things about itself.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(f"the verifier {name} is no Python: {error}") from None
    functions = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}
    if "score" not in functions:
        raise ConfigError(f"the verifier {name} has no function score(prompt, response, reference, extra)")
    said = _constants(tree)
    try:
        scope = frozenset(map(_kind, said.get("KINDS", kinds))) or CHECKED
        timeout = float(said.get("TIMEOUT_S", 5.0))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the verifier {name}: {error}") from None
    try:
        wraps = wrapped(tree)
    except ConfigError as error:
        raise ConfigError(f"the verifier {name}, {error}") from None
    spec = ToolSpec(
        name=re.sub(r"\W+", "_", name).strip("_").lower() or "verifier",
        kind="verifier",
        target="score",
        scope=Scope(kinds=scope, needs_reference=bool(said.get("NEEDS_REFERENCE", True))),
        description=str(said.get("DESCRIPTION") or ast.get_docstring(tree) or ""),
        wraps=wraps,
        timeout_s=timeout,
        boxed=True,
        origin=origin,
        source_sha256=hashlib.sha256(source.encode()).hexdigest(),
    )
    return Subject(spec=spec, source=source)


def _kind(name: object) -> Kind:
    try:
        return Kind(name)
    except ValueError:
        raise ValueError(f"KINDS: {name!r} is no kind of query; there are {', '.join(Kind)}") from None


def _constants(tree: ast.Module) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            try:
                found[node.targets[0].id] = ast.literal_eval(node.value)
            except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
                continue
    return found
