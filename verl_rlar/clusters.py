# SPDX-License-Identifier: Apache-2.0
"""Clusters of alike prompts: what exams, evidence and routes are kept by.

The hard part of a cluster is what `verl_rlar.features` finds: kind of check, kind of reference, languages, script,
format demands, turns. Prompts that differ in one of these are never in one cluster. Inside, texts that use like words
and signs are together: a prompt is a vector of hashed words, digits, punctuation, LaTeX and constraints, and joins the
nearest cluster, or founds one if none is near. A cluster's centre is the mean of its first `SETTLED` prompts, and then
never moves.

    library/clusters.jsonl        one line when a cluster is founded, settled or given a name: id, name, centre

Guarantees: the response is never looked at, nor the name of a data set (I2); the same prompts in the same order give
the same clusters; an id is never given to something else: a founding is on the disk before anybody knows of it, and a
line that a killed writer left unfinished is cut off; memory and file are bounded by `MOST` clusters, whatever the
number of prompts.

Not covered: words are compared as they are written (no synonyms, no translation): hand another `embed` over for that.
Of a cluster that was not settled when its writer died, the founding prompt alone is known; after the founding of a
nearer one, a prompt that is asked about again may be found there. Scripts without spaces are told apart by single
signs."""

from __future__ import annotations

import base64
import json
import logging
import os
import re
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from verl_rlar.errors import LibraryError
from verl_rlar.features import Features, describe
from verl_rlar.types import Kind, Query

logger = logging.getLogger(__name__)

FILE_NAME = "clusters.jsonl"
DIMENSIONS = 256
"""Length of a prompt's vector."""
HEAD = 1200
"""Characters of a prompt that are looked at."""
NEAR = 0.2
"""Cosine from which on a prompt joins a cluster."""
FAR = 2.0
"""A prompt whose cosine is so many standard deviations below its cluster's mean differs from it."""
SETTLED = 32
"""Prompts that make a cluster's centre."""
PER_KEY = 16
"""Most clusters of one hard part; then every prompt joins the nearest one."""
MOST = 512
"""Most clusters in all; then a new hard part has no clusters, only itself."""
ODD = 10_000
"""Prompts that differ from their cluster which are kept in memory."""
REMEMBERED = 100_000
"""Prompts whose cluster is kept in memory."""
WORDS_KNOWN = 20_000
NAME_WORDS = 3

Embed = Callable[[Query], np.ndarray]
"""A query -> a vector of length 1, of `DIMENSIONS` float32 or of as many as an embedding has, always the same."""

_TOKEN = re.compile(r"\\[a-zA-Z]+|[^\W\d_]+|\d|[^\w\s]")
_SCRIPTS = (
    ("cjk", 0x2E80, 0x9FFF),
    ("hangul", 0xAC00, 0xD7AF),
    ("cyrillic", 0x0400, 0x052F),
    ("greek", 0x0370, 0x03FF),
    ("hebrew", 0x0590, 0x05FF),
    ("arabic", 0x0600, 0x06FF),
    ("indic", 0x0900, 0x0DFF),
    ("thai", 0x0E00, 0x0E7F),
)
_REFERENCES = {
    "the reference is a number": "number",
    "the reference is LaTeX": "latex",
    "the reference is a formula": "formula",
    "the reference is a list of numbers": "numbers",
    "the reference marks a final answer": "steps",
}


def hard_part(query: Query, features: Features) -> str:
    """What a query's cluster must have in common with it, readable: ``math/number``, ``translation/en-de+turns``."""
    kind, evidence = features.kinds[0]
    parts = [kind.value]
    if kind is Kind.MATH:
        parts.append(_REFERENCES.get(evidence, "other"))
    elif kind is Kind.TRANSLATION:
        languages = [str(query.extra.get(name) or "?").lower()[:8] for name in ("source_lang", "target_lang")]
        parts.append("-".join(languages))
    if script := _script(query.prompt[:HEAD]):
        parts.append(script)
    marks = list(features.gates)
    if sum(message.role == "user" for message in query.messages) > 1:
        marks.append("turns")
    return "+".join(["/".join(parts), *marks])


def _script(text: str) -> str:
    """The script that most letters are of; empty for Latin."""
    if text.isascii():
        return ""
    counts: Counter[str] = Counter()
    for char in text:
        if char.isalpha():
            code = ord(char)
            counts[next((name for name, low, high in _SCRIPTS if low <= code <= high), "") if code > 0x36F else ""] += 1
    return counts.most_common(1)[0][0] if counts else ""


@lru_cache(maxsize=65_536)
def _place(token: str) -> tuple[int, float]:
    code = zlib.crc32(token.encode("utf-8", "surrogatepass"))
    return code % DIMENSIONS, 1.0 if code & 0x10000 else -1.0


