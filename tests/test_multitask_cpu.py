# SPDX-License-Identifier: Apache-2.0
"""The experiment on a CPU, as far as it needs no training: tasks, arms, graders, and what is made of results."""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from llm_server import LlmServer, says, text

from verl_rlar.library import builtin_snapshot
from verl_rlar.router import FeatureRouter
from verl_rlar.rows import query_of
from verl_rlar.tools.rules import BUILTIN
from verl_rlar.types import Sample

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "multitask_cpu"
sys.path.insert(0, str(RECIPE))

tasks = importlib.import_module("tasks")
arms = importlib.import_module("arms")
graders = importlib.import_module("graders")
experiment = importlib.import_module("experiment")
judge = importlib.import_module("judge")
quickstart = importlib.import_module("quickstart")  # its folder is in the path by `experiment`
TOOL_OF = {
    "constraints": "instruction_constraints",
    "spelling": "token_f1",
    "sums": "final_answer",
    "json": "json_schema",
}


def test_all_arms_of_a_seed_see_the_same_batches_and_nothing_that_is_held_out() -> None:
    size = {"batches": 12, "per_family": 2, "held_out": 24}
    train, test = tasks.rows(seed=1, **size)
    assert tasks.rows(seed=1, **size) == (train, test)
    other, same_test = tasks.rows(seed=2, **size)
    assert other != train and same_test == test
    for start in range(0, len(train), 8):
        names = [row["data_source"] for row in train[start : start + 8]]
        assert {name: names.count(name) for name in names} == dict.fromkeys(tasks.FAMILIES, 2)
    held_out = {row["prompt"][0]["content"] for row in test}
    assert held_out.isdisjoint(row["prompt"][0]["content"] for row in train + other)
    with pytest.raises(ValueError, match="too few"):
        tasks.rows(seed=1, batches=1, per_family=1, held_out=10_000)


RIGHT = {
    "sums": lambda row: f"The answer is {row['reward_model']['ground_truth']}.",
    "json": lambda row: row["reward_model"]["ground_truth"],
    "spelling": lambda row: row["reward_model"]["ground_truth"],
}


@pytest.mark.parametrize("name", sorted(RIGHT))
def test_graders_and_rules_by_hand_put_right_answers_above_wrong_ones(name: str) -> None:
    for row in tasks.family(name)[:20]:
        reference, extra = row["reward_model"]["ground_truth"], row["extra_info"]
        for score in (
            lambda answer, r=reference, e=extra: graders.grade(name, answer, r, e),
            lambda answer, r=reference, e=extra: arms.by_hand(name, answer, r, e),
        ):
            assert score(RIGHT[name](row)) == pytest.approx(1.0)
            for wrong in ("", "I do not know.", extra["prompt"]):
                assert 0 <= score(wrong) < 0.9


def test_no_single_rule_is_better_than_the_static_one() -> None:
    """Right answers against those to another prompt of the family, where there is a reference."""
    wins: dict[str, float] = {}
    for rule in (rule for rule in BUILTIN if not rule.spec.boxed):
        for name, right in RIGHT.items():
            rows = tasks.family(name)[24:64]
            for row, other in itertools.pairwise(rows):
                query = query_of(row)
                good, bad = (
                    rule(Sample(query=query, response=right(of), step=0, uid="u", session=0, group_size=2)).value or 0.0
                    for of in (row, other)
                )
                wins[rule.spec.name] = wins.get(rule.spec.name, 0.0) + (good > bad) + (good == bad) / 2
    assert wins[arms.STATIC] == max(wins.values()), wins


KEPT = {
    "punctuation:no_comma": ("It is wide and blue.", "It is wide, and blue."),
    "length_constraints:number_words": ("It is wide and blue.", "It is wide and blue and deep and cold and old."),
    "detectable_format:number_bullet_lists": ("* It is wide\n* It is blue", "* It is wide"),
    "detectable_format:number_highlighted_sections": ("It is *wide* and blue.", "It is wide * and blue."),
    "detectable_format:title": ("<<The sea>>\nIt is wide.", "<The sea>\nIt is wide."),
    "detectable_content:postscript": ("It is wide.\nP.S. It is blue.", "It is wide. Post scriptum: it is blue."),
}
"""By demand: an answer that meets it, and one that does not."""


