"""The robust z-score, and what is told of batches that it refuses now and then."""

import json

import torch

from moepp_megatron.config.schema import ResilienceSection
from moepp_megatron.training.resilience.numerical_guard import NumericalGuard, robust_z_score
from moepp_megatron.training.step_sums import StepSums


def test_spikes_in_the_window_do_not_hide_the_next_one() -> None:
    calm = [2.0 + 0.01 * (i % 7) for i in range(40)]
    assert robust_z_score(9.0, [*calm, 50.0, 60.0, 70.0]) > 100


def test_equal_losses_leave_room_for_rounding() -> None:
    assert robust_z_score(2.0 * (1 + 1e-6), [2.0] * 20) < 1
    assert robust_z_score(2.2, [2.0] * 20) > 10


def _told(guard: NumericalGuard, losses: list[float]) -> list[str]:
    """What is told of these batches, of those that are refused."""
    found = []
    for loss in losses:
        if guard.refuses(StepSums(loss, 1.0, loss, 1.0), torch.tensor([loss, 1.0])):
            guard.note_refused(torch.ones(1, 2, dtype=torch.float64))
            found.append(guard.many_refused())
    return found


def test_batches_refused_now_and_then_are_told_once_they_are_many() -> None:
    settings = ResilienceSection(guard_window=32, guard_max_consecutive_skips=3)
    guard = NumericalGuard(settings)
    calm = [2.0 + 0.01 * (i % 7) for i in range(12)]
    seldom = [9.0, *calm, *calm[:3]]
    assert _told(guard, calm) == []
    # Two in any 32 batches are few.
    assert _told(guard, seldom * 4) == [""] * 4
    assert _told(guard, calm * 3) == []
    assert _told(guard, [9.0, *calm, 9.0, *calm]) == ["", ""]
    again = NumericalGuard(settings)
    again.load(json.loads(json.dumps(guard.state())))
    for each in (guard, again):
        (told,) = _told(each, [9.0])
        assert told.startswith("3 of the newest 32 batches refused, not all in a row (loss 9.0000")
        # Counted anew after that.
        assert _told(each, [*calm, 9.0, 9.0]) == ["", ""]


def test_batches_refused_in_a_row_are_no_batches_refused_now_and_then() -> None:
    guard = NumericalGuard(ResilienceSection(guard_window=32, guard_max_consecutive_skips=3))
    assert _told(guard, [2.0] * 12 + [9.0] * 3) == [""] * 3
    guard.forget_refused()
    assert _told(guard, [2.0, 9.0]) == [""]
