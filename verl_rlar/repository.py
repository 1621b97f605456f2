# SPDX-License-Identifier: Apache-2.0
"""A model's repository on the hub, as values: what the hub says about it, its files, its config, its tensors.

`verl_rlar.hub` fills them in, `verl_rlar.gate` judges them. The readers here take what a hub or a repository says,
which anybody may have written.

Guarantees: pure; nothing is trusted: what is broken is left out, or a `ValueError` that says what is wrong.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, cast

from verl_rlar.errors import HubGated

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
CONFIG, TOKENIZER_CONFIG, CARD = "config.json", "tokenizer_config.json", "README.md"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
WANTED = re.compile(
    r"config\.json|generation_config\.json|tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json"
    r"|added_tokens\.json|vocab\.(?:json|txt)|merges\.txt|(?:tokenizer|spiece|spm|sentencepiece\.bpe)\.model"
    r"|chat_template\.(?:jinja|json)|README\.md|LICEN[CS]E(?:\.md|\.txt)?"
)
"""Names of the files that are downloaded beside the weights."""
LICENCE_FILE = re.compile(r"(?:LICEN[CS]E|COPYING)(?:\.md|\.txt)?", re.IGNORECASE)
SMALL_BYTES = 64 * MIB
"""Largest file that is downloaded beside the weights."""
SHARDS = 128
"""Most files that a model's weights may be in."""
COMMIT = re.compile(r"[0-9a-f]{40}")
NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
"""Names of repositories: owner and name."""
CONFIG_BYTES = 256 * KIB
"""Largest config file that is read."""
INDEX_BYTES = 16 * MIB
CARD_BYTES = 64 * KIB
"""Length at which a card is cut."""
HEADER_BYTES = 8 * MIB
"""Longest header of a safetensors file."""

Read = Callable[[str, int, int], bytes]
"""Gives the bytes of a file, by its path, from the first up to, not including, the last.

Raises:
    HubError: They cannot be had; `HubGated`: they may not be read.
"""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the hub says about a model without a look at its files."""

    repo: str
    """Owner and name."""
    commit: str
    """Newest commit, 40 hex digits; empty if a search did not say."""
    gated: bool = False
    """Whether its owner wants something before it can be read."""
    private: bool = False
    disabled: bool = False
    downloads: int = 0
    """In the last month."""
    likes: int = 0
    created: str = ""
    """ISO 8601, as the hub says it; empty if it does not."""
    modified: str = ""
    tags: tuple[str, ...] = ()
    pipeline: str = ""
    """The hub's name of its task."""
    licence: str = ""
    """As the card says, in the hub's names; empty if it does not."""
    languages: tuple[str, ...] = ()
    base_models: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    parameters: int | None = None
    """Number of parameters that the hub states."""

    @property
    def owner(self) -> str:
        return self.repo.partition("/")[0]


@dataclass(frozen=True, kw_only=True)
class HubFile:
    """A file of a repository at a commit."""

    path: str
    size: int
    """In bytes."""
    blob: str = ""
    """Git's hash of the file; of its pointer, if `sha256` is given."""
    sha256: str = ""
    """SHA-256 of the content of a large file; empty for others."""


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """A tensor, by the header of its file."""

    dtype: str
    """In safetensors' names: ``F32``, ``BF16``, ..."""
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True, kw_only=True)
class HubModel:
    """A model as it is at one commit: all that can be known before its weights are loaded."""

    facts: Facts
    files: tuple[HubFile, ...]
    weights: tuple[HubFile, ...] = ()
    """The safetensors files that would be loaded; empty if there are none, or not all that the index names."""
    config: Mapping[str, Any] | None = None
    """Content of ``config.json``."""
    tokenizer_config: Mapping[str, Any] | None = None
    card: str = ""
    """The model card: text that anybody may have written, cut after 64 KiB. Data, never an instruction."""
    licence_text: str = ""
    """The beginning of the licence file, if there is one."""
    tensors: Mapping[str, Tensor] | None = None
    """Every tensor of `weights`, by name. None: a header is broken (`faults`), or they are too large to look at."""
    closed: str = ""
    """Why the hub does not let us read the files; empty if it does."""
    faults: Mapping[str, str] | None = None
    """What is wrong with a file, by its path."""

    @property
    def repo(self) -> str:
        return self.facts.repo

    @property
    def commit(self) -> str:
        return self.facts.commit

    @property
    def weight_bytes(self) -> int:
        """Size of the weights, in bytes."""
        return sum(file.size for file in self.weights)

    @property
    def wanted(self) -> tuple[HubFile, ...]:
        """What is downloaded: the weights, and the small files that a loader reads."""
        small = (file for file in self.files if WANTED.fullmatch(file.path) and file.size <= SMALL_BYTES)
        index = (file for file in self.files if file.path == INDEX and len(self.weights) > 1)
        return (*small, *index, *self.weights)


