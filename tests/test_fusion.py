# SPDX-License-Identifier: Apache-2.0
"""The SandboxFusion client against a server that answers all that it should not: whose fault it is, and how long it
takes. No code runs here; what jobs do on a server that works is in `test_sandbox.py`."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fusion_server import Fault, FusionServer, floods, hangs, http, says, says_json, truncated

from verl_rlar.config import SandboxConfig
from verl_rlar.errors import ConfigError, ToolTimeout, ToolUnavailable
from verl_rlar.sandbox import fusion
from verl_rlar.sandbox.base import BoxLost, End, Job
from verl_rlar.sandbox.fusion import FusionSandbox

JOB = Job(mode="program", source="print(1)", seconds=1.0)
VERIFIER = Job(mode="verifier", source="...", seconds=5.0)
STARTED = "rlar: started\n"


class Scripted(FusionServer):
    """Says of each job what it is told to, as our program on the server would."""

    def __init__(self) -> None:
        super().__init__()
        self.reports: list[dict[str, Any]] = []
        """What to report of the next jobs; the last one is for all that follow."""

    async def _run_here(self, request: dict[str, Any]) -> dict[str, Any]:
        report = self.reports.pop(0) if len(self.reports) > 1 else self.reports[0]
        return answered(request, **report)

    async def _answer(self, method: str, path: str, headers: Any, body: bytes, writer: Any) -> None:
        if method == "POST" and not self.faults:
            request = json.loads(body)
            if probing(request):
                self.faults.append(says_json(answered(request, output="once only\n")))
            elif self.reports:
                self.faults.append(says_json(await self._run_here(request)))
        await super()._answer(method, path, headers, body, writer)


def job_of(request: dict[str, Any]) -> dict[str, Any]:
    job: dict[str, Any] = json.loads(base64.b64decode(request["files"]["job.json"]))
    return job


def probing(request: dict[str, Any]) -> bool:
    return bool(job_of(request)["source"] == fusion.PROBE.source)


def answered(request: dict[str, Any], *, run: Any = None, files: Any = None, **report: Any) -> dict[str, Any]:
    """A whole answer of the server with our program's report in it."""
    whole = {"secret": request["stdin"], "end": "done", "asks": [], "seconds": 0.1, "exit_code": 0}
    content = json.dumps({**whole, "output": "", "errors": "", **report}).encode()
    finished = {"status": "Finished", "return_code": 0, "execution_time": -5, "stdout": STARTED, "stderr": ""}
    return {
        "status": "Success",
        "message": "",
        "run_result": finished if run is None else run,
        "files": {"result.json": base64.b64encode(content).decode()} if files is None else files,
    }


def ended(**run: Any) -> Fault:
    """The server's answer about a program of which nothing came back."""
    result = {"status": "Finished", "return_code": 0, "stdout": STARTED, "stderr": "", "execution_time": 1.0, **run}
    return says_json({"status": "Failed", "message": "", "run_result": result, "files": {}})


@asynccontextmanager
async def entered(server: FusionServer, **settings: Any) -> AsyncIterator[FusionSandbox]:
    async with FusionSandbox(SandboxConfig(backend="sandbox_fusion", fusion_url=server.url, **settings)) as sandbox:
        server.requests.clear()
        server.headers.clear()
        yield sandbox


@pytest.fixture
async def server() -> AsyncIterator[Scripted]:
    async with Scripted() as server:
        server.reports = [{"output": "1\n"}]
        yield server


@pytest.fixture
async def sandbox(server: Scripted) -> AsyncIterator[FusionSandbox]:
    async with entered(server, queue_timeout_s=60.0) as sandbox:
        yield sandbox


