"""The fp32 product of hidden states with gate and mixing weights.

megatron-core's `router_gating_linear` makes an fp32 copy of all hidden states, forward and
backward, and an fp32 gradient of them. On a CPU these do not fit the caches, so they are made of a
block of tokens at a time. With Transformer Engine the product is left to megatron-core, whose
forward pass then reads 16-bit numbers without a copy.
"""

from typing import Any

import torch
from megatron.core.transformer.moe import moe_utils
from torch import Tensor

# Tokens of a block: of 256, 512, 1,024 and 2,048 the fastest in layers of 768 channels.
_BLOCK = 1024


def gate_product(input: Tensor, weight: Tensor) -> Tensor:
    """`input @ weight.T` in fp32, whatever the dtypes of [..., D] `input` and [n, D] `weight`.

    The gradients have the dtypes of the factors.
    """
    is_in_torch = moe_utils.te_general_gemm is None
    if is_in_torch and input.device.type == "cpu" and input.dtype.itemsize == 2:
        blockwise: Tensor = _BlockwiseProduct.apply(input, weight)
        return blockwise
    product: Tensor = moe_utils.router_gating_linear(input, weight, None, torch.float32)
    return product


class _BlockwiseProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(input, weight)
        tokens = input.reshape(-1, input.shape[-1])
        output = torch.empty(len(tokens), len(weight), dtype=torch.float32)
        columns = weight.float().T
        for block, out in zip(tokens.split(_BLOCK), output.split(_BLOCK), strict=True):
            torch.mm(block.float(), columns, out=out)
        return output.view(*input.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        input, weight = ctx.saved_tensors
        tokens, grad = input.reshape(-1, input.shape[-1]), grads[0].reshape(-1, len(weight))
        rows = weight.float()
        token_grad, weight_grad = torch.empty_like(tokens), torch.zeros_like(rows)
        parts = zip(*(tensor.split(_BLOCK) for tensor in (tokens, grad, token_grad)), strict=True)
        for block, out_grad, block_grad in parts:
            block_grad.copy_(out_grad @ rows)
            weight_grad.addmm_(out_grad.T, block.float())
        return token_grad.view(input.shape), weight_grad.to(weight.dtype)
