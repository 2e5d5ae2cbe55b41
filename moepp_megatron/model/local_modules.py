"""megatron-core's local modules, extended to the layouts that Transformer Engine supports."""

from typing import Any

import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moepp_megatron.model.attention import ContextParallelAttention, with_local_latent_attention
from moepp_megatron.model.causal_attention import CausalAttention
from moepp_megatron.moe.spec import with_attention, with_submodules
from moepp_megatron.runtime.optional import fused_rms_norm


class _SequenceParallelRMSNorm(torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` with a mark by which Megatron sums its gradient over tensor ranks.

    megatron-core's local norm refuses sequence parallelism because torch's norm has no such mark.
    Where apex is installed, its fused kernel computes it.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any
    ) -> None:
        super().__init__(
            hidden_size, eps=eps, device=torch.cuda.current_device(), dtype=config.params_dtype
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self._fused = fused_rms_norm()

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of `x`."""
        if self._fused is None:
            return super().forward(x)
        normed: Tensor = self._fused(x, self.weight, self.normalized_shape, self.eps)
        return normed


def fit_local_modules(config: TransformerConfig, spec: ModuleSpec, is_moe: bool) -> ModuleSpec:
    """`adapt` of the specs in `moepp_megatron.moe.spec` without Transformer Engine."""
    keys = "k_layernorm"
    if config.multi_latent_attention:
        spec, keys = with_local_latent_attention(spec, is_moe), "kv_layernorm"
    if config.context_parallel_size > 1:
        spec = with_attention(spec, core_attention=ContextParallelAttention)
    elif CausalAttention.suits(config):
        spec = with_attention(spec, core_attention=CausalAttention)
    if config.normalization != "RMSNorm":
        return spec
    norm = _SequenceParallelRMSNorm
    if config.qk_layernorm:
        spec = with_attention(spec, **{"q_layernorm": norm, keys: norm})
    return with_submodules(spec, input_layernorm=norm, pre_mlp_layernorm=norm)
