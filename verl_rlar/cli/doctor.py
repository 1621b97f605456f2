# SPDX-License-Identifier: Apache-2.0
"""`rlar doctor`: checks the place where code runs that nobody has read."""

from __future__ import annotations

import sys
from collections import Counter

from rich.console import Console
from rich.text import Text

from verl_rlar.cli.app import (
    BAD,
    OK,
    WIDTH,
    Json,
    Set,
    app,
    complain,
    configured,
    print_json,
    run,
    visible,
)
from verl_rlar.config import RlarConfig

CHECKS = {True: ("ok", "green"), None: ("warning", "yellow"), False: ("FAIL", "bold red")}


@app.command("doctor")
def doctor_command(as_json: Json = False, settings: Set = None) -> None:
    """Check the sandbox: where code runs that a policy or a model wrote.

    \b
    Looks at the Docker engine and what it can enforce, builds or pulls the image of the boxes where it is missing,
    tries every limit from inside a box, and runs a program as a training does; for a SandboxFusion server, runs a
    program there. What is wrong comes with what to do; the exit code is 1 then, and 0 with warnings alone.

    \b
    Examples:
      rlar doctor
      rlar doctor --set sandbox.runtime=runsc
      rlar doctor --set sandbox.backend=sandbox_fusion --set sandbox.fusion_url=http://host:8080
      rlar doctor --json | jq 'select(.ok == false)'
    """
    run(lambda: _doctor(as_json, configured(settings)))


def _doctor(as_json: bool, config: RlarConfig) -> int:
    from verl_rlar.sandbox.doctor import diagnose  # docker's package takes a while to import

    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    tally = Counter[str]()
    for check in diagnose(config.sandbox, progress=complain):
        word, style = CHECKS[check.ok]
        tally[word] += 1
        if as_json:
            print_json({"name": check.name, "ok": check.ok, "detail": check.detail, "advice": check.advice})
            continue
        line = Text(f"{word:<8}", style=style)
        line.append(f"{check.name:<24}", style="bold")
        first, *more = check.detail.splitlines() or [""]
        line.append(visible(first), style="default")
        console.print(line, soft_wrap=True)
        for text in [*more, *check.advice.splitlines()]:
            console.print(Text(" " * 32 + visible(text), style="dim"), soft_wrap=True)
    complain(", ".join(f"{tally[word]} {word}" for word, _ in CHECKS.values()))
    return BAD if tally["FAIL"] else OK
