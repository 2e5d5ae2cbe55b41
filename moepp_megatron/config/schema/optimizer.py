"""Section `optimizer`: the optimizer, its schedule, and what differs between parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from moepp_megatron.config.errors import Problem
from moepp_megatron.config.plugins import Plugin
from moepp_megatron.config.rows import (
    Condition,
    Rule,
    fill,
    group,
    no_effect_with,
    no_effect_without,
    refuse,
)
from moepp_megatron.config.schema.section import Section, Unit

if TYPE_CHECKING:
    from moepp_megatron.config.schema import Config


class _ParameterGroup(Section):
    """Optimizer settings of one kind of parameters."""

    lr_mult: Annotated[float, Unit("1", gt=0.0)] = 1.0
    """Factor of the learning rate, of lr and of min_lr"""
    weight_decay: Annotated[float | None, Unit("1", ge=0.0)] = None
    """Weight decay; null is optimizer.weight_decay for matrices and 0 for vectors"""


class ParameterGroups(Section):
    """Kinds of parameters, of which each parameter has one at most."""

    router: _ParameterGroup = _ParameterGroup()
    """Routers, with gating residuals and the shared experts' gate"""
    constants: _ParameterGroup = _ParameterGroup()
    """Vectors and mixing weights of constant experts"""
    embeddings: _ParameterGroup = _ParameterGroup()
    """Embedding and output layer"""
    norms_and_biases: _ParameterGroup = _ParameterGroup()
    """Norms, and biases of linear layers"""


def _moments_need(wrong: Condition, must: str, remedy: str) -> Rule:
    """A rule that the first of the settings of FusedAdam answers for."""

    def rule(config: Config) -> Iterator[Problem]:
        key, (value, instead) = next(iter(config.optimizer.of_fused_adam.items()))
        name, must_have = f"optimizer.{key}", f"must have {fill(must, config)}"
        yield Problem(name, value, must_have, f"set {remedy}, or {name} to {instead}")

    return group("optimizer.of_fused_adam", group(wrong, rule))


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


