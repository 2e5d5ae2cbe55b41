"""Simulates steps of a layout: every pass of every pipeline, at drawn load.

Ranks that advance together are one column: the ranks that exchange tokens in any layer of a stage,
which is the larger of an attention replica (tp cp) and an expert-parallel group (etp ep), because
both wait for each other in every layer. A column goes through all stages; columns meet at the
step's end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm

import numpy as np
from numpy.typing import NDArray

from moepp_megatron.config.stages import Stages
from moepp_megatron.workbench.planning.data_parallel import StepEnd, step_end
from moepp_megatron.workbench.planning.grid import Grid
from moepp_megatron.workbench.planning.layer_time import EXCHANGE, layer_key, layer_time
from moepp_megatron.workbench.planning.links import placement
from moepp_megatron.workbench.planning.machine import Machine
from moepp_megatron.workbench.planning.memory import fullest_rows
from moepp_megatron.workbench.planning.parameters import rank_parameters
from moepp_megatron.workbench.planning.pipeline import even_stages
from moepp_megatron.workbench.planning.simulation.contention import Fabric
from moepp_megatron.workbench.planning.simulation.events import Durations, Message, play
from moepp_megatron.workbench.planning.simulation.faults import Faults, slow_factors
from moepp_megatron.workbench.planning.simulation.load import LoadSource, fullest_ranks
from moepp_megatron.workbench.planning.simulation.pass_times import (
    computing_share,
    dense_time,
    end_times,
    moe_table,
)
from moepp_megatron.workbench.planning.simulation.result import Simulated, Timeline
from moepp_megatron.workbench.planning.simulation.schedule import step_graph
from moepp_megatron.workbench.planning.step import stage_transfers
from moepp_megatron.workbench.planning.workload import Workload

Values = NDArray[np.float64]

# Numbers held at a time: 8 bytes each, in a handful of arrays.
_MOST_VALUES = 6_000_000


@dataclass(frozen=True)
class Conditions:
    """The conditions of a simulated step.

    Attributes:
        source: Source of the load.
        fabric: The network beyond nodes; None for one that nothing slows down.
        faults: Faults with their slow nodes; None for none.
    """

    source: LoadSource
    fabric: Fabric | None = None
    faults: Faults | None = None


def simulate(
    load: Workload,
    grid: Grid,
    machine: Machine,
    conditions: Conditions,
    steps: int,
    seed: int,
    stages: Stages | None = None,
) -> Simulated:
    """Simulate steps.

    Args:
        load: The workload.
        grid: A legal layout.
        machine: The cluster.
        conditions: Load, network, slow nodes.
        steps: Number of steps; each with a popularity of experts of its own.
        seed: Seed of all random draws; the same seed gives the same load under all conditions.
        stages: Layers by pipeline rank and chunk; by default as even as they divide.
    """
    return _Player(load, grid, machine, conditions, seed, stages).play(steps)


class _Player:
    def __init__(
        self,
        load: Workload,
        grid: Grid,
        machine: Machine,
        conditions: Conditions,
        seed: int,
        stages: Stages | None,
    ) -> None:
        self._load, self._grid, self._machine = load, grid, machine
        self._conditions = conditions
        self._stages = stages or even_stages(load.layers, grid.pp, grid.vpp)
        # One stream a cause, so that one cause does not change what another draws.
        streams = np.random.SeedSequence(seed).spawn(3)
        self._load_rng, self._net_rng, slow_rng = map(np.random.default_rng, streams)
        self._column = lcm(grid.tp * grid.cp, grid.etp * grid.ep)
        self._columns = grid.world // grid.pp // self._column
        # Expert-parallel groups of a column: all but one only where tp cp is larger.
        self._groups = self._column // (grid.etp * grid.ep)
        self._count = grid.micro_batches(load.batch)
        self._place = placement(grid, "ep", machine.per_node)
        self._slow = self._slow_columns(slow_rng)
        # Alone a pass cannot hide its exchange, and nothing slows its computation down.
        self._alone = grid.apart
        self._graph = step_graph(grid.pp, grid.vpp, self._count, grid.expert_overlap)
        transfer = stage_transfers(load, grid, machine)
        self._message = Message(transfer.blocking, transfer.beside)

    def play(self, steps: int) -> Simulated:
        """Simulate all steps, as many at a time as memory allows."""
        grid, load = self._grid, self._load
        layers = sum(load.is_moe) + load.extra_layers
        popularity = self._popularity(steps, layers)
        highest = self._highest(popularity)
        ends = [self._end(rank) for rank in range(grid.pp)]
        held = len(self._graph) * self._columns
        batch = max(min(_MOST_VALUES // held, steps), 1)
        totals, busy, fullest = [], [], []
        timeline: Timeline | None = None
        slowest, parts = 0, (0.0, 0.0)
        for start in range(0, steps, batch):
            count = min(batch, steps - start)
            chosen = None if popularity is None else popularity[start : start + count]
            durations, skews = self._durations(chosen, highest, count)
            first, after, slowest = self._data_parallel(durations, ends)
            keeps = timeline is None
            played = play(self._graph, durations, self._message, first, keeps)
            # Columns wait for each other where gradients are reduced, stages for the norm.
            met = played.finish.max(axis=2) + after[:, None]
            optimizer = max(end.optimizer for end in ends)
            totals.append(met.max(axis=0) + optimizer)
            last = played.finish.max(axis=0).argmax(axis=1)
            busy.append(played.busy[slowest, np.arange(count), last])
            parts = (float(first[slowest] + after[slowest]), optimizer)
            if skews is not None:
                fullest.append(skews)
            if timeline is None:
                assert played.starts is not None, "starts were kept"
                column = int(last[0])
                timeline = Timeline.of(
                    self._graph,
                    played.starts[:, 0, column],
                    played.ends[:, 0, column],
                    totals[0][0],
                )
        assert timeline is not None, "at least one step was played"
        total = np.concatenate(totals)
        work = float(np.concatenate(busy).mean())
        sending = float(played.sending[slowest])
        return Simulated(
            totals=total,
            work=work,
            transfers=sending,
            bubble=float(total.mean()) - work - sending - sum(parts),
            data=parts[0],
            optimizer=parts[1],
            loads=np.concatenate(fullest) if fullest else np.ones(1),
            columns=self._columns,
            ranks_per_column=self._column,
            passes=sum(len(node.works) for node in self._graph) * self._columns,
            held_up=float((self._slow > 1.0).mean()),
            timeline=timeline,
        )

    def _data_parallel(
        self, durations: Durations, ends: Sequence[StepEnd]
    ) -> tuple[Values, Values, int]:
        """Exposed time of gathering weights and of reducing gradients [pp]; the slowest rank."""
        per_rank = self._per_rank(durations.forward), self._per_rank(durations.backward)
        ahead, back = (one.mean(axis=(1, 2)) for one in per_rank)
        of_ahead, of_back = zip(ends, ahead, strict=True), zip(ends, back, strict=True)
        first = np.array([end.exposed_gather(self._grid, one) for end, one in of_ahead])
        after = np.array([end.exposed_reduce(self._grid, one) for end, one in of_back])
        return first, after, int((ahead + back).argmax())

    def _popularity(self, steps: int, layers: int) -> Values | None:
        source, experts = self._conditions.source, self._load.experts
        if source.is_even or self._grid.ep == 1 or layers == 0:
            return None
        return source.popularity(self._load_rng, steps, layers, experts.num_ffn_experts)

    def _selections(self) -> int:
        tokens = self._grid.tokens(self._load.seq) * self._grid.ep
        return round(tokens * self._load.experts.ffn_per_token)

    def _highest(self, popularity: Values | None) -> float:
        """A load that no draw exceeds."""
        if popularity is None:
            return 1.0
        ranks, count = self._grid.ep, self._selections()
        share = float(popularity.reshape(*popularity.shape[:2], ranks, -1).sum(-1).max())
        # Eight standard deviations and ten rows above the highest expectation.
        return (count * share + 8 * (count * share) ** 0.5 + 10) * ranks / count

    def _durations(
        self, popularity: Values | None, highest: float, steps: int
    ) -> tuple[Durations, Values | None]:
        """Durations of all passes [stages, micro-batches, steps, columns]; every layer's load."""
        load, shape = self._load, (self._count, steps, self._columns)
        layers = sum(load.is_moe) + load.extra_layers
        skews = None
        if popularity is not None:
            skews = [self._skew(popularity[:, [layer]]) for layer in range(layers)]
        slowness = [self._slowness(shape) for _ in range(layers)]
        alone = self._passes(self._alone, highest, skews, slowness, steps)
        beside: tuple[Values | None, Values | None] = (None, None)
        if self._grid.expert_overlap:
            beside = self._passes(self._grid, highest, skews, slowness, steps)
        loads = None
        if skews is not None:
            loads = np.concatenate([skew.mean(axis=(0, 2)) for skew in skews])
        return Durations(*alone, *beside), loads

    def _passes(
        self,
        grid: Grid,
        highest: float,
        skews: list[Values] | None,
        slowness: list[Values | None],
        steps: int,
    ) -> tuple[Values, Values]:
        """Forward and backward passes [stages, micro-batches, steps, columns]."""
        load = self._load
        shape = (grid.pp * grid.vpp, self._count, steps, self._columns)
        forward, backward = np.zeros(shape), np.zeros(shape)
        table = moe_table(load, grid, self._machine, highest)
        dense = dense_time(load, grid, self._machine)
        number = 0
        for layer, stage in self._layers():
            slow = self._slow[stage % grid.pp]
            if layer is not None and not load.is_moe[layer]:
                factor = 1.0 + (slow - 1.0) * computing_share(dense)
                forward[stage] += dense.forward * factor
                backward[stage] += dense.backward * factor
                continue
            skew = np.ones(shape[1:]) if skews is None else skews[number]
            ahead, back = table.times(skew, slowness[number])
            factor = 1.0 + (slow - 1.0) * table.computing
            forward[stage] += ahead * factor
            backward[stage] += back * factor
            number += 1
        first, last = end_times(load, grid, self._machine)
        forward[0] += first.forward * self._slow[0]
        backward[0] += first.backward * self._slow[0]
        extra = 1 + load.extra_layers
        forward[-1] += extra * last.forward * self._slow[-1]
        backward[-1] += extra * last.backward * self._slow[-1]
        return forward, backward

    def _layers(self) -> list[tuple[int | None, int]]:
        """Layers in order with their stage; None for those of multi-token prediction."""
        pp = self._grid.pp
        placed: list[tuple[int | None, int]] = [
            (layer, chunk * pp + rank)
            for rank, chunks in enumerate(self._stages)
            for chunk, layers in enumerate(chunks)
            for layer in layers
        ]
        placed.sort()
        return placed + [(None, pp * self._grid.vpp - 1)] * self._load.extra_layers

    def _skew(self, popularity: Values) -> Values:
        """Fullest rank over the mean [micro-batches, steps, columns] in one layer."""
        draws = self._count * self._columns * self._groups
        found = fullest_ranks(self._load_rng, popularity, self._grid.ep, self._selections(), draws)
        skew = found.reshape(len(popularity), self._count, self._columns, self._groups).max(-1)
        return skew.transpose(1, 0, 2)

    def _slowness(self, shape: tuple[int, ...]) -> Values | None:
        fabric = self._conditions.fabric
        if fabric is None or fabric.is_idle(self._place):
            return None
        key, load = layer_key(self._grid), self._load
        time = layer_time(load, key, self._machine, True, fullest_rows(load, self._grid), 1.0)
        network = time.seconds.get(EXCHANGE, 0.0) + time.hidden.get(EXCHANGE, 0.0)
        return fabric.slowness(self._net_rng, self._place, network / time.total, shape)

    def _slow_columns(self, rng: np.random.Generator) -> Values:
        """Slow-down of computation [pp, columns]."""
        grid, faults = self._grid, self._conditions.faults
        if faults is None or faults.slow_nodes == 0:
            return np.ones((grid.pp, self._columns))
        ranks = np.arange(grid.world).reshape(grid.pp, self._columns, self._column)
        return slow_factors(rng, faults, ranks, self._machine.per_node)

    def _per_rank(self, stages: Values) -> Values:
        """A whole micro-batch through each pipeline rank's chunks, mean of micro-batches."""
        grid = self._grid
        mean = stages.mean(axis=1)
        return mean.reshape(grid.vpp, grid.pp, *mean.shape[1:]).sum(axis=0)

    def _end(self, rank: int) -> StepEnd:
        parameters = rank_parameters(self._load, self._grid, self._stages, rank)
        return step_end(self._load, self._grid, self._machine, parameters)
