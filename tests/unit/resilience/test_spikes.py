"""The robust z-score."""

from __future__ import annotations

import random

import pytest

from moepp_megatron.training.resilience.numerical_guard import robust_z_score


def test_normal_noise_is_measured_in_standard_deviations() -> None:
    chance = random.Random(1)
    recent = [chance.gauss(3.0, 0.1) for _ in range(4000)]
    # Both the median and the MAD are estimates: good to a few hundredths at this size.
    assert robust_z_score(3.5, recent) == pytest.approx(5.0, abs=0.3)
    assert robust_z_score(2.5, recent) == pytest.approx(-5.0, abs=0.3)


def test_spikes_in_the_window_do_not_hide_the_next_one() -> None:
    calm = [2.0 + 0.01 * (i % 7) for i in range(40)]
    assert robust_z_score(9.0, [*calm, 50.0, 60.0, 70.0]) > 100


def test_equal_losses_leave_room_for_rounding() -> None:
    assert robust_z_score(2.0 * (1 + 1e-6), [2.0] * 20) < 1
    assert robust_z_score(2.2, [2.0] * 20) > 10
