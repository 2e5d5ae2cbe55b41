"""Causal attention for megatron-core's local modules, of whole sequences and of spread ones.

megatron-core's own `DotProductAttention` writes the scores of all pairs of tokens and keeps them
for the backward pass: 4 bytes * heads * s^2 a sequence and layer (two 16-bit matrices). torch's
`scaled_dot_product_attention` has kernels that never write them. It also refuses context
parallelism. These are used where Transformer Engine, whose attention has both, is not installed.

With context parallelism a sequence of s tokens is cut into 2 * cp chunks, and rank r holds chunks r
and 2 * cp - 1 - r (the zigzag of `megatron.core.utils.get_batch_on_this_cp_rank`), so that all
ranks have the same work under the causal mask. Keys and values are gathered, queries are not.

Shape suffixes: S a rank's tokens, s all tokens of a sequence, b sequences, n query heads and g
key/value heads of this tensor-parallel rank, d channels of a head's query or key, v of its value.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moepp_megatron.moe.capacity import in_rank_order, in_sequence_order


class _LocalAttention(MegatronModule):
    """Causal core attention; subclasses give `_context` [S, b, n, v]."""

    softmax_scale: float | None

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
        """Attend from each token to all tokens up to it: [S, b, n * v], dtype of `query`.

        Args:
            query: [S, b, n, d], the last S of s tokens (all of them in training); with context
                parallelism this rank's two chunks, the early one first.
            key: [s, b, g, d], or [S, b, g, d] of this rank; n is a multiple of g.
            value: [s, b, g, v], or [S, b, g, v].
            attention_mask: [b, 1, S, s] bool for these queries and all keys, True where a query
                must not see a key, later keys included (`document_attention.dense_mask`); None is
                the causal mask.
            attn_mask_type: Unused; the constructor's value decides.

        Raises:
            ValueError: If there is a bias or packed sequences, or S is odd with context
                parallelism.
        """
        given = {"attention_bias": attention_bias, "packed_seq_params": packed_seq_params}
        for argument, unused in given.items():
            if unused is not None:
                raise ValueError(
                    f"{argument} ({type(unused).__name__}) must be None in {type(self).__name__}, "
                    "which is causal over whole sequences; use Transformer Engine's attention"
                )
        return self._context(query, key, value, attention_mask).flatten(start_dim=2)

    def _context(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        raise NotImplementedError


class CausalAttention(_LocalAttention):
    """Core attention of a layer whose sequences are whole on this rank.

    `softmax_scale` is 1 / sqrt(d) where None. Unused are groups, dropout and the widths of heads,
    which the tensors have. ValueError if the mask is not causal.
    """

    @staticmethod
    def suits(config: TransformerConfig) -> bool:
        """True if this class can replace `DotProductAttention` on this GPU."""
        return (
            torch.cuda.is_available()
            and config.context_parallel_size == 1
            and config.attention_dropout == 0.0
            and config.window_size is None
            and config.softmax_type == "vanilla"
            and not config.qk_clip
            and not config.apply_query_key_layer_scaling
        )

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        softmax_scale: float | None = None,
        **unused: object,
    ) -> None:
        super().__init__(config=config)
        if attn_mask_type is not AttnMaskType.causal:
            raise ValueError(
                f"attn_mask_type ({attn_mask_type}) must be causal with CausalAttention; use "
                "Transformer Engine"
            )
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale

    def _context(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        last, num_tokens = query.shape[0], key.shape[0]
        mask = None if mask is None else ~mask
        if mask is None and 1 < last < num_tokens:
            # Behind tokens whose keys are kept already.
            positions = torch.arange(num_tokens, device=query.device)
            mask = positions[-last:].unsqueeze(1) >= positions
        if value.requires_grad:
            # Values are a view of the projection's output, all of which would stay until the
            # backward pass, although rotation has made new queries and keys.
            value = value.contiguous()
        is_causal = mask is None and 1 < last == num_tokens
        return _attend(query, key, value, mask, self.softmax_scale, is_causal=is_causal)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float | None,
    *,
    is_causal: bool = False,
) -> Tensor:
    """[S, b, n, v] attention by torch's kernels, which do not write the scores; dtype of `query`.

    `query` is [S, b, n, d], `key` [s, b, g, d] (n is a multiple of g), `value` [s, b, g, v]; `mask`
    [S, s] or [b, 1, S, s] bool, True where a query sees a key. `scale` is 1 / sqrt(d) where None.
    With `is_causal` a query sees the keys up to its position; S is s, and there is no mask.
    """
    repeats = query.shape[2] // key.shape[2]
    if repeats > 1 and not _takes_shared_keys(query, mask):
        key, value = (tensor.repeat_interleave(repeats, dim=2) for tensor in (key, value))
    context_bncd = F.scaled_dot_product_attention(
        query.permute(1, 2, 0, 3),
        key.permute(1, 2, 0, 3),
        value.permute(1, 2, 0, 3),
        attn_mask=mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return context_bncd.permute(2, 0, 1, 3)


def _takes_shared_keys(query: Tensor, mask: Tensor | None) -> bool:
    """True if a kernel supports grouped-query attention: in torch 2.11, flash attention."""
    return query.device.type == "cpu" or (mask is None and query.dtype is not torch.float32)


class ContextParallelAttention(_LocalAttention):
    """Core attention of a layer whose sequences are spread over context-parallel ranks.

    The result is that of `DotProductAttention` on one rank. Keys and values of whole sequences are
    held during forward and backward, with one collective each. `softmax_scale` defaults to
    1 / sqrt(d). Unused are the type of attention and the widths of heads.

    Raises:
        ValueError: If a setting cannot be honoured: a mask that is not causal, dropout, a
            `cp_comm_type` other than "all_gather".
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **unused: object,
    ) -> None:
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        _refuse_unsupported(config, attn_mask_type, dropout, cp_comm_type)
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["cp"])
        self.layer_number = layer_number
        self.cp_group = pg_collection.cp
        self.softmax_scale = softmax_scale

    def _context(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        starts = _chunk_starts(query.shape[0], self.cp_group)
        gathered = _GatherSequence.apply(torch.cat([key, value], dim=-1), self.cp_group)
        whole_key, whole_value = gathered.split([key.shape[-1], value.shape[-1]], dim=-1)
        masks = (None, None) if mask is None else mask.chunk(2, dim=2)
        return torch.cat(
            [
                self._attend(chunk, start, whole_key, whole_value, mask)
                for chunk, start, mask in zip(query.chunk(2), starts, masks, strict=True)
            ]
        )

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
        return _attend(query, key[:end], value[:end], seen, self.softmax_scale)


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
        return in_sequence_order(gathered, group.size())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Sum over ranks in fp32."""
        ranks = ctx.group.size()
        by_rank = in_rank_order(grad.float(), ranks)
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
