# SPDX-License-Identifier: Apache-2.0
"""A run is scored again from its ledger: the same version says the same, another one shows what it would change."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
import shutil
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import planted
import pytest
from conftest import make_query, make_sample, make_sandbox_config
from test_ledger import make_row
from typer.testing import CliRunner, Result

from verl_rlar.cli import app
from verl_rlar.config import RlarConfig, ScoringConfig, parse
from verl_rlar.errors import ConfigError, ToolError
from verl_rlar.exam.subject import Subject, verifier
from verl_rlar.ledger import FILE_NAME, Ledger, Row, read
from verl_rlar.library import FOLDER_NAME, Library
from verl_rlar.replay import (
    LAST,
    Bench,
    Rescored,
    StepReplay,
    Tally,
    advantages,
    compared,
    diff_run,
    find_tool,
    kendall,
    numbers,
    parse_steps,
    pearson,
    rescore,
    responses,
    run_folder,
)
from verl_rlar.router import FeatureRouter
from verl_rlar.scoring import Scorer
from verl_rlar.tools.boxed import BoxRunner
from verl_rlar.tools.rule import load_version
from verl_rlar.trusted import trusted_tools
from verl_rlar.types import Outcome, Query, RoutePart, Sample, Score, ToolSpec, Verdict

SHORT = "In which city is the Louvre?"
MATH = "What is 6 times 7?"
FAST = ("--set", "sandbox.backend=none", "--set", "rules.processes=1")


class InThisProcess:
    """Runs rules here, which is quicker; a response that begins with ``!`` and the name of a rule makes it fail."""

    async def run(self, spec: ToolSpec, sample: Sample) -> Verdict:
        if sample.response.startswith(f"!{spec.name}"):
            raise ToolError(f"{spec.name}: the server was down")
        return load_version(spec)(sample)


def settings(folder: Path, **tree: Any) -> RlarConfig:
    return parse({"run_dir": str(folder / "rlar"), "sandbox": {"backend": "none"}, **tree})


def louvre() -> Query:
    return make_query(SHORT, "Paris")


def group(answers: Iterable[str], *, step: int, uid: str, query: Query | None = None, **fields: Any) -> list[Sample]:
    answers = list(answers)
    shared: dict[str, Any] = {"step": step, "uid": uid, "group_size": len(answers), **fields}
    return [make_sample(text, query or louvre(), session=n, **shared) for n, text in enumerate(answers)]


def record(
    config: RlarConfig,
    samples: Iterable[Sample],
    *,
    token: str = "first",
    store_texts: bool = True,
    verifiers: Iterable[Subject] = (),
) -> None:
    """A run with these responses: a real library and a real ledger, scored as in training."""
    folder = Path(config.run_dir)
    with Library(folder / FOLDER_NAME) as library:
        library.begin(trusted_tools(config), token)
        for tool in verifiers:
            library.propose(tool.spec, tool.source, by="coder", why="math")
            library.put_exam(tool.spec.digest, card={}, text="", transcript=[], passed=True, by="exam", why="passed")
            library.append("live", tool.spec.digest, by="exam", why="passed", step=0)
        snapshot = library.snapshot(0)

    async def score_all() -> list[Row]:
        sources = {tool.spec.source_sha256: tool.source for tool in verifiers}
        rows = []
        async with BoxRunner(config.sandbox, sources) as boxes:
            scorer = Scorer(config.scoring, InThisProcess(), boxes)
            for sample in samples:
                route = await FeatureRouter(config.routing).route(sample.query, snapshot)
                score = await scorer.score(sample, route, snapshot)
                sent = 0.5 if score.value is None else score.value
                rows.append(
                    Row(sample=sample, route=route, score=score, sent=sent, sent_as="value", received=1.0, seconds=0.1)
                )
        return rows

    rows = asyncio.run(score_all())
    with Ledger(folder / FILE_NAME, token=token, store_texts=store_texts) as ledger:
        ledger.add_tools(snapshot)
        for row in rows:
            ledger.add_route(row.sample.query, row.route, row.sample.split)
        ledger.add(rows)


def rlar(*args: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [*args])
    assert result.exit_code == code, result.output + result.stderr
    return result


def records(*args: str, code: int = 0) -> dict[str, list[dict[str, Any]]]:
    """The objects that a command prints, by type."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in rlar(*args, "--json", *FAST, code=code).stdout.splitlines():
        one = json.loads(line)
        found.setdefault(one.pop("type"), []).append(one)
    return found


def rescored(run: Path, tool: str, *args: str, code: int = 0) -> dict[str, list[dict[str, Any]]]:
    return records("rescore", str(run), "--tool", tool, *args, code=code)


modules = (f"replay_rules_{number}" for number in itertools.count())
Write = Callable[..., str]


