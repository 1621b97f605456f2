# SPDX-License-Identifier: Apache-2.0
"""What every sandbox promises (`verl_rlar.sandbox.base`), tried on each back-end with real boxes.

A back-end that cannot keep something says so in `KNOWN_FAILURES`, and the test fails once it can.
"""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import time
from collections.abc import AsyncIterator, Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
import pytest_asyncio
from fusion_server import FusionServer, back_end

from verl_rlar.config import SandboxConfig
from verl_rlar.sandbox import reading, values
from verl_rlar.sandbox.base import GRACE_S, Answerer, BoxLost, End, Job, Ran, Sandbox
from verl_rlar.sandbox.docker import LABEL, DockerSandbox
from verl_rlar.sandbox.fusion import FusionSandbox
from verl_rlar.sandbox.inside.verifier_api import READERS

pytestmark = [pytest.mark.docker, pytest.mark.asyncio(loop_scope="module")]

BOXES = 3
SLACK_S = 8.0
"""What a busy machine may add to any time, in seconds; a deadline that does not hold is missed by far more."""

KNOWN_FAILURES: dict[str, dict[str, str]] = {
    "docker": {},
    "sandbox_fusion": {
        "test_program_that_ends_its_watcher_gets_no_better_end[-1]": "a server that isolates nothing can be ended by a "
        "job, which is then BoxLost",
    },
}
"""By back-end, the tests that it fails, and why."""


@pytest.fixture(scope="module")
def settings(box_image: str, sandbox_config: SandboxConfig) -> SandboxConfig:
    return sandbox_config.model_copy(update={"program_boxes": BOXES, "verifier_boxes": 2, "spare_boxes": 0})


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def boxes(settings: SandboxConfig) -> AsyncIterator[DockerSandbox]:
    async with DockerSandbox(settings) as sandbox:
        yield sandbox


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["docker", "sandbox_fusion"])
async def backend(
    request: pytest.FixtureRequest, boxes: DockerSandbox, settings: SandboxConfig
) -> AsyncIterator[Sandbox]:
    async with back_end(request.param, boxes, settings) as sandbox:
        yield sandbox


@pytest.fixture
def sandbox(request: pytest.FixtureRequest, backend: Sandbox) -> Sandbox:
    name = "docker" if isinstance(backend, DockerSandbox) else "sandbox_fusion"
    test = request.node.name.replace(f"[{name}]", "").replace(f"[{name}-", "[")
    if reason := KNOWN_FAILURES[name].get(test):
        request.applymarker(pytest.mark.xfail(strict=True, reason=reason))
    return backend


async def program(sandbox: Sandbox, source: str, stdin: str = "", seconds: float = 10.0, **fields: Any) -> Ran:
    return await sandbox.run(Job(mode="program", source=source, stdin=stdin, seconds=seconds, **fields))


def call(name: str, *args: Any) -> Any:
    return {"call": [{"name": name}, [values.encode(arg) for arg in args], {}]}


async def calls(sandbox: Sandbox, source: str, *expressions: Any, seconds: float = 10.0, **fields: Any) -> Ran:
    return await sandbox.run(Job(mode="calls", source=source, calls=expressions, seconds=seconds, **fields))


async def verify(
    sandbox: Sandbox, source: str, answer: Answerer | None = None, seconds: float = 10.0, **extra: Any
) -> Ran:
    inputs = {"prompt": "?", "response": "42", "reference": None, "extra": extra}
    return await sandbox.run(Job(mode="verifier", source=source, inputs=inputs, seconds=seconds), answer)


def scoring(expression: str) -> str:
    return f"def score(prompt, response, reference, extra):\n    return {expression}\n"


# --- Programs ---------------------------------------------------------------------------------------------------------


async def test_program_reads_and_writes_as_under_python(sandbox: Sandbox) -> None:
    ran = await program(sandbox, "import sys\nprint(input(), sys.argv)\nprint('oh', file=sys.stderr)", "in\nmore")
    assert (ran.end, ran.exit_code, ran.stdout, ran.stderr) == (End.DONE, 0, "in ['program.py']\n", "oh\n")
    assert 0 < ran.seconds < 10


