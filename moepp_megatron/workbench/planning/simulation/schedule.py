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
        micro_batch: Number of the micro-batch, from 0.
        is_backward: Whether it is a backward pass.
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
        micro_batches: Micro-batches of a step.
        extra_warm_up: One more forward pass first, as the interleaved schedule and that of one
            stage do when they combine forward and backward passes to hide the experts' exchange.
    """
    # Micro-batches go through the chunks in groups of `pp`.
    table = [
        (micro_batch, chunk)
        for start in range(0, micro_batches, pp)
        for chunk in range(vpp)
        for micro_batch in range(start, min(start + pp, micro_batches))
    ]
    warm_up = _warm_up(pp, vpp, rank, micro_batches, extra_warm_up)
    ahead = [Pass(rank, chunk, micro_batch, False) for micro_batch, chunk in table]
    back = [Pass(rank, vpp - 1 - chunk, micro_batch, True) for micro_batch, chunk in table]
    order = ahead[:warm_up]
    for forward, backward in zip(ahead[warm_up:], back, strict=False):
        order += [forward, backward]
    return order + back[len(table) - warm_up :]


def _warm_up(pp: int, vpp: int, rank: int, micro_batches: int, extra: bool) -> int:
    """Forward passes before the first that a backward pass follows."""
    if vpp == 1:
        passes = pp - 1 - rank + int(extra and pp == 1)
    else:
        passes = 2 * (pp - 1 - rank) + (vpp - 1) * pp + int(extra)
    return min(passes, micro_batches * vpp)


@dataclass(frozen=True, slots=True)
class Input:
    """An input that a pass waits for.

    Attributes:
        node: Number of the node that gives it.
        is_sent: Whether it is a message from another pipeline rank.
    """

    node: int
    is_sent: bool


@dataclass(frozen=True, slots=True)
class Node:
    """A pass, or two that run together, with what must be over before they start.

    Attributes:
        works: A pass; or a forward and a backward pass of different micro-batches, whose exchanges
            hide behind each other's computation and whose results come at the same time.
        before: Number of the rank's node before it, or -1.
        inputs: The inputs that they wait for.
    """

    works: tuple[Pass, ...]
    before: int
    inputs: tuple[Input, ...]

    @property
    def rank(self) -> int:
        """The pipeline rank."""
        return self.works[0].rank


@lru_cache(maxsize=16)
def step_graph(pp: int, vpp: int, micro_batches: int, combined: bool = False) -> tuple[Node, ...]:
    """All passes of a step, each after those that it waits for.

    Args:
        pp: Pipeline ranks.
        vpp: Model chunks of each.
        micro_batches: Micro-batches of a step.
        combined: Forward and backward passes of the steady state run together, two by two
            (megatron/core/pipeline_parallel/combined_1f1b.py).

    Raises:
        ValueError: If the order is a deadlock: a pass waits for one that comes after it.
    """
    orders = [_units(pp, vpp, rank, micro_batches, combined) for rank in range(pp)]
    places: dict[Pass, int] = {}
    nodes: list[Node] = []
    done, last = [0] * pp, [-1] * pp
    while any(done[rank] < len(orders[rank]) for rank in range(pp)):
        before = len(nodes)
        for rank in range(pp):
            while done[rank] < len(orders[rank]):
                works = orders[rank][done[rank]]
                wanted = [one for one in (_needed(work, pp, vpp) for work in works) if one]
                if any(one not in places for one in wanted):
                    break
                inputs = tuple(Input(places[one], one.rank != rank) for one in wanted)
                places |= dict.fromkeys(works, len(nodes))
                nodes.append(Node(works, last[rank], inputs))
                last[rank] = len(nodes) - 1
                done[rank] += 1
        if len(nodes) == before:
            raise ValueError(f"{pp} ranks of {vpp} chunks wait for each other")
    return tuple(nodes)


def _units(
    pp: int, vpp: int, rank: int, micro_batches: int, combined: bool
) -> list[tuple[Pass, ...]]:
    """A rank's passes, those that run together as one."""
    order = rank_order(pp, vpp, rank, micro_batches, combined)
    alone = _warm_up(pp, vpp, rank, micro_batches, combined) if combined else len(order)
    steady = order[alone : len(order) - alone]
    return [
        *((work,) for work in order[:alone]),
        *zip(steady[::2], steady[1::2], strict=True),
        *((work,) for work in order[alone + len(steady) :]),
    ]


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
