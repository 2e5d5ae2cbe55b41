"""Means over seeds with their 95% t-intervals, and what follows for further seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from moepp_megatron.workbench.experiments.pilot.result import Interval

_CONFIDENCE = 0.95
# Beyond it the exponential overflows; a factor of this size is no number to decide by anyway.
_LARGEST_LOG = 700.0
# Nobody repeats a pilot more often to learn what is this close.
MAX_SEEDS = 20
# With which a spread is worth going by.
_FEWEST_SEEDS = 3


@lru_cache(maxsize=64)
def t_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's distribution, above one half, to 5 digits.

    With t = sqrt(degrees) tan(angle) the density of the angle is proportional to
    cos(angle)^(degrees - 1).
    """
    angle = np.linspace(0.0, math.pi / 2, 1_000_001)
    density = np.cos(angle) ** (degrees - 1)
    below = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    reached = np.interp(2 * probability - 1, below / below[-1], angle)
    return math.sqrt(degrees) * math.tan(float(reached))


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half the width of its 95% t-interval (None for less than two values)."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    error = statistics.stdev(values) / math.sqrt(len(values))
    return mean, t_quantile((1 + _CONFIDENCE) / 2, len(values) - 1) * error


def mean_interval(values: Sequence[float]) -> Interval:
    """The same as an `Interval`."""
    mean, half = interval(values)
    if half is None:
        return Interval(mean=mean)
    return Interval(mean=mean, low=mean - half, high=mean + half)


def factor_interval(logarithms: Sequence[float], widened_by: float = 0.0) -> Interval:
    """The geometric mean of factors, from their logarithms, on whose scale the interval is.

    Args:
        logarithms: Natural logarithms; one per seed.
        widened_by: An additional relative error, common to all seeds and of unknown sign: both ends
            move out by this factor.
    """
    mean, half = interval(logarithms)
    if half is None:
        return Interval(mean=_exp(mean))
    half += math.log1p(widened_by)
    return Interval(mean=_exp(mean), low=_exp(mean - half), high=_exp(mean + half))


def ratio_of_means(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """For each seed, a value such that their t-interval is that of the ratio of both means.

    A ratio taken seed by seed explodes where one seed's denominator is small by chance. This is
    the ratio of the means r, linearised (the delta method): r + (n_i - r d_i) / mean(d). The
    values' mean is r, and their spread holds what both means are uncertain by, paired.

    Args:
        numerators: One per seed.
        denominators: One per seed, for the same seeds; their mean is not 0.
    """
    below = statistics.fmean(denominators)
    ratio = statistics.fmean(numerators) / below
    return [ratio + (n - ratio * d) / below for n, d in zip(numerators, denominators, strict=True)]


def seeds_to_decide(found: Interval | None, seeds: int) -> int | None:
    """Seeds with which the interval of a ratio would end before 1, if mean and spread stayed.

    Args:
        found: A ratio that it does not tell from 1; None gives None.
        seeds: That it is from.

    Returns:
        At least one more than `seeds`, or None: more than `MAX_SEEDS`, or no spread to go by.
    """
    if found is None or found.low is None or found.high is None:
        return None
    if not 2 <= seeds < MAX_SEEDS:
        return None
    if not 0 < found.low <= found.mean <= found.high < math.inf:
        return None
    spread = math.log(found.high / found.low) / 2 / _reach(seeds)
    for more in range(seeds + 1, MAX_SEEDS + 1):
        if spread * _reach(more) < abs(math.log(found.mean)):
            return more
    return None


def one_run(found: Interval, seeds: int) -> float | None:
    """How far a single new run may be from the mean, 95% prediction interval; None if unknown.

    Of two seeds it would be 22 times the standard deviation, which tells nobody anything.

    The interval of a mean over n seeds is t s / sqrt(n) to either side, that of one further value
    t s sqrt(1 + 1/n).
    """
    if found.low is None or found.high is None or seeds < _FEWEST_SEEDS:
        return None
    return (found.high - found.low) / 2 * math.sqrt(seeds + 1)


def _reach(seeds: int) -> float:
    """Half of a mean's interval over the standard deviation of a single value."""
    return t_quantile((1 + _CONFIDENCE) / 2, seeds - 1) / math.sqrt(seeds)


def _exp(logarithm: float) -> float:
    return math.exp(min(logarithm, _LARGEST_LOG))
