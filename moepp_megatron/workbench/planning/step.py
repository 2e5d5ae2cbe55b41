"""Time of a training step: the slowest stage's passes, the pipeline's idle time, the step's end."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from moepp_megatron.config.stages import Stages
from moepp_megatron.workbench.planning.data_parallel import pipeline_end
from moepp_megatron.workbench.planning.grid import Grid, Recompute
from moepp_megatron.workbench.planning.imbalance import AssumedRouting, Load, rank_load
from moepp_megatron.workbench.planning.layer_time import PassTime, edge_time, layer_key, layer_time
from moepp_megatron.workbench.planning.links import placement, send_seconds
from moepp_megatron.workbench.planning.machine import Machine
from moepp_megatron.workbench.planning.memory import fullest_rows, layer_counts
from moepp_megatron.workbench.planning.parameters import rank_parameters
from moepp_megatron.workbench.planning.pipeline import (
    bubble_seconds,
    even_stages,
    late_messages,
    messages_sent,
    split_passes,
)
from moepp_megatron.workbench.planning.traffic import exchanged_bytes
from moepp_megatron.workbench.planning.workload import Workload

BUBBLE, POINT_TO_POINT, DATA, OPTIMIZER = (
    "pipeline bubble",
    "pipeline transfers",
    "data parallel",
    "optimizer",
)


@dataclass(frozen=True)
class StepTime:
    """A step of the whole run.

    Attributes:
        total: Seconds.
        seconds: Parts of the total by name.
        hidden: Seconds of communication beside computation, by name.
        load: Load of the fullest rank.
        exchange_bytes: Bytes of hidden vectors that all ranks' dispatchers send, forward.
        hardware_flop: FLOP of a rank of the slowest stage, including recomputation.
    """

    total: float
    seconds: Mapping[str, float]
    hidden: Mapping[str, float]
    load: Load
    exchange_bytes: float
    hardware_flop: float


def expert_load(load: Workload, grid: Grid, routing: AssumedRouting) -> Load:
    """Load of the fullest rank of an expert-parallel group."""
    group_tokens = grid.tokens(load.seq) * grid.ep
    selections = round(group_tokens * load.experts.ffn_per_token)
    return rank_load(routing, load.experts.num_ffn_experts, grid.ep, selections)


def step_time(
    load: Workload,
    grid: Grid,
    machine: Machine,
    routing: AssumedRouting,
    stages: Stages | None = None,
) -> StepTime:
    """Time of one training step.

    Args:
        load: The workload.
        grid: A legal layout.
        machine: The cluster.
        routing: Unevenness of the routing.
        stages: Layers by pipeline rank and chunk; by default as even as they divide.
    """
    stages = stages or even_stages(load.layers, grid.pp, grid.vpp)
    fullness = expert_load(load, grid, routing)
    alone = stage_passes(load, layer_key(grid.apart), machine, fullness.mean, stages)
    beside = stage_passes(load, layer_key(grid), machine, fullness.mean, stages)
    transfer = stage_transfers(load, grid, machine)
    micro_batches = grid.micro_batches(load.batch)
    apart, together = split_passes(grid.pp, grid.vpp, micro_batches, grid.expert_overlap)
    sending = [
        messages_sent(grid.pp, grid.vpp, rank) * transfer.blocking for rank in range(grid.pp)
    ]
    busy = [
        apart * one.total + together * other.total + micro_batches * sent
        for one, other, sent in zip(alone, beside, sending, strict=True)
    ]
    slowest = max(range(grid.pp), key=lambda rank: busy[rank])
    work = _sum([(alone[slowest], apart), (beside[slowest], together)])
    seconds, hidden = dict(work.seconds), dict(work.hidden)
    if grid.pp > 1:
        whole = [one.total + sent for one, sent in zip(alone, sending, strict=True)]
        late = late_messages(grid.pp, grid.vpp, together) * transfer.beside
        seconds[BUBBLE] = (
            bubble_seconds(sum(whole) - whole[slowest], grid.vpp, grid.is_dualpipe) + late
        )
        seconds[POINT_TO_POINT] = micro_batches * sending[slowest]
    # A step begins and ends with passes of the first stage, which run alone: beside them its
    # parameters and gradients travel.
    parameters = [rank_parameters(load, grid, stages, rank) for rank in range(grid.pp)]
    end = pipeline_end(load, grid, machine, parameters)
    seconds[DATA] = end.exposed(grid, alone[0].forward, alone[0].backward)
    seconds[OPTIMIZER] = end.optimizer
    hidden[DATA] = end.reduce + end.gather - seconds[DATA]
    moe_layers = sum(load.is_moe) + load.extra_layers
    ranks_of_layer = grid.world / grid.pp
    sent = exchanged_bytes(load, grid) * moe_layers * ranks_of_layer * micro_batches
    return StepTime(
        total=sum(seconds.values()),
        seconds=seconds,
        hidden=hidden,
        load=fullness,
        exchange_bytes=sent,
        hardware_flop=work.flop,
    )


@lru_cache(maxsize=50_000)
def stage_passes(
    load: Workload, grid: Grid, machine: Machine, skew: float, stages: Stages
) -> tuple[PassTime, ...]:
    """Passes of one micro-batch through each pipeline rank's layers."""
    rows = fullest_rows(load, grid, skew)

    def timed(is_moe: bool, recompute: Recompute) -> PassTime:
        return layer_time(load, replace(grid, recompute=recompute), machine, is_moe, rows, skew)

    passes = []
    for rank, chunks in enumerate(stages):
        counts = layer_counts(load, grid, chunks)
        parts: list[tuple[PassTime, float]] = [
            (timed(*kind), count) for kind, count in counts.items()
        ]
        if rank == 0:
            parts.append((edge_time(load, grid, machine, False), 1))
        if rank == len(stages) - 1:
            parts.append((edge_time(load, grid, machine, True), 1 + load.extra_layers))
            if load.extra_layers:
                parts.append((timed(True, grid.recompute), load.extra_layers))
        passes.append(_sum(parts))
    return tuple(passes)


def _sum(parts: Sequence[tuple[PassTime, float]]) -> PassTime:
    seconds: dict[str, float] = defaultdict(float)
    hidden: dict[str, float] = defaultdict(float)
    for time, count in parts:
        for name, value in time.seconds.items():
            seconds[name] += count * value
        for name, value in time.hidden.items():
            hidden[name] += count * value
    return PassTime(
        forward=sum(count * time.forward for time, count in parts),
        backward=sum(count * time.backward for time, count in parts),
        seconds=dict(seconds),
        hidden=dict(hidden),
        flop=sum(count * time.flop for time, count in parts),
    )


@dataclass(frozen=True, slots=True)
class PlannedTransfer:
    """One message between pipeline stages, seconds.

    Attributes:
        blocking: Time for which it holds up its sender.
        beside: Delay of its arrival, while its sender continues.
    """

    blocking: float
    beside: float


def stage_transfers(load: Workload, grid: Grid, machine: Machine) -> PlannedTransfer:
    """A message between pipeline stages."""
    if grid.pp == 1:
        return PlannedTransfer(0.0, 0.0)
    size = grid.tokens(load.seq) * load.hidden * load.numbers.activation_bytes
    if load.experts.gating_residual:
        # Router logits travel with the hidden states, as fp32.
        size += grid.tokens(load.seq) * load.experts.num_experts * 4
    across = placement(grid, "pp", machine.per_node).nodes > 1
    whole = send_seconds(across, size, machine)
    share = 1.0 - machine.reached.point_to_point_overlap if grid.vpp > 1 else 1.0
    return PlannedTransfer(whole * share, whole * (1.0 - share))
