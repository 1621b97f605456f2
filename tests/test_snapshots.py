# SPDX-License-Identifier: Apache-2.0
"""Where the files of models lie: found without the network, and only while they are what a spec says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hub_repos import bare
from hub_server import HubServer

from verl_rlar.config import HubConfig
from verl_rlar.errors import HubNotFound, ToolUnavailable
from verl_rlar.gate import check
from verl_rlar.hub import Hub
from verl_rlar.snapshots import Snapshots, read_folder
from verl_rlar.types import Kind, Scope, ToolSpec

REPO = "lab/reward"


def spec(target: str) -> ToolSpec:
    return ToolSpec(
        name="reward", kind="reward_model", target=target, scope=Scope(kinds=frozenset({Kind.OPEN})), description=""
    )


def test_what_was_fetched_is_found_and_the_hub_is_not_asked(tmp_path: Path) -> None:
    bare(tmp_path / "repos" / REPO)
    with HubServer(tmp_path / "repos") as server:
        config = HubConfig(endpoint=server.url, offline=False, cache_dir=str(tmp_path / "cache"))
        snapshots = Snapshots(config)
        commit = server.commit(REPO)
        with pytest.raises(ToolUnavailable, match=f"rlar fetch {REPO}@{commit}"):
            snapshots.locate(spec(f"{REPO}@{commit}"))
        with Hub(config) as hub:
            folder = hub.fetch(hub.inspect(REPO))
        asked = len(server.requests)
        assert snapshots.locate(spec(f"{REPO}@{commit}")) == str(folder)
        (folder / "model.safetensors").unlink()
        with pytest.raises(ToolUnavailable, match="not on this node"):
            snapshots.locate(spec(f"{REPO}@{commit}"))
        assert len(server.requests) == asked
    for odd in ("", "@", "lab/reward", f"{REPO}@main", f"../etc@{commit}", f"lab/../../x@{commit}"):
        with pytest.raises(ToolUnavailable):
            snapshots.locate(spec(odd))


def test_a_folder_of_ones_own_is_found_while_its_content_is_the_same(tmp_path: Path) -> None:
    folder = bare(tmp_path / "my model")
    config = HubConfig()
    model = read_folder(folder, config)
    assert model.repo == "local/my-model" and len(model.commit) == 40 and model.tensors
    snapshots = Snapshots(config)
    mine = spec(f"{folder}@{model.commit}")
    assert snapshots.locate(mine) == str(folder)
    (folder / "optimizer.pt").write_bytes(b"not loaded")
    assert snapshots.locate(mine) == str(folder), "what no loader reads does not count"
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-1] + b"\1")
    with pytest.raises(ToolUnavailable, match="is another one than when it was examined"):
        snapshots.locate(mine)
    (folder / "model.safetensors").write_bytes(weights)
    assert snapshots.locate(mine) == str(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ToolUnavailable):
        snapshots.locate(mine)
    with pytest.raises(ToolUnavailable, match="not on this node"):
        snapshots.locate(spec(f"{tmp_path}/nowhere@{model.commit}"))
    with pytest.raises(HubNotFound, match="no folder"):
        read_folder(tmp_path / "nowhere", config)


def test_the_gate_reads_a_folder_as_it_reads_a_repository(tmp_path: Path) -> None:
    bare(tmp_path / "repos" / REPO)
    with HubServer(tmp_path / "repos") as server:
        config = HubConfig(endpoint=server.url, offline=False, cache_dir=str(tmp_path / "cache"))
        with Hub(config) as hub:
            there = check(hub.inspect(REPO), config)
    here = check(read_folder(tmp_path / "repos" / REPO, config), config)
    names = {one.name for one in here.checks if one.ok}
    assert names >= {one.name for one in there.checks} - {"licence"}
    assert (here.architecture, here.scoring, here.parameters) == (there.architecture, there.scoring, there.parameters)
    broken = tmp_path / "repos" / REPO / "config.json"
    broken.write_text(json.dumps(json.loads(broken.read_text()) | {"auto_map": {"AutoModel": "x.Y"}}))
    report = check(read_folder(broken.parent, config), config)
    assert any(reason.startswith("code: auto_map") for reason in report.reasons)
