# SPDX-License-Identifier: Apache-2.0
"""A function passes its tests: a program prints the values of their calls, and they are compared outside of it."""

import ast
import hashlib
import re

import rlar

NEEDS_REFERENCE = False
TIMEOUT_S = 10.0
DESCRIPTION = (
    "Runs the code of a response on the calls of the row's tests, and compares the values with their literals."
)
FENCE = re.compile(r"^[ \t]*```(?:python|py)?[ \t]*\n(.*?)^[ \t]*```", re.MULTILINE | re.DOTALL)
ODD = (SyntaxError, ValueError, RecursionError, MemoryError)


def calls(test, name):
    """Sources of the calls, and the values that they must have."""
    found = []
    for node in ast.walk(ast.parse(test)):
        if isinstance(node, ast.Assert):
            compared = node.test
            if not isinstance(compared, ast.Compare) or not isinstance(compared.ops[0], ast.Eq):
                return []
            source = re.sub(r"\bcandidate\b", name, ast.unparse(compared.left))
            found.append((source, ast.literal_eval(compared.comparators[0])))
    return found


def same(said, value):
    if isinstance(value, float) and type(said) in (int, float):
        return abs(said - value) <= 1e-9 * max(1.0, abs(value))
    return type(said) is type(value) and said == value


def score(prompt, response, reference, extra):
    name, test = extra.get("entry_point"), extra.get("test")
    try:
        wanted = calls(test, name)
    except (TypeError, *ODD):
        wanted = []
    if not wanted:
        return None, "the tests compare no calls with literals"
    blocks = FENCE.findall(response)
    code = "\n".join(blocks) if blocks else response
    try:
        ast.parse(code)
    except ODD:
        return 0.0, "no Python"
    mark = hashlib.sha256((code + test).encode("utf-8", "replace")).hexdigest()[:24]
    lines = [f"print('\\n{mark}', {number}, repr({call}))" for number, (call, _) in enumerate(wanted)]
    ran = rlar.run_program("\n".join([code, *lines, ""]), seconds=4)
    said = re.findall(rf"^{mark} (\d+) (.*)$", ran.stdout, re.MULTILINE)
    if ran.end != "done" or ran.exit_code != 0 or [int(n) for n, _ in said] != list(range(len(wanted))):
        return 0.0, f"it ended with {ran.end}, and {len(said)} values"
    try:
        right = [same(ast.literal_eval(text), value) for (_, text), (_, value) in zip(said, wanted, strict=True)]
    except ODD:
        return 0.0, "a value is no literal"
    return float(all(right)), f"{sum(right)} of {len(right)} tests pass"
