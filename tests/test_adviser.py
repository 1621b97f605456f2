# SPDX-License-Identifier: Apache-2.0
"""An LLM is asked about routes beside a training: a real process, a real endpoint with a script, a real service."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import make_query
from llm_server import LlmServer, dies, of_request, says, text
from test_competence import record, tool

from verl_rlar.advice import Advice
from verl_rlar.adviser import Adviser
from verl_rlar.agents.counsel import read
from verl_rlar.cli.score import live_tools
from verl_rlar.clusters import Clusters
from verl_rlar.competence import Competence
from verl_rlar.config import RlarConfig, parse
from verl_rlar.ledger import read as read_ledger
from verl_rlar.router import decide
from verl_rlar.service import Service
from verl_rlar.types import Kind, Query, Snapshot

pytest.importorskip("smolagents", reason="the extra `agents` is not installed")

A, B = tool("a"), tool("b")
SNAPSHOT = Snapshot(tools=(A, B))
THIN = Competence(records=(record(A, 0.85), record(B, 0.8)))
POEMS = [make_query(f"Write a short poem about the sea in the month number {n}.", None) for n in range(12)]


def answer(
    tool: str | None = "b", name: str = "poems about the sea", why: str = "It was made for poems.", **more: Any
) -> str:
    return json.dumps({"name": name, "tool": tool, "why": why, "elsewhere": [], **more})


class Bench:
    """An adviser with all that it needs, without a service."""

    def __init__(self, folder: Path, url: str | None, known: Competence = THIN, **settings: Any) -> None:
        agents = {"url": url, "model": "some-llm", "retries": 0, "timeout_s": 20} if url else {}
        self.config: RlarConfig = parse(
            {"run_dir": str(folder), "agents": agents, "advice": {"prompts": 4, "again_after": 2} | settings}
        )
        self.known = known
        folder.mkdir(exist_ok=True)
        self.clusters = Clusters(folder / "clusters.jsonl")
        self.advice = Advice(folder / "advice.jsonl")
        self.adviser = Adviser(self.config, self.clusters, self.advice, self.competence)

    def competence(self, snapshot: Snapshot) -> Competence:
        return replace(self.known, rulings=self.advice.of(snapshot.advice)) if snapshot.advice else self.known

    def route(self, query: Query, step: int) -> Any:
        snapshot = self.advice.on(SNAPSHOT, step)
        cluster = self.clusters.of(query)
        return decide(query, snapshot, self.config.routing, cluster=cluster, competence=self.competence(snapshot))

    def visit(self, queries: Sequence[Query], step: int = 0) -> list[Any]:
        routes = [self.route(query, step) for query in queries]
        for query, route in zip(queries, routes, strict=True):
            self.adviser.saw(query, route)
        return routes

    async def boundary(self, step: int, *, may_change: bool = True) -> None:
        """Begins a step, and waits for what was started."""
        self.adviser.begin_step(step, self.advice.on(SNAPSHOT, step), may_change=may_change)
        await asyncio.wait_for(self.adviser.idle(), 300)


async def test_a_cluster_is_asked_about_once_and_its_answer_counts_at_the_next_boundary(tmp_path: Path) -> None:
    with LlmServer([text(answer())]) as llm:
        bench = Bench(tmp_path, llm.url)
        before = bench.visit(POEMS[:3])
        await bench.boundary(1)
        assert llm.requests == [], "three prompts of four"
        before += bench.visit(POEMS[3:6])
        await bench.boundary(2)
        assert {route.name for route in before} == {"a"} == {bench.route(query, 2).name for query in POEMS}
        await bench.boundary(3)
        assert {bench.route(query, 3).name for query in POEMS} == {"b"}
        assert bench.route(POEMS[0], 2).name == "a", "a step that was begun stays as it is"
        assert "(It was made for poems.)" in bench.route(POEMS[0], 3).reason
        bench.visit(POEMS, 3)
        await bench.boundary(4)
        assert len(llm.requests) == 1, "paid by the cluster, not by the visit"
        (asked,) = llm.requests
        task = asked["messages"][1]["content"]
        task = task if isinstance(task, str) else task[0]["text"]
        assert all(query.prompt in task for query in POEMS[:4]) and POEMS[5].prompt not in task
        assert "`a`, a reward model; right on 0.850 of 200 prompts" in task
        numbers = bench.adviser.metrics()
    assert bench.clusters.name("open#1") == "open: poems about the sea"
    assert numbers == {
        "rlar/advice/answers": 1.0,
        "rlar/advice/rulings": 1.0,
        "rlar/advice/faults": 0.0,
        "rlar/advice/tokens": 120.0,
    }


async def test_an_answer_waits_until_a_step_comes_that_was_not_handed_out(tmp_path: Path) -> None:
    with LlmServer([text(answer())]) as llm:
        bench = Bench(tmp_path, llm.url)
        bench.visit(POEMS[:4])
        await bench.boundary(5)
        await bench.boundary(4, may_change=False)  # a resumed run goes through its old steps again
        assert bench.advice.rulings == ()
        await bench.boundary(6)
        assert bench.route(POEMS[0], 6).name == "b" and bench.route(POEMS[0], 5).name == "a"


async def test_a_service_that_comes_back_does_not_ask_again_and_decides_alike(tmp_path: Path) -> None:
    with LlmServer([text(answer())]) as llm:
        first = Bench(tmp_path, llm.url)
        first.visit(POEMS[:4])
        await first.boundary(1)
        await first.boundary(2)
        second = Bench(tmp_path, llm.url)
        routes = second.visit(POEMS, 2)
        await second.boundary(3)
        assert len(llm.requests) == 1 and routes == [first.route(query, 2) for query in POEMS]
        assert second.clusters.name("open#1") == "open: poems about the sea"


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        (answer(tool="c"), ""),
        (answer(tool=None), ""),
        (
            answer(
                elsewhere=[{"prompt": 99, "tool": "a"}, {"prompt": 0, "tool": "a"}, {"prompt": 1, "tool": "rm -rf"}]
            ),
            "b",
        ),
        (f"<think>Which? {{a}} or {{b}}</think>\nHere it is:\n```json\n{answer()}\n```", "b"),
        (answer(why="because\n\n\u202eof " + "x" * 999), "b"),
    ],
    ids=["no tool of the question", "none", "nowhere else", "with thoughts", "long"],
)
async def test_of_an_answer_counts_only_what_may_be_said(tmp_path: Path, said: str, kept: str) -> None:
    with LlmServer([text(said)]) as llm:
        bench = Bench(tmp_path, llm.url)
        bench.visit(POEMS[:4])
        await bench.boundary(1)
        await bench.boundary(2)
        await bench.boundary(3)
        assert len(llm.requests) == 1
    (ruling,) = bench.advice.rulings
    assert ruling.tool == ({"b": B.digest}[kept] if kept else "")
    assert len(ruling.why) < 260 and "\n" not in ruling.why and "\u202e" not in ruling.why
    assert bench.route(POEMS[0], 2).name == (kept or "a")


async def test_a_single_prompt_of_those_that_were_shown_may_go_elsewhere(tmp_path: Path) -> None:
    said = answer(tool="a", elsewhere=[{"prompt": 2, "tool": "b", "why": "This one is about trade."}])
    with LlmServer([text(said)]) as llm:
        bench = Bench(tmp_path, llm.url)
        bench.visit(POEMS[:4])
        await bench.boundary(1)
        await bench.boundary(2)
    assert [bench.route(query, 2).name for query in POEMS[:4]] == ["a", "b", "a", "a"]
    assert "This one is about trade." in bench.route(POEMS[1], 2).reason


async def test_prompts_that_differ_from_their_cluster_are_asked_about_together_and_not_without_end(
    tmp_path: Path,
) -> None:
    alike = [make_query(f"Write a short poem about the sea in the month number {n}.", None) for n in range(100)]
    odd = [
        make_query(f"Write a short poem about {' '.join(f'w{n}x{k} {k}{n}' for k in range(12))} sea month", None)
        for n in range(30)
    ]

    def reply(asked: dict[str, Any]) -> Any:
        which = "differ most" in json.dumps(asked)
        return text(answer(tool="a", elsewhere=[{"prompt": 1, "tool": "b", "why": "Odd."}] if which else []))

    with LlmServer([of_request(reply)]) as llm:
        bench = Bench(tmp_path, llm.url, odd=4)
        bench.visit(alike)
        await bench.boundary(1)
        for step, query in enumerate(odd, start=2):
            bench.visit([query], step)
            await bench.boundary(step)
        clusters = {bench.clusters.of(query) for query in (*alike, *odd)}
        assert clusters == {"open#1"} and sum(map(bench.clusters.odd, odd)) >= 12, "else there is nothing to see here"
        assert len(llm.requests) == 3, "the cluster, and twice the odd ones"
    elsewhere = [query for query in odd if bench.route(query, 99).name == "b"]
    assert len(elsewhere) == 2 and all(bench.route(query, 99).name == "a" for query in alike)


async def test_of_a_verifiable_prompt_no_reward_model_is_in_the_question(tmp_path: Path) -> None:
    checks = tool("v", "verifier", (Kind.MATH,)), tool("w", "verifier", (Kind.MATH,)), tool("m", kinds=(Kind.MATH,))
    known = Competence(records=tuple(record(one, 0.9, 40, kind=Kind.MATH) for one in checks))
    queries = [make_query(f"What is {n} plus 3?", str(n + 3)) for n in range(4)]
    with LlmServer([text(answer(tool="m", elsewhere=[{"prompt": 1, "tool": "m", "why": "!"}]))]) as llm:
        bench = Bench(tmp_path, llm.url, known)
        snapshot = Snapshot(tools=checks)
        for query in queries:
            cluster = bench.clusters.of(query)
            bench.adviser.saw(query, decide(query, snapshot, bench.config.routing, cluster=cluster, competence=known))
        for step in (1, 2):
            bench.adviser.begin_step(step, snapshot, may_change=True)
            await asyncio.wait_for(bench.adviser.idle(), 300)
        assert "`v`" in json.dumps(llm.requests) and "`m`" not in json.dumps(llm.requests)
    assert [ruling.tool for ruling in bench.advice.rulings] == [""]


@pytest.mark.parametrize("script", [[dies()], [says(500)], [says(401)], [says(200, b"no JSON")]])
async def test_an_endpoint_that_is_dead_changes_nothing_but_a_line_in_the_log_and_a_number(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, script: Any
) -> None:
    with LlmServer(script) as llm, caplog.at_level(logging.WARNING):
        bench = Bench(tmp_path, llm.url)
        before = bench.visit(POEMS[:4])
        await bench.boundary(1)
        await bench.boundary(2)
        assert len(llm.requests) <= 1
        await bench.boundary(3)
    assert [bench.route(query, 3) for query in POEMS[:4]] == before and bench.advice.rulings == ()
    assert caplog.text.count("the LLM was not heard on 1 of 1 clusters (endpoint: ") == 2, "asked again after two steps"
    assert bench.adviser.metrics()["rlar/advice/faults"] == 2
    assert POEMS[0].prompt not in caplog.text


async def test_an_answer_that_is_none_is_asked_for_once_more_and_then_left(tmp_path: Path) -> None:
    with LlmServer([text("I think that b is nice.")]) as llm:
        bench = Bench(tmp_path, llm.url)
        bench.visit(POEMS[:4])
        for step in (1, 2, 3):
            await bench.boundary(step)
        assert len(llm.requests) == 2
    assert bench.route(POEMS[0], 3).name == "a"


async def test_no_answer_to_a_later_question_leaves_what_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LlmServer([text(answer()), text("sorry, I am busy"), text("still busy")]) as llm:
        bench = Bench(tmp_path, llm.url)
        bench.visit(POEMS[:4])
        await bench.boundary(1)
        await bench.boundary(2)
        assert bench.route(POEMS[0], 2).name == "b"
        advised = bench.advice.on(SNAPSHOT, 2).advice
        monkeypatch.setitem(globals(), "SNAPSHOT", Snapshot(tools=(*SNAPSHOT.tools, tool("c"))))
        for step in range(3, 160, 39):
            await bench.boundary(step)
        assert bench.route(POEMS[0], 159).name == "b"
        assert len(llm.requests) == 3, "a question that got no answer is not asked for ever"
    assert bench.advice.on(SNAPSHOT, 159).advice == advised, "so no route is decided again"
    assert bench.adviser.metrics()["rlar/advice/rulings"] == 1


async def test_the_tokens_of_a_run_are_kept_over_its_starts(tmp_path: Path) -> None:
    others = [make_query(f"List {n} facts: what do whales eat? Where do whales live? Why?", None) for n in range(4)]
    with LlmServer([text(answer(), usage=(3000, 100))]) as llm:
        first = Bench(tmp_path, llm.url, tokens=3500)
        first.visit(POEMS[:4])
        await first.boundary(1)
        await first.boundary(2)
        second = Bench(tmp_path, llm.url, tokens=3500)
        second.visit(others)
        await second.boundary(3)
        assert len(llm.requests) == 1 and second.adviser.metrics()["rlar/advice/tokens"] == 3100
        assert second.adviser.metrics()["rlar/advice/faults"] == 1


async def test_without_an_llm_nothing_is_asked_and_nothing_changes(tmp_path: Path) -> None:
    for folder, bench in (
        ("a", Bench(tmp_path / "a", None)),
        ("b", Bench(tmp_path / "b", "http://127.0.0.1:9/v1", enabled=False)),
    ):
        bench.visit(POEMS)
        await bench.boundary(1)
        assert bench.adviser.metrics() == {} and not list((tmp_path / folder).glob("a*"))


async def test_in_a_service_routes_change_at_a_boundary_and_the_ledger_says_why(tmp_path: Path) -> None:
    """An exact and a loose rule, both known by a few labelled answers: the LLM decides between them."""
    labelled = tmp_path / "labelled.jsonl"
    rows = [
        {
            "kind": "short_text",
            "answers": [
                {"right": True, "values": {"exact_match": 1.0, "token_f1": 1.0}},
                {"right": False, "values": {"exact_match": 0.0, "token_f1": 0.2}},
            ],
        }
    ] * 12
    labelled.write_text("".join(json.dumps(row) + "\n" for row in rows))
    queries = [make_query(f"Who wrote the book with the number {n} on its back?", "Goethe") for n in range(6)]

    def config(url: str) -> RlarConfig:
        return parse(
            {
                "run_dir": str(tmp_path / "run"),
                "routing": {"labelled": str(labelled)},
                "agents": {"url": url, "model": "some-llm", "retries": 0},
                "advice": {"prompts": 4},
            }
        )

    with LlmServer([text(answer(tool="token_f1", name="authors of books"))]) as llm:
        service = Service(config(llm.url), "one")
        assert await service.begin_step(1)
        first = await service.at(1)
        before = [await service.route(query, first) for query in queries]
        assert await service.begin_step(2)
        second = await service.at(2)
        assert second == first, "the step began while the LLM was being asked"
        await asyncio.wait_for(service._adviser.idle(), 300)
        assert [await service.route(query, second) for query in queries] == before
        assert await service.begin_step(3)
        third = await service.at(3)
        after = [await service.route(query, third) for query in queries]
        numbers = await service.metrics(3)
        service.close()
        assert {route.name for route in before} == {"exact_match"} and {route.name for route in after} == {"token_f1"}
        assert numbers["rlar/advice/rulings"] == 1.0
        again = Service(config(llm.url), "two")
        assert await again.at(1) == first and await again.at(3) == third, "a resumed run sees what the first one saw"
        assert [await again.route(query, await again.at(2)) for query in queries] == before
        new = make_query("Who wrote the book with the number 99 on its back?", "Goethe")
        assert (await again.route(new, await again.at(2))).name == "exact_match"
        assert (await again.route(new, await again.at(3))).name == "token_f1"
        again.close()
    live, _, known, _ = live_tools(str(tmp_path / "run"), None, config("http://127.0.0.1:9/v1"))
    assert live.version == third.version and known.rulings, "`rlar score --in` goes by it, too"
    with read_ledger(tmp_path / "run") as db:
        reasons = dict(db.execute("SELECT snapshot, reason FROM routes GROUP BY snapshot"))
    assert "as some-llm advised for this cluster" in reasons[third.version]
    assert "advised" not in reasons[first.version]


@pytest.mark.parametrize(
    ("said", "fault"),
    [
        ("", "no JSON object"),
        ("{" * 5000, "no JSON object"),
        ("[1]", "no JSON object"),
        ('{"name": 3, "tool": null}', "`name` must be a text"),
        ('{"name": "x", "tool": ["a"]}', "`tool` a text or null"),
        ('{"name": "x", "tool": null, "elsewhere": 3}', "`elsewhere` must be a list"),
    ],
)
def test_what_is_wrong_with_an_answer_is_said(said: str, fault: str) -> None:
    answer, why = read(said)
    assert answer == {} and fault in why
