"""The rules in effect, and the alerts they raise when they begin or end."""

from moepp_megatron.features.guard.settings import GuardRule, RoutingGuardSection
from moepp_megatron.observe.alerts import Alert
from moepp_megatron.observe.guard_judge import WHOLE_MODEL, CompleteRule, Event
from moepp_megatron.observe.shift.monitor import Cause, ShiftEvent

# Remedy by default rule; a shift's follows from its cause.
REMEDIES = {
    "router_fault": "find out what damaged the weights before they were put back",
    "few_ffn_experts": "set moe.budget.target_ffn_per_token, or raise moe.balance_coeff",
    "logit_explosion": "set moe.z_loss_coeff, and lower optimizer.lr",
}
_PAGE = "docs/guard.md"
# Meaning and remedy of each cause.
_CAUSES: dict[Cause, tuple[str, str]] = {
    "unknown": (
        "loss or routing have left their course, and the token ids do not say why",
        "wait 10 steps for an update; then lower optimizer.lr, or resume from a checkpoint before "
        "it; compare the labels with the texts",
    ),
    "data": (
        "the data have changed",
        "leave it if the change was meant; else stop, mend the source and resume from a checkpoint "
        "before it",
    ),
    "router": (
        "the routers have changed, the token ids have not",
        "set routing_guard: safe, or resume from a checkpoint before it",
    ),
}


def effective_rules(
    section: RoutingGuardSection, has_budget: bool = False
) -> tuple[CompleteRule, ...]:
    """Complete the rules of a checked configuration, in order."""
    # Where a budget holds the FFN share, it is the one that reports a missed target.
    owned = "few_ffn_experts" if has_budget else None
    rules = [rule for rule in section.merged_rules().values() if rule.action != "none"]
    return tuple(_complete(rule) for rule in rules if rule.name != owned)


def _complete(rule: GuardRule) -> CompleteRule:
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


def alert_of(
    event: Event, step: int, action: str, note: str = "", shift: ShiftEvent | None = None
) -> Alert:
    """Make the alert of a rule that begins or ends; `shift` is what the rule is about."""
    rule = event.rule
    remedy = f"{REMEDIES[rule.name]} ({_PAGE}#{rule.name})" if rule.name in REMEDIES else None
    parts, value = [rule.condition if event.begins else ""], event.value
    if shift is not None and event.begins:
        meaning, own_remedy = _CAUSES[shift.cause]
        parts += [meaning, f"since step {shift.since}", *shift.moved]
        value = shift.evidence
        if rule.name not in REMEDIES or "put_back" not in action:
            remedy = f"{own_remedy} ({_PAGE}#{shift.cause})"
    return Alert(
        step=step,
        rule=rule.name,
        metric=rule.metric,
        value=value,
        condition="; ".join(filter(None, [*parts, note])),
        severity=rule.severity if event.begins else "info",
        action=action,
        layer=None if event.layer == WHOLE_MODEL else event.layer,
        cause=None if shift is None else shift.cause,
        since=None if shift is None else shift.since,
        moved=None if shift is None else shift.moved,
        remedy=remedy if event.begins else None,
    )
