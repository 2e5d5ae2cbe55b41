"""What rules compare a step with: running means that a fault must not become part of."""

import json
import math
from typing import Any

import numpy as np
import pytest

from moepp_megatron.observe.past import Past


def fed(past: Past, steps: int, share: float, grad_norm: float = 1.0, loss: float = 3.0) -> Any:
    """What is found in the last of so many steps of two layers, of which the second is at rest."""
    found: Any = None
    for _ in range(steps):
        found = past.add([share, 0.6], grad_norm, loss)
    return found


def test_a_fallen_share_is_compared_with_what_was_before_for_long() -> None:
    past = Past(2)
    assert all(map(math.isnan, fed(past, 40, 0.6)["ffn_to_past"]))
    assert fed(past, 1, 0.6)["ffn_to_past"] == pytest.approx([1.0, 1.0])
    assert fed(past, 1, 0.06)["ffn_to_past"] == pytest.approx([0.1, 1.0])
    # Still a fall after a hundred steps; usual in the end, as a router may have settled there.
    assert fed(past, 100, 0.06)["ffn_to_past"][0] < 0.15
    assert fed(past, 5000, 0.06)["ffn_to_past"][0] == pytest.approx(1.0, abs=0.01)


def test_slow_changes_are_followed() -> None:
    past = Past(2)
    lowest = 1.0
    for step in range(400):
        found: Any = past.add([0.9 * 0.5 ** (step / 100), 0.6], 1.0, 3.0)
        if step > 40:
            lowest = min(lowest, found["ffn_to_past"][0])
    assert lowest > 0.8


def test_a_grown_gradient_is_told_and_a_step_without_one_changes_nothing() -> None:
    past = Past(2)
    fed(past, 60, 0.6)
    assert math.isnan(fed(past, 1, 0.6, grad_norm=math.nan)["grad_norm_to_past"])
    assert fed(past, 5, 0.6, grad_norm=20.0)["grad_norm_to_past"] > 10.0


@pytest.mark.parametrize("seed", range(3))
def test_a_plateau_is_a_large_share_of_the_run_without_a_new_lowest_loss(seed: int) -> None:
    chance = np.random.default_rng(seed)

    def highest(loss: Any) -> float:
        past = Past(1)
        values: list[Any] = [
            past.add([0.6], 1.0, loss(step) + 0.1 * chance.standard_normal())["loss_plateau"]
            for step in range(1000)
        ]
        assert all(map(math.isnan, values[:199]))
        return max(values[199:])

    # As a loss falls, by a power of the steps; and one that rests from step 100 on.
    assert highest(lambda step: 2.0 + 5.0 * (step + 1) ** -0.3) < 0.4
    assert highest(lambda step: max(7.0 - 0.02 * step, 5.0)) > 0.5


def test_a_state_goes_on_to_the_bit() -> None:
    chance = np.random.default_rng(1)
    steps = [(chance.random(2).tolist(), *chance.random(2).tolist()) for _ in range(300)]
    whole = Past(2)
    expected = [whole.add(*step) for step in steps]
    for cut in (1, 50, 250):
        before = Past(2)
        head = [before.add(*step) for step in steps[:cut]]
        after = Past(2, json.loads(json.dumps(before.state())))
        values = [*head, *(after.add(*step) for step in steps[cut:])]
        assert json.dumps(values) == json.dumps(expected)
    assert Past(3, whole.state()).state()["count"] == 0


def test_a_state_without_numbers_equals_its_copy_and_one_with_nan_is_read() -> None:
    """Saving compares the ranks' states; those of before held NaN, which is not equal."""
    empty = Past(2)
    empty.add([math.nan, 0.6], math.nan, math.nan)
    state = empty.state()
    assert state == json.loads(json.dumps(state))
    assert state["mean"] == [None, 0.6, None, None]
    assert state["lowest"] is None
    old = {**state, "mean": [math.nan, 0.6, math.nan, math.nan], "lowest": math.nan}
    found, expected = [fed(Past(2, each), 60, 0.5) for each in (old, state)]
    assert found == expected
    assert found["ffn_to_past"][0] == pytest.approx(1.0)
