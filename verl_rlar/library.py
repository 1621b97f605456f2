# SPDX-License-Identifier: Apache-2.0
"""The tools that a run can use. Today: the built-in rules."""

from functools import cache

from verl_rlar.tools.rules import BUILTIN
from verl_rlar.types import Snapshot


@cache
def builtin_snapshot() -> Snapshot:
    """The built-in rules, in the order in which a router prefers them."""
    return Snapshot(tools=tuple(rule.spec for rule in BUILTIN))
