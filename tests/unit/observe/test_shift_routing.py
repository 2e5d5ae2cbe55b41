"""Routing and loss: what training does by itself, what a shift is about, distances."""

from __future__ import annotations

import copy
import functools
import json
import math
from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
import pytest

from moepp_megatron.config.schema.routing_guard import ShiftSection
from moepp_megatron.observe.expert_usage import ExpertUsage, difference
from moepp_megatron.observe.shift.noise import LossNoise, UsageNoise
from moepp_megatron.observe.shift.routing import RoutingDetector
from tests.unit.observe.series import EXPERTS, KINDS, LAYERS, Router, fed, routing_step

STEPS = 400
Drift = Callable[[int], Any]


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


@functools.cache
def _trained(seed: int) -> RoutingDetector:
    detector, steps = RoutingDetector(ShiftSection()), steps_of(Router.drawn(seed), seed)
    assert fed(detector, steps, 200).max() < 1.0
    return detector


def steps_of(router: Router, seed: int, **changes: Any) -> Any:
    """Steps without drift, late in a training."""
    chance = np.random.default_rng(seed)
    while True:
        yield routing_step(chance, router, **changes)


def trained(seed: int = 3) -> tuple[RoutingDetector, Router]:
    """A detector of the test's own that has seen a text for a while, without an alarm."""
    return copy.deepcopy(_trained(seed)), Router.drawn(seed)


@pytest.mark.parametrize("drift", [settling, warming_up, wandering])
@pytest.mark.parametrize("seed", [1, 2])
def test_what_training_does_to_a_router_is_no_shift(
    drift: Callable[[np.random.Generator], Drift], seed: int
) -> None:
    chance, router = np.random.default_rng(seed), Router.drawn(seed)
    detector, moves = RoutingDetector(ShiftSection()), drift(chance)
    for step in range(STEPS):
        detector.add(*routing_step(chance, router, number=step, drift=moves(step)))
        assert (detector.reading is None) == (step + 1 < 80)
        assert detector.over_limit < 1.0
    other, values = router.other(seed), []
    for step in range(STEPS, STEPS + 5):
        detector.add(*routing_step(chance, other, 1.0, step, moves(STEPS - 1)))
        values.append(detector.over_limit)
    assert max(values) > 1.0
    assert detector.reading is not None
    assert detector.reading.cause == "data"


@pytest.mark.parametrize("seed", range(3))
def test_what_moves_says_what_has_changed(seed: int) -> None:
    detector, router = trained(seed)
    assert fed(detector, steps_of(router.other(seed), seed + 10), 8).max() > 1.0
    assert detector.reading is not None
    assert detector.reading.cause == "router"
    for loss in (1.0, -1.0):
        detector, router = trained(seed)
        assert fed(detector, steps_of(router, seed + 10, loss=loss), 4).max() > 1.0
        assert detector.reading is not None
        assert detector.reading.cause == "optimizer"


@pytest.mark.parametrize("seed", range(3))
def test_a_few_sequences_of_another_text_are_a_shift(seed: int) -> None:
    """A sixth of each batch has 2.5 nats more: the mean moves little, the sequences differ."""
    detector, router = trained(seed)
    assert fed(detector, steps_of(router, seed + 10, mixed=8), 30).max() > 1.0


def test_what_has_moved_is_named() -> None:
    detector, router = trained()
    assert detector.explain() is None
    moved = copy.deepcopy(router)
    moved.base[2, 5] += 2.0
    fed(detector, steps_of(moved, 3, loss=0.5), 6)
    finding = detector.explain()
    assert finding is not None
    assert detector.reading is not None
    assert finding.cause == detector.reading.cause
    assert 4 <= finding.steps <= 6
    assert np.unravel_index(np.abs(finding.surprise).argmax(), finding.surprise.shape) == (2, 5)
    assert finding.after[2, 5] > 1.5 * finding.before[2, 5]
    assert finding.loss_after - finding.loss_before == pytest.approx(0.5, abs=0.3)
    assert finding.chance > 10_000


def test_a_state_without_spreads_equals_its_copy() -> None:
    """One sequence a step has no spread. Saving compares the ranks' states; NaN is not equal."""
    detector = RoutingDetector(ShiftSection())
    samples = [(*step[:2], math.nan) for step in islice(KINDS["routing"].steps(1), 60)]
    fed(detector, samples)
    state = detector.state_dict()
    assert state == json.loads(json.dumps(state))
    assert state["usual"][-1][-1] == [samples[-1][1], None]
    resumed = RoutingDetector(ShiftSection())
    resumed.load_state_dict(json.loads(json.dumps(state)))
    fed(resumed, samples[:1])
    fed(detector, samples[:1])
    assert resumed.state_dict() == detector.state_dict()


@pytest.mark.parametrize("changes", [{"memory": 4}, {"memory": 64}, {"span": 1}, {"window": 4}])
@pytest.mark.parametrize("seed", range(3))
def test_other_settings_on_resuming_raise_no_alarm(changes: dict[str, int], seed: int) -> None:
    detector, router = trained(seed)
    resumed = RoutingDetector(ShiftSection(**changes))
    resumed.load_state_dict(json.loads(json.dumps(detector.state_dict())))
    assert fed(resumed, steps_of(router, seed + 20), 150).max() < 1.0
    assert fed(resumed, steps_of(router.other(seed), seed + 30, loss=1.0), 6).max() > 1.0


@pytest.mark.parametrize("is_shift", [False, True])
def test_a_reference_judges_from_the_first_step_and_as_long_as_a_shift_lasts(
    is_shift: bool,
) -> None:
    detector, router = trained()
    experts = sum(step[0] for step in islice(steps_of(router, 5), 30))
    assert isinstance(experts, np.ndarray)
    after = RoutingDetector(ShiftSection(), experts, detector.noise)
    steps = steps_of(router.other(2) if is_shift else router, 6)
    values = fed(after, steps, 1)
    assert after.reading is not None
    values = np.append(values, fed(after, steps, 99))
    assert (values.max() > 1.0) == is_shift
    assert (after.reading.routing > 1.0) == is_shift


def test_steps_that_differ_by_chance_alone_are_no_shift() -> None:
    """All alike to the last token."""
    counts = np.full((LAYERS, EXPERTS), 10_000, dtype=np.int64)
    assert fed(RoutingDetector(ShiftSection()), [(counts, 0.0, 0.0)] * 150).max() < 1.0


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
        pairs = np.stack([counts[..., :8].sum(axis=-1), counts.sum(axis=-1) // 2], axis=-1)
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


def test_scores_are_spreads_of_what_was_before() -> None:
    noise, losses = UsageNoise(ShiftSection()), LossNoise(memory=40, judged=20)
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
