"""What one rank holds at its peak: weights, gradients, optimizer, activations, buffers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from moepp_megatron.config import Config, Layout, stage_layers
from moepp_megatron.planning.activations import kept_bytes, output_bytes, peak_bytes
from moepp_megatron.planning.grid import Grid
from moepp_megatron.planning.parameters import RankParameters, rank_parameters
from moepp_megatron.planning.parts import Layer
from moepp_megatron.planning.pipeline import Stages, chunks_in_flight
from moepp_megatron.planning.workload import Workload


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Memory of a rank, bytes; parameters as numbers.

    Attributes:
        dense: Parameters outside the FFN experts.
        experts: Parameters of FFN experts.
        weights: Of the parameters.
        gradients: Of their gradients.
        optimizer: Of the optimizer's state.
        activations: Kept for the backward passes of all micro-batches in flight.
        buffers: Needed at once by one layer's or the output layer's passes.
    """

    dense: int
    experts: int
    weights: int
    gradients: int
    optimizer: int
    activations: float
    buffers: float

    @property
    def total(self) -> float:
        """All of it, bytes."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.buffers


def rank_memory(config: Config, layout: Layout, pp_rank: int) -> RankMemory:
    """Memory of each rank of a pipeline stage of a checked configuration."""
    stages = tuple(tuple(tuple(chunk) for chunk in chunks) for chunks in stage_layers(config))
    load, grid = Workload.from_config(config), Grid.from_layout(config, layout)
    return memory_of(load, grid, stages, pp_rank)


def memory_of(
    load: Workload, grid: Grid, stages: Stages, pp_rank: int, skew: float = 1.0
) -> RankMemory:
    """Memory of each rank of a pipeline stage.

    Args:
        load: What is trained.
        grid: The layout.
        stages: Layers by pipeline rank and chunk.
        pp_rank: The pipeline rank.
        skew: Rows of the fullest rank over the mean.
    """
    parameters = rank_parameters(load, grid, stages, pp_rank)
    count = parameters.dense + parameters.experts
    activations, buffers = _activations(load, grid, stages, pp_rank, skew)
    return RankMemory(
        dense=parameters.dense,
        experts=parameters.experts,
        weights=load.numbers.weight_bytes * count,
        gradients=load.numbers.gradient_bytes * count,
        optimizer=optimizer_bytes(load, grid, parameters),
        activations=activations,
        buffers=buffers,
    )


def optimizer_bytes(load: Workload, grid: Grid, parameters: RankParameters) -> int:
    """Two moments and the fp32 copy of the weights, sharded or not."""
    state = 2 * load.numbers.moment_bytes + load.numbers.master_bytes
    dense_shards, expert_shards = grid.dp * grid.cp, grid.edp
    if not grid.distributed_optimizer:
        dense_shards = expert_shards = 1
    return state * parameters.dense // dense_shards + state * parameters.experts // expert_shards


def fullest_rows(load: Workload, grid: Grid, skew: float = 1.0) -> float:
    """Rows R that the fullest rank's experts receive in one micro-batch."""
    return grid.tokens(load.seq) * load.experts.ffn_per_token * skew


@lru_cache(maxsize=100_000)
def _layer_bytes(load: Workload, grid: Grid, is_moe: bool, rows: float) -> tuple[float, float]:
    """Kept bytes and peak of a layer."""
    layer = Layer(is_moe, rows)
    return kept_bytes(load, grid, layer), peak_bytes(load, grid, layer)


def _activations(
    load: Workload, grid: Grid, stages: Stages, pp_rank: int, skew: float
) -> tuple[float, float]:
    rows = fullest_rows(load, grid, skew)
    # Everything that layers keep depends on these alone, which makes the cache effective.
    key = Grid(
        world=grid.tp * grid.cp * grid.ep * grid.etp,
        tp=grid.tp,
        cp=grid.cp,
        ep=grid.ep,
        etp=grid.etp,
        micro_batch=grid.micro_batch,
        recompute=grid.recompute,
    )
    kept_of = {kind: _layer_bytes(load, key, kind, rows) for kind in set(load.is_moe)}
    chunks = stages[pp_rank]
    per_chunk = [sum(kept_of[load.is_moe[layer]][0] for layer in chunk) for chunk in chunks]
    micro_batches = grid.micro_batches(load.batch)
    flying = chunks_in_flight(grid.pp, grid.vpp, pp_rank, micro_batches)
    activations = sum(per_chunk) / len(per_chunk) * flying
    present = {load.is_moe[layer] for chunk in chunks for layer in chunk}
    buffers = max((kept_of[kind][1] for kind in present), default=0.0)
    if pp_rank == grid.pp - 1:
        outputs = (1 + load.extra_layers) * output_bytes(load, grid)
        buffers = max(buffers, outputs)
    return activations, buffers


def fullest_rank(load: Workload, grid: Grid, stages: Stages, skew: float = 1.0) -> RankMemory:
    """Memory of the rank that needs most.

    Earlier ranks hold more micro-batches, the last one the output layer: one of the first two and
    the last is the fullest when the stages in between are alike.
    """
    ranks = {0, min(1, grid.pp - 1), grid.pp - 1}
    found = [memory_of(load, grid, stages, rank, skew) for rank in sorted(ranks)]
    return max(found, key=lambda memory: memory.total)
