"""Cross entropy over a vocabulary that tensor-parallel ranks share, in two Triton kernels.

The definition is megatron-core's `vocab_parallel_cross_entropy`, which turns the logits into fp32,
keeps their exponentials for the backward pass and reads or writes each logit about 17 times. Here

    forward   reads each logit once: largest logit, sum of exponentials, logit of the label
    backward  reads it again and writes the gradient in its place

in the logits' own format, with fp32 arithmetic and one rounding. Bytes per logit of 2 bytes: 6, and
no memory besides the logits; megatron-core's: 52, and 4 kept between the passes.

Nothing is added in an order that depends on timing. Loss and gradient are computed from differences
to the largest logit, as megatron-core's are, so that large logits cost no digits.

Shape suffixes: N tokens, V columns of this rank, R ranks of the tensor-parallel group.
"""

from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.language import constexpr

# Columns of a step of a program, and its warps: 16 bytes a load, four loads of 2-byte logits a
# thread in flight.
_BLOCK, _WARPS = 8192, 8

# The lowest fp32 number: an infinite one would give NaN where a block holds nothing else.
_LOWEST = constexpr(-3.4028234663852886e38)


def cross_entropy(logits: Tensor, labels: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[...] fp32 cross entropy of each token, the same on all ranks of the group.

    The backward pass writes the gradient over the logits: a second backward pass, or another
    reader of them, gets autograd's error of a tensor changed in place.

    Args:
        logits: [..., V] bf16 or fp32, columns of rank r from r V on.
        labels: [...] int64. With an id of no rank the logit of the label counts as the largest
            one, as megatron-core has it; its loss is to be masked.
        group: The tensor-parallel group; None for a vocabulary that is not shared.
    """
    loss: Tensor = _CrossEntropy.apply(logits, labels, group)
    return loss


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, group: dist.ProcessGroup | None
    ) -> Tensor:
        logits = logits.contiguous()
        columns = logits.shape[-1]
        num_tokens = labels.numel()
        ranks, rank = (1, 0) if group is None else (group.size(), group.rank())
        ids_N = labels.reshape(-1)
        labels_N = ids_N - rank * columns
        stats_RN = logits.new_empty(ranks, 3, num_tokens, dtype=torch.float32)
        own_N = stats_RN[rank]
        if num_tokens:
            block = min(_BLOCK, triton.next_power_of_2(columns))
            _moepp_reduce_logits[(num_tokens,)](
                logits, labels_N, own_N, num_tokens, columns, BLOCK=block, num_warps=_WARPS
            )
        if ranks > 1:
            dist.all_gather_into_tensor(stats_RN.view(-1), own_N.reshape(-1), group=group)
        largest_RN, sum_RN, target_RN = stats_RN.unbind(dim=1)
        largest_N = largest_RN.amax(dim=0)
        sum_N = (sum_RN * torch.exp(largest_RN - largest_N)).sum(dim=0)
        in_vocabulary = (ids_N >= 0) & (ids_N < ranks * columns)
        target_N = torch.where(in_vocabulary, target_RN.sum(dim=0) - largest_N, 0.0)
        ctx.save_for_backward(logits, labels_N, largest_N, sum_N)
        return (torch.log(sum_N) - target_N).view(labels.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, labels_N, largest_N, sum_N = ctx.saved_tensors
        num_tokens, columns = len(labels_N), logits.shape[-1]
        if num_tokens:
            block = min(_BLOCK, triton.next_power_of_2(columns))
            _moepp_write_loss_gradient[(num_tokens, triton.cdiv(columns, block))](
                logits,
                labels_N,
                largest_N,
                sum_N,
                grad.reshape(-1).float(),
                columns,
                BLOCK=block,
                num_warps=_WARPS,
            )
        # Autograd does not see what a kernel writes.
        torch.autograd.graph.increment_version(logits)
        return logits, None, None


@triton.jit
def _moepp_reduce_logits(  # type: ignore[no-untyped-def]
    logits_ptr, labels_ptr, stats_ptr, num_tokens, columns, BLOCK: constexpr
):
    token = tl.program_id(0).to(tl.int64)
    row = logits_ptr + token * columns
    largest = tl.full([], _LOWEST, tl.float32)
    total = tl.zeros([], tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        logits = tl.load(row + column, column < columns, float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(logits, axis=0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(logits - larger), axis=0)
        largest = larger
    label = tl.load(labels_ptr + token)
    is_here = (label >= 0) & (label < columns)
    target = tl.load(row + tl.where(is_here, label, 0), is_here, 0.0).to(tl.float32)
    tl.store(stats_ptr + token, largest)
    tl.store(stats_ptr + num_tokens + token, total)
    tl.store(stats_ptr + 2 * num_tokens + token, target)


@triton.jit
def _moepp_write_loss_gradient(  # type: ignore[no-untyped-def]
    logits_ptr, labels_ptr, largest_ptr, sum_ptr, grad_ptr, columns, BLOCK: constexpr
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = logits_ptr + token * columns + column
    logits = tl.load(at, column < columns, float("-inf")).to(tl.float32)
    shares = tl.exp(logits - tl.load(largest_ptr + token)) / tl.load(sum_ptr + token)
    is_label = column == tl.load(labels_ptr + token)
    grad = tl.where(is_label, shares - 1.0, shares) * tl.load(grad_ptr + token)
    tl.store(at, grad.to(logits_ptr.dtype.element_ty), column < columns)
