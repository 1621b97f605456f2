# SPDX-License-Identifier: Apache-2.0
"""The service as plain Python: what all reward workers of a run agree on."""

from __future__ import annotations

import asyncio
import pickle
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import make_query, make_sample
from test_ledger import make_row

from verl_rlar import service
from verl_rlar.config import AcquireConfig, LedgerConfig, RlarConfig, RoutingConfig, ScoringConfig
from verl_rlar.errors import (
    ConfigError,
    DataError,
    LedgerError,
    LibraryError,
    ServiceUnreachable,
    ToolUnavailable,
    TooManyUnscored,
)
from verl_rlar.ledger import FILE_NAME, Ledger, Row, read
from verl_rlar.once import Once
from verl_rlar.router import RouteCache, settings_of
from verl_rlar.rows import query_of
from verl_rlar.service import CALLS_AT_ONCE, STEPS_KEPT, Client, Question, RouteCalls, Service
from verl_rlar.types import Kind, Outcome, Query, Route, Score, Snapshot, Split


def make_service(run_dir: Path, *, token: str = "run", **scoring: float) -> Service:
    return Service(RlarConfig(run_dir=str(run_dir), scoring=ScoringConfig(**scoring)), token)


async def test_an_unscored_response_gets_the_mean_of_its_scored_siblings(tmp_path: Path) -> None:
    service = make_service(tmp_path)
    await service.record([make_row(uid="g", session=0, value=0.2), make_row(uid="g", session=1, value=0.6)])
    assert await service.sibling_mean("g", 2, 3, timeout_s=5) == pytest.approx(0.4)


async def test_it_waits_for_the_siblings_that_are_still_being_generated(tmp_path: Path) -> None:
    service = make_service(tmp_path)
    waiting = asyncio.create_task(service.sibling_mean("g", 0, 3, timeout_s=30))
    for session, value in ((1, 0.0), (2, 1.0)):
        await asyncio.sleep(0)
        assert not waiting.done()
        await service.record([make_row(uid="g", session=session, value=value)])
    assert await waiting == 0.5


async def test_all_unscored_responses_of_a_group_get_the_same_mean(tmp_path: Path) -> None:
    service = make_service(tmp_path)
    waiting = [asyncio.create_task(service.sibling_mean("g", session, 4, timeout_s=30)) for session in (0, 2)]
    await service.record([make_row(uid="g", session=1, value=0.25), make_row(uid="g", session=3, value=0.75)])
    assert await asyncio.gather(*waiting) == [0.5, 0.5]


async def test_a_group_with_no_scored_response_has_no_mean(tmp_path: Path) -> None:
    service = make_service(tmp_path)
    assert await asyncio.gather(*(service.sibling_mean("g", s, 3, timeout_s=30) for s in range(3))) == [None] * 3


async def test_a_large_steps_unscored_responses_leave_room_for_those_that_they_wait_for(tmp_path: Path) -> None:
    """Ray lets so many calls into an actor at once; the others wait until one of these is answered."""
    service, slots = make_service(tmp_path), asyncio.Semaphore(CALLS_AT_ONCE)

    async def unscored(uid: str, session: int) -> float | None:
        async with slots:
            return await service.sibling_mean(uid, session, 12, timeout_s=60)

    async def scored(uid: str) -> None:
        async with slots:
            await service.record([make_row(uid=uid, session=11)])

    groups = [str(number) for number in range(1000)]
    waiting = [asyncio.create_task(unscored(uid, session)) for session in range(11) for uid in groups]
    await asyncio.gather(*map(scored, groups))  # the last response of each group comes when all others wait
    assert await asyncio.gather(*waiting) == [1.0] * 11_000


async def test_a_sibling_that_never_comes_costs_the_deadline_and_no_more(tmp_path: Path) -> None:
    service = make_service(tmp_path)
    await service.record([make_row(uid="g", session=0, value=1.0)])
    assert await service.sibling_mean("g", 1, 3, timeout_s=0.05) is None