def test_grader_tool_and_rule_by_hand_say_the_same_of_every_demand() -> None:
    tool = next(rule for rule in BUILTIN if rule.spec.name == TOOL_OF["constraints"])
    seen = set()
    for row in tasks.family("constraints"):
        extra, query = row["extra_info"], query_of(row)
        (name,) = extra["instruction_id_list"]
        seen.add(name)
        for answer, value in zip((*KEPT[name], ""), (1.0, 0.0, 0.0), strict=True):
            said = tool(Sample(query=query, response=answer, step=0, uid="u", session=0, group_size=2)).value
            by_hand = arms.by_hand("constraints", answer, "", extra)
            assert said == by_hand == graders.grade("constraints", answer, "", extra) == value, (name, answer)
    assert seen == set(KEPT) == set(arms.CHECKS)


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize("arm", arms.ARMS)
def test_every_arm_is_a_configuration_that_verl_takes(arm: str, gpu: bool, tmp_path: Path) -> None:
    pytest.importorskip("verl", reason="verl is not installed (extra `cpu`)")
    from hydra import compose, initialize_config_module

    from verl_rlar.plugin import check

    switches, overrides = experiment.verls(
        experiment.QUICK, arm, 1, tmp_path, tmp_path / "model", begun=False, answered=True, gpu=gpu
    )
    with initialize_config_module("verl.trainer.config", version_base=None):
        overrides = [one for one in overrides if not one.startswith("hydra.")]
        config = compose("ppo_trainer", overrides=[*switches, *overrides])
    modules = (config.ray_kwargs.ray_init.get("runtime_env") or {}).get("env_vars", {}).get("VERL_USE_EXTERNAL_MODULES")
    ours = ["verl_rlar.plugin,verl_rlar.modes"] if arm in ("rlar", "static") else []
    assert (modules or "") == ",".join([*ours, *(["verl_rlar.cpu.one_gpu"] if gpu else [])])
    assert config.trainer.device == ("cuda" if gpu else "cpu")
    if arm in ("rlar", "static"):
        router = FeatureRouter(check(config).routing)
        for row in tasks.rows(seed=1, batches=4, per_family=2, held_out=8)[0]:
            route = asyncio.run(router.route(query_of(row), builtin_snapshot()))
            assert route.name == (arms.STATIC if arm == "static" else TOOL_OF[row["data_source"]])
    else:
        assert config.reward.custom_reward_function.path.endswith("arms.py")
        assert callable(getattr(arms, config.reward.custom_reward_function.name))


def test_a_judge_grades_over_the_network_and_makes_nothing_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (judge.URL, judge.MODEL):
        monkeypatch.delenv(name, raising=False)
    assert judge.URL in (arms.available("judge") or "")
    row = tasks.family("sums")[0]
    asked = ("sums", "It is 12.", row["reward_model"]["ground_truth"], row["extra_info"])
    no_grade = [text(said) for said in ("I would say 11", "between 7 and 8", "<think>\n7, I thi")]
    script = [says(503), text("7", usage=(90, 2)), text("10/10"), text("Fine."), text("9"), *no_grade, says(401)]
    with LlmServer(script) as server:
        for name, value in ((judge.URL, server.url), (judge.MODEL, "m"), (judge.LOG, str(tmp_path / "judge.jsonl"))):
            monkeypatch.setenv(name, value)
        judge._client.cache_clear()
        assert arms.available("judge") is None
        assert [arms.by_judge(*asked) for _ in range(3)] == [0.7, 1.0, 0.9]
        with pytest.raises(judge.NoGrade, match="7, I thi"):
            arms.by_judge(*asked)
        with pytest.raises(httpx.HTTPStatusError, match="401"):
            arms.by_judge(*asked)
    judge._client.cache_clear()
    said = server.requests[1]["messages"][0]["content"]
    assert row["prompt"][0]["content"] in said and "It is 12." in said and asked[2] in said
    assert judge.tokens(tmp_path) == 92 + 6 * 120
    assert [one["temperature"] for one in server.requests] == [0, 0, 0, 0, 1, 0, 1, 1, 0]


@pytest.mark.parametrize(
    ("said", "grade"),
    [
        ("8", 8),
        (" 7.5\n", 7.5),
        ("10/10", 10),
        ("Grade: **8**/10.", 8),
        ("**8 out of 10**", 8),
        ("<think>\nIt says 12, which is right: 10.\n</think>\n\n9", 9),
        ("12", None),
        ("-3", None),
        ("7 or 8", None),
        ("none", None),
        ("", None),
        ("<think>\nmaybe 7", None),
    ],
)
def test_a_judges_grade_is_the_one_number_that_it_says(said: str, grade: float | None) -> None:
    assert judge.read(said) == grade


def result(arm: str, seed: int, gain: float) -> dict[str, Any]:
    before = {f"{name} {n}": 0.2 for name in tasks.FAMILIES for n in range(3)}
    signs = {name: {"words": 10.0, "repeated": 0.1, "copied": 0.0} for name in tasks.FAMILIES}
    after = {prompt: value + gain for prompt, value in before.items()}
    told = {"arm": arm, "seed": seed, "before": before, "after": after, "step_s": 2.0, "kl": 0.1, "tokens": 0}
    return told | {"signs_before": signs, "signs_after": signs}


