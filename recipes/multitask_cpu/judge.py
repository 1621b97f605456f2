# SPDX-License-Identifier: Apache-2.0
"""An LLM as the judge: what it says of an answer, from 0 to 10, by any OpenAI-compatible endpoint.

    export RLAR_JUDGE_URL=http://127.0.0.1:8000/v1 RLAR_JUDGE_MODEL=Qwen/Qwen3-32B
    export RLAR_JUDGE_API_KEY=...      # where it wants one
    export RLAR_JUDGE_TOKENS=16        # of an answer at most (default 4096: one that reasons thinks first)
    python recipes/multitask_cpu/run.py --arms rlar,judge

It is shown the prompt, the reference if there is one, and the answer, and nothing of ours: neither rubric nor exam.

Guarantees: asked at temperature 0, and where it says no grade then, twice more at 1; rate limits, errors of the server
and lost connections are tried again, five times in all. Then it raises, and verl leaves the answer out: a grade that
nobody gave is never made up. Every call's tokens are appended to ``judge.jsonl`` in the run folder (`LOG`).

Not covered: an answer that talks to the judge. That is what this arm is there to show.
"""

from __future__ import annotations

import json
import os
import re
from functools import cache
from pathlib import Path

import httpx
from tenacity import retry, retry_if_exception, stop_after_attempt, wait_random_exponential

URL, MODEL, KEY = "RLAR_JUDGE_URL", "RLAR_JUDGE_MODEL", "RLAR_JUDGE_API_KEY"
TOKENS, LOG = "RLAR_JUDGE_TOKENS", "RLAR_JUDGE_LOG"
ASKED = """\
Grade the answer to a prompt from 0 (useless) to 10 (perfect). Say nothing but the number.

<prompt>
{prompt}
</prompt>
{reference}<answer>
{answer}
</answer>"""
TEMPERATURES = (0.0, 1.0, 1.0)
"""Of the tries: at 0 it would say the same again."""
TIMEOUT_S = 300.0


class NoGrade(Exception):
    """The judge said something that is no grade."""


def missing() -> str | None:
    """What has to be set before there is a judge; None if there is one."""
    unset = [name for name in (URL, MODEL) if not os.environ.get(name)]
    return f"there is no judge: set {' and '.join(unset)}" if unset else None


def grade(prompt: str, reference: str, answer: str) -> float:
    """What the judge says, in [0, 1].

    Raises:
        NoGrade: It said no number from 0 to 10, or several.
        httpx.HTTPError: It did not answer.
    """
    told = f"<reference>\n{reference}\n</reference>\n" if reference else ""
    text = ASKED.format(prompt=prompt, reference=told, answer=answer)
    said = ""
    for temperature in TEMPERATURES:
        said = _ask(text, temperature)
        if (value := read(said)) is not None:
            return value / 10
    raise NoGrade(f"the judge was asked for a number from 0 to 10, and said {said[-200:]!r}")


def read(said: str) -> float | None:
    """The one number from 0 to 10 in what a judge said, be it ``8``, ``**8**/10`` or ``Grade: 8 out of 10.``; None if
    there is none, or another one. What it thought does not count."""
    if "<think>" in said and "</think>" not in said:
        return None  # it was cut off
    told = re.sub(r"(?:/|out of)\s*10\b(?!\.\d)", "", said.rpartition("</think>")[2].replace("*", ""))
    found = re.findall(r"-?\d+(?:\.\d+)?", told)
    return float(found[0]) if len(found) == 1 and 0 <= float(found[0]) <= 10 else None


def tokens(folder: Path) -> int:
    """Tokens that the judge read and wrote in a run."""
    log = folder / "judge.jsonl"
    return sum(json.loads(line)["tokens"] for line in log.read_text().splitlines()) if log.exists() else 0


def _again(error: BaseException) -> bool:
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code == 429 or error.response.status_code >= 500
    return isinstance(error, httpx.TransportError)


@retry(
    retry=retry_if_exception(_again), stop=stop_after_attempt(5), wait=wait_random_exponential(0.5, 20), reraise=True
)
def _ask(text: str, temperature: float) -> str:
    messages = [{"role": "user", "content": text}]
    body = {"model": os.environ[MODEL], "messages": messages, "temperature": temperature}
    response = _client().post("chat/completions", json=body | {"max_tokens": int(os.environ.get(TOKENS, 4096))})
    response.raise_for_status()
    told = response.json()
    if log := os.environ.get(LOG):
        with open(log, "a", encoding="utf-8") as file:  # one write: lines of several processes do not mix
            file.write(json.dumps({"tokens": (told.get("usage") or {}).get("total_tokens", 0)}) + "\n")
    return str(told["choices"][0]["message"]["content"] or "")


@cache
def _client() -> httpx.Client:
    key = os.environ.get(KEY)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.Client(base_url=os.environ[URL].rstrip("/") + "/", headers=headers, timeout=TIMEOUT_S)
