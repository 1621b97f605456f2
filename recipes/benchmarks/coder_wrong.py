# SPDX-License-Identifier: Apache-2.0
"""Verifiers that are nearly right, before the exam that `rlar write` holds: is each of them rejected?

    python recipes/benchmarks/coder_wrong.py               # all tasks
    python recipes/benchmarks/coder_wrong.py --only units  # one
    python recipes/benchmarks/coder_wrong.py --json        # prints one object last

Each is an admitted verifier of `coder.py` (from the cassettes) with one expression changed. Their own cases, which
would give many of them away before, are not asked. The exit code is 0 only if all are rejected, and what they were made
of is admitted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from pathlib import Path

import coder
from rich.console import Console
from rich.table import Table

from verl_rlar.agents.bench import draft_of_nothing, labels_missed
from verl_rlar.agents.coder import kinds_of
from verl_rlar.config import RlarConfig
from verl_rlar.exam.hall import Hall
from verl_rlar.exam.subject import verifier

EQUAL = "said == wanted"
MUST = "rlar.plain(must[-1]) in words"
ASKED = 'rlar.builtin("final_answer", rlar.answer_of(response))'
BOTH = "for text in (rlar.answer_of(response), reference)"
WRONG: dict[str, tuple[tuple[str, str, str], ...]] = {
    "gsm8k": (
        ("near enough", "said == {wanted}", "any(abs(n - wanted) <= 1 for n in said)"),
        ("among others", "said == {wanted}", "wanted in said"),
        ("sign forgotten", "said == {wanted}", "{abs(n) for n in said} == {abs(wanted)}"),
        ("anywhere in the text", "said == {wanted}", "reference in response"),
        ("first digit", "said == {wanted}", "{str(n)[:1] for n in said} == {str(wanted)[:1]}"),
        ("any number", "float(said == {wanted})", "(0.7 if said else 0.0)"),
    ),
    "units": (
        ("unit forgotten", EQUAL, "{n for n, _ in said} == {n for n, _ in wanted}"),
        ("number forgotten", EQUAL, "{u for _, u in said} == {u for _, u in wanted}"),
        ("among others", EQUAL, "wanted <= said"),
        ("sign forgotten", EQUAL, "{(abs(n), u) for n, u in said} == wanted"),
        ("powers of ten", EQUAL, "{str(n).strip('0') for n, _ in said} == {str(n).strip('0') for n, _ in wanted}"),
    ),
    "dates": (
        ("day forgotten", EQUAL, "{str(d)[:7] for d in said} == {str(d)[:7] for d in wanted}"),
        ("year only", EQUAL, "{str(d)[:4] for d in said} == {str(d)[:4] for d in wanted}"),
        ("year forgotten", EQUAL, "{str(d)[4:] for d in said} == {str(d)[4:] for d in wanted}"),
        ("among others", EQUAL, "wanted <= said"),
    ),
    "sorting": (
        ("order forgotten", "said == items(reference)", "sorted(said) == sorted(items(reference))"),
        ("more words allowed", "said == items(reference)", "said[: len(items(reference))] == items(reference)"),
        ("number of words", "said == items(reference)", "len(said) == len(items(reference))"),
        ("beginning only", "said == items(reference)", "said[:2] == items(reference)[:2]"),
    ),
    "solutions": (
        ("one is enough", EQUAL, "bool(set(said) & set(wanted))"),
        ("others allowed", EQUAL, "set(wanted) <= set(said)"),
        ("sign forgotten", EQUAL, "sorted(map(abs, said)) == sorted(map(abs, wanted))"),
        ("none wrong", EQUAL, "bool(said) and set(said) <= set(wanted)"),
    ),
    "sentences": (
        ("words not counted", "len(words) == int(count[-1]) and len(text) < 20_000", "bool(words)"),
        ("one word more or less", "len(words) == int(count[-1])", "abs(len(words) - int(count[-1])) <= 1"),
        ("the word not looked for", MUST, "True"),
        ("the word within others", MUST, "rlar.plain(must[-1]) in rlar.plain(text)"),
        ("two of three", "not broken)", "len(broken) < 2)"),
    ),
    "programs": (
        ("one test is enough", "all(right)", "right[:1] == [True] or any(right)"),
        ("runs", "all(right)", "bool(right)"),
        ("parses", "    code = code_of(response)\n", '    return 1.0 if "def" in response else 0.0\n    code = ""\n'),
    ),
    "extraction": (
        ("keys only", EQUAL, "said is not None and said.keys() == wanted.keys()"),
        ("more fields allowed", EQUAL, "said is not None and wanted.items() <= said.items()"),
        ("types forgotten", "(type(value).__name__, ", "(0, str(value).casefold() if value is not None else "),
        ("numbers forgotten", "(type(value).__name__, ", "(0, 0 if isinstance(value, int) else "),
    ),
    "intervals": (
        ("brackets forgotten", ASKED, f"""rlar.builtin("final_answer", *(re.sub(r"[\\[(]", "(", text) {BOTH}))"""),
        ("ends forgotten", ASKED, f"""rlar.builtin("final_answer", *(re.sub(r"-?\\d+", "1", text) {BOTH}))"""),
        ("among others", "return verdict.value,", "return float(reference in rlar.final_answer(response)),"),
        ("lower end only", ASKED, f"""rlar.builtin("final_answer", *(re.sub(r",\\s*-?\\d+", ",9", text) {BOTH}))"""),
    ),
    "stdin": (
        ("one test", "zip(inputs[:20], outputs[:20])", "zip(inputs[:1], outputs[:1])"),
        ("among others", "lines(ran.stdout) != lines(wanted)", "lines(wanted)[0] not in lines(ran.stdout)"),
        ("ends well", "or lines(ran.stdout) != lines(wanted)", ""),
        ("prints a number", "lines(ran.stdout) != lines(wanted)", "not ran.stdout.strip().lstrip('-').isdecimal()"),
    ),
    "terminology": (
        ("terms forgotten", "if not has(text, term):", "if False:"),
        (
            "one term is enough",
            "for term in glossary.values():\n        if",
            "for term in [*glossary.values()][:1]:\n        if",
        ),
        ("terms within others", 'rf"(?<![\\w-]){re.escape(term)}{ENDINGS}(?![\\w-])"', "re.escape(term)"),
        ("a list will do", "if len(own) < max(2, 0.3 * len(rest)):", "if False:"),
        ("English left", "if sum(word in rest for word in own) > 0.3 * len(own):", "if False:"),
    ),
}
"""By task: what is wrong, the text that is changed, and what it becomes."""
GOALS = {"wrong_admitted": 0, "good_rejected": 0, "wrong": ">= 30"}


async def examined(task: coder.Task, sources: dict[str, str], config: RlarConfig, file: Path) -> dict[str, list[str]]:
    """Why each source is rejected, by its name; empty: it is not."""
    found: dict[str, list[str]] = {}
    async with Hall(config) as hall:
        kinds = kinds_of([str(file)], [])
        evidence = await hall.gather([str(file)], [], draft_of_nothing(task.name, kinds), screened=False)
        for name, source in sources.items():
            examination = await hall.examine(verifier(source, name=task.name, kinds=kinds), evidence)
            found[name] = [*examination.card.reasons] if not examination.card.admitted else []
            found[name] += filter(None, [labels_missed(examination)])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(WRONG), help="Repeatable.")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    replayed = argparse.Namespace(
        url=None, model=None, cassettes=str(coder.CASSETTES), record=None, note="", only=None, json=False
    )
    table = Table("task", "verifier", "verdict", "why", box=None)
    admitted, rejected, count = [], [], 0
    with tempfile.TemporaryDirectory() as place:
        for task in coder.TASKS:
            if arguments.only and task.name not in arguments.only:
                continue
            came = coder.written(task, replayed, Path(place))
            good = came.admitted.subject.source if came.admitted else ""
            sources = {"as it was": good}
            for what, old, new in WRONG[task.name]:
                if old not in good:
                    raise SystemExit(f"{task.name}: {old!r} is not in the verifier")
                sources[what] = good.replace(old, new)
            came_to = asyncio.run(
                examined(task, sources, coder.config_of(replayed, Path(place)), Path(place) / f"{task.name}.jsonl")
            )
            for name, reasons in came_to.items():
                count += name != "as it was"
                if name == "as it was" and reasons:
                    rejected.append(task.name)
                if name != "as it was" and not reasons:
                    admitted.append(f"{task.name}: {name}")
                table.add_row(task.name, name, "rejected" if reasons else "admitted", "; ".join(reasons)[:90])
    Console(width=160).print(table)
    figures = {"wrong": count, "wrong_admitted": len(admitted), "good_rejected": len(rejected), "admitted": admitted}
    ok = not admitted and not rejected and (bool(arguments.only) or count >= 30)
    if arguments.json:
        print(json.dumps({"name": "coder_wrong", "figures": figures, "goals": GOALS, "ok": ok}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