@pytest.mark.parametrize(
    "read", ["sys.stdin.read()", "sys.stdin.buffer.read().decode()", "open('/dev/stdin').read()", "open(0).read()"]
)
async def test_all_ways_to_read_standard_input_work(sandbox: Sandbox, read: str) -> None:
    ran = await program(sandbox, f"import sys\nprint(repr({read}))", "a\nß\n")
    assert ran.stdout == "'a\\nß\\n'\n", ran


async def test_empty_standard_input_ends_at_once(sandbox: Sandbox) -> None:
    ran = await program(sandbox, "try:\n    input()\nexcept EOFError:\n    print('end')")
    assert ran.stdout == "end\n"


async def test_standard_input_of_a_megabyte_arrives_whole(sandbox: Sandbox) -> None:
    ran = await program(sandbox, "import sys; print(sum(map(int, sys.stdin.read().split())))", "1000 " * 220_000)
    assert ran.stdout == "220000000\n"


async def test_output_of_700_kilobytes_arrives_whole(sandbox: Sandbox) -> None:
    ran = await program(sandbox, "for i in range(100_000): print(100_000 + i)")
    assert ran.end is End.DONE and ran.stdout.split() == [str(100_000 + i) for i in range(100_000)]


async def test_text_of_all_kinds_passes_through(sandbox: Sandbox) -> None:
    text = "ß 漢 🙂 \u202e \x00 \x1b[0m \u2028 é"
    ran = await program(sandbox, f"text = {text.replace(chr(0), '')!r}\nprint(input() + text)", text)
    assert ran.stdout == text + text.replace("\0", "") + "\n"


async def test_lone_surrogates_are_no_fault_of_ours(sandbox: Sandbox) -> None:
    ran = await program(sandbox, "print(len(input()) > 1)", "\ud800x")
    assert (ran.end, ran.stdout) == (End.DONE, "True\n")
    ran = await program(sandbox, "print('\ud800')")
    assert ran.end is End.DONE and ran.exit_code == 1
    ran = await program(sandbox, r"print('\ud800')")
    assert ran.end is End.DONE


async def test_binary_output_is_replaced_where_it_is_no_text(sandbox: Sandbox) -> None:
    ran = await program(sandbox, r"import sys; sys.stdout.buffer.write(b'a\xff\x00z')")
    assert ran.stdout == "a\ufffd\0z"


