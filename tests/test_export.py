# SPDX-License-Identifier: Apache-2.0
"""Tools outside a training: the files of `rlar tools export`, loaded and called by verl, TRL and verifiers."""

from __future__ import annotations

import ast
import asyncio
import importlib.util
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import make_sandbox_config
from typer.testing import CliRunner

from verl_rlar.cli import app
from verl_rlar.config import RlarConfig
from verl_rlar.errors import ConfigError, DataError, LibraryError, ToolError, ToolUnavailable
from verl_rlar.exam.subject import verifier
from verl_rlar.export import NEUTRAL, ExportedTool, Target, _row, exported_file, to_text
from verl_rlar.library import FOLDER_NAME, Library, builtin_snapshot
from verl_rlar.rows import query_of
from verl_rlar.sandbox.docker import LABEL, OWNER_LABEL
from verl_rlar.tools.rule import load
from verl_rlar.types import Outcome, Query, ToolSpec

ROOT = Path(__file__).parent.parent
CHECK = r'''"""Looks for the reference.

Hostile to whoever embeds it: \"\"\" r"\""" {digest} \\"""
KINDS = ("math",)
try:
    open(MARK, "x").close()
except OSError:
    pass  # a box has no such folder
def score(prompt, response, reference, extra):
    if reference == "nothing":
        return None, "nothing to say"
    if reference == "crash":
        raise ValueError("broken")
    if reference == "columns":
        return float(response == f"{prompt}: {' '.join(sorted(extra))}")
    return float(reference in response)
# the last line \ has no end'''


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """A file that is there once `CHECK` has been run outside a box."""
    return tmp_path / "ran_outside"


@pytest.fixture
def check(tmp_path: Path, mark: Path) -> tuple[ToolSpec, str]:
    """A verifier."""
    source = CHECK.replace("MARK", repr(str(mark)))
    return verifier(source, name="look_for").spec, source


Loader = Callable[..., ModuleType]


@pytest.fixture
def exported(tmp_path: Path) -> Iterator[Loader]:
    """Exports a tool, and imports the file."""
    modules: list[ModuleType] = []

    def export(spec: ToolSpec, source: str | None, target: Target, **settings: Any) -> ModuleType:
        config = RlarConfig(**({"sandbox": make_sandbox_config()} | settings))
        file = tmp_path / f"{spec.name}_{target.value}.py"
        file.write_text(exported_file(spec, source, target, config))
        made = importlib.util.spec_from_file_location(file.stem, file)
        assert made and made.loader
        module = importlib.util.module_from_spec(made)
        made.loader.exec_module(module)
        modules.append(module)
        return module

    yield export
    for module in modules:
        module.TOOL.close()


def rule(name: str) -> ExportedTool:
    """One of the planted rules, as an exported tool."""
    return ExportedTool(to_text(load(f"planted:{name}").spec, None))


@pytest.fixture
def same() -> Iterator[ExportedTool]:
    made = rule("same")
    yield made
    made.close()


ROW = {"prompt": "What is 6 times 7?", "reference": "42"}


# --- the file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [Target.VERL, Target.TRL, Target.VERIFIERS])
def test_an_exported_file_is_data_and_one_function(check: tuple[ToolSpec, str], target: Target) -> None:
    spec, source = check
    tree = ast.parse(exported_file(spec, source, target, RlarConfig()))
    doc, imported, *rest = tree.body
    assert spec.name in (said := ast.get_docstring(tree) or "") and spec.digest in said and "Docker engine" in said
    assert isinstance(doc, ast.Expr) and ast.unparse(imported) == "from verl_rlar.export import ExportedTool"
    kinds = [type(node) for node in rest if not isinstance(node, ast.Assign)]
    assert kinds in ([ast.FunctionDef], [ast.AsyncFunctionDef])
    [tool] = [node.value for node in rest if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "TOOL"]
    assert isinstance(tool, ast.Call) and ast.unparse(tool.func) == "ExportedTool"
    embedded = json.loads(ast.literal_eval(tool.args[0]))
    assert "".join(embedded["source"]) == source and embedded["digest"] == spec.digest


