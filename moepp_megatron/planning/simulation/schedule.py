"""Order in which each pipeline rank runs its forward and backward passes.

Source: megatron/core/pipeline_parallel/schedules.py (0.19.2), `get_pp_rank_microbatches`,
`get_schedule_table` and the three `forward_backward_*` functions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass of one micro-batch through one model chunk.

    Attributes:
        rank: Pipeline rank.
        chunk: Model chunk of that rank, from 0.
        micro_batch: From 0.
        is_backward: Backward pass.
    """

    rank: int
    chunk: int
    micro_batch: int
    is_backward: bool


def rank_order(
    pp: int, vpp: int, rank: int, micro_batches: int, extra_warm_up: bool = False
) -> list[Pass]:
    """Passes of one pipeline rank in the order in which they start.

    Args:
        pp: Pipeline ranks.
        vpp: Model chunks of each.
        rank: The pipeline rank.
        micro_batches: Of a step.
        extra_warm_up: One more forward pass first, as the interleaved schedule does when it
            combines forward and backward passes to hide the experts' exchange.
    """
    # Micro-batches go through the chunks in groups of `pp`.
    table = [
        (micro_batch, chunk)
        for start in range(0, micro_batches, pp)
        for chunk in range(vpp)
        for micro_batch in range(start, min(start + pp, micro_batches))
    ]
    if vpp == 1:
        warm_up = pp - 1 - rank
    else:
        warm_up = 2 * (pp - 1 - rank) + (vpp - 1) * pp + int(extra_warm_up)
    warm_up = min(warm_up, len(table))
    ahead = [Pass(rank, chunk, micro_batch, False) for micro_batch, chunk in table]
    back = [Pass(rank, vpp - 1 - chunk, micro_batch, True) for micro_batch, chunk in table]
    order = ahead[:warm_up]
    for forward, backward in zip(ahead[warm_up:], back, strict=False):
        order += [forward, backward]
    return order + back[len(table) - warm_up :]


@dataclass(frozen=True, slots=True)
class Node:
    """A pass with what must be over before it starts.

    Attributes:
        work: The pass.
        before: Number of the rank's pass before it, or -1.
        needs: Number of the pass whose message it waits for, or -1.
        is_sent: That message comes from another pipeline rank, or from another pass of this one
            through a message that is not needed (one rank).
    """

    work: Pass
    before: int
    needs: int
    is_sent: bool


@lru_cache(maxsize=16)
def step_graph(
    pp: int, vpp: int, micro_batches: int, extra_warm_up: bool = False
) -> tuple[Node, ...]:
    """All passes of a step, each after those that it waits for.

    Raises:
        ValueError: The order is a deadlock: some pass waits for one that comes after it.
    """
    orders = [rank_order(pp, vpp, rank, micro_batches, extra_warm_up) for rank in range(pp)]
    places: dict[Pass, int] = {}
    nodes: list[Node] = []
    done, last = [0] * pp, [-1] * pp
    while any(done[rank] < len(orders[rank]) for rank in range(pp)):
        before = len(nodes)
        for rank in range(pp):
            while done[rank] < len(orders[rank]):
                work = orders[rank][done[rank]]
                wanted = _needed(work, pp, vpp)
                if wanted is not None and wanted not in places:
                    break
                needs = -1 if wanted is None else places[wanted]
                is_sent = wanted is not None and wanted.rank != rank
                places[work] = len(nodes)
                nodes.append(Node(work, last[rank], needs, is_sent))
                last[rank] = places[work]
                done[rank] += 1
        if len(nodes) == before:
            raise ValueError(f"{pp} ranks of {vpp} chunks wait for each other")
    return tuple(nodes)


def _needed(work: Pass, pp: int, vpp: int) -> Pass | None:
    """The pass that gives this one its input; a stage is chunk * pp + rank."""
    stage = work.chunk * pp + work.rank
    if work.is_backward:
        if stage == pp * vpp - 1:
            return Pass(work.rank, work.chunk, work.micro_batch, False)
        stage += 1
    elif stage == 0:
        return None
    else:
        stage -= 1
    return Pass(stage % pp, stage // pp, work.micro_batch, work.is_backward)
