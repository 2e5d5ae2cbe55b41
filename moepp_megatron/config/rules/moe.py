"""Rules of experts and routing."""

from __future__ import annotations

from collections.abc import Iterator

from moepp_megatron.config.problem import Problem
from moepp_megatron.config.schema import Config


def _topk_within_experts(config: Config) -> Iterator[Problem]:
    """A token cannot select more experts than there are."""
    moe = config.moe
    if moe.router_topk > moe.num_experts:
        yield Problem(
            "moe.router_topk",
            moe.router_topk,
            f"must be at most the number of experts of all kinds ({moe.num_experts})",
            f"use {moe.num_experts} or less, or add experts",
        )


def _groups_hold_what_tokens_select(config: Config) -> Iterator[Problem]:
    """Groups are equally large, and those that a token may use have enough experts for it."""
    moe = config.moe
    for name, rule, remedy in moe.group_problems("moe."):
        yield Problem(f"moe.{name}", getattr(moe, name), rule, remedy)
    if not moe.limits_groups:
        return
    if moe.is_vanilla and (moe.score_function, moe.gate_normalization) == ("softmax", "selected"):
        yield Problem(
            "moe.num_groups",
            moe.num_groups,
            "must be 1 with moe.score_function softmax and moe.gate_normalization selected on "
            "megatron-core's vanilla MoE layer, which ranks groups by logits there, not by scores",
            "use moe.gate_normalization none or moe.score_function sigmoid, or add "
            "zero-computation experts",
        )


def _single_selection_keeps_raw_gate(config: Config) -> Iterator[Problem]:
    """A normalised gate is always 1 if K = 1, so the router would get no gradient from it."""
    moe = config.moe
    if moe.router_topk == 1 and moe.gate_normalization != "none":
        yield Problem(
            "moe.gate_normalization",
            moe.gate_normalization,
            "must be none when moe.router_topk is 1, because one gate divided by itself is 1 "
            "and gives the router no gradient",
            "use none, or set moe.router_topk to 2 or more",
        )


def _layer_freq_names_moe_layers(config: Config) -> Iterator[Problem]:
    """layer_freq is a positive step, or one flag per layer with at least one MoE layer."""
    freq, layers = config.moe.layer_freq, config.model.num_layers
    name = "moe.layer_freq"
    if isinstance(freq, int):
        if freq < 1:
            yield Problem(
                name, freq, "must be at least 1", "use 1 to make every layer an MoE layer"
            )
    elif len(freq) != layers:
        yield Problem(
            name,
            freq,
            f"must have one entry for each of model.num_layers ({layers}) and has {len(freq)}",
            f"write {layers} entries of 0 or 1, or a single whole number",
        )
    elif set(freq) - {0, 1}:
        yield Problem(
            name, freq, "must hold only 0 and 1", "write 1 for an MoE layer and 0 for a dense one"
        )
    elif 1 not in freq:
        yield Problem(
            name, freq, "must make at least one layer an MoE layer", "set one entry to 1, or use 1"
        )


def _vanilla_layer_has_no_moepp_router(config: Config) -> Iterator[Problem]:
    """megatron-core's own MoE layer lacks these router settings, which would change the model."""
    moe = config.moe
    if not moe.is_vanilla:
        return
    neutral = {
        "two_layer_gate": False,
        "expert_input_scale": 1.0,
        "logits_norm_std": None,
    }
    for key, value in neutral.items():
        if getattr(moe, key) != value:
            yield Problem(
                f"moe.{key}",
                getattr(moe, key),
                "must be left at its default without zero-computation experts and gating "
                "residual, because that is megatron-core's vanilla MoE layer, which lacks it",
                f"drop moe.{key}, set moe.gating_residual to true or add zero-computation experts",
            )
    if moe.dispatcher == "alltoall_dedup":
        yield Problem(
            "moe.dispatcher",
            "alltoall_dedup",
            "must be alltoall, allgather or flex without zero-computation experts and gating "
            "residual, because that is megatron-core's vanilla MoE layer, which lacks it",
            "use alltoall, set moe.gating_residual to true or add zero-computation experts",
        )
    if moe.balance_scope == "global":
        yield Problem(
            "moe.balance_scope",
            "global",
            "must be microbatch or sequence without zero-computation experts and gating residual, "
            "because the global loss of megatron-core's vanilla MoE layer shrinks with the number "
            "of data-parallel ranks",
            "use microbatch, set moe.gating_residual to true or add zero-computation experts",
        )


def _bias_moves_by_one_rule(config: Config) -> Iterator[Problem]:
    """megatron-core moves selection biases, and routes with them where scores are no softmax."""
    moe = config.moe
    moves, is_softmax = moe.bias_update_rate > 0, moe.score_function == "softmax"
    other_scores = "use moe.score_function sigmoid or sqrtsoftplus, or leave it out"
    for name, is_wrong, rule, remedy in (
        (
            "bias_update_rate",
            moves and not moe.selection_bias,
            "must be 0 without moe.selection_bias, which it moves",
            "set moe.selection_bias to true, or use 0",
        ),
        (
            "bias_update_rate",
            moves and moe.budget.held_by == "bias",
            "must be 0 with moe.budget.controller bias, which moves the same bias",
            "use 0, or moe.budget.controller tau",
        ),
        (
            "bias_update_rate",
            moves and is_softmax,
            "must be 0 with moe.score_function softmax, for which megatron-core moves no bias",
            other_scores,
        ),
        (
            "selection_bias",
            moe.is_vanilla and moe.selection_bias and is_softmax,
            "must be false with moe.score_function softmax on megatron-core's vanilla MoE layer, "
            "which has no bias for it",
            other_scores,
        ),
    ):
        if is_wrong:
            yield Problem(f"moe.{name}", getattr(moe, name), rule, remedy)
            return


def _shared_constants_are_whole(config: Config) -> Iterator[Problem]:
    """Shared constants need all layers on one rank, and a tested schedule."""
    moe, parallel = config.moe, config.parallel
    if not moe.shares_constants:
        return
    stages = parallel.pipeline_model_parallel_size
    needs = (
        (
            stages == 1,
            f"with parallel.pipeline_model_parallel_size ({stages}): no stage sees all layers' "
            "gradients",
        ),
        (
            not parallel.overlap_moe_expert_parallel_comm,
            "with parallel.overlap_moe_expert_parallel_comm (true), which runs every layer's "
            "backward pass by itself and is not tested with it",
        ),
    )
    for holds, rule in needs:
        if not holds:
            remedy = f"set moe.constants_shared to false, or change {rule.split(' ')[1]}"
            yield Problem("moe.constants_shared", True, f"must be false {rule}", remedy)
            return


def _shared_expert_is_there_to_weigh(config: Config) -> Iterator[Problem]:
    """The gate belongs to the shared expert, which must exist."""
    moe = config.moe
    if moe.shared_expert_gate and moe.shared_expert_ffn_hidden_size is None:
        yield Problem(
            "moe.shared_expert_gate",
            True,
            "must be false without moe.shared_expert_ffn_hidden_size, which has what it weighs",
            "use false, or give moe.shared_expert_ffn_hidden_size",
        )


RULES = (
    _topk_within_experts,
    _groups_hold_what_tokens_select,
    _single_selection_keeps_raw_gate,
    _layer_freq_names_moe_layers,
    _vanilla_layer_has_no_moepp_router,
    _bias_moves_by_one_rule,
    _shared_constants_are_whole,
    _shared_expert_is_there_to_weigh,
)
