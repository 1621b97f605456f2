# SPDX-License-Identifier: Apache-2.0
"""The rules `unit_tests` and `unit_tests_partial`: programs, forms of tests, and every way in which a run can end.

The programs here are harmless and run without walls (`bare_sandbox`); hostile ones are for real boxes.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from typing import Any

import pytest
from bare_sandbox import BareSandbox
from conftest import make_query, make_sample
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_rlar.config import SandboxConfig
from verl_rlar.errors import ToolError, ToolTimeout
from verl_rlar.sandbox.base import Answerer, BoxLost, End, Job, Ran
from verl_rlar.tools.rules.code import alike, program_of, same_output, unit_tests, unit_tests_partial
from verl_rlar.tools.rules.code_tests import (
    BadTests,
    Functions,
    Plan,
    Program,
    PromptCode,
    Streams,
    is_short,
    plan_of,
    prompt_code,
)
from verl_rlar.types import Verdict

CONFIG = SandboxConfig(program_timeout_s=3.0)
ADD = "def add(a, b):\n    return a + b\n"
WRONG = "def add(a, b):\n    return a - b\n"
HALF = "def add(a, b):\n    return a + b if a < 2 else 0\n"
ADD_PROMPT = 'def add(a, b):\n    """The sum."""\n'
CHECK = "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(2, 2) == 4, 'sum'\n"


def plan_for(reference: str | None = None, prompt: str = "Write it.", **extra: Any) -> Plan:
    return plan_of(make_query(prompt, reference, **extra))[0]


def judge(
    program: str,
    tests: Any = None,
    *,
    prompt: str = "Write it.",
    partial: bool = False,
    sandbox: Any = None,
    reference: str | None = None,
    config: SandboxConfig = CONFIG,
    **extra: Any,
) -> Verdict:
    columns = extra if tests is None else {"tests": tests, **extra}
    sample = make_sample(program, make_query(prompt, reference, **columns))
    rule = unit_tests_partial if partial else unit_tests
    return asyncio.run(rule(sample, sandbox or BareSandbox(), config))


def share(program: str, tests: Any, **fields: Any) -> float | None:
    return judge(program, tests, partial=True, **fields).value


# what the tools say of themselves


def test_both_rules_need_boxes_and_no_reference() -> None:
    for tool in (unit_tests, unit_tests_partial):
        assert tool.spec.boxed
        assert not tool.spec.scope.needs_reference
        assert tool.spec.timeout_s == 30
        assert tool.spec.misses


# the program in a response

NO_PROMPT = PromptCode(text="", preamble="", helpers=())


@pytest.mark.parametrize(
    ("response", "program"),
    [
        (ADD, ADD),
        (f"Here:\n```python\n{ADD}```\nDone.", ADD),
        (f"```py\n{ADD}```", ADD),
        (f"```\n{ADD}```", ADD),
        (f"~~~python\n{ADD}~~~", ADD),
        (f"````python\n{ADD}````", ADD),
        (f"``` python title=x\n{ADD}```", ADD),
        (f"```python\n{ADD}", ADD + "\n"),
        (f"```python\nprint(1)\n```\n```python\n{ADD}```", ADD),
        (f"```python\n{ADD}```\nTry it:\n```python\nprint(add(1, 2))\n```", ADD),
        (f"```python\n{ADD}```\n```bash\npip install x\n```", ADD),
        (f"```python\n{WRONG}```\nBetter:\n```python\n{ADD}```", ADD),
        (f"<think>\n```python\n{WRONG}```\n</think>\n```python\n{ADD}```", ADD),
        (f"1. Step\n   ```python\n   {ADD.replace(chr(10), chr(10) + '   ').rstrip()}\n   ```", ADD),
        ("```python\ndef add(a, b): return a + b```", "def add(a, b): return a + b\n"),
        ("<think>never ends", ""),
    ],
)
def test_program_is_the_last_block_that_defines_what_is_asked_for(response: str, program: str) -> None:
    assert program_of(response, NO_PROMPT, ("add",)) == program


def test_a_block_with_an_example_below_a_whole_program_is_not_the_program() -> None:
    program = "print(2 * int(input()))\n"
    for below in ("```\n2\n```\ngives\n```\n4\n```", "```python\n# 2 -> 4\n```", "```text\n4\n```"):
        assert program_of(f"```python\n{program}```\nFor example\n{below}", NO_PROMPT, ()) == program
    assert program_of(f"```python\nprint(1)\n```\nBetter:\n```\n{program}```", NO_PROMPT, ()) == program
    assert program_of("```\nx = 5\n```", NO_PROMPT, ()) == "x = 5\n"


def test_an_example_of_its_use_below_a_program_that_reads_is_not_the_program() -> None:
    program = "def solve(a): return sum(a)\nprint(solve(map(int, input().split())))\n"
    response = f"```python\n{program}```\nUsage:\n```python\nprint(solve([1, 2, 3]))\n```"
    assert program_of(response, NO_PROMPT, ()) == program


def test_only_a_row_that_is_read_at_once_is_short() -> None:
    assert is_short(make_query("add", None, test_list=["assert add(1, 2) == 3", "assert add(1, 1) == 2"]))
    assert not is_short(make_query("add", None, test="assert add(1, 2) == 3\n" * 1000))
    assert not is_short(make_query("add " * 2000, None, test="assert add(1, 2) == 3"))
    assert not is_short(make_query("add", None, tests={"inputs": ["1"], "outputs": ["1"]}))


def test_an_example_that_speaks_of_input_is_no_program() -> None:
    program = "def solve(n):\n    return n\n\nprint(solve(int(input())))\n"
    below = '```python\nprint("Output for input 3:", solve(3))\n```'
    assert program_of(f"```python\n{program}```\nTest it:\n{below}", NO_PROMPT, ()) == program


def test_program_of_a_completion_continues_the_prompt() -> None:
    prompt = prompt_code(ADD_PROMPT, "add")
    assert program_of("    return a + b\n", prompt, ("add",)) == ADD_PROMPT + "    return a + b\n"
    assert program_of("```python\n    return a + b\n```", prompt, ("add",)) == ADD_PROMPT + "    return a + b\n"
    assert program_of(ADD, prompt, ("add",)) == ADD


def test_program_of_a_chat_gets_the_imports_and_helpers_before_the_entry_point() -> None:
    prompt = prompt_code(f"import math\n\ndef half(x):\n    return x / 2\n\n@cache\n{ADD_PROMPT}", "add")
    program = program_of(f"from __future__ import annotations\n{ADD}", prompt, ("add",))
    compile(program, "program.py", "exec")
    assert program.startswith("from __future__ import annotations\nimport math\n\ndef half(x):")
    assert "@cache" not in program
    assert program.endswith(ADD)


def test_prompt_may_hold_its_code_in_a_fence() -> None:
    prompt = prompt_code(f"Complete this:\n```python\nimport math\n{ADD_PROMPT}```\nThanks!", "add")
    assert prompt.preamble == "import math\n"
    assert prompt.helpers == ("import math",)
    assert prompt_code("Write a function that adds, as in `def add`.", "add") == NO_PROMPT


def test_what_a_prompt_gives_beside_the_entry_point_is_there_for_the_program() -> None:
    given = "import missing_module\nLIMIT = 3\nfirst = input()\nclass P:\n    x = 1\ndef half(x):\n    return x / 2\n"
    prompt = prompt_code(f"You are given:\n```python\n{given}```\nWrite a function `add(a, b)`.", "add")
    names: dict[str, Any] = {}
    exec(program_of("def add(a, b):\n    return half(a) + b + LIMIT + P.x\n", prompt, ("add",)), names)
    assert names["add"](2, 1) == 6
    assert "first" not in names, "what asks for input, or may fail, stays away"


@pytest.mark.parametrize(
    ("given", "body", "right"),
    [
        ("import math\nstr = 'hello'\nfrom math import *\n", "return str(pow(2, x, 5))", "3"),
        ("import math\nINF = float('inf')\nSEEN = set()\n", "return len(SEEN) + x < INF", True),
        ("def half(x):\n    return x / 2\n```\nFor example\n```\n>>> f(3)\n1.5\n", "return half(x)", 1.5),
        ("def f(x):\n    pass\n\ndef half(x):\n    return x / 2\n\nprint(f(3))\nr = f(3)\n", "return half(x)", 1.5),
        ("import math\ntry:\n    import no_such\nexcept ImportError:\n    no_such = None\n", "return no_such", None),
    ],
)
def test_what_a_prompt_gives_is_there_and_hides_nothing(given: str, body: str, right: Any) -> None:
    prompt = prompt_code(f"You are given:\n```python\n{given}```\nWrite `f(x)`.", "f")
    names: dict[str, Any] = {}
    exec(program_of(f"```python\ndef f(x):\n    {body}\n```", prompt, ("f",)), names)
    assert names["f"](3) == right and "r" not in names


@pytest.mark.parametrize(
    "response",
    [
        "```" * 300_000,
        "```\n" * 200_000,
        "```python\n" * 100_000,
        " " * 1_000_000,
        "\t\n" * 500_000,
        "<think>" * 200_000,
        "def " * 300_000,
        "def\t" + " " * 900_000,
        "from __future__ import " * 40_000,
        "`" * 1_000_000,
        "~~~" + "`" * 999_000,
    ],
    ids=range(11),
)
def test_reading_a_hostile_response_takes_time_in_proportion_to_its_length(response: str) -> None:
    prompt = prompt_code(ADD_PROMPT, "add")

    def seconds(text: str) -> float:
        start = time.process_time()
        program_of(text, prompt, ("add", "sub"))
        return time.process_time() - start

    tenth = response[: len(response) // 10]
    assert seconds(response) < 40 * min(seconds(tenth) for _ in range(3)) + 0.2


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="`~ \nadef:()<>/think", max_size=200), st.sampled_from(["python", "py", "", "Python"]))
def test_whatever_stands_around_it_a_last_block_is_found(noise: str, language: str) -> None:
    response = noise.replace("`", "").replace("~", "") + f"\n</think>\n```{language}\n{ADD}```\n"
    assert program_of(response, NO_PROMPT, ("add",)) == ADD


# forms of tests

PAIRS = [[1, 2], [2, 2]]
FORMS: dict[str, dict[str, Any]] = {
    "check and entry_point": {"test": CHECK, "entry_point": "add"},
    "check that is called": {"test": CHECK + "\ncheck(add)\n"},
    "check, entry from the prompt": {"test": CHECK, "prompt": ADD_PROMPT},
    "list of assertions": {"test_list": ["assert add(1, 2) == 3", "assert add(2, 2) == 4"]},
    "list with setup": {"test_list": ["assert add(*x) == 3"], "test_setup_code": "x = (1, 2)"},
    "list with imports": {"test_list": ["assert isclose(add(1, 2), 3)"], "test_imports": ["from math import isclose"]},
    "text of assertions": {"tests": "assert add(1, 2) == 3\nassert add(2, 2) == 4\n"},
    "text in the reference": {"reference": "assert add(1, 2) == 3\nassert add(2, 2) == 4"},
    "functional": {"reference": json.dumps({"functional": "assert add(1, 2) == 3\nassert add(2, 2) == 4"})},
    "json list of assertions": {"tests": json.dumps(["assert add(1, 2) == 3", "assert add(2, 2) == 4"])},
    "pytest": {"test": "from solution import add\n\ndef test_a():\n    assert add(1, 2) == 3\n\ndef test_b():\n"
    "    assert add(2, 2) == 4\n"},
    "pytest, module": {"test": "import solution as s\n\ndef test_a():\n    assert s.add(1, 2) == 3\n"},
    "pytest, other name": {"test": "from solution import add as plus\n\ndef test_a():\n    assert plus(1, 2) == 3\n"},
    "pytest, all names": {"test": "from solution import *\n\ndef test_a():\n    assert add(1, 2) == 3\n"},
    "pytest, class": {"test": "class TestAdd:\n    def setup_method(self):\n        self.a = 1\n"
    "    def test_a(self):\n        assert add(self.a, 2) == 3\n"},
    "pytest, parameters": {"test": "import pytest\n\n@pytest.mark.parametrize('a, b, c', [(1, 2, 3), (2, 2, 4)])\n"
    "def test_a(a, b, c):\n    assert add(a, b) == c\n"},
    "pytest, raises and approx": {"test": "import pytest\n\ndef test_a():\n    with pytest.raises(TypeError):\n"
    "        add(1, 'x')\n    assert add(1, 2) == pytest.approx(3.0000001)\n"},
    "unittest": {"test": "import unittest\nfrom solution import add\n\nclass TestAdd(unittest.TestCase):\n"
    "    def setUp(self):\n        self.a = 1\n    def test_a(self):\n        self.assertEqual(add(self.a, 2), 3)\n"
    "    def test_b(self):\n        with self.assertRaises(TypeError):\n            add(1, 'x')\n\n"
    "if __name__ == '__main__':\n    unittest.main()\n"},
    "function with arguments": {"tests": {"fn_name": "add", "inputs": PAIRS, "outputs": [3, 4]}},
    "function, in the reference": {"reference": json.dumps({"fn_name": "add", "inputs": PAIRS, "outputs": [[3], 4]})},
    "function, input_output": {"input_output": json.dumps({"fn_name": "add", "inputs": PAIRS, "outputs": [3, 4]})},
    "LiveCodeBench function": {
        "tests": [{"input": "1\n2", "output": "3", "testtype": "functional", "metadata": {"func_name": "add"}}]
    },
    "LiveCodeBench function, row": {
        "tests": json.dumps([{"input": "1\n2", "output": "3", "testtype": "functional"}]),
        "metadata": '{"func_name": "add"}',
    },
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_tests_of_functions_passes_the_right_and_fails_the_wrong_program(form: str) -> None:
    assert judge(ADD, **FORMS[form]).value == 1.0, judge(ADD, **FORMS[form])
    wrong = judge(WRONG, **FORMS[form])
    assert wrong.value == 0.0, wrong
    assert judge(ADD, **FORMS[form], partial=True).value == 1.0
    assert 0 <= (judge(WRONG, **FORMS[form], partial=True).value or 0) < 1


SUM = "print(sum(map(int, input().split())))"
STREAMS: dict[str, dict[str, Any]] = {
    "inputs and outputs": {"tests": {"inputs": ["1 2\n", "2 2\n"], "outputs": ["3\n", "4\n"]}},
    "text in the reference": {"reference": json.dumps({"inputs": ["1 2\n"], "outputs": ["3\n"]})},
    "lines": {"input_output": json.dumps({"inputs": [["1 2", ""]], "outputs": [["3"]]})},
    "input and output": {"reference": json.dumps([{"input": "1 2", "output": "3"}, {"input": "2 2", "output": "4"}])},
    "LiveCodeBench": {"tests": [{"input": "1 2", "output": "3", "testtype": "stdin"}]},
    "list of texts": {"test_cases": [json.dumps({"input": "1 2", "output": "3"})]},
}


@pytest.mark.parametrize("form", STREAMS)
def test_every_form_of_tests_of_streams_passes_the_right_and_fails_the_wrong_program(form: str) -> None:
    assert judge(SUM, **STREAMS[form]).value == 1.0
    assert judge("print(3 - input().count('2 2') - 5)", **STREAMS[form]).value == 0.0


def test_class_of_solutions_is_found_for_functions() -> None:
    program = "class Solution:\n    def add(self, a, b):\n        return a + b\n"
    tests = {"fn_name": "add", "inputs": PAIRS, "outputs": [3, 4]}
    assert judge(program, tests).value == 1.0
    check = {"test": CHECK, "entry_point": "Solution().add"}
    assert judge(program, **check).value == 1.0
    assert judge(program, test="assert Solution().add(1, 2) == 3").value == 1.0


@pytest.mark.parametrize(
    ("reference", "extra", "reason"),
    [
        (None, {"tests": "x = 1"}, "never call"),
        (None, {"tests": "def check(candidate):\n    pass", "entry_point": "add"}, "never call"),
        (None, {"tests": "def check(candidate):\n    assert True", "entry_point": "add"}, "never call"),
        (None, {"tests": {"inputs": [], "outputs": []}}, "empty"),
        (None, {"tests": {"inputs": ["1"], "outputs": []}}, "1 inputs and 0 outputs"),
        (None, {"tests": {"inputs": ["1"]}}, "no lists"),
        (None, {"tests": [{"input": "1"}]}, "no `output`"),
        (None, {"tests": "assert add(1, 2) =="}, "no Python"),
        (None, {"tests": "assert add(1, 2) == 3\nimport nowhere_to_be_found_1.x as torch"}, None),
        (None, {"tests": "import torch\nassert add(1, 2) == 3"}, "torch"),
        (None, {"tests": "assert add(1, 2) == 3\ndel y"}, "NameError"),
        (None, {"tests": "def test_a(capsys):\n    add(1, 2)\n    assert capsys.readouterr().out"}, "capsys"),
        (None, {"tests": "def test_a(x):\n    assert add(x, 2) == 3"}, "fixture"),
        (None, {"tests": "assert add(lambda: 1, 2) == 3"}, "function"),
        (None, {"tests": "[" * 100_000}, "the tests are"),
        (None, {"tests": "(" * 50_000 + ")" * 50_000}, "the tests are"),
        (None, {"tests": [[1, 2], [3]]}, "form"),
        (None, {"tests": CHECK}, "entry_point"),
        (None, {"tests": [{"input": "1", "output": "3", "testtype": "functional"}]}, "func_name"),
        (None, {}, "no tests"),
        (None, {"tests": "raise ValueError('mine')\nassert add(1, 2) == 3"}, "mine"),
    ],
)
def test_tests_that_are_broken_are_abstained_from_with_the_reason(
    reference: str | None, extra: dict[str, Any], reason: str | None
) -> None:
    verdict = judge(ADD, reference=reference, **extra)
    if reason is None:
        return
    assert verdict.value is None, verdict
    assert reason in verdict.reason


@settings(max_examples=150, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.just("assert f(1) == 2"),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["inputs", "outputs", "fn_name", "input", "output", "x"]), inner, max_size=4
            )
        ),
        max_leaves=8,
    )
)
def test_whatever_a_column_holds_it_is_a_plan_or_bad_tests(value: Any) -> None:
    try:
        plan = plan_for(tests=value)
    except BadTests as error:
        assert str(error)
    else:
        assert isinstance(plan, (Streams, Functions, Program))


# what is fetched in advance


def test_calls_with_literals_are_fetched_together_in_their_order() -> None:
    plan = plan_for(
        tests="assert f(1, k=[2]) == 3\nassert f((1,), {2}, -1.5, 10**3) == g(f(2))\nassert f(x) == f(None)"
    )
    assert isinstance(plan, Program)
    assert [json.loads(key)["call"][1:] for key in plan.keys] == [
        [[1], {"k": [2]}],
        [[{"tuple": [1]}, {"set": [2]}, -1.5, 1000], {}],
        [[{"call": [{"name": "f"}, [2], {}]}], {}],
        [[None], {}],
    ]


JUDGED = "sum_ = add(1, 2)\nassert sum_ == 3"
"""Tests that need the judge."""


def test_one_program_job_is_enough_for_simple_tests_and_one_verifier_job_more_for_literals() -> None:
    for tests, modes in ((CHECK, ["calls"]), (JUDGED, ["calls", "verifier"])):
        sandbox = BareSandbox()
        assert judge(ADD, sandbox=sandbox, test=tests, entry_point="add").value == 1.0
        assert [job.mode for job in sandbox.jobs] == modes


def test_what_is_expected_never_enters_the_programs_box() -> None:
    tests = "SECRET = 90125\ndef check(candidate):\n    for n in range(3):\n"
    tests += "        assert candidate(n, SECRET - n - SECRET) == 90125 - 90125\n"
    tests += "    assert candidate(90000, 125) == 90125\n    assert candidate(1, 2) == 3, 'Q90125'\n"
    sandbox = BareSandbox()
    assert judge(ADD, sandbox=sandbox, test=tests, entry_point="add").value == 1.0
    given_to_program = [job for job in sandbox.jobs if job.mode != "verifier"]
    assert len(given_to_program) == 4
    assert not any("90125" in repr((job.source, job.calls, job.inputs, job.stdin)) for job in given_to_program)


def test_tests_and_program_share_no_job() -> None:
    sandbox = BareSandbox()
    marked = ADD + "\n# of the response\n"
    assert judge(marked, sandbox=sandbox, test=CHECK + "# of the tests\n", entry_point="add").value == 1.0
    for job in sandbox.jobs:
        assert "of the response" not in repr(job) or job.mode == "calls"
        assert "assert candidate" not in repr(job) or job.mode == "verifier"


def test_same_call_is_answered_once_for_each_time_it_stands_there() -> None:
    program = "n = 0\ndef count():\n    global n\n    n += 1\n    return n\n"
    assert judge(program, "assert count() == 1\nassert count() == 2\nassert count() == 3").value == 1.0


# how programs end


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("", "no program"),
        ("def add(a, b) return", "does not load"),
        ("import no_such_module\n" + ADD, "does not load"),
        ("raise SystemExit\n" + ADD, "does not load"),
        ("def sub(a, b):\n    return 0", "NameError"),
        ("def add(a):\n    return 3", "TypeError"),
        ("def add(a, b):\n    raise ValueError('no')", "ValueError: no"),
        ("def add(a, b):\n    return None", "=="),
        ("def add(a, b):\n    return str(a + b)", "=="),
        ("import os\ndef add(a, b):\n    os._exit(0)", "crashed, left"),
        ("import sys\ndef add(a, b):\n    sys.exit(0)", "SystemExit"),
        ("import os, signal\ndef add(a, b):\n    os.kill(os.getpid(), signal.SIGKILL)", "crashed"),
        ("def add(a, b):\n    while True: pass", "too long"),
        ("def add(a, b):\n    return 'x' * 10**7", "too much"),
        ("def add(a, b):\n    return 10 ** 5000", "=="),
        ("def add(a, b):\n    return float('nan')", "=="),
        ("def add(a, b):\n    x = []\n    x.append(x)\n    return x", "RecursionError"),
        ("def add(a, b):\n    x = 3\n    for _ in range(600):\n        x = [x]\n    return x", "RecursionError"),
        ("class Same:\n    def __eq__(self, other): return True\ndef add(a, b):\n    return Same()", "=="),
        ("class Same(int):\n    def __eq__(self, other): return True\ndef add(a, b):\n    return Same(7)", "=="),
        ("def add(a, b):\n    return lambda: 3", "=="),
    ],
)
def test_fault_of_the_program_scores_0_and_is_named(program: str, reason: str) -> None:
    verdict = judge(program, test=CHECK, entry_point="add", config=SandboxConfig(program_timeout_s=1.0))
    assert verdict.value == 0.0
    assert reason in verdict.reason
    assert not verdict.hacked


@pytest.mark.parametrize("mode", ["stdin", "function"])
@pytest.mark.parametrize(
    "body",
    ["while True: pass", "import os; os._exit(3)", "raise ValueError", "print('x' * 10**7); y = 'x' * 10**7", "1"],
)
def test_fault_of_the_program_scores_0_in_every_form(mode: str, body: str) -> None:
    config = SandboxConfig(program_timeout_s=1.0)
    if mode == "stdin":
        verdict = judge(body, {"inputs": ["1 2"], "outputs": ["3"]}, config=config)
    else:
        program = f"def add(a, b):\n    {body}\n    return locals().get('y')"
        verdict = judge(program, {"fn_name": "add", "inputs": PAIRS, "outputs": [3, 4]}, config=config)
    assert verdict.value == 0.0
    assert verdict.reason


def test_program_that_writes_answers_of_its_own_is_caught() -> None:
    forger = "import os\nos.write(3, b'{\"value\": 3}\\n' * 9)\n" + WRONG
    for extra in (
        {"test": CHECK, "entry_point": "add"},
        {"tests": {"fn_name": "add", "inputs": PAIRS, "outputs": [3, 4]}},
    ):
        verdict = judge(forger, **extra)
        assert verdict.value == 0.0
        assert verdict.hacked


def test_hang_that_the_tests_swallow_is_no_pass() -> None:
    tests = "try:\n    add(1, 2)\nexcept BaseException:\n    pass\nassert add(2, 2) == 4\n"
    program = "def add(a, b):\n    while a == 1: pass\n    return a + b\n"
    assert judge(program, tests, config=SandboxConfig(program_timeout_s=1.0)).value == 0.0


def test_exit_code_counts() -> None:
    tests = {"inputs": ["1 2"], "outputs": ["3"]}
    assert judge(SUM + "\nraise SystemExit(0)", tests).value == 1.0
    assert judge(SUM + "\nraise SystemExit(1)", tests).value == 0.0


# the share of cases


def test_share_counts_each_assertion_that_is_run() -> None:
    verdict = judge(HALF, test=CHECK, entry_point="add", partial=True)
    assert verdict.value == 0.5
    assert verdict.details == {"passed": 1.0, "cases": 2.0}
    assert "candidate(2, 2) == 4" in verdict.reason
    assert share(HALF, "for n in range(4):\n    assert add(n, 1) == n + 1") == 0.5
    assert share(HALF, {"fn_name": "add", "inputs": [[0, 1], [1, 1], [2, 1], [3, 1]], "outputs": [1, 2, 3, 4]}) == 0.5
    assert share("print(3)", {"inputs": ["1 2"] * 3, "outputs": ["3", "4", "3"]}) == pytest.approx(2 / 3)


def test_assertions_that_are_never_reached_count_as_failed() -> None:
    tests = "assert add(1, 2) == 3\nx = add(2, 2)[0]\nassert add(1, 1) == 2\nassert x == 4"
    assert share(ADD, tests) == pytest.approx(1 / 3)
    verdict = judge(ADD, tests)
    assert verdict.value == 0.0
    assert verdict.details == {"passed": 1.0, "cases": 3.0}


def test_failed_test_function_does_not_keep_the_next_from_being_run() -> None:
    tests = "def test_a():\n    assert add(2, 2) == 4\n\ndef test_b():\n    x = add(2, 2)[0]\n    assert x\n\n"
    tests += "def test_c():\n    assert add(1, 2) == 3\n    assert add(1, 1) == 2\n"
    verdict = judge(HALF, tests, partial=True)
    assert verdict.details == {"passed": 2.0, "cases": 4.0}
    methods = (
        "import unittest\nclass T(unittest.TestCase):\n    def test_a(self):\n        self.assertEqual(add(2, 2), 4)\n"
    )
    methods += "    def test_b(self):\n        self.assertEqual(add(1, 2), 3)\n"
    assert share(HALF, methods) == 0.5


def test_share_goes_on_after_a_hang() -> None:
    program = "def add(a, b):\n    while a == 1: pass\n    return a + b\n"
    config = SandboxConfig(program_timeout_s=1.0)
    assert share(program, "assert add(1, 2) == 3\nassert add(2, 2) == 4", config=config) == 0.5
    assert share(program, {"fn_name": "add", "inputs": PAIRS, "outputs": [3, 4]}, config=config) == 0.5


def test_share_is_whole_only_if_the_tests_get_to_their_end() -> None:
    tests = "assert add(1, 2) == 3\nadd(1, 'x')\n"
    value = share(ADD, tests)
    assert value is not None
    assert value < 1


# semantics of a plain run

RAISES = """
import pytest
from solution import add, NoSumError

