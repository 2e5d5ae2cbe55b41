"""Settings that the user gave and that have no effect: warnings, not errors."""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter

from moepp_megatron.config.blends import first_step
from moepp_megatron.config.paths import is_address
from moepp_megatron.config.problem import Problem, show
from moepp_megatron.config.schema import Config, Section
from moepp_megatron.experts import CONSTANT, LOCAL_KINDS
from moepp_megatron.layer_settings import settings_of


def _ignored(config: Config, name: str, reason: str, remedy: str) -> Iterator[Problem]:
    """Yield a notice if the user set `name` to something other than its default."""
    section, _, key = name.rpartition(".")
    owner: Section = attrgetter(section)(config)
    if owner.is_set(key):
        yield Problem(name, getattr(owner, key), f"has no effect {reason}", remedy)


def _routing_without_object(config: Config) -> Iterator[Problem]:
    """Tau weighs zero-computation experts; scope and tau shape a balance loss or capacity."""
    moe = config.moe
    if moe.num_zero_computation_experts == 0:
        yield from _ignored(
            config, "moe.tau", "without zero-computation experts", "add some, or leave it out"
        )
    elif moe.balance_coeff == 0 and moe.capacity_factor is None:
        yield from _ignored(
            config,
            "moe.tau",
            "with moe.balance_coeff 0 and no moe.capacity_factor",
            "set moe.balance_coeff above 0, or leave it out",
        )
    if moe.balance_coeff == 0:
        yield from _ignored(
            config,
            "moe.balance_scope",
            "with moe.balance_coeff 0",
            "set moe.balance_coeff above 0, or leave it out",
        )
    if moe.gate_normalization == "nonzero" and moe.num_zero_experts == 0:
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
    if config.moe.dispatcher != "flex":
        for key in ("flex_backend", "flex_num_sms"):
            yield from _ignored(
                config,
                f"moe.{key}",
                f"with moe.dispatcher {config.moe.dispatcher}",
                "set moe.dispatcher to flex, or leave it out",
            )


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


def _kernels_of_the_vanilla_layer(config: Config) -> Iterator[Problem]:
    """The Triton kernels belong to the MoE++ layer."""
    if config.moe.is_vanilla:
        yield from _ignored(
            config,
            "moe.fused",
            "on megatron-core's vanilla MoE layer",
            "add zero-computation experts, or leave it out",
        )


def _tau_beside_a_target(config: Config) -> Iterator[Problem]:
    """Tau follows from the budget's target."""
    if config.moe.budget.target_ffn_per_token is not None:
        yield from _ignored(
            config,
            "moe.tau",
            "with moe.budget.target_ffn_per_token, from which tau follows",
            "leave one of them out",
        )


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


def _evaluation_without_tasks(config: Config) -> Iterator[Problem]:
    """Interval and limit belong to tasks."""
    if not config.evaluation.tasks:
        for key in ("interval", "limit"):
            reason, remedy = "without evaluation.tasks", "name some, or leave it out"
            yield from _ignored(config, f"evaluation.{key}", reason, remedy)


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


def _weight_of_no_further_tokens(config: Config) -> Iterator[Problem]:
    """The weight belongs to the loss of multi-token prediction."""
    if config.model.mtp_num_layers == 0:
        yield from _ignored(
            config,
            "model.mtp_loss_scaling_factor",
            "with model.mtp_num_layers 0",
            "set model.mtp_num_layers above 0, or leave it out",
        )


def _sequence_parallel_without_tensor_parallel(config: Config) -> Iterator[Problem]:
    """Sequence parallelism splits over the tensor-parallel ranks."""
    if config.parallel.tensor_model_parallel_size == 1:
        yield from _ignored(
            config,
            "parallel.sequence_parallel",
            "with parallel.tensor_model_parallel_size 1",
            "set it to false, or use more tensor-parallel ranks",
        )


