"""The longest path through a step's passes, for many steps and pipelines at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moepp_megatron.workbench.planning.simulation.schedule import Node, Pass

Seconds = NDArray[np.float64]


@dataclass(frozen=True)
class Message:
    """A stage-to-stage message, seconds.

    Attributes:
        blocking: Part for which the sender waits: it lengthens the pass that sends.
        beside: Delay of the message for the receiver, while the sender continues.
    """

    blocking: float
    beside: float


@dataclass(frozen=True)
class Durations:
    """Durations of passes [stages, micro-batches, ...], seconds; stage = chunk * pp + rank.

    Attributes:
        forward: Forward passes that run alone.
        backward: Backward passes that run alone.
        forward_beside: Forward passes beside a backward pass; None where none does.
        backward_beside: Backward passes beside a forward pass.
    """

    forward: Seconds
    backward: Seconds
    forward_beside: Seconds | None = None
    backward_beside: Seconds | None = None

    def of(self, node: Node, work: Pass, pp: int) -> Seconds:
        """Duration [...] of one pass."""
        values = self.backward if work.is_backward else self.forward
        if len(node.works) > 1:
            beside = self.backward_beside if work.is_backward else self.forward_beside
            assert beside is not None, "passes that run together were timed together"
            values = beside
        found: Seconds = values[work.chunk * pp + work.rank, work.micro_batch]
        return found


@dataclass(frozen=True)
class Played:
    """The times at which passes ran.

    Attributes:
        finish: End of each pipeline rank's last pass [pp, ...], seconds.
        busy: Sum of each rank's passes, messages not included [pp, ...], seconds.
        sending: Time for which messages held up each rank [pp], seconds.
        starts: Start of every node of the graph [nodes, ...], seconds; None unless requested.
        ends: End of every node [nodes, ...], messages included.
    """

    finish: Seconds
    busy: Seconds
    sending: Seconds
    starts: Seconds | None
    ends: Seconds


def play(
    graph: tuple[Node, ...],
    durations: Durations,
    message: Message,
    first: Seconds,
    keep_starts: bool = False,
) -> Played:
    """Run all passes, each as soon as its rank is free and its input is there.

    Args:
        graph: The passes in an order in which each comes after those it waits for.
        durations: Durations of the passes.
        message: Message between stages on different ranks.
        first: When each rank can start [pp].
        keep_starts: Keep every node's start.
    """
    pp = len(first)
    stages, shape = durations.forward.shape[0], durations.forward.shape[2:]
    ends = np.zeros((len(graph), *shape))
    starts = np.zeros((len(graph), *shape)) if keep_starts else None
    finish = np.zeros((pp, *shape))
    busy = np.zeros((pp, *shape))
    sending = np.zeros(pp)
    for number, node in enumerate(graph):
        rank = node.rank
        end = ends[number]
        end[...] = ends[node.before] if node.before >= 0 else first[rank]
        for given in node.inputs:
            # A message is there `beside` after its sender was done.
            late = message.beside if given.is_sent else 0.0
            np.maximum(end, ends[given.node] + late, out=end)
        if starts is not None:
            starts[number] = end
        for work in node.works:
            own = durations.of(node, work, pp)
            end += own
            busy[rank] += own
            stage = work.chunk * pp + rank
            if pp > 1 and stage != (0 if work.is_backward else stages - 1):
                end += message.blocking
                sending[rank] += message.blocking
        finish[rank] = end
    return Played(finish, busy, sending, starts, ends)
