"""RMSNorm over all heads of a token's queries, or of its keys, at once, as in OLMoE.

The mean square is over the heads of every tensor-parallel rank, so ranks add up their sums of
squares, and in the backward pass the gradients of those. Source: arXiv 2409.02060 (QK-Norm);
transformers' `OlmoeAttention`.

Shape suffixes: S sequence, B batch, N heads of this rank, C channels of a head.
"""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup


class AllHeadsRMSNorm(torch.nn.Module):
    """One of the two norms; it takes the place of a norm per head in `SelfAttention`.

    Every rank has the whole weight ([num_heads * C], in the order of heads) and uses the part of
    its own heads. megatron-core adds up the gradients of weights named `q_layernorm` and
    `k_layernorm` over tensor-parallel ranks. With fewer key heads than ranks, several ranks have
    the same key, and each has only the gradient from its own queries.

    `hidden_size` is C, the width of one head; `num_heads` are those of all ranks together.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-5,
        *,
        num_heads: int,
        **unused: Any,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.group = parallel_state.get_tensor_model_parallel_group()
        self.first_head = self.group.rank() * num_heads // self.group.size()
        # Of these ranks each counts the same keys.
        self.copies = max(self.group.size() // num_heads, 1)
        size, device = num_heads * hidden_size, torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(size, device=device, dtype=config.params_dtype))

    def forward(self, x_SBNC: Tensor) -> Tensor:
        """Normalise this rank's heads; computed in fp32, rounded once."""
        heads, channels = x_SBNC.shape[-2:]
        weight_NC = self.weight.view(-1, channels).narrow(0, self.first_head, heads)
        count = self.weight.numel() * self.copies
        normed: Tensor = _Normalise.apply(x_SBNC, weight_NC, self.eps, count, self.group)
        return normed


class _Normalise(torch.autograd.Function):
    """`w x r`, `r = (sum of x^2 over all ranks / count + eps)^(-1/2)`; keeps `x` in its dtype."""

    @staticmethod
    def forward(
        ctx: Any, x_SBNC: Tensor, weight_NC: Tensor, eps: float, count: int, group: ProcessGroup
    ) -> Tensor:
        # A view would keep the whole projection of queries, keys and values.
        x_SBNC = x_SBNC.contiguous()
        x = x_SBNC.float()
        squares_SB11 = _sum_over_ranks(x.square(), group)
        scale_SB11 = torch.rsqrt(squares_SB11 / count + eps)
        ctx.save_for_backward(x_SBNC, weight_NC, scale_SB11)
        ctx.count, ctx.group = count, group
        return (x * scale_SB11 * weight_NC).to(x_SBNC.dtype)

    @staticmethod
    def backward(ctx: Any, grad_SBNC: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x_SBNC, weight_NC, scale_SB11 = ctx.saved_tensors
        x, grad = x_SBNC.float(), grad_SBNC.float()
        grad_weight_NC = (grad * x * scale_SB11).sum(dim=(0, 1))
        grad_normed = grad * weight_NC
        # Every rank's outputs depend on this rank's squares.
        shared_SB11 = _sum_over_ranks(grad_normed * x, ctx.group)
        grad_x = scale_SB11 * (grad_normed - x * (scale_SB11.square() * shared_SB11 / ctx.count))
        return grad_x.to(x_SBNC.dtype), grad_weight_NC.to(weight_NC.dtype), None, None, None


def _sum_over_ranks(x_SBNC: Tensor, group: ProcessGroup) -> Tensor:
    """[S, B, 1, 1]: sums over the heads of all ranks."""
    sums_SB11 = x_SBNC.sum(dim=(-2, -1), keepdim=True)
    if group.size() > 1:
        torch.distributed.all_reduce(sums_SB11, group=group)
    return sums_SB11
