"""Tags: what MoE++ layers count each token as.

Routers see hidden vectors, and a later micro-batch may be in its forward pass while this one is
recomputed for its backward pass, so tags travel with the vectors: through `TransformerBlock`'s
`context_mask` argument, which the layers of a decoder have no other use for and which activation
checkpointing keeps with its inputs. Every pipeline stage makes them from its token ids.

A tag holds as bits of one number a *cell* of the expert usage (a range of positions together with a
class of token ids by their frequency), a *group* (a class of token ids for metrics, finer than that
of a cell) and a *source* (where the text comes from).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from megatron.core import parallel_state
from torch import Tensor

# First bit of a group and of a source; a cell begins at 0.
GROUP, SOURCE = 16, 32


class TokenTags:
    """Computes tags from token ids and positions.

    Of `frequency_bins` classes and `position_bins` equal ranges of a sequence.

    Attributes:
        classes: [vocabulary] int64 class of each token id; None where all are in class 0.
        groups: [vocabulary] int64 group of each token id; None where all are in group 0.
    """

    def __init__(self, seq_length: int, position_bins: int = 1, frequency_bins: int = 1) -> None:
        self._seq_length = seq_length
        self.position_bins, self.frequency_bins = position_bins, frequency_bins
        self.classes: Tensor | None = None
        self.groups: Tensor | None = None

    @property
    def num_cells(self) -> int:
        """Number of cells; they are numbered by positions first."""
        return self.position_bins * self.frequency_bins

    @torch.no_grad()
    def __call__(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        is_sequence_parallel: bool,
        sources: Tensor | None = None,
    ) -> Tensor:
        """The tags of this rank's tokens, [s, b] int64, s local to this rank.

        `input_ids` and `position_ids` (from 0 to `seq_length` - 1) are [b, s] int64, `sources` [b,
        s] int32, None where there is only one. With `is_sequence_parallel` each tensor-parallel
        rank has its part of the sequence.
        """
        tags = position_ids * self.position_bins // self._seq_length * self.frequency_bins
        if self.classes is not None:
            tags = tags + self.classes[input_ids]
        if self.groups is not None:
            tags = tags + (self.groups[input_ids] << GROUP)
        if sources is not None:
            tags = tags + (sources.long() << SOURCE)
        tags = tags.T
        if is_sequence_parallel:
            size = parallel_state.get_tensor_model_parallel_world_size()
            tags = tags.chunk(size)[parallel_state.get_tensor_model_parallel_rank()]
        return tags.contiguous()


def cells(tags: Tensor) -> Tensor:
    """[T] int64 cells from tags [s, b]."""
    return tags.reshape(-1) & ((1 << GROUP) - 1)


def groups(tags: Tensor) -> Tensor:
    """[T] int64 groups from tags [s, b]."""
    return (tags.reshape(-1) & ((1 << SOURCE) - 1)) >> GROUP


def sources(tags: Tensor) -> Tensor:
    """[T] int64 data sources from tags [s, b]."""
    return tags.reshape(-1) >> SOURCE


class TagCounts(NamedTuple):
    """Counters by tags, int64, on the device; no rows where nothing is counted by one.

    `cells` are [cells, 2]: FFN experts that the router wants, and tokens. `groups` are [groups, 3]:
    FFN experts that it wants, those that it gets, and tokens. `sources` are [sources, E]
    selections.
    """

    cells: Tensor
    groups: Tensor
    sources: Tensor

    @classmethod
    def zeros(
        cls, cells: int, groups: int, sources: int, num_experts: int, device: torch.device
    ) -> TagCounts:
        """Counters of nothing yet, in one tensor."""
        sizes = [2 * cells, 3 * groups, sources * num_experts]
        parts = torch.zeros(sum(sizes), dtype=torch.int64, device=device).split(sizes)
        widths = (2, 3, num_experts)
        return cls(*(part.view(-1, width) for part, width in zip(parts, widths, strict=True)))


@torch.no_grad()
def count_by_tags(
    counts: TagCounts,
    made: Tensor,
    wanted: Tensor | None,
    tags: Tensor,
    num_ffn: int,
    padded: Tensor | None = None,
) -> None:
    """Count one micro-batch's tokens in place. `kernels.tags` does the same on a GPU.

    `made` are [T, E] bool selections before any capacity limit, none of padding; `wanted` those
    that the router wants, None where they are made. The first `num_ffn` columns are FFN experts.
    """
    if len(counts.sources):
        counts.sources.index_add_(0, sources(tags), made.long())
    if not (len(counts.cells) or len(counts.groups)):
        return
    ffn_made = made[:, :num_ffn].sum(dim=-1)
    ffn_wanted = ffn_made if wanted is None else wanted[:, :num_ffn].sum(dim=-1)
    tokens = torch.ones_like(ffn_made) if padded is None else (~padded).to(ffn_made.dtype)
    if len(counts.cells):
        counts.cells.index_add_(0, cells(tags), torch.stack([ffn_wanted, tokens], dim=-1))
    if len(counts.groups):
        rows = torch.stack([ffn_wanted, ffn_made, tokens], dim=-1)
        counts.groups.index_add_(0, groups(tags), rows)
