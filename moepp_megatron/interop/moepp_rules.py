"""The released MoE++ format's tensors: `model.layers.N.mlp.moe.{gate,experts}`.

The released model has 2 constant, 1 copy and 1 zero expert in every layer, a one- or two-layer gate
and a gating residual. The names extend to what it lacks: other counts, a selection bias, a shared
expert and its gate, query/key norms, biases of queries, keys and values.
"""

from collections.abc import Iterator

from moepp_megatron.config import Config
from moepp_megatron.interop.tensor_rules import (
    TensorRule,
    attention_rules,
    decoder_rules,
    dense_mlp_rules,
    row,
    same,
    shared_expert_rules,
    unused,
)


def moepp_rules(config: Config) -> Iterator[TensorRule]:
    """Every tensor of a MoE++ model, embedding first, layer by layer."""
    decoder = list(decoder_rules(config))
    yield decoder[0]
    pattern = config.moe.moe_layer_pattern(config.model.num_layers)
    first_moe_layer = pattern.index(True)
    for layer, is_moe in enumerate(pattern):
        yield from attention_rules(config, layer)
        if is_moe:
            yield from _moe_rules(config, layer, first_moe_layer)
        else:
            yield from dense_mlp_rules(config, layer)
    yield from decoder[1:]


def _moe_rules(config: Config, layer: int, first: int) -> Iterator[TensorRule]:
    ours, theirs = f"decoder.layers.{layer}.mlp.", f"model.layers.{layer}.mlp.moe."
    yield from _gate_rules(config, ours + "router.", theirs + "gate.", layer == first)
    # Shared constants are the first MoE layer's here, and a copy in each layer there.
    owner = f"decoder.layers.{first}.mlp." if config.moe.constants_shared else ours
    yield from _expert_rules(config, ours, owner, theirs + "experts.experts.")
    yield from shared_expert_rules(config, ours, theirs + "shared_expert")


def _gate_rules(config: Config, ours: str, theirs: str, is_first: bool) -> Iterator[TensorRule]:
    moe, width = config.moe, config.model.hidden_size
    experts = moe.num_experts
    if moe.two_layer_gate:
        first, second = moe.gate_shapes(width)
        yield same(ours + "weight", theirs + "wg.0.weight", *first)
        yield same(ours + "output_weight", theirs + "wg.2.weight", *second)
    else:
        yield same(ours + "weight", theirs + "wg.weight", experts, width)
    if moe.gating_residual:
        name, shape = theirs + "gate_map.weight", (experts, experts)
        if is_first:
            yield unused(name, *shape)
        else:
            yield same(ours + "residual_weight", name, *shape)
    if moe.selection_bias:
        yield same(ours + "expert_bias", theirs + "e_score_correction_bias", experts)


def _expert_rules(config: Config, ours: str, owner: str, theirs: str) -> Iterator[TensorRule]:
    moe, width, inner = config.moe, config.model.hidden_size, config.expert_ffn_hidden_size
    count = moe.num_ffn_experts
    for index in range(count):
        prefix, experts = f"{theirs}{index}.", ours + "experts.experts."
        # Gate and up projection are stacked in `up_proj`, gate first, as in megatron-core.
        yield row(
            experts + "linear_fc1.weight", count, index, prefix + "up_proj.weight", 2 * inner, width
        )
        yield row(
            experts + "linear_fc2.weight", count, index, prefix + "down_proj.weight", width, inner
        )
    yield from constant_rules(config, ours, owner, theirs)


def constant_rules(config: Config, ours: str, owner: str, theirs: str) -> Iterator[TensorRule]:
    """A layer's constant experts, behind its FFN experts; `owner` begins the vectors' name."""
    moe, width = config.moe, config.model.hidden_size
    constants = moe.num_constant_experts
    for index in range(constants):
        prefix, zero = f"{theirs}{moe.num_ffn_experts + index}.", ours + "zero_computation."
        constant = owner + "zero_computation.constants"
        yield row(constant, constants, index, prefix + "constant", width)
        yield row(zero + "mixing_weight", constants, index, prefix + "wg.weight", 2, width)
