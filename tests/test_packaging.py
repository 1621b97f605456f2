# SPDX-License-Identifier: Apache-2.0
"""What is installed is whole: the wheel brings the Hydra files, and works from any folder."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling", reason="hatchling is not installed (extra `dev`)")
    folder = tmp_path_factory.mktemp("dist")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", str(folder), str(ROOT)], check=True, timeout=300)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_the_package_the_hydra_files_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = {
        f"verl_rlar/hydra_configs/{p.relative_to(ROOT / 'hydra_configs')}" for p in ROOT.glob("hydra_configs/*/*")
    }
    assert len(configs) == 3 and configs <= names
    assert "verl_rlar/py.typed" in names
    assert {f"verl_rlar/agents/prompts/{p.name}" for p in ROOT.glob("verl_rlar/agents/prompts/*.md")} <= names
    sandbox = {f"verl_rlar/sandbox/{name}" for name in ("Dockerfile", "requirements.txt", "seccomp.json")}
    assert sandbox <= names and "verl_rlar/sandbox/inside/worker.py" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"verl_rlar"}


def test_the_switch_works_after_a_plain_install_from_any_folder(wheel: Path, tmp_path: Path) -> None:
    pytest.importorskip("verl", reason="verl is not installed (extra `cpu`)")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    done = subprocess.run(
        [sys.executable, "-m", "verl.trainer.main_ppo", "+rlar=default", "--cfg", "job"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "run_dir: ${trainer.default_local_dir}/rlar" in done.stdout
    assert "path: pkg://verl_rlar.reward_manager" in done.stdout
    where = [sys.executable, "-c", "from verl_rlar import plugin; print(plugin.configs())"]
    found = subprocess.run(
        where, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(site)}, capture_output=True, text=True
    )
    assert found.stdout.strip() == str(site / "verl_rlar" / "hydra_configs")
