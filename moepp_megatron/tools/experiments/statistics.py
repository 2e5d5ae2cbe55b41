"""Student's t, estimates with their uncertainty, and the losses of all arms in one model.

A seed decides initial weights and the order of the data, which shifts the losses of all its runs.
What is left after the means of arms and seeds is noise, whose size is taken to be the same in every
arm (two-way analysis of variance without interaction). Differences of arms then have
(arms - 1) (seeds - 1) degrees of freedom instead of seeds - 1.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

_CONFIDENCE = 0.95
# Beyond it the exponential overflows; a factor of this size is no number to decide by anyway.
_LARGEST_LOG = 700.0
# Halvings of an angle, after which a double has no more digits.
_BISECTIONS = 60


def t_below(value: float, degrees: int) -> float:
    """The probability that Student's distribution with whole `degrees` of freedom is below `value`.

    Exact finite series: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3-4.
    """
    angle = math.atan(value / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    is_odd = degrees % 2
    term = cosine if is_odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(2 + is_odd, degrees - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    inside = 2 / math.pi * (angle + sine * total) if is_odd else sine * total
    return 0.5 + inside / 2


def t_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's distribution, by bisection of the angle of `t_below`."""
    low, high = -math.pi / 2, math.pi / 2
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if t_below(math.sqrt(degrees) * math.tan(middle), degrees) < probability:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees) * math.tan((low + high) / 2)


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% interval, which a single value does not have."""

    mean: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Estimate:
    """A number that was measured with a normal error of unknown size."""

    mean: float
    error: float | None = None
    degrees: int = 0

    @staticmethod
    def of(values: Sequence[float]) -> Estimate:
        """The mean of independent values."""
        mean = statistics.fmean(values)
        if len(values) < 2:
            return Estimate(mean)
        return Estimate(mean, statistics.stdev(values) / math.sqrt(len(values)), len(values) - 1)

    def plus(self, other: Estimate, factor: float = 1.0) -> Estimate:
        """Add `factor` times an independent one; Welch and Satterthwaite's degrees, rounded."""
        mean = self.mean + factor * other.mean
        if self.error is None or other.error is None:
            return Estimate(mean)
        mine, theirs = self.error**2, (factor * other.error) ** 2
        if mine + theirs == 0.0:
            return Estimate(mean, 0.0, self.degrees)
        parts = mine**2 / self.degrees + theirs**2 / other.degrees
        return Estimate(mean, math.sqrt(mine + theirs), max(int((mine + theirs) ** 2 / parts), 1))

    def reach(self, level: float) -> float:
        """Return the distance to a bound that is wrong, on its side, with probability `level`."""
        if self.error is None:
            return math.inf
        return self.error * t_quantile(1 - level, self.degrees)

    def sign(self, level: float) -> int:
        """-1 or 1 where the number is below or above 0 at this one-sided level, else 0."""
        reach = self.reach(level)
        if self.mean + reach < 0:
            return -1
        return 1 if self.mean - reach > 0 else 0

    def interval(self) -> Interval:
        """The mean with its 95% interval."""
        if self.error is None:
            return Interval(self.mean)
        half = self.reach((1 - _CONFIDENCE) / 2)
        return Interval(self.mean, self.mean - half, self.mean + half)

    def factor(self) -> Interval:
        """The factor whose logarithm this is, with its 95% interval."""
        found = self.interval()
        low, high = (None if end is None else _exp(end) for end in (found.low, found.high))
        return Interval(_exp(self.mean), low, high)


def _exp(logarithm: float) -> float:
    return math.exp(min(logarithm, _LARGEST_LOG))


class PooledLosses:
    """Final losses in nats by arm and seed; every arm has the same seeds."""

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
        """A weighted sum of the arms' means; weights sum to 0, so that the seeds' shifts cancel."""
        assert abs(sum(weights.values())) < 1e-9, "the weights of a contrast sum to 0"
        mean = sum(weight * self._means[arm] for arm, weight in weights.items())
        if self.noise is None:
            return Estimate(mean)
        size = math.sqrt(sum(weight**2 for weight in weights.values()) / self._num_seeds)
        return Estimate(mean, self.noise * size, self.degrees)

    def difference(self, arm: str, other: str) -> Estimate:
        """Mean loss of `arm` minus that of `other`, nats."""
        return self.contrast({arm: 1.0, other: -1.0})