@pytest.fixture
def write_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Makes a rule in a module of its own, which worker processes can import, and gives its target."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(name: str, expression: str, kinds: str = "SHORT_TEXT", options: str = "") -> str:
        module = next(modules)
        source = f'''
        from pathlib import Path
        from verl_rlar.tools.rule import rule
        from verl_rlar.types import Kind, Sample, Verdict

        @rule(name="{name}", kinds={{Kind.{kinds}}}, description="For a test.", {options})
        def score(sample: Sample) -> Verdict:
            response, reference = sample.response, sample.query.reference
            return Verdict(value={expression}, reason="as written")
        '''
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(source))
        return f"{module}:score"

    return write


ANSWERS = ("Paris", "paris", "Rome", "Paris")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two steps of a run with a rule of the user's on short texts, and `final_answer` on math."""
    config = settings(tmp_path, tools=["planted:same"], routing={"prefer": {"short_text": "same"}})
    samples = []
    for step in (1, 2):
        samples += group(ANSWERS, step=step, uid=f"short {step}")
        math_answers = ("The answer is 42.", "It is 41.", "42", "none")
        samples += group(math_answers, step=step, uid=f"math {step}", query=make_query(MATH, "42"))
    record(config, samples)
    return tmp_path


# --- Re-scoring -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tool", "answers"), [("final_answer", 8), ("planted:same", 8)])
def test_the_version_that_scored_says_the_same_again(run: Path, tool: str, answers: int) -> None:
    before = (run / "rlar" / FILE_NAME).read_bytes()
    found = rescored(run, tool)
    [summary] = found["summary"]
    assert (summary["in_place"], summary["alone"], summary["kept"]) == (answers, 0, 8)
    assert (summary["reproducible"], summary["not_reproducible"], summary["changed"]) == (answers, 0, 0.0)
    assert (summary["flipped"], summary["mean_advantage_change"]) == (0.0, 0.0)
    assert math.isclose(summary["advantage_correlation"], 1.0)
    assert (run / "rlar" / FILE_NAME).read_bytes() == before
    assert "8 of 8 scores of this very version are the same again" in rlar("rescore", str(run), "--tool", tool).stdout


def test_a_changed_version_shows_what_it_would_have_changed(run: Path, write_rule: Write) -> None:
    lenient = write_rule("same", "float(response.lower() == reference.lower())")
    found = rescored(run, lenient, "--steps", "2")
    asked = [one for one in found["response"] if one["how"] == "in_place"]
    assert [(one["old"]["value"], one["new"]["value"]) for one in asked] == [(1, 1), (0, 1), (0, 0), (1, 1)]
    assert {one["reproduced"] for one in asked} == {None}, "another version need not say the same"
    old, new = advantages([1, 0, 0, 1]), advantages([1, 1, 0, 1])
    assert [one["old"]["advantage"] for one in asked] == pytest.approx(old)
    assert [one["new"]["advantage"] for one in asked] == pytest.approx(new)
    [summary], [step] = found["summary"], found["step"]
    assert (summary["responses"], summary["rescored"], summary["changed"]) == (8, 4, 1 / 8)
    assert summary["new_mean"] - summary["old_mean"] == pytest.approx(1 / 8)
    assert (summary["groups"], summary["groups_reranked"], summary["flipped"]) == (2, 1, 1 / 8)
    change = sum(abs(a - b) for a, b in zip(old, new, strict=True)) / 8
    assert summary["mean_advantage_change"] == pytest.approx(change)
    assert summary["outcomes"] == {"scored -> scored": 4}
    assert {key: value for key, value in step.items() if key not in ("step", "attempt")}.items() <= summary.items()
    text = rlar("rescore", str(run), "--tool", lenient, "--steps", "2").stdout
    assert "4: same is not for math" in text
    assert "short 2, 1: 0 scored (compared) -> 1 scored (as written)" in text and "response 'paris'" in text


def test_a_tool_that_no_route_has_scores_alone_what_it_is_for(run: Path) -> None:
    found = rescored(run, "planted:half")
    assert {one["kind"]: one["how"] for one in found["response"]} == {"short_text": "alone", "math": "kept"}
    assert {one["new"]["value"] for one in found["response"] if one["how"] == "alone"} == {0.5}
    assert found["summary"][0]["alone"] == 8
    assert "8 instead of the route" in rlar("rescore", str(run), "--tool", "planted:half").stdout