async def test_a_service_that_comes_back_knows_the_groups_and_routes_of_before(tmp_path: Path) -> None:
    first = make_service(tmp_path)
    route = await first.route(make_query(), await first.at(1))
    await first.record([make_row(uid="g", session=0, value=0.3)])
    first.close()
    second = make_service(tmp_path)
    assert await second.route(make_query(), await second.at(1)) == route
    assert await second.sibling_mean("g", 1, 2, timeout_s=5) == pytest.approx(0.3)
    with read(tmp_path) as db:
        assert db.execute("SELECT COUNT(*) FROM attempts").fetchone()[0] == 1


async def test_an_outage_says_nothing_about_the_queries_that_came_in_it(tmp_path: Path) -> None:
    """What the reward manager records where no service answered is no query that no tool fits."""
    service = make_service(tmp_path)
    route = await service.route(make_query(), await service.at(1))
    nobody = Route(parts=(), reason="did not answer", kind=Kind.OPEN, covered=False, snapshot="")
    failed = Score(value=None, outcome=Outcome.FAILED, reason="did not answer")
    during = replace(make_row(uid="g", session=1), route=nobody, score=failed)
    await service.record([replace(make_row(uid="g", session=0), route=route), during])
    numbers = await service.metrics(1)
    assert (numbers["rlar/uncovered"], numbers["rlar/failed"]) == (0, 0.5)
    service.close()
    with Ledger(tmp_path / FILE_NAME, token="run") as ledger:
        assert [(uid, session) for _, uid, session, *_ in ledger.watched_since(0)[0]] == [("g", 0)]
        assert ledger.group("g") == {0: 1.0, 1: None}


async def test_queries_of_before_texts_were_stored_have_theirs_as_soon_as_they_are(tmp_path: Path) -> None:
    for token, keep, texts in (("first", False, 0), ("second", True, 1), ("third", True, 1)):
        config = RlarConfig(run_dir=str(tmp_path), ledger=LedgerConfig(store_responses=keep))
        service = Service(config, token)
        await service.route(make_query(), await service.at(1))
        service.close()
        with read(tmp_path) as db:
            assert db.execute("SELECT COUNT(*) FROM texts").fetchone()[0] == texts


async def test_clusters_and_what_is_known_of_tools_outlive_the_service(tmp_path: Path) -> None:
    first = make_service(tmp_path)
    snapshot = await first.at(1)
    route = await first.route(make_query("How many eggs do 3 hens lay in 4 days?", "12"), snapshot)
    first.close()
    assert route.cluster == "math/number#1" and "trusted, not examined" in route.reason
    kept = tmp_path / "library" / "competence" / f"{snapshot.version}.json"
    before = kept.read_bytes()
    second = make_service(tmp_path, token="another")
    again = await second.at(2)
    assert (
        await second.route(make_query("How many eggs do 5 hens lay in 2 days?", "10"), again)
    ).cluster == route.cluster
    assert again.version == snapshot.version and kept.read_bytes() == before
    with read(tmp_path) as db:
        assert [row[0] for row in db.execute("SELECT cluster FROM routes")] == [route.cluster] * 2
    second.close()


async def test_a_start_with_other_settings_of_routes_goes_by_them_for_prompts_of_before_too(tmp_path: Path) -> None:
    query = make_query(
        "Write a poem.", "Roses are red and violets are blue: more words of prose than a check of short texts takes"
    )
    found: dict[str, Route] = {}
    declared = {name: {"parts": [{"tool": name}]} for name in ("token_f1", "exact_match")}
    settings = {
        "defaults": RoutingConfig(),
        "fallback": RoutingConfig(fallback="token_f1"),
        "declared": RoutingConfig(routes=declared),
        "reordered": RoutingConfig(routes=dict(reversed(declared.items()))),
        "defaults again": RoutingConfig(),
    }
    for start, routing in settings.items():
        service = Service(RlarConfig(run_dir=str(tmp_path), routing=routing), start)
        found[start] = await service.route(query, await service.at(1))
        service.close()
    assert [route.name for route in found.values()] == ["-", "token_f1", "token_f1", "exact_match", "-"]
    assert found["defaults again"] == found["defaults"], "and this one is the one of then"


