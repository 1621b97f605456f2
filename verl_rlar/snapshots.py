# SPDX-License-Identifier: Apache-2.0
"""The reward models whose files are on this node: snapshots in the hub's cache, and folders of the user's own.

The target of a spec names them: ``OWNER/NAME@commit``, or the absolute path of a folder and 40 hex digits of a hash of
its content (``/models/mine@3f9a...``), so that a checkpoint that was trained further is another tool (I3).

Guarantees: `Snapshots.locate` never uses the network; `Snapshots.have` may, and then takes the very commit, after the
gate has let it pass once more; a folder is handed out only while its content is what the spec says.

Not covered: a folder whose files change between `Snapshots.locate` and the moment when a server loads them; a cached
snapshot of the hub whose bytes changed on the disk.
"""

from __future__ import annotations

import hashlib
import logging
import re
from dataclasses import replace
from pathlib import Path

from verl_rlar.config import HubConfig
from verl_rlar.errors import HubError, HubNotFound, ToolUnavailable
from verl_rlar.gate import check
from verl_rlar.hub import Hub
from verl_rlar.repository import GIB, MIB, Facts, HubFile, HubModel, look_into
from verl_rlar.types import ToolSpec

logger = logging.getLogger(__name__)


def read_folder(path: Path, config: HubConfig) -> HubModel:
    """A folder as if it were a repository: `facts.repo` is ``local/NAME``, its commit the hash of what a loader reads.

    Args:
        path: The folder, as transformers' ``save_pretrained`` writes it.
        config: For the largest size.

    Raises:
        HubNotFound: There is no such folder.
        HubError: It cannot be read.
    """
    if not path.is_dir():
        raise HubNotFound(f"{path} is no folder")
    try:
        files = tuple(
            HubFile(path=file.name, size=file.stat().st_size) for file in sorted(path.iterdir()) if file.is_file()
        )
        name = re.sub(r"[^\w.-]+", "-", path.resolve().name, flags=re.ASCII).strip("-.")[:90] or "model"
        model = look_into(
            Facts(repo=f"local/{name}", commit=""),
            files,
            lambda file, begin, end: _bytes(path / file, begin, end),
            int(config.max_gb * GIB),
        )
        return replace(model, facts=replace(model.facts, commit=_content(path, model)))
    except OSError as error:
        raise HubError(f"{path} cannot be read: {error.strerror or error}") from error


def _bytes(path: Path, begin: int, end: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(begin)
        return file.read(end - begin)


def _content(path: Path, model: HubModel) -> str:
    """40 hex digits of a hash of all that a loader would read."""
    whole = hashlib.sha256()
    for file in sorted(model.wanted, key=lambda file: file.path):
        digest = hashlib.sha256()
        with open(path / file.path, "rb") as source:
            while chunk := source.read(MIB):
                digest.update(chunk)
        whole.update(f"{file.path}\0{digest.hexdigest()}\n".encode())
    return whole.hexdigest()[:40]


class Snapshots:
    """Finds the files of reward models; `locate` is what `verl_rlar.tools.reward_model.RewardModelRunner` wants.

    Args:
        config: The settings of the hub, for its cache.
    """

    def __init__(self, config: HubConfig) -> None:
        self._config = config
        self._seen: dict[tuple[str, tuple[tuple[str, int, int], ...]], str] = {}
        """Hash of the content of a folder, by its path, and names, sizes and times of its files."""

    def locate(self, spec: ToolSpec) -> str:
        """The folder of a reward model. A folder of the user's own is read once, to see that it has not changed.

        Raises:
            ToolUnavailable: It is not on this node, or not any more; the message says what to do.
        """
        repo, _, commit = spec.target.rpartition("@")
        if repo.startswith("/"):
            return self._own(spec, Path(repo), commit)
        with Hub(self._config.model_copy(update={"offline": True})) as hub:
            found = hub.local(repo, commit)
            if found is None:
                raise ToolUnavailable(
                    f"{spec.name}: {spec.target} is not on this node in {hub.cache}; fetch it with "
                    f"`rlar fetch {spec.target}`, with the same rlar.hub.cache_dir"
                )
        return str(found)

    def have(self, spec: ToolSpec) -> str:
        """Like `locate`, and fetches what is not here. Blocks, for as long as a download may take.

        Raises:
            ToolUnavailable: It is not on this node and cannot be had.
        """
        repo, _, commit = spec.target.rpartition("@")
        if repo.startswith("/"):
            return self.locate(spec)
        try:
            with Hub(self._config) as hub:
                if (folder := hub.local(repo, commit)) is not None:
                    return str(folder)
                logger.warning("%s: the snapshot %s is not on this node, and is fetched", spec.name, spec.target)
                model = hub.inspect(repo, commit)
                report = check(model, self._config)
                if not report.ok:
                    refused = "; ".join(report.reasons)
                    raise ToolUnavailable(f"{spec.name}: {spec.target} does not pass the gate: {refused}")
                return str(hub.fetch(model))
        except HubError as error:
            raise ToolUnavailable(f"{spec.name}: no snapshot of {spec.target} on this node: {error}") from None

    def _own(self, spec: ToolSpec, path: Path, commit: str) -> str:
        try:
            state = tuple(
                (file.name, file.stat().st_size, file.stat().st_mtime_ns)
                for file in sorted(path.iterdir())
                if file.is_file()
            )
            key = (str(path), state)
            if key not in self._seen:
                self._seen[key] = read_folder(path, self._config).commit
        except (OSError, HubError) as error:
            raise ToolUnavailable(f"{spec.name}: its folder {path} is not on this node: {error}") from None
        if self._seen[key] != commit:
            raise ToolUnavailable(
                f"{spec.name}: the content of {path} is another one than when it was examined; "
                f"as it is now it is another tool: `rlar exam {path}`"
            )
        return str(path)