def test_only_what_was_unscored_is_scored_again(tmp_path: Path) -> None:
    config = settings(tmp_path, tools=["planted:same"], routing={"prefer": {"short_text": "same"}})
    record(config, group(("Paris", "!same Paris", "Rome", "!same"), step=1, uid="g"))
    found = rescored(tmp_path, "planted:half", "--failed-only")
    assert [one["how"] for one in found["response"]] == ["kept", "alone", "kept", "alone"]
    old, new = ([one[side]["reward"] for one in found["response"]] for side in ("old", "new"))
    assert old == [1, 0.5, 0, 0.5], "an unscored response is the mean of its scored siblings"
    assert new == [1, 0.5, 0, 0.5]
    again = rescored(tmp_path, "planted:same")
    assert again["summary"][0]["outcomes"] == {"failed -> scored": 2, "scored -> scored": 2}
    assert again["summary"][0]["reproducible"] == 2, "a failure of then is no answer that could be said again"
    assert [one["new"]["reward"] for one in again["response"]] == [1, 0, 0, 0]


def test_what_verl_got_then_is_what_the_ledger_says(tmp_path: Path, write_rule: Write) -> None:
    """Not what today's settings would make of it: here `neutral` was 0, and a sibling came too late."""
    config = settings(tmp_path, tools=["planted:same"], routing={"prefer": {"short_text": "same"}})
    record(config, group(("Paris", "!same Paris"), step=1, uid="g"))
    with Ledger(tmp_path / "rlar" / FILE_NAME, token="first") as ledger, read(tmp_path / "rlar") as db:
        late = next(one for one in responses(db, 1, 1) if one.score.value is None)
        assert late.sample is not None and late.route is not None
        shared: dict[str, Any] = {"sent": 0.0, "sent_as": "neutral", "received": 1.0, "seconds": 0.1}
        ledger.add([Row(sample=late.sample, route=late.route, score=late.score, **shared)])
    found = rescored(tmp_path, "planted:same")
    assert [one["old"]["reward"] for one in found["response"]] == [1.0, 0.0]
    assert [one["old"]["advantage"] for one in found["response"]] == pytest.approx(advantages([1.0, 0.0]))
    assert found["summary"][0]["old_mean"] == 0.5


def test_a_tool_that_needs_a_reference_is_not_asked_without_one(tmp_path: Path, write_rule: Write) -> None:
    record(settings(tmp_path), group(ANSWERS, step=1, uid="g", query=make_query("Tell me a story.", "")))
    needs = write_rule("needs", "0.5", kinds="OPEN")
    [summary] = rescored(tmp_path, needs)["summary"]
    assert (summary["kept"], summary["rescored"]) == (4, 0)
    assert "needs is not for queries without a reference" in rlar("rescore", str(tmp_path), "--tool", needs).stdout
    without = write_rule("without", "0.5", kinds="OPEN", options="needs_reference=False")
    assert rescored(tmp_path, without)["summary"][0]["rescored"] == 4
    assert "4 responses of queries that not both are for" in rlar("diff", needs, without, "--run", str(tmp_path)).stdout


def test_a_tool_that_fails_now_is_no_score_and_an_exit_code(run: Path) -> None:
    found = rescored(run, "planted:crashing", "--steps", "1", code=1)
    [summary] = found["summary"]
    assert (summary["failed"], summary["outcomes"]) == (4, {"scored -> failed": 4})
    short = [one["new"] for one in found["response"] if one["kind"] == "short_text"]
    assert {(new["value"], new["advantage"]) for new in short} == {(None, 0.0)}
    assert "ZeroDivisionError" in short[0]["reason"]


def test_texts_that_were_never_stored_are_counted(tmp_path: Path) -> None:
    config = settings(tmp_path, tools=["planted:same"], routing={"prefer": {"short_text": "same"}})
    record(config, group(ANSWERS, step=1, uid="g"), store_texts=False)
    [summary] = rescored(tmp_path, "planted:same", code=1)["summary"]
    assert (summary["missing"], summary["failed"], summary["rescored"], summary["compared"]) == (4, 4, 0, 0)
    text = rlar("rescore", str(tmp_path), "--tool", "planted:same", code=1).stdout
    assert "4: its text is not in the ledger" in text


def test_a_group_of_which_a_text_was_trimmed_is_left_out(run: Path) -> None:
    with Ledger(run / "rlar" / FILE_NAME, token="first") as ledger:
        late = make_sample("Rome!", louvre(), step=1, uid="short 1", session=9)
        ledger.add([replace(make_row(), sample=late)])
        assert ledger.trim(before_step=2, max_bytes=1e12) == 1, "the other texts are those of step 2, too"
    found = rescored(run, "planted:half", code=1)
    [summary] = found["summary"]
    assert (summary["missing"], summary["groups_left_out"], summary["alone"]) == (1, 1, 8)
    assert [step["compared"] for step in found["step"]] == [4, 8]
    assert "1 groups with a response that cannot" in rlar("rescore", str(run), "--tool", "planted:half", code=1).stdout


