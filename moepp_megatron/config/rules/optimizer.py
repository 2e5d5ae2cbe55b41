"""Rules of the optimizer: what its kind and bf16 moments need of layout and precision."""

from __future__ import annotations

from collections.abc import Iterator

from moepp_megatron.config.problem import Problem
from moepp_megatron.config.schema import Config


def _emerging_optimizers_take_whole_matrices(config: Config) -> Iterator[Problem]:
    """They share out, gather and write whole matrices, each where megatron-core has a way to.

    Only fp32 copies of bf16 weights can be shared out: in fp32 `LayerWiseDistributedOptimizer`
    holds torch's optimizers as they are, which have none of megatron-core's methods. The overlapped
    gather works on ranges of flat buffers, and FP8 weights are written by the optimizer of ranges.
    """
    optimizer, parallel, precision = config.optimizer, config.parallel, config.precision
    if not optimizer.is_emerging:
        return
    conflicts = (
        (
            "parallel.use_distributed_optimizer",
            parallel.use_distributed_optimizer and precision.dtype != "bf16",
            " and precision.dtype fp32: megatron-core shares out whole matrices over data-parallel "
            "ranks in bf16 alone",
            "set parallel.use_distributed_optimizer to false, or precision.dtype to bf16",
        ),
        (
            "parallel.overlap_param_gather",
            parallel.overlap_param_gather,
            ", whose ranks exchange whole matrices",
            "set it to false, or optimizer.kind to adam",
        ),
        (
            "precision.fp8_param",
            precision.fp8_param,
            ", which does not turn its fp32 copies into FP8 weights",
            "set it to false, or optimizer.kind to adam",
        ),
    )
    for name, is_set, reason, remedy in conflicts:
        if is_set:
            rule = f"must be false with optimizer.kind {optimizer.kind}{reason}"
            yield Problem(name, True, rule, remedy)


# A number that falls by less than this share of itself may be rounded to bf16 as it was.
_LEAST_DECAY = 2.0**-8


def _bf16_moments_have_their_optimizer(config: Config) -> Iterator[Problem]:
    """megatron-core asserts the first two (optimizer_config.py, `__post_init__`)."""
    moments = config.optimizer.bf16_moments
    if not moments:
        return
    kind, precision = config.optimizer.kind, config.precision
    needs = (
        (kind == "adam", f"optimizer.kind ({kind}) adam", "optimizer.kind to adam"),
        (
            config.parallel.use_distributed_optimizer,
            "parallel.use_distributed_optimizer (false) true",
            "that to true",
        ),
        (
            precision.dtype == "bf16",
            f"precision.dtype ({precision.dtype}) bf16: of fp32 weights FusedAdam would keep a "
            "second copy",
            "that to bf16",
        ),
        (
            not (precision.fp8_param and precision.recipe == "delayed"),
            "precision.fp8_param (true) false with precision.fp8_recipe delayed, where FusedAdam "
            "would start from weights rounded to FP8",
            "precision.fp8_recipe to tensorwise or blockwise",
        ),
    )
    for holds, need, remedy in needs:
        if not holds:
            yield Problem(
                f"optimizer.{moments[0]}",
                "bf16",
                f"must have {need}",
                f"set {remedy}, or optimizer.{moments[0]} to fp32",
            )


def _bf16_moments_can_fall(config: Config) -> Iterator[Problem]:
    """bf16 has 8 significant bits: half of its last place is up to 2^-8 of a number."""
    for moment, beta in (("exp_avg_dtype", "adam_beta1"), ("exp_avg_sq_dtype", "adam_beta2")):
        value = getattr(config.optimizer, beta)
        if moment in config.optimizer.bf16_moments and 1.0 - value < _LEAST_DECAY:
            yield Problem(
                f"optimizer.{beta}",
                value,
                f"must be at most {1.0 - _LEAST_DECAY} (1 - 2^-8) with optimizer.{moment} bf16: a "
                "moment that falls by less in a step is rounded to what it was, and stays for ever",
                f"use 0.95, or set optimizer.{moment} to fp32",
            )


RULES = (
    _bf16_moments_have_their_optimizer,
    _bf16_moments_can_fall,
    _emerging_optimizers_take_whole_matrices,
)
