"""Features that exclude each other: the work that would join the two has not been done or tested.

Each row has a setting that is refused, the one with which it is, and why; a setting at its default
is off. Features bring rows of their own (`Section.excludes`). What a feature needs of values of
other settings is a row in the file of that feature.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from typing import Any

from moepp_megatron.config.problem import Problem, show
from moepp_megatron.config.rows import Rule
from moepp_megatron.config.schema import Config, Section
from moepp_megatron.config.sections import declared

# Refused, with what, and why.
PAIRS: tuple[tuple[str, str, str], ...] = (
    (
        "moe.constants_shared",
        "parallel.overlap_moe_expert_parallel_comm",
        "each layer's backward pass runs by itself, which is not tested with it",
    ),
    (
        "moe.constants_shared",
        "model.mtp_num_layers",
        "constants that are shared with these layers have not been tested",
    ),
    (
        "parallel.overlap_moe_expert_parallel_comm",
        "model.mtp_num_layers",
        "its schedule has no nodes for these layers that carry router logits",
    ),
    (
        "training.cuda_graphs",
        "model.mtp_num_layers",
        "graphs of these layers have not been tested",
    ),
    (
        "precision.fp8_param",
        "model.mtp_num_layers",
        "these layers have not been tested with weights in FP8",
    ),
    (
        "precision.fp8_param",
        "model.latent_attention",
        "its projections have not been tested with weights in FP8",
    ),
    (
        "data.reset_attention_mask",
        "training.cuda_graphs",
        "a graph's inputs are of fixed sizes, without documents or padding",
    ),
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
    *declared("excludes"),
)

# What has the effect of a setting that has it only together with others.
_EFFECTS = {"moe.constants_shared": "moe.shares_constants"}


def _off(config: Config, name: str) -> Any:
    section, _, key = name.rpartition(".")
    return type(attrgetter(section)(config)).model_fields[key].get_default()


def _is_on(config: Config, name: str) -> bool:
    return bool(attrgetter(_EFFECTS.get(name, name))(config) != _off(config, name))


def _named(config: Config, name: str) -> str:
    """The setting with its value, `model.mtp_num_layers (1)`; of a section the name."""
    value = attrgetter(name)(config)
    return name if isinstance(value, Section) else f"{name} ({show(value)})"


def _exclude(refused: str, other: str, reason: str) -> Rule:
    def rule(config: Config) -> Iterator[Problem]:
        if _is_on(config, refused) and _is_on(config, other):
            off = show(_off(config, refused))
            must = f"must be {off} with {_named(config, other)}: {reason}"
            remedy = f"use {off}, or set {other} to {show(_off(config, other))}"
            section: Section = attrgetter(refused.rpartition(".")[0])(config)
            if section.instead:
                remedy += f", or {section.instead}"
            yield Problem(refused, attrgetter(refused)(config), must, remedy)

    return rule


RULES: tuple[Rule, ...] = tuple(_exclude(*pair) for pair in PAIRS)
