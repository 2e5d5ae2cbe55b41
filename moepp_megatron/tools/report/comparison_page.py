"""`comparison.html`: several runs, what differs between them and what came of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from moepp_megatron.tools.report import formatting
from moepp_megatron.tools.report.blocks import (
    Block,
    Cell,
    Page,
    PageSection,
    Plot,
    Table,
    Text,
    number,
    write_blocks,
)
from moepp_megatron.tools.report.comparison import (
    ComparedRun,
    ComparedSetting,
    common_end,
    differing_settings,
    load_runs,
    loss_at,
    losses_differ_in_meaning,
)
from moepp_megatron.tools.report.drawing import LINE_COLOURS, envelope, plot_style, short_name
from moepp_megatron.tools.report.lines import Dashes, Frame, PlotLine, line_plot
from moepp_megatron.tools.report.series import finite

DEFAULT_OUT = Path("comparison.html")
# A configuration that somebody has made up may have thousands.
_MOST_SETTINGS = 300
_HEADINGS = (
    "Steps",
    "Tokens",
    "Loss",
    "Validation",
    "FFN share",
    "Step time",
    "Tokens/s",
    "Training time",
    "Model FLOP",
)
_RESULTS = (
    "Loss and FFN share: means over the last tenth of a run's records. Validation: the newest, "
    "with its step. Step time and tokens/s: medians. Model FLOP: forward and backward pass, "
    "without experts that tokens did not take."
)

_DASHES: tuple[Dashes, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)))
# Colours first, then the next dashes.
_LOOKS = [(colour, dashes) for dashes in _DASHES for colour in LINE_COLOURS]

Axis = Callable[[ComparedRun], np.ndarray | None]


def build_comparison(folders: Sequence[Path], out: Path = DEFAULT_OUT) -> Path:
    """Write a page that lays runs over each other.

    The page is ASCII, needs no other file and makes no network requests. The same inputs give
    the same bytes.

    Returns:
        `out`.

    Raises:
        ReportError: A run is missing, incomplete or inconsistent, or the page cannot be written.
    """
    return write_blocks(out, _page(load_runs(folders)))


def _page(runs: Sequence[ComparedRun]) -> Page:
    settings = differing_settings(runs)
    names = [run.name for run in runs]
    with plot_style():
        plots = _plots(runs)
    results = [[Cell(run.name), *map(number, _results(run))] for run in runs]
    sections = [
        PageSection("Results", [Table(("Run", *_HEADINGS), results, _RESULTS)]),
        PageSection("Curves", plots),
        PageSection("Settings that differ", [_settings(settings, names)]),
    ]
    losses = _losses(runs)
    if losses is not None:
        sections.insert(1, PageSection("Loss where all have come equally far", [losses]))
    named = [setting for setting in settings if setting.name != "run.name"]
    differ = "1 setting differs" if len(named) == 1 else f"{len(named)} settings differ"
    return Page(
        kind="MoE++ runs compared",
        title=", ".join(names),
        lead=f"{len(runs)} runs; {differ} besides their folders and names.",
        warnings=_warnings(runs, settings),
        sections=sections,
        sources="config.yaml and metrics.jsonl of each run",
        command="moepp report RUN RUN...",
    )


def _settings(settings: Sequence[ComparedSetting], names: Sequence[str]) -> Block:
    if not settings:
        return Text(["All settings are equal but for the folders."], "nothing")
    rows = [
        [Cell(setting.name, "code"), *map(Cell, setting.values)]
        for setting in settings[:_MOST_SETTINGS]
    ]
    caption = "From each run's config.yaml; a dash: the run has no such setting."
    if len(settings) > _MOST_SETTINGS:
        caption += f" {len(settings) - _MOST_SETTINGS} more are not shown."
    return Table(("ComparedSetting", *names), rows, caption)


def _warnings(runs: Sequence[ComparedRun], settings: Sequence[ComparedSetting]) -> list[str]:
    warnings = []
    names = losses_differ_in_meaning(settings)
    if names:
        warnings.append(f"Losses may not be comparable: {', '.join(names)} differ.")
    short = [
        f"{run.name} ({run.summary.last_step:,} of {run.data.config.training.train_iters:,})"
        for run in runs
        if run.summary.last_step < run.data.config.training.train_iters
    ]
    if short:
        warnings.append(
            f"Not all planned steps are done: {', '.join(short)}. A learning rate that has not "
            "fallen to its end keeps a loss up."
        )
    return warnings


def _results(run: ComparedRun) -> list[str]:
    summary = run.summary
    planned = run.data.config.training.train_iters
    step_time = _finite_median(run.data.numbers.values("step_time_s"))
    valid = "none"
    if summary.valid_loss is not None:
        valid = f"{formatting.number(summary.valid_loss)} at {summary.valid_step:,}"
    flops = math.nan if run.flops is None else float(run.flops[-1])
    return [
        f"{summary.last_step:,} of {planned:,}",
        formatting.big_count(summary.tokens),
        _shown(summary.settled_loss, formatting.number(summary.settled_loss)),
        valid,
        formatting.percent(summary.settled_ffn_fraction),
        _shown(step_time, f"{formatting.significant(step_time)} s"),
        formatting.count(summary.tokens_per_s),
        formatting.duration(summary.train_seconds),
        _shown(flops, formatting.flops(flops)),
    ]


def _losses(runs: Sequence[ComparedRun]) -> Table | None:
    """The runs' losses where each has come equally far, by tokens, time and FLOPs."""
    places: list[tuple[list[np.ndarray | None], Callable[[float], str]]] = [
        ([run.tokens for run in runs], lambda end: f"{formatting.big_count(end)} tokens"),
        ([run.seconds for run in runs], formatting.duration),
        ([run.flops for run in runs], formatting.flops),
    ]
    headings: list[str] = []
    columns: list[list[str]] = []
    for axes, show in places:
        end = common_end(axes)
        if end is None:
            continue
        headings.append(show(end))
        values = [
            math.nan if axis is None else loss_at(run, axis, end)
            for run, axis in zip(runs, axes, strict=True)
        ]
        columns.append([_shown(value, formatting.number(value)) for value in values])
    if not headings:
        return None
    rows = [
        [Cell(run.name), *(number(column[i]) for column in columns)] for i, run in enumerate(runs)
    ]
    caption = "As far as the shortest run reaches; means over the last tenth before it."
    return Table(("Training loss (nats) after", *headings), rows, caption)


