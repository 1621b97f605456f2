# SPDX-License-Identifier: Apache-2.0
"""Enabling: one override switches the plugin on, and a run that could not work is refused before it starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from verl_rlar.config import RlarConfig, defaults, parse
from verl_rlar.errors import ConfigError, DataError, ToolUnavailable
from verl_rlar.row_files import read_rows

pytest.importorskip("verl", reason="verl is not installed (extra `cpu`)")

from hydra import compose, initialize_config_module
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf

from verl_rlar import plugin

ROOT = Path(__file__).parent.parent


@pytest.fixture
def composed() -> Callable[..., DictConfig]:
    def compose_with(*overrides: str) -> DictConfig:
        with initialize_config_module("verl.trainer.config", version_base=None):
            return compose("ppo_trainer", overrides=list(overrides))

    return compose_with


def test_the_plugin_loads_with_verl(composed: Callable[..., DictConfig]) -> None:
    assert plugin.LOAD_ERROR is None


def test_one_override_switches_everything_on(composed: Callable[..., DictConfig]) -> None:
    config = composed("+rlar=default", "trainer.default_local_dir=/somewhere", "reward_model.enable=False")
    settings = plugin.check(config)
    assert settings.run_dir == "/somewhere/rlar"
    assert settings.scoring == RlarConfig().scoring


def test_every_setting_can_be_overridden_without_a_plus(composed: Callable[..., DictConfig]) -> None:
    config = composed("+rlar=default", "rlar.scoring.timeout_s=3", "rlar.routing.prefer.short_text=token_f1")
    settings = plugin.check(config)
    assert settings.scoring.timeout_s == 3
    assert settings.routing.prefer["short_text"] == "token_f1"


@pytest.mark.parametrize("more", ["", "+rlar_device=cpu", "+rlar_placement=colocated"])
def test_every_group_file_composes_on_verls_own_configuration(composed: Callable[..., DictConfig], more: str) -> None:
    config = composed("+rlar=default", *[more] * bool(more))
    settings = plugin.check(config)
    assert (config.trainer.device == "cpu") == (more == "+rlar_device=cpu")
    assert settings.serving.placement == ("colocated" if more == "+rlar_placement=colocated" else "standalone")


@pytest.mark.parametrize(
    ("overrides", "hinted"),
    [
        ((), False),
        (("data.train_batch_size=1024", "actor_rollout_ref.rollout.n=16"), True),
        (("data.train_batch_size=1024", "actor_rollout_ref.rollout.n=16", "reward.num_workers=17"), False),
        (("data.train_batch_size=1024", "actor_rollout_ref.rollout.n=16", "rlar.scoring.on_unscored=neutral"), False),
    ],
)
def test_more_responses_than_may_wait_for_siblings_are_said(
    composed: Callable[..., DictConfig], overrides: tuple[str, ...], hinted: bool
) -> None:
    config = composed("+rlar=default", *overrides)
    assert [
        ("set reward.num_workers=17" in hint) for hint in plugin.room_for_waiting(config, plugin.check(config))
    ] == [True] * hinted


def test_ray_lets_as_many_calls_into_a_reward_worker_as_we_count_on() -> None:
    from ray._common.ray_constants import DEFAULT_MAX_CONCURRENCY_ASYNC

    assert plugin.CALLS_OF_A_WORKER == DEFAULT_MAX_CONCURRENCY_ASYNC


def test_all_yaml_files_are_covered_by_the_tests() -> None:
    files = {str(path.relative_to(ROOT / "hydra_configs")) for path in (ROOT / "hydra_configs").rglob("*.yaml")}
    assert files == {"rlar/default.yaml", "rlar_device/cpu.yaml", "rlar_placement/colocated.yaml"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.use_v1=False", "legacy trainer"),
        ("reward.reward_model.enable=True", "bypass every reward manager"),
        ("reward.custom_reward_function.path=reward.py", "custom_reward_function.path would be ignored"),
        ("custom_reward_function.path=reward.py", "custom_reward_function.path=reward.py: of verl's old configuration"),
        ("reward_model.enable=True", "reward_model.enable=True: of verl's old configuration"),
        ("reward_model.reward_manager=dapo", "reward_model.reward_manager=dapo: .* so remove it"),
        ("reward_model.reward_loop_source=importlib", "reward_model.reward_loop_source=importlib: "),
        ("reward_model.model.path=some/model", "reward_model.model.path=some/model: "),
        ("sandbox_fusion.url=http://host", "sandbox_fusion.url=http://host: "),
        ("reward.reward_manager.name=dapo", "remove your override of reward.reward_manager"),
        ("actor_rollout_ref.rollout.agent.agent_loop_manager_class=null", "must be verl_rlar.trainer.RlarAgentLoop"),
        (
            "actor_rollout_ref.rollout.agent.agent_loop_manager_class=verl.trainer.ppo.v1.AgentLoopManagerTQ",
            "or a subclass of it",
        ),
        ("trainer.device=cpu", "trains in one process: set trainer.n_gpus_per_node=1"),
        ("trainer.v1.trainer_mode=colocate_async", "say trainer.v1.trainer_mode=rlar_colocate_async"),
        ("+rlar.scoring.timeout=3", r"unknown key rlar\.scoring\.timeout, did you mean timeout_s\?"),
        ("+rlar.nonsense=3", r"unknown key rlar\.nonsense; known are: .*ledger"),
        ("rlar.scoring.timeout_s=-1", r"rlar\.scoring\.timeout_s: .*greater than 0, got -1"),
        ("rlar.scoring.on_unscored=zero", r"rlar\.scoring\.on_unscored: .*'siblings' or 'neutral'"),
        ("+rlar.routing.prefer.poetry=exact_match", r"rlar\.routing\.prefer\.poetry"),
    ],
)
def test_a_run_that_could_not_work_is_refused_with_what_to_change(
    composed: Callable[..., DictConfig], override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        plugin.check(composed("+rlar=default", override))


def test_models_cannot_sleep_where_the_rollout_never_pauses(composed: Callable[..., DictConfig]) -> None:
    config = composed("+rlar=default", "+rlar_placement=colocated", "trainer.v1.trainer_mode=rlar_separate_async")
    with pytest.raises(ConfigError, match="its rollout never pauses"):
        plugin.check(config)


def test_a_key_that_is_not_there_fails_by_name_in_hydra_already(composed: Callable[..., DictConfig]) -> None:
    with pytest.raises(ConfigCompositionException, match=r"rlar\.scoring\.timeout"):
        composed("+rlar=default", "rlar.scoring.timeout=3")


def test_a_plain_string_in_place_of_the_group_is_refused(composed: Callable[..., DictConfig]) -> None:
    config = composed("+rlar=default")
    broken = OmegaConf.merge(OmegaConf.create(OmegaConf.to_container(config)), {"rlar": "default"})
    with pytest.raises(ConfigError, match="the plugin was not loaded"):
        plugin.check(broken)


def test_training_on_the_cpu_of_a_machine_with_a_gpu_has_to_be_told_to_verl(
    composed: Callable[..., DictConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi = tmp_path / "nvidia-smi"  # verl takes a machine where it answers for one with a GPU
    smi.write_text("#!/bin/sh\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("VERL_PLATFORM", raising=False)
    config = composed("+rlar=default", "+rlar_device=cpu")
    with pytest.raises(ConfigError, match="export VERL_PLATFORM=cpu"):
        plugin.check(config)
    plugin.check(composed("+rlar=default", "+rlar_device=cpu", "trainer.device=cuda"))
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    plugin.check(config)


def test_all_defaults_stand_in_the_code_and_are_valid() -> None:
    assert parse(defaults()) == RlarConfig()


def run_verl(folder: Path, *overrides: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "verl.trainer.main_ppo", "+rlar=default", f"hydra.run.dir={folder}", *overrides],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def rows_file(folder: Path, *extras: dict[str, object]) -> Path:
    """A data file in verl's columns, a row for each further column."""
    path = folder / "rows.jsonl"
    prompt = [{"role": "user", "content": "?"}]
    path.write_text("".join(json.dumps({"prompt": prompt, "extra_info": extra}) + "\n" for extra in extras))
    return path


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")


