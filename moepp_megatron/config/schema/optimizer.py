"""Section `optimizer`: the optimizer, its schedule, and what differs between parameters."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from moepp_megatron.config.plugins import Plugin
from moepp_megatron.config.schema.section import Section, unit


class ParameterGroup(Section):
    """What parameters of one kind are trained with."""

    lr_mult: float = Field(
        default=1.0,
        gt=0.0,
        description="Factor of the learning rate, of lr and of min_lr",
        json_schema_extra=unit("1"),
    )
    weight_decay: float | None = Field(
        default=None,
        ge=0.0,
        description="Weight decay; null is optimizer.weight_decay for matrices and 0 for vectors",
        json_schema_extra=unit("1"),
    )


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

    lr: float = Field(gt=0.0, description="Peak learning rate", json_schema_extra=unit("1"))
    min_lr: float = Field(
        default=0.0, ge=0.0, description="Final learning rate", json_schema_extra=unit("1")
    )
    weight_decay: float = Field(
        default=0.1, ge=0.0, description="Decoupled weight decay", json_schema_extra=unit("1")
    )
    clip_grad: float = Field(
        default=1.0,
        ge=0.0,
        description="Largest global gradient norm; 0 does not clip",
        json_schema_extra=unit("1"),
    )
    adam_beta1: float = Field(
        default=0.9, ge=0.0, lt=1.0, description="Adam beta 1", json_schema_extra=unit("1")
    )
    adam_beta2: float = Field(
        default=0.95, ge=0.0, lt=1.0, description="Adam beta 2", json_schema_extra=unit("1")
    )
    adam_eps: float = Field(
        default=1e-8, gt=0.0, description="Adam epsilon", json_schema_extra=unit("1")
    )
    exp_avg_dtype: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="Type of Adam's first moment between steps; bf16 takes half of its memory and "
        "needs Transformer Engine",
        json_schema_extra=unit("-"),
    )
    exp_avg_sq_dtype: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="The same of Adam's second moment",
        json_schema_extra=unit("-"),
    )
    warmup_iters: int = Field(
        default=0,
        ge=0,
        description="Steps in which the rate rises from 0 to lr",
        json_schema_extra=unit("steps"),
    )
    decay_style: (
        Literal["cosine", "linear", "constant", "inverse-square-root", "WSD"]
        | Annotated[str, Plugin("schedules")]
    ) = Field(
        default="cosine",
        description="How the rate falls from lr to min_lr; WSD keeps it at lr until its last steps",
        json_schema_extra=unit("-"),
    )
    wsd_decay_iters: int | None = Field(
        default=None,
        ge=1,
        description="With WSD: the steps before decay_iters in which the rate falls",
        json_schema_extra=unit("steps"),
    )
    wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = Field(
        default="exponential",
        description="With WSD: how it falls in these steps",
        json_schema_extra=unit("-"),
    )
    decay_iters: int | None = Field(
        default=None,
        ge=1,
        description="Step at which min_lr is reached; null means training.train_iters",
        json_schema_extra=unit("steps"),
    )
    kind: Literal["adam", "muon", "lion"] | Annotated[str, Plugin("optimizers")] = Field(
        default="adam",
        description="The optimizer; adam is AdamW; the others train the matrices, and AdamW the "
        "router, constants, embeddings, output layer, norms and biases",
        json_schema_extra=unit("-"),
    )
    muon_momentum: float = Field(
        default=0.95,
        ge=0.0,
        lt=1.0,
        description="Share of the average gradient that a step keeps",
        json_schema_extra=unit("1"),
    )
    muon_nesterov: bool = Field(
        default=False,
        description="Look ahead by the step's own gradient",
        json_schema_extra=unit("-"),
    )
    muon_num_ns_steps: int = Field(
        default=5, ge=1, description="Newton-Schulz iterations", json_schema_extra=unit("1")
    )
    muon_scale_mode: Literal["spectral", "unit_rms_norm", "shape_scaling"] = Field(
        default="spectral",
        description="How an update is scaled by the shape of its matrix (emerging_optimizers)",
        json_schema_extra=unit("-"),
    )
    muon_extra_scale_factor: float = Field(
        default=1.0,
        gt=0.0,
        description="Factor of every update; 0.2 gives those of spectral the size of AdamW's",
        json_schema_extra=unit("1"),
    )
    muon_fp32_matmul_prec: Literal["highest", "high", "medium"] = Field(
        default="medium",
        description="Precision of the iterations' products; medium is bf16",
        json_schema_extra=unit("-"),
    )
    muon_tp_mode: Literal["duplicated", "distributed"] = Field(
        default="duplicated",
        description="With tensor parallelism: gather each matrix, or share out its products; "
        "both orthogonalize it whole",
        json_schema_extra=unit("-"),
    )
    lion_beta1: float = Field(
        default=0.95, ge=0.0, lt=1.0, description="Lion beta 1", json_schema_extra=unit("1")
    )
    lion_beta2: float = Field(
        default=0.98, ge=0.0, lt=1.0, description="Lion beta 2", json_schema_extra=unit("1")
    )
    groups: ParameterGroups = Field(
        default_factory=ParameterGroups,
        description="Learning rate and weight decay of some kinds of parameters",
    )

    @property
    def bf16_moments(self) -> tuple[str, ...]:
        """The settings of moments that are kept in bf16."""
        names = ("exp_avg_dtype", "exp_avg_sq_dtype")
        return tuple(name for name in names if getattr(self, name) == "bf16")

    @property
    def is_emerging(self) -> bool:
        """Whether it comes from the package emerging_optimizers."""
        return self.kind in ("muon", "lion")
