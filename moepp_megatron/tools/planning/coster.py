"""Fast total time and memory of many layouts of one model; `step.py` and `memory.py` define them.

A hundred thousand layouts share a few hundred kinds of layer and of stage, which are calculated
once. Tests compare the results with `step_time` and `fullest_rank`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from moepp_megatron.tools.planning import memory, pipeline, step
from moepp_megatron.tools.planning.grid import Dispatcher, Grid, States
from moepp_megatron.tools.planning.imbalance import AssumedRouting, Load
from moepp_megatron.tools.planning.layer_time import (
    PassTime,
    edge_time,
    layer_key,
    layer_time,
    sum_passes,
)
from moepp_megatron.tools.planning.machine import Machine
from moepp_megatron.tools.planning.memory import LayerBytes, RankParameters
from moepp_megatron.tools.planning.workload import NumberFormats, Workload

GIB = 2**30
_Value = TypeVar("_Value")
# Passes of an MoE layer, another layer, the embedding, the output layer and loss.
Kinds = tuple[PassTime, PassTime, PassTime, PassTime]


@dataclass(frozen=True, slots=True)
class _Pattern:
    """Pipeline ranks with the same layers: how many of each kind, and which ends they hold."""

    moe: int  # MoE layers of a rank
    dense: int  # its other layers
    embeddings: int  # 1 on the first rank
    outputs: int  # output layers, those of multi-token prediction included
    messages: int  # messages that it sends to other stages for a micro-batch
    ranks: int  # number of such ranks
    examples: tuple[int, ...]  # their numbers, ascending

    def passes(self, kinds: Kinds) -> PassTime:
        """Passes of a micro-batch through all chunks of such a rank."""
        counts = (self.moe, self.dense, self.embeddings, self.outputs)
        return sum_passes([(kind, count) for count, kind in zip(counts, kinds, strict=True)])


def _stage_patterns(load: Workload, pp: int, vpp: int) -> tuple[_Pattern, ...]:
    """All patterns of a pipeline of even stages, the first rank's first."""
    kinds: list[tuple[int, int, int, int, int]] = []
    for rank, chunks in enumerate(pipeline.even_stages(load.layers, pp, vpp)):
        layers = [load.is_moe[layer] for chunk in chunks for layer in chunk]
        outputs = (1 + load.extra_layers) * (rank == pp - 1)
        if outputs:
            layers += [load.is_moe[-1]] * load.extra_layers
        ends = (int(rank == 0), outputs, pipeline.messages_sent(pp, vpp, rank))
        kinds.append((sum(layers), len(layers) - sum(layers), *ends))
    return tuple(
        _Pattern(*kind, ranks, tuple(rank for rank in range(pp) if kinds[rank] == kind))
        for kind, ranks in Counter(kinds).items()
    )


@dataclass(frozen=True, slots=True)
class Cost:
    """A step in five sums, seconds."""

    work: float  # computation that every layout does
    recompute: float  # computation repeated in the backward pass
    network: float  # exposed communication of layers and stages
    bubble: float  # idle time of the pipeline
    end: float  # exposed data-parallel communication and the optimizer

    @property
    def total(self) -> float:
        """The step, seconds."""
        return self.work + self.recompute + self.network + self.bubble + self.end


