"""Sums over all ranks."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum a float64 tensor over all ranks; returned on the CPU."""
    on_device = values.to(torch.cuda.current_device())
    dist.all_reduce(on_device)
    return on_device.cpu()


def mean_loss(losses: Tensor) -> float:
    """Token mean of the language-model loss over all ranks; NaN if no token counts.

    Args:
        losses: [2] this rank's sum and count. Tensor-parallel ranks hold the same tokens, so only
            the first of each group is counted.
    """
    if parallel_state.get_tensor_model_parallel_rank() != 0:
        losses = torch.zeros_like(losses)
    total, count = sum_over_ranks(losses).tolist()
    return total / count if count > 0 else math.nan
