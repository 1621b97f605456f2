# SPDX-License-Identifier: Apache-2.0
"""`rlar tools`: a run's library, from the command line."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from verl_rlar.cli import app
from verl_rlar.config import RlarConfig
from verl_rlar.inbox import Submission, hand_in, submit, take_in, waiting
from verl_rlar.library import FOLDER_NAME, Library
from verl_rlar.service import Service
from verl_rlar.types import Kind, Outcome

CHECK = '''"""Compares the price per unit."""
KINDS = ("math",)
def score(prompt, response, reference, extra):
    raise SystemExit("it is never run here")
'''


def tools(*args: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["tools", *args])
    assert result.exit_code == code, result.output + result.stderr
    return result


def records(*args: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in tools(*args, "--json").stdout.splitlines()]


@pytest.fixture
def run(tmp_path: Path) -> str:
    """The checkpoint folder of a run that has handed out steps 0 to 4."""
    Service(RlarConfig(run_dir=str(tmp_path / "rlar")), "run").close()
    with Library(tmp_path / "rlar" / FOLDER_NAME) as library:
        library.snapshot(4)
    return str(tmp_path)


@pytest.fixture
def check(tmp_path: Path) -> str:
    file = tmp_path / "unit_price.py"
    file.write_text(CHECK)
    return str(file)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield


def test_without_a_library_the_tools_that_a_training_begins_with_are_listed() -> None:
    result = tools("ls")
    assert "there is no library at rlar/library" in result.stderr
    assert [line.split()[0] for line in result.stdout.splitlines()][:2] == ["tool", "unit_tests"]
    assert {row["by"] for row in records("ls")} == {"builtin"}
    assert "unit_tests" not in tools("ls", "--set", "sandbox.backend=none").stdout


def test_without_a_library_a_tool_that_a_training_begins_with_is_shown() -> None:
    assert "Units are not converted" in tools("show", "final_answer").stdout
    assert "no tool 'nobody'" in tools("show", "nobody", code=2).stderr


def test_a_change_says_why(run: str) -> None:
    assert "--why is empty" in tools("retire", "token_f1", "--why", " ", "--in", run, code=2).stderr


def test_a_proposed_verifier_is_listed_shown_and_never_live_without_an_exam(run: str, check: str) -> None:
    added = records("add", check, "--in", run, "--why", "prices")[0]
    assert (added["tool"], added["state"]) == ("unit_price", "proposed")
    for stage in ("shadow", "live"):
        refused = tools("promote", "unit_price", "--in", run, "--to", stage, "--why", "x", code=2)
        assert "needs an exam before it scores" in refused.stderr and "`rlar exam`" in refused.stderr
    assert tools("add", check, "--in", run).stdout.startswith(f"unit_price ({added['digest']}) is proposed")
    rows = records("ls", "--in", run)
    assert [row["tool"] for row in rows][-1] == "unit_price" and len(rows) == 12
    assert {row["state"] for row in rows[:-1]} == {"live"}
    shown = tools("show", added["digest"][:6], "--in", f"{run}/rlar/library").stdout
    assert "Compares the price per unit." in shown and "none: it had no exam" in shown and "prices" in shown
    [record] = records("show", "unit_price", "--in", run)
    assert record["spec"]["scope"]["kinds"] == [Kind.MATH.value] and record["card"] is None


def test_a_tool_with_a_passed_exam_can_be_made_live_from_a_later_step(run: str, check: str) -> None:
    digest = records("add", check, "--in", run)[0]["digest"]
    with Library(Path(run) / "rlar" / FOLDER_NAME) as library:
        record: dict[str, Any] = {"text": "# unit_price\nall \x1b[31mright\n", "transcript": []}
        library.put_exam(digest, card={"gold": 1.0}, passed=True, by="exam", why="all right", **record)
    live = ("promote", "unit_price", "--in", run, "--to", "live", "--why", "all right")
    assert "already, and a step never changes" in tools(*live, "--from", "4", code=2).stderr
    assert records(*live, "--from", "7")[0]["state"] == "live"
    states = [{row["tool"]: row["state"] for row in records("ls", "--in", run, "--step", step)} for step in ("6", "7")]
    assert [state["unit_price"] for state in states] == ["examined", "live"]
    shown = tools("show", "unit_price", "--in", run).stdout
    assert "all \\x1b[31mright" in shown, "what a card quotes is shown, not obeyed"


def test_a_tool_is_retired_from_a_later_step_and_says_why(run: str) -> None:
    assert "handed out" in tools("retire", "token_f1", "--in", run, "--why", "x", "--from", "4", code=2).stderr
    assert records("retire", "token_f1", "--in", run, "--why", "too lenient")[0]["step"] == 5
    assert "too lenient" in tools("show", "token_f1", "--in", run).stdout
    assert "is retired from step 5 on" in tools("retire", "token_f1", "--in", run, "--why", "x").stdout, "as it was"
    again = Service(RlarConfig(run_dir=f"{run}/rlar"), "another start")
    again.close()
    assert {row["tool"]: row["state"] for row in records("ls", "--in", run)}["token_f1"] == "retired"


def test_a_step_that_was_a_typo_is_corrected(run: str) -> None:
    for step in ("400", "40"):
        [said] = records("retire", "token_f1", "--in", run, "--why", "too lenient", "--from", step)
        assert (said["state"], said["step"]) == ("retired", int(step))
    assert records("retire", "token_f1", "--in", run, "--why", "now")[0]["step"] == 5


def retire(library: Path, digest: str, start: Any) -> None:
    start.wait()
    submit(library, Submission(digest=digest, event="retired", by="ada", why="x"))


def test_commands_that_change_a_library_at_the_same_time_wait_for_each_other(run: str) -> None:
    library = Path(run) / "rlar" / FOLDER_NAME
    digests = [row["digest"] for row in records("ls", "--in", run)][:4]
    start = multiprocessing.Barrier(len(digests))
    processes = [multiprocessing.Process(target=retire, args=(library, digest, start)) for digest in digests]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert {row["digest"] for row in records("ls", "--in", run) if row["state"] == "retired"} == set(digests)
    assert waiting(library) == ()


def test_what_an_ended_training_left_waiting_is_older_than_what_is_asked_now(
    run: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = Path(run) / "rlar" / FOLDER_NAME
    with Library(path) as library:
        digest = library.find("token_f1")
        library.append("retired", digest, by="ada", why="x")
        hand_in(path, Submission(digest=digest, event="live", by="ada", why="wanted after all"))
    assert records("retire", "token_f1", "--in", run, "--why", "no")[0]["state"] == "retired"
    assert waiting(path) == () and "waited, and came first: live from step 5 on" in caplog.text
    with Library(path) as library:
        assert not list(take_in(library)) and library.standings()[digest].event == "retired"


def test_the_code_that_comes_out_is_the_code_that_went_in(run: str, check: str, tmp_path: Path) -> None:
    digest = records("add", check, "--in", run)[0]["digest"]
    tools("export", digest, str(tmp_path / "out.py"), "--in", run)
    assert (tmp_path / "out.py").read_bytes() == CHECK.encode()
    assert "--force overwrites" in tools("export", digest, str(tmp_path / "out.py"), "--in", run, code=2).stderr
    assert tools("export", "unit_price", "-", "--in", run).stdout == CHECK


def test_a_new_library_is_made_for_the_first_tool(check: str) -> None:
    assert records("add", check)[0]["library"] == "rlar/library"
    assert [row["tool"] for row in records("ls")] == ["unit_price"]


@pytest.mark.parametrize("folder", ["ck/new", "ck/new/rlar", "ck/new/rlar/library"])
def test_a_library_that_is_made_before_the_training_is_the_one_that_the_training_finds(check: str, folder: str) -> None:
    assert "there was no library: ck/new/rlar/library was made" in tools("add", check, "--in", folder).stderr
    Service(RlarConfig(run_dir="ck/new/rlar"), "run").close()
    for place in ("ck/new", "ck/new/rlar"):
        assert "unit_price" in [row["tool"] for row in records("ls", "--in", place)]


def test_the_library_of_the_training_comes_before_one_beside_it(run: str, check: str) -> None:
    Library(Path(run) / FOLDER_NAME).close()
    assert records("add", check, "--in", run)[0]["library"] == f"{run}/rlar/library"


def test_who_is_listed_is_who_said_what_was_so_at_that_step(run: str) -> None:
    tools("retire", "exact_match", "--why", "x", "--by", "eve", "--in", run)
    for step, state, by in (("4", "live", "builtin"), ("5", "retired", "eve")):
        [row] = [row for row in records("ls", "--step", step, "--in", run) if row["tool"] == "exact_match"]
        assert (row["state"], row["by"]) == (state, by)


def test_a_file_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "marked.py").write_text(CHECK, "utf-8-sig")
    added = records("add", str(tmp_path / "marked.py"))[0]
    assert tools("export", added["digest"], "-").stdout == CHECK


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("ls", "--in", "nowhere"), "there is no library at nowhere"),
        (("retire", "token_f1", "--in", "nowhere", "--why", "x"), "there is no library at nowhere"),
        (("show", "token_f2"), "there is no tool 'token_f2'; there are: "),
        (("add", "missing.py"), r"cannot read the verifier missing.py"),
        (("retire", "token_f1"), "Missing option '--why'"),
    ],
)
def test_what_is_wrong_is_named(run: str, args: tuple[str, ...], message: str) -> None:
    where = () if "--in" in args else ("--in", run)
    assert message in tools(*args, *where, code=2).stderr


def test_while_somebody_writes_the_library_can_be_read_and_changes_wait_for_the_writer(run: str, check: str) -> None:
    with Library(Path(run) / "rlar" / FOLDER_NAME):
        assert len(records("ls", "--in", run)) == 11
        added = records("add", check, "--in", run)[0]
        assert added["state"] == "waiting" and Path(added["inbox"]).is_file()
        assert "takes it in at its next step" in tools("retire", "token_f1", "--in", run, "--why", "x").stdout
        assert len(records("ls", "--in", run)) == 11


def test_own_tools_of_the_settings_score_from_the_command_line_too(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "Say half.", "reference": "half", "response": "no"}) + "\n")
    settings = ["--set", 'tools=["planted:half"]', "--set", "routing.prefer.short_text=half"]
    result = CliRunner().invoke(app, ["score", str(file), "--json", *settings])
    row = json.loads(result.stdout)
    assert (row["tool"], row["value"], row["outcome"]) == ("half", 0.5, Outcome.SCORED.value)
