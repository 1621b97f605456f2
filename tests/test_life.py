# SPDX-License-Identifier: Apache-2.0
"""The life of a tool in a run: what promotes it, what takes it out, and that a killed service decides alike."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import make_query, make_sample
from test_library import code, make_spec, names, take_in

from verl_rlar.calibration import fit
from verl_rlar.config import LifeConfig, RlarConfig
from verl_rlar.exam.canaries import Canary, public, to_json
from verl_rlar.fleet import WATCH
from verl_rlar.inbox import Exam, Submission, hand_in
from verl_rlar.ledger import CanaryRow, Row, ShadowRow, read
from verl_rlar.library import FOLDER_NAME, Library, Standing, spec_to_json
from verl_rlar.life import Life
from verl_rlar.service import Service
from verl_rlar.types import Kind, Outcome, Route, RoutePart, Sample, Score, ToolScore, ToolSpec

STEPS, GROUPS, SIZE = 6, 6, 4
LIFE = LifeConfig(shadow_steps=3, shadow_responses=32, shadow_patience=8, min_pairs=10, min_calls=16, window=3)

Say = Callable[[str, int, float], tuple[float | None, str]]
"""What a tool gives for a response: of the group's id, its session and what the tools in place give."""


def honest(uid: str, session: int, place: float) -> tuple[float | None, str]:
    return place, "scored"


def against(uid: str, session: int, place: float) -> tuple[float | None, str]:
    return 1.0 - place, "scored"


def constant(uid: str, session: int, place: float) -> tuple[float | None, str]:
    return 0.5, "scored"


def noise(uid: str, session: int, place: float) -> tuple[float | None, str]:
    return random.Random(f"{uid} {session}").random(), "scored"


def broken(uid: str, session: int, place: float) -> tuple[float | None, str]:
    return (None, "failed") if session == 0 else (place, "scored")


@pytest.fixture
def library(tmp_path: Path) -> Iterator[Library]:
    with Library(tmp_path / "library") as made:
        yield made


def part(digest: str, value: float | None, outcome: str, raw: float | None = None) -> dict[str, Any]:
    return {"digest": digest, "outcome": outcome, "raw": value if raw is None else raw, "value": value}


def train(
    life: Life, library: Library, steps: range, digest: str, say: Say, *, place: bool = True, live: bool = False
) -> Standing:
    """Some steps of a training with a tool in the shadow, or live; what it is after them."""
    for step in steps:
        for decision in life.decide(step, library):
            library.append(
                decision.event,
                decision.digest,
                by=WATCH,
                why=decision.why,
                step=step,
                replaces=decision.replaces,
                restores=decision.restores,
            )
        snapshot = library.snapshot(step)
        seen = {tool.digest for tool in (*snapshot.tools, *snapshot.shadows)}
        for uid in (f"{step}-{group}" for group in range(GROUPS)):
            for session in range(SIZE):
                value, outcome = say(uid, session, session / (SIZE - 1))
                ours = [part(digest, value, outcome)] if digest in seen else []
                life.saw_response(
                    step=step,
                    uid=uid,
                    session=session,
                    query=uid,
                    value=session / (SIZE - 1) if place else None,
                    parts=ours if live else (),
                )
                for one in () if live else ours:
                    life.saw_shadow(step=step, uid=uid, session=session, part=one)
    return library.standings()[digest]


@pytest.mark.parametrize(
    ("say", "becomes", "why"),
    [
        (honest, "live", "ranks 1.00 of"),
        (against, "quarantined", "ranks 0.00 of"),
        (noise, "quarantined", "like the tools in place, and must at least 0.55"),
        (constant, "retired", "its values differ in 0 of"),
        (broken, "quarantined", "calls failed"),
    ],
)
def test_a_tool_in_the_shadow_becomes_what_it_showed(library: Library, say: Say, becomes: str, why: str) -> None:
    digest = take_in(library)
    library.append("shadow", digest, by="exam", why="passed", step=1)
    standing = train(Life(LIFE), library, range(1, 14), digest, say)
    assert standing.event == becomes and why in standing.why


