# SPDX-License-Identifier: Apache-2.0
"""Unlike scorers in one pool: does a right answer beat a wrong one that another scorer has judged?

    python recipes/benchmarks/calibration.py
    python recipes/benchmarks/calibration.py --json    # prints one object last

Real scores of reward models and judges for the same answers (RewardMATH), on scales from [0.04, 0.46] to [-942, 372];
the sign of two of them is turned here, to stand for metrics where lower is better. Each is calibrated on one half of
the problems. On the other half:

- *own*: share of pairs of a right and a wrong answer (to any problem) that a scorer ranks rightly by itself, averaged;
- *mixed, calibrated*: the same, over all answers of all scorers in one pool, by calibrated values;
- *mixed, raw*, and *mixed, scaled* (each scorer's range mapped to [0, 1] linearly): what is done without calibration.

Means over `SPLITS` halvings. The exit code is 0 only if calibrated mixing is within one point of *own*.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import statistics
import sys
from pathlib import Path
from typing import Any

from verl_rlar.calibration import Pair, fit, rank_accuracy

DATA = Path(__file__).resolve().parent.parent / "data" / "rewardmath_scores.jsonl.gz"
SCORERS = ("ArmoRM", "Eurus-RM", "gpt4", "gpt4o", "grm_llama3", "internlm2_20b", "internlm2", "skywork_llama3")
"""Those that rank at least 63 % of the pairs rightly; the others of the file would not pass an exam."""
TURNED = ("gpt4", "internlm2")
SPLITS = 10
POINT = 0.01


def pairs_of(rows: list[dict[str, Any]], scorer: str) -> list[Pair]:
    """Raw score and whether the answer is right, for all answers of some problems."""
    sign = -1.0 if scorer in TURNED else 1.0
    return [(sign * raw, n == row["right"]) for row in rows for n, raw in enumerate(row["scores"][scorer])]


def accuracy(pairs: list[Pair]) -> float:
    return rank_accuracy([raw for raw, right in pairs if right], [raw for raw, right in pairs if not right])


def split(rows: list[dict[str, Any]], seed: int) -> dict[str, float]:
    """The figures of one halving."""
    order = random.Random(seed).sample(rows, len(rows))
    learned, fresh = order[: len(order) // 2], order[len(order) // 2 :]
    own, raw_own, calibrated, raw, scaled = [], [], [], [], []
    turned = 0
    for scorer in SCORERS:
        known, made = pairs_of(learned, scorer), fit(pairs_of(learned, scorer))
        turned += made.lower_is_better == (scorer in TURNED)
        seen = pairs_of(fresh, scorer)
        values = [(made(x), right) for x, right in seen]
        low, high = min(x for x, _ in known), max(x for x, _ in known)
        own.append(accuracy(values))
        best = accuracy(seen)
        raw_own.append(1.0 - best if scorer in TURNED else best)
        calibrated += values
        raw += seen
        scaled += [((x - low) / (high - low), right) for x, right in seen]
    return {
        "own": statistics.mean(raw_own),
        "own_calibrated": statistics.mean(own),
        "mixed_calibrated": accuracy(calibrated),
        "mixed_raw": accuracy(raw),
        "mixed_scaled": accuracy(scaled),
        "directions_found": turned / len(SCORERS),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    options = parser.parse_args()
    with gzip.open(DATA, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    splits = [split(rows, seed) for seed in range(SPLITS)]
    figures = {name: statistics.mean(one[name] for one in splits) for name in splits[0]}
    figures["points_lost"] = 100 * (figures["own"] - figures["mixed_calibrated"])
    goals = {"points_lost": f"<= {100 * POINT:g}", "directions_found": 1}
    ok = figures["points_lost"] <= 100 * POINT and figures["directions_found"] == 1
    for name, value in figures.items():
        print(f"{name:<20} {value:8.4f}" + (f"   (goal: {goals[name]})" if name in goals else ""))
    if options.json:
        print(json.dumps({"name": "calibration", "figures": figures, "goals": goals, "ok": ok}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
