"""Student's t distribution, estimates with their uncertainty, and means over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from moepp_megatron.workbench.experiments.pilot.result import Interval

_CONFIDENCE = 0.95
# Beyond it the exponential overflows; a factor of this size is no number to decide by anyway.
_LARGEST_LOG = 700.0
# With which a spread is worth going by.
_FEWEST_SEEDS = 3


@lru_cache(maxsize=64)
def _angles(degrees: int) -> tuple[np.ndarray, np.ndarray]:
    """Angles, and the probability below each in the upper half of Student's distribution.

    With t = sqrt(degrees) tan(angle) the density of the angle is proportional to
    cos(angle)^(degrees - 1).
    """
    angle = np.linspace(0.0, math.pi / 2, 1_000_001)
    density = np.cos(angle) ** (degrees - 1)
    below = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return angle, below / below[-1]


@lru_cache(maxsize=1024)
def t_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's distribution, above one half, to 5 digits."""
    angle, below = _angles(degrees)
    return math.sqrt(degrees) * math.tan(float(np.interp(2 * probability - 1, below, angle)))


def t_below(value: float, degrees: int) -> float:
    """The probability that Student's distribution is below `value`."""
    angle, below = _angles(degrees)
    reached = float(np.interp(math.atan(abs(value) / math.sqrt(degrees)), angle, below))
    return 0.5 + math.copysign(reached / 2, value)


def t_excess(value: float, degrees: int) -> float:
    """Mean of max(0, value + T), with T of Student's distribution with 2 degrees or more."""
    log_density = (
        math.lgamma((degrees + 1) / 2)
        - math.lgamma(degrees / 2)
        - 0.5 * math.log(degrees * math.pi)
        - (degrees + 1) / 2 * math.log1p(value**2 / degrees)
    )
    tail = (degrees + value**2) / (degrees - 1) * math.exp(log_density)
    return tail + value * t_below(value, degrees)


@dataclass(frozen=True)
class Estimate:
    """A number that was measured with a normal error of unknown size.

    Attributes:
        mean: The estimate.
        error: Its standard error; None where nothing tells.
        degrees: Degrees of freedom of the standard error.
    """

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
        """This estimate plus `factor` times an independent one.

        The degrees of freedom are those of Welch and Satterthwaite, rounded down.
        """
        mean = self.mean + factor * other.mean
        if self.error is None or other.error is None:
            return Estimate(mean)
        mine, theirs = self.error**2, (factor * other.error) ** 2
        if mine + theirs == 0.0:
            return Estimate(mean, 0.0, self.degrees)
        parts = mine**2 / self.degrees + theirs**2 / other.degrees
        return Estimate(mean, math.sqrt(mine + theirs), max(int((mine + theirs) ** 2 / parts), 1))

    def reach(self, level: float) -> float:
        """How far a bound is from the mean that is wrong, on its side, with probability `level`."""
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
            return Interval(mean=self.mean)
        half = self.reach((1 - _CONFIDENCE) / 2)
        return Interval(mean=self.mean, low=self.mean - half, high=self.mean + half)

    def factor(self, widened_by: float = 0.0) -> Interval:
        """The factor whose logarithm this is, with its 95% interval.

        Args:
            widened_by: An additional relative error of unknown sign: both ends move out by it.
        """
        found = self.interval()
        if found.low is None or found.high is None:
            return Interval(mean=_exp(self.mean))
        wide = math.log1p(widened_by)
        return Interval(
            mean=_exp(self.mean), low=_exp(found.low - wide), high=_exp(found.high + wide)
        )

    def probability_below(self) -> float | None:
        """How probable it is that the number is below 0; None where nothing tells."""
        if self.error is None:
            return None
        if self.error == 0.0:
            return 1.0 if self.mean < 0.0 else 0.0
        return t_below(-self.mean / self.error, self.degrees)

    def expected_above(self) -> float | None:
        """The mean of max(0, number): what it costs to take it for 0 or less; None if unknown."""
        if self.error is None or self.degrees < 2:
            return None
        if self.error == 0.0:
            return max(0.0, self.mean)
        return self.error * t_excess(self.mean / self.error, self.degrees)


def mean_interval(values: Sequence[float]) -> Interval:
    """The mean of independent values with its 95% t-interval."""
    return Estimate.of(values).interval()


def factor_interval(logarithms: Sequence[float]) -> Interval:
    """The geometric mean of factors with its 95% interval, from their natural logarithms."""
    return Estimate.of(logarithms).factor()


def one_run(found: Interval, seeds: int) -> float | None:
    """How far a single new run may be from the mean, 95% prediction interval; None if unknown.

    Of two seeds it would be 22 times the standard deviation, which tells nobody anything.

    The interval of a mean over n seeds is t s / sqrt(n) to either side, that of one further value
    t s sqrt(1 + 1/n).
    """
    if found.low is None or found.high is None or seeds < _FEWEST_SEEDS:
        return None
    return (found.high - found.low) / 2 * math.sqrt(seeds + 1)


def _exp(logarithm: float) -> float:
    return math.exp(min(logarithm, _LARGEST_LOG))
