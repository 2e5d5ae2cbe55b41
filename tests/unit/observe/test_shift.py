"""Shifts of the data against what texts, routers and training do by themselves."""

from __future__ import annotations

import copy
import functools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moepp_megatron.config.errors import ConfigError
from moepp_megatron.config.schema.routing_guard import ShiftSection
from moepp_megatron.file_names import USAGE_FILE
from moepp_megatron.observe.cusum import Cusum, limit_for, steps_of_chance
from moepp_megatron.observe.expert_usage import ExpertUsage, difference
from moepp_megatron.observe.shift import ShiftMonitor
from moepp_megatron.observe.shift_reading import ShiftReading
from moepp_megatron.observe.usage_file import StoredUsage
from moepp_megatron.observe.usage_noise import LossNoise, UsageNoise
from tests.unit.observe.drawn_usages import EXPERTS, FFN, LAYERS, Router

STEPS = 400
FIRST_JUDGED = 80
Drift = Callable[[int], Any]
Sample = tuple[np.ndarray, float, float]


def settling(chance: np.random.Generator) -> Drift:
    """A router that finds its experts in the first steps, and moves on slowly all along."""
    early, late = 2.0 * chance.standard_normal((2, LAYERS, EXPERTS))
    return lambda step: early * math.exp(-step / 60) + late * step / 2000


def warming_up(chance: np.random.Generator) -> Drift:
    """One that rests while the learning rate is small, and moves faster then."""
    way = 1.5 * chance.standard_normal((LAYERS, EXPERTS))

    def moved(step: int) -> np.ndarray:
        time = min(step, 60) ** 2 / 120 + max(step - 60, 0)
        return way * (1 - math.exp(-time / 120))

    return moved


def wandering(chance: np.random.Generator) -> Drift:
    steps = 0.003 * chance.standard_normal((STEPS, LAYERS, EXPERTS))
    return np.cumsum(steps, axis=0).__getitem__


def resting(chance: np.random.Generator) -> Drift:
    return lambda step: 0.0


@dataclass
class Text:
    """Steps of a training on one text.

    Attributes:
        router: What it makes of the text.
        loss: Loss above that of the first text, nats.
    """

    router: Router
    loss: float = 0.0

    def step(self, chance: np.random.Generator, number: int, drift: Any = 0.0) -> Sample:
        """Selections, loss and its spread; sequences differ with heavy tails, as texts do."""
        profile = self.router.window(chance, drift)
        sequences = 0.6 * chance.standard_t(5, size=48) + 3.0 + self.loss
        sequences += 4.0 * math.exp(-number / 100)
        return profile.experts, float(sequences.mean()), float(sequences.std(ddof=1))

    def steps(self, seed: int) -> Iterator[Sample]:
        """Steps without drift, late in a training."""
        chance = np.random.default_rng(seed)
        while True:
            yield self.step(chance, 10_000)


def text_of(seed: int) -> Text:
    return Text(Router.drawn(np.random.default_rng(seed)))


def other_than(text: Text, seed: int, loss: float = 0.0) -> Text:
    """A text that the same router makes something else of."""
    chance = np.random.default_rng(seed)
    base = text.router.base + 1.5 * chance.standard_normal((LAYERS, EXPERTS))
    return Text(replace(text.router, base=base), loss)


def fed(monitor: ShiftMonitor, samples: Iterator[Sample], count: int) -> list[ShiftReading | None]:
    return [monitor.add(*sample) for sample in islice(samples, count)]


def highest(readings: list[ShiftReading | None]) -> float:
    """The largest of what was judged."""
    return max(max(r.routing, r.loss) for r in readings if r is not None)


def delay(readings: list[ShiftReading | None]) -> int:
    """Steps until the first alarm."""
    alarms = [r is not None and max(r.routing, r.loss) > 1.0 for r in readings]
    return alarms.index(True) + 1 if True in alarms else 10**9


@functools.cache
def _trained(seed: int) -> ShiftMonitor:
    monitor = ShiftMonitor(ShiftSection())
    assert highest(fed(monitor, text_of(seed).steps(seed), 200)) < 1.0
    return monitor


