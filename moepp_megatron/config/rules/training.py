"""Rules of schedule, batches, recomputation, data split and checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from moepp_megatron.config.problem import Problem
from moepp_megatron.config.rows import Rule, each, group, refuse, values
from moepp_megatron.config.rules.divisibility import batch_sizes, must_divide
from moepp_megatron.config.schema import Config
from moepp_megatron.config.split import parse_split

# megatron-core knows one more (gdn_norm_out), for attention we do not build. `mla_up_proj` has a
# rule of its own, in `rules.latent_attention`.
_RECOMPUTE_MODULES = {
    "core_attn",
    "layernorm",
    "mla_up_proj",
    "mlp",
    "moe",
    "moe_act",
    "shared_experts",
}


def _warmup_is_too_long(config: Config) -> bool:
    end = config.optimizer.decay_iters
    return end is not None and config.warmup_iters >= end


def _wsd_decay_comes_after_warmup(config: Config) -> Iterator[Problem]:
    """WSD has a number of steps to decay in, which begin after warmup (OptimizerParamScheduler)."""
    optimizer, warmup = config.optimizer, config.warmup_iters
    end, steps = optimizer.decay_iters or config.training.train_iters, optimizer.wsd_decay_iters
    most = end - warmup
    if most > 0 and (steps is None or steps > most):
        rule = (
            f"must be from 1 to the {most} steps between warmup (optimizer.warmup_iters {warmup}) "
            f"and the end of the decay ({end}) with optimizer.decay_style WSD"
        )
        yield Problem("optimizer.wsd_decay_iters", steps, rule, f"use {max(most // 5, 1)}")


def _batch_ramp_rises_to_the_batch(config: Config) -> Iterator[Problem]:
    """Pairs of tokens and sequences, from 0 tokens to the batch that the run ends with."""
    training, length = config.training, config.model.seq_length
    ramp, batch = training.batch_ramp, training.global_batch_size
    if ramp is None:
        return
    rule = ""
    if not ramp or any(len(pair) != 2 or pair[0] < 0 or pair[1] < 1 for pair in ramp):
        rule = "must be pairs of tokens (0 or more) and sequences per step (1 or more)"
    # megatron-core counts sequences.
    elif not _rises_from_zero([tokens // length for tokens, _ in ramp]):
        rule = (
            "must begin at 0 tokens and continue at rising numbers of tokens, at least a sequence "
            f"(model.seq_length {length}) apart"
        )
    elif ramp[-1][1] != batch:
        rule = f"must end with training.global_batch_size ({batch}), not {ramp[-1][1]}"
    if rule:
        remedy = f"use for example [[0, {training.micro_batch_size}], [1000000, {batch}]]"
        yield Problem("training.batch_ramp", ramp, rule, remedy)


def _rises_from_zero(numbers: list[int]) -> bool:
    return numbers[0] == 0 and all(start < later for start, later in pairwise(numbers))


def _micro_batches_divide_global_batch(config: Config) -> Iterator[Problem]:
    """A step is a whole number of micro-batches."""
    name = "training.micro_batch_size"
    for batch, size in batch_sizes(config):
        yield from must_divide(batch, size, config.training.micro_batch_size, name, others=())


def _layers_of_a_rank(config: Config) -> int:
    return config.model.num_layers // config.parallel.pipeline_model_parallel_size


def _recomputes_no_layers_of_a_rank(config: Config) -> bool:
    layers = config.training.recompute_num_layers
    return layers is None or layers > max(_layers_of_a_rank(config), 1)


def _split_has_three_parts(config: Config) -> Iterator[Problem]:
    """Three weights, something to train on, and something to validate on if that is asked for."""
    text, evaluated = config.data.split, config.training.eval_iters
    weights = parse_split(text) if text is not None else (1.0, 1.0, 1.0)
    remedy = "use '98,2,0'"
    if weights is None:
        rule = "must be three numbers of 0 or more, separated by commas: train, validation, test"
    elif weights[0] <= 0:
        rule = "must leave something to train on"
    elif weights[1] <= 0 and evaluated > 0 and not config.data.validation:
        rule = f"must leave something to validate on for training.eval_iters ({evaluated})"
        remedy += ", name sets in data.validation, or set training.eval_iters to 0"
    else:
        return
    yield Problem("data.split", text, rule, remedy)


RULES: tuple[Rule, ...] = (
    refuse(
        "optimizer.min_lr",
        lambda c: c.optimizer.min_lr > c.optimizer.lr,
        "must be at most optimizer.lr ({optimizer.lr})",
        "use 0.0, or a tenth of optimizer.lr",
    ),
    refuse(
        "optimizer.warmup_iters",
        _warmup_is_too_long,
        "must be less than optimizer.decay_iters ({optimizer.decay_iters})",
        lambda c: f"use {(c.optimizer.decay_iters or 0) // 10}, or raise optimizer.decay_iters",
    ),
    group(
        lambda c: c.optimizer.decay_style == "WSD",
        _wsd_decay_comes_after_warmup,
    ),
    # The rate of a step is lr times sqrt(warmup / step); without warmup it begins at lr (1).
    group(
        lambda c: c.optimizer.decay_style == "inverse-square-root",
        refuse(
            "optimizer.warmup_iters",
            lambda c: c.optimizer.warmup_iters == 0,
            "must be above 0 with optimizer.decay_style inverse-square-root, whose rate is lr "
            "times the square root of warmup_iters over the step",
            lambda c: f"use {max(c.training.train_iters // 100, 1)}",
        ),
    ),
    _batch_ramp_rises_to_the_batch,
    _micro_batches_divide_global_batch,
    group(
        lambda c: c.training.recompute_granularity == "full",
        refuse(
            "training.recompute_method",
            lambda c: c.training.recompute_method is None,
            "must be set with training.recompute_granularity full",
            "use uniform or block",
        ),
        refuse(
            "training.recompute_num_layers",
            _recomputes_no_layers_of_a_rank,
            lambda c: (
                f"must be from 1 to the layers of a pipeline rank ({_layers_of_a_rank(c)}) "
                "with training.recompute_granularity full"
            ),
            "use 1",
        ),
    ),
    group(
        lambda c: c.training.recompute_granularity == "selective",
        each(
            values("training.recompute_method training.recompute_num_layers"),
            lambda value: value is not None,
            "must be null with training.recompute_granularity selective",
            "set {name} to null, or training.recompute_granularity to full",
        ),
        each(
            values("training.recompute_modules"),
            lambda modules: not modules or set(modules) - _RECOMPUTE_MODULES,
            f"must name at least one of {', '.join(sorted(_RECOMPUTE_MODULES))} and nothing else",
            "use [moe]",
        ),
    ),
    _split_has_three_parts,
    refuse(
        "checkpoint.async_save",
        lambda c: c.checkpoint.async_save and c.checkpoint.save_interval == 0,
        "must have checkpoint.save_interval (0) above 0",
        "set checkpoint.save_interval to a number of steps, or checkpoint.async_save to false",
    ),
)
