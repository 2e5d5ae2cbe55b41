"""FFN experts in place of megatron-core's local ones: one loop on a CPU, one product on a GPU.

At a hundred rows per expert, as with MoE++ at a small tau, the matrix products of megatron-core's
`SequentialMLP` run on a CPU at three quarters of their speed at a thousand rows, and each
elementwise step of SwiGLU is a pass over memory that is also kept for the backward pass. Here
products with large weights go to oneDNN, which holds its speed at few rows, and only the first
product's result is kept.

On a GPU `SequentialMLP` starts some ten kernels an expert, and `TEGroupedMLP` reads each expert's
rows on the host. Here each of the two products is one `torch.nn.functional.grouped_mm` over rows
that are sorted by expert. Each expert has its own parameters, so the products take a copy of them
side by side (4 bytes per weight in bf16), which is made again in the backward pass instead of being
kept.

Parameters, their names and checkpoints are unchanged.

Shape suffixes: R rows sorted by expert, E local experts, D channels, F of an expert.
"""

from collections.abc import Sequence
from functools import cache
from itertools import batched
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.autograd.function import once_differentiable

# Rows of a matrix begin at multiples of 16 bytes.
_ALIGNMENT = 8


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
        weights = [linear.get_parameter("weight") for linear in _gathered(linears)]
        rows = permuted_local_hidden_states
        return self.compute(rows, permuted_probs, tokens_per_expert, weights), None

    def compute(
        self, tokens: Tensor, gates: Tensor, tokens_per_expert: Tensor, weights: Sequence[Tensor]
    ) -> Tensor:
        """Outputs [rows, D] times gates; `weights` are fc1 and fc2 of each expert in turn."""
        rows = tokens_per_expert.tolist()
        if torch.is_grad_enabled():
            result: Tensor = _CPUExperts.apply(tokens, gates, rows, *weights)
            return result
        return _forward(tokens, gates, rows, weights, keep=None)


def _gathered(linears: list[torch.nn.Module]) -> list[torch.nn.Module]:
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
        return _swiglu(*F.linear(x, weight).chunk(2, dim=-1))
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
    parts = (_by_expert(each, rows) for each in (tokens, gates, output))
    for x, gate, out, (weight_in, weight_out) in zip(*parts, batched(weights, 2), strict=True):
        if len(x):
            if keep is None:
                activated = _activated(x, weight_in)
            else:
                keep.append(_linear(x, weight_in))
                activated = _swiglu(*keep[-1].chunk(2, dim=-1))
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
        weights, hidden = batched(rest[: 2 * count], 2), rest[2 * count :]
        input_grad, gate_grad = torch.empty_like(tokens), torch.empty_like(gates)
        weight_grads: list[Tensor] = []
        tensors = (tokens, gates, grads[0], input_grad, gate_grad)
        parts = (_by_expert(tensor, rows) for tensor in tensors)
        for x, gate, out_grad, x_grad, g_grad, projected, (weight_in, weight_out) in zip(
            *parts, hidden, weights, strict=True
        ):
            if not len(x):
                weight_grads += [torch.zeros_like(weight_in), torch.zeros_like(weight_out)]
                continue
            activated, projected_grad, grad = _activation_grads(
                projected, torch.mm(out_grad, weight_out), gate
            )
            g_grad.copy_(grad)
            torch.mm(projected_grad, weight_in, out=x_grad)
            weight_grads.append(torch.mm(projected_grad.t(), x))
            weight_grads.append(torch.mm(_weighted(out_grad, gate).t(), activated))
        return (input_grad, gate_grad, None, *weight_grads)


