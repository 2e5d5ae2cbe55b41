"""The longest path through a step's passes, for many steps and pipelines at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moepp_megatron.planning.simulation.schedule import Node

Seconds = NDArray[np.float64]


@dataclass(frozen=True)
class Message:
    """A stage-to-stage message, seconds.

    Attributes:
        blocking: The sender waits for this part: it lengthens the pass that sends.
        beside: The receiver gets the message this much later, while the sender goes on.
    """

    blocking: float
    beside: float


@dataclass(frozen=True)
class Played:
    """When passes ran.

    Attributes:
        finish: End of each pipeline rank's last pass [pp, ...], seconds.
        busy: Sum of each rank's passes, messages not included [pp, ...], seconds.
        sending: What messages held each rank up [pp], seconds.
        starts: Start of every pass of the graph [passes, ...], seconds, where asked for.
        ends: End of every pass [passes, ...], messages included.
    """

    finish: Seconds
    busy: Seconds
    sending: Seconds
    starts: Seconds | None
    ends: Seconds


def play(
    graph: tuple[Node, ...],
    forward: Seconds,
    backward: Seconds,
    message: Message,
    first: Seconds,
    keep_starts: bool = False,
) -> Played:
    """Run all passes, each as soon as its rank is free and its input is there.

    Args:
        graph: The passes in an order in which each comes after those it waits for.
        forward: Duration of forward passes [stages, micro-batches, ...], stage = chunk * pp + rank.
        backward: The same backward.
        message: Between stages on different ranks.
        first: When each rank can start [pp].
        keep_starts: Keep every pass's start.
    """
    pp = len(first)
    stages, shape = forward.shape[0], forward.shape[2:]
    ends = np.zeros((len(graph), *shape))
    starts = np.zeros((len(graph), *shape)) if keep_starts else None
    finish = np.zeros((pp, *shape))
    busy = np.zeros((pp, *shape))
    sending = np.zeros(pp)
    # An input that came as a message is there `beside` after its sender was done.
    for number, node in enumerate(graph):
        work = node.work
        stage = work.chunk * pp + work.rank
        own = (backward if work.is_backward else forward)[stage, work.micro_batch]
        free = ends[node.before] if node.before >= 0 else first[work.rank]
        if node.needs >= 0:
            ready = ends[node.needs] + message.beside if node.is_sent else ends[node.needs]
            start = np.maximum(free, ready)
        else:
            start = np.broadcast_to(free, shape)
        is_end = stage == (0 if work.is_backward else stages - 1)
        sends = 0.0 if is_end or pp == 1 else message.blocking
        ends[number] = start + own
        ends[number] += sends
        if starts is not None:
            starts[number] = start
        busy[work.rank] += own
        sending[work.rank] += sends
        finish[work.rank] = ends[number]
    return Played(finish, busy, sending, starts, ends)
