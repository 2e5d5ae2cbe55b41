"""The rules of a run: complete, with the remedy of each default one."""

from __future__ import annotations

from moepp_megatron.features.guard.settings import GuardRule, RoutingGuardSection
from moepp_megatron.observe.guard_judge import CompleteRule

REMEDIES = {
    "router_fault": "find out what damaged the weights before they were put back",
    "few_ffn_experts": "set moe.budget.target_ffn_per_token, or raise moe.balance_coeff",
    "logit_explosion": "set moe.z_loss_coeff, and lower optimizer.lr",
}
"""Remedy by default rule; a shift's remedy follows from its cause."""


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
    rules = [rule for rule in section.merged_rules().values() if rule.action != "none"]
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