def hashed(query: Query) -> np.ndarray:
    """The default `Embed`: words and signs of the prompt's beginning, by the root of how often they occur."""
    counts = Counter(_TOKEN.findall(query.prompt[:HEAD].lower()))
    demands = query.extra.get("instruction_id_list")
    if isinstance(demands, Sequence) and not isinstance(demands, str):
        counts.update({f"demand {str(name).partition(':')[0]}": 4 for name in demands})
    vector = np.zeros(DIMENSIONS, dtype=np.float32)
    if counts:
        places, signs = zip(*map(_place, counts), strict=True)
        weights = np.sqrt(np.fromiter(counts.values(), dtype=np.float32, count=len(counts)))
        np.add.at(vector, list(places), weights * np.asarray(signs, dtype=np.float32))
    length = float(np.sqrt(vector @ vector))
    return vector / length if length > 0 else vector


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A cluster, as others see it."""

    id: str
    """Its hard part and a number, such as ``math/number#2``. Never changes."""
    name: str
    """The hard part and words that are telling; or what somebody called it. For people, no decision depends on it."""
    settled: bool
    named: bool = False
    """Whether somebody gave it its name (`Clusters.rename`)."""


class _Growing:
    """A cluster and its centre."""

    def __init__(self, cluster: Cluster, centre: np.ndarray) -> None:
        self.cluster = cluster
        self.total = centre.copy()
        self.count = SETTLED if cluster.settled else 1
        self.words: Counter[str] = Counter()
        self.joined, self.nearness, self.squares = 0, 0.0, 0.0
        """Of those that joined in this process: how many, and the sums of their nearness and its squares."""

    def far(self, near: float) -> bool:
        """Whether something is less like it than nearly all that joined; takes note of it."""
        mean = self.nearness / self.joined if self.joined else 0.0
        spread = max(0.0, self.squares / self.joined - mean * mean) if self.joined else 0.0
        far = self.joined >= SETTLED and near < mean - FAR * spread**0.5
        self.joined, self.nearness, self.squares = self.joined + 1, self.nearness + near, self.squares + near * near
        return far


