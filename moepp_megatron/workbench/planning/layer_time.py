"""Time of one layer and micro-batch on the slowest rank: parts, communication, overlap."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache

from moepp_megatron.workbench.planning.grid import Grid
from moepp_megatron.workbench.planning.machine import Machine
from moepp_megatron.workbench.planning.parts import (
    Layer,
    LayerPart,
    embedding_part,
    layer_parts,
    output_part,
)
from moepp_megatron.workbench.planning.rates import Work, work_seconds
from moepp_megatron.workbench.planning.traffic import layer_traffic
from moepp_megatron.workbench.planning.workload import Workload

# Names beside those of parts.py, in the order of plots.
RECOMPUTE, TENSOR, CONTEXT, EXCHANGE = (
    "recomputation",
    "tensor parallel",
    "context parallel",
    "expert exchange",
)


@dataclass(frozen=True)
class PassTime:
    """Seconds by name; forward and backward of one micro-batch.

    Attributes:
        forward: Total of the forward pass.
        backward: Total of the backward pass.
        seconds: Both together, by name.
        hidden: Communication that runs beside computation, by name; not in `seconds`.
        flop: FLOP done, including recomputation.
    """

    forward: float = 0.0
    backward: float = 0.0
    seconds: Mapping[str, float] = field(default_factory=dict)
    hidden: Mapping[str, float] = field(default_factory=dict)
    flop: float = 0.0

    @property
    def total(self) -> float:
        """Forward and backward, seconds."""
        return self.forward + self.backward


@lru_cache(maxsize=100_000)
def layer_time(
    load: Workload, grid: Grid, machine: Machine, is_moe: bool, rows: float, skew: float
) -> PassTime:
    """Time of a layer; `grid` need not be whole, see `layer_key`."""
    parts = list(layer_parts(load, grid, Layer(is_moe, rows, has_residual=True)))
    traffic = layer_traffic(load, grid, machine, is_moe, skew)
    reached = machine.reached
    overlaps = machine.overlaps and grid.expert_overlap and traffic.experts > 0
    slower = 1.0 / (1.0 - reached.overlap_slowdown) if overlaps else 1.0
    clock = _Clock(machine, slower)
    for part in parts:
        clock.add(part)
    repeats_exchange = grid.recomputes_all or "moe" in grid.recompute
    clock.communicate(TENSOR, traffic.tensor_forward, traffic.tensor_backward)
    if grid.recomputes_all:
        clock.communicate(TENSOR, 0.0, traffic.tensor_forward)
    # Keys and values travel while the core works on those that have arrived.
    cover = (0.0, 0.0)
    if machine.overlaps:
        core = next(part for part in parts if part.name == "attention")
        cover = (_core_seconds(core.forward, machine), _core_seconds(core.backward, machine))
    clock.communicate(
        CONTEXT,
        max(traffic.context - cover[0], 0.0),
        max(2 * traffic.context - cover[1], 0.0),
    )
    if traffic.experts:
        passes = 1 + (1 if repeats_exchange else 0)
        sync = reached.expert_sync_s if load.experts.dispatcher != "allgather" else 0.0
        clock.exchange(traffic.experts, passes * traffic.experts, sync, overlaps)
    return clock.time()


@lru_cache(maxsize=100_000)
def edge_time(load: Workload, grid: Grid, machine: Machine, is_last: bool) -> PassTime:
    """Time of the embedding, or of output layer and loss."""
    clock = _Clock(machine, 1.0)
    clock.add(output_part(load, grid) if is_last else embedding_part(load, grid))
    return clock.time()


def layer_key(grid: Grid) -> Grid:
    """The grid with everything removed that a layer's time does not depend on.

    Many layouts share it, so that their layers are timed once.
    """
    return Grid(
        world=grid.tp * grid.cp * grid.ep * grid.etp,
        tp=grid.tp,
        cp=grid.cp,
        ep=grid.ep,
        etp=grid.etp,
        micro_batch=grid.micro_batch,
        recompute=grid.recompute,
        expert_overlap=grid.expert_overlap,
    )


def _core_seconds(work: Work, machine: Machine) -> float:
    core = replace(work, products=(), moved=0.0, kernels=0)
    return work_seconds(core, machine)


class _Clock:
    """Adds up a pass."""

    def __init__(self, machine: Machine, slower: float) -> None:
        self._machine = machine
        self._slower = slower
        self._forward = self._backward = self._flop = 0.0
        self._seconds: dict[str, float] = defaultdict(float)
        self._hidden: dict[str, float] = defaultdict(float)

    def add(self, part: LayerPart) -> None:
        ahead = work_seconds(part.forward, self._machine) * self._slower
        back = work_seconds(part.backward, self._machine) * self._slower
        again = work_seconds(part.again, self._machine) * self._slower
        self._forward += ahead
        self._backward += back + again
        self._seconds[part.name] += ahead + back
        self._flop += part.forward.flop + part.backward.flop + part.again.flop
        if again:
            self._seconds[RECOMPUTE] += again

    def communicate(self, name: str, forward: float, backward: float) -> None:
        if forward + backward == 0:
            return
        self._forward += forward
        self._backward += backward
        self._seconds[name] += forward + backward

    def exchange(self, forward: float, backward: float, sync: float, overlaps: bool) -> None:
        reached = self._machine.reached
        hidden = (0.0, 0.0)
        if overlaps:
            # Forward of one micro-batch runs beside backward of another: they share the cover.
            cover = self._forward + self._backward
            wanted = reached.overlap * (forward + backward)
            share = min(wanted, cover) / (forward + backward)
            hidden = (forward * share, backward * share)
            self._hidden[EXCHANGE] += sum(hidden)
        self.communicate(EXCHANGE, forward - hidden[0] + sync, backward - hidden[1])

    def time(self) -> PassTime:
        return PassTime(
            self._forward, self._backward, dict(self._seconds), dict(self._hidden), self._flop
        )
