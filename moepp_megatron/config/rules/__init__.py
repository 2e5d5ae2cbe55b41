"""The named cross-field rules, by subject.

A rule is a generator function: it takes a Config and yields a Problem where it is broken. Its
name says what must hold, its docstring why. If a rule relies on another one, the other one comes
first, and the rule reports nothing while that one is broken, so that one mistake gives one line.
"""

from collections.abc import Callable, Iterator

from moepp_megatron.config.problem import Problem
from moepp_megatron.config.rules import (
    budget,
    cuda_graphs,
    expert_overlap,
    flex,
    ignored,
    latent_attention,
    model,
    moe,
    observe,
    parallel,
    precision,
    resilience,
    routing_guard,
    slurm,
    training,
    world_size,
)
from moepp_megatron.config.schema import Config

RULES: tuple[Callable[[Config], Iterator[Problem]], ...] = (
    *model.RULES,
    *latent_attention.RULES,
    *moe.RULES,
    *budget.RULES,
    *parallel.RULES,
    *flex.RULES,
    *expert_overlap.RULES,
    *precision.RULES,
    *training.RULES,
    *cuda_graphs.RULES,
    *resilience.RULES,
    *slurm.RULES,
    *observe.RULES,
    *routing_guard.RULES,
)
IGNORED: tuple[Callable[[Config], Iterator[Problem]], ...] = ignored.RULES
WORLD_SIZE_RULES: tuple[Callable[[Config, int], Iterator[Problem]], ...] = world_size.RULES
WORLD_SIZE_IGNORED: tuple[Callable[[Config, int], Iterator[Problem]], ...] = world_size.IGNORED

__all__ = ["IGNORED", "RULES", "WORLD_SIZE_IGNORED", "WORLD_SIZE_RULES"]
