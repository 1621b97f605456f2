# SPDX-License-Identifier: Apache-2.0
"""Folders of servers: those that a killed process left are removed, by the next one that makes some; no other is."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from verl_rlar.serving.homes import LOCK, PREFIX, Home

MAKES = (
    "import subprocess, sys\n"
    "from verl_rlar.serving.homes import Home\n"
    "home = Home.make()\n"
    "open(home.path + '/log', 'w').close()\n"
    "if sys.argv[1:]: subprocess.Popen(['sleep', '100'], pass_fds=[home.lock], stdin=0, stdout=2)\n"
    "print(home.path, flush=True); sys.stdin.read()\n"
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The temporary directory of these tests, here and in the processes that they start."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield tmp_path
    tempfile.tempdir = None


def maker(*args: str) -> tuple[subprocess.Popen[str], Path]:
    """A process that holds a folder until its input ends."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", MAKES, *args], text=True, start_new_session=True, **pipes)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_what_a_killed_process_left_is_removed_at_the_next_start_and_what_is_in_use_stays() -> None:
    killed, left = maker()
    alive, used = maker()
    assert left.is_dir() and used.is_dir()
    end(killed)
    assert left.is_dir()
    home = Home.make()
    assert not left.exists() and (used / "log").exists() and Path(home.path).is_dir()
    home.remove()
    assert not Path(home.path).exists()
    end(alive)
    Home.make().remove()
    assert not used.exists()


def test_a_server_that_outlives_its_maker_keeps_its_folder() -> None:
    process, place = maker("with a server")
    end(process)
    Home.make().remove()
    assert place.is_dir()
    os.killpg(process.pid, 9)  # the server: its group is that of its maker
    for _ in range(600):
        Home.make().remove()
        if not place.exists():
            return
        threading.Event().wait(0.05)
    pytest.fail("it was never removed")


def test_what_is_not_a_home_of_ours_is_let_alone(folder: Path) -> None:
    other, target = folder / f"{PREFIX}being-made", folder / "elsewhere"
    other.mkdir()
    target.mkdir()
    (target / LOCK).touch()
    (folder / f"{PREFIX}link").symlink_to(target)
    (folder / f"{PREFIX}file").touch()
    (folder / "another").mkdir()
    (folder / "another" / LOCK).touch()
    before = sorted(folder.rglob("*"))
    Home.make().remove()
    assert sorted(folder.rglob("*")) == before


def test_many_that_start_at_once_take_nothing_from_each_other(folder: Path) -> None:
    lost: list[str] = []

    def work() -> None:
        for _ in range(40):
            home = Home.make()
            if not Path(home.path, LOCK).exists():
                lost.append(home.path)
            home.remove()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not lost and not list(folder.glob(f"{PREFIX}*"))
