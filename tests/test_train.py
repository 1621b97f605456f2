# SPDX-License-Identifier: Apache-2.0
"""A real run: stock `verl.trainer.main_ppo`, a tiny policy with tied embeddings, mixed tasks, three steps of GRPO."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import make_sandbox_config, none_left
from test_library import make_spec, sha

from verl_rlar.ledger import read
from verl_rlar.library import Library
from verl_rlar.types import Kind, Scope

pytest.importorskip("verl", reason="verl is not installed (extra `cpu`)")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

DATA = Path(__file__).parent.parent / "recipes" / "data"
STEPS, PROMPTS, RESPONSES, VAL_ROWS = 3, 4, 4, 5


def rows() -> list[dict[str, Any]]:
    """Two tasks and a row that no tool fits, in verl's columns."""
    with gzip.open(DATA / "gsm8k_test.jsonl.gz", "rt") as file:
        math = [json.loads(next(file)) for _ in range(2 * PROMPTS)]
    made = [
        {
            "data_source": "gsm8k",
            "prompt": [{"role": "user", "content": row["question"][:120]}],
            "reward_model": {"style": "rule", "ground_truth": row["answer"]},
            "extra_info": {"index": index, "instruction_id_list": [], "kwargs": ""},
        }
        for index, row in enumerate(math)
    ]
    made += [
        {
            "data_source": "ifeval",
            "prompt": [{"role": "user", "content": f"Write about number {index} without commas."}],
            "reward_model": {"style": "rule", "ground_truth": ""},
            "extra_info": {"index": index, "instruction_id_list": ["punctuation:no_comma"], "kwargs": "[{}]"},
        }
        for index in range(2 * PROMPTS)
    ]
    made.append(
        {
            "data_source": "chat",
            "prompt": [{"role": "user", "content": "How are you?"}],
            "reward_model": {"style": "none", "ground_truth": ""},
            "extra_info": {"index": 0, "instruction_id_list": [], "kwargs": ""},
        }
    )
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from verl_rlar.cpu.models import build_tiny

    folder = tmp_path_factory.mktemp("run")
    build_tiny(folder / "model")
    made = rows()
    pq.write_table(pa.Table.from_pylist(made[::2]), folder / "train.parquet")
    pq.write_table(pa.Table.from_pylist(made[-VAL_ROWS:]), folder / "val.parquet")
    run(folder, f"trainer.total_training_steps={STEPS}")
    return folder


def command(folder: Path, *overrides: str) -> list[str]:
    return [
        *(sys.executable, "-m", "verl.trainer.main_ppo", "+rlar=default", "+rlar_device=cpu"),
        "algorithm.adv_estimator=grpo",
        f"data.train_files={folder}/train.parquet",
        f"data.val_files={folder}/val.parquet",
        f"data.train_batch_size={PROMPTS}",
        "data.max_prompt_length=192",
        "data.max_response_length=16",
        "data.filter_overlong_prompts=True",
        f"actor_rollout_ref.model.path={folder}/model",
        "actor_rollout_ref.actor.optim.lr=1e-3",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={PROMPTS}",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=16",
        f"actor_rollout_ref.rollout.n={RESPONSES}",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=16",
        "actor_rollout_ref.rollout.max_model_len=256",
        "reward.num_workers=2",
        "trainer.logger=[console]",
        "trainer.val_before_train=True",
        f"trainer.test_freq={STEPS}",
        f"trainer.save_freq={STEPS}",
        f"trainer.default_local_dir={folder}/checkpoints",
        f"hydra.run.dir={folder}/hydra",
        *overrides,
    ]