def test_a():
    with pytest.raises(NoSumError):
        add(1, 2)
"""


@pytest.mark.parametrize(
    ("program", "tests", "value"),
    [
        (ADD, "def check(candidate):\n    f = candidate\n    assert f(1, b=2) == 3\ncheck(add)", 1),
        (ADD, "import math\nassert math.isclose(add(0.1, 0.2), 0.3)", 1),
        (ADD, "assert isclose(add(0.1, 0.2), 0.3)", 1),
        ("isclose = lambda a, b: True\n" + WRONG, "assert isclose(add(0.1, 0.2), 0.3)", 0),
        ("import math\nmath.isclose = lambda a, b: True\n" + WRONG, "assert math.isclose(add(1, 2), 3)", 0),
        (ADD, "try:\n    add(1, 'x')\nexcept TypeError as e:\n    assert 'type' in str(e)\nelse:\n    assert 0", 1),
        ("def f():\n    raise KeyError('k')", "import pytest\nwith pytest.raises(KeyError, match='k'):\n    f()", 1),
        (
            "class NoSumError(Exception): pass\ndef add(a, b): raise NoSumError('why')",
            RAISES,
            1,
        ),
        (ADD, RAISES, 0),
        ("def f(x): return iter(x)", "assert list(f([1, 2])) == [1, 2]\nassert sorted(f({2, 1})) == [1, 2]", 1),
        ("def f(x): return {1: {2, 3}, 'a': (None, b'x')}", "assert f(0) == {1: {3, 2}, 'a': (None, b'x')}", 1),
        ("def f(x): return (1, 2)", "assert f(0) == [1, 2]", 0),
        ("from collections import Counter\nf = Counter", "assert f('aab') == Counter('aab') == {'a': 2, 'b': 1}", 1),
        ("def f(n): return lambda x: x + n", "assert f(2)(3) == 5\ng = f(1)\nassert g(1) == 2", 1),
        ("def f(x):\n    x.sort()", "def test_a():\n    x = [3, 1, 2]\n    f(x)\n    assert x == [1, 2, 3]", 1),
        ("def f(x):\n    pass", "def test_a():\n    x = [3, 1, 2]\n    f(x)\n    assert x == [1, 2, 3]", 0),
        ("def f(x):\n    x.clear()\n    return []", "x = [3, 1, 2]\nassert f(x) == sorted(x)", 0),
        ("def f(x): return x", "x = [1]\nassert f(x) == [1]\nx.append(2)\nassert f(x) == [1, 2]", 1),
    ],
)  # fmt: skip
def test_tests_run_as_they_would_beside_the_program(program: str, tests: str, value: float) -> None:
    verdict = judge(program, tests)
    assert verdict.value == value, verdict
    whole = judge(program, tests, partial=True)
    assert (whole.value == 1.0) == bool(value), whole


STACK = """
class Empty(Exception):
    pass

