# SPDX-License-Identifier: Apache-2.0
"""Exams that are taken again while a training runs, of every kind of tool: what takes a tool out, and what must not."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import planted_tools
import pytest
import rubrics
from conftest import make_sandbox_config
from hub_repos import WIDE
from llm_server import LlmServer

from verl_rlar.calibration import fit
from verl_rlar.config import HubConfig, RlarConfig, parse
from verl_rlar.exam.card import Card, Figure
from verl_rlar.exam.evidence import Evidence
from verl_rlar.exam.subject import find, verifier
from verl_rlar.inbox import take_in
from verl_rlar.library import FOLDER_NAME, Library, LibraryView
from verl_rlar.reexam import Reexaminer, _says_nothing
from verl_rlar.serving import How
from verl_rlar.snapshots import read_folder
from verl_rlar.tools.reward_model import serving, target
from verl_rlar.tools.rubric import Rubric
from verl_rlar.trusted import trusted_tools
from verl_rlar.types import Kind, Scope, ToolSpec


def sums(count: int = 40) -> list[dict[str, Any]]:
    """Questions with a number as the reference, and a right and a wrong answer to each."""
    return [
        {
            "prompt": f"What is {n} + {n}?",
            "reference": str(2 * n),
            "response": f"{2 * n + wrong}",
            "is_correct": not wrong,
        }
        for n in range(3, 3 + count)
        for wrong in (0, 1)
    ]


def settings(folder: Path, rows: Iterable[Mapping[str, Any]], **more: Any) -> RlarConfig:
    folder.mkdir(exist_ok=True)
    file = folder / "labelled.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    tree: dict[str, Any] = {
        "run_dir": str(folder),
        "acquire": {"labelled": [str(file)], "wall_s": 240},
        "exam": {"max_queries": 20, "repeats": 10},
        "sandbox": {"backend": "none"},
        **more,
    }
    return parse(tree)


def put_live(folder: Path, spec: ToolSpec, source: str | None = None, **card: Any) -> None:
    """As after an exam that it passed."""
    with Library(folder / FOLDER_NAME) as library:
        if spec.kind == "rule":
            library.begin(trusted_tools(parse({"tools": [spec.target], "sandbox": {"backend": "none"}})), "run")
        else:
            library.propose(spec, source, by="tester", why="test")
            library.put_exam(spec.digest, card=card, text="", transcript=[], passed=True, by="tester", why="test")
            library.append("live", spec.digest, by="tester", why="test", step=0)


async def again(folder: Path, config: RlarConfig, digest: str, caplog: pytest.LogCaptureFixture) -> str:
    """Has a tool examined again; what is said of it. What was handed in is taken in."""
    caplog.set_level(logging.WARNING, "verl_rlar.reexam")
    reexaminer = Reexaminer(config, folder / FOLDER_NAME)
    reexaminer.ask(digest, "it was flat")
    reexaminer.begin_step(1)
    await asyncio.wait_for(reexaminer.settled(), 280)
    with Library(folder / FOLDER_NAME) as library:
        assert all(said != "refused" for _, said in take_in(library))
    return caplog.messages[-1]


def state(folder: Path, digest: str) -> tuple[bool, dict[str, Any]]:
    """Whether a tool is live, and its card."""
    view = LibraryView(folder / FOLDER_NAME)
    return any(tool.digest == digest for tool in view.latest().tools), dict(view.card(digest) or {})


@pytest.mark.parametrize(
    ("name", "rows", "said"),
    [
        ("always_one", sums(4), "too few labelled answers of its kinds"),
        ("always_one", sums(), "does not pass any more: "),
    ],
)
async def test_only_enough_answers_that_can_be_trusted_take_a_tool_out(
    name: str, rows: list[dict[str, Any]], said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = find(f"planted_tools:{name}").spec
    put_live(tmp_path, spec)
    assert said in await again(tmp_path, settings(tmp_path, rows), spec.digest, caplog)
    live, card = state(tmp_path, spec.digest)
    assert live is ("any more" not in said) and bool(card) is not live


@pytest.mark.parametrize(
    ("calls", "stopped", "untrusted", "said"),
    [
        ({"errors": Figure(value=0.0, limit=0.01, least=False)}, "", 3, ""),
        ({"errors": Figure(value=0.0, limit=0.01, least=False)}, "", 6, "the gold of 6 of 10 labelled rows"),
        ({"errors": Figure(value=0.02, limit=0.01, least=False)}, "", 0, "2.0% of its calls failed"),
        ({"errors": Figure(value=0.001, limit=0.01, least=False)}, "", 0, ""),
        ({"timeouts": Figure(value=1.0)}, "", 0, "0.1% of its calls failed"),
        ({}, "5 calls were still at work", 0, "5 calls were still at work"),
    ],
)
def test_what_is_no_fault_of_the_tool_is_no_verdict(
    calls: dict[str, Figure], stopped: str, untrusted: int, said: str
) -> None:
    few = {"errors": Figure(value=0.001, limit=0.01, least=False), "timeouts": Figure(value=0.0)}
    card = Card(
        tool="t",
        digest="d",
        kind="rule",
        verdict="rejected",
        reasons=("math: pairwise is 0.5",),
        figures={"all": few | calls, "math": {}},
        stopped=stopped,
    )
    evidence = Evidence(rows=12, other_rows=2, set_apart=(("row 1", "why"),) * untrusted)
    assert _says_nothing(card, evidence, 0.5).startswith(said) and bool(_says_nothing(card, evidence, 0.5)) is bool(
        said
    )
    assert not _says_nothing(replace(card, verdict="admitted"), evidence, 0.5)


@pytest.mark.docker
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("box_image")
async def test_verifiers_are_examined_again_in_boxes_and_keep_what_they_passed_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    boxes = make_sandbox_config().model_dump(mode="json")
    for name, verdict in (("box_good", "passed again on "), ("box_always_one", "does not pass any more: ")):
        source = next(one.source for one in planted_tools.VERIFIERS if one.name == name)
        source += 'KINDS = ("math", "short_text")\n'
        spec = verifier(source, name=name).spec
        put_live(tmp_path / name, spec, source, unproven=[])
        config = settings(tmp_path / name, sums(20), sandbox=boxes)
        assert verdict in await again(tmp_path / name, config, spec.digest, caplog)
        live, card = state(tmp_path / name, spec.digest)
        assert live is (name == "box_good")
        if live:
            assert card == {"unproven": []}, "there were no short texts to be tried on"
        else:
            assert card["reasons"]


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_reward_models_are_examined_again_with_the_scale_that_they_have(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed (verl brings it)")
    from hub_repos import build, encode, pairs_of
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    repo = "meadow-lab/chat-reward-llama"
    build(tmp_path, only=(repo,))
    held_out = pairs_of("chat")
    held_out = held_out[-len(held_out) // 5 :][:30]
    rows = [{"prompt": prompt, "chosen": better, "rejected": worse} for prompt, better, worse in held_out]
    model = read_folder(tmp_path / repo, HubConfig())
    reader = AutoTokenizer.from_pretrained(tmp_path / repo)
    judge = AutoModelForSequenceClassification.from_pretrained(tmp_path / repo)
    scores: list[tuple[float, bool]] = []
    for answer, right in (("chosen", True), ("rejected", False)):
        asked = encode(reader, [row["prompt"] for row in rows], [row[answer] for row in rows])
        scores += [(raw, right) for raw in judge(**asked).logits[:, 0].tolist()]
    spec = ToolSpec(
        name="chat_reward",
        kind="reward_model",
        target=target(str(tmp_path / repo), model.facts.commit),
        scope=Scope(kinds=frozenset({Kind.OPEN}), needs_reference=False),
        description="Prefers answers over refusals.",
        low=-1e6,
        high=1e6,
        timeout_s=60.0,
        serving=serving(How(max_length=256)),
        calibration=fit(scores),
    )
    put_live(tmp_path, spec)
    exam = {"max_queries": 20, "repeats": 5, "by_kind": {"open": WIDE}}
    config = settings(tmp_path, rows, exam=exam, serving={"threads": 1})
    assert "passed again on " in await again(tmp_path, config, spec.digest, caplog)
    live, card = state(tmp_path, spec.digest)
    assert live and card["admitted_for"] == ["open"] and card["digest"] == spec.digest
    turned = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    assert "does not pass any more: " in await again(
        tmp_path, settings(tmp_path, turned, exam=exam, serving={"threads": 1}), spec.digest, caplog
    )
    live, card = state(tmp_path, spec.digest)
    assert not live and any("pairwise" in reason for reason in card["reasons"])


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_rubrics_are_examined_again_with_the_key_of_their_judge(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLAR_LLM_API_KEY", "a key of some length")
    spec = Rubric.from_text(json.dumps(rubrics.GOOD)).spec(
        name="cooking", kinds={Kind.OPEN}, model="scripted", timeout_s=20.0, origin="test"
    )
    put_live(tmp_path, spec)
    with LlmServer([rubrics.honest]) as server:
        agents = {"url": server.url, "model": "scripted", "retries": 0}
        config = settings(tmp_path, rubrics.rows(), agents=agents)
        assert "passed again on " in await again(tmp_path, config, spec.digest, caplog)
        assert server.headers and {one["authorization"] for one in server.headers} == {"Bearer a key of some length"}
