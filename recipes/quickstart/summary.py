# SPDX-License-Identifier: Apache-2.0
"""What a run of the quickstart has come to: reward per task and per tool, outcomes, time, and a picture of the curves.

    python recipes/quickstart/summary.py RUN [--json]

*Start* and *end* are the first and the last quarter of the training steps that were made. Means are over scored
responses; unscored ones are counted, never averaged in. Where a run was killed after its last checkpoint and resumed,
the later attempt counts from its first step on, and what the earlier one had made from there does not; the ledger keeps
both.

The reward's *exposed* seconds of a step are those in which nothing was left to generate: from the arrival of the step's
last response until its last score was known. Responses that are scored while others are still being generated cost the
step nothing.

Guarantees: reads only (but for ``curves.png``), and works on a run that is still going on.

Not covered: the way of a response to the reward worker and back (Ray's remote call, a few milliseconds) is not in the
exposed seconds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from verl_rlar.errors import LedgerError
from verl_rlar.ledger import read

LEDGER = "rlar"
"""Folder of the ledger inside the run folder."""
PEARSON = "training/rollout_actor_probs_pearson_corr"
"""verl's metric that tells whether the rollout computes with the trainer's weights: 1 is perfect."""


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean over scored responses."""

    mean: float | None
    """None if nothing was scored."""
    n: int

    def __str__(self) -> str:
        return "-" if self.mean is None else f"{self.mean:.3f} (n={self.n})"


@dataclass(frozen=True, kw_only=True)
class Change:
    """A reward at the start and at the end."""

    start: Mean
    end: Mean

    @property
    def difference(self) -> float | None:
        return None if self.start.mean is None or self.end.mean is None else self.end.mean - self.start.mean


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Everything that `show` prints."""

    run: str
    steps: int
    """Training steps with scores in the ledger."""
    attempts: int
    """How often training was started."""
    responses: int
    """Training responses."""
    by_task: dict[str, Change]
    """First against last quarter of the training steps, by `data_source`."""
    by_tool: dict[str, Change]
    """The same, by route."""
    validation: dict[str, Change]
    """Prompts that were never trained on, before training and after the last step; empty if there was no validation."""
    outcomes: dict[str, int]
    """Training responses by outcome."""
    step_seconds: float | None
    """Mean time of a step as verl measures it (`timing_s/step`); None if verl wrote no metrics."""
    exposed_seconds: float | None
    """Mean exposed time of the reward in a step."""
    exposed_share: float | None
    """Exposed time of the reward as a share of the steps' time, in [0, 1]."""
    pearson_min: float | None
    """Smallest value of `PEARSON`."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One response, as far as needed here."""

    step: int
    task: str
    tool: str
    outcome: str
    value: float | None
    received: float
    done: float


