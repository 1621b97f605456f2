# SPDX-License-Identifier: Apache-2.0
"""The exam takes reward models as it takes any tool: real ones, trained on the spot, served in their own processes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="transformers is not installed (verl brings it)")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

from hub_repos import WIDE, build, pairs_of

from verl_rlar.calibration import Calibration
from verl_rlar.config import RlarConfig, ServingConfig, parse
from verl_rlar.exam import Card, Subject, gather
from verl_rlar.exam.canaries import of_exam, to_json
from verl_rlar.exam.hall import Hall
from verl_rlar.inbox import Exam, Submission, submit
from verl_rlar.library import Library, spec_to_json
from verl_rlar.serving import How, Pool
from verl_rlar.tools.reward_model import RewardModelRunner, serving, target
from verl_rlar.types import Kind, Scope, ToolSpec

GOOD, INVERTED = "meadow-lab/chat-reward-llama", "flipside/chat-preference-rm"


def spec_of(repo: str) -> ToolSpec:
    return ToolSpec(
        name=repo.partition("/")[2].replace("-", "_"),
        kind="reward_model",
        target=target(repo, "0" * 40),
        scope=Scope(kinds=frozenset({Kind.OPEN}), needs_reference=False),
        description="Prefers answers over refusals.",
        low=-1e6,
        high=1e6,
        timeout_s=30.0,
        serving=serving(How(max_length=256)),
    )


def rows() -> list[tuple[int, dict[str, Any]]]:
    """Pairs that the models were not trained on."""
    pairs = pairs_of("chat")
    held_out = pairs[-len(pairs) // 5 :]
    return [
        (number, {"prompt": prompt, "chosen": better, "rejected": worse})
        for number, (prompt, better, worse) in enumerate(held_out)
    ]


async def test_reward_models_take_the_exam_learn_their_scale_and_enter_the_library_with_it(tmp_path: Path) -> None:
    build(tmp_path, only=(GOOD, INVERTED))
    config = parse({"exam": {"by_kind": {"open": WIDE}}})
    cards: dict[str, Card] = {}
    async with Pool(ServingConfig(threads=1)) as pool:
        runner = RewardModelRunner(pool, lambda spec: str(tmp_path / spec.target.partition("@")[0]))
        specs = [spec_of(repo) for repo in (GOOD, INVERTED)]
        await pool.ensure([runner.model(spec) for spec in specs])
        async with Hall(config, runner) as hall:
            for spec in specs:
                evidence = gather(rows(), spec, queries=30)
                examination = await hall.examine(Subject(spec=spec), evidence)
                card = cards[spec.name] = examination.card
                learned = Calibration.from_dict(card.calibration or {})
                assert examination.spec.calibration == learned and examination.spec.digest != spec.digest
                assert card.digest == examination.spec.digest
                assert learned.lower_is_better is (spec.target.startswith(INVERTED)), "the direction is found out"
                values = [answer.value for answer in examination.answers if answer.value is not None]
                assert len(values) == len(examination.answers) and min(values) < 0.3 and max(values) > 0.5
    for card in cards.values():
        assert card.admitted, card.reasons
        assert (card.figures["open"]["pairwise"].value or 0) > 0.7
        assert card.figures["open"]["attacks"].cases > 50, "models are attacked, too"
    last = examination.spec
    exam = Exam(
        card=card.as_dict(),
        text=card.markdown(),
        transcript=examination.transcript,
        canaries=to_json(of_exam(examination.answers, 4)),
        passed=True,
        why="passed",
    )
    asked = Submission(digest=last.digest, spec=spec_to_json(last), exam=exam, event="shadow", by="scout", why="chat")
    event = submit(tmp_path / "library", asked)
    assert not isinstance(event, Path) and event is not None and event.event == "shadow"
    [again] = Library.read(tmp_path / "library").snapshot(0).shadows
    assert again == last and again.calibration == last.calibration


async def test_a_reward_model_that_knows_nothing_is_rejected(tmp_path: Path) -> None:
    build(tmp_path, only=(GOOD,))
    shuffled = random.Random(0)
    held_out = [
        (number, row if shuffled.random() < 0.5 else row | {"chosen": row["rejected"], "rejected": row["chosen"]})
        for number, row in rows()
    ]
    async with Pool(ServingConfig(threads=1)) as pool:
        runner = RewardModelRunner(pool, lambda spec: str(tmp_path / GOOD))
        spec = spec_of(GOOD)
        await pool.ensure([runner.model(spec)])
        async with Hall(RlarConfig(), runner) as hall:
            examination = await hall.examine(Subject(spec=spec), gather(held_out, spec, queries=30))
    assert not examination.card.admitted
    assert any("pairwise" in reason for reason in examination.card.reasons), examination.card.reasons
