"""Memory of a rank: its parameters and its peak."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod

from moepp_megatron.config import Config, Layout, stage_layers
from moepp_megatron.config.stages import Stages
from moepp_megatron.experts import FFN
from moepp_megatron.features.registry import OTHER_MODELS, named
from moepp_megatron.tools.planning import activations
from moepp_megatron.tools.planning.grid import Grid, layer_key
from moepp_megatron.tools.planning.parts import Layer
from moepp_megatron.tools.planning.pipeline import chunks_in_flight
from moepp_megatron.tools.planning.traffic import rows_with_room
from moepp_megatron.tools.planning.workload import Workload

GIB = 2**30


@dataclass(frozen=True, slots=True)
class RankParameters:
    """Parameters of a rank."""

    dense: int  # parameters outside the FFN experts; sharded over data- and context-parallel ranks
    experts: int  # parameters of FFN experts; sharded over the experts' data-parallel ranks
    of_adam: int = 0  # dense parameters that AdamW trains whatever `optimizer.kind` is


def rank_parameters(load: Workload, grid: Grid, stages: Stages) -> tuple[RankParameters, ...]:
    """Parameters of each rank, by pipeline stage."""
    return _rank_parameters(
        load, Grid(grid.world, grid.tp, 1, grid.pp, 1, grid.ep, grid.etp), stages
    )


@lru_cache(maxsize=50_000)
def _rank_parameters(load: Workload, grid: Grid, stages: Stages) -> tuple[RankParameters, ...]:
    return tuple(_of_stage(load, grid, stages, rank) for rank in range(grid.pp))


def _of_stage(load: Workload, grid: Grid, stages: Stages, pp_rank: int) -> RankParameters:
    dense = of_adam = _outside_layers(load, grid, pp_rank)
    layers = [layer for chunk in stages[pp_rank] for layer in chunk]
    kinds = Counter((load.is_moe[layer], layer == load.first_moe_layer) for layer in layers)
    if pp_rank == grid.pp - 1 and load.extra_layers:
        kinds[load.is_moe[-1], False] += load.extra_layers
        # Multi-token prediction: two norms and a projection of two vectors to one in front of each
        # layer, a norm after.
        dense += load.extra_layers * load.hidden * (3 + 2 * load.hidden // grid.tp)
        of_adam += load.extra_layers * 3 * load.hidden
    experts = 0
    for (is_moe, is_first), count in kinds.items():
        dense += count * _attention(load, grid)
        of_adam += count * _attention_vectors(load, grid)
        if is_moe:
            outside = _moe_dense(load, grid, is_first)
            dense += count * outside
            of_adam += count * (outside - _shared_matrices(load, grid))
            experts += count * _ffn_experts(load, grid)
        else:
            dense += count * _dense_ffn(load, grid)
    return RankParameters(dense, experts, of_adam)


def _dense_ffn(load: Workload, grid: Grid) -> int:
    return (3 if load.gated else 2) * load.hidden * load.dense_size // grid.tp


def _outside_layers(load: Workload, grid: Grid, pp_rank: int) -> int:
    """Embedding on the first stage; final norm and output layer on the last."""
    vocabulary = load.vocab * load.hidden // grid.tp
    is_first, is_last = pp_rank == 0, pp_rank == grid.pp - 1
    count = vocabulary if is_first else 0
    if is_last:
        count += load.hidden
        # Tied to an embedding on another stage, the output layer is a copy of it.
        if not (load.tied and is_first):
            count += vocabulary
        # Multi-token prediction embeds tokens on the last stage.
        if load.extra_layers and not is_first:
            count += vocabulary
    return count


def _attention(load: Workload, grid: Grid) -> int:
    """Projections of this rank's heads, norms inside, and the two norms of the layer."""
    matmuls = load.attention.matmuls(load.hidden, grid.tp)
    projections = sum(prod((matmul.outputs, matmul.inputs)) for matmul in matmuls)
    return projections + _attention_vectors(load, grid)


