# SPDX-License-Identifier: Apache-2.0
"""The image of the boxes: built once from what it is made of, found at once; what is missing is told with a way out."""

from __future__ import annotations

import io
import os
import sys
import tarfile
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import make_sandbox_config

from verl_rlar.config import SandboxConfig
from verl_rlar.errors import ToolUnavailable
from verl_rlar.sandbox.engine import connect
from verl_rlar.sandbox.image import LABEL, ensure_image, recipe_of


def test_the_recipe_is_what_the_image_is_made_of() -> None:
    assert recipe_of(SandboxConfig()) == recipe_of(SandboxConfig(memory_mb=128, runtime="runsc"))
    assert recipe_of(SandboxConfig()) != recipe_of(SandboxConfig(base="other:1"))


@pytest.mark.docker
def test_an_image_that_is_there_is_found_at_once(engine: Any, box_image: str) -> None:
    said: list[str] = []
    began = time.monotonic()
    assert ensure_image(engine, make_sandbox_config(), progress=said.append) == box_image
    assert time.monotonic() - began < 30
    assert said == [] and box_image.startswith("sha256:")
    assert engine.images.get(box_image).labels[LABEL] == recipe_of(make_sandbox_config())


@pytest.mark.docker
def test_an_image_that_was_named_is_used_as_it_is(engine: Any, box_image: str) -> None:
    assert ensure_image(engine, make_sandbox_config(image=box_image)) == box_image


@pytest.mark.docker
def test_its_files_are_roots_and_readable_by_all(engine: Any, box_image: str) -> None:
    container = engine.containers.create(box_image)
    try:
        stream, _ = container.get_archive("/opt/rlar")
        with tarfile.open(fileobj=io.BytesIO(b"".join(stream))) as tar:
            entries = {entry.name: entry for entry in tar}
    finally:
        container.remove()
    assert {"rlar/worker.py", "rlar/values.py", "rlar/lib/numpy/__init__.py", "rlar/lib/regex/__init__.py"} <= set(
        entries
    )
    assert any(name.startswith("rlar/lib/sympy/") and name.endswith(".pyc") for name in entries)
    assert {(entry.uid, entry.gid) for entry in entries.values()} == {(0, 0)}
    assert [name for name, entry in entries.items() if entry.mode & 0o022 or not entry.mode & 0o004] == []
    assert not [name for name in entries if name.startswith("rlar/lib/bin/")]


@pytest.fixture
def new_base(engine: Any, box_image: str) -> Iterator[str]:
    """Another name of the base image, so that the image of the boxes is not there for it."""
    name = f"rlar-test/base:{uuid.uuid4().hex[:12]}"
    repository, tag = name.split(":")
    engine.images.get(make_sandbox_config().base).tag(repository, tag)
    yield name
    built = f"verl-rlar-box:{recipe_of(SandboxConfig(base=name))[:12]}"
    for left in (built, name):
        if engine.images.list(left):
            engine.images.remove(left, noprune=True)


@pytest.mark.docker
@pytest.mark.slow
def test_two_that_need_it_build_it_once(new_base: str) -> None:
    found: list[str] = []
    said: list[str] = []

    def need() -> None:
        client = connect(SandboxConfig())
        found.append(ensure_image(client, SandboxConfig(base=new_base), progress=said.append))
        client.close()

    threads = [threading.Thread(target=need) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 and len(set(found)) == 1
    assert len([line for line in said if line.startswith("building ")]) == 1
    assert len([line for line in said if "another process" in line]) == 1


@pytest.mark.docker
def test_libraries_that_cannot_be_fetched_are_told(engine: Any, new_base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", os.devnull)
    with pytest.raises(ToolUnavailable, match=r"libraries of the boxes cannot be fetched(.|\n)*rlar\.sandbox\.image"):
        ensure_image(engine, SandboxConfig(base=new_base))


@pytest.mark.docker
def test_without_pip_and_uv_the_message_says_so(engine: Any, new_base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pip", None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ToolUnavailable, match="has no pip, and there is no uv"):
        ensure_image(engine, SandboxConfig(base=new_base))


@pytest.mark.docker
def test_a_base_that_cannot_be_had_is_told_with_ways_out(engine: Any) -> None:
    with pytest.raises(ToolUnavailable) as caught:
        ensure_image(engine, SandboxConfig(base="registry.invalid/nothing:1"))
    for part in ("registry.invalid/nothing:1 (rlar.sandbox.base)", "docker pull", "docker load", "rlar.sandbox.image"):
        assert part in str(caught.value)


@pytest.mark.docker
def test_an_image_that_cannot_be_had_is_told_with_ways_out(engine: Any) -> None:
    with pytest.raises(ToolUnavailable, match=r"registry\.invalid/nothing \(rlar\.sandbox\.image\) is not on"):
        ensure_image(engine, SandboxConfig(image="registry.invalid/nothing"))


@pytest.mark.docker
def test_a_base_without_python_is_told(engine: Any) -> None:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("empty"))
    name = f"rlar-test/empty:{uuid.uuid4().hex[:12]}"
    engine.api.import_image_from_data(data.getvalue(), *name.split(":"))
    try:
        with pytest.raises(ToolUnavailable, match=r"cannot be built on: its `python3` does not run"):
            ensure_image(engine, SandboxConfig(base=name))
    finally:
        engine.images.remove(name, force=True)
