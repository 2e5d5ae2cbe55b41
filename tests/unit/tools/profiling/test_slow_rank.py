"""A slow rank is told apart from uneven experts."""

from pathlib import Path

import pytest

from moepp_megatron.tools.profiling.measures.expert_load import ExpertLoad, slow_rank
from moepp_megatron.tools.profiling.measures.exposure import MeasuredStepTime
from moepp_megatron.tools.profiling.trace import RankTrace, TracedGroup

SAMPLE = Path(__file__).parent / "samples/kineto_nccl"
GROUP = (0, 1, 2, 3)


def found(compute, rows, groups=None):
    """Of ranks that compute this long and have these rows, in two equal steps."""
    traces = [
        RankTrace(rank, groups={"9": TracedGroup("9", of, "EXPERT_MODEL_PARALLEL_GROUP")})
        for of in groups or [GROUP]
        for rank in of
    ]
    times = {
        step: {r: MeasuredStepTime(9e9, us, 0.0, 0.0) for r, us in enumerate(compute)}
        for step in (5, 6)
    }
    load = ExpertLoad({(step, r): n for step in (5, 6) for r, n in enumerate(rows)}, 0, 1.2)
    return slow_rank(traces, times, load)


def test_longer_for_fewer_rows_is_slow():
    slow = found([440.0, 100.0, 100.0, 100.0], [84, 100, 100, 100])
    assert slow.rank == 0
    assert (slow.time_ratio, slow.rows_ratio) == pytest.approx((4.4, 0.84))


@pytest.mark.parametrize(
    ("compute", "rows"),
    [
        # As much longer as it has more rows.
        ([180.0, 100.0, 100.0, 100.0], [180, 100, 100, 100]),
        ([120.0, 100.0, 100.0, 100.0], [100, 100, 100, 100]),
        # Fewer rows, and as long: the rest of the layer is the same work.
        ([100.0, 100.0, 100.0, 100.0], [10, 100, 100, 100]),
    ],
)
def test_more_rows_explain_more_time(compute, rows):
    assert found(compute, rows) is None


def test_ranks_are_compared_within_their_group():
    """Stages of a pipeline hold different layers, and so groups of different times."""
    assert found([400.0, 400.0, 100.0, 100.0], [100] * 4, [(0, 1), (2, 3)]) is None
    slow = found([400.0, 400.0, 300.0, 100.0], [100] * 4, [(0, 1), (2, 3)])
    assert (slow.rank, slow.time_ratio) == (2, 3.0)
