# SPDX-License-Identifier: Apache-2.0
"""What an LLM has advised: from which step on it counts, and what the router makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import make_query
from test_competence import OPEN, names, record, tool

from verl_rlar.advice import Advice, Ruling
from verl_rlar.competence import NOTHING, Competence, Store
from verl_rlar.config import parse
from verl_rlar.errors import LibraryError
from verl_rlar.features import describe
from verl_rlar.library import builtin_snapshot
from verl_rlar.router import alternatives, decide, open_question
from verl_rlar.types import Kind, Query, Route, Snapshot, ToolSpec

A, B, C = tool("a"), tool("b"), tool("c")
SNAPSHOT = Snapshot(tools=(A, B))
CLUSTER = "open#1"


def ruling(spec: ToolSpec | None = B, cluster: str = CLUSTER, query: str = "", question: str = "q") -> Ruling:
    digest = spec.digest if spec else ""
    return Ruling(cluster=cluster, query=query, tool=digest, why="it reads poems", by="some-llm", question=question)


def routed(
    tools: list[ToolSpec], known: Competence, *rulings: Ruling, query: Query = OPEN, cluster: str = CLUSTER, **set: Any
) -> Route:
    config = parse({"routing": set}).routing
    known = Competence(records=known.records, refused=known.refused, blends=known.blends, rulings=rulings)
    return decide(query, Snapshot(tools=tuple(tools)), config, cluster=cluster, competence=known)


# --- From which step on -----------------------------------------------------------------------------------------------


def test_a_ruling_counts_from_its_step_on_and_for_no_step_before(tmp_path: Path) -> None:
    advice = Advice(tmp_path / "advice.jsonl")
    advice.add([ruling(B)], 3)
    advice.add([ruling(A), ruling(C, query="k")], 5)
    seen = {step: advice.on(SNAPSHOT, step) for step in range(8)}
    assert all(seen[step] == SNAPSHOT and seen[step].version == SNAPSHOT.version for step in (0, 1, 2))
    assert len({seen[step].version for step in (2, 3, 5)}) == 3 and seen[3] == seen[4] and seen[5] == seen[7]
    assert seen[3].toolset == SNAPSHOT.toolset, "the tools are the same"
    again = Advice(tmp_path / "advice.jsonl")
    assert {step: again.on(SNAPSHOT, step) for step in range(8)} == seen, "a resumed run sees the same"
    assert again.of(seen[3].advice) == (ruling(B),)


def test_an_answer_that_advises_nothing_is_kept_and_changes_no_snapshot(tmp_path: Path) -> None:
    advice = Advice(tmp_path / "advice.jsonl")
    advice.add([ruling(None)], 3)
    assert advice.on(SNAPSHOT, 9) == SNAPSHOT and Advice(tmp_path / "advice.jsonl").rulings == (ruling(None),)
    advice.add([ruling(B)], 4)
    advice.add([ruling(None)], 5)
    assert advice.on(SNAPSHOT, 4) != SNAPSHOT and advice.on(SNAPSHOT, 5) == SNAPSHOT, "the later one takes its place"


def test_a_line_that_a_killed_writer_left_is_cut_off_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "advice.jsonl"
    Advice(path).add([ruling(B)], 3)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:40])
    assert Advice(path).rulings == (ruling(B),) and path.read_bytes() == whole
    path.write_bytes(whole + whole[:40])
    reader = Advice(path, writes=False)
    reader.add([ruling(A)], 4)
    assert path.read_bytes() == whole + whole[:40] and reader.on(SNAPSHOT).version != reader.on(SNAPSHOT, 3).version
    path.write_bytes(whole.replace(b'"tool"', b'"tol"'))
    with pytest.raises(LibraryError, match=r"advice\.jsonl, line 1 is damaged"):
        Advice(path)
    with pytest.raises(LibraryError, match="restore the file"):
        Advice().of("0123")


def test_what_is_known_of_tools_stays_when_advice_comes(tmp_path: Path) -> None:
    advice = Advice()
    advice.add([ruling(B)], 3)
    asked: list[str] = []

    def card(digest: str) -> None:
        asked.append(digest)

    store = Store(card, (), tmp_path, rulings=advice.of)
    assert store.of(SNAPSHOT) == NOTHING
    count = len(asked)
    assert store.of(advice.on(SNAPSHOT, 3)).rulings == (ruling(B),)
    assert len(asked) == count and [path.stem for path in tmp_path.iterdir()] == [SNAPSHOT.toolset]


# --- What the router makes of it --------------------------------------------------------------------------------------


def test_advice_decides_where_evidence_is_thin_and_says_so() -> None:
    thin = Competence(records=(record(A, 0.85), record(B, 0.8)))
    assert names(routed([A, B], thin)) == ["a"]
    made = routed([A, B], thin, ruling(B))
    assert names(made) == ["b"] and made.covered
    assert "as some-llm advised for this cluster (it reads poems), as evidence is thin: a 0." in made.reason
    assert names(routed([A, B], thin, ruling(B), cluster="open#2")) == ["a"], "it is for its cluster only"


def test_advice_gives_way_where_the_clusters_own_evidence_speaks() -> None:
    plain = Competence(
        records=(record(A, 0.95, 120, cluster=CLUSTER), record(B, 0.6, 120, cluster=CLUSTER), record(A, 0.9))
    )
    assert names(routed([A, B], plain, ruling(B))) == ["a"]


def test_evidence_outweighs_advice_as_it_comes_though_the_question_is_still_open() -> None:
    def taken(prompts: int) -> str:
        shares = (record(A, 0.8, prompts, cluster=CLUSTER), record(B, 0.68, prompts, cluster=CLUSTER))
        known = Competence(records=shares)
        found = open_question(OPEN, SNAPSHOT, parse({}).routing, CLUSTER, known)
        assert found is not None and len(found.rivals) == 2, "the question is still open"
        return names(routed([A, B], known, ruling(B)))[0]

    assert [taken(prompts) for prompts in (2, 8, 16, 40, 60)] == ["b", "b", "b", "a", "a"]


@pytest.mark.parametrize(
    "settings",
    [
        {"prefer": {"open": "a"}},
        {"forbid": ["b"]},
        {"routes": {"mine": {"kinds": ["open"], "parts": [{"tool": "a"}]}}},
    ],
    ids=["prefer", "forbid", "routes"],
)
@pytest.mark.parametrize("single", [False, True])
def test_what_the_settings_say_comes_before_advice(settings: dict[str, Any], single: bool) -> None:
    thin = Competence(records=(record(A, 0.85), record(B, 0.8)))
    assert names(routed([A, B], thin, ruling(B, query=OPEN.key if single else ""), **settings)) == ["a"]


def test_a_single_prompt_may_go_elsewhere_and_its_cluster_stays() -> None:
    sure = Competence(records=(record(A, 0.99, 2000, cluster=CLUSTER), record(B, 0.7)))
    other = make_query("Tell me a story about a lake.", None)
    made = routed([A, B], sure, ruling(B, query=OPEN.key))
    assert names(made) == ["b"] and "b as some-llm advised for this prompt (it reads poems)" in made.reason
    assert names(routed([A, B], sure, ruling(B, query=OPEN.key), query=other)) == ["a"]


def test_advice_never_puts_a_reward_model_in_a_verifiers_place() -> None:
    query = make_query()
    model = tool("m", kinds=(Kind.MATH,))
    checks = [builtin_snapshot().tool("final_answer"), model]
    known = Competence(records=(record(model, 0.97, 100, kind=Kind.MATH),))
    for advised in (ruling(model, "math/number#1"), ruling(model, "math/number#1", query.key)):
        assert names(routed(checks, known, advised, query=query, cluster="math/number#1")) == ["final_answer"]
    assert {one.name for one in alternatives(query, Snapshot(tools=tuple(checks)), parse({}).routing, "", known)} == {
        "final_answer"
    }


@pytest.mark.parametrize(
    "advised",
    [
        tool("v", "verifier", (Kind.CHOICE,)),
        tool("gone", "verifier", (Kind.MATH,)),
    ],
    ids=["another kind", "not live"],
)
def test_advice_that_does_not_fit_is_as_if_it_were_not_there(advised: ToolSpec) -> None:
    query = make_query()
    live = [builtin_snapshot().tool("final_answer"), tool("v", "verifier", (Kind.CHOICE,))]
    for place in ("", query.key):
        made = routed(live, NOTHING, ruling(advised, "math/number#1", place), query=query, cluster="math/number#1")
        assert names(made) == ["final_answer"] and "advised" not in made.reason


def test_a_prompt_that_can_be_checked_in_two_ways_may_be_sent_to_the_second_one() -> None:
    query = make_query("What is the sum of all digits?", "42")
    live = [tool for tool in builtin_snapshot().tools if not tool.boxed]
    assert [kind for kind, _ in describe(query).kinds] == [Kind.MATH, Kind.SHORT_TEXT]
    exact = next(tool for tool in live if tool.name == "exact_match")
    made = routed(live, NOTHING, ruling(exact, "math/number#1", query.key), query=query, cluster="math/number#1")
    assert names(made) == ["exact_match"] and made.kind is Kind.SHORT_TEXT


def test_a_question_is_open_only_between_tools_that_may_well_be_better() -> None:
    config = parse({}).routing

    def rivals(*records: Any, tools: tuple[ToolSpec, ...] = (A, B, C)) -> list[str]:
        known = Competence(records=records)
        found = open_question(OPEN, Snapshot(tools=tools), config, CLUSTER, known)
        assert found is not None and found.covered
        return [one.name for one in found.rivals]

    assert rivals(record(A, 0.9), record(B, 0.85), record(C, 0.55, 400)) == ["a", "b"]
    assert rivals(record(A, 0.95, 300, cluster=CLUSTER), record(B, 0.6, 300, cluster=CLUSTER), tools=(A, B)) == []
    assert rivals(record(A, 0.9), tools=(A,)) == []
    nobody = open_question(OPEN, Snapshot(tools=()), config, CLUSTER, NOTHING)
    assert nobody is not None and not nobody.covered and nobody.rivals == ()


def test_rules_that_nobody_examined_are_not_weighed_against_each_other() -> None:
    query = make_query("Who wrote Faust?", "Goethe")
    found = open_question(query, builtin_snapshot(), parse({}).routing, "short_text#1", NOTHING)
    assert found is not None and found.covered and found.rivals == (), (
        "exact_match before token_f1, as their makers say"
    )
