# SPDX-License-Identifier: Apache-2.0
"""``rollout.name=hf_cpu`` on a machine with one GPU: for small models, where vLLM is not installed.

    python -m verl.trainer.main_ppo +rlar_device=cpu trainer.device=cuda \\
        ++ray_kwargs.ray_init.runtime_env.env_vars.VERL_USE_EXTERNAL_MODULES=verl_rlar.cpu.one_gpu

With ``+rlar=default`` the modules that it names come first: 'verl_rlar.plugin,verl_rlar.modes,verl_rlar.cpu.one_gpu'.
verl imports them in each of its workers. Importing this one registers the rollout, and nothing else: platform, engine
and all other rollouts are verl's own.

Not covered: a second GPU; larger models (this rollout makes a token at a time for a whole batch, without paging).
"""

from verl_rlar.cpu import register_hf_cpu

register_hf_cpu()
