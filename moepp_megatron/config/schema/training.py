"""Section `training`: batches, length, recomputation and logging."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from moepp_megatron.config.schema.section import Section, Unit


class EngineTrainingSection(Section):
    """Settings of batches, length, recomputation and logging."""

    train_iters: Annotated[int, Unit("steps"), Field(ge=1)]
    """Optimizer steps"""
    global_batch_size: Annotated[int, Unit("sequences"), Field(ge=1)]
    """Sequences per step, all ranks"""
    micro_batch_size: Annotated[int, Unit("sequences"), Field(ge=1)]
    """Sequences per forward pass and data-parallel rank"""
    batch_ramp: Annotated[list[list[int]] | None, Unit("tokens, sequences")] = None
    """Smaller steps at first: pairs of tokens trained on and sequences per step from then on, the
    last with global_batch_size; null: all steps are alike"""
    seed: Annotated[int, Unit("-"), Field(ge=0, lt=2**31)] = 1234
    """Seed of initialisation, data order and noise"""
    recompute_granularity: Annotated[Literal["full", "selective"] | None, Unit("-")] = None
    """Activations to recompute in the backward pass; null: none"""
    recompute_method: Annotated[Literal["uniform", "block"] | None, Unit("-")] = None
    """With full: equal groups of layers, or the first layers of each stage"""
    recompute_num_layers: Annotated[int | None, Unit("layers"), Field(ge=1)] = None
    """With full: layers per group (uniform) or per stage (block)"""
    recompute_modules: Annotated[list[str], Unit("-")] = ["moe"]
    """With selective: the modules to recompute"""
    cuda_graphs: Annotated[list[str], Unit("-")] = []
    """Parts of each layer that run as CUDA graphs: attn, moe_router"""
    log_interval: Annotated[int, Unit("steps"), Field(ge=1)] = 1
    """Steps between log lines"""
    eval_interval: Annotated[int, Unit("steps"), Field(ge=0)] = 0
    """Steps between validations; 0 validates only at the end"""
    eval_iters: Annotated[int, Unit("steps"), Field(ge=0)] = 4
    """Global batches per validation; 0 never validates"""
    deterministic: Annotated[bool, Unit("-")] = False
    """Only deterministic kernels, at some cost in speed"""

    @property
    def batch_sizes(self) -> list[int]:
        """Sequences per step, of each stage of the ramp."""
        if self.batch_ramp is None:
            return [self.global_batch_size]
        # A pair of another length is refused by a rule.
        return [pair[1] for pair in self.batch_ramp if len(pair) == 2]
