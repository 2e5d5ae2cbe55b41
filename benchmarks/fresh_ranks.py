"""Many models one after the other on the same ranks: what one leaves behind is forgotten."""

from __future__ import annotations

import gc

import torch
import torch.distributed as dist
from megatron.core import num_microbatches_calculator, parallel_state, rerun_state_machine
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import random as parallel_random
from megatron.core.transformer.moe import moe_logging
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler


def forget_model() -> None:
    """Forget groups, megatron-core's global settings and whatever model is left; every rank calls.

    torch's default group stays.
    """
    # A peer may still be reading from a group that this rank would close.
    dist.barrier()
    parallel_state.destroy_model_parallel()
    num_microbatches_calculator.destroy_num_microbatches_calculator()
    rerun_state_machine.destroy_rerun_state_machine()
    moe_logging.destroy_moe_metrics_tracker()
    parallel_random._CUDA_RNG_STATE_TRACKER = None
    parallel_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = False
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    _empty_models_left_behind()
    _destroy_groups_but_default()
    gc.collect()


def _empty_models_left_behind() -> None:
    """Gradient hooks of megatron-core's data parallelism keep a model alive that nobody can reach.

    The collector cannot see through autograd's nodes. Such a model keeps its memory and its process
    groups, whose threads wake up a hundred times a second each: after some dozen models the machine
    does nothing else. So what is left is emptied.
    """
    gc.collect()
    # By type: asking some hundred thousand objects for an abstract class takes longer than a step.
    wrappers = _with_subclasses(DistributedDataParallel)
    optimizers = _with_subclasses(MegatronOptimizer)
    for thing in gc.get_objects():
        if type(thing) in wrappers:
            for module in list(thing.modules()):
                module.__dict__.clear()
                torch.nn.Module.__init__(module)
        elif type(thing) in optimizers:
            thing.__dict__.clear()


def _with_subclasses(kind: type) -> set[type]:
    return {kind}.union(*map(_with_subclasses, kind.__subclasses__()))


def _destroy_groups_but_default() -> None:
    """Megatron only forgets its groups; each would keep its threads and sockets."""
    default = dist.group.WORLD
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not default:
            dist.destroy_process_group(group)
