"""Peak memory of one rank: weights, gradients, optimizer, activations, buffers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from moepp_megatron.config import Config, Layout, stage_layers
from moepp_megatron.config.stages import Stages
from moepp_megatron.workbench.planning.activations import (
    kept_bytes,
    output_bytes,
    peak_bytes,
    resident_bytes,
)
from moepp_megatron.workbench.planning.grid import Grid, Recompute
from moepp_megatron.workbench.planning.parameters import (
    RankParameters,
    rank_parameters,
)
from moepp_megatron.workbench.planning.parts import Layer
from moepp_megatron.workbench.planning.pipeline import chunks_in_flight
from moepp_megatron.workbench.planning.teacher import teacher_bytes
from moepp_megatron.workbench.planning.workload import Workload


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Memory of a rank, bytes; parameters as numbers.

    Attributes:
        dense: Parameters outside the FFN experts.
        experts: Parameters of FFN experts.
        weights: Bytes of the parameters.
        gradients: Bytes of their gradients.
        optimizer: Bytes of the optimizer's state.
        activations: Bytes kept for the backward passes of all micro-batches in flight.
        buffers: Bytes needed temporarily by one layer's or the output layer's passes.
        teacher: Bytes of `distillation.teacher` and of comparing with it.
    """

    dense: int
    experts: int
    weights: int
    gradients: int
    optimizer: int
    activations: float
    buffers: float
    teacher: float = 0.0

    @property
    def total(self) -> float:
        """Total bytes."""
        state = self.weights + self.gradients + self.optimizer
        return state + self.activations + self.buffers + self.teacher


def rank_memory(config: Config, layout: Layout, pp_rank: int) -> RankMemory:
    """Memory of each rank of a pipeline stage of a checked configuration.

    Args:
        config: The configuration.
        layout: Its ranks.
        pp_rank: The pipeline rank.
    """
    stages = stage_layers(config)
    load, grid = Workload.from_config(config), Grid.from_layout(config, layout)
    memory = memory_of(load, grid, stages, pp_rank)
    return replace(memory, teacher=teacher_bytes(config, layout, pp_rank))


def memory_of(
    load: Workload, grid: Grid, stages: Stages, pp_rank: int, skew: float = 1.0
) -> RankMemory:
    """Memory of each rank of a pipeline stage.

    Args:
        load: The workload.
        grid: The layout.
        stages: Layers by pipeline rank and chunk.
        pp_rank: The pipeline rank.
        skew: Rows of the fullest rank over the mean.
    """
    counts = layer_counts(load, grid, stages[pp_rank])
    if pp_rank == grid.pp - 1:
        counts[True, grid.recompute] += load.extra_layers
    layers = [
        (count, layer_bytes(load, replace(grid, recompute=recompute), is_moe, skew))
        for (is_moe, recompute), count in counts.items()
    ]
    parameters = rank_parameters(load, grid, stages, pp_rank)
    return assemble(load, grid, pp_rank, parameters, layers)


def layer_counts(
    load: Workload, grid: Grid, chunks: Sequence[Sequence[int]]
) -> Counter[tuple[bool, Recompute]]:
    """Layers of a rank by whether they are MoE layers and by what they recompute.

    With `recompute_method: block` the first layers of each model chunk are recomputed.
    """
    return Counter(
        (load.is_moe[layer], grid.recompute_of(place))
        for chunk in chunks
        for place, layer in enumerate(chunk)
    )


@dataclass(frozen=True, slots=True)
class LayerBytes:
    """Activations of one layer and micro-batch.

    Attributes:
        kept: Bytes kept from the forward to the backward pass.
        peak: Bytes needed temporarily beside the kept ones.
    """

    kept: float
    peak: float


def layer_bytes(load: Workload, grid: Grid, is_moe: bool, skew: float) -> LayerBytes:
    """Activations of an MoE layer or of a dense one."""
    layer = Layer(is_moe, fullest_rows(load, grid, skew))
    return LayerBytes(kept_bytes(load, grid, layer), peak_bytes(load, grid, layer))


def assemble(
    load: Workload,
    grid: Grid,
    pp_rank: int,
    parameters: RankParameters,
    layers: Sequence[tuple[int, LayerBytes]],
) -> RankMemory:
    """Memory of a rank from its parts.

    Args:
        load: The workload.
        grid: The layout.
        pp_rank: The pipeline rank.
        parameters: Its parameters.
        layers: Its layers of each kind, and the activations of one.
    """
    count = parameters.dense + parameters.experts
    flying = chunks_in_flight(grid.pp, grid.vpp, pp_rank, grid.micro_batches(load.batch))
    kept = sum(number * one.kept for number, one in layers)
    buffers = max((one.peak for number, one in layers if number), default=0.0)
    if pp_rank == grid.pp - 1:
        buffers = max(buffers, (1 + load.extra_layers) * output_bytes(load, grid))
    return RankMemory(
        dense=parameters.dense,
        experts=parameters.experts,
        weights=load.numbers.weight_bytes * count,
        gradients=load.numbers.gradient_bytes * count,
        optimizer=_optimizer_bytes(load, grid, parameters),
        # Chunks of a rank hold about as many layers each.
        activations=kept / grid.vpp * flying,
        buffers=buffers + resident_bytes(load, grid),
    )


def _optimizer_bytes(load: Workload, grid: Grid, parameters: RankParameters) -> int:
    """The moments and the fp32 copy of the weights, sharded or not.

    Muon and Lion share out whole matrices: the fullest rank may hold more than its even share.
    """
    numbers = load.numbers
    state = numbers.matrix_moments_bytes + numbers.master_bytes
    further = (numbers.moments_bytes - numbers.matrix_moments_bytes) * parameters.of_adam
    dense_shards, expert_shards = grid.dp * grid.cp, grid.edp
    if not grid.distributed_optimizer:
        dense_shards = expert_shards = 1
    dense = state * parameters.dense + further
    return dense // dense_shards + state * parameters.experts // expert_shards


def fullest_rows(load: Workload, grid: Grid, skew: float = 1.0) -> float:
    """Rows R that the fullest rank's experts receive in one micro-batch."""
    return grid.tokens(load.seq) * load.experts.ffn_per_token * skew


def candidate_ranks(load: Workload, stages: Stages) -> tuple[int, ...]:
    """Pipeline ranks among which is the fullest: the first of those with the same kinds of layers.

    Earlier ranks hold more micro-batches; the first has the embedding, the last the output layer.
    """
    last = len(stages) - 1
    found: dict[tuple[int, int, bool, bool], int] = {}
    for rank, chunks in enumerate(stages):
        kinds = [load.is_moe[layer] for chunk in chunks for layer in chunk]
        found.setdefault((sum(kinds), len(kinds), rank == 0, rank == last), rank)
    return tuple(found.values())


def fullest_rank(load: Workload, grid: Grid, stages: Stages, skew: float = 1.0) -> RankMemory:
    """Memory of the fullest rank."""
    ranks = candidate_ranks(load, stages)
    found = [memory_of(load, grid, stages, rank, skew) for rank in ranks]
    return max(found, key=lambda memory: memory.total)