def run(folder: Path, *overrides: str, fails: bool = False) -> str:
    """Trains; returns what was printed, which also stands in ``train.log``."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "RAY_ADDRESS": "local",  # a cluster that was killed leaves its address behind
        "RAY_USAGE_STATS_ENABLED": "0",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(
        command(folder, *overrides),
        env=environment,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    (folder / "train.log").write_text(done.stdout)
    assert (done.returncode != 0) == fails, "\n".join(done.stdout.splitlines()[-60:])
    return done.stdout


def query(folder: Path, sql: str) -> list[tuple[Any, ...]]:
    with read(folder / "checkpoints" / "rlar") as db:
        return [tuple(row) for row in db.execute(sql)]


def test_the_ledger_has_exactly_one_row_per_response(folder: Path) -> None:
    by_step = query(folder, "SELECT step, COUNT(*) FROM scores WHERE split = 'train' GROUP BY step ORDER BY step")
    assert by_step == [(step, PROMPTS * RESPONSES) for step in range(1, STEPS + 1)]
    validated = query(folder, "SELECT step, COUNT(*) FROM scores WHERE split = 'val' GROUP BY step ORDER BY step")
    assert validated == [(0, VAL_ROWS), (STEPS, VAL_ROWS)]


def test_a_report_of_the_run_can_be_made(folder: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "verl_rlar",
        "report",
        str(folder / "checkpoints"),
        "-o",
        str(tmp_path / "run.html"),
    ]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["run"]["rows"] == STEPS * PROMPTS * RESPONSES + 2 * VAL_ROWS and figures["run"]["texts"]
    assert figures["curves"]["train"]["steps"] == [[step, step] for step in range(1, STEPS + 1)]
    assert {(flow["source"], flow["kind"], flow["route"]) for flow in figures["flow"]} == {
        ("chat", "open", "-"),
        ("gsm8k", "math", "final_answer"),
        ("ifeval", "constraints", "instruction_constraints"),
    }
    used = {tool["name"]: tool["state"] for tool in figures["tools"] if tool["use"]}
    assert used == {"final_answer": "live", "instruction_constraints": "live"}
    assert "Write about number" in (tmp_path / "run.html").read_text()


def test_every_group_is_whole_and_has_one_route_and_one_ruler(folder: Path) -> None:
    groups = query(
        folder,
        "SELECT COUNT(*), COUNT(DISTINCT session), COUNT(DISTINCT query), COUNT(DISTINCT snapshot || route) "
        "FROM scores WHERE split = 'train' GROUP BY uid",
    )
    assert groups == [(RESPONSES, RESPONSES, 1, 1)] * (STEPS * PROMPTS)


def test_every_response_is_scored_by_the_tool_that_fits_its_query(folder: Path) -> None:
    tools = query(folder, "SELECT DISTINCT data_source, route, outcome FROM scores ORDER BY data_source")
    assert tools == [
        ("chat", "-", "abstained"),
        ("gsm8k", "final_answer", "scored"),
        ("ifeval", "instruction_constraints", "scored"),
    ]


def test_verl_got_the_value_for_scored_and_a_flagged_neutral_number_for_unscored_responses(folder: Path) -> None:
    assert query(
        folder, "SELECT COUNT(*) FROM scores WHERE value IS NOT NULL AND (sent_as != 'value' OR sent != value)"
    ) == [(0,)]
    unscored = query(folder, "SELECT DISTINCT sent, sent_as FROM scores WHERE value IS NULL")
    assert unscored == [(0.5, "neutral")]


def test_the_rollout_follows_the_weights(folder: Path) -> None:
    log = (folder / "train.log").read_text()
    pearson = [
        float(value)
        for value in re.findall(r"training/rollout_actor_probs_pearson_corr:(?:np\.float\d+\()?([-\d.e]+)", log)
    ]
    assert len(pearson) == STEPS
    assert min(pearson) > 0.99


def test_verls_logger_has_the_rewards_of_each_step_by_tool_and_kind(folder: Path) -> None:
    log = (folder / "train.log").read_text()
    shares = "SELECT step, AVG(value), AVG(value IS NOT NULL) FROM scores WHERE split = 'train' GROUP BY step"
    for step, mean, scored in query(folder, shares):
        (line,) = [line for line in log.splitlines() if f"step:{step} - " in line]
        logged = {
            name: float(value) for name, value in re.findall(r"(rlar/[\w/]+):(?:np\.float\d+\()?([-\d.e]+)", line)
        }
        assert logged["rlar/mean"] == pytest.approx(mean) and logged["rlar/scored"] == pytest.approx(scored)
        assert logged["rlar/responses"] == PROMPTS * RESPONSES
        assert {"rlar/tool/final_answer/mean", "rlar/kind/math/share", "rlar/live", "rlar/boundary_s"} <= logged.keys()


def test_the_weights_changed(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    before = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    shards = sorted((folder / "checkpoints" / f"global_step_{STEPS}" / "actor").glob("model_world_size_1_rank_0.pt"))
    after = torch.load(shards[0], weights_only=False)
    changed = [
        name
        for name, tensor in after.items()
        if name in before and not torch.equal(getattr(tensor, "_local_tensor", tensor).float(), before[name].float())
    ]
    assert changed


def write_code_rows(folder: Path) -> None:
    """Rows with a test each, for training and validation."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    code = [
        {
            "data_source": "code",
            "prompt": [{"role": "user", "content": f"Write f{index}."}],
            "reward_model": {"style": "rule", "ground_truth": f"assert f{index}(1) == 2"},
            "extra_info": {"index": index},
        }
        for index in range(PROMPTS)
    ]
    for name in ("train", "val"):
        pq.write_table(pa.Table.from_pylist(code), folder / f"{name}.parquet")


