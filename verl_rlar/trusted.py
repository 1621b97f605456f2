# SPDX-License-Identifier: Apache-2.0
"""The tools that need no exam to be live: the built-in rules, and the user's own.

The user's own are functions under `verl_rlar.tools.rule.rule`, named in `rlar.tools` or by an entry point in the group
``verl_rlar.tools`` of an installed package. They run like the built-in rules, in a process of their own, not in a box.

Guarantees: the same list in every process with the same settings and packages; a function that cannot be imported or is
no rule, and two tools of one name, are a `ConfigError` that names them.

Not covered: the hash of a tool's code is that of its own file; what it imports may change without notice.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import entry_points

from verl_rlar.config import RlarConfig
from verl_rlar.errors import ConfigError
from verl_rlar.library import Trusted, builtin_snapshot
from verl_rlar.tools.rule import load, source_of
from verl_rlar.types import Snapshot, ToolSpec

GROUP = "verl_rlar.tools"
"""Group of entry points."""


def trusted_tools(config: RlarConfig) -> tuple[Trusted, ...]:
    """All of them: the built-in ones in their order, then `rlar.tools`, then entry points by name.

    Raises:
        ConfigError: See the module.
    """
    boxes = config.sandbox.backend != "none"
    tools = [Trusted(spec=spec, source=_source(spec), by="builtin") for spec in builtin_snapshot(boxes=boxes).tools]
    wheres = {tool.spec.name: "built in" for tool in tools}
    targets: set[str] = set()
    for where, target in _named(config):
        if target in targets:
            continue
        targets.add(target)
        spec = _spec(where, target)
        if spec.boxed and not boxes:
            continue
        if spec.name in wheres:
            raise ConfigError(
                f"{where}: there are two tools named {spec.name!r}, this one ({target}) and one that is "
                f"{wheres[spec.name]}; give yours another name, and prefer it by rlar.routing.prefer.KIND={spec.name}_2"
            )
        wheres[spec.name] = f"from {where}"
        tools.append(Trusted(spec=spec, source=_source(spec), by="user"))
    return tuple(tools)


def trusted_snapshot(config: RlarConfig) -> Snapshot:
    """The same as a snapshot: what is live where there is no library."""
    return Snapshot(tools=tuple(tool.spec for tool in trusted_tools(config)))


def _named(config: RlarConfig) -> Iterator[tuple[str, str]]:
    """What names a tool, and its target."""
    for target in config.tools:
        yield f"rlar.tools ({target})", target
    for point in sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value)):
        package = point.dist.name if point.dist else "unknown"
        yield f"entry point {point.name!r} of package {package}", point.value


def _spec(where: str, target: str) -> ToolSpec:
    try:
        function = load(target)
    except Exception as error:  # the boundary to the user's code, which may raise anything when it is imported
        raise ConfigError(
            f"{where}: {target!r} cannot be imported ({type(error).__name__}: {error}); write package.module:function, "
            "and make sure that every node has the package"
        ) from error
    spec = getattr(function, "spec", None)
    if not isinstance(spec, ToolSpec):
        raise ConfigError(
            f"{where}: {target!r} is no rule; put `@rule(name=..., kinds=..., description=...)` from "
            "verl_rlar.tools.rule above it"
        )
    if spec.target != target:
        raise ConfigError(f"{where}: {target!r} is defined as {spec.target!r}; name it so")
    return spec


def _source(spec: ToolSpec) -> str:
    return source_of(load(spec.target))
