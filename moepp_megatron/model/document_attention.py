"""Attention that stays within documents: the mask of a micro-batch, and the attention that uses it.

Documents share sequences. Which document a token belongs to reaches the core attention of every
layer through megatron-core's argument `attention_mask`, which pipeline stages, recomputation and
the combined schedule pass on unchanged:

- megatron-core's local modules and those of this package get the mask itself, [b, 1, s, s].
- Transformer Engine's kernels never look at a mask of that size. They get the lengths of the
  documents and compute packed sequences (`thd`), around which only tokens are laid out again, so
  that all other modules and the lane of router logits see [s, b] as always.
"""

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor


def document_numbers(tokens: Tensor, eod: int) -> Tensor:
    """[b, s] int64 number of each token's document in its sequence, from 0; EOD ends a document."""
    ends = (tokens == eod).long()
    return ends.cumsum(dim=-1) - ends


def dense_mask(documents: Tensor) -> Tensor:
    """[b, 1, s, s] bool from documents [b, s], True where a query must not see a key."""
    length = documents.shape[-1]
    later = torch.ones(length, length, dtype=torch.bool, device=documents.device).triu_(1)
    return (later | (documents.unsqueeze(2) != documents.unsqueeze(1))).unsqueeze(1)


def document_ends(documents: Tensor) -> Tensor:
    """[n + 1] int32: 0, and the token after each document of sequences one after the other.

    `documents` [b, s] are on the CPU, because their number is read.
    """
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    first = starts.flatten().nonzero().flatten()
    return torch.cat([first, first.new_tensor([documents.numel()])]).to(torch.int32)


def packed_attention() -> type:
    """Transformer Engine's core attention that takes `document_ends` as its `attention_mask`."""
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    class PackedAttention(TEDotProductAttention):
        def forward(
            self,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Tensor | None,
            attn_mask_type: AttnMaskType,
            **kwargs: Any,
        ) -> Tensor:
            """Attend within documents: [s, b, n * v] from query [s, b, n, d], key and value.

            `attention_mask` are the `document_ends` of the micro-batch; None is causal attention
            over whole sequences, as in generation.
            """
            if attention_mask is None:
                context: Tensor = super().forward(query, key, value, None, attn_mask_type, **kwargs)
                return context
            length, size = query.shape[:2]
            packed = [tensor.transpose(0, 1).flatten(0, 1) for tensor in (query, key, value)]
            kwargs["packed_seq_params"] = PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=attention_mask,
                cu_seqlens_kv=attention_mask,
                # An upper limit is enough, and needs no read from the device.
                max_seqlen_q=length,
                max_seqlen_kv=length,
            )
            output = super().forward(*packed, None, AttnMaskType.padding_causal, **kwargs)
            return output.reshape(size, length, -1).transpose(0, 1).contiguous()

    return PackedAttention