def test_a_tool_waits_in_the_shadow_until_it_has_scored_enough(library: Library) -> None:
    digest = take_in(library)
    library.append("shadow", digest, by="exam", why="passed", step=2)
    assert train(Life(LIFE), library, range(1, 12), digest, honest).step == 5, "three steps in the shadow: 2, 3, 4"


def test_where_the_tools_in_place_say_nothing_variance_and_health_decide(library: Library) -> None:
    digest = take_in(library)
    library.append("shadow", digest, by="exam", why="passed", step=1)
    standing = train(Life(LIFE), library, range(1, 6), digest, noise, place=False)
    assert standing.event == "live" and "say too little to compare with" in standing.why


def test_a_new_version_takes_the_place_of_the_old_one_and_gives_it_back_when_it_fails(library: Library) -> None:
    old, new = take_in(library), take_in(library, version=2)
    library.append("live", old, by="exam", why="passed", step=0)
    library.append("shadow", new, by="exam", why="passed", step=1)
    life = Life(LIFE)
    assert train(life, library, range(1, 6), new, honest).event == "live"
    assert names(library, 5) == ["checker"] and library.snapshot(5).tools[0].digest == new
    standing = train(life, library, range(6, 10), new, broken, live=True)
    assert standing.event == "rolled_back" and "calls failed" in standing.why
    assert library.snapshot(9).tools[0].digest == old
    assert library.snapshot(5).tools[0].digest == new, "steps that are over stay as they were"


def test_a_failing_version_goes_also_where_the_one_before_must_not_come_back(library: Library) -> None:
    old, new = take_in(library), take_in(library, version=2)
    library.append("live", old, by="exam", why="passed", step=0)
    library.append("live", new, by="exam", why="better", step=1, replaces=old)
    library.put_exam(old, card={"verdict": "rejected"}, text="", transcript=[], passed=False, by="exam", why="worse")
    assert train(Life(LIFE), library, range(1, 10), new, broken, live=True).event == "rolled_back"
    assert names(library, 9) == []


def test_a_failing_version_goes_also_where_the_one_before_is_in_the_shadow(library: Library) -> None:
    old, new = take_in(library), take_in(library, version=2)
    library.append("live", old, by="exam", why="passed", step=0)
    library.append("live", new, by="exam", why="better", step=1, replaces=old)
    library.append("shadow", old, by="ada", why="compare both", step=2)
    assert train(Life(LIFE), library, range(1, 10), new, broken, live=True).event == "rolled_back"
    assert names(library, 9) == [] and library.standings()[old].event == "shadow"


def test_a_live_tool_that_gives_everybody_the_same_is_rolled_back_in_its_first_steps_only(library: Library) -> None:
    config = LIFE.model_copy(update={"saturated_queries": 12})
    for name, first, becomes in (("young", 1, "rolled_back"), ("grown", 30, "live")):
        digest = take_in(library, name)
        library.append("live", digest, by="exam", why="passed", step=library.next_step)
        life = Life(config)
        begins = library.next_step
        train(life, library, range(begins, begins + first), digest, honest, live=True)
        standing = train(life, library, range(begins + first, begins + first + 5), digest, constant, live=True)
        assert standing.event == becomes, name


