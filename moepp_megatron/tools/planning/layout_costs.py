"""Costs of many layouts of one model, as `step.py` and `memory.py` say, whose caches they share."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache

from moepp_megatron.config.stages import Stages
from moepp_megatron.tools.planning import memory, pipeline, step
from moepp_megatron.tools.planning.grid import Dispatcher, Grid, States, layer_key
from moepp_megatron.tools.planning.imbalance import Load
from moepp_megatron.tools.planning.layer_time import layer_time
from moepp_megatron.tools.planning.machine import Machine
from moepp_megatron.tools.planning.workload import NumberFormats, Workload


class LayoutCosts:
    """Costs of layouts of one model on one machine, each with the fastest of `dispatchers`."""

    def __init__(
        self,
        load: Workload,
        machine: Machine,
        dispatchers: Sequence[Dispatcher] = (),
        states: Mapping[States, NumberFormats] | None = None,
    ) -> None:
        self._load, self._machine = load, machine
        self._dispatchers = dispatchers
        numbers = states or {(): load.numbers}
        by_name = {None: load} | {name: load.with_dispatcher(name) for name in dispatchers}
        self._loads = {
            (name, kept): replace(load, numbers=numbers[kept])
            for name, load in by_name.items()
            for kept in numbers
        }
        # Of layouts that differ otherwise, the fastest dispatcher is the same.
        self._fastest_of = cache(self._fastest)

    def named(self, grid: Grid) -> Grid:
        """The layout with its dispatcher's name, where there was a choice."""
        name = self._dispatcher(grid) if any(self._load.is_moe) else None
        return grid if name is None else replace(grid, dispatcher=name)

    def memory(self, grid: Grid) -> float:
        """Peak memory of the fullest rank, CUDA and NCCL included, bytes."""
        load, stages = self._loads[self._dispatcher(grid), grid.states], self._stages(grid)
        held = memory.fullest_rank(load, grid, stages, self._fullness(grid).p99)
        return held.total + self._machine.reached.reserved_gib * memory.GIB

    def seconds(self, grid: Grid) -> float:
        """Time of a step."""
        load, skew = self._loads[self._dispatcher(grid), grid.states], self._fullness(grid).mean
        return step.critical_path(load, grid, self._machine, skew, self._stages(grid)).seconds

    def _stages(self, grid: Grid) -> Stages:
        return pipeline.even_stages(self._load.layers, grid.pp, grid.vpp)

    def _fullness(self, grid: Grid) -> Load:
        return step.expert_load(self._load, grid)

    def _dispatcher(self, grid: Grid) -> Dispatcher | None:
        return self._fastest_of(layer_key(grid)) if self._dispatchers else None

    def _fastest(self, grid: Grid) -> Dispatcher:
        """The dispatcher whose layers are fastest; equals go to the first."""
        experts, skew = self._load.experts, self._fullness(grid).mean
        rows = memory.fullest_rows(self._load, grid, skew)
        allowed = set(self._dispatchers)
        if grid.expert_overlap:
            # What the combined schedule can free when the call returns (rules/expert_overlap.py).
            allowed &= {"alltoall", "flex"}
        if grid.ep * grid.etp == 1:
            allowed -= {"flex"}
        if grid.ep in (1, experts.num_ffn_experts) or experts.router_topk == 1:
            allowed -= {"alltoall_dedup"}
        assert allowed, "alltoall is always allowed"

        def seconds(name: Dispatcher) -> float:
            load = self._loads[name, ()]
            return layer_time(load, grid, self._machine, True, rows, skew).total

        return min((name for name in self._dispatchers if name in allowed), key=seconds)
