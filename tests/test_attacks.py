# SPDX-License-Identifier: Apache-2.0
"""The attack suite: nothing in `attacks` earns a reward, holds anybody up, or outlives its call, on either back-end.

After each attack four things are asserted: its score is not above 0; it ended in its time, and the event loop was not
held up meanwhile; the next honest call on the same boxes has the full score; no process, file or box is left over.
Then each cheat meets the naive grader that lacks the defence in question, and must deceive it, and probes of a box's
walls meet a container that lacks one: an attack that works nowhere would prove nothing.

All of it runs in containers without a network, the naive graders too.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import pytest_asyncio
from attacks import (
    CHEATS,
    FORMS,
    GRADERS,
    HONEST,
    HONEST_VERIFIER,
    JOBS,
    OPEN,
    ROWS,
    SAY,
    SLOW,
    TRY,
    VERIFIERS,
    WRONG,
    Attack,
    Cheat,
    Verifier,
)
from conftest import make_query, make_sample
from fusion_server import back_end

from verl_rlar.config import SandboxConfig, ScoringConfig
from verl_rlar.errors import ToolError
from verl_rlar.sandbox.base import GRACE_S, BoxLost, End, Job, Ran, Sandbox
from verl_rlar.sandbox.docker import LABEL, OWNER_LABEL, DockerSandbox, _owner
from verl_rlar.sandbox.fusion import START_S
from verl_rlar.sandbox.hardening import container_options
from verl_rlar.scoring import Scorer
from verl_rlar.tools.rules.code import unit_tests, unit_tests_partial
from verl_rlar.tools.verifier import verify
from verl_rlar.types import Kind, Outcome, Route, RoutePart, Sample, Snapshot, ToolSpec, Verdict

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

BOXES = 3
PROGRAM_S, VERIFIER_S = 1.5, 4.0
PATIENT_S = 10.0
"""What a program has that ends by itself, on a busy machine, in seconds."""
SLACK_S = 8.0
"""What a busy machine may add to any time, in seconds; a deadline that does not hold is missed by far more."""
HELD_UP_S = 3.0
"""How long the event loop may be kept at work by one thing, in seconds of its thread's processor time: a machine that
stands still holds it up, too. What the attacks aim at is a minute."""

NO_WALLS = "a server that isolates nothing: a job can end the server's own processes (BoxLost)"
KNOWN: dict[str, dict[str, str]] = {
    "docker": {},
    "sandbox_fusion": {
        "every_descriptor": f"{NO_WALLS}, or write into their pipes",
        "signal_to_all": NO_WALLS,
    },
}
"""By back-end, the attacks that it does not withstand, and why. Each must fail until it is taken out of here."""


# --- Back-ends --------------------------------------------------------------------------------------------------------


def own_boxes(engine: Any) -> int:
    """Number of containers that this process has."""
    import os

    labels = [LABEL, f"{OWNER_LABEL}={_owner(os.getpid())}"]
    return len(engine.containers.list(all=True, filters={"label": labels}, ignore_removed=True))


@pytest.fixture(scope="module")
def settings(box_image: str, sandbox_config: SandboxConfig) -> SandboxConfig:
    sizes = {"program_boxes": BOXES, "verifier_boxes": 2, "spare_boxes": 0, "memory_mb": 256, "tmp_mb": 32}
    return sandbox_config.model_copy(update={**sizes, "program_timeout_s": PROGRAM_S, "queue_timeout_s": 60.0})


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def boxes(engine: Any, settings: SandboxConfig) -> AsyncIterator[DockerSandbox]:
    before = own_boxes(engine)
    async with DockerSandbox(settings) as sandbox:
        yield sandbox
    assert own_boxes(engine) == before, "the suite left boxes behind"


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["docker", "sandbox_fusion"])
async def backend(
    request: pytest.FixtureRequest, boxes: DockerSandbox, settings: SandboxConfig
) -> AsyncIterator[Sandbox]:
    async with back_end(request.param, boxes, settings) as sandbox:
        yield sandbox


@pytest.fixture
def sandbox(request: pytest.FixtureRequest, backend: Sandbox) -> Iterator[Sandbox]:
    attack = request.node.callspec.id.partition("-")[2]
    name = "docker" if isinstance(backend, DockerSandbox) else "sandbox_fusion"
    if reason := KNOWN[name].get(attack):
        request.applymarker(pytest.mark.xfail(strict=True, reason=reason, raises=(AssertionError, BoxLost)))
    yield backend


# --- What is asserted after each attack -------------------------------------------------------------------------------


@asynccontextmanager
async def watched(seconds: float) -> AsyncIterator[None]:
    """Asserts that what is done here takes no longer, and does not hold the event loop up."""
    held_up = stood_still = 0.0

    async def tick() -> None:
        nonlocal held_up, stood_still
        while True:
            before, begun = time.thread_time(), time.monotonic()
            await asyncio.sleep(0.02)
            held_up = max(held_up, time.thread_time() - before)
            stood_still = max(stood_still, time.monotonic() - begun)

    ticking, begun = asyncio.ensure_future(tick()), time.monotonic()
    yield
    took = time.monotonic() - begun
    await asyncio.sleep(0.05)  # so that a last tick is counted
    ticking.cancel()
    assert took < seconds + SLACK_S, f"it took {took:.1f} s"
    assert held_up < HELD_UP_S, f"the event loop was kept at work for {held_up:.1f} s"
    assert stood_still < SLACK_S, f"the event loop stood still for {stood_still:.1f} s"


LEFT_OVER = """
import os
own = {str(os.getpid()), "1"}
print(sorted(set(filter(str.isdigit, os.listdir("/proc"))) - own), os.listdir("/tmp"), os.listdir("/dev/shm"))
print([oct(os.stat(folder).st_mode & 0o700) for folder in ("/tmp", "/dev/shm")], os.getcwd())
print(len(os.listdir("/proc/self/fd")))
"""


def patient(settings: SandboxConfig) -> SandboxConfig:
    """Settings for programs that end by themselves."""
    return settings.model_copy(update={"program_timeout_s": PATIENT_S})


async def unharmed(sandbox: Sandbox, settings: SandboxConfig) -> None:
    """Asserts that an honest response has the full score, and that each box is as it was."""
    verdict = await unit_tests(sample_of(HONEST, "check"), sandbox, patient(settings))
    assert verdict.value == 1.0, verdict
    if isinstance(sandbox, DockerSandbox):
        job = Job(mode="program", source=LEFT_OVER, seconds=10)
        for ran in await asyncio.gather(*(sandbox.run(job) for _ in range(BOXES))):
            assert ran.stdout == "[] [] []\n['0o700', '0o700'] /tmp\n4\n", ran
        assert sandbox.boxes <= BOXES + 2


def sample_of(program: str, form: str) -> Sample:
    response = program if "```" in program or form == "as it is" else f"```python\n{program}\n```"
    prompt = "Write a function `answer(x)`, or a program that reads x and prints its answer."
    return make_sample(response, make_query(prompt, None, **FORMS.get(form, {})))


# --- Cheats against unit tests ----------------------------------------------------------------------------------------


async def test_honest_program_passes_all_forms(backend: Sandbox, settings: SandboxConfig) -> None:
    settings = patient(settings)
    for form in FORMS:
        assert (await unit_tests(sample_of(HONEST, form), backend, settings)).value == 1.0, form
        assert (await unit_tests(sample_of(WRONG, form), backend, settings)).value == 0.0, form


@pytest.mark.parametrize("cheat", CHEATS, ids=lambda cheat: cheat.id)
async def test_cheat_earns_nothing(sandbox: Sandbox, settings: SandboxConfig, cheat: Cheat) -> None:
    docker = isinstance(sandbox, DockerSandbox)
    if docker and cheat.hacked:  # it ends by itself, and must have shown what it is
        settings = patient(settings)
    forms = cheat.forms
    if not docker:  # each job takes half a second there
        forms = tuple(form for form in SLOW if form in forms)[: 2 if cheat.mode <= 8 else 1] or forms[:1]
    for number, form in enumerate(forms):
        sample = make_sample(cheat.response, sample_of("", form).query)
        async with watched(2 * PROGRAM_S + VERIFIER_S + (0 if docker else 3 * START_S)):
            verdict = await unit_tests(sample, sandbox, settings)
        assert verdict.value == 0.0, (form, verdict)
        if cheat.hacked and form != "streams":
            assert verdict.hacked, (form, verdict)
        if docker and number == 0 and cheat.forms != SLOW:
            verdict = await unit_tests_partial(sample, sandbox, settings)
            assert verdict.value == 0.0, (form, verdict)
    await unharmed(sandbox, settings)


HELPER = """
def shift(text, by=5):
    \"\"\"Shifts every letter.\"\"\"
    return "".join(chr((ord(c) - 97 + by) % 26 + 97) for c in text)

