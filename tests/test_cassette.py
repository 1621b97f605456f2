# SPDX-License-Identifier: Apache-2.0
"""Cassettes: what was recorded comes back, whatever was not is an error that names it, and no secret is in them."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hub_repos import bare, write_card
from hub_server import HubServer, cuts, hangs, says

from verl_rlar.agents.cassette import Cassette, Header, Line, Player, Recorder, Tape
from verl_rlar.config import HubConfig
from verl_rlar.errors import CassetteError, HubCutShort, HubError, HubUnreachable
from verl_rlar.hub import Hub, Search

SECRET = "hf_planted0123456789"
HEADER = Header(
    recorded="2026-07-01T00:00:00+00:00",
    note="a test",
    llm="http://llm/v1",
    model="m",
    hub="http://hub",
    task="chat",
    settings={},
    seed="seed",
    prompts={"scout.md": "1" * 64},
)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[HubServer]:
    place = bare(tmp_path / "hub" / "owner" / "reward-model", downloads=5)
    write_card(place, "A card. " * 500)
    with HubServer(tmp_path / "hub") as server:
        yield server


def recorded(path: Path, server: HubServer, work: Callable[[Hub], Any], **settings: Any) -> Any:
    config = HubConfig(endpoint=server.url, offline=False, max_wait_s=0, **settings)
    with Tape(path, HEADER) as tape:
        carrier = Recorder(tape.add, side="scout", peer="hub", base=server.url, secrets=[SECRET])
        with Hub(config, carrier) as hub:
            return outcome(work, hub)


def replayed(path: Path, server: HubServer, work: Callable[[Hub], Any], **settings: Any) -> Any:
    config = HubConfig(endpoint=server.url, offline=False, max_wait_s=0, **settings)
    player = Player(Cassette.read(path), side="scout", peer="hub", base=server.url)
    with Hub(config, player) as hub:
        return outcome(work, hub)


def outcome(work: Callable[[Hub], Any], hub: Hub) -> Any:
    try:
        return work(hub)
    except HubError as error:
        return type(error), str(error)


def look(hub: Hub) -> Any:
    found = hub.search([Search(words="reward"), Search(tags=("reward-model",))])
    return found, hub.inspect("owner/reward-model")


def test_what_was_recorded_comes_back_without_the_network(server: HubServer, tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    first = recorded(path, server, look)
    asked = len(server.requests)
    assert replayed(path, server, look) == first and first[1].card.count("A card.") == 500
    assert len(server.requests) == asked
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    bodies = [line["id"] for line in lines if line["kind"] == "body"]
    assert len(bodies) == len(set(bodies)) and path.stat().st_size < 20_000


def test_pages_of_a_search_come_back(server: HubServer, tmp_path: Path) -> None:
    for number in range(5):
        bare(server.folder / f"owner/reward-{number}")
    server.refresh()
    server.page_size = 2
    path = tmp_path / "c.jsonl"
    first = recorded(path, server, lambda hub: hub.search([Search(words="reward")]))
    assert len(first.models) == 6 and replayed(path, server, lambda hub: hub.search([Search(words="reward")])) == first


def test_faults_come_back_as_they_were(server: HubServer, tmp_path: Path) -> None:
    over = threading.Event()
    for number, (fault, kind, timeout_s) in enumerate(
        [
            (says(404), HubError, 20),
            (says(500), HubUnreachable, 20),
            (cuts(), HubCutShort, 20),
            (hangs(over), HubUnreachable, 1),
        ]
    ):
        path = tmp_path / f"{number}.jsonl"
        server.faults = [("api/models/owner", fault, 9)]
        first = recorded(path, server, look, retries=1, timeout_s=timeout_s)
        assert issubclass(first[0], kind)
        assert replayed(path, server, look, retries=1, timeout_s=timeout_s) == first
    over.set()
    assert "within 1 s" in first[1]


def test_a_busy_hub_is_busy_once_on_replay_too(server: HubServer, tmp_path: Path) -> None:
    server.faults = [("api/models/owner", says(503), 1)]
    path = tmp_path / "c.jsonl"
    first = recorded(path, server, look)
    assert replayed(path, server, look) == first
    statuses = [line.get("status") for line in map(json.loads, path.read_text().splitlines())]
    assert statuses.count(503) == 1


def test_no_more_of_a_weight_file_is_kept_than_was_read(server: HubServer, tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    recorded(path, server, look)
    header = 8 + int.from_bytes((server.folder / "owner/reward-model/model.safetensors").read_bytes()[:8], "little")
    cassette = Cassette.read(path)
    sizes = [
        len(cassette.bodies[e["body"]]) for e in cassette.exchanges if e["ask"]["path"].endswith("model.safetensors")
    ]
    assert sum(sizes) == header


def test_a_request_that_was_not_recorded_is_named(server: HubServer, tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    recorded(path, server, look)
    with pytest.raises(CassetteError, match=r"GET /api/models\?search=other.*is not in .*c\.jsonl"):
        replayed(path, server, lambda hub: hub.search([Search(words="other")]))


def test_the_token_is_not_in_it_even_if_the_hub_says_it(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    card = server.folder / "owner/reward-model/README.md"
    card.write_text(card.read_text() + f"\nYour token is {SECRET}\n")
    server.refresh()
    path = tmp_path / "c.jsonl"
    first = recorded(path, server, look)
    assert SECRET in first[1].card
    assert any(SECRET in request.headers.get("authorization", "") for request in server.requests)
    cassette = Cassette.read(path)
    assert not any(SECRET.encode() in body for body in cassette.bodies.values())
    assert SECRET not in path.read_text() and "authorization" not in path.read_text().lower()


def test_an_address_elsewhere_loses_its_signature(tmp_path: Path) -> None:
    lines: list[Line] = []

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.host == "cdn":
            return httpx.Response(200, content=b"weights")
        return httpx.Response(302, headers={"location": "http://cdn/file?X-Signature=planted"})

    recorder = Recorder(lines.append, side="scout", peer="hub", base="http://hub", inner=httpx.MockTransport(answer))
    with httpx.Client(transport=recorder, follow_redirects=True) as client:
        assert client.get("http://hub/file").content == b"weights"
    assert "planted" not in str(lines) and sum(line["kind"] == "exchange" for line in lines) == 2
    path = tmp_path / "c.jsonl"
    with Tape(path, HEADER) as tape:
        for line in lines:
            tape.add(line)
    player = Player(Cassette.read(path), side="scout", peer="hub", base="http://hub")
    with httpx.Client(transport=player, follow_redirects=True) as client:
        assert client.get("http://hub/file").content == b"weights"


# conversations


def talk(transport: httpx.BaseTransport, *conversations: list[str], model: str = "m") -> list[str]:
    answers = []
    with httpx.Client(transport=transport) as client:
        for said in conversations:
            messages = [{"role": "user", "content": text} for text in said]
            body = {"model": model, "messages": messages}
            answers.append(client.post("http://llm/v1/chat/completions", json=body).text)
    return answers


@pytest.fixture
def conversation(tmp_path: Path) -> Path:
    path = tmp_path / "talk.jsonl"
    with Tape(path, HEADER) as tape:
        inner = httpx.MockTransport(
            lambda request: httpx.Response(200, text=f"answer {len(json.loads(request.content)['messages'])}")
        )
        recorder = Recorder(tape.add, side="agent", peer="llm", base="http://llm/v1", inner=inner)
        talk(recorder, ["one"], ["one", "two"])
    return path


def player_of(path: Path) -> Player:
    return Player(Cassette.read(path), side="agent", peer="llm", base="http://llm/v1")


def test_a_conversation_comes_back_in_its_order(conversation: Path) -> None:
    assert talk(player_of(conversation), ["one"], ["one", "two"]) == ["answer 1", "answer 2"]


@pytest.mark.parametrize(
    ("said", "model", "reason"),
    [
        ([["one"], ["one", "twx"]], "m", r"request 2 to the llm.*message 2 differs at character \d+.*twx.*two"),
        ([["one"], ["two"]], "m", "1 messages instead of 2"),
        ([["one"]], "other", "settings or tools differ"),
        ([["one"], ["one", "two"], ["three"]], "m", "request 3 to the LLM is not in"),
    ],
)
def test_one_letter_that_differs_is_named(conversation: Path, said: list[list[str]], model: str, reason: str) -> None:
    with pytest.raises(CassetteError, match=reason):
        talk(player_of(conversation), *said, model=model)


def test_the_sides_do_not_answer_for_each_other(conversation: Path) -> None:
    with pytest.raises(CassetteError, match="which holds 0 to the llm"):
        talk(Player(Cassette.read(conversation), side="scout", peer="llm", base="http://llm/v1"), ["one"])


# files


def test_a_changed_prompt_is_named(conversation: Path) -> None:
    cassette = Cassette.read(conversation)
    cassette.check({"scout.md": "1" * 64, "new.md": "2" * 64})
    for prompts in ({}, {"scout.md": "2" * 64}):
        with pytest.raises(CassetteError, match=r"scout\.md: not the prompt that .*talk\.jsonl was recorded with"):
            cassette.check(prompts)


def test_half_a_cassette_is_none(tmp_path: Path, conversation: Path) -> None:
    with pytest.raises(RuntimeError), Tape(tmp_path / "half.jsonl", HEADER):
        raise RuntimeError
    assert not list(tmp_path.glob("half*"))
    lines = conversation.read_text().splitlines(keepends=True)
    for content, reason in [
        ("".join(lines[:-1]), "not recorded to its end"),
        ("".join(lines).replace("answer 1", "answer 9"), "was changed"),
        ("".join(lines[1:]), "no cassette"),
        ("hello", "no cassette"),
        ("", "no cassette"),
    ]:
        conversation.write_text(content)
        with pytest.raises(CassetteError, match=reason):
            Cassette.read(conversation)
    with pytest.raises(CassetteError, match="cannot be read"):
        Cassette.read(tmp_path / "none.jsonl")
    with pytest.raises(CassetteError, match="cannot be written"):
        Tape(conversation / "c.jsonl", HEADER)
