"""megatron-core's local modules, extended to the layouts that Transformer Engine supports."""

from __future__ import annotations

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from moepp_megatron.model.attention import ContextParallelAttention
from moepp_megatron.model.causal_attention import CausalAttention, suits_causal_attention
from moepp_megatron.model.latent_attention import with_local_latent_attention
from moepp_megatron.model.norm import SequenceParallelRMSNorm
from moepp_megatron.moe.adapter import with_attention, with_submodules


def fit_local_modules(config: TransformerConfig, spec: ModuleSpec, is_moe: bool) -> ModuleSpec:
    """`adapt` of the specs in `moepp_megatron.moe.spec` without Transformer Engine."""
    keys = "k_layernorm"
    if config.multi_latent_attention:
        spec, keys = with_local_latent_attention(spec, is_moe), "kv_layernorm"
    if config.context_parallel_size > 1:
        spec = with_attention(spec, core_attention=ContextParallelAttention)
    elif suits_causal_attention(config):
        spec = with_attention(spec, core_attention=CausalAttention)
    if config.normalization != "RMSNorm":
        return spec
    norm = SequenceParallelRMSNorm
    if config.qk_layernorm:
        spec = with_attention(spec, **{"q_layernorm": norm, keys: norm})
    return with_submodules(spec, input_layernorm=norm, pre_mlp_layernorm=norm)
