"""The named cross-field rules, by subject.

budget.py            rules of `moe.budget`
cuda_graphs.py       rules of `training.cuda_graphs`
data.py              rules of the section `data`: blends, stages, validation sets
distillation.py      rules of the section `distillation`
divisibility.py      divisibility, the most common rule, with a remedy that can be typed in
documents.py         rules of attention that stays within documents
evaluation.py        rules of the section `evaluation`
expert_overlap.py    rules of `parallel.overlap_moe_expert_parallel_comm`
flex.py              the sizes that deep_ep, the package of the flex dispatcher, requires
ignored.py           settings that the user gave and that have no effect: warnings, not errors
latent_attention.py  rules of `model.latent_attention`: settings that it replaces or excludes
model.py             rules of the model's shape
moe.py               rules of experts and routing
multi_token.py       rules of `model.mtp_num_layers`: what multi-token prediction excludes
observe.py           rules of the section `observe`
optimizer.py         rules of the optimizer's kind
parallel.py          rules of the layout that hold for any number of ranks
precision.py         rules of number formats
resilience.py        rules of the section `resilience`
routing_guard.py     rules of the section `routing_guard`
slurm.py             rules of the section `slurm`
training.py          rules of optimizer, batches, recomputation, data and checkpoints
world_size.py        rules that need the number of ranks

A rule is a generator function: it takes a Config and yields a Problem where it is broken. Its
name says what must hold, its docstring why. If a rule relies on another one, the other one comes
first, and the rule reports nothing while that one is broken, so that one mistake gives one line.
"""

from collections.abc import Callable, Iterator

from moepp_megatron.config.problem import Problem
from moepp_megatron.config.rules import (
    budget,
    cuda_graphs,
    data,
    distillation,
    documents,
    evaluation,
    expert_overlap,
    flex,
    ignored,
    latent_attention,
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

RULES: tuple[Callable[[Config], Iterator[Problem]], ...] = (
    *model.RULES,
    *latent_attention.RULES,
    *moe.RULES,
    *multi_token.RULES,
    *budget.RULES,
    *parallel.RULES,
    *flex.RULES,
    *expert_overlap.RULES,
    *precision.RULES,
    *training.RULES,
    *optimizer.RULES,
    *data.RULES,
    *distillation.RULES,
    *cuda_graphs.RULES,
    *documents.RULES,
    *resilience.RULES,
    *slurm.RULES,
    *observe.RULES,
    *evaluation.RULES,
    *routing_guard.RULES,
)
IGNORED: tuple[Callable[[Config], Iterator[Problem]], ...] = ignored.RULES
WORLD_SIZE_RULES: tuple[Callable[[Config, int], Iterator[Problem]], ...] = world_size.RULES
WORLD_SIZE_IGNORED: tuple[Callable[[Config, int], Iterator[Problem]], ...] = world_size.IGNORED

__all__ = ["IGNORED", "RULES", "WORLD_SIZE_IGNORED", "WORLD_SIZE_RULES"]
