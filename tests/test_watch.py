# SPDX-License-Identifier: Apache-2.0
"""Watching a run: what is raised, what is not, what is done about it at a step boundary, and that a restart knows."""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_query
from test_acquirer import LIVE, finished, make_acquirer, started
from test_acquirer import row as asked_row
from test_library import make_spec
from test_life import honest, one_step, prepare, settings, tool_score

from verl_rlar.calibration import fit
from verl_rlar.config import RlarConfig, WatchConfig, parse
from verl_rlar.errors import StoppedByAlarm
from verl_rlar.inbox import waiting
from verl_rlar.ledger import CanaryRow, Row, ShadowRow, read
from verl_rlar.library import FOLDER_NAME, Library, LibraryView
from verl_rlar.report.figures import gather
from verl_rlar.service import Service
from verl_rlar.signs import correlation, flat, g_test, likeness, marks, psi, ranked_alike
from verl_rlar.types import Kind, Outcome, Sample, Score, ToolSpec
from verl_rlar.watch import Alarm, Tally, Watch

LEARNED = fit([(random.Random(n).gauss(5 * (n % 2), 1), bool(n % 2)) for n in range(200)])
JUDGE = make_spec("judge", kind="reward_model", calibration=LEARNED, source_sha256="", boxed=False)
OTHER = make_spec("other")
GATE = make_spec("gate", gate=True)
CONFIG = WatchConfig(window=4, again_after=6)
SIZE = 4

Part = dict[str, Any]


def part(spec: ToolSpec, value: float | None, outcome: str = "scored", raw: float = 5.0) -> Part:
    return {"digest": spec.digest, "outcome": outcome, "raw": None if value is None else raw, "value": value}


def words(dice: random.Random, count: int) -> str:
    return " ".join(f"w{dice.randrange(100_000)}" for _ in range(count))


class Say:
    """What is seen at a place: parts and text of a response."""

    def __init__(self, step: int, group: int, session: int) -> None:
        self.dice = random.Random(f"{step} {group} {session}")
        self.step, self.group, self.session = step, group, session

    def healthy(self) -> tuple[list[Part], str]:
        return [part(JUDGE, self.dice.random())], words(self.dice, 40)

    def failed(self) -> tuple[list[Part], str]:
        return [part(JUDGE, None, "failed") if self.dice.random() < 0.2 else part(JUDGE, self.dice.random())], "x"

    def abstained(self) -> tuple[list[Part], str]:
        return [part(JUDGE, None, "abstained") if self.dice.random() < 0.5 else part(JUDGE, self.dice.random())], "x"

    def outside(self) -> tuple[list[Part], str]:
        return [part(JUDGE, self.dice.random(), raw=1e6 if self.dice.random() < 0.2 else 5.0)], "x"

    def flat(self) -> tuple[list[Part], str]:
        return [part(JUDGE, random.Random(self.group).random())], "x"

    def saturated(self) -> tuple[list[Part], str]:
        return [part(JUDGE, 1.0 - 1e-3 * self.dice.random())], "x"

    def disagree(self) -> tuple[list[Part], str]:
        value = self.dice.random()
        return [part(JUDGE, value), part(OTHER, 1.0 - value)], "x"

    def length(self) -> tuple[list[Part], str]:
        count = self.dice.randrange(10, 200)
        return [part(JUDGE, count / 200 + 0.1 * self.dice.random())], words(self.dice, count)

    def format(self) -> tuple[list[Part], str]:
        count = self.dice.randrange(8)
        body = words(self.dice, 40 - 2 * count)
        return [part(JUDGE, count / 8)], "\n".join(["- **w1**"] * count + [body])

    def copied(self) -> tuple[list[Part], str]:
        best = self.session == 0
        text = f"{words(random.Random(1), 60)} {self.group}" if best else words(self.dice, 60)
        return [part(JUDGE, 0.9 if best else 0.5 * self.dice.random())], text