@pytest.mark.docker
@pytest.mark.usefixtures("box_image")
def test_a_training_on_code_runs_it_in_boxes_and_a_verifier_gets_a_say_between_two_steps(
    tmp_path: Path, engine: Any
) -> None:
    """The verifier has passed its exam, and scores in the shadow at steps 1 and 2."""
    from verl_rlar.cpu.models import build_tiny

    build_tiny(tmp_path / "model")
    write_code_rows(tmp_path)
    source = "def score(prompt, response, reference, extra):\n    return (7 * len(response) % 100 + 1) / 200\n"
    spec = make_spec("grown", scope=Scope(kinds=frozenset({Kind.UNIT_TESTS})), source_sha256=sha(source))
    with Library(tmp_path / "checkpoints" / "rlar" / "library") as library:
        library.propose(spec, source, by="coder", why="for the test")
        library.put_exam(spec.digest, card={}, text="", transcript=[], passed=True, by="exam", why="passed")
        library.append("shadow", spec.digest, by="exam", why="passed", step=1)
    run(
        tmp_path,
        f"rlar.sandbox.base={make_sandbox_config().base}",
        "trainer.total_training_steps=3",
        "trainer.val_before_train=False",
        "rlar.life.shadow_steps=2",
        f"rlar.life.shadow_responses={PROMPTS * RESPONSES}",
        "rlar.life.min_varied=0.1",
        "+rlar.routing.routes.code={kinds: [unit_tests], split: train, parts: [{tool: [grown, unit_tests]}]}",
    )
    scored = query(tmp_path, "SELECT step, route, outcome, COUNT(*) FROM scores WHERE split = 'train' GROUP BY 1, 2, 3")
    assert scored == [
        (1, "unit_tests", "scored", PROMPTS * RESPONSES),
        (2, "unit_tests", "scored", PROMPTS * RESPONSES),
        (3, "grown", "scored", PROMPTS * RESPONSES),
    ]
    assert query(tmp_path, "SELECT DISTINCT route FROM scores WHERE split = 'val'") == [("unit_tests",)]
    assert query(tmp_path, "SELECT DISTINCT value FROM scores WHERE route = 'unit_tests'") == [(0.0,)]
    assert none_left(engine)


def test_too_many_unscored_responses_end_a_run_with_the_tool_and_the_reason(tmp_path: Path) -> None:
    from verl_rlar.cpu.models import build_tiny

    build_tiny(tmp_path / "model")
    write_code_rows(tmp_path)
    settings = ["rlar.scoring.unscored_window=8", "trainer.val_before_train=False", "trainer.total_training_steps=9"]
    settings.append("rlar.sandbox.backend=none")
    printed = run(tmp_path, *settings, fails=True)
    assert "TooManyUnscored" in printed
    assert "before step 2: 8 of the last 8 responses could not be scored" in printed
    assert "8x -: uncovered: no tool for unit_tests" in printed
    sent = query(tmp_path, "SELECT step, outcome, value, sent, sent_as, COUNT(*) FROM scores GROUP BY 1, 2, 3, 4, 5")
    assert sent == [(1, "abstained", None, 0.5, "neutral", PROMPTS * RESPONSES)]


def test_no_process_of_the_run_is_left(folder: Path) -> None:
    left = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() in entry.read_bytes():
                left.append(entry.parent.name)
        except OSError:
            continue
    assert left == []
