"""Shifts of the data against what texts, routers and training do by themselves."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moepp_megatron.config.errors import ConfigError
from moepp_megatron.config.schema.routing_guard import ShiftSection
from moepp_megatron.observe.expert_usage import ExpertUsage, difference
from moepp_megatron.observe.shift import ShiftMonitor
from moepp_megatron.observe.usage_file import USAGE_FILE, StoredUsage
from moepp_megatron.observe.usage_noise import UsageNoise
from tests.unit.observe.drawn_usages import EXPERTS, FFN, LAYERS, Router

WINDOWS = 1000
# One window to compare with, four to say in which directions windows differ, the warm-up.
FIRST_JUDGED = 5 + ShiftSection().warmup
Drift = Callable[[int], Any]


def settling(chance: np.random.Generator) -> Drift:
    """A router that finds its experts in the first windows, and moves on slowly all along."""
    early, late = 2.0 * chance.standard_normal((2, LAYERS, EXPERTS))
    return lambda window: early * math.exp(-window / 30) + late * window / WINDOWS


def warming_up(chance: np.random.Generator) -> Drift:
    """One that rests while the learning rate is small, and moves faster then."""
    way = 1.5 * chance.standard_normal((LAYERS, EXPERTS))

    def moved(window: int) -> np.ndarray:
        time = min(window, 60) ** 2 / 120 + max(window - 60, 0)
        return way * (1 - math.exp(-time / 60))

    return moved


def wandering(chance: np.random.Generator) -> Drift:
    steps = 0.003 * chance.standard_normal((WINDOWS, LAYERS, EXPERTS))
    return np.cumsum(steps, axis=0).__getitem__


def resting(chance: np.random.Generator) -> Drift:
    return lambda window: 0.0


def values_of(monitor: ShiftMonitor, usages: list[ExpertUsage]) -> list[float]:
    """What is judged of them."""
    return [value for value in map(monitor.add, usages) if value is not None]


def drawn(count: int) -> list[ExpertUsage]:
    """Windows of one text."""
    chance = np.random.default_rng(1)
    router = Router.drawn(chance)
    return [router.window(chance) for _ in range(count)]


def drawn_shifted(count: int) -> list[ExpertUsage]:
    """Windows of another text, of which the same router makes something else."""
    chance = np.random.default_rng(1)
    router = shifted(Router.drawn(chance), np.random.default_rng(2))
    return [router.window(chance) for _ in range(count)]


def shifted(router: Router, chance: np.random.Generator) -> Router:
    return replace(router, base=router.base + 1.5 * chance.standard_normal((LAYERS, EXPERTS)))


@pytest.mark.parametrize(
    ("drift", "seed"),
    [
        *((resting, seed) for seed in (1, 2, 3)),
        *((settling, seed) for seed in (1, 2)),
        *((warming_up, seed) for seed in (1, 2)),
        (wandering, 1),
    ],
)
def test_no_false_alarm_in_a_thousand_windows_and_a_shift_is_found_in_the_next(
    drift: Callable[[np.random.Generator], Drift], seed: int
) -> None:
    """The same data, whatever training does to the router; then data it treats differently."""
    chance = np.random.default_rng(seed)
    router, moves = Router.drawn(chance), drift(chance)
    settings = ShiftSection()
    # One that is fixed only once the fast part of training is over, as docs say.
    monitors = [ShiftMonitor(settings), ShiftMonitor(settings.model_copy(update=LATE))]
    for window in range(WINDOWS):
        usage = router.window(chance, moves(window))
        for monitor in monitors:
            value = monitor.add(usage)
            assert (value is None) == (window < FIRST_JUDGED)
            assert value is None or value < 1.0, (window, value)
    other = shifted(router, chance)
    values = [monitor.add(other.window(chance, moves(WINDOWS - 1))) for monitor in monitors]
    assert all(value is not None and value > 1.0 for value in values), values


LATE = {"fixed_after": 3000}


def test_a_shift_lasts_until_it_is_usual_or_over() -> None:
    settings = ShiftSection()
    before, one, other = drawn(108)[:8], drawn(108)[8:], drawn_shifted(100)
    reference = sum(before[1:], before[0])
    monitor, fixed = ShiftMonitor(settings), ShiftMonitor(settings, reference)
    for each in (monitor, fixed):
        assert max(values_of(each, one[:60])) < 1.0
        # A short one leaves no trace.
        assert min(values_of(each, other[:5])) > 1.0
        assert max(values_of(each, one[60:])) < 1.0
    patience = settings.span + settings.lag
    values = [monitor.add(usage) for usage in other]
    assert all(value is not None and value > 1.0 for value in values[:patience])
    # From then on the new data is what is usual; the noise is learnt anew.
    num_learnt = values[patience:].count(None)
    assert num_learnt == 4 + settings.warmup
    later = [value for value in values[patience + num_learnt :] if value is not None]
    assert len(later) == len(other) - patience - num_learnt
    assert max(later) < 1.0
    assert min(values_of(monitor, one[:5])) > 1.0
    assert min(values_of(fixed, other)) > 1.0


@pytest.mark.parametrize("changes", [{}, LATE | {"fixed_after": 200}])
def test_a_monitor_that_was_saved_goes_on_to_the_bit(changes: dict[str, Any]) -> None:
    settings = ShiftSection(**changes)
    # Stops while it warms up, while it judges, within a shift.
    usages = [*drawn(60), *drawn_shifted(45)]
    whole = ShiftMonitor(settings)
    expected = [whole.add(usage) for usage in usages]
    assert any(value is not None and value > 1.0 for value in expected)
    for stop in (0, 1, 7, 25, 63):
        first, second = ShiftMonitor(settings), ShiftMonitor(settings)
        values = [first.add(usage) for usage in usages[:stop]]
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        values += [second.add(usage) for usage in usages[stop:]]
        assert values == expected
        assert second.state_dict() == whole.state_dict()


def test_a_reference_from_a_file_judges_the_first_window(tmp_path: Path) -> None:
    settings = ShiftSection()
    before = ShiftMonitor(settings)
    one, other = drawn(80), drawn_shifted(3)
    values_of(before, one[:60])
    assert before.newest is not None
    StoredUsage(before.newest, "0123", before.noise).write(tmp_path)
    stored = StoredUsage.read(tmp_path / USAGE_FILE, settings)
    assert stored.token_classes == "0123"
    assert stored.noise.as_json() == before.noise.as_json()
    assert not difference(stored.usage, before.newest).any()
    for usages, is_shift in ((one[60:], False), (other, True)):
        stored = StoredUsage.read(tmp_path / USAGE_FILE, settings)
        after = ShiftMonitor(settings, stored.usage, stored.noise)
        values = [after.add(usage) for usage in usages]
        assert [value is not None and value > 1.0 for value in values] == [is_shift] * len(values)


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
    noise = UsageNoise(ShiftSection(memory=8))
    known = 3.0 * chance.standard_normal((10, 5))
    for row in known:
        noise.learn(row, None)
    kept = np.round(known[-8:], 6)
    covariance = kept.T @ kept / 8
    ridge = np.trace(covariance) / 5
    x = chance.standard_normal(5)
    expected = x @ np.linalg.solve(covariance + ridge * np.eye(5), x) / 5
    distance = noise.log_distance(x)
    assert distance is not None
    assert math.exp(distance) == pytest.approx(expected, rel=1e-9)


def test_windows_that_differ_by_chance_alone_are_no_shift() -> None:
    """All alike, and then one that differs by as much as chance would make it."""
    monitor = ShiftMonitor(ShiftSection())
    counts = np.full((LAYERS, EXPERTS), 10_000, dtype=np.int64)
    cells = np.zeros((LAYERS, 0, 2), dtype=np.int64)
    assert max(values_of(monitor, [ExpertUsage(counts, cells)] * 50)) < 1.0


GOOD: dict[str, Any] = {
    "format": "moepp routing profile 1",
    "experts": [[3, 5]],
    "cells": [[[2, 4]]],
    "token_classes": "00",
    "noise": {"differences": [[0.5, 0.25, 1.0]], "log_distances": [0.5]},
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
        ({"noise": {"differences": [[0.5, 0.25]], "log_distances": []}}, "noise"),
        ({"noise": {"differences": [[0.5, 0.25, "a"]], "log_distances": []}}, "noise"),
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


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_files_that_are_no_json_object_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / USAGE_FILE
    path.write_bytes(content)
    for name in (path, tmp_path, tmp_path / "missing"):
        with pytest.raises(ConfigError, match="routing_guard.shift.reference"):
            StoredUsage.read(name, ShiftSection())
