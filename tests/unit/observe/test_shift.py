"""What the detectors of all kinds of series have in common."""

from __future__ import annotations

import json
from itertools import islice
from typing import Any

import numpy as np
import pytest

from moepp_megatron.config.schema.routing_guard import ShiftSection
from moepp_megatron.observe.shift.detector import Cusum, limit_for, steps_of_chance
from tests.unit.observe.series import KINDS, Kind, fed

MEMORY = ShiftSection().memory * ShiftSection().window


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


def first_alarm(values: np.ndarray) -> int:
    """Steps until it, counted from 1."""
    return int(np.argmax(values > 1.0)) + 1 if (values > 1.0).any() else 10**9


@pytest.mark.parametrize("seed", range(3))
def test_usual_steps_are_no_shift_and_other_data_are_within_five(kind: Kind, seed: int) -> None:
    detector = kind.detector(ShiftSection())
    usual = fed(detector, kind.steps(seed), 300)
    assert not (usual > 1.0).any()
    assert detector.steps == 0
    assert not (usual[: kind.first_judged - 1] > 0.0).any()
    assert first_alarm(fed(detector, kind.steps(seed, text=seed + 1, first=300), 5)) <= 5
    assert 0 < detector.steps <= 5 + 4


def test_a_single_odd_step_is_no_shift(kind: Kind) -> None:
    detector, usual = kind.trained(1), kind.steps(2, first=200)
    values = fed(detector, kind.steps(1, text=2, first=200), 1)
    assert not (np.append(values, fed(detector, usual, 60)) > 1.0).any()


def test_what_has_lasted_is_usual_and_the_way_back_is_a_shift(kind: Kind) -> None:
    detector = kind.trained(1)
    values = fed(detector, kind.steps(1, text=2, first=200), MEMORY + 120)
    first = first_alarm(values)
    assert first <= 5
    assert (values[first : MEMORY - 3] > 1.0).all()
    assert not (values[MEMORY + 20 :] > 1.0).any()
    assert detector.steps == 0
    assert first_alarm(fed(detector, kind.steps(3, first=400), 10)) <= 10


def test_a_shift_that_ends_leaves_no_trace(kind: Kind) -> None:
    detector, usual = kind.trained(1), kind.steps(2, first=200)
    assert first_alarm(fed(detector, kind.steps(1, text=2, first=200), 10)) <= 5
    fed(detector, usual, 40)
    assert not (fed(detector, usual, 60) > 1.0).any()
    assert first_alarm(fed(detector, kind.steps(4, text=2, first=310), 5)) <= 5


@pytest.mark.parametrize("changes", [{}, {"fixed_after": 200}])
def test_a_saved_state_continues_to_the_bit(kind: Kind, changes: dict[str, Any]) -> None:
    settings = ShiftSection(**changes)
    # Stops before there is a line, while it judges, within a shift, and once it is usual.
    steps = [*islice(kind.steps(1), 205), *islice(kind.steps(1, text=2, first=205), 90)]
    whole, parts = kind.detector(settings), kind.detector(settings)
    expected, values = fed(whole, steps), []
    assert (expected[205:] > 1.0).any()
    for number, step in enumerate(steps):
        if number in (0, 1, 40, 90, 208, 280):
            saved = json.dumps(parts.state_dict(), allow_nan=False)
            parts = kind.detector(settings)
            parts.load_state_dict(json.loads(saved))
        values.append(fed(parts, [step]))
    assert np.array_equal(np.concatenate(values), expected, equal_nan=True)
    assert parts.state_dict() == whole.state_dict()


def test_fewer_false_alarms_need_more_evidence(kind: Kind) -> None:
    found = []
    for false_alarm_steps in (1_000.0, 10_000.0, 1_000_000.0):
        detector = kind.trained(1, 150, false_alarm_steps=false_alarm_steps)
        found.append(fed(detector, kind.steps(1, text=2, first=150), 2)[-1])
    assert found[0] > found[1] > found[2] > 0.0


def test_a_state_of_something_else_is_refused() -> None:
    with pytest.raises(ValueError, match="no state"):
        KINDS["routing"].detector(ShiftSection()).load_state_dict({"usual": []})


def test_evidence_adds_up_and_is_forgotten() -> None:
    cusum = Cusum(limit=8.0)
    for deviation in (3.0, -9.0, 2.5, 100.0):
        cusum.add(deviation)
    # 2, then 0; of the fourth 6 count at most; 1 is usual in each step.
    assert cusum.evidence == 1.5 + 5.0
    assert cusum.over_limit == 6.5 / 8.0
    for _ in range(9):
        cusum.add(6.0)
    assert cusum.evidence == 12.0, "the end of a long change is reported soon"
    again = Cusum(limit=8.0)
    again.load(json.loads(json.dumps(cusum.state())))
    assert again.state() == cusum.state()
    for left in (11.5, 11.0, 10.5, 0.0):
        again.add(0.5)
        assert again.evidence == left
    assert steps_of_chance(limit_for(5000.0)) == pytest.approx(5000.0)
    assert limit_for(1e6) > limit_for(1e4) > 5.0
