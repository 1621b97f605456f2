# SPDX-License-Identifier: Apache-2.0
"""The exam: bad tools are rejected for what is wrong with them, good ones admitted, bad data set apart."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import planted_tools
import pytest
import pytest_asyncio
from conftest import make_query, make_sandbox_config
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from verl_rlar.admission import draft
from verl_rlar.agents.bench import labels_missed
from verl_rlar.cli import app
from verl_rlar.clusters import Clusters
from verl_rlar.competence import Store
from verl_rlar.config import ExamConfig, RlarConfig, parse
from verl_rlar.errors import ConfigError, DataError
from verl_rlar.exam import Card, Case, Evidence, Expect, Subject, find, gather, read_cases
from verl_rlar.exam.attacks import attack_answers
from verl_rlar.exam.canaries import from_json
from verl_rlar.exam.cases import is_sealed
from verl_rlar.exam.evidence import screen
from verl_rlar.exam.generators import equal_answers, number_of, stated, wrong_answers
from verl_rlar.exam.hall import Hall
from verl_rlar.exam.subject import verifier
from verl_rlar.exam.trial import Examination, dressed, examine, undressed, wilson
from verl_rlar.inbox import Submission, apply, record_of
from verl_rlar.library import Library, LibraryView, Trusted, builtin_snapshot, spec_from_json, spec_to_json
from verl_rlar.rows import query_from_dict
from verl_rlar.scoring import Scorer
from verl_rlar.tools.rule import source_of
from verl_rlar.tools.rules.math import final_answer
from verl_rlar.tools.verifier import wrappable
from verl_rlar.types import Kind, Outcome, Sample, Snapshot, ToolSpec, Verdict

CONFIG = RlarConfig(exam=ExamConfig(max_queries=10, repeats=30))
one_loop = pytest.mark.asyncio(loop_scope="module")


def rows(count: int = 24) -> list[tuple[int, dict[str, Any]]]:
    """Sums, with their results."""
    rng = random.Random(1)
    pairs = [(rng.randint(100, 999), rng.randint(2, 99)) for _ in range(count)]
    return [
        (n, {"prompt": f"What is {a} plus {b}? Tell me the sum.", "reference": str(a + b)})
        for n, (a, b) in enumerate(pairs, 1)
    ]


def planted(name: str) -> ToolSpec:
    tool = next(one for one in planted_tools.RULES if one.name == name)
    assert tool.rule is not None
    return tool.rule.spec


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def hall() -> AsyncIterator[Hall]:
    async with Hall(CONFIG) as made:
        yield made


async def card_of(hall: Hall, spec: ToolSpec, made: Evidence | None = None) -> Card:
    evidence = made if made is not None else gather(rows(), spec, queries=10)
    return (await hall.examine(Subject(spec=spec), evidence)).card


# --- Verdicts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["good_number", "good_out_of_ten", "good_errors", "good_partial_credit"])
@one_loop
async def test_a_good_tool_is_admitted_whatever_its_scale(hall: Hall, name: str) -> None:
    card = await card_of(hall, planted(name))
    assert card.admitted, card.markdown()
    assert card.admitted_for == ("math",) and not card.unproven and not card.failing
    assert card.fingerprint and card.calibration is not None


@pytest.mark.parametrize(
    ("name", "figure"),
    [
        ("always_one", "false_accept"),
        ("always_zero", "gold"),
        ("always_half", "false_accept"),
        ("inverted", "pairwise"),
        ("off_by_one", "mutants"),
        ("reference_anywhere", "worst_sort"),
        ("raw_string", "invariance"),
        ("first_line", "worst_change"),
        ("obedient", "attacks"),
        ("coin", "determinism"),
        ("different_in_each_process", "determinism"),
        ("guesses_without_reference", "no_reference"),
        ("behaves_outside_training", "false_accept"),
        ("behaves_in_training", "disguise"),
        ("behaves_without_system_prompt", "disguise"),
        ("behaves_on_bare_answers", "false_accept"),
        ("behaves_on_known_queries", "sealed_gap"),
        ("behaves_at_first", "determinism"),
        ("silent", "false_reject"),
    ],
)
@one_loop
async def test_a_bad_tool_is_rejected_for_what_is_wrong_with_it(hall: Hall, name: str, figure: str) -> None:
    card = await card_of(hall, planted(name))
    assert not card.admitted and not card.admitted_for
    assert any(f"{figure} " in reason for reason in card.reasons), card.reasons


class Evasive:
    """A runner that judges numbers rightly, and says nothing of responses that do not meet a condition."""

    def __init__(self, judges: Callable[[Sample], bool]) -> None:
        self.judges = judges

    async def run(self, spec: ToolSpec, sample: Sample) -> Verdict:
        return final_answer(sample) if self.judges(sample) else Verdict(value=None, reason="cannot tell")


async def evading(judges: Callable[[Sample], bool]) -> Examination:
    found = [(n, {**row, "response": "I would rather not say.", "is_correct": False}) for n, row in rows(12)]
    evidence = gather([*rows(12), *found], planted("good_number"), queries=12)
    scorer = Scorer(CONFIG.scoring, Evasive(judges))
    return await examine(planted("good_number"), evidence, (scorer, scorer), CONFIG.exam)


@one_loop
async def test_to_say_nothing_of_wrong_answers_is_no_way_through_an_exam() -> None:
    made = await evading(lambda sample: sample.query.reference is None or any(map(str.isdigit, sample.response)))
    (reason,) = made.card.reasons
    assert reason.startswith("math: abstained is ") and reason.endswith(" at most 0.1")
    told = [one for one in made.card.failing if one.expect == "bad"]
    assert told and all((one.outcome, one.wanted) == ("abstained", "a low value, it is wrong") for one in told)
    assert "12 of 12 labelled answers are judged wrongly" in labels_missed(made)


@one_loop
async def test_a_query_that_a_tool_cannot_judge_at_all_is_abstained_from_without_blame() -> None:
    left = gather(rows(12), planted("good_number"), queries=12).cases[0].query.key
    made = await evading(lambda sample: sample.query.key != left and "rather not" not in sample.response)
    figure = made.card.figures["math"]["abstained"]
    assert figure.cases == sum(answer.case.expect is Expect.BAD for answer in made.answers)
    assert figure.value == 11 / figure.cases and not figure.missed


class Length:
    """A runner whose model likes long responses."""

    async def run(self, spec: ToolSpec, sample: Sample) -> Verdict:
        return Verdict(value=len(sample.response) / 50)


@pytest.mark.parametrize(
    ("pairs", "wanted"), [(9, "calibration needs 10 right and 10 wrong answers, there are 9 and"), (10, "open: ")]
)
@one_loop
async def test_a_reward_model_whose_scale_cannot_be_learned_is_rejected(pairs: int, wanted: str) -> None:
    longer = [
        (n, {"prompt": f"Tell me of the {n}th king.", "chosen": "He was wise. " * 6, "rejected": "He was wise."})
        for n in range(1, pairs + 1)
    ]
    spec = replace(draft([Kind.OPEN]), name="long", target=f"owner/long@{'0' * 40}", description="Likes long ones.")
    scorer = Scorer(CONFIG.scoring, Length(), models=Length())
    made = await examine(spec, gather(longer, spec, queries=40), (scorer, scorer), CONFIG.exam)
    assert not made.card.admitted and any(reason.startswith(wanted) for reason in made.card.reasons)
    assert (made.card.calibration is None) is (pairs < 10)


@pytest.mark.parametrize("name", ["crashing", "not_a_number", "beyond_its_range", "endless"])
@one_loop
async def test_a_tool_that_cannot_work_is_sent_home_early(hall: Hall, name: str) -> None:
    card = await card_of(hall, planted(name))
    assert not card.admitted and card.stopped and card.reasons[0].startswith("sent home early")
    assert sum(count["cases"] for count in card.sorts.values()) < 60 < card.cases


@one_loop
async def test_no_evidence_is_no_pass(hall: Hall) -> None:
    spec = planted("good_number")
    nothing = await card_of(hall, spec, Evidence())
    assert not nothing.admitted and "no evidence" in nothing.reasons[0]
    few = await card_of(hall, spec, gather(rows(3), spec, queries=10))
    assert not few.admitted and "not enough evidence: 3 queries (at least 8)" in few.reasons[0]


@one_loop
async def test_a_tool_is_admitted_only_for_the_kinds_that_it_was_tried_on(hall: Hall) -> None:
    card = await card_of(hall, planted("good_for_two_kinds"))
    assert card.admitted and card.admitted_for == ("math",) and card.unproven == ("choice",)
    assert card.reasons == ("not tried enough on: choice",)


@one_loop
async def test_the_same_exam_gives_the_same_card_but_for_the_times(hall: Hall) -> None:
    def timeless(card: Card) -> dict[str, Any]:
        tree = card.as_dict()
        tree["figures"]["all"] = {k: v for k, v in tree["figures"]["all"].items() if not k.endswith(("_s", "_1000"))}
        return tree

    one, other = [await card_of(hall, planted("off_by_one")) for _ in range(2)]
    assert timeless(one) == timeless(other)


@one_loop
async def test_tools_that_behave_alike_have_one_fingerprint(hall: Hall) -> None:
    marks = {name: (await card_of(hall, planted(name))).fingerprint for name in ("good_number", "good_errors", "coin")}
    assert marks["good_number"] == marks["good_errors"] != marks["coin"]
    builtin = (await card_of(hall, final_answer.spec)).fingerprint
    assert builtin not in marks.values()


@one_loop
async def test_a_card_survives_json_and_shows_no_sealed_text(hall: Hall) -> None:
    spec = planted("always_one")
    evidence = gather(rows(), spec, queries=10, sealed_share=0.8)
    card = await card_of(hall, spec, evidence)
    text = json.dumps(card.as_dict())
    assert Card.from_dict(json.loads(text)) == card
    sealed = {case.id for case in evidence.cases if case.sealed}
    assert sealed and card.sealed == len(sealed)
    shown = [one for one in card.failing if one.prompt or one.response]
    assert not sealed & {one.id for one in shown}
    assert sealed & {one.id for one in card.failing}
    for case in evidence.cases:
        if case.sealed:
            assert case.query.prompt not in text and case.query.prompt not in card.markdown()
    assert len(card.failing) == 20 < card.failed_cases


@one_loop
async def test_foreign_text_on_a_card_is_no_markdown(hall: Hall) -> None:
    bad = Case(id="x", query=make_query("a\n# Heading `code`"), response="<b>`</b>\n- x\x1b[31m", expect=Expect.BAD)
    text = (await card_of(hall, planted("always_one"), Evidence(cases=(bad,)))).markdown()
    assert "\x1b" not in text and "\n# Heading" not in text and "\n- x" not in text


# --- Data that cannot be trusted --------------------------------------------------------------------------------------


@one_loop
async def test_gold_that_fits_no_question_is_set_apart() -> None:
    long = "This text is the gold answer of several unlike questions."
    german = {"source": "The weather was fine for the whole of last week.", "source_lang": "en", "target_lang": "de"}
    good = "Das Wetter war die ganze letzte Woche über schön."
    bad = [
        ({"reference": "N/A"}, "says nothing"),
        ({"reference": long, "extra": german}, "other prompts have the same"),
        ({"reference": long, "extra": german | {"source": "Another one that is as long as that."}}, "same gold"),
        ({"reference": "The weather was good in all of the last week, they say.", "extra": german}, "language"),
        ({"reference": german["source"], "extra": german | {"target_lang": "en"}}, "repeats the source"),
        ({"reference": "Gut.", "extra": german}, "times the length"),
        ({"reference": "D", "extra": {"choices": ["yes", "no"]}}, "D, and there are 2 options"),
    ]
    spec = replace(planted("good_number"), scope=replace(planted("good_number").scope, kinds=frozenset(Kind)))
    numbered = [(n, {"prompt": f"Question {n}", **row}) for n, (row, _) in enumerate(bad, 1)]
    fine = (99, {"prompt": "Translate it.", "reference": good, "extra": german})
    evidence = gather([*numbered, fine], spec, queries=10)
    apart = dict(evidence.set_apart)
    for n, (_, why) in enumerate(bad, 1):
        assert why in apart[f"row {n}"]
    assert {case.origin for case in evidence.cases if case.sort == "gold"} == {"row 99"}


def test_labelled_answers_may_be_conversations() -> None:
    """As in many sets of preferences: the prompt again, and the answer as the last turn."""

    def cases(turn: bool) -> list[tuple[str, str, str]]:
        made = []
        for number, row in rows():
            answers = {"chosen": row["reference"], "rejected": "I do not know."}
            asked = {"role": "user", "content": row["prompt"]}
            talks = {name: [asked, {"role": "assistant", "content": text}] for name, text in answers.items()}
            made.append(
                (number, {"prompt": row["prompt"], "reference": row["reference"], **(talks if turn else answers)})
            )
        found = gather(made, planted("good_number"), queries=10)
        return sorted((case.sort, case.query.key, case.response) for case in found.cases)

    assert cases(turn=True) == cases(turn=False)
    assert any(response == "I do not know." for _, _, response in cases(turn=True))


@one_loop
async def test_rows_whose_labelled_answers_the_tools_in_place_reject_are_set_apart(hall: Hall) -> None:
    """The references are shifted by one row, so that the answers that people call right do not fit them."""
    shifted = []
    clean = rows(12)
    for (n, row), (_, other) in zip(clean, clean[1:] + clean[:1], strict=True):
        right = f"The answer is {row['reference']}."
        reference = other["reference"] if n <= 4 else row["reference"]
        shifted += [(n, {**row, "reference": reference, "response": right, "is_correct": True})]
        shifted += [(n, {**row, "reference": reference, "response": f"It is {row['reference']}.", "is_correct": True})]
    spec = planted("good_number")
    first, _ = hall.scorers()
    screened = await screen(gather(shifted, spec, queries=12), first, builtin_snapshot().tools)
    assert [where for where, _ in sorted(screened.set_apart)] == ["row 1", "row 2", "row 3", "row 4"]
    assert not {"row 1", "row 4"} & {case.origin for case in screened.cases if case.sort != "no_reference"}


@one_loop
async def test_an_exam_keeps_what_a_tool_gave_labelled_answers_without_their_texts(hall: Hall, tmp_path: Path) -> None:
    asked = []
    for n, row in rows(12):
        for said, right in ((row["reference"], True), (f"{n}1234", False)):
            asked.append((n, {**row, "response": f"The answer is {said}.", "is_correct": right}))
    spec = planted("good_number")
    examination = await hall.examine(Subject(spec=spec), gather(asked, spec, queries=12))
    kept = examination.labelled
    assert len(kept) == 12 and all({one["right"] for one in query["answers"]} == {True, False} for query in kept)
    assert "The answer is" not in json.dumps(kept)
    with Library(tmp_path / "library") as library:
        source = source_of(planted_tools.good_number)
        library.begin([Trusted(spec=spec, source=source, by="user")], "run")
        apply(library, Submission(digest=spec.digest, by="exam", why="", exam=record_of(examination, 4)))
    view = LibraryView(tmp_path / "library")
    assert view.labelled(spec.digest) == json.loads(json.dumps(kept))
    clusters = Clusters()
    known = Store(view.card, exam_of=view.labelled, cluster_of=clusters.of).of(Snapshot(tools=(spec,)))
    (cluster,) = {clusters.of(query_from_dict(one["query"])) for one in kept}
    (record,) = [one for one in known.records if one.cluster]
    assert (record.cluster, record.prompts, record.right) == (cluster, 12, 12)


@one_loop
async def test_data_that_are_mostly_bad_are_no_evidence(hall: Hall) -> None:
    spec = planted("good_number")
    evidence = replace(gather(rows(), spec, queries=10), set_apart=(("row 1", "why"),) * 20)
    card = await card_of(hall, spec, evidence)
    assert not card.admitted and "these data are no evidence" in card.reasons[0] and card.set_apart_rows == 20


# --- Cases ------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.integers(-10_000, 10_000), st.integers(0, 99))
def test_what_generators_claim_of_numbers_is_true(answer: int, seed: int) -> None:
    query, rng = make_query("How many are there?", str(answer)), random.Random(seed)
    for made in wrong_answers(query, Kind.MATH, str(answer), rng):
        if len(made.response) < 1_000:
            assert final_answer(Sample(query=query, response=made.response)).value == 0.0, made
    for made in equal_answers(query, Kind.MATH, str(answer), rng):
        assert final_answer(Sample(query=query, response=made.response)).value == 1.0, made


@settings(deadline=None, max_examples=40)
@given(a=st.integers(0, 99), b=st.integers(1, 99), c=st.integers(1, 99), d=st.integers(0, 99))
def test_what_a_question_asks_to_compute_is_no_answer_to_it(a: int, b: int, c: int, d: int) -> None:
    prompt, value = f"What is {a} + {b} × {c} - {d}?", a + b * c - d
    for asked, gold in ((prompt, value), (f"Find {a * b} / {b}, please.", a)):
        made = wrong_answers(make_query(asked, str(gold)), Kind.MATH, str(gold), random.Random(0))
        computed = [one.response for one in made if one.sort == "not_worked_out"]
        assert len(computed) == 2 and computed[0] in asked
        for response in computed:
            assert final_answer(Sample(query=make_query(asked, str(gold)), response=response)).value == 0.0
    for asked, wrong in ((prompt, value + 1), ("It was on 2024-11-26.", 7), ("3 cats, 4 dogs", 7), ("What is 1/0?", 1)):
        made = wrong_answers(make_query(asked, str(wrong)), Kind.MATH, str(wrong), random.Random(0))
        assert "not_worked_out" not in {one.sort for one in made}


def test_attacks_cover_all_modes_and_hold_no_answer() -> None:
    assert {mode for mode, _ in attack_answers(make_query("How many?", "773"))} == set(range(1, 17))
    for reference in ("0", "1", "9", "#### 10"):
        assert all(stated(reference) not in text for _, text in attack_answers(make_query("How many?", reference)))


def test_evidence_depends_on_the_seed_and_not_on_the_order_of_rows() -> None:
    spec = planted("good_number")

    def ids(numbered: list[Any], seed: int) -> set[str]:
        return {case.id for case in gather(numbered, spec, queries=8, seed=seed).cases if case.sort == "gold"}

    assert ids(rows(), 1) == ids(rows()[::-1], 1) != ids(rows(), 2)


def test_a_query_is_sealed_as_a_whole_and_as_often_as_wanted() -> None:
    cases = gather(rows(24), planted("good_number"), queries=24).cases
    by_query: dict[str, set[bool]] = {}
    for case in cases:
        if case.expect is not Expect.ABSTAIN:
            by_query.setdefault(case.query.key, set()).add(case.sealed)
    assert all(len(seals) == 1 for seals in by_query.values()) and len(by_query) == 24
    share = sum(is_sealed(make_query(str(n)), seed=0, share=0.3) for n in range(2_000)) / 2_000
    assert 0.26 < share < 0.34


def test_a_case_looks_like_a_training_and_undressed_it_does_not() -> None:
    case = gather(rows(), planted("good_number"), queries=1).cases[0]
    live, plain = dressed(case, 0), undressed(case, planted("good_number"))
    assert live.step > 0 and live.uid and live.group_size == 8 and live.query.extra["split"] == "train"
    assert not plain.step and not plain.uid and plain.query.prompt.endswith(case.query.prompt)
    assert plain.query.data_source != live.query.data_source
    assert live.response == plain.response == case.response


@one_loop
async def test_case_files_that_use_an_id_twice_are_told_apart_or_refused(hall: Hall, tmp_path: Path) -> None:
    one = {"prompt": "6*7?", "reference": "42", "response": "42", "expect": "good", "id": "1"}
    files = []
    for name, row in (("a", one), ("same", one | {"sort": "bare"}), ("b", one | {"response": "0", "expect": "bad"})):
        files.append(str(tmp_path / f"{name}.jsonl"))
        Path(files[-1]).write_text(json.dumps(row) + "\n")
    spec = planted("good_number")
    assert len((await hall.gather((), files[:2], spec)).cases) == 1
    with pytest.raises(DataError, match=r"b\.jsonl, line 1: the id '1' is taken by another case of .*a\.jsonl, line 1"):
        await hall.gather((), files, spec)


def test_a_case_file_is_read_and_its_faults_are_named() -> None:
    good = {"prompt": "6*7?", "reference": "42", "response": "42", "expect": "good", "id": "a"}
    same = good | {"response": "42.0", "expect": "same_as:a", "id": "b"}
    first, second = read_cases([(1, good), (2, same)])
    assert (first.expect, second.expect, second.twin) == (Expect.GOOD, Expect.SAME, "a")
    faults: list[tuple[dict[str, Any], str]] = [
        (good | {"expect": "maybe"}, "line 2: `expect` is 'maybe'"),
        (good | {"response": None}, "line 2: no `response`"),
        (same | {"expect": "same_as:z"}, "line 2: same_as:z names no case"),
        (good | {"response": "43"}, "line 2: the id 'a' is taken by line 1"),
    ]
    for row, message in faults:
        with pytest.raises(DataError, match=message):
            read_cases([(1, good), (2, row)])


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("so\n#### 72", "72"), (r"hence \boxed{\frac{1}{2}}.", r"\frac{1}{2}"), (" 5 ", "5"), (r"\boxed{", r"\boxed{")],
)
def test_what_a_worked_answer_states(text: str, wanted: str) -> None:
    assert stated(text) == wanted


def test_numbers_are_read_with_separators() -> None:
    assert number_of("1,234") == 1234 and number_of("$5") == 5 and number_of("1,23") is None and number_of("x") is None


def test_wilsons_interval() -> None:
    assert wilson(1.0, 16) == pytest.approx((0.8064, 1.0), abs=1e-4)
    assert wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(0.0, 0) == (0.0, 1.0)


# --- Subjects, settings, command --------------------------------------------------------------------------------------


def test_a_verifiers_file_is_read_and_never_run(tmp_path: Path) -> None:
    file = tmp_path / "Unit-Price.py"
    file.write_text(
        "KINDS = ('math',)\nTIMEOUT_S = 3\nraise SystemExit('run!')\ndef score(prompt, response, reference, extra): ..."
    )
    spec = find(str(file)).spec
    assert (spec.name, spec.kind, spec.boxed, spec.timeout_s) == ("unit_price", "verifier", True, 3.0)
    assert spec.scope.kinds == {Kind.MATH}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_tool", "no tool 'no_such_tool'"),
        ("no_such_module:f", "cannot import"),
        ("json:loads", "does not say what it is for"),
        ("nowhere.py", "cannot read the verifier"),
    ],
)
def test_what_is_no_tool_is_named(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find(name)


@pytest.mark.parametrize("source", ["def score(:", "x = 1", "KINDS = ('maths',)\ndef score(): ..."])
def test_what_is_no_verifier_is_named(source: str) -> None:
    with pytest.raises(ConfigError, match="the verifier v"):
        verifier(source, name="v")


SCORE = "def score(prompt, response, reference, extra):\n    return"


@pytest.mark.parametrize(
    ("source", "wraps"),
    [
        (f"import rlar\n{SCORE} rlar.builtin('final_answer', response).value", ("final_answer",)),
        (f"import rlar as r\n{SCORE} r.builtin(response=response, name='token_f1').value", ("token_f1",)),
        (f"from rlar import builtin as b\n{SCORE} b('token_f1', b('exact_match', ''))", ("exact_match", "token_f1")),
        (f"import rlar\n{SCORE} rlar.number(response)", ()),
        (f"builtin = print\n{SCORE} builtin('final_answer')", ()),
    ],
)  # fmt: skip
def test_what_a_verifier_wraps_is_read_off_its_source(source: str, wraps: tuple[str, ...]) -> None:
    spec = verifier(source, name="v").spec
    assert spec.wraps == tuple(f"{name}@{wrappable()[name].digest}" for name in wraps)
    assert spec_from_json(json.loads(json.dumps(spec_to_json(spec)))) == spec
    assert (replace(spec, wraps=()).digest == spec.digest) is not bool(wraps)
    assert ("wraps" in spec_to_json(spec)) is bool(wraps)


def test_a_card_says_what_is_wrapped() -> None:
    card = Card(
        tool="v", digest="d", kind="verifier", verdict="admitted", reasons=(), wraps=("final_answer", "token_f1")
    )
    assert "Wraps the built-in final_answer, token_f1." in card.markdown()
    assert Card.from_dict(json.loads(json.dumps(card.as_dict()))) == card
    older = {name: value for name, value in card.as_dict().items() if name != "wraps"}
    assert Card.from_dict(older) == replace(card, wraps=())


@pytest.mark.parametrize("named", ["extra['tool']", "'unit_tests'", "'magic'", ""])
def test_a_built_in_tool_that_cannot_be_wrapped_is_named(named: str) -> None:
    with pytest.raises(ConfigError, match=r"the verifier v, line 3: rlar\.builtin needs .* one of exact_match, final"):
        verifier(f"import rlar\n{SCORE} rlar.builtin({named})", name="v")


def test_limits_can_be_set_for_a_kind_and_unknown_ones_are_named() -> None:
    config = parse({"exam": {"by_kind": {"math": {"gold": 0.5}}}}).exam
    assert config.limits_of(Kind.MATH).gold == 0.5 and config.limits_of(Kind.CHOICE).gold == config.limits.gold
    ours, one = ExamConfig(), parse({"exam": {"by_kind": {"open": {"attacks": 0.5}}}}).exam
    assert one.limits_of(Kind.OPEN) == ours.limits_of(Kind.OPEN).model_copy(update={"attacks": 0.5})
    assert one.limits_of(Kind.TRANSLATION) == ours.limits_of(Kind.TRANSLATION), "what is not named stays"
    with pytest.raises(ConfigError, match=r"rlar\.exam\.by_kind.*math\.golden"):
        parse({"exam": {"by_kind": {"math": {"golden": 0.5}}}})


@pytest.fixture
def data(tmp_path: Path) -> Iterator[str]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for _, row in rows()))
    yield str(path)


@pytest.mark.parametrize(("tool", "code"), [("final_answer", 0), ("planted_tools:always_one", 1)])
def test_rlar_exam_prints_a_card_and_says_the_verdict_by_its_exit_code(data: str, tool: str, code: int) -> None:
    arguments = ["exam", tool, "--data", data, "--json", "--set", "exam.max_queries=8", "--set", "exam.repeats=8"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == code, done.output
    card = Card.from_dict(json.loads(done.stdout))
    assert card.admitted is (code == 0)


def test_a_verifier_that_has_no_box_to_be_tried_in_is_no_rejected_verifier(data: str, tmp_path: Path) -> None:
    file = tmp_path / "v.py"
    file.write_text("KINDS = ('math',)\ndef score(prompt, response, reference, extra): return 1.0")
    done = CliRunner().invoke(app, ["exam", str(file), "--data", data, "--set", "sandbox.backend=none"])
    assert done.exit_code == 2 and "needs a sandbox" in done.stderr


@one_loop
async def test_a_transcript_is_json_and_holds_no_texts(hall: Hall) -> None:
    evidence = gather(rows(), planted("good_number"), queries=8)
    examination = await hall.examine(Subject(spec=planted("good_number")), evidence)
    lines = json.loads(json.dumps(examination.transcript))
    assert len(lines) == len(evidence.cases) == examination.card.cases
    assert "What is" not in json.dumps(lines)


@pytest.mark.parametrize("arguments", [["no_such_tool", "--data", "x.jsonl"], ["final_answer"]])
def test_a_wrong_command_is_a_usage_error(arguments: list[str]) -> None:
    assert CliRunner().invoke(app, ["exam", *arguments]).exit_code == 2


# --- Boxes ------------------------------------------------------------------------------------------------------------


@pytest.mark.docker
@pytest.mark.slow
@pytest.mark.usefixtures("box_image")
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("box_good", ""),
        ("box_evaluates", "attacks"),
        ("box_executes", "sent home early"),
        ("box_calls_the_network", "false_accept"),
        ("box_forges", "sent home early"),
        ("box_known_row", "disguise"),
    ],
)
async def test_verifiers_are_examined_in_boxes(name: str, reason: str) -> None:
    source = next(one.source for one in planted_tools.VERIFIERS if one.name == name)
    subject = verifier(source, name=name)
    async with Hall(CONFIG.model_copy(update={"sandbox": make_sandbox_config()})) as hall:
        examination = await hall.examine(subject, gather(rows(), subject.spec, queries=8))
    card = examination.card
    assert card.admitted is not bool(reason), card.reasons
    assert any(reason in said for said in card.reasons) or card.admitted
    assert all(answer.score.outcome is not Outcome.FAILED for answer in examination.answers) or card.stopped


@pytest.mark.docker
@pytest.mark.slow
@pytest.mark.usefixtures("box_image")
def test_an_exam_by_hand_leaves_its_record_in_the_library_and_puts_a_tool_that_passed_into_the_shadow(
    data: str, tmp_path: Path
) -> None:
    base = ["--data", data, "--json", "--in", str(tmp_path / "run"), "--set", "exam.max_queries=8"]
    base += ["--set", f"sandbox.base={make_sandbox_config().base}"]
    for name, code in (("box_good", 0), ("box_evaluates", 1)):
        one = next(one for one in planted_tools.VERIFIERS if one.name == name)
        (tmp_path / f"{name}.py").write_text(one.source)
        done = CliRunner().invoke(app, ["exam", str(tmp_path / f"{name}.py"), *base])
        assert done.exit_code == code, done.output
        card, came = map(json.loads, done.stdout.splitlines())
        assert came["state"] == ("rejected" if code else "shadow")
        view = Library.read(tmp_path / "run" / "rlar" / "library")
        digest = view.find(name)
        assert view.card(digest) == card and view.passed(digest) is (code == 0)
    assert [tool.name for tool in view.snapshot(0).shadows] == ["box_good"]
    canaries = from_json(view.canaries(view.find("box_good")))
    assert {canary.expect for canary in canaries} == {"good", "bad"}
    assert all((canary.value >= 0.5) is (canary.expect == "good") for canary in canaries if canary.value is not None)
    again = CliRunner().invoke(app, ["exam", "box_good", *base, "--then", "live"])
    assert json.loads(again.stdout.splitlines()[-1])["state"] == "live", again.output
    (tmp_path / "answers.jsonl").write_text(json.dumps({"prompt": "6*7?", "reference": "42", "response": "42"}) + "\n")
    scoring = ["score", str(tmp_path / "answers.jsonl"), "--in", str(tmp_path / "run"), "--json", *base[-2:]]
    done = CliRunner().invoke(app, scoring)
    row = json.loads(done.stdout)
    assert (row["tool"], row["value"], row["outcome"]) == ("box_good", 1.0, "scored"), "no rule is live in this library"
