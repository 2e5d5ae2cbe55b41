"""Settings that the user gave and that have no effect: warnings, not errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any

from moepp_megatron.config.blends import first_step
from moepp_megatron.config.paths import is_address
from moepp_megatron.config.problem import Problem, show
from moepp_megatron.config.schema import Config, Section
from moepp_megatron.experts import CONSTANT, LOCAL_KINDS
from moepp_megatron.layer_settings import settings_of

Rule = Callable[[Config], Iterator[Problem]]


def _ignored(config: Config, name: str, reason: str, remedy: str) -> Iterator[Problem]:
    """Yield a notice if the user set `name` to something other than its default."""
    section, _, key = name.rpartition(".")
    owner: Section = attrgetter(section)(config)
    if owner.is_set(key):
        yield Problem(name, getattr(owner, key), f"has no effect {reason}", remedy)


def _where(applies: Callable[[Config], bool], reason: str, names: str, remedy: str) -> Rule:
    """A rule: none of `names` (one or more, with spaces) has an effect where `applies` is true."""

    def rule(config: Config) -> Iterator[Problem]:
        if applies(config):
            for name in names.split():
                yield from _ignored(config, name, reason, remedy)

    rule.__name__ = f"{names} {reason}"
    rule.__doc__ = f"What is without effect {reason}: {names}."
    return rule


def _with(switch: str, value: Any, names: str, remedy: str) -> Rule:
    """A rule: none of `names` has an effect with this value of another setting."""
    reason = f"with {switch} {value if isinstance(value, str) else show(value)}"
    value_of = attrgetter(switch)
    remedy = f"{remedy}, or leave it out"
    return _where(lambda config: value_of(config) == value, reason, names, remedy)


def _without(switch: str, names: str, remedy: str) -> Rule:
    """A rule: none of `names` has an effect without another setting, or without a value of it."""
    setting, _, value = switch.partition(" ")
    value_of = attrgetter(setting)

    def is_missing(config: Config) -> bool:
        return value_of(config) != value if value else not value_of(config)

    return _where(is_missing, f"without {switch}", names, f"{remedy}, or leave it out")


def _nonzero_without_zero_experts(config: Config) -> Iterator[Problem]:
    """Only a zero expert leaves a probability out of the sum."""
    if config.moe.gate_normalization == "nonzero" and config.moe.num_zero_experts == 0:
        yield Problem(
            "moe.gate_normalization",
            "nonzero",
            "is the same as selected without zero experts",
            "use selected, or add zero experts",
        )


def _settings_of_absent_experts(config: Config) -> Iterator[Problem]:
    """Some settings belong to one kind of experts."""
    for kind in LOCAL_KINDS:
        if config.moe.count(kind) == 0:
            reason = f"with moe.{kind.setting} 0"
            remedy = f"add {kind.name} experts, or leave it out"
            names = [f"moe.{key}" for key in settings_of(kind)]
            if kind is CONSTANT:
                names += [f"optimizer.groups.constants.{k}" for k in ("lr_mult", "weight_decay")]
            for name in names:
                yield from _ignored(config, name, reason, remedy)


def _priority_of_groups_of_one(config: Config) -> Iterator[Problem]:
    """A rank alone sends nothing."""
    parallel = config.parallel
    ranks = {
        "tp": ("tensor_model_parallel_size", parallel.tensor_model_parallel_size),
        "cp": ("context_parallel_size", parallel.context_parallel_size),
        "pp": ("pipeline_model_parallel_size", parallel.pipeline_model_parallel_size),
        "ep": ("expert_model_parallel_size", parallel.expert_model_parallel_size),
    }
    for group in parallel.high_priority_stream_groups:
        key, size = ranks.get(group, ("", 2))
        if size == 1:
            yield Problem(
                "parallel.high_priority_stream_groups",
                parallel.high_priority_stream_groups,
                f"has no effect on {group} with parallel.{key} 1",
                f"leave {group} out",
            )


def _flex_settings_without_flex(config: Config) -> Iterator[Problem]:
    """Backend and multiprocessors belong to the flex dispatcher."""
    dispatcher = config.moe.dispatcher
    if dispatcher != "flex":
        remedy = "set moe.dispatcher to flex, or leave it out"
        for key in ("flex_backend", "flex_num_sms"):
            yield from _ignored(config, f"moe.{key}", f"with moe.dispatcher {dispatcher}", remedy)


def _deduplication_without_duplicates(config: Config) -> Iterator[Problem]:
    """A token has two experts of one rank only if a rank holds two and a token selects two."""
    moe, ranks = config.moe, config.parallel.expert_model_parallel_size
    if moe.dispatcher != "alltoall_dedup":
        return
    reasons = {
        "parallel.expert_model_parallel_size (1)": ranks == 1,
        "one FFN expert a rank": ranks == moe.num_ffn_experts,
        "moe.router_topk (1)": moe.router_topk == 1,
    }
    for reason, holds in reasons.items():
        if holds:
            yield Problem(
                "moe.dispatcher",
                "alltoall_dedup",
                f"sends no byte less than alltoall with {reason}",
                "use alltoall",
            )
            return


def _budget_settings_of_what_is_off(config: Config) -> Iterator[Problem]:
    """Settings of another controller, or of none; the start and its ramp need each other."""
    budget = config.moe.budget
    others: tuple[str, ...] = ("response",)
    reason, remedy = f"with moe.budget.controller {budget.held_by}", "use bias, or leave it out"
    if budget.held_by == "none":
        others = ("response", "gain", "decay", "scope")
        reason, remedy = "without moe.budget.controller", "use bias or tau"
    elif budget.measures_gain:
        others, reason, remedy = ("decay",), "without moe.budget.gain", "set it, or leave this out"
    elif budget.held_by == "bias":
        reason, remedy = "with moe.budget.gain, which is fixed", "leave one of them out"
    for key in others:
        yield from _ignored(config, f"moe.budget.{key}", reason, remedy)
    if budget.start_ffn_per_token is None:
        for key in ("ramp_begin", "ramp_steps"):
            reason = "without moe.budget.start_ffn_per_token"
            yield from _ignored(config, f"moe.budget.{key}", reason, "set it, or leave this out")
    elif not budget.acts:
        yield from _ignored(
            config,
            "moe.budget.start_ffn_per_token",
            "without moe.budget.target_ffn_per_token or controller",
            "set one of them, or leave it out",
        )


def _nothing_evens_out_experts(config: Config) -> Iterator[Problem]:
    """The measured bias moves all FFN experts alike; the balance loss tells them apart."""
    if config.moe.budget.measures_gain and config.moe.balance_coeff == 0:
        yield Problem(
            "moe.balance_coeff",
            config.moe.balance_coeff,
            "leaves nothing that evens out FFN experts among each other with moe.budget.controller "
            "bias and no moe.budget.gain",
            "use 0.01, or set moe.budget.gain for LongCat-Flash's rule, which moves each expert's",
        )


def _residual_without_predecessor(config: Config) -> Iterator[Problem]:
    """The first MoE layer has no logits before it, so one MoE layer has no residual."""
    moe_layers = sum(config.router_pattern)
    if config.moe.gating_residual and moe_layers == 1:
        yield Problem(
            "moe.gating_residual",
            True,
            "has no effect with a single MoE layer",
            "set it to false, or add MoE layers",
        )


def _shared_experts_that_are_not_there(config: Config) -> Iterator[Problem]:
    """Their recomputation needs some."""
    training = config.training
    if (
        training.recompute_granularity == "selective"
        and "shared_experts" in training.recompute_modules
        and config.moe.shared_expert_ffn_hidden_size is None
    ):
        yield Problem(
            "training.recompute_modules",
            training.recompute_modules,
            "has no effect for shared_experts without moe.shared_expert_ffn_hidden_size",
            "drop shared_experts from the list",
        )


def _parts_of_other_optimizers(config: Config) -> Iterator[Problem]:
    """Muon's and Lion's settings are their own; Adam's are also those of the other parameters."""
    for key in type(config.optimizer).model_fields:
        kind = key.partition("_")[0]
        if kind in ("muon", "lion") and kind != config.optimizer.kind:
            yield from _ignored(
                config,
                f"optimizer.{key}",
                f"without optimizer.kind {kind}",
                f"set optimizer.kind to {kind}, or leave it out",
            )


