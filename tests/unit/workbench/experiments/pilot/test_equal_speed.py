"""MoE++ against the vanilla model of its speed."""

from __future__ import annotations

import pytest

from moepp_megatron.workbench.experiments.pilot.equal_speed import equal_speed, standing
from tests.unit.workbench.experiments.pilot.synthetic import seeds

SLOW = seeds([4.0, 4.1, 4.2], [2.0, 2.2, 2.0])
FAST = seeds([5.0, 5.1, 5.2], [1.0, 1.2, 1.0])
VANILLA = {"vanilla": SLOW, "vanilla top-1": FAST}


def test_loss_is_interpolated_by_step_time_seed_by_seed() -> None:
    # A quarter, half and three quarters of the way from the faster to the slower.
    mine = seeds([4.5, 4.5, 4.5], [1.25, 1.7, 1.75])
    found = equal_speed("mine", mine, VANILLA)
    assert (found.slower, found.faster, found.enclosed) == ("vanilla", "vanilla top-1", True)
    assert found.weight == pytest.approx(0.5)
    rivals = [4.75, 4.6, 4.45]
    assert found.loss_difference.mean == pytest.approx(4.5 - sum(rivals) / 3)
    assert standing(found, 1.5, 2.0) == "open"


def test_a_seed_outside_of_both_takes_the_nearer_one() -> None:
    mine = seeds([4.0, 4.0, 4.0], [1.5, 1.1, 1.5])
    found = equal_speed("mine", mine, VANILLA)
    assert not found.enclosed
    assert found.weight == pytest.approx(1 / 3)
    assert found.loss_difference.mean == pytest.approx(4.0 - (4.5 + 5.1 + 4.7) / 3)


@pytest.mark.parametrize(
    ("losses", "time", "expected", "says"),
    [
        # Slower than all and worse: says something; slower and better: does not.
        ([4.3, 4.41, 4.5], 3.0, "vanilla", "worse"),
        ([3.7, 3.81, 3.9], 3.0, "vanilla", None),
        # Faster than all: the other way round.
        ([5.3, 5.41, 5.5], 0.5, "vanilla top-1", None),
        ([4.7, 4.81, 4.9], 0.5, "vanilla top-1", "better"),
    ],
)
def test_outside_of_all_speeds(
    losses: list[float], time: float, expected: str, says: str | None
) -> None:
    found = equal_speed("mine", seeds(losses, [time] * 3), VANILLA)
    assert (found.slower, found.faster, found.enclosed) == (expected, expected, False)
    other = 2.1 if expected == "vanilla" else 1.1
    assert standing(found, time, other) == says


def test_arms_that_noise_has_put_the_other_way_round() -> None:
    # By their means vanilla is slower; in the first seed it was faster.
    vanilla = {"vanilla": seeds([4.0, 4.0], [1.0, 3.0]), "top": seeds([5.0, 5.0], [1.2, 1.2])}
    found = equal_speed("mine", seeds([4.5, 4.5], [1.5, 1.5]), vanilla)
    assert not found.enclosed
    assert found.weight == pytest.approx((0.5 + 0.3 / 1.8) / 2)


def test_a_single_seed_decides_nothing() -> None:
    found = equal_speed("mine", {1: seeds([9.0], [1.5])[1]}, {"vanilla": SLOW, "top": FAST})
    assert standing(found, 1.5, 2.0) == "open"