def test_raw_scores_outside_the_range_of_the_exam_take_a_calibrated_tool_out(library: Library) -> None:
    rng = random.Random(0)
    learned = fit([(rng.gauss(5 if right else 0, 1), right) for right in (True, False) * 100])
    spec = make_spec("judge", kind="reward_model", calibration=learned, source_sha256="", boxed=False)
    library.propose(spec, None, by="scout", why="open questions have no tool")
    library.put_exam(spec.digest, card={}, text="", transcript=[], passed=True, by="exam", why="passed")
    library.append("live", spec.digest, by="exam", why="passed", step=1)
    again = Library.read(library.path).spec(spec.digest)
    assert again == spec and again.calibration == learned, "a calibration is a part of the spec"
    life = Life(LIFE)
    life.knows([spec])
    for step in range(1, 4):
        assert [decision.event for decision in life.decide(step, library)] == []
        library.snapshot(step)
        for session in range(20):
            life.saw_response(
                step=step,
                uid=f"{step}",
                session=session,
                query=f"{step}",
                value=0.9,
                parts=[part(spec.digest, 0.9, "scored", raw=5.0 if session or step < 3 else 1e6)],
            )
    assert life.decide(4, library) == [], "1 of 60 is no alarm"
    for session in range(20, 30):
        life.saw_response(
            step=3, uid="3", session=session, query="3", value=1.0, parts=[part(spec.digest, 1.0, "scored", raw=1e6)]
        )
    [decision] = life.decide(4, library)
    assert decision.event == "rolled_back" and "11 of 70 raw scores lie outside the range" in decision.why


# --- Canaries ---------------------------------------------------------------------------------------------------------


def test_a_canary_that_flips_quarantines_the_tool_and_names_the_steps(library: Library) -> None:
    digest = take_in(library)
    library.append("live", digest, by="exam", why="passed", step=1)
    life = Life(LIFE)
    life.expect(digest, "known-wrong", 0.0)
    for step in range(1, 5):
        life.saw_canary(step=step, digest=digest, canary="known-wrong", outcome="scored", value=0.02)
        assert life.decide(step + 1, library) == []
    life.saw_canary(step=5, digest=digest, canary="known-wrong", outcome="failed", value=None)
    assert life.decide(6, library) == [], "a failed call says nothing about the answer"
    life.saw_canary(step=7, digest=digest, canary="known-wrong", outcome="scored", value=1.0)
    [decision] = life.decide(8, library)
    assert decision.event == "quarantined"
    assert "canary known-wrong got 1 at step 7, and must get 0" in decision.why and "steps 5 to 7" in decision.why


@pytest.mark.parametrize(("every", "doubt"), [(1, "steps 5 to 5"), (10, "steps 41 to 50")])
def test_steps_are_in_doubt_since_the_canaries_before_the_flip(library: Library, every: int, doubt: str) -> None:
    digest = take_in(library)
    library.append("live", digest, by="exam", why="passed", step=1)
    life = Life(LIFE)
    for canary in "abc":
        life.expect(digest, canary, 1.0)
    for step in range(every, 6 * every, every):
        for canary in "abc":
            value = float((step, canary) != (5 * every, "b"))
            life.saw_canary(step=step, digest=digest, canary=canary, outcome="scored", value=value)
    assert doubt in life.decide(5 * every + 1, library)[0].why


def test_what_a_canary_gets_at_first_is_what_it_must_get_where_no_exam_has_said_so(library: Library) -> None:
    digest = take_in(library)
    library.append("live", digest, by="exam", why="passed", step=1)
    life = Life(LIFE)
    for value in (0.3, 0.31, 0.3):
        life.saw_canary(step=2, digest=digest, canary="c", outcome="scored", value=value)
    assert life.decide(3, library) == []
    life.saw_canary(step=3, digest=digest, canary="c", outcome="abstained", value=None)
    assert "got nothing" in life.decide(4, library)[0].why


def test_canaries_of_built_in_tools_come_from_all_of_their_kinds_and_are_few() -> None:
    spec = make_spec(scope=replace(make_spec().scope, kinds=frozenset({Kind.MATH, Kind.CHOICE})))
    chosen = public(spec, 6)
    assert len(chosen) == len({canary.id for canary in chosen}) == 6
    assert {canary.query.reference == "B" for canary in chosen} == {True, False}
    assert chosen[0].sample(3).uid != chosen[0].sample(4).uid, "a canary looks like any response"


# --- In the service ---------------------------------------------------------------------------------------------------


def settings(run_dir: Path, **life: Any) -> RlarConfig:
    return RlarConfig(run_dir=str(run_dir), life=LIFE.model_copy(update=life))


