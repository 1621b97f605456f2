# SPDX-License-Identifier: Apache-2.0
"""Does every query go to the tool that verifies it? On all data sets of `recipes/data`, in verl's columns.

    python recipes/benchmarks/routing.py [--json]

The right tool of each data set is written down here and nowhere in the package. Each row is routed as it is, and once
more with its data set renamed and through JSON, which may change nothing. Open dialogue and preference prompts have no
tool: right is that they are reported as uncovered.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from verl_rlar.config import RoutingConfig
from verl_rlar.library import builtin_snapshot
from verl_rlar.router import FeatureRouter
from verl_rlar.rows import query_of

DATA = Path(__file__).resolve().parent.parent / "data"
GOALS = {"verifiable_to_right_tool": ">= 0.99", "changed_by_renaming": 0, "open_to_a_tool": 0}
UNCOVERED = "-"


def lines(name: str) -> Iterator[dict[str, Any]]:
    with (gzip.open if name.endswith(".gz") else open)(DATA / name, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def row(prompt: str, truth: str | None, **extra: Any) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": extra,
    }


def mixture() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Data set, its right tool, and a row, for every row there is."""
    for line in lines("gsm8k_test.jsonl.gz"):
        yield "gsm8k (steps, ####)", "final_answer", row(line["question"], line["answer"])
    for line in lines("gsm8k_train_short.jsonl.gz"):
        yield "gsm8k (number)", "final_answer", row(line["question"], line["answer"].rpartition("####")[2].strip())
    for line in lines("math500.jsonl.gz"):
        yield "math500", "final_answer", row(line["prompt"], line["answer"])
    for name in ("humaneval", "mbpp"):
        for line in lines(f"{name}.jsonl.gz"):
            extra = {"test": line["test"], "entry_point": line["entry_point"]}
            yield name, "unit_tests", row(line["prompt"], line.get("canonical_solution"), **extra)
    for line in lines("ifeval.jsonl.gz"):
        extra = {"instruction_id_list": line["instruction_id_list"], "kwargs": line["kwargs"]}
        yield "ifeval", "instruction_constraints", row(line["prompt"], "", **extra)
    for line in lines("ted_mqm_ende.jsonl.gz"):
        prompt = f"Translate the following text into German:\n{line['source']}"
        columns = {"source": line["source"], "source_lang": "en", "target_lang": "de"}
        yield "ted (columns)", "translation", row(prompt, line["reference"], **columns)
        yield "ted (prompt only)", "translation", row(prompt, line["reference"])
    for line in lines("mt_bench_questions.jsonl"):
        yield "mt_bench", UNCOVERED, row(line["turns"][0], None)
    for line in lines("ifbench_preferences.jsonl.gz"):
        yield "preference prompts", UNCOVERED, row(line["prompt"], None)


async def route_all(rows: list[tuple[str, str, dict[str, Any]]]) -> tuple[list[str], list[str], float]:
    """The route of each row as it is, of each row renamed and through JSON, and microseconds per decision."""
    router, snapshot = FeatureRouter(RoutingConfig()), builtin_snapshot()
    queries = [query_of({**columns, "data_source": name}) for name, _, columns in rows]
    start = time.perf_counter()
    routes = [(await router.route(query, snapshot)).name for query in queries]
    micros = 1e6 * (time.perf_counter() - start) / len(rows)
    renamed = [query_of(json.loads(json.dumps({**columns, "data_source": "gsm8k"}))) for _, _, columns in rows]
    return routes, [(await router.route(query, snapshot)).name for query in renamed], micros


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    arguments = parser.parse_args()
    rows = list(mixture())
    routes, renamed, micros = asyncio.run(route_all(rows))
    taken: dict[tuple[str, str], Counter[str]] = {}
    for (name, right, _), route in zip(rows, routes, strict=True):
        taken.setdefault((name, right), Counter())[route] += 1
    table = Table("data set", "rows", "right tool", "went to", box=None)
    for (name, right), counts in taken.items():
        went = ", ".join(f"{tool} {count}" for tool, count in counts.most_common())
        table.add_row(name, str(counts.total()), right, went)
    Console().print(table)
    verifiable = [right == route for (_, right, _), route in zip(rows, routes, strict=True) if right != UNCOVERED]
    figures = {
        "rows": len(rows),
        "verifiable": len(verifiable),
        "verifiable_to_right_tool": sum(verifiable) / len(verifiable),
        "open_to_a_tool": sum(r == UNCOVERED != t for (_, r, _), t in zip(rows, routes, strict=True)),
        "changed_by_renaming": sum(a != b for a, b in zip(routes, renamed, strict=True)),
        "microseconds_per_decision": micros,
    }
    ok = figures["verifiable_to_right_tool"] >= 0.99 and not figures["changed_by_renaming"] + figures["open_to_a_tool"]
    Console().print(*(f"{name}: {value:.4g}" for name, value in figures.items()), sep="\n", highlight=False)
    if arguments.json:
        print(json.dumps({"name": "routing", "figures": figures, "goals": GOALS, "ok": ok}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
