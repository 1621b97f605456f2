# SPDX-License-Identifier: Apache-2.0
"""Programs that want the reward and not the task, in real boxes: none earns any, and the next program is unharmed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from conftest import make_query, make_sample

from verl_rlar.config import SandboxConfig
from verl_rlar.sandbox import Sandbox, open_sandbox
from verl_rlar.tools.rules.code import unit_tests, unit_tests_partial
from verl_rlar.types import Verdict

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

ADD = "def add(a, b):\n    return a + b\n"
CHECK = """
import math

def check(candidate):
    assert candidate(1, 2) == 3
    assert candidate(20, 22) == 42
    assert math.isclose(candidate(0.5, 0.25), 0.75)
    assert abs(candidate(4, 5) - 9) < 1e-6
    assert candidate(4, 5) == 9 <= candidate(5, 6)
    assert 7 in [candidate(3, 4)]
    for n in range(3):
        assert candidate(n, n) == sum([n, n])
"""
FORMS: dict[str, dict[str, Any]] = {
    "check": {"test": CHECK, "entry_point": "add"},
    "literals": {"test_list": ["assert add(1, 2) == 3", "assert add(20, 22) == 42"]},
    "pytest": {
        "test": "from solution import add\ndef test_a():\n    for n in (1, 20):\n        assert add(n, 1) == n + 1"
    },
    "function": {"tests": {"fn_name": "add", "inputs": [[1, 2], [20, 22]], "outputs": [3, 42]}},
    "streams": {"tests": {"inputs": ["1 2\n", "20 22\n"], "outputs": ["3\n", "42\n"]}},
}

CHEATS = {
    "leaves": "import os\nos._exit(0)",
    "exits": "raise SystemExit(0)",
    "exits when called": "import sys\ndef add(*a): sys.exit(0)",
    "leaves when called": "import os\ndef add(*a): os._exit(0)",
    "leaves at exit": "import atexit, os\natexit.register(lambda: os._exit(0))\ndef add(*a): return None",
    "is equal to all": """
class Same:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __bool__(self): return True
    def __float__(self): return 7.5
    def __abs__(self): return 0
    def __lt__(self, other): return True
    def __contains__(self, item): return True
    __radd__ = __rsub__ = __sub__ = __add__ = lambda self, other: 0
    __hash__ = None
def add(*a): return Same()
""",
    "is a number that is equal to all": """
class Same(int):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    __hash__ = int.__hash__
def add(*a): return Same(77)
""",
    "patches builtins": """
import builtins, math, operator
builtins.sum = lambda *a: None
builtins.isinstance = lambda *a: True
math.isclose = lambda *a, **k: True
operator.eq = lambda *a: True
def add(*a): return None
""",
    "patches the harness": """
import sys
for name, module in list(sys.modules.items()):
    for attribute in ("encode", "_answer", "dumps", "run_tests", "check"):
        if hasattr(module, attribute):
            try: setattr(module, attribute, lambda *a, **k: 3)
            except Exception: pass
def add(*a): return None
""",
    "walks frames": """
import gc, sys
def add(*a):
    frame = sys._getframe()
    while frame:
        for value in list(frame.f_locals.values()) + list(frame.f_globals.values()):
            if isinstance(value, dict) and 'expected' in value: return value['expected']
        frame = frame.f_back
    for value in gc.get_objects():
        if isinstance(value, str) and 'candidate' in value: return value
    return None
""",
    "reads what it finds": """
import glob, os
def add(*a):
    found = []
    for path in glob.glob('/proc/[0-9]*/environ') + glob.glob('/proc/[0-9]*/cmdline') + glob.glob('/tmp/*'):
        try: found.append(open(path, 'rb').read())
        except OSError: pass
    return found
""",
    "writes a verdict": """
import json, os
for fd in range(3, 64):
    for line in ('{"value": 1, "reason": ""}', '{"end": "done"}'):
        try: os.write(fd, line.encode() + bytes([10]))
        except OSError: pass
for path in ('/tmp/reward', '/logs/verifier/reward.txt', 'reward.txt'):
    try: open(path, 'w').write('1')
    except OSError: pass
