# SPDX-License-Identifier: Apache-2.0
"""What the plugin costs a training step, beside verl's own reward manager with the same rule.

    python recipes/benchmarks/step.py                      # both sections: some ten minutes
    python recipes/benchmarks/step.py --only training --blocks 14 --model FOLDER --prompts 2
    python recipes/benchmarks/step.py --only training --gpu --arms naive,plugin --model FOLDER --prompts 16 --tokens 256
    python recipes/benchmarks/step.py --quick --json       # mechanics only; prints one object last

*training*: stock verl on the CPU with a tiny policy (or `--model`), GRPO, as in the quickstart. One training, in which
the reward path takes turns from step to step between verl's naive manager, the plugin, and the plugin with three rules
per response (`step_arms.py`); the steps in a row that make a block, one of each arm, have the same prompts, so
differences are taken within blocks.
The policy's learning rate is next to nothing and all answers have their full length, so all steps have the same work.
Printed are the time from the first to the last of the responses that come to be scored together at the end of a step,
until the last score is known (*exposed*), the plugin's work at the step's boundary, and the paired difference of whole
steps, as the median with a 95 % bootstrap interval. A tiny policy is the worst case: its steps are short, and answers
of one length come all at once, where those of a real one come one by one and few are left to wait for. `--prompts`
keeps steps of a larger policy short; what a step costs once counts for more then. The processor time of all processes
in the step is compared likewise: what else runs on the machine lengthens a step, and hardly adds to that; and that of
the processes alone that score (reward workers, theirs for rules, the service), in shares of the whole, since what a
step of some size computes varies by more than these use.
*At most* is for policies whose own computing (log probabilities, gradients, weights) varies by more than the goal:
what is added to all the rest of the step, and to that the processor time of all that scores, as if every second of it
had held the step up. If an interval holds the goal, the answer is "not decided", and the script says so. What the
service and the processes for rules use while they wait is not seen, as they are there in all arms.

*scaling*: no policy. verl's own reward workers in a Ray of two nodes on this machine get the same responses (answers of
real models to GSM8K) as fast as they take them: 1, 2 and 4 workers on one node, 2 and 4 on two. The clock stops when
all scores are back and, with the plugin, in the ledger; the last rows take some 40 ms for that, however many there were
(`--groups`). Arms and settings take turns in rounds; the first round is left out. *Scaling kept* is the plugin's gain
over its one worker, in shares of the naive manager's. Where cores are fewer than processes that want one, that says
less of the plugin than of the cores: one worker with its process for rules and the service keeps two of them busy
already. So the processor time of all processes per response is compared, too, over its own with one worker: what grows
there grows with the workers on any machine. *Service* is the part of it that no further worker shares.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

HERE = Path(__file__).resolve().parent
QUICKSTART = HERE.parent / "quickstart"
MODULES = "verl_rlar.plugin,verl_rlar.modes,step_arms"
ALL_ARMS = ("naive", "plugin", "several")
SEVERAL = "{columns: [several], parts: [{tool: final_answer}, {tool: exact_match}, {tool: token_f1}]}"
ON_GPU = ("trainer.device=cuda", "actor_rollout_ref.rollout.max_num_seqs=256", "reward.num_workers=8")
"""verl's settings there; its number of reward workers is 8 where nothing is said."""
GOAL = 0.02
"""Largest share of a step that the plugin may add."""
WORKERS = {"1": (1, 0), "2": (2, 0), "4": (4, 0), "2_over_2_nodes": (1, 1), "4_over_2_nodes": (2, 2)}
"""By setting: reward workers on the first node, and on the second."""
GOALS = {
    "plugin_added_share_high": f"< {GOAL}",
    "plugin_at_most_added_share_high": f"< {GOAL}",
    "plugin_processor_added_share_high": f"< {GOAL}",
    "plugin_scoring_added_share_high": f"< {GOAL}",
    "scaling_kept_4_high": ">= 1",
    "scaling_kept_4_over_2_nodes_high": ">= 1",
    "processor_growth_4_low": "<= 1",
    "processor_growth_4_over_2_nodes_low": "<= 1",
    "differences": 0,
    "missing_rows": 0,
}
GROUP = 8
TOGETHER_S = 0.2
"""Responses come together if none comes later than this after the one before it, in seconds."""
Figures = dict[str, float]