def test_a_score_that_is_another_one_now_is_not_reproducible(tmp_path: Path, write_rule: Write) -> None:
    moody = write_rule("moody", f"float(Path({str(tmp_path / 'mark')!r}).exists() or response == 'Paris')")
    config = settings(tmp_path, tools=[moody], routing={"prefer": {"short_text": "moody"}})
    record(config, group(ANSWERS, step=1, uid="g"))
    assert rescored(tmp_path, moody)["summary"][0]["reproducible"] == 4
    (tmp_path / "mark").touch()
    found = rescored(tmp_path, moody, code=1)
    assert [one["reproduced"] for one in found["response"]] == [True, False, False, True]
    assert found["summary"][0]["not_reproducible"] == 2
    text = rlar("rescore", str(tmp_path), "--tool", moody, code=1).stdout
    assert "2 of 4 scores of this very version" in text and "not the same" in text


# --- Routes of several parts ------------------------------------------------------------------------------------------

GATED = {
    "routes": {
        "gated": {
            "kinds": ["short_text"],
            "parts": [
                {"tool": "gate", "gate": True, "threshold": 0.5},
                {"tool": "same", "weight": {0: 1.0, 10: 3.0}},
                {"tool": "half", "weight": 1.0},
            ],
        }
    }
}


def test_weights_by_step_hold_when_a_part_is_replaced(tmp_path: Path, write_rule: Write) -> None:
    gate = write_rule("gate", "float(response != 'Rome')")
    config = settings(tmp_path, tools=[gate, "planted:same", "planted:half"], routing=GATED)
    record(config, [*group(ANSWERS, step=0, uid="a"), *group(ANSWERS, step=5, uid="b")])
    found = rescored(tmp_path, write_rule("same", "float(response.lower() == reference.lower())"))
    step_0, step_5 = ([one for one in found["response"] if one["step"] == step] for step in (0, 5))
    assert [one["old"]["value"] for one in step_0] == [0.75, 0.25, 0.0, 0.75]
    assert [one["new"]["value"] for one in step_0] == [0.75, 0.75, 0.0, 0.75]
    assert [one["old"]["value"] for one in step_5] == pytest.approx([2.5 / 3, 0.5 / 3, 0.0, 2.5 / 3])
    assert [one["new"]["value"] for one in step_5] == pytest.approx([2.5 / 3, 2.5 / 3, 0.0, 2.5 / 3])
    assert [one["how"] for one in step_0] == ["in_place", "in_place", "not_asked", "in_place"]
    assert found["summary"][0]["not_asked"] == 2, "behind a shut gate nobody is asked"


def test_a_new_gate_shuts_and_opens_and_what_was_behind_it_is_asked_in_its_version(
    tmp_path: Path, write_rule: Write
) -> None:
    gate = write_rule("gate", "float(response != 'Rome')")
    config = settings(tmp_path, tools=[gate, "planted:same", "planted:half"], routing=GATED)
    record(config, group(ANSWERS, step=0, uid="a"))
    found = rescored(tmp_path, write_rule("gate", "float(response != 'Paris')"))
    assert [one["old"]["value"] for one in found["response"]] == [0.75, 0.25, 0.0, 0.75]
    assert [one["new"]["value"] for one in found["response"]] == [0.0, 0.25, 0.25, 0.0]
    assert found["response"][0]["new"]["reason"].startswith("gate gate")
    same = rescored(tmp_path, gate)["summary"][0]
    assert (same["reproducible"], same["changed"]) == (4, 0.0)


def test_a_part_that_failed_then_still_counts_for_the_whole(tmp_path: Path, write_rule: Write) -> None:
    gate = write_rule("gate", "1.0")
    config = settings(tmp_path, tools=[gate, "planted:same", "planted:half"], routing=GATED)
    record(config, group(("Paris", "!same"), step=0, uid="a"))
    found = rescored(tmp_path, gate)
    assert [one["new"]["outcome"] for one in found["response"]] == ["scored", "failed"]
    assert found["summary"][0]["reproducible"] == 2
    mended = rescored(tmp_path, "planted:same", "--failed-only")
    assert [(one["how"], one["new"]["value"]) for one in mended["response"]] == [("kept", 0.75), ("in_place", 0.25)]


def test_a_part_whose_version_is_nowhere_is_said(tmp_path: Path) -> None:
    row = make_row(uid="a", step=1)
    route = replace(row.route, parts=(*row.route.parts, RoutePart(tool="same", digest="f" * 16)))
    with Ledger(tmp_path / FILE_NAME, token="run") as ledger:
        ledger.add_route(row.sample.query, route)
        ledger.add([row])
    found = rescored(tmp_path, "planted:same", code=1)
    assert "exact_match (dddddddddddddddd) of its route is neither in the library nor" in found["response"][0]["why"]


