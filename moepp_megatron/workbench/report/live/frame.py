"""Builds one frame of the view: the present state of a run."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Group
from rich.table import Table
from rich.text import Text

from moepp_megatron.config.printable import printable
from moepp_megatron.observe.alerts import Alert
from moepp_megatron.observe.metrics import StepMetrics
from moepp_megatron.workbench.report import formatting
from moepp_megatron.workbench.report.live.curve import LiveSeries, draw_curve, sparkline
from moepp_megatron.workbench.report.live.experts import expert_bars, layer_shares, legend
from moepp_megatron.workbench.report.live.glyphs import Glyphs
from moepp_megatron.workbench.report.live.liveness import State, short_time
from moepp_megatron.workbench.report.live.run import LiveRun

# From this width on two curves stand side by side.
_WIDE = 110
_SMALLEST_WIDTH = 40
_MOST_ALERTS = 4
_MOST_SOURCES = 4
_CURVE_ROWS = (4, 10)
# Up to a space outside of the quotes that `shlex.quote` writes.
_SHELL_WORD = re.compile(r"""(?:'[^']*'|"[^"]*"|[^'"\s])+""")

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


@dataclass(frozen=True)
class Size:
    """Size of a frame.

    Attributes:
        width: Columns.
        height: Rows; None shows everything, as for a log.
    """

    width: int
    height: int | None = None


