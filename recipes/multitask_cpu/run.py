# SPDX-License-Identifier: Apache-2.0
"""Does training get better? One small policy, four families of tasks, the same prompts in the same order, several
rewards, several seeds; graded by code that no reward is.

    python recipes/multitask_cpu/run.py                          # SmolLM2-135M-Instruct, 4 arms x 3 seeds: hours
    python recipes/multitask_cpu/run.py --arms rlar,static --seeds 1,2 --steps 48 --answers 8
    python recipes/multitask_cpu/run.py --quick                  # a tiny policy, a few steps: mechanics only
    python recipes/multitask_cpu/run.py --gpu --arms rlar --seeds 1    # on a GPU, without vLLM
    python recipes/multitask_cpu/run.py --table                  # of what is done so far

Each arm and seed is one training of stock verl (`arms.py` says how they differ), in a folder of its own under
``--results``; one that is done is not run again, one that was interrupted goes on from its last checkpoint. Several
processes may share a folder, each with arms and seeds of its own: a GPU has room for a dozen. Before the first step and
after the last one, verl answers held-out prompts, and `graders.py` grades these answers; of the first ones, those that
were given first for a seed count for all its arms, as all begin with the same policy.

*Gain* is the grade after less the grade before, by prompt. The table has, for each arm, the mean over its seeds with a
95 % t interval by family and overall (families with equal weight), and the differences to `static` and of `rlar` to it,
paired by seed.

Guarantees: the same arguments give the same data and, for a seed, the same order in all arms; a results folder that was
made with other settings is refused, and so is a run that is under way; what ends this process ends the training.

Not covered: verl's rollout is sampled with the seed, but sums on several threads may differ in the last bit, so a run
repeated is close, not equal. KL is a figure, not a part of the loss: verl's reference model was not tried on a CPU.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "quickstart")]

import judge  # noqa: E402
import quickstart  # noqa: E402
import training  # noqa: E402
from arms import ARMS, available  # noqa: E402
from experiment import FULL, QUICK, Size, go_back, verls  # noqa: E402
from graders import grade, indicators  # noqa: E402
from kl import divergence  # noqa: E402
from tasks import FAMILIES, Row, rows  # noqa: E402

from verl_rlar.errors import ConfigError  # noqa: E402
from verl_rlar.library import write_whole  # noqa: E402

RUNS = HERE.parent.parent / "runs"
DONE, SETTINGS = "result.json", "settings.json"
SIGNS = ("words", "repeated", "copied")
"""Of an answer: what a reward may be gamed by."""
WIDTH = 150
"""Of the table where there is no terminal, in characters."""
KL_ANSWERS = 48
"""About so many of them, of all families, tell how far the policy went."""
T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Student's t at 95 %, two-sided, by degrees of freedom."""


