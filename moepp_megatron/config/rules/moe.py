"""Rules of experts and routing."""

from __future__ import annotations

from collections.abc import Iterator

from moepp_megatron.config.problem import Problem
from moepp_megatron.config.rows import Rule, first, group, refuse
from moepp_megatron.config.schema import Config

# megatron-core's own layer lacks these settings, which would change the model.
_VANILLA = (
    "without zero-computation experts and gating residual, because that is megatron-core's vanilla "
    "MoE layer, which lacks it"
)
_MOEPP = "set moe.gating_residual to true or add zero-computation experts"
_OTHER_SCORES = "use moe.score_function sigmoid or sqrtsoftplus, or leave it out"


def _layer_can_be_built(config: Config) -> Iterator[Problem]:
    for name, rule, remedy in config.moe.problems("moe."):
        yield Problem(f"moe.{name}", getattr(config.moe, name), rule, remedy)


def _flags(config: Config) -> list[int]:
    """Flag each MoE layer with 1; all layers where `layer_freq` is a number."""
    freq = config.moe.layer_freq
    return [1] * config.model.num_layers if isinstance(freq, int) else freq


def _one_entry_each(config: Config) -> str:
    layers, entries = config.model.num_layers, len(_flags(config))
    return f"must have one entry for each of model.num_layers ({layers}) and has {entries}"


RULES: tuple[Rule, ...] = (
    refuse(
        "moe.router_topk",
        lambda c: c.moe.router_topk > c.moe.num_experts,
        "must be at most the number of experts of all kinds ({moe.num_experts})",
        "use {moe.num_experts} or less, or add experts",
    ),
    _layer_can_be_built,
    group(
        lambda c: c.moe.limits_groups and c.moe.is_vanilla,
        refuse(
            "moe.num_groups",
            lambda c: (c.moe.score_function, c.moe.gate_normalization) == ("softmax", "selected"),
            "must be 1 with moe.score_function softmax and moe.gate_normalization selected on "
            "megatron-core's vanilla MoE layer, which ranks groups by logits there, not by scores",
            "use moe.gate_normalization none or moe.score_function sigmoid, or add "
            "zero-computation experts",
        ),
    ),
    first(
        refuse(
            "moe.layer_freq",
            lambda c: isinstance(c.moe.layer_freq, int) and c.moe.layer_freq < 1,
            "must be at least 1",
            "use 1 to make every layer an MoE layer",
        ),
        refuse(
            "moe.layer_freq",
            lambda c: len(_flags(c)) != c.model.num_layers,
            _one_entry_each,
            "write {model.num_layers} entries of 0 or 1, or a single whole number",
        ),
        refuse(
            "moe.layer_freq",
            lambda c: set(_flags(c)) - {0, 1},
            "must hold only 0 and 1",
            "write 1 for an MoE layer and 0 for a dense one",
        ),
        refuse(
            "moe.layer_freq",
            lambda c: 1 not in _flags(c),
            "must make at least one layer an MoE layer",
            "set one entry to 1, or use 1",
        ),
    ),
    group(
        lambda c: c.moe.is_vanilla,
        refuse(
            "moe.two_layer_gate",
            lambda c: c.moe.two_layer_gate,
            f"must be left at its default {_VANILLA}",
            f"drop {{name}}, {_MOEPP}",
        ),
        refuse(
            "moe.expert_input_scale",
            lambda c: c.moe.expert_input_scale != 1.0,
            f"must be left at its default {_VANILLA}",
            f"drop {{name}}, {_MOEPP}",
        ),
        refuse(
            "moe.logits_norm_std",
            lambda c: c.moe.logits_norm_std is not None,
            f"must be left at its default {_VANILLA}",
            f"drop {{name}}, {_MOEPP}",
        ),
        refuse(
            "moe.dispatcher",
            lambda c: c.moe.dispatcher == "alltoall_dedup",
            f"must be alltoall, allgather or flex {_VANILLA}",
            f"use alltoall, {_MOEPP}",
        ),
        refuse(
            "moe.balance_scope",
            lambda c: c.moe.balance_scope == "global",
            "must be microbatch or sequence without zero-computation experts and gating "
            "residual, because the global loss of megatron-core's vanilla MoE layer shrinks with "
            "the number of data-parallel ranks",
            f"use microbatch, {_MOEPP}",
        ),
    ),
    # megatron-core moves selection biases, and routes with them where scores are no softmax.
    first(
        refuse(
            "moe.bias_update_rate",
            lambda c: c.moe.bias_update_rate > 0 and not c.moe.selection_bias,
            "must be 0 without moe.selection_bias, which it moves",
            "set moe.selection_bias to true, or use 0",
        ),
        refuse(
            "moe.bias_update_rate",
            lambda c: c.moe.bias_update_rate > 0 and c.moe.budget.held_by == "bias",
            "must be 0 with moe.budget.controller bias, which moves the same bias",
            "use 0, or moe.budget.controller tau",
        ),
        refuse(
            "moe.bias_update_rate",
            lambda c: c.moe.bias_update_rate > 0 and c.moe.score_function == "softmax",
            "must be 0 with moe.score_function softmax, for which megatron-core moves no bias",
            _OTHER_SCORES,
        ),
        group(
            lambda c: c.moe.is_vanilla,
            refuse(
                "moe.selection_bias",
                lambda c: c.moe.selection_bias and c.moe.score_function == "softmax",
                "must be false with moe.score_function softmax on megatron-core's vanilla MoE "
                "layer, which has no bias for it",
                _OTHER_SCORES,
            ),
        ),
    ),
    refuse(
        "moe.constants_shared",
        lambda c: c.moe.shares_constants and c.parallel.pipeline_model_parallel_size > 1,
        "must be false with parallel.pipeline_model_parallel_size "
        "({parallel.pipeline_model_parallel_size}): no stage sees all layers' gradients",
        "set moe.constants_shared to false, or change parallel.pipeline_model_parallel_size",
    ),
    refuse(
        "moe.shared_expert_gate",
        lambda c: c.moe.shared_expert_gate and c.moe.shared_expert_ffn_hidden_size is None,
        "must be false without moe.shared_expert_ffn_hidden_size, which has what it weighs",
        "use false, or give moe.shared_expert_ffn_hidden_size",
    ),
)