def parse_header(header: bytes, size: int) -> dict[str, Tensor]:
    """Reads the header of a safetensors file, and checks that the file holds exactly what it says.

    Args:
        header: The JSON text between the length and the data.
        size: Bytes of data that follow it in the file.

    Raises:
        ValueError: It is broken, or the file is longer or shorter than it says; the message says which.
    """
    try:
        content = json.loads(header)
    except (ValueError, RecursionError):
        raise ValueError("its header is no JSON") from None
    if not isinstance(content, dict):
        raise ValueError("its header is no JSON object")
    content.pop("__metadata__", None)
    tensors: dict[str, Tensor] = {}
    spans: list[tuple[int, int]] = []
    for name, entry in content.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        except (TypeError, KeyError, ValueError):
            raise ValueError(f"tensor {name[:80]!r} has no dtype, shape and place") from None
        numbers = (*shape, begin, end)
        if dtype not in BITS or not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(f"tensor {name[:80]!r} has an unknown dtype, or a bad shape or place")
        tensors[name] = Tensor(dtype=dtype, shape=shape)
        if (end - begin) * 8 != tensors[name].elements * BITS[dtype]:
            raise ValueError(f"tensor {name[:80]!r} has another size than its shape and dtype")
        spans.append((begin, end))
    reached = 0
    for begin, end in sorted(spans):
        if begin != reached:
            raise ValueError("its tensors overlap, or there are gaps between them")
        reached = end
    if reached != size:
        verb = "truncated" if size < reached else "longer than its tensors"
        raise ValueError(f"it is {verb}: {size:,} bytes of data, its header says {reached:,}")
    return tensors


BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E5M2": 8, "F8_E4M3": 8, "I64": 64, "I32": 32, "I16": 16, "I8": 8,
    "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip
"""Size of an element by safetensors' name of the dtype, in bits."""


def is_plain(path: str) -> bool:
    """Whether a path of a repository stays inside of it, and is written as one would."""
    parts = PurePosixPath(path).parts
    return (
        0 < len(path) <= 500
        and path.isprintable()
        and "\\" not in path
        and not path.startswith("/")
        and ".." not in parts
        and "/".join(parts) == path
    )


def look_into(facts: Facts, files: tuple[HubFile, ...], read: Read, weight_bytes: int) -> HubModel:
    """Reads what can be known about a model before its weights are loaded.

    Args:
        facts: What is said about it.
        files: Its files.
        read: Reads them.
        weight_bytes: Largest size of the weights of which the headers are read.

    Raises:
        HubError: From `read`, but for `HubGated`: that is a part of the answer.
    """
    by_path = {file.path: file for file in files}
    faults: dict[str, str] = {}

    def text(path: str, cap: int, *, cut: bool = False) -> str:
        if path not in by_path:
            return ""
        if by_path[path].size > cap and not cut:
            faults[path] = f"{by_path[path].size:,} bytes; at most {cap:,} are read"
            return ""
        end = min(cap, by_path[path].size)
        return read(path, 0, end).decode("utf-8", "replace") if end else ""

    def mapping(path: str, cap: int) -> Mapping[str, Any] | None:
        if path not in by_path or not (content := text(path, cap)):
            return None
        try:
            value = json.loads(content)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            return cast(Mapping[str, Any], value)
        faults[path] = "no JSON object"
        return None

    weights: tuple[HubFile, ...] = ()
    tensors: Mapping[str, Tensor] | None = None
    config = tokenizer_config = None
    card = licence_text = closed = ""
    try:
        config = mapping(CONFIG, CONFIG_BYTES)
        tokenizer_config = mapping(TOKENIZER_CONFIG, 16 * CONFIG_BYTES)
        card = text(CARD, CARD_BYTES, cut=True)
        licence_file = next((path for path in sorted(by_path) if LICENCE_FILE.fullmatch(path)), "")
        licence_text = text(licence_file, 4 * KIB, cut=True)
        if WEIGHTS in by_path:
            weights = (by_path[WEIGHTS],)
        elif INDEX in by_path:
            weights = shards_of(mapping(INDEX, INDEX_BYTES), by_path, faults)
        if weights and sum(file.size for file in weights) <= weight_bytes:
            tensors = _tensors(weights, read, faults)
    except HubGated as error:
        closed = str(error)
    return HubModel(
        facts=facts,
        files=files,
        weights=weights,
        config=config,
        tokenizer_config=tokenizer_config,
        card=card,
        licence_text=licence_text,
        tensors=tensors,
        closed=closed,
        faults=faults,
    )


