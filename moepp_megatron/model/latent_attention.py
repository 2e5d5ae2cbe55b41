"""megatron-core's multi-head latent attention, corrected for its local modules.

megatron-core 0.19 builds the compressions of latent attention (arXiv 2405.04434, section 2.1) whole
on every tensor-parallel rank where Transformer Engine is there, and split over the ranks where it
is not. For the second case two things are missing there: a core attention that is given the widths
of queries and values, and the whole gradient of the position key that all heads share: each rank
keeps its own heads' part (0.19.2; on two ranks gradients were off by half).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron.core.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from moepp_megatron.moe.adapter import with_submodules

# Where Transformer Engine's modules hold a norm's weight inside the next product, and checkpoints
# with it: the same names for both.
_NORM_NAMES = {
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
}
_DENSE_NORM_NAME = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}


class LatentDotProductAttention(DotProductAttention):
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


def with_local_latent_attention(spec: ModuleSpec, is_moe: bool) -> ModuleSpec:
    """megatron-core's local spec of a layer with these modules in its attention."""
    attention = spec.submodules.self_attention
    attention = with_submodules(attention, core_attention=LatentDotProductAttention)
    return with_submodules(
        spec,
        self_attention=dataclasses.replace(attention, module=_LocalLatentAttention),
        sharded_state_dict_keys_map=_NORM_NAMES if is_moe else _NORM_NAMES | _DENSE_NORM_NAME,
    )
