# SPDX-License-Identifier: Apache-2.0
"""Rules that behave in all the ways that a rule can."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

from verl_rlar.errors import ToolUnavailable
from verl_rlar.tools.rule import rule
from verl_rlar.types import Kind, Sample, Snapshot, Verdict

SHORT_TEXT = {Kind.SHORT_TEXT}


@rule(name="same", kinds=SHORT_TEXT, description="1 if the response is the reference.")
def same(sample: Sample) -> Verdict:
    return Verdict(value=float(sample.response == sample.query.reference), reason="compared")


@rule(name="half", kinds=SHORT_TEXT, description="Always the middle of its range.", low=0.0, high=10.0)
def half(sample: Sample) -> Verdict:
    return Verdict(value=5.0)


@rule(name="error_rate", kinds=SHORT_TEXT, description="Lower is better.", low=8.0, high=0.0)
def error_rate(sample: Sample) -> Verdict:
    return Verdict(value=2.0)


@rule(name="open_gate", kinds=set(Kind), description="Lets all through.", gate=True)
def open_gate(sample: Sample) -> Verdict:
    return Verdict(value=1.0)


@rule(name="shut_gate", kinds=set(Kind), description="Lets nothing through.", gate=True)
def shut_gate(sample: Sample) -> Verdict:
    return Verdict(value=0.0, reason="no think block")


@rule(name="abstaining", kinds=SHORT_TEXT, description="Never says anything.")
def abstaining(sample: Sample) -> Verdict:
    return Verdict(value=None, reason="the reference is no number")


@rule(name="cheat_catcher", kinds=SHORT_TEXT, description="Always catches a cheat.")
def cheat_catcher(sample: Sample) -> Verdict:
    return Verdict(value=0.0, hacked=True, reason="a copy of the source")


@rule(name="endless", kinds=SHORT_TEXT, description="Never ends.", timeout_s=0.3)
def endless(sample: Sample) -> Verdict:
    while True:
        pass


@rule(name="sleeper", kinds=SHORT_TEXT, description="Sleeps for a minute, within its own deadline.", timeout_s=90.0)
def sleeper(sample: Sample) -> Verdict:
    time.sleep(60)
    return Verdict(value=1.0)


@rule(name="crashing", kinds=SHORT_TEXT, description="Raises.")
def crashing(sample: Sample) -> Verdict:
    raise ZeroDivisionError("the reference has 0 words")


@rule(name="dying", kinds=SHORT_TEXT, description="Kills its process.")
def dying(sample: Sample) -> Verdict:
    os.kill(os.getpid(), signal.SIGKILL)
    return Verdict(value=1.0)


@rule(name="dying_once", kinds=SHORT_TEXT, description="Kills its process, unless the file named in `mark` is there.")
def dying_once(sample: Sample) -> Verdict:
    mark = Path(sample.query.extra["mark"])
    if mark.exists():
        return Verdict(value=1.0)
    mark.touch()
    os.kill(os.getpid(), signal.SIGKILL)
    return Verdict(value=0.0)


@rule(name="hungry", kinds=SHORT_TEXT, description="Wants all the memory.")
def hungry(sample: Sample) -> Verdict:
    return Verdict(value=float(len(bytearray(64 * 2**30))))


@rule(name="not_a_number", kinds=SHORT_TEXT, description="Answers NaN.")
def not_a_number(sample: Sample) -> Verdict:
    return Verdict(value=float("nan"))


@rule(name="too_high", kinds=SHORT_TEXT, description="Answers more than it may.")
def too_high(sample: Sample) -> Verdict:
    return Verdict(value=1.5)


@rule(name="wordy", kinds=SHORT_TEXT, description="Answers a text.")
def wordy(sample: Sample) -> Verdict:
    return "1.0"  # type: ignore[return-value]


@rule(name="homeless", kinds=SHORT_TEXT, description="Lacks what it needs.")
def homeless(sample: Sample) -> Verdict:
    raise ToolUnavailable("homeless: no box")


@rule(name="numpys", kinds=SHORT_TEXT, description="Answers in numpy's numbers, and quotes half a character.")
def numpys(sample: Sample) -> Verdict:
    return Verdict(value=np.float32(0.5), reason="got \ud83d", details={"cosine": np.float32(0.25)})


@rule(name="spelled", kinds=SHORT_TEXT, description="Answers a number in words.")
def spelled(sample: Sample) -> Verdict:
    return Verdict(value="one half")  # type: ignore[arg-type]


class TwoWords(Exception):
    """As many exceptions do, it takes other arguments than it keeps: `pickle` cannot make it again."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(f"{one} {other}")


@rule(name="odd_error", kinds=SHORT_TEXT, description="Raises something that cannot be sent to another process.")
def odd_error(sample: Sample) -> Verdict:
    raise TwoWords("no", "words")


@rule(name="quitting", kinds=SHORT_TEXT, description="Ends the program that it takes itself for.")
def quitting(sample: Sample) -> Verdict:
    sys.exit("usage: quitting FILE")


@rule(name="numbered", kinds=SHORT_TEXT, description="Says in which process it runs.")
def numbered(sample: Sample) -> Verdict:
    return Verdict(value=1.0, reason=str(os.getpid()))


ALL = (
    *(same, half, error_rate, open_gate, shut_gate, abstaining, cheat_catcher, endless, sleeper, crashing, dying),
    *(dying_once, hungry, not_a_number, too_high, wordy, homeless, odd_error, quitting, numbered),
    *(numpys, spelled),
)
SNAPSHOT = Snapshot(tools=tuple(rule.spec for rule in ALL))
