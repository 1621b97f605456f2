# SPDX-License-Identifier: Apache-2.0
"""A tool of your own, the trusted way: a rule for times of day. 23:15, 11.15 pm and "It is 11:15 p.m." are the same."""

import re

from verl_rlar.tools.rule import rule
from verl_rlar.types import Kind, Sample, Verdict

TIME = re.compile(r"(?<![\d:.])(\d{1,2})[:.](\d{2})(?![\d:]|\.\d)\s*(?:([ap])\.?m\b)?", re.IGNORECASE)


def times(text: str) -> set[int]:
    """The times of day in a text, in minutes since midnight."""
    found = set()
    for hour, minute, half in TIME.findall(text):
        hours = int(hour) % 12 + 12 * (half in "pP") if half else int(hour)
        if hours < 24 and int(minute) < 60:
            found.add(60 * hours + int(minute))
    return found


@rule(
    name="clock_time",
    kinds={Kind.SHORT_TEXT},
    description="A time of day: 1 if the last line of the response has the reference's time and no other, else 0.",
    misses=("A right time by wrong reasoning scores 1.", "Times in words (half past ten) are not read."),
)
def clock_time(sample: Sample) -> Verdict:
    wanted = times(sample.query.reference or "")
    if len(wanted) != 1:
        return Verdict(value=None, reason="the reference is no time of day")
    said = times(sample.response.strip().rpartition("\n")[2])
    return Verdict(value=float(said == wanted), reason=f"{len(said)} times in the last line")
