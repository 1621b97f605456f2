# SPDX-License-Identifier: Apache-2.0
"""verl's trainer as a child process: started, watched, and ended with everything that it has started.

verl's own output goes to ``train.log`` in the run folder, its metrics to ``metrics.<start>.jsonl``; the screen gets one
line per step and a bar.

Guarantees: when `train` ends, for whatever reason, no process of the child's session is left (Ray's daemons and workers
are in it); if this process is killed with SIGKILL, Linux ends the trainer and Ray's own reaper the rest. Only processes
of that session are ever signalled.

Not covered: Ray's logs stay where Ray puts them (``/tmp/ray``).
"""

from __future__ import annotations

import ctypes
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

LOG = "train.log"
TAIL = 25
"""Lines of the log that are shown if training fails."""
GRACE_S = 20.0
"""How long the trainer may take to end by itself after SIGINT, in seconds."""
PR_SET_PDEATHSIG = 1


class Failed(Exception):
    """Training ended with an error; the message has the end of its log."""


SWITCHES = ("+rlar=default", "+rlar_device=cpu")
"""The plugin, and its CPU platform."""


def train(
    overrides: list[str], run: Path, *, steps: int, console: Console, switches: tuple[str, ...] = SWITCHES
) -> None:
    """Runs ``python -m verl.trainer.main_ppo +rlar=default +rlar_device=cpu ...`` and shows its progress.

    Args:
        overrides: Further Hydra overrides.
        run: The run folder.
        steps: Training steps in all, those of earlier starts included.
        console: Where progress goes.
        switches: What of ours is switched on.

    Raises:
        Failed: The trainer ended with an error.
        KeyboardInterrupt: From a signal; the child is gone by then.
    """
    from summary import metrics_files

    metrics = run / f"metrics.{len(metrics_files(run)) + 1}.jsonl"
    command = [sys.executable, "-m", "verl.trainer.main_ppo", *switches, *overrides]
    with open(run / LOG, "ab") as log:
        log.write(f"\n$ {shlex.join(command)}\n".encode())
        log.flush()
        child = subprocess.Popen(
            command,
            cwd=run,
            env=os.environ | environment(metrics),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
    try:
        _watch(child, metrics, steps, console)
    finally:
        end(child)
    if child.returncode:
        lines = (run / LOG).read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]
        shown = "\n".join(f"  | {line[:300]}" for line in lines)
        raise Failed(f"training ended with exit code {child.returncode}. The end of {run / LOG}:\n{shown}")


def computes_in_bf16() -> bool:
    """Whether this machine's CPU multiplies bfloat16 by itself; where it does not, float32 is faster."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return False
    return not {"amx_bf16", "avx512_bf16"}.isdisjoint(flags)


def environment(metrics: Path) -> dict[str, str]:
    """Environment variables of the trainer and all its workers."""
    cores = str(min(16, len(os.sched_getaffinity(0))))
    return {
        "VERL_FILE_LOGGER_PATH": str(metrics),
        "VERL_PLATFORM": os.environ.get("VERL_PLATFORM", "cpu"),  # a GPU that happens to be here stays idle
        "HF_HUB_OFFLINE": "1",  # everything is on the disk
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", cores),
        "OMP_WAIT_POLICY": "PASSIVE",  # processes take turns on the cores: who waits shall not spin
        "RAY_ADDRESS": "local",  # never join a cluster that happens to run here
        "RAY_DEDUP_LOGS": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_raylet_start_wait_time_s": "300",  # 30 s are not enough on a busy machine
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }


def _die_with_parent() -> None:
    """In the child, before it starts: Linux shall kill it when its parent dies (elsewhere: nothing)."""
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    except (AttributeError, OSError):
        pass


def _watch(child: subprocess.Popen[bytes], metrics: Path, steps: int, console: Console) -> None:
    """Shows a line for every entry of verl's metrics until the child ends."""
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
    recent: deque[float] = deque(maxlen=8)
    with bar:
        task = bar.add_task("starting verl and Ray (1 to 3 minutes)", total=steps)
        reader = _Lines(metrics)
        while True:
            running = child.poll() is None
            for entry in reader.new():
                step, data = entry["step"], entry["data"]
                if "timing_s/step" in data:
                    recent.append(data["timing_s/step"])
                    eta = _clock((steps - step) * sum(recent) / len(recent))
                    console.print(_line(step, steps, data, eta), highlight=False, soft_wrap=True)
                    bar.update(task, completed=step, description="training")
                else:
                    bar.update(task, completed=step, description="training (the first step is slow)")
            if not running:
                return
            time.sleep(0.25)


def _line(step: int, steps: int, data: dict[str, Any], eta: str) -> str:
    reward, seconds = data.get("critic/score/mean", float("nan")), data["timing_s/step"]
    return f"step {step:>3}/{steps}   reward {reward:.3f}   {seconds:5.1f} s   {eta} left"


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


class _Lines:
    """The whole lines of a JSON lines file that is being written, each once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def new(self) -> list[dict[str, Any]]:
        try:
            with open(self._path, "rb") as file:
                file.seek(self._offset)
                text = file.read()
        except FileNotFoundError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [json.loads(line) for line in whole.splitlines()]


def end(child: subprocess.Popen[bytes]) -> None:
    """Ends a child and its whole session: politely, then not. A second Ctrl-C does not interrupt it."""
    handlers = {s: signal.signal(s, signal.SIG_IGN) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        if child.poll() is None:
            child.send_signal(signal.SIGINT)
            try:
                child.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        deadline = time.monotonic() + 3.0
        while (left := session(child.pid)) and time.monotonic() < deadline:
            time.sleep(0.1)  # Ray's processes are on their way out
        while left:
            for pid in left:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            time.sleep(0.1)
            left = session(child.pid)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def session(sid: int) -> list[int]:
    """The living processes of a session."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[3]) == sid and fields[0] != "Z":
                found.append(int(entry.name))
    return found