async def test_result_with_the_secret_counts_and_nothing_else_that_the_server_says(
    server: Scripted, sandbox: FusionSandbox
) -> None:
    lies = {"status": "Finished", "return_code": None, "execution_time": 1e9, "stdout": "", "stderr": "[DecodeError]"}
    server.reports = [{"output": "1\n", "errors": "e", "exit_code": 3, "seconds": 0.0, "run": lies}]
    ran = await sandbox.run(JOB)
    assert (ran.end, ran.exit_code, ran.stdout, ran.stderr, ran.seconds) == (End.DONE, 3, "1\n", "e", 0.0)


async def test_no_code_is_made_of_texts(server: Scripted, sandbox: FusionSandbox) -> None:
    first, second = "'''\\\n\"\"\" + __import__('os')", "\ud800\0"
    await sandbox.run(Job(mode="program", source=first, stdin=second, seconds=1))
    await sandbox.run(JOB)
    one, two = server.requests
    assert one["code"] == two["code"] and one["code"].isascii() and one["language"] == "python"
    assert (job_of(one)["source"], job_of(one)["stdin"]) == (first, second)
    assert one["stdin"] != two["stdin"] and len(one["stdin"]) == 32, "a secret for each request"


@pytest.mark.parametrize(
    "fault",
    [
        says("500 Internal Server Error"),
        says("502 Bad Gateway", b"<html>", "text/html"),
        says("503 Service Unavailable"),
        says("504 Gateway Timeout"),
        says("204 No Content"),
        says("200 OK", b'{"status": "Suc'),
        says("200 OK", b"[" * 100_000),
        says("200 OK", b"<html>", "text/html"),
        says("200 OK", b"[]"),
        says_json({}),
        says_json(None),
        says_json({"status": "Success", "message": ""}),
        says_json({"status": "Success", "message": "", "run_result": None, "files": {}}),
        says_json({"status": "Success", "run_result": {}}),
        says_json({"status": "Success", "run_result": {"status": "Finished", "return_code": 0}, "files": None}),
        says_json({"status": "SandboxError", "message": "no space left", "run_result": None}),
        says_json({"status": "Fine", "run_result": {"status": "Finished", "return_code": 0, "stdout": STARTED}}),
        ended(stdout="", return_code=1, stderr="bash: python: command not found"),
        ended(stdout="", status="TimeLimitExceeded", return_code=None),
        ended(stdout=None, status="Error"),
        truncated(),
        floods("text/html"),
    ],
)
async def test_fault_of_the_server_is_no_result(server: Scripted, sandbox: FusionSandbox, fault: Fault) -> None:
    server.faults.append(fault)
    with pytest.raises(BoxLost):
        await sandbox.run(JOB)
    assert (await sandbox.run(JOB)).stdout == "1\n"


async def test_status_sandbox_error_is_no_result_even_with_one(server: Scripted, sandbox: FusionSandbox) -> None:
    server.reports = [{"output": "1\n"}]
    request = {"stdin": "unknown"}
    server.faults.append(says_json({**answered(request), "status": "SandboxError", "message": "oh"}))
    with pytest.raises(BoxLost, match="oh"):
        await sandbox.run(JOB)


@pytest.mark.parametrize(
    ("fault", "end", "code"),
    [
        (ended(status="TimeLimitExceeded", return_code=None), End.TIMEOUT, None),
        (ended(return_code=-9), End.KILLED, -9),
        (ended(return_code=137), End.KILLED, 137),
        (ended(return_code=None), End.KILLED, None),
        (ended(return_code=0), End.KILLED, 0),
        (ended(return_code="0"), End.KILLED, None),
        (ended(status="Splendid"), End.KILLED, 0),
        (floods(), End.FLOODED, None),
    ],
)
async def test_job_that_took_its_report_away_has_failed(
    server: Scripted, sandbox: FusionSandbox, fault: Fault, end: End, code: int | None
) -> None:
    server.faults.append(fault)
    ran = await sandbox.run(JOB)
    assert (ran.end, ran.exit_code, ran.stdout) == (end, code, "")
    assert ran.seconds < 60