def test_what_was_changed_does_not_load(check: tuple[ToolSpec, str]) -> None:
    text = to_text(*check)
    with pytest.raises(LibraryError, match="look_for: the exported source is not the one"):
        ExportedTool(text.replace("broken", "fixed"))
    with pytest.raises(LibraryError, match=r"look_for: the exported spec has the digest .* it was changed"):
        ExportedTool(text.replace('"timeout_s": 5.0', '"timeout_s": 50.0'))
    with pytest.raises(LibraryError, match="this is no exported tool"):
        ExportedTool("{}")
    other = replace(load("planted:same").spec, source_sha256="0" * 64)
    with pytest.raises(ToolUnavailable, match="the code of planted:same changed since version"):
        ExportedTool(to_text(other, None))


def test_a_rule_that_is_not_installed_is_named() -> None:
    spec = replace(load("planted:same").spec, target="no_such_package.rewards:same")
    with pytest.raises(ToolUnavailable, match=r"same: cannot import no_such_package.rewards:same .* install"):
        ExportedTool(to_text(spec, None))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "reward_model"}, "is a reward model, which needs a server"),
        ({"name": 'x"""; import os'}, "cannot be exported"),
        ({"target": 'os"""\nimport os:path'}, "is no name of a function or module"),
        ({"name": "class"}, "'class' is no name"),
    ],
)
def test_what_cannot_be_exported_is_refused(fields: dict[str, Any], message: str) -> None:
    spec = replace(load("planted:same").spec, **fields)
    with pytest.raises(ConfigError, match=message):
        exported_file(spec, None, Target.TRL, RlarConfig())


