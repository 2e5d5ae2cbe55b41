"""Reducing gradients, gathering parameters, and the optimizer's step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from moepp_megatron.workbench.planning.grid import Grid
from moepp_megatron.workbench.planning.links import gather_seconds, placement
from moepp_megatron.workbench.planning.machine import Machine
from moepp_megatron.workbench.planning.parameters import RankParameters
from moepp_megatron.workbench.planning.workload import Workload


@dataclass(frozen=True, slots=True)
class StepEnd:
    """Costs of the end of a step, in seconds.

    Attributes:
        reduce: Reduce-scatter (or all-reduce) of gradients.
        gather: All-gather of parameters.
        optimizer: Gradient norm, Adam, casts: all bound by memory.
    """

    reduce: float
    gather: float
    optimizer: float

    def exposed(self, grid: Grid, forward_s: float, backward_s: float) -> float:
        """Communication that does not run beside computation, in seconds.

        Args:
            grid: The layout, which says what may overlap.
            forward_s: Forward pass of one micro-batch, beside which parameters are gathered.
            backward_s: Backward pass of the last one, beside which gradients are reduced.
        """
        return self.exposed_reduce(grid, backward_s) + self.exposed_gather(grid, forward_s)

    def exposed_reduce(self, grid: Grid, backward_s: float) -> float:
        """The part of the reduction that runs after the last backward pass."""
        return max(self.reduce - (backward_s if grid.grad_overlap else 0.0), 0.0)

    def exposed_gather(self, grid: Grid, forward_s: float) -> float:
        """The part of the gathering that the first forward pass waits for."""
        return max(self.gather - (forward_s if grid.param_overlap else 0.0), 0.0)


def step_end(load: Workload, grid: Grid, machine: Machine, parameters: RankParameters) -> StepEnd:
    """The end of a step of a rank with these parameters."""
    numbers = load.numbers
    dense = placement(grid, "dp_cp", machine.per_node)
    experts = placement(grid, "edp", machine.per_node)
    reduce = gather_seconds(dense, parameters.dense * numbers.gradient_bytes, machine)
    reduce += gather_seconds(experts, parameters.experts * numbers.gradient_bytes, machine)
    gather = 0.0
    if grid.distributed_optimizer:
        gather = gather_seconds(dense, parameters.dense * numbers.weight_bytes, machine)
        gather += gather_seconds(experts, parameters.experts * numbers.weight_bytes, machine)
    else:
        reduce *= 2  # an all-reduce is a reduce-scatter and an all-gather
    optimizer = _optimizer(load, grid, machine, parameters)
    return StepEnd(reduce, gather, optimizer)


def pipeline_end(
    load: Workload, grid: Grid, machine: Machine, stages: Sequence[RankParameters]
) -> StepEnd:
    """The end of a step of all stages.

    The first stage starts first and ends last, so that its transfers count; the slowest optimizer
    does, because all wait for the gradients' norm.

    Args:
        load: The workload.
        grid: The layout.
        machine: The cluster.
        stages: Parameters of ranks of each kind of stage, the first stage's first.
    """
    ends = [step_end(load, grid, machine, parameters) for parameters in stages]
    return replace(ends[0], optimizer=max(end.optimizer for end in ends))


def _optimizer(load: Workload, grid: Grid, machine: Machine, parameters: RankParameters) -> float:
    numbers = load.numbers
    shards = (grid.dp * grid.cp, grid.edp) if grid.distributed_optimizer else (1, 1)
    own = parameters.dense / shards[0] + parameters.experts / shards[1]
    # Norm and update read the gradient, Adam reads and writes moments and master weights, then
    # writes the weights; clearing the gradients writes all of them.
    state = 2 * (numbers.moments_bytes + max(numbers.master_bytes, 4))
    moved = own * (2 * numbers.gradient_bytes + state + numbers.weight_bytes)
    moved += (parameters.dense + parameters.experts) * numbers.gradient_bytes
    return moved / machine.memory_rate