def prepare(run_dir: Path) -> ToolSpec:
    """A run's library with a tool in the shadow from step 1 on."""
    with Library(run_dir / FOLDER_NAME) as library:
        digest = take_in(library)
        library.append("shadow", digest, by="exam", why="passed", step=1)
        return library.spec(digest)


def tool_score(spec: ToolSpec, value: float | None) -> ToolScore:
    outcome = Outcome.FAILED if value is None else Outcome.SCORED
    return ToolScore(tool=spec.name, digest=spec.digest, outcome=outcome, raw=value, value=value)


def response(step: int, uid: str, session: int, spec: ToolSpec) -> Row:
    value = session / (SIZE - 1)
    sample = Sample(query=make_query(uid), response=str(session), step=step, uid=uid, session=session, group_size=SIZE)
    route = Route(
        parts=(RoutePart(tool=spec.name, digest=spec.digest),), reason="", kind=Kind.MATH, covered=True, snapshot="s"
    )
    score = Score(value=value, outcome=Outcome.SCORED, reason="", parts=(tool_score(spec, value),))
    return Row(sample=sample, route=route, score=score, sent=value, sent_as="value", received=0.0, seconds=0.0)


async def one_step(service: Service, step: int, shadow: ToolSpec, say: Say = honest) -> None:
    await service.begin_step(step)
    snapshot = await service.at(step)
    built_in = snapshot.tool("final_answer")
    rows = [response(step, f"{step}-{g}", s, built_in) for g in range(GROUPS) for s in range(SIZE)]
    await service.record(rows)
    shadows = [
        ShadowRow(
            uid=row.sample.uid,
            session=row.sample.session,
            step=step,
            score=tool_score(shadow, say(row.sample.uid, row.sample.session, row.sent)[0]),
        )
        for row in rows
        if shadow in snapshot.shadows
    ]
    await service.saw(shadows, ())


async def test_a_service_promotes_at_a_boundary_and_a_killed_one_decides_alike(tmp_path: Path) -> None:
    steps = {}
    for name, killed_at in (("whole", ()), ("killed", (2, 3, 4, 5))):
        shadow = prepare(tmp_path / name)
        service = Service(settings(tmp_path / name), "run")
        for step in range(1, 8):
            if step in killed_at:
                service.close()
                service = Service(settings(tmp_path / name), "run")
            await one_step(service, step, shadow)
        service.close()
        view = Library.read(tmp_path / name / FOLDER_NAME)
        steps[name] = [(event.event, event.step, event.by, event.why) for event in view.events][-1]
        assert [shadow in view.snapshot(step).tools for step in (3, 4)] == [False, True]
    assert steps["whole"] == steps["killed"]
    assert steps["whole"][:3] == ("live", 4, WATCH)


async def test_a_resumed_run_sees_what_the_first_one_saw_also_where_a_tool_was_promoted(tmp_path: Path) -> None:
    shadow = prepare(tmp_path)
    first = Service(settings(tmp_path), "first")
    for step in range(1, 8):
        await one_step(first, step, shadow)
    seen = [await first.at(step) for step in range(1, 8)]
    first.close()
    second = Service(settings(tmp_path), "second")
    for step in range(3, 8):
        await one_step(second, step, shadow, against)
    assert [await second.at(step) for step in range(3, 8)] == seen[2:]
    assert [await second.at(step) for step in (1, 2)] == seen[:2], "a straggler of an older step sees that step's tools"
    second.close()


