# SPDX-License-Identifier: Apache-2.0
"""How a model wants to be asked is found out by evidence: template, output, sign. No evidence is said to be none."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from verl_rlar.errors import ToolError, ToolTimeout
from verl_rlar.serving import PAIRS, Conversation, How, Pool, Probed, Scored, probe

GOOD = {pair.good for pair in PAIRS}


class Planted:
    """A model that tells good answers from bad ones only if it is asked in the right way."""

    def __init__(self, right: How, columns: int = 1, refuses: str = "", knows: float = 1.0) -> None:
        self.right = right
        self.columns = columns
        self.refuses = refuses
        self.asked = 0
        self._random = random.Random(0)
        self._known = {pair.good for pair in PAIRS if self._random.random() < knows}

    async def ask(self, how: How, conversations: Sequence[Conversation]) -> list[Scored]:
        if how.form == self.refuses:
            raise ToolError(f"no {how.form} here")
        self.asked += len(conversations)
        asked_right = replace(how, head=0, against=None, sign=1) == replace(self.right, head=0, against=None, sign=1)
        scored = []
        for conversation in conversations:
            row = [self._random.gauss(0, 1) for _ in range(self.columns)]
            if asked_right and (conversation[-1].content in self._known or conversation[-1].content not in GOOD):
                quality = 3.0 if conversation[-1].content in GOOD else -3.0
                row[self.right.head] = self.right.sign * quality
                if self.right.against is not None:
                    row[self.right.against] = -self.right.sign * quality
            scored.append(Scored(value=0.0, rows=(tuple(row),)))
        return scored


@pytest.mark.parametrize(
    ("right", "columns"),
    [
        (How(), 1),
        (How(sign=-1), 1),
        (How(form="plain"), 1),
        (How(form="pair"), 1),
        (How(form="pair", sign=-1), 1),
        (How(system=""), 1),
        (How(eos=True), 1),
        (How(form="plain", eos=False, sign=-1), 1),
        (How(head=3), 5),
        (How(head=1, sign=-1), 3),
    ],
)
async def test_the_right_way_is_found(right: How, columns: int) -> None:
    model = Planted(right, columns)
    found = await probe(model.ask)
    assert found.sure and found.how == right, found.reason
    assert found.tried[0].accuracy == 1.0


async def test_of_two_labels_the_log_odds_are_a_way() -> None:
    right = How(head=1, against=0)
    found = await probe(Planted(right, 2).ask, default=right)
    assert found.how == right and found.sure


async def test_the_models_own_way_stays_where_no_other_is_clearly_better() -> None:
    class Blind(Planted):
        async def ask(self, how: How, conversations: Sequence[Conversation]) -> list[Scored]:
            return await super().ask(replace(self.right, head=0), conversations)  # the template does not matter to it

    found = await probe(Blind(How(), knows=0.9).ask, default=How(form="plain"))
    assert found.how == How(form="plain") and found.sure
    assert "no other clearly more" in found.reason


async def test_a_model_that_knows_nothing_is_said_to_know_nothing() -> None:
    for seed in range(20):
        model = Planted(How(form="chat", max_length=9))  # a way that is never tried
        model._random.seed(seed)
        found = await probe(model.ask)
        assert not found.sure and found.how == How()
        assert "no way ranks the pairs better than chance" in found.reason


async def test_a_way_that_the_model_refuses_is_evidence_and_no_error() -> None:
    found = await probe(Planted(How(form="plain"), refuses="chat").ask)
    assert found.how == How(form="plain") and "cannot be asked" in found.reason
    assert {one.error for one in found.tried if one.how.form == "chat"} == {"no chat here"}
    assert found.to_json()["tried"][0]["accuracy"] == 1.0

    async def refuse(how: How, conversations: Sequence[Conversation]) -> list[Scored]:
        raise ToolError("never")

    with pytest.raises(ToolError, match="in any way; the first refusal: never"):
        await probe(refuse)


async def test_a_server_that_is_late_is_no_evidence() -> None:
    async def late(how: How, conversations: Sequence[Conversation]) -> list[Scored]:
        raise ToolTimeout("late")

    with pytest.raises(ToolTimeout):
        await probe(late)


def test_the_pairs_cannot_be_told_by_their_length() -> None:
    longer = sum(len(pair.good) > len(pair.bad) for pair in PAIRS)
    assert 0.4 < longer / len(PAIRS) < 0.6
    assert len({pair.prompt for pair in PAIRS}) == len(PAIRS) >= 40


@pytest.mark.slow
async def test_real_models_are_found_out_through_a_real_server(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed (extra `cpu`)")
    import torch
    from tiny_rewards import build, served, talk, train
    from transformers import AutoModelForSequenceClassification

    from verl_rlar.config import ServingConfig

    plain = How(form="plain", max_length=256)
    chat = replace(plain, form="chat")
    good = build(tmp_path, seed=1)
    train(
        good,
        [
            (chat, talk(text, pair.prompt), target)
            for pair in PAIRS
            for text, target in ((pair.good, 1.0), (pair.bad, -1.0))
        ],
        steps=150,
    )
    inverted = tmp_path / "inverted"
    model = AutoModelForSequenceClassification.from_pretrained(good)
    with torch.no_grad():
        model.score.weight *= -1
    model.save_pretrained(inverted)
    for file in good.glob("token*"):
        (inverted / file.name).write_bytes(file.read_bytes())
    (inverted / "chat_template.jinja").write_bytes((good / "chat_template.jinja").read_bytes())
    random_one = build(tmp_path, seed=2)
    async with Pool(ServingConfig(threads=1)) as pool:
        await pool.ensure([served(good), served(inverted), served(random_one)])

        async def of(path: Path) -> Probed:
            return await probe(
                lambda how, texts: pool.score(served(path, how), texts, 120), default=How(max_length=256)
            )

        right, wrong, unknown = [await of(path) for path in (good, inverted, random_one)]
    assert right.sure and (right.how.form, right.how.sign) == ("chat", 1), right.reason
    assert wrong.sure and (wrong.how.form, wrong.how.sign) == ("chat", -1), wrong.reason
    assert not unknown.sure, unknown.reason
