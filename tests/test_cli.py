# SPDX-License-Identifier: Apache-2.0
"""The `rlar` command, by its exit codes and what it prints."""

from __future__ import annotations

import gzip
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.table import Table
from typer.testing import CliRunner, Result

from verl_rlar import __version__
from verl_rlar.cli import app, visible
from verl_rlar.cli.app import Output
from verl_rlar.library import builtin_snapshot

ROOT = Path(__file__).parent.parent
GSM8K = [
    ("Natalia sold clips to 48 friends in April, and then half as many in May. How many altogether?", "72"),
    ("Weng earns $12 an hour for babysitting. Yesterday, she just did 50 minutes. How much did she earn?", "10"),
    ("Betty has only half of the money for a wallet which costs $100. How much more does she need?", "50"),
]
TED = [
    (
        "I want to show you how light travels through the universe.",
        "Ich möchte Ihnen zeigen, wie Licht durch das All reist.",
    ),
    ("Most of what we know comes to us from the stars.", "Das meiste, was wir wissen, kommt von den Sternen zu uns."),
]
LANDMARKS = [("Louvre", "Paris"), ("Prado", "Madrid"), ("Colosseum", "Rome")]
MATH_ROWS = [{"prompt": q, "reference": a, "data_source": "gsm8k"} for q, a in GSM8K]
MIXED_ROWS: list[dict[str, Any]] = [
    *MATH_ROWS,
    *(
        {"prompt": f"Translate into German:\n{source}", "reference": reference, "data_source": "ted"}
        for source, reference in TED
    ),
    *(
        {"prompt": f"Pick one.\nA) {a}\nB) {b}", "reference": right, "data_source": "quiz"}
        for a, b, right in (("red", "blue", "A"), ("cat", "dog", "B"), ("up", "down", "A"))
    ),
    {"prompt": "Tell me about your day.", "data_source": "chat"},
    {
        "prompt": "Write without commas.",
        "data_source": "ifeval",
        "extra": {
            "instruction_id_list": ["punctuation:no_comma", "keywords:existence"],
            "kwargs": [{}, {"keywords": ["sun"]}],
        },
    },
]


def rlar(*args: str) -> Result:
    return CliRunner().invoke(app, args)


def process(*args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "verl_rlar", *args],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def records(output: str) -> list[dict[str, Any]]:
    """The objects of an output of which every line must be one."""
    found = [json.loads(line) for line in output.splitlines()]
    assert all(isinstance(record, dict) for record in found)
    return found


def plan(path: str, *args: str, code: int = 0) -> dict[str, list[dict[str, Any]]]:
    """The objects of a plan, by type."""
    result = rlar("plan", path, "--json", *args)
    assert result.exit_code == code, result.output
    found: dict[str, list[dict[str, Any]]] = {
        name: [] for name in ("route", "cluster", "uncovered", "conflict", "error", "summary")
    }
    for record in records(result.stdout):
        found[record.pop("type")].append(record)
    return found