async def test_what_was_handed_in_during_a_run_is_taken_in_at_the_next_boundary(tmp_path: Path) -> None:
    service = Service(settings(tmp_path), "run")
    await service.begin_step(1)
    await service.at(1)
    spec = make_spec()
    canaries = to_json([Canary(id="c1", query=make_query(), response="42", expect="good", value=1.0)])
    exam = Exam(card={}, text="", transcript=[], canaries=canaries, passed=True, why="passed")
    good = Submission(
        digest=spec.digest,
        spec=spec_to_json(spec),
        source=code("checker"),
        exam=exam,
        event="shadow",
        by="coder",
        why="math",
    )
    path = tmp_path / FOLDER_NAME
    (path / "inbox").mkdir()
    (path / "inbox" / "0-bad.json").write_text("{")
    hand_in(path, replace(good, source="another source"))
    hand_in(path, replace(good, digest=7, spec=None))
    hand_in(path, replace(good, exam=replace(exam, canaries=[{"id": "c1"}])))
    waits = hand_in(path, good)
    assert not (await service.at(1)).shadows
    await service.begin_step(2)
    assert (await service.at(2)).shadows == (spec,)
    assert not (await service.at(1)).shadows
    assert "shadow from step 2 on" in (path / "inbox" / "done" / f"{waits.stem}.txt").read_text()
    refusals = [file.read_text() for file in sorted((path / "inbox" / "done").glob("*.txt"))][:4]
    assert "no submission" in refusals[0] and "not the one that the spec names" in refusals[1]
    assert refusals[2].startswith("refused: ") and "no canaries" in refusals[3], "they keep nobody from the next one"
    assert not list((path / "inbox").glob("*.json"))
    [(_, [canary])] = [given for given in await service.canaries(2) if given[0] == spec]
    assert (canary.id, canary.value, canary.query.key) == ("c1", 1.0, make_query().key)
    assert await service.canaries(2) == (), "one reward worker is enough"
    service.close()


async def test_a_flipped_canary_takes_a_built_in_rule_out_at_the_next_boundary_and_a_restart_knows(
    tmp_path: Path,
) -> None:
    service = Service(settings(tmp_path), "run")
    spec = (await service.at(1)).tool("final_answer")

    def got(step: int, value: float) -> CanaryRow:
        return CanaryRow(canary="c", step=step, score=tool_score(spec, value))

    for step, value in ((1, 1.0), (2, 1.0), (3, 0.0)):
        await service.begin_step(step)
        await service.at(step)
        await service.saw((), (got(step, value),))
    service.close()
    service = Service(settings(tmp_path), "run")
    await service.begin_step(4)
    assert "final_answer" in {tool.name for tool in (await service.at(3)).tools}
    assert "final_answer" not in {tool.name for tool in (await service.at(4)).tools}
    service.close()
    with read(tmp_path) as db:
        assert [row["value"] for row in db.execute("SELECT value FROM canaries ORDER BY step")] == [1.0, 1.0, 0.0]
    events = Library.read(tmp_path / FOLDER_NAME).events
    assert "steps 3 to 3" in events[-1].why


async def test_canaries_are_for_tools_in_use_and_for_those_in_the_shadow(tmp_path: Path) -> None:
    shadow = prepare(tmp_path)
    service = Service(settings(tmp_path, canary_every=2), "run")
    await one_step(service, 1, shadow)
    assert await service.canaries(1) == ()
    await one_step(service, 2, shadow)
    given = await service.canaries(2)
    assert [spec.name for spec, _ in given] == ["checker", "final_answer"]
    assert all(0 < len(canaries) <= LIFE.canaries for _, canaries in given)
    service.close()


async def test_old_responses_give_way_and_rows_stay(tmp_path: Path) -> None:
    config = RlarConfig.model_validate({"run_dir": str(tmp_path), "ledger": {"keep_steps": 2}})
    service = Service(config, "run")
    for step in range(1, 6):
        await service.begin_step(step)
        spec = (await service.at(step)).tool("final_answer")
        row = response(step, f"{step}", 0, spec)
        await service.record([replace(row, sample=make_sample(f"text {step}", step=step, uid=f"{step}"))])
    service.close()
    with read(tmp_path) as db:
        assert db.execute("SELECT COUNT(*) FROM scores").fetchone()[0] == 5
        assert db.execute("SELECT MIN(step), MAX(step) FROM texts").fetchone()[:] == (3, 5)
