# SPDX-License-Identifier: Apache-2.0
"""New weights for a running vLLM worker on CPU.

Why: vLLM's CPU linear layers pack their weight for the processor's matrix units and then drop it
(vllm/model_executor/layers/utils.py: dispatch_cpu_unquantized_gemm), so verl's in-place ``model.load_weights()``
(verl/workers/rollout/vllm_rollout/utils.py:405) has nothing to write to. vLLM's own layerwise reload rebuilds the
layers; it needs all weights at once.

One thing the reload misses: a tied head gets no weights of its own, so it keeps the packed copy of the *old* embedding
(vllm/model_executor/model_loader/reload/layerwise.py:268), without any error: the rollout becomes noise. Every layer
that still owns its weight is therefore packed again.

Guarantees: after an update the worker computes as if it had been started from the new weights.

Not covered: LoRA and quantized models, which `vllm_rollout.CPUvLLMReplica` refuses. vLLM logs "Failed to load
weights" for layers without weights of their own at each update; that is harmless.
"""

import logging
import time
from typing import Any

import torch
from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightReceiver
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

logger = logging.getLogger(__name__)


class CPUWorkerExtension(vLLMColocateWorkerExtension):
    """verl's worker extension with another way to take weights. vLLM mixes it into its worker class."""

    model_runner: Any

    @torch.no_grad()
    def update_weights_from_ipc(
        self, peft_config: Any = None, base_sync_done: bool = False, use_shm: bool = False
    ) -> None:
        """Receives all weights of the trainer and rebuilds the model from them.

        Args:
            peft_config: None; LoRA is refused earlier.
            base_sync_done: Without meaning.
            use_shm: Whether the weights come through shared memory; on a CPU they do.
        """
        start = time.monotonic()
        weights: list[tuple[str, torch.Tensor]] = []
        receiver = BucketedWeightReceiver(zmq_handle=self._get_zmq_handle(), device=self.device, use_shm=use_shm)
        # The buffer behind the tensors is used again for the next bucket: hence the copies.
        receiver.receive_weights(
            on_bucket_received=lambda bucket, is_last: weights.extend((name, tensor.clone()) for name, tensor in bucket)
        )
        self.model_runner.reload_weights(weights_iterator=iter(weights))
        for layer in self.model_runner.model.modules():
            weight = getattr(layer, "weight", None)
            if hasattr(layer, "cpu_linear") and weight is not None and weight.numel():
                layer.quant_method.process_weights_after_loading(layer)
        logger.info("vLLM took %d weights in %.2f s", len(weights), time.monotonic() - start)