def trained(seed: int = 3) -> tuple[ShiftMonitor, Text]:
    """A monitor of the test's own that has seen a text for a while, without an alarm."""
    return copy.deepcopy(_trained(seed)), text_of(seed)


@pytest.mark.parametrize("drift", [resting, settling, warming_up, wandering])
@pytest.mark.parametrize("seed", [1, 2])
def test_no_false_alarm_and_another_text_is_told_within_five_steps(
    drift: Callable[[np.random.Generator], Drift], seed: int
) -> None:
    """The same data, whatever training does to the router; then data it treats differently."""
    chance = np.random.default_rng(seed)
    text, monitor = text_of(seed), ShiftMonitor(ShiftSection())
    moves = drift(chance)
    readings = [monitor.add(*text.step(chance, step, moves(step))) for step in range(STEPS)]
    assert [r is None for r in readings] == [step + 1 < FIRST_JUDGED for step in range(STEPS)]
    assert highest(readings) < 1.0
    other = other_than(text, seed, loss=1.0)
    later = [monitor.add(*other.step(chance, STEPS + step, moves(STEPS - 1))) for step in range(5)]
    assert delay(later) <= 5
    assert later[-1] is not None
    assert later[-1].cause == "data"


@pytest.mark.parametrize("seed", range(3))
def test_what_moves_says_what_has_changed(seed: int) -> None:
    monitor, text = trained(seed)
    readings = fed(monitor, other_than(text, seed).steps(seed + 10), 8)
    assert delay(readings) <= 8
    assert readings[-1] is not None
    assert readings[-1].cause == "router"
    for loss in (1.0, -1.0):
        monitor, text = trained(seed)
        readings = fed(monitor, Text(text.router, loss).steps(seed + 10), 4)
        assert delay(readings) <= 4
        assert readings[-1] is not None
        assert readings[-1].cause == "optimizer"


@pytest.mark.parametrize("seed", range(3))
def test_a_few_sequences_of_another_text_are_told(seed: int) -> None:
    """A sixth of each batch has 2.5 nats more: the mean moves little, the sequences differ."""
    monitor, text = trained(seed)
    chance = np.random.default_rng(seed + 10)
    readings = []
    for _ in range(30):
        experts, _, _ = text.step(chance, 10_000)
        sequences = 0.6 * chance.standard_t(5, size=48) + 3.0
        sequences[:8] += 2.5
        spread = float(sequences.std(ddof=1))
        readings.append(monitor.add(experts, float(sequences.mean()), spread))
    assert delay(readings) <= 30


def test_a_single_odd_batch_is_no_shift() -> None:
    monitor, text = trained()
    readings = fed(monitor, other_than(text, 2, loss=3.0).steps(3), 1)
    readings += fed(monitor, text.steps(4), 60)
    assert highest(readings) < 1.0


def test_a_shift_lasts_until_it_is_usual_or_over() -> None:
    monitor, text = trained()
    other = other_than(text, 2, loss=1.0)
    assert delay(fed(monitor, other.steps(3), 10)) <= 5
    # A short one leaves no trace.
    samples = text.steps(4)
    fed(monitor, samples, 40)
    assert highest(fed(monitor, samples, 60)) < 1.0
    # One that stays is usual after as many steps as are remembered.
    samples = other.steps(5)
    values = fed(monitor, samples, 60)
    assert delay(values) <= 5
    alarms = [r is not None and max(r.routing, r.loss) > 1.0 for r in values]
    assert all(alarms[5:58])
    assert highest(fed(monitor, samples, 100)) < 1.0
    assert delay(fed(monitor, text.steps(6), 10)) <= 5


