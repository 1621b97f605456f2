# SPDX-License-Identifier: Apache-2.0
"""Life and death of boxes on a real engine, and the tools that use them."""

from __future__ import annotations

import asyncio
import os
import signal
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from typing import Any

import pytest
import pytest_asyncio
from conftest import make_query, make_sample
from docker.errors import APIError

from verl_rlar.config import SandboxConfig
from verl_rlar.errors import ToolError, ToolTimeout, ToolUnavailable
from verl_rlar.sandbox import BoxLost, End, Job
from verl_rlar.sandbox.docker import (
    HOST_LABEL,
    LABEL,
    OWNER_LABEL,
    DockerSandbox,
    _Connection,
    _host,
    _owner,
    _remove,
    box_counts,
    sweep,
)
from verl_rlar.sandbox.hardening import OOM_SCORE_ADJ, container_options
from verl_rlar.tools.boxed import BoxRunner
from verl_rlar.tools.verifier import wrappable
from verl_rlar.types import Kind, Scope, ToolSpec, Verdict

pytestmark = [pytest.mark.docker, pytest.mark.usefixtures("box_image")]

HELLO = Job(mode="program", source="print('hello')", seconds=10.0)


@pytest_asyncio.fixture
async def sandbox(sandbox_config: SandboxConfig) -> AsyncIterator[DockerSandbox]:
    async with DockerSandbox(sandbox_config.model_copy(update={"program_boxes": 1, "verifier_boxes": 1})) as made:
        yield made


def boxes_of(engine: Any, pid: int) -> list[Any]:
    """The containers of a process."""
    mine = {"label": [LABEL, f"{OWNER_LABEL}={_owner(pid)}"]}
    return list(engine.containers.list(all=True, filters=mine, ignore_removed=True))


async def gone(engine: Any, names: set[str]) -> bool:
    """Whether these containers go away."""
    for _ in range(300):
        left = await asyncio.to_thread(engine.containers.list, all=True, ignore_removed=True)
        if not {box.name for box in left} & names:
            return True
        await asyncio.sleep(0.1)
    return False


def running(engine: Any, pid: int | None = None) -> list[Any]:
    """The containers of a process, or ours, that run: not those that are just being started or destroyed."""
    return [box for box in boxes_of(engine, pid or os.getpid()) if box.status == "running"]


def kill_all(boxes: list[Any]) -> None:
    for box in boxes:
        with suppress(APIError):  # it has gone meanwhile
            box.kill()


async def at_work(engine: Any) -> None:
    """Returns when a job computes in one of our boxes."""
    while True:
        for box in running(engine):
            processes: list[list[str]] = []
            with suppress(APIError):  # it has gone meanwhile
                processes = (box.top(ps_args="-eo pid,stat") or {}).get("Processes", [])
            if any("R" in state and "s" not in state for _, state in processes):  # s: the first process of the box
                return
        await asyncio.sleep(0.05)


def passed_on(stream: int, data: bytes) -> bytes:
    """What an engine sends for what a container wrote."""
    return struct.pack(">BxxxI", stream, len(data)) + data


@pytest.mark.parametrize("size", [1, 3, 10, 1000])
async def test_messages_are_whole_however_they_come(size: int) -> None:
    written = b"".join(struct.pack(">I", len(message)) + message for message in (b"first", b"", b"third"))
    data = passed_on(1, written[:7]) + passed_on(2, b"Traceback\nMemoryError\n") + passed_on(1, written[7:])
    connection = _Connection()
    for start in range(0, len(data), size):
        connection.data_received(data[start : start + size])
    assert [await connection.message() for _ in range(3)] == [b"first", b"", b"third"]
    waits = asyncio.ensure_future(connection.message())
    await asyncio.sleep(0)
    connection.eof_received()
    with pytest.raises(BoxLost, match="a box is gone: MemoryError"):
        await waits


async def hello(sandbox: DockerSandbox) -> str:
    return (await sandbox.run(HELLO)).stdout


