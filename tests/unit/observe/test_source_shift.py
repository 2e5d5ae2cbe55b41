"""A data source that turns bad, against what losses of sources do by themselves."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from moepp_megatron.config.schema.routing_guard import ShiftSection
from moepp_megatron.observe.source_shift import SourceShift

NAMES = ("web", "books", "code")
SHARES = (0.77, 0.2, 0.03)
SEQUENCES, LENGTH, STEPS = 64, 128, 300


def losses(
    chance: np.random.Generator, step: int, above: dict[str, float] | None = None
) -> np.ndarray:
    """[sources, 2] of a step: falling losses of sequences that differ with heavy tails."""
    counts = chance.multinomial(SEQUENCES, SHARES)
    rows = []
    for name, count in zip(NAMES, counts, strict=True):
        means = 3.0 + 4.0 * math.exp(-step / 80) + 0.5 * chance.standard_t(5, size=count)
        means += (above or {}).get(name, 0.0)
        rows.append([means.sum() * LENGTH, float(count * LENGTH)])
    return np.array(rows)


def watched(seed: int, steps: int = STEPS) -> tuple[SourceShift, np.ndarray, np.random.Generator]:
    chance = np.random.default_rng([seed, 3])
    monitor = SourceShift(ShiftSection(), NAMES)
    values = [monitor.add(losses(chance, step)) for step in range(steps)]
    return monitor, np.array(values), chance


@pytest.mark.parametrize("seed", range(10))
def test_a_small_source_is_told_by_name_and_nothing_else_is(seed: int) -> None:
    monitor, values, chance = watched(seed)
    assert np.isnan(values[:30]).all()
    assert (values[80:] <= 1.0).all()
    assert monitor.moved() == []
    assert monitor.steps == 0
    for step in range(STEPS, STEPS + 25):
        if monitor.add(losses(chance, step, {"code": 2.0})) > 1.0:
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
        monitor.add(losses(chance, step, {"books": -1.5}))
    assert [line.split(":")[0] for line in monitor.moved()] == ["source books"]


def test_fewer_tokens_are_weaker_evidence() -> None:
    """The same loss, by a sixteenth of the tokens."""
    found = []
    for share in (1.0, 1.0 / 16.0):
        monitor, _, chance = watched(2)
        step = losses(chance, STEPS)
        tokens = step[1, 1] * share
        step[1] = [4.0 * tokens, tokens]
        found.append(monitor.add(step))
    assert found[0] > 2.0 * found[1]


def test_a_source_without_tokens_says_nothing() -> None:
    monitor, values, chance = watched(3)
    state = monitor.state_dict()
    value = monitor.add(np.zeros((3, 2)))
    assert value == values[-1]
    assert monitor.state_dict()["courses"] == state["courses"]
    assert math.isnan(SourceShift(ShiftSection(), NAMES).add(np.zeros((3, 2))))


def test_what_has_lasted_is_usual() -> None:
    monitor, _, chance = watched(4)
    values = [monitor.add(losses(chance, STEPS + step, {"web": 1.0})) for step in range(140)]
    assert max(values[:10]) > 1.0
    assert max(values[100:]) < 1.0
    assert monitor.moved() == []


def test_a_state_goes_on_to_the_bit() -> None:
    chance = np.random.default_rng(5)
    whole, parts = (SourceShift(ShiftSection(), NAMES) for _ in range(2))
    for step in range(160):
        row = losses(chance, step, {"code": 3.0} if step > 120 else None)
        state: Any = json.loads(json.dumps(parts.state_dict(), allow_nan=False))
        parts = SourceShift(ShiftSection(), NAMES)
        parts.load_state_dict(state)
        found, expected = parts.add(row), whole.add(row)
        assert found == expected or (math.isnan(found) and math.isnan(expected))
        assert parts.moved() == whole.moved()
    assert parts.state_dict() == whole.state_dict()
    assert whole.moved()
    # Another blend: what it shares with the one before goes on.
    other = SourceShift(ShiftSection(), ("code", "new"))
    other.load_state_dict(whole.state_dict())
    assert [line.split(":")[0] for line in other.moved()] == ["source code"]


def test_more_sources_need_more_evidence_each() -> None:
    """So that all of them together raise as few false alarms."""
    few, many = (SourceShift(ShiftSection(), [str(i) for i in range(n)]) for n in (2, 40))
    for monitor, number in ((few, 2), (many, 40)):
        chance = np.random.default_rng(6)
        for step in range(122):
            one = losses(chance, step, {"web": 0.0 if step < 120 else 0.5})[0]
            monitor.add(np.tile(one, (number, 1)))
    assert few.over_limit > many.over_limit > 0.0
