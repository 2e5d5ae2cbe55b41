"""Alerts of the routing guard."""

from __future__ import annotations

import math
import time

from moepp_megatron.observe.alerts import Alert
from moepp_megatron.observe.guard_judge import WHOLE_MODEL, Event


def told(event: Event, step: int, is_dry_run: bool, note: str = "") -> Alert:
    """The alert of an action that begins or ends.

    Args:
        event: The action that begins or ends.
        step: The step that was judged.
        is_dry_run: Whether the action is only reported.
        note: Further text.
    """
    rule = event.rule
    if event.begins:
        condition = rule.condition
    else:
        condition = "" if math.isnan(event.value) else _healthy(event)
    if event.is_used_up:
        condition += f"; taken {rule.max_firings} times (max_firings), so only told"
    action = event.action if event.begins else f"end of {event.action}"
    return Alert(
        step=step,
        time=time.time(),
        rule=rule.name,
        metric=rule.metric,
        value=event.value,
        condition="; ".join(part for part in (condition, note) if part),
        severity=rule.severity if event.begins else "info",
        action=f"{action} (dry run)" if is_dry_run else action,
        layer=None if event.layer == WHOLE_MODEL else event.layer,
    )


def _healthy(event: Event) -> str:
    """The condition for being healthy, such as `>= 0.5 for 20 steps`."""
    rule = event.rule
    sign = "<=" if rule.is_above else ">="
    duration = "" if rule.clear_for_steps == 1 else f" for {rule.clear_for_steps} steps"
    return f"{sign} {rule.clear:g}{duration}"
