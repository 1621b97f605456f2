# SPDX-License-Identifier: Apache-2.0
"""What is known of tools, what the router makes of it, and that it stays what it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import make_query
from test_mixture import choices

from verl_rlar.clusters import Clusters
from verl_rlar.competence import (
    NOTHING,
    Competence,
    Labelled,
    Record,
    Store,
    gather,
    of_exams,
    read_labelled,
)
from verl_rlar.config import RoutingConfig, parse
from verl_rlar.errors import ConfigError, DataError, LibraryError
from verl_rlar.exam.card import Card, Figure
from verl_rlar.library import builtin_snapshot
from verl_rlar.router import FeatureRouter, decide
from verl_rlar.rows import query_as_dict
from verl_rlar.types import Kind, Query, Route, Scope, Snapshot, ToolSpec

BUILTIN = builtin_snapshot()
RULE = BUILTIN.tool("final_answer")
OPEN = make_query("Tell me a story about the sea.", None)


def tool(name: str, kind: Any = "reward_model", kinds: Any = (Kind.OPEN,), needs_reference: bool = False) -> ToolSpec:
    return ToolSpec(
        name=name,
        kind=kind,
        target=f"{name}@1",
        scope=Scope(kinds=frozenset(kinds), needs_reference=needs_reference),
        description=name,
        boxed=kind == "verifier",
    )


def record(spec: ToolSpec, share: float, prompts: float = 200, kind: Kind = Kind.OPEN, **fields: Any) -> Record:
    return Record(digest=spec.digest, kind=kind, prompts=prompts, right=share * prompts, **fields)


def card(
    spec: ToolSpec, *, share: float, prompts: int = 100, kind: Kind = Kind.OPEN, unproven: tuple[str, ...] = ()
) -> Any:
    made = Card(
        tool=spec.name,
        digest=spec.digest,
        kind=spec.kind,
        verdict="admitted",
        reasons=(),
        admitted_for=(kind.value,),
        unproven=unproven,
        figures={
            "all": {"p50_s": Figure(value=0.2), "dollars_per_1000": Figure(value=None)},
            kind.value: {"pairwise": Figure(value=share, cases=prompts)},
        },
    )
    return json.loads(json.dumps(made.as_dict()))


def route(query: Query, tools: list[ToolSpec], known: Competence, cluster: str = "", **settings: Any) -> Route:
    config = parse({"routing": settings}).routing
    return decide(query, Snapshot(tools=tuple(tools)), config, cluster=cluster, competence=known)


def names(made: Route) -> list[str]:
    return [part.tool for part in made.parts]


# --- Beliefs ----------------------------------------------------------------------------------------------------------


def test_more_evidence_of_the_same_accuracy_makes_a_narrower_belief() -> None:
    spec = tool("a")
    beliefs = [Competence(records=(record(spec, 0.8, n),)).believe(spec, Kind.OPEN) for n in (10, 100, 1000)]
    assert [round(b.low, 2) for b in beliefs] == [0.55, 0.73, 0.78]
    assert all(b.low < 0.8 < b.high + 0.01 and b.known for b in beliefs)


def test_without_a_card_a_rule_is_trusted_and_any_other_tool_is_not() -> None:
    assert NOTHING.believe(RULE, Kind.MATH).low == pytest.approx(0.957, abs=1e-3)
    for kind in ("verifier", "reward_model"):
        assert NOTHING.believe(tool("a", kind), Kind.OPEN).low < 0.1


def test_an_exam_that_went_well_takes_no_queries_from_a_rule_and_one_that_went_badly_does() -> None:
    query = make_query("Who wrote Faust?", "Johann Wolfgang von Goethe")
    exact, f1 = BUILTIN.tool("exact_match"), BUILTIN.tool("token_f1")

    def first(share: float, prompts: int = 40, unproven: tuple[str, ...] = ()) -> str:
        cards = {exact.digest: card(exact, share=share, prompts=prompts, kind=Kind.SHORT_TEXT, unproven=unproven)}
        return route(query, [exact, f1], gather([exact, f1], cards)).name

    assert route(query, [exact, f1], NOTHING).name == "exact_match"
    assert first(1.0) == "exact_match"
    assert first(1.0, 5, ("short_text",)) == "exact_match", "too few answers take no trust away"
    assert first(0.5) == "token_f1"


def test_a_clusters_evidence_outweighs_its_kinds_however_much_there_is_of_that() -> None:
    spec = tool("a")
    known = Competence(records=(record(spec, 0.9, 5000), record(spec, 0.3, 60, cluster="open#2")))
    assert known.believe(spec, Kind.OPEN, "open#1").mean == pytest.approx(0.9, abs=0.01)
    assert 0.3 < known.believe(spec, Kind.OPEN, "open#2").mean < 0.5


def test_a_card_tells_accuracy_time_and_what_was_not_tried() -> None:
    spec = tool("a", kinds=(Kind.OPEN, Kind.MATH))
    known = gather([spec], {spec.digest: card(spec, share=0.85, unproven=("math",))})
    (one,) = known.records
    assert (one.kind, one.prompts, one.right, one.seconds, one.dollars) == (Kind.OPEN, 100, 85.0, 0.2, None)
    assert known.refuses(spec.digest, Kind.MATH) and not known.refuses(spec.digest, Kind.OPEN)
    assert gather([spec], {spec.digest: {"gold": 1.0}}) == NOTHING


def test_labelled_answers_of_exams_tell_of_clusters_and_teach_mixtures() -> None:
    """Two tools were examined on the same answers, a third one on others."""
    strength = {"a": 1.2, "b": 1.0}
    tools = {name: tool(name) for name in ("a", "b", "c")}
    asked = [make_query(f"Write a short poem about the sea in the month number {n}.", None) for n in range(120)]
    exams: dict[str, list[Any]] = {spec.digest: [] for spec in tools.values()}
    for number, (query, made) in enumerate(zip(asked, choices(120, strength), strict=True)):
        for name in strength:
            answers = [
                {"case": f"{number}-{n}", "right": right, "value": values[name]}
                for n, (values, right) in enumerate(zip(made.values, made.right, strict=True))
            ]
            exams[tools[name].digest].append({"kind": "open", "query": query_as_dict(query), "answers": answers})
    other = make_query("Why?", None)
    answers = [{"case": str(n), "right": n > 0, "value": 0.5 + n / 10} for n in range(2)]
    exams[tools["c"].digest].append({"kind": "open", "query": query_as_dict(other), "answers": answers})
    clusters = Clusters()
    made = of_exams(json.loads(json.dumps(exams)), clusters.of)
    assert len(made) == 121 and {one.choice.cluster for one in made[:120]} == {clusters.of(asked[0])}
    known = gather(list(tools.values()), {}, made)
    (blend,) = [blend for blend in known.blends if not blend.cluster]
    assert {digest for digest, _ in blend.weights} == {tools["a"].digest, tools["b"].digest} and blend.gain_low > 0
    here = known.believe(tools["a"], Kind.OPEN, clusters.of(asked[0]))
    assert "120 prompts of its cluster" in here.source
    assert "of 1 prompts of its cluster" in known.believe(tools["c"], Kind.OPEN, clusters.of(other)).source


# --- Decisions --------------------------------------------------------------------------------------------------------


def test_the_tool_with_the_best_evidence_wins_wherever_it_stands_in_the_library() -> None:
    a, b = tool("a"), tool("b")
    known = Competence(records=(record(a, 0.7), record(b, 0.8)))
    made = [route(OPEN, order, known) for order in ([a, b], [b, a])]
    assert [names(one) for one in made] == [["b"], ["b"]] and all(one.covered for one in made)
    assert "b 0.751 (right on 0.800 of 200 prompts), before a 0.6" in made[0].reason


def test_a_lucky_tool_does_not_beat_one_that_is_known_to_be_good() -> None:
    lucky, good = tool("lucky"), tool("good")
    assert names(route(OPEN, [lucky, good], Competence(records=(record(lucky, 1.0, 4), record(good, 0.85))))) == [
        "good"
    ]


def test_of_tools_that_are_alike_the_cheaper_and_then_the_faster_one_is_taken() -> None:
    slow, fast, dear = tool("slow"), tool("fast"), tool("dear")
    known = Competence(
        records=(
            record(slow, 0.802, seconds=2.0),
            record(fast, 0.8, seconds=0.1),
            record(dear, 0.803, seconds=0.01, dollars=3.0),
        )
    )
    assert names(route(OPEN, [dear, slow, fast], known)) == ["fast"]
    assert names(route(OPEN, [dear, slow, fast], known, alike=0.0)) == ["dear"]


def test_each_cluster_goes_to_the_tool_that_is_best_there() -> None:
    a, b = tool("a"), tool("b")
    known = Competence(
        records=(
            record(a, 0.8),
            record(b, 0.75),
            record(a, 0.6, 80, cluster="open#1"),
            record(b, 0.95, 80, cluster="open#1"),
        )
    )
    assert [names(route(OPEN, [a, b], known, cluster)) for cluster in ("open#1", "open#2")] == [["b"], ["a"]]


def test_what_was_seen_in_a_cluster_comes_before_what_a_tool_did_elsewhere() -> None:
    """Two verifiers of one kind, each perfect in its own exam; only one of them was tried in this cluster."""
    query = make_query("Say 3 km in words.", "three kilometres")
    dates, units = (tool(name, "verifier", (Kind.SHORT_TEXT,), needs_reference=True) for name in ("dates", "units"))
    exams = [record(spec, 1.0, 120, kind=Kind.SHORT_TEXT) for spec in (dates, units)]
    seen = record(units, 1.0, 40, kind=Kind.SHORT_TEXT, cluster="short_text#2")
    live = [*BUILTIN.tools, dates, units]
    made = [
        names(route(query, live, Competence(records=(*exams, *records)), "short_text#2")) for records in ((), (seen,))
    ]
    assert made == [["dates"], ["units"]]


def test_a_verifier_that_was_tried_in_one_cluster_takes_no_other_one_from_a_rule() -> None:
    query = make_query("Who wrote Faust?", "Goethe")
    units = tool("units", "verifier", (Kind.SHORT_TEXT,), needs_reference=True)
    exam = [record(units, 1.0, 200, kind=Kind.SHORT_TEXT, cluster=cluster) for cluster in ("", "short_text#2")]
    known = Competence(records=tuple(exam))
    for cluster, live, winner in (
        ("short_text#2", [*BUILTIN.tools, units], "units"),
        ("short_text#3", [*BUILTIN.tools, units], "exact_match"),
        ("short_text#3", [units], "units"),
        ("", [*BUILTIN.tools, units], "units"),
    ):
        assert names(route(query, live, known, cluster)) == [winner], (cluster, winner)


def test_no_competent_tool_is_an_uncovered_route_that_says_why() -> None:
    weak, untried = tool("weak"), tool("untried")
    known = Competence(records=(record(weak, 0.5),), refused=((untried.digest, Kind.OPEN),))
    made = route(OPEN, [weak, untried], known)
    assert not made.covered and not made.parts
    assert "weak is too weak: 0.44" in made.reason and "untried was not tried enough on open" in made.reason
    assert names(route(OPEN, [weak, untried], known, least=0.4)) == ["weak"]


def test_a_few_labelled_answers_take_no_tool_away_unless_it_was_wrong_on_most_of_them() -> None:
    model = tool("model")
    for right, prompts, taken in ((1, 1, True), (3, 4, True), (5, 8, True), (1, 4, False), (33, 60, False)):
        known = Competence(records=(record(model, right / prompts, prompts),))
        assert route(OPEN, [model], known).covered == taken, (right, prompts)
    one = Competence(records=(record(RULE, 1.0, 1, kind=Kind.MATH),))
    assert names(route(make_query(), [RULE], one)) == [RULE.name], "a trusted rule, after one labelled answer"


def test_a_verifiable_query_goes_to_its_rule_however_good_a_reward_model_is() -> None:
    model = tool("model", kinds=Kind)
    known = Competence(records=(record(model, 1.0, 5000, Kind.MATH),))
    assert names(route(make_query(), [model, *BUILTIN.tools], known)) == ["final_answer"]
    made = route(make_query(), [model, *BUILTIN.tools], known, beside=0.2)
    assert [(part.tool, part.weight) for part in made.parts] == [("final_answer", 1.0), ("model", 0.2)]
    assert "beside it model 0.99" in made.reason


def test_a_reward_model_takes_a_rules_place_only_where_evidence_is_beyond_doubt() -> None:
    model = tool("model", kinds=(Kind.MATH,))
    bad_rule = record(RULE, 0.7, 100, Kind.MATH)
    for share, winner in ((0.8, "final_answer"), (0.95, "model")):
        known = Competence(records=(bad_rule, record(model, share, 300, Kind.MATH)))
        assert names(route(make_query(), [RULE, model], known)) == [winner]


def test_a_verifier_that_was_examined_well_takes_the_place_of_a_rule_that_was_examined_badly() -> None:
    verifier = tool("written", "verifier", (Kind.MATH,), needs_reference=True)
    good = record(verifier, 0.99, 300, Kind.MATH)
    assert names(route(make_query(), [RULE, verifier], Competence(records=(good,)))) == ["written"]
    assert names(route(make_query(), [RULE, verifier], Competence(records=(replace(good, prompts=20, right=20),)))) == [
        "final_answer"
    ], "twenty prompts are less than what a rule is trusted for"


def test_without_evidence_the_routes_are_those_of_the_librarys_order() -> None:
    for query in (make_query(), make_query("Who wrote Faust?", "Goethe"), make_query("f", None, tests=["assert f()"])):
        kind = decide(query, BUILTIN, RoutingConfig()).kind
        first = next(one.name for one in BUILTIN.tools if kind in one.scope.kinds and not one.gate)
        assert names(decide(query, BUILTIN, RoutingConfig())) == [first]


def test_settings_pin_forbid_and_weigh() -> None:
    a, b = tool("a"), tool("b")
    known = Competence(records=(record(a, 0.7), record(b, 0.8)))
    assert names(route(OPEN, [a, b], known, prefer={"open": "a"})) == ["a"]
    made = route(OPEN, [a, b], known, forbid=["b"])
    assert names(made) == ["a"]
    assert "b is in rlar.routing.forbid" in route(OPEN, [b], known, forbid=["b"]).reason
    mixed = {"mix": {"clusters": ["open#1"], "parts": [{"tool": "a", "weight": 3}, {"tool": "b"}]}}
    made = route(OPEN, [a, b], known, cluster="open#1", routes=mixed)
    assert [(part.tool, part.weight) for part in made.parts] == [("a", 3.0), ("b", 1.0)] and made.cluster == "open#1"
    assert names(route(OPEN, [a, b], known, cluster="open#2", routes=mixed)) == ["b"]
    with pytest.raises(ConfigError, match=r"rlar\.routing\.forbid: there is no tool 'c'"):
        FeatureRouter(parse({"routing": {"forbid": ["c"]}}).routing).check(Snapshot(tools=(a, b)))


# --- Mixtures ---------------------------------------------------------------------------------------------------------


def labelled(count: int, strength: dict[str, float], seed: int = 0, cluster: str = "") -> list[Labelled]:
    return [Labelled(kind=Kind.OPEN, choice=one) for one in choices(count, strength, seed, cluster)]


def test_reward_models_that_know_different_things_score_together_by_learned_weights() -> None:
    models = [tool("a"), tool("b"), tool("c")]
    known = gather(models, {}, labelled(200, {"a": 1.2, "b": 1.1, "c": 1.0}))
    made = route(OPEN, models, known)
    assert set(names(made)) == {"a", "b", "c"} and all(part.odds and part.weight > 0 for part in made.parts)
    assert "mixture of its kind, 200 prompts" in made.reason and "best single" in made.reason
    assert len(names(route(OPEN, models, known, mixtures=False))) == 1
    assert len(names(route(OPEN, models[:2], known))) == 1, "of a mixture all parts must be live"
    assert "b" not in names(route(OPEN, models, known, forbid=["b"]))


def test_tools_that_know_the_same_do_not_score_together() -> None:
    models = [tool("a"), tool("b")]
    same = [
        Labelled(kind=Kind.OPEN, choice=replace(one, values=tuple({"a": v["a"], "b": v["a"]} for v in one.values)))
        for one in choices(200, {"a": 1.5})
    ]
    assert gather(models, {}, same).blends == ()


def test_a_cluster_with_labelled_answers_of_its_own_has_its_own_weights() -> None:
    models = [tool("a"), tool("b")]
    answers = labelled(200, {"a": 1.4, "b": 1.2}) + labelled(150, {"a": 0.4, "b": 1.4}, 1, "open#2")
    known = gather(models, {}, answers)

    def weight_of_a(cluster: str) -> float:
        made = route(OPEN, models, known, cluster)
        weights = {part.tool: part.weight for part in made.parts}
        return weights.get("a", 0.0) / sum(weights.values())

    assert weight_of_a("open#2") < 0.7 * weight_of_a("open#1")


def test_labelled_answers_are_read_by_name_or_digest_and_faults_are_named(tmp_path: Path) -> None:
    a, b = tool("a"), tool("b")
    path = tmp_path / "labelled.jsonl"
    good = {"kind": "open", "answers": [{"right": True, "values": {"a": 0.9, b.digest: 0.8}}] * 1}
    good["answers"] = [*good["answers"], {"right": False, "values": {"a": 0.2, b.digest: 0.9}}]  # type: ignore[misc]
    path.write_text(f"{json.dumps(good)}\n" * 3)
    known = gather([a, b], {}, read_labelled(path))
    assert {(one.digest, one.right) for one in known.records} == {(a.digest, 3.0), (b.digest, 0.0)}
    path.write_text(json.dumps(good) + "\n" + json.dumps(good).replace("0.9", "9") + "\n")
    with pytest.raises(DataError, match=r"labelled\.jsonl, line 2: ValueError: a value is not in \[0, 1\]"):
        read_labelled(path)
    with pytest.raises(DataError, match=r"gone\.jsonl"):
        read_labelled(tmp_path / "gone.jsonl")


# --- It stays what it was ---------------------------------------------------------------------------------------------


def test_what_is_known_goes_through_json() -> None:
    models = [tool("a"), tool("b")]
    known = gather(
        models, {models[0].digest: card(models[0], share=0.9, unproven=("math",))}, labelled(100, {"a": 1.5, "b": 1.5})
    )
    assert known.blends and known.refused
    again = Competence.from_dict(json.loads(json.dumps(known.as_dict())))
    assert again == known and again.version == known.version


def test_what_was_known_of_a_snapshot_stays_whatever_exams_are_taken_later(tmp_path: Path) -> None:
    model = tool("model")
    snapshot = Snapshot(tools=(model,))
    cards = {model.digest: card(model, share=0.9)}
    first = Store(cards.get, folder=tmp_path).of(snapshot)
    cards[model.digest] = card(model, share=0.4)
    assert Store(cards.get, folder=tmp_path).of(snapshot) == first, "also in a later start"
    assert Store(cards.get).of(snapshot) != first
    other = Snapshot(tools=(model, tool("another")))
    assert Store(cards.get, folder=tmp_path).of(other).records[0].right == 40.0, "a new snapshot looks anew"


def test_other_labelled_answers_are_looked_at_and_a_damaged_file_is_named(tmp_path: Path) -> None:
    models = (tool("a"), tool("b"))
    snapshot = Snapshot(tools=models)
    cards: dict[str, Any] = {}
    assert Store(cards.get, folder=tmp_path).of(snapshot) == NOTHING
    assert Store(cards.get, labelled(100, {"a": 1.5, "b": 1.5}), tmp_path).of(snapshot).blends
    (tmp_path / f"{snapshot.version}.json").write_text("{")
    with pytest.raises(LibraryError, match=r"\.json is damaged"):
        Store(cards.get, folder=tmp_path).of(snapshot)


async def test_a_decision_is_a_function_of_what_it_is_given() -> None:
    a, b = tool("a"), tool("b")
    known = Competence(records=(record(a, 0.7), record(b, 0.8)))
    snapshot = Snapshot(tools=(a, b))
    router = FeatureRouter(RoutingConfig(), lambda snapshot: known, Clusters())
    made = await router.route(OPEN, snapshot)
    assert made.cluster == "open#1"
    assert made == decide(OPEN, snapshot, RoutingConfig(), cluster="open#1", competence=known)
    renamed = replace(OPEN, data_source="another", extra={"index": 3})
    assert await router.route(renamed, snapshot) == made


@pytest.mark.parametrize("prompts", [1, 5, 8, 12, 17, 40])
def test_an_exam_without_a_fault_takes_no_queries_from_a_rule_however_small_it_is(prompts: int) -> None:
    exact, loose = BUILTIN.tool("exact_match"), BUILTIN.tool("token_f1")
    query = make_query("Who wrote Faust?", "Johann Wolfgang von Goethe")
    known = gather([exact, loose], {exact.digest: card(exact, share=1.0, prompts=prompts, kind=Kind.SHORT_TEXT)})
    assert route(query, [exact, loose], known).name == "exact_match"


def test_labelled_answers_of_an_exam_with_too_few_of_them_take_no_queries_from_a_rule() -> None:
    exact, loose = BUILTIN.tool("exact_match"), BUILTIN.tool("token_f1")
    queries = [make_query(f"Who wrote book {number}?", "Johann Wolfgang von Goethe") for number in range(5)]
    answers = [
        {
            "kind": "short_text",
            "query": query_as_dict(query),
            "answers": [
                {"case": f"{number}r", "right": True, "value": float(number < 2)},
                {"case": f"{number}w", "right": False, "value": 0.0},
            ],
        }
        for number, query in enumerate(queries)
    ]

    def first(unproven: tuple[str, ...]) -> str:
        made = card(exact, share=0.7, prompts=5, kind=Kind.SHORT_TEXT, unproven=unproven)
        store = Store({exact.digest: made}.get, exam_of=lambda digest: answers if digest == exact.digest else ())
        return route(queries[0], [exact, loose], store.of(Snapshot(tools=(exact, loose)))).name

    assert first(("short_text",)) == "exact_match"
    assert first(()) == "token_f1"


@pytest.mark.parametrize(
    ("kind", "cluster", "covered"),
    [
        ((1000, 1000), (0, 20), False),
        ((1000, 1000), (5, 20), False),
        ((1000, 1000), (18, 20), True),
        ((0, 19), None, False),
        ((50, 100), None, False),
        ((55, 110), None, False),
        ((0, 5), None, True),  # too few say nothing against a rule
        ((90, 100), None, True),
        (None, (0, 20), False),
    ],
)
def test_a_rule_that_was_measured_to_be_wrong_does_not_score(
    kind: tuple[int, int] | None, cluster: tuple[int, int] | None, covered: bool
) -> None:
    measured = [("", kind), ("math#1", cluster)]
    records = [
        Record(digest=RULE.digest, kind=Kind.MATH, cluster=name, right=found[0], prompts=found[1])
        for name, found in measured
        if found is not None
    ]
    made = route(make_query("What is 2 + 2?", "4"), [RULE], Competence(records=tuple(records)), cluster="math#1")
    assert made.covered is covered
