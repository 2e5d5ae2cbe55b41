"""Alerts of the routing guard."""

from __future__ import annotations

import math
import time

from moepp_megatron.observe.alerts import Alert
from moepp_megatron.observe.guard_judge import WHOLE_MODEL, Event
from moepp_megatron.observe.shift.reading import ShiftStory


def alert_of(
    event: Event, step: int, is_dry_run: bool, note: str = "", story: ShiftStory | None = None
) -> Alert:
    """The alert of an action that begins or ends.

    Args:
        event: The action.
        step: The step that was judged.
        is_dry_run: Whether the action is only reported.
        note: Further text, unless there is a story.
        story: What a shift is about.
    """
    rule = event.rule
    if event.begins:
        condition = rule.condition
    else:
        condition = "" if math.isnan(event.value) else _healthy(event)
    if event.is_used_up:
        condition += f"; taken {rule.max_firings} times (max_firings), so only told"
    if story is not None:
        story = story.of_metric(rule.metric)
        note = story.text(step)
    action = event.action if event.begins else f"end of {event.action}"
    # A warning is the same whether or not the guard may act.
    if is_dry_run and event.action != "warn":
        action = f"{action} (dry run)"
    return Alert(
        step=step,
        time=time.time(),
        rule=rule.name,
        metric=rule.metric,
        value=event.value,
        condition="; ".join(part for part in (condition, note) if part),
        severity=rule.severity if event.begins else "info",
        action=action,
        layer=None if event.layer == WHOLE_MODEL else event.layer,
        cause=None if story is None else story.cause,
        since=None if story is None else step - story.steps + 1,
        chance_steps=None if story is None else story.chance,
        moved=None if story is None else story.moved,
    )


def _healthy(event: Event) -> str:
    """The condition for being healthy, such as `>= 0.5 for 20 steps`."""
    rule = event.rule
    sign = "<=" if rule.is_above else ">="
    duration = "" if rule.clear_for_steps == 1 else f" for {rule.clear_for_steps} steps"
    return f"{sign} {rule.clear:g}{duration}"