@pytest.mark.parametrize(
    ("last", "code", "said"),
    [
        ("sys.exit()", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("sys.exit('why')", 1, "why\n"),
        ("sys.exit(-1)", 255, ""),
        ("exit(True)", 1, ""),
        ("os._exit(7)", 7, ""),
        ("raise SystemExit(2)", 2, ""),
    ],
)
async def test_exit_codes_are_pythons(sandbox: Sandbox, last: str, code: int, said: str) -> None:
    ran = await program(sandbox, f"import os, sys\n{last}")
    assert (ran.end, ran.exit_code, ran.stderr) == (End.DONE, code, said)


async def test_exception_shows_its_traceback_and_keeps_the_output(sandbox: Sandbox) -> None:
    ran = await program(sandbox, "print('before')\ndef f():\n    return 1 / 0\nf()")
    assert (ran.end, ran.exit_code, ran.stdout) == (End.DONE, 1, "before\n")
    assert "line 3" in ran.stderr and ran.stderr.endswith("ZeroDivisionError: division by zero\n")


async def test_syntax_error_is_a_result(sandbox: Sandbox) -> None:
    ran = await program(sandbox, "print('x'")
    assert (ran.end, ran.exit_code) == (End.DONE, 1) and "SyntaxError" in ran.stderr


async def test_threads_are_joined_and_exit_functions_run(sandbox: Sandbox) -> None:
    source = """
import atexit, threading, time
atexit.register(print, "exit")
threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
print("main")
"""
    assert (await program(sandbox, source)).stdout == "main\nthread\nexit\n"


async def test_module_is_main(sandbox: Sandbox) -> None:
    source = """
import pickle, dataclasses
@dataclasses.dataclass
class Point:
    x: int
if __name__ == "__main__":
    print(pickle.loads(pickle.dumps(Point(3))))
"""
    assert (await program(sandbox, source)).stdout == "Point(x=3)\n"


async def test_recursion_without_end_is_an_exception(sandbox: Sandbox) -> None:
    ran = await program(sandbox, "def f(): return f()\nf()")
    assert (ran.end, ran.exit_code) == (End.DONE, 1) and "RecursionError" in ran.stderr


async def test_output_before_the_deadline_is_kept(sandbox: Sandbox) -> None:
    ran = await program(sandbox, "print('partial', flush=True)\nwhile True: pass", seconds=1)
    assert (ran.end, ran.exit_code, ran.stdout) == (End.TIMEOUT, None, "partial\n")


async def test_deadline_holds_against_a_program_that_catches_everything(sandbox: Sandbox) -> None:
    source = """
import signal, time
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except Exception: pass
while True:
    try: time.sleep(60)
    except BaseException: pass
"""
    start = time.monotonic()
    ran = await program(sandbox, source, seconds=1)
    assert ran.end is End.TIMEOUT
    assert time.monotonic() - start - ran.queued < 1 + GRACE_S + SLACK_S


async def test_flooding_is_stopped(sandbox: Sandbox) -> None:
    ran = await program(sandbox, "while True: print('x' * 1000)", output_bytes=100_000)
    assert ran.end is End.FLOODED and len(ran.stdout) < 400_000
    ran = await program(sandbox, "import sys\nwhile True: print('x' * 1000, file=sys.stderr)", output_bytes=100_000)
    assert ran.end is End.FLOODED and len(ran.stderr) < 100_000


async def test_death_by_signal_is_told(sandbox: Sandbox) -> None:
    ran = await program(sandbox, "import os\nprint('x', flush=True)\nos.kill(os.getpid(), 11)")
    assert (ran.end, ran.exit_code, ran.stdout) == (End.KILLED, -11, "x\n")


async def test_program_that_takes_all_memory_is_killed_and_no_fault_of_ours(sandbox: Sandbox) -> None:
    ran = await program(sandbox, "kept = []\nwhile True: kept.append(b'x' * (16 << 20))", seconds=20)
    assert ran.end is End.KILLED
    assert (await program(sandbox, "print('next')")).stdout == "next\n"


async def test_fork_bomb_ends_with_its_job(sandbox: Sandbox) -> None:
    source = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    assert (await program(sandbox, source, seconds=1)).end is End.TIMEOUT
    for _ in range(BOXES):
        assert (await program(sandbox, "print('next')")).stdout == "next\n"


async def test_programs_own_children_work(sandbox: Sandbox) -> None:
    ran = await program(
        sandbox, "import os\nif not os.fork(): os._exit(3)\nprint(os.waitstatus_to_exitcode(os.wait()[1]))"
    )
    assert ran.stdout == "3\n"


LEFT = """
import os, time
ready, done = os.pipe()
if not os.fork():
    os.setsid()
    if not os.fork():
        open("/proc/self/comm", "w").write("leftover")
        for name in {"/tmp/leftover", os.path.abspath("leftover")}:
            os.makedirs(name, exist_ok=True)
            open(name + "/file", "w").close()
            os.chmod(name, 0)
        os.write(done, b"!")
        time.sleep(600)
    os._exit(0)
os.read(ready, 1)
print(*[open(f"/proc/{pid}/comm").read() for pid in os.listdir("/proc") if pid.isdigit()])
"""
SEEN = """
import os
for pid in os.listdir("/proc"):
    if pid.isdigit():
        try: print(open(f"/proc/{pid}/comm").read())
        except OSError: pass
print(os.listdir("/tmp"), os.listdir("."))
"""


async def test_processes_and_files_that_a_job_leaves_are_gone_for_the_next(sandbox: Sandbox) -> None:
    assert "leftover" in (await program(sandbox, LEFT)).stdout
    for _ in range(2 * BOXES):
        ran = await program(sandbox, SEEN)
        assert ran.stdout and "leftover" not in ran.stdout


async def test_what_a_job_does_to_python_is_gone_for_the_next(sandbox: Sandbox) -> None:
    await program(
        sandbox, "import builtins, json, os\nbuiltins.len = json.dumps = os.write = None\nos.environ['X'] = '1'"
    )
    for _ in range(2 * BOXES):
        ran = await program(sandbox, "import os, json\nprint(len([1]), json.dumps(1), 'X' in os.environ)")
        assert ran.stdout == "1 1 False\n"


async def test_jobs_run_in_parallel(sandbox: Sandbox) -> None:
    source = "import time; begun = time.time(); time.sleep(3); print(begun, time.time())"
    ran = await asyncio.gather(*(program(sandbox, source) for _ in range(BOXES)))
    begun, ended = zip(*(map(float, r.stdout.split()) for r in ran), strict=True)
    assert max(begun) < min(ended), "there was a time at which all were at work"


async def test_no_secret_is_in_reach(sandbox: Sandbox) -> None:
    source = """
import os
print(dict(os.environ))
for pid in os.listdir("/proc"):
    try: print(open(f"/proc/{pid}/environ").read())
    except OSError: pass
"""
    ran = await program(sandbox, source)
    assert "PATH" in ran.stdout and "hunter2" not in ran.stdout and "SECRET" not in ran.stdout


async def test_there_is_no_network(sandbox: Sandbox) -> None:
    ran = await program(sandbox, "print([line.split(':')[0].strip() for line in open('/proc/net/dev')][2:])")
    assert ran.stdout == "['lo']\n", ran


@pytest.mark.parametrize("victim", ["os.getppid()", "-1", "1"])
async def test_program_that_ends_its_watcher_gets_no_better_end(sandbox: Sandbox, victim: str) -> None:
    source = f"import os\ntry: os.kill({victim}, 9)\nexcept OSError: pass\nwhile True: pass"
    assert (await program(sandbox, source, seconds=1)).end in (End.KILLED, End.TIMEOUT)


# --- Calls ------------------------------------------------------------------------------------------------------------

SAMPLES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        2**53,
        -(10**400),
        1.5,
        -0.0,
        1e308,
        "",
        "ß\ud800\0🙂",
        1 + 2j,
        b"\0\xff",
        bytearray(b"x"),
    ),
    *(
        [],
        [1, [2, "x"]],
        (),
        (1, (2,)),
        {"a": 1, 2: "b", (1, 2): None, None: 0},
        {1, 2},
        frozenset({"x"}),
        range(3, 9, 2),
    ),
    *(Decimal("1.10"), Fraction(1, 3), datetime.date(2024, 2, 29), datetime.datetime(2024, 1, 2, 3, 4, 5, 6)),
    *(datetime.time(1, 2), datetime.timedelta(days=-1, microseconds=1), {"deep": [({1: [{2: (3,)}]},)]}),
)


