"""Uneven routing as a distribution: the load of the fullest rank and of the fullest expert.

Each layer's popularity of FFN experts is a draw from a symmetric Dirichlet distribution, the
selections of a micro-batch a multinomial draw from it. With evenness `a` the popularity of one of F
experts varies by a coefficient of variation sqrt((F - 1) / (F a + 1)), close to 1 / sqrt(a): large
`a` is even, and infinite `a` leaves only the chance of the draw. All ranks of an expert-parallel
group wait for the fullest, in every layer anew, so that a step costs the mean of the maxima.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

# Draws of a layer: their mean is then known to well below a percent of the mean load.
_DRAWS = 400
_SEED = 20241009
# A multinomial draw beyond this is as even as one of this size, at a thousandth of its time.
_MOST_SELECTIONS = 2**40


@dataclass(frozen=True)
class AssumedRouting:
    """Unevenness of the routing.

    Attributes:
        evenness: `a` of the Dirichlet distribution; None for routing that is forced to balance.
    """

    evenness: float | None


FORCED_BALANCE = AssumedRouting(None)
# What a balance loss reaches after 200B tokens: the fullest of 64 experts takes 1.52 times the mean
# (arXiv 2408.15664, table 2, the larger model: MaxVio 0.52). The quickstart model is at an evenness
# of 8 in the last quarter of its first 1.6M tokens here (docs/planning.md).
LEARNED = AssumedRouting(26.0)

# Evenness times experts in the first hundred steps: 128 experts at 2 explain why Qwen3-30B takes
# 1.23 times as long with its own routing as with routing forced to balance. Not carried beyond
# the 8 to 128 experts of the two runs that there are.
_EARLY_CONCENTRATION, _LEAST_EVEN = 256.0, 2.0


def early(num_experts: int) -> AssumedRouting:
    """Routing of a run's first hundred steps, in which most published runs were timed."""
    assert LEARNED.evenness is not None, "learned routing is not forced to balance"
    most = min(_EARLY_CONCENTRATION / num_experts, LEARNED.evenness)
    return AssumedRouting(max(most, _LEAST_EVEN))


@dataclass(frozen=True)
class Load:
    """Maximum over mean, over layers and micro-batches.

    Attributes:
        mean: Expected value; the factor on the time of experts and of their exchange.
        median: Median: half of the layers are at most this full.
        p90: 90th percentile.
        p99: 99th percentile.
    """

    mean: float
    median: float
    p90: float
    p99: float


EVEN = Load(1.0, 1.0, 1.0, 1.0)


@lru_cache(maxsize=4096)
def rank_load(routing: AssumedRouting, num_experts: int, ranks: int, selections: int) -> Load:
    """Rows of the fullest of `ranks` ranks over the mean.

    Args:
        routing: Unevenness of the routing.
        num_experts: FFN experts F; `ranks` divides it.
        ranks: Expert-parallel ranks; `num_experts` for the fullest expert.
        selections: FFN selections of the group's tokens in one layer and micro-batch.
    """
    if routing.evenness is None or ranks == 1 or selections == 0:
        return EVEN
    rng = np.random.default_rng(_SEED)
    popularity = rng.dirichlet(np.full(num_experts, routing.evenness), size=_DRAWS)
    # Rounding must not push a row's sum above 1.
    popularity /= popularity.sum(axis=1, keepdims=True)
    per_rank = popularity.reshape(_DRAWS, ranks, -1).sum(axis=2)
    counts = rng.multinomial(min(selections, _MOST_SELECTIONS), per_rank / per_rank.sum(1)[:, None])
    ratios = counts.max(axis=1) * ranks / counts.sum(axis=1)
    median, p90, p99 = np.quantile(ratios, (0.5, 0.9, 0.99))
    return Load(float(ratios.mean()), float(median), float(p90), float(p99))


def evenness_of(shares: Iterable[Sequence[float]], selections: int) -> float:
    """The evenness that explains the measured unevenness of layers' shares of FFN experts.

    It uses the method of moments: the mean square of the relative deviation, less what the chance
    of `selections` draws contributes.

    Args:
        shares: For each layer (and step), the selections' fractions of its FFN experts.
        selections: FFN selections that each was counted over.

    Raises:
        ValueError: If there is no layer, or one without selections.
    """
    variations = []
    for layer in shares:
        values = np.asarray(layer, dtype=float)
        if values.sum() <= 0:
            raise ValueError("a layer's shares of FFN experts must not all be 0")
        relative = values / values.mean()
        chance = (len(values) - 1) / selections
        variations.append(max(float(relative.var()) - chance, 0.0))
    if not variations:
        raise ValueError("shares must hold at least one layer")
    variation = float(np.mean(variations))
    experts = len(values)
    if variation == 0.0:
        return float("inf")
    return max(((experts - 1) / variation - 1) / experts, 1e-3)
