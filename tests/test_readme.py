# SPDX-License-Identifier: Apache-2.0
"""The README keeps its word: its commands compose, its files are there, its figures have commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_command_for_gpus_composes_and_passes_the_checks() -> None:
    pytest.importorskip("verl", reason="verl is not installed (extra `cpu`)")
    from hydra import compose, initialize_config_module

    from verl_rlar.plugin import check

    command = re.search(
        r"^    (python -m verl\.trainer\.main_ppo \+rlar=default \\\n(?: {8}.*\n)+)", README, re.MULTILINE
    )
    assert command
    overrides = shlex.split(command.group(1).replace("\\\n", " "))[3:]
    assert len(overrides) > 15
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=overrides)
    assert check(config).run_dir == "checkpoints/qwen3-8b/rlar"


def test_the_declared_routes_compose_and_are_understood() -> None:
    pytest.importorskip("verl", reason="verl is not installed (extra `cpu`)")
    from hydra import compose, initialize_config_module

    from verl_rlar.plugin import check

    overrides = [shlex.split(line)[0] for line in re.findall(r"^    \+?(rlar\.routing\..*)$", README, re.MULTILINE)]
    declared = [override for override in overrides if ".routes." in override]
    assert len(overrides) > len(declared) > 2
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=["+rlar=default", *(f"++{override}" for override in overrides)])
    routing = check(config).routing
    assert {f"rlar.routing.routes.{name}" for name in routing.routes} == {line.split("=")[0] for line in declared}


def test_the_tree_names_every_module_and_no_other() -> None:
    tree = README.split("## The tree")[1].split("## ")[0]
    folders = (ROOT / "verl_rlar" / name for name in (".", "tools", "sandbox"))
    modules = {path.name for folder in folders for path in folder.glob("*.py")} - {"__init__.py", "__main__.py"}
    assert {name for name in re.findall(r"\b(\w+\.py)\b", tree)} == modules
    rules = {path.stem for path in (ROOT / "verl_rlar" / "tools" / "rules").glob("*.py")} - {"__init__"}
    line = re.search(r"rules/ +(.*)\n", tree)
    assert line and set(line.group(1).split()) == rules


def test_every_benchmark_in_the_figures_is_there() -> None:
    figures = README.split("## Figures")[1].split("## Tests")[0]
    scripts = re.findall(r"python (recipes/\S+\.py)", figures)
    assert scripts
    assert [script for script in scripts if not (ROOT / script).is_file()] == []


def test_every_extra_in_the_readme_is_in_the_package() -> None:
    extras = set(
        re.findall(r"^([a-z-]+) = \[", (ROOT / "pyproject.toml").read_text().split("optional-dependencies]")[1], re.M)
    )
    table = README.split("| extra | brings |")[1].split("##")[0]
    named = set(re.findall(r"^\| `([a-z-]+)`", table, re.M))
    assert named <= extras and {"cpu", "cpu-vllm", "vllm", "dev"} <= named
