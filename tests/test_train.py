# SPDX-License-Identifier: Apache-2.0
"""A real run: stock `verl.trainer.main_ppo`, a tiny policy with tied embeddings, mixed tasks, four steps of GRPO. A
scripted LLM behind a real socket is asked about a cluster whose evidence is thin."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import make_sandbox_config, none_left
from llm_server import LlmServer, Reply, of_request, text
from test_library import make_spec, sha

from verl_rlar.ledger import read
from verl_rlar.library import Library
from verl_rlar.types import Kind, Scope

pytest.importorskip("verl", reason="verl is not installed (extra `cpu`)")
pytest.importorskip("smolagents", reason="smolagents is not installed (extra `agents`)")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

DATA = Path(__file__).parent.parent / "recipes" / "data"
STEPS, PROMPTS, RESPONSES, VAL_ROWS = 4, 4, 4, 5
PATIENT = """
import time
from pathlib import Path

from verl_rlar.tools.rule import rule
from verl_rlar.types import Kind


@rule(name="patient_match", kinds={Kind.SHORT_TEXT}, timeout_s=120, description="Whether it is the same text.")
def patient_match(sample):
    from verl_rlar.tools.rules.text import exact_match

    agents = Path(__file__).parent / "checkpoints" / "rlar" / "agents"
    end = time.monotonic() + 90
    while sample.step == 2 and time.monotonic() < end:
        if any('"event": "end"' in file.read_text() for file in agents.glob("advice-*.jsonl")):
            break
        time.sleep(0.05)
    return exact_match(sample)
"""
"""A rule that waits for the LLM, at the step at which it is asked, so that its answer comes in time."""


def rows() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """For training, three tasks in every batch; for validation, one of them and a row that no tool fits. In verl's
    columns."""
    with gzip.open(DATA / "gsm8k_test.jsonl.gz", "rt") as file:
        math = [json.loads(next(file)) for _ in range(STEPS)]

    def row(source: str, index: int, prompt: str, truth: str, *demands: str) -> dict[str, Any]:
        return {
            "data_source": source,
            "prompt": [{"role": "user", "content": prompt}],
            "reward_model": {"style": "rule" if source != "chat" else "none", "ground_truth": truth},
            "extra_info": {
                "index": index,
                "instruction_id_list": list(demands),
                "kwargs": json.dumps([{} for _ in demands]) if demands else "",
            },
        }

    def demand(index: int) -> dict[str, Any]:
        return row("ifeval", index, f"Write about number {index} without commas.", "", "punctuation:no_comma")

    train = []
    for step, question in enumerate(math):
        train += [row("gsm8k", step, question["question"][:120], question["answer"]), demand(step)]
        for index in (2 * step, 2 * step + 1):
            train.append(row("facts", index, f"Who wrote the book with the number {index} on its back?", "Goethe"))
    return train, [*map(demand, range(STEPS, 2 * STEPS)), row("chat", 0, "How are you?", "")]


def advice(asked: dict[str, Any]) -> Reply:
    """What the LLM says: of the cluster that is open between two tools, the second one by evidence."""
    is_open = "`exact_match`" in json.dumps(asked)
    said = {"name": "authors of books" if is_open else "other things", "why": "It is the plain one."}
    return text(json.dumps(said | {"tool": "exact_match" if is_open else None, "elsewhere": []}))


def write_labelled(path: Path) -> None:
    """Twelve labelled answers, on which two rules are nearly alike, and a third one knows nothing."""

    def line(patient: float, exact: float) -> str:
        good = {"patient_match": patient, "exact_match": exact, "token_f1": 0.5}
        bad = {"patient_match": 0.0, "exact_match": 0.0, "token_f1": 0.5}
        answers = [{"right": True, "values": good}, {"right": False, "values": bad}]
        return json.dumps({"kind": "short_text", "answers": answers}) + "\n"

    path.write_text(line(1.0, 1.0) * 11 + line(1.0, 0.0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from verl_rlar.cpu.models import build_tiny

    folder = tmp_path_factory.mktemp("run")
    build_tiny(folder / "model")
    train, val = rows()
    pq.write_table(pa.Table.from_pylist(train), folder / "train.parquet")
    pq.write_table(pa.Table.from_pylist(val), folder / "val.parquet")
    write_labelled(folder / "labelled.jsonl")
    (folder / "patient.py").write_text(PATIENT)
    settings = ["data.shuffle=False", "rlar.tools=[patient:patient_match]", "rlar.advice.prompts=2"]
    settings += ["rlar.scoring.timeout_s=120", "trainer.logger=[console,file]"]
    settings += [f"rlar.routing.labelled={folder}/labelled.jsonl", "rlar.agents.model=some-llm"]
    with LlmServer([of_request(advice)]) as llm:
        run(folder, f"trainer.total_training_steps={STEPS}", f"rlar.agents.url={llm.url}", *settings)
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
        "PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")])),  # rules of its own
        "VERL_FILE_LOGGER_PATH": f"{folder}/metrics.jsonl",
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


def metrics(folder: Path) -> dict[int, dict[str, Any]]:
    """What verl's own logger got at each step; a file, as the last lines that Ray has printed may be missing."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["data"] for line in lines}


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
        ("facts", "short_text", "exact_match"),
        ("facts", "short_text", "patient_match"),
        ("gsm8k", "math", "final_answer"),
        ("ifeval", "constraints", "instruction_constraints"),
    }
    used = {tool["name"]: tool["state"] for tool in figures["tools"] if tool["use"]}
    assert used == dict.fromkeys(("exact_match", "final_answer", "instruction_constraints", "patient_match"), "live")
    assert "Write about number" in (tmp_path / "run.html").read_text()