def test_what_has_moved_is_named() -> None:
    monitor, text = trained()
    assert monitor.explain() is None
    base = text.router.base.copy()
    base[2, 5] += 2.0
    moved = Text(replace(text.router, base=base), 0.5)
    readings = fed(monitor, moved.steps(3), 6)
    finding = monitor.explain()
    assert finding is not None
    assert finding.reading == readings[-1]
    assert 4 <= finding.steps <= 6
    assert np.unravel_index(np.abs(finding.surprise).argmax(), finding.surprise.shape) == (2, 5)
    assert finding.after[2, 5] > 1.5 * finding.before[2, 5]
    assert finding.loss_after - finding.loss_before == pytest.approx(0.5, abs=0.3)
    assert finding.chance > 10_000


@pytest.mark.parametrize("changes", [{}, {"fixed_after": 200}])
def test_a_monitor_that_was_saved_goes_on_to_the_bit(changes: dict[str, Any]) -> None:
    settings = ShiftSection(**changes)
    text = text_of(1)
    # Stops while it warms up, while it judges, within a shift.
    samples = [*islice(text.steps(1), 220), *islice(other_than(text, 2, 1.0).steps(3), 100)]
    whole = ShiftMonitor(settings)
    expected = [whole.add(*sample) for sample in samples]
    assert highest(expected) > 1.0
    monitor, values = ShiftMonitor(settings), []
    for step, sample in enumerate(samples):
        if step in (0, 1, 40, 90, 224):
            saved = json.dumps(monitor.state_dict())
            monitor = ShiftMonitor(settings)
            monitor.load_state_dict(json.loads(saved))
        values.append(monitor.add(*sample))
    assert values == expected
    assert monitor.state_dict() == whole.state_dict()


def test_a_state_without_spreads_equals_its_copy() -> None:
    """One sequence a step has no spread. Saving compares the ranks' states; NaN is not equal."""
    monitor, text = ShiftMonitor(ShiftSection()), text_of(1)
    samples = [(experts, loss) for experts, loss, _ in islice(text.steps(1), 60)]
    for sample in samples:
        monitor.add(*sample)
    state = monitor.state_dict()
    assert state == json.loads(json.dumps(state))
    assert state["usual"][-1][-1] == [samples[-1][1], None]
    resumed = ShiftMonitor(ShiftSection())
    resumed.load_state_dict(json.loads(json.dumps(state)))
    assert resumed.add(*samples[0]) == monitor.add(*samples[0])


@pytest.mark.parametrize("changes", [{"memory": 4}, {"memory": 64}, {"span": 1}, {"window": 4}])
@pytest.mark.parametrize("seed", range(3))
def test_other_settings_on_resuming_raise_no_alarm(changes: dict[str, int], seed: int) -> None:
    monitor, text = trained(seed)
    resumed = ShiftMonitor(ShiftSection(**changes))
    resumed.load_state_dict(json.loads(json.dumps(monitor.state_dict())))
    assert highest(fed(resumed, text.steps(seed + 20), 150)) < 1.0
    assert delay(fed(resumed, other_than(text, seed, 1.0).steps(seed + 30), 10)) <= 6


def test_a_state_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="no state"):
        ShiftMonitor(ShiftSection()).load_state_dict({"usual": []})


def test_a_reference_from_a_file_judges_from_the_first_steps(tmp_path: Path) -> None:
    settings = ShiftSection()
    monitor, text = trained()
    one = list(islice(text.steps(5), 60))
    experts = sum(sample[0] for sample in one[:30])
    profile = ExpertUsage(experts, np.zeros((LAYERS, 0, 2), dtype=np.int64))
    StoredUsage(profile, "0123", monitor.noise).write(tmp_path)
    for samples, is_shift in ((one[30:], False), (islice(other_than(text, 2).steps(6), 30), True)):
        stored = StoredUsage.read(tmp_path / USAGE_FILE, settings)
        assert stored.token_classes == "0123"
        assert stored.noise.as_json() == monitor.noise.as_json()
        after = ShiftMonitor(settings, stored.usage.experts, stored.noise)
        readings = [after.add(*sample) for sample in samples]
        assert readings[0] is not None
        assert (highest(readings) > 1.0) == is_shift
        # As long as it lasts.
        assert readings[-1] is not None
        assert (readings[-1].routing > 1.0) == is_shift


