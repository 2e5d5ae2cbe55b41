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
    fullest_rows,
    layer_bytes,
)
from moepp_megatron.planning.parameters import RankParameters, rank_parameters
from moepp_megatron.planning.pipeline import bubble_passes, even_stages
from moepp_megatron.planning.step import Transfer, expert_load, stage_transfers
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
        self._kinds: dict[tuple[object, ...], tuple[_Sums, _Sums, _Sums, _Sums]] = {}
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
        most = 0.0
        # The same ranks as `memory.candidate_ranks`.
        for pattern in self._pattern(grid.pp, grid.vpp):
            rank = pattern.examples[0]
            parameters = self._rank_parameters(grid, rank)
            layers = (pattern.moe, pattern.dense)
            most = max(most, assemble(self.load, grid, rank, parameters, layers, kinds).total)
        return most + self.machine.reached.reserved_gib * GIB

    def cost(self, grid: Grid) -> Cost:
        """Time of a step."""
        moe, dense, first, last = self._kind(grid)
        passes = bubble_passes(grid.pp, grid.vpp)
        transfer = self._transfer(grid)
        longest, slowest, mean = -1.0, None, 0.0
        for pattern in self._pattern(grid.pp, grid.vpp):
            total = pattern.moe * (moe.forward + moe.backward)
            total += pattern.dense * (dense.forward + dense.backward)
            if pattern.is_first:
                total += first.forward + first.backward
            if pattern.is_last:
                total += last.forward + last.backward
            mean += pattern.ranks * total
            if total > longest:
                longest, slowest = total, pattern
        assert slowest is not None, "a pipeline has stages"
        mean = mean / grid.pp + transfer.idle
        parts = [(moe, slowest.moe), (dense, slowest.dense)]
        parts += [(first, int(slowest.is_first)), (last, int(slowest.is_last))]
        count = grid.micro_batches(self.load.batch)
        recompute = count * sum(n * sums.recompute for sums, n in parts)
        network = count * sum(n * sums.network for sums, n in parts)
        forward = sum(n * sums.forward for sums, n in parts)
        end = self._end(grid, slowest.examples[0])
        exposed = end.exposed(grid, forward, longest - forward)
        return Cost(
            work=count * longest - recompute - network,
            recompute=recompute,
            network=network + count * transfer.steady,
            bubble=passes * mean,
            end=exposed + end.optimizer,
        )

    def _kind(self, grid: Grid) -> tuple[_Sums, _Sums, _Sums, _Sums]:
        key = (
            grid.tp,
            grid.cp,
            grid.ep,
            grid.etp,
            grid.micro_batch,
            grid.recompute,
            grid.expert_overlap,
        )
        if key not in self._kinds:
            small, load, machine = layer_key(grid), self.load, self.machine
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