def test_what_is_done_is_shown_and_not_run_again(tmp_path: Path) -> None:
    for arm, level in (("rlar", 0.3), ("static", 0.1)):
        for seed in (1, 2, 3):
            place = tmp_path / f"{arm}-{seed}"
            place.mkdir()
            (place / "result.json").write_text(json.dumps(result(arm, seed, level + 0.01 * seed)))
    command = [sys.executable, str(RECIPE / "run.py"), "--arms", "rlar,static", "--results", str(tmp_path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    printed = json.loads(done.stdout.splitlines()[-1])
    assert printed["ok"] and printed["figures"]["runs"] == 6
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["rlar"]["overall"][0] == pytest.approx(0.32)
    assert table["rlar"]["above_static"] == table["static"]["rlar_above"] == pytest.approx([0.2, 0.2, 0.2])
    mean, low, high = table["static"]["overall"]
    assert mean - low == pytest.approx(high - mean) == pytest.approx(4.303 * 0.01 / math.sqrt(3))
    assert (tmp_path / "gains.png").stat().st_size > 1000
    (tmp_path / "table.json").write_text("as it was")
    assert subprocess.run([*command, "--table"], capture_output=True, timeout=100).returncode == 0
    assert (tmp_path / "table.json").read_text() == "as it was", "who only looks changes nothing"
    empty = [*command[:4], "--results", str(tmp_path / "new"), "--table"]
    other = subprocess.run(empty, capture_output=True, text=True, timeout=100)
    assert other.returncode == 1 and "there is no result" in other.stderr
    for setting in (["--steps", "7"], ["--answers", "9"]):
        again = subprocess.run([*command, *setting], capture_output=True, text=True, timeout=100)
        assert again.returncode == 2 and "other settings" in again.stderr
    nothing = subprocess.run([*command, "--steps", "0"], capture_output=True, text=True, timeout=100)
    assert nothing.returncode == 2 and "at least 1" in nothing.stderr
    with quickstart.locked(tmp_path / "rlar-4"):  # one run is under way: it is not made twice, all others are free
        other = subprocess.run([*command, "--seeds", "1,4"], capture_output=True, text=True, timeout=100)
        shown = subprocess.run([*command, "--steps", "7", "--table"], capture_output=True, text=True, timeout=100)
    assert other.returncode == 1 and "another run" in other.stderr
    assert shown.returncode == 0 and json.loads(shown.stdout.splitlines()[-1])["figures"]["runs"] == 6


def test_the_first_answers_that_any_arm_gave_count_for_all_arms_of_a_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])  # the recipe puts its folder first
    spec = importlib.util.spec_from_file_location("multitask_run", RECIPE / "run.py")  # other recipes have a `run`, too
    assert spec and spec.loader
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    assert run.first_answers(tmp_path / "rlar-1", 1) is None
    for age, name in enumerate(("rules-1", "rlar-1", "static-1", "rlar-11", "rlar-2")):
        place = tmp_path / name / "answers" / "0.jsonl"
        place.parent.mkdir(parents=True)
        place.touch()
        os.utime(place, (100 - age, 100 - age))
    for arm in ("rlar-1", "embedding-1"):
        assert run.first_answers(tmp_path / arm, 1) == tmp_path / "static-1" / "answers" / "0.jsonl"


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    command = [sys.executable, str(RECIPE / "run.py"), "--quick", "--gpu", "--results", str(tmp_path)]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert refused.returncode == 2 and "finds no GPU" in refused.stderr


def test_a_run_stopped_before_its_last_answers_goes_on_from_the_checkpoint_before(tmp_path: Path) -> None:
    for step in (4, 8, 12):
        (tmp_path / f"global_step_{step}").mkdir()
    for last, left in ((12, 8), (8, 4), (4, None)):
        (tmp_path / quickstart.NOTED).write_text(str(last))
        experiment.go_back(tmp_path)
        assert quickstart.checkpoint(tmp_path) == left


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_quick_experiment_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    """Mechanics only: a tiny policy learns nothing in six steps."""
    pytest.importorskip("verl", reason="verl is not installed (extra `cpu`)")
    place = tmp_path / "results" / "rlar-1"
    command = [sys.executable, str(RECIPE / "run.py"), "--quick", "--steps", "6", "--json"]
    command += ["--results", str(tmp_path / "results")]
    told = ""
    with subprocess.Popen([*command, "--arms", "rlar"], stderr=subprocess.PIPE, text=True) as first:
        assert first.stderr is not None
        for line in first.stderr:
            told += line
            if line.startswith("step   1/6"):
                first.send_signal(signal.SIGINT)
    assert first.returncode == 130, told[-3000:]
    assert "goes on from the last checkpoint" in told
    kept = int((place / "latest_checkpointed_iteration.txt").read_text())
    assert 1 <= kept < 6  # the training is faster than the signal, by a step or two
    again = subprocess.run([*command, "--arms", "rlar"], capture_output=True, text=True, timeout=800)
    assert again.returncode == 0, again.stderr[-3000:]
    assert f"step   {kept + 1}/6" in again.stderr and f"step   {kept}/6" not in again.stderr
    assert json.loads(again.stdout.splitlines()[-1])["figures"]["runs"] == 1
    result = json.loads((place / "result.json").read_text())
    assert result["kl"] > 0 and result["step_s"] > 0 and "exposed_s" in result
    assert result["before"].keys() == result["after"].keys() and len(result["after"]) == 8
    assert not list(place.glob("global_step_*"))
