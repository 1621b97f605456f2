# SPDX-License-Identifier: Apache-2.0
"""The settings under `rlar.*`: one model, checked once, defaults here and nowhere else.

`hydra_configs/rlar/default.yaml` takes its defaults from this file (`verl_rlar.plugin` registers them with Hydra), so
every key below can be overridden on verl's command line as ``rlar.<section>.<key>=<value>``.

Guarantees: an unknown key or a bad value raises `ConfigError` that names it; secrets are never stored here, only the
names of the environment variables that hold them.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from verl_rlar.errors import ConfigError
from verl_rlar.types import Kind


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ScoringConfig(Section):
    timeout_s: float = Field(default=10.0, gt=0)
    """Deadline of one tool's call, in seconds, with queueing and retries. A tool's own shorter deadline holds too."""
    retries: int = Field(default=1, ge=0, le=5)
    """How often a call is made again after an infrastructure error. A deadline or a wrong answer is not retried."""
    on_unscored: Literal["siblings", "neutral"] = "siblings"
    """What verl gets for an unscored response in training: the mean of its group's scored responses, or `neutral`."""
    neutral: float = Field(default=0.5, ge=0, le=1)
    """What verl gets for an unscored response where there is no scored sibling, and in validation."""
    sibling_timeout_s: float = Field(default=600.0, gt=0)
    """How long an unscored response waits for the scores of its siblings, in seconds; then it gets `neutral`."""
    max_unscored: float = Field(default=0.5, gt=0, le=1)
    """Share of unscored training responses in the window above which the run stops at a step boundary. 1: never."""
    unscored_window: int = Field(default=512, ge=1)
    """Number of latest training responses over which `max_unscored` is measured; nothing stops before it is full."""


class RulesConfig(Section):
    processes: int = Field(default=2, ge=1, le=64)
    """Worker processes for rules per reward worker (`reward.num_workers`)."""
    memory_gb: float = Field(default=4.0, gt=0)
    """Address space of each of them, in GiB; a rule that needs more fails."""


class RoutingConfig(Section):
    prefer: dict[Kind, str | None] = dict.fromkeys(Kind)
    """Tool to take for a kind of query, where several fit. None: the first in the library."""
    fallback: str | None = None
    """Tool for queries that no tool fits. None: their responses stay unscored."""


class LedgerConfig(Section):
    store_responses: bool = True
    """Whether prompts and responses are kept (compressed). Without them a reward can be looked up, not replayed."""
    flush_s: float = Field(default=0.02, gt=0)
    """Longest time a row waits in a reward worker before it is sent, in seconds."""


class RlarConfig(Section):
    """All settings of the plugin."""

    run_dir: str = "rlar"
    """Folder of the ledger, made if missing. In training: inside the checkpoint folder."""
    service_timeout_s: float = Field(default=30.0, gt=0)
    """Deadline of a call from a reward worker to the service, in seconds, restarts of the service included."""
    scoring: ScoringConfig = ScoringConfig()
    rules: RulesConfig = RulesConfig()
    routing: RoutingConfig = RoutingConfig()
    ledger: LedgerConfig = LedgerConfig()


def defaults() -> dict[str, Any]:
    """All keys with their defaults, as plain containers."""
    return RlarConfig().model_dump(mode="json")


def parse(tree: Any) -> RlarConfig:
    """Checks a tree of settings.

    Args:
        tree: A mapping as it stands under `rlar` in the configuration; keys that are absent take their defaults.

    Raises:
        ConfigError: The tree is no mapping, or a key is unknown, or a value is not allowed. All faults are named.
    """
    if not isinstance(tree, Mapping):
        raise ConfigError(
            f"`rlar` is {tree!r} instead of a group of settings: Hydra did not find `rlar/default.yaml`, because the "
            "plugin was not loaded. Check that verl_rlar is installed in this environment (`pip show verl-rlar`) and "
            "that VERL_USE_EXTERNAL_PLUGINS does not exclude it."
        )
    try:
        return RlarConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(fault) for fault in error.errors())) from None


def _explain(fault: Any) -> str:
    path = [str(part) for part in fault["loc"]]
    key = ".".join(["rlar", *path])
    if fault["type"] != "extra_forbidden":
        return f"{key}: {fault['msg']}, got {fault['input']!r}"
    model: Any = RlarConfig
    for part in path[:-1]:
        model = model.model_fields[part].annotation
    known = sorted(model.model_fields)
    near = difflib.get_close_matches(path[-1], known, n=1)
    return f"unknown key {key}" + (f", did you mean {near[0]}?" if near else f"; known are: {', '.join(known)}")
