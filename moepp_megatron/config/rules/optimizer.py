"""Rules of the optimizer: what its kind and bf16 moments need of layout and precision."""

from __future__ import annotations

from collections.abc import Iterator

from moepp_megatron.config.problem import Problem
from moepp_megatron.config.rows import Condition, Rule, fill, group, refuse
from moepp_megatron.config.schema import Config


def _moments_need(wrong: Condition, must: str, remedy: str) -> Rule:
    """A rule that the first of the settings of FusedAdam answers for."""

    def rule(config: Config) -> Iterator[Problem]:
        settings = config.optimizer.of_fused_adam
        if settings and wrong(config):
            key, (value, instead) = next(iter(settings.items()))
            name, must_have = f"optimizer.{key}", f"must have {fill(must, config)}"
            yield Problem(name, value, must_have, f"set {remedy}, or {name} to {instead}")

    return rule


def _moment_falls(moment: str, beta: str) -> Rule:
    """bf16 has 8 significant bits: half of its last place is up to 2^-8 of a number."""
    least = 2.0**-8
    return group(
        lambda c: f"{moment}_dtype" in c.optimizer.bf16_moments,
        refuse(
            f"optimizer.{beta}",
            lambda c: 1.0 - getattr(c.optimizer, beta) < least,
            f"must be at most {1.0 - least} (1 - 2^-8) with optimizer.{moment}_dtype bf16: a "
            "moment that falls by less in a step is rounded to what it was, and stays for ever",
            f"use 0.95, or set optimizer.{moment}_dtype to fp32",
        ),
    )


RULES: tuple[Rule, ...] = (
    # megatron-core asserts the first two (optimizer_config.py, `__post_init__`).
    _moments_need(
        lambda c: c.optimizer.kind != "adam",
        "optimizer.kind ({optimizer.kind}) adam",
        "optimizer.kind to adam",
    ),
    _moments_need(
        lambda c: not c.parallel.use_distributed_optimizer,
        "parallel.use_distributed_optimizer (false) true",
        "that to true",
    ),
    _moments_need(
        lambda c: c.precision.dtype != "bf16",
        "precision.dtype ({precision.dtype}) bf16: of fp32 weights FusedAdam would keep a second "
        "copy",
        "that to bf16",
    ),
    _moments_need(
        lambda c: c.precision.fp8_param and c.precision.recipe == "delayed",
        "precision.fp8_param (true) false with precision.fp8_recipe delayed, where FusedAdam "
        "would start from weights rounded to FP8",
        "precision.fp8_recipe to tensorwise or blockwise",
    ),
    refuse(
        "optimizer.store_param_remainders",
        lambda c: c.optimizer.store_param_remainders and c.precision.fp8 is not None,
        "must be false with precision.fp8 ({precision.fp8}), with which megatron-core may keep the "
        "fp32 weights itself",
        "set it to false, or precision.fp8 to null",
    ),
    _moment_falls("exp_avg", "adam_beta1"),
    _moment_falls("exp_avg_sq", "adam_beta2"),
    # Emerging optimizers share out, gather and write whole matrices. Only fp32 copies of bf16
    # weights can be shared out: in fp32 `LayerWiseDistributedOptimizer` holds torch's optimizers as
    # they are, which have none of megatron-core's methods. The overlapped gather works on ranges of
    # flat buffers, and FP8 weights are written by the optimizer of ranges.
    group(
        lambda c: c.optimizer.is_emerging,
        refuse(
            "parallel.use_distributed_optimizer",
            lambda c: c.parallel.use_distributed_optimizer and c.precision.dtype != "bf16",
            "must be false with optimizer.kind {optimizer.kind} and precision.dtype fp32: "
            "megatron-core distributes whole matrices over data-parallel ranks only in bf16",
            "set parallel.use_distributed_optimizer to false, or precision.dtype to bf16",
        ),
        refuse(
            "parallel.overlap_param_gather",
            lambda c: c.parallel.overlap_param_gather,
            "must be false with optimizer.kind {optimizer.kind}, whose ranks exchange whole "
            "matrices",
            "set it to false, or optimizer.kind to adam",
        ),
        refuse(
            "precision.fp8_param",
            lambda c: c.precision.fp8_param,
            "must be false with optimizer.kind {optimizer.kind}, which does not turn its fp32 "
            "copies into FP8 weights",
            "set it to false, or optimizer.kind to adam",
        ),
    ),
)
