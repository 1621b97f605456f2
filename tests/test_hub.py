# SPDX-License-Identifier: Apache-2.0
"""The hub's client against a real HTTP server: what it reads and keeps, and that each fault is an error of its own."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hub_repos import bare, change_config, write_tensors
from hub_server import HubServer, cuts, drips, hangs, lies, says
from huggingface_hub import scan_cache_dir, snapshot_download
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_rlar.config import HubConfig
from verl_rlar.errors import (
    ConfigError,
    HubCutShort,
    HubError,
    HubGated,
    HubMismatch,
    HubNotFound,
    HubRateLimited,
    HubUnreachable,
)
from verl_rlar.hub import Hub, Search
from verl_rlar.repository import HubFile, facts_of, files_of, parse_header

GOOD, OTHER = "lab/reward-a", "lab/reward-b"
WEIGHTS = r"model\.safetensors$"

MakeHub = Callable[..., Hub]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    bare(tmp_path / "repos" / GOOD, downloads=10)
    bare(tmp_path / "repos" / OTHER, downloads=20)
    return tmp_path / "repos"


@pytest.fixture
def server(folder: Path) -> Iterator[HubServer]:
    with HubServer(folder) as server:
        yield server


@pytest.fixture
def make_hub(server: HubServer, tmp_path: Path) -> Iterator[MakeHub]:
    hubs: list[Hub] = []

    def make(**settings: Any) -> Hub:
        base = {"endpoint": server.url, "offline": False, "cache_dir": str(tmp_path / "cache"), "max_wait_s": 0}
        hubs.append(Hub(HubConfig(**(base | settings))))
        return hubs[-1]

    yield make
    for hub in hubs:
        hub.close()


@pytest.fixture
def hub(make_hub: MakeHub) -> Hub:
    return make_hub()


@pytest.fixture
def stop() -> Iterator[threading.Event]:
    """Ends what hangs."""
    event = threading.Event()
    yield event
    event.set()


def test_the_hubs_own_client_takes_the_stand_in_for_the_hub(server: HubServer, tmp_path: Path) -> None:
    script = f"""
