"""A data source that turns bad, against what losses of sources do by themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moepp_megatron.config.schema.routing_guard import ShiftSection
from moepp_megatron.observe.shift.losses import SourceShift
from tests.unit.observe.series import SOURCES, fed, source_step

STEPS = 300


def watched(seed: int, steps: int = STEPS) -> tuple[SourceShift, np.ndarray, np.random.Generator]:
    chance, monitor = np.random.default_rng([seed, 3]), SourceShift(ShiftSection(), SOURCES)
    values = fed(monitor, ((source_step(chance, step),) for step in range(steps)))
    return monitor, values, chance


@pytest.mark.parametrize("seed", range(10))
def test_a_small_source_is_named_and_nothing_else_is(seed: int) -> None:
    monitor, values, chance = watched(seed)
    assert np.isnan(values[:30]).all()
    assert (values[80:] <= 1.0).all()
    assert (monitor.moved(), monitor.steps) == ([], 0)
    for step in range(STEPS, STEPS + 25):
        if monitor.add(source_step(chance, step, {"code": 2.0})) > 1.0:
            break
    assert monitor.over_limit > 1.0
    (line,) = monitor.moved()
    assert line.startswith("source code: loss ")
    before, after = (float(part) for part in line.removeprefix("source code: loss ").split(" -> "))
    assert 0.5 < after - before < 4.0
    assert 0 < monitor.steps <= step - STEPS + 1 + 4


def test_a_loss_that_falls_is_a_shift_too() -> None:
    monitor, _, chance = watched(1)
    for step in range(STEPS, STEPS + 10):
        monitor.add(source_step(chance, step, {"books": -1.5}))
    assert [line.split(":")[0] for line in monitor.moved()] == ["source books"]
    # Another blend: what it shares with the one before continues.
    other = SourceShift(ShiftSection(), ("books", "new"))
    other.load_state_dict(monitor.state_dict())
    assert [line.split(":")[0] for line in other.moved()] == ["source books"]


def test_fewer_tokens_are_weaker_evidence() -> None:
    """The same loss, by a sixteenth of the tokens."""
    found = []
    for share in (1.0, 1.0 / 16.0):
        monitor, _, chance = watched(2)
        step = source_step(chance, STEPS)
        tokens = step[1, 1] * share
        step[1] = [4.0 * tokens, tokens]
        found.append(monitor.add(step))
    assert found[0] > 2.0 * found[1]


def test_a_source_without_tokens_says_nothing() -> None:
    monitor, values, _ = watched(3)
    state = monitor.state_dict()
    assert monitor.add(np.zeros((3, 2))) == values[-1]
    assert monitor.state_dict()["courses"] == state["courses"]
    assert math.isnan(SourceShift(ShiftSection(), SOURCES).add(np.zeros((3, 2))))


def test_a_state_of_an_older_version_continues() -> None:
    """Its steps are number, loss and tokens, and its residuals one list."""
    new, _, chance = watched(4, 120)
    state = new.state_dict()
    for course in state["courses"]:
        (course["residuals"],) = course.pop("loss_noises")
        for name in ("usual", "apart"):
            course[name] = [[number, *loss, *tokens] for number, _, tokens, loss in course[name]]
    old = SourceShift(ShiftSection(), SOURCES)
    old.load_state_dict(state)
    for step in range(120, 140):
        row = source_step(chance, step, {"web": 1.0})
        assert old.add(row) == new.add(row)
    assert old.state_dict() == new.state_dict()
    assert old.moved()


def test_more_sources_need_more_evidence_each() -> None:
    """So that all of them together raise as few false alarms."""
    few, many = (SourceShift(ShiftSection(), [str(i) for i in range(n)]) for n in (2, 40))
    for monitor, number in ((few, 2), (many, 40)):
        chance = np.random.default_rng(6)
        for step in range(122):
            one = source_step(chance, step, {"web": 0.0 if step < 120 else 0.5})[0]
            monitor.add(np.tile(one, (number, 1)))
    assert few.over_limit > many.over_limit > 0.0