def build_frame(run: LiveRun, size: Size, glyphs: Glyphs) -> Group:
    """Draws a run as it was at the last poll.

    Returns:
        Lines of at most ``size.width`` columns, and no more than ``size.height`` of them where
        that is 20 or more.
    """
    width = max(_SMALLEST_WIDTH, size.width)
    top = _header(run, width, glyphs)
    newest = run.history.newest
    alerts = _alerts(run, width, glyphs)
    if newest is None:
        return Group(*top, *alerts)
    numbers = _numbers(run, newest, width)
    shares = []
    if run.config is not None:
        shares = layer_shares(newest, run.config.experts, run.config.moe_layers)
    # A heading and the steps under the curve; the sparkline of narrow views; the bars' heading.
    fixed = len(top) + len(numbers) + len(alerts) + 2 + (width < _WIDE) + bool(shares)
    rest = 10**6 if size.height is None else max(0, size.height - fixed)
    rows = min(max(rest // 2, _CURVE_ROWS[0], rest - len(shares)), _CURVE_ROWS[1])
    body = [*_curves(run, width, rows, glyphs), *numbers]
    if shares and rest - rows > 0:
        body.append(_heading("experts", legend(shares, glyphs), width, glyphs))
        body += expert_bars(shares, run.wanted_ffn_share, width, rest - rows, glyphs)
    return Group(*top, *body, *alerts)


def _header(run: LiveRun, width: int, glyphs: Glyphs) -> list[Text]:
    """Name, progress, health."""
    health = run.health()
    name = run.config.run.name if run.config is not None else run.folder.name
    state = health.state.upper()
    title = Text(no_wrap=True, overflow="ellipsis")
    title.append(printable(name, keep=""), style="bold")
    title.append(printable(f"  {run.folder}", keep=""), style="dim")
    title.truncate(width - len(state) - 1, overflow="ellipsis")
    title.append(" " * (width - len(state) - title.cell_len))
    title.append(state, style=_STATE_STYLES[health.state])
    lines = [title]
    if run.config is not None and run.history.newest is not None:
        lines.append(_progress(run, run.config.training.train_iters, width, glyphs))
    text = Text(health.text, style=_STATE_STYLES[health.state])
    if run.history.went_back is not None:
        before, after = run.history.went_back
        text.append(f"; went back from step {before:,} to {after:,}", style="yellow")
    if run.damaged_lines:
        text.append(f"; {run.damaged_lines} unreadable lines in metrics.jsonl", style="red")
    if health.go_on is None:
        return [*lines, _cut(text, width)]
    lines.append(_cut(text.append("; to go on:"), width))
    return lines + [Text(line) for line in _command_lines(printable(health.go_on, keep=""), width)]


def _command_lines(command: str, width: int) -> list[str]:
    """A shell command over as many lines as it needs; copied together they are the command."""
    lines = [""]
    for word in _SHELL_WORD.findall(command):
        longer = f"{lines[-1]} {word}".strip()
        # Room for what says that the command goes on.
        if lines[-1] and len(longer) > width - 2:
            lines.append(word)
        else:
            lines[-1] = longer
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]


def _progress(run: LiveRun, total: int, width: int, glyphs: Glyphs) -> Text:
    history = run.history
    step = history.steps[-1]
    left = max(0, total - step)
    share = min(1.0, step / total) if total else 1.0
    before = f"step {step:,}/{total:,} "
    after = f" {share:.0%}"
    if left:
        seconds = history.step_time_s * left
        after += f"  ETA {formatting.duration(seconds) if math.isfinite(seconds) else 'unknown'}"
    room = max(8, width - len(before) - len(after))
    done = round(share * room)
    line = Text(before)
    line.append(glyphs.bars[0] * done, style="green")
    line.append(glyphs.line * (room - done), style="dim")
    return _cut(line.append(after), width)


def _curves(run: LiveRun, width: int, rows: int, glyphs: Glyphs) -> list[Text | Table]:
    """Loss and FFN share: side by side, or the share as one line."""
    history = run.history
    points = [
        (step, value)
        for step, value in zip(history.steps, history.valid_loss, strict=True)
        if not math.isnan(value)
    ]
    loss = LiveSeries(history.steps, history.loss, points)
    if width < _WIDE:
        lines = [_loss_heading(run, width, glyphs), *draw_curve(loss, width, rows, glyphs)]
        share = _share_text(run, "FFN share ")
        room = width - share.cell_len - 2
        share.append("  " + sparkline(history.ffn_fraction, room, glyphs), style="blue")
        return [*lines, _cut(share, width)]
    left = (width - 2) // 2
    right = width - 2 - left
    share_series = LiveSeries(
        history.steps, history.ffn_fraction, target=run.wanted_ffn_share, style="blue"
    )
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(width=left)
    grid.add_column(width=right)
    share_heading = _heading("FFN share", _share_text(run, ""), right, glyphs)
    grid.add_row(_loss_heading(run, left, glyphs), share_heading)
    for pair in zip(
        draw_curve(loss, left, rows, glyphs),
        draw_curve(share_series, right, rows, glyphs),
        strict=True,
    ):
        grid.add_row(*pair)
    return [grid]


def _loss_heading(run: LiveRun, width: int, glyphs: Glyphs) -> Text:
    history = run.history
    text = Text("  ")
    if history.first_bad_step is not None:
        text.append(f"not finite since step {history.first_bad_step:,}", style="bold red")
    else:
        text.append(formatting.number(history.loss[-1]), style="bold")
    evaluated = history.last_valid_loss()
    if evaluated is not None:
        step, value = evaluated
        text.append(f"  {glyphs.point} ", style="bold yellow")
        text.append(f"validation {formatting.number(value)} (step {step:,})")
    return _heading("loss", text, width, glyphs)


def _share_text(run: LiveRun, name: str) -> Text:
    newest = run.history.newest
    assert newest is not None, "a curve is drawn of records"
    text = Text(name or "  ")
    text.append(f"{newest.ffn_fraction:.3f}", style="bold")
    if newest.ffn_target is not None:
        text.append(f" (target {newest.ffn_target:.3f})", style="green")
    elif run.wanted_ffn_share is not None:
        text.append(f" (phi {run.wanted_ffn_share:.3f})", style="green")
    return text


def _numbers(run: LiveRun, newest: StepMetrics, width: int) -> list[Text]:
    """Speed, and the use of machines as far as it is known."""
    history, latest = run.history, run.history.latest
    rate = history.tokens_per_s
    speed = [
        f"{formatting.count(rate)} tokens/s",
        f"step {short_time(history.step_time_s)}",
        f"lr {newest.lr:.2e}",
        f"grad norm {newest.grad_norm:.3f}",
        f"{formatting.big_count(newest.tokens)} tokens",
    ]
    costs = []
    for key, form in (
        ("mfu", "MFU {:.1%}"),
        ("model_tflops", "{} a rank"),
        ("gpu_power_w", "{:.0f} W per GPU"),
        ("gpu_temperature_c", "{:.0f} C"),
        ("energy_per_token_j", "{:.3g} J/token"),
        ("cpu_utilization", "CPU {:.0%}"),
        ("waiting_fraction", "{:.1%} waiting"),
    ):
        if key in latest:
            value = latest[key]
            # Of 0.03 TFLOP/s nobody reads anything.
            is_rate = key == "model_tflops"
            costs.append(form.format(f"{formatting.flops(1e12 * value)}/s" if is_rate else value))
    if history.energy_j:
        costs.append(f"{history.energy_j / 3.6e6:.3g} kWh")
    if history.gpu_hours:
        costs.append(f"{history.gpu_hours:.3g} GPU-hours")
    if newest.dropped_fraction:
        speed.append(f"{newest.dropped_fraction:.1%} dropped")
    if newest.tau is not None:
        speed.append(f"tau {newest.tau:.3f}")
    rows = (speed, costs, _sources(newest))
    return [line for parts in rows if parts for line in _packed(parts, width)]


def _sources(newest: StepMetrics) -> list[str]:
    """Loss and FFN share of the data sources with the most tokens."""
    tokens, shares = newest.source_tokens or {}, newest.source_ffn_share or {}
    names = sorted(tokens, key=lambda name: -tokens[name])
    parts = []
    for name in names[:_MOST_SOURCES]:
        loss = (newest.source_loss or {}).get(name, math.nan)
        share = f", FFN {shares[name]:.2f}" if name in shares else ""
        parts.append(f"{printable(name, keep='')} {tokens[name]:.0%}: loss {loss:.3f}{share}")
    left_out = len(names) - _MOST_SOURCES
    return [*parts, f"{left_out} more sources"] if left_out > 0 else parts


def _alerts(run: LiveRun, width: int, glyphs: Glyphs) -> list[Text]:
    """The newest alerts, newest first."""
    if not run.alerts:
        return []
    shown: Sequence[Alert] = [*run.alerts][: -_MOST_ALERTS - 1 : -1]
    count = Text(f"  {run.alert_counts.total()}", style="bold")
    lines = [_heading("alerts", count, width, glyphs)]
    for alert in shown:
        lines.append(
            _cut(
                Text(printable(alert.text(), keep=""), style=_SEVERITY_STYLES[alert.severity]),
                width,
            )
        )
    return lines


def _heading(name: str, text: Text, width: int, glyphs: Glyphs) -> Text:
    line = Text(name, style="bold")
    line.append_text(text)
    line = _cut(line, width)
    rest = width - line.cell_len - 1
    if rest > 0:
        line.append(" " + glyphs.line * rest, style="dim not bold")
    return line


def _packed(parts: Sequence[str], width: int) -> list[Text]:
    """Put parts side by side, on as many lines as they need."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + 3 + len(part) <= width:
            lines[-1] += f" | {part}"
        else:
            lines.append(part)
    return [_cut(Text(line), width) for line in lines]


def _cut(text: Text, width: int) -> Text:
    """Cut a text to one line of `width` columns; an alert's words may hold anything."""
    text = text.copy()
    text.plain = " ".join(text.plain.splitlines()) if "\n" in text.plain else text.plain
    text.no_wrap = True
    text.truncate(width, overflow="ellipsis")
    return text
