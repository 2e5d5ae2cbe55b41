"""All series of a run together: the reading after a step, and what an alert says has moved."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from moepp_megatron.config.schema.routing_guard import ShiftSection
from moepp_megatron.observe.expert_usage import ExpertUsage
from moepp_megatron.observe.shift.monitor import ShiftMonitor
from moepp_megatron.observe.shift.reading import (
    ShiftFinding,
    ShiftStory,
    moved_classes,
    moved_experts,
)
from tests.unit.observe.series import KINDS, SOURCES

NAMES = ["FFN 0", "FFN 1", "zero 0"]
STEPS = 120


def told(**texts: int) -> tuple[Any, ShiftStory]:
    """Reading and story a few steps after a shift of these series; the state is restored there."""
    chance, monitor = np.random.default_rng(1), ShiftMonitor(ShiftSection(), SOURCES)
    for number in range(STEPS + 6):
        steps = [
            KINDS[name].step(chance, number, texts.get(name, 0) if number >= STEPS else 0)
            for name in ("routing", "tokens", "source")
        ]
        reading = monitor.add(*(value for step in steps for value in step))
        if number == STEPS + 2:
            saved = json.dumps(monitor.state_dict(), allow_nan=False)
            monitor = ShiftMonitor(ShiftSection(), SOURCES)
            monitor.load_state_dict(json.loads(saved))
    assert reading is not None
    assert reading.metrics.keys() == {"routing_shift", "loss_shift", "token_shift", "source_shift"}
    assert reading.is_shift
    story = monitor.explain(lambda finding: ["layer 1"])
    assert story is not None
    assert STEPS <= STEPS + 6 - story.steps <= STEPS + 3
    return reading, story


@pytest.mark.parametrize("also", [{}, {"tokens": 1}])
def test_loss_and_routing_are_about_the_data(also: dict[str, int]) -> None:
    reading, story = told(routing=1, **also)
    assert (reading.cause, story.cause) == ("data", "data")
    assert story.chance is not None
    assert story.moved[0].startswith("loss ")
    assert story.moved[1] == "layer 1"
    assert any(line.endswith("other groups of ids") for line in story.moved) == bool(also)


def test_token_ids_and_sources_are_shifts_of_their_own() -> None:
    reading, story = told(tokens=1)
    assert (reading.cause, story.cause, story.chance) == ("data", "data", None)
    _, story = told(source=1)
    assert (story.cause, story.chance) == ("source", None)
    (line,) = story.moved
    assert line.startswith("source books: loss ")
    assert story.text(20).startswith("data of one source: its loss; since step ")
    _, story = told(tokens=1, source=1)
    assert [story.cause, *map(bool, story.moved)] == ["data", True, True]
    assert story.of_metric("token_shift") == story
    assert story.of_metric("source_shift").cause == "source"


def test_series_that_nobody_counts_are_not_judged() -> None:
    chance, monitor = np.random.default_rng(1), ShiftMonitor(ShiftSection(), SOURCES)
    readings = [monitor.add(*KINDS["routing"].step(chance, number, 0)) for number in range(80)]
    assert readings[:79] == [None] * 79
    assert readings[79] is not None
    assert readings[79].metrics.keys() == {"routing_shift", "loss_shift"}


def finding(surprise: list[list[float]]) -> ShiftFinding:
    """Two layers of three experts; the second layer's first expert has doubled."""
    before = np.array([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]])
    after = np.array([[0.5, 0.3, 0.2], [0.2, 0.5, 0.3]])
    return ShiftFinding("data", 3, 1e5, before, after, np.array(surprise), 2.0, 2.75)


def test_experts_are_named_by_how_unusual_their_change_is() -> None:
    found = finding([[0.5, -1.9, 0.0], [6.0, -3.0, 0.1]])
    assert moved_experts(found, NAMES, [2, 4]) == [
        "layer 4 FFN 0 10.0% -> 20.0%",
        "layer 4 FFN 1 60.0% -> 50.0%",
    ]
    assert moved_experts(finding([[1.0] * 3] * 2), NAMES, [2, 4]) == [], "all of it is usual"
    story = ShiftStory.of(found, ["layer 4 FFN 0 10.0% -> 20.0%"])
    assert story.text(57) == (
        "the data: loss and routing, or token ids; since step 55; loss 2.00 -> 2.75, "
        "layer 4 FFN 0 10.0% -> 20.0%"
    )


def usage(rarest_ffn: int) -> ExpertUsage:
    """A layer whose tokens make two selections each, in two positions of four classes."""
    cells = np.array([[[150, 100], [150, 100], [150, 100], [rarest_ffn, 100]] * 2])
    ffn = int(cells[0, :, 0].sum())
    return ExpertUsage(np.array([[ffn - 100, 100, 1600 - ffn]]), cells)


def test_classes_of_tokens_are_named_by_their_frequency() -> None:
    assert moved_classes([usage(150)] * 2, usage(40), [3]) == [
        "layer 3 rarest tokens 1.50 -> 0.40 FFN experts"
    ]
    assert moved_classes([usage(150)], usage(148), [3]) == []
    without = [ExpertUsage(each.experts, each.cells[:, :0]) for each in (usage(150), usage(40))]
    assert moved_classes(without[:1], without[1], [3]) == []
