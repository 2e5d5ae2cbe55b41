"""Uneven routing as a distribution."""

import pytest

from moepp_megatron.tools.planning.imbalance import EVEN, LEARNED, rank_load


def test_forced_balance_and_a_single_rank_are_even():
    assert rank_load(None, 64, 8, 1000) == EVEN
    assert rank_load(LEARNED, 64, 1, 1000) == EVEN


def test_learned_routing_is_as_uneven_as_published():
    # arXiv 2408.15664, table 2: MaxVio 0.52 of 64 experts. 400 draws know the mean to 0.01.
    load = rank_load(LEARNED, 64, 64, 10**8)
    assert load.mean == pytest.approx(1.52, abs=0.03)
    assert load.mean < load.p99