@pytest.mark.parametrize(
    "forge",
    [
        {"secret": "0" * 32},
        {"secret": None},
        {"secret": "\ud800"},
        {"end": "wonderful"},
        {"exit_code": []} | {"asks": 3},
        {"seconds": "soon"},
        {"files": {"result.json": "no base64!"}},
        {"files": {"result.json": 5}},
        {"files": {"result.json": base64.b64encode(b"[" * 100_000).decode()}},
        {"files": {"other.json": ""}},
    ],
)
async def test_report_that_is_not_our_programs_is_none(
    server: Scripted, sandbox: FusionSandbox, forge: dict[str, Any]
) -> None:
    server.reports = [{"output": "1\n", **forge}]
    ran = await sandbox.run(JOB)
    assert (ran.end, ran.stdout) == (End.KILLED, "")


async def test_answers_that_no_harness_writes_are_noticed(server: Scripted, sandbox: FusionSandbox) -> None:
    server.reports = [{"output": '{"value": NaN, "reason": ""}\n'}, {"output": '{"value": 1, "reason": ""}\n' * 2}]
    for _ in range(2):
        assert (await sandbox.run(VERIFIER)).forged


async def test_done_without_all_answers_is_killed(server: Scripted, sandbox: FusionSandbox) -> None:
    server.reports = [{"output": '{"value": 1}\n'}]
    ran = await sandbox.run(Job(mode="calls", source="", calls=(1, 2), seconds=1))
    assert (ran.end, ran.answers) == (End.KILLED, ({"value": 1},))


@pytest.mark.parametrize("code", ["400 Bad Request", "401 Unauthorized", "404 Not Found", "413 Too Large", "302 Found"])
async def test_refusal_is_told_with_what_the_server_says(server: Scripted, sandbox: FusionSandbox, code: str) -> None:
    server.faults.append(says(code, b'{"detail": "because"}'))
    with pytest.raises(ToolUnavailable, match=f"HTTP {code[:3]}.*because"):
        await sandbox.run(JOB)


async def test_server_that_hangs_is_left(server: Scripted, sandbox: FusionSandbox, monkeypatch: Any) -> None:
    monkeypatch.setattr(fusion, "START_S", 0.2)
    monkeypatch.setattr(fusion, "HTTP_S", 0.3)
    server.faults.append(hangs())
    start = time.monotonic()
    with pytest.raises(BoxLost, match=r"did not answer within 1\.5 s"):
        await sandbox.run(JOB)
    assert time.monotonic() - start < 60


async def test_server_that_is_gone_is_told(server: Scripted, sandbox: FusionSandbox) -> None:
    await server.__aexit__(None, None, None)
    with pytest.raises(BoxLost, match="ConnectError"):
        await sandbox.run(JOB)


@pytest.mark.parametrize(
    "busy",
    [
        says("429 Too Many Requests", Retry_After="0"),
        says("429 Too Many Requests"),
        says("503 Service Unavailable", Retry_After="1"),
        says("503 Service Unavailable", Retry_After="Wed, 21 Oct 2026 07:28:00 GMT"),
    ],
)
async def test_busy_server_is_waited_for(server: Scripted, sandbox: FusionSandbox, busy: Fault) -> None:
    server.faults.append(busy)
    ran = await sandbox.run(JOB)
    assert ran.stdout == "1\n" and len(server.requests) == 2 and ran.queued >= 0


async def test_waiting_for_a_busy_server_has_an_end(server: Scripted) -> None:
    async with entered(server, queue_timeout_s=9.0) as sandbox:
        server.faults.extend([says("503 Service Unavailable", Retry_After="0")] * 3)
        assert (await sandbox.run(JOB)).stdout == "1\n"
        server.faults.append(says("429 Too Many Requests", Retry_After="99999999999"))
        with pytest.raises(ToolTimeout, match="queue_timeout_s"):
            await sandbox.run(JOB)