def _activation_grads(
    projected: Tensor, weighted_grad: Tensor, gates: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """SwiGLU's activation [n, F] again, and the gradients of `projected` and of the gates [n]."""
    # `projected` is [n, 2F], fc1's result: the gate's part, then the other factor. `weighted_grad`
    # is [n, F], the gradient of the activation times its gates.
    gate_part, up = projected.chunk(2, dim=-1)
    gated = F.silu(gate_part)
    activated = gated * up
    gate_grad = (weighted_grad * activated).sum(dim=-1, dtype=gates.dtype)
    activated_grad = _weighted(weighted_grad, gates)
    projected_grad = torch.empty_like(projected)
    gate_half, up_half = projected_grad.chunk(2, dim=-1)
    torch.mul(activated_grad, gated, out=up_half)
    silu_backward = torch.ops.aten.silu_backward.grad_input
    silu_backward(activated_grad.mul_(up), gate_part, grad_input=gate_half)
    return activated, projected_grad, gate_grad


def _swiglu(gate_part: Tensor, up: Tensor) -> Tensor:
    """SwiGLU's activation, silu(gate) * up."""
    return F.silu(gate_part).mul_(up)


def _weighted(activated: Tensor, gate: Tensor) -> Tensor:
    """The rows times their gates, rounded once to the dtype of the activations."""
    # Into a tensor of that dtype: a GPU then multiplies and rounds in one pass.
    return torch.mul(activated, gate.unsqueeze(-1), out=torch.empty_like(activated))


class GroupedExperts(CPUExperts):
    """megatron-core's `SequentialMLP` of SwiGLU experts, in one product over all of them."""

    @staticmethod
    def suits(config: TransformerConfig) -> bool:
        """True if this class can replace `SequentialMLP`: bf16 on Hopper or newer."""
        width = config.moe_ffn_hidden_size // config.expert_tensor_parallel_size
        return (
            CPUExperts.suits(config)
            and torch.cuda.is_available()
            and config.params_dtype == torch.bfloat16
            and config.hidden_size % _ALIGNMENT == width % _ALIGNMENT == 0
            and torch.cuda.get_device_capability() >= (9, 0)
        )

    def compute(
        self, tokens: Tensor, gates: Tensor, tokens_per_expert: Tensor, weights: Sequence[Tensor]
    ) -> Tensor:
        """See `_outputs`."""
        return _outputs(tokens, gates, tokens_per_expert, weights)


class EngineExperts(TEGroupedMLP):
    """megatron-core's `TEGroupedMLP` of SwiGLU experts, multiplied without Transformer Engine."""

    @staticmethod
    def suits(config: TransformerConfig) -> bool:
        """True if this class computes the same as `TEGroupedMLP`."""
        fits = (GroupedExperts if torch.cuda.is_available() else CPUExperts).suits(config)
        return (
            fits
            and not config.moe_single_grouped_weight
            and not config.use_transformer_engine_op_fuser
            and not {"expert_fc1", "moe_act"} & {*(config.offload_modules or ())}
            and config.moe_mlp_glu_interleave_size is None
        )

    def forward(
        self,
        permuted_local_hidden_states: Tensor,
        tokens_per_expert: Tensor,
        permuted_probs: Tensor,
    ) -> tuple[Tensor, None]:
        """Same as `TEGroupedMLP`; `tokens_per_expert` may be on any device."""
        linears = _gathered([self.linear_fc1, self.linear_fc2])
        weights = [
            linear.get_parameter(f"weight{index}")
            for index in range(self.num_local_experts)
            for linear in linears
        ]
        rows = permuted_local_hidden_states
        return _outputs(rows, permuted_probs, tokens_per_expert, weights), None


def _outputs(
    tokens: Tensor, gates: Tensor, tokens_per_expert: Tensor, weights: Sequence[Tensor]
) -> Tensor:
    """[R, D] outputs of all experts times `gates` [R], of `tokens` [R, D] sorted by expert."""
    # `tokens_per_expert` may be on any device; `weights` are fc1 [2F, D] and fc2 [D, F] in turn.
    ends = tokens_per_expert.cumsum(0, dtype=torch.int32)
    ends = ends.to(tokens.device, non_blocking=True)
    result: Tensor = _GroupedExperts.apply(tokens, gates, ends, *weights)
    return result


class _GroupedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens_RD: Tensor, gates_R: Tensor, ends_E: Tensor, *weights: Tensor
    ) -> Tensor:
        projected = _product(tokens_RD, _transposed(weights[::2]), ends_E)
        ctx.save_for_backward(tokens_RD, gates_R, ends_E, projected, *weights)
        activated = _swiglu(*projected.chunk(2, dim=-1))
        # The gate scales the output, which is narrower than the activation.
        return _weighted(_product(activated, _transposed(weights[1::2]), ends_E), gates_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (output_grad,) = grads
        output_grad = output_grad.contiguous()
        tokens_RD, gates_R, ends_E, projected, *weights = ctx.saved_tensors
        activated, projected_grad, gate_grad = _activation_grads(
            projected, _product(output_grad, torch.stack(weights[1::2]), ends_E), gates_R
        )
        fc2_grads = _weight_grads(_weighted(output_grad, gates_R), activated, ends_E)
        input_grad = _product(projected_grad, torch.stack(weights[::2]), ends_E)
        fc1_grads = _weight_grads(projected_grad, tokens_RD, ends_E)
        pairs = zip(fc1_grads.unbind(), fc2_grads.unbind(), strict=True)
        weight_grads = [grad for pair in pairs for grad in pair]
        return (input_grad, gate_grad, None, *weight_grads)


def _transposed(weights: Sequence[Tensor]) -> Tensor:
    """[E, in, out] of weights [out, in]."""
    return torch.stack(tuple(weights)).transpose(1, 2)


def _product(rows: Tensor, weights: Tensor, ends_E: Tensor) -> Tensor:
    """Rows [R, in] of each expert times its weights [E, in, out]: [R, out]."""
    if not len(rows):
        # No product is defined for no rows at all.
        return rows.new_empty(0, weights.shape[-1])
    return F.grouped_mm(rows, weights, offs=ends_E)


def _weight_grads(output_grad: Tensor, rows: Tensor, ends_E: Tensor) -> Tensor:
    """[E, out, in] of gradients [R, out] and rows [R, in]; zeros of an expert without rows."""
    if not len(rows):
        return rows.new_zeros(len(ends_E), output_grad.shape[1], rows.shape[1])
    return F.grouped_mm(output_grad.t(), rows, offs=ends_E)
