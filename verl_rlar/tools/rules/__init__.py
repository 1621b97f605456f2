# SPDX-License-Identifier: Apache-2.0
"""The built-in rules, one file per family; `BUILTIN` lists them in the order in which a router prefers them."""

from verl_rlar.tools.rule import Rule
from verl_rlar.tools.rules.choice import multiple_choice
from verl_rlar.tools.rules.code import unit_tests, unit_tests_partial
from verl_rlar.tools.rules.format import length_limits, think_format
from verl_rlar.tools.rules.instruction import instruction_constraints
from verl_rlar.tools.rules.json_schema import json_schema
from verl_rlar.tools.rules.math import final_answer
from verl_rlar.tools.rules.text import exact_match, token_f1
from verl_rlar.tools.rules.translation import translation

BUILTIN: tuple[Rule, ...] = (
    unit_tests,
    unit_tests_partial,
    instruction_constraints,
    json_schema,
    multiple_choice,
    translation,
    final_answer,
    exact_match,
    token_f1,
    think_format,
    length_limits,
)
