# SPDX-License-Identifier: Apache-2.0
"""The process of one job: sets its limits and pipes, loads the job's code, and writes down what it answers.

From the moment the code is loaded, nothing in this process can be trusted any more, this file included: whatever it
writes is the code's own word. That is all right, as no answer of a program says anything about whether it is right:
what is expected never enters its box.
"""

from __future__ import annotations

import _signal  # without the enumerations of `signal`, which touch a good deal of memory
import atexit
import importlib
import json
import os
import resource
import sys
import traceback
from types import ModuleType
from typing import Any, NoReturn

import values

for _name in "bisect copy functools heapq itertools math random re string typing".split():
    importlib.import_module(_name)  # what programs use most: loaded before the fork, so that no job pays for it

MAX_TEXT = 2000
WARM_CALLS = 64
_WARM = b'{"call": [{"name": "f"}, [1, "a", 0.5, [1], {"tuple": [{"set": [1]}]}, {"dict": [[1, 2]]}], {}]}'
CHANNEL, REPLIES = 3, 4

_encoded = json.JSONEncoder(allow_nan=False).encode
_read = json.JSONDecoder().raw_decode


def warm_up() -> None:
    """Does once, before any fork, what every job does: what Python sets up at first use is then there for all.

    The types of its parser alone take a millisecond. And code that has run often is no more rewritten by Python 3.11
    while it runs, which would have each job copy it.
    """
    namespace: dict[str, Any] = {}
    exec(compile("def f(*args):\n    return [arg for arg in args]\n", "warm.py", "exec"), namespace)
    for _ in range(WARM_CALLS):
        call = read(_WARM)
        _encoded({"value": values.encode(values.evaluate(call, namespace, {}))})


def read(job: bytes) -> dict[str, Any]:
    """A job out of JSON; the short way through the module `json`."""
    found: dict[str, Any] = _read(job.decode())[0]
    return found


def child(job: dict[str, Any], stdin: int, output: int, errors: int, replies: int) -> NoReturn:
    """Runs a job in this process, and ends it. The descriptors are above 2; `replies` is looked at for a verifier."""
    _signal.signal(_signal.SIGINT, _signal.default_int_handler)
    # 0, 1, 2: as a program has them; 3: where answers go; 4: replies to what it asks. Nothing else stays open.
    program, last = job["mode"] == "program", 2
    os.dup2(stdin, 0)
    os.dup2(output if program else errors, 1)
    os.dup2(errors, 2)
    if not program:
        if replies == CHANNEL:
            replies = os.dup(replies)
        last = os.dup2(output, CHANNEL)
    if job["mode"] == "verifier":
        last = os.dup2(replies, REPLIES)
    os.closerange(last + 1, 128)  # among them, what leads to the host
    seconds = int(float(job["seconds"])) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (seconds * 8, seconds * 8))
    if job["mode"] == "verifier":
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))  # no children: nobody else can answer for it
    {"program": _program, "calls": _calls, "verifier": _verifier}[job["mode"]](job)
    os._exit(0)


def _module(name: str, filename: str) -> ModuleType:
    """An empty module that stands in `sys.modules`, where dataclasses and pickle look for it."""
    module = ModuleType(name)
    module.__file__ = filename
    sys.modules[name] = module
    return module


def _program(job: dict[str, Any]) -> NoReturn:
    sys.stdin = open(0, encoding="utf-8", errors="surrogateescape")
    sys.stdout = open(1, "w", encoding="utf-8", errors="surrogateescape")
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1)
    sys.argv = ["program.py"]
    code, said = 0, None
    try:
        module = _module("__main__", "program.py")
        exec(compile(job["source"], "program.py", "exec"), module.__dict__)
    except SystemExit as error:
        code, said = (error.code, None) if isinstance(error.code, int) else (int(error.code is not None), error.code)
    except BaseException:
        code = 1
        traceback.print_exc(limit=20)
    try:
        if said is not None:
            print(said, file=sys.stderr)
        if "threading" in sys.modules:  # not loaded before the fork: each fork would pay for it
            sys.modules["threading"]._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
    except BaseException:
        code = code or 120
    os._exit(code & 0xFF)


def _answer(message: dict[str, Any]) -> None:
    data = _encoded(message).encode() + b"\n"
    while data:
        data = data[os.write(CHANNEL, data) :]


def _calls(job: dict[str, Any]) -> None:
    module = _module("program", "program.py")
    try:
        exec(compile(job["source"], "program.py", "exec"), module.__dict__)
    except BaseException as error:
        _answer({"load_error": _explain(error)})
        return
    results: dict[str, Any] = {}
    for number, expression in enumerate(job["calls"]):
        try:
            results[f"#{number}"] = value = values.evaluate(expression, module.__dict__, results)
            message = {"value": values.encode(value)}
        except BaseException as error:
            message = {"raised": type(error).__name__[:100], "text": _message(error)}
        _answer(message)


def _message(error: BaseException) -> str:
    try:
        return str(error)[:MAX_TEXT]
    except BaseException:
        return ""


def _explain(error: BaseException) -> str:
    """The last lines of a traceback."""
    try:
        return "".join(traceback.format_exception(error, limit=-3))[-MAX_TEXT:]
    except BaseException:
        return type(error).__name__


def _verifier(job: dict[str, Any]) -> None:
    import verifier_api

    verifier_api.connect(_answer, open(REPLIES, encoding="utf-8"))
    sys.modules["rlar"] = verifier_api
    module = _module("verifier", "verifier.py")
    try:
        exec(compile(job["source"], "verifier.py", "exec"), module.__dict__)
        value = module.score(**job["inputs"])
        reason = ""
        if isinstance(value, tuple):
            value, reason = value
        _answer({"value": None if value is None else float(value), "reason": str(reason)[:MAX_TEXT]})
    except BaseException as error:
        _answer({"error": _explain(error)})
