"""Uneven routing as a distribution: the load of the fullest rank and of the fullest expert.

Each layer's popularity of FFN experts is a draw from a symmetric Dirichlet distribution, the
selections of a micro-batch a multinomial draw from it. With evenness `a` the popularity of one of F
experts has the coefficient of variation sqrt((F - 1) / (F a + 1)): large `a` is even. All ranks of
an expert-parallel group wait for the fullest, in every layer: the mean of the maxima counts.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

# Draws of a layer: their mean is then known to well below a percent of the mean load.
_DRAWS, _SEED = 400, 20241009
# A multinomial draw beyond this is as even as one of this size, at a thousandth of its time.
_MOST_SELECTIONS = 2**40


# What a balance loss reaches after 200B tokens: the fullest of 64 experts takes 1.52 times the mean
# (arXiv 2408.15664, table 2, the larger model: MaxVio 0.52). The quickstart model is at an evenness
# of 8 in the last quarter of its first 1.6M tokens here (docs/planning.md).
LEARNED = 26.0

# Evenness times experts in the first hundred steps: 128 experts at 2 explain why Qwen3-30B takes
# 1.23 times as long with its own routing as with routing forced to balance. Not carried beyond
# the 8 to 128 experts of the two runs that there are.
_EARLY_CONCENTRATION, _LEAST_EVEN = 256.0, 2.0


def early(num_experts: int) -> float:
    """Evenness in a run's first hundred steps, in which most published runs were timed."""
    return max(min(_EARLY_CONCENTRATION / num_experts, LEARNED), _LEAST_EVEN)


@dataclass(frozen=True)
class Load:
    """Maximum over mean, over layers and micro-batches."""

    mean: float  # the factor on the time of experts and of their exchange
    p99: float


EVEN = Load(1.0, 1.0)


@lru_cache(maxsize=4096)
def rank_load(evenness: float | None, num_experts: int, ranks: int, selections: int) -> Load:
    """Rows of the fullest of `ranks` ranks over the mean; `ranks` divides the FFN experts.

    `evenness` is `a` of the distribution, None where routing is forced to balance; `selections` are
    the FFN selections of the group's tokens in one layer and micro-batch.
    """
    if evenness is None or ranks == 1 or selections == 0:
        return EVEN
    rng = np.random.default_rng(_SEED)
    popularity = rng.dirichlet(np.full(num_experts, evenness), size=_DRAWS)
    # Rounding must not push a row's sum above 1.
    popularity /= popularity.sum(axis=1, keepdims=True)
    per_rank = popularity.reshape(_DRAWS, ranks, -1).sum(axis=2)
    counts = rng.multinomial(min(selections, _MOST_SELECTIONS), per_rank / per_rank.sum(1)[:, None])
    ratios = counts.max(axis=1) * ranks / counts.sum(axis=1)
    return Load(float(ratios.mean()), float(np.quantile(ratios, 0.99)))
