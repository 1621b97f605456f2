# SPDX-License-Identifier: Apache-2.0
"""The recipe for GPUs as far as it runs without one: data, composition, routes, estimates, evaluation."""

from __future__ import annotations

import gzip
import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas
import pytest

from verl_rlar.tools.rules.code import program_of
from verl_rlar.tools.rules.code_tests import prompt_code

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "multitask_grpo"
sys.path.insert(0, str(RECIPE))

domains = importlib.import_module("domains")
evaluate = importlib.import_module("evaluate")


def dry(*arguments: str) -> dict[str, Any]:
    """What a dry run says."""
    pytest.importorskip("verl", reason="verl is not installed (extra `cpu`)")
    command = [sys.executable, str(RECIPE / "run.py"), *arguments, "--dry-run", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=RECIPE)
    assert done.stdout, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == (0 if found["ok"] else 1)
    return found | {"printed": done.stdout}


@pytest.mark.slow
@pytest.mark.parametrize(("model", "placement"), [("qwen3-8b", "standalone"), ("llama-3.1-8b", "colocated")])
def test_a_dry_run_composes_routes_and_estimates(model: str, placement: str, tmp_path: Path) -> None:
    library = []
    if placement == "colocated":  # with a reward model that passed its exam
        from test_train_models import make_live

        make_live(tmp_path, "c" * 40)
        library = ["--library", str(tmp_path / "library")]
    found = dry("--model", model, "--placement", placement, "--nodes", "2", "--data", str(tmp_path), *library)
    assert found["ok"]
    tools = {name: set(route["tools"]) for name, route in found["routes"].items()}
    assert tools == {
        "gsm8k": {"final_answer"},
        "math": {"final_answer"},
        "leetcode": {"unit_tests"},
        "flores": {"translation"},
        "ultrachat": {"chat_reward" if library else "-"},
    }
    assert any(line.startswith("data: ") for line in found["missing"])
    assert 16 * 8e9 / 16 / 2**30 < found["estimate"]["peak"] < 80
    assert ("+rlar_placement=colocated" in found["printed"]) == (placement == "colocated")


@pytest.mark.slow
def test_a_mistyped_override_is_refused_and_more_nodes_need_less_memory_each(tmp_path: Path) -> None:
    pytest.importorskip("verl", reason="verl is not installed (extra `cpu`)")
    command = [
        sys.executable,
        str(RECIPE / "run.py"),
        "--dry-run",
        "--data",
        str(tmp_path),
        "--",
        "rlar.scorin.retries=2",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=RECIPE)
    assert done.returncode not in (0, None) and "scorin" in done.stderr
    estimate = importlib.import_module("estimate")
    settings = importlib.import_module("settings")
    peaks = [estimate.estimate(settings.Choices(nodes=nodes)).peak for nodes in (1, 2, 4)]
    assert peaks == sorted(peaks, reverse=True) and peaks[0] > peaks[2]


@pytest.mark.slow
def test_each_start_has_a_file_of_metrics_that_no_later_one_empties(tmp_path: Path) -> None:
    (tmp_path / "metrics.3.jsonl").touch()
    found = dry("--run", str(tmp_path), "--data", str(tmp_path), "--resume")
    path = f"VERL_FILE_LOGGER_PATH={tmp_path}/metrics.4.jsonl"
    assert f" ++ray_kwargs.ray_init.runtime_env.env_vars.{path} " in found["printed"] and found["ok"]


