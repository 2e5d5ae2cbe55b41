"""Settings that the user gave and that have no effect: warnings, not errors."""

from __future__ import annotations

from collections.abc import Iterator

from moepp_megatron.config.blends import first_step
from moepp_megatron.config.paths import is_address
from moepp_megatron.config.problem import Problem
from moepp_megatron.config.rows import (
    Rule,
    first,
    group,
    no_effect_where,
    no_effect_with,
    no_effect_without,
    refuse,
)
from moepp_megatron.config.schema import Config, OptimizerSection
from moepp_megatron.config.schema.parallel import DEGREES
from moepp_megatron.config.sections import declared
from moepp_megatron.experts import CONSTANT, LOCAL_KINDS, ExpertKind
from moepp_megatron.layer_settings import settings_of


def _of_kind(kind: ExpertKind) -> str:
    """The settings that belong to one kind of experts."""
    names = [f"moe.{key}" for key in settings_of(kind)]
    if kind is CONSTANT:
        names += [f"optimizer.groups.constants.{key}" for key in ("lr_mult", "weight_decay")]
    return " ".join(names)


def _of_optimizer(kind: str) -> str:
    """Muon's and Lion's settings are their own; Adam's are also those of the other parameters."""
    names = (name for name in OptimizerSection.model_fields if name.startswith(f"{kind}_"))
    return " ".join(f"optimizer.{name}" for name in names)


def _priority_of_groups_of_one(config: Config) -> Iterator[Problem]:
    """A group of one rank sends nothing."""
    parallel, name = config.parallel, "parallel.high_priority_stream_groups"
    for group_name in parallel.high_priority_stream_groups:
        key = DEGREES.get(group_name)
        if key is not None and getattr(parallel, key) == 1:
            reason = f"has no effect on {group_name} with parallel.{key} 1"
            value = parallel.high_priority_stream_groups
            yield Problem(name, value, reason, f"leave {group_name} out")


def _recomputes_absent_shared_experts(config: Config) -> bool:
    training = config.training
    return (
        training.recompute_granularity == "selective"
        and "shared_experts" in training.recompute_modules
        and config.moe.shared_expert_ffn_hidden_size is None
    )


def _stages_behind_the_end(config: Config) -> Iterator[Problem]:
    """A run that is trained in parts may name them all the same."""
    steps, remedy = config.training.train_iters, "raise training.train_iters, or leave it out"
    for index, stage in enumerate(config.data.stages):
        step = first_step(config, stage)
        if step >= steps:
            reason = f"has no effect: the run ends at training.train_iters ({steps})"
            yield Problem(f"data.stages[{index}]", f"from step {step}", reason, remedy)


