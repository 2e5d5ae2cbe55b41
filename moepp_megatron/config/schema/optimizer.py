"""Section `optimizer`: the optimizer, its schedule, and what differs between parameters."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from moepp_megatron.config.plugins import Plugin
from moepp_megatron.config.schema.section import Section, Unit


class ParameterGroup(Section):
    """Optimizer settings of one kind of parameters."""

    lr_mult: Annotated[float, Unit("1"), Field(gt=0.0)] = 1.0
    """Factor of the learning rate, of lr and of min_lr"""
    weight_decay: Annotated[float | None, Unit("1"), Field(ge=0.0)] = None
    """Weight decay; null is optimizer.weight_decay for matrices and 0 for vectors"""


def _group(description: str) -> ParameterGroup:
    group: ParameterGroup = Field(default_factory=ParameterGroup, description=description)
    return group


class ParameterGroups(Section):
    """Kinds of parameters, of which each parameter has one at most."""

    router: ParameterGroup = _group("Routers, with gating residuals and the shared experts' gate")
    constants: ParameterGroup = _group("Vectors and mixing weights of constant experts")
    embeddings: ParameterGroup = _group("Embedding and output layer")
    norms_and_biases: ParameterGroup = _group("Norms, and biases of linear layers")


class OptimizerSection(Section):
    """The optimizer and its learning-rate schedule."""

    lr: Annotated[float, Unit("1"), Field(gt=0.0)]
    """Peak learning rate"""
    min_lr: Annotated[float, Unit("1"), Field(ge=0.0)] = 0.0
    """Final learning rate"""
    weight_decay: Annotated[float, Unit("1"), Field(ge=0.0)] = 0.1
    """Decoupled weight decay"""
    clip_grad: Annotated[float, Unit("1"), Field(ge=0.0)] = 1.0
    """Largest global gradient norm; 0 does not clip"""
    adam_beta1: Annotated[float, Unit("1"), Field(ge=0.0, lt=1.0)] = 0.9
    """Adam beta 1"""
    adam_beta2: Annotated[float, Unit("1"), Field(ge=0.0, lt=1.0)] = 0.95
    """Adam beta 2"""
    adam_eps: Annotated[float, Unit("1"), Field(gt=0.0)] = 1e-8
    """Adam epsilon"""
    exp_avg_dtype: Annotated[Literal["fp32", "bf16"], Unit("-")] = "fp32"
    """Type of Adam's first moment between steps; bf16 takes half of its memory and needs
    Transformer Engine"""
    exp_avg_sq_dtype: Annotated[Literal["fp32", "bf16"], Unit("-")] = "fp32"
    """The same of Adam's second moment"""
    store_param_remainders: Annotated[bool, Unit("-")] = False
    """Keep of each fp32 weight the 16 bits that its bf16 weight lacks, exactly, in place of all 32;
    needs Transformer Engine"""
    warmup_iters: Annotated[int, Unit("steps"), Field(ge=0)] = 0
    """Steps in which the rate rises from 0 to lr"""
    decay_style: Annotated[
        Literal["cosine", "linear", "constant", "inverse-square-root", "WSD"]
        | Annotated[str, Plugin("schedules")],
        Unit("-"),
    ] = "cosine"
    """Learning-rate decay from lr to min_lr; WSD keeps lr until its last steps"""
    wsd_decay_iters: Annotated[int | None, Unit("steps"), Field(ge=1)] = None
    """With WSD: the steps before decay_iters in which the rate falls"""
    wsd_decay_style: Annotated[
        Literal["exponential", "linear", "cosine", "minus_sqrt"], Unit("-")
    ] = "exponential"
    """With WSD: how it falls in these steps"""
    decay_iters: Annotated[int | None, Unit("steps"), Field(ge=1)] = None
    """Step at which min_lr is reached; null means training.train_iters"""
    kind: Annotated[
        Literal["adam", "muon", "lion"] | Annotated[str, Plugin("optimizers")], Unit("-")
    ] = "adam"
    """The optimizer; adam is AdamW; the others train the matrices, and AdamW the router, constants,
    embeddings, output layer, norms and biases"""
    muon_momentum: Annotated[float, Unit("1"), Field(ge=0.0, lt=1.0)] = 0.95
    """Share of the average gradient that a step keeps"""
    muon_nesterov: Annotated[bool, Unit("-")] = False
    """Look ahead by the step's own gradient"""
    muon_num_ns_steps: Annotated[int, Unit("1"), Field(ge=1)] = 5
    """Newton-Schulz iterations"""
    muon_scale_mode: Annotated[Literal["spectral", "unit_rms_norm", "shape_scaling"], Unit("-")] = (
        "spectral"
    )
    """Scaling of an update by the shape of its matrix (emerging_optimizers)"""
    muon_extra_scale_factor: Annotated[float, Unit("1"), Field(gt=0.0)] = 1.0
    """Factor of every update; 0.2 gives those of spectral the size of AdamW's"""
    muon_fp32_matmul_prec: Annotated[Literal["highest", "high", "medium"], Unit("-")] = "medium"
    """Precision of the iterations' products; medium is bf16"""
    muon_tp_mode: Annotated[Literal["duplicated", "distributed"], Unit("-")] = "duplicated"
    """With tensor parallelism: gather each matrix, or share out its products; both orthogonalize it
    whole"""
    lion_beta1: Annotated[float, Unit("1"), Field(ge=0.0, lt=1.0)] = 0.95
    """Lion beta 1"""
    lion_beta2: Annotated[float, Unit("1"), Field(ge=0.0, lt=1.0)] = 0.98
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
