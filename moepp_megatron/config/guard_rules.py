"""The rules of a run's routing guard, and the metrics that they may use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moepp_megatron.catalogue import METRICS
from moepp_megatron.config.schema import Config
from moepp_megatron.config.schema.routing_guard import GuardAction, GuardRule, RoutingGuardSection


def _judged(guard: str) -> dict[str, str]:
    return {name: row.with_unit for name, row in METRICS.items() if row.guard == guard}


# Their meanings. Of every MoE layer in every step, from counts of what its router wants.
COUNTED = _judged("counted")
# Of every MoE layer, in steps where router health is measured (observe.health_interval).
MEASURED = _judged("measured")
GUARD_METRICS = {**COUNTED, **MEASURED, **_judged("whole")}

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
REMEDIES = {
    "router_fault": "find out what damaged the weights before they were put back",
    "few_ffn_experts": "set moe.budget.target_ffn_per_token, or raise moe.balance_coeff",
    "logit_explosion": "set moe.z_loss_coeff, and lower optimizer.lr",
}
"""Remedy by default rule; a shift's remedy follows from its cause."""


@dataclass(frozen=True)
class CompleteRule:
    """A complete rule, its defaults resolved.

    Attributes:
        name: Its name in alerts.
        metric: One of `GUARD_METRICS`.
        limit: The value beyond which the rule holds; `is_above` gives the side.
        is_above: Whether it holds above the limit, or below.
        clear: The value beyond which the metric is healthy again.
        for_steps: Steps in a row that it must hold before the action, and be healthy after it.
        severity: Severity of its alerts.
        action: The guard's action.
    """

    name: str
    metric: str
    limit: float
    is_above: bool
    clear: float
    for_steps: int = 1
    severity: Literal["info", "warning", "critical"] = "warning"
    action: GuardAction = "warn"

    def holds(self, value: float) -> bool:
        """True if the metric is beyond the limit."""
        return value > self.limit if self.is_above else value < self.limit

    def is_healthy(self, value: float) -> bool:
        """True if the metric is within `clear`."""
        return value <= self.clear if self.is_above else value >= self.clear

    @property
    def condition(self) -> str:
        """The rule's condition in words, such as `< 0.25 for 20 steps`."""
        sign = ">" if self.is_above else "<"
        return f"{sign} {self.limit:g}{lasting(self.for_steps)}"


def lasting(for_steps: int | None) -> str:
    """Format how long a rule must hold: ` for 20 steps`, or empty for one step."""
    return "" if for_steps is None or for_steps == 1 else f" for {for_steps} steps"


def is_watched(config: Config) -> bool:
    """True if the guard watches the routers; megatron-core's own MoE layer is not watched."""
    return config.routing_guard.enabled is not False and config.moe.num_zero_computation_experts > 0


def merged_rules(section: RoutingGuardSection) -> dict[str, GuardRule]:
    """The default rules with the user's changes, and the user's own, by name; dropped ones too."""
    rules = {rule.name: rule for rule in DEFAULT_RULES} if section.defaults else {}
    for own in section.rules:
        base = rules.get(own.name)
        rules[own.name] = own if base is None else _changed(base, own)
    return rules


def effective_rules(
    section: RoutingGuardSection, has_budget: bool = False
) -> tuple[CompleteRule, ...]:
    """The complete rules of a checked configuration, in order.

    Args:
        section: The settings.
        has_budget: Whether a controller holds the FFN share (`moe.budget.held_by`).
    """
    # Where a budget holds the FFN share, it is the one that reports a missed target.
    owned = "few_ffn_experts" if has_budget else None
    rules = [rule for rule in merged_rules(section).values() if rule.action != "none"]
    return tuple(complete(rule) for rule in rules if rule.name != owned)


def complete(rule: GuardRule) -> CompleteRule:
    """Resolve the defaults of a rule that has a metric and one limit."""
    limit = rule.above if rule.above is not None else rule.below
    assert rule.metric is not None, f"rule {rule.name} has no metric"
    assert limit is not None, f"rule {rule.name} has no limit"
    return CompleteRule(
        name=rule.name,
        metric=rule.metric,
        limit=limit,
        is_above=rule.above is not None,
        clear=limit if rule.clear is None else rule.clear,
        for_steps=rule.for_steps or 1,
        severity=rule.severity or "warning",
        action=rule.action or "warn",
    )


def _changed(base: GuardRule, own: GuardRule) -> GuardRule:
    given = {name: value for name, value in own.model_dump().items() if value is not None}
    if "above" in given or "below" in given:
        # A new limit takes the place of the old one, and the old way back does not fit it.
        base = base.model_copy(update={"above": None, "below": None, "clear": None})
    return base.model_copy(update=given)
