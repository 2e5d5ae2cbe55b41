"""Tags: what MoE++ layers count each token as.

Routers see hidden vectors, and a later micro-batch may be in its forward pass while this one is
recomputed for its backward pass, so tags travel with the vectors: through `TransformerBlock`'s
`context_mask` argument, which the layers of a decoder have no other use for and which activation
checkpointing keeps with its inputs. Every pipeline stage makes them from its token ids.

A tag holds as bits of one number a *group* (a class of token ids for metrics) and a *source* (where
the text comes from).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from megatron.core import parallel_state
from torch import Tensor

# First bit of a source; a group begins at 0.
SOURCE = 16


class TokenTags:
    """Computes tags from token ids."""

    def __init__(self) -> None:
        # [vocabulary] int64 group of each token id; None where all are in group 0.
        self.groups: Tensor | None = None

    @torch.no_grad()
    def __call__(
        self, input_ids: Tensor, is_sequence_parallel: bool, sources: Tensor | None = None
    ) -> Tensor:
        """The tags of this rank's tokens, [s, b] int64, s local to this rank.

        `input_ids` are [b, s] int64, `sources` [b, s] int32, None where there is only one. With
        `is_sequence_parallel` each tensor-parallel rank has its part of the sequence.
        """
        tags = torch.zeros_like(input_ids) if self.groups is None else self.groups[input_ids]
        if sources is not None:
            tags = tags + (sources.long() << SOURCE)
        tags = tags.T
        if is_sequence_parallel:
            size = parallel_state.get_tensor_model_parallel_world_size()
            tags = tags.chunk(size)[parallel_state.get_tensor_model_parallel_rank()]
        return tags.contiguous()


def groups(tags: Tensor) -> Tensor:
    """[T] int64 groups from tags [s, b]."""
    return tags.reshape(-1) & ((1 << SOURCE) - 1)


def _sources(tags: Tensor) -> Tensor:
    """[T] int64 data sources from tags [s, b]."""
    return tags.reshape(-1) >> SOURCE


class TagCounts(NamedTuple):
    """Counters by tags, int64, on the device; no rows where nothing is counted by one.

    `groups` are [groups, 2]: FFN experts and tokens. `sources` are [sources, E] selections.
    """

    groups: Tensor
    sources: Tensor

    @classmethod
    def zeros(cls, groups: int, sources: int, num_experts: int, device: torch.device) -> TagCounts:
        """Counters of nothing yet, in one tensor."""
        sizes = [2 * groups, sources * num_experts]
        of_groups, of_sources = torch.zeros(sum(sizes), dtype=torch.int64, device=device).split(
            sizes
        )
        return cls(of_groups.view(-1, 2), of_sources.view(-1, num_experts))


@torch.no_grad()
def count_by_tags(
    counts: TagCounts, selected: Tensor, tags: Tensor, num_ffn: int, padded: Tensor | None = None
) -> None:
    """Count one micro-batch's tokens in place. `kernels.tags` does the same on a GPU.

    `selected` are [T, E] bool selections before any capacity limit, none of padding. The first
    `num_ffn` columns are FFN experts.
    """
    if len(counts.sources):
        counts.sources.index_add_(0, _sources(tags), selected.long())
    if len(counts.groups):
        ffn = selected[:, :num_ffn].sum(dim=-1)
        tokens = torch.ones_like(ffn) if padded is None else (~padded).to(ffn.dtype)
        counts.groups.index_add_(0, groups(tags), torch.stack([ffn, tokens], dim=-1))
