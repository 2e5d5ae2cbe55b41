"""How the ranks' times are compared."""

import pytest

from moepp_megatron.training.resilience.stragglers import OwnTimes


def test_slowest_rank_against_the_median() -> None:
    times = OwnTimes(own_s=[1.0, 1.2, 3.0, 0.8], wall_s=[3.5] * 4)
    assert times.slowest == 2
    assert times.ratio == pytest.approx(3.0)
    assert times.waiting_fraction == pytest.approx(1 - 6.0 / 14.0)


def test_two_ranks_are_compared_with_each_other() -> None:
    assert OwnTimes(own_s=[3.0, 1.0], wall_s=[3.0, 3.0]).ratio == pytest.approx(3.0)