def test_a_run_folder_that_holds_a_run_is_not_touched_unasked(tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("20")
    done = subprocess.run(
        [sys.executable, str(RECIPE / "run.py"), "--run", str(tmp_path)], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 2 and "--resume" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpus", "7"], "with 7 GPUs take a multiple of 7"),
        (["--nodes", "3", "--gpus", "4", "--dry-run"], "with 12 GPUs take a multiple of 3"),
        (["--library", "no/such/folder", "--dry-run"], "there is no library"),
        (["--run", "no/such/run", "--resume"], "there is no run in"),
        (["--run", "new", "--resume", "--", "rlar.run_dir=elsewhere"], "GPUs are wanted on this node, and there are"),
        (["--gpus", "1024", "--mini-batch", "1024"], "1024 GPUs are wanted on this node, and there are"),
        (["--gpus", "0"], "0 is not positive"),
        (["--dry-run", "--data", "others"], "a row's data_source is 'mine'; this recipe's sets are gsm8k, "),
    ],
)
def test_what_could_not_work_is_said_before_anything_starts(arguments: list[str], said: str, tmp_path: Path) -> None:
    pytest.importorskip("verl", reason="verl is not installed (extra `cpu`)")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "ledger.sqlite").touch()
    (tmp_path / "others").mkdir()
    pandas.DataFrame([{"data_source": "mine", "prompt": "1+1?"}]).to_parquet(tmp_path / "others" / "train.parquet")
    done = subprocess.run(
        [sys.executable, str(RECIPE / "run.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env=os.environ | {"RAY_ADDRESS": "local"},
    )
    assert done.returncode == 2 and said in done.stdout + done.stderr, done.stdout + done.stderr


def test_quotation_marks_around_all_of_a_translation_are_no_part_of_it() -> None:
    assert evaluate.bare_translation('"Hallo Welt"') == "Hallo Welt"
    assert evaluate.bare_translation('"Hallo" und "Welt"') == '"Hallo" und "Welt"'


def test_a_run_that_has_no_checkpoint_yet_is_not_touched_either(tmp_path: Path) -> None:
    (tmp_path / "rlar").mkdir()
    (tmp_path / "rlar" / "ledger.sqlite").touch()
    done = subprocess.run(
        [sys.executable, str(RECIPE / "run.py"), "--run", str(tmp_path)], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 2 and "--resume" in done.stdout


def test_a_solution_of_leetcode_has_the_imports_that_its_set_grades_it_with() -> None:
    item = {
        "problem_description": "Given `nums`, return their sum.",
        "prompt": "from typing import *\nfrom collections import *\n\ndef twice(x):\n    return 2 * x\n",
        "starter_code": "class Solution:\n    def total(self, nums: List[int]) -> int:\n        ",
        "query": "not this one",
        "entry_point": "Solution().total",
        "test": "def check(candidate):\n    assert candidate(nums=[1, 2]) == 6\n",
    }
    row = domains.leetcode(item)
    assert row is not None
    solution = "class Solution:\n    def total(self, nums: List[int]) -> int:\n        return twice(sum(nums))\n"
    prompt = prompt_code(row["prompt"][0]["content"], item["entry_point"])
    names: dict[str, Any] = {}
    exec(program_of(f"```python\n{solution}```", prompt, ("Solution",)), names)
    assert names["Solution"]().total([1, 2]) == 6
    of_nodes = {**item, "test": "def check(candidate):\n    assert is_same_list(candidate(list_node([1])), None)\n"}
    assert domains.leetcode(of_nodes) is None


def test_the_last_box_is_read_with_its_braces() -> None:
    assert domains.last_box("so \\boxed{1} or \\boxed{\\frac{1}{2}}.") == "\\frac{1}{2}"
    assert domains.last_box("\\boxed{1") is None and domains.last_box("1") is None


def test_a_set_without_its_column_is_named() -> None:
    with pytest.raises(domains.DataFault, match=r"gsm8k \(openai/gsm8k\) has no usable column 'answer'"):
        domains.convert(domains.SOURCES[0], [{"question": "1+1?"}], 1)


def test_a_set_without_its_split_or_its_configuration_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets", reason="datasets is not installed (extra `cpu`)")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text('{"question": "1+1?", "answer": "#### 2"}\n')
    source = replace(domains.SOURCES[0], repo=str(tmp_path / "set"), config=None)
    assert len(list(domains.items_of(source, "train", "0" * 40))) == 1
    with pytest.raises(
        domains.DataFault, match=r"gsm8k \(\S+\) at 0{12}, configuration None, split tests: Unknown split"
    ):
        list(domains.items_of(source, "tests", "0" * 40))
    with pytest.raises(domains.DataFault, match=r"configuration main, split train: .*--revision gsm8k=COMMIT"):
        list(domains.items_of(replace(source, config="main"), "train", "0" * 40))


def test_a_row_of_leetcode_without_a_task_is_named() -> None:
    (leetcode,) = (source for source in domains.SOURCES if source.name == "leetcode")
    with pytest.raises(domains.DataFault, match="has no usable column 'query'"):
        domains.convert(leetcode, [{"test": "def check(candidate): ...", "entry_point": "f"}], 1)


def test_answers_to_other_prompts_have_no_gain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = []
    for number in (1, 2):
        files.append(tmp_path / f"{number}.jsonl")
        row = {"data_source": "gsm8k", "prompt": f"{number} + 1?", "reference": "2", "response": "#### 2"}
        files[-1].write_text(json.dumps(row) + "\n")
    options = ["--set", "sandbox.backend=none"]
    assert evaluate.main([*map(str, files), *options]) == 2
    assert "no prompt of" in capsys.readouterr().err
    assert evaluate.main([str(files[0]), str(files[0]), *options]) == 0
    assert "paired: 1 of 1 prompts" in capsys.readouterr().err
    (tmp_path / "none.jsonl").touch()
    assert evaluate.main([str(tmp_path / "none.jsonl"), *options]) == 2


def test_pairs_are_of_one_sentence_in_all_directions() -> None:
    texts = {"en": [{"id": 1, "text": "Hello"}, {"id": 2, "text": "x"}], "de": [{"id": 1, "text": "Hallo"}]}
    made = list(domains.pairs(texts))
    assert [(one["from"], one["to"], one["source"], one["reference"]) for one in made] == [
        ("de", "en", "Hallo", "Hello"),
        ("en", "de", "Hello", "Hallo"),
    ]


def answered(folder: Path, rows: list[dict[str, Any]], name: str) -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def evaluated(*arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(RECIPE / "evaluate.py"), *arguments, "--set", "sandbox.backend=none", "--json"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])["figures"]
    return figures


def test_form_and_content_are_told_apart(tmp_path: Path) -> None:
    sums = domains.sample(2)
    (gsm, _), (boxed, _), (flores, _) = sums["gsm8k"], sums["math"], sums["flores"]
    truth, solution = gsm["reward_model"]["ground_truth"], boxed["reward_model"]["ground_truth"]
    reference = flores["reward_model"]["ground_truth"]
    rows = [
        gsm | {"response": f"So it is so.\n#### {truth}"},
        gsm | {"response": f"So the answer is \\boxed{{{truth}}}."},
        gsm | {"response": "So it is so.\n#### 123456789"},
        boxed | {"response": f"Thus \\boxed{{{solution}}}."},
        boxed | {"response": f"Thus the answer is ${solution}$."},
        flores | {"response": reference},
        flores | {"response": f'Here is the translation:\n\n"{reference}"'},
        sums["leetcode"][0] | {"response": "```python\npass\n```"},
        sums["ultrachat"][0] | {"response": "Aloha! " * 20},
    ]
    figures = evaluated(answered(tmp_path, rows, "after.jsonl"))
    means = {
        (source, name): figures[source][name]["mean"]
        for source in figures
        for name in figures[source]
        if name in evaluate.MEASURES and source != "overall"
    }
    assert means["gsm8k", "compliant"] == pytest.approx(2 / 3) and means["gsm8k", "correct"] == pytest.approx(2 / 3)
    assert means["gsm8k", "strict"] == pytest.approx(1 / 3)
    assert (means["math", "compliant"], means["math", "correct"], means["math", "strict"]) == (0.5, 1.0, 0.5)
    assert means["flores", "correct"] == pytest.approx(1.0) and means["flores", "compliant"] == 0.5
    assert ("leetcode", "correct") not in means and figures["leetcode"]["ungraded"] == 1
    assert "sandbox" in figures["leetcode"]["why"] and means["leetcode", "compliant"] == 1
    assert means["ultrachat", "repeated"] > 0.8 and ("ultrachat", "correct") not in means
    assert set(figures["overall"]) == {"compliant", "correct", "strict"}


def test_recorded_answers_get_the_means_of_their_own_labels_and_gains_are_paired(tmp_path: Path) -> None:
    with gzip.open(RECIPE.parent / "data" / "gsm8k_model_solutions.jsonl.gz", "rt") as file:
        listed = [json.loads(line) for line in file]
    by_model: dict[str, list[dict[str, Any]]] = {}
    labels: dict[str, list[bool]] = {}
    for one in listed:
        row = domains.gsm8k({"question": one["question"], "answer": "#### " + one["ground_truth"].rpartition("A:")[2]})
        if len(by_model.setdefault(one["model"], [])) < 100:
            by_model[one["model"]].append(row | {"response": one["response"]})
            labels.setdefault(one["model"], []).append(one["is_correct"])
    first, second = list(by_model)[:2]
    files = [answered(tmp_path, by_model[name], f"{name}.jsonl") for name in (second, first)]
    figures = evaluated(*files)["gsm8k"]
    assert figures["correct"]["mean"] == pytest.approx(sum(labels[second]) / len(labels[second]))
    assert figures["correct"]["low"] < figures["correct"]["mean"] < figures["correct"]["high"]
    assert figures["compliant"]["mean"] < figures["correct"]["mean"], "they were asked for another form"
    assert "correct_gain" in figures