def summarise(run: Path) -> Summary:
    """Reads a run folder.

    Raises:
        LedgerError: It holds no ledger, or one that cannot be read.
    """
    train, val, attempts = records(run)
    steps = sorted({r.step for r in train})
    quarter = max(1, len(steps) // 4)
    first, last = set(steps[:quarter]), set(steps[-quarter:])
    metrics = verl_metrics(run)
    exposed = exposed_seconds(train)
    timed = [step for step in exposed if "timing_s/step" in metrics.get(step, {})]
    total = sum(metrics[step]["timing_s/step"] for step in timed)
    hidden = sum(exposed[step] for step in timed)
    pearson = [m[PEARSON] for m in metrics.values() if m.get(PEARSON) is not None]
    val_steps = sorted({r.step for r in val})
    return Summary(
        run=str(run),
        steps=len(steps),
        attempts=attempts,
        responses=len(train),
        by_task=_changes(train, "task", first, last),
        by_tool=_changes(train, "tool", first, last),
        validation=_changes(val, "task", {val_steps[0]}, {val_steps[-1]}) if len(val_steps) > 1 else {},
        outcomes=dict(Counter(r.outcome for r in train).most_common()),
        step_seconds=total / len(timed) if timed else None,
        exposed_seconds=hidden / len(timed) if timed else None,
        exposed_share=hidden / total if total else None,
        pearson_min=min(pearson, default=None),
    )


def records(run: Path) -> tuple[list[Record], list[Record], int]:
    """The responses of training and of validation that count, see above, and the number of attempts."""
    query = (
        "WITH begun AS (SELECT attempt, MIN(step) AS step FROM scores WHERE split = 'train' GROUP BY attempt) "
        "SELECT split, step, data_source AS task, route AS tool, outcome, value, received, received + seconds AS done "
        "FROM scores JOIN (SELECT split, step, MAX(attempt) AS attempt FROM scores GROUP BY split, step) "
        "USING (split, step, attempt) WHERE NOT EXISTS "
        "(SELECT 1 FROM begun WHERE begun.attempt > scores.attempt AND begun.step <= scores.step)"
    )
    splits: dict[str, list[Record]] = {"train": [], "val": []}
    with read(run / LEDGER) as db:
        attempts = db.execute("SELECT COUNT(*) FROM attempts").fetchone()[0]
        for row in db.execute(query):
            fields = dict(row)
            splits[fields.pop("split")].append(Record(**fields))
    return splits["train"], splits["val"], attempts


def verl_metrics(run: Path) -> dict[int, dict[str, Any]]:
    """verl's own metrics by step; of what was made twice, the later ones."""
    found: dict[int, dict[str, Any]] = {}
    for file in metrics_files(run):
        made: dict[int, dict[str, Any]] = {}
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # a line that is being written
                continue
            made[entry["step"]] = made.get(entry["step"], {}) | entry["data"]
        begun = min((step for step, data in made.items() if "timing_s/step" in data), default=None)
        found = {step: data for step, data in found.items() if begun is None or step < begun}
        for step, data in made.items():
            found[step] = found.get(step, {}) | data
    return found


def metrics_files(run: Path) -> list[Path]:
    """The files that verl's logger wrote, one for each start of training, the oldest first."""
    return sorted(run.glob("metrics.*.jsonl"), key=lambda file: int(file.name.split(".")[1]))


def exposed_seconds(train: Iterable[Record]) -> dict[int, float]:
    """By step: how long the step waited for scores when no response was left to come."""
    arrived: dict[int, float] = defaultdict(float)
    done: dict[int, float] = defaultdict(float)
    for r in train:
        arrived[r.step] = max(arrived[r.step], r.received)
        done[r.step] = max(done[r.step], r.done)
    return {step: max(0.0, done[step] - arrived[step]) for step in arrived}


def _changes(rows: list[Record], key: str, first: set[int], last: set[int]) -> dict[str, Change]:
    names = sorted({getattr(r, key) for r in rows})
    of = {name: [r for r in rows if getattr(r, key) == name] for name in names}
    return {name: Change(start=_mean(of[name], first), end=_mean(of[name], last)) for name in names}


def _mean(rows: list[Record], steps: set[int]) -> Mean:
    values = [r.value for r in rows if r.step in steps and r.value is not None]
    return Mean(mean=sum(values) / len(values) if values else None, n=len(values))


def show(summary: Summary, console: Any) -> None:
    """Prints a summary on a rich console."""
    from rich.table import Table

    sections = (
        ("Reward by task, in training", "task", summary.by_task, ("first quarter", "last quarter")),
        ("Reward by tool, in training", "tool", summary.by_tool, ("first quarter", "last quarter")),
        ("Reward on prompts never trained on", "task", summary.validation, ("before", "after")),
    )
    for title, name, changes, columns in sections:
        if not changes:
            continue
        table = Table(title=title, title_justify="left")
        for column in (name, *columns, "change"):
            table.add_column(column, justify="left" if column == name else "right")
        for key, change in changes.items():
            difference = "-" if change.difference is None else f"{change.difference:+.3f}"
            table.add_row(key, str(change.start), str(change.end), difference)
        console.print(table)
    attempts = f", started {summary.attempts} times" if summary.attempts > 1 else ""
    lines = [f"{summary.steps} steps, {summary.responses} responses{attempts}"]
    lines.append("outcomes: " + ", ".join(f"{count} {outcome}" for outcome, count in summary.outcomes.items()))
    if summary.exposed_share is not None:
        held_up = f"{1e3 * (summary.exposed_seconds or 0):.0f} ms ({summary.exposed_share:.2%})"
        lines.append(f"a step took {summary.step_seconds:.1f} s; the reward held it up for {held_up}")
    if summary.pearson_min is not None:
        lines.append(f"rollout and trainer agree on probabilities: Pearson >= {summary.pearson_min:.5f}")
    console.print("\n".join(lines), highlight=False, soft_wrap=True)


def draw(run: Path) -> Path:
    """Draws the reward of each task over the steps into ``curves.png`` in the run folder.

    Returns:
        The file.

    Raises:
        LedgerError: The run has no ledger, or one that cannot be read.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    train, val, _ = records(run)
    tasks = sorted({r.task for r in train})
    columns = 2 if len(tasks) > 1 else 1
    lines = max(1, -(-len(tasks) // columns))
    figure, axes = pyplot.subplots(lines, columns, figsize=(5 * columns, 3.2 * lines), squeeze=False, sharex=True)
    for axis in axes.flat[len(tasks) :]:
        axis.set_visible(False)
    for axis, task in zip(axes.flat, tasks, strict=False):
        points = _means_by_step(train, task)
        axis.plot(*zip(*points, strict=True), ".", color="tab:blue", alpha=0.35, label="mean of a step")
        axis.plot(*zip(*_smoothed(points), strict=True), color="tab:blue", label="moving average")
        if held_out := _means_by_step(val, task):
            axis.plot(*zip(*held_out, strict=True), "D", color="tab:orange", label="never trained on")
        tools = ", ".join(sorted({r.tool for r in train if r.task == task}))
        axis.set_title(f"{task}  (by {tools})", fontsize=10)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    for axis in axes[:, 0]:
        axis.set_ylabel("reward")
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    file = run / "curves.png"
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
    return file


def _means_by_step(rows: list[Record], task: str) -> list[tuple[int, float]]:
    values: dict[int, list[float]] = defaultdict(list)
    for r in rows:
        if r.task == task and r.value is not None:
            values[r.step].append(r.value)
    return [(step, sum(v) / len(v)) for step, v in sorted(values.items())]


def _smoothed(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Centred moving average over about an eighth of the points."""
    half = max(1, len(points) // 16)
    windows = (points[max(0, i - half) : i + half + 1] for i in range(len(points)))
    return [(step, sum(v for _, v in window) / len(window)) for (step, _), window in zip(points, windows, strict=True)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="summary.py", description="What a run of the quickstart has come to.")
    parser.add_argument("run", type=Path, metavar="RUN", help="the run folder, for example runs/quickstart")
    parser.add_argument("--json", action="store_true", help="print one JSON object, draw nothing")
    arguments = parser.parse_args(argv)
    try:
        summary = summarise(arguments.run)
        if arguments.json:
            print(json.dumps(asdict(summary)))
            return 0
        from rich.console import Console

        console = Console()
        show(summary, console)
        console.print(f"curves: {draw(arguments.run)}", soft_wrap=True)
    except LedgerError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