async def test_values_of_every_kind_cross_and_come_back_equal(sandbox: Sandbox) -> None:
    ran = await calls(sandbox, "def same(x): return x", *(call("same", value) for value in SAMPLES))
    back = [values.decode(answer["value"]) for answer in ran.answers]
    assert back == list(SAMPLES) and [type(value) for value in back] == [type(value) for value in SAMPLES]
    assert ran.end is End.DONE and not ran.forged


async def test_numbers_that_json_does_not_know_cross(sandbox: Sandbox) -> None:
    ran = await calls(sandbox, "f = float", call("f", "nan"), call("f", "-inf"), call("f", float("inf")))
    assert str([values.decode(answer["value"]) for answer in ran.answers]) == "[nan, -inf, inf]"


async def test_values_that_cannot_cross_stay_and_can_be_used_there(sandbox: Sandbox) -> None:
    source = "class Counter:\n    n = 0\n    def add(self):\n        self.n += 1\n        return self.n\nc = Counter()"
    add = {"call": [{"attr": [{"name": "c"}, "add"]}, [], {}]}
    ran = await calls(sandbox, source, add, add, {"name": "c"}, {"name": "print"})
    assert [answer.get("value") for answer in ran.answers[:2]] == [1, 2]
    assert isinstance(values.decode(ran.answers[2]["value"]), values.Opaque)


