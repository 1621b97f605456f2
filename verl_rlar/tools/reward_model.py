# SPDX-License-Identifier: Apache-2.0
"""`RewardModelRunner`: scores a sample by a reward model that is served.

The spec of a reward model names ``repo@revision`` as its target, and in `ToolSpec.serving` how it is asked: the fields
of `verl_rlar.serving.base.How`, beside ``family``, ``address`` and ``golden``. So another template, another sign or
another revision is another tool. Where the snapshot of that revision lies on this node, or at what address it is
served, is no part of the spec.

Guarantees: the raw score is the model's own number; a call ends within the spec's `timeout_s`; what goes wrong with us
is an error, and never a number.

Not covered: samples whose prompt holds images or audio; those parts never reach a tool.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, get_args

from verl_rlar.errors import ConfigError, ToolError, ToolUnavailable
from verl_rlar.serving.base import Conversation, Family, Golden, How, RewardModelPool, ServedModel
from verl_rlar.types import Message, Sample, ToolSpec, Verdict

WORDS = 300
"""Most characters of a judge's answer that are kept as its reason; its end."""
Locate = Callable[[ToolSpec], str]
"""Gives the folder of the snapshot that a spec names, on this node.

Raises:
    ToolUnavailable: It is not here.
"""


def target(repo: str, revision: str) -> str:
    """The target of a spec: a repository at a commit."""
    return f"{repo}@{revision}"


def serving(
    how: How, family: str = "sequence", golden: tuple[Golden, ...] = (), address: str | None = None
) -> dict[str, Any]:
    """`ToolSpec.serving` of a model that is asked in this way."""
    known = [
        {"conversation": [[message.role, message.content] for message in one.conversation], "value": one.value}
        for one in golden
    ]
    return {"how": how.to_json(), "family": family, "golden": known, "address": address}


def served_model(spec: ToolSpec, path: str | None = None) -> ServedModel:
    """The model that a spec describes.

    Args:
        spec: Of kind ``reward_model``.
        path: Folder of its snapshot on this node; without a meaning if the spec has an address.

    Raises:
        ToolUnavailable: The spec is none of a reward model that can be served.
    """
    described = spec.serving
    repo, at, revision = spec.target.rpartition("@")
    if spec.kind != "reward_model" or described is None or not at or not repo or not revision:
        raise ToolUnavailable(f"{spec.name}: a reward model has a target like repo@commit, and says how it is served")
    try:
        golden = tuple(
            Golden(
                conversation=tuple(Message(role=role, content=content) for role, content in one["conversation"]),
                value=float(one["value"]),
            )
            for one in described.get("golden", ())
        )
        family = described.get("family", "sequence")
        if family not in get_args(Family):
            raise ConfigError(f"no family of models is called {family!r}")
        address = described.get("address")
        return ServedModel(
            name=spec.target,
            revision=revision,
            path=None if address else path,
            address=address,
            family=family,
            how=How.from_json(described["how"]),
            golden=golden,
        )
    except (ConfigError, LookupError, TypeError, ValueError) as error:
        raise ToolUnavailable(f"{spec.name}: its description of how it is served is of no use: {error}") from None


def conversation(sample: Sample) -> Conversation:
    """What a model is shown of a sample: the prompt's messages, and the response."""
    return (*sample.query.messages, Message(role="assistant", content=sample.response))


class RewardModelRunner:
    """See the module.

    Args:
        pool: Where the models are served; the models of every step that still may score are ensured there.
        locate: Where snapshots are.
    """

    def __init__(self, pool: RewardModelPool, locate: Locate) -> None:
        self._pool = pool
        self._locate = locate
        self._models: dict[str, ServedModel] = {}
        """By digest of the spec."""

    def model(self, spec: ToolSpec) -> ServedModel:
        """The model that a spec describes, on this node; for `RewardModelPool.ensure`.

        Raises:
            ToolUnavailable: The spec is of no use, or the snapshot is not here.
        """
        found = self._models.get(spec.digest)
        if found is None:
            address = isinstance(spec.serving, Mapping) and spec.serving.get("address")
            found = served_model(spec, None if address else self._locate(spec))
            self._models[spec.digest] = found
        return found

    async def run(self, spec: ToolSpec, sample: Sample) -> Verdict:
        """Scores one sample.

        Raises:
            ToolTimeout: Not scored within `spec.timeout_s`.
            ToolUnavailable: The model is not served here.
            ToolError: The model cannot score this sample.
            ConnectionError: Its server died under the call; worth one more try.
        """
        try:
            (scored,) = await self._pool.score(self.model(spec), (conversation(sample),), spec.timeout_s)
        except (ToolError, ConnectionError) as error:
            raise type(error)(f"{spec.name}: {error}") from None
        details = {"tokens": float(scored.tokens), "truncated": float(scored.truncated)}
        reason = f"raw score {scored.value:.4g}" + (", of a text that was cut" if scored.truncated else "")
        if scored.words:
            reason += f": {scored.words[-WORDS:]}"
        return Verdict(value=scored.value, reason=reason, details=details)