def test_every_group_is_whole_and_has_one_route_and_one_ruler(folder: Path) -> None:
    groups = query(
        folder,
        "SELECT COUNT(*), COUNT(DISTINCT session), COUNT(DISTINCT query), COUNT(DISTINCT snapshot || route) "
        "FROM scores WHERE split = 'train' GROUP BY uid",
    )
    assert groups == [(RESPONSES, RESPONSES, 1, 1)] * (STEPS * PROMPTS)


def test_every_response_is_scored_by_the_tool_that_fits_its_query(folder: Path) -> None:
    tools = query(folder, "SELECT DISTINCT data_source, route, outcome FROM scores ORDER BY 1, 2")
    assert tools == [
        ("chat", "-", "abstained"),
        ("facts", "exact_match", "scored"),
        ("facts", "patient_match", "scored"),
        ("gsm8k", "final_answer", "scored"),
        ("ifeval", "instruction_constraints", "scored"),
    ]


def test_an_llms_advice_changes_the_routes_of_a_cluster_at_a_boundary_and_the_ledger_says_so(folder: Path) -> None:
    by_step = query(
        folder,
        "SELECT scores.step, scores.route, COUNT(*), MIN(routes.reason), MAX(routes.reason) FROM scores "
        "JOIN routes ON routes.snapshot = scores.snapshot AND routes.query = scores.query "
        "WHERE data_source = 'facts' GROUP BY 1, 2 ORDER BY 1",
    )
    rulings = map(json.loads, (folder / "checkpoints" / "rlar" / "library" / "advice.jsonl").read_text().splitlines())
    (since,) = [ruling["step"] for ruling in rulings if ruling["tool"]]
    assert since in (3, 4), "asked before step 2, and heard while that went on"
    advised = ["exact_match" if step >= since else "patient_match" for step in range(1, STEPS + 1)]
    assert [(step, route, count) for step, route, count, *_ in by_step] == [
        (step, route, 2 * RESPONSES) for step, route in enumerate(advised, start=1)
    ]
    for step, _, _, *reasons in by_step:
        said = "as some-llm advised for this cluster (It is the plain one.), as evidence is thin: patient_match 0."
        assert all((said in reason) == (step >= since) for reason in reasons), reasons
    assert metrics(folder)[STEPS]["rlar/advice/rulings"] == 1.0


def test_verl_got_the_value_for_scored_and_a_flagged_neutral_number_for_unscored_responses(folder: Path) -> None:
    assert query(
        folder, "SELECT COUNT(*) FROM scores WHERE value IS NOT NULL AND (sent_as != 'value' OR sent != value)"
    ) == [(0,)]
    unscored = query(folder, "SELECT DISTINCT sent, sent_as FROM scores WHERE value IS NULL")
    assert unscored == [(0.5, "neutral")]


def test_the_rollout_follows_the_weights(folder: Path) -> None:
    logged = metrics(folder)
    assert all(logged[step]["training/rollout_actor_probs_pearson_corr"] > 0.99 for step in range(1, STEPS + 1))


def test_verls_logger_has_the_rewards_of_each_step_by_tool_and_kind(folder: Path) -> None:
    shares = "SELECT step, AVG(value), AVG(value IS NOT NULL) FROM scores WHERE split = 'train' GROUP BY step"
    for step, mean, scored in query(folder, shares):
        logged = metrics(folder)[step]
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
    """The verifier has passed its exam, and scores in the shadow from step 1 on, for two steps at least: its scores are
    made off the path, and may be late for a boundary."""
    from verl_rlar.cpu.models import build_tiny

    steps = 5
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
        f"trainer.total_training_steps={steps}",
        "trainer.save_freq=-1",
        "trainer.val_before_train=False",
        "rlar.life.shadow_steps=2",
        f"rlar.life.shadow_responses={PROMPTS * RESPONSES}",
        "rlar.life.min_varied=0.1",
        "+rlar.routing.routes.code={kinds: [unit_tests], split: train, parts: [{tool: [grown, unit_tests]}]}",
    )
    events = Library.read(tmp_path / "checkpoints" / "rlar" / "library").events
    (since,) = [event.step for event in events if (event.event, event.digest) == ("live", spec.digest)]
    assert 3 <= since <= steps
    scored = query(tmp_path, "SELECT step, route, outcome, COUNT(*) FROM scores WHERE split = 'train' GROUP BY 1, 2, 3")
    assert scored == [
        (step, "grown" if step >= since else "unit_tests", "scored", PROMPTS * RESPONSES)
        for step in range(1, steps + 1)
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