def _recompute_settings_without_recompute(config: Config) -> Iterator[Problem]:
    """Method, layers and modules describe a recomputation that must be switched on."""
    training = config.training
    if training.recompute_granularity is None:
        for key in ("recompute_method", "recompute_num_layers", "recompute_modules"):
            yield from _ignored(
                config,
                f"training.{key}",
                "without training.recompute_granularity",
                "set training.recompute_granularity, or leave it out",
            )
    elif training.recompute_granularity == "full":
        yield from _ignored(
            config,
            "training.recompute_modules",
            "with training.recompute_granularity full",
            "use selective, or leave it out",
        )
    elif (
        "shared_experts" in training.recompute_modules
        and config.moe.shared_expert_ffn_hidden_size is None
    ):
        yield Problem(
            "training.recompute_modules",
            training.recompute_modules,
            "has no effect for shared_experts without moe.shared_expert_ffn_hidden_size",
            "drop shared_experts from the list",
        )


def _number_formats_without_use(config: Config) -> Iterator[Problem]:
    """Gradients of fp32 are fp32; only delayed scaling has a history; bf16 layers need a switch."""
    precision = config.precision
    if precision.dtype == "fp32":
        yield from _ignored(
            config,
            "precision.grad_reduce_in_fp32",
            "with precision.dtype fp32",
            "set precision.dtype to bf16, or leave it out",
        )
    if precision.recipe != "delayed":
        for key in ("fp8_margin", "fp8_amax_history_len", "fp8_amax_compute_algo"):
            yield from _ignored(
                config, f"precision.{key}", "without precision.fp8_recipe delayed", "leave it out"
            )
    if not precision.first_last_layers_bf16:
        for key in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
            yield from _ignored(
                config,
                f"precision.{key}",
                "without precision.first_last_layers_bf16",
                "set precision.first_last_layers_bf16 to true, or leave it out",
            )


