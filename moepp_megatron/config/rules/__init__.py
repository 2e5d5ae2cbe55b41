"""The cross-field rules, by subject; features bring their own (`Section.own_rules`).

budget.py            `moe.budget`
cuda_graphs.py       `training.cuda_graphs`
data.py              the section `data`: blends, stages, validation sets
divisibility.py      divisibility, the most common rule, with a remedy that can be typed in
exclusive.py         features that exclude each other: a table with two axes
expert_overlap.py    `parallel.overlap_moe_expert_parallel_comm`
flex.py              the sizes that deep_ep, the package of the flex dispatcher, requires
fp8_shapes.py        the shapes that FP8 requires
ignored.py           settings that the user gave and that have no effect: warnings, not errors
latent_attention.py  `model.latent_attention`: settings that it replaces or excludes
megatron.py          the section `megatron`
model.py             the model's shape
moe.py               experts and routing
multi_token.py       `model.mtp_num_layers`
observe.py           the section `observe`
optimizer.py         the optimizer's kind and moments
parallel.py          the layout, for any number of ranks
precision.py         number formats
resilience.py        the section `resilience`
routing_guard.py     the section `routing_guard`
slurm.py             the section `slurm`
training.py          schedule, batches, recomputation, split, checkpoints
world_size.py        what depends on the number of ranks

A rule takes a Config and yields a Problem where it is broken. Most are rows; what has to loop or to
compute is a generator function. If a rule relies on another one, the other one comes first, and the
rule reports nothing while that one is broken, so that one mistake gives one line.
"""

from collections.abc import Callable, Iterator

from moepp_megatron.config.problem import Problem
from moepp_megatron.config.rows import Rule
from moepp_megatron.config.rules import (
    budget,
    cuda_graphs,
    data,
    exclusive,
    expert_overlap,
    flex,
    ignored,
    latent_attention,
    megatron,
    model,
    moe,
    multi_token,
    observe,
    optimizer,
    parallel,
    precision,
    resilience,
    routing_guard,
    slurm,
    training,
    world_size,
)
from moepp_megatron.config.schema import Config
from moepp_megatron.config.sections import declared

RULES: tuple[Rule, ...] = (
    *model.RULES,
    *latent_attention.RULES,
    *moe.RULES,
    *exclusive.RULES,
    *multi_token.RULES,
    *budget.RULES,
    *parallel.RULES,
    *flex.RULES,
    *expert_overlap.RULES,
    *precision.RULES,
    *training.RULES,
    *optimizer.RULES,
    *data.RULES,
    *cuda_graphs.RULES,
    *resilience.RULES,
    *slurm.RULES,
    *observe.RULES,
    *declared("own_rules"),
    *megatron.RULES,
    *routing_guard.RULES,
)
IGNORED: tuple[Rule, ...] = ignored.RULES
WORLD_SIZE_RULES: tuple[Callable[[Config, int], Iterator[Problem]], ...] = world_size.RULES
WORLD_SIZE_IGNORED: tuple[Callable[[Config, int], Iterator[Problem]], ...] = world_size.IGNORED

__all__ = ["IGNORED", "RULES", "WORLD_SIZE_IGNORED", "WORLD_SIZE_RULES"]
