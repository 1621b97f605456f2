# SPDX-License-Identifier: Apache-2.0
"""Shared by all tests: samples, and the planted rules that workers must be able to import."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from verl_rlar.types import Message, Query, Sample

sys.path.insert(0, str(Path(__file__).parent))  # worker processes import `planted` from here


def make_query(prompt: str = "What is 6 times 7?", reference: str | None = "42", **extra: Any) -> Query:
    return Query(messages=(Message(role="user", content=prompt),), reference=reference, data_source="test", extra=extra)


def make_sample(response: str = "42", query: Query | None = None, **fields: Any) -> Sample:
    return Sample(query=query or make_query(), response=response, **fields)


@pytest.fixture
def query() -> Callable[..., Query]:
    return make_query


@pytest.fixture
def sample() -> Callable[..., Sample]:
    return make_sample