def unshift(text):
    \"\"\"Undoes `shift`.\"\"\"
"""
SHIFTS = 'def check(candidate):\n    for text in ("abc", "xyz"):\n        assert candidate(shift(text)) == text\n'


@pytest.mark.parametrize(
    "weaker",
    [
        "def shift(text, by=5): return text\ndef unshift(text): return text",
        "import builtins\nbuiltins.chr = builtins.ord = lambda x: x\nshift = unshift = lambda text, by=5: text",
        "def unshift(text): return text\nclass shift(str):\n    def __new__(cls, text, by=5): return text",
    ],
    ids=["helper", "builtins", "class"],
)
async def test_helper_of_the_tests_is_the_prompts(sandbox: Sandbox, settings: SandboxConfig, weaker: str) -> None:
    settings = patient(settings)
    query = make_query(HELPER, None, test=SHIFTS, entry_point="unshift")
    good = "def unshift(text):\n    return ''.join(chr((ord(c) - 97 - 5) % 26 + 97) for c in text)"
    assert (await unit_tests(make_sample(f"```python\n{good}\n```", query), sandbox, settings)).value == 1.0
    assert (await unit_tests(make_sample(f"```python\n{weaker}\n```", query), sandbox, settings)).value == 0.0


async def test_output_that_takes_a_careless_checker_over_earns_nothing(
    boxes: DockerSandbox, settings: SandboxConfig
) -> None:
    settings = patient(settings)
    checker = "def check(stdin, stdout, expected):\n    return float(eval(stdout) == int(expected))\n"
    query = make_query("Print x * x + 7.", None, tests=FORMS["streams"]["tests"], checker=checker)
    assert (await unit_tests(make_sample(f"```python\n{HONEST}```", query), boxes, settings)).value == 1.0
    line = '\'{"value": 1.0, "reason": ""}\\n\''
    cheat = "print(" + repr(f"__import__('os').write(3, {line}.encode())") + ")"
    verdict = await unit_tests(make_sample(f"```python\n{cheat}\n```", query), boxes, settings)
    assert (verdict.value, verdict.hacked) == (0.0, True), verdict


@pytest.mark.parametrize("row", ROWS)
async def test_row_without_tests_gives_nothing(boxes: DockerSandbox, settings: SandboxConfig, row: str) -> None:
    query = make_query("Write a function.", None, **ROWS[row])
    for program in (HONEST, WRONG):
        for rule in (unit_tests, unit_tests_partial):
            verdict = await rule(make_sample(f"```python\n{program}\n```", query), boxes, settings)
            assert verdict.value is None, verdict


async def test_what_is_flagged_is_not_rewarded() -> None:
    class Flags:
        async def run(self, spec: ToolSpec, sample: Sample) -> Verdict:
            return Verdict(value=1.0, hacked=True, reason="a cheat, and the best score all the same")

    spec: ToolSpec = unit_tests.spec
    snapshot = Snapshot(tools=(spec,))
    part = RoutePart(tool=spec.name, digest=spec.digest)
    route = Route(parts=(part,), reason="", kind=Kind.UNIT_TESTS, covered=True, snapshot=snapshot.version)
    score = await Scorer(ScoringConfig(), Flags(), Flags()).score(make_sample(), route, snapshot)
    assert (score.value, score.outcome) == (0.0, Outcome.HACKED)


# --- Cheats against an honest verifier, and hostile verifiers ---------------------------------------------------------


def spec_of(name: str, seconds: float = VERIFIER_S) -> ToolSpec:
    import dataclasses

    return dataclasses.replace(unit_tests.spec, name=name, kind="verifier", timeout_s=seconds)


def verified(response: str) -> Sample:
    tests = FORMS["streams"]["tests"]
    cases = list(zip(tests["inputs"], tests["outputs"], strict=True))
    return make_sample(response, make_query("Print x * x + 7.", None, cases=cases))


async def honest_verifier(
    sandbox: Sandbox, settings: SandboxConfig, response: str, seconds: float = VERIFIER_S, program_s: float = PROGRAM_S
) -> Verdict:
    source = HONEST_VERIFIER.replace("SECONDS", str(program_s))
    return await verify(spec_of("honest", seconds), source, verified(response), sandbox, settings)


async def verifier_is_unharmed(sandbox: Sandbox, settings: SandboxConfig) -> bool:
    """Whether an honest verifier gives an honest response its score, if it has time enough."""
    seconds = 3 * PATIENT_S + 4 * START_S  # where each program starts a Python
    verdict = await honest_verifier(sandbox, settings, f"```python\n{HONEST}```", seconds, PATIENT_S)
    return verdict.value == 1.0


@pytest.mark.parametrize(
    "cheat",
    [cheat for cheat in CHEATS if "streams" in cheat.forms and cheat.id not in ("gigabyte", "only_thinking")],
    ids=lambda c: c.id,
)
async def test_cheat_earns_nothing_from_an_honest_verifier(
    sandbox: Sandbox, settings: SandboxConfig, cheat: Cheat
) -> None:
    if not isinstance(sandbox, DockerSandbox) and cheat.mode not in (2, 3, 6, 8):
        pytest.skip("the same as with unit tests there, and slow")
    async with watched(VERIFIER_S + (0 if isinstance(sandbox, DockerSandbox) else 4 * START_S)):
        verdict = await honest_verifier(sandbox, settings, cheat.response)
    assert verdict.value == 0.0, verdict
    assert await verifier_is_unharmed(sandbox, settings)


@pytest.mark.parametrize("verifier", VERIFIERS, ids=lambda verifier: verifier.id)
async def test_hostile_verifier_gets_nothing(sandbox: Sandbox, settings: SandboxConfig, verifier: Verifier) -> None:
    programs = 0

    class Counting:
        async def run(self, job: Job, answer: Any = None) -> Ran:
            nonlocal programs
            programs += job.mode == "program"
            return await sandbox.run(job, answer)

    value: float | None = None
    async with watched(VERIFIER_S + GRACE_S + (0 if isinstance(sandbox, DockerSandbox) else 64.0)):
        try:
            counting: Any = Counting()
            value = (await verify(spec_of(verifier.id), verifier.source, verified("42"), counting, settings)).value
        except ToolError:
            pass
    assert value in ((0.0, None) if verifier.zero else (None,)), value
    assert programs <= verifier.programs
    assert await verifier_is_unharmed(sandbox, settings)
    await unharmed(sandbox, settings)


# --- Escapes and sabotage ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", JOBS, ids=lambda attack: attack.id)
async def test_attack_on_a_box_achieves_nothing(sandbox: Sandbox, settings: SandboxConfig, attack: Attack) -> None:
    job = Job(mode="program", source=TRY + attack.source + SAY, seconds=attack.seconds, output_bytes=1 << 20)
    docker = isinstance(sandbox, DockerSandbox)
    async with watched(attack.seconds + GRACE_S + (0 if docker else START_S)):
        ran = await sandbox.run(job)
    assert ran.end.value in attack.ends, ran
    assert ran.seconds <= attack.seconds + SLACK_S, ran
    assert (
        ran.stdout in ("", "[]\n") if ran.end is not End.FLOODED else len(ran.stdout) <= job.output_bytes + (1 << 17)
    ), ran
    await unharmed(sandbox, settings)


async def test_a_job_has_its_own_pipes_and_nothing_else(sandbox: Sandbox, settings: SandboxConfig) -> None:
    look = "[int(name) for name in os.listdir('/proc/self/fd') if os.path.exists(f'/proc/self/fd/{name}')]"
    source = f"import os\ndef found(*args, **kwargs):\n    return sorted({look})\n"
    ran = await sandbox.run(Job(mode="program", source=source + "print(found())", seconds=5))
    assert ran.stdout == "[0, 1, 2]\n"
    call = {"call": [{"name": "found"}, [], {}]}
    ran = await sandbox.run(Job(mode="calls", source=source, calls=(call,), seconds=5))
    assert ran.answers == ({"value": [0, 1, 2, 3]},)
    inputs = {"prompt": "", "response": "", "reference": None, "extra": {}}
    source += "def score(**inputs):\n    return 0.0, str(found())"
    ran = await sandbox.run(Job(mode="verifier", source=source, inputs=inputs, seconds=5))
    assert ran.answers == ({"value": 0.0, "reason": "[0, 1, 2, 3, 4]"},)


@pytest.mark.parametrize("descriptor", [0, *range(3, 10)])
async def test_job_forges_no_job_for_the_worker(sandbox: Sandbox, settings: SandboxConfig, descriptor: int) -> None:
    """Whoever writes to the worker's standard input decides what becomes of somebody else's program."""
    source = f"""
