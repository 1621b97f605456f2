# SPDX-License-Identifier: Apache-2.0
"""The architecture, kept by a test: imports go down only, and few files know the heavy packages."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "verl_rlar"

LEVELS: tuple[tuple[str, ...], ...] = (
    ("__init__", "types", "errors", "config", "calibration", "mixture", "signs", "versions", "once"),
    ("rows", "row_files", "streams", "features", "ledger", "sandbox", "serving", "repository", "hub", "gate"),
    ("chat", "purse", "quoting"),
    ("advice", "clusters", "card_examples", "snapshots"),
    ("tools",),
    ("library", "scoring", "trusted", "competence"),
    ("router",),
    ("dispatcher",),
    ("planning",),
    ("exam", "life", "watch", "metrics", "inbox", "agents"),
    ("admission",),
    ("acquisition", "adviser"),
    ("shadow", "export", "replay", "report", "nodes", "fleet", "acquirer", "reexam", "doctor"),
    ("service",),
    ("cpu", "plugin", "trainer", "modes", "reward_manager", "cli", "__main__"),
)
"""Modules by level, the lowest first; a folder counts as one. See the README."""

ONLY_IN = {
    "ray": {"nodes.py", "service.py", "cpu"},
    "verl": {"plugin.py", "trainer.py", "modes.py", "reward_manager.py", "cpu"},
    "torch": {"cpu", "serving"},
    "vllm": {"cpu"},
    "transformers": {"cpu", "serving"},
    "docker": {"sandbox"},
    "omegaconf": {"plugin.py"},
    "hydra": {"plugin.py"},
    "huggingface_hub": {"hub.py"},
    "smolagents": {"agents"},
    "jinja2": {"agents", "report"},
}


def modules() -> dict[str, list[Path]]:
    """Files by module of the first level."""
    found: dict[str, list[Path]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        found.setdefault(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), []).append(path)
    return found


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def level(module: str) -> int:
    return next(number for number, names in enumerate(LEVELS) if module in names)


def test_every_module_has_a_level() -> None:
    assert set(modules()) == {name for names in LEVELS for name in names}


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_go_down_only(module: str) -> None:
    for path in modules()[module]:
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "verl_rlar" and len(parts) > 1 and parts[1] not in (module, "__version__"):
                above = f"{path.name} (level {level(module)}) imports {name} (level {level(parts[1])})"
                assert level(parts[1]) <= level(module), above


@pytest.mark.parametrize("package", sorted(ONLY_IN))
def test_heavy_packages_are_known_to_few_files(package: str) -> None:
    importers = {
        path.relative_to(PACKAGE).parts[0]
        for paths in modules().values()
        for path in paths
        if any(name.split(".")[0] == package for name in imports(path))
    }
    assert importers <= ONLY_IN[package]


def test_of_serving_only_the_servers_own_process_knows_torch() -> None:
    for path in modules()["serving"]:
        heavy = {name.split(".")[0] for name in imports(path)} & {"torch", "transformers"}
        assert not heavy or path.name == "server.py"


def test_every_file_says_its_licence_and_what_it_is() -> None:
    for paths in modules().values():
        for path in paths:
            text = path.read_text()
            assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n"), path
            assert ast.get_docstring(ast.parse(text)), f"{path} has no docstring"
