# SPDX-License-Identifier: Apache-2.0
"""The report: its figures are those of the run, its page holds what is hostile as data, and it disturbs no training."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import signal
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import make_sample
from report_runs import RESPONSES, STEPS, add_agents, make_run
from typer.testing import CliRunner, Result

from verl_rlar.cli import app
from verl_rlar.errors import LedgerError
from verl_rlar.ledger import FILE_NAME, SCHEMA_VERSION, Ledger, Row, read
from verl_rlar.library import FOLDER_NAME, LibraryView
from verl_rlar.report import alarms, reading, samples, tools
from verl_rlar.report.figures import gather
from verl_rlar.report.live import HOST, Live, watched
from verl_rlar.report.page import as_data, policy, render
from verl_rlar.types import Kind, Outcome, Route, RoutePart, Score, Snapshot

get = partial(httpx.get, timeout=120)
"""Asks a live report, which may make its figures before it answers."""


def report(*args: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["report", *args])
    assert result.exit_code == code, result.output + result.stderr
    return result


def figures_of(folder: Path, **arguments: Any) -> dict[str, Any]:
    return gather(folder, LibraryView(folder / FOLDER_NAME), **arguments)


def titles(figures: dict[str, Any]) -> str:
    return "\n".join(f"{alarm['title']}: {alarm['text']}" for alarm in figures["alarms"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def figures(folder: Path) -> dict[str, Any]:
    return figures_of(folder)


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[dict[str, Any]]:
    with read(folder) as db:
        return [dict(row) for row in db.execute("SELECT * FROM scores")]


# --- The figures ------------------------------------------------------------------------------------------------------


def test_curves_hold_what_the_rows_say(figures: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    curves = figures["curves"]["train"]
    assert curves["steps"] == [[step, step] for step in range(1, STEPS + 1)]
    for name in ("math", "chat"):
        task = next(task for task in curves["tasks"] if task["name"] == name)
        for at, step in enumerate(range(1, STEPS + 1)):
            of_step = [r for r in rows if (r["split"], r["step"], r["data_source"]) == ("train", step, name)]
            values = [row["value"] for row in of_step if row["value"] is not None]
            assert task["n"][at] == len(of_step) and task["scored"][at] == len(values)
            assert task["mean"][at] == (pytest.approx(sum(values) / len(values), abs=1e-4) if values else None)
    train = [row for row in rows if row["split"] == "train"]
    outcomes = Counter(row["outcome"] for row in train)
    assert {name: sum(counts) for name, counts in curves["outcomes"].items()} == outcomes
    by_uid: dict[str, list[Any]] = {}
    for row in train:
        by_uid.setdefault(row["uid"], []).append(row["value"])
    flat = sum(len(set(values)) == 1 and values[0] is not None for values in by_uid.values())
    assert sum(curves["groups"]["flat"]) == flat > 0
    assert sum(curves["groups"]["groups"]) == len(by_uid)


def test_tools_hold_what_their_calls_say(figures: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    calls = [part for row in rows for part in json.loads(row["parts"])]
    for page in figures["tools"]:
        of_tool = [call for call in calls if call["digest"] == page["digest"]]
        if not of_tool:
            assert page["use"] is None
            continue
        use, values = page["use"], [call["value"] for call in of_tool if call["value"] is not None]
        assert use["calls"] == use["sampled"] == len(of_tool)
        assert sum(use["histogram"]) == len(values)
        assert use["outcomes"] == {o.value: sum(c["outcome"] == o.value for c in of_tool) for o in Outcome}
        assert use["seconds"] == pytest.approx(sum(call["seconds"] for call in of_tool), abs=0.01)
    assert sum(flow["n"] for flow in figures["flow"]) == len(rows)
    assert sum(cost["seconds"] for cost in figures["costs"]) > 0


def test_a_tools_page_has_its_exam_calibration_shadow_canaries_and_history(figures: dict[str, Any]) -> None:
    pages = {page["name"]: page for page in figures["tools"]}
    model, rule, checker = pages["model"], pages["final_answer"], pages["checker"]
    assert model["state"] == "rolled_back" and [event["event"] for event in model["events"]] == [
        *("proposed", "examined", "shadow", "live", "rolled_back")
    ]
    assert model["card"]["failing"][0]["prompt"] == "prompt of a case" and model["card"]["failed_cases"] == 17
    missed = {figure["name"]: figure["missed"] for figure in model["card"]["figures"]}
    assert missed == {"errors": False, "gold": False, "false_accept": True}
    assert model["calibration"]["method"] in ("isotonic", "quantile")
    values = [value for _, value in model["calibration"]["points"]]
    assert values == sorted(values) and len(values) > 50
    assert model["shadow"]["n"] == 3 * 5 * RESPONSES and model["shadow"]["pairs"] > 0
    assert rule["calibration"]["method"] == "identity" and figures["sources"][rule["source"]] == "source"
    assert {one["canary"]: one["flipped"] for one in rule["canaries"]} == {"known": None, "canary": 9}
    assert checker["use"] is None and checker["state"] == "examined"
    marks = [(event["step"], event["event"]) for event in figures["events"]]
    assert (5, "live") in marks and (10, "rolled_back") in marks and (0, "live") not in marks


def test_clusters_advice_rubrics_agents_and_what_they_cost_are_shown(tmp_path: Path) -> None:
    rubric = add_agents(make_run(tmp_path))
    figures = figures_of(tmp_path)
    [cluster] = [flow["cluster"] for flow in figures["flow"] if flow["route"] == "rubric"]
    assert figures["clusters"][cluster] == f"{cluster.partition('#')[0]}: sea tales"
    assert {flow["cluster"] for flow in figures["flow"]} == {cluster, "math", "open"}, "by kind, where there is none"
    assert [(one["cluster"], one["digest"], one["step"]) for one in figures["advice"]] == [
        (cluster, rubric.digest, STEPS + 1)
    ]
    page = next(page for page in figures["tools"] if page["digest"] == rubric.digest)
    assert [(one["question"], one["weight"], one["yes"]) for one in page["checks"]] == [
        ("question one", 2.0, 1.0),
        ("question two", 1.0, 1 / RESPONSES),
    ]
    assert (page["use"]["tokens"], page["use"]["dollars"]) == (220 * RESPONSES, 0.001 * RESPONSES)
    costs = {one["tool"]: (one["tokens"], one["dollars"]) for one in figures["costs"] if one["how"] == "use"}
    assert costs["rubric"] == (880, 0.004) and costs["final_answer"] == (None, None)
    spent = {one["task"]: one for one in figures["agents"]["spent"]}
    assert {task: one["who"] for task, one in spent.items()} == {
        "rubrics": "rubrics",
        "advice": "advice on routes",
        "a4deadf7417d": "coder",
        "task": "coder",
    }
    one = spent["rubrics"]
    assert (one["calls"], one["read"], one["written"], one["dollars"]) == (1, 200, 20, 0.001)
    [did] = figures["agents"]["runs"]
    assert (did["agent"], did["how"], did["tool"], did["reason"]) == (
        "acquire-open",
        "done",
        "acquired",
        "why acquired",
    )
    [raised] = [alarm for alarm in figures["alarms"] if alarm.get("sign") == "length"]
    assert raised["title"].startswith(f"Before step {STEPS + 1}, rubric, ") and "2 times since step 9" in raised["text"]
    assert raised["figures"] == [["correlation", 0.81], ["figure", 40.0]] and raised["uids"] == ["sea"]
    [sample] = [group for group in figures["samples"] if "alarm" in group["tags"]]
    assert sample["uid"] == "sea" and sample["cluster"] == cluster
    silent = json.dumps(figures_of(tmp_path, texts=False))
    assert "sea tales" not in silent and "why advised" not in silent and "why acquired" not in silent


def test_a_damaged_account_or_transcript_is_left_out(tmp_path: Path) -> None:
    add_agents(make_run(tmp_path))
    (tmp_path / "agents" / "spending.sqlite").write_bytes(b"no account " * 100)
    for transcript in (tmp_path / "agents").glob("*.jsonl"):
        transcript.write_bytes(b'[1]\n{"event": "end", "how": ["odd"], "at": "x"}\n{"event": "acq')
    (tmp_path / FOLDER_NAME / "advice.jsonl").write_text("no advice\n")
    figures = figures_of(tmp_path)
    assert figures["agents"]["spent"] == [] and figures["advice"] == []
    assert [(one["how"], one["seconds"]) for one in figures["agents"]["runs"]] == [("['odd']", None)]


def test_a_rule_costs_no_tokens_whatever_its_details_say(tmp_path: Path) -> None:
    place = make_run(tmp_path)
    with closing(sqlite3.connect(place / FILE_NAME)) as db, db:
        sql = "UPDATE scores SET parts = replace(parts, ?, ?) WHERE step % 2 = ?"
        for odd, tokens in enumerate(("0.5", "NaN")):
            db.execute(sql, ('"detail"', f'"truncated": 0.0, "tokens": {tokens}, "x"', odd))
    figures = figures_of(place)
    assert any("model" == cost["tool"] and cost["tokens"] for cost in figures["costs"])
    assert all(cost["tokens"] is None for cost in figures["costs"] if cost["tool"] == "final_answer")


def test_a_canary_may_differ_by_the_tolerance_that_is_set(folder: Path) -> None:
    flipped = lambda figures: [one for tool in figures["tools"] for one in tool["canaries"] if one["flipped"]]  # noqa: E731
    assert flipped(json.loads(report(str(folder), "--json").stdout))
    assert not flipped(json.loads(report(str(folder), "--json", "--set", "life.tolerance=1").stdout))


def test_a_library_that_is_elsewhere_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    make_run(tmp_path / "run")
    (tmp_path / "run" / FOLDER_NAME).rename(tmp_path / FOLDER_NAME)
    run, library = str(tmp_path / "run"), str(tmp_path / FOLDER_NAME)
    assert f"there is no library in {run}, so" in report(run, "--json").stderr
    assert "there is no library" not in report(run, "--json", "--in", library).stderr


def test_of_a_step_that_was_trained_again_the_latest_start_counts(tmp_path: Path) -> None:
    make_run(tmp_path)
    first = figures_of(tmp_path)
    with read(tmp_path) as db:
        row = dict(db.execute("SELECT * FROM scores WHERE split = 'train' AND step = 7 LIMIT 1").fetchone())
    with Ledger(tmp_path / FILE_NAME, token="again") as ledger:
        route = Route(
            parts=(RoutePart(tool="final_answer", digest="d" * 16),),
            reason="",
            kind=Kind.MATH,
            covered=True,
            snapshot=row["snapshot"],
        )
        sample = make_sample("new", uid="new", step=7)
        score = Score(value=0.25, outcome=Outcome.SCORED, reason="")
        ledger.add(
            [
                Row(sample=sample, route=route, score=score, sent=0.25, sent_as="value", received=1.0, seconds=0.1),
                Row(
                    sample=replace(sample, session=1),
                    route=route,
                    score=score,
                    sent=0.25,
                    sent_as="value",
                    received=1.0,
                    seconds=0.1,
                ),
            ]
        )
    second = figures_of(tmp_path)
    was, now = first["curves"]["train"]["all"], second["curves"]["train"]["all"]
    assert now["n"][6] == 2 and now["mean"][6] == 0.25
    assert now["n"][:6] == was["n"][:6] and len(now["n"]) == 7, "what the first start made from step 7 on is gone"
    assert all(one["last"] == 6 and not one["flipped"] for page in second["tools"] for one in page["canaries"])
    assert any(one["flipped"] == 9 for page in first["tools"] for one in page["canaries"])
    again = {group["uid"]: group["attempt"] for group in second["samples"] if group["attempt"] > 1}
    assert again == {"new": 2} and not any(
        g["step"] == 7 and g["split"] == "train" for g in second["samples"] if g["uid"] not in again
    )
    assert [start["steps"] for start in second["run"]["starts"]] == [[1, 6], [7, 7]]


def test_a_sample_of_the_rows_is_spread_and_scaled(
    folder: Path, figures: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "ROWS", 120)
    monkeypatch.setattr(reading, "STRETCH", 6)
    sampled = figures_of(folder)
    assert 60 <= sampled["run"]["sampled"] <= 120 < sampled["run"]["rows"]
    assert sampled["curves"] == figures["curves"]  # which are of all rows all the same
    name = "final_answer"
    few, all_of = (next(t["use"] for t in f["tools"] if t["name"] == name) for f in (sampled, figures))
    assert few["calls"] == pytest.approx(all_of["calls"], rel=0.35) and few["sampled"] < all_of["sampled"]
    assert len([1 for n in few["points"]["scored"] if n]) > STEPS / 2
    assert figures_of(folder)["tools"] == sampled["tools"]


def test_of_very_many_tools_those_have_a_page_that_were_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "PAGES", 2)
    figures = figures_of(make_run(tmp_path))
    assert {page["name"] for page in figures["tools"]} == {"final_answer", "model"} and figures["tools_left_out"] == 1


def test_long_runs_have_few_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "POINTS", 5)
    figures = figures_of(make_run(tmp_path))
    curves = figures["curves"]["train"]
    assert curves["steps"] == [[1, 3], [4, 6], [7, 9], [10, 12]]
    assert sum(curves["all"]["n"]) == STEPS * 5 * RESPONSES


# --- Samples ----------------------------------------------------------------------------------------------------------


def test_samples_are_whole_groups_and_say_what_they_are_shown_for(
    figures: dict[str, Any], rows: list[dict[str, Any]]
) -> None:
    seen = Counter(tag for group in figures["samples"] for tag in group["tags"])
    assert {"hacked", "failed", "unscored", "flat", "split", "disagree", "repeated"} <= set(seen)
    for group in figures["samples"]:
        of_group = [row for row in rows if row["uid"] == group["uid"]]
        assert group["n"] == len(of_group) == len(group["responses"])
        assert [one["value"] for one in group["responses"]] == [row["value"] for row in of_group]
        assert ("hacked" in group["tags"]) == any(row["outcome"] == "hacked" for row in of_group)
        assert group["prompt"]["turns"][-1]["text"].startswith("prompt ")
        assert all(one["text"] is not None for one in group["responses"])


def test_the_same_run_gives_the_same_report(folder: Path, figures: dict[str, Any]) -> None:
    again = figures_of(folder)
    assert again | {"made": ""} == figures | {"made": ""}


def test_samples_keep_to_their_budget_whatever_the_texts_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path, lambda place: "\u2028<" * 20_000 if place in ("response", "prompt") else place)
    monkeypatch.setattr(samples, "BYTES", 200_000)
    found = figures_of(tmp_path)["samples"]
    assert found and len(json.dumps(found)) <= 200_000
    text = found[0]["responses"][0]["text"]
    assert "characters left out" in text and len(text) < 4000
    assert found[0]["responses"][0]["length"] >= 40_000


def test_a_run_without_texts_has_figures_and_scores(tmp_path: Path) -> None:
    figures = figures_of(make_run(tmp_path, store_texts=False))
    assert figures["run"]["texts"] is False and len(figures["samples"]) > 10
    assert all(group["prompt"] is None for group in figures["samples"])
    assert figures["curves"]["train"]["all"]["mean"][0] is not None
    assert figures["length"]["tasks"] == []
    assert b"<script" in render(figures)


# --- Alarms -----------------------------------------------------------------------------------------------------------


def test_what_is_broken_raises_an_alarm(figures: dict[str, Any]) -> None:
    said = titles(figures)
    for sign in ("model was rolled back at step 10: why rolled back", "Unscored responses", "Caught cheats"):
        assert sign in said
    assert "final_answer: a canary flipped" in said and "canary got 0 at step 9, and must get 1" in said
    assert re.search(r"One response was paid for \d prompts|Tools disagree in \d+ of \d+ groups", said)
    levels = [alarm["level"] for alarm in figures["alarms"]]
    assert levels == sorted(levels, key=alarms.LEVELS.index)


def healthy(**changes: Any) -> dict[str, Any]:
    """Figures without a fault."""
    n = [64] * 8
    series = {"n": n, "scored": n, "mean": [0.3 + at / 40 for at in range(8)], "sent": n}
    curves = {
        "steps": [[step, step] for step in range(8)],
        "all": series,
        "outcomes": {"scored": n, "hacked": [0] * 8, "failed": [0] * 8, "abstained": [0] * 8},
        "groups": {"groups": [8] * 8, "many": [8] * 8, "flat": [2] * 8},
        "tasks": [{"name": "math", **series}],
        "uncovered": 0,
    }
    return {
        "events": [],
        "raised": [],
        "curves": {"train": curves | changes},
        "tools": [],
        "length": {"tasks": [{"name": "math", "r": 0.1, "n": 900}]},
        "repeated": [],
        "doubted": {"groups": 0, "compared": 9, "by": 0.5},
    }


def test_a_sound_run_raises_none() -> None:
    assert alarms.alarms(healthy()) == []


@pytest.mark.parametrize(
    ("changes", "sign"),
    [
        ({"outcomes": {"scored": [24] * 8, "hacked": [0] * 8, "failed": [40] * 8, "abstained": [0] * 8}}, "Unscored"),
        ({"outcomes": {"scored": [62] * 8, "hacked": [2] * 8, "failed": [0] * 8, "abstained": [0] * 8}}, "cheats"),
        ({"groups": {"groups": [8] * 8, "many": [8] * 8, "flat": [7] * 8}}, "without variance"),
        ({"tasks": [{"name": "math", "scored": [64] * 8, "mean": [0.99] * 8}]}, "all but 1"),
        ({"tasks": [{"name": "math", "scored": [64] * 8, "mean": [0.0] * 8}]}, "all but 0"),
        ({"tasks": [{"name": "math", "scored": [64] * 8, "mean": [0.5, 0.5] + [0.3] * 6}]}, "reward falls"),
        ({"uncovered": 5}, "no tool fits"),
    ],
)
def test_each_sign_has_its_alarm(changes: dict[str, Any], sign: str) -> None:
    found = alarms.alarms(healthy(**changes))
    assert len(found) == 1 and sign in found[0]["title"], found


def test_length_that_pays_is_an_alarm() -> None:
    figures = healthy()
    figures["length"]["tasks"][0]["r"] = -0.6
    assert "shorter responses are paid more" in alarms.alarms(figures)[0]["title"]


# --- What is hostile --------------------------------------------------------------------------------------------------

BREAKERS = (
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "]]>\u2028\u2029",
    "\udc80\ud800 lone",
    "__proto__",
    "{{ 7*7 }}{% raw %}",
    "\x00\x1b[31m\u202e",
)


@pytest.mark.parametrize("word", BREAKERS)
def test_what_is_hostile_stays_data(tmp_path: Path, word: str) -> None:
    def words(place: str) -> str:
        lone = any(0xD800 <= ord(char) < 0xE000 for char in word)  # which can stand in a model's text only
        return f"{word} {place}" if not lone or place in ("response", "prompt", "reference") else place

    figures = figures_of(make_run(tmp_path, words))
    page = render(figures).decode()
    assert page.count("<script") == 2 and page.count("</script>") == 2 and "49" not in page.split("<script")[0][-300:]
    data = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)
    assert data and not set("<>&\u2028\u2029") & set(data[1])
    assert json.loads(data[1]) == json.loads(json.dumps(figures))


def test_the_policy_names_the_hashes_of_what_is_in_the_page(figures: dict[str, Any]) -> None:
    page = render(figures).decode()
    for tag, rule in (("script", "script-src"), ("style", "style-src")):
        inline = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert len(inline) == 1
        named = base64.b64encode(hashlib.sha256(inline[0].encode()).digest()).decode()
        assert f"{rule} 'sha256-{named}'" in policy(live=False)
    assert "default-src 'none'" in policy(live=False) and "connect-src 'none'" in policy(live=False)
    assert "unsafe" not in policy(live=True)
    assert not re.search(r"""(src|href)=["'](?!#|data:)""", page.split('<script type="application/json"')[0])


