"""The gradient norm on the device, for one read of a step (`step_sums.py`).

megatron-core reads the norm of each optimizer. On a GPU without Transformer Engine and apex it
computes the norm of one tensor after another and reads each on the host
(`megatron.core.utils.local_multi_tensor_l2_norm`): the host waits for the device as often as there
are parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer, clip_grads
from megatron.core.utils import local_multi_tensor_l2_norm
from torch import Tensor

from moepp_megatron.runtime.patches import replace


def replace_l2_norm() -> None:
    """Replace megatron-core's own norm, where it is used on a GPU; CPU runs keep their bits."""
    if torch.cuda.is_available() and clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        replace(clip_grads, "l2_norm_impl", l2_norm)


@torch.no_grad()
def squared_norms(optimizer: ChainedOptimizer) -> Tensor:
    """[groups] fp32 squared gradient norms on the device, over all ranks that hold parts.

    What `ChainedOptimizer.get_grad_norm` computes before it reads: one norm where all optimizers
    reduce it over the same ranks, else one for each (dense parameters, spread experts).
    """
    parts = optimizer.chained_optimizers
    if len(parts) > 1 and optimizer.grads_states_parallel_group_is_shared():
        gradients = [[grad for part in parts for grad in part.get_grads_for_grad_norm()]]
    else:
        gradients = [part.get_grads_for_grad_norm() for part in parts]
    device = torch.cuda.current_device()
    squares = torch.zeros(len(gradients), dtype=torch.float32, device=device)
    for square, part, grads in zip(squares.split(1), parts, gradients, strict=False):
        if grads:
            overflow = torch.zeros(1, dtype=torch.int, device=device)
            norm, _ = clip_grads.multi_tensor_applier(
                clip_grads.l2_norm_impl, overflow, [grads], False
            )
            square.copy_(norm**2.0)
        dist.all_reduce(square, group=part.get_grad_stats_parallel_group())
    return squares


def l2_norm(
    chunk_size: int,
    no_op: Tensor,
    tensor_lists: Sequence[Sequence[Tensor]],
    per_tensor: bool,
    *unused: Any,
) -> tuple[Tensor, None]:
    """The norm of all tensors together, in the form of apex's multi-tensor kernel.

    Args:
        chunk_size: Unused.
        no_op: Unused.
        tensor_lists: Tensors on one device, at least one.
        per_tensor: Unused; the caller asks for none.
        *unused: What the kernel takes besides.

    Returns:
        [1] fp32 norm on the device of the tensors, and no norms of single ones.
    """
    tensors = [tensor for tensors in tensor_lists for tensor in tensors]
    norms = torch.stack([norm.float() for norm in torch._foreach_norm(tensors)])
    return torch.linalg.vector_norm(norms).reshape(1), None
