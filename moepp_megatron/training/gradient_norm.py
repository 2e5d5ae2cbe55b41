"""The gradient norm on a GPU without Transformer Engine and apex, read once and not once a tensor.

megatron-core then computes the norm of one tensor after another and reads each on the host
(`megatron.core.utils.local_multi_tensor_l2_norm`): the host waits for the device as often as there
are parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.optimizer import clip_grads
from megatron.core.utils import local_multi_tensor_l2_norm
from torch import Tensor

from moepp_megatron.runtime.patches import replace


def use_one_read() -> None:
    """Replace megatron-core's own norm, where it is used on a GPU; CPU runs keep their bits."""
    if torch.cuda.is_available() and clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        replace(clip_grads, "l2_norm_impl", l2_norm)


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