def interval(values: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """The median, and the ends of its 95 % bootstrap interval."""
    dice = random.Random(seed)
    medians = sorted(statistics.median(dice.choices(values, k=len(values))) for _ in range(2000))
    return statistics.median(values), medians[49], medians[1949]


# --- A training -------------------------------------------------------------------------------------------------------


def rows(blocks: int, prompts: int) -> Iterator[dict[str, Any]]:
    """Verl's rows, batch after batch: each block's prompts once for each arm."""
    from data import SOURCES
    from step_arms import ARMS, arm_of

    fitting = [row for row in SOURCES["gsm8k"]() if len(row["prompt"][0]["content"]) <= 200]
    random.Random(0).shuffle(fitting)
    for step in range(1, blocks * len(ARMS) + 1):
        block = (step - 1) // len(ARMS)
        for number in range(prompts):
            row = fitting[(block * prompts + number) % len(fitting)]
            several = {"several": True} if arm_of(step) == "several" else {"several": None}
            yield row | {"extra_info": {"index": number, **several}}


def training(folder: Path, args: argparse.Namespace) -> Figures:
    """Trains, and compares the arms."""
    import pandas
    import quickstart
    from step_arms import ARMS, RESPONSES, STEPS, arm_of
    from training import train

    from verl_rlar.cpu.models import build_tiny
    from verl_rlar.ledger import read

    prompts = args.prompts or (2 if args.quick else 8)
    model = Path(args.model).resolve() if args.model else build_tiny(folder / "model")
    at_once = min(64 if args.gpu else 32, prompts * GROUP)
    pandas.DataFrame(list(rows(args.blocks, prompts))).to_parquet(folder / "train.parquet")
    steps = args.blocks * len(ARMS)
    overrides = [
        *quickstart.SHARED,
        *quickstart.TINY.overrides,
        f"data.train_batch_size={prompts}",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={prompts}",
        f"data.max_response_length={args.tokens}",
        f"actor_rollout_ref.rollout.max_model_len={480 + args.tokens}",
        f"actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu={at_once}",
        f"actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu={at_once}",
        f"actor_rollout_ref.rollout.n={GROUP}",
        "actor_rollout_ref.actor.optim.lr=1e-9",
        "actor_rollout_ref.rollout.ignore_eos=True",  # all steps have the same work to do
        f"actor_rollout_ref.model.path={model}",
        f"data.train_files={folder}/train.parquet",
        f"data.val_files={folder}/train.parquet",
        f"trainer.default_local_dir={folder}",
        f"trainer.total_training_steps={steps}",
        *("trainer.resume_mode=disable", "trainer.val_before_train=False"),
        *("trainer.test_freq=-1", "trainer.save_freq=-1", f"hydra.run.dir={folder}/hydra"),
        *("rlar.sandbox.backend=none", f"+rlar.routing.routes.several={SEVERAL}"),
        *("reward.reward_manager.name=Arms", "reward.reward_manager.module.path=pkg://step_arms"),
        "actor_rollout_ref.rollout.agent.agent_loop_manager_class=step_arms.ArmsAgentLoopManager",
        "trainer.v1.trainer_mode=rlar_arms",
        *(ON_GPU if args.gpu else ("reward.num_workers=2",)),
    ]
    modules = MODULES + (",verl_rlar.cpu.one_gpu" if args.gpu else "")
    overrides.append(f"ray_kwargs.ray_init.runtime_env.env_vars.VERL_USE_EXTERNAL_MODULES='{modules}'")
    os.environ["VERL_USE_EXTERNAL_MODULES"] = modules  # the driver wants them, too
    if args.gpu:
        os.environ.setdefault("VERL_PLATFORM", "nvidia")
    train(overrides, folder, steps=steps, console=Console(stderr=True))

    seconds = {line["step"]: line for line in lines(folder / STEPS)}
    scored = defaultdict[int, list[tuple[float, float]]](list)
    for file in folder.glob(RESPONSES.format("*")):
        for line in lines(file):
            scored[line["step"]].append((line["received"], line["done"]))
    exposed = {step: last_wait(times) for step, times in scored.items()}
    blocks = [range(first, first + len(ARMS)) for first in range(len(ARMS) + 1, steps + 1, len(ARMS))]  # warm by then

    def of(arm: str, what: Mapping[int, float]) -> list[float]:
        return [what[step] for block in blocks for step in block if arm_of(step) == arm]

    whole, boundary, processor, scoring, policy = (
        {step: line[name] for step, line in seconds.items()}
        for name in ("seconds", "boundary", "processor", "scoring", "policy")
    )
    most = {step: whole[step] - policy[step] + scoring[step] for step in whole}
    held_up = {step: exposed[step] + boundary[step] for step in exposed}
    responses = prompts * GROUP
    figures: Figures = {"blocks": len(blocks), "responses_per_step": responses}
    for arm in ARMS:
        for name, what in (
            ("step", whole),
            ("exposed", exposed),
            ("boundary", boundary),
            ("processor", processor),
            ("scoring", scoring),
            ("policy", policy),
        ):
            figures[f"{arm}_{name}_s"] = statistics.median(of(arm, what))
    step_s = figures["naive_step_s"]
    for arm in ARMS[1:]:
        for name, what, unit in (
            ("added_share", whole, step_s),
            ("at_most_added_share", most, step_s),
            ("added_ms_per_sample", whole, responses / 1000),
            ("exposed_added_share", held_up, step_s),
            ("processor_added_share", processor, figures["naive_processor_s"]),
            ("scoring_added_share", scoring, figures["naive_processor_s"]),
        ):
            added = [one - other for one, other in zip(of(arm, what), of("naive", what), strict=True)]
            for end, value in zip(("", "_low", "_high"), interval(added), strict=True):
                figures[f"{arm}_{name}{end}"] = value / unit
    with read(folder / "rlar") as db:
        kept = dict(db.execute("SELECT step, COUNT(*) FROM scores GROUP BY step").fetchall())
    wanted = {step: responses for step in range(1, steps + 1) if arm_of(step) != "naive"}
    figures["missing_rows"] = sum(abs(kept.get(step, 0) - wanted.get(step, 0)) for step in range(1, steps + 1))
    figures["missing_rows"] += sum(abs(len(scored[step]) - responses) for step in range(1, steps + 1))
    return figures


def last_wait(times: Sequence[tuple[float, float]]) -> float:
    """How long the last responses of a step that come together are scored, in seconds.

    Args:
        times: Of each response, when it came and when its score was known.
    """
    came = sorted((received for received, _ in times), reverse=True)
    first = came[0]
    for received in came[1:]:
        if first - received > TOGETHER_S:
            break
        first = received
    return max(done for _, done in times) - first


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- Scaling ----------------------------------------------------------------------------------------------------------


def scaling(folder: Path, args: argparse.Namespace) -> Figures:
    """Reward workers in a Ray of two nodes, arm by arm and setting by setting in rounds."""
    import ray
    from dispatch import ANSWERS, response
    from hydra import compose, initialize_config_module
    from ray.cluster_utils import Cluster
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
    from step_arms import ARMS, SERVICE, arm_of, processor_s
    from transformers import AutoTokenizer
    from verl.experimental.reward_loop.reward_loop import RewardLoopWorker, migrate_legacy_reward_impl

    from verl_rlar.cpu.models import build_tiny

    class Worker(RewardLoopWorker):
        """verl's reward worker, which can say when its rows are in the ledger."""

        async def flush(self) -> None:
            await self.reward_manager.flush()

    model = build_tiny(folder / "model")
    overrides = [
        *("+rlar=default", f"trainer.default_local_dir={folder}", f"actor_rollout_ref.model.path={model}"),
        *(f"actor_rollout_ref.rollout.n={GROUP}", "rlar.sandbox.backend=none", "rlar.rules.processes=1"),
        f"+rlar.routing.routes.several={SEVERAL}",
        *("reward.reward_manager.name=Arms", "reward.reward_manager.module.path=pkg://step_arms"),
        "rlar.scoring.timeout_s=60",  # who gets hundreds at once has a queue
    ]
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = migrate_legacy_reward_impl(compose("ppo_trainer", overrides=overrides))
    tokenizer = AutoTokenizer.from_pretrained(model)
    with gzip.open(ANSWERS, "rt") as file:
        answers = [json.loads(line) for line in file]
    texts = {}  # a group answers one question
    for row in answers:
        texts.setdefault(row["question"], row["ground_truth"])
    groups = [group for group, _ in zip(itertools.cycle(texts.items()), range(args.groups))]
    dice = random.Random(0)

    def batch(step: int) -> list[Any]:
        made = []
        for number, (question, truth) in enumerate(groups):
            for session in range(GROUP):
                said = answers[(number * GROUP + session) % len(answers)]["response"]
                item = response(
                    {"question": question, "ground_truth": truth, "response": said}, session, number, tokenizer
                )
                item.non_tensor_batch["uid"][0] = f"{step}-{number}"
                item.non_tensor_batch["global_steps"][0] = step
                if arm_of(step) == "several":
                    item.non_tensor_batch["extra_info"][0] = {"index": number, "several": True}
                made.append(item)
        return made

    async def measure(workers: Sequence[Any], step: int) -> tuple[Figures, list[float]]:
        """Responses per second, processor time per response in ms, of it the service's, and the scores."""
        items = [(workers[dice.randrange(len(workers))], item) for item in batch(step)]
        before, start = processor_s((SERVICE,)), time.perf_counter()
        results = await asyncio.gather(*(worker.compute_score.remote(item) for worker, item in items))
        if arm_of(step) != "naive":
            await asyncio.gather(*(worker.flush.remote() for worker in workers))
        seconds, ms = time.perf_counter() - start, 1000 / len(items)
        everything, of_service = (now - then for now, then in zip(processor_s((SERVICE,)), before, strict=True))
        figures = {
            "per_s": len(items) / seconds,
            "processor_ms": everything * ms,
            "service_ms": of_service * ms,
        }
        return figures, [result["reward_score"] for result in results]

    async def rounds(settings: Mapping[str, Sequence[Any]]) -> tuple[dict[str, dict[str, list[Figures]]], int]:
        found: dict[str, dict[str, list[Figures]]] = {name: defaultdict(list) for name in settings}
        values: dict[str, list[float]] = {}
        differences, block = 0, 0
        for number in track(range(args.rounds + 1), "scaling", console=Console(stderr=True), transient=True):
            for name, workers in settings.items():
                for step in range(block * len(ARMS) + 1, (block + 1) * len(ARMS) + 1):
                    arm = arm_of(step)
                    measured, scored = await asyncio.wait_for(measure(workers, step), 300)
                    if arm != "several":  # the same rule, whoever asks it
                        differences += scored != values.setdefault("same", scored)
                    if number:
                        found[name][arm].append(measured)
                block += 1
        return found, differences

    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp", ignore_cleanup_errors=True) as short:
        os.environ["RAY_TMPDIR"] = short
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 8, "include_dashboard": False})
        second = cluster.add_node(num_cpus=8)
        variables = {"PYTHONPATH": os.environ["PYTHONPATH"], "VERL_USE_EXTERNAL_MODULES": MODULES}
        ray.init(
            address=cluster.address,
            log_to_driver=False,
            logging_level="error",
            runtime_env={"env_vars": variables},
        )
        try:
            made: dict[str, list[Any]] = {}
            for node, count in ((cluster.head_node.node_id, 4), (second.node_id, 2)):
                place = NodeAffinitySchedulingStrategy(node, soft=False)
                actor: Any = ray.remote(Worker)
                made[node] = [actor.options(scheduling_strategy=place).remote(config) for _ in range(count)]
            first, other = made.values()
            settings = {name: [*first[:here], *other[:there]] for name, (here, there) in WORKERS.items()}
            found, differences = asyncio.run(rounds(settings))
        finally:
            ray.shutdown()
            cluster.shutdown()
            os.environ.pop("RAY_TMPDIR")
    figures: Figures = {"rounds": args.rounds, "differences": differences}
    for name, of_arm in found.items():
        for arm, measured in of_arm.items():
            for what in measured[0] if arm != "naive" else ("per_s", "processor_ms"):
                figures[f"{arm}_{what}_{name}"] = statistics.median(one[what] for one in measured)

    def to_naive(name: str, what: str) -> list[float]:
        """The plugin's in shares of the naive manager's, round by round."""
        return [one[what] / base[what] for one, base in zip(found[name]["plugin"], found[name]["naive"], strict=True)]

    for name in found:
        figures[f"plugin_to_naive_{name}"] = statistics.median(to_naive(name, "per_s"))
    for name in list(found)[1:]:
        for says, what in (("scaling_kept", "per_s"), ("processor_growth", "processor_ms")):
            kept = [here / alone for here, alone in zip(to_naive(name, what), to_naive("1", what), strict=True)]
            for end, value in zip(("", "_low", "_high"), interval(kept), strict=True):
                figures[f"{says}_{name}{end}"] = value
    return figures


