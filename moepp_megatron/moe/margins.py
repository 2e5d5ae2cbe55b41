"""The margins of selections: how far a router is from selecting more or fewer FFN experts.

The *margin* of a token's j-th best FFN expert is what the selection bias of all FFN experts would
have to rise by for the token to take j of them: the score of the zero-computation expert in its
way, the (K + 1 - j)-th best, less its own, biases included. It is at most 0 exactly where the
expert is selected. So the share of margins up to c is the FFN share under a bias raised by c, and
the bias that gives a wanted share is a quantile: no derivative, no scale of scores, no model.

Margins of a step are counted in bins whose width grows with the distance from 0: a small correction
is known as well, relative to its size, as a large one, whatever the scale of the scores.

Shape suffixes: T local tokens, E all experts, F FFN experts, K selected per token, B bins.
"""

import itertools
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from moepp_megatron.moe.config import MoEPPConfig
from moepp_megatron.moe.scores import score_of
from moepp_megatron.moe.selection import within_groups

# Scores are in [0, 1] and biases begin within 1.25 (upcycling), so margins are within 4; those of
# sqrtsoftplus are for logits up to 16, and a margin beyond counts as 4. Of scores of a thousandth,
# fp32 resolves 2^-33.
_LEAST_EXPONENT, _MOST_EXPONENT, _BINS_PER_OCTAVE = -24, 2, 4
OUT_OF_REACH = 2.0**_MOST_EXPONENT
"""The last edge: a `quantile` this far from 0 is one that no bias reaches."""


_BINS = range(_LEAST_EXPONENT * _BINS_PER_OCTAVE, _MOST_EXPONENT * _BINS_PER_OCTAVE + 1)
_SIZES = [2.0 ** (place / _BINS_PER_OCTAVE) for place in _BINS]
EDGES = (*(-size for size in reversed(_SIZES)), 0.0, *_SIZES)
"""Upper ends of all bins but the last; 0 is one of them."""


@cache
def _edges_on(device: torch.device) -> Tensor:
    """`EDGES` as fp32 on a device: copied once, since a copy makes the device wait."""
    return torch.tensor(EDGES, device=device)


@torch.no_grad()
def count_margins(
    logits: Tensor, bias: Tensor, config: MoEPPConfig, padded: Tensor | None = None
) -> Tensor:
    """[B] int64 margins of a micro-batch in each bin, from logits as `selection.select` takes them.

    Those up to 0 are the FFN experts selected; FFN experts that no bias can remove, for lack of
    zero-computation experts, are in the first bin.
    """
    topk, ffn = config.router_topk, config.num_ffn_experts
    ranked_TE = score_of(config).scores(logits) + bias
    # A bias that rises for all FFN experts does not change which groups are best.
    ranked_TE = within_groups(ranked_TE, ranked_TE, config)
    best = ranked_TE[:, :ffn].topk(min(topk, ffn), dim=-1).values
    others = min(topk, config.num_zero_computation_experts)
    in_way_TK = ranked_TE.new_full((len(logits), topk), -torch.inf)
    in_way_TK[:, topk - others :] = ranked_TE[:, ffn:].topk(others, dim=-1).values.flip(-1)
    margins = in_way_TK[:, : best.shape[1]] - best
    bins = torch.bucketize(margins, _edges_on(logits.device))
    weights = torch.ones_like(bins)
    if padded is not None:
        weights = weights.masked_fill(padded.unsqueeze(-1), 0)
    counts_B = torch.zeros(len(EDGES) + 1, dtype=torch.int64, device=logits.device)
    return counts_B.index_add_(0, bins.flatten(), weights.flatten())


def quantile(counts: Sequence[float], wanted: float) -> float:
    """The value up to which `wanted` of the margins counted in [B] bins lie.

    A bias on all FFN experts that rises by it gives them this number of selections. It is between
    the first and the last of `EDGES`; within a bin margins count as evenly spread.
    """
    place = next(
        (i for i, total in enumerate(itertools.accumulate(counts)) if total >= wanted), len(EDGES)
    )
    if place in (0, len(EDGES)):
        return EDGES[min(place, len(EDGES) - 1)]
    low, high = EDGES[place - 1], EDGES[place]
    inside = wanted - sum(counts[:place])
    return low + (high - low) * inside / counts[place] if counts[place] > 0 else low
