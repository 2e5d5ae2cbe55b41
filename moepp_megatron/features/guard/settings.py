"""Section `routing_guard`: rules over the routers, and the actions when one holds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from difflib import get_close_matches
from typing import TYPE_CHECKING, Annotated, Literal

from moepp_megatron.catalogue import METRICS
from moepp_megatron.config.errors import Problem
from moepp_megatron.config.rows import no_effect_where, refuse
from moepp_megatron.config.schema.section import FilledText, Section, Unit

if TYPE_CHECKING:
    from moepp_megatron.config.schema import Config

GuardAction = Literal["none", "warn", "put_back", "rollback", "stop"]


def _judged(guard: str) -> dict[str, str]:
    return {name: row.with_unit for name, row in METRICS.items() if row.guard == guard}


# Their meanings. Of every MoE layer in every step, from counts of what its router wants.
COUNTED = _judged("counted")
# Of every MoE layer, in steps where router health is measured (observe.health_interval).
MEASURED = _judged("measured")
GUARD_METRICS = {**COUNTED, **MEASURED, **_judged("whole")}


class GuardRule(Section):
    """One rule. If `name` is that of a default rule, missing settings are taken from it."""

    name: FilledText
    """Name in alerts; that of a default rule changes that rule"""
    metric: str | None = None
    """Metric to watch (docs/metrics.md)"""
    above: Annotated[float | None, Unit("the metric's")] = None
    """The rule holds while the metric is above this"""
    below: Annotated[float | None, Unit("the metric's")] = None
    """The rule holds while the metric is below this"""
    for_steps: Annotated[int | None, Unit("steps", ge=1)] = None
    """Steps in a row that it must hold before the action is taken, and must be healthy before the
    next time; null: 1"""
    clear: Annotated[float | None, Unit("the metric's")] = None
    """The metric is healthy again beyond this; null: where the rule does not hold"""
    severity: Literal["info", "warning", "critical"] | None = None
    """Severity of its alerts; null: warning"""
    action: GuardAction | None = None
    """Response; none drops the rule; put_back gives all routers their weights from the newest
    healthy step; null: warn"""


# docs/guard.md says what each means. Series have their limits in `observe/shift/detector.py`, of
# which 1 is what the metrics are over.
DEFAULT_RULES = (
    GuardRule(name="shift", metric="shift", above=1.0),
    GuardRule(
        name="router_fault",
        metric="router_fault",
        above=1.0,
        severity="critical",
        action="put_back",
    ),
    GuardRule(
        name="few_ffn_experts",
        metric="mean_ffn_to_target",
        below=0.6,
        clear=0.75,
        for_steps=40,
    ),
    GuardRule(
        name="logit_explosion",
        metric="logit_variance",
        above=100.0,
        clear=50.0,
        for_steps=20,
        severity="critical",
    ),
)


def _changed(base: GuardRule, own: GuardRule) -> GuardRule:
    given = {name: value for name, value in own.model_dump().items() if value is not None}
    if "above" in given or "below" in given:
        # A new limit takes the place of the old one, and the old way back does not fit it.
        base = base.model_copy(update={"above": None, "below": None, "clear": None})
    return base.model_copy(update=given)


def _own(config: Config) -> Iterator[tuple[str, GuardRule]]:
    """The rules that the user wrote, as they are merged, with their names in messages."""
    section = config.routing_guard
    merged = section.merged_rules()
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
    off = ["observe.health_interval"] if config.observe.health_interval == 0 else []
    off += ["training.cuda_graphs"] if config.training.captures_router else []
    for name, rule in _own(config):
        for setting in off if rule.metric in MEASURED and rule.action != "none" else ():
            must = f"must be measured, and {setting} switches that off"
            remedy = f"change {setting}, or drop the rule"
            yield Problem(f"{name}.metric", rule.metric, must, remedy)


def _checkpoints_reach_back(config: Config) -> Iterator[Problem]:
    """A rollback goes to before the rule held, so a checkpoint from then must still exist."""
    keep, interval = config.checkpoint.keep, config.checkpoint.save_interval
    acts = config.routing_guard.enabled is True
    for rule in config.routing_guard.merged_rules().values() if acts else ():
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


class RoutingGuardSection(Section):
    """Watches the routers and acts where a rule holds."""

    enabled: bool | None = None
    """true: judge the rules after every step and act; null: judge and only report, so that the
    model's numbers stay what they are; false: neither. `routing_guard: safe`, `observe` and `off`
    are short for these"""
    defaults: bool = True
    """Begin with the default rules (docs/guard.md)"""
    rules: list[GuardRule] = []
    """Further rules, or changes of default rules by their name"""
    warmup: Annotated[int, Unit("steps", ge=0)] = 0
    """First steps of the run that are not judged"""
    false_alarm_steps: Annotated[float, Unit("steps", ge=100.0)] = 10_000.0
    """Steps in which chance may raise one alarm of a series (loss, routing, token ids, sources)"""

    @property
    def acts(self) -> bool:
        """True if actions are carried out, not only reported."""
        return self.enabled is True

    def merged_rules(self) -> dict[str, GuardRule]:
        """The default rules with the user's changes, and the user's own, by name; dropped too."""
        rules = {rule.name: rule for rule in DEFAULT_RULES} if self.defaults else {}
        for own in self.rules:
            base = rules.get(own.name)
            rules[own.name] = own if base is None else _changed(base, own)
        return rules

    own_rules = (
        refuse(
            "routing_guard.enabled",
            "routing_guard.acts and not moe.num_zero_computation_experts",
            "must come with zero-computation experts, because what it guards against is their "
            "misuse",
            "add zero-computation experts, or set it to false",
        ),
        _names_differ,
        _metrics_exist,
        _one_limit,
        _clear_on_the_healthy_side,
        _metrics_are_measured,
        _checkpoints_reach_back,
    )
    no_effect = (
        no_effect_where(
            "routing_guard.enabled false",
            "with routing_guard.enabled false",
            "routing_guard.rules",
            "leave enabled out",
        ),
    )
    shorthand = {
        "safe": {"enabled": True},
        "observe": {"enabled": None},
        "off": {"enabled": False},
    }
    removed = {
        "dry_run": (False, "use `routing_guard: observe`"),
        "safe_ramp": (20, "leave it out: safe mode ends at once"),
        "force_ffn": (
            {"tokens": "high_loss", "token_ids": [], "share": 0.1, "decay": 0.99},
            "leave it out: no action forces FFN experts on chosen tokens",
        ),
        "tau_factor": (2.0, "leave it out: moe.budget is what holds the FFN share"),
        "tau_half_life": (50.0, "leave it out: moe.budget is what holds the FFN share"),
        "shift": (
            {
                "window": 10,
                "reference": None,
                "fixed_after": None,
                "span": 3,
                "lag": 0,
                "memory": 6,
                "warmup": 8,
                "false_alarm_steps": 10_000.0,
                "threshold": None,
            },
            "leave it out, or use routing_guard.false_alarm_steps",
        ),
    }
