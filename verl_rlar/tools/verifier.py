# SPDX-License-Identifier: Apache-2.0
"""Runs a verifier: code that we did not write, in a box, on one sample.

A verifier is a module with a function ``score(prompt, response, reference, extra)`` that returns a number in [0, 1], or
None where it has nothing to say, or one of these with a reason. It may have programs run, each in another box
(``rlar.run_program``, see `verl_rlar.sandbox.inside.verifier_api`).

Guarantees: only a finite number in [0, 1], or None, is an answer; everything else, above all an answer that did not
come through the harness, is a failure of the tool and no score.

Not covered: a verifier that executes text of the response in its own process gives its vote away; processes and threads
are denied to it, and the exam is there to find such verifiers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from verl_rlar.config import SandboxConfig
from verl_rlar.errors import ToolError, ToolTimeout
from verl_rlar.sandbox import Answerer, End, Job, Sandbox
from verl_rlar.types import Sample, ToolSpec, Verdict

MAX_PROGRAMS = 64
"""Programs that a verifier may have run for one sample."""
SOURCE_BYTES = 1 << 20
"""Most text that a verifier may hand over as a program, or as its input."""


async def verify(spec: ToolSpec, source: str, sample: Sample, sandbox: Sandbox, config: SandboxConfig) -> Verdict:
    """Scores a sample by a verifier.

    Args:
        spec: The verifier; its deadline is ``timeout_s``.
        source: Its source text.
        sample: The sample.
        sandbox: Where it runs.
        config: Limits of the programs that it asks for.

    Raises:
        ToolTimeout: It did not answer in time.
        ToolError: It raised, crashed, or answered something else than a number in [0, 1] or None.
        BoxLost, ToolUnavailable: See `Sandbox.run`.
    """
    inputs = {
        "prompt": sample.query.prompt,
        "response": sample.response,
        "reference": sample.query.reference,
        "extra": dict(sample.query.extra),
    }
    job = Job(mode="verifier", source=source, inputs=inputs, seconds=spec.timeout_s)
    ran = await sandbox.run(job, program_answerer(sandbox, config))
    if ran.end is End.TIMEOUT:
        raise ToolTimeout(f"{spec.name}: still at work after {spec.timeout_s:g} s")
    if ran.forged or ran.end is not End.DONE:
        what = "an answer that its harness cannot have written" if ran.forged else f"no answer ({ran.end.value})"
        raise ToolError(f"{spec.name}: {what}")
    answer = ran.answers[0]
    if "error" in answer:
        raise ToolError(f"{spec.name}: {str(answer['error'])[-500:]}")
    value = answer["value"]
    if value is not None and not 0 <= value <= 1:
        raise ToolError(f"{spec.name}: answered {value!r}, which is not in [0, 1]")
    return Verdict(value=None if value is None else float(value), reason=str(answer["reason"]))


def program_answerer(sandbox: Sandbox, config: SandboxConfig) -> Answerer:
    """What answers a verifier's ``run_program``: the program runs in another box, and its end comes back."""
    asked = 0

    async def answer(ask: Mapping[str, Any], left: float) -> Any:
        nonlocal asked
        asked += 1
        source, stdin, seconds = ask.get("source"), ask.get("stdin"), ask.get("seconds")
        if ask.get("kind") != "program" or not isinstance(source, str) or not isinstance(stdin, str):
            return {"error": "only programs can be run: run_program(source, stdin, seconds)"}
        if asked > MAX_PROGRAMS or len(source) > SOURCE_BYTES or len(stdin) > SOURCE_BYTES:
            return {"error": f"more than {MAX_PROGRAMS} programs, or one with more than {SOURCE_BYTES} characters"}
        wanted = seconds if isinstance(seconds, (int, float)) and seconds > 0 else config.program_timeout_s
        ran = await sandbox.run(Job(mode="program", source=source, stdin=stdin, seconds=min(wanted, left)))
        return {"end": ran.end.value, "exit_code": ran.exit_code, "stdout": ran.stdout, "stderr": ran.stderr}

    return answer