def test_the_command_exports_a_tool_of_a_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: tuple[ToolSpec, str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with Library(tmp_path / "run" / FOLDER_NAME) as library:
        library.propose(*check, by="test", why="test")
        library.put_exam(check[0].digest, card={}, text="", transcript=[], passed=True, by="exam", why="all right")

    def run(*args: str, code: int = 0) -> str:
        result = CliRunner().invoke(app, ["tools", "export", *args])
        assert result.exit_code == code, result.output + result.stderr
        return result.stdout if code == 0 else result.stderr

    assert run("look_for", "-", "--in", "run") == run("look_for", "-", "--in", "run", "--as", "source") == check[1]
    run("look_for", "out.py", "--in", "run", "--as", "trl", "--set", "scoring.retries=0")
    assert (tmp_path / "out.py").read_text() == exported_file(*check, Target.TRL, RlarConfig(scoring={"retries": 0}))
    assert "--force overwrites" in run("look_for", "out.py", "--in", "run", "--as", "verl", code=2)
    # without a library: what a training begins with
    assert "for verl" in run("final_answer", "-", "--as", "verl")
    assert "and the module `planted` as it is" in run("half", "-", "--as", "verl", "--set", 'tools=["planted:half"]')
    assert "no tool 'other' that a training begins with: unit_tests, " in run("other", "-", "--as", "verl", code=2)


def test_a_verifier_that_passed_no_exam_is_exported_on_demand_only_and_the_file_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: tuple[ToolSpec, str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with Library(tmp_path / "run" / FOLDER_NAME) as library:
        library.propose(*check, by="test", why="test")
    export = ["tools", "export", "look_for", "out.py", "--as", "trl", "--in", "run"]
    refused = CliRunner().invoke(app, export)
    assert refused.exit_code == 2 and "look_for" in refused.stderr and "did not pass an exam" in refused.stderr
    assert not (tmp_path / "out.py").exists()
    assert CliRunner().invoke(app, [*export, "--force"]).exit_code == 0
    assert "It passed no exam" in (tmp_path / "out.py").read_text()
    assert "It passed no exam" not in exported_file(*check, Target.TRL, RlarConfig())


def test_a_rule_whose_code_is_another_one_by_now_is_not_exported() -> None:
    other = replace(builtin_snapshot().tool("token_f1"), source_sha256="0" * 64)
    with pytest.raises(ToolUnavailable, match=r"token_f1: the code of .* changed since version"):
        exported_file(other, None, Target.TRL, RlarConfig())


# --- scoring ----------------------------------------------------------------------------------------------------------


def test_a_score_says_what_a_training_would_say(same: ExportedTool) -> None:
    scores = same.score_all([ROW] * 3 + [{"prompt": "?"}], ["42", "41", "", "42"])
    assert [score.value for score in scores] == [1.0, 0.0, 0.0, None]
    assert scores[3].outcome is Outcome.ABSTAINED and "no reference" in scores[3].reason
    assert asyncio.run(same.ascore(ROW, "42")).value == 1.0
    with pytest.raises(DataError, match="no `messages` or `prompt`"):
        same.score({}, "42")


@pytest.mark.parametrize(
    ("extra_info", "prompt", "extra"),
    [
        ('{"question": "6*7?"}', "6*7?", {"question": "6*7?"}),
        ({"question": 3, "problem": "6*7?"}, "6*7?", {"question": 3, "problem": "6*7?"}),
        ({"problem": 3}, "", {"problem": 3}),
        ({"prompt": [{"role": "user", "content": "6*7?"}]}, "6*7?", {"prompt": [{"role": "user", "content": "6*7?"}]}),
        ("row 7", "", {"extra_info": "row 7"}),
        (None, "", {}),
    ],
)
def test_whatever_verl_has_in_extra_info_a_response_is_scored(
    same: ExportedTool, monkeypatch: pytest.MonkeyPatch, extra_info: Any, prompt: str, extra: dict[str, Any]
) -> None:
    asked: list[Query] = []
    score = same.score
    monkeypatch.setattr(same, "score", lambda row, response: asked.append(query_of(row)) or score(row, response))
    assert same.verl("x", "42", "42", extra_info, NEUTRAL)["score"] == 1.0
    assert (asked[0].prompt, dict(asked[0].extra)) == (prompt, extra)


def test_of_several_columns_that_may_be_the_reference_the_others_go_to_the_tool() -> None:
    row = _row("6*7?", {"answer": "42", "solution": "6*7 = 42"})
    assert (row["reference"], row["extra"]) == ("42", {"solution": "6*7 = 42"})


@pytest.mark.parametrize(
    ("name", "outcome"), [("abstaining", Outcome.ABSTAINED), ("crashing", Outcome.FAILED), ("endless", Outcome.FAILED)]
)
def test_what_is_not_scored_is_never_zero(name: str, outcome: Outcome) -> None:
    tool = rule(name)
    try:
        assert (tool.score(ROW, "42").value, tool.score(ROW, "42").outcome) == (None, outcome)
        assert tool.verl("x", "42", "42", None, 0.25) == {
            "score": 0.25,
            "rlar_scored": 0.0,
            "rlar_outcome": outcome.value,
            "rlar_tool": name,
        }
        assert tool.trl(["?"], ["42"], {"answer": ["42"]}) == [None]
    finally:
        tool.close()


def test_a_deadline_holds_for_the_whole_line() -> None:
    tool = ExportedTool(to_text(load("planted:sleeper").spec, None), deadline_s=2.0)
    begun = time.monotonic()
    scores = tool.score_all([ROW] * 20, ["42"] * 20)
    assert time.monotonic() - begun < 55, "less than one call takes"
    assert {score.outcome for score in scores} == {Outcome.FAILED} and "not scored within 2 s" in scores[0].reason
    tool.close()


def test_closing_ends_calls_under_way_and_a_later_call_starts_anew() -> None:
    tool = rule("sleeper")
    found: list[Any] = []
    calling = threading.Thread(target=lambda: found.append(tool.score(ROW, "42")))
    calling.start()
    while tool._engine is None or tool._engine._scorer is None:
        calling.join(0.01)
    tool.close()
    calling.join(60)
    assert found[0].outcome is Outcome.FAILED and "being closed" in found[0].reason
    other = rule("same")
    other.close()
    assert other.score(ROW, "42").value == 1.0
    other.close()


def test_threads_event_loops_and_copies_can_call_it(same: ExportedTool) -> None:
    found: list[float | None] = []
    copy = pickle.loads(pickle.dumps(same))

    def call(tool: ExportedTool) -> None:
        found.append(tool.score(ROW, "42").value)
        found.append(asyncio.run(tool.ascore(ROW, "41")).value)

    threads = [threading.Thread(target=call, args=(tool,)) for tool in (same, same, same, copy)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found, key=str) == [0.0] * 4 + [1.0] * 4
    copy.close()


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_forked_process_starts_its_own_and_leaves_its_parents_alone(same: ExportedTool) -> None:
    assert same.score(ROW, "42").value == 1.0
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = 0 if same.score(ROW, "42").value == 1.0 and same.score(ROW, "1").value == 0.0 else 2
            same.close()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert same.score(ROW, "42").value == 1.0


SCORES_AND_ENDS = """
import contextlib, os, sys
sys.path[:0] = sys.argv[1:]
import exported
print(exported.compute_score("x", "42", "42", None)["score"], os.getpid())
for thread in os.listdir("/proc/self/task"):
    with contextlib.suppress(OSError):  # it has ended meanwhile
        print(*open(f"/proc/self/task/{thread}/children").read().split(), end=" ")
"""


@pytest.mark.parametrize("kind", ["rule", pytest.param("verifier", marks=pytest.mark.docker)])
def test_what_was_started_ends_with_its_process(
    tmp_path: Path, check: tuple[ToolSpec, str], kind: str, request: pytest.FixtureRequest
) -> None:
    spec, source = (load("planted:same").spec, None) if kind == "rule" else check
    config = RlarConfig(sandbox=make_sandbox_config())
    (tmp_path / "exported.py").write_text(exported_file(spec, source, Target.VERL, config))
    engine = request.getfixturevalue("box_image") and request.getfixturevalue("engine") if kind == "verifier" else None
    arguments = [sys.executable, "-c", SCORES_AND_ENDS, str(tmp_path), str(Path(__file__).parent)]
    ran = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    value, pid, *workers = ran.stdout.split()
    assert (value, ran.returncode, ran.stderr) == ("1.0", 0, "")
    assert workers or engine

    def left() -> list[str]:
        alive = [worker for worker in workers if Path(f"/proc/{worker}").exists()]
        boxes = engine.containers.list(all=True, filters={"label": LABEL}, ignore_removed=True) if engine else []
        return alive + [box.name for box in boxes if box.labels[OWNER_LABEL].startswith(f"{pid}:")]

    until = time.monotonic() + 60
    while still := left():
        assert time.monotonic() < until, still


# --- verifiers: code that nobody has read -----------------------------------------------------------------------------


def test_without_an_engine_the_first_call_raises_and_nothing_is_run(
    exported: Loader, check: tuple[ToolSpec, str], mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
    verl = exported(*check, Target.VERL)
    for _ in range(2):
        with pytest.raises(ToolUnavailable, match=r"look_for: .*Docker"):
            verl.compute_score("x", "42", "42", None)
    trl = exported(*check, Target.TRL, sandbox={"backend": "none"})
    with pytest.raises(ToolUnavailable, match=r"look_for: .*rlar.sandbox.backend"):
        trl.reward(["?"], ["42"], answer=["42"])
    assert not mark.exists()


@pytest.mark.docker
def test_a_verifier_scores_in_a_box_only(
    exported: Loader, check: tuple[ToolSpec, str], mark: Path, box_image: str
) -> None:
    trl = exported(*check, Target.TRL)
    assert trl.reward.__name__ == "look_for"
    logged: list[Any] = []
    values = trl.reward(
        prompts=["6*7?", [{"role": "user", "content": "6*7?"}], "?", "?", "?"],
        completions=["It is 42.", [{"role": "assistant", "content": "It is 41."}], "42", "42", "42"],
        completion_ids=[[1]] * 5,
        answer=["42", 42, "nothing", "crash", None],
        lang=["en", None, "de", "fr", "en"],
        trainer_state=object(),
        log_metric=lambda *metric: logged.append(metric),
    )
    assert values == [1.0, 0.0, None, None, None]
    assert logged == [("look_for/scored", 0.4)]
    # what each framework knows of a row reaches the tool
    assert trl.reward(["6*7?"], ["6*7?: lang"], answer=["columns"], lang=["en"], completion_ids=[[1]]) == [1.0]
    assert trl.reward(["6*7?"], ["6*7?: lang"], answer=["columns"], extra=[{"lang": "en"}]) == [1.0]
    verl = exported(*check, Target.VERL)
    extra_info = {"question": "6*7?", "lang": "en", "num_turns": 1, "rollout_reward_scores": {}}
    assert verl.compute_score("x", "6*7?: lang question", "columns", extra_info)["score"] == 1.0
    assert not mark.exists()


@pytest.mark.docker
def test_a_rubric_gets_the_neutral_number_and_the_reason(
    exported: Loader, check: tuple[ToolSpec, str], box_image: str, caplog: pytest.LogCaptureFixture
) -> None:
    reward = exported(*check, Target.VERIFIERS).reward
    state: dict[str, Any] = {}
    turn = [{"role": "assistant", "content": "42"}]
    with caplog.at_level(logging.ERROR, logger="verl_rlar"):
        asked = dict(prompt="?", completion=turn, info='{"lang": "en"}', state=state)
        assert asyncio.run(reward(**asked, answer="42")) == 1.0 and not state
        assert asyncio.run(reward(**asked, answer="crash")) == NEUTRAL
    assert "ValueError: broken" in state["rlar_unscored"]
    assert "look_for: a response was not scored (failed); it counts 0.5" in caplog.text


# --- verl -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torch", reason="torch is not installed (extra `cpu`)")
    from verl_rlar.cpu.models import build_tiny

    return build_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rule", pytest.param("verifier", marks=pytest.mark.docker)])
async def test_verl_loads_it_and_its_managers_call_it(
    kind: str,
    exported: Loader,
    check: tuple[ToolSpec, str],
    tmp_path: Path,
    tiny: Path,
    mark: Path,
    request: pytest.FixtureRequest,
) -> None:
    pytest.importorskip("verl", reason="verl is not installed (extra `cpu`)")
    import numpy as np
    import torch
    from hydra import compose, initialize_config_module
    from tensordict import TensorDict
    from transformers import AutoTokenizer
    from verl import DataProto
    from verl.trainer.ppo.reward import get_custom_reward_fn, load_reward_manager
    from verl.workers.reward_manager.naive import NaiveRewardManager

    if kind == "verifier":
        request.getfixturevalue("box_image")
    spec, source = (builtin_snapshot().tool("final_answer"), None) if kind == "rule" else check
    exported(spec, source, Target.VERL)  # the file; verl imports it once more, by its own loader
    overrides = [
        f"reward.custom_reward_function.path={tmp_path / f'{spec.name}_verl.py'}",
        "+reward.custom_reward_function.reward_kwargs.neutral=0.25",
    ]
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=overrides)
    tokenizer = AutoTokenizer.from_pretrained(tiny)

    def data(response: str, truth: str) -> DataProto:
        prompts, responses = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("6*7?", response))
        tensors = {
            "prompts": torch.tensor([prompts]),
            "responses": torch.tensor([responses + [0] * 3]),
            "attention_mask": torch.tensor([[1] * (len(prompts) + len(responses)) + [0] * 3]),
        }
        row = {"data_source": "x", "reward_model": {"ground_truth": truth}, "extra_info": {"question": "6*7?"}}
        fields = {name: np.array([value], dtype=object) for name, value in row.items()}
        return DataProto(batch=TensorDict(tensors, batch_size=[1]), non_tensor_batch=fields)

    unscorable = "" if kind == "rule" else "nothing"
    expected = {("It is 42.", "42"): (1.0, 1.0), ("It is 41.", "42"): (0.0, 1.0), ("42", unscorable): (0.25, 0.0)}
    manager = load_reward_manager(config, tokenizer)
    compute_score = get_custom_reward_fn(config)
    legacy = NaiveRewardManager(tokenizer, num_examine=0, compute_score=compute_score)
    for (response, truth), (score, scored) in expected.items():
        result = await manager.run_single(data(response, truth))
        extra = result["reward_extra_info"]
        assert (result["reward_score"], extra["rlar_scored"], extra["rlar_tool"]) == (score, scored, spec.name)
        assert set(extra) == {"score", "rlar_scored", "rlar_outcome", "rlar_tool"}
        at_once = await asyncio.to_thread(legacy, data(response, truth), return_dict=True)
        assert at_once["reward_tensor"].sum().item() == score
        assert at_once["reward_extra_info"]["rlar_scored"] == [scored]
    for function in (manager.compute_score, compute_score):
        function.args[0].__globals__["TOOL"].close()
    assert not mark.exists()


# --- TRL and verifiers, in processes of their own ---------------------------------------------------------------------


@pytest.fixture(scope="session")
def elsewhere() -> Iterator[Path]:
    """A virtual environment on top of this one, with TRL and verifiers; in `older`, the last one that has rubrics."""
    if sys.version_info < (3, 11):
        pytest.skip("TRL and verifiers need Python 3.11")
    folder = Path(tempfile.mkdtemp(prefix="rlar-venv-"))
    try:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        [packages] = folder.glob("lib/python*/site-packages")
        (packages / "ours.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
        pip = [sys.executable, "-m", "pip", f"--python={folder}/bin/python", "install", "--quiet", "--no-compile"]
        older = ("--no-deps", "--target", str(folder / "older"), "verifiers==0.3.1")
        for wanted in (("trl==1.16.0", "verifiers==0.4.0"), older):
            ran = subprocess.run([*pip, *wanted], capture_output=True, text=True, timeout=600)
            if ran.returncode:
                pytest.skip(f"pip cannot install {wanted[-1]} here: {ran.stderr.strip().splitlines()[-1][:200]}")
        yield folder
    finally:
        shutil.rmtree(folder)


def run_in(place: Path, script: str, folder: Path, *arguments: str, path: str = "") -> dict[str, Any]:
    """What a script prints last, as JSON."""
    (folder / "script.py").write_text(script)
    command = [f"{place}/bin/python", "script.py", *arguments]
    environment = os.environ | {"PYTHONPATH": path}
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return dict(json.loads(ran.stdout.splitlines()[-1]))


TRL = """
import importlib, json, sys
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

model, name, unscorable = sys.argv[1:]
reward = importlib.import_module(name).reward
row = {"prompt": [{"role": "user", "content": "What is 6 times 7?"}], "answer": "42", "lang": None}
sizes = dict(per_device_train_batch_size=4, num_generations=4, max_completion_length=8, max_steps=1, logging_steps=1)
config = GRPOConfig("out", use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True, **sizes)
trainer = GRPOTrainer(model, reward_funcs=[reward], args=config, train_dataset=Dataset.from_list([row] * 2))
rows = [row, row, row | {"answer": unscorable}]
texts = ("It is 42.", "It is 41.", "It is 42.")
completions = [[{"role": "assistant", "content": text}] for text in texts]
rewards = trainer._calculate_rewards(rows, [row["prompt"] for row in rows], completions, [[1]] * 3)
trainer.train()
logged = {key: value for log in trainer.state.log_history for key, value in log.items()}
print(json.dumps({"rewards": [str(value) for [value] in rewards.tolist()], "logged": logged}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rule", pytest.param("verifier", marks=pytest.mark.docker)])
def test_trl_trains_with_it(
    kind: str,
    exported: Loader,
    check: tuple[ToolSpec, str],
    tmp_path: Path,
    tiny: Path,
    mark: Path,
    elsewhere: Path,
    request: pytest.FixtureRequest,
) -> None:
    if kind == "verifier":
        request.getfixturevalue("box_image")
    spec, source = (builtin_snapshot().tool("final_answer"), None) if kind == "rule" else check
    exported(spec, source, Target.TRL)
    unscorable = "" if kind == "rule" else "crash"
    said = run_in(elsewhere, TRL, tmp_path, str(tiny), f"{spec.name}_trl", unscorable)
    assert said["rewards"] == ["1.0", "0.0", "nan"]
    assert 0 <= said["logged"][f"rewards/{spec.name}/mean"] <= 1 and f"{spec.name}/scored" in said["logged"]
    assert not mark.exists()


VERIFIERS = """
import asyncio, json, sys
import verifiers.v1 as vf
from verifiers.v1.configs.agent import AgentConfig

name, response, answer, unscorable = sys.argv[1:]

class Data(vf.TaskData):
    answer: str
    lang: str = "en"

async def rollout(response, answer):
    config = vf.TaskConfig(rewards={name: vf.RewardFunctionConfig(fn=f"{name}_verifiers.py:reward", weight=2.0)})
    task = vf.Task[Data, vf.State, vf.TaskConfig](Data(prompt="6*7?", system_prompt="Be brief.", answer=answer), config)
    nodes = [
        vf.MessageNode(message=vf.UserMessage(content="6*7?")),
        vf.MessageNode(message=vf.AssistantMessage(content=response), parent=0, sampled=True),
    ]
    kind = vf.TraceTask(type="Task", data=task.data)
    trace = vf.Trace(task=kind, agent=vf.AgentInfo(config=AgentConfig()), nodes=nodes)
    try:
        await task.score(trace)
    except vf.TaskError as error:
        return {"error": str(error), "reward": trace.rewards[name]}
    return {"reward": trace.reward}

async def main():
    return [await rollout(response, answer), await rollout("It is 41.", "42"), await rollout("42", unscorable)]

right, wrong, unscored = asyncio.run(main())
print(json.dumps({"right": right, "wrong": wrong, "unscored": unscored}))
"""

RUBRIC = """
import asyncio, importlib, json, sys
import verifiers as vf
from verifiers.types import AssistantMessage, UserMessage

name, response, answer, unscorable = sys.argv[1:]
rubric = vf.Rubric(funcs=[importlib.import_module(f"{name}_verifiers").reward])

async def rollout(response, answer):
    fields = {"prompt": [UserMessage(content="6*7?")], "answer": answer, "info": {"lang": "en"}, "example_id": 1}
    state = vf.State(input=vf.types.RolloutInput(**fields), completion=[AssistantMessage(content=response)])
    await rubric.score_rollout(state)
    return {"reward": state["reward"], "metrics": state["metrics"], "error": state.get("rlar_unscored")}

async def main():
    return [await rollout(response, answer), await rollout("It is 41.", "42"), await rollout("42", unscorable)]

right, wrong, unscored = asyncio.run(main())
print(json.dumps({"right": right, "wrong": wrong, "unscored": unscored}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rule", pytest.param("verifier", marks=pytest.mark.docker)])
@pytest.mark.parametrize("release", ["0.4.0", "0.3.1"])
def test_verifiers_scores_rollouts_with_it(
    kind: str,
    release: str,
    exported: Loader,
    check: tuple[ToolSpec, str],
    tmp_path: Path,
    mark: Path,
    elsewhere: Path,
    request: pytest.FixtureRequest,
) -> None:
    if kind == "verifier":
        request.getfixturevalue("box_image")
    spec, source = (builtin_snapshot().tool("final_answer"), None) if kind == "rule" else check
    exported(spec, source, Target.VERIFIERS)
    asked = ("It is 42.", "42", "") if kind == "rule" else ("6*7?: lang", "columns", "crash")
    if release == "0.4.0":
        said = run_in(elsewhere, VERIFIERS, tmp_path, spec.name, *asked)
        assert (said["right"], said["wrong"]) == ({"reward": 2.0}, {"reward": 0.0})
        assert said["unscored"]["reward"] is None and f"{spec.name}: " in said["unscored"]["error"]
    else:
        said = run_in(elsewhere, RUBRIC, tmp_path, spec.name, *asked, path=f"{elsewhere}/older")
        assert (said["right"]["metrics"], said["wrong"]["metrics"]) == ({spec.name: 1.0}, {spec.name: 0.0})
        assert said["unscored"]["reward"] == NEUTRAL and said["unscored"]["error"]
    assert not mark.exists()


async def test_an_unscored_rollout_raises(same: ExportedTool) -> None:
    class TaskData:
        model_fields = ("prompt",)

        def model_dump(self, mode: str) -> dict[str, Any]:
            return {"prompt": "?"}

    class Trace:
        last_reply = "42"

    with pytest.raises(ToolError, match="same: abstained: there is no reference"):
        await same.verifiers(TaskData(), Trace())
