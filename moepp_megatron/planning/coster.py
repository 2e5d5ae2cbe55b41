"""Total time and memory of many layouts of one model: what `step.py` and `memory.py` say, but fast.

A hundred thousand layouts share a few hundred kinds of layer and of stage. Those are worked out
once; what is left for each layout is arithmetic. `tests/unit/planning` holds the results to
`step_time` and `fullest_rank`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from moepp_megatron.planning.data_parallel import StepEnd, step_end
from moepp_megatron.planning.grid import Grid
from moepp_megatron.planning.imbalance import Load, Routing
from moepp_megatron.planning.layer_time import (
    CONTEXT,
    EXCHANGE,
    RECOMPUTE,
    TENSOR,
    PassTime,
    edge_time,
    layer_key,
    layer_time,
)
from moepp_megatron.planning.machine import Machine
from moepp_megatron.planning.memory import (
    LayerBytes,
    assemble,
    candidate_ranks,
    fullest_rows,
    layer_bytes,
)
from moepp_megatron.planning.parameters import RankParameters, rank_parameters
from moepp_megatron.planning.pipeline import (
    bubble_seconds,
    even_stages,
    late_messages,
    split_passes,
)
from moepp_megatron.planning.step import Transfer, expert_load, messages_sent, stage_transfers
from moepp_megatron.planning.workload import Workload

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Cost:
    """A step in five sums, seconds.

    Attributes:
        work: Computation that every layout does.
        recompute: Computation repeated in the backward pass.
        network: Exposed communication of layers and stages.
        bubble: Idle time of the pipeline.
        end: Exposed data-parallel communication and the optimizer.
    """

    work: float
    recompute: float
    network: float
    bubble: float
    end: float

    @property
    def total(self) -> float:
        """The step, seconds."""
        return self.work + self.recompute + self.network + self.bubble + self.end


@dataclass(frozen=True, slots=True)
class _Sums:
    forward: float
    backward: float
    recompute: float
    network: float

    @property
    def total(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward


# Of an MoE layer, another layer, the embedding, the output layer and loss.
_Kinds = tuple[_Sums, _Sums, _Sums, _Sums]


def _sums(time: PassTime) -> _Sums:
    network = sum(time.seconds.get(name, 0.0) for name in (TENSOR, CONTEXT, EXCHANGE))
    return _Sums(time.forward, time.backward, time.seconds.get(RECOMPUTE, 0.0), network)


@dataclass(frozen=True, slots=True)
class _Pattern:
    """Pipeline ranks with the same layers: how many of each kind, and which ends they hold."""

    moe: int
    dense: int
    is_first: bool
    is_last: bool
    ranks: int
    examples: tuple[int, ...]

    def sums(self, kinds: _Kinds) -> _Sums:
        """All chunks of such a rank."""
        counts = (self.moe, self.dense, int(self.is_first), int(self.is_last))
        parts = [(count, kind) for count, kind in zip(counts, kinds, strict=True) if count]
        return _Sums(
            sum(count * kind.forward for count, kind in parts),
            sum(count * kind.backward for count, kind in parts),
            sum(count * kind.recompute for count, kind in parts),
            sum(count * kind.network for count, kind in parts),
        )


class Coster:
    """Costs of layouts of one model on one machine.

    Args:
        load: What is trained.
        machine: The cluster.
        routing: How unevenly tokens choose.
    """

    def __init__(self, load: Workload, machine: Machine, routing: Routing) -> None:
        self.load = load
        self.machine = machine
        self.routing = routing
        self._kinds: dict[tuple[object, ...], _Kinds] = {}
        self._stage_sums: dict[tuple[object, ...], tuple[_Sums, ...]] = {}
        self._loads: dict[tuple[int, int], Load] = {}
        self._patterns: dict[tuple[int, int], tuple[_Pattern, ...]] = {}
        self._parameters: dict[tuple[int, ...], RankParameters] = {}
        self._layer_bytes: dict[tuple[object, ...], tuple[LayerBytes, LayerBytes]] = {}
        self._ends: dict[tuple[int, ...], StepEnd] = {}
        self._transfers: dict[tuple[int, ...], Transfer] = {}

    def fullness(self, grid: Grid) -> Load:
        """How full the fullest rank of an expert-parallel group is."""
        key = (grid.ep, grid.tokens(self.load.seq))
        if key not in self._loads:
            self._loads[key] = expert_load(self.load, grid, self.routing)
        return self._loads[key]

    def memory(self, grid: Grid) -> float:
        """Bytes of the fullest rank, what libraries take included."""
        kinds = self._bytes(grid)
        patterns = self._pattern(grid.pp, grid.vpp)
        most = 0.0
        for rank in candidate_ranks(grid.pp):
            pattern = next(p for p in patterns if rank in p.examples)
            parameters = self._rank_parameters(grid, rank)
            layers = (pattern.moe, pattern.dense)
            most = max(most, assemble(self.load, grid, rank, parameters, layers, kinds).total)
        return most + self.machine.reached.reserved_gib * GIB

    def cost(self, grid: Grid) -> Cost:
        """Time of a step."""
        count = grid.micro_batches(self.load.batch)
        apart, together = split_passes(grid.pp, grid.vpp, count, grid.expert_overlap)
        alone = self._stages(grid, False)
        beside = self._stages(grid, True) if grid.expert_overlap else alone
        transfer = self._transfer(grid)
        longest, chosen, others = -1.0, 0, 0.0
        patterns = self._pattern(grid.pp, grid.vpp)
        for number, pattern in enumerate(patterns):
            sent = messages_sent(grid, pattern.examples[0]) * transfer.blocking
            own = alone[number].total
            busy = apart * own + together * beside[number].total + count * sent
            others += pattern.ranks * (own + sent)
            if busy > longest:
                longest, chosen, slowest = busy, number, own + sent
        rank = patterns[chosen].examples[0]
        one, pair = alone[chosen], beside[chosen]
        recompute = apart * one.recompute + together * pair.recompute
        sending = count * messages_sent(grid, rank) * transfer.blocking
        network = apart * one.network + together * pair.network + sending
        late = late_messages(grid.pp, grid.vpp, together) * transfer.beside
        end = self._end(grid, rank)
        return Cost(
            work=longest - recompute - network,
            recompute=recompute,
            network=network,
            bubble=bubble_seconds(others - slowest, grid.vpp) + late,
            end=end.exposed(grid, one.forward, one.backward) + end.optimizer,
        )

    def _stages(self, grid: Grid, overlaps: bool) -> tuple[_Sums, ...]:
        """A micro-batch through the stages of each pattern, alone or beside another."""
        key = (*self._key(grid, overlaps), grid.pp, grid.vpp)
        if key not in self._stage_sums:
            kinds = self._kind(grid, overlaps)
            patterns = self._pattern(grid.pp, grid.vpp)
            self._stage_sums[key] = tuple(pattern.sums(kinds) for pattern in patterns)
        return self._stage_sums[key]

    @staticmethod
    def _key(grid: Grid, overlaps: bool) -> tuple[object, ...]:
        return (grid.tp, grid.cp, grid.ep, grid.etp, grid.micro_batch, grid.recompute, overlaps)

    def _kind(self, grid: Grid, overlaps: bool) -> _Kinds:
        key = self._key(grid, overlaps)
        if key not in self._kinds:
            load, machine = self.load, self.machine
            small = layer_key(grid if overlaps else grid.apart)
            skew = self.fullness(grid).mean
            rows = fullest_rows(load, grid, skew)
            self._kinds[key] = (
                _sums(layer_time(load, small, machine, True, rows, skew)),
                _sums(layer_time(load, small, machine, False, rows, skew)),
                _sums(edge_time(load, small, machine, False)),
                _sums(edge_time(load, small, machine, True)),
            )
        return self._kinds[key]

    def _pattern(self, pp: int, vpp: int) -> tuple[_Pattern, ...]:
        if (pp, vpp) not in self._patterns:
            stages = even_stages(self.load.layers, pp, vpp)
            kinds: list[tuple[int, int, bool, bool]] = []
            for rank, chunks in enumerate(stages):
                moe = sum(self.load.is_moe[layer] for chunk in chunks for layer in chunk)
                whole = sum(len(chunk) for chunk in chunks)
                kinds.append((moe, whole - moe, rank == 0, rank == pp - 1))
            self._patterns[pp, vpp] = tuple(
                _Pattern(*kind, ranks, tuple(r for r in range(pp) if kinds[r] == kind))
                for kind, ranks in Counter(kinds).items()
            )
        return self._patterns[pp, vpp]

    def _rank_parameters(self, grid: Grid, rank: int) -> RankParameters:
        key = (grid.tp, grid.pp, grid.vpp, grid.ep, grid.etp, rank)
        if key not in self._parameters:
            stages = even_stages(self.load.layers, grid.pp, grid.vpp)
            self._parameters[key] = rank_parameters(self.load, grid, stages, rank)
        return self._parameters[key]

    def _bytes(self, grid: Grid) -> tuple[LayerBytes, LayerBytes]:
        key = (grid.tp, grid.cp, grid.ep, grid.etp, grid.micro_batch, grid.recompute)
        if key not in self._layer_bytes:
            small, skew = layer_key(grid), self.fullness(grid).p99
            self._layer_bytes[key] = (
                layer_bytes(self.load, small, True, skew),
                layer_bytes(self.load, small, False, skew),
            )
        return self._layer_bytes[key]

    def _end(self, grid: Grid, rank: int) -> StepEnd:
        key = (grid.tp, grid.cp, grid.pp, grid.vpp, grid.ep, grid.etp, rank)
        if key not in self._ends:
            parameters = self._rank_parameters(grid, rank)
            self._ends[key] = step_end(self.load, grid, self.machine, parameters)
        return self._ends[key]

    def _transfer(self, grid: Grid) -> Transfer:
        key = (grid.tp, grid.cp, grid.pp, grid.vpp, grid.micro_batch)
        if key not in self._transfers:
            self._transfers[key] = stage_transfers(self.load, grid, self.machine)
        return self._transfers[key]