def _attention_vectors(load: Workload, grid: Grid) -> int:
    """Norms inside attention, biases, and the two norms of the layer."""
    inside = load.attention.norm_parameters() + load.attention.bias_parameters(grid.tp)
    return inside + 2 * load.hidden


def _moe_dense(load: Workload, grid: Grid, is_first: bool) -> int:
    """Router and zero-computation experts, whole on every rank, and the shared expert's part."""
    # The first MoE layer has no gating residual. If all layers share V, only the first has it.
    experts, hidden = load.experts, load.hidden
    shared = _shared_matrices(load, grid)
    shared += hidden if experts.shared_gate else 0
    router = experts.router_parameters(hidden, is_first=is_first)
    return router + experts.local_parameters(hidden, is_first=is_first) + shared


def _shared_matrices(load: Workload, grid: Grid) -> int:
    return 3 * load.hidden * load.experts.shared_size // grid.tp


def _ffn_experts(load: Workload, grid: Grid) -> int:
    weights = FFN.parameters(load.hidden, load.experts.ffn_size)
    return load.experts.num_ffn_experts // grid.ep * weights // grid.etp


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Memory of a rank, bytes; parameters as numbers."""

    dense: int  # parameters outside the FFN experts
    experts: int  # parameters of FFN experts
    weights: int  # bytes of the parameters
    gradients: int  # bytes of their gradients
    optimizer: int  # bytes of the optimizer's state
    activations: float  # bytes kept for the backward passes of all micro-batches in flight
    buffers: float  # bytes needed temporarily by one layer's or the output layer's passes
    teacher: float = 0.0  # bytes of `distillation.teacher` and of comparing with it

    @property
    def total(self) -> float:
        """Total bytes."""
        state = self.weights + self.gradients + self.optimizer
        return state + self.activations + self.buffers + self.teacher


def rank_memory(config: Config, layout: Layout, pp_rank: int) -> RankMemory:
    """Memory of each rank of a pipeline stage of a checked configuration."""
    stages = stage_layers(config)
    load, grid = Workload.from_config(config), Grid.from_config(config, layout.world_size)
    memory = memory_of(load, grid, stages, pp_rank)
    return replace(memory, teacher=_other_models_bytes(config, layout, pp_rank))


def memory_of(
    load: Workload, grid: Grid, stages: Stages, pp_rank: int, skew: float = 1.0
) -> RankMemory:
    """Memory of each rank of a pipeline stage; `skew`: rows of the fullest rank over the mean."""
    some, key = grid.recomputed_layers, layer_key(grid)
    kept = buffers = 0.0
    for (is_moe, repeats), number in layer_counts(load, stages, pp_rank, some).items():
        kind = key if repeats else replace(key, recompute=())
        kept_by_one, peak = _layer_bytes(load, kind, is_moe, skew)
        kept += number * kept_by_one
        buffers = max(buffers, peak)
    parameters = rank_parameters(load, grid, stages)[pp_rank]
    count = parameters.dense + parameters.experts
    flying = chunks_in_flight(grid.pp, grid.vpp, pp_rank, grid.micro_batches(load.batch))
    if pp_rank == grid.pp - 1:
        buffers = max(buffers, (1 + load.extra_layers) * activations.output_bytes(load, grid))
    return RankMemory(
        dense=parameters.dense,
        experts=parameters.experts,
        weights=load.numbers.weight_bytes * count,
        gradients=load.numbers.gradient_bytes * count,
        optimizer=_optimizer_bytes(load, grid, parameters),
        # Chunks of a rank hold about as many layers each.
        activations=kept / grid.vpp * flying,
        buffers=buffers + activations.resident_bytes(load, grid),
    )


@lru_cache(maxsize=50_000)
def layer_counts(
    load: Workload, stages: Stages, pp_rank: int, recomputed: int | None
) -> Mapping[tuple[bool, bool], int]:
    """Layers of a rank by whether they are MoE layers, and whether recomputation reaches them.

    Those of multi-token prediction are included; it reaches the first `recomputed` layers of a
    chunk, None for all.
    """
    counts = Counter(
        (load.is_moe[layer], recomputed is None or place < recomputed)
        for chunk in stages[pp_rank]
        for place, layer in enumerate(chunk)
    )
    if pp_rank == len(stages) - 1 and load.extra_layers:
        counts[load.is_moe[-1], True] += load.extra_layers
    return counts


@lru_cache(maxsize=100_000)
def _layer_bytes(load: Workload, grid: Grid, is_moe: bool, skew: float) -> tuple[float, float]:
    """Activations of a layer and micro-batch: kept for the backward pass, needed beside them."""
    layer = Layer(is_moe, rows_with_room(load, grid, fullest_rows(load, grid, skew)))
    return activations.kept_bytes(load, grid, layer), activations.peak_bytes(load, grid, layer)


def _optimizer_bytes(load: Workload, grid: Grid, parameters: RankParameters) -> int:
    """The moments and the fp32 copy of the weights, sharded or not."""
    # Muon and Lion share out whole matrices: the fullest rank may hold more than its even share.
    numbers = load.numbers
    state = numbers.matrix_moments_bytes + numbers.master_bytes
    further = (numbers.moments_bytes - numbers.matrix_moments_bytes) * parameters.of_adam
    shards = (grid.dp * grid.cp, grid.edp) if grid.distributed_optimizer else (1, 1)
    dense = state * parameters.dense + further
    return dense // shards[0] + state * parameters.experts // shards[1]


def fullest_rows(load: Workload, grid: Grid, skew: float = 1.0) -> float:
    """Rows R that the fullest rank's experts receive in one micro-batch."""
    return grid.tokens(load.seq) * load.experts.ffn_per_token * skew


