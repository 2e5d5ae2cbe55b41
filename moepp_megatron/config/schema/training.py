"""Sections `optimizer` and `training`: how the model is trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from moepp_megatron.config.plugins import Plugin
from moepp_megatron.config.schema.section import Section, unit

Schedule = Annotated[str, Plugin("schedules")]
Optimizer = Annotated[str, Plugin("optimizers")]


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
    warmup_iters: int = Field(
        default=0,
        ge=0,
        description="Steps in which the rate rises from 0 to lr",
        json_schema_extra=unit("steps"),
    )
    decay_style: Literal["cosine", "linear", "constant"] | Schedule = Field(
        default="cosine",
        description="How the rate falls from lr to min_lr",
        json_schema_extra=unit("-"),
    )
    decay_iters: int | None = Field(
        default=None,
        ge=1,
        description="Step at which min_lr is reached; null means training.train_iters",
        json_schema_extra=unit("steps"),
    )
    kind: Literal["adam"] | Optimizer = Field(
        default="adam", description="The optimizer; adam is AdamW", json_schema_extra=unit("-")
    )


class TrainingSection(Section):
    """Settings of batches, length, recomputation and logging."""

    train_iters: int = Field(ge=1, description="Optimizer steps", json_schema_extra=unit("steps"))
    global_batch_size: int = Field(
        ge=1, description="Sequences per step, all ranks", json_schema_extra=unit("sequences")
    )
    micro_batch_size: int = Field(
        ge=1,
        description="Sequences per forward pass and data-parallel rank",
        json_schema_extra=unit("sequences"),
    )
    seed: int = Field(
        default=1234,
        ge=0,
        lt=2**31,
        description="Seed of initialisation, data order and noise",
        json_schema_extra=unit("-"),
    )
    recompute_granularity: Literal["full", "selective"] | None = Field(
        default=None,
        description="Activations to recompute in the backward pass; null: none",
        json_schema_extra=unit("-"),
    )
    recompute_method: Literal["uniform", "block"] | None = Field(
        default=None,
        description="With full: equal groups of layers, or the first layers of each stage",
        json_schema_extra=unit("-"),
    )
    recompute_num_layers: int | None = Field(
        default=None,
        ge=1,
        description="With full: layers per group (uniform) or per stage (block)",
        json_schema_extra=unit("layers"),
    )
    recompute_modules: list[str] = Field(
        default=["moe"],
        description="With selective: the modules to recompute",
        json_schema_extra=unit("-"),
    )
    cuda_graphs: list[str] = Field(
        default=[],
        description="Parts of each layer that run as CUDA graphs: attn, moe_router",
        json_schema_extra=unit("-"),
    )
    log_interval: int = Field(
        default=1, ge=1, description="Steps between log lines", json_schema_extra=unit("steps")
    )
    eval_interval: int = Field(
        default=0,
        ge=0,
        description="Steps between validations; 0 validates only at the end",
        json_schema_extra=unit("steps"),
    )
    eval_iters: int = Field(
        default=4,
        ge=0,
        description="Global batches per validation; 0 never validates",
        json_schema_extra=unit("steps"),
    )
    deterministic: bool = Field(
        default=False,
        description="Only deterministic kernels, at some cost in speed",
        json_schema_extra=unit("-"),
    )
    profile_steps: list[int] = Field(
        default=[],
        description="Steps to record with torch's profiler, to RUN/profile; empty is off",
        json_schema_extra=unit("-"),
    )
    profile_ranks: list[int] | None = Field(
        default=None,
        description="Ranks that record them; null is all, without which waiting for late ranks "
        "cannot be distinguished from transfer",
        json_schema_extra=unit("-"),
    )
