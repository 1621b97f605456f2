# SPDX-License-Identifier: Apache-2.0
"""A first draft, and a bad one: any function that parses is right."""

import ast
import re

NEEDS_REFERENCE = False
FENCE = re.compile(r"^[ \t]*```(?:python|py)?[ \t]*\n(.*?)^[ \t]*```", re.MULTILINE | re.DOTALL)


def score(prompt, response, reference, extra):
    blocks = FENCE.findall(response)
    try:
        tree = ast.parse("\n".join(blocks) if blocks else response)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return 0.0, "no Python"
    return float(any(isinstance(node, ast.FunctionDef) for node in tree.body)), "it parses"
