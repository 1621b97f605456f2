# SPDX-License-Identifier: Apache-2.0
"""How much memory a reward model needs, and where there is room for it.

Sizes come from the headers of the safetensors files, so nothing is loaded to know them.

Guarantees: what is placed fits on each device together with all that is there (I5); the same models are always placed
in the same way; what does not fit is an error that names every model's size and every device's room.

Not covered: a lying header. The loader checks a file's length against it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_rlar.errors import ToolUnavailable

GIB = 2**30
NAMES = ("_name_or_path", "transformers_version", "id2label", "label2id")
"""Fields of a config that are nothing but names."""
BESIDE = ("tokenizer.json", "generation_config.json")
"""Files beside the config that a server reads once and for all."""
HEADER_BYTES = 100 << 20
"""Longest header of a safetensors file; the format's own limit."""


@dataclass(frozen=True, kw_only=True)
class Need:
    """What one replica takes up."""

    name: str
    """Model, for messages."""
    key: str
    """`ServedModel.key`."""
    devices: int
    """On how many devices it lies, in equal parts."""
    bytes_each: int
    """Memory on each of them."""


def parameters(folder: str | Path) -> int:
    """Number of a model's parameters, out of its safetensors files.

    Raises:
        ToolUnavailable: There are none in the folder, or one of them is not whole.
    """
    return sum(math.prod(tensor["shape"]) for tensor in _tensors(folder).values())


def shape(folder: str | Path) -> str:
    """Identity of all about a model but its weights and names: its config, its tokens, and the names, types and shapes
    of its weights. A server of one model can take up the weights of another one of the same shape.

    Raises:
        ToolUnavailable: There is no whole model in the folder.
    """
    try:
        config = json.loads(Path(folder, "config.json").read_bytes())
        beside = [path.read_bytes() for name in BESIDE if (path := Path(folder, name)).exists()]
    except (OSError, ValueError) as error:
        raise ToolUnavailable(f"{folder} holds no model: {error}") from None
    known = {name: value for name, value in config.items() if name not in NAMES}
    tensors = {name: [value["dtype"], value["shape"]] for name, value in _tensors(folder).items()}
    digest = hashlib.sha256(json.dumps([known, tensors], sort_keys=True).encode())
    for data in beside:
        digest.update(hashlib.sha256(data).digest())
    return digest.hexdigest()


def _tensors(folder: str | Path) -> dict[str, dict[str, Any]]:
    """What the headers of a model's safetensors files say of each weight."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise ToolUnavailable(f"{folder} has no *.safetensors: other weights are not loaded")
    found: dict[str, dict[str, Any]] = {}
    for path in files:
        try:
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                if length > HEADER_BYTES:
                    raise ValueError(f"a header of {length} bytes")
                header = json.loads(file.read(length))
            tensors = {name: value for name, value in header.items() if name != "__metadata__"}
            end = max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
            if path.stat().st_size != 8 + length + end:
                raise ValueError(f"{path.stat().st_size} bytes long instead of {8 + length + end}")
            for tensor in tensors.values():
                math.prod(tensor["shape"]), str(tensor["dtype"])
            found |= tensors
        except (OSError, ValueError, TypeError, LookupError, struct.error, AttributeError) as error:
            raise ToolUnavailable(f"{path} is no whole safetensors file: {error}") from None
    return found


def machine_memory() -> int:
    """Memory of this machine or of the container it is, in bytes."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def place(
    needs: Sequence[Need], room: Mapping[str, int], taken: Sequence[tuple[Need, tuple[str, ...]]] = ()
) -> dict[int, tuple[str, ...]]:
    """Finds devices for replicas, the largest first, each where most is free.

    Args:
        needs: The replicas.
        room: Bytes of each device, by name.
        taken: What lies on them already.

    Returns:
        The devices of each replica, by its index in `needs`.

    Raises:
        ToolUnavailable: There is no room for all.
    """
    free = dict(room)
    for need, devices in taken:
        for device in devices:
            free[device] -= need.bytes_each
    found: dict[int, tuple[str, ...]] = {}
    for index in sorted(range(len(needs)), key=lambda i: (-needs[i].bytes_each, -needs[i].devices, needs[i].key, i)):
        need = needs[index]
        best = sorted(free, key=lambda device: (-free[device], device))[: need.devices]
        if len(best) < need.devices or any(free[device] < need.bytes_each for device in best):
            sizes = "; ".join(_size(n) for n in [*needs, *(n for n, _ in taken)])
            rooms = ", ".join(f"{device} {size / GIB:.2f} GiB" for device, size in room.items())
            raise ToolUnavailable(
                f"the reward models do not fit together. Needed: {sizes}. Given: {rooms or 'no device'}. Take fewer or "
                "smaller models, fewer replicas (rlar.serving.replicas), a smaller rlar.serving.dtype, or give more "
                "(rlar.serving.memory_gb, rlar.serving.gpus)"
            )
        for device in best:
            free[device] -= need.bytes_each
        found[index] = tuple(best)
    return found


def _size(need: Need) -> str:
    on = f" on each of {need.devices} devices" if need.devices > 1 else ""
    return f"{need.name} {need.bytes_each / GIB:.2f} GiB{on}"
