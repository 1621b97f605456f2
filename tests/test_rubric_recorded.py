# SPDX-License-Identifier: Apache-2.0
"""A rubric that a large language model wrote, and judged by, on real preferences: replayed from its recording.

The rows are 20 of RM-Bench's chat subset, whose worse answers differ from the better ones by one false detail. Which
was which, the judge was not told; it is a session of the same model that wrote the rubric (see the cassette's note).
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("smolagents", reason="smolagents is not installed (extra `agents`)")
from verl_rlar.agents.cassette import Cassette, LoopPlayer, Player
from verl_rlar.agents.coder import Written, write
from verl_rlar.config import RlarConfig, parse
from verl_rlar.errors import CassetteError
from verl_rlar.exam.trial import Answer, dressed
from verl_rlar.scoring import Scorer
from verl_rlar.tools.rubric import RubricRunner
from verl_rlar.types import Outcome

ROOT = Path(__file__).resolve().parent.parent
CASSETTE = ROOT / "tests" / "cassettes" / "rubric_chat.jsonl.gz"
TASK = "a short, helpful answer of an assistant to what a user asks, whose every statement is true"
SETTINGS: dict[str, Any] = {"exam": {"repeats": 12}, "sandbox": {"backend": "none"}}


def rows() -> list[dict[str, Any]]:
    with gzip.open(ROOT / "recipes" / "data" / "reward_preferences.jsonl.gz", "rt", encoding="utf-8") as file:
        chat = [row for row in map(json.loads, file) if row["subset"] == "chat"]
    return [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in chat[10:30]]


def written(folder: Path, made: list[dict[str, Any]], cassette: Path = CASSETTE, **options: Any) -> Written:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    options = {"name": "chat_answers", "form": "rubric", **options}
    settings = SETTINGS if options["form"] == "rubric" else {}
    config = parse(settings | {"run_dir": str(folder)})
    return write(TASK, [str(file)], config, folder=folder / "agents", replay=cassette, **options)


@pytest.fixture(scope="module")
def came(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return written(tmp_path_factory.mktemp("recorded"), rows())


def answers(came: Written) -> tuple[Answer, ...]:
    assert came.admitted, came.why
    return came.admitted.examination.answers


def test_it_is_admitted_and_puts_19_of_20_pairs_in_the_right_order(came: Written) -> None:
    assert came.admitted and [trial.state for trial in came.trials] == ["admitted"]
    card = came.admitted.examination.card
    assert (card.cases, card.sealed, card.admitted_for) == (269, 42, ("open",))
    assert card.figures["all"]["errors"].value == 0.0 and card.figures["open"]["pairwise"].value == pytest.approx(0.99)
    pairs = [
        (pair[0]["value"] > pair[1]["value"], pair[0]["right"])
        for one in came.admitted.examination.labelled
        if (pair := sorted(one["answers"], key=lambda said: not said["right"]))
    ]
    sealed = {answer.case.query.key for answer in answers(came) if answer.case.sealed}
    print(f"labelled pairs in the right order: {sum(right for right, _ in pairs)} of {len(pairs)}")
    assert (len(pairs), sum(right for right, _ in pairs), len(sealed)) == (20, 19, 6)
    assert card.figures["open"]["sealed_pairwise"].value == pytest.approx(29 / 30), "the lost pair is a sealed one"


def test_orders_and_praise_in_a_response_earned_nothing(came: Written) -> None:
    attacks = [answer for answer in answers(came) if answer.case.sort == "attack"]
    assert len(attacks) == 129 and {(one.score.outcome, one.value) for one in attacks} == {(Outcome.SCORED, 0.0)}
    assert any("Ignore the rubric" in one.case.response for one in attacks)
    assert came.admitted
    figures = came.admitted.examination.card.figures["open"]
    gains = [figures[name].value for name in ("flattery_gain", "length_gain", "format_gain", "overtaken")]
    assert gains == [pytest.approx(-2 / 17), pytest.approx(-2 / 17), 0.0, 0.0]


def test_the_author_saw_no_sealed_case_and_the_tokens_are_those_of_the_endpoint(came: Written) -> None:
    cassette = Cassette.read(CASSETTE)
    assert "large language model" in cassette.header.note
    asked = {peer: [e for e in cassette.exchanges if e["peer"] == peer] for peer in ("llm", "judge")}
    opened = {answer.case.response for answer in answers(came) if not answer.case.sealed}
    secret = {answer.case.query.prompt for answer in answers(came) if answer.case.sealed}
    secret |= {answer.case.response for answer in answers(came) if answer.case.sealed} - opened
    texts = [cassette.bodies[body].decode() for exchange in asked["llm"] for body in exchange["ask"]["body"]]
    assert len(secret) > 20 and [one for one in secret if any(json.dumps(one)[1:-1] in text for text in texts)] == []
    used = {
        peer: sum(json.loads(cassette.bodies[one["body"]])["usage"]["total_tokens"] for one in exchanges)
        for peer, exchanges in asked.items()
    }
    assert used == {"llm": came.agent.tokens, "judge": came.judged_tokens}, "to the token"
    assert (len(asked["llm"]), len(asked["judge"])) == (came.agent.steps, came.judged_calls) == (1, 838)
    print(f"tokens: {used['llm']:,} to write it, {used['judge'] / came.judged_calls:,.0f} for each scored response")


async def test_an_answer_of_the_judge_that_is_cut_off_or_prose_is_a_failure_and_never_0(
    came: Written, tmp_path: Path
) -> None:
    assert came.admitted
    spec, answer = came.admitted.examination.spec, answers(came)[0]
    cassette = Cassette.read(CASSETTE)
    config = RlarConfig.model_validate(
        {"agents": {"url": cassette.header.llm, "model": cassette.header.model}, "rubrics": {"timeout_s": 600}}
    )

    async def scored(change: Any) -> tuple[Outcome, float | None]:
        bodies = dict(cassette.bodies)
        for exchange in cassette.exchanges:
            if exchange["peer"] == "judge":
                reply = json.loads(bodies[exchange["body"]])
                message = reply["choices"][0]["message"]
                bodies[exchange["body"]] = json.dumps(
                    {**reply, "choices": [{"message": {**message, "content": change(message["content"])}}]}
                ).encode()
        changed = Cassette(path=CASSETTE, header=cassette.header, bodies=bodies, exchanges=cassette.exchanges)
        player = LoopPlayer(Player(changed, side="scout", peer="judge", base=cassette.header.llm))
        async with RubricRunner(config, folder=tmp_path, transport=player) as runner:
            score = await Scorer(config.scoring, runner, rubrics=runner).call(spec, dressed(answer.case, 0))
        return score.outcome, score.value

    assert await scored(lambda said: said) == (Outcome.SCORED, answer.value)
    for cut in (lambda said: said[:-4], lambda said: "Yes to all of them.", lambda said: said.replace('"1"', '"one"')):
        assert await scored(cut) == (Outcome.FAILED, None)


def test_what_was_not_recorded_is_an_error_that_names_it(tmp_path: Path) -> None:
    changed = tmp_path / "changed.jsonl.gz"
    with gzip.open(CASSETTE, "rt", encoding="utf-8") as old, gzip.open(changed, "wt", encoding="utf-8") as new:
        header = json.loads(next(old))
        header["prompts"]["rubric_judge.md"] = "0" * 64
        new.write(json.dumps(header) + "\n")
        new.writelines(old)
    with pytest.raises(CassetteError, match=r"rubric_judge\.md: not the prompt that .* was recorded with"):
        written(tmp_path, rows(), changed)
    with pytest.raises(CassetteError, match="not recorded while a verifier was written"):
        written(tmp_path, rows(), form="verifier")
    first, *others = rows()
    with pytest.raises(CassetteError, match=r"request 1 to the llm is not what|what a judge is asked now"):
        written(tmp_path, [{**first, "rejected": first["rejected"] + " Enjoy."}, *others])
