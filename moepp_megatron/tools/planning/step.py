"""Time of a training step: the slowest stage's passes, the pipeline's idle time, the step's end."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from moepp_megatron.config.stages import Stages
from moepp_megatron.tools.planning import pipeline
from moepp_megatron.tools.planning.grid import Grid
from moepp_megatron.tools.planning.imbalance import Load, rank_load
from moepp_megatron.tools.planning.layer_time import PassTime, edge_time, layer_time, sum_passes
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
class _StepEnd:
    """Costs of the end of a step, in seconds."""

    reduce: float  # reduce-scatter (or all-reduce) of gradients
    gather: float  # all-gather of parameters
    optimizer: float  # gradient norm, Adam, casts: all bound by memory

    def exposed(self, grid: Grid, forward_s: float, backward_s: float) -> float:
        """Seconds without computation: the first forward and the last backward pass cover it."""
        reduce = max(self.reduce - (backward_s if grid.grad_overlap else 0.0), 0.0)
        return reduce + max(self.gather - (forward_s if grid.param_overlap else 0.0), 0.0)


def _step_end(load: Workload, grid: Grid, machine: Machine, stages: Stages) -> _StepEnd:
    """The end of a step, on the stage that decides each part of it."""
    # The first stage starts first and ends last, so that its transfers count; the slowest optimizer
    # does, because all wait for the gradients' norm.
    ranks = rank_parameters(load, grid, stages)
    groups = {"dp_cp": ranks[0].dense, "edp": ranks[0].experts}

    def seconds(size: int) -> float:
        return sum(
            gather_seconds(placement(grid, name, machine.per_node), count * size, machine)
            for name, count in groups.items()
        )

    reduce, gather = seconds(load.numbers.gradient_bytes), 0.0
    if grid.distributed_optimizer:
        gather = seconds(load.numbers.weight_bytes)
    else:
        reduce *= 2  # an all-reduce is a reduce-scatter and an all-gather
    optimizers = [_optimizer(load, grid, machine, of_rank) for of_rank in dict.fromkeys(ranks)]
    return _StepEnd(reduce, gather, max(optimizers))


def _optimizer(load: Workload, grid: Grid, machine: Machine, parameters: RankParameters) -> float:
    numbers = load.numbers
    elements = parameters.dense / grid.shards[0] + parameters.experts / grid.shards[1]
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


def expert_load(load: Workload, grid: Grid) -> Load:
    """Load of the fullest rank of an expert-parallel group."""
    selections = round(grid.tokens(load.seq) * grid.ep * load.experts.ffn_per_token)
    return rank_load(load.evenness, load.experts.num_ffn_experts, grid.ep, selections)


@dataclass(frozen=True, slots=True)
class _CriticalPath:
    """The parts of a step's time: the slowest rank's passes, and what is between and after them."""

    alone: PassTime  # of the slowest rank, a micro-batch
    paired: PassTime  # the same beside the opposite pass of another micro-batch
    passes: tuple[float, float]  # number of both
    sending: float  # seconds in which the slowest rank is held up by its messages
    bubble: float  # idle time of the slowest rank
    end: _StepEnd
    data: float  # seconds of the end's communication that nothing hides

    @property
    def seconds(self) -> float:
        """Time of the step."""
        apart, together = self.passes
        busy = apart * self.alone.total + together * self.paired.total
        return busy + self.sending + self.bubble + self.data + self.end.optimizer


def critical_path(
    load: Workload, grid: Grid, machine: Machine, skew: float, stages: Stages
) -> _CriticalPath:
    """The critical path of a step in a legal layout; `skew`: rows of the fullest rank over mean."""
    alone = _stage_passes(load, grid.apart.layer_key, machine, skew, stages)
    paired = alone
    if grid.expert_overlap:
        paired = _stage_passes(load, grid.layer_key, machine, skew, stages)
    blocking, overlapped = _stage_transfers(load, grid, machine)
    micro_batches = grid.micro_batches(load.batch)
    apart, together = pipeline.split_passes(grid.pp, grid.vpp, micro_batches, grid.expert_overlap)
    # Of a micro-batch each chunk sends both ways, but before the first stage and after the last.
    last = grid.pp - 1
    sending = [(2 * grid.vpp - (rank == 0) - (rank == last)) * blocking for rank in range(grid.pp)]
    busy = [
        apart * one.total + together * other.total + micro_batches * sent
        for one, other, sent in zip(alone, paired, sending, strict=True)
    ]
    slowest = busy.index(max(busy))
    passes = [one.total + sent for one, sent in zip(alone, sending, strict=True)]
    others = sum(passes) - passes[slowest]
    bubble = pipeline.bubble_seconds(others, grid.vpp, grid.is_dualpipe)
    bubble += pipeline.late_messages(grid.pp, grid.vpp, together) * overlapped
    # A step begins and ends with passes of the first stage, which run alone: beside them its
    # parameters and gradients travel.
    end = _step_end(load, grid, machine, stages)
    return _CriticalPath(
        alone[slowest],
        paired[slowest],
        (apart, together),
        micro_batches * sending[slowest],
        bubble,
        end,
        end.exposed(grid, alone[0].forward, alone[0].backward),
    )


def step_time(
    load: Workload,
    grid: Grid,
    machine: Machine,
    stages: Stages | None = None,
) -> StepTime:
    """Time of one training step in a legal layout; stages are as even as they divide, or these."""
    stages = stages or pipeline.even_stages(load.layers, grid.pp, grid.vpp)
    fullness = expert_load(load, grid)
    path = critical_path(load, grid, machine, fullness.mean, stages)
    work = sum_passes([(path.alone, path.passes[0]), (path.paired, path.passes[1])])
    seconds, hidden = dict(work.seconds), dict(work.hidden)
    if grid.pp > 1:
        seconds |= {BUBBLE: path.bubble, POINT_TO_POINT: path.sending}
    seconds |= {DATA: path.data, OPTIMIZER: path.end.optimizer}
    hidden[DATA] = path.end.reduce + path.end.gather - path.data
    sent = exchanged_bytes(load, grid) * (sum(load.is_moe) + load.extra_layers * load.is_moe[-1])
    sent *= grid.world / grid.pp * grid.micro_batches(load.batch)
    return StepTime(sum(seconds.values()), seconds, hidden, fullness, sent)


@lru_cache(maxsize=50_000)
def _stage_passes(
    load: Workload, grid: Grid, machine: Machine, skew: float, stages: Stages
) -> tuple[PassTime, ...]:
    """Passes of one micro-batch through each pipeline rank's layers."""
    rows, last = fullest_rows(load, grid, skew), len(stages) - 1
    kinds = {True: grid, False: replace(grid, recompute=())}
    # Ranks with the same layers take the same time.
    known: dict[object, PassTime] = {}
    passes = []
    for rank in range(len(stages)):
        counts = layer_counts(load, stages, rank, grid.recomputed_layers)
        key = (tuple(counts.items()), rank == 0, rank == last)
        if key not in known:
            parts = [
                (layer_time(load, kinds[repeats], machine, is_moe, rows, skew), count)
                for (is_moe, repeats), count in counts.items()
            ]
            if rank == 0:
                parts.append((edge_time(load, grid, machine, False), 1))
            if rank == last:
                parts.append((edge_time(load, grid, machine, True), 1 + load.extra_layers))
            known[key] = sum_passes(parts)
        passes.append(known[key])
    return tuple(passes)


def _stage_transfers(load: Workload, grid: Grid, machine: Machine) -> tuple[float, float]:
    """Seconds for which a message between stages holds up its sender, and arrives later."""
    if grid.pp == 1:
        return 0.0, 0.0
    size = load.row_bytes
    if load.experts.gating_residual:
        # Router logits travel with the hidden states, as fp32.
        size += load.experts.num_experts * 4
    across = placement(grid, "pp", machine.per_node).nodes > 1
    seconds = send_seconds(across, grid.tokens(load.seq) * size, machine)
    share = 1.0 - machine.reached.point_to_point_overlap if grid.vpp > 1 else 1.0
    return seconds * share, seconds * (1.0 - share)