def test_numbers_that_json_does_not_know_are_refused() -> None:
    with pytest.raises(ValueError):
        as_data({"x": float("nan")})


def test_a_damaged_card_and_spec_are_shown_as_far_as_they_go(tmp_path: Path) -> None:
    make_run(tmp_path)
    model = next(t for t in figures_of(tmp_path)["tools"] if t["name"] == "model")
    folder = tmp_path / FOLDER_NAME / "tools" / model["digest"]
    (folder / "card.json").write_text('{"figures": {"all": 3, "math": {"gold": {"value": "high"}}}, "failing": [7]}')
    page = next(t for t in figures_of(tmp_path)["tools"] if t["name"] == "model")
    assert page["card"]["verdict"] == "unknown" and page["card"]["figures"][0]["value"] is None
    (folder / "card.json").write_text("{")
    (folder / "spec.json").write_text("{}")
    figures = figures_of(tmp_path)
    page = next(t for t in figures["tools"] if t["digest"] == model["digest"])
    assert page["name"] == "model" and page["calibration"] and "damaged" in page["damaged"]
    assert "the library is damaged" in titles(figures)


# --- A run that goes on -----------------------------------------------------------------------------------------------


def test_it_reads_one_state_while_somebody_writes(tmp_path: Path) -> None:
    make_run(tmp_path)
    stop, rows = threading.Event(), 0
    route = Route(parts=(), reason="", kind=Kind.OPEN, covered=False, snapshot=Snapshot(tools=()).version)

    def write() -> None:
        nonlocal rows
        with Ledger(tmp_path / FILE_NAME, token="run") as ledger:
            while not stop.is_set():
                score = Score(value=1.0, outcome=Outcome.SCORED, reason="")
                made = [
                    Row(
                        sample=make_sample("x", uid=f"n{rows}", session=session, step=STEPS + 1),
                        route=route,
                        score=score,
                        sent=1.0,
                        sent_as="value",
                        received=1.0,
                        seconds=0.1,
                    )
                    for session in range(4)
                ]
                ledger.add(made)
                rows += 4

    thread = threading.Thread(target=write)
    thread.start()
    try:
        seen = []
        while rows < 400:
            figures = figures_of(tmp_path)
            n = sum(sum(curves["all"]["n"]) for curves in figures["curves"].values())
            assert n == figures["run"]["rows"] == sum(flow["n"] for flow in figures["flow"])
            seen.append(n)
    finally:
        stop.set()
        thread.join()
    assert seen == sorted(seen)


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Live]:
    make_run(tmp_path)
    files = watched(tmp_path, tmp_path / FOLDER_NAME)
    with Live(lambda: figures_of(tmp_path), files, refresh_s=0.5, rest=0) as server:
        yield server


