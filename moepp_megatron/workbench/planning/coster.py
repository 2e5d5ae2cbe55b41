"""Fast total time and memory of many layouts of one model; `step.py` and `memory.py` define them.

A hundred thousand layouts share a few hundred kinds of layer and of stage. These are calculated
once; the rest is arithmetic for each layout. Tests compare the results with `step_time` and
`fullest_rank`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from moepp_megatron.workbench.planning.data_parallel import StepEnd, pipeline_end
from moepp_megatron.workbench.planning.grid import Dispatcher, Grid
from moepp_megatron.workbench.planning.imbalance import AssumedRouting, Load
from moepp_megatron.workbench.planning.layer_time import edge_time, layer_key, layer_time
from moepp_megatron.workbench.planning.machine import Machine
from moepp_megatron.workbench.planning.memory import (
    LayerBytes,
    assemble,
    fullest_rows,
    layer_bytes,
)
from moepp_megatron.workbench.planning.parameters import RankParameters, rank_parameters
from moepp_megatron.workbench.planning.pipeline import (
    bubble_seconds,
    even_stages,
    late_messages,
    split_passes,
)
from moepp_megatron.workbench.planning.stage_patterns import (
    Kinds,
    Pattern,
    Sums,
    stage_patterns,
    sums_of,
)
from moepp_megatron.workbench.planning.step import PlannedTransfer, expert_load, stage_transfers
from moepp_megatron.workbench.planning.workload import Workload

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


class Coster:
    """Costs of layouts of one model on one machine.

    Args:
        load: What is trained.
        machine: The cluster.
        routing: How unevenly tokens choose.
        dispatchers: Dispatchers of which each layout takes the fastest; () for the model's own.
    """

    def __init__(
        self,
        load: Workload,
        machine: Machine,
        routing: AssumedRouting,
        dispatchers: Sequence[Dispatcher] = (),
    ) -> None:
        self.load = load
        self._loads_by_name = {name: load.with_dispatcher(name) for name in dispatchers}
        self._chosen: dict[tuple[object, ...], Workload] = {}
        self.machine = machine
        self.routing = routing
        self._kinds: dict[tuple[object, ...], Kinds] = {}
        self._stage_sums: dict[tuple[object, ...], tuple[Sums, ...]] = {}
        self._loads: dict[tuple[int, int], Load] = {}
        self._patterns: dict[tuple[int, int], tuple[Pattern, ...]] = {}
        self._parameters: dict[tuple[int, ...], RankParameters] = {}
        self._layer_bytes: dict[tuple[object, ...], tuple[LayerBytes, LayerBytes]] = {}
        self._ends: dict[tuple[int, ...], StepEnd] = {}
        self._transfers: dict[tuple[int, ...], PlannedTransfer] = {}

    def fullness(self, grid: Grid) -> Load:
        """Load of the fullest rank of an expert-parallel group."""
        key = (grid.ep, grid.tokens(self.load.seq))
        if key not in self._loads:
            self._loads[key] = expert_load(self.load, grid, self.routing)
        return self._loads[key]

    def load_of(self, grid: Grid) -> Workload:
        """The model with the dispatcher that a layout takes."""
        if not self._loads_by_name:
            return self.load
        key = self._key(grid, grid.expert_overlap)
        if key not in self._chosen:
            self._chosen[key] = self._fastest(grid)
        return self._chosen[key]

    def named(self, grid: Grid) -> Grid:
        """The layout with its dispatcher's name, where there was a choice."""
        if not self._loads_by_name or not any(self.load.is_moe):
            return grid
        return replace(grid, dispatcher=self.load_of(grid).experts.dispatcher)

    def _fastest(self, grid: Grid) -> Workload:
        """The model with the dispatcher whose layers are fastest; equals go to the first."""
        experts, small = self.load.experts, layer_key(grid)
        skew = self.fullness(grid).mean
        rows = fullest_rows(self.load, grid, skew)
        allowed = set(self._loads_by_name)
        if grid.expert_overlap:
            # What the combined schedule can free when the call returns (rules/expert_overlap.py).
            allowed &= {"alltoall", "flex"}
        if grid.ep * grid.etp == 1:
            allowed -= {"flex"}
        if grid.ep in (1, experts.num_ffn_experts) or experts.router_topk == 1:
            allowed -= {"alltoall_dedup"}
        loads = [load for name, load in self._loads_by_name.items() if name in allowed]
        assert loads, "alltoall is always allowed"
        return min(
            loads,
            key=lambda load: layer_time(load, small, self.machine, True, rows, skew).total,
        )

    def memory(self, grid: Grid) -> float:
        """Bytes of the fullest rank, including those of libraries."""
        kinds, load = self._bytes(grid), self.load_of(grid)
        most = 0.0
        # The same ranks as `memory.candidate_ranks`.
        for pattern in self._pattern(grid.pp, grid.vpp):
            rank = pattern.examples[0]
            parameters = self._rank_parameters(grid, rank)
            layers = ((pattern.moe, kinds[0]), (pattern.dense, kinds[1]))
            most = max(most, assemble(load, grid, rank, parameters, layers).total)
        return most + self.machine.reached.reserved_gib * GIB

    def cost(self, grid: Grid) -> Cost:
        """Time of a step."""
        count = grid.micro_batches(self.load.batch)
        apart, together = split_passes(grid.pp, grid.vpp, count, grid.expert_overlap)
        alone = self._stages(grid, False)
        beside = self._stages(grid, True) if grid.expert_overlap else alone
        transfer = self._transfer(grid)
        longest, slowest, all_stages = -1.0, 0, 0.0
        for number, pattern in enumerate(self._pattern(grid.pp, grid.vpp)):
            sending = pattern.messages * transfer.blocking
            whole = alone[number].total
            busy = apart * whole + together * beside[number].total + count * sending
            all_stages += pattern.ranks * (whole + sending)
            if busy > longest:
                longest, slowest, own, sent = busy, number, whole + sending, sending
        one, pair = alone[slowest], beside[slowest]
        recompute = apart * one.recompute + together * pair.recompute
        network = apart * one.network + together * pair.network + count * sent
        late = late_messages(grid.pp, grid.vpp, together) * transfer.beside
        # The first pattern is the first rank's.
        end, first = self._end(grid), alone[0]
        return Cost(
            work=longest - recompute - network,
            recompute=recompute,
            network=network,
            bubble=bubble_seconds(all_stages - own, grid.vpp) + late,
            end=end.exposed(grid, first.forward, first.backward) + end.optimizer,
        )

    def _stages(self, grid: Grid, overlaps: bool) -> tuple[Sums, ...]:
        """Times of a micro-batch in the stages of each pattern, alone or beside another."""
        key = (*self._key(grid, overlaps), grid.expert_overlap, grid.pp, grid.vpp)
        if key not in self._stage_sums:
            kinds = self._kind(grid, overlaps)
            patterns = self._pattern(grid.pp, grid.vpp)
            self._stage_sums[key] = tuple(pattern.sums(kinds) for pattern in patterns)
        return self._stage_sums[key]

    @staticmethod
    def _key(grid: Grid, overlaps: bool) -> tuple[object, ...]:
        return (grid.tp, grid.cp, grid.ep, grid.etp, grid.micro_batch, grid.recompute, overlaps)

    def _kind(self, grid: Grid, overlaps: bool) -> Kinds:
        key = (*self._key(grid, overlaps), grid.expert_overlap)
        if key not in self._kinds:
            load, machine = self.load_of(grid), self.machine
            small = layer_key(grid if overlaps else grid.apart)
            skew = self.fullness(grid).mean
            rows = fullest_rows(load, grid, skew)
            self._kinds[key] = (
                sums_of(layer_time(load, small, machine, True, rows, skew)),
                sums_of(layer_time(load, small, machine, False, rows, skew)),
                sums_of(edge_time(load, small, machine, False)),
                sums_of(edge_time(load, small, machine, True)),
            )
        return self._kinds[key]

    def _pattern(self, pp: int, vpp: int) -> tuple[Pattern, ...]:
        if (pp, vpp) not in self._patterns:
            self._patterns[pp, vpp] = stage_patterns(self.load, pp, vpp)
        return self._patterns[pp, vpp]

    def _rank_parameters(self, grid: Grid, rank: int) -> RankParameters:
        key = (grid.tp, grid.pp, grid.vpp, grid.ep, grid.etp, rank)
        if key not in self._parameters:
            stages = even_stages(self.load.layers, grid.pp, grid.vpp)
            self._parameters[key] = rank_parameters(self.load, grid, stages, rank)
        return self._parameters[key]

    def _bytes(self, grid: Grid) -> tuple[LayerBytes, LayerBytes]:
        key = self._key(grid, grid.expert_overlap)
        if key not in self._layer_bytes:
            small, skew, load = layer_key(grid), self.fullness(grid).p99, self.load_of(grid)
            self._layer_bytes[key] = (
                layer_bytes(load, small, True, skew),
                layer_bytes(load, small, False, skew),
            )
        return self._layer_bytes[key]

    def _end(self, grid: Grid) -> StepEnd:
        key = (grid.tp, grid.cp, grid.pp, grid.vpp, grid.ep, grid.etp)
        if key not in self._ends:
            # The last of like ranks: no first MoE layer, which has no gating residual.
            others = [pattern.examples[-1] for pattern in self._pattern(grid.pp, grid.vpp)]
            stages = [self._rank_parameters(grid, rank) for rank in (0, *others)]
            self._ends[key] = pipeline_end(self.load, grid, self.machine, stages)
        return self._ends[key]

    def _transfer(self, grid: Grid) -> PlannedTransfer:
        key = (grid.tp, grid.cp, grid.pp, grid.vpp, grid.micro_batch)
        if key not in self._transfers:
            self._transfers[key] = stage_transfers(self.load, grid, self.machine)
        return self._transfers[key]
