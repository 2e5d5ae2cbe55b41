"""The rules of a run, complete."""

from __future__ import annotations

from moepp_megatron.features.guard.settings import GuardRule, RoutingGuardSection
from moepp_megatron.observe.guard_judge import CompleteRule


def effective_rules(
    section: RoutingGuardSection, has_budget: bool = False
) -> tuple[CompleteRule, ...]:
    """Complete the rules of a checked configuration, in order."""
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
