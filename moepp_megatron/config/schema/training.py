"""Section `training`: batches, length, recomputation and logging."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from moepp_megatron.config.errors import Problem
from moepp_megatron.config.rows import (
    batch_sizes,
    each,
    first,
    group,
    must_divide,
    no_effect_with,
    no_effect_without,
    refuse,
    table,
    values,
)
from moepp_megatron.config.schema.section import Section, Unit

if TYPE_CHECKING:
    from moepp_megatron.config.schema import Config


# megatron-core knows one more (gdn_norm_out), for attention we do not build. `mla_up_proj` has a
# rule of its own, in `schema.latent_attention`.
_RECOMPUTE_MODULES = {
    "core_attn",
    "layernorm",
    "mla_up_proj",
    "mlp",
    "moe",
    "moe_act",
    "shared_experts",
}


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


def _recomputes_no_layers_of_a_rank(config: Config) -> bool:
    layers = config.training.recompute_num_layers
    return layers is None or layers > max(config.layers_per_rank, 1)


_CAPTURABLE = ("attn", "moe_router", "moe")
# megatron-core's other parts, with the reason against each.
_REASONS = {
    "mlp": "a dense FFN is not captured by the MoE++ layer",
    "moe_preprocess": "the all-to-all's sizes are read on the host, which no graph can do",
    "mamba": "there is no such layer here",
}
_REMEDY = "change that, or set training.cuda_graphs to []"


def _unknown(config: Config) -> list[str]:
    return [part for part in config.training.cuda_graphs if part not in _CAPTURABLE]


def _only_capturable(config: Config) -> str:
    part = _unknown(config)[0]
    reason = _REASONS.get(part, "there is no such part")
    return f"must hold only {', '.join(_CAPTURABLE)}, because of {part}: {reason}"


def _recomputes_absent_shared_experts(config: Config) -> bool:
    has_none = config.moe.shared_expert_ffn_hidden_size is None
    return has_none and "shared_experts" in config.training.recomputed


class EngineTrainingSection(Section):
    """Settings of batches, length, recomputation and logging."""

    train_iters: Annotated[int, Unit("steps", ge=1)]
    """Optimizer steps"""
    global_batch_size: Annotated[int, Unit("sequences", ge=1)]
    """Sequences per step, all ranks"""
    micro_batch_size: Annotated[int, Unit("sequences", ge=1)]
    """Sequences per forward pass and data-parallel rank"""
    batch_ramp: Annotated[list[list[int]] | None, Unit("tokens, sequences")] = None
    """Smaller steps at first: pairs of tokens trained on and sequences per step from then on, the
    last with global_batch_size; null: all steps are alike"""
    seed: Annotated[int, Unit("-", ge=0, lt=2**31)] = 1234
    """Seed of initialisation, data order and noise"""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Activations to recompute in the backward pass; null: none"""
    recompute_method: Literal["uniform", "block"] | None = None
    """With full: equal groups of layers, or the first layers of each stage"""
    recompute_num_layers: Annotated[int | None, Unit("layers", ge=1)] = None
    """With full: layers per group (uniform) or per stage (block)"""
    recompute_modules: list[str] = ["moe"]
    """With selective: the modules to recompute"""
    cuda_graphs: list[str] = []
    """Parts of each layer that run as CUDA graphs: attn, moe_router, moe (router and experts)"""
    log_interval: Annotated[int, Unit("steps", ge=1)] = 1
    """Steps between log lines"""
    deterministic: bool = False
    """Only deterministic kernels, at some cost in speed"""

    @property
    def recomputed(self) -> set[str]:
        """The modules that are recomputed one by one; none without selective."""
        return set(self.recompute_modules) if self.recompute_granularity == "selective" else set()

    @property
    def captures_router(self) -> bool:
        """True if routers run as CUDA graphs."""
        return not {"moe_router", "moe"}.isdisjoint(self.cuda_graphs)

    @property
    def batch_sizes(self) -> list[int]:
        """Sequences per step, of each stage of the ramp."""
        if self.batch_ramp is None:
            return [self.global_batch_size]
        # A pair of another length is refused by a rule.
        return [pair[1] for pair in self.batch_ramp if len(pair) == 2]

    engine_defaults = {"eval_iters": 0}
    megatron_flags: ClassVar[str] = (
        "train-iters global-batch-size micro-batch-size seed recompute-granularity "
        "recompute-method recompute-num-layers recompute-modules log-interval "
        "deterministic-mode=deterministic:true "
        "recompute-activations=recompute_granularity:selective"
    )
    own_rules = table(
        _batch_ramp_rises_to_the_batch,
        _micro_batches_divide_global_batch,
        group(
            "training.recompute_granularity full",
            refuse(
                "training.recompute_method",
                "not training.recompute_method",
                "must be set with training.recompute_granularity full",
                "use uniform or block",
            ),
            refuse(
                "training.recompute_num_layers",
                _recomputes_no_layers_of_a_rank,
                "must be from 1 to the layers of a pipeline rank ({layers_per_rank}) with "
                "training.recompute_granularity full",
                "use 1",
            ),
        ),
        group(
            "training.recompute_granularity selective",
            each(
                values("training.recompute_method training.recompute_num_layers"),
                lambda value: value is not None,
                "must be null with training.recompute_granularity selective",
                "set {name} to null, or training.recompute_granularity to full",
            ),
            each(
                values("training.recompute_modules"),
                lambda modules: not modules or set(modules) - _RECOMPUTE_MODULES,
                f"must name at least one of {', '.join(sorted(_RECOMPUTE_MODULES))} and nothing "
                "else",
                "use [moe]",
            ),
        ),
        first(
            refuse("training.cuda_graphs", _unknown, _only_capturable, "use [attn, moe_router]"),
            group(
                "training.cuda_graphs",
                refuse(
                    "training.cuda_graphs",
                    "moe.is_vanilla",
                    "must have zero-computation experts or moe.gating_residual: for vanilla layers "
                    "megatron-core's attn captures the experts as well, whose sizes are not fixed",
                    _REMEDY,
                ),
                refuse(
                    "training.cuda_graphs",
                    lambda c: "moe" in c.training.cuda_graphs and c.moe.static_rows is None,
                    "must not hold moe without moe.static_rows: an expert gets another number of "
                    "tokens in every step, and a graph's sizes are fixed",
                    "set moe.static_rows, or use [attn, moe_router]",
                ),
                refuse(
                    "training.cuda_graphs",
                    "training.captures_router and not moe.z_loss_coeff null",
                    "must have moe.z_loss_coeff ({moe.z_loss_coeff}) null with moe_router: the "
                    "loss is recorded by the host, which a graph does not repeat",
                    _REMEDY,
                ),
                refuse(
                    "training.cuda_graphs",
                    "training.captures_router and not moe.input_jitter_eps null",
                    "must have moe.input_jitter_eps ({moe.input_jitter_eps}) null with moe_router: "
                    "noise inside a graph has not been tested",
                    _REMEDY,
                ),
            ),
        ),
    )
    excludes = table(
        (
            "training.cuda_graphs",
            "training.recompute_granularity",
            "a graph keeps its activations, and runs forward once for every backward",
        ),
        (
            "training.cuda_graphs",
            "parallel.overlap_moe_expert_parallel_comm",
            "that schedule calls the parts of a layer itself",
        ),
        (
            "training.cuda_graphs",
            "precision.fp8",
            "megatron-core keeps a layer's FP8 state with each graph and updates it twice",
        ),
    )
    no_effect = table(
        no_effect_without(
            "training.recompute_granularity",
            "training.recompute_method training.recompute_num_layers training.recompute_modules",
            "set training.recompute_granularity",
        ),
        no_effect_with(
            "training.recompute_granularity", "full", "training.recompute_modules", "use selective"
        ),
        refuse(
            "training.recompute_modules",
            _recomputes_absent_shared_experts,
            "has no effect for shared_experts without moe.shared_expert_ffn_hidden_size",
            "drop shared_experts from the list",
        ),
    )