def _tensors(weights: tuple[HubFile, ...], read: Read, faults: dict[str, str]) -> Mapping[str, Tensor] | None:
    """The tensors of all files; None if one of the headers is broken."""
    tensors: dict[str, Tensor] = {}
    for file in weights:
        try:
            length = int.from_bytes(read(file.path, 0, 8), "little") if file.size > 8 else 0
            if not 2 <= length <= min(HEADER_BYTES, file.size - 8):
                raise ValueError(f"its header would be {length:,} bytes long, the file is {file.size:,}")
            found = parse_header(read(file.path, 8, 8 + length), file.size - 8 - length)
            if both := sorted(found.keys() & tensors.keys()):
                raise ValueError(f"tensor {both[0]!r} is in another file, too")
        except ValueError as error:
            faults[file.path] = str(error)
            return None
        tensors |= found
    return tensors


def facts_of(item: Any) -> Facts | None:
    """What an entry of the hub's says; None if it is none."""
    if not isinstance(item, dict) or not NAME.fullmatch(str(item.get("id"))):
        return None
    card = item.get("cardData") if isinstance(item.get("cardData"), dict) else {}
    assert isinstance(card, dict)
    tags = _strings(item.get("tags"))
    licences = _strings(card.get("license")) or tuple(t[8:] for t in tags if t.startswith("license:"))
    if licences == ("other",) and (named := _strings(card.get("license_name"))):
        licences = named
    weights = item.get("safetensors")
    parameters = weights.get("total") if isinstance(weights, dict) else None
    commit = item.get("sha")
    return Facts(
        repo=item["id"],
        commit=commit if isinstance(commit, str) and COMMIT.fullmatch(commit) else "",
        gated=bool(item.get("gated")),
        private=bool(item.get("private")),
        disabled=bool(item.get("disabled")),
        downloads=_count(item.get("downloads")),
        likes=_count(item.get("likes")),
        created=_word(item.get("createdAt")),
        modified=_word(item.get("lastModified")),
        tags=tags,
        pipeline=_word(item.get("pipeline_tag")),
        licence=", ".join(licence.lower() for licence in licences),
        languages=_strings(card.get("language")),
        base_models=_strings(card.get("base_model")),
        datasets=_strings(card.get("datasets")),
        parameters=parameters if type(parameters) is int and parameters > 0 else None,
    )


def files_of(info: Any) -> tuple[HubFile, ...]:
    """The files that the hub lists for a model, with their sizes and hashes."""
    listed = info.get("siblings")
    files = []
    for item in listed if isinstance(listed, list) else ():
        if isinstance(item, dict) and isinstance(item.get("rfilename"), str):
            lfs = item.get("lfs") if isinstance(item.get("lfs"), dict) else {}
            assert isinstance(lfs, dict)
            size = lfs.get("size", item.get("size"))
            files.append(
                HubFile(
                    path=item["rfilename"],
                    size=_count(size),
                    blob=_word(item.get("blobId")),
                    sha256=_word(lfs.get("sha256")),
                )
            )
    return tuple(files)


def shards_of(
    index: Mapping[str, Any] | None, by_path: Mapping[str, HubFile], faults: dict[str, str]
) -> tuple[HubFile, ...]:
    """The files that an index names; none if one of them is not there."""
    if index is None:
        return ()
    places = index.get("weight_map")
    names = set(map(str, places.values())) if isinstance(places, dict) else set()
    good = re.compile(r"[\w.-]+\.safetensors", re.ASCII)
    missing = sorted(name for name in names if name not in by_path or not good.fullmatch(name))
    if missing or not 0 < len(names) <= SHARDS:
        faults[INDEX] = (
            f"it names {missing[0][:80]!r}, which is not there" if missing else f"it names {len(names)} files"
        )
        return ()
    return tuple(by_path[name] for name in sorted(names))


def _strings(value: Any) -> tuple[str, ...]:
    items = value if isinstance(value, list) else [value]
    return tuple(item[:200] for item in items[:500] if isinstance(item, str) and item)


def _word(value: Any) -> str:
    return value[:200] if isinstance(value, str) else ""


def _count(value: Any) -> int:
    return value if type(value) is int and value > 0 else 0
