# SPDX-License-Identifier: Apache-2.0
"""What verl loads at `import verl` (entry point group ``verl.plugins``), in the driver and in every Ray worker.

It tells Hydra where `rlar/default.yaml` is and what the defaults of `rlar.*` are, so that ``+rlar=default`` works from
any folder, and lets `verl_rlar.cpu` bring in its platform where there is no accelerator. Before Ray starts, `Preflight`
(a Hydra callback that `rlar/default.yaml` names) refuses a run that could not work, and says what to change.

Guarantees: cheap to import; verl hides the errors of a plugin, so ours are kept in `LOAD_ERROR` and stop the run there.

Not covered: if this file is never loaded (the package is missing, or VERL_USE_EXTERNAL_PLUGINS excludes it), Hydra
takes ``+rlar=default`` for a plain string and verl trains with its own reward manager; nothing of ours can object then.
"""

from __future__ import annotations

import math
import sys
import traceback
from pathlib import Path
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.experimental.callback import Callback
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf

from verl_rlar import cpu, versions
from verl_rlar.config import RlarConfig, defaults, parse
from verl_rlar.errors import ConfigError, DataError, ToolUnavailable
from verl_rlar.types import Split

REWARD_MANAGER = {"source": "importlib", "name": "RlarRewardManager", "path": "pkg://verl_rlar.reward_manager"}
AGENT_LOOP_MANAGER = "verl_rlar.trainer.RlarAgentLoopManager"
OLD_SECTIONS = ("custom_reward_function", "reward_model", "sandbox_fusion")
"""Sections that verl keeps for its old trainers (``legacy_reward_impl.yaml``)."""

LOAD_ERROR: str | None = None
"""Traceback of what went wrong when the plugin was loaded; None if nothing did."""


def configs() -> Path:
    """The folder of the Hydra files: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "hydra_configs"
    return installed if installed.is_dir() else package.parent / "hydra_configs"


class RlarSearchPath(SearchPathPlugin):
    """Adds our Hydra files to every search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append(provider="verl_rlar", path=configs().as_uri())


class Preflight(Callback):
    """Stops a run that could not work, before Ray starts."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        try:
            settings = check(config)
            check_sandbox(config, settings)
            check_tools(settings)
            hints = [f"{fault}; it may work, and was not tried" for fault in versions.untried().values()]
            for hint in (*hints, *room_for_waiting(config, settings)):
                print(f"verl_rlar: {hint}", file=sys.stderr, flush=True)
        except (ConfigError, ToolUnavailable) as error:
            print(f"\nverl_rlar refuses to start:\n  {error}\n", file=sys.stderr, flush=True)
            raise SystemExit(2) from None  # Hydra turns any other exception of a callback into a warning


CALLS_OF_A_WORKER = 1000
"""So many calls at once does Ray let into a reward worker of verl's."""


def room_for_waiting(config: DictConfig, settings: RlarConfig) -> list[str]:
    """A hint, if a step's unscored responses, which wait for their siblings, could fill all reward workers: what comes
    after them would wait for `sibling_timeout_s`."""
    prompts, answers, workers = (
        int(OmegaConf.select(config, key) or 1)
        for key in ("data.train_batch_size", "actor_rollout_ref.rollout.n", "reward.num_workers")
    )
    responses = prompts * answers
    if settings.scoring.on_unscored != "siblings" or responses <= workers * CALLS_OF_A_WORKER:
        return []
    enough = math.ceil(responses / CALLS_OF_A_WORKER)
    return [
        f"a step has {responses} responses; if a tool is down, most of them may wait for siblings, and "
        f"{workers} reward workers have room for {workers * CALLS_OF_A_WORKER}: set reward.num_workers={enough}"
    ]