def _finite_median(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else math.nan


def _shown(value: float, text: str) -> str:
    return text if math.isfinite(value) else "-"


def _plots(runs: Sequence[ComparedRun]) -> list[Plot]:
    """Loss over tokens, time and FLOPs; FFN share and step time over tokens."""

    def validation(axes: Axes) -> None:
        for run, (colour, _) in zip(runs, _LOOKS, strict=False):
            x, y = finite(run.tokens, run.data.numbers.values("valid_loss"))
            axes.plot(*envelope(x, y), "D", color=colour, markersize=4.5)

    loss, seconds = "loss (nats)", "training time (s)"
    return [
        _plot(
            runs,
            "Loss over tokens",
            _tokens,
            "loss",
            "Token mean over the global batch. Diamonds: validation loss.",
            Frame(loss, x="tokens", wide=True, height=4.0, change=validation),
        ),
        _plot(
            runs,
            "Loss over time",
            lambda r: r.seconds,
            "loss",
            "Time in training steps, without start, evaluation and checkpoints. It compares "
            "machines and layouts as well as models.",
            Frame(loss, x=seconds, height=3.6),
        ),
        _plot(
            runs,
            "Loss over FLOPs",
            lambda r: r.flops,
            "loss",
            "Forward and backward pass; experts that tokens did not take do not count.",
            Frame(loss, x="model FLOP", height=3.6),
        ),
        _plot(
            runs,
            "FFN share of all selections",
            _tokens,
            "ffn_fraction",
            "What lies below 100% is expert work that was not done.",
            Frame("FFN share", formatting.percent, "tokens", 0, 1.02, height=3.6),
        ),
        _plot(
            runs,
            "Step time",
            _tokens,
            "step_time_s",
            "Wall time of a step. Single slow steps, as the first, may lie above the picture.",
            Frame("seconds", x="tokens", height=3.6, change=_without_peaks),
        ),
    ]


def _tokens(run: ComparedRun) -> np.ndarray:
    return run.tokens


def _without_peaks(axes: Axes) -> None:
    """Cut the axis where the first step, which warms up, would flatten all others."""
    medians = [np.median(np.asarray(line.get_ydata(), np.float64)) for line in axes.get_lines()]
    axes.set_ylim(0, min(axes.get_ylim()[1], 3 * max(medians)))


def _plot(
    runs: Sequence[ComparedRun], title: str, axis: Axis, key: str, caption: str, frame: Frame
) -> Plot:
    """One number of all runs over one axis; runs without two points are named instead."""
    lines, absent = [], []
    for run, (colour, dashes) in zip(runs, _LOOKS, strict=False):
        x = axis(run)
        points = finite(*(2 * [np.empty(0)] if x is None else (x, run.data.numbers.values(key))))
        if len(points.x) < 2:
            absent.append(run.name)
        else:
            lines.append(PlotLine(short_name(run.name), points, colour, dashes))
    if absent:
        caption += f" Fewer than two points: {', '.join(absent)}."
    if not lines:
        return Plot(title, caption, None, f"No run has two finite points ({', '.join(absent)}).")
    return line_plot(title, caption, lines, frame)