def train(
    watch: Watch,
    steps: range,
    say: Callable[[Say], tuple[list[Part], str]],
    cluster: Callable[[int, int], str] = lambda step, group: "open#1",
    groups: int = 16,
    flipped: dict[str, str] | None = None,
    keep: Callable[[int, dict[tuple[str, str], Tally]], None] = lambda step, tallies: None,
) -> list[Alarm]:
    """Some steps of a training; what was raised before each of them, and before the one after them."""
    watch.knows([JUDGE, OTHER, GATE])
    found: list[Alarm] = []
    for step in (*steps, steps[-1] + 1):
        for done, tallies in watch.close(step):
            keep(done, tallies)
        found += watch.judge(step, flipped)
        for group in range(groups) if step in steps else ():
            for session in range(SIZE):
                parts, text = say(Say(step, group, session))
                watch.saw_response(
                    step=step,
                    uid=f"{step}-{group}",
                    session=session,
                    query=f"{step}-{group}",
                    cluster=cluster(step, group),
                    kind=Kind.OPEN,
                    covered=True,
                    parts=parts,
                    text=text,
                )
    return found


def test_of_a_healthy_tool_nothing_is_raised() -> None:
    assert train(Watch(CONFIG), range(1, 20), Say.healthy) == []


@pytest.mark.parametrize(
    ("sign", "figure", "least"),
    [
        ("failed", "share", 0.1),
        ("abstained", "share", 0.3),
        ("outside", "share", 0.1),
        ("flat", "share", 1.0),
        ("saturated", "mean", 0.98),
        ("disagree", "share", 0.3),
        ("length", "r", 0.9),
        ("format", "r", 0.9),
        ("copied", "share", 0.9),
    ],
)
def test_what_is_wrong_with_a_tool_is_raised_with_its_figures_and_examples_and_not_at_every_step(
    sign: str, figure: str, least: float
) -> None:
    found = train(Watch(CONFIG), range(1, 12), getattr(Say, sign))
    raised = [alarm for alarm in found if alarm.sign == sign and alarm.digest == JUDGE.digest]
    assert len(raised) == 2 and raised[1].step - raised[0].step == CONFIG.again_after
    first = raised[0]
    assert (first.tool, first.cluster, first.kind, first.action) == ("judge", "open#1", Kind.OPEN, "log")
    assert first.figures[figure] >= least and 1 < first.step <= 5
    assert (first.examples and all(uid.partition("-")[0].isdecimal() for uid in first.examples)) or sign == "saturated"
    others = {alarm.sign for alarm in found} - {sign}
    assert others <= {"flat": {"length"}, "copied": {"length"}, "format": {"length"}}.get(sign, set()), found


def test_a_gate_says_the_same_to_everybody_and_is_no_tool_to_disagree_with() -> None:
    found = train(Watch(CONFIG), range(1, 8), lambda say: ([part(GATE, 1.0), *say.healthy()[0]], "x"))
    assert found == []


def test_a_tool_in_the_shadow_is_watched_too_and_disagrees() -> None:
    watch = Watch(CONFIG)
    watch.knows([JUDGE, OTHER])
    for step in range(1, 4):
        for group in range(16):
            for session in range(SIZE):
                value = session / 3
                place: dict[str, Any] = {"step": step, "uid": f"{step}-{group}", "session": session}
                watch.saw_response(
                    **place, query="q", cluster="c", kind=Kind.OPEN, covered=True,
                    parts=[part(JUDGE, value)], text=None,
                )  # fmt: skip
                watch.saw_shadow(**place, part=part(OTHER, 1 - value))
    assert len(list(watch.close(4))) == 3
    assert {(alarm.sign, alarm.tool) for alarm in watch.judge(4)} == {("disagree", "judge"), ("disagree", "other")}


def test_a_flipped_canary_is_an_alarm() -> None:
    found = train(Watch(CONFIG), range(1, 3), Say.healthy, flipped={JUDGE.digest: "canary c got 1, and must get 0"})
    assert [(alarm.sign, alarm.text) for alarm in found] == [("canary", "canary c got 1, and must get 0")]


# --- Shares -----------------------------------------------------------------------------------------------------------


def mixture(shares: dict[int, list[float]]) -> Callable[[int, int], str]:
    """Clusters drawn by the shares that hold from a step on."""

    def cluster(step: int, group: int) -> str:
        weights = shares[max(first for first in shares if first <= step)]
        return f"c#{random.Random(f'{step} {group}').choices(range(len(weights)), weights)[0]}"

    return cluster


