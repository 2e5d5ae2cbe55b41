"""Clocks of ranks: known shifts are found again."""

import random
from dataclasses import replace
from pathlib import Path

import pytest

from moepp_megatron.tools.profiling.collective import Collective, Operation
from moepp_megatron.tools.profiling.merge import find_clocks, same_calls

SAMPLES = Path(__file__).parent / "samples"


def call(rank: int, end_us: float, number: int | None, **more) -> Collective:
    fields = {"operation": Operation.ALL_REDUCE, "group": "world", **more}
    return Collective(rank=rank, start_us=end_us - 100, end_us=end_us, sequence=number, **fields)


def recorded(
    shifts_us: dict[int, float], calls: int, jitter_us: float, outliers: int = 0, **more
) -> dict[int, list[Collective]]:
    """Ranks that leave each call within `jitter_us` of each other; some calls far apart."""
    chance = random.Random(8)
    by_rank: dict[int, list[Collective]] = {rank: [] for rank in shifts_us}
    for number in range(calls):
        for rank, shift in shifts_us.items():
            end = 1e6 + 5000 * number + shift + chance.uniform(-jitter_us, jitter_us)
            if number < outliers and rank % 2:
                end += 20000  # preempted on its way out
            by_rank[rank].append(call(rank, end, number, **more))
    return by_rank


SHIFTS = {0: 0.0, 1: 1234567.0, 2: -88.5, 3: 4.0e9}


def test_shifted_clocks_are_found_through_jitter_and_outliers():
    clocks = find_clocks(recorded(SHIFTS, calls=101, jitter_us=20, outliers=20))
    for rank, shift in SHIFTS.items():
        # Single differences lie within +-40 us. 20 of 101 outliers move the median to the 60th
        # percentile of the rest at most, and sampling moves it by about 2 us: far within 10.
        assert clocks[rank].offset_us == pytest.approx(-shift, abs=10)
    assert clocks[1].calls == 101
    # The difference of two uniform values of +-20 has a standard deviation of 16 us; outliers widen
    # it a little.
    assert 8 < clocks[2].spread_us < 32
    assert clocks[0] == (0.0, 0.0, 0)


def test_the_offset_is_exact_without_jitter():
    clocks = find_clocks(recorded(SHIFTS, calls=3, jitter_us=0))
    for rank, shift in SHIFTS.items():
        # Times near 4e9 us in double precision are exact to 5e-7 us.
        assert clocks[rank].offset_us == pytest.approx(-shift, abs=1e-5)
        assert clocks[rank].spread_us == pytest.approx(0, abs=1e-5)


def test_a_rank_is_reached_through_others():
    # 0 and 1 share a group, 1 and 2 another; 0 and 2 none.
    left = recorded({0: 0.0, 1: 500.0}, 9, 0, group="left", group_ranks=(0, 1))
    right = recorded({1: 500.0, 2: -300.0}, 9, 0, group="right", group_ranks=(1, 2))
    clocks = find_clocks({0: left[0], 1: left[1] + right[1], 2: right[2]})
    assert clocks[2].offset_us == pytest.approx(300, abs=1e-6)
    assert clocks[2].calls == 9


def test_the_surer_way_is_taken():
    # Directly, 0 and 2 agree badly; through 1 they agree well.
    direct = recorded({0: 0.0, 2: 700.0}, 5, 400, group="direct", group_ranks=(0, 2))
    left = recorded({0: 0.0, 1: 500.0}, 50, 1, group="left", group_ranks=(0, 1))
    right = recorded({1: 500.0, 2: 700.0}, 50, 1, group="right", group_ranks=(1, 2))
    by_rank = {0: direct[0] + left[0], 1: left[1] + right[1], 2: direct[2] + right[2]}
    clocks = find_clocks(by_rank)
    assert clocks[2].offset_us == pytest.approx(-700, abs=2)  # two steps of at most 2 us of jitter
    assert clocks[2].calls == 50


def test_numbers_are_not_mixed_between_operations_and_groups():
    # NCCL's profilers number each operation by itself.
    def both(rank: int, shift: float) -> list[Collective]:
        gather = {"operation": Operation.ALL_GATHER}
        return [call(rank, 1000 + shift, 0), call(rank, 9000 + shift, 0, **gather)]

    clocks = find_clocks({0: both(0, 0.0), 1: both(1, 50.0)})
    assert clocks[1].offset_us == -50
    assert clocks[1].calls == 2


def test_without_numbers_the_order_counts_if_all_have_equally_many():
    ends = {0: [100.0, 200.0, 300.0], 1: [150.0, 250.0, 350.0]}
    by_rank = {rank: [call(rank, end, None) for end in ends[rank]] for rank in ends}
    assert find_clocks(by_rank)[1].offset_us == -50
    by_rank[1].pop(0)  # a recording that began later
    assert find_clocks(by_rank)[1] is None


def test_times_are_left_where_no_call_is_shared(caplog):
    by_rank = {0: [call(0, 10.0, 1)], 1: [call(1, 20.0, 2)], 2: []}
    clocks = find_clocks(by_rank)
    for rank in (1, 2):
        assert clocks[rank] is None
    assert "ranks 1, 2 share no timed collective with rank 0" in caplog.text


def test_calls_without_a_place_in_time_are_not_compared():
    by_rank = recorded({0: 0.0, 1: 500.0}, 5, 0)
    by_rank[1] = [replace(one, placed=False) for one in by_rank[1]]
    clocks = find_clocks(by_rank)
    assert clocks[1] is None


def test_an_all_to_all_whose_parts_disagree_is_not_the_same_call():
    fields = {"operation": Operation.ALL_TO_ALL, "group_ranks": (0, 1)}
    first = call(0, 100.0, 0, sent=(8, 16), received=(8, 24), **fields)
    second = call(1, 150.0, 0, sent=(24, 4), received=(16, 4), **fields)
    calls = {0: [first], 1: [second]}
    assert len(same_calls(calls, {Operation.ALL_TO_ALL})) == 1
    calls[1] = [replace(second, received=(32, 4))]
    assert same_calls(calls, {Operation.ALL_TO_ALL}) == []


def test_one_rank_and_none():
    assert find_clocks({}) == {}
    assert find_clocks({3: []}) == {3: (0.0, 0.0, 0)}
