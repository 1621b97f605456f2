# SPDX-License-Identifier: Apache-2.0
"""GRPO on math, code, translation and dialogue with agent-backed rewards: the paper's set-up on stock verl.

    bash recipes/multitask_grpo/run.sh --model qwen3-8b --dry-run          # here, now: nothing is rented yet
    bash recipes/multitask_grpo/run.sh --model qwen3-8b --data DATA --run RUN
    bash recipes/multitask_grpo/run.sh --model llama-3.1-8b --placement colocated --nodes 2 --data DATA --run RUN
    bash recipes/multitask_grpo/run.sh ... --resume
    bash recipes/multitask_grpo/run.sh ... -- actor_rollout_ref.actor.optim.lr=5e-7      # any override of verl's

``--dry-run`` composes verl's configuration with these overrides and has the plugin check it; routes the data (those of
``--data`` if they are there, else a sample of `recipes/data` in the same form); looks for what is needed and says what
is missing; and estimates memory and time. It starts nothing and needs neither GPU nor network.

Guarantees: the command that is run is printed first, and is all there is to it; a run folder that holds a run is not
touched unless ``--resume`` says so.

Not covered: nothing was run on a GPU where this was written. Ray on several nodes is started by you, see the README.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import math
import os
import shlex
import sys
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from domains import SOURCES, Row, sample  # noqa: E402
from estimate import Estimate, estimate  # noqa: E402
from settings import GPU_GB, MODELS, RESPONSES, Choices, command, overrides  # noqa: E402

VERIFIED = {"math": {"math"}, "code": {"unit_tests"}, "translation": {"translation"}, "dialogue": {"open"}}
"""By domain, the kinds of query that its rows must be."""


@dataclass(frozen=True, kw_only=True)
class Routed:
    """Where the rows of one set go."""

    domain: str
    rows: int
    tools: dict[str, int]
    kinds: dict[str, int]
    covered: int

    @property
    def fine(self) -> bool:
        """Whether all are what they should be; dialogue waits for a reward model."""
        right = set(self.kinds) <= VERIFIED[self.domain]
        return right and (self.domain == "dialogue" or self.covered == self.rows)


def compose(choices: Choices, extra: list[str]) -> Any:
    """verl's whole configuration, checked by the plugin as at a start.

    Raises:
        ConfigError: The run could not work.
        hydra.errors.HydraException: There is no such setting.
    """
    from hydra import compose as composed
    from hydra import initialize_config_module

    from verl_rlar.plugin import check

    with initialize_config_module("verl.trainer.config", version_base=None):
        config = composed("ppo_trainer", overrides=overrides(choices, extra))
    check(config)
    return config


async def route(rows: dict[str, list[Row]], config: Any) -> dict[str, Routed]:
    """Routes rows by the run's settings and, if it names one, its library."""
    from verl_rlar.cli.score import live_tools
    from verl_rlar.dispatcher import Dispatcher
    from verl_rlar.plugin import check
    from verl_rlar.rows import query_of
    from verl_rlar.trusted import trusted_snapshot

    settings = check(config)
    snapshot, known = trusted_snapshot(settings), ()
    if settings.library.path and Path(settings.library.path).is_dir():
        live, *known = live_tools(settings.library.path, None, settings)
        tools = {tool.name: tool for tool in (*snapshot.tools, *live.tools)}
        snapshot = replace(live, tools=tuple(tools.values()))
    domains = {source.name: source.domain for source in SOURCES}
    found = {}
    async with Dispatcher(settings, snapshot, *known) as dispatcher:
        for name, listed in rows.items():
            routes = [await dispatcher.route(query_of(one)) for one in listed]
            found[name] = Routed(
                domain=domains[name],
                rows=len(routes),
                tools=dict(Counter(one.name for one in routes)),
                kinds=dict(Counter(one.kind.value for one in routes)),
                covered=sum(one.covered for one in routes),
            )
    return found


def rows_of(folder: Path) -> tuple[dict[str, list[Row]], str]:
    """Rows by set, and where they are from.

    Raises:
        DataError: One is of no set of this recipe.
    """
    file = folder / "train.parquet"
    if not file.is_file():
        return sample(), "a sample of recipes/data, as there are none yet"
    import pandas

    from verl_rlar.errors import DataError

    rows: dict[str, list[Row]] = {source.name: [] for source in SOURCES}
    for one in pandas.read_parquet(file).to_dict("records"):
        if (name := one.get("data_source")) not in rows:
            raise DataError(f"{file}: a row's data_source is {name!r}; this recipe's sets are {', '.join(rows)}")
        rows[name].append(one)
    return rows, str(file)