def test_settings_of_routes_have_one_identity_wherever_they_come_from() -> None:
    named = {Kind.MATH: "final_answer"}
    assert settings_of(RoutingConfig()) == settings_of(RoutingConfig(prefer={})) == ""
    assert settings_of(RoutingConfig(prefer=dict.fromkeys(Kind))) == "", "as Hydra has it"
    assert (
        settings_of(RoutingConfig(prefer=named)) == settings_of(RoutingConfig(prefer=dict.fromkeys(Kind) | named)) != ""
    )


async def test_a_row_goes_to_the_service_without_the_tests_of_its_query_and_is_the_same_in_the_ledger(
    tmp_path: Path,
) -> None:
    query = make_query("Write a program.", "", tests="assert solve(1) == 2\n" * 50_000)
    row = make_row(uid="g", query=query)
    client = Client.__new__(Client)  # without its actor: nothing is sent
    client._rows, client._sender = deque(), asyncio.get_running_loop().create_future()
    for acquire, least, most in ((False, 0, 10_000), (True, 1_000_000, 2_000_000)):
        client._config = RlarConfig(acquire=AcquireConfig(enabled=acquire, labelled=("rows.jsonl",)))
        client.record(row)
        sent = pickle.dumps(client._rows.pop())
        assert least <= len(sent) <= most
        with Ledger(tmp_path / FILE_NAME, token=f"acquire {acquire}") as ledger:
            ledger.add([pickle.loads(sent)])
    with read(tmp_path) as db:
        kept = [tuple(found) for found in db.execute("SELECT query, data_source, uid, value FROM scores")]
    assert kept == [(query.key, query.data_source, "g", 1.0)] * 2


async def test_labelled_answers_that_cannot_be_read_are_refused_at_the_start(tmp_path: Path) -> None:
    config = RlarConfig(run_dir=str(tmp_path), routing=RoutingConfig(labelled=str(tmp_path / "gone.jsonl")))
    with pytest.raises(DataError, match=r"labelled answers .*gone\.jsonl"):
        Service(config, "run")


def fill_disk(service: Service, *, full: bool) -> None:
    """Has SQLite find the disk full, or no longer so, as far as the ledger is concerned."""
    db = service._ledger._db
    (pages,) = db.execute("PRAGMA page_count").fetchone()
    db.execute(f"PRAGMA max_page_count={pages if full else 2**30}")


async def test_on_a_full_disk_routes_are_decided_once_and_written_with_the_first_row_after(tmp_path: Path) -> None:
    service = make_service(tmp_path)
    snapshot = await service.at(1)
    fill_disk(service, full=True)
    noise = random.Random(0)
    queries = [make_query(f"{noise.randbytes(2000).hex()}?", "5") for _ in range(20)]  # more than there is room for
    routes = [await service.route(query, snapshot) for query in queries]
    assert {route.name for route in routes} == {"final_answer"}
    with read(tmp_path) as db:
        assert db.execute("SELECT COUNT(*) FROM routes").fetchone()[0] < len(queries), "it was full"
    row = make_row(uid="g", session=0, value=0.4)
    with pytest.raises(LedgerError, match="full"):
        await service.record([row])
    assert await service.sibling_mean("g", 1, 2, timeout_s=5) == 0.4, "who waits for it does not wait for the disk"
    fill_disk(service, full=False)
    await service.record([row])
    service.close()
    again = make_service(tmp_path)
    with read(tmp_path) as db:
        assert db.execute("SELECT COUNT(*) FROM routes").fetchone()[0] == len(queries)
        assert db.execute("SELECT uid, value FROM scores").fetchall()[0]["value"] == 0.4
    assert [await again.route(query, snapshot) for query in queries] == routes
    again.close()


class SlowRouter:
    """Counts its decisions and takes a moment for each; the first one fails if told so."""

    def __init__(self, *, fails_first: bool = False) -> None:
        self.decisions = 0
        self.fails_first = fails_first

    async def route(self, query: Query, snapshot: Snapshot, split: Split = "train") -> Route:
        self.decisions += 1
        decision = self.decisions
        await asyncio.sleep(0.01)
        if self.fails_first and decision == 1:
            raise LedgerError("disk full")
        return Route(parts=(), reason=f"decision {decision}", kind=Kind.OPEN, covered=False, snapshot=snapshot.version)