@pytest.mark.usefixtures("no_engine")
def test_without_an_engine_a_run_with_a_code_row_is_refused_with_the_row_and_the_ways_out(
    composed: Callable[..., DictConfig], tmp_path: Path
) -> None:
    file = rows_file(tmp_path, {}, {"test_list": ["assert f(1) == 2"]})
    config = composed("+rlar=default", f"data.train_files={file}", f"data.val_files=[{file}]")
    with pytest.raises(ToolUnavailable) as refused:
        plugin.check_sandbox(config, plugin.check(config))
    message = str(refused.value)
    assert f"row 2 of {file}" in message
    for way in ("/nowhere/docker.sock", "rootless", "DOCKER_TLS_VERIFY", "sandbox_fusion", "rlar.sandbox.backend=none"):
        assert way in message


@pytest.mark.usefixtures("no_engine")
def test_without_an_engine_data_that_cannot_be_looked_into_counts_as_code(
    composed: Callable[..., DictConfig],
) -> None:
    config = composed("+rlar=default", "data.train_files=hdfs://far/away.parquet", "data.val_files=[]")
    with pytest.raises(ToolUnavailable, match=r"hdfs://far/away\.parquet may hold rows with tests"):
        plugin.check_sandbox(config, plugin.check(config))


@pytest.mark.usefixtures("no_engine")
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_without_an_engine_data_none_of_whose_rows_can_be_read_counts_as_code(
    composed: Callable[..., DictConfig], tmp_path: Path, name: str
) -> None:
    file = tmp_path / name
    file.write_text(json.dumps({"question": "?"}) + "\n[]\n")
    config = composed("+rlar=default", f"data.train_files={file}", "data.val_files=[]")
    with pytest.raises(
        ToolUnavailable, match=rf"{name} may hold rows with tests \(none of its rows can be read, row 1: "
    ):
        plugin.check_sandbox(config, plugin.check(config))


