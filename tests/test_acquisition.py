# SPDX-License-Identifier: Apache-2.0
"""The gaps of a data set are found, and filled by tools that pass an exam."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import make_query
from hub_repos import WIDE
from test_competence import record, tool

from verl_rlar.acquisition import Gap, acquire, find_gaps, shortfall
from verl_rlar.competence import Competence
from verl_rlar.config import RlarConfig, parse
from verl_rlar.dispatcher import Dispatcher
from verl_rlar.library import LibraryView
from verl_rlar.router import decide
from verl_rlar.types import Kind, Snapshot

CHAT = {"prompt": [{"role": "user", "content": "How are you?"}], "data_source": "chat"}
MATH = {
    "prompt": [{"role": "user", "content": "6 * 7?"}],
    "data_source": "math",
    "reward_model": {"ground_truth": "42"},
}
CODE = {
    "prompt": [{"role": "user", "content": "Write f."}],
    "data_source": "code",
    "reward_model": {"ground_truth": "assert f(1) == 2"},
}
NO_SANDBOX = {"sandbox": {"backend": "none"}}


def chat(prompt: str) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": prompt}], "data_source": "chat"}


LLM = {"agents": {"url": "http://127.0.0.1:9/v1", "model": "some-llm"}}


async def gaps_of(rows: list[dict[str, Any]], tree: dict[str, Any]) -> tuple[int, tuple[Gap, ...]]:
    config = parse(tree)
    async with Dispatcher(config) as dispatcher:
        return await find_gaps(enumerate(rows, start=1), dispatcher, config)


async def test_kinds_of_query_without_a_tool_are_named_with_who_could_find_one() -> None:
    total, gaps = await gaps_of([MATH, CHAT, CODE, CHAT], NO_SANDBOX)
    assert total == 4
    assert [(gap.kind, gap.rows, gap.share, gap.way) for gap in gaps] == [
        (Kind.OPEN, 2, 0.5, "scout"),
        (Kind.UNIT_TESTS, 1, 0.25, "nobody"),
    ]
    assert "set agents.url" in gaps[1].plan and len(gaps[0].queries) == 1, "CHAT is one query"
    _, gaps = await gaps_of([CODE, CHAT], NO_SANDBOX | LLM)
    assert [(gap.way, "some-llm" in gap.plan) for gap in gaps] == [("scout", True), ("coder", True)]


async def test_gaps_are_by_cluster_those_first_by_which_most_is_to_be_gained() -> None:
    poems = [chat(f"Write a short poem about the sea in the month number {n}.") for n in range(40)]
    whales = [chat(f"List {n} facts: what do whales eat? Where do whales live? Why?") for n in range(50)]
    odd = [chat("Расскажи о море."), chat("Πες μου για τη θάλασσα."), chat("海について教えて。")]
    config = parse(NO_SANDBOX)
    async with Dispatcher(config) as dispatcher:
        rows = enumerate([*poems, *whales, *odd, MATH], start=1)
        total, gaps = await find_gaps(rows, dispatcher, config, 0.02)
    assert total == 94
    assert [(gap.rows, gap.headroom) for gap in gaps] == [(50, 0.5), (40, 0.5), (3, 0.5)]
    assert gaps[0].gain == pytest.approx(50 / 94 / 2) and "facts" in gaps[0].name and "month" in gaps[1].name
    assert [bool(gap.cluster) for gap in gaps] == [True, True, False], "small ones of a kind are together"
    assert all("whales" in query.prompt for query in gaps[0].queries)


def test_a_tool_that_is_weak_in_a_cluster_is_a_shortfall_there_unless_the_settings_want_it() -> None:
    weak = tool("weak")
    known = Competence(records=(record(weak, 0.55, 60, cluster="open#1"), record(weak, 0.9)))
    snapshot, query = Snapshot(tools=(weak,)), make_query("Tell me a story.", None)

    def short(cluster: str, **settings: Any) -> tuple[float, str] | None:
        config = parse({"routing": {"least": 0.4, **settings}}).routing
        route = decide(query, snapshot, config, cluster=cluster, competence=known)
        return shortfall(route, snapshot, known, 0.55)

    found = short("open#1")
    assert found is not None and found[0] == pytest.approx(0.46, abs=0.05) and "weak is weak: 0." in found[1]
    assert short("open#2") is None and short("open#1", prefer={"open": "weak"}) is None
    uncovered = decide(query, Snapshot(tools=()), parse({}).routing)
    assert shortfall(uncovered, snapshot, known, 0.55) == (0.5, "uncovered: no tool for open")


async def test_a_data_set_whose_queries_all_have_a_tool_has_no_gap() -> None:
    assert await gaps_of([MATH, MATH], NO_SANDBOX) == (2, ())


async def test_where_nobody_can_look_for_a_tool_nothing_is_done() -> None:
    _, (gap,) = await gaps_of([CODE], NO_SANDBOX)
    acquired = await acquire(gap, [], RlarConfig())
    assert (acquired.submission, acquired.tried, acquired.why) == (None, (), gap.plan)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A folder with queries of a chat, labelled answers, and a hub with a good model and one that is upside down."""
    pytest.importorskip("transformers", reason="transformers is not installed (verl brings it)")
    from hub_repos import build, pairs_of
    from hub_server import HubServer

    folder = tmp_path_factory.mktemp("build")
    build(folder / "hub", only=("meadow-lab/chat-reward-llama",))
    pairs = pairs_of("chat")
    held_out = pairs[-len(pairs) // 5 :]
    queries = [{"prompt": [{"role": "user", "content": prompt}], "data_source": "chat"} for prompt, _, _ in held_out]
    labelled = [{"prompt": prompt, "chosen": good, "rejected": bad} for prompt, good, bad in held_out]
    for name, rows in (("train", [*queries, MATH]), ("labelled", labelled)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with HubServer(folder / "hub") as server:
        yield folder, server.url


def rlar(folder: Path, url: str, *args: str, code: int) -> list[dict[str, Any]]:
    options = [
        f"hub.endpoint={url}",
        f"hub.cache_dir={folder}/cache",
        "hub.offline=false",
        "serving.threads=1",
        "sandbox.backend=none",
        f"exam.by_kind.open={json.dumps(WIDE)}",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "verl_rlar", "build", *args, *(f"--set={one}" for one in options), "--json"],
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    (rows,) = [one for one in found if one.get("type") == "rows"]
    assert rows["bad"] == 0 < rows["rows"] and rows["gaps"] == sum(one.get("type") == "gap" for one in found)
    return [one for one in found if one.get("type") != "rows"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_gap_is_filled_by_a_model_that_passes_and_is_none_any_more(folder: tuple[Path, str]) -> None:
    place, url = folder
    gaps = rlar(place, url, "train.jsonl", "--in", "run", "--dry-run", code=1)
    assert {(gap["kind"], gap["way"]) for gap in gaps} == {("open", "scout")} and sum(g["share"] for g in gaps) > 0.9
    assert [gap["gain"] for gap in gaps] == sorted((gap["gain"] for gap in gaps), reverse=True)
    count = len(gaps)

    told = rlar(place, url, "train.jsonl", "--in", "run", code=1)[count:]
    assert [one["cluster"] for one in told] == [gap["cluster"] for gap in gaps]
    assert all(one["tool"] is None and "no labelled answers" in one["why"] for one in told)
    assert not list((place / "cache").rglob("*.safetensors")), "nothing is downloaded where no exam can be held"

    told = rlar(place, url, "train.jsonl", "--labelled", "labelled.jsonl", "--in", "run", code=0)[count:]
    acquired, taken = told  # what was found for the first cluster fits the others, too
    assert [one["verdict"] for one in acquired["tried"]] == ["admitted"]
    assert (taken["state"], taken["digest"]) == ("live", acquired["tool"]["digest"])
    *_, kept = rlar(
        place, url, "train.jsonl", "--labelled", "labelled.jsonl", "--in", "kept", "--then", "nothing", code=0
    )
    assert (kept["state"], kept["digest"]) == ("examined", taken["digest"])
    (spec,) = [
        tool for tool in LibraryView(place / "run" / "rlar" / "library").latest().tools if tool.kind == "reward_model"
    ]
    assert spec.digest == taken["digest"] and spec.target.startswith("meadow-lab/chat-reward-llama@")

    assert rlar(place, url, "train.jsonl", "--in", "run", code=0) == [], "no gap is left"
