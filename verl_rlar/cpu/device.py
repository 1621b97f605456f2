# SPDX-License-Identifier: Apache-2.0
"""The platform "cpu" for verl's `PlatformRegistry`.

What: verl reaches its device through one `PlatformBase` object (memory figures, streams, random state, process group,
Ray resource). Importing this module registers one for host memory.

Guarantees: only verl's public registry is used; memory figures are real ones (resident set of this process, memory of
the machine); what has no meaning on a CPU (streams, caches, profiler) does nothing and returns.

Not covered: device counts other than one, IPC between processes (verl then sends weights through shared memory),
profiling.

Three hooks are bent, because verl asks for more than their names say:

- `CPUPlatform.current_device` returns a `torch.device`, not an index: verl passes it on as ``device=`` in some twenty
  places, where an int means "cuda:N".
- `CPUPlatform.communication_backend_name` opens the process group. verl builds the backend string
  ``cpu:gloo,<device>:<backend>`` (verl/utils/distributed.py:89), which torch refuses for device "cpu" (duplicate
  device type). It builds the string right before it asks whether a group is open already, so a worker's group is
  opened here, as plain gloo.
- `CPUPlatform.ray_resource_name` is "GPU": verl counts only the Ray resources GPU and NPU
  (verl/single_controller/ray/base.py:230), so the CPU is declared to Ray as one logical GPU (``ray_init.num_gpus=1``).
"""

import os
import resource
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType
from typing import Any

import psutil
import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry

_CPU = torch.device("cpu")


class _Inert:
    """Stands in for a stream or an event: a context manager whose every method does nothing."""

    def __init__(self, *args: Any, **kwargs: Any): ...

    def __enter__(self) -> "_Inert":
        return self

    def __exit__(self, *exc: object) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


class _HostMemory(ModuleType):
    """What verl calls on ``torch.cuda``, answered for host memory. Sizes in bytes."""

    Stream = _Inert
    Event = _Inert

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> torch.device:
        return _CPU

    def get_device_name(self, device: Any = None) -> str:
        return "cpu"

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        memory = psutil.virtual_memory()
        return memory.available, memory.total

    def memory_allocated(self, device: Any = None) -> int:
        return psutil.Process().memory_info().rss

    def max_memory_allocated(self, device: Any = None) -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB

    memory_reserved = memory_allocated
    max_memory_reserved = max_memory_allocated

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def stream(self, stream: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def current_stream(self, device: Any = None) -> _Inert:
        return _Inert()

    def _nothing(self, *args: Any, **kwargs: Any) -> None: ...

    synchronize = empty_cache = ipc_collect = set_device = set_per_process_memory_fraction = _nothing
    reset_peak_memory_stats = reset_accumulated_memory_stats = _nothing


_HOST_MEMORY = _HostMemory("verl_rlar.cpu.device.host_memory")


@PlatformRegistry.register(platform="cpu")
class CPUPlatform(PlatformBase):
    """One CPU device. Registered last, so that verl probes every accelerator before it."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = _HOST_MEMORY

    def is_available(self) -> bool:
        return True

    # -- device -------------------------------------------------------------------------------------------------------
    def current_device(self) -> torch.device:  # type: ignore[override]
        return _CPU

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None: ...

    def synchronize(self, device_index: int | None = None) -> None: ...

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def set_allocator_settings(self, settings: str) -> None: ...

    def empty_cache(self) -> None: ...

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    # -- processes ----------------------------------------------------------------------------------------------------
    def communication_backend_name(self) -> str:
        in_worker = os.environ.get("WG_BACKEND") == "ray" and {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()
        if in_worker and not torch.distributed.is_initialized():
            torch.distributed.init_process_group(
                backend="gloo",
                rank=int(os.environ["RANK"]),
                world_size=int(os.environ["WORLD_SIZE"]),
                init_method=os.environ.get("DIST_INIT_METHOD"),
            )
        return "gloo"

    def is_ipc_supported(self) -> bool:
        return False

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def rollout_env_vars(self) -> dict[str, str]:
        # vLLM's CPU build would take a share of the machine's memory for its KV cache, and bind its threads to cores
        # that the trainer uses as well. The user's own values win.
        defaults = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # GiB; no binding
        return {name: os.environ.get(name, value) for name, value in defaults.items()}

    # -- profiling ----------------------------------------------------------------------------------------------------
    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None: ...

    def profiler_stop(self) -> None: ...

    def cudart(self) -> None:
        return None