def test_shifting_shares_are_raised_within_three_steps_and_a_new_cluster_by_its_name() -> None:
    watch = Watch(WatchConfig())
    cluster = mixture({1: [3, 1, 0], 20: [2, 2, 2], 40: [0, 1, 5]})
    found = train(watch, range(1, 60), Say.healthy, cluster)
    drifts = [alarm for alarm in found if alarm.sign == "drift"]
    assert len(drifts) == 2 and 20 < drifts[0].step <= 23 and 40 < drifts[1].step <= 43
    assert "c#2 0% -> " in drifts[0].text and drifts[0].figures["psi"] > 0.1 and drifts[0].figures["p"] < 1e-4
    [new] = [alarm for alarm in found if alarm.sign == "new_cluster"]
    assert new.cluster == "c#2" and 20 < new.step <= 23 and new.figures["first"] in (20, 21)
    assert new.action == "log", "a tool fits them: nothing is to be looked for"
    assert {uid.partition("-")[0] for uid in new.examples} <= {"20", "21", "22"}


def test_stationary_streams_raise_no_drift_but_one_in_many_thousand_steps() -> None:
    """Shares of 20 clusters, some rare, that never change; counted, as they are drawn, without a watch around them."""
    dice = np.random.default_rng(0)
    steps = alarms = 0
    for _ in range(40):
        shares = dice.dirichlet([0.5] * 20)
        watch = Watch(WatchConfig())
        for step in range(1, 101):
            counts = dice.multinomial(32, shares)
            watch._steps[step - 1] = {
                ("", f"c#{n}"): Tally.from_json(json.dumps({"counts": {"groups": int(k)}, "best": []}))
                for n, k in enumerate(counts)
                if k
            }
            alarms += sum(alarm.sign == "drift" for alarm in watch._of_shares(step))
            steps += 1
    assert steps == 4000 and alarms <= 2, "drift_p is 1e-4 a step, and overlapping steps are no further tests"


@pytest.mark.parametrize("g", [3.0, 6.635, 15.0])
def test_the_p_value_of_two_shares_is_that_of_chi_square(g: float) -> None:
    """Two clusters, so one degree of freedom, for which the distribution is known in closed form."""
    low, high = 0.0, 0.5
    for _ in range(60):
        shift = (low + high) / 2
        n = 10_000
        counts = [(0.5 + shift / 2) * n, (0.5 - shift / 2) * n]
        seen = 2 * sum(2 * c * math.log(c / (n / 2)) for c in counts)
        low, high = (shift, high) if seen < g else (low, shift)
    before = {"a": round(counts[0]), "b": round(counts[1])}
    p = g_test(before, {"a": before["b"], "b": before["a"]})
    assert p == pytest.approx(math.erfc(math.sqrt(g / 2)), rel=0.05)


def test_statistics_of_little_say_nothing() -> None:
    assert g_test({}, {"a": 3}) == g_test({"a": 5}, {"a": 3}) == 1.0
    for names in (3000, 3001):
        even, tilted = ({str(name): 20 + tilt * (name % 2) for name in range(names)} for tilt in (0, 16))
        assert g_test(even, even) == 1.0 and 0.7 < g_test(even, tilted) < 0.9
        assert g_test(even, {name: 40 for name in even} | {"0": 40_000}) < 1e-9
    assert psi({}, {}) == 0.0 and psi({"a": 10}, {"a": 10}) == 0.0
    assert psi({"a": 50, "b": 50}, {"a": 90, "b": 10}) > 0.5
    assert correlation([(1, 1), (2, 2)]) == (None, 2)
    assert correlation([(1, 5), (2, 5), (3, 5)]) == (None, 3)
    assert correlation([(1, 2), (2, 4), (3, 6)]) == (pytest.approx(1.0), 3)
    assert flat([]) and flat([0.5, 0.5]) and not flat([0.5, 0.6])
    assert ranked_alike({0: 1.0, 1: 0.0, 2: 0.5}, {0: 1.0, 1: 0.5, 2: 0.5}) == (2, 2)
    assert marks("- a\n* b\n1. c\n# d\n**e** and **f**\nplain") == 6 and marks("plain\ntext - so") == 0


