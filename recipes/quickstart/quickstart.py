# SPDX-License-Identifier: Apache-2.0
"""The quickstart: model, data, GRPO through verl with agent-backed rewards, summary. `run.sh` installs, then runs this.

    bash recipes/quickstart/run.sh [--tiny] [--steps N] [--fresh | --resume] [--run-dir DIR] [--no-install]

Training is stock ``python -m verl.trainer.main_ppo +rlar=default +rlar_device=cpu ...`` in a process of its own
(`training.py`); the settings below are all that the recipe adds.

Guarantees: arguments are checked before anything is installed or deleted, with the standard library only; a run folder
is never overwritten unless ``--fresh`` says so, and only a folder that the quickstart made is ever cleared; two
quickstarts never share a run folder; whatever ends this process ends the training and Ray with it.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import shutil
import signal
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parent.parent
RUNS = CHECKOUT / "runs"
SETTINGS = "quickstart.json"
"""Marks a run folder as ours, and says what was run."""

EXAMPLES = """\
examples:
  bash recipes/quickstart/run.sh                 SmolLM2-135M-Instruct, under half an hour on 2 cores
  bash recipes/quickstart/run.sh --tiny          a random model of 300 thousand parameters, a few minutes
  bash recipes/quickstart/run.sh --resume --steps 64
  python recipes/quickstart/summary.py runs/quickstart --json
"""


class Stop(Exception):
    """The quickstart cannot go on; the message says why and what to do."""

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.code = code
        """Exit code of the quickstart."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is trained, on what, and how."""

    model: str
    """Name that `verl_rlar.cpu.models` knows."""
    steps: int
    data: dict[str, Any]
    """Fields of `data.Profile`."""
    overrides: tuple[str, ...]
    """verl's settings, beyond those that both recipes share."""


SHARED = (
    "algorithm.adv_estimator=grpo",
    "data.shuffle=False",  # batches have a fixed mixture, see data.py
    "data.filter_overlong_prompts=True",
    "actor_rollout_ref.rollout.val_kwargs.do_sample=True",  # as in training
    "actor_rollout_ref.rollout.val_kwargs.n=2",
    "trainer.total_epochs=100000",  # steps decide
    "trainer.project_name=rlar",
    "trainer.experiment_name=quickstart",
    "trainer.logger=[console,file]",
    # with 1, verl removes the last checkpoint before it notes that there is a new one
    "trainer.max_actor_ckpt_to_keep=2",
)

TINY = Recipe(
    model="tiny",
    steps=40,
    data={
        "mixture": {"ifeval": 4, "ted_en_de": 2, "gsm8k": 1, "math": 1},
        "batches": 10,
        "validation": {"ifeval": 8, "ted_en_de": 4, "gsm8k": 2, "math": 2},
        "prompt_chars": 200,
    },
    overrides=(
        "data.train_batch_size=8",
        "data.max_prompt_length=320",
        "data.max_response_length=32",
        "actor_rollout_ref.actor.ppo_mini_batch_size=8",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=32",
        "actor_rollout_ref.actor.optim.lr=1e-3",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=32",
        "actor_rollout_ref.rollout.n=8",
        "actor_rollout_ref.rollout.max_model_len=512",
    ),
)

DEFAULT = Recipe(
    model="smollm2",
    steps=32,
    data={
        "mixture": {"ifeval": 4, "ted_en_de": 2, "gsm8k": 1, "math": 1},
        "batches": 8,
        "validation": {"ifeval": 12, "ted_en_de": 12, "gsm8k": 4, "math": 4},
        "prompt_chars": 200,
    },
    overrides=(
        "data.train_batch_size=8",
        "data.max_prompt_length=128",
        "data.max_response_length=48",
        "actor_rollout_ref.actor.ppo_mini_batch_size=8",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=24",
        "actor_rollout_ref.actor.optim.lr=4e-5",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=24",
        "actor_rollout_ref.rollout.n=6",
        "actor_rollout_ref.rollout.max_model_len=256",
    ),
)


BF16 = (
    "actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=bf16",
    "actor_rollout_ref.rollout.dtype=bfloat16",
)
"""Computing in bfloat16 (weights and optimizer stay in float32): two to three times as fast on CPUs made for it."""