# --- What verl makes of it --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [True, False])
def test_advantages_are_those_of_verl(norm: bool) -> None:
    torch = pytest.importorskip("torch", reason="verl is not installed (extra `cpu`)")
    algos = pytest.importorskip("verl.trainer.ppo.core_algos", reason="verl is not installed (extra `cpu`)")
    np = pytest.importorskip("numpy")
    rng = random.Random(0)
    groups = [[rng.choice([0.0, 0.25, rng.random(), 1.0]) for _ in range(size)] for size in (1, 2, 3, 8, 8, 16)]
    groups += [[0.1] * 7, [0.0, 0.0], [1.0]]
    uids = np.array([f"group {n}" for n, rewards in enumerate(groups) for _ in rewards], dtype=object)
    rewards = torch.tensor([reward for rewards in groups for reward in rewards], dtype=torch.float64).unsqueeze(-1)
    theirs, _ = algos.compute_grpo_outcome_advantage(
        rewards, torch.ones_like(rewards), uids, norm_adv_by_std_in_grpo=norm
    )
    ours = [value for rewards in groups for value in advantages(rewards, norm=norm)]
    assert ours == pytest.approx(theirs.squeeze(-1).tolist(), abs=1e-7), "a group of one goes through 32 bits"


def test_what_stands_in_for_unscored_responses_is_what_training_takes() -> None:
    siblings, neutral = ScoringConfig(), ScoringConfig(on_unscored="neutral", neutral=0.25)
    assert numbers([1.0, None, 0.5], siblings) == [1.0, 0.75, 0.5]
    assert numbers([1.0, None, 0.5], neutral) == [1.0, 0.25, 0.5]
    assert numbers([1.0, None, 0.5], siblings, "val") == [1.0, 0.5, 0.5]
    assert numbers([None, None], siblings) == [0.5, 0.5]


def answers(old: Iterable[float | None], new: Iterable[float | None], tmp_path: Path) -> StepReplay:
    """A group whose values were these."""
    with Ledger(tmp_path / FILE_NAME, token="run") as ledger:
        ledger.add([make_row(uid="g", session=n, value=value) for n, value in enumerate(old)])
    with read(tmp_path) as db:
        stored = responses(db, 0, 1)
    made = [
        Rescored(stored=one, how="alone", score=Score(value=value, outcome=Outcome.SCORED, reason=""))
        for one, value in zip(stored, new, strict=True)
    ]
    return StepReplay(step=0, attempt=1, responses=compared(made, ScoringConfig()))


def test_the_figures_are_counted_by_hand(tmp_path: Path) -> None:
    tally = Tally(1)
    tally.add(answers([1.0, 0.0, None, 0.5], [0.0, 1.0, 0.5, None], tmp_path))
    figures = tally.figures()
    assert (figures["old_mean"], figures["new_mean"], figures["changed"]) == (0.5, 0.5, 0.5)
    assert (figures["groups_reranked"], figures["flipped"]) == (1, 0.5)
    assert figures["advantage_correlation"] == pytest.approx(-1.0)
    assert [one.stored.session for one in tally.changes] == [0]


def test_a_group_with_nothing_scored_has_no_gradient(tmp_path: Path) -> None:
    step = answers([None, None], [1.0, 0.0], tmp_path)
    assert [one.advantages and one.advantages[0] for one in step.responses] == [0.0, 0.0]
    tally = Tally()
    tally.add(step)
    assert tally.figures()["advantage_correlation"] is None, "there is nothing to correlate with"


def test_correlations_are_those_of_the_textbook() -> None:
    assert pearson([(1, 2), (2, 4), (3, 7)]) == pytest.approx(0.9933992677987828)
    assert pearson([(1, 2)]) is None and pearson([(1, 2), (1, 3)]) is None
    assert kendall([[(1, 1), (2, 3), (3, 2), (4, 4)]]) == pytest.approx(4 / 6)
    assert kendall([[(0, 0), (0, 1), (1, 1)]]) == pytest.approx(1 / 2), "ties, as of tau-b"
    assert kendall([[(1, 1), (2, 2)], [(5, 2), (6, 1)]]) == 0.0
    assert kendall([[(1, 1), (1, 2)]]) is None


def test_validation_has_rewards_and_no_advantages(tmp_path: Path) -> None:
    config = settings(tmp_path, tools=["planted:same"], routing={"prefer": {"short_text": "same"}})
    record(config, group(("Paris", "Rome"), step=4, uid="v", split="val"))
    found = rescored(tmp_path, "planted:half", "--split", "val")
    assert [one["new"]["reward"] for one in found["response"]] == [0.5, 0.5]
    assert {one["new"]["advantage"] for one in found["response"]} == {None}
    assert found["summary"][0]["flipped"] is None


# --- Which responses, which tool --------------------------------------------------------------------------------------


