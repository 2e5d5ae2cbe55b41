"""Jumps of the loss, and what is reported of batches that are refused now and then."""

import json
import math
import random

import pytest
import torch

from moepp_megatron.config.schema import ResilienceSection
from moepp_megatron.training.resilience.numerical_guard import NumericalGuard, _first_non_finite
from moepp_megatron.training.step_sums import StepSums

SETTINGS = ResilienceSection(guard_max_consecutive_skips=3)


def _refuses(guard, loss):
    return guard.refuses(StepSums(loss, 1.0, loss, 1.0), torch.tensor([loss, 1.0]))


def _told(guard, losses):
    """Return the alerts about these batches, of those that are refused."""
    found = []
    for loss in losses:
        if _refuses(guard, loss):
            guard.note_refused(torch.ones(1, 2, dtype=torch.float64))
            found.append(guard.many_refused())
    return found


@pytest.mark.parametrize(("steps", "jump"), [(30, 4.2), (60, 3.0), (150, 2.0), (400, 1.2)])
def test_a_jump_is_one_in_the_descent_too(steps, jump):
    """The losses of before are higher than a jump now."""
    chance = random.Random(steps)
    guard = NumericalGuard(ResilienceSection())
    losses = [3.0 + 4.0 * math.exp(-step / 50) + chance.gauss(0.0, 0.1) for step in range(steps)]
    assert not any(_refuses(guard, loss) for loss in losses)
    usual = 3.0 + 4.0 * math.exp(-steps / 50)
    assert not _refuses(guard, usual + 0.4)
    assert _refuses(guard, usual + jump)
    assert "spreads above its course" in guard.last_reason
    # A better loss is no jump.
    assert not _refuses(guard, usual - 2.0)


def test_a_damaged_model_is_not_sound_because_its_loss_is_no_jump():
    """Batches from before that are nearer to the refused ones than to what they were."""
    guard = NumericalGuard(ResilienceSection())
    calm = [3.5 + 0.14 * math.sin(1.7 * i) for i in range(60)]
    assert not any(_refuses(guard, loss) for loss in calm)
    expected = guard._course.expected()[0]
    spread = 1.0 / (guard._course.distance(expected + 1.0, 20) or math.nan)
    assert not guard.is_sound(expected + 9.4 * spread)
    assert guard.is_sound(expected + 4.0 * spread)
    assert not _refuses(guard, expected + 9.4 * spread)


def test_refused_jumps_do_not_hide_the_next_one():
    guard = NumericalGuard(ResilienceSection())
    calm = [2.0 + 0.01 * (i % 7) for i in range(40)]
    assert not any(_refuses(guard, loss) for loss in calm)
    assert all(_refuses(guard, loss) for loss in (50.0, 9.0, 4.0))


def test_losses_that_hardly_differ_leave_room():
    guard = NumericalGuard(ResilienceSection())
    assert not any(_refuses(guard, 2.0) for _ in range(60))
    assert not _refuses(guard, 2.2)
    assert _refuses(guard, 2.4)


def test_accepted_data_are_what_is_usual():
    guard = NumericalGuard(SETTINGS)
    assert _told(guard, [2.0 + 0.1 * (i % 3) for i in range(40)]) == []
    assert _told(guard, [6.0, 6.1, 6.0]) == [""] * 3
    guard.accept_refused()
    assert not any(_refuses(guard, loss) for loss in (6.1, 5.9, 5.8))
    assert _refuses(guard, 9.0)


def test_a_batch_without_tokens_to_learn_from_says_so_and_is_no_fault():
    """It is not trained on, and however many come, no cause is sought."""
    guard = NumericalGuard(SETTINGS)
    for _ in range(5):
        assert guard.refuses(StepSums(math.nan, 0.0, 0.0, 0.0), torch.zeros(2))
        assert "none of its tokens has a loss" in guard.last_reason
        assert not guard.note_refused(torch.ones(1, 2, dtype=torch.float64))
    assert guard.refused == []


def test_batches_refused_now_and_then_are_told_once_they_are_many():
    guard = NumericalGuard(SETTINGS)
    calm = [2.0 + 0.01 * (i % 7) for i in range(70)]
    assert _told(guard, calm) == []
    # Two in any 128 batches are few.
    assert _told(guard, [9.0, *calm] * 4) == [""] * 4
    assert _told(guard, calm * 2) == []
    assert _told(guard, [9.0, *calm[:20], 9.0, *calm[:20]]) == ["", ""]
    again = NumericalGuard(SETTINGS)
    again.load(json.loads(json.dumps(guard.state())))
    for each in (guard, again):
        (told,) = _told(each, [9.0])
        assert told.startswith("3 of the newest 128 batches refused, not all in a row (loss 9.0000")
        # Counted anew after that.
        assert _told(each, [*calm, 9.0, 9.0]) == ["", ""]


def test_batches_refused_in_a_row_are_no_batches_refused_now_and_then():
    guard = NumericalGuard(SETTINGS)
    assert _told(guard, [2.0] * 40 + [9.0] * 3) == [""] * 3
    guard.forget_refused()
    assert _told(guard, [2.0, 9.0]) == [""]


def test_the_parameter_that_is_not_finite_is_named():
    """Or else the one whose gradient is not."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    assert _first_non_finite([model]) is None
    model[1].weight.main_grad = torch.full((2, 2), math.inf)
    assert _first_non_finite([model]) == "gradient of 1.weight is not finite"
    with torch.no_grad():
        model[0].bias[1] = math.nan
    assert _first_non_finite([model]) == "parameter 0.bias is not finite"
