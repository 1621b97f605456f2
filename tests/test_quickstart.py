# SPDX-License-Identifier: Apache-2.0
"""The quickstart's parts: data, arguments, the child process, the summary. The training itself: test_train.py."""

import asyncio
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import pytest

from verl_rlar.config import RoutingConfig
from verl_rlar.features import describe
from verl_rlar.ledger import FILE_NAME, Ledger, Row
from verl_rlar.library import builtin_snapshot
from verl_rlar.router import FeatureRouter
from verl_rlar.rows import query_of
from verl_rlar.types import Kind, Outcome, Query, Route, RoutePart, Sample, Score

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "quickstart"
sys.path.insert(0, str(RECIPE))

data = importlib.import_module("data")
quickstart = importlib.import_module("quickstart")
summary = importlib.import_module("summary")
training = importlib.import_module("training")

TOOL_OF = {
    "gsm8k": "final_answer",
    "math": "final_answer",
    "ifeval": "instruction_constraints",
    "ted_en_de": "translation",
}
PROFILES = {"tiny": data.Profile(**quickstart.TINY.data), "default": data.Profile(**quickstart.DEFAULT.data)}


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES.keys())
def test_every_row_goes_to_the_tool_of_its_task(profile):
    router = FeatureRouter(RoutingConfig())
    for row in chain(*data.rows(profile)):
        route = asyncio.run(router.route(query_of(row), builtin_snapshot()))
        assert route.name == TOOL_OF[row["data_source"]], row["prompt"]
        assert route.covered


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES.keys())
def test_every_batch_holds_the_whole_mixture_and_validation_is_held_out(profile):
    train, val = data.rows(profile)
    size = sum(profile.mixture.values())
    assert len(train) == size * profile.batches
    for start in range(0, len(train), size):
        names = [row["data_source"] for row in train[start : start + size]]
        assert {name: names.count(name) for name in names} == profile.mixture
    assert {name: sum(row["data_source"] == name for row in val) for name in profile.mixture} == profile.validation
    prompts = [{row["prompt"][0]["content"] for row in split} for split in (train, val)]
    assert not prompts[0] & prompts[1]


def test_rows_are_the_same_after_a_parquet_file(tmp_path):
    pandas = pytest.importorskip("pandas")
    profile = PROFILES["tiny"]
    for file, rows in zip(data.write(profile, tmp_path), data.rows(profile), strict=True):
        read = pandas.read_parquet(file).to_dict("records")
        assert [query_of(row).key for row in read] == [query_of(row).key for row in rows]
        assert {describe(query_of(row)).kind for row in read} == {Kind.CONSTRAINTS, Kind.TRANSLATION, Kind.MATH}


def test_a_profile_that_asks_for_more_than_there_is_is_refused():
    few = {**quickstart.TINY.data, "prompt_chars": 40}
    with pytest.raises(ValueError, match="too few"):
        data.rows(data.Profile(**few))


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--steps", "many"], ["--fresh", "--resume"], ["--fast"]])
def test_wrong_arguments_end_with_code_2(arguments):
    with pytest.raises(SystemExit) as end:
        quickstart.main(arguments)
    assert end.value.code == 2


def test_a_run_that_exists_is_neither_resumed_nor_deleted_unasked(tmp_path, capsys):
    (tmp_path / quickstart.SETTINGS).write_text(json.dumps({"recipe": "tiny", "steps": 4}))
    check = ["--check", "--run-dir", str(tmp_path)]
    assert quickstart.main(check) == 2
    assert "--resume" in capsys.readouterr().err
    assert quickstart.main([*check, "--resume"]) == 0
    assert quickstart.main([*check, "--fresh", "--tiny"]) == 0


def test_resume_takes_the_settings_of_the_run_and_a_larger_number_of_steps(tmp_path):
    (tmp_path / quickstart.SETTINGS).write_text(json.dumps({"recipe": "tiny", "steps": 4}))
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("4")
    resume = ["--resume", "--run-dir", str(tmp_path)]
    assert quickstart.decide(quickstart.parse([*resume, "--steps", "6"])) == {"recipe": "tiny", "steps": 6}
    with pytest.raises(quickstart.Stop, match="larger --steps"):
        quickstart.decide(quickstart.parse(resume))


def test_there_is_nothing_to_resume_in_an_empty_folder_and_a_strange_one_is_not_touched(tmp_path):
    with pytest.raises(quickstart.Stop, match="nothing to resume"):
        quickstart.decide(quickstart.parse(["--resume", "--run-dir", str(tmp_path)]))
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(quickstart.Stop, match="no quickstart run"):
        quickstart.decide(quickstart.parse(["--fresh", "--run-dir", str(tmp_path)]))


def test_two_quickstarts_do_not_share_a_run_folder(tmp_path):
    with quickstart.locked(tmp_path), pytest.raises(quickstart.Stop, match="another run"):
        with quickstart.locked(tmp_path):
            pass