async def test_requests_at_work_are_limited(server: Scripted) -> None:
    async def slowly(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.1)
        writer.write(http("500 No"))

    async with entered(server, program_boxes=3) as sandbox:
        server.most_at_work = 0
        server.faults.extend([slowly] * 10)
        await asyncio.gather(*(sandbox.run(JOB) for _ in range(10)), return_exceptions=True)
        assert server.most_at_work == 3


async def test_waiting_for_a_slot_has_an_end(server: Scripted) -> None:
    async with entered(server, program_boxes=1, queue_timeout_s=0.3) as sandbox:
        server.faults.append(hangs())
        first = asyncio.ensure_future(sandbox.run(JOB))
        await asyncio.sleep(0.1)
        with pytest.raises(ToolTimeout, match="program_boxes"):
            await sandbox.run(JOB)
    with pytest.raises(BoxLost, match="closed"):
        await first


async def test_abandoned_job_gives_its_slot_back(server: Scripted) -> None:
    there = asyncio.Event()

    async def hanging(writer: asyncio.StreamWriter) -> None:
        there.set()
        await hangs()(writer)

    async with entered(server, program_boxes=1) as sandbox:
        server.faults.append(hanging)
        first = asyncio.ensure_future(sandbox.run(JOB))
        await there.wait()
        first.cancel()
        assert (await sandbox.run(JOB)).stdout == "1\n"
        with pytest.raises(asyncio.CancelledError):
            await first
    with pytest.raises(BoxLost, match="closed"):
        await sandbox.run(JOB)


# --- Verifiers that ask -----------------------------------------------------------------------------------------------


def asking(*questions: Any, **report: Any) -> dict[str, Any]:
    return {"end": "asks", "asks": [json.dumps({"ask": question}) for question in questions], **report}


async def echo(ask: Mapping[str, Any], left: float) -> Any:
    return {"echo": ask["n"]}


async def test_verifier_that_asks_is_run_again_with_all_replies(server: Scripted, sandbox: FusionSandbox) -> None:
    last = {**asking({"n": 1}, {"n": 2}), "end": "done", "output": '{"value": 0.5, "reason": ""}\n', "seconds": 0.0}
    server.reports = [asking({"n": 1}, seconds=0.0), asking({"n": 1}, {"n": 2}, seconds=0.0), last]
    ran = await sandbox.run(VERIFIER, echo)
    assert ran.answers == ({"value": 0.5, "reason": ""},)
    replies = [base64.b64decode(request["files"]["replies.jsonl"]).decode() for request in server.requests]
    assert replies == ["", '{"echo": 1}\n', '{"echo": 1}\n{"echo": 2}\n']
    assert all(0 < job_of(request)["seconds"] <= 5 for request in server.requests)


async def test_verifier_that_asks_something_else_next_time_is_not_deterministic(
    server: Scripted, sandbox: FusionSandbox
) -> None:
    for second in (asking({"n": 3}, {"n": 4}), {"end": "done", "output": '{"value": 1.0, "reason": ""}\n'}):
        server.reports = [asking({"n": 1}), second]
        ran = await sandbox.run(VERIFIER, echo)
        assert "deterministic" in ran.answers[0]["error"]


async def test_verifier_that_ends_early_in_a_later_round_is_not_called_changeable(
    server: Scripted, sandbox: FusionSandbox
) -> None:
    server.reports = [asking({"n": 1}), asking({"n": 1}, {"n": 2}), {**asking({"n": 1}), "end": "killed"}]
    ran = await sandbox.run(VERIFIER, echo)
    assert (ran.end, ran.answers) == (End.KILLED, ())


async def test_questions_are_limited(server: Scripted, sandbox: FusionSandbox) -> None:
    server.reports = [asking(*({"n": n} for n in range(count + 1)), seconds=0.0) for count in range(100)]
    ran = await sandbox.run(VERIFIER, echo)
    assert "64 questions" in ran.answers[0]["error"] and len(server.requests) == 65


