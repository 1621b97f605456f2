# SPDX-License-Identifier: Apache-2.0
"""The selection benchmark: the official rules by hand, its files, and that it does not look at what it must not."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from llm_server import LlmServer, says

from verl_rlar.errors import DataError

SELECTION = Path(__file__).parent.parent / "recipes" / "selection"
sys.path.insert(0, str(SELECTION))

import pools


def item(id: str, right: int, scores: list[float], subset: str = "Math") -> pools.Item:
    marks = tuple(n < right for n in range(len(scores)))
    return pools.Item(id=id, subset=subset, prompt="", right=marks, scores={"a": tuple(scores)})


@pytest.mark.parametrize(
    ("scores", "official", "softmax"),
    [
        ([3.0, 1.0, 1.0, 1.0], 1.0, 1.0),
        ([1.0, 0.9, 0.9, 0.9], 1.0, 0.0),  # first, and not by much
        ([1.0, 1.0, 0.0, 0.0], 0.5, 0.0),
        ([1.0, 1.0, 1.0, 1.0], 0.25, 0.0),
        ([0.0, 1.0, 0.0, 0.0], 0.0, 0.0),
        ([-900.0, -1000.0, -1000.0, -1000.0], 1.0, 1.0),
    ],
)
def test_an_item_counts_by_the_official_rule_and_by_the_papers(
    scores: list[float], official: float, softmax: float
) -> None:
    right = (True, False, False, False)
    assert pools.official(scores, right) == official
    assert pools.softmax_half(scores, right) == softmax


def test_ties_are_scored_by_accuracy_and_margins_as_upstream() -> None:
    items = [
        item("ref:0", 1, [5.0, 1.0, 0.0], "Ties"),
        item("tied:0", 2, [5.0, 4.0, 1.0], "Ties"),
        item("ref:1", 1, [2.0, 1.5, 0.0], "Ties"),
        item("tied:1", 2, [5.0, 2.0, 3.0], "Ties"),
    ]
    scores = [one.scores["a"] for one in items]
    # tied: prompt 0 accurate (spread 1, distance 3), prompt 1 not (spread 3, distance -1); both references accurate
    margins = (math.tanh(3 / 1 - 1) + math.tanh(-1 / 3 - 1)) / 2
    assert pools.ties_score(items, scores) == pytest.approx(
        0.3 * 0.5 + 0.3 * 1 + 0.2 * 0.5 + 0.2 * 0.5 + 0.01 * margins
    )


def write_rewardbench2(folder: Path, tools: dict[str, float], count: int = 60) -> Path:
    """Files in the form of the hub's; a tool's right answers are better by its strength."""
    scores = folder / "eval-set-scores" / "org"
    scores.mkdir(parents=True)
    ids = [f"{n}" for n in range(count)] + [f"{sort}:{n}" for n in range(6) for sort in ("ref", "tied")]
    for seed, (name, strength) in enumerate(tools.items()):
        rng = random.Random(seed)
        rows = []
        for id in ids:
            right = 3 if id.startswith("tied") else 1
            rows.append([[rng.gauss(strength * (n < right), 1.0)] for n in range(right + 3)])
        table = {
            "id": ids,
            "subset": ["Focus"] * count + ["Ties"] * 12,
            "scores": rows,
            "num_correct": [3 if id.startswith("tied") else 1 for id in ids],
            "model": f"org/{name}",
            "text": [["..."] * len(row) for row in rows],
        }
        (scores / f"{name}.json").write_text(json.dumps(table))
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"id": id, "prompt": f"Question {id} about ships?"}) + "\n" for id in ids))
    return prompts


def run(*arguments: str, script: str = "run.py") -> tuple[dict[str, Any], subprocess.CompletedProcess[str]]:
    done = subprocess.run(
        [sys.executable, str(SELECTION / script), "--json", "--repeats", "1", *arguments],
        capture_output=True,
        text=True,
        timeout=600,
    )
    return json.loads(done.stdout.splitlines()[-1]) if done.stdout else {}, done


def test_files_of_rewardbench_2_are_read_counted_and_written_in_the_leaderboards_form(tmp_path: Path) -> None:
    prompts = write_rewardbench2(tmp_path, {"a": 1.0, "b": 1.0, "noise": 0.0})
    pool = pools.rewardbench2(tmp_path / "eval-set-scores", prompts)
    assert pool.tools == ("org/a", "org/b", "org/noise") and len(pool.items) == 72
    assert {one.id: sum(one.right) for one in pool.items}["tied:3"] == 3 and pool.items[0].prompt.startswith("Question")
    out = tmp_path / "results.json"
    result, done = run(
        "--rewardbench2", str(tmp_path / "eval-set-scores"), "--prompts", str(prompts), "--out", str(out)
    )
    figures = result["figures"]
    assert figures["items"] == 60, "Ties are counted apart"
    assert figures["shuffled"] < figures["router"] <= figures["oracle"] and figures["tokens_per_item"] == 0
    assert {"router_ties", "best_single_ties"} <= figures.keys() and done.returncode == (0 if result["ok"] else 1)
    written = json.loads(out.read_text())
    assert set(written) == {"model", "model_type", "chat_template", "Focus", "Ties"}
    assert written["Focus"] == pytest.approx(figures["router"])


def test_items_that_a_tool_has_not_scored_are_left_out_and_other_files_refused(tmp_path: Path) -> None:
    write_rewardbench2(tmp_path, {"a": 1.0, "b": 1.0})
    path = tmp_path / "eval-set-scores" / "org" / "b.json"
    table = json.loads(path.read_text())
    table["scores"][0] = [[math.nan]] * 4
    path.write_text(json.dumps({name: column[:50] if name != "model" else column for name, column in table.items()}))
    assert len(pools.rewardbench2(tmp_path / "eval-set-scores").items) == 49
    path.write_text(json.dumps({"model": "org/b", "results": [1, 0]}))
    with pytest.raises(DataError, match=r"b\.json is no file of RewardBench 2's eval-set-scores: KeyError"):
        pools.rewardbench2(tmp_path / "eval-set-scores")


def test_the_label_of_an_item_does_not_change_what_is_said_of_it() -> None:
    import numpy as np
    import run as script
    from rich.console import Console

    rng = np.random.default_rng(0)
    items = []
    for n in range(60):
        scores = {
            t: tuple(float(x) for x in rng.normal(size=4) + np.array([good, 0, 0, 0]))
            for t, good in (("a", 1.5), ("b", 1.3))
        }
        items.append(pools.Item(id=str(n), subset="x", prompt=f"{n}", right=(True, False, False, False), scores=scores))
    pool = pools.Pool(tools=("a", "b"), items=tuple(items))
    order = np.random.default_rng(0).permutation(60)
    tested = {int(n) for n in order[0 :: script.FOLDS]}
    lied = [
        pools.Item(id=i.id, subset="x", prompt=i.prompt, right=(False, True, False, False), scores=i.scores)
        if n in tested
        else i
        for n, i in enumerate(items)
    ]
    quiet = Console(quiet=True)
    honest = script.compare(pool, {}, 1, quiet).said["router"]
    other = script.compare(pools.Pool(tools=pool.tools, items=tuple(lied)), {}, 1, quiet).said["router"]
    assert [honest[n] for n in sorted(tested)] == [other[n] for n in sorted(tested)]
    assert honest != other, "the labels of the others are looked at"


@pytest.mark.slow
def test_on_real_scores_the_router_is_ten_points_above_the_best_single_tool() -> None:
    result, done = run("--repeats", "3")
    figures = result["figures"]
    assert result["ok"] and done.returncode == 0, figures
    assert (
        figures["shuffled"] < figures["random"] + 0.02 < figures["best_single"] < figures["router"] < figures["oracle"]
    )


# --- Few labels -------------------------------------------------------------------------------------------------------


def test_an_llms_advice_pays_where_no_item_is_labelled_and_poor_advice_fades_with_the_labels() -> None:
    """Its answers are a recording; the questions are asked by the adviser of a training, over a socket."""
    pytest.importorskip("smolagents", reason="the extra `agents` is not installed")
    result, done = run("--labels", "0,32", "--repeats", "2", script="thin.py")
    figures = result["figures"]
    assert done.returncode == 0 and result["ok"] and not figures["unanswered"], done.stderr[-2000:]
    assert figures["router_llm_0"] > figures["metadata_only_0"] + 0.1 and figures["router_llm_0_gain_low"] > 0
    assert figures["router_poor_advice_0"] == figures["metadata_only_0"], "nothing speaks against it yet"
    lost = figures["metadata_only_32"] - figures["router_32"]
    assert figures["router_poor_advice_32_gain"] > lost / 2 < 0, "evidence has its say by then"
    assert 5 < figures["tokens_per_item_32"] < figures["tokens_per_item_0"] < 20


def test_a_question_that_was_not_recorded_is_an_error_that_says_so() -> None:
    pytest.importorskip("smolagents", reason="the extra `agents` is not installed")
    _, done = run("--labels", "0,1", script="thin.py")
    assert done.returncode == 2 and "is not in" in done.stderr and "advise_rewardmath" in done.stderr


def test_an_llm_that_does_not_answer_leaves_the_router_as_it_is_and_is_counted() -> None:
    pytest.importorskip("smolagents", reason="the extra `agents` is not installed")
    with LlmServer([says(500)]) as llm:
        result, done = run("--labels", "0", "--url", llm.url, "--model", "x", script="thin.py")
    figures = result["figures"]
    assert done.returncode == 0 and figures["unanswered"] == 1 and len(llm.requests) == 1, done.stderr[-2000:]
    assert figures["router_llm_0"] == figures["router_0"] and figures["tokens_per_item_0"] > 0, "what was asked is paid"