def missing(choices: Choices, config: Any) -> list[str]:
    """What the run needs and this machine does not have, in words."""
    from verl_rlar.errors import ToolUnavailable
    from verl_rlar.plugin import check
    from verl_rlar.sandbox import check_reachable

    found = []
    try:
        check_reachable(check(config).sandbox)
    except ToolUnavailable as error:
        found.append(
            f"a sandbox for code: {str(error).splitlines()[0].removesuffix(' Tried:')} (`rlar doctor` says more)"
        )
    if importlib.util.find_spec("vllm") is None:
        found.append("vLLM: pip install 'verl-rlar[vllm]'")
    if importlib.util.find_spec("flash_attn") is None:
        found.append("flash-attn, which verl's FSDP takes: pip install flash-attn==2.8.3 --no-build-isolation")
    if not joined() and (there := devices()) < wanted(choices):
        found.append(f"GPUs: {there} of {wanted(choices)} on this node")
    model = MODELS[choices.model]
    if choices.path is None and not os.environ.get("HF_TOKEN") and model.gated:
        found.append(f"access to {model.repo}: accept its terms on the hub, and set HF_TOKEN")
    if not (choices.data / "train.parquet").is_file():
        found.append(f"data: python recipes/multitask_grpo/domains.py {choices.data}")
    return found


def wanted(choices: Choices) -> int:
    """GPUs that the run needs on a node; on one node, reward models of their own are there, too."""
    beside = choices.library and choices.placement == "standalone" and choices.nodes == 1
    return choices.gpus + (choices.reward_gpus if beside else 0)