def main(argv: list[str] | None = None) -> int:
    """Runs the quickstart.

    Returns:
        Exit code: 0 done, 1 training failed, 2 wrong arguments or an unusable run folder, 130 if stopped.
    """
    arguments = parse(argv)
    try:
        settings = decide(arguments)
        if not arguments.check:
            with locked(arguments.run_dir):
                run(arguments, settings)
    except Stop as stop:
        print(f"quickstart: {stop}", file=sys.stderr)
        return stop.code
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="run.sh",
        description="Trains a small language model with verl's GRPO on four kinds of task on this machine's CPU; every "
        "response is scored by the tool that fits its query.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tiny", action="store_true", help="a random model built on the spot: shows the plumbing only")
    steps = f"training steps ({DEFAULT.steps}; tiny: {TINY.steps})"
    parser.add_argument("--steps", type=_positive, metavar="N", help=steps)
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--fresh", action="store_true", help="start anew: what is in the run folder is deleted")
    again.add_argument("--resume", action="store_true", help="go on from the run folder's last checkpoint")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="run folder (runs/quickstart[-tiny])")
    parser.add_argument("--no-install", action="store_true", help="install nothing, use the python of this shell")
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    folder = arguments.run_dir or RUNS / ("quickstart-tiny" if arguments.tiny else "quickstart")
    arguments.run_dir = folder.expanduser().resolve()
    return arguments


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def decide(arguments: argparse.Namespace) -> dict[str, Any]:
    """What to run: ``recipe`` (``tiny`` or ``default``) and ``steps``.

    Raises:
        Stop: The run folder and the flags do not go together.
    """
    folder: Path = arguments.run_dir
    before = _settings(folder)
    if folder.exists() and not folder.is_dir():
        raise Stop(f"{folder} is no folder; name another with --run-dir")
    if before is None and folder.exists() and any(entry.name != LOCK for entry in folder.iterdir()):
        raise Stop(f"{folder} holds something that is no quickstart run; name another folder with --run-dir")
    if before is not None and not (arguments.fresh or arguments.resume):
        raise Stop(
            f"there is a run in {folder} already. Say --resume to go on from its last checkpoint, --fresh to delete it "
            "and start anew, or --run-dir DIR to keep it and use another folder"
        )
    if arguments.resume:
        if before is None:
            raise Stop(f"there is nothing to resume in {folder}; leave --resume away to start a run")
        if arguments.tiny and before["recipe"] != "tiny":
            raise Stop(f"the run in {folder} is not a --tiny one; leave --tiny away, or name another --run-dir")
        steps = arguments.steps or before["steps"]
        done = checkpoint(folder)
        if done is not None and done >= steps:
            raise Stop(f"the run in {folder} has made its {done} steps; give a larger --steps to go on")
        return {"recipe": before["recipe"], "steps": steps}
    name = "tiny" if arguments.tiny else "default"
    return {"recipe": name, "steps": arguments.steps or (TINY if arguments.tiny else DEFAULT).steps}


def _settings(folder: Path) -> dict[str, Any] | None:
    """What a run folder was made for; None if there is no run in it."""
    try:
        return json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise Stop(f"{folder / SETTINGS} cannot be read ({error}); name another folder with --run-dir") from error


NOTED = "latest_checkpointed_iteration.txt"
"""Verl's note of its last checkpoint."""


def checkpoint(folder: Path) -> int | None:
    """The step of verl's last checkpoint in a run folder; None if there is none."""
    try:
        return int((folder / NOTED).read_text())
    except (FileNotFoundError, ValueError):
        return None


LOCK = ".lock"


@contextmanager
def locked(folder: Path):
    """Keeps other runs of the recipe out of a folder, which is made if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Stop(f"another run of this recipe is under way in {folder}") from None
        yield


def run(arguments: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Prepares, trains, and sums up.

    Raises:
        Stop: The environment is incomplete, or training failed or was stopped.
    """
    try:
        import verl  # noqa: F401
        from rich.console import Console

        from verl_rlar.cpu import models
    except ImportError as error:
        raise Stop(f"{error}. Leave --no-install away, or install what is missing: pip install '.[cpu]'") from error
    sys.path.insert(0, str(HERE))
    import data
    import summary
    import training

    signal.signal(signal.SIGTERM, _terminated)
    signal.signal(signal.SIGHUP, _terminated)
    console = Console()
    folder: Path = arguments.run_dir
    recipe = TINY if settings["recipe"] == "tiny" else DEFAULT
    if arguments.fresh:
        _clear(folder)
    (folder / SETTINGS).write_text(json.dumps(settings) + "\n", encoding="utf-8")
    try:
        with console.status(f"model: {recipe.model}"):
            build = {"tiny": models.build_tiny, "smollm2": models.build_smollm2}[recipe.model]
            model = build(RUNS / "models" / recipe.model)
        train, val = data.write(data.Profile(**recipe.data), folder / "data")
        console.print(f"model {model}\nrun   {folder}", highlight=False, soft_wrap=True)
        overrides = [
            *SHARED,
            *recipe.overrides,
            *(BF16 if recipe is DEFAULT and training.computes_in_bf16() else ()),
            f"actor_rollout_ref.model.path={model}",
            f"data.train_files={train}",
            f"data.val_files={val}",
            f"trainer.default_local_dir={folder}",
            f"trainer.total_training_steps={settings['steps']}",
            f"trainer.resume_mode={'auto' if arguments.resume else 'disable'}",
            f"trainer.val_before_train={checkpoint(folder) is None}",
            f"trainer.test_freq={settings['steps']}",
            f"trainer.save_freq={max(1, min(20, settings['steps'] // 2))}",
            f"hydra.run.dir={folder / 'hydra'}",
        ]
        training.train(overrides, folder, steps=settings["steps"], console=console)
    except KeyboardInterrupt:
        raise Stop(f"stopped; go on with --resume. Run folder: {folder}", 130) from None
    except training.Failed as failed:
        raise Stop(str(failed), 1) from None
    console.print()
    summary.show(summary.summarise(folder), console)
    console.print(f"curves: {summary.draw(folder)}\nrun folder: {folder}", highlight=False, soft_wrap=True)


def _terminated(signum: int, _: Any) -> None:
    raise KeyboardInterrupt


def _clear(folder: Path) -> None:
    """Deletes what is in a run folder (`decide` has seen that it is one), but for the lock that we hold."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != LOCK:
            entry.unlink()


if __name__ == "__main__":
    sys.exit(main())
