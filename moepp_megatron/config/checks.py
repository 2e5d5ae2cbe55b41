"""Runs the cross-field rules and reports every broken rule on a line of its own."""

from __future__ import annotations

from moepp_megatron.config.problem import raise_problems
from moepp_megatron.config.rules import IGNORED, RULES, WORLD_SIZE_IGNORED, WORLD_SIZE_RULES
from moepp_megatron.config.schema import Config


def check_config(config: Config) -> list[str]:
    """Check all rules that do not depend on the number of ranks.

    Returns:
        A line for each setting that the user gave and that has no effect.

    Raises:
        ConfigError: If a rule is broken; one line per rule.
    """
    raise_problems(problem for rule in RULES for problem in rule(config))
    return [str(notice) for rule in IGNORED for notice in rule(config)]


def check_world_size(config: Config, world_size: int) -> list[str]:
    """Check the rules that depend on the number of ranks; `config` itself is valid.

    Returns:
        A line for each setting that has no effect on this many ranks.

    Raises:
        ConfigError: If a rule is broken; one line per rule.
    """
    # In order, and only up to the first broken one: later rules count on earlier ones.
    for rule in WORLD_SIZE_RULES:
        raise_problems(rule(config, world_size))
    return [str(notice) for rule in WORLD_SIZE_IGNORED for notice in rule(config, world_size)]