def test_evidence_adds_up_and_is_forgotten() -> None:
    cusum = Cusum(limit=8.0)
    for deviation in (3.0, -9.0, 2.5, 100.0):
        cusum.add(deviation)
    # 2, then 0; of the fourth 6 count at most; 1 is usual in each step.
    assert cusum.evidence == 1.5 + 5.0
    assert cusum.over_limit == 6.5 / 8.0
    for _ in range(9):
        cusum.add(6.0)
    assert cusum.evidence == 12.0, "the end of a long change is told soon"
    again = Cusum(limit=8.0)
    again.load(json.loads(json.dumps(cusum.state())))
    assert again.state() == cusum.state()
    for left in (11.5, 11.0, 10.5, 0.0):
        again.add(0.5)
        assert again.evidence == left
    assert steps_of_chance(limit_for(5000.0)) == pytest.approx(5000.0)
    assert limit_for(1e6) > limit_for(1e4) > 5.0


def test_difference_is_what_it_says() -> None:
    """Against its definition, number by number, with an empty cell and an idle expert."""
    experts = np.array([[[30, 50, 20, 0]], [[60, 10, 20, 10]]])
    cells = np.array([[[[60, 40], [20, 10]]], [[[40, 25], [0, 0]]]])
    one = ExpertUsage(experts[0], cells[0])
    other = ExpertUsage(2 * experts[1], 4 * cells[1])
    shares = [(0.3, 0.6), (0.5, 0.1), (0.2, 0.2), (0.0, 0.1)]
    expected = [(p**0.5 - q**0.5) * 2 / (1 / 100 + 1 / 200) ** 0.5 for p, q in shares]
    # Two selections a token: 60 of 80 go to FFN experts in the one, 160 of 200 in the other.
    angle = math.asin(0.75**0.5) - math.asin(0.8**0.5)
    expected += [angle * 2 / (1 / 80 + 1 / 200) ** 0.5, 0.0]
    assert difference(one, other) == pytest.approx(expected, rel=1e-12)
    assert difference(other, one) == pytest.approx([-value for value in expected], rel=1e-12)
    assert not difference(one, one + one).any()
    with pytest.raises(ValueError, match="shapes"):
        difference(one, ExpertUsage(one.experts, one.cells[:, :1]))