def test_of_several_starts_of_training_each_step_has_its_latest_one(tmp_path: Path) -> None:
    config = settings(tmp_path, tools=["planted:same"], routing={"prefer": {"short_text": "same"}})
    record(config, [s for step in (1, 2, 3) for s in group(("Paris", "Rome"), step=step, uid=f"a{step}")])
    record(config, [s for step in (3, 4) for s in group(("Rome", "Rome"), step=step, uid=f"b{step}")], token="second")
    steps = rescored(tmp_path, "planted:same")["step"]
    assert [(one["step"], one["attempt"]) for one in steps] == [(1, 1), (2, 1), (3, 2), (4, 2)]
    steps = rescored(tmp_path, "planted:same", "--attempt", "1", "--steps", "2..")["step"]
    assert [(one["step"], one["attempt"], one["new_mean"]) for one in steps] == [(2, 1, 0.5), (3, 1, 0.5)]


@pytest.mark.parametrize(
    ("text", "steps"), [(None, (0, LAST)), ("7", (7, 7)), ("3..7", (3, 7)), ("3..", (3, LAST)), ("..7", (0, 7))]
)
def test_steps_are_a_number_or_a_range(text: str | None, steps: tuple[int, int]) -> None:
    assert parse_steps(text) == steps


@pytest.mark.parametrize("text", ["7..3", "..", "", "a", "-3", "3-7", "1..2..3", "3. .7"])
def test_other_steps_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="steps"):
        parse_steps(text)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--tool", "final_answer", "--steps", "9..3"), "the last step is before the first one"),
        (("--tool", "final_answer", "--steps", "90..95"), "in those steps; it has steps 1 to 2"),
        (("--tool", "final_answer", "--attempt", "7"), "no train response of attempt 7; there are attempts 1"),
        (("--tool", "final_answer", "--split", "val"), "no val response"),
        (("--tool", "nothing"), "there is no tool 'nothing'; there are: "),
        (("--tool", "final_answer@ffff"), "there is no tool 'ffff'"),
        (("--tool", "missing.py"), "cannot read the verifier missing.py"),
        (("--tool", "planted:nothing"), "cannot import planted:nothing"),
        (("--tool", "unit_tests"), "there is nowhere to run code"),
        ((), "Missing option '--tool'"),
    ],
)
def test_what_is_wrong_is_named(run: Path, args: tuple[str, ...], message: str) -> None:
    assert message in rlar("rescore", str(run), *args, "--set", "sandbox.backend=none", code=2).stderr


def test_without_a_ledger_that_is_said(tmp_path: Path) -> None:
    assert "there is no ledger at" in rlar("rescore", str(tmp_path), "--tool", "final_answer", code=2).stderr


def test_without_a_ledger_that_is_said_before_the_tool_is_looked_for(run: Path) -> None:
    shutil.copytree(run / "rlar" / FOLDER_NAME, run / "typo" / FOLDER_NAME)
    assert "there is no ledger at" in rlar("rescore", str(run / "typo"), "--tool", "unit_price", code=2).stderr


def test_a_copy_of_a_ledger_is_not_taken_for_the_ledger_beside_it(run: Path) -> None:
    ledger = run / "rlar" / FILE_NAME
    copy = shutil.copy(ledger, ledger.with_name("before.sqlite"))
    said = rlar("rescore", str(copy), "--tool", "exact_match", code=2).stderr
    assert str(copy) in said and str(ledger) in said
    assert run_folder(str(ledger)) == run_folder(str(run)) == ledger.parent


def test_a_version_is_found_by_its_digest_and_a_wrong_pair_is_refused(run: Path) -> None:
    view = Library.read(run / "rlar" / FOLDER_NAME)
    digest = view.find("same")
    assert find_tool(f"same@{digest[:6]}", view).spec == find_tool(digest, view).spec == planted.same.spec
    with pytest.raises(ConfigError, match="is a version of same, not of half"):
        find_tool(f"half@{digest}", view)
    with pytest.raises(ConfigError, match="there is none here"):
        find_tool(f"same@{digest}", None)


def test_a_rule_whose_code_is_gone_is_refused_by_its_digest_and_meant_by_its_name(
    tmp_path: Path, write_rule: Write
) -> None:
    target = write_rule("same", "1.0")
    config = settings(tmp_path, tools=[target])
    record(config, group(("Paris",), step=1, uid="g"))
    view = Library.read(tmp_path / "rlar" / FOLDER_NAME)
    old = view.spec(view.find("same"))
    changed = replace(old, source_sha256="0" * 64)
    with Library(tmp_path / "rlar" / FOLDER_NAME) as library:
        library.propose(changed, None, by="ada", why="an older one")
    view = Library.read(tmp_path / "rlar" / FOLDER_NAME)
    with pytest.raises(ConfigError, match=f"is another one by now.*ask the code of today: {target}"):
        find_tool(changed.digest, view)
    assert find_tool("same", view).spec == old


