"""Attention that stays within documents: the mask of a micro-batch, and the attention that uses it.

Documents share sequences. Which document a token belongs to reaches the core attention of every
layer through megatron-core's argument `attention_mask`, which pipeline stages, recomputation and
the combined schedule pass on unchanged:

- megatron-core's local modules and those of this package get the mask itself, [b, 1, s, s].
- Transformer Engine's kernels never look at a mask of that size. They get the lengths of the
  documents and compute packed sequences (`thd`), around which only tokens are laid out again, so
  that all other modules and the lane of router logits see [s, b] as always.
"""

import torch
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