def test_a_live_report_is_read_by_who_has_its_address_only(live: Live) -> None:
    page = get(live.url)
    assert page.status_code == 200 and 'data-live="0.5"' in page.text
    assert "connect-src 'self'" in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff" and page.headers["cache-control"] == "no-store"
    bare = f"http://{HOST}:{live.port}"
    assert get(f"{bare}/").status_code == get(f"{bare}/data.json").status_code == 404
    for host in (f"evil.example:{live.port}", "127.0.0.1.evil.example:80", "", "127.0.0.1"):
        assert get(live.url, headers={"Host": host}).status_code == 403
    assert get(live.url, headers={"Host": "localhost:9999"}).status_code == 200
    assert httpx.post(live.url, timeout=120).status_code == 501
    assert live.url.startswith("http://127.0.0.1:")


def test_a_live_report_gives_new_figures_when_there_are_any(live: Live, tmp_path: Path) -> None:
    first = get(live.url + "data.json")
    rows, tag = first.json()["run"]["rows"], first.headers["etag"]
    assert get(live.url + "data.json", headers={"If-None-Match": tag}).status_code == 304
    with Ledger(tmp_path / FILE_NAME, token="run") as ledger:
        route = Route(parts=(), reason="", kind=Kind.OPEN, covered=False, snapshot="s")
        score = Score(value=None, outcome=Outcome.ABSTAINED, reason="")
        sample = make_sample("x", uid="late", step=STEPS + 1)
        ledger.add([Row(sample=sample, route=route, score=score, sent=0.5, sent_as="neutral", received=1, seconds=0)])
        second = get(live.url + "data.json", headers={"If-None-Match": tag})
    assert second.status_code == 200 and second.json()["run"]["rows"] == rows + 1
    assert second.headers["etag"] != tag


