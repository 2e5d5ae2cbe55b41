"""Failures of long runs against Daly's formula, and what can be assumed."""

from __future__ import annotations

import numpy as np
import pytest

from moepp_megatron.config import ConfigError
from moepp_megatron.workbench.planning.simulation.assumptions import Assumptions, parse_assumptions
from moepp_megatron.workbench.planning.simulation.faults import (
    Faults,
    best_interval,
    expected_goodput,
    play_run,
)


@pytest.mark.parametrize(
    "faults",
    [
        Faults(mtbf_hours=20_000, restart_s=600, save_s=30),
        Faults(mtbf_hours=2_000, restart_s=300, save_s=60, checkpoint_s=1200),
    ],
    ids=["rare", "often"],
)
def test_played_runs_lose_what_the_formula_says(faults: Faults) -> None:
    runs = play_run(np.random.default_rng(0), faults, 4096, step_s=5.0, days=30, runs=100)
    error = 4 * runs.share.std() / 10
    assert runs.share.mean() == pytest.approx(runs.expected, abs=error)
    parts = runs.share.mean() + runs.saving + runs.lost + runs.restarting
    assert parts == pytest.approx(1.0, abs=1e-9)
    failure_s = faults.mtbf_hours * 3600 / 4096
    assert runs.failures == pytest.approx(30 * 86400 / failure_s, rel=0.1)


def test_the_best_interval_is_the_best() -> None:
    for save_s, failure_s in ((30.0, 11_000.0), (120.0, 3_600.0), (600.0, 3_600.0)):
        best = best_interval(save_s, failure_s)
        found = expected_goodput(best, save_s, 600, failure_s)
        for other in np.linspace(0.2, 5.0, 60) * best:
            # Daly's estimate is a truncated series: within a thousandth of the optimum here.
            assert found > expected_goodput(float(other), save_s, 600, failure_s) - 1e-3
    # Young's first-order result where saving is short.
    assert best_interval(1.0, 1e8) == pytest.approx((2 * 1e8) ** 0.5, rel=1e-3)


def test_without_failures_only_checkpoints_cost() -> None:
    faults = Faults(mtbf_hours=1e12, save_s=100.0, checkpoint_s=900.0)
    runs = play_run(np.random.default_rng(0), faults, 8, step_s=1.0, days=1, runs=2)
    assert runs.failures == 0
    # 86 whole cycles of 1,000 s and 400 s of the next.
    assert runs.share == pytest.approx(np.full(2, (86 * 900 + 400) / 86400))


def test_assumptions_are_set_by_name() -> None:
    found = parse_assumptions(["mtbf_hours=1000", "leaf_nodes=16", "seed=7"])
    assert (found.faults.mtbf_hours, found.fabric.leaf_nodes, found.seed) == (1000, 16, 7)
    assert parse_assumptions([]) == Assumptions()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mtbf=1", "did you mean mtbf_hours"),
        ("nothing=1", "known are"),
        ("seed=1.5", "a whole number"),
        ("slow_nodes=2", "from 0 to 1"),
        ("restart_s=nan", "seconds from 0"),
        ("save_s", "seconds from 0"),
    ],
)
def test_other_assumptions_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_assumptions([text])
