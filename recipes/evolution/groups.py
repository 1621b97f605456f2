# SPDX-License-Identifier: Apache-2.0
"""What the answers to a prompt got, counted by their hidden labels."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from verl_rlar.signs import flat


@dataclass
class Group:
    """What a prompt's answers got."""

    step: int
    task: str
    right: tuple[bool, ...]
    sent: tuple[float, ...]
    """As verl gets them."""
    covered: bool

    @property
    def accuracy(self) -> float:
        pairs = [
            0.5 if abs(good - bad) < 1e-9 else float(good > bad)
            for good, is_right in zip(self.sent, self.right, strict=True)
            if is_right
            for bad, other_is_right in zip(self.sent, self.right, strict=True)
            if not other_is_right
        ]
        return statistics.fmean(pairs)

    @property
    def gradient(self) -> str:
        """``none``, ``right`` or ``wrong``: on which side GRPO's advantages are higher."""
        if flat(self.sent):
            return "none"
        mean, std = statistics.fmean(self.sent), statistics.stdev(self.sent)
        good, bad = (
            statistics.fmean(
                (one - mean) / std for one, is_right in zip(self.sent, self.right, strict=True) if is_right is of
            )
            for of in (True, False)
        )
        return "right" if good > bad + 1e-9 else "wrong" if bad > good + 1e-9 else "none"


def mean_accuracy(groups: Iterable[Group]) -> float:
    return statistics.fmean(group.accuracy for group in groups)


def share(groups: Sequence[Group], gradient: str) -> float:
    return sum(group.gradient == gradient for group in groups) / len(groups)