def test_near_copies_are_found_and_short_or_other_texts_are_not() -> None:
    found = other = 0
    for n in range(100):
        dice = random.Random(n)
        text = words(dice, 80).split()
        copy = [*text]
        copy[dice.randrange(80)] = "another"
        found += bool({*likeness(" ".join(text))} & {*likeness(" ".join(copy))})
        half = text[:40] + words(random.Random(n + 1000), 40).split()
        other += bool({*likeness(" ".join(text))} & {*likeness(" ".join(half))})
    assert found >= 80 and other <= 20
    assert likeness("the answer is 18") == ()


# --- Across restarts --------------------------------------------------------------------------------------------------


def test_a_watch_that_was_restored_raises_what_the_first_one_would_have() -> None:
    cluster = mixture({1: [3, 1, 0], 12: [1, 1, 3]})

    def say(place: Say) -> tuple[list[Part], str]:
        return place.length() if place.step >= 8 else place.healthy()

    config = CONFIG.model_copy(update={"min_correlated": 80})
    kept: dict[int, dict[tuple[str, str], Tally]] = {}
    whole = train(Watch(config), range(1, 25), say, cluster, keep=kept.__setitem__)
    assert {alarm.sign for alarm in whole} >= {"length", "drift", "new_cluster"}
    for resumed in (6, 10, 13, 18):
        watch = Watch(config)
        before = [step for step in kept if step < resumed]
        tallies = [(s, *key, tally.as_json()) for s in before[-watch.reach :] for key, tally in kept[s].items()]
        first: dict[str, int] = {}
        for step in before:
            for _, id in kept[step]:
                first.setdefault(id, step)
        raised = [(a.sign, a.digest, a.cluster, a.step) for a in whole if a.step < resumed]
        watch.restore(tallies, first.items(), raised)
        assert train(watch, range(resumed, 25), say, cluster) == [a for a in whole if a.step >= resumed], resumed


# --- In the service ---------------------------------------------------------------------------------------------------


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    prepare(tmp_path)
    yield tmp_path


def watched(run_dir: Path, **actions: str) -> RlarConfig:
    config = settings(run_dir)
    watch = {"window": 4, "again_after": 6, "min_correlated": 60, "actions": actions}
    return config.model_copy(update={"watch": parse({"watch": watch}).watch})


async def long_is_good(service: Service, step: int, *, broken: bool = True) -> None:
    """A step in whose groups a longer response is paid more, if so wanted."""
    await service.begin_step(step)
    spec = (await service.at(step)).tool("final_answer")
    rows = []
    for group in range(8):
        query = make_query(f"What do you get when you add {group} to {step}?")
        route = await service.route(query, await service.at(step))
        for session in range(SIZE):
            dice = random.Random(f"{step} {group} {session}")
            value = session / (SIZE - 1)
            text = words(dice, 10 + 20 * session if broken else 40)
            sample = Sample(
                query=query, response=text, step=step, uid=f"{step}-{group}", session=session, group_size=SIZE
            )
            score = Score(value=value, outcome=Outcome.SCORED, reason="", parts=(tool_score(spec, value),))
            rows.append(
                Row(sample=sample, route=route, score=score, sent=value, sent_as="value", received=0.0, seconds=0.0)
            )
    await service.record(rows)


def raised(run_dir: Path) -> list[tuple[int, str, str, str]]:
    with read(run_dir) as db:
        return [tuple(row) for row in db.execute("SELECT step, sign, tool, action FROM alarms ORDER BY step, sign")]


