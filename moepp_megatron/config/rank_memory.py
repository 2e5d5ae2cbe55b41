"""What one rank holds: parameters of its stage and shard, and what training keeps of them."""

from __future__ import annotations

from dataclasses import dataclass

from moepp_megatron.config.layout import Layout
from moepp_megatron.config.schema import Config
from moepp_megatron.config.stages import stage_layers

# Gradients are accumulated in fp32; Adam keeps two fp32 moments; with bf16 weights the optimizer
# also keeps them in fp32.
_GRADIENT_BYTES = 4
_MOMENT_BYTES = 8
_WEIGHT_BYTES = {"fp32": 4, "bf16": 2}
_MASTER_BYTES = {"fp32": 0, "bf16": 4}


@dataclass(frozen=True)
class RankMemory:
    """Parameters of a rank and their memory; activations and buffers of kernels come on top.

    Attributes:
        dense: Parameters outside the FFN experts.
        experts: Parameters of FFN experts.
        weights: Bytes of the parameters.
        gradients: Bytes of their fp32 gradients.
        optimizer: Bytes of the optimizer's state.
    """

    dense: int
    experts: int
    weights: int
    gradients: int
    optimizer: int


def rank_memory(config: Config, layout: Layout, pp_rank: int) -> RankMemory:
    """Parameters and memory of each rank of a pipeline stage.

    Args:
        config: A checked configuration.
        layout: Its rank grid.
        pp_rank: The pipeline rank.
    """
    layers = [layer for chunk in stage_layers(config)[pp_rank] for layer in chunk]
    pattern = config.moe.moe_layer_pattern(config.model.num_layers)
    first_moe_layer = pattern.index(True)
    dense = _outside_layers(config, layout, pp_rank)
    experts = 0
    for layer in layers:
        dense += _attention(config, layout)
        if pattern[layer]:
            dense += _moe_dense(config, layout, has_residual=layer > first_moe_layer)
            experts += _ffn_experts(config, layout)
        else:
            dense += 3 * config.model.hidden_size * config.model.ffn_hidden_size // layout.tp
    return _memory(config, layout, dense, experts)


def _memory(config: Config, layout: Layout, dense: int, experts: int) -> RankMemory:
    dtype = config.precision.dtype
    state = _MOMENT_BYTES + _MASTER_BYTES[dtype]
    dense_shards, expert_shards = layout.dp * layout.cp, layout.edp
    if not config.parallel.use_distributed_optimizer:
        dense_shards = expert_shards = 1
    return RankMemory(
        dense=dense,
        experts=experts,
        weights=_WEIGHT_BYTES[dtype] * (dense + experts),
        gradients=_GRADIENT_BYTES * (dense + experts),
        optimizer=state * dense // dense_shards + state * experts // expert_shards,
    )


def _outside_layers(config: Config, layout: Layout, pp_rank: int) -> int:
    """Embedding on the first stage; final norm and output layer on the last."""
    model = config.model
    vocabulary = model.vocab_size * model.hidden_size // layout.tp
    is_first, is_last = pp_rank == 0, pp_rank == layout.pp - 1
    count = vocabulary if is_first else 0
    if is_last:
        count += model.hidden_size
        # Tied to an embedding on another stage, the output layer is a copy of it.
        if not (model.tie_embeddings and is_first):
            count += vocabulary
    return count


def _attention(config: Config, layout: Layout) -> int:
    """Projections of this rank's heads, query/key norms, and the two norms of the layer."""
    model = config.model
    heads = model.num_attention_heads // layout.tp
    # With fewer key/value heads than ranks, ranks share one.
    groups = max(model.query_groups // layout.tp, 1)
    projections = 2 * (heads + groups) * model.head_dim * model.hidden_size
    norms = 2 * model.hidden_size + (2 * model.head_dim if model.qk_layernorm else 0)
    return projections + norms


def _moe_dense(config: Config, layout: Layout, has_residual: bool) -> int:
    """Router and constant experts, whole on every rank, and the shared expert's part."""
    moe, width = config.moe, config.model.hidden_size
    experts = moe.num_experts
    router = experts * width
    if moe.two_layer_gate:
        router = 8 * experts * width + 8 * experts * experts
    if moe.gating_residual and has_residual:
        router += experts * experts
    shared = 3 * width * (moe.shared_expert_ffn_hidden_size or 0) // layout.tp
    return router + 3 * width * moe.num_constant_experts + shared


def _ffn_experts(config: Config, layout: Layout) -> int:
    moe, width = config.moe, config.model.hidden_size
    return (
        moe.num_ffn_experts // layout.ep * 3 * width * config.expert_ffn_hidden_size // layout.etp
    )
