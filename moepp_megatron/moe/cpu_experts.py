"""FFN experts on a CPU: one loop forward and one backward, without avoidable passes over memory.

At a hundred rows per expert, as with MoE++ at a small tau, the matrix products of megatron-core's
`SequentialMLP` run at three quarters of their speed at a thousand rows, and each elementwise step
of SwiGLU is a pass over memory that is also kept for the backward pass. Here products with large
weights go to oneDNN, which holds its speed at few rows, and only the first product's result is
kept. Parameters, their names and checkpoints are unchanged.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class CPUExperts(SequentialMLP):
    """megatron-core's `SequentialMLP` of SwiGLU experts, computed by one autograd function."""

    @staticmethod
    def suits(config: TransformerConfig) -> bool:
        """True if this class computes the same as `SequentialMLP` for this configuration."""
        return (
            config.gated_linear_unit
            and config.activation_func is F.silu
            and config.activation_func_clamp_value is None
            and config.glu_linear_offset == 0.0
            and not config.add_bias_linear
            and not config.moe_apply_probs_on_input
            and config.fp8 is None
            and config.fp4 is None
            and not config.delay_wgrad_compute
        )

    def forward(
        self,
        permuted_local_hidden_states: Tensor,
        tokens_per_expert: Tensor,
        permuted_probs: Tensor,
    ) -> tuple[Tensor, None]:
        """Same as `SequentialMLP`: [rows, D] outputs times gates, sorted by expert, and no bias."""
        linears = [
            linear
            for expert in self.local_experts
            for linear in (expert.linear_fc1, expert.linear_fc2)
        ]
        weights = [linear.get_parameter("weight") for linear in gathered(linears)]
        tokens, gates = permuted_local_hidden_states, permuted_probs
        return self.compute(tokens, gates, tokens_per_expert, weights), None

    def compute(
        self, tokens: Tensor, gates: Tensor, tokens_per_expert: Tensor, weights: Sequence[Tensor]
    ) -> Tensor:
        """Outputs [rows, D] times gates; `weights` are fc1 and fc2 of each expert in turn."""
        rows = tokens_per_expert.tolist()
        if torch.is_grad_enabled():
            result: Tensor = _CPUExperts.apply(tokens, gates, rows, *weights)
            return result
        return _forward(tokens, gates, rows, weights, keep=None)


def gathered(linears: list[torch.nn.Module]) -> list[torch.nn.Module]:
    """The modules, which nobody calls, once their weights are there."""
    # Weights that are still being gathered (`parallel.overlap_param_gather`) are waited for in a
    # hook before the call.
    for linear in linears:
        for hook in linear._forward_pre_hooks.values():
            hook(linear, ())
    return linears


# Elements of a weight. For each number of rows that it has not seen oneDNN makes a kernel first,
# about a millisecond; with smaller weights that takes longer than the product.
_LARGE = 1 << 20


@cache
def _onednn_has(dtype: torch.dtype) -> bool:
    """True if oneDNN multiplies this dtype here; bf16 needs AVX-512 or its successor."""
    if dtype == torch.bfloat16:
        supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return supported
    return dtype == torch.float32


def _suits_onednn(x: Tensor, weight: Tensor) -> bool:
    return weight.numel() >= _LARGE and _onednn_has(x.dtype)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """X [n, in] times weight [out, in] transposed, by oneDNN where it can and gains by it."""
    if not _suits_onednn(x, weight):
        return F.linear(x, weight)
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def _activated(x: Tensor, weight: Tensor) -> Tensor:
    """SwiGLU's activation [n, F] of x [n, D] and fc1 [2F, D]; oneDNN fuses it into the product."""
    weight_gate, weight_up = weight.chunk(2)
    if not _suits_onednn(x, weight_gate):
        return swiglu(*F.linear(x, weight).chunk(2, dim=-1))
    linear = torch.ops.mkldnn._linear_pointwise
    gated = linear(x, weight_gate, None, "swish", [], "")
    activated: Tensor = linear.binary(x, gated, weight_up, None, "mul")
    return activated


def _by_expert(tensor: Tensor, rows: list[int]) -> tuple[Tensor, ...]:
    """The rows of each expert; with static rows others follow, which nobody reads."""
    return tensor[: sum(rows)].split(rows)