@pytest.mark.parametrize("cells", [0, 6])
def test_chance_alone_makes_a_mean_square_of_one(cells: int) -> None:
    """For windows of any sizes."""
    chance = np.random.default_rng(5)
    shares = chance.dirichlet(np.full(EXPERTS, 5.0), size=LAYERS)

    def made(tokens: int) -> ExpertUsage:
        counts = chance.multinomial(tokens, shares, size=(max(cells, 1), LAYERS)).transpose(1, 0, 2)
        pairs = np.stack([counts[..., :FFN].sum(axis=-1), counts.sum(axis=-1) // 2], axis=-1)
        return ExpertUsage(counts.sum(axis=1), pairs[:, :cells])

    for sizes in ((4000, 4000), (4000, 40000)):
        values = [np.square(difference(*map(made, sizes))).mean() for _ in range(200)]
        # Of each layer's numbers one is not free. Standard errors are below 2%.
        expected = 1 - 1 / (EXPERTS + cells)
        assert np.mean(values) == pytest.approx(expected, abs=0.06)


def test_distance_is_that_of_mahalanobis_with_a_ridge() -> None:
    chance = np.random.default_rng(4)
    noise = UsageNoise(ShiftSection(memory=4))
    known = 3.0 * chance.standard_normal((45, 5))
    for row in known:
        noise.learn(row, None)
    kept = np.round(known[-40:], 6)
    covariance = kept.T @ kept / 40
    ridge = np.trace(covariance) / 5
    x = chance.standard_normal(5)
    expected = x @ np.linalg.solve(covariance + ridge * np.eye(5), x) / 5
    distance = noise.log_distance(x)
    assert distance is not None
    assert math.exp(distance) == pytest.approx(expected, rel=1e-9)


def test_steps_that_differ_by_chance_alone_are_no_shift() -> None:
    """All alike to the last token."""
    monitor = ShiftMonitor(ShiftSection())
    counts = np.full((LAYERS, EXPERTS), 10_000, dtype=np.int64)
    assert highest([monitor.add(counts, 0.0, 0.0) for _ in range(150)]) < 1.0


def test_scores_are_spreads_of_what_was_before() -> None:
    noise, losses = UsageNoise(ShiftSection()), LossNoise(ShiftSection())
    for value in range(19):
        noise.learn(np.ones(3), float(value % 3))
        losses.learn(0.1 * (value % 3 - 1))
    assert noise.score(5.0) is None
    noise.learn(np.ones(3), 0.0)
    losses.learn(0.1)
    # Median 1 and 1.4826 times the median deviation of 1; of the losses 0 and 0.1 of that.
    assert noise.score(1.0 + 1.4826) == pytest.approx(1.0)
    assert losses.score(0.14826) == pytest.approx(1.0)
    assert losses.score(math.nan) is None
    assert noise.deviations().tolist() == [1.0, 1.0, 1.0]


GOOD: dict[str, Any] = {
    "format": "moepp routing profile 2",
    "experts": [[3, 5]],
    "cells": [[[2, 4]]],
    "token_classes": "00",
    "noise": {"differences": [[0.5, 0.25]], "log_distances": [0.5]},
}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": "other"}, "format"),
        ({"experts": None}, "experts"),
        ({"experts": [[3, -5]]}, "experts"),
        ({"experts": [[3, 5.5]]}, "experts"),
        ({"experts": [[3, 5], [1]]}, "experts"),
        ({"experts": [[10**19, 5]]}, "experts"),
        ({"cells": [[[2, 4]], [[2, 4]]]}, "cells"),
        ({"cells": [[2, 4]]}, "cells"),
        ({"token_classes": "0x"}, "token_classes"),
        ({"noise": {"differences": [[0.5, 0.25, 1.0]], "log_distances": []}}, "noise"),
        ({"noise": {"differences": [[0.5, "a"]], "log_distances": []}}, "noise"),
        ({"noise": {"differences": [], "log_distances": [float("nan")]}}, "noise"),
        ({"noise": {"differences": [], "log_distances": [[1.0]]}}, "noise"),
        ({"noise": {"differences": []}}, "noise"),
        ({"noise": 3}, "noise"),
    ],
)
def test_bad_files_are_refused(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    path = tmp_path / USAGE_FILE
    path.write_text(json.dumps(GOOD))
    StoredUsage.read(path, ShiftSection())
    path.write_text(json.dumps(GOOD | changes))
    with pytest.raises(ConfigError, match=reason) as error:
        StoredUsage.read(path, ShiftSection())
    assert "routing_guard.shift.reference" in str(error.value)
    assert "\n" not in str(error.value)
    without = {name: value for name, value in GOOD.items() if name not in changes}
    path.write_text(json.dumps(without))
    with pytest.raises(ConfigError, match=reason):
        StoredUsage.read(path, ShiftSection())


def test_a_file_of_an_older_version_gives_its_profile(tmp_path: Path) -> None:
    """Its noise is of windows."""
    path = tmp_path / USAGE_FILE
    noise = {"differences": [[0.5, 0.25, 1.0]], "log_distances": [0.5]}
    path.write_text(json.dumps(GOOD | {"format": "moepp routing profile 1", "noise": noise}))
    stored = StoredUsage.read(path, ShiftSection())
    assert stored.usage.experts.tolist() == GOOD["experts"]
    assert stored.noise.as_json() == {"differences": [], "log_distances": []}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_files_that_are_no_json_object_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / USAGE_FILE
    path.write_bytes(content)
    for name in (path, tmp_path, tmp_path / "missing"):
        with pytest.raises(ConfigError, match="routing_guard.shift.reference"):
            StoredUsage.read(name, ShiftSection())
