"""Rows of the experts of each rank."""

import pytest

from moepp_megatron.tools.profiling.measures.expert_load import expert_load
from moepp_megatron.tools.profiling.trace import About, Pass, RankTrace, TracedGroup, _Passes


def routed(layer, to_ranks):
    return Pass(
        layer=layer,
        recomputed=False,
        dispatcher="AlltoAll",
        tokens=0,
        topk=2,
        row_bytes=4,
        ranks=2,
        own=0,
        to_ranks=to_ranks,
        copies_to_ranks=to_ranks,
    )


def trace(rank, ranks, *sent, etp=1):
    """A rank's step 5; each of `sent` is a layer and its selections for the group's ranks."""
    passes = [routed(layer, to_ranks) for layer, to_ranks in sent]
    return RankTrace(
        rank,
        groups={"9": TracedGroup("9", ranks, "EXPERT_MODEL_PARALLEL_GROUP")},
        about=About(steps=[_Passes(step=5, passes=passes)], layout={"etp": etp}),
    )


def test_the_busiest_rank_of_each_layer_counts():
    """Rank 2 is busy in layer 1, rank 3 in layer 2: equal in sum, and yet each waits."""
    found = expert_load(
        [trace(2, (2, 3), (1, [4, 1]), (2, [2, 2])), trace(3, (2, 3), (1, [4, 1]), (2, [0, 6]))],
        [5],
    )
    assert found.rows == {(5, 2): 4 + 4 + 2 + 0, (5, 3): 1 + 1 + 2 + 6}
    assert found.busiest_over_mean == pytest.approx((8 + 8) / (5 + 5))
    assert found.busiest == 2


def test_passes_of_a_layer_are_apart_and_repeated_ones_do_not_count():
    both = [trace(0, (0, 1), (1, [3, 0]), (1, [0, 3])), trace(1, (0, 1), (1, [3, 0]), (1, [0, 3]))]
    for one in both:
        again = routed(1, [9, 0]).model_copy(update={"recomputed": True})
        one.about.steps[0].passes.append(again)
    found = expert_load(both, [5])
    assert found.busiest_over_mean == 2.0
    assert found.rows == {(5, 0): 6, (5, 1): 6}


def test_groups_are_apart():
    pairs = [trace(r, (0, 1), (1, [1, 1])) for r in (0, 1)]
    pairs += [trace(r, (2, 3), (1, [8, 0])) for r in (2, 3)]
    found = expert_load(pairs, [5])
    assert found.rows == {(5, 0): 2, (5, 1): 2, (5, 2): 16, (5, 3): 0}
    assert found.busiest == 2
    assert found.busiest_over_mean == pytest.approx((2 + 16) / (2 + 8))


def test_unknown():
    whole = [trace(0, (0, 1), (1, [1, 2])), trace(1, (0, 1), (1, [1, 2]))]
    assert expert_load(whole, [5]) is not None
    assert expert_load(whole[:1], [5]) is None
    assert expert_load(whole, [6]) is None
    assert expert_load([trace(0, (0,), (1, [3]))], [5]) is None
    assert expert_load([trace(r, (0, 1), (1, [1, 2]), etp=2) for r in (0, 1)], [5]) is None