async def test_iterators_are_taken_out(sandbox: Sandbox) -> None:
    ran = await calls(sandbox, "def f(n):\n    yield from range(n)", call("f", 3), call("enumerate", ["a"]))
    assert [list(values.decode(answer["value"])) for answer in ran.answers] == [[0, 1, 2], [(0, "a")]]


async def test_call_that_raises_does_not_stop_the_next(sandbox: Sandbox) -> None:
    source = "def f(x):\n    if x == 1: raise ValueError('no')\n    if x == 2: raise SystemExit\n    return x"
    ran = await calls(sandbox, source, call("f", 1), call("f", 2), call("g"), call("f", 3))
    assert ran.answers[0] == {"raised": "ValueError", "text": "no"}
    assert [answer.get("raised") for answer in ran.answers] == ["ValueError", "SystemExit", "NameError", None]
    assert ran.answers[3] == {"value": 3} and ran.end is End.DONE


async def test_value_that_contains_itself_is_an_exception(sandbox: Sandbox) -> None:
    ran = await calls(sandbox, "x = []\nx.append(x)", {"name": "x"}, call("len", [1]))
    assert ran.answers[0]["raised"] == "RecursionError" and ran.answers[1] == {"value": 1}


@pytest.mark.parametrize("source", ["1 / 0", "def (", "raise SystemExit(0)", "import no_such_module", "x = '\ud800'"])
async def test_module_that_does_not_load_says_why(sandbox: Sandbox, source: str) -> None:
    ran = await calls(sandbox, source, call("f"))
    assert ran.end is End.DONE and len(ran.answers) == 1 and ran.answers[0]["load_error"]


async def test_module_is_not_main_and_prints_nothing_into_the_answers(sandbox: Sandbox) -> None:
    source = "print('loud')\nif __name__ == '__main__': raise ValueError\ndef f():\n    print('x')\n    return True"
    ran = await calls(sandbox, source, call("f"))
    assert ran.answers == ({"value": True},) and not ran.forged


async def test_answers_before_an_early_exit_are_kept(sandbox: Sandbox) -> None:
    ran = await calls(
        sandbox, "import os\ndef f(x): return x if x < 2 else os._exit(0)", *(call("f", n) for n in range(4))
    )
    assert (ran.end, ran.answers) == (End.KILLED, ({"value": 0}, {"value": 1}))


async def test_answers_before_a_hang_are_kept(sandbox: Sandbox) -> None:
    source = "def f(x):\n    while x: pass\n    return 'first'"
    ran = await calls(sandbox, source, call("f", 0), call("f", 1), seconds=1)
    assert (ran.end, ran.answers) == (End.TIMEOUT, ({"value": "first"},))


async def test_answers_that_flood_are_stopped(sandbox: Sandbox) -> None:
    ran = await calls(sandbox, "def f(): return 'x' * 10_000_000", call("f"))
    assert (ran.end, ran.answers) == (End.FLOODED, ())


@pytest.mark.parametrize(
    "line", ["{}", "1", "nonsense", '{"value": NaN}', '{"value": 1, "more": 2}', '{"load_error": 1}']
)
async def test_line_that_no_harness_writes_is_noticed(sandbox: Sandbox, line: str) -> None:
    ran = await calls(sandbox, f"import os\ndef f(): os.write(3, {line!r}.encode() + b'\\n')", call("f"))
    assert ran.forged and ran.answers == ()


async def test_more_answers_than_calls_are_noticed(sandbox: Sandbox) -> None:
    ran = await calls(sandbox, "import os\ndef f(): os.write(3, b'{\"value\": 1}\\n')", call("f"))
    assert ran.forged and len(ran.answers) == 1