@pytest.mark.usefixtures("no_engine")
def test_a_row_with_tests_is_found_in_an_array_and_where_the_prompt_has_another_name(
    composed: Callable[..., DictConfig], tmp_path: Path
) -> None:
    rows = [
        {"question": "?", "messages": 3, "extra_info": extra} for extra in ({}, {"test_list": ["assert f(1) == 2"]})
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1))
    config = composed("+rlar=default", f"data.train_files={tmp_path}/rows.json", "data.prompt_key=question")
    with pytest.raises(ToolUnavailable, match=r"row 2 of \S+rows\.json: its tool runs code"):
        plugin.check_sandbox(config, plugin.check(config))


def test_an_array_of_rows_is_read_as_lines_are_and_a_broken_one_is_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_bytes(b'\xef\xbb\xbf\n [{"prompt": "?"}, 3]')
    (_, row), (number, fault) = read_rows(str(file))
    assert row == {"prompt": "?"} and number == 2 and str(fault) == "a JSON int, not an object"
    file.write_text('{"prompt": "?"}\n')
    assert list(read_rows(str(file))) == [(1, {"prompt": "?"})]
    file.write_text('[{"prompt": ')
    with pytest.raises(DataError, match=r"cannot read \S+rows\.json: not JSON: Expecting value at character 13"):
        list(read_rows(str(file)))


@pytest.mark.usefixtures("no_engine")
def test_without_an_engine_a_run_that_needs_none_or_wants_none_starts(
    composed: Callable[..., DictConfig], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    harmless = rows_file(tmp_path, {}, {"index": 1})
    config = composed("+rlar=default", f"data.train_files={harmless}", f"data.val_files={harmless}")
    plugin.check_sandbox(config, plugin.check(config))
    assert "no row of the data needs a sandbox" in capfd.readouterr().err
    config = composed("+rlar=default", "rlar.sandbox.backend=none", "data.train_files=hdfs://far/away.parquet")
    plugin.check_sandbox(config, plugin.check(config))


@pytest.mark.slow
def test_stock_verl_refuses_from_any_folder_before_ray_starts(tmp_path: Path) -> None:
    done = run_verl(tmp_path, "trainer.use_v1=False")
    assert done.returncode == 2
    assert "verl_rlar refuses to start" in done.stderr
    assert "trainer.use_v1=False selects verl's legacy trainer" in done.stderr
    assert "ray init kwargs" not in done.stdout


@pytest.mark.slow
def test_a_plugin_that_failed_to_load_stops_the_run_with_its_traceback(tmp_path: Path) -> None:
    broken = "import sys; sys.modules['verl_rlar.cpu.device'] = None"
    (tmp_path / "sitecustomize.py").write_text(broken)
    done = run_verl(tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert "the plugin was not loaded whole" in done.stderr
    assert "import of verl_rlar.cpu.device halted" in done.stderr
