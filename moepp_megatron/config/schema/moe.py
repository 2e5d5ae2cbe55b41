"""Section `moe`: experts and routing of MoE++ (arXiv 2410.07348)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from moepp_megatron.config.errors import Problem
from moepp_megatron.config.rows import (
    divisible,
    each,
    first,
    group,
    no_effect_where,
    no_effect_with,
    refuse,
    table,
    values,
)
from moepp_megatron.config.schema.section import Section, Unit
from moepp_megatron.experts import CONSTANT, LOCAL_KINDS, ExpertKind
from moepp_megatron.layer_settings import LayerSettings, settings_of

if TYPE_CHECKING:
    from moepp_megatron.config.schema import Config


Controller = Literal["none", "bias", "tau"]

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


# Tokens move in pieces of 16 bytes, 8 bf16 values.
HIDDEN_ALIGNMENT = 8
# HybridEP gathers 4 bytes per token, in pieces of 16 bytes.
_TOKEN_ALIGNMENT = 4


def _of_kind(kind: ExpertKind) -> str:
    """The settings that belong to one kind of experts."""
    names = [f"moe.{key}" for key in settings_of(kind)]
    if kind is CONSTANT:
        names += [f"optimizer.groups.constants.{key}" for key in ("lr_mult", "weight_decay")]
    return " ".join(names)


# mypy does not see that a section is frozen.
class EngineMoESection(Section, LayerSettings):  # type: ignore[misc]
    """Experts, router, balance: the layer's settings, and what surrounds the layer."""

    z_loss_coeff: Annotated[float | None, Unit("1", ge=0.0)] = None
    """Coefficient of the router z-loss; null: off"""
    input_jitter_eps: Annotated[float | None, Unit("1", ge=0.0, lt=1.0)] = None
    """Half width of the uniform noise factor on the router's input; null: off"""
    bias_update_rate: Annotated[float, Unit("1", ge=0.0)] = 0.0
    """Step by which the selection bias of each expert moves after every batch, up where its load is
    below the mean and down where it is above (aux-loss-free balancing, DeepSeek-V3: 0.001); 0: it
    stays. Needs scores other than softmax, as in megatron-core"""
    dispatcher: Literal["alltoall", "alltoall_dedup", "allgather", "flex"] = "alltoall"
    """Token dispatcher of FFN experts (alltoall_dedup: a token goes once to each rank; flex: DeepEP
    or HybridEP)"""
    flex_backend: Literal["auto", "deepep", "hybridep"] = "auto"
    """Library of the flex dispatcher; auto takes DeepEP, or else HybridEP"""
    flex_num_sms: Annotated[int | None, Unit("multiprocessors", ge=2)] = None
    """Multiprocessors that the flex dispatcher's kernels occupy; null: 20 with DeepEP, HybridEP's
    own choice"""
    cutlass_grouped_gemm: bool = False
    """Let one CUTLASS kernel multiply all FFN experts of a rank, in bf16 on Hopper (Transformer
    Engine; the weights' gradients stay with cuBLAS), in place of a cuBLAS product each"""
    layer_freq: Annotated[int | list[int], Unit("layers")] = 1
    """MoE layers: every n-th layer from the first, or one 0 or 1 per layer"""
    ffn_hidden_size: Annotated[int | None, Unit("channels", ge=1)] = None
    """Inner width of an FFN expert; null means model.ffn_hidden_size"""
    shared_expert_ffn_hidden_size: Annotated[int | None, Unit("channels", ge=1)] = None
    """Inner width of an expert that every token takes; null: none"""
    shared_expert_gate: bool = False
    """Weigh what the shared expert returns by sigmoid(w x) with a learned w (Qwen2)"""

    @property
    def ffn_share(self) -> float:
        """phi: the FFN share of selections in perfect balance under tau (arXiv 2410.07348)."""
        return self.phi(self.tau)

    @property
    def largest_ffn_share(self) -> float:
        """The largest target of the FFN share in the run."""
        return self.ffn_share

    @property
    def static_rows_per_selection(self) -> float | None:
        """FFN rows of a rank for each selection of its tokens; None without static rows."""
        return None

    @property
    def balanced_tau(self) -> float:
        """The tau under which perfect balance gives `ffn_share`."""
        return self.tau

    @property
    def share_controller(self) -> Controller:
        """The controller of the FFN share."""
        return "none"

    def moe_layer_pattern(self, num_layers: int) -> list[bool]:
        """For each of `num_layers` layers, whether it is an MoE layer.

        As in megatron-core's `moe_layer_freq`, an integer n makes layers 0, n, 2n, ... MoE layers.
        """
        if isinstance(self.layer_freq, int):
            return [layer % self.layer_freq == 0 for layer in range(num_layers)]
        return [bool(flag) for flag in self.layer_freq]

    megatron_flags: ClassVar[str] = (
        "num-experts=num_ffn_experts moe-router-topk=router_topk "
        "moe-ffn-hidden-size=ffn_hidden_size "
        "moe-shared-expert-intermediate-size=shared_expert_ffn_hidden_size "
        "moe-router-score-function=score_function moe-router-topk-scaling-factor=gate_scale "
        "moe-router-num-groups=num_groups moe-router-group-topk=group_topk "
        "moe-router-bias-update-rate=bias_update_rate moe-z-loss-coeff=z_loss_coeff "
        "moe-input-jitter-eps=input_jitter_eps moe-expert-capacity-factor=capacity_factor "
        "moe-token-dispatcher-type=dispatcher moe-flex-dispatcher-backend=flex_backend "
        "moe-shared-expert-gate=shared_expert_gate:true "
        "moe-router-enable-expert-bias=selection_bias:true "
        "moe-enable-deepep=flex_backend:deepep"
    )
    own_rules = table(
        refuse(
            "moe.router_topk",
            lambda c: c.moe.router_topk > c.moe.num_experts,
            "must be at most the number of experts of all kinds ({moe.num_experts})",
            "use {moe.num_experts} or less, or add experts",
        ),
        _layer_can_be_built,
        refuse(
            "moe.num_groups",
            "moe.limits_groups and moe.is_vanilla and moe.score_function softmax and "
            "moe.gate_normalization selected",
            "must be 1 with moe.score_function softmax and moe.gate_normalization selected on "
            "megatron-core's vanilla MoE layer, which ranks groups by logits there, not by "
            "scores",
            "use moe.gate_normalization none or moe.score_function sigmoid, or add "
            "zero-computation experts",
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
            "moe.is_vanilla",
            each(
                values("moe.two_layer_gate moe.expert_input_scale moe.logits_norm_std"),
                lambda value: value is True or value not in (False, 1.0, None),
                f"must be left at its default {_VANILLA}",
                f"drop {{name}}, {_MOEPP}",
            ),
            refuse(
                "moe.dispatcher",
                "moe.dispatcher alltoall_dedup",
                f"must be alltoall, allgather or flex {_VANILLA}",
                f"use alltoall, {_MOEPP}",
            ),
            refuse(
                "moe.balance_scope",
                "moe.balance_scope global",
                "must be microbatch or sequence without zero-computation experts and gating "
                "residual, because the global loss of megatron-core's vanilla MoE layer shrinks "
                "with the number of data-parallel ranks",
                f"use microbatch, {_MOEPP}",
            ),
        ),
        # megatron-core moves selection biases, and routes with them where scores are no softmax.
        first(
            refuse(
                "moe.bias_update_rate",
                "moe.bias_update_rate and not moe.selection_bias",
                "must be 0 without moe.selection_bias, which it moves",
                "set moe.selection_bias to true, or use 0",
            ),
            refuse(
                "moe.bias_update_rate",
                "moe.bias_update_rate and moe.share_controller bias",
                "must be 0 with moe.budget.controller bias, which moves the same bias",
                "use 0, or moe.budget.controller tau",
            ),
            refuse(
                "moe.bias_update_rate",
                "moe.bias_update_rate and moe.score_function softmax",
                "must be 0 with moe.score_function softmax, for which megatron-core moves no bias",
                _OTHER_SCORES,
            ),
            refuse(
                "moe.selection_bias",
                "moe.is_vanilla and moe.selection_bias and moe.score_function softmax",
                "must be false with moe.score_function softmax on megatron-core's vanilla MoE "
                "layer, which has no bias for it",
                _OTHER_SCORES,
            ),
        ),
        refuse(
            "moe.constants_shared",
            "moe.shares_constants and not parallel.pipeline_model_parallel_size 1",
            "must be false with parallel.pipeline_model_parallel_size "
            "({parallel.pipeline_model_parallel_size}): no stage sees all layers' gradients",
            "set moe.constants_shared to false, or change parallel.pipeline_model_parallel_size",
        ),
        refuse(
            "moe.shared_expert_gate",
            "moe.shared_expert_gate and not moe.shared_expert_ffn_hidden_size",
            "must be false without moe.shared_expert_ffn_hidden_size, which has what it weighs",
            "use false, or give moe.shared_expert_ffn_hidden_size",
        ),
        group(
            "moe.dispatcher flex",
            refuse(
                "moe.dispatcher",
                lambda c: (
                    c.parallel.expert_model_parallel_size * c.parallel.expert_tensor_size == 1
                ),
                "must have more than one rank in parallel.expert_model_parallel_size (1) * "
                "parallel.expert_tensor_parallel_size (1)",
                "use alltoall, or set parallel.expert_model_parallel_size to 2 or more",
            ),
            divisible(
                "model.hidden_size",
                lambda c: HIDDEN_ALIGNMENT,
                f"{HIDDEN_ALIGNMENT} for moe.dispatcher flex",
            ),
            # DeepEP's kernels use multiprocessors in pairs.
            group(
                "moe.flex_num_sms and not moe.flex_backend hybridep",
                divisible(
                    "moe.flex_num_sms", lambda c: 2, "2 for moe.flex_backend {moe.flex_backend}"
                ),
            ),
            refuse(
                "training.micro_batch_size",
                lambda c: c.moe.flex_backend == "hybridep" and c.tokens_per_rank % _TOKEN_ALIGNMENT,
                "must give each rank a number of tokens ({tokens_per_rank}) divisible by "
                f"{_TOKEN_ALIGNMENT} with moe.flex_backend hybridep",
                f"use {_TOKEN_ALIGNMENT}, or moe.flex_backend deepep",
            ),
        ),
    )
    excludes = table(
        (
            "moe.constants_shared",
            "parallel.overlap_moe_expert_parallel_comm",
            "each layer's backward pass runs by itself, which is not tested with it",
        ),
    )
    no_effect = table(
        no_effect_where(
            "not moe.num_zero_computation_experts",
            "without zero-computation experts",
            "moe.tau moe.balance_loss",
            "add some, or leave it out",
        ),
        no_effect_where(
            "moe.num_zero_computation_experts and not moe.balance_coeff and "
            "not moe.bias_update_rate and moe.capacity_factor null",
            "with moe.balance_coeff 0 and no moe.capacity_factor",
            "moe.tau",
            "set moe.balance_coeff above 0, or leave it out",
        ),
        no_effect_with(
            "moe.balance_coeff",
            0,
            "moe.balance_scope moe.balance_loss",
            "set moe.balance_coeff above 0",
        ),
        refuse(
            "moe.gate_normalization",
            "moe.gate_normalization nonzero and not moe.num_zero_experts",
            "is the same as selected without zero experts",
            "use selected, or add zero experts",
        ),
        *(
            no_effect_with(f"moe.{kind.setting}", 0, _of_kind(kind), f"add {kind.name} experts")
            for kind in LOCAL_KINDS
            if settings_of(kind)
        ),
        no_effect_where(
            "not moe.dispatcher flex",
            "with moe.dispatcher {moe.dispatcher}",
            "moe.flex_backend moe.flex_num_sms",
            "set moe.dispatcher to flex, or leave it out",
        ),
        refuse(
            "moe.cutlass_grouped_gemm",
            lambda c: (
                c.moe.cutlass_grouped_gemm and (c.precision.fp8 or c.precision.dtype != "bf16")
            ),
            "has no effect on products in fp32 or FP8",
            "use false, or bf16",
        ),
        # A token has two experts of one rank only if a rank holds two and a token selects two.
        group(
            "moe.dispatcher alltoall_dedup",
            first(
                refuse(
                    "moe.dispatcher",
                    "parallel.expert_model_parallel_size 1",
                    "sends no byte less than alltoall with parallel.expert_model_parallel_size (1)",
                    "use alltoall",
                ),
                refuse(
                    "moe.dispatcher",
                    lambda c: c.parallel.expert_model_parallel_size == c.moe.num_ffn_experts,
                    "sends no byte less than alltoall with one FFN expert a rank",
                    "use alltoall",
                ),
                refuse(
                    "moe.dispatcher",
                    "moe.router_topk 1",
                    "sends no byte less than alltoall with moe.router_topk (1)",
                    "use alltoall",
                ),
            ),
        ),
        no_effect_where(
            "moe.is_vanilla",
            "on megatron-core's vanilla MoE layer",
            "moe.fused",
            "add zero-computation experts, or leave it out",
        ),
        # The first MoE layer has no logits before it.
        refuse(
            "moe.gating_residual",
            lambda c: c.moe.gating_residual and sum(c.router_pattern) == 1,
            "has no effect with a single MoE layer",
            "set it to false, or add MoE layers",
        ),
    )