# --- Verifiers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "value", "reason"),
    [
        ("1.0", 1.0, ""),
        ("0.25", 0.25, ""),
        ("None", None, ""),
        ("(0.5, 'half')", 0.5, "half"),
        ("(None, 'no code')", None, "no code"),
        ("True", 1.0, ""),
        ("0", 0.0, ""),
        ("2.0", 2.0, ""),  # whoever runs it judges the range
        ("-1", -1.0, ""),
    ],
)
async def test_verifier_gives_a_value(sandbox: Sandbox, expression: str, value: float | None, reason: str) -> None:
    ran = await verify(sandbox, scoring(expression))
    assert ran.answers == ({"value": value, "reason": reason},) and ran.end is End.DONE and not ran.forged


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (scoring("1 / 0"), "ZeroDivisionError"),
        (scoring("float('nan')"), ""),
        (scoring("float('inf')"), ""),
        (scoring("'good'"), "ValueError"),
        (scoring("[]"), "TypeError"),
        (scoring("(1.0, 'a', 'b')"), "ValueError"),
        (scoring("exit()"), "SystemExit"),
        ("x = 1", "score"),
        ("def score(", "SyntaxError"),
        ("def score(): return 1.0", "TypeError"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    ],
)
async def test_verifier_that_breaks_says_why_and_gives_no_value(sandbox: Sandbox, source: str, said: str) -> None:
    ran = await verify(sandbox, source)
    assert ran.end is End.DONE and not ran.forged
    assert len(ran.answers) == 1 and said in ran.answers[0]["error"]


async def test_verifier_gets_its_inputs_as_they_are(sandbox: Sandbox) -> None:
    hostile = [
        "\ud800",
        "\0",
        "'; import os #",
        '"""',
        "{}",
        "\u202e",
        '\n{"value": 1.0, "reason": ""}\n',
        "漢",
        10**30,
    ]
    source = scoring(f"float(extra == {{'x': {hostile!r}}} and response == '42' and reference is None)")
    assert (await verify(sandbox, source, x=hostile)).answers == ({"value": 1.0, "reason": ""},)


async def test_reason_is_text_of_limited_length(sandbox: Sandbox) -> None:
    (answer,) = (await verify(sandbox, scoring(r"(1.0, '\ud800' + 'x' * 1_000_000)"))).answers
    assert answer["value"] == 1.0 and 100 < len(answer["reason"]) < 10_000


async def test_state_of_a_verifier_does_not_last(sandbox: Sandbox) -> None:
    source = "import math\nn = getattr(math, 'n', 0)\nmath.n = n + 1\n" + scoring("n")
    for _ in range(3):
        assert (await verify(sandbox, source)).answers == ({"value": 0.0, "reason": ""},)


async def test_verifier_that_hangs_or_leaves_gives_no_value(sandbox: Sandbox) -> None:
    ran = await verify(sandbox, scoring("exec('while True: pass')"), seconds=1)
    assert (ran.end, ran.answers) == (End.TIMEOUT, ())
    ran = await verify(sandbox, "import os\n" + scoring("os._exit(0)"))
    assert (ran.end, ran.answers) == (End.KILLED, ())


async def test_verifier_starts_no_process(sandbox: Sandbox) -> None:
    source = """
import os, subprocess, sys
def score(prompt, response, reference, extra):
    for start in (os.fork, lambda: subprocess.run([sys.executable, "-c", "1"]), lambda: os.posix_spawn("/", ["/"], {})):
        try:
            start()
        except OSError:
            continue
        return 0.0
    return 1.0
"""
    assert (await verify(sandbox, source)).answers == ({"value": 1.0, "reason": ""},)


READ = (
    ("The answer is 1,042 or \\frac{1}{2}.", 1),
    ("<think>5</think> **\\boxed{3} and \\boxed{4}**", 1),
    ('```python\nx = 1\n```\n{"a": [1, {}]} “É” \ud800', 1),
    ("[", 100_000), ("\\boxed{", 20_000), ("9", 100_000), ("```\n", 20_000), ('{"a":', 50_000), ("1,", 50_000),
    ("<think>", 20_000), ("answer is ", 20_000), ("-$", 50_000), ("\\frac{", 20_000), ('"\\', 50_000), (" ", 200_000),
)  # fmt: skip
"""Texts, and how often they are repeated: plain ones, and hostile ones."""


