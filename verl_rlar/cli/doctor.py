# SPDX-License-Identifier: Apache-2.0
"""`rlar doctor`: checks whether this machine can do what the settings ask for, and says what to do where it cannot."""

from __future__ import annotations

from collections import Counter
from enum import Enum
from typing import Annotated

import typer
from rich.text import Text

from verl_rlar.cli.app import (
    BAD,
    OK,
    Json,
    Output,
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


class Area(str, Enum):
    """What can be looked at; see `verl_rlar.doctor`."""

    INSTALL = "install"
    DISK = "disk"
    GPUS = "gpus"
    HUB = "hub"
    LLM = "llm"
    SANDBOX = "sandbox"


@app.command("doctor", short_help="Check whether this machine is fit.")
def doctor_command(
    only: Annotated[
        list[Area] | None, typer.Option("--only", help="Look at this alone. Repeatable. Default: all.")
    ] = None,
    as_json: Json = False,
    settings: Set = None,
) -> None:
    """Check the machine: packages, disk, GPUs, hub, LLM, and the sandbox, where foreign code runs.

    The sandbox: looks at the Docker engine and what it can enforce, builds or pulls the image of the boxes where it is
    missing, tries every limit from inside a box, and runs a program as a training does; for a SandboxFusion server,
    runs a program there. An LLM is asked for its list of models, never for a completion.
    What is wrong comes with what to do; the exit code is 1 then, and 0 with warnings alone.

    \b
    Examples:
      rlar doctor
      rlar doctor --only install --only disk
      rlar doctor --set sandbox.runtime=runsc
      rlar doctor --set sandbox.backend=sandbox_fusion --set sandbox.fusion_url=http://host:8080
      rlar doctor --only llm --set agents.url=http://127.0.0.1:8000/v1 --set agents.model=Qwen/Qwen3-32B
      rlar doctor --json | jq 'select(.ok == false)'
    """
    run(lambda: _doctor(only or list(Area), as_json, configured(settings)))


def _doctor(areas: list[Area], as_json: bool, config: RlarConfig) -> int:
    from verl_rlar.doctor import AREAS  # docker's package takes a while to import

    console = Output()
    tally = Counter[str]()
    for check in (check for area, look in AREAS.items() if area in areas for check in look(config, complain)):
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
