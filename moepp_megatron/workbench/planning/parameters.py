"""Counts the parameters of each rank: its layers, its share of each, its experts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod

from moepp_megatron.config.stages import Stages
from moepp_megatron.experts import FFN
from moepp_megatron.workbench.planning.grid import Grid
from moepp_megatron.workbench.planning.workload import Workload


@dataclass(frozen=True, slots=True)
class RankParameters:
    """Parameters of a rank.

    Attributes:
        dense: Parameters outside the FFN experts; sharded over data- and context-parallel ranks.
        experts: Parameters of FFN experts; sharded over the experts' data-parallel ranks.
        of_adam: Dense parameters that AdamW trains whatever `optimizer.kind` is.
    """

    dense: int
    experts: int
    of_adam: int = 0


def rank_parameters(load: Workload, grid: Grid, stages: Stages, pp_rank: int) -> RankParameters:
    """Parameters of each rank of a pipeline stage."""
    dense = of_adam = _outside_layers(load, grid, pp_rank)
    layers = [layer for chunk in stages[pp_rank] for layer in chunk]
    kinds = Counter((load.is_moe[layer], layer == load.first_moe_layer) for layer in layers)
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
    if pp_rank == grid.pp - 1:
        for _ in range(load.extra_layers):
            # Multi-token prediction: two norms and a projection of two vectors to one in front, a
            # norm behind.
            dense += _attention(load, grid) + _moe_dense(load, grid, is_first=False)
            dense += 3 * load.hidden + 2 * load.hidden * load.hidden // grid.tp
            experts += _ffn_experts(load, grid)
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
    """Router and zero-computation experts, whole on every rank, and the shared expert's part.

    The first MoE layer has no gating residual. If all layers share V, only the first has it.
    """
    experts, hidden = load.experts, load.hidden
    shared = _shared_matrices(load, grid)
    shared += hidden if experts.shared_gate else 0
    router = experts.router_parameters(hidden, is_first=is_first)
    return router + experts.local_parameters(hidden, is_first=is_first) + shared


def _shared_matrices(load: Workload, grid: Grid) -> int:
    return 3 * load.hidden * load.experts.shared_size // grid.tp


def _ffn_experts(load: Workload, grid: Grid) -> int:
    experts = load.experts
    each = FFN.parameters(load.hidden, experts.ffn_size)
    return experts.num_ffn_experts // grid.ep * each // grid.etp
