"""What is left of a class's FFN experts beside its past."""

import json

import numpy as np
import pytest

from moepp_megatron.observe.past import ClassPast

TOKENS = np.array([2000, 1000, 40])


def counts(random: np.random.RandomState, per_token: np.ndarray) -> np.ndarray:
    """[1, 4, 2]: three classes and all tokens, with these FFN experts a token of at most two."""
    ffn = random.binomial(2 * TOKENS, per_token / 2)
    rows = np.stack([ffn, TOKENS], axis=-1)
    return np.concatenate([rows, rows.sum(axis=0, keepdims=True)])[None]


def course(seed: int, steps: int, per_token, state=None) -> tuple[np.ndarray, ClassPast]:
    """[steps, classes] what is left, where `per_token` gives the FFN experts of a step."""
    random = np.random.RandomState(seed)
    past = ClassPast(1, 3, state)
    return np.array([past.add(counts(random, per_token(step)))[0] for step in range(steps)]), past


@pytest.mark.parametrize("seed", range(10))
def test_a_class_that_falls_is_told_and_stays_told(seed: int) -> None:
    usual, fallen = np.array([1.2, 1.0, 0.8]), np.array([1.2, 1.0, 0.05])
    left, _ = course(seed, 300, lambda step: usual if step < 150 else fallen)
    assert np.isnan(left[:100]).all()
    # By chance the rarest class, of 40 tokens a step, is off by a tenth at most.
    assert (np.abs(left[100:150] - 1.0) < 0.3).all()
    assert (left[162:, 2] < 0.5).all()
    assert (left[150:, :2] > 0.8).all()


def test_a_fall_of_all_classes_and_a_rise_of_the_others_are_no_fall_of_one() -> None:
    usual = np.array([1.2, 1.0, 0.8])
    whole, _ = course(1, 250, lambda step: usual if step < 150 else usual / 10)
    assert not (whole < 0.6).any()
    others, _ = course(1, 250, lambda step: np.array([0.4, 0.4, 0.8]) if step < 150 else usual)
    assert not (others < 0.6).any()


def test_what_training_changes_slowly_becomes_usual() -> None:
    left, _ = course(1, 300, lambda step: np.array([1.2, 1.0, 1.2 * 0.5 ** (step / 100)]))
    assert not (left < 0.5).any()
    # Later its few tokens have too few FFN experts to tell a fall from chance.
    assert np.isnan(left[270:, 2]).all()


def test_a_class_of_few_tokens_or_without_ffn_experts_is_not_compared() -> None:
    past = ClassPast(1, 2)
    rows = np.array([[[100, 1000], [1, 9], [101, 1009]]])
    for _ in range(120):
        left = past.add(rows)
    assert left[0, 0] == pytest.approx(1.0)
    assert np.isnan(left[0, 1])
    nothing = np.array([[[0, 1000], [9, 900], [9, 1900]]])
    past = ClassPast(1, 2)
    for _ in range(120):
        left = past.add(nothing)
    assert np.isnan(left).all()


def test_state_goes_on_to_the_bit() -> None:
    random = np.random.RandomState(3)
    steps = [counts(random, np.array([1.2, 1.0, 0.8])) for _ in range(140)]
    whole, first = ClassPast(1, 3), ClassPast(1, 3)
    for step in steps[:70]:
        whole.add(step)
        first.add(step)
    second = ClassPast(1, 3, first.state())
    for step in steps[70:]:
        assert np.array_equal(whole.add(step), second.add(step), equal_nan=True)
    # Another number of classes begins anew.
    assert np.isnan(ClassPast(1, 4, first.state()).add(np.ones((1, 5, 2), dtype=np.int64))).all()


def test_a_class_without_tokens_leaves_no_nan_in_the_state() -> None:
    past = ClassPast(1, 2)
    past.add(np.array([[[0, 0], [100, 1000], [100, 1000]]]))
    state = past.state()
    assert state == json.loads(json.dumps(state))
    assert state["mean"] == [[[None, None], [pytest.approx(0.1), pytest.approx(1.0)]]]
    state["mean"][0][0] = [float("nan")] * 2
    before, _ = ClassPast(1, 2, state).ffn_per_token()
    assert np.array_equal(before, [[np.nan, 0.1]], equal_nan=True)