async def test_a_route_is_decided_once_for_all_who_ask_at_the_same_time() -> None:
    router = SlowRouter()
    cache = RouteCache(router)
    routes = await asyncio.gather(*(cache.route(make_query(), Snapshot(tools=())) for _ in range(50)))
    assert {route.reason for route in routes} == {"decision 1"}
    assert router.decisions == 1


async def test_a_decision_that_failed_is_made_again_for_the_next_who_asks() -> None:
    cache = RouteCache(SlowRouter(fails_first=True))
    with pytest.raises(LedgerError):
        await cache.route(make_query(), Snapshot(tools=()))
    assert (await cache.route(make_query(), Snapshot(tools=()))).reason == "decision 2"


async def test_who_stops_waiting_for_a_decision_does_not_spoil_it_for_the_others() -> None:
    cache = RouteCache(SlowRouter())
    impatient = asyncio.create_task(cache.route(make_query(), Snapshot(tools=())))
    patient = asyncio.create_task(cache.route(make_query(), Snapshot(tools=())))
    await asyncio.sleep(0)
    impatient.cancel()
    assert (await patient).reason == "decision 1"


async def test_what_is_asked_during_a_call_goes_together_in_the_next_one(tmp_path: Path) -> None:
    of_all, calls = make_service(tmp_path), []
    under_way = asyncio.Event()

    async def ask(asked: Sequence[Question]) -> list[Route | BaseException]:
        calls.append([query.prompt for query, _, _ in asked])
        await under_way.wait()
        return await of_all.routes(asked)

    router, snapshot = RouteCalls(ask), await of_all.at(1)
    queries = [make_query(f"What is {number} + 1?") for number in range(10)]
    routes = [asyncio.create_task(router.route(query, snapshot)) for query in queries[:1]]
    await asyncio.sleep(0)
    routes += [asyncio.create_task(router.route(query, snapshot)) for query in queries[1:]]
    await asyncio.sleep(0)
    routes[3].cancel()  # who gives up does not spoil it for the others
    under_way.set()
    found = await asyncio.gather(*routes, return_exceptions=True)
    assert isinstance(found.pop(3), asyncio.CancelledError)
    assert found == [await of_all.route(query, snapshot) for query in queries[:3] + queries[4:]]
    assert [len(call) for call in calls] == [1, 9]


async def test_a_question_that_fails_fails_alone_and_a_call_that_fails_fails_for_all_who_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache, works, asks = RouteCache(SlowRouter(fails_first=True)), True, 0

    async def ask(asked: Sequence[Question]) -> list[Route | BaseException]:
        nonlocal asks
        asks += 1
        if not works:
            raise ServiceUnreachable("gone")
        return await asyncio.gather(*(cache.route(*one) for one in asked), return_exceptions=True)

    router, snapshot = RouteCalls(ask), Snapshot(tools=())

    async def both() -> list[Route | BaseException]:
        queries = [make_query(f"What is {number} + 1?") for number in range(2)]
        return await asyncio.gather(*(router.route(query, snapshot) for query in queries), return_exceptions=True)

    first, second = await both()
    assert isinstance(first, LedgerError) and isinstance(second, Route)
    works = False
    asks = 0
    assert [type(one) for one in await both()] == [ServiceUnreachable] * 2
    monkeypatch.setattr(service, "ROUTES_PER_CALL", 1)  # those that wait for another call do not wait for it in vain
    assert [type(one) for one in await both()] == [ServiceUnreachable] * 2
    assert asks == 2
    works = True
    assert all(isinstance(one, Route) for one in await both())