async def test_a_verifier_reads_as_our_rules_do(sandbox: Sandbox) -> None:
    source = f"""
import hashlib, rlar
def score(prompt, response, reference, extra):
    said = [repr(getattr(rlar, name)(text * times)) for text, times in {READ!r} for name in rlar.READERS]
    return 1.0, hashlib.sha256("\\n".join(said).encode("utf-8", "surrogatepass")).hexdigest()
# reads by rlar.number and others
"""
    said = [repr(getattr(reading, name)(text * times)) for text, times in READ for name in READERS]
    wanted = hashlib.sha256("\n".join(said).encode("utf-8", "surrogatepass")).hexdigest()
    assert (await verify(sandbox, source, seconds=60)).answers == ({"value": 1.0, "reason": wanted},)


async def test_what_a_verifier_is_not_offered_is_named(sandbox: Sandbox) -> None:
    (answer,) = (await verify(sandbox, "import rlar\n" + scoring("rlar.final_anser('')"))).answers
    assert "rlar has no final_anser; it has run_program, builtin, answer_of" in answer["error"]


async def test_second_answer_of_a_verifier_is_noticed(sandbox: Sandbox) -> None:
    ran = await verify(sandbox, 'import os\nos.write(3, b\'{"value": 1.0, "reason": ""}\\n\')\n' + scoring("0.0"))
    assert ran.forged


ASKS = """
import rlar
def score(prompt, response, reference, extra):
    first = rlar.run_program("print(int(input()) + 1)", stdin="41")
    second = rlar.run_program("1 / 0", seconds=9)
    return float(first.stdout == "42\\n" and first.end == "done" and second.exit_code == 1), second.stderr[-10:]
"""


async def test_verifier_asks_for_programs_and_gets_what_became_of_them(sandbox: Sandbox) -> None:
    asked = []

    async def answer(ask: Mapping[str, Any], left: float) -> Any:
        assert 0 < left <= 20
        asked.append(ask)
        ran = await program(sandbox, ask["source"], ask["stdin"], seconds=ask["seconds"] or 5)
        return {"end": ran.end.value, "exit_code": ran.exit_code, "stdout": ran.stdout, "stderr": ran.stderr}

    ran = await verify(sandbox, ASKS, answer, seconds=20)
    assert ran.answers == ({"value": 1.0, "reason": "n by zero\n"},), ran
    assert [(ask["kind"], ask["seconds"]) for ask in asked] == [("program", None), ("program", 9)]


async def test_asking_without_one_who_answers_is_refused(sandbox: Sandbox) -> None:
    ran = await verify(sandbox, ASKS)
    assert ran.end is End.DONE and "nothing is answered here" in ran.answers[0]["error"]


async def test_refusal_reaches_the_verifier_which_goes_on(sandbox: Sandbox) -> None:
    async def answer(ask: Mapping[str, Any], left: float) -> Any:
        return {"error": f"what is {ask['kind']}?"}

    source = """
import rlar
def score(prompt, response, reference, extra):
    try:
        rlar.ask(kind="secrets")
    except RuntimeError as error:
        return 0.5, str(error)
"""
    assert (await verify(sandbox, source, answer)).answers == ({"value": 0.5, "reason": "what is secrets?"},)


async def test_large_questions_and_replies_pass(sandbox: Sandbox) -> None:
    async def answer(ask: Mapping[str, Any], left: float) -> Any:
        return ask["text"] + "ß\ud800"

    source = "import rlar\n" + scoring("float(rlar.ask(text='x\\n' * 150_000) == 'x\\n' * 150_000 + 'ß\\ud800')")
    assert (await verify(sandbox, source, answer)).answers == ({"value": 1.0, "reason": ""},)


async def test_one_who_answers_too_late_does_not_hold_the_deadline_up(sandbox: Sandbox) -> None:
    async def answer(ask: Mapping[str, Any], left: float) -> Any:
        await asyncio.sleep(60)

    start = time.monotonic()
    ran = await verify(sandbox, "import rlar, time\n" + scoring("rlar.ask(kind='x')"), answer, seconds=1)
    assert ran.end is End.TIMEOUT or "error" in ran.answers[0]
    assert time.monotonic() - start - ran.queued < 1 + GRACE_S + SLACK_S


