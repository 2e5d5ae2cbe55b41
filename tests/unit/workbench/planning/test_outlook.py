"""Failures of long runs against Daly's formula."""

import numpy as np
import pytest

from moepp_megatron.workbench.planning.outlook import best_interval, expected_goodput


@pytest.mark.parametrize(
    ("interval_s", "save_s", "restart_s", "failure_s"),
    [(1000.0, 30.0, 600.0, 17_600.0), (1200.0, 60.0, 300.0, 1_760.0)],
    ids=["rare", "often"],
)
def test_a_played_run_keeps_what_the_formula_says(interval_s, save_s, restart_s, failure_s):
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(100):
        clock = kept = 0.0
        # Failures have no memory, and may strike a restart too.
        while clock < 30 * 86400:
            up = rng.exponential(failure_s)
            kept += up // (interval_s + save_s) * interval_s
            clock += up + restart_s
            while (again := rng.exponential(failure_s)) < restart_s:
                clock += again
        shares.append(kept / clock)
    # Four standard errors; a restart that fails starts again.
    error = 4 * float(np.std(shares)) / 10
    expected = expected_goodput(interval_s, save_s, restart_s, failure_s)
    assert np.mean(shares) == pytest.approx(expected, abs=error)


def test_the_best_interval_is_the_best() -> None:
    for save_s, failure_s in ((30.0, 11_000.0), (120.0, 3_600.0), (600.0, 3_600.0)):
        best = best_interval(save_s, failure_s)
        found = expected_goodput(best, save_s, 600, failure_s)
        for other in np.linspace(0.2, 5.0, 60) * best:
            # Daly's estimate is a truncated series: within a thousandth of the optimum here.
            assert found > expected_goodput(float(other), save_s, 600, failure_s) - 1e-3
    # Young's first-order result where saving is short.
    assert best_interval(1.0, 1e8) == pytest.approx((2 * 1e8) ** 0.5, rel=1e-3)