@lru_cache(maxsize=4096)
def _candidate_ranks(load: Workload, stages: Stages) -> tuple[int, ...]:
    """Pipeline ranks among which is the fullest: the first with the same kinds of layers."""
    # Earlier ranks hold more micro-batches; the first has the embedding, the last the output layer.
    last = len(stages) - 1
    rank_of_kind: dict[tuple[int, int, bool, bool], int] = {}
    for rank, chunks in enumerate(stages):
        kinds = [load.is_moe[layer] for chunk in chunks for layer in chunk]
        rank_of_kind.setdefault((sum(kinds), len(kinds), rank == 0, rank == last), rank)
    return tuple(rank_of_kind.values())


def fullest_rank(load: Workload, grid: Grid, stages: Stages, skew: float = 1.0) -> RankMemory:
    """Memory of the fullest rank."""
    memories = (memory_of(load, grid, stages, at, skew) for at in _candidate_ranks(load, stages))
    return max(memories, key=lambda memory: memory.total)


def _other_models_bytes(config: Config, layout: Layout, pp_rank: int) -> float:
    """Bytes that a teacher of a checked configuration adds to each rank of a pipeline stage.

    Its weights; on the last stage its last hidden states, and what comparing a micro-batch's logits
    needs: its own, and both models' and their difference in fp32. This comes before the buffers of
    the model's own loss, so that their sum is an estimate from above.

    Raises:
        ConfigError: There is no such teacher, or it does not fit the run.
    """
    return sum(
        _forward_bytes(theirs, layout, pp_rank)
        for model_of in named(OTHER_MODELS)
        if (theirs := model_of(config)) is not None
    )


def _forward_bytes(theirs: Config, layout: Layout, pp_rank: int) -> float:
    """Bytes of a model that only runs forward, and of the comparison with it."""
    stages = stage_layers(theirs)
    load, grid = Workload.from_config(theirs), Grid.from_config(theirs, layout.world_size)
    parameters = rank_parameters(load, grid, stages)[pp_rank]
    weights = float(load.numbers.weight_bytes * (parameters.dense + parameters.experts))
    if pp_rank < layout.pp - 1:
        return weights
    size, tokens = load.numbers.activation_bytes, grid.tokens(load.seq)
    ahead = layout.num_microbatches if layout.pp > 1 else 1
    hidden = float(ahead * tokens * load.hidden * size)
    return weights + hidden + tokens * load.vocab * (size + 3 * 4.0)