# --- What is printed --------------------------------------------------------------------------------------------------


def verdict(figures: Figures) -> tuple[bool, list[str]]:
    """Whether every goal is reached, and what is to be said about each."""
    said, ok = [], True
    for what, name in (
        ("whole step", "plugin_added_share"),
        ("... but for what the policy computes", "plugin_at_most_added_share"),
        ("its processor time", "plugin_processor_added_share"),
        ("... of that, what scores", "plugin_scoring_added_share"),
    ):
        if name in figures:
            low, high = figures[f"{name}_low"], figures[f"{name}_high"]
            ok &= high < GOAL
            how = "reached" if high < GOAL else "missed" if low > GOAL else "not decided"
            said.append(f"{what}: {100 * low:+.1f} to {100 * high:+.1f} % (goal: < {100 * GOAL:g} %): {how}")
    ok &= figures.get("missing_rows", 0) == 0
    for name in ("4", "4_over_2_nodes"):
        if f"scaling_kept_{name}" in figures:
            low, high = figures[f"scaling_kept_{name}_low"], figures[f"scaling_kept_{name}_high"]
            ok &= high >= 1
            how = "no worse" if low >= 1 else "worse" if high < 1 else "not decided"
            said.append(f"scaling to {name.replace('_', ' ')} workers: {low:.2f} to {high:.2f} of naive's: {how}")
            low, high = figures[f"processor_growth_{name}_low"], figures[f"processor_growth_{name}_high"]
            ok &= low <= 1
            how = "no worse" if high <= 1 else "worse" if low > 1 else "not decided"
            said.append(f"... processor time per response: {low:.2f} to {high:.2f} of how naive's grows: {how}")
    ok &= figures.get("differences", 0) == 0
    return bool(ok), said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("training", "scaling"), help="one section")
    parser.add_argument("--arms", default=",".join(ALL_ARMS), help="naive, and others after a comma (default all)")
    parser.add_argument("--blocks", type=int, help="blocks in training, of a step for each arm (default 30)")
    parser.add_argument("--rounds", type=int, help="rounds of scaling (default 10)")
    parser.add_argument("--groups", type=int, help=f"of {GROUP} responses that come at once in scaling (default 32)")
    parser.add_argument("--model", help="folder of the policy (default: a tiny one, built on the spot)")
    parser.add_argument("--prompts", type=int, help=f"of a step, each answered {GROUP} times (default 8)")
    parser.add_argument("--tokens", type=int, default=32, help="of a response, all of the same length (default 32)")
    parser.add_argument("--gpu", action="store_true", help="train on a GPU; the rollout is transformers', without vLLM")
    parser.add_argument("--quick", action="store_true", help="few small steps: mechanics, decides nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    args = parser.parse_args()
    arms = args.arms.split(",")
    if arms[0] != "naive" or len(set(arms)) != len(arms) or len(arms) < 2 or not {*arms} <= {*ALL_ARMS}:
        parser.error(f"--arms {args.arms}: naive first, then {' or '.join(ALL_ARMS[1:])}, or both")
    if args.model and not (Path(args.model) / "config.json").is_file():
        parser.error(f"--model {args.model}: there is no config.json; `python -m verl_rlar.cpu.models` makes a policy")
    os.environ["STEP_ARMS"] = args.arms
    args.blocks = args.blocks or (3 if args.quick else 30)
    args.rounds = args.rounds or (2 if args.quick else 10)
    args.groups = args.groups or (8 if args.quick else 32)
    sys.path[:0] = [str(HERE), str(QUICKSTART)]
    folders = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(folders)  # of Ray's workers
    figures: Figures = {}
    for name, section in (("training", training), ("scaling", scaling)):
        if args.only in (None, name):
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                found = section(Path(folder), args)
            figures |= found
            print(f"{name}: {json.dumps(found)}", file=sys.stderr, flush=True)
    ok, said = verdict(figures)
    table = Table("figure", "value", "goal", title="A step with and without the plugin", box=None)
    for name, value in figures.items():
        table.add_row(name, f"{value:.4g}", str(GOALS.get(name, "")))
    console = Console()
    console.print(table)
    for line in said:
        console.print(line, highlight=False)
    if args.json:
        goals = {name: goal for name, goal in GOALS.items() if name in figures}
        print(json.dumps({"name": "step", "figures": figures, "goals": goals, "notes": said, "ok": ok}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
