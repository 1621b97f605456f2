# SPDX-License-Identifier: Apache-2.0
"""Runs a verifier: code that we did not write, in a box, on one sample.

A verifier is a module with a function ``score(prompt, response, reference, extra)`` that returns a number in [0, 1], or
None where it has nothing to say, or one of these with a reason. It may have programs run, each in another box, and
ask the built-in rules that it wraps (``rlar.run_program``, ``rlar.builtin``: see
`verl_rlar.sandbox.inside.verifier_api`). Which these are is read off its source (`wrapped`), and stands in its spec.

Guarantees: only a finite number in [0, 1], or None, is an answer; everything else, above all an answer that did not
come through the harness, is a failure of the tool and no score. No built-in rule answers a verifier whose spec does not
name it, in the version that it was examined with (I3): where a rule is another one by now, verifiers that wrap it score
nothing, and say so. A rule is asked about the row at hand only, in the processes of our rules, within the verifier's
deadline.

Not covered: rules that have programs run themselves cannot be wrapped. A verifier that executes text of the response in
its own process gives its vote away; processes and threads are denied to it, and the exam is there to find such
verifiers.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from verl_rlar.config import SandboxConfig
from verl_rlar.errors import ConfigError, ToolError, ToolTimeout, ToolUnavailable
from verl_rlar.sandbox import Answerer, End, Job, Sandbox
from verl_rlar.tools.runner import RuleRunner
from verl_rlar.types import Sample, ToolSpec, Verdict

MAX_PROGRAMS = 64
"""Programs that a verifier may have run for one sample, calls of built-in rules included."""
SOURCE_BYTES = 1 << 20
"""Most text that a verifier may hand over as a program, or as its input."""
ASKED_BYTES = 8 << 20
"""Most that a verifier which wraps rules may write, its questions included."""


@cache
def wrappable() -> Mapping[str, ToolSpec]:
    """The built-in rules that a verifier can wrap, by name."""
    from verl_rlar.tools.rules import BUILTIN  # late: it loads SymPy

    return {rule.spec.name: rule.spec for rule in BUILTIN if not rule.spec.boxed}


def wrapped(tree: ast.Module) -> tuple[str, ...]:
    """The built-in rules that a verifier's source asks, by the names in calls of ``rlar.builtin``; sorted.

    Returns:
        ``NAME@DIGEST`` of each.

    Raises:
        ConfigError: A call does not name its rule as a literal, or names one that cannot be wrapped.
    """
    found = set()
    for call in _calls_of_builtin(tree):
        named = call.args[0] if call.args else next((k.value for k in call.keywords if k.arg == "name"), None)
        name = named.value if isinstance(named, ast.Constant) else None
        if not isinstance(name, str) or name not in wrappable():
            raise ConfigError(
                f"line {call.lineno}: rlar.builtin needs the name of a built-in tool as a literal, one of "
                f"{', '.join(sorted(wrappable()))}"
            )
        found.add(f"{name}@{wrappable()[name].digest}")
    return tuple(sorted(found))


def _calls_of_builtin(tree: ast.Module) -> Iterator[ast.Call]:
    nodes = [*ast.walk(tree)]
    modules = {a.asname or a.name for n in nodes if isinstance(n, ast.Import) for a in n.names if a.name == "rlar"}
    imports = [n for n in nodes if isinstance(n, ast.ImportFrom) and n.module == "rlar"]
    functions = {a.asname or a.name for n in imports for a in n.names if a.name == "builtin"}
    for node in nodes:
        if isinstance(node, ast.Call):
            asked = node.func
            if isinstance(asked, ast.Name) and asked.id in functions:
                yield node
            if isinstance(asked, ast.Attribute) and asked.attr == "builtin" and isinstance(asked.value, ast.Name):
                if asked.value.id in modules:
                    yield node


async def verify(
    spec: ToolSpec,
    source: str,
    sample: Sample,
    sandbox: Sandbox,
    config: SandboxConfig,
    rules: RuleRunner | None = None,
) -> Verdict:
    """Scores a sample by a verifier.

    Args:
        spec: The verifier; its deadline is ``timeout_s``.
        source: Its source text.
        sample: The sample.
        sandbox: Where it runs.
        config: Limits of the programs that it asks for.
        rules: Runs the rules that it wraps. None: it wraps none.

    Raises:
        ToolTimeout: It did not answer in time.
        ToolError: It raised, crashed, or answered something else than a number in [0, 1] or None.
        ToolUnavailable: A rule that it wraps is another one by now.
        BoxLost, ToolUnavailable: See `Sandbox.run`.
    """
    for wrapped_rule in spec.wraps:
        name, _, digest = wrapped_rule.partition("@")
        if name not in wrappable() or wrappable()[name].digest != digest:
            raise ToolUnavailable(
                f"{spec.name}: it wraps {wrapped_rule}, and this release has another {name}; "
                "examine it anew (`rlar exam`)"
            )
    inputs = {
        "prompt": sample.query.prompt,
        "response": sample.response,
        "reference": sample.query.reference,
        "extra": dict(sample.query.extra),
    }
    job = Job(mode="verifier", source=source, inputs=inputs, seconds=spec.timeout_s)
    if spec.wraps:
        job = replace(job, output_bytes=ASKED_BYTES)
    ran = await sandbox.run(job, _answerer(spec, sample, sandbox, config, rules))
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


def _answerer(
    spec: ToolSpec, sample: Sample, sandbox: Sandbox, config: SandboxConfig, rules: RuleRunner | None
) -> Answerer:
    """What answers a verifier's ``run_program`` and ``builtin``; what they come to goes back to it."""
    asked = 0

    async def answer(ask: Mapping[str, Any], left: float) -> Any:
        nonlocal asked
        asked += 1
        if asked > MAX_PROGRAMS:
            return {"error": f"more than {MAX_PROGRAMS} programs and calls of built-in tools"}
        if ask.get("kind") == "builtin":
            return await builtin(ask, left)
        source, stdin, seconds = ask.get("source"), ask.get("stdin"), ask.get("seconds")
        if ask.get("kind") != "program" or not isinstance(source, str) or not isinstance(stdin, str):
            return {"error": "only programs can be run: run_program(source, stdin, seconds)"}
        if len(source) > SOURCE_BYTES or len(stdin) > SOURCE_BYTES:
            return {"error": f"a program, or its input, has more than {SOURCE_BYTES} characters"}
        wanted = seconds if isinstance(seconds, (int, float)) and seconds > 0 else config.program_timeout_s
        ran = await sandbox.run(Job(mode="program", source=source, stdin=stdin, seconds=min(wanted, left)))
        return {"end": ran.end.value, "exit_code": ran.exit_code, "stdout": ran.stdout, "stderr": ran.stderr}

    async def builtin(ask: Mapping[str, Any], left: float) -> Any:
        name, response, reference = ask.get("name"), ask.get("response"), ask.get("reference")
        if name not in {one.partition("@")[0] for one in spec.wraps} or rules is None:
            return {"error": f"{str(name)[:80]!r} is not named in the source, as in rlar.builtin('final_answer', ...)"}
        if not isinstance(response, str) or not isinstance(reference, str | None):
            return {"error": "response is a text, and reference a text or None"}
        if max(len(response), len(reference or "")) > SOURCE_BYTES:
            return {"error": f"a text has more than {SOURCE_BYTES} characters"}
        rule = wrappable()[name]
        query = sample.query if reference is None else replace(sample.query, reference=reference)
        try:
            verdict = await rules.run(
                replace(rule, timeout_s=min(rule.timeout_s, left)), replace(sample, query=query, response=response)
            )
        except (ToolError, ConnectionError) as error:
            return {"error": str(error)[:300]}
        return [verdict.value, verdict.reason]

    return answer
