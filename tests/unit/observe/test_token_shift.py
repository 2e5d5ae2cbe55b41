"""Shifts of the token ids against what batches of one text do by themselves."""

from __future__ import annotations

import json
import math
import re
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moepp_megatron.config.schema.routing_guard import ShiftSection
from moepp_megatron.observe.token_shift import GROUPS, TokenShift, group_of

FIRST_JUDGED, STEPS = 80, 300
SEQUENCES, LENGTH = 48, 64


class Text:
    """A text whose sequences differ in their shares of the groups (Dirichlet-multinomial).

    Args:
        seed: Of the shares.
        alike: Concentration: how alike the sequences are.
    """

    def __init__(self, seed: int, alike: float = 100.0) -> None:
        self._alike = alike * np.random.default_rng(seed).dirichlet(np.full(GROUPS, 2.0))

    def batch(self, chance: np.random.Generator, sequences: int = SEQUENCES) -> np.ndarray:
        shares = chance.dirichlet(self._alike, size=sequences)
        return chance.multinomial(LENGTH, shares).sum(axis=0).astype(np.float64)


def mixed(chance: np.random.Generator, text: Text, other: Text, share: float) -> np.ndarray:
    number = int(chance.binomial(SEQUENCES, share))
    return text.batch(chance, SEQUENCES - number) + other.batch(chance, number)


def judged(monitor: TokenShift, batches: list[np.ndarray]) -> np.ndarray:
    return np.array([monitor.add(batch) for batch in batches])


def monitor_of(text: Text, chance: np.random.Generator, steps: int = STEPS) -> TokenShift:
    monitor = TokenShift(ShiftSection())
    judged(monitor, [text.batch(chance) for _ in range(steps)])
    return monitor


def test_neighbouring_ids_are_spread() -> None:
    groups = group_of(np.arange(50_000))
    assert (groups.min(), groups.max()) == (0, GROUPS - 1)
    counts = np.bincount(groups)
    assert counts.max() < 1.05 * counts.mean()
    assert len({*group_of(np.arange(7_000, 7_016)).tolist()}) == 16


@pytest.mark.parametrize("seed", range(10))
def test_no_false_alarm_and_a_tenth_of_another_text_is_told(seed: int) -> None:
    chance = np.random.default_rng([seed, 7])
    text, other = Text(seed), Text(seed + 100)
    monitor = TokenShift(ShiftSection())
    values = judged(monitor, [text.batch(chance) for _ in range(STEPS)])
    assert np.isnan(values[:FIRST_JUDGED]).all()
    assert (values[FIRST_JUDGED:] <= 1.0).all()
    after = judged(monitor, [mixed(chance, text, other, 0.1) for _ in range(30)])
    assert (after > 1.0).any()
    # The ids are another text's as long as it is there.
    assert after[-1] > 1.0
    assert 0 < monitor.steps <= 30
    assert 0.01 < monitor.moved < 0.2


def test_sequences_that_differ_more_need_more_evidence() -> None:
    """The same change is nothing unusual among sequences that differ so much anyway."""
    told = []
    for alike in (1000.0, 3.0):
        chance = np.random.default_rng(3)
        text = Text(1, alike)
        monitor = monitor_of(text, chance)
        told.append(
            judged(monitor, [mixed(chance, text, Text(101, alike), 0.1) for _ in range(8)])[-1]
        )
    assert told[0] > 1.0 > told[1]


def test_one_odd_batch_is_no_alarm_and_is_not_learnt() -> None:
    chance = np.random.default_rng(5)
    text, odd = Text(1), Text(50, 5.0)
    monitor = monitor_of(text, chance)
    mean = monitor.state_dict()["usual"]
    batch = odd.batch(chance)
    assert judged(monitor, [batch])[0] < 1.0
    assert monitor.state_dict()["usual"] == mean
    after = judged(monitor, [text.batch(chance) for _ in range(40)])
    assert (after < 1.0).all()
    # Were it learnt, the spread of its largest group would tell.
    usual = np.array(monitor.state_dict()["usual"][2])
    assert usual.max() < 4.0