async def test_error_of_one_who_answers_is_not_the_verifiers(sandbox: Sandbox) -> None:
    async def answer(ask: Mapping[str, Any], left: float) -> Any:
        raise BoxLost("the other box is gone")

    with pytest.raises(BoxLost, match="other box"):
        await verify(sandbox, ASKS, answer)
    assert (await verify(sandbox, scoring("1.0"))).answers == ({"value": 1.0, "reason": ""},)


async def test_forged_questions_reach_nobody(sandbox: Sandbox) -> None:
    async def answer(ask: Mapping[str, Any], left: float) -> Any:
        raise AssertionError("asked")

    for line in ('{"ask": [1]}', '{"ask"', '{"ask": ' + "[" * 100_000):
        ran = await verify(sandbox, f"import os\nos.write(3, {line!r}.encode() + b'\\n')\n" + scoring("0.0"), answer)
        assert ran.forged or ran.answers == ({"value": 0.0, "reason": ""},)


async def test_replies_that_nobody_waited_for_do_not_reach_the_next_job(sandbox: Sandbox) -> None:
    async def answer(ask: Mapping[str, Any], left: float) -> Any:
        return "x" * 200_000  # more than a pipe takes

    source = """
import os, rlar

def score(prompt, response, reference, extra):
    if extra["how"] == "honest":
        return float(rlar.ask(kind="x") == "x" * 200_000)
    for _ in range(int(extra["how"])):
        os.write(3, b'{"ask": {"kind": "x"}}\\n')
    return 0.5
"""
    for number in ("1", "2", "9"):
        hasty = await verify(sandbox, source, answer, how=number)
        assert hasty.forged or hasty.answers == ({"value": 0.5, "reason": ""},)
        assert (await verify(sandbox, source, answer, how="honest")).answers == ({"value": 1.0, "reason": ""},)


async def test_verifier_that_takes_no_reply_is_ended_in_time_and_its_box_is_whole(sandbox: Sandbox) -> None:
    async def answer(ask: Mapping[str, Any], left: float) -> Any:
        return "x" * 200_000

    source = "import os, time\n" + scoring("os.write(3, b'{\"ask\": {}}\\n') and time.sleep(60)")
    for _ in range(2):
        assert (await verify(sandbox, source, answer, seconds=1)).end is End.TIMEOUT


# --- The whole --------------------------------------------------------------------------------------------------------


async def test_abandoned_job_does_not_disturb_the_next(sandbox: Sandbox) -> None:
    tasks = [asyncio.ensure_future(program(sandbox, "while True: pass", seconds=4)) for _ in range(BOXES)]
    await asyncio.sleep(0.5)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    ran = await asyncio.gather(*(program(sandbox, f"print({n})", seconds=20) for n in range(2 * BOXES)))
    assert [r.stdout for r in ran] == [f"{n}\n" for n in range(2 * BOXES)]


@pytest.mark.parametrize("name", ["docker", "sandbox_fusion"])
async def test_closing_ends_all_that_is_at_work(
    boxes: DockerSandbox, settings: SandboxConfig, engine: Any, name: str
) -> None:
    def all_boxes() -> set[str]:
        return {box.id for box in engine.containers.list(all=True, filters={"label": LABEL}, ignore_removed=True)}

    async with FusionServer(boxes) as server:
        before = all_boxes()
        config = settings.model_copy(update={"fusion_url": server.url, "program_boxes": 1, "verifier_boxes": 1})
        async with DockerSandbox(config) if name == "docker" else FusionSandbox(config) as sandbox:
            jobs = [asyncio.ensure_future(program(sandbox, "while True: pass", seconds=60)) for _ in range(3)]
            await asyncio.sleep(1)
        results = await asyncio.wait_for(asyncio.gather(*jobs, return_exceptions=True), 10)
        assert [type(result) for result in results] == [BoxLost] * 3
        assert name != "docker" or all_boxes() <= before