def test_hostile_texts_are_shown_and_not_obeyed(tmp_path: Path, write_rule: Write) -> None:
    hostile = "\x1b]0;owned\x07[bold red]Paris\u202e\nsecond line \udc80"
    query = make_query("Say \x1b[31mred[/]", "Paris")
    config = settings(tmp_path, tools=["planted:same"], routing={"prefer": {"short_text": "same"}})
    record(config, group((hostile, "Paris"), step=1, uid="\x1b[2J", query=query))
    echo = write_rule("echo", "1.0 if 'owned' in response else 0.0")
    shown = rlar("rescore", str(tmp_path), "--tool", echo)
    assert "\x1b" not in shown.output and "\u202e" not in shown.output and "\x07" not in shown.output
    assert "\\x1b]0;owned" in shown.stdout and "[bold red]" in shown.stdout
    shown = rlar("diff", echo, "planted:same", "--run", str(tmp_path))
    assert "\x1b" not in shown.output and "\\x1b]0;owned" in shown.stdout
    line = rlar("rescore", str(tmp_path), "--tool", echo, "--json").stdout.splitlines()[0]
    assert line.isascii() and json.loads(line)["uid"] == "\x1b[2J"


async def test_a_reader_who_leaves_early_ends_the_processes(run: Path) -> None:
    def children() -> set[str]:
        found: set[str] = set()
        for task in Path("/proc/self/task").iterdir():
            with suppress(OSError):  # a thread that has ended meanwhile
                found |= set((task / "children").read_text().split())
        return found

    before = children()
    replays = rescore(run / "rlar", Subject(spec=planted.half.spec), settings(run))
    assert (await anext(replays)).step == 1
    at_work = children() - before
    await replays.aclose()  # type: ignore[attr-defined]
    assert at_work and not at_work <= children()


# --- Two tools --------------------------------------------------------------------------------------------------------


@pytest.fixture
def sums(tmp_path: Path) -> str:
    rng = random.Random(1)
    rows = [(a, rng.randint(2, 99)) for a in rng.sample(range(100, 999), 24)]
    file = tmp_path / "sums.jsonl"
    file.write_text(
        "".join(json.dumps({"prompt": f"What is {a} plus {b}?", "reference": str(a + b)}) + "\n" for a, b in rows)
    )
    return str(file)


def test_two_tools_are_compared_on_the_cases_of_an_exam(sums: str, write_rule: Write) -> None:
    generous = write_rule("generous", "1.0", kinds="MATH")
    found = records("diff", "final_answer", generous, "--data", sums, "--set", "exam.max_queries=12")
    [kind], [summary], tools = found["kind"], found["summary"], found["tool"]
    assert (kind["on"], kind["kind"], kind["better"], kind["graded"]) == ("cases", "math", "first", False)
    assert kind["first"]["pairwise"] > 0.95 and kind["second"]["pairwise"] == 0.0
    assert (kind["second"]["false_accept"], kind["second"]["false_reject"]) == (1.0, 0.0)
    assert kind["labelled"]["queries"] == 12 and kind["kendall"] is None, "one that always says the same has no order"
    right = sum(one["first"]["value"] == 1.0 for one in found["response"])
    assert kind["agreed"] == right < kind["pairs"] == len(found["response"]) == summary["compared"]
    assert [tool["tool"] for tool in tools] == ["final_answer", "generous"]
    assert all(0 < tool["p50_s"] <= tool["p95_s"] for tool in tools)
    shown = rlar("diff", "final_answer", generous, "--data", sums, "--set", "exam.max_queries=12").stdout
    assert "this one" in shown and "wanted: bad: 0 scored" in shown


def test_two_tools_are_compared_on_the_responses_of_a_run(run: Path, write_rule: Write) -> None:
    lenient = write_rule("same", "float(response.lower() == reference.lower())")
    found = records("diff", "same", lenient, "--run", str(run), "--steps", "1..2")
    [kind], [summary] = found["kind"], found["summary"]
    assert (kind["on"], kind["kind"], kind["pairs"], kind["agreed"], kind["both"]) == ("run", "short_text", 8, 6, 8)
    assert (summary["other_kinds"], summary["missing"]) == (8, 0)
    values = [(1, 1), (0, 1), (0, 0), (1, 1)] * 2
    assert kind["pearson"] == pytest.approx(pearson(values))
    assert kind["kendall"] == pytest.approx(kendall([values]))
    shown = rlar("diff", "same", lenient, "--run", str(run)).stdout
    assert "8 responses of queries that not both are for" in shown and "response 'paris'" in shown