def test_what_has_lasted_is_usual() -> None:
    chance = np.random.default_rng(6)
    text, other = Text(1), Text(2)
    monitor = monitor_of(text, chance)
    steps = ShiftSection().memory * ShiftSection().window
    values = judged(monitor, [other.batch(chance) for _ in range(steps + 120)])
    first = int(np.argmax(values > 1.0))
    assert first < 5
    assert (values[first : steps - 1] > 1.0).all()
    later = values[steps + 40 :]
    assert not np.isnan(later).any()
    assert (later < 1.0).all()
    assert (judged(monitor, [text.batch(chance) for _ in range(10)])[-1]) > 1.0, "the way back"


def test_a_shift_that_ends_is_not_learnt() -> None:
    chance = np.random.default_rng(8)
    text, other = Text(1), Text(2)
    monitor = monitor_of(text, chance)
    before = np.array(monitor.state_dict()["usual"][1])
    judged(monitor, [other.batch(chance) for _ in range(10)])
    judged(monitor, [text.batch(chance) for _ in range(60)])
    assert np.abs(np.array(monitor.state_dict()["usual"][1]) - before).max() < 0.01
    assert monitor.over_limit < 1.0


def test_slow_changes_are_followed() -> None:
    """A fortieth of the text becomes another within 1,500 steps."""
    chance = np.random.default_rng(9)
    text, other = Text(1), Text(2)
    monitor = TokenShift(ShiftSection())
    values = judged(monitor, [mixed(chance, text, other, step / 60_000) for step in range(1500)])
    assert np.nanmax(values) < 1.0


def test_the_number_of_tokens_may_change() -> None:
    chance = np.random.default_rng(10)
    text = Text(1)
    monitor = monitor_of(text, chance)
    assert (judged(monitor, [text.batch(chance, 192) for _ in range(60)]) < 1.0).all()


def test_steps_that_are_all_the_same() -> None:
    monitor = TokenShift(ShiftSection())
    counts = np.zeros(GROUPS)
    counts[3] = 3000.0
    assert judged(monitor, [counts] * 100)[-1] == 0.0
    assert math.isfinite(monitor.add(np.roll(counts, 1)))
    assert judged(monitor, [np.roll(counts, 1)] * 20).max() > 1.0
    value = monitor.over_limit
    assert monitor.add(np.zeros(GROUPS)) == value, "a step without tokens says nothing"


def test_a_state_goes_on_to_the_bit() -> None:
    chance = np.random.default_rng(11)
    text, other = Text(1), Text(2)
    batches = [text.batch(chance) for _ in range(120)]
    batches += [other.batch(chance) for _ in range(80)]
    whole, parts = TokenShift(ShiftSection()), TokenShift(ShiftSection())
    for batch in batches:
        state: Any = json.loads(json.dumps(parts.state_dict(), allow_nan=False))
        parts = TokenShift(ShiftSection())
        parts.load_state_dict(state)
        found, expected = parts.add(batch), whole.add(batch)
        assert found == expected or (math.isnan(found) and math.isnan(expected))
    assert parts.state_dict() == whole.state_dict()
    assert math.isnan(whole.over_limit), "what has lasted is usual, and not yet known enough"


def test_fewer_false_alarms_need_more_evidence() -> None:
    def last(false_alarm_steps: float) -> float:
        chance = np.random.default_rng(12)
        monitor = TokenShift(ShiftSection(false_alarm_steps=false_alarm_steps))
        text = Text(1)
        judged(monitor, [text.batch(chance) for _ in range(150)])
        return judged(monitor, [mixed(chance, text, Text(2), 0.1) for _ in range(6)])[-1]

    assert last(1_000.0) > last(10_000.0) > last(1_000_000.0) > 0.0


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

    monitor = TokenShift(ShiftSection())
    assert np.nanmax(judged(monitor, [batch(0.0) for _ in range(200)])) < 1.0
    assert judged(monitor, [batch(1 / 7) for _ in range(30)]).max() > 1.0