async def test_rows_wait_for_a_service_that_is_slow_until_somebody_hurries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "PAUSE", 1e6)
    monkeypatch.setattr(service, "LONGEST_PAUSE_S", 1e6)
    client = Client.__new__(Client)  # without its actor
    client._config, client._rows, client._sender = RlarConfig(), deque(), None
    client._pause_s, sent = 0.0, []

    async def call(method: str, rows: list[Row], *, timeout_s: float) -> None:
        sent.append([row.sample.session for row in rows])
        await asyncio.sleep(0.01)

    client._call = call  # type: ignore[assignment]

    async def first() -> None:
        while not sent:
            await asyncio.sleep(0)

    client.record(make_row(uid="g", session=0))
    await asyncio.wait_for(first(), 60)
    client.record(make_row(uid="g", session=1))
    await asyncio.sleep(10 * client._config.ledger.flush_s)
    client.record(make_row(uid="g", session=2))
    assert sent == [[0]]
    await asyncio.wait_for(client.flush(), 60)
    assert sent == [[0], [1, 2]]
    client.record(make_row(uid="g", session=3))  # when all had been sent, too
    await asyncio.sleep(10 * client._config.ledger.flush_s)
    assert len(sent) == 2
    await asyncio.wait_for(client.flush(), 60)
    assert sent == [[0], [1, 2], [3]]

    async def later() -> None:
        client.record(make_row(uid="g", session=4))
        await asyncio.wait_for(client.flush(), 60)

    await asyncio.to_thread(asyncio.run, later())  # in an event loop of its own
    assert sent == [[0], [1, 2], [3], [4]]


async def test_the_route_of_a_query_is_the_same_whatever_the_data_set_is_called(tmp_path: Path) -> None:
    service = make_service(tmp_path)
    snapshot = await service.at(1)
    one = make_query("Translate to German: I am here.", "Ich bin hier.")
    other = Query(messages=one.messages, reference=one.reference, data_source="openai/gsm8k", extra=one.extra)
    assert await service.route(one, snapshot) == await service.route(other, snapshot)
    assert one.key == other.key


async def test_too_many_unscored_responses_stop_the_run_with_the_tools_and_reasons_named(tmp_path: Path) -> None:
    service = make_service(tmp_path, max_unscored=0.5, unscored_window=8)
    await service.record([make_row(uid=str(n), value=None) for n in range(7)])
    await service.begin_step(2)
    await service.record([make_row(uid="last", value=None)])
    with pytest.raises(TooManyUnscored, match=r"8 of the last 8 responses.*8x exact_match"):
        await service.begin_step(3)
    await service.record([make_row(uid=str(n), value=1.0) for n in range(4)])
    await service.begin_step(4)


async def test_unscored_responses_in_validation_do_not_stop_the_run(tmp_path: Path) -> None:
    service = make_service(tmp_path, max_unscored=0.5, unscored_window=4)
    await service.record([make_row(uid=str(n), value=None, split="val") for n in range(9)])
    await service.begin_step(2)


def test_a_setting_that_names_an_unknown_tool_is_refused_at_start(tmp_path: Path) -> None:
    config = RlarConfig.model_validate({"run_dir": str(tmp_path), "routing": {"prefer": {"short_text": "exact_mach"}}})
    with pytest.raises(ConfigError, match=r"rlar\.routing\.prefer\.short_text.*'exact_mach'.*exact_match"):
        Service(config, "run")


async def test_rows_that_cannot_be_written_are_refused_and_can_be_sent_again(tmp_path: Path) -> None:
    service = make_service(tmp_path)
    blocker = Ledger(tmp_path / FILE_NAME, token="run")
    blocker._db.execute("PRAGMA busy_timeout=0")
    service._ledger._db.execute("PRAGMA busy_timeout=0")
    blocker._db.execute("BEGIN EXCLUSIVE")
    with pytest.raises(LedgerError, match="locked"):
        await service.record([make_row(uid="a")])
    blocker._db.execute("ROLLBACK")
    await service.record([make_row(uid="a")])
    with read(tmp_path) as db:
        assert db.execute("SELECT COUNT(*) FROM scores").fetchone()[0] == 1


def test_a_sample_crosses_processes_unchanged() -> None:
    import pickle

    sample = make_sample(uid="g")
    assert pickle.loads(pickle.dumps(sample)) == sample


def test_a_part_of_a_message_that_has_no_text_adds_none() -> None:
    image = {"type": "image", "image": "a.png", "text": None}
    asked = {"type": "text", "image": None, "text": "What is this?"}
    assert query_of({"prompt": [{"role": "user", "content": [image, asked]}]}).prompt == "What is this?"