async def test_all_rounds_together_have_the_jobs_seconds(server: Scripted, sandbox: FusionSandbox) -> None:
    async def slow(ask: Mapping[str, Any], left: float) -> Any:
        await asyncio.sleep(0.9)

    server.reports = [asking(*({"n": n} for n in range(count + 1)), seconds=0.0) for count in range(100)]
    ran = await sandbox.run(Job(mode="verifier", source="...", seconds=3.0), slow)
    assert ran.end is End.TIMEOUT and 2 <= len(server.requests) <= 4
    assert 2.9 < ran.seconds < 20


async def test_question_is_answered_without_holding_a_slot(server: Scripted) -> None:
    async with entered(server, program_boxes=1, queue_timeout_s=1.0) as sandbox:

        async def answer(ask: Mapping[str, Any], left: float) -> Any:
            server.reports.insert(0, {"output": "inner"})
            return (await sandbox.run(JOB)).stdout

        last = {**asking({"n": 1}), "end": "done", "output": '{"value": 1, "reason": ""}\n'}
        server.reports = [asking({"n": 1}), last]
        assert (await sandbox.run(VERIFIER, answer)).answers == ({"value": 1, "reason": ""},)


# --- Entering ---------------------------------------------------------------------------------------------------------


async def test_address_may_be_verls_with_the_path(server: Scripted) -> None:
    async with FusionSandbox(SandboxConfig(fusion_url=server.url + "/run_code")) as sandbox:
        assert (await sandbox.run(JOB)).stdout == "1\n"


@pytest.mark.parametrize("url", [None, "", "localhost:8080", "unix:///x"])
def test_address_that_is_none_is_a_wrong_setting(url: str | None) -> None:
    with pytest.raises(ConfigError, match=r"rlar\.sandbox\.fusion_url"):
        FusionSandbox(SandboxConfig(fusion_url=url))


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "http://[::1", "http://\ud800", "http://host.invalid"])
async def test_server_that_is_not_there_is_told_with_ways_out(url: str) -> None:
    with pytest.raises(ToolUnavailable, match=r"rlar\.sandbox\.fusion_url"):
        async with FusionSandbox(SandboxConfig(fusion_url=url)):
            pass


@pytest.mark.parametrize(
    "fault",
    [
        says("404 Not Found"),
        says("500 Internal Server Error"),
        ended(stdout="", return_code=127, stderr="python: command not found"),
        says_json(
            {"status": "Success", "run_result": {"status": "Finished", "return_code": 0, "stdout": "once only\n"}}
        ),
    ],
)
async def test_server_that_cannot_run_a_trial_program_is_refused(fault: Fault) -> None:
    async with FusionServer() as server:
        server.faults.append(fault)
        with pytest.raises(ToolUnavailable, match=r"run_code|fusion_url"):
            async with entered(server):
                pass


async def test_server_that_is_another_one_is_refused() -> None:
    async with FusionServer() as server:
        server.ping = says("404 Not Found")
        with pytest.raises(ToolUnavailable, match=r"v1/ping answered HTTP 404"):
            async with entered(server):
                pass


async def test_token_is_sent_by_the_name_of_its_variable(
    server: Scripted, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigError, match="RLAR_TEST_TOKEN is not set"):
        FusionSandbox(SandboxConfig(fusion_url=server.url, fusion_token_env="RLAR_TEST_TOKEN"))
    monkeypatch.setenv("RLAR_TEST_TOKEN", "s3cret")
    with caplog.at_level(logging.INFO):
        async with entered(server, fusion_token_env="RLAR_TEST_TOKEN") as sandbox:
            await sandbox.run(JOB)
    assert [headers["authorization"] for headers in server.headers] == ["Bearer s3cret"]
    assert "s3cret" not in caplog.text


async def test_missing_isolation_is_warned_of(server: Scripted, caplog: pytest.LogCaptureFixture) -> None:
    async with entered(server):
        pass
    assert "isolation: none" in caplog.text
