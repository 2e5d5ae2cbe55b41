"""Intervals over seeds."""

from __future__ import annotations

import math

import pytest

from moepp_megatron.workbench.experiments.pilot.statistics import (
    factor_interval,
    mean_interval,
    ratio_of_means,
    t_quantile,
)


# Student's t table, two-sided 95%.
@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.7062), (2, 4.30265), (4, 2.77645), (29, 2.04523), (100, 1.98397)],
)
def test_t_quantiles(degrees: int, quantile: float) -> None:
    # 5 digits are promised, 6 stand in the table.
    assert t_quantile(0.975, degrees) == pytest.approx(quantile, rel=2e-5)


def test_interval_of_three() -> None:
    found = mean_interval([1.0, 2.0, 3.0])
    half = 4.30265 / math.sqrt(3)
    assert found.mean == 2.0
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half), rel=2e-5)


def test_one_seed_has_no_interval() -> None:
    assert mean_interval([1.5]).model_dump() == {"mean": 1.5, "low": None, "high": None}
    assert factor_interval([0.0], widened_by=0.1).high is None


def test_factors_are_symmetric_in_logarithms_and_widened_at_both_ends() -> None:
    plain = factor_interval([0.1, 0.2, 0.3])
    assert plain.mean == pytest.approx(math.exp(0.2))
    assert plain.low is not None
    assert plain.high is not None
    assert plain.low * plain.high == pytest.approx(plain.mean**2)
    wide = factor_interval([0.1, 0.2, 0.3], widened_by=0.07)
    assert (wide.low, wide.high) == pytest.approx((plain.low / 1.07, plain.high * 1.07))


def test_a_hopeless_factor_is_large_but_finite() -> None:
    assert math.isfinite(factor_interval([1e6]).mean)


def test_ratio_of_means_where_one_denominator_is_small_by_chance() -> None:
    tops, bottoms = [0.02, 0.03, 0.01], [0.2, 0.001, 0.099]
    found = ratio_of_means(tops, bottoms)
    assert sum(found) / 3 == pytest.approx(0.02 / 0.1)
    # Seed by seed the second ratio would be 30.
    assert max(found) < 1
    # Exact where every seed has the same ratio: nothing is uncertain.
    assert ratio_of_means([0.02, 0.04], [0.1, 0.2]) == pytest.approx([0.2, 0.2])
