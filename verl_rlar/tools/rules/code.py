# SPDX-License-Identifier: Apache-2.0
"""Code with unit tests: recognised and routed, not yet run.

Code that a policy wrote runs in a Docker box or not at all (I6), and this release has no box yet. So the rule is always
unavailable: the outcome is ``failed`` with that reason, and never a score of 0.
"""

from verl_rlar.errors import ToolUnavailable
from verl_rlar.tools.rule import rule
from verl_rlar.types import Kind, Sample, Verdict


@rule(
    name="unit_tests",
    kinds={Kind.UNIT_TESTS},
    description="Runs the row's unit tests against the program in the response, in a Docker box.",
    misses=("Everything, for now: it waits for the box, and its responses stay unscored.",),
    needs_reference=False,
)
def unit_tests(sample: Sample) -> Verdict:
    """Raises `ToolUnavailable`, always."""
    raise ToolUnavailable("unit_tests: code runs in a Docker box only, which this release does not have yet")
