# SPDX-License-Identifier: Apache-2.0
"""Sections of `rules.py` on translation and instruction following. (Stub until its owner writes it.)"""

from __future__ import annotations

from collections.abc import Callable

from section import SectionResult

SECTIONS: dict[str, Callable[[], SectionResult]] = {}