def _stages_behind_the_end(config: Config) -> Iterator[Problem]:
    """A run that is trained in parts may name them all the same."""
    for index, stage in enumerate(config.data.stages):
        step, steps = first_step(config, stage), config.training.train_iters
        if step >= steps:
            yield Problem(
                f"data.stages[{index}]",
                f"from step {step}",
                f"has no effect: the run ends at training.train_iters ({steps})",
                "raise training.train_iters, or leave it out",
            )


def _warmup_longer_than_the_run(config: Config) -> Iterator[Problem]:
    """A short try of a long run's configuration."""
    warmup, steps = config.optimizer.warmup_iters, config.training.train_iters
    if config.warmup_iters != warmup:
        yield Problem(
            "optimizer.warmup_iters",
            warmup,
            f"is not less than training.train_iters ({steps}), and is taken for "
            f"{config.warmup_iters}, a tenth of the run",
            "lower it, or raise training.train_iters",
        )


RULES: tuple[Rule, ...] = (
    _warmup_longer_than_the_run,
    _where(
        lambda config: config.moe.num_zero_computation_experts == 0,
        "without zero-computation experts", "moe.tau", "add some, or leave it out",
    ),
    _where(
        lambda config: (
            config.moe.num_zero_computation_experts > 0
            and config.moe.balance_coeff == 0
            and config.moe.bias_update_rate == 0
            and config.moe.capacity_factor is None
        ),
        "with moe.balance_coeff 0 and no moe.capacity_factor", "moe.tau",
        "set moe.balance_coeff above 0, or leave it out",
    ),
    _with("moe.balance_coeff", 0, "moe.balance_scope", "set moe.balance_coeff above 0"),
    _nonzero_without_zero_experts,
    _settings_of_absent_experts,
    _priority_of_groups_of_one,
    _flex_settings_without_flex,
    _deduplication_without_duplicates,
    _where(
        lambda config: config.moe.is_vanilla, "on megatron-core's vanilla MoE layer", "moe.fused",
        "add zero-computation experts, or leave it out",
    ),
    _where(
        lambda config: config.moe.budget.target_ffn_per_token is not None,
        "with moe.budget.target_ffn_per_token, from which tau follows", "moe.tau",
        "leave one of them out",
    ),
    _budget_settings_of_what_is_off,
    _without("evaluation.tasks", "evaluation.interval evaluation.limit", "name some"),
    _nothing_evens_out_experts,
    _residual_without_predecessor,
    _with(
        "model.mtp_num_layers", 0, "model.mtp_loss_scaling_factor",
        "set model.mtp_num_layers above 0",
    ),
    _where(
        lambda config: config.parallel.tensor_model_parallel_size == 1,
        "with parallel.tensor_model_parallel_size 1", "parallel.sequence_parallel",
        "set it to false, or use more tensor-parallel ranks",
    ),
    _without(
        "training.recompute_granularity",
        "training.recompute_method training.recompute_num_layers training.recompute_modules",
        "set training.recompute_granularity",
    ),
    _with("training.recompute_granularity", "full", "training.recompute_modules", "use selective"),
    _shared_experts_that_are_not_there,
    _with(
        "precision.dtype", "fp32", "precision.grad_reduce_in_fp32", "set precision.dtype to bf16",
    ),
    _where(
        lambda config: config.precision.recipe != "delayed", "without precision.fp8_recipe delayed",
        "precision.fp8_margin precision.fp8_amax_history_len precision.fp8_amax_compute_algo",
        "leave it out",
    ),
    _without(
        "precision.first_last_layers_bf16",
        "precision.num_layers_at_start_in_bf16 precision.num_layers_at_end_in_bf16",
        "set precision.first_last_layers_bf16 to true",
    ),
    _without(
        "optimizer.decay_style WSD", "optimizer.wsd_decay_iters optimizer.wsd_decay_style",
        "set optimizer.decay_style to WSD",
    ),
    _with(
        "optimizer.decay_style", "constant", "optimizer.min_lr optimizer.decay_iters",
        "use another one",
    ),
    _parts_of_other_optimizers,
    _with(
        "training.eval_iters", 0, "training.eval_interval data.validation",
        "set training.eval_iters above 0",
    ),
    _with("checkpoint.save_interval", 0, "checkpoint.keep", "set checkpoint.save_interval above 0"),
    _where(
        lambda config: not is_address(config.checkpoint.dir or ""),
        "where checkpoint.dir is a folder", "checkpoint.staging",
        "set checkpoint.dir to an address such as s3://bucket/prefix, or leave it out",
    ),
    _with("checkpoint.load", None, "checkpoint.load_optimizer", "set checkpoint.load"),
    _stages_behind_the_end,
    _with(
        "resilience.guard", False,
        "resilience.guard_window resilience.guard_threshold "
        "resilience.guard_max_consecutive_skips resilience.guard_max_rollbacks "
        "resilience.guard_new_data",
        "switch resilience.guard on",
    ),
    _with(
        "resilience.hang_timeout_s", 0.0, "resilience.hang_slow_phase_timeout_s",
        "switch resilience.hang_timeout_s on",
    ),
    _with(
        "resilience.straggler_interval", 0, "resilience.straggler_threshold",
        "switch resilience.straggler_interval on",
    ),
    _where(
        lambda config: config.resilience.guard and config.checkpoint.save_interval == 0,
        "with checkpoint.save_interval 0", "resilience.guard_max_rollbacks",
        "set checkpoint.save_interval above 0, or leave it out",
    ),
    _without("training.profile_steps", "training.profile_ranks", "name some steps"),
    _where(
        lambda config: config.observe.wandb.project is None, "without observe.wandb.project",
        "observe.wandb.entity observe.wandb.mode", "name a project",
    ),
    _without(
        "distillation.teacher",
        "distillation.weight distillation.text_weight distillation.temperature distillation.top_k",
        "name one",
    ),
    _where(
        lambda config: config.routing_guard.enabled is False, "with routing_guard.enabled false",
        "routing_guard.dry_run routing_guard.rules", "leave enabled out",
    ),
    _where(
        lambda config: not config.data.reset_attention_mask,
        "on attention, which sees distances alone; only metrics by position see it",
        "data.reset_position_ids", "set data.reset_attention_mask to true, or leave it out",
    ),
)  # fmt: skip
