# SPDX-License-Identifier: Apache-2.0
"""Work for agents' processes, without an LLM: `test_session` has them run it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

from verl_rlar.agents.session import Emit, Stop
from verl_rlar.errors import HubUnreachable


def tells(order: dict[str, Any], emit: Emit) -> None:
    print("this is no event")
    emit({"event": "told", "order": order, "environment": dict(os.environ)})


def hangs(order: dict[str, Any], emit: Emit) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    emit({"event": "told", "pids": [os.getpid(), child.pid]})
    if order.get("say"):
        with open(order["say"], "w") as file:
            file.write(f"{os.getpid()}\n")
    time.sleep(1000)


def stops(order: dict[str, Any], emit: Emit) -> None:
    raise Stop("steps", "that was all")


def fails(order: dict[str, Any], emit: Emit) -> None:
    raise HubUnreachable("the hub is away")


def crashes(order: dict[str, Any], emit: Emit) -> None:
    emit({"event": "told"})
    raise RuntimeError(f"with {os.environ['PLANTED_KEY']} in it")


def dies(order: dict[str, Any], emit: Emit) -> None:
    emit({"event": "told"})
    os._exit(7)


def acquires(order: dict[str, Any], emit: Emit) -> None:
    """Tells what it was told, as if nothing had been found."""
    emit({"event": "acquired", "tool": None, "why": f"nothing for {order['gap']['kind']}"})


def repeats(order: dict[str, Any], emit: Emit) -> None:
    """Tells the event that it was told of."""
    emit(order["event"])
