# SPDX-License-Identifier: Apache-2.0
"""The scorer and the rule runner together, on rules that behave in all ways that a rule can."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import planted
import pytest
from conftest import make_query, make_sample

from verl_rlar.config import RulesConfig, ScoringConfig
from verl_rlar.errors import ToolUnavailable
from verl_rlar.ledger import FILE_NAME, CanaryRow, Ledger, Row, ShadowRow, read
from verl_rlar.scoring import Scorer
from verl_rlar.tools.runner import RuleRunner
from verl_rlar.types import Kind, Outcome, Route, RoutePart, Sample, Score


@pytest.fixture(scope="module")
def runner() -> Iterator[RuleRunner]:
    with RuleRunner(
        RulesConfig(processes=2, memory_gb=4), tuple(tool.target for tool in planted.SNAPSHOT.tools)
    ) as made:
        yield made


def route_of(*names: str, weights: tuple[float, ...] = (1.0,)) -> Route:
    """A route of gates and scorers; the weights are those of the scorers, in their order."""
    left = list(weights)
    parts = []
    for name in names:
        spec = planted.SNAPSHOT.tool(name)
        parts.append(RoutePart(tool=name, digest=spec.digest, gate=spec.gate, weight=0.0 if spec.gate else left.pop(0)))
    return Route(
        parts=tuple(parts), reason="test", kind=Kind.SHORT_TEXT, covered=True, snapshot=planted.SNAPSHOT.version
    )


async def score(runner: RuleRunner, route: Route, sample: Sample | None = None, **config: float) -> Score:
    scorer = Scorer(ScoringConfig(**config), runner)
    return await scorer.score(sample or make_sample(), route, planted.SNAPSHOT)


async def test_a_right_and_a_wrong_answer_score_1_and_0(runner: RuleRunner) -> None:
    assert (await score(runner, route_of("same"))).value == 1.0
    wrong = await score(runner, route_of("same"), make_sample("41"))
    assert (wrong.value, wrong.outcome, wrong.reason) == (0.0, Outcome.SCORED, "compared")


async def test_raw_scores_are_mapped_to_0_1_by_the_range_of_the_tool(runner: RuleRunner) -> None:
    assert (await score(runner, route_of("half"))).value == 0.5
    assert (await score(runner, route_of("error_rate"))).value == 0.75, "lower is better where high < low"


async def test_parts_are_added_by_weight(runner: RuleRunner) -> None:
    assert (await score(runner, route_of("same", "half", weights=(0.25, 0.75)))).value == pytest.approx(0.25 + 0.375)


async def test_a_gate_decides_whether_but_not_how_much(runner: RuleRunner) -> None:
    assert (await score(runner, route_of("open_gate", "half"))).value == 0.5
    shut = await score(runner, route_of("shut_gate", "same"))
    assert (shut.value, shut.outcome) == (0.0, Outcome.SCORED)
    assert "no think block" in shut.reason


async def test_a_caught_cheat_scores_0_and_is_flagged(runner: RuleRunner) -> None:
    cheat = await score(runner, route_of("same", "cheat_catcher", weights=(0.5, 0.5)))
    assert (cheat.value, cheat.outcome) == (0.0, Outcome.HACKED)
    for beside in ("crashing", "abstaining"):  # else it would get what its siblings have on average
        cheat = await score(runner, route_of(beside, "cheat_catcher", weights=(0.5, 0.5)))
        assert (cheat.value, cheat.outcome) == (0.0, Outcome.HACKED)


@pytest.mark.parametrize(
    ("tool", "outcome", "reason"),
    [
        ("abstaining", Outcome.ABSTAINED, "no number"),
        ("crashing", Outcome.FAILED, "ZeroDivisionError"),
        ("dying", Outcome.FAILED, "died"),
        ("hungry", Outcome.FAILED, "memory"),
        ("not_a_number", Outcome.FAILED, "nan"),
        ("too_high", Outcome.FAILED, "outside its range"),
        ("wordy", Outcome.FAILED, "instead of a Verdict"),
        ("homeless", Outcome.FAILED, "no box"),
        ("endless", Outcome.FAILED, "still at work"),
        ("spelled", Outcome.FAILED, "something else than numbers"),
        ("odd_error", Outcome.FAILED, "TwoWords: no words"),
        ("quitting", Outcome.FAILED, "SystemExit: usage"),
    ],
)
async def test_what_is_no_score_is_unscored_and_never_0(
    runner: RuleRunner, tool: str, outcome: Outcome, reason: str
) -> None:
    result = await score(runner, route_of(tool))
    assert (result.value, result.outcome) == (None, outcome)
    assert reason in result.reason


async def test_a_missing_part_makes_the_whole_score_unscored(runner: RuleRunner) -> None:
    result = await score(runner, route_of("same", "crashing", weights=(0.9, 0.1)))
    assert (result.value, result.outcome) == (None, Outcome.FAILED)
    assert [part.outcome for part in result.parts] == [Outcome.SCORED, Outcome.FAILED]


async def test_the_deadline_of_the_scorer_holds_for_a_tool_that_allows_itself_more(runner: RuleRunner) -> None:
    start = time.monotonic()
    result = await score(runner, route_of("sleeper"), timeout_s=0.5)
    assert result.outcome is Outcome.FAILED
    assert "rlar.scoring.timeout_s" in result.reason
    assert time.monotonic() - start < 30, "the sleeper sleeps for 60 s"


async def test_hung_calls_do_not_keep_their_workers_from_the_next_sample(runner: RuleRunner) -> None:
    hung = [score(runner, route_of("endless")) for _ in range(4)]
    results = await asyncio.gather(*hung, score(runner, route_of("same")))
    assert [r.outcome for r in results] == [Outcome.FAILED] * 4 + [Outcome.SCORED]
    assert (await score(runner, route_of("same"))).value == 1.0


def known_to_be_fast(runner: RuleRunner, *names: str) -> None:
    """As after some calls of these tools that took no time."""
    for name in names:
        runner._seconds[planted.SNAPSHOT.tool(name).digest] = 1e-4


async def test_calls_that_wait_go_together(runner: RuleRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    known_to_be_fast(runner, "same", "half")
    sent, schedule = [], runner._schedule
    monkeypatch.setattr(runner, "_schedule", lambda calls: (sent.append(len(calls)), schedule(calls))[1])
    samples = [make_sample(str(40 + number % 3)) for number in range(60)]
    results = await asyncio.gather(*(score(runner, route_of("same"), sample) for sample in samples))
    assert [result.value for result in results] == [1.0 if number % 3 == 2 else 0.0 for number in range(60)]
    assert sum(sent) == 60 and len(sent) < 15
    sent.clear()
    runner._seconds.clear()  # nothing is known of what a call takes
    await asyncio.gather(*(score(runner, route_of("half")) for _ in range(4)))
    assert sent[:2] == [1, 1]


@pytest.mark.parametrize(("culprit", "reason"), [("dying", "died"), ("endless", "still at work"), ("hungry", "memory")])
async def test_who_goes_together_with_a_call_that_breaks_all_off_is_scored(
    runner: RuleRunner, culprit: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    known_to_be_fast(runner, "same", culprit)
    sent, schedule = [], runner._schedule
    monkeypatch.setattr(runner, "_schedule", lambda calls: (sent.append(len(calls)), schedule(calls))[1])
    names = ["same"] * 5 + [culprit] + ["same"] * 6
    results = await asyncio.gather(*(score(runner, route_of(name)) for name in names))
    assert [result.value for result in results] == [1.0] * 5 + [None] + [1.0] * 6
    assert reason in results[5].reason
    assert sent[0] == 6, "it went with others at first"
    if culprit != "hungry":  # which is answered, as nothing else is broken off by it
        assert sent.count(1) >= 6


async def test_a_call_that_hangs_within_its_own_deadline_keeps_those_that_go_with_it_a_second_and_no_longer(
    runner: RuleRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    known_to_be_fast(runner, "same", "sleeper")
    limits, pool, schedule = [], runner._pool, runner._pool.schedule

    def seen(function: Any, *, args: Any, timeout: float) -> Any:
        limits.append((len(args[0]), timeout))
        return schedule(function, args=args, timeout=timeout)

    monkeypatch.setattr(pool, "schedule", seen)
    calls = [score(runner, route_of(name), timeout_s=30) for name in ("same", "sleeper", "same", "same")]
    results = await asyncio.gather(*calls)
    assert [result.value for result in results] == [1.0, None, 1.0, 1.0]
    assert "rlar.scoring.timeout_s" in results[1].reason, "it sleeps for 60 s, and may for 90 s"
    assert limits[0] == (2, 1.0) and (1, 90.0) in limits and (1, 5.0) in limits


async def test_calls_of_a_runner_that_is_closed_are_failed_and_not_left_waiting() -> None:
    with RuleRunner(RulesConfig(processes=1), (planted.same.spec.target,)) as runner:
        calls = [asyncio.create_task(runner.run(planted.sleeper.spec, make_sample())) for _ in range(3)]
        while not runner._feeders or len(runner._waiting) == 3:
            await asyncio.sleep(0)
    ended = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 60)
    assert all(isinstance(one, ToolUnavailable) for one in ended), ended


async def test_a_call_whose_process_dies_is_tried_once_more(runner: RuleRunner, tmp_path: Path) -> None:
    sample = make_sample(query=make_query(mark=str(tmp_path / "mark")))
    assert (await score(runner, route_of("dying_once"), sample)).value == 1.0
    (tmp_path / "mark").unlink()
    assert (await score(runner, route_of("dying_once"), sample, retries=0)).outcome is Outcome.FAILED


async def test_what_a_tool_answers_in_numpys_numbers_and_half_characters_is_in_the_ledger(
    runner: RuleRunner, tmp_path: Path
) -> None:
    sample, route = make_sample(uid="u"), route_of("numpys")
    result = await score(runner, route, sample)
    part = result.parts[0]
    assert (type(result.value), result.value, part.raw, part.details) == (float, 0.5, 0.5, {"cosine": 0.25})
    row = Row(sample=sample, route=route, score=result, sent=0.5, sent_as="value", received=1.0, seconds=0.1)
    with Ledger(tmp_path / FILE_NAME, token="run") as ledger:
        ledger.add([row])
        ledger.add_shadows([ShadowRow(uid="u", session=0, step=1, score=part)])
        ledger.add_canaries([CanaryRow(canary="c", step=1, score=part)])
    with read(tmp_path) as db:
        for table in ("scores", "shadows", "canaries"):
            assert tuple(db.execute(f"SELECT value, reason FROM {table}").fetchone()) == (0.5, "got \\ud83d")


async def test_after_what_cannot_be_sent_back_the_next_call_is_answered(runner: RuleRunner) -> None:
    assert (await score(runner, route_of("odd_error"))).outcome is Outcome.FAILED
    assert (await score(runner, route_of("same"))).value == 1.0


async def test_a_worker_that_dies_while_idle_costs_no_later_call() -> None:
    with RuleRunner(RulesConfig(processes=1), (planted.numbered.spec.target,)) as runner:
        worker = int((await score(runner, route_of("numbered"))).reason)
        os.kill(worker, signal.SIGKILL)
        end = time.monotonic() + 60
        while runner._pool.active and time.monotonic() < end:
            await asyncio.sleep(0.05)
        assert not runner._pool.active, "the pool has seen it, and takes no call any more"
        again = await score(runner, route_of("numbered"), timeout_s=60)
        assert again.value == 1.0 and int(again.reason) != worker
    with pytest.raises(ToolUnavailable, match="were ended"):
        await runner.run(planted.numbered.spec, make_sample())


async def test_a_route_without_tools_is_unscored_with_the_routers_reason(runner: RuleRunner) -> None:
    route = Route(parts=(), reason="uncovered: open", kind=Kind.OPEN, covered=False, snapshot=planted.SNAPSHOT.version)
    result = await score(runner, route)
    assert (result.value, result.outcome, result.reason) == (None, Outcome.ABSTAINED, "uncovered: open")


ORPHANING = """
import asyncio, sys
sys.path.insert(0, {tests!r})
import planted
from verl_rlar.config import RulesConfig
from verl_rlar.tools.runner import RuleRunner
from conftest import make_sample

async def main():
    with RuleRunner(RulesConfig(processes=2), (planted.same.spec.target,)) as runner:
        await runner.run(planted.same.spec, make_sample())
        print("ready", flush=True)
        await runner.run(planted.endless.spec, make_sample())

if __name__ == "__main__":
    planted.endless.spec.__dict__["timeout_s"] = 3.0
    asyncio.run(main())
"""


def test_no_worker_outlives_a_caller_that_was_killed(tmp_path: Path) -> None:
    script = tmp_path / "caller.py"
    script.write_text(ORPHANING.format(tests=str(Path(__file__).parent)))
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as caller:
        assert caller.stdout is not None
        assert caller.stdout.readline() == "ready\n"
        workers = {int(pid) for pid in children_of(caller.pid)}
        assert len(workers) >= 2
        os.kill(caller.pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]


def children_of(pid: int) -> list[str]:
    """Process ids of the children of all threads of a process."""
    return [child for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]
