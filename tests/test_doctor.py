# SPDX-License-Identifier: Apache-2.0
"""`rlar doctor`: what it finds, on a real engine and without one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import make_sandbox_config
from typer.testing import CliRunner

from verl_rlar.cli import app
from verl_rlar.config import SandboxConfig
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
    result = CliRunner().invoke(app, ["doctor", "--json", *settings])
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
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert result.stdout.startswith("FAIL") and "there is no such socket" in result.stdout
    assert "dockerd-rootless-setuptool.sh install" in result.stdout
    assert "1 FAIL" in result.stderr


def test_without_a_back_end_there_is_a_warning_alone() -> None:
    result = CliRunner().invoke(app, ["doctor", "--set", "sandbox.backend=none"])
    assert (result.exit_code, result.stdout.split()[:2]) == (0, ["warning", "backend"])


def test_a_setting_that_is_wrong_is_a_wrong_command() -> None:
    result = CliRunner().invoke(app, ["doctor", "--set", "sandbox.backend=sandbox_fusion"])
    assert result.exit_code == 2 and "rlar.sandbox.fusion_url" in result.stderr
    assert CliRunner().invoke(app, ["doctor", "--set", "sandbox.bakend=none"]).exit_code == 2


def test_a_server_that_does_not_answer_is_a_failure() -> None:
    settings = ["--set", "sandbox.backend=sandbox_fusion", "--set", "sandbox.fusion_url=http://127.0.0.1:1"]
    result = CliRunner().invoke(app, ["doctor", *settings])
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