RULES: tuple[Rule, ...] = (
    # A short try of a long run's configuration.
    refuse(
        "optimizer.warmup_iters",
        lambda c: c.warmup_iters != c.optimizer.warmup_iters,
        "is not less than training.train_iters ({training.train_iters}), and is taken for "
        "{warmup_iters}, a tenth of the run",
        "lower it, or raise training.train_iters",
    ),
    no_effect_where(
        lambda c: c.moe.num_zero_computation_experts == 0,
        "without zero-computation experts",
        "moe.tau moe.balance_loss",
        "add some, or leave it out",
    ),
    no_effect_where(
        lambda c: (
            c.moe.num_zero_computation_experts > 0
            and c.moe.balance_coeff == 0
            and c.moe.bias_update_rate == 0
            and c.moe.capacity_factor is None
        ),
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
        lambda c: c.moe.gate_normalization == "nonzero" and c.moe.num_zero_experts == 0,
        "is the same as selected without zero experts",
        "use selected, or add zero experts",
    ),
    *(
        no_effect_with(f"moe.{kind.setting}", 0, _of_kind(kind), f"add {kind.name} experts")
        for kind in LOCAL_KINDS
    ),
    _priority_of_groups_of_one,
    no_effect_where(
        lambda c: c.moe.dispatcher != "flex",
        "with moe.dispatcher {moe.dispatcher}",
        "moe.flex_backend moe.flex_num_sms",
        "set moe.dispatcher to flex, or leave it out",
    ),
    refuse(
        "moe.cutlass_grouped_gemm",
        lambda c: c.moe.cutlass_grouped_gemm and (c.precision.fp8 or c.precision.dtype != "bf16"),
        "has no effect on products in fp32 or FP8",
        "use false, or bf16",
    ),
    # A token has two experts of one rank only if a rank holds two and a token selects two.
    group(
        lambda c: c.moe.dispatcher == "alltoall_dedup",
        first(
            refuse(
                "moe.dispatcher",
                lambda c: c.parallel.expert_model_parallel_size == 1,
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
                lambda c: c.moe.router_topk == 1,
                "sends no byte less than alltoall with moe.router_topk (1)",
                "use alltoall",
            ),
        ),
    ),
    no_effect_where(
        lambda c: c.moe.is_vanilla,
        "on megatron-core's vanilla MoE layer",
        "moe.fused",
        "add zero-computation experts, or leave it out",
    ),
    no_effect_where(
        lambda c: c.moe.budget.target_ffn_per_token is not None,
        "with moe.budget.target_ffn_per_token, from which tau follows",
        "moe.tau",
        "leave one of them out",
    ),
    no_effect_where(
        lambda c: c.moe.budget.held_by == "none",
        "without moe.budget.controller",
        "moe.budget.response moe.budget.gain moe.budget.decay moe.budget.scope",
        "use bias or tau",
    ),
    no_effect_where(
        lambda c: c.moe.budget.measures_gain,
        "without moe.budget.gain",
        "moe.budget.decay",
        "set it, or leave this out",
    ),
    no_effect_where(
        lambda c: c.moe.budget.held_by == "bias" and not c.moe.budget.measures_gain,
        "with moe.budget.gain, which is fixed",
        "moe.budget.response",
        "leave one of them out",
    ),
    no_effect_where(
        lambda c: c.moe.budget.held_by == "tau",
        "with moe.budget.controller tau",
        "moe.budget.response",
        "use bias, or leave it out",
    ),
    no_effect_where(
        lambda c: c.moe.budget.start_ffn_per_token is None,
        "without moe.budget.start_ffn_per_token",
        "moe.budget.ramp_begin moe.budget.ramp_steps",
        "set it, or leave this out",
    ),
    no_effect_where(
        lambda c: not c.moe.budget.acts,
        "without moe.budget.target_ffn_per_token or controller",
        "moe.budget.start_ffn_per_token",
        "set one of them, or leave it out",
    ),
    # The measured bias moves all FFN experts alike; the balance loss distinguishes them.
    refuse(
        "moe.balance_coeff",
        lambda c: c.moe.budget.measures_gain and c.moe.balance_coeff == 0,
        "leaves nothing that evens out FFN experts among each other with moe.budget.controller "
        "bias and no moe.budget.gain",
        "use 0.01, or set moe.budget.gain for LongCat-Flash's rule, which moves each expert's",
    ),
    # The first MoE layer has no logits before it.
    refuse(
        "moe.gating_residual",
        lambda c: c.moe.gating_residual and sum(c.router_pattern) == 1,
        "has no effect with a single MoE layer",
        "set it to false, or add MoE layers",
    ),
    no_effect_with(
        "model.mtp_num_layers",
        0,
        "model.mtp_loss_scaling_factor",
        "set model.mtp_num_layers above 0",
    ),
    no_effect_where(
        lambda c: c.parallel.tensor_model_parallel_size == 1,
        "with parallel.tensor_model_parallel_size 1",
        "parallel.sequence_parallel",
        "set it to false, or use more tensor-parallel ranks",
    ),
    no_effect_without(
        "training.recompute_granularity",
        "training.recompute_method training.recompute_num_layers training.recompute_modules",
        "set training.recompute_granularity",
    ),
    no_effect_with(
        "training.recompute_granularity", "full", "training.recompute_modules", "use selective"
    ),
    refuse(
        "training.recompute_modules",
        _recomputes_absent_shared_experts,
        "has no effect for shared_experts without moe.shared_expert_ffn_hidden_size",
        "drop shared_experts from the list",
    ),
    no_effect_with(
        "precision.dtype", "fp32", "precision.grad_reduce_in_fp32", "set precision.dtype to bf16"
    ),
    no_effect_where(
        lambda c: c.precision.recipe != "delayed",
        "without precision.fp8_recipe delayed",
        "precision.fp8_margin precision.fp8_amax_history_len precision.fp8_amax_compute_algo",
        "leave it out",
    ),
    no_effect_without(
        "precision.first_last_layers_bf16",
        "precision.num_layers_at_start_in_bf16 precision.num_layers_at_end_in_bf16",
        "set precision.first_last_layers_bf16 to true",
    ),
    no_effect_without(
        "optimizer.decay_style WSD",
        "optimizer.wsd_decay_iters optimizer.wsd_decay_style",
        "set optimizer.decay_style to WSD",
    ),
    no_effect_with(
        "optimizer.decay_style",
        "constant",
        "optimizer.min_lr optimizer.decay_iters",
        "use another one",
    ),
    *(
        no_effect_without(
            f"optimizer.kind {kind}", _of_optimizer(kind), f"set optimizer.kind to {kind}"
        )
        for kind in ("muon", "lion")
    ),
    no_effect_with(
        "training.eval_iters",
        0,
        "training.eval_interval data.validation",
        "set training.eval_iters above 0",
    ),
    no_effect_with(
        "checkpoint.save_interval", 0, "checkpoint.keep", "set checkpoint.save_interval above 0"
    ),
    no_effect_where(
        lambda c: not is_address(c.checkpoint.dir or ""),
        "where checkpoint.dir is a folder",
        "checkpoint.staging",
        "set checkpoint.dir to an address such as s3://bucket/prefix, or leave it out",
    ),
    no_effect_with("checkpoint.load", None, "checkpoint.load_optimizer", "set checkpoint.load"),
    _stages_behind_the_end,
    no_effect_with(
        "resilience.guard",
        False,
        "resilience.guard_threshold "
        "resilience.guard_max_consecutive_skips resilience.guard_max_rollbacks "
        "resilience.guard_new_data",
        "switch resilience.guard on",
    ),
    no_effect_with(
        "resilience.hang_timeout_s",
        0.0,
        "resilience.hang_slow_phase_timeout_s",
        "switch resilience.hang_timeout_s on",
    ),
    no_effect_with(
        "resilience.straggler_interval",
        0,
        "resilience.straggler_threshold",
        "switch resilience.straggler_interval on",
    ),
    no_effect_where(
        lambda c: c.resilience.guard and c.checkpoint.save_interval == 0,
        "with checkpoint.save_interval 0",
        "resilience.guard_max_rollbacks",
        "set checkpoint.save_interval above 0, or leave it out",
    ),
    no_effect_without(
        "megatron.fine_grained_activation_offloading",
        "megatron.offload_modules megatron.min_offloaded_tensor_size",
        "set it to true",
    ),
    no_effect_where(
        lambda c: c.observe.wandb.project is None,
        "without observe.wandb.project",
        "observe.wandb.entity observe.wandb.mode",
        "name a project",
    ),
    no_effect_where(
        lambda c: c.routing_guard.enabled is False,
        "with routing_guard.enabled false",
        "routing_guard.dry_run routing_guard.rules",
        "leave enabled out",
    ),
    no_effect_where(
        lambda c: not c.data.reset_attention_mask,
        "on attention, which depends only on distances; only metrics by position change",
        "data.reset_position_ids",
        "set data.reset_attention_mask to true, or leave it out",
    ),
    *declared("no_effect"),
)
