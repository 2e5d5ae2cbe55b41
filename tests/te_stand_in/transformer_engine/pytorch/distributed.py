"""Random streams and recomputation."""

from contextlib import nullcontext

import torch
from transformer_engine.pytorch.quantization import FP8GlobalStateManager


class CudaRNGStatesTracker:
    """megatron-core's own derives from it where graphs are captured, which no CPU does."""


def activation_recompute_forward(activation_recompute=False, recompute_phase=False):
    return nullcontext()


def checkpoint(function, *args, **kwargs):
    """Runs the recomputation in the FP8 context of the first pass."""
    for name in ("distribute_saved_activations", "get_rng_state_tracker", "tp_group"):
        kwargs.pop(name, None)
    reentrant = kwargs.pop("use_reentrant", True)
    state = FP8GlobalStateManager.get_autocast_state()

    def run(*inputs):
        before = FP8GlobalStateManager.get_autocast_state()
        FP8GlobalStateManager.set_autocast_state(state)
        try:
            return function(*inputs, **kwargs)
        finally:
            FP8GlobalStateManager.set_autocast_state(before)

    return torch.utils.checkpoint.checkpoint(run, *args, use_reentrant=reentrant)
