"""Runs the cross-field rules and reports every broken rule on a line of its own.

A rule takes a Config and yields a Problem where it is broken. If a rule relies on another one, it
reports nothing while that one is broken, so that one mistake gives one line.
"""

from collections.abc import Iterator
from operator import attrgetter
from typing import Any

from moepp_megatron.config.errors import Problem, raise_problems, show
from moepp_megatron.config.rows import Rule, WorldSizeRule
from moepp_megatron.config.schema import Config, Section
from moepp_megatron.config.sections import declared
from moepp_megatron.config.world_size import without_effect

# What has the effect of a setting that has it only together with others.
_EFFECTS = {"moe.constants_shared": "moe.shares_constants"}


def _off(config: Config, name: str) -> Any:
    section, _, key = name.rpartition(".")
    model = type(attrgetter(section)(config))
    field = model.model_fields.get(key)
    return model.engine_defaults[key] if field is None else field.get_default()


def _is_on(config: Config, name: str) -> bool:
    return bool(attrgetter(_EFFECTS.get(name, name))(config) != _off(config, name))


def _named(config: Config, name: str) -> str:
    """The setting with its value, `model.mtp_num_layers (1)`; of a section the name."""
    value = attrgetter(name)(config)
    return name if isinstance(value, Section) else f"{name} ({show(value)})"


def _exclude(refused: str, other: str, reason: str) -> Rule:
    """A rule: `refused` must be at its default, which is off, where `other` is not at its own."""

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


RULES: tuple[Rule, ...] = (
    *declared("own_rules"),
    *(_exclude(*row) for row in declared("excludes")),
)
WORLD_SIZE_RULES: tuple[WorldSizeRule, ...] = declared("world_size_rules")
IGNORED: tuple[Rule, ...] = declared("no_effect")


def check_config(config: Config) -> list[str]:
    """Check all rules that do not depend on the number of ranks.

    Return a line per given setting that has no effect. ConfigError has a line per broken rule.
    """
    raise_problems(problem for rule in RULES for problem in rule(config))
    return [str(notice) for rule in IGNORED for notice in rule(config)]


def check_world_size(config: Config, world_size: int) -> list[str]:
    """Check the rules that depend on the number of ranks; `config` itself is valid.

    Return a line for each setting that has no effect on this many ranks. ConfigError has the
    problems of the first broken rule only.
    """
    # In order, and only up to the first broken one: later rules count on earlier ones.
    for rule in WORLD_SIZE_RULES:
        raise_problems(rule(config, world_size))
    return [str(notice) for notice in without_effect(config, world_size)]
