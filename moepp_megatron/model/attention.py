"""Attention for megatron-core's local modules: context parallelism, and latent attention.

megatron-core's `DotProductAttention` refuses context parallelism. This one is used where
Transformer Engine, whose attention supports it, is not installed.

A sequence of s tokens is cut into 2 * cp chunks, and rank r holds chunks r and 2 * cp - 1 - r (the
zigzag of `megatron.core.utils.get_batch_on_this_cp_rank`), so that all ranks have the same work
under the causal mask. Keys and values are gathered, queries are not.

megatron-core 0.19 splits the compressions of latent attention (arXiv 2405.04434, section 2.1) over
the tensor-parallel ranks where Transformer Engine is not there. It then lacks a core attention that
is given the widths of queries and values, and the whole gradient of the position key that all heads
share: each rank keeps its own heads' part (0.19.2; on two ranks gradients were off by half).

Shape suffixes: S a rank's tokens, s all tokens of a sequence, b sequences, n query heads and g
key/value heads of this tensor-parallel rank, d channels of a head's query or key, v of its value.
"""

import dataclasses
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moepp_megatron.model.causal_attention import attend, refuse_unused
from moepp_megatron.moe.spec import with_submodules


class ContextParallelAttention(MegatronModule):
    """Core attention of a layer whose sequences are spread over context-parallel ranks.

    The result is that of `DotProductAttention` on one rank. Keys and values of whole sequences are
    held during forward and backward, with one collective each. `softmax_scale` defaults to
    1 / sqrt(d).

    Raises:
        ValueError: If a setting cannot be honoured: a mask that is not causal, dropout, a
            `cp_comm_type` other than "all_gather".
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
    ) -> None:
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        _refuse_unsupported(config, attn_mask_type, dropout, cp_comm_type)
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["cp"])
        self.layer_number = layer_number
        self.cp_group = pg_collection.cp
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend from this rank's tokens to all tokens up to them: [S, b, n * v], dtype of `query`.

        Args:
            query: [S, b, n, d] this rank's two chunks, the early one first.
            key: [S, b, g, d]; n is a multiple of g.
            value: [S, b, g, v].
            attention_mask: [b, 1, S, s] bool for this rank's queries and all keys, True where a
                query must not see a key (`document_attention.dense_mask`); None is the causal mask.

        Raises:
            ValueError: If there is a bias or packed sequences, or S is odd.
        """
        refuse_unused(
            type(self).__name__, attention_bias=attention_bias, packed_seq_params=packed_seq_params
        )
        gathered = _GatherSequence.apply(torch.cat([key, value], dim=-1), self.cp_group)
        whole_key, whole_value = gathered.split([key.shape[-1], value.shape[-1]], dim=-1)
        starts = _chunk_starts(query.shape[0], self.cp_group)
        masks = (None, None) if attention_mask is None else attention_mask.chunk(2, dim=2)
        context = [
            self._attend(chunk, start, whole_key, whole_value, mask)
            for chunk, start, mask in zip(query.chunk(2), starts, masks, strict=True)
        ]
        return torch.cat(context).flatten(start_dim=2)

    def _attend(
        self, query: Tensor, start: int, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        """[c, b, n, v] causal attention of c consecutive tokens, the first at position `start`."""
        # No query of the chunk sees a key after the chunk.
        end = start + query.shape[0]
        if mask is None:
            query_positions = torch.arange(start, end, device=query.device)
            seen = query_positions.unsqueeze(1) >= torch.arange(end, device=query.device)
        else:
            seen = ~mask[..., :end]
        return attend(query, key[:end], value[:end], seen, self.softmax_scale)


def _chunk_starts(num_local_tokens: int, group: torch.distributed.ProcessGroup) -> tuple[int, int]:
    """Positions of the first tokens of this rank's two chunks; ValueError for an odd number."""
    if num_local_tokens % 2:
        raise ValueError(
            f"sequence length of a context-parallel rank ({num_local_tokens}) must be divisible by "
            f"2; make the whole a multiple of 2 * context_parallel_size ({2 * group.size()})"
        )
    length = num_local_tokens // 2
    return group.rank() * length, (2 * group.size() - 1 - group.rank()) * length


class _GatherSequence(torch.autograd.Function):
    """[S, b, g, d] of all ranks in order of positions; backward: fp32 reduce-scatter."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
        """[s, b, g, d] from [S, b, g, d]."""
        ctx.group = group
        # Along axis 0, the one way of joining tensors that gloo and NCCL both know.
        gathered = local.new_empty(group.size() * local.shape[0], *local.shape[1:])
        torch.distributed.all_gather_into_tensor(gathered, local.contiguous(), group=group)
        early, late = gathered.unflatten(0, (group.size(), -1)).chunk(2, dim=1)
        return torch.cat([*early, *late.flip(0)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Sum over ranks in fp32."""
        ranks = ctx.group.size()
        chunks = grad.float().chunk(2 * ranks)
        by_rank = torch.cat(
            [part for r in range(ranks) for part in (chunks[r], chunks[2 * ranks - 1 - r])]
        )
        local = torch.empty_like(by_rank.chunk(ranks)[0])
        torch.distributed.reduce_scatter_tensor(local, by_rank, group=ctx.group)
        return local.to(grad.dtype), None


def _refuse_unsupported(
    config: TransformerConfig,
    attn_mask_type: AttnMaskType,
    dropout: float,
    cp_comm_type: str | None,
) -> None:
    rules: tuple[tuple[str, object, tuple[object, ...]], ...] = (
        ("attention_dropout", dropout, (0.0,)),
        ("attn_mask_type", attn_mask_type, (AttnMaskType.causal,)),
        ("cp_comm_type", cp_comm_type, (None, "all_gather")),
        ("window_size", config.window_size, (None,)),
        ("softmax_type", config.softmax_type, ("vanilla",)),
        ("qk_clip", config.qk_clip, (False,)),
    )
    for name, value, allowed in rules:
        if value not in allowed:
            raise ValueError(
                f"{name} ({value}) must be {' or '.join(str(a) for a in allowed)} with "
                f"context_parallel_size ({config.context_parallel_size}) > 1 where Transformer "
                f"Engine is not there; use {allowed[0]}, or Transformer Engine"
            )


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


def with_local_latent_attention(spec: ModuleSpec, is_moe: bool) -> ModuleSpec:
    """megatron-core's local spec of a layer with these modules in its attention."""
    attention = spec.submodules.self_attention
    attention = with_submodules(attention, core_attention=_LatentDotProductAttention)
    return with_submodules(
        spec,
        self_attention=dataclasses.replace(attention, module=_LocalLatentAttention),
        sharded_state_dict_keys_map=_NORM_NAMES if is_moe else _NORM_NAMES | _DENSE_NORM_NAME,
    )
