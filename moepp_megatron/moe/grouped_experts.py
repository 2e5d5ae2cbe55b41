"""FFN experts on a GPU: one product over all of them, whose sizes stay on the device.

megatron-core's `SequentialMLP` starts some ten kernels an expert and keeps every step of SwiGLU for
the backward pass, and `TEGroupedMLP` reads each expert's rows on the host. Here each of the two
products is one `torch.nn.functional.grouped_mm` over rows that are sorted by expert, and only the
first one's result is kept. Parameters, their names and checkpoints are unchanged: each expert has
its own, so the products take a copy of them side by side (4 bytes per weight in bf16), which is
made again in the backward pass instead of being kept.

Shape suffixes: R rows sorted by expert, E local experts, D channels, F of an expert.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.autograd.function import once_differentiable

from moepp_megatron.moe.cpu_experts import (
    CPUExperts,
    activation_grads,
    gathered,
    swiglu,
    weighted,
)

# Rows of a matrix begin at multiples of 16 bytes.
_ALIGNMENT = 8


class GroupedExperts(CPUExperts):
    """megatron-core's `SequentialMLP` of SwiGLU experts, in one product over all of them."""

    @staticmethod
    def suits(config: TransformerConfig) -> bool:
        """True if this class can replace `SequentialMLP`: bf16 on Hopper or newer."""
        if not (
            CPUExperts.suits(config)
            and torch.cuda.is_available()
            and config.params_dtype == torch.bfloat16
        ):
            return False
        width = config.moe_ffn_hidden_size // config.expert_tensor_parallel_size
        is_aligned = config.hidden_size % _ALIGNMENT == 0 and width % _ALIGNMENT == 0
        return is_aligned and torch.cuda.get_device_capability() >= (9, 0)

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
        linears = gathered([self.linear_fc1, self.linear_fc2])
        weights = [
            linear.get_parameter(f"weight{index}")
            for index in range(self.num_local_experts)
            for linear in linears
        ]
        tokens, gates = permuted_local_hidden_states, permuted_probs
        return _outputs(tokens, gates, tokens_per_expert, weights), None


def _outputs(
    tokens: Tensor, gates: Tensor, tokens_per_expert: Tensor, weights: Sequence[Tensor]
) -> Tensor:
    """[R, D] outputs of all experts times `gates` [R], of `tokens` [R, D] sorted by expert.

    `tokens_per_expert` may be on any device; `weights` are fc1 [2F, D] and fc2 [D, F] in turn.
    """
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
        activated = swiglu(*projected.chunk(2, dim=-1))
        # The gate scales the output, which is narrower than the activation.
        return weighted(_product(activated, _transposed(weights[1::2]), ends_E), gates_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (output_grad,) = grads
        output_grad = output_grad.contiguous()
        tokens_RD, gates_R, ends_E, projected, *weights = ctx.saved_tensors
        activated, projected_grad, gate_grad = activation_grads(
            projected, _product(output_grad, torch.stack(weights[1::2]), ends_E), gates_R
        )
        fc2_grads = _weight_grads(weighted(output_grad, gates_R), activated, ends_E)
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
