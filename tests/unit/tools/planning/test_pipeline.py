"""The pipeline's formulas beside megatron-core's schedules, played pass by pass."""

from collections import defaultdict
from functools import cache
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from moepp_megatron.tools.planning.pipeline import (
    bubble_seconds,
    chunks_in_flight,
    late_messages,
    split_passes,
)


class Pass(NamedTuple):
    """A micro-batch through one model chunk of a pipeline rank."""

    rank: int
    chunk: int
    micro_batch: int
    is_backward: bool


# A pass, or a forward and a backward pass that run together.
Node = tuple[Pass, ...]


def warm_up_passes(pp, vpp, rank, count, is_combined):
    """Forward passes before the first that a backward pass follows, as megatron-core has it."""
    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches

    where = SimpleNamespace(
        pp_group=SimpleNamespace(size=lambda: pp, rank=lambda: rank),
        virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
    )
    *_, warm_up, _ = get_pp_rank_microbatches(
        count, vpp, pp, overlap_moe_expert_parallel_comm=is_combined, p2p_communicator=where
    )
    # `combined_1f1b_schedule_for_no_pipelining`: one forward pass, then pairs.
    return 1 if is_combined and pp == 1 else warm_up


def rank_nodes(pp, vpp, rank, count, is_combined):
    """Return the operations of a rank, in order."""
    from megatron.core.pipeline_parallel.schedules import get_schedule_table

    table = get_schedule_table(count, vpp, pp)
    warm_up = warm_up_passes(pp, vpp, rank, count, is_combined)
    ahead = [Pass(rank, chunk, micro_batch, False) for micro_batch, chunk in table]
    # Backward, the chunks come the other way round.
    back = [Pass(rank, vpp - 1 - chunk, micro_batch, True) for micro_batch, chunk in table]
    steady = list(zip(ahead[warm_up:], back, strict=False))
    if not is_combined:
        steady = [(one,) for pair in steady for one in pair]
    return [
        *((one,) for one in ahead[:warm_up]),
        *steady,
        *((one,) for one in back[len(table) - warm_up :]),
    ]


def needed(work, pp, vpp):
    """The pass that gives this one its input; a stage is chunk * pp + rank."""
    stage, last = work.chunk * pp + work.rank, pp * vpp - 1
    if work.is_backward and stage == last:
        return work._replace(is_backward=False)
    stage += 1 if work.is_backward else -1
    if stage < 0:
        return None
    return Pass(stage % pp, stage // pp, work.micro_batch, work.is_backward)


@cache
def played_order(pp, vpp, count, is_combined=False):
    """All ranks' passes, each after those that it waits for."""
    waiting = [rank_nodes(pp, vpp, rank, count, is_combined) for rank in range(pp)]
    done = {None}
    order = []
    while any(waiting):
        before = len(order)
        for nodes in waiting:
            while nodes and all(needed(work, pp, vpp) in done for work in nodes[0]):
                done |= set(nodes[0])
                order.append(nodes.pop(0))
        assert len(order) > before, "ranks wait for each other"
    return tuple(order)


def played(pp, vpp, *passes, blocking=0.0, late=0.0, count=8):
    """End of the last pass."""
    ends = {}
    free = defaultdict(float)
    for node in played_order(pp, vpp, count, len(passes) > 2):
        rank = node[0].rank
        end = free[rank]
        for work in node:
            given = needed(work, pp, vpp)
            if given is not None:
                end = max(end, ends[given] + (late if given.rank != rank else 0.0))
        for work in node:
            stage = work.chunk * pp + rank
            end += passes[work.is_backward + 2 * (len(node) > 1)][stage]
            if pp > 1 and stage != (0 if work.is_backward else pp * vpp - 1):
                end += blocking
        free[rank] = end
        ends |= dict.fromkeys(node, end)
    return max(free.values())


def even(pp, vpp, *seconds):
    return [[one] * (pp * vpp) for one in seconds]


@pytest.mark.parametrize(
    ("pp", "vpp", "micro_batches", "is_combined"),
    [(4, 1, 8, False), (4, 1, 2, False), (4, 3, 8, False), (4, 3, 8, True), (2, 2, 2, True)]
    + [(1, 1, 4, True), (1, 1, 1, True), (1, 1, 4, False)],
)
def test_chunks_in_flight_are_those_of_the_schedule(pp, vpp, micro_batches, is_combined):
    for rank in range(pp):
        held = most = 0
        for node in rank_nodes(pp, vpp, rank, micro_batches, is_combined):
            # Both passes of a pair run at the same time.
            held += sum(-1 if one.is_backward else 1 for one in node)
            most = max(most, held)
        assert chunks_in_flight(pp, vpp, rank, micro_batches) == most


@pytest.mark.parametrize(("pp", "vpp"), [(1, 1), (2, 1), (4, 1), (8, 1), (2, 2), (4, 3)])
def test_equal_stages_wait_as_the_formula_says(pp, vpp):
    # (m + (p - 1) / v) passes of a rank's v chunks, 1 + 2 seconds each.
    expected = 8 * vpp * 3.0 + vpp * bubble_seconds((pp - 1) * 3.0, vpp)
    assert played(pp, vpp, *even(pp, vpp, 1, 2)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("pp", "vpp", "count"), [(1, 1, 1), (1, 1, 8), (2, 2, 2), (2, 2, 8), (4, 3, 4), (4, 3, 16)]
)
def test_combined_passes_take_what_the_formula_says(pp, vpp, count):
    # Alone 1 + 2 seconds a chunk; a pair hides more than it loses, but is longer than either.
    taken = played(pp, vpp, *even(pp, vpp, 1, 2, 0.8, 1.7), count=count)
    alone, together = split_passes(pp, vpp, count, True)
    assert alone + together == count
    passes = 3.0 * alone + 2.5 * together + bubble_seconds((pp - 1) * 3.0, vpp)
    assert taken == pytest.approx(vpp * passes, rel=1e-12)
    # The last rank's passes are those that count.
    last = rank_nodes(pp, vpp, pp - 1, count, True)
    assert sum(len(node) == 2 for node in last) == round(together * vpp)


@pytest.mark.parametrize(("pp", "vpp", "count"), [(2, 2, 2), (4, 3, 4), (4, 3, 16)])
@pytest.mark.parametrize("seconds", [(1, 2), (1, 2, 0.8, 1.7)], ids=["alone", "combined"])
def test_nothing_hides_the_messages_of_pairs_and_of_filling(pp, vpp, count, seconds):
    late = 0.1
    quiet = played(pp, vpp, *even(pp, vpp, *seconds), count=count)
    taken = played(pp, vpp, *even(pp, vpp, *seconds), late=late, count=count)
    _, together = split_passes(pp, vpp, count, len(seconds) > 2)
    assert taken - quiet == pytest.approx(late_messages(pp, vpp, together) * late, rel=1e-9)


def test_unequal_stages_wait_for_the_slowest():
    # The path through the slowest stage's m passes, and once through all others.
    ahead, back = [1.0, 1.2, 1.1, 1.7], [2.0, 2.1, 2.3, 2.9]
    expected = 8 * (1.7 + 2.9) + bubble_seconds(sum(ahead + back) - 1.7 - 2.9, 1)
    assert played(4, 1, ahead, back) == pytest.approx(expected, rel=1e-12)


def test_messages_hold_stages_up():
    # The last stage never waits after its first input: 8 x (1 + 2 + 0.1) from 1.1 on.
    assert played(2, 1, *even(2, 1, 1, 2), blocking=0.1) == pytest.approx(1.1 + 8 * 3.1 + 2)