def _forward(
    tokens: Tensor,
    gates: Tensor,
    rows: list[int],
    weights: Sequence[Tensor],
    keep: list[Tensor] | None,
) -> Tensor:
    """The gates times W_out (silu(W_gate x) * W_up x); `keep` receives fc1's results."""
    output = torch.empty_like(tokens)
    parts = zip(*(_by_expert(each, rows) for each in (tokens, gates, output)), strict=True)
    for index, (x, gate, out) in enumerate(parts):
        weight_in, weight_out = weights[2 * index], weights[2 * index + 1]
        if len(x):
            if keep is None:
                activated = _activated(x, weight_in)
            else:
                keep.append(_linear(x, weight_in))
                activated = swiglu(*keep[-1].chunk(2, dim=-1))
            # The gate scales the output, which is narrower than the activation.
            torch.mul(_linear(activated, weight_out), gate.unsqueeze(-1), out=out)
        elif keep is not None:
            # A product of no rows at all is not defined for oneDNN.
            keep.append(x.new_empty(0, 0))
    return output


class _CPUExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, gates: Tensor, rows: list[int], *weights: Tensor
    ) -> Tensor:
        hidden: list[Tensor] = []
        output = _forward(tokens, gates, rows, weights, keep=hidden)
        ctx.rows = rows
        ctx.save_for_backward(tokens, gates, *weights, *hidden)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, count = ctx.rows, len(ctx.rows)
        tokens, gates, *rest = ctx.saved_tensors
        weights, hidden = rest[: 2 * count], rest[2 * count :]
        input_grad, gate_grad = torch.empty_like(tokens), torch.empty_like(gates)
        weight_grads: list[Tensor] = []
        tensors = (tokens, gates, grads[0], input_grad, gate_grad)
        parts = zip(*(_by_expert(tensor, rows) for tensor in tensors), strict=True)
        for index, (x, gate, out_grad, x_grad, g_grad) in enumerate(parts):
            weight_in, weight_out = weights[2 * index], weights[2 * index + 1]
            if not len(x):
                weight_grads += [torch.zeros_like(weight_in), torch.zeros_like(weight_out)]
                continue
            activated, projected_grad, grad = activation_grads(
                hidden[index], torch.mm(out_grad, weight_out), gate
            )
            g_grad.copy_(grad)
            torch.mm(projected_grad, weight_in, out=x_grad)
            weight_grads.append(torch.mm(projected_grad.t(), x))
            weight_grads.append(torch.mm(weighted(out_grad, gate).t(), activated))
        return (input_grad, gate_grad, None, *weight_grads)


def activation_grads(
    projected: Tensor, weighted_grad: Tensor, gates: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """SwiGLU's activation [n, F] again, and the gradients of `projected` and of the gates [n].

    `projected` is [n, 2F], fc1's result: the gate's part, then the other factor. `weighted_grad` is
    [n, F], the gradient of the activation times its gates.
    """
    gate_part, up = projected.chunk(2, dim=-1)
    gated = F.silu(gate_part)
    activated = gated * up
    gate_grad = (weighted_grad * activated).sum(dim=-1, dtype=gates.dtype)
    activated_grad = weighted(weighted_grad, gates)
    projected_grad = torch.empty_like(projected)
    gate_half, up_half = projected_grad.chunk(2, dim=-1)
    torch.mul(activated_grad, gated, out=up_half)
    silu_backward = torch.ops.aten.silu_backward.grad_input
    silu_backward(activated_grad.mul_(up), gate_part, grad_input=gate_half)
    return activated, projected_grad, gate_grad


def swiglu(gate_part: Tensor, up: Tensor) -> Tensor:
    """SwiGLU's activation, silu(gate) * up."""
    return F.silu(gate_part).mul_(up)


def weighted(activated: Tensor, gate: Tensor) -> Tensor:
    """The rows times their gates, rounded once to the dtype of the activations."""
    # Into a tensor of that dtype: a GPU then multiplies and rounds in one pass.
    return torch.mul(activated, gate.unsqueeze(-1), out=torch.empty_like(activated))