def conflicts(found: Mapping[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    return {record["sort"]: record for record in found["conflict"]}


ROUTES_ONLY = ("--sample", "0")


# score


def test_every_line_gets_its_value_outcome_tool_reason_and_time(tmp_path: Path) -> None:
    rows = [
        {"prompt": "6*7?", "response": "It is 42.", "reference": "42", "data_source": "t"},
        {"messages": [{"role": "user", "content": "6*7?"}], "response": "41", "reference": "42"},
        {"prompt": [{"role": "user", "content": "6*7?"}], "response": "42", "reward_model": {"ground_truth": "42"}},
        {"prompt": "Hello!", "response": "Hi."},
        {"prompt": "def f():", "response": "pass", "extra": {"test": "assert f() is None"}},
    ]
    result = rlar("score", write(tmp_path / "rows.jsonl", rows), "--json")
    assert result.exit_code == 1, "a tool failed"
    found = records(result.stdout)
    assert [record["line"] for record in found] == [1, 2, 3, 4, 5]
    assert [record["value"] for record in found] == [1.0, 0.0, 1.0, None, None]
    assert [record["outcome"] for record in found] == ["scored", "scored", "scored", "abstained", "failed"]
    assert [record["tool"] for record in found] == ["final_answer", "final_answer", "final_answer", "-", "unit_tests"]
    assert all(record["reason"] and record["ms"] >= 0 for record in found)
    assert "mean value 0.6667" in result.stderr


def test_bad_lines_are_reported_with_their_numbers_and_the_rest_goes_on(tmp_path: Path) -> None:
    good = {"prompt": "6*7?", "response": "42", "reference": "42"}
    bad = [
        "not json",
        "[1]",
        {"response": "42"},
        {"prompt": "6*7?"},
        {"prompt": "6*7?", "response": ["42"]},
        '{"a":' * 9999,
    ]
    path = write(tmp_path / "rows.jsonl", [good, *bad, "", good])
    result = rlar("score", path, "--json")
    assert result.exit_code == 1
    found = records(result.stdout)
    assert [record["line"] for record in found] == [1, 2, 3, 4, 5, 6, 7, 9], "in the order of the input"
    assert [record["line"] for record in found if "error" in record] == [2, 3, 4, 5, 6, 7]
    assert all(f"line {number}: " in result.stderr for number in range(2, 8))
    assert [record["value"] for record in found if "error" not in record] == [1.0, 1.0]


def test_a_line_that_is_no_utf_8_is_a_bad_line(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(
        b'{"prompt": "\xff"}\n{"prompt": "6*7?", "response": "42", "reference": "42"}\n'
    )
    result = rlar("score", str(tmp_path / "rows.jsonl"), "--json")
    assert result.exit_code == 1
    assert ["error" in record for record in records(result.stdout)] == [True, False]


HOSTILE = "\x1b]0;owned\x07\x1b[2J[red]x[/red] [/] [link=http://x]y[/link] \u202eevil \x9b31m \ud800 \r\n\ttab"


@pytest.mark.parametrize("args", [(), ("--json",)])
def test_a_hostile_response_is_shown_as_text(tmp_path: Path, args: tuple[str, ...]) -> None:
    row = {"prompt": HOSTILE, "response": HOSTILE, "reference": "Ann [bold]", "data_source": HOSTILE}
    result = process("score", write(tmp_path / "rows.jsonl", [row]), *args)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if not line.startswith("line\t")]
    assert len(lines) == 1
    assert "Ann" in lines[0] or "ann" in lines[0]
    for char in "\x1b\x07\u202e\x9b\r":
        assert char not in result.stdout + result.stderr
    planned = process("plan", write(tmp_path / "plan.jsonl", [{**row, "reference": None}]), *ROUTES_ONLY)
    assert planned.returncode == 0, planned.stderr
    assert "[red]x[/red]" in planned.stdout, "markup is text"
    for char in "\x1b\x07\u202e\x9b\r":
        assert char not in planned.stdout + planned.stderr


def test_visible_leaves_text_as_it_is_and_escapes_the_rest() -> None:
    assert visible("Grüße, 你好 [red] 🙂") == "Grüße, 你好 [red] 🙂"
    assert visible("\x1b[31m\u202e\ud800\n") == "\\x1b[31m\\u202e\\ud800\\n"


def test_a_tool_that_runs_into_its_deadline_failed_and_did_not_score_0(tmp_path: Path) -> None:
    path = write(
        tmp_path / "rows.jsonl", [{"prompt": "Where is the Louvre?", "response": "Paris", "reference": "Paris"}]
    )
    sleeper = ("--set", 'tools=["planted:sleeper"]', "--set", "routing.prefer.short_text=sleeper")
    result = rlar("score", path, "--json", *sleeper, "--set", "scoring.timeout_s=0.2")
    found = records(result.stdout)
    assert (found[0]["value"], found[0]["outcome"], result.exit_code) == (None, "failed", 1)
    assert "scoring.timeout_s" in found[0]["reason"]
    assert records(rlar("score", path, "--json", "--set", "rlar.scoring.timeout_s=10").stdout)[0]["value"] == 1.0


def test_json_keeps_standard_output_pure_and_reads_a_pipe() -> None:
    rows = [{"prompt": q, "response": f"The answer is {a}.", "reference": a} for q, a in GSM8K]
    result = process("score", "-", "--json", stdin="\n".join(map(json.dumps, rows)) + "\nbad\n")
    assert result.returncode == 1
    assert [record.get("value") for record in records(result.stdout)] == [1.0, 1.0, 1.0, None]
    assert result.stdout.isascii()


def test_results_come_while_the_pipe_is_still_open() -> None:
    row = json.dumps({"prompt": "6*7?", "response": "42", "reference": "42"})
    with subprocess.Popen(
        [sys.executable, "-m", "verl_rlar", "score", "-", "--json"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as running:
        assert running.stdin is not None
        assert running.stdout is not None
        running.stdin.write(row + "\n")
        running.stdin.flush()
        assert json.loads(running.stdout.readline())["value"] == 1.0
        running.stdin.close()
        assert running.wait(60) == 0


def test_a_table_for_a_pipe_is_separated_by_tabs(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"prompt": "6*7?", "response": "42", "reference": "42"}])
    header, row = (line.split("\t") for line in rlar("score", path).stdout.splitlines())
    assert header == ["line", "value", "outcome", "tool", "ms", "reason"]
    assert row[:4] == ["1", "1", "scored", "final_answer"]


@pytest.mark.parametrize(("stop", "starting"), [(signal.SIGINT, False), (signal.SIGTERM, False), (signal.SIGINT, True)])
def test_a_signal_ends_the_command_and_its_workers(stop: signal.Signals, starting: bool) -> None:
    row = json.dumps({"prompt": "6*7?", "response": "42", "reference": "42"})
    running = subprocess.Popen(
        [sys.executable, "-m", "verl_rlar", "score", "-", "--json"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert running.stdin is not None
    assert running.stdout is not None
    assert running.stderr is not None
    try:
        running.stdin.write(row + "\n")
        running.stdin.flush()
        if starting:
            end = time.monotonic() + 60
            while not workers_of(running.pid) and time.monotonic() < end:
                time.sleep(0.01)
            assert workers_of(running.pid)
        else:
            running.stdout.readline()  # now the workers are there
            assert len(processes_of(running.pid)) > 1
        os.killpg(running.pid, stop)  # as a terminal does
        assert running.wait(30) == 128 + stop
        end = time.monotonic() + 20
        while processes_of(running.pid) and time.monotonic() < end:
            time.sleep(0.1)
        assert not processes_of(running.pid)
        assert "Traceback" not in running.stderr.read()
    finally:
        for stream in (running.stdin, running.stdout, running.stderr):
            stream.close()
        if processes_of(running.pid):
            os.killpg(running.pid, signal.SIGKILL)


def processes_of(session: int) -> list[int]:
    """Living processes of a session (field 6 of /proc/<pid>/stat)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def workers_of(session: int) -> list[int]:
    """Those of them in which rules run."""
    found = []
    for process in processes_of(session):
        with suppress(OSError):
            if b"pebble_pool_worker" in Path(f"/proc/{process}/cmdline").read_bytes():
                found.append(process)
    return found


@pytest.mark.parametrize("args", [("tools", "ls"), ("tools", "show", "final_answer"), ("tools", "ls", "--json")])
def test_a_reader_that_goes_away_is_exit_code_141_and_no_fault(args: tuple[str, ...]) -> None:
    read, wrote = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "verl_rlar", *args]
    ran = subprocess.run(command, stdout=wrote, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    os.close(wrote)
    assert ran.returncode == 128 + signal.SIGPIPE
    assert "Traceback" not in ran.stderr and "ignored" not in ran.stderr


def test_output_that_has_no_room_on_the_disk_is_a_message() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "verl_rlar", "tools", "ls", "--json"]
        ran = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    assert ran.returncode == 2
    assert "the output cannot be written: No space left on device" in ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize("width", [40, 80, 160])
def test_a_table_that_has_no_room_loses_no_name_and_no_number(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    output = Output()
    output.width = width
    table = Table("tool", "digest", "reward", "why", box=None, pad_edge=False)
    table.add_row("instruction_constraints", "8fc847a5f554846a", "0.1570 -> 0.3139", "far too lenient " * 9)
    output.table(table)
    printed = capsys.readouterr().out
    for word in ("instruction_constraints", "8fc847a5f554846a", "0.1570", "0.3139", "lenient"):
        assert word in printed
    assert "\u2026" not in printed


def test_on_a_narrow_terminal_a_reason_stands_below_its_score(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"prompt": "How do I keep bread fresh?", "response": "In a bag."}])
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)
    env = os.environ | {"COLUMNS": "80", "TERM": "xterm"}
    command = [sys.executable, "-m", "verl_rlar", "score", path]
    subprocess.run(command, stdout=theirs, stderr=subprocess.DEVNULL, env=env, timeout=120, check=True)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", os.read(ours, 10_000).decode()).splitlines()
    os.close(ours)
    os.close(theirs)
    assert shown[1].split() == ["1", "-", "abstained", "-"]
    assert shown[2].startswith("        uncovered: no tool for open (no tests,")


# plan


def test_a_plan_says_what_goes_where(tmp_path: Path) -> None:
    found = plan(write(tmp_path / "rows.jsonl", MIXED_ROWS), *ROUTES_ONLY)
    summary = found["summary"][0]
    assert summary["rows"] == 10
    assert (summary["verifiable"], summary["verified"], summary["coverage"]) == (9, 9, 1.0)
    tools = {"final_answer": 3, "translation": 2, "multiple_choice": 3, "instruction_constraints": 1, "-": 1}
    assert summary["tools"] == tools
    assert summary["kinds"] == {"math": 3, "translation": 2, "choice": 3, "constraints": 1, "open": 1}
    assert {route["tool"]: route["rows"] for route in found["route"]} == tools
    clusters = {cluster["id"].partition("#")[0]: cluster for cluster in found["cluster"]}
    assert sum(cluster["rows"] for cluster in found["cluster"]) == len(MIXED_ROWS)
    assert clusters["open"]["tools"] == {"-": 1} and "no tool for open" in clusters["open"]["reason"]


def test_gold_answers_win_against_garbage_on_sound_data(tmp_path: Path) -> None:
    found = plan(write(tmp_path / "rows.jsonl", MIXED_ROWS))
    dry = {route["tool"]: route["dry"] | {"verdict": route["verdict"]} for route in found["route"]}
    for tool in ("final_answer", "translation", "multiple_choice"):
        assert dry[tool]["verdict"] == "ok"
        assert dry[tool]["gold"] == 1.0
        assert set(dry[tool]["garbage"]) == {"empty", "i_dont_know", "other_reference", "prompt", "random_words"}
    assert dry["instruction_constraints"]["note"] == "no gold available"
    assert dry["instruction_constraints"]["verdict"] == "no_gold"
    assert dry["-"]["verdict"] == "not_run"


def test_uncovered_queries_are_reported_with_an_example(tmp_path: Path) -> None:
    (uncovered,) = plan(write(tmp_path / "rows.jsonl", MIXED_ROWS), *ROUTES_ONLY)["uncovered"]
    assert (uncovered["kind"], uncovered["rows"]) == ("open", 1)
    assert uncovered["examples"] == [{"line": 9, "prompt": "Tell me about your day.", "note": ""}]
    assert "Tell me about your day." in rlar("plan", str(tmp_path / "rows.jsonl"), *ROUTES_ONLY).stdout


@pytest.mark.parametrize(
    ("case", "references"),
    [("all the same", ["A", "A", "A", "A"]), ("no option", ["D", "E", "D", "F"])],
)
def test_a_route_where_gold_does_not_win_is_an_error(tmp_path: Path, case: str, references: list[str]) -> None:
    rows = [{"prompt": f"No. {i}\nA) x\nB) y", "reference": r, "data_source": "quiz"} for i, r in enumerate(references)]
    path = write(tmp_path / "rows.jsonl", rows)
    found = plan(path, code=1)
    (error,) = found["error"]
    assert (error["tool"], error["data_source"]) == ("multiple_choice", "quiz")
    assert "gold does not win" in error["error"]
    assert error["examples"][0]["line"] == 1
    assert found["summary"][0]["errors"] == 1
    assert "gold does not win" in (printed := rlar("plan", path).stdout)
    assert ("All rows have the same reference" in printed) is (case == "all the same")
    assert plan(path, *ROUTES_ONLY)["error"] == [], "nothing is tried without a sample"


def test_a_route_where_gold_cannot_be_scored_is_an_error_of_ours_and_no_lost_one(tmp_path: Path) -> None:
    rows = [{"prompt": f"Where is the {name}?", "reference": city} for name, city in LANDMARKS]
    crashing = ("--set", 'tools=["planted:crashing"]', "--set", "routing.prefer.short_text=crashing")
    found = plan(write(tmp_path / "rows.jsonl", rows), *crashing, code=1)
    assert found["route"][0]["verdict"] == "failed"
    assert found["route"][0]["dry"]["failed"] == 3
    assert "could not be scored" in found["error"][0]["error"]
    assert "failed on 3 of 3" in conflicts(found)["failed_gold"]["what"]


def test_references_that_the_tool_cannot_use_are_a_conflict(tmp_path: Path) -> None:
    rows = [{"prompt": f"No. {i}\nA) x\nB) y", "reference": r} for i, r in enumerate("ABABABAE")]
    found = plan(write(tmp_path / "rows.jsonl", rows))
    assert found["route"][0]["dry"]["unusable"] == 1
    assert conflicts(found)["unusable_reference"]["examples"][0]["line"] == 8


def test_contradicting_labels_are_conflicts(tmp_path: Path) -> None:
    rows = [
        *MATH_ROWS,
        {**MATH_ROWS[0], "reference": "73"},
        {**MATH_ROWS[1], "extra": {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}},
    ]
    found = conflicts(plan(write(tmp_path / "rows.jsonl", rows), *ROUTES_ONLY))
    assert found["different_references"]["rows"] == 1
    assert found["different_references"]["examples"][0]["line"] == 4
    assert "row 1" in found["different_references"]["examples"][0]["note"]
    assert "its reference (math)" in found["unscored_check"]["what"]
    assert found["unscored_check"]["examples"][0]["line"] == 5
    assert "4 math, 1 constraints" in found["mixed_source"]["what"]
    assert not conflicts(plan(write(tmp_path / "sound.jsonl", MATH_ROWS), *ROUTES_ONLY))


def test_the_plan_of_parquet_is_the_plan_of_the_same_json_lines(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [
        {
            "data_source": row["data_source"],
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "reward_model": {"style": "rule", "ground_truth": row.get("reference")},
            "extra_info": row.get("extra", {}) | {"index": i},
        }
        for i, row in enumerate(MIXED_ROWS)
    ]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    of_json = plan(write(tmp_path / "rows.jsonl", rows), "--sample", "2")
    assert plan(str(tmp_path / "rows.parquet"), "--sample", "2") == of_json
    assert of_json["summary"][0]["verified"] == 9


def test_renaming_the_data_sources_changes_no_decision(tmp_path: Path) -> None:
    renamed = [{**row, "data_source": row["data_source"][::-1] + "/math"} for row in MIXED_ROWS]
    before = json.dumps(plan(write(tmp_path / "a.jsonl", MIXED_ROWS), "--sample", "3"))
    for name in {row["data_source"] for row in MIXED_ROWS}:
        before = before.replace(f'"data_source": "{name}"', f'"data_source": "{name[::-1]}/math"')
    assert plan(write(tmp_path / "b.jsonl", renamed), "--sample", "3") == json.loads(before)


def test_bad_rows_are_left_out_of_the_plan_and_named(tmp_path: Path) -> None:
    found = plan(
        write(tmp_path / "rows.jsonl", [MATH_ROWS[0], "{", {"reference": "4"}, *MATH_ROWS[1:]]), *ROUTES_ONLY, code=1
    )
    assert [record["line"] for record in found["error"]] == [2, 3]
    assert (found["summary"][0]["rows"], found["summary"][0]["bad"]) == (3, 2)


def test_a_sample_bounds_the_dry_score_and_is_the_same_every_time(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i} + {i}?", "reference": str(2 * i)} for i in range(1, 40)]
    first, again = (plan(write(tmp_path / "rows.jsonl", rows), "--sample", "5") for _ in range(2))
    assert first == again
    assert first["route"][0]["dry"]["rows"] == 5


def test_equal_references_in_a_small_sample_are_no_error_where_the_data_has_others(tmp_path: Path) -> None:
    rows = [{"prompt": f"No. {i}\nA) x\nB) y", "reference": "B" if i == 7 else "A"} for i in range(20)]
    assert plan(write(tmp_path / "rows.jsonl", rows), "--sample", "2")["route"][0]["verdict"] == "ok"


def test_gates_do_not_stand_in_the_way_of_bare_gold(tmp_path: Path) -> None:
    rows = [{**row, "extra": {"format": "think"}} for row in MATH_ROWS]
    (route,) = plan(write(tmp_path / "rows.jsonl", rows))["route"]
    assert (route["tool"], route["verdict"]) == ("think_format+final_answer", "ok")


# both


@pytest.mark.parametrize("command", ["score", "plan"])
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere.jsonl"], "cannot read nowhere.jsonl: No such file"),
        (["nowhere.parquet"], "cannot read nowhere.parquet: No such file"),
        ([str(Path(__file__).parent)], "Is a directory"),
        ([__file__, "--set", "scoring.timeout_s"], "KEY=VALUE"),
        ([__file__, "--set", "scoring.timeout=3"], "unknown key rlar.scoring.timeout, did you mean timeout_s?"),
        ([__file__, "--set", "scoring.timeout_s=-1"], "rlar.scoring.timeout_s"),
        ([__file__, "--set", "routing.fallback=nobody"], "there is no tool 'nobody'"),
        ([__file__, "--set", "scoring=1", "--set", "scoring.retries=1"], "scoring was set to 1 before"),
        ([__file__, "--nonsense"], "--nonsense"),
        ([], "Missing argument"),
    ],
)
def test_what_the_user_can_mend_is_a_message_and_exit_code_2(command: str, args: list[str], message: str) -> None:
    result = rlar(command, *args)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not result.stdout


@pytest.mark.parametrize(
    "command", [("score",), ("plan",), ("build", "--in", "lib", "--dry-run"), ("exam", "exact_match", "--data")]
)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no row"),
        ("\n \n", "no row"),
        ('{"question": "6*7?", "answer": "42"}\n', "`messages` or `prompt`|rlar plan"),
    ],
)
def test_a_file_without_rows_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], text: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    result = rlar(*command, str(path)) if command[0] != "build" else rlar("build", str(path), *command[1:])
    one_by_one = text.strip() and command[0] in ("score", "plan")
    assert result.exit_code == (1 if one_by_one else 2), result.output
    assert one_by_one or (re.search(message, result.stderr) and str(path) in result.stderr)
    assert not one_by_one or "line 1: no " in result.stderr
    assert not (tmp_path / "lib").exists()


@pytest.mark.parametrize("command", ["score", "plan"])
def test_a_file_of_another_format_or_with_other_columns_says_what_is_wanted(tmp_path: Path, command: str) -> None:
    (tmp_path / "rows.csv").write_text("prompt,response\n6*7?,42\n")
    assert "rows.csv can be" in (said := rlar(command, str(tmp_path / "rows.csv")).stderr)
    assert "it must be JSON lines (one object per line) or *.parquet, with `prompt` or `messages`" in said
    other = write(tmp_path / "rows.jsonl", [{"question": "6*7?", "answer": "42"}])
    assert "; there is question, answer\n" in rlar(command, other).stderr


def test_rows_that_cannot_be_read_are_named_by_build_too(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ["{broken", {"prompt": "1+1?", "reference": "2"}])
    result = rlar("build", path, "--in", str(tmp_path / "lib"), "--dry-run", "--json")
    assert result.exit_code == 1 and "line 1: " in result.stderr
    assert records(result.stdout) == [{"type": "rows", "rows": 1, "bad": 1, "gaps": 0}]
    other = write(tmp_path / "other.jsonl", [{"prompt": "1+1?", "reference": "2"}, "{broken"])
    said = rlar("build", path, other, "--in", str(tmp_path / "lib"), "--dry-run").stderr.splitlines()
    assert [(line[:12], line.rsplit("/")[-1]) for line in said if "line" in line] == [
        ("rlar: line 1", "rows.jsonl)"),
        ("rlar: line 2", "other.jsonl)"),
    ]


@pytest.mark.parametrize("command", ["score", "plan"])
def test_a_damaged_archive_is_a_message(tmp_path: Path, command: str) -> None:
    whole = bytearray(gzip.compress("".join(f'{{"prompt": "{n}", "response": "{n}"}}\n' for n in range(999)).encode()))
    for at in range(100, 200):
        whole[at] ^= 0xFF
    (tmp_path / "rows.jsonl.gz").write_bytes(whole)
    result = rlar(command, str(tmp_path / "rows.jsonl.gz"))
    assert result.exit_code == 2 and "cannot read" in result.stderr and "Traceback" not in result.stderr


def test_a_library_in_the_settings_counts_for_score_and_one_that_is_not_there_is_no_success(tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", [{"prompt": "6*7?", "response": "42", "reference": "42"}])
    for command in (("score", rows), ("bench", rows), ("tools", "ls")):
        result = rlar(*command, "--set", f"library.path={tmp_path / 'nowhere'}")
        assert result.exit_code == 2 and f"there is no library at {tmp_path / 'nowhere'}" in result.stderr


def test_the_beginning_of_a_digest_names_a_tool_without_a_library_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    digest = builtin_snapshot().tool("final_answer").digest
    assert "final_answer" in rlar("tools", "show", digest[:8]).stdout
    assert rlar("tools", "show", "zz").exit_code == 2


def test_a_tool_that_is_preferred_for_what_it_is_not_for_is_refused(tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", [{"prompt": "6*7?", "response": "42", "reference": "42"}])
    for name in ("token_f1", "think_format"):
        result = rlar("score", rows, "--set", f"routing.prefer.math={name}")
        assert result.exit_code == 2 and f"rlar.routing.prefer.math: {name} is not for math" in result.stderr


def test_write_refuses_a_file_that_is_there_before_anything_is_paid(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("precious")
    cases = str(ROOT / "recipes" / "custom_tool" / "cases.jsonl")
    for out, why in (("mine.py", "is there already"), ("none/new.py", "there is no folder")):
        result = rlar("write", "a time of day", "--cases", cases, "--out", str(tmp_path / out))
        assert result.exit_code == 2 and why in result.stderr
    assert (tmp_path / "mine.py").read_text() == "precious"


def test_a_reference_that_is_missing_in_a_column_of_numbers_is_none(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ['{"prompt": "6*7?", "response": "nan", "reference": NaN}'])
    (record,) = records(rlar("score", path, "--json").stdout)
    assert (record["outcome"], record["value"]) == ("abstained", None)


def test_what_may_not_be_read_is_a_message(tmp_path: Path) -> None:
    bare = () if os.geteuid() else ("setpriv", "--bounding-set=-all", "--inh-caps=-all")  # root may read everything
    if bare and not shutil.which(bare[0]):
        pytest.skip("setpriv is not installed")
    (tmp_path / "run" / "rlar").mkdir(parents=True)
    (tmp_path / "run" / "rlar" / "ledger.sqlite").touch(mode=0)
    (tmp_path / "closed").mkdir(mode=0)
    for run in ("run", "closed"):
        command = [*bare, sys.executable, "-m", "verl_rlar", "report", str(tmp_path / run), "--json"]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert ran.returncode == 2, ran.stderr
        assert "Permission denied; may you read it" in ran.stderr and str(tmp_path / run) in ran.stderr
        assert len(ran.stderr.splitlines()) == 1


CASES = '{"prompt": "6*7?", "response": "42"}\n'
ROW = '{"prompt": "6*7?", "response": "42", "reference": "42"}\n'


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["score", "ROWS", "--step", "3"], "add --in FOLDER"),
        (["score", "ROWS", "--set", "scoring.timeout_s=1e999"], "a finite number"),
        (["score", "ROWS", "--set", "tools=my:fn"], """for example tools='["..."]'"""),
        (["exam", "final_answer", "--cases", "CASES"], "cases.jsonl, line 1: no `expect`"),
        (["exam", "final_answer", "--data", "ROWS", "--in", "FOLDER/new"], "is no tool of a library at"),
        (["exam", "final_answer", "--data", "ROWS", "--in", "ROWS"], "rows.jsonl is a file"),
        (["exam", "./no-model", "--data", "ROWS"], "there is no folder ./no-model"),
        (["diff", "exact_match", "token_f1", "--data", "ROWS", "--steps", "1"], "add --run RUN"),
        (["diff", "exact_match", "token_f1", "--data", "BAD"], "is line 1: not JSON"),
        (["build", "ROWS", "--in", "ROWS", "--dry-run"], "rows.jsonl is a file"),
        (["build", "ROWS", "--in", "FOLDER/new", "--labelled", "nowhere", "--dry-run"], "cannot read nowhere"),
        (["rescore", "FOLDER", "--tool", "final_answer"], "there is no ledger at"),
    ],
)
def test_what_cannot_work_is_said_before_the_work(tmp_path: Path, args: list[str], message: str) -> None:
    files = {"ROWS": ROW, "CASES": CASES, "BAD": "prompt,response\n"}
    for name, text in files.items():
        (tmp_path / f"{name.lower()}.jsonl").write_text(text)
    paths = {name: str(tmp_path / f"{name.lower()}.jsonl") for name in files}
    result = rlar(*(paths.get(arg, arg.replace("FOLDER", str(tmp_path))) for arg in args))
    assert result.exit_code == 2
    assert message in result.stderr and len(result.stderr.splitlines()) == 1
    assert not result.stdout
    assert not (tmp_path / "new").exists()


def test_a_broken_parquet_file_is_a_message(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "rows.parquet").write_text("no parquet")
    result = rlar("plan", str(tmp_path / "rows.parquet"))
    assert result.exit_code == 2
    assert "no parquet file that can be read" in result.stderr


def test_help_shows_examples_and_version_is_the_packages() -> None:
    assert "rlar score answers.jsonl" in rlar("--help").stdout
    assert "rlar score answers.jsonl --json" in rlar("score", "--help").stdout
    assert "rlar plan train.parquet" in rlar("plan", "--help").stdout
    assert rlar("--version").stdout.strip() == f"rlar {__version__}"


def leaves(command: Any, name: str = "rlar") -> Iterator[tuple[str, Any]]:
    """The commands that do something, by what is typed."""
    for key, one in getattr(command, "commands", {}).items():
        yield from leaves(one, f"{name} {key}")
    if not hasattr(command, "commands"):
        yield name, command


COMMANDS = dict(leaves(typer.main.get_command(app)))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_the_same_options_and_examples_of_itself(name: str) -> None:
    options = {word for parameter in COMMANDS[name].params for word in parameter.opts}
    assert {"--json", "--set"} <= options
    examples = (COMMANDS[name].help or "").partition("Examples:")[2]
    assert name in examples
    assert all(one.help for one in COMMANDS[name].params if one.param_type_name == "option")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_setting_that_is_not_there_is_refused_by_every_command(name: str, tmp_path: Path) -> None:
    needed = {"task": "t", "name": "n", "why": "w", "folder": str(tmp_path), "tool": "final_answer"}
    args = name.split()[1:]
    for one in COMMANDS[name].params:
        if one.required:
            value = needed.get(one.name, str(tmp_path / "nothing"))
            args += [value] if one.param_type_name == "argument" else [one.opts[0], value]
    result = rlar(*args, "--set", "scoring.timeout=3")
    assert result.exit_code == 2 and "did you mean timeout_s?" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "hint"), [(["scor"], "'score'"), (["score", "--jsn", "x"], "--json"), (["tools", "promot"], "'promote'")]
)
def test_a_typing_error_gets_a_hint(args: list[str], hint: str) -> None:
    result = rlar(*args)
    assert result.exit_code == 2 and hint in result.stderr


def test_the_shell_completes_commands_and_options() -> None:
    def completed(line: str) -> list[str]:
        words = line.split(" ")
        asked = {"_RLAR_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
        code = "from verl_rlar.cli import app; app(prog_name='rlar')"
        ran = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | asked,
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        return ran.stdout.split()

    assert completed("rlar sc") == ["score", "scout"]
    assert completed("rlar tools r") == ["retire"]
    assert "--set" in completed("rlar bench --s")


def test_a_module_of_the_users_own_is_found_in_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "own_rewards.py").write_text(
        "from verl_rlar.tools.rule import rule\n"
        "from verl_rlar.types import Kind, Sample, Verdict\n"
        "@rule(name='loud', kinds={Kind.OPEN}, needs_reference=False, description='')\n"
        "def loud(sample: Sample) -> Verdict:\n"
        "    return Verdict(value=float(sample.response.isupper()), reason='')\n"
    )
    ran = subprocess.run(
        ["rlar", "score", "-", "--json", "--set", 'tools=["own_rewards:loud"]'],
        cwd=tmp_path,
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
        input='{"prompt": "Hello!", "response": "HELLO!"}',
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["value"] == 1.0


def test_a_report_is_opened_in_the_users_browser(tmp_path: Path) -> None:
    from report_runs import make_run

    run = make_run(tmp_path / "run", steps=2)
    (tmp_path / "browser").write_text(f'#!/bin/sh\necho "$1" > {tmp_path}/opened\n')
    (tmp_path / "browser").chmod(0o755)
    command = [sys.executable, "-m", "verl_rlar", "report", str(run), "--open", "-o", str(tmp_path / "run.html")]
    shown = os.environ | {"BROWSER": f"{tmp_path}/browser %s"}
    subprocess.run(command, env=shown, check=True, capture_output=True, timeout=120)
    assert (tmp_path / "opened").read_text().strip() == (tmp_path / "run.html").as_uri()


# bench


def test_bench_times_routing_each_tool_and_the_ledger(tmp_path: Path) -> None:
    rows = [{"prompt": q, "reference": a, "response": a} for q, a in GSM8K]
    rows += [{"prompt": "Hello!", "response": "Hi."}]
    settings = ("--set", f"run_dir={tmp_path}/rlar", "--set", "rules.processes=1")
    result = rlar("bench", write(tmp_path / "rows.jsonl", rows), "--calls", "10", "--json", *settings)
    assert result.exit_code == 0, result.output
    found = {record["what"]: record for record in records(result.stdout)}
    assert list(found) == ["route", "final_answer", "ledger"]
    assert found["route"]["calls"] == 4 and found["final_answer"]["calls"] == 10
    assert found["final_answer"]["outcomes"] == {"scored": 10} and found["final_answer"]["first_s"] > 0
    assert all(0 < one["p50_ms"] <= one["p95_ms"] and one["per_s"] > 0 for one in found.values())
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"], "nothing is left behind"


def test_bench_says_which_tool_failed_and_why(tmp_path: Path) -> None:
    rows = ["no json", {"prompt": "def f():", "response": "pass", "extra": {"test": "assert f() is None"}}]
    settings = ("--set", f"run_dir={tmp_path}", "--set", "sandbox.backend=sandbox_fusion")
    settings += ("--set", "sandbox.fusion_url=http://127.0.0.1:1")
    result = rlar("bench", write(tmp_path / "rows.jsonl", rows), "--calls", "2", *settings)
    assert result.exit_code == 1
    assert "line 1" in result.stderr and "unit_tests: " in result.stderr and "http://127.0.0.1:1" in result.stderr
    assert "failed 2" in result.stdout
    empty = rlar("bench", write(tmp_path / "empty.jsonl", []))
    assert empty.exit_code == 2 and "no response" in empty.stderr


def test_bench_of_the_public_set_has_every_rule_that_it_takes(tmp_path: Path) -> None:
    result = rlar("bench", "--calls", "4", "--json", "--set", f"run_dir={tmp_path}", "--set", "sandbox.backend=none")
    assert result.exit_code == 0, result.output
    assert {"final_answer", "translation", "json_schema"} <= {record["what"] for record in records(result.stdout)}


def test_the_command_needs_neither_verl_nor_ray_nor_torch() -> None:
    code = "import sys, verl_rlar.cli; print([m for m in ('verl', 'ray', 'torch', 'transformers') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.strip() == "[]"


def test_the_references_of_math_500_go_to_final_answer_and_win(tmp_path: Path) -> None:
    path = Path(__file__).parent.parent / "recipes" / "data" / "math500.jsonl.gz"
    with gzip.open(path, "rt") as lines:
        rows = [{"prompt": row["prompt"], "reference": row["answer"]} for row in map(json.loads, lines)]
    found = plan(write(tmp_path / "rows.jsonl", rows), "--sample", "32")
    assert found["summary"][0]["tools"] == {"final_answer": len(rows)}
    assert found["route"][0]["dry"]["gold"] == 1.0