def _schedule_parts_of_other_schedules(config: Config) -> Iterator[Problem]:
    """A constant learning rate does not decay, and only WSD decays in its last steps."""
    if config.optimizer.decay_style != "WSD":
        for key in ("wsd_decay_iters", "wsd_decay_style"):
            yield from _ignored(
                config,
                f"optimizer.{key}",
                "without optimizer.decay_style WSD",
                "set optimizer.decay_style to WSD, or leave it out",
            )
    if config.optimizer.decay_style == "constant":
        for key in ("min_lr", "decay_iters"):
            yield from _ignored(
                config,
                f"optimizer.{key}",
                "with optimizer.decay_style constant",
                "use another one, or leave it out",
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


def _intervals_of_nothing(config: Config) -> Iterator[Problem]:
    """Validation without batches; checkpoints that are not written or not read."""
    if config.training.eval_iters == 0:
        yield from _ignored(
            config,
            "training.eval_interval",
            "with training.eval_iters 0",
            "set training.eval_iters above 0, or leave it out",
        )
        yield from _ignored(
            config,
            "data.validation",
            "with training.eval_iters 0",
            "set training.eval_iters above 0, or leave it out",
        )
    if config.checkpoint.save_interval == 0:
        yield from _ignored(
            config,
            "checkpoint.keep",
            "with checkpoint.save_interval 0",
            "set checkpoint.save_interval above 0, or leave it out",
        )
    if not is_address(config.checkpoint.dir or ""):
        yield from _ignored(
            config,
            "checkpoint.staging",
            "where checkpoint.dir is a folder",
            "set checkpoint.dir to an address such as s3://bucket/prefix, or leave it out",
        )
    if config.checkpoint.load is None:
        yield from _ignored(
            config,
            "checkpoint.load_optimizer",
            "with checkpoint.load null",
            "set checkpoint.load, or leave it out",
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


def _settings_of_what_is_off(config: Config) -> Iterator[Problem]:
    """Details of a guard, a timeout or a comparison that is switched off."""
    resilience = config.resilience
    off = {
        "guard": ("guard_window", "guard_threshold", "guard_max_consecutive_skips",
                  "guard_max_rollbacks", "guard_new_data"),
        "hang_timeout_s": ("hang_slow_phase_timeout_s",),
        "straggler_interval": ("straggler_threshold",),
    }  # fmt: skip
    for switch, keys in off.items():
        value = getattr(resilience, switch)
        if value:
            continue
        for key in keys:
            yield from _ignored(
                config,
                f"resilience.{key}",
                f"with resilience.{switch} {show(value)}",
                f"switch resilience.{switch} on, or leave it out",
            )


def _rollback_without_checkpoint(config: Config) -> Iterator[Problem]:
    """Rolling back needs a checkpoint of this run."""
    if config.resilience.guard and config.checkpoint.save_interval == 0:
        yield from _ignored(
            config,
            "resilience.guard_max_rollbacks",
            "with checkpoint.save_interval 0",
            "set checkpoint.save_interval above 0, or leave it out",
        )


def _profiled_ranks_without_steps(config: Config) -> Iterator[Problem]:
    """Ranks record nothing if no steps are given."""
    if not config.training.profile_steps:
        yield from _ignored(
            config,
            "training.profile_ranks",
            "without training.profile_steps",
            "name some steps, or leave it out",
        )


def _wandb_settings_without_project(config: Config) -> Iterator[Problem]:
    """W&B is on only if a project is named."""
    wandb = config.observe.wandb
    if wandb.project is None:
        for key in ("entity", "mode"):
            reason = "without observe.wandb.project"
            yield from _ignored(config, f"observe.wandb.{key}", reason, "name a project")


def _distillation_without_teacher(config: Config) -> Iterator[Problem]:
    """Only a teacher gives weights and temperature something to act on."""
    if config.distillation.teacher is None:
        for key in ("weight", "text_weight", "temperature", "top_k"):
            reason = "without distillation.teacher"
            yield from _ignored(config, f"distillation.{key}", reason, "name one, or leave it out")


def _guard_settings_of_what_is_off(config: Config) -> Iterator[Problem]:
    """Rules are judged only if the guard is on; ids and shares belong to one kind of tokens."""
    guard = config.routing_guard
    if guard.enabled is False:
        for key in ("dry_run", "rules"):
            reason = "with routing_guard.enabled false"
            yield from _ignored(config, f"routing_guard.{key}", reason, "leave enabled out")
    kinds = {"token_ids": "ids", "share": "high_loss", "decay": "high_loss"}
    for key, kind in kinds.items():
        if guard.force_ffn.tokens != kind:
            reason = f"with routing_guard.force_ffn.tokens {guard.force_ffn.tokens}"
            section = "routing_guard.force_ffn"
            yield from _ignored(config, f"{section}.{key}", reason, f"use tokens {kind}")


def _positions_of_documents_that_are_seen(config: Config) -> Iterator[Problem]:
    """Rotary embeddings know distances alone, which are the same within a document."""
    if config.data.reset_position_ids and not config.data.reset_attention_mask:
        yield from _ignored(
            config,
            "data.reset_position_ids",
            "on attention, which sees distances alone; only metrics by position see it",
            "set data.reset_attention_mask to true, or leave it out",
        )


RULES = (
    _routing_without_object,
    _settings_of_absent_experts,
    _priority_of_groups_of_one,
    _flex_settings_without_flex,
    _deduplication_without_duplicates,
    _kernels_of_the_vanilla_layer,
    _tau_beside_a_target,
    _budget_settings_of_what_is_off,
    _evaluation_without_tasks,
    _nothing_evens_out_experts,
    _residual_without_predecessor,
    _weight_of_no_further_tokens,
    _sequence_parallel_without_tensor_parallel,
    _recompute_settings_without_recompute,
    _number_formats_without_use,
    _schedule_parts_of_other_schedules,
    _parts_of_other_optimizers,
    _intervals_of_nothing,
    _stages_behind_the_end,
    _settings_of_what_is_off,
    _rollback_without_checkpoint,
    _profiled_ranks_without_steps,
    _wandb_settings_without_project,
    _distillation_without_teacher,
    _guard_settings_of_what_is_off,
    _positions_of_documents_that_are_seen,
)