class Stack:
    def __init__(self, items=()):
        self.items = list(items)
        self.name = 'stack'
    def push(self, item):
        self.items.append(item)
        return self
    def pop(self):
        if not self.items:
            raise IndexError('empty')
        return self.items.pop()
    def __len__(self):
        return len(self.items)
    def __iter__(self):
        return iter(self.items)
    def __eq__(self, other):
        return isinstance(other, Stack) and self.items == other.items
"""


@pytest.mark.parametrize(
    "tests",
    [
        "s = Stack()\ns.push(1)\ns.push(2)\nassert s.pop() == 2\nassert s.pop() == 1\nassert len(s) == 0",
        "s = Stack([1, 2])\nt = Stack([1])\nt.push(2)\nassert s == t\nassert not s != t\nt.pop()\nassert s != t",
        "s = Stack((3, 4))\nassert list(s) == [3, 4]\nassert s.name == 'stack'\ns.name = 'x'\nassert s.name == 'x'",
        "import pytest\nfrom solution import Stack\ndef test_a():\n    s = Stack()\n"
        "    with pytest.raises(IndexError):\n        s.pop()\n    s.push(5)\n    assert s.pop() == 5",
        "s = Stack()\nassert isinstance(s, Stack)\nassert hasattr(s, 'push') and not hasattr(s, 'peek')",
        "s = Stack()\nassert s.items == []\ns.push(1)\nassert s.items == [1]",
        "assert Stack().push(1).push(2).pop() == 2\nassert len(Stack([1])) == 1\nassert not Stack()\nassert Stack([1])",
        "s = Stack([1])\nassert s != [1]\nassert 1 in s\nassert [x + 1 for x in s] == [2]",
        "class TestStack:\n    def setup_method(self):\n        self.s = Stack([7])\n    def test_a(self):\n"
        "        assert self.s.pop() == 7\n    def test_b(self):\n        assert len(self.s.push(8)) == 2",
    ],
)
def test_objects_stay_in_their_box_and_keep_their_state(tests: str) -> None:
    verdict = judge(STACK, tests)
    assert verdict.value == 1.0, verdict


VECTOR = """
class Vector:
    def __init__(self, x): self.x = x
    def __add__(self, other): return Vector(self.x + other.x)
    def __mul__(self, n): return Vector(self.x * n)
    def __lt__(self, other): return self.x < getattr(other, "x", other)
    def __contains__(self, n): return n == self.x
