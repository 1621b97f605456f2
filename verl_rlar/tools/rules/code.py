# SPDX-License-Identifier: Apache-2.0
"""Rules `unit_tests` and `unit_tests_partial`: runs the row's tests against the program in the response.

Program, tests and expected values meet nowhere. The program runs in a box that gets inputs only; what it gives comes
back as plain data. Inputs and expected values of data (`code_tests.Streams`, `code_tests.Functions`) are compared
here; tests that are Python themselves run in another box, a verifier's, which asks for the program's answers
(`code_judge`).

The program is the last fenced block (of those that define what is asked for, or, where that has no name, of those
that write something, if any does), else the whole response after its thinking. If it does not define what is asked
for, it continues the prompt's code; else the prompt's imports and helpers are put before it.

Output is compared by its tokens: white space does not matter, and where a number with a decimal point or an exponent
is expected, 1e-6 of it (or 1e-9) is near enough. Results of functions are compared as Python does, but for lists and
tuples, which are alike, and for floats, as above.

Guarantees: a fault of the program (it does not load, raises, hangs, floods, crashes, or is wrong) is a score; a fault
of the row's tests is an abstention with the reason; a fault of ours is an exception. No case is no pass. Reading a
response takes time linear in its length. All programs of a call together get the rule's time: what they do not reach,
they fail.

Not covered: see `misses` and the modules named above.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any
from weakref import WeakKeyDictionary

from verl_rlar.config import SandboxConfig
from verl_rlar.errors import RlarError, ToolError, ToolTimeout
from verl_rlar.sandbox import values
from verl_rlar.sandbox.base import BoxLost, End, Job, Ran, Sandbox
from verl_rlar.sandbox.reading import answer_of, code_blocks
from verl_rlar.tools.rule import rule
from verl_rlar.tools.rules.code_tests import (
    BadTests,
    Functions,
    Plan,
    Program,
    PromptCode,
    Streams,
    is_known,
    is_short,
    plan_of,
    root_name,
)
from verl_rlar.types import Kind, Query, Sample, Verdict

TIMEOUT_S = 30.0
"""Deadline of the rules, in seconds."""
MARGIN_S = 2.0
"""Of that, what is kept for the last job's end."""
AT_ONCE = 4
"""Inputs that a program is run on at the same time."""
MAX_PROGRAM = 1_000_000
"""Characters of a program; a longer one fails."""
MAX_ANSWERS = 4 << 20
"""Bytes that a program may answer to the calls of one job."""
MAX_DEPTH = 300
"""Nesting of an answer; one that is deeper is wrong."""
RESTARTS = 3
"""How often the partial rule goes on with the next call after one that hung or crashed."""

_MISSES = (
    "What a program prints, reads from files or does to global state is not seen by tests that call functions.",
    "What a call changes in its arguments is seen only if the call is a statement of its own.",
    "Objects of the program's own classes are compared as these classes say.",
    "Tests that hand over functions or objects of their own are abstained from.",
    "Programs that fit the tests but not the task pass; so do those that pass by luck.",
)


@rule(
    name="unit_tests",
    kinds={Kind.UNIT_TESTS},
    needs_reference=False,
    boxed=True,
    timeout_s=TIMEOUT_S,
    description="""Runs the row's unit tests against the program in the response, in boxes: assertions,
    `check(candidate)`, pytest, unittest, standard input and output, functions with arguments and results, or a special
    judge (column `checker`). 1 if every test passes, else 0.""",
    misses=_MISSES,
)
async def unit_tests(sample: Sample, sandbox: Sandbox, config: SandboxConfig) -> Verdict:
    """1.0 if all tests pass, else 0.0; None if the row's tests are unusable."""
    return await _score(sample, sandbox, config, partial=False)


@rule(
    name="unit_tests_partial",
    kinds={Kind.UNIT_TESTS},
    needs_reference=False,
    boxed=True,
    timeout_s=TIMEOUT_S,
    description="""As `unit_tests`, but the score is the share of cases that pass: assertions that are run, or inputs.
    In [0, 1]. Use it where hardly any response passes all tests.""",
    misses=(*_MISSES, "A constant answer that happens to be right for some cases earns their share."),
)
async def unit_tests_partial(sample: Sample, sandbox: Sandbox, config: SandboxConfig) -> Verdict:
    """Share in [0, 1] of the cases that pass; None if the row's tests are unusable."""
    return await _score(sample, sandbox, config, partial=True)


class _Tampered(Exception):
    """The program wrote answers that are not its to write."""


