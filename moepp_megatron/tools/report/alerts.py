"""A run's alerts on its page: a table, and marks on the curves."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from pydantic import ValidationError

from moepp_megatron.observe.alerts import Alert, Severity
from moepp_megatron.tools.report import formatting, healthy
from moepp_megatron.tools.report.blocks import Block, Cell, Table, Text, number
from moepp_megatron.tools.report.drawing import MUTED, VERMILION
from moepp_megatron.tools.report.run_data import RunData

# A page is for reading; alerts.jsonl has them all.
MAX_ROWS = 100
# Lines closer than a pixel only darken the plot.
_MAX_MARKS = 40

_COLOURS: dict[Severity, str] = {"critical": VERMILION, "warning": "#e69f00", "info": MUTED}


_HEAD = ("Rule", "Step", "Severity", "Found", "Condition", "Action")


def alert_blocks(run: RunData) -> list[Block]:
    """The page's section on alerts: how many, a table of the newest, what was watched."""
    alerts = run.alerts
    if not alerts:
        blocks: list[Block] = [Text(["This run raised no alert."], "nothing")]
    else:
        counts = [(rule, sum(a.rule == rule for a in alerts)) for rule in _names(alerts)]
        parts = [f"{rule} ({count:,})" for rule, count in counts]
        noun = "alert" if len(alerts) == 1 else "alerts"
        sentence = f"{len(alerts):,} {noun} in alerts.jsonl: {', '.join(parts)}."
        if len(alerts) > MAX_ROWS:
            sentence += f" The table has the newest {MAX_ROWS}."
        rows = [_row(alert) for alert in alerts[-MAX_ROWS:]]
        blocks = [Text([sentence], "note"), Table(_HEAD, rows)]
    note = watched(run)
    return [*blocks, Text([note], "note")] if note else blocks


def watched(run: RunData) -> str:
    """Say what was watched; empty where nothing was, or another version did."""
    if healthy.GUARD is None:
        return ""
    try:
        section = healthy.GUARD.model_validate(run.config.routing_guard)
    except ValidationError:
        return ""
    if section.enabled is False or run.config.is_vanilla:
        return "The routing guard was off."
    merged = section.merged_rules().values()
    rules = ", ".join(rule.name for rule in merged if rule.action != "none")
    does = "acts on them" if section.acts else "only reports what they find"
    return f"The routing guard judged these rules after every step and {does}: {rules}."


def mark_alerts(axes: Axes, alerts: Sequence[Alert], steps: np.ndarray) -> None:
    """Draw a vertical line at each alert's step.

    Args:
        alerts: Alerts of the run; those outside of `steps`, and ends of alerts (`info`), are left
            out.
        steps: Steps of the curve, increasing.
    """
    seen: set[Severity] = set()
    shown = [a for a in alerts if a.severity != "info" and steps[0] <= a.step <= steps[-1]]
    moments = dict.fromkeys((alert.step, alert.severity) for alert in shown)
    for step, severity in list(moments)[-_MAX_MARKS:]:
        label = None if severity in seen else f"{severity} alert"
        seen.add(severity)
        colour = _COLOURS[severity]
        axes.axvline(step, color=colour, linewidth=1.0, alpha=0.7, zorder=1, label=label)


def _names(alerts: Sequence[Alert]) -> list[str]:
    return list(dict.fromkeys(alert.rule for alert in alerts))


def _row(alert: Alert) -> list[Cell]:
    where = "" if alert.layer is None else f" of layer {alert.layer}"
    return [
        Cell(alert.rule),
        number(f"{alert.step:,}"),
        Cell(alert.severity, alert.severity),
        Cell(f"{alert.metric}{where}: {formatting.significant(alert.value)}"),
        Cell(alert.condition, "comment"),
        Cell(alert.action),
    ]
