"""Alerts of rules that begin or end, and of shifts."""

from __future__ import annotations

import time

from moepp_megatron.observe.alerts import Alert
from moepp_megatron.observe.guard_judge import WHOLE_MODEL, Event
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
        time=time.time(),
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