class _Slow(Exception):
    """The programs of this call have had all the time that there is."""


@dataclass(kw_only=True)
class _Work:
    """One call of a rule."""

    sandbox: Sandbox
    config: SandboxConfig
    partial: bool
    source: str
    """The program."""
    start: float = field(default_factory=lambda: asyncio.get_running_loop().time())
    queued: float = 0.0
    """Seconds spent on waiting for boxes."""
    busy: float = 0.0
    """Seconds that programs were at work."""

    @property
    def left(self) -> float:
        """Seconds until the call must be over."""
        return TIMEOUT_S - MARGIN_S - (asyncio.get_running_loop().time() - self.start - self.queued)

    async def run(self, *, at_once: int = 1, limit: float = math.inf, **fields: Any) -> Ran:
        """Runs the program.

        Raises:
            _Slow: There is no time left.
            _Tampered: It forges.
        """
        seconds = min(self.config.program_timeout_s, self.left, limit)
        if seconds < 0.05:
            raise _Slow
        ran = await self.sandbox.run(Job(source=self.source, seconds=seconds, **fields))
        self.queued += ran.queued / at_once
        self.busy += ran.seconds / at_once
        if ran.forged:
            raise _Tampered
        return ran

    async def call(self, calls: Sequence[Any], limit: float = math.inf) -> tuple[list[Any], str]:
        """Has expressions evaluated.

        Returns:
            An answer for each, as far as they came, and why there are no more.
        """
        try:
            ran = await self.run(mode="calls", calls=tuple(calls), output_bytes=MAX_ANSWERS, limit=limit)
        except _Slow:
            return [], "no time is left"
        if ran.answers and "load_error" in ran.answers[0]:
            return [], f"the program does not load: {_last_line(ran.answers[0]['load_error'])}"
        answers = [answer if _shallow(answer) else _TOO_DEEP for answer in ran.answers]
        return answers, "" if len(answers) == len(calls) else _ENDS[ran.end]


_TOO_DEEP = {"raised": "RecursionError", "text": "the result is nested too deeply"}
_ENDS = {
    End.DONE: "the program left",
    End.TIMEOUT: "the program took too long",
    End.KILLED: "the program crashed, left or ran out of memory",
    End.FLOODED: "the program wrote too much",
}


def _shallow(answer: Any) -> bool:
    """Whether an answer is not nested too deeply for those who read it."""
    layer = [answer]
    for _ in range(MAX_DEPTH):
        layer = [
            part
            for value in layer
            if isinstance(value, (list, dict))
            for part in (value.values() if isinstance(value, dict) else value)
            if isinstance(part, (list, dict))
        ]
        if not layer:
            return True
    return False


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2][:200]


def _verdict(passed: float, cases: int, why: str, *, partial: bool) -> Verdict:
    """The verdict on a program of which so many cases passed; `why` not all."""
    value = float(not why)
    if partial and why:
        value = passed / (cases + (passed >= cases))  # what broke off after the last case is one more
    reason = f"all {cases} cases pass" if not why else f"{passed:g} of {cases} cases pass; {why}"
    return Verdict(value=value, reason=reason[:600], details={"passed": float(passed), "cases": float(cases)})


async def _score(sample: Sample, sandbox: Sandbox, config: SandboxConfig, *, partial: bool) -> Verdict:
    try:
        query = sample.query
        plan, prompt = plan_of(query) if is_known(query) else await _read(query)
    except BadTests as error:
        return Verdict(value=None, reason=str(error))
    wanted = plan.wanted if isinstance(plan, Program) else (plan.name,) if isinstance(plan, Functions) else ()
    source = program_of(sample.response, prompt, wanted)
    if not source.strip():
        return Verdict(value=0.0, reason="the response has no program")
    if len(source) > MAX_PROGRAM:
        return Verdict(value=0.0, reason=f"the program is longer than {MAX_PROGRAM} characters")
    work = _Work(sandbox=sandbox, config=config, partial=partial, source=source)
    try:
        if isinstance(plan, Streams):
            return await _streams(work, plan)
        if isinstance(plan, Functions):
            return await _functions(work, plan)
        return await _program(work, plan)
    except _Tampered:
        return Verdict(value=0.0, hacked=True, reason="the program wrote answers past the harness")
    except BadTests as error:
        return Verdict(value=None, reason=str(error))


_turns: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()