class OptimizerSection(Section):
    """The optimizer and its learning-rate schedule."""

    lr: Annotated[float, Unit("1", gt=0.0)]
    """Peak learning rate"""
    min_lr: Annotated[float, Unit("1", ge=0.0)] = 0.0
    """Final learning rate"""
    weight_decay: Annotated[float, Unit("1", ge=0.0)] = 0.1
    """Decoupled weight decay"""
    clip_grad: Annotated[float, Unit("1", ge=0.0)] = 1.0
    """Largest global gradient norm; 0 does not clip"""
    adam_beta1: Annotated[float, Unit("1", ge=0.0, lt=1.0)] = 0.9
    """Adam beta 1"""
    adam_beta2: Annotated[float, Unit("1", ge=0.0, lt=1.0)] = 0.95
    """Adam beta 2"""
    adam_eps: Annotated[float, Unit("1", gt=0.0)] = 1e-8
    """Adam epsilon"""
    exp_avg_dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of Adam's first moment between steps; bf16 takes half of its memory and needs
    Transformer Engine"""
    exp_avg_sq_dtype: Literal["fp32", "bf16"] = "fp32"
    """The same of Adam's second moment"""
    store_param_remainders: bool = False
    """Keep of each fp32 weight the 16 bits that its bf16 weight lacks, exactly, in place of all 32;
    needs Transformer Engine"""
    warmup_iters: Annotated[int, Unit("steps", ge=0)] = 0
    """Steps in which the rate rises from 0 to lr"""
    decay_style: (
        Literal["cosine", "linear", "constant", "inverse-square-root", "WSD"]
        | Annotated[str, Plugin("schedules")]
    ) = "cosine"
    """Learning-rate decay from lr to min_lr; WSD keeps lr until its last steps"""
    wsd_decay_iters: Annotated[int | None, Unit("steps", ge=1)] = None
    """With WSD: the steps before decay_iters in which the rate falls"""
    wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """With WSD: how it falls in these steps"""
    decay_iters: Annotated[int | None, Unit("steps", ge=1)] = None
    """Step at which min_lr is reached; null means training.train_iters"""
    kind: Literal["adam", "muon", "lion"] | Annotated[str, Plugin("optimizers")] = "adam"
    """The optimizer; adam is AdamW; the others train the matrices, and AdamW the router, constants,
    embeddings, output layer, norms and biases"""
    muon_momentum: Annotated[float, Unit("1", ge=0.0, lt=1.0)] = 0.95
    """Share of the average gradient that a step keeps"""
    muon_nesterov: bool = False
    """Look ahead by the step's own gradient"""
    muon_num_ns_steps: Annotated[int, Unit("1", ge=1)] = 5
    """Newton-Schulz iterations"""
    muon_scale_mode: Literal["spectral", "unit_rms_norm", "shape_scaling"] = "spectral"
    """Scaling of an update by the shape of its matrix (emerging_optimizers)"""
    muon_extra_scale_factor: Annotated[float, Unit("1", gt=0.0)] = 1.0
    """Factor of every update; 0.2 gives those of spectral the size of AdamW's"""
    muon_fp32_matmul_prec: Literal["highest", "high", "medium"] = "medium"
    """Precision of the iterations' products; medium is bf16"""
    muon_tp_mode: Literal["duplicated", "distributed"] = "duplicated"
    """With tensor parallelism: gather each matrix, or share out its products; both orthogonalize it
    whole"""
    lion_beta1: Annotated[float, Unit("1", ge=0.0, lt=1.0)] = 0.95
    """Lion beta 1"""
    lion_beta2: Annotated[float, Unit("1", ge=0.0, lt=1.0)] = 0.98
    """Lion beta 2"""
    groups: ParameterGroups = ParameterGroups()
    """Learning rate and weight decay of some kinds of parameters"""

    @property
    def bf16_moments(self) -> tuple[str, ...]:
        """The settings of moments that are kept in bf16."""
        names = ("exp_avg_dtype", "exp_avg_sq_dtype")
        return tuple(name for name in names if getattr(self, name) == "bf16")

    @property
    def of_fused_adam(self) -> dict[str, tuple[object, str]]:
        """Settings that only Transformer Engine's FusedAdam has: value, and what does without."""
        found: dict[str, tuple[object, str]] = dict.fromkeys(self.bf16_moments, ("bf16", "fp32"))
        if self.store_param_remainders:
            found["store_param_remainders"] = True, "false"
        return found

    @property
    def is_emerging(self) -> bool:
        """True if it comes from the package emerging_optimizers."""
        return self.kind in ("muon", "lion")

    megatron_flags = (
        "lr min-lr weight-decay clip-grad adam-beta1 adam-beta2 adam-eps exp-avg-dtype "
        "exp-avg-sq-dtype lr-warmup-iters=warmup_iters lr-decay-iters=decay_iters "
        "lr-decay-style=decay_style lr-wsd-decay-iters=wsd_decay_iters "
        "lr-wsd-decay-style=wsd_decay_style optimizer=kind muon-momentum muon-num-ns-steps "
        "muon-scale-mode muon-extra-scale-factor muon-fp32-matmul-prec muon-tp-mode "
        "lion-beta1 lion-beta2"
    )
    own_rules = (
        refuse(
            "optimizer.min_lr",
            lambda c: c.optimizer.min_lr > c.optimizer.lr,
            "must be at most optimizer.lr ({optimizer.lr})",
            "use 0.0, or a tenth of optimizer.lr",
        ),
        refuse(
            "optimizer.warmup_iters",
            lambda c: c.optimizer.decay_iters and c.warmup_iters >= c.optimizer.decay_iters,
            "must be less than optimizer.decay_iters ({optimizer.decay_iters})",
            lambda c: f"use {(c.optimizer.decay_iters or 0) // 10}, or raise optimizer.decay_iters",
        ),
        group(
            "optimizer.decay_style WSD",
            _wsd_decay_comes_after_warmup,
        ),
        # The rate of a step is lr times sqrt(warmup / step); without warmup it begins at lr (1).
        refuse(
            "optimizer.warmup_iters",
            "optimizer.decay_style inverse-square-root and not optimizer.warmup_iters",
            "must be above 0 with optimizer.decay_style inverse-square-root, whose rate is lr "
            "times the square root of warmup_iters over the step",
            lambda c: f"use {max(c.training.train_iters // 100, 1)}",
        ),
        # megatron-core asserts the first two (optimizer_config.py, `__post_init__`).
        _moments_need(
            "not optimizer.kind adam",
            "optimizer.kind ({optimizer.kind}) adam",
            "optimizer.kind to adam",
        ),
        _moments_need(
            "not parallel.use_distributed_optimizer",
            "parallel.use_distributed_optimizer (false) true",
            "that to true",
        ),
        _moments_need(
            "not precision.dtype bf16",
            "precision.dtype ({precision.dtype}) bf16: of fp32 weights FusedAdam would keep a "
            "second copy",
            "that to bf16",
        ),
        _moments_need(
            "precision.fp8_param and precision.recipe delayed",
            "precision.fp8_param (true) false with precision.fp8_recipe delayed, where FusedAdam "
            "would start from weights rounded to FP8",
            "precision.fp8_recipe to tensorwise or blockwise",
        ),
        refuse(
            "optimizer.store_param_remainders",
            "optimizer.store_param_remainders and precision.fp8",
            "must be false with precision.fp8 ({precision.fp8}), with which megatron-core may "
            "keep the fp32 weights itself",
            "set it to false, or precision.fp8 to null",
        ),
        _moment_falls("exp_avg", "adam_beta1"),
        _moment_falls("exp_avg_sq", "adam_beta2"),
        # Emerging optimizers share out, gather and write whole matrices. Only fp32 copies of bf16
        # weights can be shared out: in fp32 `LayerWiseDistributedOptimizer` holds torch's
        # optimizers as they are, which have none of megatron-core's methods. The overlapped gather
        # works on ranges of flat buffers, and FP8 weights are written by the optimizer of ranges.
        group(
            "optimizer.is_emerging",
            refuse(
                "parallel.use_distributed_optimizer",
                "parallel.use_distributed_optimizer and not precision.dtype bf16",
                "must be false with optimizer.kind {optimizer.kind} and precision.dtype fp32: "
                "megatron-core distributes whole matrices over data-parallel ranks only in bf16",
                "set parallel.use_distributed_optimizer to false, or precision.dtype to bf16",
            ),
            refuse(
                "parallel.overlap_param_gather",
                "parallel.overlap_param_gather",
                "must be false with optimizer.kind {optimizer.kind}, whose ranks exchange whole "
                "matrices",
                "set it to false, or optimizer.kind to adam",
            ),
            refuse(
                "precision.fp8_param",
                "precision.fp8_param",
                "must be false with optimizer.kind {optimizer.kind}, which does not turn its fp32 "
                "copies into FP8 weights",
                "set it to false, or optimizer.kind to adam",
            ),
        ),
    )
    no_effect = (
        # A short try of a long run's configuration.
        refuse(
            "optimizer.warmup_iters",
            lambda c: c.warmup_iters != c.optimizer.warmup_iters,
            "is not less than training.train_iters ({training.train_iters}), and is taken for "
            "{warmup_iters}, a tenth of the run",
            "lower it, or raise training.train_iters",
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
        no_effect_without(
            "optimizer.kind muon",
            "optimizer.muon_momentum optimizer.muon_nesterov optimizer.muon_num_ns_steps "
            "optimizer.muon_scale_mode optimizer.muon_extra_scale_factor "
            "optimizer.muon_fp32_matmul_prec optimizer.muon_tp_mode",
            "set optimizer.kind to muon",
        ),
        no_effect_without(
            "optimizer.kind lion",
            "optimizer.lion_beta1 optimizer.lion_beta2",
            "set optimizer.kind to lion",
        ),
    )
