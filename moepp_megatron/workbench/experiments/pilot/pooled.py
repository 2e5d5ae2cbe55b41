"""Fits the losses of all arms as arm + seed + noise, so that every run informs the noise.

A seed decides initial weights and the order of the data, which shifts the losses of all its runs.
What is left after the means of arms and seeds is noise, whose size is taken to be the same in every
arm (two-way analysis of variance without interaction). Differences of arms then have
(arms - 1) (seeds - 1) degrees of freedom instead of seeds - 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from moepp_megatron.workbench.experiments.pilot.statistics import Estimate


class PooledLosses:
    """Final losses by arm and seed.

    Args:
        losses: Nats by arm's name and seed; every arm has the same seeds.
    """

    def __init__(self, losses: Mapping[str, Mapping[int, float]]) -> None:
        seeds = sorted(next(iter(losses.values())))
        table_AS = np.array([[losses[arm][seed] for seed in seeds] for arm in losses])
        arms_A, seeds_S = table_AS.mean(axis=1), table_AS.mean(axis=0)
        rest_AS = table_AS - arms_A[:, None] - seeds_S[None, :] + table_AS.mean()
        self._means = dict(zip(losses, map(float, arms_A), strict=True))
        self._num_seeds = len(seeds)
        self.degrees = (len(losses) - 1) * (len(seeds) - 1)
        """Degrees of freedom of the noise."""
        self.noise = float(math.sqrt((rest_AS**2).sum() / self.degrees)) if self.degrees else None
        """Standard deviation of a run's noise, nats; None with a single seed or arm."""

    def contrast(self, weights: Mapping[str, float]) -> Estimate:
        """A weighted sum of the arms' means.

        Args:
            weights: Weights by arm; they sum to 0, so that the seeds' shifts cancel.
        """
        assert abs(sum(weights.values())) < 1e-9, "the weights of a contrast sum to 0"
        mean = sum(weight * self._means[arm] for arm, weight in weights.items())
        if self.noise is None:
            return Estimate(mean)
        size = math.sqrt(sum(weight**2 for weight in weights.values()) / self._num_seeds)
        return Estimate(mean, self.noise * size, self.degrees)

    def difference(self, arm: str, other: str) -> Estimate:
        """Mean loss of `arm` minus that of `other`, nats."""
        return self.contrast({arm: 1.0, other: -1.0})