async def _read(query: Query) -> tuple[Plan, PromptCode]:
    """Reads a row's tests. One at a time: of a batch that comes at once, programs run while others are read."""
    loop = asyncio.get_running_loop()
    async with _turns.setdefault(loop, asyncio.Lock()):
        return plan_of(query) if is_known(query) or is_short(query) else await asyncio.to_thread(plan_of, query)


# the program in a response


def program_of(response: str, prompt: PromptCode, wanted: Sequence[str]) -> str:
    """The program that a response stands for, with what it needs of the prompt.

    Args:
        response: Hostile text.
        prompt: The code in the prompt.
        wanted: Names that it should define; may be empty.
    """
    text = answer_of(response) if "think>" in response else response
    blocks = code_blocks(text)
    defining = [block for block in blocks if (_defines(block, wanted) if wanted else _WRITES.search(block))]
    if not wanted:  # an example of its use, in a block below, reads nothing
        defining = [block for block in defining if _READS.search(_COMMENT.sub("", block))] or defining
    code = (defining or blocks or [text])[-1]
    if not wanted or not prompt.text:
        return code
    if not defining and not _defines(code, wanted):
        return f"{prompt.text}{code}"
    if not prompt.preamble.strip():
        return code
    future = _FUTURE.findall(code)
    return "\n".join([*future, prompt.preamble, _FUTURE.sub("", code) if future else code])


_WRITES = re.compile(r"\b(?:print|write|writelines|stdout|exec|eval|system)\b")
"""What a whole program has in it; an example of its input and output, in a block below, has not."""
_READS = re.compile(r"\b(?:(?:input|open)\s*[(,)]|(?:stdin|read|fileinput)\b)")
_COMMENT = re.compile(r"#[^\n]*")
_FUTURE = re.compile(r"^from __future__ import [^\n]*", re.MULTILINE)


def _defines(code: str, names: Sequence[str]) -> bool:
    """Whether a text looks as if it defined one of the names."""
    roots = set(map(root_name, names))
    return any(found.group(found.lastindex or 0) in roots for found in _DEFINITION.finditer(code))


_DEFINITION = re.compile(r"^[ \t]*(?:(?:async )?def|class)[ \t]+(\w+)|^(\w+)[ \t]*=", re.MULTILINE)


# tests that are Python


@cache
def _judge_source() -> str:
    return (resources.files("verl_rlar.tools.rules") / "code_judge.py").read_text(encoding="utf-8")


async def _program(work: _Work, plan: Program) -> Verdict:
    """Runs tests that are a program."""
    answers, stopped = await _fetched(work, plan)
    if stopped.startswith("the program does not load"):
        return _verdict(0, max(len(plan.texts), 1), stopped, partial=work.partial)
    outcome = plan.simple.judge(plan.keys, answers, partial=work.partial) if plan.simple else None
    if outcome is not None:
        why = f"{plan.texts[outcome.failed[0]]!r}: {outcome.failed[1]}" if outcome.failed else ""
        return _verdict(outcome.passed, outcome.cases, why, partial=work.partial)
    fault: list[BaseException] = []
    asks = 0

    async def answer(ask: Mapping[str, Any], left: float) -> Any:
        nonlocal asks
        asks += 1
        calls = ask.get("calls")
        if ask.get("kind") != "calls" or not isinstance(calls, list):
            return {"error": "only calls are answered"}
        try:
            found, why = await work.call(calls, limit=left)
        except (RlarError, BoxLost, _Tampered) as error:  # raised again when the judge has ended
            fault.append(error)
            return {"error": "the program's box is gone"}
        return {"answers": found, "stopped": why}

    queued, busy, seconds = work.queued, work.busy, work.left
    if seconds < 0.05:
        return _verdict(0, max(len(plan.texts), 1), "no time is left", partial=work.partial)
    ran = await work.sandbox.run(
        Job(
            mode="verifier",
            source=_judge_source(),
            seconds=seconds,
            inputs={"plan": plan.for_judge, "answers": answers, "partial": work.partial},
        ),
        answer,
    )
    if fault:
        raise fault[0]
    if ran.end is not End.DONE or ran.forged or not ran.answers:
        if ran.end is End.TIMEOUT and work.queued - queued > seconds / 2:
            raise ToolTimeout(f"the tests waited {work.queued - queued:.0f} s for boxes: rlar.sandbox.program_boxes")
        if ran.forged or not (answers or asks):
            raise BadTests(f"the tests broke off: {ran.end.value}")
        slow = work.busy - busy > seconds / 2
        why = "no time is left" if slow else f"the tests broke off with what it gave: {ran.end.value}"
        return _verdict(0, max(len(plan.texts), 1), why, partial=work.partial)
    report = ran.answers[0]
    if "error" in report:
        raise ToolError(f"the judge of unit tests broke: {_last_line(report['error'])}")
    counts = json.loads(report["reason"])
    if counts["broken"]:
        raise BadTests(f"the tests are broken: {counts['broken']}")
    why = ""
    if report["value"] != 1:
        number, text = counts["failed"] or (None, "the tests did not get to their end")
        why = f"{plan.texts[number]!r}: {text}" if number is not None else text
    return _verdict(counts["passed"], counts["cases"], why, partial=work.partial)


