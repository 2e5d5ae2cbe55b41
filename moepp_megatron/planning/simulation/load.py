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
    """Where popularity comes from.

    Attributes:
        evenness: Of the Dirichlet distribution; None for even load.
        recorded: Shares of FFN experts of a recorded run [steps, MoE layers, FFN experts], which
            `evenness` gives way to; each simulated step takes those of one recorded step.
    """

    evenness: float | None = None
    recorded: Values | None = None

    @property
    def is_even(self) -> bool:
        """Every rank gets the same."""
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
        highest: Values = counts.max(axis=-1).astype(np.float64)
        return highest * ranks / selections
    spread = np.sqrt(mean * (1.0 - share))
    ordered = np.argsort(-mean, axis=-1)
    mean = np.take_along_axis(mean, ordered, axis=-1)
    spread = np.take_along_axis(spread, ordered, axis=-1)
    near = mean + _FAR * (spread + spread[..., :1]) >= mean[..., :1]
    kept = int(near.sum(axis=-1).max())
    fullest = np.full((steps, layers, draws), -np.inf, dtype=np.float32)
    for place in range(kept):
        # One rank at a time, and only in layers where it can matter: the memory of a draw.
        rows = near[..., place]
        noise = rng.standard_normal((int(rows.sum()), draws), dtype=np.float32)
        counts = mean[rows, place, None] + spread[rows, place, None] * noise
        fullest[rows] = np.maximum(fullest[rows], counts)
    return np.maximum(fullest.astype(np.float64) * ranks / selections, 1.0)
