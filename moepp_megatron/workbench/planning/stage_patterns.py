"""Groups pipeline ranks that hold the same layers, and sums a micro-batch's costs on one."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from moepp_megatron.workbench.planning.layer_time import (
    NETWORK,
    RECOMPUTE,
    PassTime,
)
from moepp_megatron.workbench.planning.pipeline import even_stages, messages_sent
from moepp_megatron.workbench.planning.workload import Workload


@dataclass(frozen=True, slots=True)
class Sums:
    """Seconds of a layer, or of all chunks of a rank, for one micro-batch.

    Attributes:
        forward: Seconds of the forward pass.
        backward: Seconds of the backward pass.
        recompute: Part of these: computation that the backward pass repeats.
        network: Part of these: communication that nothing hides.
    """

    forward: float
    backward: float
    recompute: float
    network: float

    @property
    def total(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward


# Of an MoE layer, another layer, the embedding, the output layer and loss.
Kinds = tuple[Sums, Sums, Sums, Sums]


def sums_of(time: PassTime) -> Sums:
    """The sums of a layer's passes."""
    network = sum(time.seconds.get(name, 0.0) for name in NETWORK)
    return Sums(time.forward, time.backward, time.seconds.get(RECOMPUTE, 0.0), network)


@dataclass(frozen=True, slots=True)
class Pattern:
    """Pipeline ranks with the same layers: how many of each kind, and which ends they hold.

    Attributes:
        moe: MoE layers of a rank.
        dense: Its other layers.
        is_first: Whether it holds the embedding.
        is_last: Whether it holds the output layer.
        messages: Messages that it sends to other stages for a micro-batch.
        ranks: Number of such ranks.
        examples: Their numbers, ascending.
    """

    moe: int
    dense: int
    is_first: bool
    is_last: bool
    messages: int
    ranks: int
    examples: tuple[int, ...]

    def sums(self, kinds: Kinds) -> Sums:
        """The sums of all chunks of such a rank."""
        counts = (self.moe, self.dense, int(self.is_first), int(self.is_last))
        parts = [(count, kind) for count, kind in zip(counts, kinds, strict=True) if count]
        return Sums(
            sum(count * kind.forward for count, kind in parts),
            sum(count * kind.backward for count, kind in parts),
            sum(count * kind.recompute for count, kind in parts),
            sum(count * kind.network for count, kind in parts),
        )


def stage_patterns(load: Workload, pp: int, vpp: int) -> tuple[Pattern, ...]:
    """All patterns of a pipeline of even stages, the first rank's first."""
    kinds: list[tuple[int, int, bool, bool, int]] = []
    for rank, chunks in enumerate(even_stages(load.layers, pp, vpp)):
        moe = sum(load.is_moe[layer] for chunk in chunks for layer in chunk)
        whole = sum(len(chunk) for chunk in chunks)
        ends = (rank == 0, rank == pp - 1)
        kinds.append((moe, whole - moe, *ends, messages_sent(pp, vpp, rank)))
    return tuple(
        Pattern(*kind, ranks, tuple(rank for rank in range(pp) if kinds[rank] == kind))
        for kind, ranks in Counter(kinds).items()
    )