async def test_the_boxes_of_a_killed_process_go(engine: Any, sandbox_config: SandboxConfig) -> None:
    program = (
        "import asyncio, sys\n"
        "from verl_rlar.config import SandboxConfig\n"
        "from verl_rlar.sandbox.docker import DockerSandbox\n"
        "async def main():\n"
        "    async with DockerSandbox(SandboxConfig.model_validate_json(sys.argv[1])) as sandbox:\n"
        "        print('ready', flush=True)\n"
        "        await asyncio.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    # no more boxes than those that are ready: one that was created and never started would stay, see `orphan`
    config = sandbox_config.model_copy(update={"program_boxes": 1, "verifier_boxes": 1, "spare_boxes": 0})
    owner = subprocess.Popen(
        [sys.executable, "-c", program, config.model_dump_json()], stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    with owner.stdout:
        assert owner.stdout.readline() == "ready\n"
    names = {box.name for box in running(engine, owner.pid)}
    assert len(names) >= 2
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert await gone(engine, names)


@pytest.fixture
def orphan(engine: Any, sandbox_config: SandboxConfig, box_image: str) -> Iterator[Any]:
    """A box whose owner is no more, and which does not know it: it was never started."""
    dead = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    labels = {LABEL: "1", HOST_LABEL: _host(), OWNER_LABEL: _owner(dead.pid)}
    dead.communicate(b"\n")
    made = engine.containers.create(**container_options(sandbox_config, image=box_image, uid=12345, labels=labels))
    yield made
    assert made.id not in {box.id for box in engine.containers.list(all=True, ignore_removed=True)}


async def test_what_a_dead_run_left_is_removed_at_the_next_start_and_no_other_box_is(
    engine: Any, sandbox: DockerSandbox, orphan: Any
) -> None:
    mine = {box.name for box in boxes_of(engine, os.getpid())}
    assert await asyncio.to_thread(sweep, engine) == 1
    assert mine <= {box.name for box in boxes_of(engine, os.getpid())}
    assert await hello(sandbox) == "hello\n"


async def test_a_box_that_somebody_else_is_removing_is_waited_for(engine: Any, sandbox: DockerSandbox) -> None:
    def is_gone(box: Any) -> bool:
        _remove(box)
        return box.name not in {other.name for other in boxes_of(engine, os.getpid())}

    boxes = running(engine)
    assert boxes and all(await asyncio.gather(*(asyncio.to_thread(is_gone, box) for box in 3 * boxes)))


async def test_a_box_that_dies_under_a_job_is_our_fault_and_the_next_job_has_another(
    engine: Any, sandbox: DockerSandbox
) -> None:
    job = asyncio.ensure_future(sandbox.run(Job(mode="program", source="while True: pass", seconds=60.0)))
    await at_work(engine)
    kill_all(running(engine))
    with pytest.raises(BoxLost, match="a box is gone"):
        await job
    assert await hello(sandbox) == "hello\n"


async def test_a_box_that_died_while_idle_is_never_noticed_by_a_job(engine: Any, sandbox: DockerSandbox) -> None:
    assert await hello(sandbox) == "hello\n"
    boxes = running(engine)
    await asyncio.to_thread(kill_all, boxes)  # beside our event loop, as whoever kills them is
    assert boxes and await gone(engine, {box.name for box in boxes})
    assert await hello(sandbox) == "hello\n"


async def test_where_memory_ends_a_job_goes_before_the_first_process_of_its_box(sandbox: DockerSandbox) -> None:
    source = "for who in ('self', 1): print(open(f'/proc/{who}/oom_score_adj').read().strip())"
    for _ in range(2):
        ran = await sandbox.run(Job(mode="program", source=source, seconds=10.0))
        assert ran.stdout.split() == ["1000", str(OOM_SCORE_ADJ)]


SPY = """
import re
found = set()
with open("/proc/self/mem", "rb", 0) as memory:
    for line in open("/proc/self/maps"):
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if " rw" in line:
            try:
                memory.seek(start)
                found |= set(re.findall(b"SIB" + b"LING-[A-Z]+", memory.read(end - start)))
            except (OSError, ValueError):
                pass
print(sorted(found))
"""


@pytest.mark.parametrize("padding", [0, 10, 60, 2000])
async def test_a_program_finds_nothing_of_earlier_ones_in_its_memory(sandbox: DockerSandbox, padding: int) -> None:
    """A job is a fork of the process that has read what earlier jobs are, and what they wrote."""
    source = f"# SIBLING-SOURCE{'x' * 100 * padding}\nprint('SIBLING-' + 'OUTPUT' + input() * {1 + padding})\n"
    for _ in range(3):
        ran = await sandbox.run(Job(mode="program", source=source, stdin="SIBLING-INPUT\n", seconds=10.0))
        assert "SIBLING-OUTPUT" in ran.stdout
        spied = await sandbox.run(Job(mode="program", source=SPY, seconds=10.0))
        assert (spied.stdout, spied.end) == ("[]\n", End.DONE), spied.stderr


async def test_the_box_of_an_abandoned_job_is_destroyed(engine: Any, sandbox: DockerSandbox) -> None:
    names = {box.name for box in boxes_of(engine, os.getpid())}
    job = asyncio.ensure_future(sandbox.run(Job(mode="program", source="while True: pass", seconds=60.0)))
    await at_work(engine)
    job.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job
    assert await hello(sandbox) == "hello\n"
    while names <= {box.name for box in boxes_of(engine, os.getpid())}:
        await asyncio.sleep(0.05)


def test_by_default_programs_have_one_box_more_than_there_are_processors() -> None:
    programs, verifiers = box_counts(SandboxConfig())
    assert programs == verifiers + 1 and verifiers == min(os.cpu_count() or 1, 16)
    assert box_counts(SandboxConfig(program_boxes=5, verifier_boxes=7)) == (5, 7)


async def test_verifiers_never_share_a_box_with_each_other_or_with_a_program(sandbox: DockerSandbox) -> None:
    seen = []
    for job in (
        Job(mode="program", source="import os; print(os.getuid())", seconds=5.0),
        verifier("import os\ndef score(**_): return 0.5, str(os.getuid())"),
        verifier("import os  # another\ndef score(**_): return 0.5, str(os.getuid())"),
    ):
        ran = await sandbox.run(job)
        seen.append(ran.stdout.strip() or ran.answers[0]["reason"])
    assert len(set(seen)) == 3, "each box has a user of its own"


def verifier(source: str) -> Job:
    inputs = {"prompt": "", "response": "", "reference": None, "extra": {}}
    return Job(mode="verifier", source=source, inputs=inputs, seconds=5.0)


# --- The tools --------------------------------------------------------------------------------------------------------


def spec_of(source_sha256: str, timeout_s: float = 60.0, wraps: tuple[str, ...] = ()) -> ToolSpec:
    return ToolSpec(
        name="checker",
        kind="verifier",
        target="score",
        scope=Scope(kinds=frozenset({Kind.SHORT_TEXT})),
        description="A verifier.",
        timeout_s=timeout_s,
        boxed=True,
        wraps=wraps,
        source_sha256=source_sha256,
    )


SOURCES = {
    "same": "def score(prompt, response, reference, extra):\n    return float(response == reference), 'compared'\n",
    "silent": "def score(**_): return None\n",
    "high": "def score(**_): return 1.5\n",
    "broken": "def score(**_): raise KeyError('tests')\n",
    "endless": "def score(**_):\n    while True: pass\n",
    "leaving": "import os\ndef score(**_): os._exit(0)\n",
    "forging": "import os\ndef score(**_):\n    os.write(3, b'1.0\\n')\n    return 1.0\n",
    "running": (
        "import rlar\n"
        "def score(response, extra, **_):\n"
        "    ran = rlar.run_program(response, stdin=extra['stdin'])\n"
        "    return float(ran.end == 'done' and ran.stdout.strip() == '42')\n"
    ),
    "wrapping": (
        "import rlar\n"
        "def score(response, extra, **_):\n"
        "    said = rlar.builtin('final_answer', response, extra.get('other'))\n"
        "    return said.value, said.reason\n"
    ),
    "unnamed": "import rlar\ndef score(**_): return rlar.ask(kind='builtin', name='token_f1', response='')[0]\n",
    "odd": "import rlar\ndef score(**_): return rlar.ask(kind='builtin', name='final_answer', response=1)[0]\n",
    "greedy": ("import rlar\ndef score(**_):\n    for _ in range(1000): rlar.run_program('')\n    return 1.0\n"),
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def runner(sandbox_config: SandboxConfig) -> AsyncIterator[BoxRunner]:
    async with BoxRunner(sandbox_config, SOURCES) as made:
        yield made


async def check(runner: BoxRunner, name: str, response: str = "42", **extra: Any) -> Any:
    return await runner.run(spec_of(name), make_sample(response, make_query(**extra)))


@pytest.mark.asyncio(loop_scope="module")
async def test_a_verifier_scores_a_sample_or_abstains(runner: BoxRunner) -> None:
    right, wrong, silent = [await check(runner, *case) for case in (("same",), ("same", "41"), ("silent",))]
    assert (right.value, right.reason, wrong.value, silent.value) == (1.0, "compared", 0.0, None)


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("high", r"answered 1\.5, which is not in \[0, 1\]"),
        ("broken", "KeyError: 'tests'"),
        ("leaving", r"no answer \(killed\)"),
        ("forging", "cannot have written"),
        ("greedy", "more than 64 programs"),
        ("unknown", "is not in the library"),
    ],
)
async def test_what_is_no_answer_is_the_tools_failure_and_no_score(runner: BoxRunner, name: str, message: str) -> None:
    with pytest.raises(ToolError, match=message):
        await check(runner, name)
    assert (await check(runner, "same")).value == 1.0


@pytest.mark.asyncio(loop_scope="module")
async def test_a_verifier_that_does_not_end_is_a_timeout(runner: BoxRunner) -> None:
    with pytest.raises(ToolTimeout, match=r"still at work after 0\.5 s"):
        await runner.run(spec_of("endless", timeout_s=0.5), make_sample())


@pytest.mark.asyncio(loop_scope="module")
async def test_a_verifier_has_programs_run_elsewhere(runner: BoxRunner) -> None:
    double = "print(int(input()) * 2)"
    assert (await check(runner, "running", double, stdin="21\n")).value == 1.0
    assert (await check(runner, "running", double, stdin="20\n")).value == 0.0
    assert (await check(runner, "running", "import os; os._exit(0)", stdin="21\n")).value == 0.0


@pytest.mark.asyncio(loop_scope="module")
async def test_a_verifier_asks_the_built_in_rules_that_it_wraps(runner: BoxRunner) -> None:
    rule = f"final_answer@{wrappable()['final_answer'].digest}"

    async def ask(name: str, response: str, wraps: str = rule, **extra: Any) -> Verdict:
        spec = spec_of(name, wraps=(wraps,))
        return await runner.run(spec, make_sample(response, make_query(reference="1/2", **extra)))

    right, wrong = await ask("wrapping", r"So it is $\frac{1}{2}$."), await ask("wrapping", "0.6")
    assert (right.value, wrong.value, wrong.reason) == (1.0, 0.0, "'0.6' is not '1/2'")
    assert (await ask("wrapping", "0.6", other="3/5")).value == 1.0
    assert (await ask("wrapping", "0.5", other=r"\sum x")).value is None
    for hostile in ("\\boxed{" * 20_000, "9^" * 300 + "9", "\ud800", "[" * 100_000, ""):
        assert (await ask("wrapping", hostile)).value == 0.0
    for name, message in (("unnamed", "'token_f1' is not named"), ("odd", "response is a text")):
        with pytest.raises(ToolError, match=message):
            await ask(name, "1/2")
    for other in ("final_answer@0123456789abcdef", "gone@0123456789abcdef"):
        with pytest.raises(ToolUnavailable, match=f"it wraps {other}, and this release has another"):
            await ask("wrapping", "1/2", wraps=other)
    with pytest.raises(ToolError, match="'final_answer' is not named"):
        await check(runner, "wrapping")
    assert (await ask("wrapping", "漢" * (1 << 20) + " 1/2")).value == 1.0


async def test_a_sandbox_that_cannot_be_started_says_so_to_every_call() -> None:
    async with BoxRunner(SandboxConfig(backend="none")) as runner:
        for _ in range(2):
            with pytest.raises(ToolUnavailable, match="nowhere to run code"):
                await runner.run(spec_of("same"), make_sample())


async def test_a_call_cannot_outlast_its_deadlines(engine: Any, sandbox_config: SandboxConfig) -> None:
    one = sandbox_config.model_copy(update={"verifier_boxes": 1, "spare_boxes": 0, "queue_timeout_s": 0.2})
    async with BoxRunner(one, SOURCES) as runner:
        first = asyncio.ensure_future(runner.run(spec_of("endless", timeout_s=5.0), make_sample()))
        await at_work(engine)
        with pytest.raises(ToolTimeout, match="no box became free"):
            await runner.run(spec_of("endless", timeout_s=5.0), make_sample())
        with pytest.raises(ToolTimeout, match="still at work after 5 s"):
            await first


async def test_jobs_that_end_badly_leave_the_box_usable(sandbox: DockerSandbox) -> None:
    ends = []
    for source, seconds in (
        ("while True: pass", 0.5),
        ("print('x' * 10**7)", 9),
        ("import os; os.abort()", 9),
        ("1/0", 9),
    ):
        ends.append((await sandbox.run(Job(mode="program", source=source, seconds=seconds))).end)
        assert await hello(sandbox) == "hello\n"
    assert ends == [End.TIMEOUT, End.FLOODED, End.KILLED, End.DONE]
