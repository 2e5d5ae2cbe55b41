"""A run in the terminal: its state, the newest numbers by the catalogue, and its alerts."""

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator

from rich import box
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from moepp_megatron.catalogue import METRICS, OF_RECORD, Metric
from moepp_megatron.experts import FFN
from moepp_megatron.observe.numbers import Labels, name_of
from moepp_megatron.runtime.printable import printable
from moepp_megatron.runtime.terminal import Console
from moepp_megatron.tools.report import formatting
from moepp_megatron.tools.report.live.run import LiveRun, State

_MOST_ALERTS = 4
_MOST_ENTRIES = 4
_STATE_STYLES: dict[State, str] = {
    "waiting": "yellow",
    "starting": "yellow",
    "running": "green",
    "silent": "bold red",
    "finished": "bold green",
    "stopped": "yellow",
    "died": "bold red",
}
_SEVERITY_STYLES = {"info": "cyan", "warning": "yellow", "critical": "bold red"}


def print_run(run: LiveRun, console: Console) -> None:
    """Print the run as it is now."""
    run.poll()
    console.print(_run_table(run), highlight=False)


def watch(
    run: LiveRun,
    console: Console,
    interval_s: float,
    *,
    until_over: bool = True,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Show a run until Ctrl-C or, with `until_over`, its end; the last state stays on screen."""
    with Live(console=console, auto_refresh=False) as live:
        try:
            while True:
                run.poll()
                live.update(_run_table(run), refresh=True)
                if until_over and run.health().is_over:
                    return
                sleep(interval_s)
        except KeyboardInterrupt:
            pass


def _run_table(run: LiveRun) -> Group:
    """The run as it was at the last poll."""
    health = run.health()
    style = _STATE_STYLES[health.state]
    name = run.config.run.name if run.config is not None else run.folder.name
    title = Text(printable(name, keep=""), style="bold")
    title.append(printable(f"  {run.folder}  ", keep=""), style="dim not bold")
    title.append(health.state.upper(), style=style)
    damaged = run.damaged_lines
    unread = f"; {damaged} unreadable lines in metrics.jsonl" if damaged else ""
    lines = [title, Text(health.text + unread, style=style)]
    if health.resume_command is not None:
        # A run folder may come from elsewhere, so this is no command to copy unread.
        said = printable(json.dumps(health.resume_command, ensure_ascii=False), keep="")
        lines.append(Text(f"to resume, status.json names (read it before you run it): {said}"))
    table = Table(box=box.SIMPLE_HEAD, show_header=False, show_edge=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for row in _rows(run):
        table.add_row(*row)
    for alert in [*run.alerts][: -_MOST_ALERTS - 1 : -1]:
        text = " ".join(alert.text().splitlines())
        shown = Text(printable(text, keep=""), style=_SEVERITY_STYLES[alert.severity])
        table.add_row("alert", shown)
    if len(run.alerts) > _MOST_ALERTS:
        table.add_row("alerts", f"{run.alert_counts.total()} in all, in alerts.jsonl")
    return Group(*lines, table)


def _rows(run: LiveRun) -> Iterator[tuple[str, str]]:
    """Progress, then the newest numbers by the catalogue's group, then those with labels."""
    if run.history.newest is None:
        return
    yield "step", _progress(run)
    newest: dict[str, dict[Labels, float]] = {}
    for key, labels, value in run.numbers():
        newest.setdefault(key, {})[labels] = value
    groups: dict[str, list[str]] = {}
    lists: dict[str, str] = {}
    for key, row in OF_RECORD.items():
        if row.labels and key in newest:
            lists[key] = _entries(row, newest[key])
        elif key != "step" and key in newest:
            group = row.group.partition("/")[0]
            groups.setdefault(group, []).append(f"{key} {_shown(newest[key][()], row.unit)}")
    if run.target_ffn_share is not None and "router" in groups:
        groups["router"].append(f"wanted ffn_fraction {run.target_ffn_share:.3g}")
    for group, numbers in groups.items():
        yield group, "  ".join(numbers)
    yield from lists.items()
    shares = newest.get("layer_expert_share", {}).items()
    unused = Counter(layer for (layer, _, kind), n in shares if kind == FFN.name and n == 0)
    if unused:
        named = [f"{count} in layer {layer}" for layer, count in unused.items()]
        yield "unused", f"FFN experts without a selection: {', '.join(named)}"


def _progress(run: LiveRun) -> str:
    step = run.history.newest.step if run.history.newest is not None else 0
    if run.config is None:
        return f"{step:,}"
    total = run.config.training.train_iters
    seconds = run.history.step_time_s * max(0, total - step)
    left = formatting.duration(seconds) if math.isfinite(seconds) else "unknown"
    return f"{step:,} of {total:,} ({min(1.0, step / total):.0%}), time left {left}"


def _shown(value: float, unit: str) -> str:
    if unit == "share":
        return formatting.percent(value)
    if unit == "bytes":
        return formatting.data_size(value)
    # Other units are in the key.
    return formatting.count(value) if abs(value) >= 1e3 else formatting.significant(value)


def _entries(row: Metric, newest: dict[Labels, float]) -> str:
    """The numbers of a key, or those of each metric in it."""
    if row.axes[0] != "metric":
        return _span({name_of(row, labels): value for labels, value in newest.items()}, row.unit)
    parts: dict[str, dict[str, float]] = {}
    for (metric, layer), value in newest.items():
        parts.setdefault(metric, {})[f"layer {layer}"] = value
    units = {metric: METRICS[metric].unit if metric in METRICS else "" for metric in parts}
    return "; ".join(
        f"{printable(metric, keep='')} {_span(part, units[metric])}"
        for metric, part in parts.items()
    )


def _span(values: dict[str, float], unit: str) -> str:
    """Each of a few numbers with its name; of more, the least and the largest."""
    shown = {printable(name, keep=""): value for name, value in values.items()}
    finite = {name: value for name, value in shown.items() if math.isfinite(value)}
    if len(shown) <= _MOST_ENTRIES or not finite:
        few = list(shown.items())[:_MOST_ENTRIES]
        return "  ".join(f"{name} {_shown(value, unit)}" for name, value in few)
    ends = [at(finite, key=finite.__getitem__) for at in (min, max)]
    return " to ".join(f"{_shown(finite[name], unit)} ({name})" for name in ends)