def test_a_live_report_leaves_the_machine_to_the_training(tmp_path: Path) -> None:
    make_run(tmp_path)
    made = 0

    def counted() -> dict[str, Any]:
        nonlocal made
        made += 1
        return {"run": {"rows": made}, "made": "2026"}

    with Live(counted, (tmp_path / FILE_NAME,), rest=1e12) as server:
        (tmp_path / FILE_NAME).touch()
        assert [get(server.url + "data.json").json()["run"]["rows"] for _ in range(3)] == [1, 1, 1]
    with Live(counted, (tmp_path / FILE_NAME,), rest=0) as server:
        (tmp_path / FILE_NAME).touch()
        assert [get(server.url + "data.json").json()["run"]["rows"] for _ in range(3)] == [3, 3, 3]


def test_a_live_report_keeps_its_figures_when_the_ledger_is_gone(live: Live, tmp_path: Path) -> None:
    rows = get(live.url + "data.json").json()["run"]["rows"]
    (tmp_path / FILE_NAME).rename(tmp_path / "away")
    assert get(live.url + "data.json").json()["run"]["rows"] == rows


# --- The command ------------------------------------------------------------------------------------------------------


def test_the_command_writes_a_file_and_says_what_is_in_it(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "out.html"
    said = report(str(folder), "-o", str(file)).stderr
    assert "252 responses" in said and "alarms" in said
    assert b'<html lang="en">' in file.read_bytes()
    report(str(folder), "-o", str(file))  # a report gives way to a report
    assert [path.name for path in tmp_path.iterdir()] == ["out.html"]


def test_the_command_overwrites_no_other_file(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.html"
    file.write_text("<p>mine</p>")
    assert "no report; --force overwrites it" in report(str(folder), "-o", str(file), code=2).stderr
    assert file.read_text() == "<p>mine</p>"
    report(str(folder), "-o", str(file), "--force")
    assert "there is no folder" in report(str(folder), "-o", str(tmp_path / "no" / "x.html"), code=2).stderr


def test_json_is_one_object_without_texts(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = report(str(folder), "--json").stdout.splitlines()
    assert len(lines) == 1 and list(tmp_path.iterdir()) == []
    figures = json.loads(lines[0])
    assert figures["run"]["rows"] == 252 and not {"samples", "sources"} & set(figures)


def test_a_report_without_texts_can_be_shown_around(tmp_path: Path) -> None:
    secret, quoting = "the policy said this", re.compile("prompt|response|reference|source|cell|reason")
    make_run(tmp_path, lambda place: secret if place != "reason of a card" and quoting.search(place) else place)
    file = tmp_path / "out.html"
    report(str(tmp_path), "-o", str(file), "--no-texts")
    assert secret not in file.read_text()
    report(str(tmp_path), "-o", str(file))
    assert secret in file.read_text()


def test_the_checkpoint_folder_will_do(tmp_path: Path) -> None:
    make_run(tmp_path / "rlar")
    report(str(tmp_path), "-o", str(tmp_path / "out.html"))
    assert f"{tmp_path.name} · rlar report" in (tmp_path / "out.html").read_text()


def test_no_ledger_another_schema_and_an_empty_one_are_explained(tmp_path: Path) -> None:
    assert "there is no ledger at" in report(str(tmp_path), code=2).stderr
    Ledger(tmp_path / FILE_NAME, token="run").close()
    assert "no scored response yet" in report(str(tmp_path), code=2).stderr
    with sqlite3.connect(tmp_path / FILE_NAME) as db:
        db.execute(f"PRAGMA user_version={SCHEMA_VERSION + 1}")
    db.close()
    assert f"schema version {SCHEMA_VERSION + 1}" in report(str(tmp_path), code=2).stderr
    with pytest.raises(LedgerError):
        gather(tmp_path, None)


def test_without_a_library_tools_are_as_the_ledger_knows_them(tmp_path: Path) -> None:
    make_run(tmp_path)
    figures = gather(tmp_path, None)
    assert figures["run"]["library"] is False and figures["events"] == []
    rule = next(tool for tool in figures["tools"] if tool["name"] == "final_answer")
    assert rule["state"] == "unknown" and rule["use"]["calls"] > 0 and rule["description"] == "description"


def test_live_and_a_file_together_are_refused(folder: Path) -> None:
    assert "--live serves the report" in report(str(folder), "--live", "--json", code=2).stderr


def test_a_port_that_is_taken_is_explained(folder: Path, live: Live) -> None:
    assert "choose another --port" in report(str(folder), "--live", "--port", str(live.port), code=2).stderr


def test_the_live_command_ends_on_ctrl_c(folder: Path) -> None:
    command = [sys.executable, "-m", "verl_rlar", "report", str(folder), "--live"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        url = process.stdout.readline().strip()
        assert get(url).status_code == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 128 + signal.SIGINT
        assert process.stderr and "Traceback" not in process.stderr.read()


def test_responses_of_an_outage_are_no_uncovered_queries(tmp_path: Path) -> None:
    nobody = Route(parts=(), reason="no answer", kind=Kind.OPEN, covered=False, snapshot="")
    tool = Route(
        parts=(RoutePart(tool="exact_match", digest="d"),), reason="", kind=Kind.OPEN, covered=True, snapshot="s"
    )
    bare = replace(nobody, snapshot="s")
    unscored = {
        nobody: Score(value=None, outcome=Outcome.FAILED, reason="no answer"),
        bare: Score(value=None, outcome=Outcome.ABSTAINED, reason="no tool"),
    }
    with Ledger(tmp_path / FILE_NAME, token="a") as ledger:
        for group, routes in enumerate(([tool, tool, nobody], [tool, tool, tool], [bare, bare, bare])):
            rows = []
            for session, route in enumerate(routes):
                sample = replace(make_sample(), step=1, uid=str(group), session=session)
                score = Score(value=1.0, outcome=Outcome.SCORED, reason="") if route is tool else unscored[route]
                rows.append(
                    Row(sample=sample, route=route, score=score, sent=0.0, sent_as="value", received=1.0, seconds=0.1)
                )
            ledger.add(rows)
    curves = gather(tmp_path, None)["curves"]["train"]
    assert curves["uncovered"] == 3
    assert {line["name"]: sum(line["n"]) for line in curves["routes"]} == {"exact_match": 6, "-": 3}