def run_one(size: Size, arm: str, seed: int, folder: Path, console: Console, *, gpu: bool) -> dict[str, Any]:
    """Trains one arm with one seed, and grades it."""
    import pandas
    import torch

    from verl_rlar.cpu import models

    folder.mkdir(parents=True, exist_ok=True)
    train, test = rows(seed=seed, batches=size.batches, per_family=size.per_family, held_out=size.held_out)
    for name, split in (("train", train), ("test", test)):
        pandas.DataFrame(split).to_parquet(folder / f"{name}.parquet")
    build = {"tiny": models.build_tiny, "smollm2": models.build_smollm2}[size.model]
    base = build(RUNS / "models" / size.model)
    os.environ[judge.LOG] = str(folder / "judge.jsonl")
    if quickstart.checkpoint(folder) == size.steps and not (folder / "answers" / f"{size.steps}.jsonl").exists():
        go_back(folder)
    begun = quickstart.checkpoint(folder) is not None
    answered = (folder / "answers" / "0.jsonl").exists() or first_answers(folder, seed) is not None
    switches, overrides = verls(size, arm, seed, folder, base, begun=begun, answered=answered, gpu=gpu)
    if gpu:
        os.environ.setdefault("VERL_PLATFORM", "nvidia")
    elif size.model == "smollm2" and training.computes_in_bf16():
        overrides += quickstart.BF16
    training.train(overrides, folder, steps=size.steps, console=console, switches=switches)
    answers = first_answers(folder, seed), folder / "answers" / f"{size.steps}.jsonl"
    device = torch.cuda.get_device_name() if gpu else "cpu"
    result = {"arm": arm, "seed": seed, "device": device, **graded(answers, test), **costs(folder)}
    talks = result.pop("talks")
    some = talks[:: max(1, len(talks) // KL_ANSWERS)]
    result["kl"] = divergence(base, folder / f"global_step_{size.steps}" / "actor", some)
    write_whole(folder / DONE, json.dumps(result).encode())
    for checkpoint in folder.glob("global_step_*"):  # a gigabyte and more each
        shutil.rmtree(checkpoint)
    return result


def first_answers(folder: Path, seed: int) -> Path | None:
    """Those to the held-out prompts that any arm gave first for a seed, before its first step."""
    given = folder.parent.glob(f"*-{seed}/answers/0.jsonl")
    return min(given, key=lambda file: file.stat().st_mtime_ns, default=None)


def run_all(
    size: Size, arms: Sequence[str], seeds: Sequence[int], folder: Path, console: Console, *, run: bool, gpu: bool
) -> list[dict[str, Any]]:
    """The results of arms and seeds; those that are missing are trained first, if `run`."""
    results = []
    for seed in seeds:  # seed by seed, so that what is there can be compared early
        for arm in arms:
            place = folder / f"{arm}-{seed}"
            if (place / DONE).exists():
                results.append(json.loads((place / DONE).read_text()))
            elif not run:
                continue
            elif why := available(arm):
                console.print(f"{arm} is left out: {why}", highlight=False)
            else:
                console.print(f"{arm}, seed {seed}: {place}", highlight=False, soft_wrap=True)
                with quickstart.locked(place):
                    results.append(run_one(size, arm, seed, place, console, gpu=gpu))
    return results


def graded(answers: tuple[Path, Path], test: Sequence[Row]) -> dict[str, Any]:
    """Grades of the held-out prompts before and after, by their number; `talks`: prompts and answers after."""
    by_prompt = {words(row["prompt"][0]["content"]): row for row in test}
    found: dict[str, Any] = {}
    for name, file in zip(("before", "after"), answers, strict=True):
        grades: dict[str, list[float]] = defaultdict(list)
        signs: dict[str, dict[str, list[float]]] = {one: defaultdict(list) for one in FAMILIES}
        found["talks"] = []
        for line in file.read_text(encoding="utf-8").splitlines():
            told = json.loads(line)
            asked = words(told["input"])
            row = next(row for prompt, row in by_prompt.items() if prompt in asked)
            source, extra = row["data_source"], row["extra_info"]
            value = grade(source, told["output"], row["reward_model"]["ground_truth"], extra)
            grades[f"{source} {extra['index']}"].append(value)
            found["talks"].append((row["prompt"][0]["content"], told["output"]))
            for sign, amount in indicators(told["output"], row["prompt"][0]["content"]).items():
                signs[source][sign].append(amount)
        found[name] = {prompt: statistics.fmean(values) for prompt, values in grades.items()}
        found[f"signs_{name}"] = {
            source: {sign: statistics.fmean(values) for sign, values in of.items()} for source, of in signs.items()
        }
    return found


def words(text: str) -> str:
    """A text without its spaces: chat templates add some."""
    return "".join(text.split())


def costs(folder: Path) -> dict[str, float]:
    """Seconds of a step, those that the reward held it up where there is a ledger, and tokens of a judge."""
    import summary

    steps = [entry["timing_s/step"] for entry in summary.verl_metrics(folder).values() if "timing_s/step" in entry]
    found = {"step_s": statistics.fmean(steps), "tokens": judge.tokens(folder)}
    if (folder / "rlar").is_dir():
        found["exposed_s"] = summary.summarise(folder).exposed_seconds or 0.0
    return found


# --- What came of it --------------------------------------------------------------------------------------------------


def mean_of(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """A mean over seeds, and its 95 % t interval; no ends for one seed."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None, None
    half = T.get(len(values) - 1, 1.96) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def gains(result: Mapping[str, Any]) -> dict[str, float]:
    """The mean gain of each family, and `overall`."""
    by_family: dict[str, list[float]] = defaultdict(list)
    for prompt, after in result["after"].items():
        by_family[prompt.split()[0]].append(after - result["before"][prompt])
    found = {name: statistics.fmean(by_family[name]) for name in FAMILIES}
    return found | {"overall": statistics.fmean(found.values())}


def summarise(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """By arm: gains, differences to `static` and of `rlar` to it by seed, costs and signs of gaming."""
    by_arm: dict[str, dict[int, Mapping[str, Any]]] = defaultdict(dict)
    for result in results:
        by_arm[result["arm"]][result["seed"]] = result
    gained = {arm: {seed: gains(result) for seed, result in of.items()} for arm, of in by_arm.items()}
    found: dict[str, Any] = {}
    for arm in (arm for arm in ARMS if arm in by_arm):
        mine = gained[arm]
        of: dict[str, Any] = {"seeds": sorted(mine)}
        for name in (*FAMILIES, "overall"):
            of[name] = mean_of([gain[name] for gain in mine.values()])
        for name, high, low in (("above_static", arm, "static"), ("rlar_above", "rlar", arm)):
            upper, lower = gained.get(high, {}), gained.get(low, {})
            if both := sorted(upper.keys() & lower.keys()):
                of[name] = mean_of([upper[seed]["overall"] - lower[seed]["overall"] for seed in both])
        for name in ("step_s", "kl", "tokens"):
            of[name] = statistics.fmean(result.get(name, 0) for result in by_arm[arm].values())
        exposed = [result["exposed_s"] for result in by_arm[arm].values() if "exposed_s" in result]
        of["exposed_s"] = statistics.fmean(exposed) if exposed else None
        for sign in SIGNS:
            of[sign] = statistics.fmean(
                result["signs_after"][name][sign] for result in by_arm[arm].values() for name in FAMILIES
            )
        found[arm] = of
    return found


def show(summary: Mapping[str, Any], console: Console) -> None:
    def cell(value: Sequence[float | None]) -> str:
        mean, low, high = value
        return f"{mean:+.3f}" + ("" if low is None else f" ({low:+.3f} to {high:+.3f})")

    table = Table("gain", *summary, box=None)
    for name in (*FAMILIES, "overall"):
        table.add_row(name, *(cell(of[name]) for of in summary.values()))
    for name, label in (("above_static", "above static"), ("rlar_above", "rlar above it")):
        table.add_row(label, *(cell(of[name]) if name in of else "-" for of in summary.values()))
    table.add_section()
    rows = {"seeds": lambda of: ", ".join(map(str, of["seeds"]))}
    rows |= {sign: lambda of, sign=sign: f"{of[sign]:.{0 if sign == 'words' else 2}f}" for sign in SIGNS}
    rows |= {"KL": lambda of: f"{of['kl']:.3f}", "seconds of a step": lambda of: f"{of['step_s']:.1f}"}
    rows["of them exposed"] = lambda of: "-" if of["exposed_s"] is None else f"{of['exposed_s']:.2f}"
    rows["judge's tokens"] = lambda of: f"{of['tokens']:,.0f}"
    for name, said in rows.items():
        table.add_row(name, *map(said, summary.values()))
    console.print(table)


def draw(summary: Mapping[str, Any], file: Path) -> None:
    """The gains as bars with their intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 4))
    names, width = (*FAMILIES, "overall"), 0.8 / max(1, len(summary))
    for place, (arm, of) in enumerate(summary.items()):
        means = [of[name][0] for name in names]
        ends = [[0.0 if of[name][1] is None else of[name][0] - of[name][1] for name in names]] * 2
        axis.bar([n + place * width for n in range(len(names))], means, width, yerr=ends, capsize=3, label=arm)
    axis.set_xticks([n + 0.4 - width / 2 for n in range(len(names))], names)
    axis.set_ylabel("gain on held-out prompts")
    axis.axhline(0, color="grey", linewidth=0.8)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", default=",".join(ARMS), help="which, with commas (default: %(default)s)")
    parser.add_argument("--seeds", default="1,2,3", help="which, with commas (default: %(default)s)")
    parser.add_argument("--steps", type=int, help=f"training steps (default: {FULL.steps})")
    parser.add_argument("--answers", type=int, help=f"to each held-out prompt (default: {FULL.answers})")
    parser.add_argument("--results", type=Path, help="folder of results (default: runs/multitask_cpu)")
    parser.add_argument("--quick", action="store_true", help="a tiny policy and one seed: mechanics only")
    parser.add_argument("--gpu", action="store_true", help="train on a GPU; the rollout is transformers', too")
    parser.add_argument("--table", action="store_true", help="run and write nothing, show what is done")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    args = parser.parse_args(argv)
    from dataclasses import asdict, replace

    size = QUICK if args.quick else FULL
    named = {name: getattr(args, name) for name in ("steps", "answers") if getattr(args, name) is not None}
    if any(number < 1 for number in named.values()):
        parser.error("--steps and --answers are at least 1")
    size = replace(size, **named)
    try:
        wanted, seeds = args.arms.split(","), [1] if args.quick else [int(seed) for seed in args.seeds.split(",")]
    except ValueError:
        parser.error(f"--seeds {args.seeds}: whole numbers with commas, such as 1,2,3")
    if unknown := set(wanted) - set(ARMS):
        parser.error(f"no arm is called {', '.join(sorted(unknown))}; there are {', '.join(ARMS)}")
    folder = (args.results or RUNS / ("multitask_cpu-quick" if args.quick else "multitask_cpu")).resolve()
    if folder.is_file():
        parser.error(f"--results {folder} is a file; a folder is wanted")
    if args.gpu and not args.table:
        import torch

        if not torch.cuda.is_available():
            print("--gpu: torch finds no GPU here; leave it away to train on the CPU", file=sys.stderr)
            return 2
    kept, told = folder / SETTINGS, json.dumps(asdict(size), sort_keys=True)
    if not args.table:
        folder.mkdir(parents=True, exist_ok=True)
        if kept.exists() and kept.read_text() != told:
            print(f"{folder} was made with other settings; name another folder with --results", file=sys.stderr)
            return 2
        aside = folder / f".{SETTINGS}.{os.getpid()}"  # others may begin at the same time
        aside.write_text(told)
        aside.replace(kept)
    console = Console(stderr=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        results = run_all(size, wanted, seeds, folder, console, run=not args.table, gpu=args.gpu)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except (ConfigError, training.Failed, quickstart.Stop) as error:
        print(error, file=sys.stderr)
        return 1
    if not results:
        print(f"there is no result in {folder}", file=sys.stderr)
        return 1
    summary = summarise(results)
    show(summary, Console(width=None if sys.stdout.isatty() else WIDTH))
    if not args.table:
        (folder / "table.json").write_text(json.dumps(summary, indent=2) + "\n")
        draw(summary, folder / "gains.png")
    ours = summary.get("rlar", {})
    low = ours.get("above_static", (0, None, None))[1]
    best = all(ours["overall"][0] >= of["overall"][0] for of in summary.values()) if ours else False
    ok = args.quick or (best and low is not None and low > 0)
    if args.json:
        figures = {f"{arm}_overall": of["overall"][0] for arm, of in summary.items()}
        figures |= {"runs": len(results), "above_static_low": low}
        goals = {"rlar_overall": ">= every arm", "above_static_low": "> 0"}
        print(json.dumps({"name": "multitask_cpu", "figures": figures, "goals": goals, "ok": ok}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
