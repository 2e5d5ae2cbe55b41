"""megatron-core's local modules, extended to the layouts that Transformer Engine supports.

megatron-core 0.19 splits the compressions of latent attention (arXiv 2405.04434, section 2.1) over
the tensor-parallel ranks where Transformer Engine is not there. It then lacks a core attention that
is given the widths of queries and values, and the whole gradient of the position key that all heads
share: each rank keeps its own heads' part (0.19.2; on two ranks gradients were off by half).
"""

import dataclasses
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moepp_megatron.model.attention import CausalAttention, ContextParallelAttention
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
        spec, keys = _with_local_latent_attention(spec, is_moe), "kv_layernorm"
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


# Where Transformer Engine's modules hold a norm's weight inside the next product, and checkpoints
# with it: the same names for both.
_NORM_NAMES = {
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
}
_DENSE_NORM_NAME = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}


class _LatentDotProductAttention(DotProductAttention):
    """megatron-core's core attention, for queries and values of different widths.

    It takes the output's width from `TransformerConfig.kv_channels`, which must be that of values.
    """

    def __init__(
        self, *, k_channels: int | None = None, v_channels: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        width = self.hidden_size_per_attention_head
        if v_channels not in (None, width):
            raise ValueError(
                f"v_head_dim ({v_channels}) must be TransformerConfig.kv_channels ({width}) with "
                "megatron-core's local attention, which takes its output's width from there; "
                "use the same"
            )


class _LocalLatentAttention(MLASelfAttention):
    """Latent attention whose compressions are split over tensor-parallel ranks."""

    def _qkv_down_projection(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Compress q and kv; gather kv here, with a sum of gradients that megatron-core's lacks."""
        queries, keys = super()._qkv_down_projection(hidden_states)
        if self.config.tensor_model_parallel_size > 1:
            keys = gather_from_tensor_model_parallel_region(keys, group=self.tp_group)
            if self.config.sequence_parallel:
                keys = scatter_to_sequence_parallel_region(keys, group=self.tp_group)
        return queries, keys


def _with_local_latent_attention(spec: ModuleSpec, is_moe: bool) -> ModuleSpec:
    """megatron-core's local spec of a layer with these modules in its attention."""
    attention = spec.submodules.self_attention
    attention = with_submodules(attention, core_attention=_LatentDotProductAttention)
    return with_submodules(
        spec,
        self_attention=dataclasses.replace(attention, module=_LocalLatentAttention),
        sharded_state_dict_keys_map=_NORM_NAMES if is_moe else _NORM_NAMES | _DENSE_NORM_NAME,
    )