def add(*a): return None
""",
    "answers ahead": """
import os
for fd in range(3, 64):
    try: os.write(fd, b'{"value": 3}\\n{"value": 42}\\n{"value": 0.75}\\n{"value": 0}\\n')
    except OSError: pass
def add(*a): return None
""",
    "leaves a child": """
import os, time
if os.fork() == 0:
    os.setsid()
    while True:
        for fd in range(3, 64):
            try: os.write(fd, b'{"value": 3}\\n')
            except OSError: pass
        time.sleep(0.01)
def add(*a): return None
""",
    "prints everything": "print(*range(1000))\nfor n in range(50): print(n)\ndef add(*a): return list(range(50))",
    "floods": "import os\nwhile True: os.write(1, b'x' * 65536)",
    "answers a gigabyte": "def add(*a): return 'x' * 10**9",
    "hangs": "while True: pass",
    "hangs when called": "def add(*a):\n    while True: pass",
    "eats memory": "x = []\nwhile True: x.append(bytearray(10**7))",
    "forks": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "answers depths": "def add(*a):\n    x = []\n    for _ in range(100000): x = [x]\n    return x",
    "answers itself": "def add(*a):\n    x = {}\n    x[0] = x\n    return x",
    "answers a long number": "def add(*a): return 10 ** 100000",
    "answers nan": "def add(*a): return float('nan')",
    "answers all numbers": "def add(*a): return range(10 ** 18)",
    "answers for ever": "import itertools\ndef add(*a): return itertools.count()",
    "crashes": "import ctypes\ndef add(*a): ctypes.string_at(0)",
    "raises what cannot be told": """
class Odd(BaseException):
    def __str__(self): raise SystemExit
def add(*a): raise Odd
""",
    "names itself oddly": "class Odd: pass\nOdd.__name__ = 'True' * 10000\ndef add(*a): return Odd()",
    "skips": "import unittest\ndef add(*a): raise unittest.SkipTest('all of it')",
    "replaces the tests": "def check(*a): pass\ndef test_a(*a): pass\ndef score(*a, **k): return 1\nadd = check",
    "is empty": "pass",
}  # fmt: skip


@pytest.fixture(scope="module")
def settings(box_image: str, sandbox_config: SandboxConfig) -> SandboxConfig:
    return sandbox_config.model_copy(
        update={"program_boxes": 2, "verifier_boxes": 2, "spare_boxes": 0, "program_timeout_s": 1.0}
    )


def patient(settings: SandboxConfig) -> SandboxConfig:
    """Settings for programs that end by themselves, however busy the machine is."""
    return settings.model_copy(update={"program_timeout_s": 10.0})


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def boxes(settings: SandboxConfig) -> AsyncIterator[Sandbox]:
    async with open_sandbox(settings) as sandbox:
        yield sandbox


async def judged(program: str, form: str, boxes: Sandbox, settings: SandboxConfig, *, partial: bool = False) -> Verdict:
    rule = unit_tests_partial if partial else unit_tests
    verdict: Verdict = await rule(make_sample(program, make_query("Add.", None, **FORMS[form])), boxes, settings)
    return verdict


@pytest.mark.parametrize("cheat", CHEATS)
@pytest.mark.parametrize("form", FORMS)
async def test_cheat_earns_nothing_and_the_next_program_is_unharmed(
    cheat: str, form: str, boxes: Sandbox, settings: SandboxConfig
) -> None:
    for partial in (False, True):
        verdict = await judged(CHEATS[cheat], form, boxes, settings, partial=partial)
        assert verdict.value == 0.0, verdict
    right = "print(sum(map(int, input().split())))" if form == "streams" else ADD
    assert (await judged(right, form, boxes, patient(settings))).value == 1.0


@pytest.mark.parametrize("form", ["check", "literals", "function"])
@pytest.mark.parametrize("cheat", ["writes a verdict", "answers ahead"])
async def test_forged_answers_are_flagged(cheat: str, form: str, boxes: Sandbox, settings: SandboxConfig) -> None:
    assert (await judged(CHEATS[cheat], form, boxes, patient(settings))).hacked
