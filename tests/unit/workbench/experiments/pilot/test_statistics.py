"""Student's t, estimates, the pooled model and the looks."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest

from moepp_megatron.workbench.experiments.pilot import schedule
from moepp_megatron.workbench.experiments.pilot.pooled import PooledLosses
from moepp_megatron.workbench.experiments.pilot.statistics import (
    Estimate,
    factor_interval,
    mean_interval,
    t_below,
    t_excess,
    t_quantile,
)


# Student's t table, two-sided 95%.
@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.7062), (2, 4.30265), (4, 2.77645), (29, 2.04523), (100, 1.98397)],
)
def test_t_quantiles(degrees: int, quantile: float) -> None:
    # 5 digits are promised, 6 are in the table.
    assert t_quantile(0.975, degrees) == pytest.approx(quantile, rel=2e-5)
    assert t_below(quantile, degrees) == pytest.approx(0.975, abs=1e-6)
    assert t_below(-quantile, degrees) == pytest.approx(0.025, abs=1e-6)


@pytest.mark.parametrize("degrees", [2, 5, 20])
@pytest.mark.parametrize("value", [-3.0, -0.4, 0.0, 1.5])
def test_excess_is_the_mean_of_what_is_above_0(degrees: int, value: float) -> None:
    # The mean of max(0, value + T) is the integral of P(value + T > x) over x > 0.
    x = np.concatenate([np.linspace(0, 20, 2001), np.geomspace(20.01, 1e5, 2000)])
    above = np.array([t_below(value - each, degrees) for each in x])
    assert t_excess(value, degrees) == pytest.approx(
        float(np.trapezoid(above, x)), rel=1e-3, abs=1e-4
    )


def test_interval_of_three() -> None:
    found = mean_interval([1.0, 2.0, 3.0])
    half = 4.30265 / math.sqrt(3)
    assert found.mean == 2.0
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half), rel=2e-5)


def test_one_value_has_no_interval() -> None:
    assert mean_interval([1.5]).model_dump() == {"mean": 1.5, "low": None, "high": None}
    alone = Estimate.of([0.0])
    assert alone.factor(widened_by=0.1).high is None
    assert (alone.sign(0.4), alone.probability_below(), alone.expected_above()) == (0, None, None)


def test_factors_are_symmetric_in_logarithms_and_widened_at_both_ends() -> None:
    plain = factor_interval([0.1, 0.2, 0.3])
    assert plain.mean == pytest.approx(math.exp(0.2))
    assert plain.low is not None
    assert plain.high is not None
    assert plain.low * plain.high == pytest.approx(plain.mean**2)
    wide = Estimate.of([0.1, 0.2, 0.3]).factor(widened_by=0.07)
    assert (wide.low, wide.high) == pytest.approx((plain.low / 1.07, plain.high * 1.07))


def test_a_hopeless_factor_is_large_but_finite() -> None:
    assert math.isfinite(factor_interval([1e6]).mean)


def test_the_sum_of_two_estimates() -> None:
    found = Estimate(1.0, 0.3, 8).plus(Estimate(2.0, 0.4, 4), factor=2.0)
    assert found.mean == 5.0
    assert found.error == pytest.approx(math.hypot(0.3, 0.8))
    # Welch and Satterthwaite: 0.73^2 / (0.09^2 / 8 + 0.64^2 / 4) = 5.15.
    assert found.degrees == 5
    assert Estimate(1.0, 0.3, 8).plus(Estimate(2.0)).error is None


def test_seeds_cancel_and_every_arm_tells_of_the_noise() -> None:
    # Two arms: the pooled model is the paired t-test.
    one, other = {1: 4.0, 2: 5.0, 3: 6.5}, {1: 3.9, 2: 4.95, 3: 6.35}
    pair = PooledLosses({"a": one, "b": other}).difference("a", "b")
    paired = Estimate.of([one[seed] - other[seed] for seed in one])
    assert (pair.mean, pair.error) == pytest.approx((paired.mean, paired.error))
    assert pair.degrees == paired.degrees == 2
    more = PooledLosses({"a": one, "b": other, "c": {1: 4.2, 2: 5.2, 3: 6.7}})
    assert more.difference("a", "b").mean == pytest.approx(pair.mean)
    assert more.difference("a", "b").degrees == 4


def test_a_single_seed_has_no_noise() -> None:
    alone = PooledLosses({"a": {1: 4.0}, "b": {1: 3.9}}).difference("a", "b")
    assert (alone.mean, alone.error) == (pytest.approx(0.1), None)


def test_a_contrast_of_several_arms() -> None:
    random = np.random.default_rng(0)
    table = {name: dict(enumerate(random.normal(4, 0.1, 4))) for name in "abc"}
    pooled = PooledLosses(table)
    found = pooled.contrast({"a": 1.0, "b": -0.5, "c": -0.5})
    means = {name: statistics.fmean(values.values()) for name, values in table.items()}
    assert found.mean == pytest.approx(means["a"] - (means["b"] + means["c"]) / 2)
    assert pooled.noise is not None
    assert found.error == pytest.approx(pooled.noise * math.sqrt(1.5 / 4))


def test_all_looks_and_arms_together_spend_no_more_than_the_level() -> None:
    for arms in (1, 2, 5):
        spent = sum(arms * schedule.level(look, arms) for look in range(1, 50))
        assert spent <= schedule.LEVEL
        assert spent == pytest.approx(schedule.LEVEL)
    assert [schedule.look_of(seeds, 5) for seeds in (4, 5, 9, 10)] == [0, 1, 1, 2]
