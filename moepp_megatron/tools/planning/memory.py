"""Memory of a rank: its parameters and its peak."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from moepp_megatron.config import Config, Layout, stage_layers
from moepp_megatron.config.stages import Stages
from moepp_megatron.experts import FFN
from moepp_megatron.features.registry import OTHER_MODELS, named
from moepp_megatron.tools.planning import activations
from moepp_megatron.tools.planning.grid import Grid
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
    # Norms inside attention, biases, and the two norms of the layer.
    attention, number = load.attention, kinds.total()
    vectors = attention.norm_parameters() + attention.bias_parameters(grid.tp) + 2 * load.hidden
    of_adam += number * vectors
    matmuls = attention.matmuls(load.hidden, grid.tp)
    dense += number * (vectors + sum(matmul.outputs * matmul.inputs for matmul in matmuls))
    experts = 0
    for (is_moe, is_first), count in kinds.items():
        if is_moe:
            whole = _moe_whole(load, is_first)
            of_adam += count * whole
            dense += count * (whole + 3 * load.hidden * load.experts.shared_size // grid.tp)
            weights = FFN.parameters(load.hidden, load.experts.ffn_size)
            experts += count * (load.experts.num_ffn_experts // grid.ep * weights // grid.etp)
        else:
            matrices = 3 if load.gated else 2
            dense += count * (matrices * load.hidden * load.dense_size // grid.tp)
    return RankParameters(dense, experts, of_adam)


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


def _moe_whole(load: Workload, is_first: bool) -> int:
    """Router, zero-computation experts and the shared expert's gate, whole on every rank."""
    # The first MoE layer has no gating residual. If all layers share V, only the first has it.
    experts, hidden = load.experts, load.hidden
    router = experts.router_parameters(hidden, is_first=is_first)
    gate = hidden if experts.shared_gate else 0
    return router + experts.local_parameters(hidden, is_first=is_first) + gate


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
    """Memory of a stage's ranks of a checked configuration; ConfigError if its teacher misfits."""
    load, grid = Workload.from_config(config), Grid.from_config(config, layout.world_size)
    memory = _memory_of(load, grid, stage_layers(config), pp_rank)
    others = (model_of(config) for model_of in named(OTHER_MODELS))
    forward = (_forward_bytes(other, layout, pp_rank) for other in others if other is not None)
    return replace(memory, teacher=sum(forward))


def _memory_of(
    load: Workload, grid: Grid, stages: Stages, pp_rank: int, skew: float = 1.0
) -> RankMemory:
    """Memory of each rank of a pipeline stage; `skew`: rows of the fullest rank over the mean."""
    some, key = grid.recomputed_layers, grid.layer_key
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

    It reaches a chunk's first `recomputed` layers, None for all, and multi-token prediction.
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
    dense, experts = state * parameters.dense + further, state * parameters.experts
    return dense // grid.shards[0] + experts // grid.shards[1]


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
    memories = (_memory_of(load, grid, stages, at, skew) for at in _candidate_ranks(load, stages))
    return max(memories, key=lambda memory: memory.total)


def _forward_bytes(theirs: Config, layout: Layout, pp_rank: int) -> float:
    """Bytes that a teacher adds to each rank of a pipeline stage, estimated from above."""
    stages = stage_layers(theirs)
    load, grid = Workload.from_config(theirs), Grid.from_config(theirs, layout.world_size)
    parameters = rank_parameters(load, grid, stages)[pp_rank]
    weights = float(load.numbers.weight_bytes * (parameters.dense + parameters.experts))
    if pp_rank < layout.pp - 1:
        return weights
    # Its last hidden states, and what comparing a micro-batch's logits needs: its own, and both
    # models' and their difference in fp32. This comes before the buffers of the model's own loss.
    tokens = grid.tokens(load.seq)
    ahead = layout.num_microbatches if layout.pp > 1 else 1
    hidden = float(ahead * tokens * load.row_bytes)
    return weights + hidden + tokens * load.vocab * (load.numbers.activation_bytes + 3 * 4.0)
