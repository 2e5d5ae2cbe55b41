"""Rules of the section `routing_guard`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from difflib import get_close_matches

from moepp_megatron.config.guard_rules import DEFAULT_RULES, GUARD_METRICS, MEASURED, merged_rules
from moepp_megatron.config.problem import Problem
from moepp_megatron.config.rows import Rule, refuse
from moepp_megatron.config.schema import Config, GuardRule

# What switches off router health.
_HEALTH = ("observe.health_interval", "training.cuda_graphs")


def _own(config: Config) -> Iterator[tuple[str, GuardRule]]:
    """The rules that the user wrote, as they are merged, with their names in messages."""
    section = config.routing_guard
    merged = merged_rules(section)
    for index, rule in enumerate(section.rules):
        yield f"routing_guard.rules[{index}]", merged[rule.name]


def _names_differ(config: Config) -> Iterator[Problem]:
    """Alerts and checkpoints know a rule by its name."""
    names = [rule.name for rule in config.routing_guard.rules]
    for index, name in enumerate(names):
        if name in names[:index]:
            setting = f"routing_guard.rules[{index}].name"
            must = "must be another one than that of the rules before"
            yield Problem(setting, name, must, "rename it, or join the two")


def _metrics_exist(config: Config) -> Iterator[Problem]:
    """A metric that nothing measures would never hold."""
    for name, rule in _own(config):
        if rule.metric not in GUARD_METRICS:
            near = get_close_matches(rule.metric or "", GUARD_METRICS, n=1, cutoff=0.4)
            remedy = f"use {near[0]}" if near else f"use one of {', '.join(GUARD_METRICS)}"
            must = "must be one of the guard's metrics"
            if rule.metric is None:
                defaults = ", ".join(default.name for default in DEFAULT_RULES)
                must = f"must be given, because {rule.name} is no default rule ({defaults})"
            yield Problem(f"{name}.metric", rule.metric, must, remedy)


def _one_limit(config: Config) -> Iterator[Problem]:
    """A rule holds above a limit or below one."""
    for name, rule in _own(config):
        if rule.metric is not None and (rule.above is None) == (rule.below is None):
            given = "neither" if rule.above is None else "both"
            must = f"must be given, or else below, and here are {given}"
            yield Problem(f"{name}.above", rule.above, must, "write for example below: 0.2")


def _clear_on_the_healthy_side(config: Config) -> Iterator[Problem]:
    """The clear value is on the healthy side; else a rule could hold and be healthy at once."""
    for name, rule in _own(config):
        sides = (("above", rule.above, 1, "most"), ("below", rule.below, -1, "least"))
        for key, limit, sign, most in sides:
            if limit is not None and rule.clear is not None and (rule.clear - limit) * sign > 0:
                must = f"must be at {most} {key} ({limit:g})"
                yield Problem(f"{name}.clear", rule.clear, must, f"use {limit:g} or leave it out")


def _metrics_are_measured(config: Config) -> Iterator[Problem]:
    """A rule needs its metric: router health can be switched off."""
    is_off = {
        "observe.health_interval": config.observe.health_interval == 0,
        "training.cuda_graphs": "moe_router" in config.training.cuda_graphs,
    }
    for name, rule in _own(config):
        for setting in _HEALTH if rule.metric in MEASURED else ():
            if is_off[setting] and rule.action != "none":
                must = f"must be measured, and {setting} switches that off"
                remedy = f"change {setting}, or drop the rule"
                yield Problem(f"{name}.metric", rule.metric, must, remedy)


def _checkpoints_reach_back(config: Config) -> Iterator[Problem]:
    """A rollback goes to before the rule held, so a checkpoint from then must still exist."""
    keep, interval = config.checkpoint.keep, config.checkpoint.save_interval
    acts = config.routing_guard.enabled is True
    for rule in merged_rules(config.routing_guard).values() if acts else ():
        if rule.action != "rollback":
            continue
        if interval == 0:
            must = f"must be above 0 with the action rollback of rule {rule.name}"
            remedy = f"use for example 100, or give rule {rule.name} the action warn"
            yield Problem("checkpoint.save_interval", 0, must, remedy)
            return
        # The newest may be that of the last step but one in which it held. The first and the last
        # were measured.
        every = (rule.metric in MEASURED and config.observe.health_interval) or 1
        steps = 1 + every * math.ceil(((rule.for_steps or 1) - 1) / every)
        needed = 1 + math.ceil((steps - 1) / interval)
        if keep is not None and keep < needed:
            yield Problem(
                "checkpoint.keep",
                keep,
                f"must be at least {needed} with the action rollback of rule {rule.name}, which "
                f"goes back to before its {steps} steps (checkpoint.save_interval {interval})",
                f"use {needed}, or null",
            )
            return


RULES: tuple[Rule, ...] = (
    refuse(
        "routing_guard.enabled",
        lambda c: c.routing_guard.enabled is True and c.moe.num_zero_computation_experts == 0,
        "must come with zero-computation experts, because what it guards against is their misuse",
        "add zero-computation experts, or set it to false",
    ),
    _names_differ,
    _metrics_exist,
    _one_limit,
    _clear_on_the_healthy_side,
    _metrics_are_measured,
    _checkpoints_reach_back,
)