import json, os, struct
def answer(x):
    job = {{"mode": "program", "source": "print('forged')", "stdin": "", "seconds": 5, "output_bytes": 1000}}
    data = json.dumps(job).encode()
    for way in (lambda: {descriptor}, lambda: os.open("/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK)):
        try: os.write(way(), struct.pack(">I", len(data)) + data)
        except OSError: pass
"""
    call = {"call": [{"name": "answer"}, [3], {}]}
    for mode in ("calls", "program"):
        await sandbox.run(Job(mode=mode, source=source + "answer(3)", calls=(call,), seconds=2))
        for _ in range(BOXES):
            ran = await sandbox.run(Job(mode="program", source="print(input())", stdin="honest", seconds=5))
            assert ran.stdout == "honest\n", ran
    await unharmed(sandbox, settings)


async def test_boxes_that_attack_at_once_see_nothing_of_each_other(
    boxes: DockerSandbox, settings: SandboxConfig
) -> None:
    source = TRY + next(attack.source for attack in JOBS if attack.id == "other_boxes") + SAY
    async with watched(5):
        ran = await asyncio.gather(*(boxes.run(Job(mode="program", source=source, seconds=5)) for _ in range(BOXES)))
    assert [one.stdout for one in ran] == ["[]\n"] * BOXES, ran
    await unharmed(boxes, settings)


async def test_honest_calls_beside_attacks_succeed(boxes: DockerSandbox, settings: SandboxConfig) -> None:
    chosen = ("memory_of_nobody", "shut_folders", "signals_to_worker", "daemons")
    jobs = [attack for attack in JOBS if attack.id in chosen]

    async def attack(number: int) -> None:
        one = jobs[number % len(jobs)]
        await boxes.run(Job(mode="program", source=TRY + one.source + SAY, seconds=one.seconds))

    async def honest() -> None:
        assert (await unit_tests(sample_of(HONEST, "judge"), boxes, patient(settings))).value == 1.0

    await asyncio.gather(*(attack(number) for number in range(8)), *(honest() for _ in range(8)))
    await unharmed(boxes, settings)


# --- The same without the defence -------------------------------------------------------------------------------------

DECEIVED = [(cheat, grader) for cheat in CHEATS for grader in cheat.beats]


@pytest.mark.parametrize(("cheat", "grader"), DECEIVED, ids=lambda one: one if isinstance(one, str) else one.id)
async def test_cheat_deceives_a_grader_without_the_defence(boxes: DockerSandbox, cheat: Cheat, grader: str) -> None:
    async def deceived(program: str) -> bool:
        given = json.dumps({"program": program, "tests": FORMS["check"]["test"]})
        ran = await boxes.run(Job(mode="program", source=GRADERS[grader], stdin=given, seconds=10))
        return ran.end is End.DONE and ran.exit_code == 0

    assert not await deceived(WRONG), "this grader is of no use"
    assert await deceived(cheat.program)


@pytest.mark.parametrize("attack", [attack for attack in JOBS if attack.opened], ids=lambda attack: attack.id)
async def test_attack_succeeds_where_the_wall_is_missing(
    engine: Any, box_image: str, settings: SandboxConfig, attack: Attack
) -> None:
    options = container_options(settings, image=box_image, uid=61235, labels={"verl_rlar.test": "attacks"})
    options |= {"auto_remove": False, "entrypoint": ["python3", "-I", "-c"], **OPEN[attack.opened]}

    def run() -> str:
        container = engine.containers.create(command=[TRY + attack.source + SAY], **options)
        watchdog = threading.Timer(30, container.kill)
        try:
            stream = container.attach(stream=True)
            container.start()
            watchdog.start()
            return b"".join(stream).decode(errors="replace")
        finally:
            watchdog.cancel()
            container.remove(force=True)

    output = await asyncio.to_thread(run)
    assert json.loads(output.splitlines()[-1]), output
