"""Saves and restores what a forward and backward pass changes besides gradients."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker


class StepState:
    """Random number generators and module buffers of this rank at one moment.

    Dropout and router noise draw numbers; `finalize_model_grads` moves selection biases, which are
    buffers. Everything here is small (tens of kB).

    Args:
        models: This rank's model chunks, not wrapped.
    """

    def __init__(self, models: Sequence[torch.nn.Module]) -> None:
        self._buffers = [
            (buffer, buffer.detach().clone()) for model in models for buffer in model.buffers()
        ]
        self._python = random.getstate()
        self._numpy = np.random.get_state()
        self._cpu = torch.get_rng_state()
        self._device = torch.cuda.get_rng_state()
        # Megatron replaces the tensors in this mapping, it does not write into them.
        self._tracker = get_cuda_rng_tracker().get_states()

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back to that moment."""
        for buffer, value in self._buffers:
            buffer.copy_(value)
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._cpu)
        torch.cuda.set_rng_state(self._device)
        get_cuda_rng_tracker().set_states(self._tracker)
