"""Time of a training step: the slowest stage's passes, the pipeline's idle time, the step's end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from moepp_megatron.config.stages import Stages
from moepp_megatron.tools.planning import pipeline
from moepp_megatron.tools.planning.grid import Grid, Recompute
from moepp_megatron.tools.planning.imbalance import AssumedRouting, Load, rank_load
from moepp_megatron.tools.planning.layer_time import (
    PassTime,
    edge_time,
    layer_key,
    layer_time,
    sum_passes,
)
from moepp_megatron.tools.planning.machine import Machine
from moepp_megatron.tools.planning.memory import (
    RankParameters,
    fullest_rows,
    layer_counts,
    rank_parameters,
)
from moepp_megatron.tools.planning.traffic import (
    exchanged_bytes,
    gather_seconds,
    placement,
    send_seconds,
)
from moepp_megatron.tools.planning.workload import Workload


@dataclass(frozen=True, slots=True)
class StepEnd:
    """Costs of the end of a step, in seconds."""

    reduce: float  # reduce-scatter (or all-reduce) of gradients
    gather: float  # all-gather of parameters
    optimizer: float  # gradient norm, Adam, casts: all bound by memory

    def exposed(self, grid: Grid, forward_s: float, backward_s: float) -> float:
        """Seconds without computation: the first forward and the last backward pass cover it."""
        reduce = max(self.reduce - (backward_s if grid.grad_overlap else 0.0), 0.0)
        return reduce + max(self.gather - (forward_s if grid.param_overlap else 0.0), 0.0)


def _step_end(load: Workload, grid: Grid, machine: Machine, parameters: RankParameters) -> StepEnd:
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
    return StepEnd(reduce, gather, _optimizer(load, grid, machine, parameters))


def pipeline_end(
    load: Workload, grid: Grid, machine: Machine, stages: Sequence[RankParameters]
) -> StepEnd:
    """The end of a step of all stages, by ranks of each kind of stage, the first stage's first.

    The first stage starts first and ends last, so that its transfers count; the slowest optimizer
    does, because all wait for the gradients' norm.
    """
    ends = [_step_end(load, grid, machine, parameters) for parameters in stages]
    return replace(ends[0], optimizer=max(end.optimizer for end in ends))


def _optimizer(load: Workload, grid: Grid, machine: Machine, parameters: RankParameters) -> float:
    numbers = load.numbers
    shards = (grid.dp * grid.cp, grid.edp) if grid.distributed_optimizer else (1, 1)
    elements = parameters.dense / shards[0] + parameters.experts / shards[1]
    # Norm and update read the gradient, Adam reads and writes moments and master weights, then
    # writes the weights; clearing the gradients writes all of them.
    weight = min(numbers.master_bytes + numbers.weight_bytes, 4)
    state = 2 * (numbers.moments_bytes + weight)
    moved = elements * (2 * numbers.gradient_bytes + state + numbers.weight_bytes)
    moved += (parameters.dense + parameters.experts) * numbers.gradient_bytes
    return moved / machine.memory_rate


BUBBLE, POINT_TO_POINT = "pipeline bubble", "pipeline transfers"
DATA, OPTIMIZER = "data parallel", "optimizer"


@dataclass(frozen=True)
class StepTime:
    """A step of the whole run."""

    total: float  # seconds
    seconds: Mapping[str, float]  # parts of the total by name
    hidden: Mapping[str, float]  # seconds of communication hidden by computation, by name
    load: Load  # load of the fullest rank
    exchange_bytes: float  # bytes of hidden vectors that all ranks' dispatchers send, forward


def expert_load(load: Workload, grid: Grid, routing: AssumedRouting) -> Load:
    """Load of the fullest rank of an expert-parallel group."""
    selections = round(grid.tokens(load.seq) * grid.ep * load.experts.ffn_per_token)
    return rank_load(routing, load.experts.num_ffn_experts, grid.ep, selections)


def step_time(
    load: Workload,
    grid: Grid,
    machine: Machine,
    routing: AssumedRouting,
    stages: Stages | None = None,
) -> StepTime:
    """Time of one training step in a legal layout; stages are as even as they divide, or these."""
    stages = stages or pipeline.even_stages(load.layers, grid.pp, grid.vpp)
    fullness = expert_load(load, grid, routing)
    unpaired = _stage_passes(load, layer_key(grid.apart), machine, fullness.mean, stages)
    paired = _stage_passes(load, layer_key(grid), machine, fullness.mean, stages)
    transfer = stage_transfers(load, grid, machine)
    micro_batches = grid.micro_batches(load.batch)
    apart, together = pipeline.split_passes(grid.pp, grid.vpp, micro_batches, grid.expert_overlap)
    sending = [
        pipeline.messages_sent(grid.pp, grid.vpp, rank) * transfer.blocking
        for rank in range(grid.pp)
    ]
    busy = [
        apart * one.total + together * other.total + micro_batches * sent
        for one, other, sent in zip(unpaired, paired, sending, strict=True)
    ]
    slowest = max(range(grid.pp), key=lambda rank: busy[rank])
    work = sum_passes([(unpaired[slowest], apart), (paired[slowest], together)])
    seconds, hidden = dict(work.seconds), dict(work.hidden)
    if grid.pp > 1:
        passes = [one.total + sent for one, sent in zip(unpaired, sending, strict=True)]
        late = pipeline.late_messages(grid.pp, grid.vpp, together) * transfer.overlapped
        others = sum(passes) - passes[slowest]
        seconds[BUBBLE] = pipeline.bubble_seconds(others, grid.vpp, grid.is_dualpipe) + late
        seconds[POINT_TO_POINT] = micro_batches * sending[slowest]
    # A step begins and ends with passes of the first stage, which run alone: beside them its
    # parameters and gradients travel.
    parameters = [rank_parameters(load, grid, stages, rank) for rank in range(grid.pp)]
    end = pipeline_end(load, grid, machine, parameters)
    seconds[DATA] = end.exposed(grid, unpaired[0].forward, unpaired[0].backward)
    seconds[OPTIMIZER] = end.optimizer
    hidden[DATA] = end.reduce + end.gather - seconds[DATA]
    sent = exchanged_bytes(load, grid) * (sum(load.is_moe) + load.extra_layers * load.is_moe[-1])
    sent *= grid.world / grid.pp * micro_batches
    return StepTime(sum(seconds.values()), seconds, hidden, fullness, sent)


@lru_cache(maxsize=50_000)
def _stage_passes(
    load: Workload, grid: Grid, machine: Machine, skew: float, stages: Stages
) -> tuple[PassTime, ...]:
    """Passes of one micro-batch through each pipeline rank's layers."""
    rows = fullest_rows(load, grid, skew)

    def time_of(is_moe: bool, recompute: Recompute) -> PassTime:
        return layer_time(load, replace(grid, recompute=recompute), machine, is_moe, rows, skew)

    passes = []
    for rank, chunks in enumerate(stages):
        counts = layer_counts(load, grid, chunks).items()
        parts = [(time_of(*kind), count) for kind, count in counts]
        if rank == 0:
            parts.append((edge_time(load, grid, machine, False), 1))
        if rank == len(stages) - 1:
            parts.append((edge_time(load, grid, machine, True), 1 + load.extra_layers))
            if load.extra_layers:
                parts.append((time_of(load.is_moe[-1], grid.recompute), load.extra_layers))
        passes.append(sum_passes(parts))
    return tuple(passes)


@dataclass(frozen=True, slots=True)
class PlannedTransfer:
    """One message between pipeline stages, seconds."""

    blocking: float  # time for which it holds up its sender
    overlapped: float  # delay of its arrival, while its sender continues


def stage_transfers(load: Workload, grid: Grid, machine: Machine) -> PlannedTransfer:
    """A message between pipeline stages."""
    if grid.pp == 1:
        return PlannedTransfer(0.0, 0.0)
    size = grid.tokens(load.seq) * load.hidden * load.numbers.activation_bytes
    if load.experts.gating_residual:
        # Router logits travel with the hidden states, as fp32.
        size += grid.tokens(load.seq) * load.experts.num_experts * 4
    across = placement(grid, "pp", machine.per_node).nodes > 1
    seconds = send_seconds(across, size, machine)
    share = 1.0 - machine.reached.point_to_point_overlap if grid.vpp > 1 else 1.0
    return PlannedTransfer(seconds * share, seconds * (1.0 - share))
