"""Student's t, estimates, the pooled model and the looks."""

import math
import statistics

import numpy as np
import pytest

from moepp_megatron.tools.experiments.statistics import (
    Estimate,
    Interval,
    PooledLosses,
    t_below,
    t_quantile,
)


# Student's t table, two-sided 95%.
@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.7062), (2, 4.30265), (4, 2.77645), (29, 2.04523), (100, 1.98397)],
)
def test_t_quantiles(degrees, quantile):
    # The table has six digits.
    assert t_quantile(0.975, degrees) == pytest.approx(quantile, rel=2e-6)
    assert t_quantile(0.025, degrees) == pytest.approx(-quantile, rel=2e-6)


@pytest.mark.parametrize("degrees", [1, 2, 3, 6, 7, 401])
def test_probabilities_are_the_integral_of_the_density(degrees):
    x = np.linspace(0.0, 2.5, 200_001)
    norm = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)
    density = np.exp(norm - (degrees + 1) / 2 * np.log1p(x**2 / degrees))
    inside = float(np.trapezoid(density / math.sqrt(degrees * math.pi), x))
    # Of the trapezoidal rule.
    assert t_below(2.5, degrees) == pytest.approx(0.5 + inside, abs=1e-9)
    assert t_below(-2.5, degrees) == pytest.approx(0.5 - inside, abs=1e-9)
    assert t_quantile(t_below(2.5, degrees), degrees) == pytest.approx(2.5, rel=1e-9)


def test_intervals_of_three_and_of_one():
    found = Estimate.of([1.0, 2.0, 3.0]).interval()
    half = 4.30265 / math.sqrt(3)
    assert found.mean == 2.0
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half), rel=2e-5)
    alone = Estimate.of([1.5])
    assert alone.interval() == Interval(1.5)
    assert alone.factor().high is None
    assert alone.sign(0.4) == 0


def test_factors_are_symmetric_in_logarithms():
    plain = Estimate.of([0.1, 0.2, 0.3]).factor()
    assert plain.mean == pytest.approx(math.exp(0.2))
    assert plain.low is not None
    assert plain.high is not None
    assert plain.low * plain.high == pytest.approx(plain.mean**2)
    assert math.isfinite(Estimate.of([1e6]).factor().mean)


def test_the_sum_of_two_estimates():
    found = Estimate(1.0, 0.3, 8).plus(Estimate(2.0, 0.4, 4), factor=2.0)
    assert found.mean == 5.0
    assert found.error == pytest.approx(math.hypot(0.3, 0.8))
    # Welch and Satterthwaite: 0.73^2 / (0.09^2 / 8 + 0.64^2 / 4) = 5.15.
    assert found.degrees == 5
    assert Estimate(1.0, 0.3, 8).plus(Estimate(2.0)).error is None


def test_seeds_cancel_and_every_arm_tells_of_the_noise():
    # Two arms: the pooled model is the paired t-test.
    one, other = {1: 4.0, 2: 5.0, 3: 6.5}, {1: 3.9, 2: 4.95, 3: 6.35}
    pair = PooledLosses({"a": one, "b": other}).difference("a", "b")
    paired = Estimate.of([one[seed] - other[seed] for seed in one])
    assert (pair.mean, pair.error) == pytest.approx((paired.mean, paired.error))
    assert pair.degrees == paired.degrees == 2
    more = PooledLosses({"a": one, "b": other, "c": {1: 4.2, 2: 5.2, 3: 6.7}})
    assert more.difference("a", "b").mean == pytest.approx(pair.mean)
    assert more.difference("a", "b").degrees == 4
    alone = PooledLosses({"a": {1: 4.0}, "b": {1: 3.9}}).difference("a", "b")
    assert (alone.mean, alone.error) == (pytest.approx(0.1), None)


def test_a_contrast_of_several_arms():
    random = np.random.default_rng(0)
    table = {name: dict(enumerate(random.normal(4, 0.1, 4))) for name in "abc"}
    pooled = PooledLosses(table)
    found = pooled.contrast({"a": 1.0, "b": -0.5, "c": -0.5})
    means = {name: statistics.fmean(values.values()) for name, values in table.items()}
    assert found.mean == pytest.approx(means["a"] - (means["b"] + means["c"]) / 2)
    assert pooled.noise is not None
    assert found.error == pytest.approx(pooled.noise * math.sqrt(1.5 / 4))
