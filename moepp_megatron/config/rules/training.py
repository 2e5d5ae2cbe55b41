"""Rules of optimizer, batches, recomputation, data and checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from moepp_megatron.config.problem import Problem, show
from moepp_megatron.config.rules.divisibility import batch_sizes, must_divide
from moepp_megatron.config.schema import Config
from moepp_megatron.config.split import parse_split

# megatron-core knows one more (gdn_norm_out), for attention we do not build. `mla_up_proj` has a
# rule of its own, in `rules.latent_attention`.
_RECOMPUTE_MODULES = (
    "core_attn",
    "layernorm",
    "mla_up_proj",
    "mlp",
    "moe",
    "moe_act",
    "shared_experts",
)


def _learning_rate_falls(config: Config) -> Iterator[Problem]:
    """The final rate is not above the peak."""
    optimizer = config.optimizer
    if optimizer.min_lr > optimizer.lr:
        yield Problem(
            "optimizer.min_lr",
            optimizer.min_lr,
            f"must be at most optimizer.lr ({show(optimizer.lr)})",
            "use 0.0, or a tenth of optimizer.lr",
        )


def _warmup_ends_before_the_decay(config: Config) -> Iterator[Problem]:
    """The rate has risen before it has fallen."""
    optimizer, end = config.optimizer, config.optimizer.decay_iters
    if end is not None and config.warmup_iters >= end:
        yield Problem(
            "optimizer.warmup_iters",
            optimizer.warmup_iters,
            f"must be less than optimizer.decay_iters ({end})",
            f"use {end // 10}, or raise optimizer.decay_iters",
        )


def _wsd_decay_comes_after_warmup(config: Config) -> Iterator[Problem]:
    """WSD has a number of steps to decay in, which begin after warmup (OptimizerParamScheduler)."""
    optimizer = config.optimizer
    if optimizer.decay_style != "WSD":
        return
    end = optimizer.decay_iters or config.training.train_iters
    most, steps = end - config.warmup_iters, optimizer.wsd_decay_iters
    if most > 0 and (steps is None or steps > most):
        yield Problem(
            "optimizer.wsd_decay_iters",
            steps,
            f"must be from 1 to the {most} steps between warmup (optimizer.warmup_iters "
            f"{config.warmup_iters}) and the end of the decay ({end}) with "
            "optimizer.decay_style WSD",
            f"use {max(most // 5, 1)}",
        )


def _inverse_square_root_starts_with_warmup(config: Config) -> Iterator[Problem]:
    """The rate of a step is lr times sqrt(warmup / step); without warmup it begins at lr (1)."""
    optimizer = config.optimizer
    if optimizer.decay_style == "inverse-square-root" and optimizer.warmup_iters == 0:
        yield Problem(
            "optimizer.warmup_iters",
            0,
            "must be above 0 with optimizer.decay_style inverse-square-root, whose rate is lr "
            "times the square root of warmup_iters over the step",
            f"use {max(config.training.train_iters // 100, 1)}",
        )


def _batch_ramp_rises_to_the_batch(config: Config) -> Iterator[Problem]:
    """Pairs of tokens and sequences, from 0 tokens to the batch that the run ends with."""
    training, name = config.training, "training.batch_ramp"
    ramp = training.batch_ramp
    if ramp is None:
        return
    batch = training.global_batch_size
    remedy = f"use for example [[0, {training.micro_batch_size}], [1000000, {batch}]]"
    if not ramp or any(len(pair) != 2 or pair[0] < 0 or pair[1] < 1 for pair in ramp):
        rule = "must be pairs of tokens (0 or more) and sequences per step (1 or more)"
        yield Problem(name, ramp, rule, remedy)
        return
    # megatron-core counts sequences.
    starts = [tokens // config.model.seq_length for tokens, _ in ramp]
    if starts[0] != 0 or any(later <= start for start, later in pairwise(starts)):
        rule = (
            "must begin at 0 tokens and go on at rising numbers of tokens, at least a sequence "
            f"(model.seq_length {config.model.seq_length}) apart"
        )
        yield Problem(name, ramp, rule, remedy)
    elif ramp[-1][1] != batch:
        rule = f"must end with training.global_batch_size ({batch}), not {ramp[-1][1]}"
        yield Problem(name, ramp, rule, remedy)


def _micro_batches_divide_global_batch(config: Config) -> Iterator[Problem]:
    """A step is a whole number of micro-batches."""
    training = config.training
    for name, size in batch_sizes(config):
        yield from must_divide(
            name, size, training.micro_batch_size, "training.micro_batch_size", others=()
        )


def _full_recompute_has_its_parts(config: Config) -> Iterator[Problem]:
    """Full recomputation needs a method and a number of layers that a stage has."""
    training = config.training
    if training.recompute_granularity != "full":
        return
    if training.recompute_method is None:
        yield Problem(
            "training.recompute_method",
            None,
            "must be set with training.recompute_granularity full",
            "use uniform or block",
        )
    most = config.model.num_layers // config.parallel.pipeline_model_parallel_size
    layers = training.recompute_num_layers
    if layers is None or layers > max(most, 1):
        yield Problem(
            "training.recompute_num_layers",
            layers,
            "must be from 1 to the layers of a pipeline rank "
            f"({most}) with training.recompute_granularity full",
            "use 1",
        )


def _selective_recompute_names_modules(config: Config) -> Iterator[Problem]:
    """Selective recomputation is described by its modules alone."""
    training = config.training
    if training.recompute_granularity != "selective":
        return
    for key in ("recompute_method", "recompute_num_layers"):
        if getattr(training, key) is not None:
            yield Problem(
                f"training.{key}",
                getattr(training, key),
                "must be null with training.recompute_granularity selective",
                f"set training.{key} to null, or training.recompute_granularity to full",
            )
    known = ", ".join(_RECOMPUTE_MODULES)
    if not training.recompute_modules or set(training.recompute_modules) - set(_RECOMPUTE_MODULES):
        yield Problem(
            "training.recompute_modules",
            training.recompute_modules,
            f"must name at least one of {known} and nothing else",
            "use [moe]",
        )


def _split_has_three_parts(config: Config) -> Iterator[Problem]:
    """Three weights, something to train on, and something to validate on if that is asked for."""
    name, text = "data.split", config.data.split
    if text is None:
        return
    weights = parse_split(text)
    if weights is None:
        yield Problem(
            name,
            text,
            "must be three numbers of 0 or more, separated by commas: train, validation, test",
            "use '98,2,0'",
        )
    elif weights[0] <= 0:
        yield Problem(name, text, "must leave something to train on", "use '98,2,0'")
    elif weights[1] <= 0 and config.training.eval_iters > 0 and not config.data.validation:
        yield Problem(
            name,
            text,
            f"must leave something to validate on for training.eval_iters "
            f"({config.training.eval_iters})",
            "use '98,2,0', name sets in data.validation, or set training.eval_iters to 0",
        )


def _background_saving_saves(config: Config) -> Iterator[Problem]:
    """Writing in the background needs a checkpoint that is written during training."""
    if config.checkpoint.async_save and config.checkpoint.save_interval == 0:
        yield Problem(
            "checkpoint.async_save",
            True,
            "must have checkpoint.save_interval (0) above 0",
            "set checkpoint.save_interval to a number of steps, or checkpoint.async_save to false",
        )


def _profiled_steps_follow_each_other(config: Config) -> Iterator[Problem]:
    """One recording, from its first step to its last, within the run."""
    name, steps = "training.profile_steps", config.training.profile_steps
    if not steps:
        return
    if min(steps) < 1 or max(steps) > config.training.train_iters:
        yield Problem(
            name,
            steps,
            f"must be steps from 1 to training.train_iters ({config.training.train_iters})",
            "use steps of this run, after the first few, which also warm up",
        )
    elif steps != list(range(steps[0], steps[0] + len(steps))):
        yield Problem(
            name,
            steps,
            "must follow each other, because they are one recording",
            f"use {list(range(min(steps), min(steps) + len(set(steps))))}",
        )


RULES = (
    _learning_rate_falls,
    _warmup_ends_before_the_decay,
    _wsd_decay_comes_after_warmup,
    _inverse_square_root_starts_with_warmup,
    _batch_ramp_rises_to_the_batch,
    _micro_batches_divide_global_batch,
    _full_recompute_has_its_parts,
    _selective_recompute_names_modules,
    _split_has_three_parts,
    _background_saving_saves,
    _profiled_steps_follow_each_other,
)
