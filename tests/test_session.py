# SPDX-License-Identifier: Apache-2.0
"""An agent's process: it ends in time, knows no secret that is not its own, and leaves a transcript."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from verl_rlar.agents.session import Ended, run
from verl_rlar.errors import AgentError, HubUnreachable

KEY = "sk-planted-0123456789"


def work(name: str, folder: Path, wall_s: float = 60, **order: Any) -> tuple[Ended, list[dict[str, Any]]]:
    events: list[dict[str, Any]] = []
    ended = run(
        f"agents_at_work:{name}",
        order,
        folder=folder,
        name="test",
        wall_s=wall_s,
        secrets=["PLANTED_KEY"],
        on_event=events.append,
    )
    return ended, events


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def gone(pid: int) -> bool:
    """Whether a process has ended, or does within a while."""
    for _ in range(200):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


def test_what_it_tells_comes_in_order_and_stands_in_the_transcript(tmp_path: Path) -> None:
    ended, events = work("tells", tmp_path, hello=["world"])
    assert (ended.how, ended.detail) == ("done", "")
    assert [event["event"] for event in events] == ["told"] and events[0]["order"] == {"hello": ["world"]}
    kept = lines_of(ended.transcript)
    assert [line["event"] for line in kept] == ["order", "told", "end"] and kept[0]["order"] == {"hello": ["world"]}
    assert "no event" not in ended.transcript.read_text()


def test_it_gets_the_secrets_that_it_needs_and_no_other_and_none_is_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLANTED_KEY", KEY)
    monkeypatch.setenv("SOMEBODY_ELSES_KEY", "sk-other-0123456789")
    ended, events = work("tells", tmp_path)
    environment = events[0]["environment"]
    assert environment["PLANTED_KEY"] == "[secret]" and "SOMEBODY_ELSES_KEY" not in environment
    ended, _ = work("crashes", tmp_path)
    assert ended.how == "crash" and "[secret]" in ended.detail
    assert not any(KEY in path.read_text() for path in tmp_path.iterdir())


def test_at_the_wall_clock_it_is_killed_with_what_it_started_and_its_words_are_kept(tmp_path: Path) -> None:
    ended, events = work("hangs", tmp_path, wall_s=8)
    assert ended.how == "time" and "killed after 8 s" in ended.detail
    assert all(gone(pid) for pid in events[0]["pids"])
    assert [line["event"] for line in lines_of(ended.transcript)] == ["order", "told", "end"]


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT])
def test_it_goes_when_who_started_it_goes(tmp_path: Path, blow: signal.Signals) -> None:
    said = tmp_path / "said"
    program = (
        "import sys; from pathlib import Path; from verl_rlar.agents.session import run\n"
        "run('agents_at_work:hangs', {'say': sys.argv[1]}, folder=Path(sys.argv[2]), name='test', wall_s=300, "
        "secrets=[], on_event=print)\n"
    )
    path = os.pathsep.join(filter(None, sys.path))
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(said), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(600):
            kept = "".join(path.read_text() for path in tmp_path.glob("test-*.jsonl"))
            if said.exists() and said.read_text().endswith("\n") and '"told"' in kept:
                break
            time.sleep(0.1)
        parent.send_signal(blow)
        parent.wait(30)
    finally:
        parent.kill()
        parent.wait()
    assert gone(int(said.read_text()))
    (transcript,) = tmp_path.glob("test-*.jsonl")
    assert [line["event"] for line in lines_of(transcript)][:2] == ["order", "told"]


def test_how_it_ended_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANTED_KEY", KEY)
    assert work("stops", tmp_path)[0].how == "steps" and work("stops", tmp_path)[0].detail == "that was all"
    died, events = work("dies", tmp_path)
    assert (died.how, len(events)) == ("crash", 1) and "code 7" in died.detail
    assert "RuntimeError" in work("crashes", tmp_path)[0].detail
    with pytest.raises(HubUnreachable, match="the hub is away"):
        work("fails", tmp_path)


def test_no_transcript_no_agent(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(AgentError, match="no transcript"):
        work("tells", tmp_path / "file" / "folder")