def joined() -> bool:
    """Whether a Ray cluster is there that verl will join: then this node's GPUs say little."""
    address = os.environ.get("RAY_ADDRESS")
    if address:
        return address != "local"
    return (Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster").exists()


def objection(choices: Choices, library: Path | None, extra: list[str], *, dry: bool) -> str:
    """Why a run cannot be; the empty string if nothing is against it."""
    responses, gpus = choices.mini_batch * RESPONSES, choices.nodes * choices.gpus
    if responses % gpus:
        return (
            f"--mini-batch {choices.mini_batch}: verl shares its {responses} responses among {gpus} GPUs, and has to "
            f"divide them evenly; with {gpus} GPUs take a multiple of {gpus // math.gcd(gpus, RESPONSES)}"
        )
    if library is not None and choices.library is None:
        return f"--library {library}: there is no library; `rlar build ... --in {library}` makes one"
    if dry:
        return ""
    checkpoint = (choices.run / "latest_checkpointed_iteration.txt").exists()
    moved = [one.partition("=")[2] for one in extra if one.lstrip("+").startswith("rlar.run_dir=")]
    begun = checkpoint or (Path(moved[-1] if moved else choices.run / "rlar") / "ledger.sqlite").exists()
    if begun and not choices.resume:
        return f"there is a run in {choices.run}: say --resume to go on, or name another folder with --run"
    if choices.resume and not begun:
        return f"--resume: there is no run in {choices.run}"
    if choices.nodes == 1 and not joined() and (there := devices()) < (all_of := wanted(choices)):
        beside = all_of - choices.gpus
        return (
            f"{all_of} GPUs are wanted on this node{f', {beside} of them for reward models' if beside else ''}, and "
            f"there are {there}: take {'--placement colocated, or ' if beside else ''}fewer --gpus (with --mini-batch "
            "to fit), or start Ray on the nodes first, as the README says"
        )
    return ""


def devices() -> int:
    """GPUs of this node."""
    try:
        import torch
    except ImportError:
        return 0
    return torch.cuda.device_count()


def dry_run(choices: Choices, extra: list[str], console: Console, gpu_gb: float) -> dict[str, Any]:
    """Everything but the training; what was found."""
    config = compose(choices, extra)
    console.print("configuration: composed, and the plugin has no objection", highlight=False)
    rows, origin = rows_of(choices.data)
    routed = asyncio.run(route(rows, config))
    table = Table("data", "rows", "kinds", "tools", "", title=f"Routes: {origin}", title_justify="left", box=None)
    for name, one in routed.items():
        said = "" if one.fine and one.covered else "waits for a reward model" if one.fine else "NOT AS EXPECTED"
        table.add_row(name, str(one.rows), words(one.kinds), words(one.tools), said)
    console.print(table)
    lacking = missing(choices, config)
    console.print("on this machine " + ("nothing is missing" if not lacking else "there is not:"), highlight=False)
    for what in lacking:
        console.print(f"  {what}", highlight=False, soft_wrap=True, markup=False)
    sums = estimate(choices, gpu_gb)
    show(sums, console, choices, gpu_gb)
    fine = all(one.fine for one in routed.values())
    routes = {name: asdict(one) | {"fine": one.fine} for name, one in routed.items()}
    return {"routes": routes, "missing": lacking, "estimate": asdict(sums), "ok": fine and sums.fits}


def words(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def show(sums: Estimate, console: Console, choices: Choices, gpu_gb: float) -> None:
    table = Table("estimate, not measured", "", title="A GPU that trains, in GiB", title_justify="left", box=None)
    for name, value in sums.memory.items():
        table.add_row(name, f"{value:.1f}")
    table.add_row("in all, while gradients are computed", f"{sums.peak:.1f} of {gpu_gb:g}")
    table.add_row("in all, while responses are written", f"{sums.rollout:.1f} of {gpu_gb:g}")
    table.add_row("room for keys and values, in tokens", f"{sums.kv_tokens:,}")
    console.print(table)
    if not sums.fits:
        console.print(f"this does not fit {gpu_gb:g} GiB: more --gpus or --nodes, or --gpu-gb", highlight=False)
    table = Table("estimate, not measured", "", title="A step, in seconds", title_justify="left", box=None)
    for name, value in sums.step_s.items():
        table.add_row(name, f"{value:.0f}")
    step = sum(sums.step_s.values())
    table.add_row(f"a step; {choices.steps} of them in hours", f"{step:.0f}; {choices.steps * step / 3600:.1f}")
    console.print(table)
    for line in sums.assumptions:
        console.print(f"  assumed: {line}", highlight=False, soft_wrap=True)


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    given = list(sys.argv[1:] if argv is None else argv)
    extra = given[given.index("--") + 1 :] if "--" in given else []
    parser = argparse.ArgumentParser(
        prog="run.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Choices()
    parser.add_argument("--model", choices=MODELS, default=default.model, help="the policy (default: %(default)s)")
    parser.add_argument("--path", help="folder or repository of its weights, in place of the model's own")
    parser.add_argument(
        "--placement",
        choices=("standalone", "colocated"),
        default=default.placement,
        help="reward models on GPUs of their own, or on those of the training (default: %(default)s)",
    )
    parser.add_argument("--nodes", type=positive, default=default.nodes, help="nodes that train (default: %(default)s)")
    parser.add_argument("--gpus", type=positive, default=default.gpus, help="GPUs of each (default: %(default)s)")
    parser.add_argument(
        "--reward-gpus", type=positive, default=default.reward_gpus, help="standalone: GPUs for reward models, per node"
    )
    parser.add_argument("--reward-nodes", type=positive, default=default.reward_nodes, help="nodes that serve them")
    parser.add_argument("--data", type=Path, default=default.data, help="folder that domains.py has filled")
    parser.add_argument("--run", type=Path, default=default.run, help="run folder (default: %(default)s)")
    parser.add_argument("--library", type=Path, help="a library that `rlar build` has filled")
    parser.add_argument("--steps", type=positive, default=default.steps, help="training steps (default: %(default)s)")
    parser.add_argument("--mini-batch", type=positive, default=default.mini_batch, help="prompts per optimizer step")
    parser.add_argument("--seed", type=int, default=default.seed, help="order of the data (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint")
    parser.add_argument("--gpu-gb", type=float, default=GPU_GB, help="memory of a GPU, for the estimate")
    parser.add_argument("--dry-run", action="store_true", help="check everything, start nothing")
    parser.add_argument("--json", action="store_true", help="with --dry-run: print one JSON object last")
    return parser.parse_args(given[: given.index("--")] if "--" in given else given), extra


def main(argv: list[str] | None = None) -> int:
    args, extra = parse(argv)
    fields = {name: value for name, value in vars(args).items() if name in Choices.__dataclass_fields__}
    for name in ("data", "run"):
        fields[name] = fields[name].resolve()  # Ray's workers may be elsewhere
    if args.path and Path(args.path).exists():
        fields["path"] = str(Path(args.path).resolve())
    if args.library:
        from verl_rlar.cli.app import library_folder

        found_library = library_folder(str(args.library))
        fields["library"] = found_library.resolve() if found_library else None
    starts = [int(file.name.split(".")[1]) for file in fields["run"].glob("metrics.[0-9]*.jsonl")]
    choices = Choices(**fields, start=max(starts, default=0) + 1)
    console = Console()
    if why := objection(choices, args.library, extra, dry=args.dry_run):
        console.print(why, highlight=False, soft_wrap=True, markup=False)
        return 2
    line = shlex.join(["python", *command(choices, extra)])
    console.print(line, highlight=False, soft_wrap=True, markup=False)
    if args.dry_run:
        from hydra.errors import HydraException

        from verl_rlar.errors import RlarError

        try:
            found = dry_run(choices, extra, console, args.gpu_gb)
        except (HydraException, RlarError) as error:
            print(error, file=sys.stderr)
            return 2
        if args.json:
            print(json.dumps({"name": "multitask_grpo", **found}))
        return 0 if found["ok"] else 1
    choices.run.mkdir(parents=True, exist_ok=True)  # verl's logger makes no folder
    os.execv(sys.executable, [sys.executable, *command(choices, extra)])


if __name__ == "__main__":
    sys.exit(main())