async def _fetched(work: _Work, plan: Program) -> tuple[list[Any], str]:
    """The answers to the calls that are known in advance, and why there are no more."""
    answers: list[Any] = []
    stopped = ""
    for _ in range(RESTARTS if work.partial else 1):
        if len(answers) == len(plan.calls):
            break
        found, stopped = await work.call(plan.calls[len(answers) :])
        answers += found
        if stopped and len(answers) < len(plan.calls):
            answers.append({"stopped": stopped})
        if stopped.startswith("the program does not load"):
            break
    return answers, stopped


# tests of a function, by value


async def _functions(work: _Work, plan: Functions) -> Verdict:
    """Calls a function, and compares what it gives."""
    function: Any = {"name": plan.name}
    if re.search(r"^class[ \t]+Solution\b", work.source, re.MULTILINE) and not re.search(
        rf"^(?:async )?def[ \t]+{re.escape(plan.name)}\b", work.source, re.MULTILINE
    ):
        function = {"attr": [{"call": [{"name": "Solution"}, [], {}]}, plan.name]}
    calls = [{"call": [function, [values.encode(arg) for arg in args], {}]} for args, _ in plan.cases]
    answers: list[Any] = []
    stopped = ""
    for _ in range(RESTARTS if work.partial else 1):
        found, stopped = await work.call(calls[len(answers) :])
        answers += found
        if len(answers) == len(calls) or stopped.startswith("the program does not load"):
            break
        answers.append({"raised": "", "text": stopped})
    passed, why = await asyncio.to_thread(_compared, plan, answers, partial=work.partial)
    if len(answers) < len(calls) and not why:
        why = stopped
    return _verdict(passed, len(calls), why, partial=work.partial)


def _compared(plan: Functions, answers: list[Any], *, partial: bool) -> tuple[int, str]:
    """How many answers are right, and what is wrong with the first that is not. Takes a second for megabytes."""
    passed, why = 0, ""
    for number, ((_, expected), answer) in enumerate(zip(plan.cases, answers, strict=False), 1):
        fault = _fault(answer, expected)
        passed += not fault
        if fault and not why:
            why = f"case {number}: {fault}"
            if not partial:
                break
    return passed, why


def _fault(answer: Any, expected: Any) -> str:
    """What is wrong with an answer; empty if nothing is."""
    if not isinstance(answer, dict) or "value" not in answer:
        return f"{answer.get('raised', '')} {answer.get('text', '')}".strip()[:200] or "no answer"
    try:
        got = values.decode(answer["value"])
        # APPS wraps results in a list
        if alike(got, expected) or (isinstance(expected, list) and len(expected) == 1 and alike(got, expected[0])):
            return ""
        return f"gave {str(got)[:100]}"
    except (values.NotData, RecursionError, OverflowError) as error:
        return f"gave something that is no value: {error}"[:200]
    except (ValueError, ArithmeticError):  # a number with too many digits to be shown, or that is not to be compared
        return "gave something else"


def alike(got: Any, expected: Any) -> bool:
    """Whether a result is what is expected: lists and tuples are alike, floats may differ by a little."""
    if isinstance(got, values.Opaque):
        return False
    if hasattr(got, "__next__"):
        got = list(got)
    elif hasattr(got, "dtype"):
        got = got.tolist()
    elif isinstance(got, range) and isinstance(expected, list) and len(got) == len(expected):
        got = list(got)
    if isinstance(expected, (list, tuple)):
        same = isinstance(got, (list, tuple)) and len(got) == len(expected)
        return same and all(map(alike, got, expected))
    if isinstance(expected, Mapping):
        if not isinstance(got, Mapping) or len(got) != len(expected):
            return False
        if got.keys() != expected.keys():  # JSON has no keys but texts
            got = {str(key): value for key, value in got.items()}
        return got.keys() == expected.keys() and all(alike(got[key], value) for key, value in expected.items())
    if isinstance(got, float) or isinstance(expected, float):
        if not isinstance(got, (int, float)) or not isinstance(expected, (int, float)):
            return False
        if got == expected or isinstance(expected, float):
            return got == expected or math.isclose(got, expected, rel_tol=1e-6, abs_tol=1e-9)
        if not math.isfinite(got) or float(got).is_integer():  # of a whole number, 1e-6 of it may be thousands
            return math.isfinite(got) and int(got) == expected
        return abs(expected) < 2**53 and abs(got - expected) <= max(1e-6, 4 * math.ulp(got))
    return bool(got == expected)


