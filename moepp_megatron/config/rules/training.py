"""Rules of precision, optimizer, batches, recomputation, data and checkpoints."""

from __future__ import annotations

from collections.abc import Iterator

from moepp_megatron.config.problem import Problem, show
from moepp_megatron.config.rules.divisibility import must_divide
from moepp_megatron.config.schema import Config
from moepp_megatron.config.split import parse_split

# megatron-core knows two more (mla_up_proj, gdn_norm_out), for attention we do not build.
RECOMPUTE_MODULES = ("core_attn", "layernorm", "mlp", "moe", "moe_act", "shared_experts")
# Transformer Engine quantises in blocks of this many values; GEMM sides must be multiples.
FP8_ALIGNMENT = 16


def fp8_rests_on_bf16(config: Config) -> Iterator[Problem]:
    """FP8 is a way to run bf16 GEMMs, in Transformer Engine on a GPU."""
    precision = config.precision
    if precision.fp8 is not None and precision.dtype != "bf16":
        yield Problem(
            "precision.fp8",
            precision.fp8,
            f"must have precision.dtype ({precision.dtype}) bf16, with Transformer Engine on a GPU",
            "set precision.dtype to bf16, or precision.fp8 to null",
        )
    if precision.fp8 is None and precision.fp8_recipe is not None:
        yield Problem(
            "precision.fp8_recipe",
            precision.fp8_recipe,
            "must come with precision.fp8, which is null",
            "set precision.fp8 to e4m3 or hybrid, or precision.fp8_recipe to null",
        )


def fp8_widths_are_aligned(config: Config) -> Iterator[Problem]:
    """Transformer Engine's FP8 GEMMs need both sides of a weight shard to be multiples of 16."""
    if config.precision.fp8 is None:
        return
    etp = config.parallel.expert_tensor_size
    own = config.moe.ffn_hidden_size is not None
    widths = {
        "model.hidden_size": (config.model.hidden_size, FP8_ALIGNMENT),
        f"{'moe' if own else 'model'}.ffn_hidden_size": (
            config.expert_ffn_hidden_size,
            FP8_ALIGNMENT * etp,
        ),
    }
    for name, (value, divisor) in widths.items():
        yield from must_divide(name, value, divisor, f"{divisor} for FP8")


def learning_rate_falls(config: Config) -> Iterator[Problem]:
    """The final rate is not above the peak."""
    optimizer = config.optimizer
    if optimizer.min_lr > optimizer.lr:
        yield Problem(
            "optimizer.min_lr",
            optimizer.min_lr,
            f"must be at most optimizer.lr ({show(optimizer.lr)})",
            "use 0.0, or a tenth of optimizer.lr",
        )


def warmup_ends_in_time(config: Config) -> Iterator[Problem]:
    """Warmup ends before training does and before the decay does."""
    optimizer, iters = config.optimizer, config.training.train_iters
    ends = {"training.train_iters": iters, "optimizer.decay_iters": optimizer.decay_iters or iters}
    name, end = min(ends.items(), key=lambda item: item[1])
    if optimizer.warmup_iters >= end:
        yield Problem(
            "optimizer.warmup_iters",
            optimizer.warmup_iters,
            f"must be less than {name} ({end})",
            f"use {end // 10}, or raise {name}",
        )


def micro_batches_divide_global_batch(config: Config) -> Iterator[Problem]:
    """A step is a whole number of micro-batches."""
    training = config.training
    yield from must_divide(
        "training.global_batch_size",
        training.global_batch_size,
        training.micro_batch_size,
        f"training.micro_batch_size ({training.micro_batch_size})",
    )


def full_recompute_has_its_parts(config: Config) -> Iterator[Problem]:
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


def selective_recompute_names_modules(config: Config) -> Iterator[Problem]:
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
    known = ", ".join(RECOMPUTE_MODULES)
    if not training.recompute_modules or set(training.recompute_modules) - set(RECOMPUTE_MODULES):
        yield Problem(
            "training.recompute_modules",
            training.recompute_modules,
            f"must name at least one of {known} and nothing else",
            "use [moe]",
        )


def delayed_fp8_keeps_inner_activations(config: Config) -> Iterator[Problem]:
    """megatron-core cannot recompute these under delayed scaling."""
    training, precision = config.training, config.precision
    inner = sorted({"moe_act", "layernorm"} & set(training.recompute_modules))
    delayed = precision.fp8 is not None and precision.fp8_recipe in (None, "delayed")
    if training.recompute_granularity == "selective" and delayed and inner:
        yield Problem(
            "training.recompute_modules",
            training.recompute_modules,
            f"must not hold {' or '.join(inner)} with precision.fp8_recipe delayed",
            "use [moe], or set precision.fp8_recipe to tensorwise or blockwise",
        )


def split_has_three_parts(config: Config) -> Iterator[Problem]:
    """Three weights, something to train on, and something to validate on if that is asked for."""
    name, text = "data.split", config.data.split
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
    elif weights[1] <= 0 and config.training.eval_iters > 0:
        yield Problem(
            name,
            text,
            f"must leave something to validate on for training.eval_iters "
            f"({config.training.eval_iters})",
            "use '98,2,0', or set training.eval_iters to 0",
        )


def background_saving_saves(config: Config) -> Iterator[Problem]:
    """Writing in the background needs a checkpoint that is written while training goes on."""
    if config.checkpoint.async_save and config.checkpoint.save_interval == 0:
        yield Problem(
            "checkpoint.async_save",
            True,
            "must have checkpoint.save_interval (0) above 0",
            "set checkpoint.save_interval to a number of steps, or checkpoint.async_save to false",
        )


RULES = (
    fp8_rests_on_bf16,
    fp8_widths_are_aligned,
    learning_rate_falls,
    warmup_ends_in_time,
    micro_batches_divide_global_batch,
    full_recompute_has_its_parts,
    selective_recompute_names_modules,
    delayed_fp8_keeps_inner_activations,
    split_has_three_parts,
    background_saving_saves,
)
