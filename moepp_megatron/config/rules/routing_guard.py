"""Rules of the section `routing_guard`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from difflib import get_close_matches

from moepp_megatron.config.guard_metrics import GUARD_METRICS, MEASURED
from moepp_megatron.config.guard_rules import complete, merged_rules
from moepp_megatron.config.problem import Problem
from moepp_megatron.config.schema import Config, GuardRule


def _own(config: Config) -> Iterator[tuple[str, GuardRule]]:
    """The rules that the user wrote, as they are merged, with their names in messages."""
    section = config.routing_guard
    merged = merged_rules(section)
    for index, rule in enumerate(section.rules):
        yield f"routing_guard.rules[{index}]", merged[rule.name]


def _acting(config: Config, *actions: str) -> Iterator[GuardRule]:
    """Rules that are judged and take one of these actions."""
    if config.routing_guard.enabled is True:
        for rule in merged_rules(config.routing_guard).values():
            if rule.action in actions:
                yield rule


def _guard_has_routers_to_watch(config: Config) -> Iterator[Problem]:
    """megatron-core's own MoE layer has none of our routers."""
    if config.routing_guard.enabled is True and config.moe.num_zero_computation_experts == 0:
        yield Problem(
            "routing_guard.enabled",
            True,
            "must come with zero-computation experts, because what it guards against is their "
            "misuse",
            "add zero-computation experts, or set it to false",
        )


def _guard_rules_have_one_name_each(config: Config) -> Iterator[Problem]:
    """Alerts and checkpoints know a rule by its name."""
    names = [rule.name for rule in config.routing_guard.rules]
    for index, name in enumerate(names):
        if name in names[:index]:
            yield Problem(
                f"routing_guard.rules[{index}].name",
                name,
                "must be another one than that of the rules before",
                "rename it, or join the two",
            )


def _guard_rules_look_at_a_metric(config: Config) -> Iterator[Problem]:
    """A metric that nothing measures would never hold."""
    for name, rule in _own(config):
        if rule.metric in GUARD_METRICS:
            continue
        near = get_close_matches(rule.metric or "", GUARD_METRICS, n=1, cutoff=0.4)
        yield Problem(
            f"{name}.metric",
            rule.metric,
            "must be one of the guard's metrics",
            f"use {near[0]}" if near else f"use one of {', '.join(GUARD_METRICS)}",
        )


def _guard_rules_have_one_limit(config: Config) -> Iterator[Problem]:
    """A rule holds above a limit or below one."""
    for name, rule in _own(config):
        given = [key for key in ("above", "below") if getattr(rule, key) is not None]
        if len(given) != 1:
            yield Problem(
                f"{name}.above",
                rule.above,
                f"must be given, or else below, and here are {'both' if given else 'neither'}",
                "write for example below: 0.2",
            )


def _guard_rules_clear_on_the_healthy_side(config: Config) -> Iterator[Problem]:
    """The clear value is on the healthy side; else a rule could hold and be healthy at once."""
    for name, rule in _own(config):
        for key, sign in (("above", 1), ("below", -1)):
            limit = getattr(rule, key)
            if limit is None or rule.clear is None or (rule.clear - limit) * sign <= 0:
                continue
            yield Problem(
                f"{name}.clear",
                rule.clear,
                f"must be at {'most' if sign > 0 else 'least'} {key} ({limit:g})",
                f"use {limit:g} or leave it out",
            )


# Metrics of the detector of shifts.
_OF_SHIFTS = ("routing_shift", "loss_shift", "token_shift", "source_shift")
# Settings that switch off other metrics than that of classes of tokens.
_OF_OTHER_METRICS = ("observe.health_interval", "routing_guard.shift.window")


def _guard_metrics_are_measured(config: Config) -> Iterator[Problem]:
    """A rule needs its metric: router health and expert usage can be switched off."""
    is_off = {
        "observe.health_interval": config.observe.health_interval == 0,
        "training.cuda_graphs": "moe_router" in config.training.cuda_graphs,
        "routing_guard.shift.window": config.routing_guard.shift.window == 0,
        "observe.token_groups": not config.observe.token_groups,
        "parallel.overlap_moe_expert_parallel_comm": (
            config.parallel.overlap_moe_expert_parallel_comm
        ),
    }
    for name, rule in _own(config):
        if rule.action == "none":
            continue
        needs = ["observe.health_interval", "training.cuda_graphs"]
        if rule.metric in _OF_SHIFTS:
            needs = ["routing_guard.shift.window"]
            if rule.metric == "source_shift":
                needs.append("observe.token_groups")
        elif rule.metric == "class_ffn_to_past":
            needs = [name for name in is_off if name not in _OF_OTHER_METRICS]
        elif rule.metric not in MEASURED:
            continue
        for setting in needs:
            if is_off[setting]:
                yield Problem(
                    f"{name}.metric",
                    rule.metric,
                    f"must be measured, and {setting} switches that off",
                    f"change {setting}, or drop the rule",
                )