# tests of a whole program


async def _streams(work: _Work, plan: Streams) -> Verdict:
    """Runs the program on the inputs, some at a time."""
    passed: dict[int, float] = {}
    faults: dict[int, str] = {}
    numbers = iter(range(len(plan.cases)))

    async def run_some() -> None:
        for number in numbers:
            if faults and not work.partial:
                return
            value, why = await _case(work, plan, number)
            passed[number] = value
            if value < 1:
                faults[number] = why

    tasks = [asyncio.ensure_future(run_some()) for _ in range(min(AT_ONCE, len(plan.cases)))]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    why = f"case {min(faults) + 1}: {faults[min(faults)]}" if faults else ""
    return _verdict(sum(passed.values()), len(plan.cases), why, partial=work.partial)


async def _case(work: _Work, plan: Streams, number: int) -> tuple[float, str]:
    """Share in [0, 1] that one input earns, and why not more."""
    given, expected = plan.cases[number]
    at_once = min(AT_ONCE, len(plan.cases))
    try:
        ran = await work.run(
            at_once=at_once, mode="program", stdin=given, output_bytes=max(1 << 20, 4 * len(expected) + (1 << 16))
        )
    except _Slow:
        return 0.0, "no time is left"
    if ran.end is not End.DONE:
        return 0.0, _ENDS[ran.end]
    if ran.exit_code != 0:
        return 0.0, f"it ended with exit code {ran.exit_code}: {_last_line(ran.stderr)}"
    if plan.checker is not None:
        return await _checked(work, plan.checker, given, ran.stdout, expected, at_once)
    return (1.0, "") if same_output(ran.stdout, expected) else (0.0, f"it wrote {ran.stdout[:100]!r}")


_CHECKER = """

if "score" not in globals():
    def score(stdin, stdout, expected):
        return check(stdin, stdout, expected)
"""


async def _checked(
    work: _Work, checker: str, given: str, output: str, expected: str, at_once: int
) -> tuple[float, str]:
    """What a special judge says of an output."""
    seconds = min(work.config.program_timeout_s, work.left)
    if seconds < 0.05:
        return 0.0, "no time is left"
    inputs = {"stdin": given, "stdout": output, "expected": expected}
    ran = await work.sandbox.run(Job(mode="verifier", source=checker + _CHECKER, seconds=seconds, inputs=inputs))
    work.queued += ran.queued / at_once
    if ran.forged:  # its output took the checker over
        raise _Tampered
    if ran.end is not End.DONE or not ran.answers:
        return 0.0, f"the checker broke off with its output: {ran.end.value}"
    error = ran.answers[0].get("error")
    if error is not None:
        last = _last_line(error)
        if last.startswith(("SyntaxError", "IndentationError", "NameError", "ImportError", "ModuleNotFoundError")):
            raise BadTests(f"the checker is broken: {last}")
        return 0.0, f"the checker broke on its output: {last}"
    value = ran.answers[0]["value"]
    if value is None:
        raise BadTests("the checker does not judge this case")
    return min(max(float(value), 0.0), 1.0), "the checker refuses its output"


_DECIMAL = re.compile(r"[-+]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][-+]?\d{1,3})?")
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,3})?")


def same_output(got: str, expected: str) -> bool:
    """Whether an output has the expected tokens; see the module."""
    if got == expected:
        return True
    tokens, wanted = got.split(), expected.split()
    return len(tokens) == len(wanted) and all(map(_same_token, tokens, wanted))


def _same_token(got: str, expected: str) -> bool:
    if got == expected:
        return True
    if max(len(got), len(expected)) > 400 or not _DECIMAL.fullmatch(expected) or not _NUMBER.fullmatch(got):
        return False
    return math.isclose(float(got), float(expected), rel_tol=1e-6, abs_tol=1e-9)
