"""A run's alerts on its page: a table, and marks on the curves."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from moepp_megatron.observe.alerts import Alert, Severity
from moepp_megatron.tools.report import formatting
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
    """The page's section on alerts: how many, and a table of the newest."""
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
    if run.config.moe.is_vanilla or run.config.routing_guard.get("enabled") is False:
        blocks.append(Text(["The routing guard was off."], "note"))
    return blocks


def mark_alerts(axes: Axes, alerts: Sequence[Alert], steps: np.ndarray) -> None:
    """Draw a line at each alert's step; those outside of `steps` and ends (`info`) are left out."""
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
