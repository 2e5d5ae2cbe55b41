"""Many layouts one after the other on the same ranks."""

from __future__ import annotations

import gc

import torch.distributed as dist


def forget_model() -> None:
    """Forget groups, global settings and whatever model is still reachable; every rank calls.

    Gradient hooks of megatron-core's data parallelism keep a model alive that nobody can reach, and
    with it its memory and the threads of its groups: it is emptied.
    """
    from megatron.core import num_microbatches_calculator, parallel_state, rerun_state_machine
    from megatron.core.tensor_parallel import random as parallel_random
    from megatron.core.transformer.moe import moe_logging
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    dist.barrier()
    parallel_state.destroy_model_parallel()
    num_microbatches_calculator.destroy_num_microbatches_calculator()
    rerun_state_machine.destroy_rerun_state_machine()
    moe_logging.destroy_moe_metrics_tracker()
    parallel_random._CUDA_RNG_STATE_TRACKER = None
    parallel_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = False
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    _empty_models()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def _empty_models() -> None:
    import torch
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer import MegatronOptimizer

    gc.collect()
    for thing in gc.get_objects():
        if isinstance(thing, DistributedDataParallel):
            for module in list(thing.modules()):
                module.__dict__.clear()
                torch.nn.Module.__init__(module)
        elif isinstance(thing, MegatronOptimizer):
            thing.__dict__.clear()
    gc.collect()