def _safe_mode_has_enough_ffn_experts(config: Config) -> Iterator[Problem]:
    """A token takes K FFN experts in safe mode."""
    moe = config.moe
    if moe.router_topk > moe.num_ffn_experts:
        for rule in _acting(config, "safe_mode"):
            yield Problem(
                "moe.router_topk",
                moe.router_topk,
                f"must be at most moe.num_ffn_experts ({moe.num_ffn_experts}) with the action "
                f"safe_mode of rule {rule.name}, which sends all selections to FFN experts",
                f"give rule {rule.name} the action warn",
            )
            return


def _guard_moves_no_capacity(config: Config) -> Iterator[Problem]:
    """Capacities follow from a fixed tau; further FFN selections would only be dropped."""
    if config.moe.capacity_factor is None:
        return
    names = [rule.name for rule in _acting(config, "raise_tau", "safe_mode")]
    if names:
        yield Problem(
            "moe.capacity_factor",
            config.moe.capacity_factor,
            f"must be null with the actions of the rules {', '.join(names)}, because the "
            "capacities follow from a fixed moe.tau and would drop what they send to FFN experts",
            "use null, or give these rules the action warn",
        )


def _guard_reaches_the_router(config: Config) -> Iterator[Problem]:
    """A captured router repeats the kernels of the first step."""
    if "moe_router" not in config.training.cuda_graphs:
        return
    for rule in _acting(config, "safe_mode"):
        yield Problem(
            "training.cuda_graphs",
            config.training.cuda_graphs,
            f"must not hold moe_router with the action {rule.action} of rule {rule.name}, because "
            "a graph goes on as it was captured",
            f"take moe_router out, or give rule {rule.name} the action warn",
        )
        return


def _actions_have_the_balance_loss_they_need(config: Config) -> Iterator[Problem]:
    """Tau acts through it, and in safe mode it alone reaches what is switched off."""
    if config.moe.balance_coeff > 0:
        return
    names = [rule.name for rule in _acting(config, "raise_tau", "safe_mode")]
    if names:
        yield Problem(
            "moe.balance_coeff",
            config.moe.balance_coeff,
            f"must be above 0 with the actions of the rules {', '.join(names)}: tau acts through "
            "the balance loss, and nothing else teaches a router to leave safe mode",
            "use 0.01, or give these rules the action warn",
        )


def _guard_has_checkpoints_to_go_back_to(config: Config) -> Iterator[Problem]:
    """A rollback needs a checkpoint."""
    if config.checkpoint.save_interval > 0:
        return
    for rule in _acting(config, "rollback"):
        yield Problem(
            "checkpoint.save_interval",
            config.checkpoint.save_interval,
            f"must be above 0 with the action rollback of rule {rule.name}",
            f"use for example 100, or give rule {rule.name} the action warn",
        )
        return


def _guard_keeps_checkpoints_of_before(config: Config) -> Iterator[Problem]:
    """A rollback goes to before the rule held, so a checkpoint from then must still exist."""
    keep, interval = config.checkpoint.keep, config.checkpoint.save_interval
    if keep is None or interval == 0:
        return
    for rule in map(complete, _acting(config, "rollback")):
        # The newest may be that of the last step but one in which it held.
        steps = rule.of_steps or rule.for_steps
        needed = 1 + math.ceil((steps - 1) / interval)
        if keep < needed:
            yield Problem(
                "checkpoint.keep",
                keep,
                f"must be at least {needed} with the action rollback of rule {rule.name}, which "
                f"goes back to before its {steps} steps (checkpoint.save_interval "
                f"{interval})",
                f"use {needed}, or null",
            )
            return


def _guard_rules_hold_in_steps_that_there_are(config: Config) -> Iterator[Problem]:
    """A rule cannot hold in more steps than it looks at."""
    for name, rule in _own(config):
        if rule.of_steps is not None and rule.of_steps < (rule.for_steps or 1):
            yield Problem(
                f"{name}.of_steps",
                rule.of_steps,
                f"must be at least for_steps ({rule.for_steps})",
                f"use {rule.for_steps}, or leave it out",
            )


RULES = (
    _guard_has_routers_to_watch,
    _guard_rules_have_one_name_each,
    _guard_rules_look_at_a_metric,
    _guard_rules_have_one_limit,
    _guard_rules_clear_on_the_healthy_side,
    _guard_metrics_are_measured,
    _safe_mode_has_enough_ffn_experts,
    _guard_moves_no_capacity,
    _guard_reaches_the_router,
    _actions_have_the_balance_loss_they_need,
    _guard_has_checkpoints_to_go_back_to,
    _guard_keeps_checkpoints_of_before,
    _guard_rules_hold_in_steps_that_there_are,
)
