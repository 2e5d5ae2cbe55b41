"""Section `training`: batches, length, recomputation and logging."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moepp_megatron.config.schema.section import Section, unit


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
    batch_ramp: list[list[int]] | None = Field(
        default=None,
        description="Smaller steps at first: pairs of tokens trained on and sequences per step "
        "from then on, the last with global_batch_size; null: all steps are alike",
        json_schema_extra=unit("tokens, sequences"),
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

    @property
    def batch_sizes(self) -> list[int]:
        """Sequences per step, of each stage of the ramp."""
        if self.batch_ramp is None:
            return [self.global_batch_size]
        # A pair of another length is refused by a rule.
        return [pair[1] for pair in self.batch_ramp if len(pair) == 2]
