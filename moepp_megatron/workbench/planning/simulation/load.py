"""Load of the fullest rank of each expert-parallel group, drawn for every layer and micro-batch.

A layer's popularity of experts is one draw for a step (the same for all groups and micro-batches:
they run the same router); the selections of a group and micro-batch are a multinomial draw from it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

# Ranks whose expected load is this many standard deviations below the highest cannot be the
# fullest: they are left out.
_FAR = 7.0
# Above this many expected selections a rank's count is as good as normal.
_NORMAL_FROM = 100.0


@dataclass(frozen=True)
class LoadSource:
    """The source of experts' popularity.

    Attributes:
        evenness: Evenness of the Dirichlet distribution; None for even load.
        recorded: Shares of FFN experts of a recorded run [steps, MoE layers, FFN experts], which
            `evenness` gives way to; each simulated step takes those of one recorded step.
    """

    evenness: float | None = None
    recorded: Values | None = None

    @property
    def is_even(self) -> bool:
        """Whether every rank gets the same load."""
        return self.evenness is None and self.recorded is None

    def popularity(self, rng: np.random.Generator, steps: int, layers: int, experts: int) -> Values:
        """Share of each FFN expert in each layer's selections [steps, layers, experts]."""
        if self.recorded is not None:
            chosen = self.recorded[rng.integers(len(self.recorded), size=steps)]
            # A model of another depth takes the recorded layer at the same relative depth.
            places = np.arange(layers) * chosen.shape[1] // max(layers, 1)
            shares: Values = chosen[:, places]
        else:
            assert self.evenness is not None, "even load needs no draw"
            shares = rng.dirichlet(np.full(experts, self.evenness), size=(steps, layers))
        return shares / shares.sum(axis=-1, keepdims=True)


EVEN = LoadSource()


def fullest_ranks(
    rng: np.random.Generator, popularity: Values, ranks: int, selections: int, draws: int
) -> Values:
    """Rows of the fullest rank over the mean.

    Args:
        rng: Random numbers.
        popularity: Share of each FFN expert [steps, layers, experts].
        ranks: Expert-parallel ranks of a group; each holds as many experts, in order.
        selections: FFN selections of a group's tokens in a layer and micro-batch.
        draws: Groups times micro-batches.

    Returns:
        [steps, layers, draws], at least 1.
    """
    steps, layers, _ = popularity.shape
    if ranks == 1 or selections == 0:
        return np.ones((steps, layers, draws))
    share = popularity.reshape(steps, layers, ranks, -1).sum(axis=-1)
    mean = selections * share
    if selections / ranks < _NORMAL_FROM:
        counts = rng.multinomial(selections, share[:, :, None, :], size=(steps, layers, draws))
        return counts.max(axis=-1).astype(np.float64) * ranks / selections
    mean = -np.sort(-mean, axis=-1)
    # At most the standard deviation of a difference to the highest.
    spread = np.sqrt(mean) + np.sqrt(mean[..., :1])
    kept = int((mean + _FAR * spread >= mean[..., :1]).sum(axis=-1).max())
    # Normal with the covariance of a multinomial draw: independent Poisson counts less each rank's
    # share of what all of them are off by. All other ranks together are one more such count.
    rest = np.sqrt(np.maximum(selections - mean[..., :kept].sum(axis=-1), 0.0))
    off = rest[..., None] * rng.standard_normal((steps, layers, draws), dtype=np.float32)
    noise = rng.standard_normal((kept, steps, layers, draws), dtype=np.float32)
    for place in range(kept):
        noise[place] *= np.sqrt(mean[..., place, None])
        off += noise[place]
    fullest = np.full((steps, layers, draws), -np.inf)
    for place in range(kept):
        own = mean[..., place, None]
        np.maximum(fullest, own + noise[place] - own / selections * off, out=fullest)
    return np.maximum(fullest * (ranks / selections), 1.0)