def test_case_files_and_graded_tools_are_compared_within_the_tolerance(tmp_path: Path, write_rule: Write) -> None:
    file = tmp_path / "cases.jsonl"
    rows = [
        {"prompt": SHORT, "reference": "Paris", "response": response, "expect": expect}
        for response, expect in (("Paris", "good"), ("Rome", "bad"), ("It is Paris", "good"))
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, other = write_rule("one", "len(response) / 20"), write_rule("other", "len(response) / 20 + 0.01")
    [kind] = records("diff", one, other, "--cases", str(file))["kind"]
    assert (kind["graded"], kind["pairs"], kind["agreed"], kind["kendall"]) == (True, 3, 3, 1.0)
    far = write_rule("far", "1 - len(response) / 20")
    [kind] = records("diff", one, far, "--cases", str(file))["kind"]
    assert (kind["agreed"], kind["kendall"]) == (0, -1.0) and kind["pearson"] == pytest.approx(-1.0)


def test_a_tool_that_fails_or_abstains_is_counted(run: Path) -> None:
    found = records("diff", "planted:same", "planted:crashing", "--run", str(run), "--steps", "1", code=1)
    assert found["summary"][0]["failed"] == 4
    assert found["kind"][0]["only_first"] == 4 and found["tool"][1]["outcomes"] == {"failed": 4}
    found = records("diff", "planted:same", "planted:abstaining", "--run", str(run), "--steps", "1")
    assert (found["kind"][0]["both"], found["kind"][0]["pearson"]) == (0, None)


def test_texts_that_are_gone_are_said_by_diff_too(tmp_path: Path) -> None:
    config = settings(tmp_path, tools=["planted:same"], routing={"prefer": {"short_text": "same"}})
    record(config, group(ANSWERS, step=1, uid="g"), store_texts=False)
    found = records("diff", "planted:same", "planted:half", "--run", str(tmp_path), code=1)
    assert (found["summary"][0]["missing"], found["summary"][0]["compared"]) == (4, 0)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("final_answer", "token_f1"), "nothing to compare them on: give --data"),
        (("final_answer", "final_answer", "--run", "."), "are the same tool"),
        (
            ("final_answer", "planted:half", "--data", "x.jsonl"),
            "nothing to compare: final_answer is for math",
        ),
        (("exact_match", "token_f1", "--data", "x.jsonl"), "cannot read x.jsonl"),
        (("exact_match", "token_f1", "--run", "nowhere"), "there is no ledger at"),
        (("exact_match", "nothing", "--run", "nowhere"), "no tool 'nothing'"),
    ],
)
def test_what_cannot_be_compared_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in rlar("diff", *args, code=2).stderr


# --- Boxes ------------------------------------------------------------------------------------------------------------

VERIFIER = '''
"""The last number of the response."""
KINDS = ("math",)
def score(prompt, response, reference, extra):
    return 1.0 if response.split()[-1].strip(".") == reference else 0.0
'''
LENIENT = VERIFIER.replace('response.split()[-1].strip(".") == reference', "reference in response")


@pytest.mark.docker
@pytest.mark.usefixtures("box_image")
def test_a_verifier_is_replayed_in_a_box(tmp_path: Path) -> None:
    first = verifier(VERIFIER, name="last_number")
    base = make_sandbox_config()
    sandbox = {"base": base.base, "verifier_boxes": 2, "program_boxes": 1}
    config = settings(tmp_path, sandbox=sandbox, routing={"prefer": {"math": "last_number"}})
    texts = ("It is 42.", "41", "42 it is", "no")
    record(config, group(texts, step=1, uid="g", query=make_query(MATH, "42")), verifiers=[first])
    options = ["--json", *(f"--set=sandbox.{key}={value}" for key, value in sandbox.items())]

    def responses_of(tool: str) -> Iterator[dict[str, Any]]:
        lines = rlar("rescore", str(tmp_path), "--tool", tool, *options).stdout.splitlines()
        return (one for one in map(json.loads, lines) if one["type"] == "response")

    again = list(responses_of(f"last_number@{first.spec.digest[:8]}"))
    assert [(one["new"]["value"], one["reproduced"]) for one in again] == [
        (1.0, True),
        (0.0, True),
        (0.0, True),
        (0.0, True),
    ]
    file = tmp_path / "last_number.py"
    file.write_text(LENIENT)
    other = list(responses_of(str(file)))
    assert [one["how"] for one in other] == ["in_place"] * 4
    assert [one["new"]["value"] for one in other] == [1.0, 0.0, 1.0, 0.0]

    async def both() -> list[tuple[float, float] | None]:
        tools = (first, verifier(LENIENT, name="last_number"))
        async with Bench(config, tools) as bench:
            pairs, _ = await diff_run(tmp_path / "rlar", tools, bench)
        return [pair.values for pair in pairs]

    assert asyncio.run(both()) == [(1.0, 1.0), (0.0, 0.0), (0.0, 1.0), (0.0, 0.0)]
