# SPDX-License-Identifier: Apache-2.0
"""What one section of a benchmark script reports. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class SectionResult:
    """The outcome of one section: what was measured, what was wanted, and whether it was reached."""

    figures: dict[str, float]
    """Measured numbers by name."""
    goals: dict[str, str | float] = field(default_factory=dict)
    """What each figure must reach, by the figure's name: a number, or words such as ``>= 0.99``."""
    ok: bool
    """Whether every goal is reached."""
    notes: tuple[str, ...] = ()
    """One line for each disagreement, with its verdict; printed by ``--list``."""
