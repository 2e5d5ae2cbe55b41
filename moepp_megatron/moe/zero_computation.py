"""Zero, copy and constant experts, all together in closed form, where the token already is."""

from __future__ import annotations

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_utils import router_gating_linear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moepp_megatron.moe.config import MoEPPConfig
from moepp_megatron.moe.parameter import replicated_parameter


class ZeroComputationExperts(MegatronModule):
    """Adds the output of every zero-computation expert of a layer to its FFN experts' output.

    zero(x) = 0, copy(x) = x, constant_c(x) = a1 x + a2 v_c with [a1, a2] = softmax(U_c x)
    (arXiv 2410.07348, zero-computation experts). Weighted by their gates g they sum to

        s x + A V,   s = g_copy + sum_c g_c a1_c,   A_c = g_c a2_c

    so no token is gathered, sorted or sent.

    Attributes:
        constants: [C, D] V, the learned vectors.
        mixing_weight: [C, 2, D] U.
    """

    def __init__(self, config: TransformerConfig, moepp: MoEPPConfig) -> None:
        super().__init__(config)
        self.moepp = moepp
        count, hidden = moepp.num_constant_experts, config.hidden_size
        if count > 0:
            self.constants = replicated_parameter(config, count, hidden)
            self.mixing_weight = replicated_parameter(config, count, 2, hidden)

    def forward(self, x: Tensor, gates: Tensor, ffn_output: Tensor) -> Tensor:
        """Add the zero-computation experts' output.

        Args:
            x: [T, D] the layer's input.
            gates: [T, E] fp32 gates of all experts, 0 where not selected.
            ffn_output: [T, D] combined output of the FFN experts, dtype of `x`.

        Returns:
            [T, D], dtype of `x`.
        """
        moepp = self.moepp
        weight_of_input = gates[:, moepp.copy_experts].sum(dim=-1)
        output = ffn_output
        if moepp.num_constant_experts > 0:
            constant_gates = gates[:, moepp.constant_experts]
            keep, replace = self._mixing(x).unbind(dim=-1)
            weight_of_input = weight_of_input + (constant_gates * keep).sum(dim=-1)
            weight_of_constants = (constant_gates * replace).to(x.dtype)
            output = torch.addmm(output, weight_of_constants, self.constants)
        if moepp.num_constant_experts + moepp.num_copy_experts > 0:
            weight_of_input = weight_of_input * moepp.expert_input_scale
            output = torch.addcmul(output, x, weight_of_input.to(x.dtype).unsqueeze(-1))
        return output

    def _mixing(self, x: Tensor) -> Tensor:
        """[T, C, 2] fp32: how much of the input each constant expert keeps and replaces."""
        count = self.moepp.num_constant_experts
        weight = self.mixing_weight.view(2 * count, -1)
        logits = router_gating_linear(x, weight, None, torch.float32)
        return torch.softmax(logits.view(-1, count, 2) * self.moepp.expert_input_scale, dim=-1)