def check(config: DictConfig) -> RlarConfig:
    """Checks a whole verl configuration, and reads our part of it.

    Raises:
        ConfigError: The run could not work, or would not do what it says.
    """
    import verl

    def refuse_unless(fine: bool, message: str) -> None:
        if not fine:
            raise ConfigError(message)

    if LOAD_ERROR is not None:
        raise ConfigError(f"the plugin was not loaded whole, mend this first:\n{LOAD_ERROR}")
    if verl.__version__ != versions.VERL:
        raise ConfigError(f"verl {verl.__version__} is installed, this release works with verl=={versions.VERL} only")
    refuse_unless(versions.python_fits(), f"Python {sys.version.split()[0]}: take Python 3.10, 3.11 or 3.12")
    rlar = OmegaConf.select(config, "rlar")
    settings = parse(OmegaConf.to_container(rlar, resolve=True) if OmegaConf.is_config(rlar) else rlar)

    get = lambda key: OmegaConf.select(config, key)  # noqa: E731
    refuse_unless(
        get("trainer.use_v1") is not False,
        "trainer.use_v1=False selects verl's legacy trainer, which does not tell rewards their step; remove it",
    )
    refuse_unless(
        not get("reward.reward_model.enable"),
        "reward.reward_model.enable=True makes verl bypass every reward manager; remove it",
    )
    refuse_unless(
        get("reward.custom_reward_function.path") is None,
        "reward.custom_reward_function.path would be ignored, as tools score every response; remove it",
    )
    old = [one for section in OLD_SECTIONS for one in _given(get(section), section)]
    refuse_unless(
        not old,
        f"{', '.join(old)}: of verl's old configuration, which its V1 trainer ignores; tools score every response, so "
        "remove it (the number of reward workers is reward.num_workers)",
    )
    manager = get("reward.reward_manager") or {}
    ours = {
        "source": manager.get("source"),
        "name": manager.get("name"),
        "path": (manager.get("module") or {}).get("path"),
    }
    refuse_unless(
        ours == REWARD_MANAGER,
        f"reward.reward_manager is {ours}, not {REWARD_MANAGER}; remove your override of reward.reward_manager.*",
    )
    agent_loop = get("actor_rollout_ref.rollout.agent.agent_loop_manager_class")
    refuse_unless(
        _is_ours(agent_loop),
        f"actor_rollout_ref.rollout.agent.agent_loop_manager_class={agent_loop}: it must be {AGENT_LOOP_MANAGER} or a "
        "subclass of it, which tells rewards apart in training and validation and guards the step boundary",
    )
    mode, serving = str(get("trainer.v1.trainer_mode")), settings.serving
    refuse_unless(
        mode.startswith("rlar_"),
        f"trainer.v1.trainer_mode={mode} is verl's own, which has no numbers about rewards in its log and lets no "
        f"reward model sleep; say trainer.v1.trainer_mode=rlar_{mode}, which is the same beside that",
    )
    refuse_unless(
        not (serving.placement == "colocated" and mode == "rlar_separate_async"),
        "rlar.serving.placement=colocated with trainer.v1.trainer_mode=rlar_separate_async: its rollout never pauses, "
        "so reward models would never sleep; give them GPUs of their own (rlar.serving.ray_gpus)",
    )
    refuse_unless(
        not (serving.placement == "colocated" and serving.ray_gpus),
        "rlar.serving.ray_gpus sets GPUs aside, and rlar.serving.placement=colocated takes those of the training; "
        "remove one of them",
    )
    if get("trainer.device") == "cpu":
        refuse_unless(
            not cpu.accelerator_present(),
            "trainer.device=cpu, but verl finds an accelerator here and would take that: export VERL_PLATFORM=cpu, or "
            "leave +rlar_device=cpu away",
        )
        missing = cpu.missing_modules()
        refuse_unless(not missing, f"trainer.device=cpu: no module named {', '.join(missing)}. {cpu.INSTALL}")
        refuse_unless(
            get("trainer.n_gpus_per_node") == 1 and get("trainer.nnodes") == 1,
            "trainer.device=cpu trains in one process: set trainer.n_gpus_per_node=1 trainer.nnodes=1",
        )
    return settings


def check_tools(settings: RlarConfig) -> None:
    """Raises `ConfigError` if one of the user's own tools cannot be used."""
    from verl_rlar.trusted import trusted_tools

    trusted_tools(settings)


def check_sandbox(config: DictConfig, settings: RlarConfig) -> None:
    """Makes sure that there is a sandbox, if a row of the data could need one.

    Raises:
        ToolUnavailable: One is needed, or it cannot be said that none is, and there is none. The message names the row.
    """
    if settings.sandbox.backend == "none":
        return
    from verl_rlar.sandbox import check_reachable

    try:
        check_reachable(settings.sandbox)
    except ToolUnavailable as error:
        needed = _first_boxed_row(config, settings)
        if needed is None:
            print("verl_rlar: there is no sandbox here, and no row of the data needs a sandbox", file=sys.stderr)
            return
        raise ToolUnavailable(f"{needed}: its tool runs code, which needs a sandbox.\n{error}") from None


def _first_boxed_row(config: DictConfig, settings: RlarConfig) -> str | None:
    """The first row of the data whose route needs a sandbox, in words, or a file that cannot be looked into."""
    from verl_rlar.planning import first_boxed_row
    from verl_rlar.trusted import trusted_snapshot

    snapshot = trusted_snapshot(settings)
    prompt_key = str(OmegaConf.select(config, "data.prompt_key") or "prompt")
    splits: tuple[Split, ...] = ("train", "val")
    for split in splits:
        names = OmegaConf.select(config, f"data.{split}_files") or ()
        for path in [names] if isinstance(names, str) else map(str, names):
            try:
                number = first_boxed_row(path, settings.routing, snapshot, split, prompt_key=prompt_key)
            except DataError as error:
                return f"{path} may hold rows with tests ({error})"
            if number is not None:
                return f"row {number} of {path}"
    return None


def _given(setting: Any, name: str) -> list[str]:
    """What somebody has set in a section whose defaults are null, as overrides; `False` asks for nothing either."""
    if isinstance(setting, DictConfig):
        return [one for key in map(str, setting) for one in _given(setting.get(key), f"{name}.{key}")]
    return [] if setting is None or setting is False else [f"{name}={setting}"]


def _is_ours(class_path: str | None) -> bool:
    if class_path is None or class_path == AGENT_LOOP_MANAGER:
        return class_path is not None
    from verl.utils.import_utils import load_class_from_fqn

    from verl_rlar.trainer import RlarAgentLoopManager

    return issubclass(load_class_from_fqn(class_path, "AgentLoopManager"), RlarAgentLoopManager)


def _load() -> None:
    Plugins.instance().register(RlarSearchPath)
    ConfigStore.instance().store(group="rlar", name="base", node=defaults(), provider="verl_rlar")
    cpu.enable()


try:
    _load()
except Exception:  # verl would hide it; Preflight shows it
    LOAD_ERROR = traceback.format_exc()
    print(f"verl_rlar: the plugin was not loaded whole:\n{LOAD_ERROR}", file=sys.stderr, flush=True)