def test_ending_the_child_ends_all_that_it_started():
    script = "import subprocess, time; subprocess.Popen(['sleep', '60']); print('up', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", script], start_new_session=True, stdout=subprocess.PIPE) as child:
        assert child.stdout.readline() == b"up\n"
        assert len(training.session(child.pid)) == 2
        training.end(child)
        assert training.session(child.pid) == []


def test_the_child_dies_with_a_parent_that_is_killed():
    script = (
        f"import subprocess, sys; sys.path.insert(0, {str(RECIPE)!r}); import training, time\n"
        "child = subprocess.Popen(['sleep', '60'], start_new_session=True, preexec_fn=training._die_with_parent)\n"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as parent:
        child = int(parent.stdout.readline())
        os.kill(parent.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while training.session(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert training.session(child) == []


@pytest.fixture
def run(tmp_path):
    """A run of 8 steps, killed after step 5, whose last checkpoint was that of step 4: step 5 was made twice."""
    query = Query(messages=(), reference="4", data_source="gsm8k")
    spec = builtin_snapshot().tool("final_answer")
    part = RoutePart(tool=spec.name, digest=spec.digest)
    route = Route(parts=(part,), reason="", kind=Kind.MATH, covered=True, snapshot=builtin_snapshot().version)

    def row(step, session, value, *, split="train", seconds=0.25):
        outcome = Outcome.FAILED if value is None else Outcome.SCORED
        return Row(
            sample=Sample(query=query, response="4", step=step, uid=f"{split}{step}", session=session, split=split),
            route=route,
            score=Score(value=value, outcome=outcome, reason=""),
            sent=value or 0.0,
            sent_as="value",
            received=100.0 * step + session,
            seconds=seconds,
        )

    for attempt, steps in enumerate((range(1, 12), range(5, 9)), start=1):
        with Ledger(tmp_path / summary.LEDGER / FILE_NAME, token=str(attempt)) as ledger:
            for step in steps:
                rising = 0.9 if step >= 5 and attempt == 1 else step / 10
                ledger.add([row(step, 0, rising, seconds=0.5), row(step, 1, rising), row(step, 2, None)])
            if attempt == 1:
                ledger.add([row(0, 0, 0.25, split="val"), row(10, 0, 1.0, split="val")])
            else:
                ledger.add([row(8, 0, 0.75, split="val")])
        lines = [{"step": step, "data": {"timing_s/step": 10.0, summary.PEARSON: 0.99}} for step in steps]
        lines += [{"step": 10, "data": {summary.PEARSON: 0.5}}] * (attempt == 1)
        text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9, "da'
        (tmp_path / f"metrics.{attempt}.jsonl").write_text(text)
    return tmp_path


def test_summary_compares_quarters_and_counts_nothing_that_was_made_before_a_run_went_back(run):
    found = summary.summarise(run)
    change = found.by_task["gsm8k"]
    assert (found.steps, found.attempts, found.responses) == (8, 2, 24)
    assert change.start == summary.Mean(mean=pytest.approx(0.15), n=4)
    assert change.end == summary.Mean(mean=pytest.approx(0.75), n=4)
    assert change.difference == pytest.approx(0.6)
    assert found.by_tool == {"final_answer": change}
    assert found.outcomes == {"scored": 16, "failed": 8}
    assert found.validation["gsm8k"].difference == pytest.approx(0.5)
    assert found.pearson_min == 0.99


def test_exposed_time_is_what_follows_the_last_response(run):
    found = summary.summarise(run)
    assert found.exposed_seconds == pytest.approx(0.25)
    assert found.exposed_share == pytest.approx(0.025)


def test_summary_prints_draws_and_speaks_json(run, capsys):
    assert summary.main([str(run)]) == 0
    assert "gsm8k" in capsys.readouterr().out
    assert (run / "curves.png").stat().st_size > 1000
    assert summary.main([str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["by_task"]["gsm8k"]["end"]["n"] == 4


def test_summary_of_a_folder_without_a_ledger_says_so(tmp_path, capsys):
    assert summary.main([str(tmp_path)]) == 2
    assert "no ledger" in capsys.readouterr().err


def test_a_training_that_is_killed_while_it_saves_has_a_whole_checkpoint(tmp_path):
    """verl's own bookkeeping, in the order in which its trainer saves: the last checkpoint *noted* is always there."""
    pytest.importorskip("verl", reason="verl is not installed (extra `cpu`)")
    from verl.utils.checkpoint.checkpoint_manager import BaseCheckpointManager

    (keep,) = [int(one.partition("=")[2]) for one in quickstart.SHARED if "max_actor_ckpt_to_keep" in one]
    manager = BaseCheckpointManager.__new__(BaseCheckpointManager)  # its constructor wants a process group
    manager.previous_saved_paths = []
    folders = [tmp_path / f"global_step_{step}" for step in range(6)]
    for noted, new in zip((None, *folders), folders, strict=False):
        manager.ensure_checkpoint_capacity(keep)
        assert noted is None or noted.exists()
        new.mkdir()
        manager.register_checkpoint(str(new), keep)  # only now does the trainer note the new one
        assert noted is None or noted.exists()
    assert len(list(tmp_path.iterdir())) <= 2  # of a gigabyte and more each