def double(vector): return vector * 2
"""


def test_operators_of_objects_that_the_tests_make_are_the_programs() -> None:
    tests = "v = Vector(1) + Vector(2)\nassert v.x == 3\nassert (v * 2).x == 6\nassert v < 4\nassert not v < 3\n"
    tests += "assert 3 in v\nassert 4 not in v\nassert double(Vector(2)).x == 4\nassert Vector(1) < double(Vector(2))\n"
    verdict = judge(VECTOR, tests)
    assert verdict.value == 1.0, verdict


@pytest.mark.parametrize(
    "test",
    [
        "abs(f(1) - 37) < 1e-6",
        "f(1) < 37",
        "37 > f(1)",
        "37 in f(1)",
        "f(1) == 37",
        "f(1) + 0 == 37",
        "sum([f(1)]) == 37",
        "f(1).startswith('37')",
    ],
)
def test_operators_of_results_that_are_no_plain_values_decide_nothing(test: str) -> None:
    program = "class Yes:\n    __hash__ = None\n    def __iter__(self): return iter([])\n"
    yes = ("lt", "gt", "eq", "contains", "bool")
    program += "".join(f"    def __{name}__(self, *a): return True\n" for name in yes)
    program += "".join(f"    def __{name}__(self, *a): return 0\n" for name in ("sub", "abs", "rsub"))
    program += "".join(f"    def __{name}__(self, *a): return 30 + 7\n" for name in ("add", "radd"))
    program += "    def startswith(self, *a): return True\ndef f(x): return Yes()\n"
    sandbox = BareSandbox()
    assert judge(program, f"assert {test}", sandbox=sandbox).value == 0.0
    assert not any("37" in repr(job.calls) for job in sandbox.jobs)


NODES = """
class Node:
    def __init__(self, value, left=None, right=None):
        self.value, self.left, self.right = value, left, right