async def test_an_alarm_is_in_the_log_the_metrics_the_ledger_and_the_report(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    service = Service(watched(run_dir), "run")
    for step in range(1, 4):
        await long_is_good(service, step)
    await service.begin_step(4)
    numbers = await service.metrics(4)
    assert (
        numbers["rlar/alarms/length"] == 1.0 and numbers["rlar/alarms"] >= 1.0 and numbers["rlar/alarms/drift"] == 0.0
    )
    assert (await service.metrics(4))["rlar/alarms"] == 0.0
    assert "alarm length (log), final_answer on math/number#1: longer responses are paid more" in caplog.text
    [row] = [row for row in raised(run_dir) if row[1] == "length"]
    assert row[2:] == ("final_answer", "log")
    assert "final_answer" in {tool.name for tool in (await service.at(4)).tools}, "log does nothing else"
    service.close()
    figures = gather(run_dir, LibraryView(run_dir / FOLDER_NAME))
    [one] = [one for one in figures["raised"] if one["sign"] == "length"]
    assert one["figures"]["r"] > 0.9 and one["examples"] and one["cluster"].startswith("math/number")
    [alarm] = [alarm for alarm in figures["alarms"] if alarm["title"].endswith("length is paid")]
    assert alarm["tool"] == one["digest"] and f"Before step {row[0]}, final_answer, math/number#1" in alarm["title"]


async def test_a_quarantine_takes_effect_at_the_boundary_and_not_in_a_step(run_dir: Path) -> None:
    service = Service(watched(run_dir, length="quarantine"), "run")
    live: dict[int, bool] = {}
    for step in range(1, 4):
        await service.begin_step(step)
        live[step] = "final_answer" in {tool.name for tool in (await service.at(step)).tools}
        if not live[step]:
            break
        await long_is_good(service, step)
        assert "final_answer" in {tool.name for tool in (await service.at(step)).tools}, "its step is not over"
    assert list(live.values()) == [*[True] * (len(live) - 1), False] and len(live) > 1
    service.close()
    event = Library.read(run_dir / FOLDER_NAME).events[-1]
    assert event.event == "quarantined" and event.why.startswith("alarm length on math/number#1: longer responses")


async def test_an_alarm_can_stop_the_run_with_what_was_seen(run_dir: Path) -> None:
    service = Service(watched(run_dir, length="stop"), "run")
    with pytest.raises(StoppedByAlarm, match=r"length, final_answer: longer responses are paid more.*rlar\.watch"):
        for step in range(1, 6):
            await long_is_good(service, step)
    service.close()


async def test_a_killed_service_and_a_resumed_run_raise_what_a_whole_one_raises(tmp_path: Path) -> None:
    found = {}
    for name in ("whole", "killed", "resumed"):
        prepare(tmp_path / name)
        config = watched(tmp_path / name)
        service = Service(config, "run")
        for step in range(1, 10):
            if name == "killed":
                service.close()
                service = Service(config, "run")
            if name == "resumed" and step == 7:  # from the checkpoint of step 4
                service.close()
                service = Service(config, "again")
                for again in (5, 6):
                    await long_is_good(service, again, broken=again >= 2)
            await long_is_good(service, step, broken=step >= 2)
        await service.begin_step(10)
        service.close()
        figures = gather(tmp_path / name, LibraryView(tmp_path / name / FOLDER_NAME))
        found[name] = [(one["step"], one["sign"], one["figures"], one["examples"]) for one in figures["raised"]]
    assert len([one for one in found["whole"] if one[1] == "length"]) == 2, "in an epoch like in the next: again later"
    assert found["killed"] == found["whole"] == found["resumed"]


async def test_a_flipped_canary_is_raised_beside_the_quarantine(run_dir: Path) -> None:
    service = Service(watched(run_dir), "run")
    spec = (await service.at(1)).tool("final_answer")
    for step, value in ((1, 1.0), (2, 0.0)):
        await service.begin_step(step)
        await service.at(step)
        await service.saw((), (CanaryRow(canary="c", step=step, score=tool_score(spec, value)),))
    await service.begin_step(3)
    service.close()
    assert (3, "canary", "final_answer", "log") in raised(run_dir)


async def test_what_is_off_is_not_watched(run_dir: Path) -> None:
    config = watched(run_dir)
    service = Service(config.model_copy(update={"watch": config.watch.model_copy(update={"enabled": False})}), "run")
    for step in range(1, 6):
        await long_is_good(service, step)
        spec = (await service.at(step)).tool("final_answer")
        await service.saw((ShadowRow(uid="u", session=0, step=step, score=tool_score(spec, 1.0)),), ())
    service.close()
    assert raised(run_dir) == []
    assert service._watch._open == {}, "nothing is kept that nobody counts up"


async def test_scores_of_a_fallback_are_no_tools_in_place_to_agree_with(tmp_path: Path) -> None:
    shadow = prepare(tmp_path)
    service = Service(settings(tmp_path), "run")

    def uncovered(row: Row) -> Row:
        return replace(row, route=replace(row.route, covered=False))

    record = service.record
    service.record = lambda rows: record([uncovered(row) for row in rows])  # type: ignore[method-assign]
    for step in range(1, 6):
        await one_step(service, step, shadow, lambda uid, session, place: honest(uid, session, 1.0 - place))
    service.close()
    event = Library.read(tmp_path / FOLDER_NAME).events[-1]
    assert event.event == "live" and "say too little to compare with" in event.why


# --- What is done beside the training ---------------------------------------------------------------------------------


async def test_a_tool_that_is_asked_for_is_looked_for_at_once_also_where_one_fits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    acquirer = make_acquirer(tmp_path, window=100)
    acquirer.saw(asked_row(Kind.OPEN, True, "How is it?", "open#2"))
    acquirer.saw(asked_row(Kind.OPEN, True, "And else?", "open#3"))
    acquirer.begin_step(1, LIVE)
    assert started(tmp_path) == [], "the window is not full, and a tool fits"
    acquirer.ask(Kind.OPEN, "open#2", "new prompts")
    acquirer.begin_step(2, LIVE)
    await finished(acquirer)
    (order,) = started(tmp_path)
    assert [query["messages"][0]["content"] for query in order["gap"]["queries"]] == ["How is it?"]
    assert "50 % of the responses are to open queries (open#2) without a competent tool: new prompts;" in caplog.text
    acquirer.begin_step(3, LIVE)
    assert len(started(tmp_path)) == 1, "once"


async def test_a_tool_that_does_not_pass_any_more_is_quarantined_after_its_exam(tmp_path: Path) -> None:
    from verl_rlar.reexam import Reexaminer

    labelled = tmp_path / "labelled.jsonl"
    rows = [
        {
            "prompt": f"What is {n} + {n}?",
            "reference": str(2 * n),
            "response": f"{2 * n + wrong}",
            "is_correct": not wrong,
        }
        for n in range(3, 40)
        for wrong in (0, 1)
    ]
    labelled.write_text("\n".join(map(json.dumps, rows)))
    config = parse(
        {
            "run_dir": str(tmp_path),
            "tools": ["planted_tools:always_one"],
            "acquire": {"labelled": [str(labelled)]},
            "exam": {"max_queries": 20, "repeats": 10},
            "watch": {"actions": {"flat": "re_exam"}},
        }
    )
    service = Service(config, "run")
    specs = {tool.name: tool for tool in (await service.at(1)).tools}
    reexaminer = service._reexaminer
    assert isinstance(reexaminer, Reexaminer)
    for name in ("always_one", "final_answer"):
        for _ in range(2):
            reexaminer.ask(specs[name].digest, "flat")
    for step in (1, 2):
        reexaminer.begin_step(step)
        await asyncio.wait_for(reexaminer.settled(), 120)
    assert len(waiting(tmp_path / FOLDER_NAME)) == 3, "two records, and a quarantine"
    await service.begin_step(2)
    live = {tool.name for tool in (await service.at(2)).tools}
    assert "always_one" not in live and "final_answer" in live
    service.close()
    events = [(event.event, event.by) for event in Library.read(tmp_path / FOLDER_NAME).events if event.by == "re-exam"]
    assert sorted(events) == [("examined", "re-exam"), ("quarantined", "re-exam"), ("rejected", "re-exam")]


def test_tallies_can_be_kept_and_added() -> None:
    one, other = Tally(), Tally()
    one.counts.update(calls=3, failed=1)
    one.best, one.length = [("u", "q", [1, 2])], [3.0, 1.0, 2.0, 1.5]
    other.counts.update(calls=2)
    other.best = [("v", "r", [2, 9]), ("w", "s", [7])]
    other.example("flat", "v")
    assert Tally.from_json(one.as_json()) == one
    one.add(Tally.from_json(other.as_json()))
    assert (one.counts["calls"], one.length[0], one.copies(), one.examples) == (5, 3.0, ["u", "v"], {"flat": ["v"]})
