# SPDX-License-Identifier: Apache-2.0
"""What is installed is whole: the wheel brings the Hydra files and its types, and works from any folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
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
    page = ("template.html.j2", "report.css", "charts.js", "report.js")
    assert {f"verl_rlar/report/{name}" for name in page} <= names
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


def test_the_source_archive_holds_what_it_takes_to_test_and_to_document(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="hatchling is not installed (extra `dev`)")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "sdist", "--directory", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=300)
    (archive,) = tmp_path.glob("verl_rlar-*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode == 0:
        assert {name for name in tracked.stdout.split() if not name.startswith(".")} <= names
    assert {"CHANGELOG.md", "CITATION.cff", "LICENSE", "docs/mkdocs.yml", "hydra_configs/rlar/default.yaml"} <= names
    assert {name.split("/")[0] for name in names} <= {
        "verl_rlar", "hydra_configs", "recipes", "tests", "docs", "README.md", "CHANGELOG.md", "CITATION.cff",
        "CONTRIBUTING.md", "LICENSE", "pyproject.toml", "PKG-INFO", ".gitignore",
    }  # fmt: skip


def test_the_version_stands_in_one_place_and_the_citation_has_it(wheel: Path) -> None:
    from verl_rlar import __version__

    assert wheel.name.startswith(f"verl_rlar-{__version__}-")
    assert re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1] == __version__
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert '\nversion = "' not in (ROOT / "pyproject.toml").read_text()


def test_a_users_mypy_sees_the_types(wheel: Path, tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="mypy is not installed (extra `dev`)")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "own.py").write_text(
        "from verl_rlar.tools.rule import rule\n"
        "from verl_rlar.types import Kind, Sample, Verdict\n\n"
        '@rule(name="loud", kinds={Kind.OPEN}, description="")\n'
        "def loud(sample: Sample) -> Verdict:\n"
        "    reveal_type(sample.query.reference)\n"
        "    return Verdict(value=sample.response)\n"
    )
    asked = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), "own.py"]
    ran = subprocess.run(
        asked,
        cwd=tmp_path,
        env=os.environ | {"MYPYPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        timeout=600,
    )
    faults = [line for line in ran.stdout.splitlines() if line.startswith("own.py")]
    assert any("str | None" in line or "Union[str, None]" in line for line in faults), ran.stdout + ran.stderr
    assert [line for line in faults if "error" in line] == [line for line in faults if "arg-type" in line] != []