def test_a_query_is_the_same_whether_it_came_by_json_or_by_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed (verl brings it)")
    pq = pytest.importorskip("pyarrow.parquet")
    rows = [
        {
            "prompt": [{"role": "user", "content": "Two bullets, no commas."}],
            "reward_model": {"ground_truth": ""},
            "extra_info": {"instruction_id_list": ["a", "b"], "kwargs": [{"num_bullets": 2}, {"relation": "at least"}]},
        }
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    back = pq.read_table(tmp_path / "rows.parquet").to_pylist()
    assert back != rows, "parquet adds the fields of the other rows"
    assert query_of(back[0]).key == query_of(rows[0]).key


async def test_a_client_asks_once_for_what_many_responses_need_at_the_same_moment() -> None:
    client, asked = Client.__new__(Client), []  # without its actor
    client._config, client._snapshots, client._sources = RlarConfig(), Once(STEPS_KEPT), Once(2)

    async def call(method: str, *what: int | str, timeout_s: float) -> tuple[Snapshot, dict[str, Route]] | str | None:
        asked.append((method, *what))
        await asyncio.sleep(0.01)
        if len(asked) == 1:
            raise ServiceUnreachable("restarting")
        return (Snapshot(tools=()), {}) if method == "prepared" else None if "unknown" in what else f"code of {what}"

    client._call = call  # type: ignore[assignment]
    failed = await asyncio.gather(*(client.at(1) for _ in range(20)), return_exceptions=True)
    assert {type(one) for one in failed} == {ServiceUnreachable}
    impatient = asyncio.create_task(client.at(1))
    await asyncio.sleep(0)
    impatient.cancel()
    assert await asyncio.gather(*(client.at(1) for _ in range(20))) == [Snapshot(tools=())] * 20
    assert set(await asyncio.gather(*(client.source("a") for _ in range(20)))) == {"code of ('a',)"}
    with pytest.raises(ToolUnavailable, match="not in the library"):
        await client.source("unknown")
    assert asked == [("prepared", 1, "train")] * 2 + [("source", "a"), ("source", "unknown")]
    for step in range(2, STEPS_KEPT + 2):
        await client.at(step)
    await client.at(STEPS_KEPT + 1)
    await client.at(1)  # forgotten, as so many others came
    assert [step for method, step, *_ in asked if method == "prepared"] == [1, 1, *range(2, STEPS_KEPT + 2), 1]


async def test_routes_that_were_expected_come_with_the_tools_of_their_step(tmp_path: Path) -> None:
    service, asked = make_service(tmp_path), []
    queries = [make_query(f"What is {number} + 1?") for number in range(20)]
    await service.expect(3, "train", [*queries, queries[0]])
    snapshot, routes = await service.prepared(3, "train")
    assert snapshot == await service.at(3)
    assert routes == {query.key: await service.route(query, snapshot) for query in queries}
    with read(tmp_path) as db:
        assert db.execute("SELECT COUNT(*) FROM routes").fetchone()[0] == 20
    assert (await service.prepared(3, "val"))[1] == (await service.prepared(4, "train"))[1] == {}

    client = Client.__new__(Client)  # without its actor

    async def call(method: str, *what: object, timeout_s: float) -> object:
        asked.append(method)
        return await getattr(service, method)(*what)

    client._config, client._snapshots, client._call = RlarConfig(), Once(STEPS_KEPT), call  # type: ignore[assignment]
    client._routes = RouteCache(RouteCalls(client._ask_routes))
    found = await client.at(3)
    assert [await client.route(query, found) for query in queries] == list(routes.values())
    assert asked == ["prepared"]
    assert await client.route(queries[0], found, "val") == await service.route(queries[0], snapshot, "val")
    assert asked == ["prepared", "routes"], "what was not expected is asked for"
    for step in range(4, 3 * STEPS_KEPT):
        await service.expect(step, "train", queries[:1])
    assert sorted(service._expected) == [(step, "train") for step in range(2 * STEPS_KEPT, 3 * STEPS_KEPT)]


async def test_a_library_that_cannot_be_read_just_then_costs_what_was_expected_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = make_service(tmp_path)

    async def broken(step: int) -> Snapshot:
        raise LibraryError("no such folder")

    with monkeypatch.context() as now:
        now.setattr(service, "at", broken)
        await service.expect(1, "train", [make_query()])
        assert await service._expected[1, "train"] == {}
    assert (await service.prepared(1, "train"))[0] == await service.at(1)