class Clusters:
    """All clusters of a run. Use from one thread at a time.

    Args:
        path: The file; None: nothing is kept.
        embed: A prompt -> a vector of length 1. A file is of one embedding only.
        writes: Whether the file is written; if not, what is founded is known to this process only.

    Raises:
        LibraryError: The file cannot be read, is damaged, or is of another embedding.
    """

    def __init__(self, path: Path | None = None, embed: Embed = hashed, *, writes: bool = True) -> None:
        self._path = path if writes else None
        self._embed = embed
        self._keys: dict[str, list[_Growing]] = {}
        self._centres: dict[str, np.ndarray] = {}
        self._count = 0
        self._words: Counter[str] = Counter()
        self._prompts = 0
        self._known: OrderedDict[str, str] = OrderedDict()
        self._odd: OrderedDict[str, None] = OrderedDict()
        if path is not None:
            self._restore(path)

    def __len__(self) -> int:
        return self._count

    def all(self) -> tuple[Cluster, ...]:
        """In the order of their founding, by hard part."""
        return tuple(growing.cluster for members in self._keys.values() for growing in members)

    def get(self, id: str) -> Cluster | None:
        """A cluster by its id; None if it is not known."""
        members = self._keys.get(id.rpartition("#")[0], ())
        return next((growing.cluster for growing in members if growing.cluster.id == id), None)

    def name(self, id: str) -> str:
        """The name of a cluster; its id if it is not known."""
        known = self.get(id)
        return known.name if known else id

    def odd(self, query: Query) -> bool:
        """Whether a query was far from the centre of its cluster when it joined."""
        return query.key in self._odd

    def rename(self, id: str, name: str) -> None:
        """Gives a cluster a name that people can read, behind its hard part; it keeps it. Not, if there is none with
        this id, or it cannot be written."""
        key = id.rpartition("#")[0]
        for at, growing in enumerate(self._keys.get(key, ())):
            if growing.cluster.id == id:
                named = replace(growing.cluster, name=f"{key}: {name}", named=True)
                if self._write(named, self._centres[key][at]):
                    growing.cluster = named

    def of(self, query: Query, features: Features | None = None) -> str:
        """The id of a query's cluster. A query that was not seen before counts as a new member. Where there is no
        cluster, as there are `MOST` or a founding cannot be written, the id is the hard part alone."""
        known = self._known.get(query.key)
        if known is not None:
            self._known.move_to_end(query.key)
            return known
        key = hard_part(query, describe(query) if features is None else features)
        vector = self._embed(query)
        members = self._keys.get(key, [])
        at, near = -1, -1.0
        if members:
            nearness = self._centres[key][: len(members)] @ vector
            at = int(nearness.argmax())
            near = float(nearness[at])
        if near < NEAR and len(members) < PER_KEY and self._count < MOST:
            founded = self._found(key, vector)
            if founded is None:
                return key
            found = founded
            self._tell_apart(found, query)
        elif members:
            found = members[at]
            if found.far(near):
                self._odd[query.key] = None
                if len(self._odd) > ODD:
                    self._odd.popitem(last=False)
            if found.count < SETTLED:
                self._grow(key, at, vector, query)
        else:
            return key
        self._known[query.key] = found.cluster.id
        if len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return found.cluster.id

    def _found(self, key: str, vector: np.ndarray) -> _Growing | None:
        number = len(self._keys.get(key, ())) + 1
        cluster = Cluster(id=f"{key}#{number}", name=f"{key}#{number}", settled=False)
        if not self._write(cluster, vector):
            return None
        return self._add(key, cluster, vector)

    def _add(self, key: str, cluster: Cluster, centre: np.ndarray) -> _Growing:
        members = self._keys.setdefault(key, [])
        centres = self._centres.get(key)
        if centres is None:
            centres = self._centres[key] = np.zeros((4, len(centre)), dtype=np.float32)
        if len(members) == len(centres):
            centres = self._centres[key] = np.concatenate([centres, np.zeros_like(centres)])
        centres[len(members)] = centre
        members.append(_Growing(cluster, centre))
        self._count += 1
        return members[-1]

    def _grow(self, key: str, at: int, vector: np.ndarray, query: Query) -> None:
        growing = self._keys[key][at]
        growing.total += vector
        growing.count += 1
        self._centres[key][at] = growing.total / max(float(np.linalg.norm(growing.total)), 1e-9)
        self._tell_apart(growing, query)
        if growing.count == SETTLED:
            was = growing.cluster
            named = replace(was, name=was.name if was.named else f"{key}: {self._telling(growing)}", settled=True)
            self._write(named, self._centres[key][at])
            growing.cluster, growing.words = named, Counter()

    def _tell_apart(self, growing: _Growing, query: Query) -> None:
        words = {word for word in _TOKEN.findall(query.prompt[:HEAD].lower()) if len(word) > 2}
        growing.words.update(words)
        self._words.update(words)
        self._prompts += 1
        if len(self._words) > WORDS_KNOWN:
            self._words = Counter(dict(self._words.most_common(WORDS_KNOWN // 2)))

    def _telling(self, growing: _Growing) -> str:
        """Words that many of its prompts have, and few others."""

        def weight(word: str, count: int) -> float:
            return count / growing.count * float(np.log((1 + self._prompts) / (1 + self._words[word])))

        ranked = sorted(growing.words.items(), key=lambda item: (-weight(*item), item[0]))
        return ", ".join(word for word, _ in ranked[:NAME_WORDS])

    # --- The file -----------------------------------------------------------------------------------------------------

    def _write(self, cluster: Cluster, centre: np.ndarray) -> bool:
        if self._path is None:
            return True
        packed = base64.b64encode(centre.astype("<f4").tobytes()).decode()
        line = json.dumps({**asdict(cluster), "centre": packed})
        try:
            with self._path.open("ab") as file:
                whole = file.tell()
                try:
                    file.write(line.encode() + b"\n")
                    file.flush()
                    os.fsync(file.fileno())
                except OSError:
                    os.truncate(self._path, whole)
                    raise
        except OSError as error:
            logger.warning("the cluster %s could not be written: %s", cluster.id, error)
            return False
        return True

    def _restore(self, path: Path) -> None:
        try:
            data = path.read_bytes() if path.exists() else b""
            whole = data[: data.rfind(b"\n") + 1]
            if whole != data and self._path is not None:
                os.truncate(path, len(whole))
        except OSError as error:
            raise LibraryError(f"{path}: {error}") from error
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                body = json.loads(line)
                named = bool(body.get("named", False))
                cluster = Cluster(id=body["id"], name=body["name"], settled=body["settled"], named=named)
                centre = np.frombuffer(base64.b64decode(body["centre"], validate=True), dtype="<f4").copy()
            except (ValueError, KeyError, TypeError) as error:
                raise LibraryError(
                    f"{path}, line {number} is damaged ({type(error).__name__}); restore the file from a copy"
                ) from None
            key = cluster.id.rpartition("#")[0]
            members = self._keys.get(key, [])
            if key in self._centres and self._centres[key].shape[1] != len(centre):
                raise LibraryError(
                    f"{path}, line {number}: a vector of {len(centre)} numbers, others have more or less"
                )
            at = next((n for n, growing in enumerate(members) if growing.cluster.id == cluster.id), None)
            if at is None:
                self._add(key, cluster, centre)
            else:
                growing = members[at] = _Growing(cluster, centre)
                self._centres[key][at] = growing.total