class Coster:
    """Costs of layouts of one model on one machine, each with the fastest of `dispatchers`."""

    def __init__(
        self,
        load: Workload,
        machine: Machine,
        routing: AssumedRouting,
        dispatchers: Sequence[Dispatcher] = (),
        states: Mapping[States, NumberFormats] | None = None,
    ) -> None:
        self.load, self.machine, self.routing = load, machine, routing
        self._numbers = states or {(): load.numbers}
        self._loads_by_name = {name: load.with_dispatcher(name) for name in dispatchers}
        # What is calculated once, by kind and by what it depends on.
        self._known: dict[tuple[object, ...], Any] = {}

    def _once(self, key: tuple[object, ...], calculate: Callable[[], _Value]) -> _Value:
        value: _Value | None = self._known.get(key)
        if value is None:
            value = self._known[key] = calculate()
        return value

    def fullness(self, grid: Grid) -> Load:
        """Load of the fullest rank of an expert-parallel group."""
        key = ("load", grid.ep, grid.tokens(self.load.seq))
        return self._once(key, lambda: step.expert_load(self.load, grid, self.routing))

    def load_of(self, grid: Grid) -> Workload:
        """The model with the dispatcher that a layout takes."""
        if not self._loads_by_name:
            return self.load
        key = ("chosen", *self._key(grid, grid.expert_overlap))
        return self._once(key, lambda: self._fastest(grid))

    def named(self, grid: Grid) -> Grid:
        """The layout with its dispatcher's name, where there was a choice."""
        if not self._loads_by_name or not any(self.load.is_moe):
            return grid
        return replace(grid, dispatcher=self.load_of(grid).experts.dispatcher)

    def _fastest(self, grid: Grid) -> Workload:
        """The model with the dispatcher whose layers are fastest; equals go to the first."""
        experts, small = self.load.experts, layer_key(grid)
        skew = self.fullness(grid).mean
        rows = memory.fullest_rows(self.load, grid, skew)
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
            loads, key=lambda load: layer_time(load, small, self.machine, True, rows, skew).total
        )

    def memory(self, grid: Grid) -> float:
        """Peak bytes of the fullest rank, CUDA and NCCL included."""
        kinds, load = self._bytes(grid), self._with_states(grid)
        most = 0.0
        # The same ranks as `memory.candidate_ranks`.
        for pattern in self._pattern(grid.pp, grid.vpp):
            rank = pattern.examples[0]
            parameters = self._rank_parameters(grid, rank)
            layers = ((pattern.moe, kinds[0]), (pattern.dense, kinds[1]))
            most = max(most, memory.assemble(load, grid, rank, parameters, layers).total)
        return most + self.machine.reached.reserved_gib * GIB

    def _with_states(self, grid: Grid) -> Workload:
        """The model with the states of a layout."""
        load, numbers = self.load_of(grid), self._numbers[grid.states]
        key = ("states", load.experts.dispatcher, grid.states)
        return self._once(key, lambda: replace(load, numbers=numbers))

    def cost(self, grid: Grid) -> Cost:
        """Time of a step."""
        count = grid.micro_batches(self.load.batch)
        apart, together = pipeline.split_passes(grid.pp, grid.vpp, count, grid.expert_overlap)
        unpaired = self._stages(grid, False)
        paired = self._stages(grid, True) if grid.expert_overlap else unpaired
        transfer = self._transfer(grid)
        longest, slowest, all_stages = -1.0, 0, 0.0
        for number, pattern in enumerate(self._pattern(grid.pp, grid.vpp)):
            sending = pattern.messages * transfer.blocking
            seconds = unpaired[number].total
            busy = apart * seconds + together * paired[number].total + count * sending
            all_stages += pattern.ranks * (seconds + sending)
            if busy > longest:
                longest, slowest, passes, sent = busy, number, seconds + sending, sending
        single, pair = unpaired[slowest], paired[slowest]
        recompute = apart * single.recompute + together * pair.recompute
        network = apart * single.network + together * pair.network + count * sent
        late = pipeline.late_messages(grid.pp, grid.vpp, together) * transfer.overlapped
        # The first pattern is the first rank's.
        end, first = self._end(grid), unpaired[0]
        return Cost(
            work=longest - recompute - network,
            recompute=recompute,
            network=network,
            bubble=pipeline.bubble_seconds(all_stages - passes, grid.vpp) + late,
            end=end.exposed(grid, first.forward, first.backward) + end.optimizer,
        )

    @staticmethod
    def _key(grid: Grid, overlaps: bool) -> tuple[object, ...]:
        return (grid.tp, grid.cp, grid.ep, grid.etp, grid.micro_batch, grid.recompute, overlaps)

    def _stages(self, grid: Grid, overlaps: bool) -> tuple[PassTime, ...]:
        """Times of a micro-batch in the stages of each pattern, unpaired or with another."""
        key = ("stages", *self._key(grid, overlaps), grid.expert_overlap, grid.pp, grid.vpp)
        return self._once(
            key,
            lambda: tuple(
                pattern.passes(self._kind(grid, overlaps))
                for pattern in self._pattern(grid.pp, grid.vpp)
            ),
        )

    def _kind(self, grid: Grid, overlaps: bool) -> Kinds:
        def calculate() -> Kinds:
            load, machine, skew = self.load_of(grid), self.machine, self.fullness(grid).mean
            small, rows = (
                layer_key(grid if overlaps else grid.apart),
                memory.fullest_rows(load, grid, skew),
            )
            return (
                layer_time(load, small, machine, True, rows, skew),
                layer_time(load, small, machine, False, rows, skew),
                edge_time(load, small, machine, False),
                edge_time(load, small, machine, True),
            )

        key = ("kinds", *self._key(grid, overlaps), grid.expert_overlap)
        return self._once(key, calculate)

    def _pattern(self, pp: int, vpp: int) -> tuple[_Pattern, ...]:
        return self._once(("pattern", pp, vpp), lambda: _stage_patterns(self.load, pp, vpp))

    def _rank_parameters(self, grid: Grid, rank: int) -> RankParameters:
        stages = pipeline.even_stages(self.load.layers, grid.pp, grid.vpp)
        key = ("parameters", grid.tp, grid.pp, grid.vpp, grid.ep, grid.etp, rank)
        return self._once(key, lambda: memory.rank_parameters(self.load, grid, stages, rank))

    def _bytes(self, grid: Grid) -> tuple[LayerBytes, LayerBytes]:
        def calculate() -> tuple[LayerBytes, LayerBytes]:
            small, skew, load = layer_key(grid), self.fullness(grid).p99, self.load_of(grid)
            moe = memory.layer_bytes(load, small, True, skew)
            return moe, memory.layer_bytes(load, small, False, skew)

        return self._once(("bytes", *self._key(grid, grid.expert_overlap)), calculate)

    def _end(self, grid: Grid) -> step.StepEnd:
        def calculate() -> step.StepEnd:
            # The last of like ranks: no first MoE layer, which has no gating residual.
            others = [pattern.examples[-1] for pattern in self._pattern(grid.pp, grid.vpp)]
            stages = [self._rank_parameters(grid, rank) for rank in (0, *others)]
            return step.pipeline_end(self._with_states(grid), grid, self.machine, stages)

        key = ("end", grid.states, grid.tp, grid.cp, grid.pp, grid.vpp, grid.ep, grid.etp)
        return self._once(key, calculate)

    def _transfer(self, grid: Grid) -> step.PlannedTransfer:
        key = ("transfer", grid.tp, grid.cp, grid.pp, grid.vpp, grid.micro_batch)
        return self._once(key, lambda: step.stage_transfers(self.load, grid, self.machine))