def total(node):
    return node.value + total(node.left) + total(node.right) if node else 0

def mirror(node):
    return node and Node(node.value, mirror(node.right), mirror(node.left))

def both(node):
    return [node, node.left]
"""


def test_objects_can_be_handed_back_and_looked_into() -> None:
    tests = "root = Node(1)\nroot.left = Node(2)\nroot.left.right = Node(3)\nassert total(root) == 6\n"
    tests += "assert mirror(root).right.value == 2\nassert mirror(root).left is None\n"
    tests += "pair = both(root)\nassert len(pair) == 2\nassert pair[1].value == 2\n"
    tests += "assert [n.value for n in pair] == [1, 2]\n"
    tests += "assert total(Node(1, Node(2), Node(3))) == 6\n"
    verdict = judge(NODES, tests)
    assert verdict.value == 1.0, verdict


def test_helpers_of_the_prompt_are_the_tests_own() -> None:
    prompt = f"def double(x):\n    return 2 * x\n\n\n{ADD_PROMPT}"
    tests = "def check(candidate):\n    assert candidate(1, 1) == double(1)\n"
    fields = {"prompt": prompt, "test": tests, "entry_point": "add"}
    assert judge(ADD, **fields).value == 1.0
    assert judge("def double(x):\n    return 0\n\ndef add(a, b):\n    return 0\n", **fields).value == 0.0
    assert judge("    return double(a) + b - a\n", **fields).value == 1.0


# comparisons


@pytest.mark.parametrize(
    ("got", "expected", "same"),
    [
        ("3\n", "3", True),
        ("3  \n\n", "3\n", True),
        ("1 2\n3", "1\n2 3", True),
        ("", "", True),
        ("", "3", False),
        ("3 3", "3", False),
        ("0.3333333", "0.33333333", True),
        ("0.34", "0.33", False),
        ("1000000007", "1000000008", False),
        ("1e3", "1000.0", True),
        ("1000", "1000.0", True),
        ("3.0", "3", False),
        ("nan", "1.5", False),
        ("inf", "1.5", False),
        ("1_5", "15.0", False),
        ("YES", "Yes", False),
        ("9" * 500_000, "1.5", False),
        ("9" * 399, "1.5", False),
        ("1e99999", "1.5", False),
    ],
)
def test_outputs_are_compared_by_tokens(got: str, expected: str, same: bool) -> None:
    assert same_output(got, expected) is same


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=50))
def test_an_output_is_the_same_as_itself(text: str) -> None:
    assert same_output(text, text)
    assert same_output(text + "\n", text)


@pytest.mark.parametrize(
    ("got", "expected", "same"),
    [
        ((1, 2), [1, 2], True),
        ([(1, 2)], [[1, 2]], True),
        (iter([1]), [1], True),
        (range(2), [0, 1], True),
        (range(10**18), [0, 1], False),
        (0.1 + 0.2, 0.3, True),
        (1, 1.0000001, True),
        (10**400, 1.5, False),
        (float("nan"), float("nan"), False),
        ("1", 1, False),
        (True, "True", False),
        ({1: 2.0}, {"1": 2}, True),
        ({1: 2}, {"1": 3}, False),
        (None, 0, False),
        (10**20, 10**20 + 1, False),
        (2000000 * 2000000 / 2, 2000000 * 2000001 // 2, False),
        (float(10**9 + 1), 10**9, False),
        ([10**6 + 0.9], [10**6], False),
        (3.0000000001, 3, True),
        (6.0, 6, True),
        (1e16, 10**16 + 1, False),
        (123456789012.00002, 123456789012, True),
        (float("inf"), 5, False),
        (2.5, 10**400, False),
    ],
)
def test_results_are_compared_by_value(got: Any, expected: Any, same: bool) -> None:
    if isinstance(got, int) and isinstance(expected, float) and got > 10**300:
        with pytest.raises(OverflowError):
            alike(got, expected)
        return
    assert alike(got, expected) is same


# special judges


def test_special_judge_decides_instead_of_the_comparison() -> None:
    tests = {"inputs": ["6", "10"], "outputs": ["", ""]}
    checker = (
        "def check(stdin, stdout, expected):\n    a, b = map(int, stdout.split())\n    return a * b == int(stdin)\n"
    )
    assert judge("n = int(input())\nprint(2, n // 2)", tests, checker=checker).value == 1.0
    assert judge("print(2, 3)", tests, checker=checker).value == 0.0
    assert share("print(2, 3)", tests, checker=checker) == 0.5
    assert judge("print('two three')", tests, checker=checker).value == 0.0
    graded = "def score(stdin, stdout, expected):\n    return len(stdout.strip()) / 4\n"
    assert share("print('abc')", tests, checker=graded) == 0.75
    assert judge("print('abc')", tests, checker=graded).value == 0.0


@pytest.mark.parametrize(
    "checker", ["def check(", "def other(): pass", "import no_such_module", "def check(*a): return None"]
)
def test_special_judge_that_is_broken_is_abstained_from(checker: str) -> None:
    verdict = judge("print(1)", {"inputs": ["6"], "outputs": ["1"]}, checker=checker)
    assert verdict.value is None
    assert "checker" in verdict.reason


def test_special_judge_shares_no_job_with_the_program() -> None:
    sandbox = BareSandbox()
    checker = "def check(stdin, stdout, expected):\n    return 'of the judge'\n"
    judge("print(1)", {"inputs": ["6"], "outputs": ["1"]}, checker=checker, sandbox=sandbox)
    assert [job.mode for job in sandbox.jobs] == ["program", "verifier"]
    assert "of the judge" not in sandbox.jobs[0].source


# what is our fault


class BrokenSandbox(BareSandbox):
    """Fails on one mode."""

    def __init__(self, mode: str, error: Exception) -> None:
        super().__init__()
        self.mode, self.error = mode, error

    async def run(self, job: Job, answer: Answerer | None = None) -> Ran:
        if job.mode == self.mode:
            raise self.error
        return await super().run(job, answer)


@pytest.mark.parametrize("error", [BoxLost("gone"), ToolTimeout("no box")])
@pytest.mark.parametrize(
    ("mode", "tests"),
    [
        ("calls", "assert add(1, 2) == 3"),
        ("calls", "for n in range(2):\n    assert add(n, 2) == n + 2"),
        ("verifier", JUDGED),
        ("calls", {"fn_name": "add", "inputs": [[1, 2]], "outputs": [3]}),
        ("program", {"inputs": ["1", "2"], "outputs": ["1", "2"]}),
    ],
)
def test_fault_of_ours_is_raised_and_never_a_score(mode: str, tests: Any, error: Exception) -> None:
    with pytest.raises(type(error)):
        judge(ADD, tests, sandbox=BrokenSandbox(mode, error))


class ScriptedSandbox:
    """Answers verifier jobs with what the test says; programs are run."""

    def __init__(self, ran: Ran) -> None:
        self.ran = ran
        self.bare = BareSandbox()

    async def run(self, job: Job, answer: Answerer | None = None) -> Ran:
        return self.ran if job.mode == "verifier" else await self.bare.run(job, answer)


def test_judge_that_breaks_is_our_fault_and_one_that_is_broken_by_an_answer_is_not() -> None:
    with pytest.raises(ToolError):
        judge(ADD, JUDGED, sandbox=ScriptedSandbox(Ran(end=End.DONE, answers=({"error": "x"},))))
    for end in (End.KILLED, End.FLOODED, End.TIMEOUT):
        assert judge(ADD, JUDGED, sandbox=ScriptedSandbox(Ran(end=end))).value == 0.0
    assert judge(ADD, "for n in [1]:\n    add(n, 2)", sandbox=ScriptedSandbox(Ran(end=End.KILLED))).value is None


def test_inputs_run_together_but_only_so_many_and_none_after_a_failure() -> None:
    class Counting(BareSandbox):
        running = most = 0

        async def run(self, job: Job, answer: Answerer | None = None) -> Ran:
            self.running += 1
            self.most = max(self.most, self.running)
            try:
                return await super().run(job, answer)
            finally:
                self.running -= 1

    sandbox = Counting()
    tests = {"inputs": ["1 2"] * 12, "outputs": ["3"] * 12}
    assert judge(SUM, tests, sandbox=sandbox).value == 1.0
    assert 1 < sandbox.most <= 4
    assert len(sandbox.jobs) == 12
    sandbox = Counting()
    assert judge("print(0)", tests, sandbox=sandbox).value == 0.0
    assert len(sandbox.jobs) < 12


def test_asks_that_are_no_calls_are_refused() -> None:
    replies: list[Mapping[str, Any]] = []

    class Asking(BareSandbox):
        async def run(self, job: Job, answer: Answerer | None = None) -> Ran:
            if job.mode == "verifier" and answer:
                for ask in ({}, {"kind": "program", "source": "1"}, {"kind": "calls", "calls": 3}):
                    replies.append(await answer(ask, 1.0))
            return await super().run(job, answer)

    assert judge(ADD, JUDGED, sandbox=Asking()).value == 1.0
    assert all("error" in reply for reply in replies)
    assert len(replies) == 3
