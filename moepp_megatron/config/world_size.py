"""Rules that need the number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING

from moepp_megatron.config.errors import Problem
from moepp_megatron.config.rows import WorldSizeRule, batch_sizes, must_divide, nearest_multiples
from moepp_megatron.config.stages import stage_layers, virtual_stages

if TYPE_CHECKING:
    from moepp_megatron.config.schema import Config


def _world_size_is_positive(config: Config, world_size: int) -> Iterator[Problem]:
    """There is at least one rank."""
    if world_size < 1:
        yield Problem("world size", world_size, "must be at least 1", "start 1 rank or more")


def _model_ranks_divide_world_size(config: Config, world_size: int) -> Iterator[Problem]:
    """The ranks form whole copies of the model."""
    return _product_divides(_model_sizes(config), world_size)


def _expert_ranks_divide_world_size(config: Config, world_size: int) -> Iterator[Problem]:
    """The ranks form whole copies of the experts."""
    parallel = config.parallel
    sizes = {
        "expert_tensor_parallel_size": parallel.expert_tensor_size,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
    }
    return _product_divides(sizes, world_size)


def _product_divides(sizes: dict[str, int], world_size: int) -> Iterator[Problem]:
    """The product of these degrees of parallelism divides the world size."""
    product = prod(sizes.values())
    factors = " * ".join(f"parallel.{key} ({size})" for key, size in sizes.items())
    ranks = nearest_multiples(world_size, product)
    if world_size % product:
        rule = f"must be divisible by {factors} = {product}"
        remedy = f"start {ranks} ranks (on one machine --nproc {ranks}), or lower one of these"
        yield Problem("world size", world_size, rule, remedy)


def _model_sizes(config: Config) -> dict[str, int]:
    """The degrees of parallelism whose product are the ranks of one copy of the model."""
    names = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    return {name: getattr(config.parallel, name) for name in names}


def _data_parallel_size(config: Config, world_size: int) -> int:
    """Copies of the model that share out a batch."""
    return world_size // prod(_model_sizes(config).values())


def _batch_divides_over_ranks(config: Config, world_size: int) -> Iterator[Problem]:
    """Every data-parallel rank gets the same whole number of micro-batches."""
    micro, dp = config.training.micro_batch_size, _data_parallel_size(config, world_size)
    text = f"training.micro_batch_size ({micro}) * data-parallel ranks ({dp}) = {micro * dp}"
    for name, size in batch_sizes(config):
        yield from must_divide(name, size, micro * dp, text)


def _interleaving_fills_stages(config: Config, world_size: int) -> Iterator[Problem]:
    """The interleaved schedule takes micro-batches in groups of one per pipeline rank."""
    stages = config.parallel.pipeline_model_parallel_size
    per_round = config.training.micro_batch_size * _data_parallel_size(config, world_size)
    text = (
        f"training.micro_batch_size * data-parallel ranks ({per_round}) * "
        f"parallel.pipeline_model_parallel_size ({stages}) = {per_round * stages}"
    )
    for name, size in batch_sizes(config) if virtual_stages(config) != 1 else ():
        reason = " for the interleaved schedule"
        yield from must_divide(name, size, per_round * stages, text, reason)


def without_effect(config: Config, world_size: int) -> Iterator[Problem]:
    """Settings that have no effect on so many ranks: overlap, where no two share a parameter."""
    dense_ranks = _data_parallel_size(config, world_size) * config.parallel.context_parallel_size
    for key in ("overlap_grad_reduce", "overlap_param_gather"):
        if dense_ranks == 1 and getattr(config.parallel, key):
            rule = "has no effect with one data-parallel rank"
            yield Problem(f"parallel.{key}", True, rule, "leave it out, or start more ranks")


def _offloading_chunks_have_layers(config: Config, world_size: int) -> Iterator[Problem]:
    """megatron-core confuses the micro-batches of a chunk with one layer that has the modules."""
    name, modules = "megatron.fine_grained_activation_offloading", config.megatron.offload_modules
    if not config.megatron.fine_grained_activation_offloading:
        return
    # Transformer Engine fuses the norm of a dense FFN.
    of_experts = {"mlp_norm", "expert_fc1", "moe_act"} & set(modules)
    has_them = config.router_pattern if of_experts else [True] * config.model.num_layers
    chunks = [chunk for stage in stage_layers(config) for chunk in stage]
    fewest = min(sum(has_them[layer] for layer in chunk) for chunk in chunks)
    if fewest < 2:
        rule = f"must have two layers or more with {', '.join(modules)} in every pipeline chunk"
        yield Problem(
            name, True, f"{rule}, not {fewest}", "use false, other modules or fewer chunks"
        )


WORLD_SIZE_RULES: tuple[WorldSizeRule, ...] = (
    _world_size_is_positive,
    _model_ranks_divide_world_size,
    _expert_ranks_divide_world_size,
    _batch_divides_over_ranks,
    _interleaving_fills_stages,
    _offloading_chunks_have_layers,
)
