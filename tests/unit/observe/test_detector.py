"""The detector of one series: what it finds, what it leaves alone, where it begins anew."""

import json
import math

import numpy as np
import pytest

from moepp_megatron.observe.shift.detector import CHARTS, Detector

EXPERTS, SELECTIONS = 12, 6000
SHARES = np.arange(1.0, EXPERTS + 1) / np.arange(1.0, EXPERTS + 1).sum()


def falling(chance, step):
    """A loss that falls as in training, with batch noise."""
    return np.array([3.0 + 3.0 * math.exp(-step / 60) + chance.normal(0.0, 0.1)]), 1.0


def routed(shares):
    """[3 layers x experts] square roots of counted shares; batches differ more than tokens do."""

    def course(chance, step):
        noise = np.exp(chance.normal(0.0, 0.05, size=(3, EXPERTS)))
        layers = [chance.multinomial(SELECTIONS, p / p.sum()) for p in shares * noise]
        return np.sqrt(np.concatenate(layers) / SELECTIONS), 0.5 / math.sqrt(SELECTIONS)

    return course


def detector(kind):
    return Detector(CHARTS[kind], 10_000.0, 3 if kind == "routing" else 1)


def evidence(judge, course, steps, seed):
    chance = np.random.default_rng(seed)
    return [judge.add(*course(chance, step)) for step in steps]


@pytest.mark.parametrize(("kind", "course"), [("loss", falling), ("routing", routed(SHARES))])
def test_usual_steps_are_no_change(kind, course):
    judged = 0
    for seed in range(6):
        found = evidence(detector(kind), course, range(400), seed)
        assert all(math.isnan(each) for each in found[: CHARTS[kind].warmup - 1])
        known = [each for each in found if not math.isnan(each)]
        assert max(known) < 1.0, seed
        judged += len(known)
    assert judged > 1800


@pytest.mark.parametrize("layers", [3, 1])
def test_another_routing_is_found_at_once(layers):
    """Of all layers and of one."""
    other = np.tile(SHARES, (3, 1))
    other[:layers] = SHARES[::-1]
    for seed in range(5):
        judge = detector("routing")
        evidence(judge, routed(SHARES), range(150), seed)
        found = evidence(judge, routed(other), range(4), seed)
        assert max(found) > 1.0, seed
        assert judge.is_suspect
        assert judge.peak > 1.5


@pytest.mark.parametrize(("jump", "within"), [(1.0, 5), (0.4, 8)])
def test_a_loss_that_leaves_its_course_is_found(jump, within):
    """The smaller is four spreads of a batch, of which no step counts in full."""
    for sign in (1.0, -1.0):
        judge = detector("loss")
        evidence(judge, falling, range(150), 1)
        chance = np.random.default_rng(2)
        steps = [falling(chance, 150 + step)[0] + sign * jump for step in range(within)]
        assert max(judge.add(step) for step in steps) > 1.0


def test_one_odd_step_is_no_change():
    judge = detector("loss")
    evidence(judge, falling, range(150), 3)
    found = judge.add(np.array([9.0]))
    assert max([found, *evidence(judge, falling, range(150, 160), 4)]) < 1.0


def test_after_a_new_beginning_the_next_change_is_found_too():
    """The baseline begins anew with the step; 10 steps later all is judged as before."""
    judge = detector("loss")
    evidence(judge, falling, range(150), 5)
    higher = [np.array([6.0 + 0.1 * math.sin(7.0 * step)]) for step in range(30)]
    first = next(step for step in higher if judge.add(step) > 1.0)
    judge.reset_baseline(first)
    found = [judge.add(step) for step in higher]
    assert math.isnan(found[0])
    assert not math.isnan(found[-1])
    assert max(each for each in found if not math.isnan(each)) < 1.0
    assert max(judge.add(step + 2.0) for step in higher[:5]) > 1.0


def test_distance_is_in_spreads_from_the_course():
    judge = detector("loss")
    assert judge.distance(1.0, 20) is None
    evidence(judge, falling, range(300), 6)
    expected = float(judge.expected()[0])
    assert expected == pytest.approx(3.02, abs=0.1)
    assert judge.distance(expected + 1.0, 20) == pytest.approx(10.0, rel=0.3)


@pytest.mark.parametrize("cut", [1, 40, 155])
def test_a_state_continues_to_the_bit(cut):
    """Through JSON, before anything is known, in the warm-up, and while steps are suspect."""
    course = routed(SHARES)
    whole, parts = detector("routing"), detector("routing")
    chance = np.random.default_rng(7)
    steps = [course(chance, step) for step in range(150)]
    steps += [routed(SHARES[::-1])(chance, step) for step in range(10)]
    expected = [whole.add(*step) for step in steps]
    for step in steps[:cut]:
        parts.add(*step)
    again = detector("routing")
    again.load(json.loads(json.dumps(parts.state())))
    found = [again.add(*step) for step in steps[cut:]]
    assert np.array_equal(found, expected[cut:], equal_nan=True)
    assert again.state() == whole.state()
