"""Waiting for the last rank of a call."""

from dataclasses import replace

import pytest

from moepp_megatron.tools.profiling.measures.lateness import Lateness, lateness
from moepp_megatron.tools.profiling.measures.purpose import purpose_of
from moepp_megatron.tools.profiling.trace import Collective, Operation


def call(rank, start, end, **changes):
    one = Collective(
        operation=Operation.ALL_REDUCE,
        rank=rank,
        group="3",
        group_ranks=(0, 1, 2),
        group_size=3,
        sequence=7,
        start_us=start,
        end_us=end,
    )
    return replace(one, **changes)


def test_the_last_rank_waits_for_nobody():
    found = lateness({0: [call(0, 10, 50)], 1: [call(1, 30, 50)], 2: [call(2, 25, 52)]})
    assert found == {(0, 0): Lateness(20.0, 1), (1, 0): Lateness(0.0, 1), (2, 0): Lateness(5.0, 1)}


def test_no_longer_than_the_call():
    """A rank that is done before the last one starts, as a broadcast's root may be."""
    found = lateness({0: [call(0, 10, 15)], 1: [call(1, 30, 50)], 2: [call(2, 25, 52)]})
    assert found[0, 0].wait_us == 5.0


@pytest.mark.parametrize(
    "changes",
    [
        {"sequence": 8},
        {"sequence": None},
        {"group": "4"},
        {"operation": Operation.BROADCAST},
        {"group_ranks": ()},
    ],
)
def test_what_is_not_the_same_call_is_not_matched(changes):
    ranks = {0: [call(0, 1, 2)], 1: [call(1, 1, 2)], 2: [call(2, 1, 2, **changes)]}
    assert lateness(ranks) == {}


def test_send_and_receive_are_one_call_of_two():
    ends = {"group_ranks": (0, 1, 2, 3), "pair": (2, 0), "sequence": 4}
    found = lateness(
        {
            0: [call(0, 5, 40, operation=Operation.RECEIVE, **ends)],
            2: [call(2, 25, 40, operation=Operation.SEND, **ends)],
        }
    )
    assert found == {(0, 0): Lateness(20.0, 2), (2, 0): Lateness(0.0, 2)}


@pytest.mark.parametrize(
    ("operation", "meaning", "scopes", "purpose"),
    [
        (Operation.ALL_TO_ALL, "expert", ("forward", "layer3/combine"), "combine"),
        (Operation.ALL_TO_ALL, "expert", ("layer3/dispatch:backward",), "dispatch"),
        (Operation.ALL_GATHER, "expert", ("layer3/dispatch:recompute",), "dispatch"),
        (Operation.ALL_REDUCE, "tensor and context", ("layer3/router",), "router"),
        (Operation.ALL_REDUCE, "tensor", ("layer3/attention",), "tensor parallel"),
        (Operation.SEND, "pipeline", (), "pipeline"),
        (Operation.REDUCE_SCATTER, "data", (), "gradient reduce"),
        (Operation.ALL_REDUCE, "expert data", ("gradients",), "gradient reduce"),
        (Operation.ALL_GATHER, "data", ("optimizer",), "parameter gather"),
        (Operation.ALL_REDUCE, "data", ("optimizer",), "optimizer"),
        (Operation.ALL_REDUCE, "embedding", ("gradients",), "gradient reduce"),
        (Operation.SEND, "context", ("layer1/attention",), "context parallel"),
        (Operation.BROADCAST, "all ranks", (), "other"),
    ],
)
def test_purpose(operation, meaning, scopes, purpose):
    one = call(0, 0, 1, operation=operation, scopes=scopes)
    assert purpose_of(one, meaning) == purpose