import json
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
api = HfApi()
models = list(api.list_models(filter=["reward-model", "license:apache-2.0"], search="reward", sort="downloads"))
info = api.model_info("{GOOD}", files_metadata=True)
tree = {{entry.path: entry.size for entry in api.list_repo_tree("{GOOD}", recursive=True)}}
header = api.get_safetensors_metadata("{GOOD}")
place = snapshot_download("{GOOD}", revision=info.sha, allow_patterns=["*.json", "*.safetensors"])
errors = []
for ask in (lambda: api.model_info("lab/none"), lambda: api.model_info("{GOOD}", revision="none")):
    try:
        ask()
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        errors.append(type(error).__name__)
lfs = next(file.lfs.sha256 for file in info.siblings if file.lfs)
print(json.dumps([[m.id for m in models], info.sha, tree, sum(header.parameter_count.values()), place, errors, lfs]))
"""
    server.page_size = 1
    environment = os.environ | {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    models, sha, tree, parameters, place, errors, lfs = json.loads(done.stdout)
    assert models == [OTHER, GOOD] and sha == server.commit(GOOD)
    assert tree["model.safetensors"] == (Path(place) / "model.safetensors").stat().st_size and parameters == 8_736
    assert hashlib.sha256((Path(place) / "model.safetensors").read_bytes()).hexdigest() == lfs
    assert errors == ["RepositoryNotFoundError", "RevisionNotFoundError"]


# search


def test_several_searches_are_united_each_model_once_and_in_order(hub: Hub) -> None:
    found = hub.search([Search(words="reward-a"), Search(words="reward"), Search(tags=("reward-model", "chat"))])
    assert [facts.repo for facts in found.models] == [GOOD, OTHER]
    assert found.models[1].downloads == 20 and found.models[1].licence == "apache-2.0"
    assert found.models[1].tags[:2] == ("transformers", "safetensors") and found.models[1].languages == ("en",)


def test_a_search_follows_pages_up_to_its_limit(hub: Hub, make_hub: MakeHub, server: HubServer, folder: Path) -> None:
    for number in range(7):
        bare(folder / f"many/reward-{number}")
    server.refresh()
    server.page_size = 3
    assert len(hub.search([Search(words="reward")]).models) == 9
    assert len(server.asked("api/models$")) == 3
    assert len(make_hub(results=4).search([Search(words="reward")]).models) == 4


def test_the_next_page_is_not_fetched_from_elsewhere(hub: Hub, server: HubServer) -> None:
    server.faults = [("api/models", says(200, b"[]", Link='<http://127.0.0.1:1/steal>; rel="next"'), 1)]
    assert hub.search([Search(words="reward")]).models == ()
    assert len(server.requests) == 1


def test_a_search_that_fails_does_not_stop_the_others_but_all_of_them_do(make_hub: MakeHub, server: HubServer) -> None:
    hub = make_hub(retries=0)
    server.faults = [("api/models", says(500), 1)]
    found = hub.search([Search(words="reward"), Search(words="reward-b")])
    assert [facts.repo for facts in found.models] == [OTHER]
    assert len(found.faults) == 1 and "HTTP 500" in found.faults[0]
    server.faults = [("api/models", says(500), 2)]
    with pytest.raises(HubUnreachable, match="HTTP 500"):
        hub.search([Search(words="reward"), Search(words="reward-b")])


# look


def test_a_model_is_read_at_one_commit_and_of_its_weights_only_the_header(hub: Hub, server: HubServer) -> None:
    model = hub.inspect(GOOD)
    assert model.commit == server.commit(GOOD) and not model.faults and not model.closed
    assert model.config and model.config["model_type"] == "llama"
    assert model.card.startswith("---\nlicense: apache-2.0") and model.licence_text.startswith("Apache")
    assert model.tensors and model.tensors["score.weight"].shape == (1, 16)
    weights = server.asked(WEIGHTS)
    header = int(weights[1].headers["range"].split("-")[1]) + 1
    assert [request.headers["range"] for request in weights] == ["bytes=0-7", f"bytes=8-{header - 1}"]
    assert server.sent(WEIGHTS) == header < model.weight_bytes
    assert all(f"/resolve/{model.commit}/" in request.path for request in server.asked("resolve"))


def test_an_older_commit_can_be_asked_for_and_a_branch_becomes_a_commit(
    hub: Hub, server: HubServer, folder: Path
) -> None:
    before = server.commit(GOOD)
    change_config(folder / GOOD, problem_type="regression")
    server.refresh()
    old, new = hub.inspect(GOOD, before), hub.inspect(GOOD, "main")
    assert old.config and "problem_type" not in old.config
    assert new.config == {**old.config, "problem_type": "regression"}
    assert new.commit == hub.inspect(GOOD).commit == server.commit(GOOD) != before


def test_what_is_wrong_with_a_file_is_a_fault_of_the_model(hub: Hub, server: HubServer, folder: Path) -> None:
    (folder / GOOD / "config.json").write_text("[" * 100_000)
    (folder / GOOD / "tokenizer_config.json").write_bytes(b"\xff\xfe")
    (folder / GOOD / "README.md").write_text("x" * 200_000)
    (folder / GOOD / "model.safetensors").write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    server.refresh()
    model = hub.inspect(GOOD)
    assert model.config is None and model.tokenizer_config is None and model.tensors is None
    assert set(model.faults or ()) == {"config.json", "tokenizer_config.json", "model.safetensors"}
    assert len(model.card) == 65_536


def test_weights_in_several_files_are_those_of_the_index(hub: Hub, server: HubServer, folder: Path) -> None:
    place = folder / GOOD
    (place / "model.safetensors").unlink()
    write_tensors(place / "model-1.safetensors", {"a": (2, 2)})
    write_tensors(place / "model-2.safetensors", {"b": (3,)})
    write_tensors(place / "optimizer.safetensors", {"c": (3,)})
    index = place / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}')
    server.refresh()
    model = hub.inspect(GOOD)
    assert [file.path for file in model.weights] == ["model-1.safetensors", "model-2.safetensors"]
    assert set(model.tensors or ()) == {"a", "b"}
    names = {path.name for path in hub.fetch(model).iterdir()}
    assert {"model-1.safetensors", "model-2.safetensors", index.name} < names and "optimizer.safetensors" not in names
    index.write_text('{"weight_map": {"a": "../../secret.safetensors"}}')
    server.refresh()
    assert hub.inspect(GOOD).weights == ()


# errors


@pytest.mark.parametrize(
    ("repo", "revision", "error", "says_what"),
    [
        ("lab/gone", None, HubNotFound, "lab/gone is not on"),
        (GOOD, "0" * 40, HubNotFound, "at 0000000"),
        ("no name", None, HubError, "OWNER/NAME"),
        ("lab/../../x", None, HubError, "OWNER/NAME"),
    ],
)
def test_what_is_not_there_is_said(
    hub: Hub, repo: str, revision: str | None, error: type[HubError], says_what: str
) -> None:
    with pytest.raises(error, match=says_what):
        hub.inspect(repo, revision)


def test_a_gated_model_is_known_as_such_and_opens_with_the_token(
    make_hub: MakeHub, server: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare(folder / "lab/gated", gated="manual")
    server.refresh()
    monkeypatch.delenv("MY_HUB_TOKEN", raising=False)
    closed = make_hub(token_env="MY_HUB_TOKEN").inspect("lab/gated")
    assert closed.facts.gated and closed.config is None and "MY_HUB_TOKEN" in closed.closed
    monkeypatch.setenv("MY_HUB_TOKEN", "hf_right")
    server.tokens = {"hf_right"}
    opened = make_hub(token_env="MY_HUB_TOKEN").inspect("lab/gated")
    assert opened.config and not opened.closed
    server.tokens = {"hf_other"}
    with pytest.raises(HubGated, match="gated"):
        make_hub(token_env="MY_HUB_TOKEN").fetch(opened)


def test_a_disabled_repository_is_not_there_any_more(hub: Hub, server: HubServer, folder: Path) -> None:
    bare(folder / "lab/disabled", disabled=True)
    server.refresh()
    with pytest.raises(HubNotFound, match="disabled"):
        hub.inspect("lab/disabled")


def test_a_wrong_token_is_said_with_the_name_of_its_variable(hub: Hub, server: HubServer) -> None:
    server.faults = [("api/models/", says(401, b"{}", X_Error_Message="Invalid credentials"), 1)]
    with pytest.raises(HubGated, match=r"401.*Invalid credentials.*HF_TOKEN"):
        hub.inspect(GOOD)


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_hub_that_is_busy_is_asked_again(hub: Hub, server: HubServer, status: int) -> None:
    server.faults = [("api/models/", says(status, Retry_After="0"), 2)]
    assert hub.inspect(GOOD).repo == GOOD
    assert len(server.asked("api/models/")) == 3


def test_the_number_of_times_has_an_end(make_hub: MakeHub, server: HubServer) -> None:
    server.faults = [("api/models/", says(429, Retry_After="0"), 100)]
    with pytest.raises(HubRateLimited, match=r"429.*HF_TOKEN") as caught:
        make_hub(retries=2).inspect(GOOD)
    assert len(server.requests) == 3 and caught.value.retry_after_s == 0
    server.faults = [("api/models/", says(503), 100)]
    with pytest.raises(HubUnreachable, match="503"):
        make_hub(retries=2).inspect(GOOD)
    assert len(server.requests) == 6


@pytest.mark.parametrize("headers", [{"Retry_After": "86400"}, {"RateLimit": '"api";r=0;t=86400'}])
def test_a_pause_that_is_too_long_is_not_waited_for(hub: Hub, server: HubServer, headers: dict[str, str]) -> None:
    server.faults = [("api/models/", says(429, **headers), 1)]
    with pytest.raises(HubRateLimited, match="86400") as caught:
        hub.inspect(GOOD)
    assert len(server.requests) == 1
    copy = pickle.loads(pickle.dumps(caught.value))
    assert copy.retry_after_s == 86400 and str(copy) == str(caught.value)


def test_other_faults_are_not_tried_again(hub: Hub, server: HubServer) -> None:
    server.faults = [("api/models/", says(418), 1)]
    with pytest.raises(HubMismatch, match="418"):
        hub.inspect(GOOD)
    assert len(server.requests) == 1


def test_no_connection_is_said(make_hub: MakeHub) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        with pytest.raises(HubUnreachable, match="cannot be reached"):
            make_hub(endpoint=f"http://127.0.0.1:{taken.getsockname()[1]}").inspect(GOOD)


def test_a_hub_that_does_not_answer_or_never_ends_costs_its_deadline(
    make_hub: MakeHub, server: HubServer, stop: threading.Event
) -> None:
    hub = make_hub(timeout_s=0.3)
    server.faults = [("api/models/", hangs(stop), 1)]
    began = time.monotonic()
    with pytest.raises(HubUnreachable, match=r"0\.3 s"):
        hub.inspect(GOOD)
    hub = make_hub(timeout_s=2.0)  # the longest silence, too
    server.faults = [("api/models/", drips(stop), 1)]
    with pytest.raises(HubCutShort, match="deadline"):
        hub.inspect(GOOD)
    assert time.monotonic() - began < 60


@pytest.mark.parametrize(
    "body",
    [
        b"<html>a proxy's page</html>",
        b"[]",
        b"{}",
        b"null",
        b'{"id": "lab/reward-a"}',
        b'{"id": "lab/another", "sha": "' + b"1" * 40 + b'"}',
        b"[" * 50_000,
    ],
)
def test_what_is_no_answer_of_a_hub_is_said(hub: Hub, server: HubServer, body: bytes) -> None:
    server.faults = [("api/models/", says(200, body), 1)]
    with pytest.raises(HubMismatch):
        hub.inspect(GOOD)


def test_another_commit_than_the_one_that_was_asked_for_is_an_error(hub: Hub, server: HubServer) -> None:
    commit = server.commit(GOOD)
    other = f'{{"id": "{GOOD}", "sha": "{"1" * 40}"}}'.encode()
    server.faults = [("api/models/", says(200, other), 1)]
    with pytest.raises(HubMismatch, match="commit 1111"):
        hub.inspect(GOOD, commit)
    server.faults = [(WEIGHTS, says(200, bytes(8), X_Repo_Commit="2" * 40), 1)]
    with pytest.raises(HubMismatch, match="commit 2222"):
        hub.inspect(GOOD, commit)


def test_the_endpoint_may_come_from_the_environment(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    with Hub(HubConfig(offline=False)) as hub:
        assert hub.inspect(GOOD).commit == server.commit(GOOD)


def test_an_endpoint_must_be_an_address() -> None:
    with pytest.raises(ConfigError, match=r"rlar\.hub\.endpoint"):
        Hub(HubConfig(endpoint="huggingface.co"))


@pytest.mark.parametrize(
    "item",
    [
        None,
        [],
        {"id": 3},
        {"id": "../x"},
        {"id": "a/b", "tags": {"x": 1}, "cardData": [1], "safetensors": 3, "downloads": -1, "sha": 4, "gated": "yes"},
        {"id": "a/b", "siblings": 7},
        {"id": "a/b", "siblings": [1, {"rfilename": None}, {"rfilename": "x", "size": "big", "lfs": 2}]},
    ],
)
def test_broken_entries_do_no_harm(item: Any) -> None:
    facts = facts_of(item)
    assert facts is None or (facts.downloads == 0 and facts.commit == "")
    if isinstance(item, dict):
        assert all(file.size == 0 for file in files_of(item))


# download


def test_only_what_a_loader_needs_is_downloaded(hub: Hub, server: HubServer, folder: Path) -> None:
    for name in ("modeling_x.py", "pytorch_model.bin", "training_args.bin", "adapter_config.json", "runs.json"):
        (folder / GOOD / name).write_text("{}")
    (folder / GOOD / "onnx").mkdir()
    (folder / GOOD / "onnx" / "model.safetensors").write_text("x")
    server.refresh()
    place = hub.fetch(hub.inspect(GOOD))
    assert sorted(path.name for path in place.iterdir()) == [
        "LICENSE",
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for name in ("config.json", "model.safetensors"):
        assert (place / name).read_bytes() == (folder / GOOD / name).read_bytes()
    assert not server.asked(r"\.py$|\.bin$|adapter|runs|onnx")


def test_what_is_cached_is_not_asked_for_again_and_serves_offline(
    hub: Hub, make_hub: MakeHub, server: HubServer
) -> None:
    model = hub.inspect(GOOD)
    assert hub.local(GOOD, model.commit) is None
    place = hub.fetch(model)
    before = len(server.requests)
    assert hub.fetch(model) == place and make_hub().fetch(model) == place
    offline = make_hub(offline=True, endpoint="http://127.0.0.1:1")
    assert offline.fetch(model) == place and offline.local(GOOD, model.commit) == place
    assert len(server.requests) == before
    for ask in (lambda: offline.inspect(GOOD), lambda: offline.search([Search(words="reward")])):
        with pytest.raises(HubUnreachable, match="offline"):
            ask()
    with pytest.raises(HubUnreachable, match="offline"):
        offline.fetch(hub.inspect(OTHER))


def test_the_cache_is_the_hubs_own(hub: Hub, tmp_path: Path) -> None:
    model = hub.inspect(GOOD)
    place = hub.fetch(model)
    settings: dict[str, Any] = {"revision": model.commit, "cache_dir": tmp_path / "cache", "local_files_only": True}
    assert snapshot_download(GOOD, **settings) == str(place)
    scanned = scan_cache_dir(tmp_path / "cache")
    assert not scanned.warnings and [repo.repo_id for repo in scanned.repos] == [GOOD]


def test_two_models_with_the_same_weights_are_both_there(hub: Hub) -> None:
    first, second = hub.fetch(hub.inspect(GOOD)), hub.fetch(hub.inspect(OTHER))
    assert (
        first != second
        and (first / "model.safetensors").stat().st_size == (second / "model.safetensors").stat().st_size
    )


def test_a_download_that_ended_early_goes_on_where_it_stopped(hub: Hub, server: HubServer) -> None:
    model = hub.inspect(GOOD)
    server.requests.clear()
    server.faults = [(WEIGHTS, cuts(0.4), 1)]
    with pytest.raises(HubCutShort, match=r"model\.safetensors of lab/reward-a: the connection ended"):
        hub.fetch(model)
    assert hub.local(GOOD, model.commit) is None
    place = hub.fetch(model)
    assert (place / "model.safetensors").stat().st_size == model.weight_bytes == server.sent(WEIGHTS)
    assert server.asked(WEIGHTS)[-1].headers["range"] == f"bytes={int(model.weight_bytes * 0.4)}-"


def test_a_server_that_ignores_where_to_go_on_sends_all_again(hub: Hub, server: HubServer, folder: Path) -> None:
    model, content = hub.inspect(GOOD), (folder / GOOD / "model.safetensors").read_bytes()
    server.faults = [(WEIGHTS, cuts(0.4), 1), (WEIGHTS, lies(content), 1)]
    with pytest.raises(HubCutShort):
        hub.fetch(model)
    assert (hub.fetch(model) / "model.safetensors").read_bytes() == content


@pytest.mark.parametrize("wrong", ["shorter", "longer", "other", "announced"])
def test_a_file_that_is_not_what_was_listed_is_not_kept(hub: Hub, server: HubServer, folder: Path, wrong: str) -> None:
    model, content = hub.inspect(GOOD), (folder / GOOD / "model.safetensors").read_bytes()
    fault = {
        "shorter": lies(content[:-5]),
        "longer": lies(content + b"x"),
        "other": lies(content[:-1] + b"x"),
        "announced": says(200, content, X_Linked_Size="7"),
    }[wrong]
    server.faults = [(WEIGHTS, fault, 1)]
    with pytest.raises(HubMismatch, match=r"model\.safetensors of lab/reward-a"):
        hub.fetch(model)
    assert hub.local(GOOD, model.commit) is None
    blobs = list(hub.cache.glob("models--lab--reward-a/blobs/*"))
    assert all(blob.stat().st_size == 0 for blob in blobs if blob.name.startswith(model.weights[0].sha256))
    assert (hub.fetch(model) / "model.safetensors").read_bytes() == content


def test_a_small_file_is_checked_by_gits_hash(hub: Hub, server: HubServer, folder: Path) -> None:
    model = hub.inspect(GOOD)
    server.faults = [(r"tokenizer\.json$", lies(b"[]"), 1)]
    with pytest.raises(HubMismatch, match=r"tokenizer\.json"):
        hub.fetch(model)


def test_a_download_has_a_deadline(make_hub: MakeHub, server: HubServer, stop: threading.Event) -> None:
    hub = make_hub(download_timeout_s=0.3)
    model = hub.inspect(GOOD)
    server.faults = [(WEIGHTS, drips(stop), 1)]
    with pytest.raises(HubCutShort, match="deadline"):
        hub.fetch(model)


def test_a_large_file_from_another_host_comes_without_the_token(
    make_hub: MakeHub, server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.redirect = True
    hub = make_hub()
    place = hub.fetch(hub.inspect(GOOD))
    assert (place / "model.safetensors").exists()
    assert all(request.headers["authorization"] == "Bearer hf_secret" for request in server.asked("resolve|api"))
    elsewhere = server.asked("/cdn/")
    assert elsewhere and not any("authorization" in request.headers for request in elsewhere)


def test_without_a_token_none_is_sent(hub: Hub, server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.inspect(GOOD)
    assert not any("authorization" in request.headers for request in server.requests)


def test_names_that_lead_out_of_the_folder_are_not_written(hub: Hub, tmp_path: Path) -> None:
    model = hub.inspect(GOOD)
    for path in ("../../../../escape", "/tmp/escape", "a\\b", "a/../b", "a\x1b[0m"):
        weights = (replace(model.weights[0], path=path),)
        with pytest.raises(HubMismatch, match="no plain name"):
            hub.fetch(replace(model, weights=weights))
    assert not list(tmp_path.rglob("*escape*"))


def test_a_model_without_safetensors_or_without_room_is_not_downloaded(hub: Hub, server: HubServer) -> None:
    model = hub.inspect(GOOD)
    before = len(server.requests)
    with pytest.raises(HubError, match="no weights in safetensors"):
        hub.fetch(replace(model, weights=()))
    with pytest.raises(HubError, match="GiB are free"):
        hub.fetch(replace(model, weights=(HubFile(path="model.safetensors", size=1 << 60, sha256="0" * 64),)))
    for facts in (replace(model.facts, repo="../../x"), replace(model.facts, commit="../x")):
        with pytest.raises(HubError, match="no repository at a commit"):
            hub.fetch(replace(model, facts=facts))
        assert hub.local(facts.repo, facts.commit) is None
    with pytest.raises(HubMismatch, match="no hash"):
        hub.fetch(replace(model, weights=(HubFile(path="model.safetensors", size=5),)))
    assert not server.asked(WEIGHTS)[before:]


def test_many_who_want_the_same_model_cause_one_download(make_hub: MakeHub, server: HubServer) -> None:
    hubs = [make_hub() for _ in range(4)]
    model = hubs[0].inspect(GOOD)
    server.requests.clear()
    with ThreadPoolExecutor(4) as pool:
        places = set(pool.map(lambda hub: hub.fetch(model), hubs))
    assert len(places) == 1 and len(server.asked(WEIGHTS)) == 1


def test_progress_ends_with_all_bytes(hub: Hub) -> None:
    model = hub.inspect(GOOD)
    seen: list[tuple[str, int, int | None]] = []
    hub.fetch(model, lambda *state: seen.append(state))
    total = sum(file.size for file in model.wanted)
    assert seen[-1] == (GOOD, total, total)


# headers of safetensors files


@settings(deadline=None)
@given(st.binary(max_size=200), st.integers(0, 300))
def test_a_header_of_any_bytes_is_read_or_refused(header: bytes, size: int) -> None:
    try:
        tensors = parse_header(header, size)
    except ValueError:
        return
    assert sum(tensor.elements for tensor in tensors.values()) <= size


entries = st.dictionaries(
    st.text(max_size=3),
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "I8", "X", None]),
            "shape": st.lists(st.integers(-1, 3), max_size=3) | st.none(),
            "data_offsets": st.lists(st.integers(-1, 40), min_size=0, max_size=3),
        }
    ),
    max_size=3,
)


@settings(deadline=None)
@given(entries, st.integers(0, 100))
def test_a_header_of_any_entries_is_read_or_refused(content: dict[str, Any], size: int) -> None:
    try:
        tensors = parse_header(json.dumps(content).encode(), size)
    except ValueError:
        return
    assert sum(tensor.elements * (4 if tensor.dtype == "F32" else 1) for tensor in tensors.values()) == size
