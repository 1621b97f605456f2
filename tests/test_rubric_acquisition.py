# SPDX-License-Identifier: Apache-2.0
"""Rubrics for gaps: where no program can check and an LLM is configured, it writes one, and the exam decides."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("smolagents", reason="smolagents is not installed (extra `agents`)")
import rubrics
from llm_server import LlmServer, of_request, text
from rubrics import GOOD, author_and_judge, is_judged
from test_acquirer import row
from typer.testing import CliRunner

from verl_rlar.acquirer import Acquirer
from verl_rlar.acquisition import Acquired, Gap, acquire, find_gaps, judging_tokens
from verl_rlar.cli import app
from verl_rlar.config import RlarConfig, parse
from verl_rlar.dispatcher import Dispatcher
from verl_rlar.inbox import take_in
from verl_rlar.library import Library
from verl_rlar.purse import Purse
from verl_rlar.types import Kind

ANSWERED = 120
"""Tokens of each answer of the scripted LLM."""


def files_of(folder: Path) -> tuple[Path, Path]:
    """Queries of a training, and preferences."""
    queries, labelled = folder / "queries.jsonl", folder / "preferences.jsonl"
    queries.write_text("".join(json.dumps({"prompt": one["prompt"]}) + "\n" for one in rubrics.rows()))
    labelled.write_text("".join(json.dumps(one) + "\n" for one in rubrics.rows()))
    return queries, labelled


def settings(server: LlmServer, folder: Path, rubrics: str = "first", **agents: Any) -> RlarConfig:
    return parse(
        {
            "agents": {"url": server.url, "model": "scripted", "retries": 0, **agents},
            "acquire": {"rubrics": rubrics},
            "exam": {"repeats": 12},
            "hub": {"offline": True, "cache_dir": str(folder / "cache")},
            "run_dir": str(folder),
            "sandbox": {"backend": "none"},
        }
    )


async def gap_of(config: RlarConfig) -> Gap:
    async with Dispatcher(config) as dispatcher:
        rows = [{"prompt": one["prompt"]} for one in rubrics.rows()]
        _, (gap,) = await find_gaps(enumerate(rows, start=1), dispatcher, config)
    return gap


async def acquired(config: RlarConfig, folder: Path) -> tuple[Gap, Acquired]:
    gap = await gap_of(config)
    return gap, await acquire(gap, [str(files_of(folder)[1])], config)


async def test_a_rubric_is_written_for_open_dialogue_and_handed_in_for_the_shadow(tmp_path: Path) -> None:
    with LlmServer([author_and_judge(GOOD)]) as server:
        config = settings(server, tmp_path)
        gap, came = await acquired(config, tmp_path)
    assert (gap.kind, gap.way) == (Kind.OPEN, "author") and "scripted writes a rubric" in gap.plan
    assert [one.verdict for one in came.tried] == ["admitted"]
    assert came.submission and came.submission.event == "shadow" and came.submission.exam
    assert came.submission.spec and came.submission.spec["kind"] == "rubric" and came.submission.exam.passed
    calls = len(server.requests)
    spent = Purse(tmp_path / "agents", "", config.agents).spent()
    assert (spent.calls, spent.tokens) == (calls, ANSWERED * calls), "to the token"
    assert f"{ANSWERED * sum(map(is_judged, server.requests)):,} tokens for its trials" in came.why


async def test_where_no_reward_model_can_be_had_a_rubric_is_written_instead(tmp_path: Path) -> None:
    with LlmServer([author_and_judge(GOOD)]) as server:
        config = settings(server, tmp_path, "after")
        gap, came = await acquired(config, tmp_path)
        never = await gap_of(settings(server, tmp_path, "never"))
    assert gap.way == "scout" and "if none passes, scripted writes a rubric" in gap.plan
    assert came.way == "author" and came.submission and came.submission.spec
    assert came.submission.spec["kind"] == "rubric" and came.tried[-1].verdict == "admitted", came
    assert never.way == "scout" and "rubric" not in never.plan


@of_request
def judges_all_alike(asked: dict[str, Any]) -> Any:
    """An LLM that writes a good rubric, and answers no to everything."""
    if not is_judged(asked):
        return text(f"```json\n{json.dumps(GOOD)}\n```")
    _, _, questions, code = rubrics.read(asked)
    return text(rubrics.answered(code, [False] * len(questions)))


@pytest.mark.parametrize(
    ("turn", "agents", "why"),
    [
        (judges_all_alike, {"drafts": 1, "repairs": 0}, "none of 1 drafts was admitted"),
        (author_and_judge(GOOD), {"run_tokens": 2000}, "rlar.agents.run_tokens"),
    ],
)
async def test_no_rubric_gets_a_say_that_fails_or_exceeds_the_budget(
    turn: Any, agents: dict[str, Any], why: str, tmp_path: Path
) -> None:
    with LlmServer([turn]) as server:
        config = settings(server, tmp_path, **agents)
        _, came = await acquired(config, tmp_path)
    assert came.submission is None and why in came.why, came
    if cap := agents.get("run_tokens"):
        assert Purse(tmp_path / "agents", "", config.agents).spent().tokens <= cap


async def test_a_training_has_one_written_beside_its_work_and_it_comes_by_the_shadow(tmp_path: Path) -> None:
    _, labelled = files_of(tmp_path)
    with LlmServer([author_and_judge(GOOD)]) as server:
        config = settings(server, tmp_path)
        acquiring = {"enabled": True, "labelled": (str(labelled),), "window": 4, "share": 0.5}
        config = config.model_copy(update={"acquire": config.acquire.model_copy(update=acquiring)})
        with Library(tmp_path / "library") as library:
            acquirer = Acquirer(config, library.path)
            acquirer.begin_step(0, library.snapshot(0))
            for one in rubrics.rows()[:4]:
                acquirer.saw(row(Kind.OPEN, False, one["prompt"]))
            acquirer.begin_step(1, library.snapshot(1))
            assert acquirer._task is not None
            await asyncio.wait_for(acquirer._task, 600)
            (said,) = [said for _, said in take_in(library)]
            after = library.snapshot(2)
    assert said.startswith("shadow from step")
    assert [tool.kind for tool in after.shadows] == ["rubric"] and not [t for t in after.tools if t.kind == "rubric"]
    assert any(is_judged(asked) for asked in server.requests)
    acquirer.begin_step(2, after)
    assert acquirer._task.done(), "nothing more is begun for it"


def test_plan_and_build_say_that_a_rubric_would_be_written_and_what_it_costs(tmp_path: Path) -> None:
    queries, _ = files_of(tmp_path)
    with LlmServer([author_and_judge(GOOD)]) as server:
        given = [
            "sandbox.backend=none",
            f"agents.url={server.url}",
            "agents.model=scripted",
            "rubrics.exam_tokens=5000",
        ]
        options = [part for one in given for part in ("--set", one)]
        planned = CliRunner().invoke(app, ["plan", str(queries), "--json", *options])
        built = CliRunner().invoke(app, ["build", str(queries), "--in", str(tmp_path / "run"), "--dry-run", *options])
    assert not server.requests and built.exit_code == 1
    (uncovered,) = [one for one in map(json.loads, planned.stdout.splitlines()) if one["type"] == "uncovered"]
    each = f"about {judging_tokens():,} for each scored response"
    assert "if none passes, scripted writes a rubric" in uncovered["remedy"] and each in uncovered["remedy"]
    said = " ".join(built.stdout.split())
    assert "In all at most: 805,000 tokens" in said and "A rubric then takes about" in said


def test_the_estimate_of_what_a_rubric_takes_is_near_what_one_took(tmp_path: Path) -> None:
    """778 tokens for each scored response, in the recording of a rubric for short answers; 838 calls."""
    assert 0.8 * 778 < judging_tokens() < 1.25 * 778
