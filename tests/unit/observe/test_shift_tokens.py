"""Shifts of the token ids against what batches of one text do by themselves."""

from __future__ import annotations

import math
import re
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from moepp_megatron.config.schema.routing_guard import ShiftSection
from moepp_megatron.observe.shift.tokens import GROUPS, TokenDetector, group_of
from tests.unit.observe.series import SEQUENCES, TokenText, fed

STEPS, LENGTH = 300, 64


def judged(detector: TokenDetector, batches: list[np.ndarray]) -> np.ndarray:
    return fed(detector, [(batch,) for batch in batches])


def trained(text: TokenText, chance: np.random.Generator, steps: int = STEPS) -> TokenDetector:
    detector = TokenDetector(ShiftSection())
    judged(detector, [text.step(chance) for _ in range(steps)])
    return detector


def test_neighbouring_ids_are_spread() -> None:
    groups = group_of(np.arange(50_000))
    assert (groups.min(), groups.max()) == (0, GROUPS - 1)
    counts = np.bincount(groups)
    assert counts.max() < 1.05 * counts.mean()
    assert len({*group_of(np.arange(7_000, 7_016)).tolist()}) == 16


@pytest.mark.parametrize("seed", range(10))
def test_a_tenth_of_another_text_is_a_shift_as_long_as_it_is_there(seed: int) -> None:
    chance = np.random.default_rng([seed, 7])
    text, other = TokenText(seed), TokenText(seed + 100)
    detector = TokenDetector(ShiftSection())
    values = judged(detector, [text.step(chance) for _ in range(STEPS)])
    assert np.isnan(values[:80]).all()
    assert (values[80:] <= 1.0).all()
    after = judged(detector, [text.mixed(chance, other, 0.1) for _ in range(30)])
    assert after[-1] > 1.0
    assert 0 < detector.steps <= 30
    assert 0.01 < detector.moved < 0.2


def test_sequences_that_differ_more_need_more_evidence() -> None:
    """The same change is nothing unusual among sequences that differ so much anyway."""
    found = []
    for alike in (1000.0, 3.0):
        chance, text, other = np.random.default_rng(3), TokenText(1, alike), TokenText(101, alike)
        detector = trained(text, chance)
        found.append(judged(detector, [text.mixed(chance, other, 0.1) for _ in range(8)])[-1])
    assert found[0] > 1.0 > found[1]


def test_what_is_odd_or_a_shift_is_not_learnt() -> None:
    chance, text = np.random.default_rng(5), TokenText(1)
    detector = trained(text, chance)
    usual = detector.state_dict()["usual"]
    assert judged(detector, [TokenText(50, 5.0).step(chance)])[0] < 1.0
    assert detector.state_dict()["usual"] == usual
    judged(detector, [text.step(chance) for _ in range(40)])
    # Were it learnt, the spread of its largest group would show it.
    assert np.array(detector.state_dict()["usual"][2]).max() < 4.0
    before = np.array(detector.state_dict()["usual"][1])
    judged(detector, [TokenText(2).step(chance) for _ in range(10)])
    judged(detector, [text.step(chance) for _ in range(60)])
    assert np.abs(np.array(detector.state_dict()["usual"][1]) - before).max() < 0.01


def test_slow_changes_are_followed() -> None:
    """A fortieth of the text becomes another within 1,500 steps."""
    chance, text, other = np.random.default_rng(9), TokenText(1), TokenText(2)
    batches = [text.mixed(chance, other, step / 60_000) for step in range(1500)]
    assert np.nanmax(judged(TokenDetector(ShiftSection()), batches)) < 1.0


def test_the_number_of_tokens_may_change() -> None:
    chance, text = np.random.default_rng(10), TokenText(1)
    assert (judged(trained(text, chance), [text.step(chance, 192) for _ in range(60)]) < 1.0).all()


def test_steps_that_are_all_the_same() -> None:
    detector = TokenDetector(ShiftSection())
    counts = np.zeros(GROUPS)
    counts[3] = 3000.0
    assert judged(detector, [counts] * 100)[-1] == 0.0
    assert math.isfinite(detector.add(np.roll(counts, 1)))
    assert judged(detector, [np.roll(counts, 1)] * 20).max() > 1.0
    value = detector.over_limit
    assert detector.add(np.zeros(GROUPS)) == value, "a step without tokens says nothing"


@cache
def shipped(suffix: str) -> np.ndarray:
    """[n] groups of the words of the repository's files of a kind."""
    root = Path(__file__).parents[3]
    files = sorted(root.glob(f"*/**/*{suffix}"))
    text = b"".join(path.read_bytes() for path in files)[:3_000_000]
    words = re.findall(rb"\w+|[^\w\s]|\s+", text)
    return group_of(np.array([zlib.crc32(word) for word in words], dtype=np.int64))


@pytest.mark.parametrize("seed", range(3))
def test_shipped_text(seed: int) -> None:
    """Batches of the repository's Python, then with a seventh of its pages."""
    chance = np.random.default_rng([seed, 13])
    python, markdown = shipped(".py"), shipped(".md")

    def batch(share: float) -> np.ndarray:
        found = np.zeros(GROUPS)
        for groups, each in ((python, 1.0 - share), (markdown, share)):
            starts = chance.integers(len(groups) - LENGTH, size=round(SEQUENCES * each))
            places = starts[:, None] + np.arange(LENGTH)
            found += np.bincount(groups[places].ravel(), minlength=GROUPS)
        return found

    detector = TokenDetector(ShiftSection())
    assert np.nanmax(judged(detector, [batch(0.0) for _ in range(200)])) < 1.0
    assert judged(detector, [batch(1 / 7) for _ in range(30)]).max() > 1.0
