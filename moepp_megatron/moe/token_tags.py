"""Tags that tell MoE++ layers, for each token, what it is counted as, and whether it is forced.

Routers see hidden vectors. Which token a vector belongs to has to travel with it: a later
micro-batch may be in its forward pass while this one is computed again for its backward pass. So
the tags go through `TransformerBlock`'s `context_mask` argument, which the layers of a decoder have
no other use for and which activation checkpointing keeps with its inputs. Every pipeline stage
makes them from the token ids that it is given.

A *cell* of the expert usage is a range of positions together with a class of token ids by their
frequency. A *group* is a class of token ids for metrics, finer than that of a cell. A *source* is
where the text comes from.

A tag holds them as bits of one number: 1 where an FFN demand concerns the token, then the cell, the
group and the source.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from torch import Tensor

# First bit of each, and one bit behind the last of a cell, and of a group.
_CELL, _GROUP, _SOURCE = 1, 16, 32


class TokenTags:
    """Computes tags from token ids and positions.

    Args:
        seq_length: Length of a sequence.
        position_bins: Ranges of positions, equally long.
        frequency_bins: Classes of token ids.

    Attributes:
        forced_ids: [vocabulary] bool token ids that a demand concerns; None for none of them.
        classes: [vocabulary] int64 class of each token id; None where all are in class 0.
        groups: [vocabulary] int64 group of each token id; None where all are in group 0.
    """

    def __init__(self, seq_length: int, position_bins: int = 1, frequency_bins: int = 1) -> None:
        self._seq_length = seq_length
        self.position_bins, self.frequency_bins = position_bins, frequency_bins
        self.forced_ids: Tensor | None = None
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
        """The tags of this rank's tokens.

        Args:
            input_ids: [b, s] int64.
            position_ids: [b, s] int64, from 0 to `seq_length` - 1.
            is_sequence_parallel: Whether each tensor-parallel rank has its part of the sequence.
            sources: [b, s] int32 data source of each token; None where there is one alone.

        Returns:
            [s, b] int64, s local to this rank.
        """
        tags = position_ids * self.position_bins // self._seq_length * self.frequency_bins
        if self.classes is not None:
            tags = tags + self.classes[input_ids]
        tags = tags << _CELL
        if self.groups is not None:
            tags = tags + (self.groups[input_ids] << _GROUP)
        if sources is not None:
            tags = tags + (sources.long() << _SOURCE)
        if self.forced_ids is not None:
            tags = tags + self.forced_ids[input_ids]
        tags = tags.T
        if is_sequence_parallel:
            size = parallel_state.get_tensor_model_parallel_world_size()
            tags = tags.chunk(size)[parallel_state.get_tensor_model_parallel_rank()]
        return tags.contiguous()


def forced_tokens(tags: Tensor | None) -> Tensor | None:
    """[T] bool from tags [s, b], True for forced tokens; None, which means all tokens, for None."""
    return None if tags is None else (tags.reshape(-1) & 1).bool()


def cells(tags: Tensor) -> Tensor:
    """[T] int64 cells from tags [s, b]."""
    return (tags.reshape(-1) & ((1 << _GROUP) - 1)) >> _CELL


def groups(tags: Tensor) -> Tensor:
    """[T] int64 groups from tags [s, b]."""
    return (tags.reshape(-1) & ((1 << _SOURCE) - 1)) >> _GROUP


def sources(tags: Tensor) -> Tensor:
    """[T] int64 data sources from tags [s, b]."""
    return tags.reshape(-1) >> _SOURCE
