"""`pilot.html`: does MoE++ pay, and how certain is the answer? One screen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from moepp_megatron.tools.experiments.pilot.result import (
    ArmKind,
    ArmOutcome,
    Interval,
    PilotResult,
)
from moepp_megatron.tools.experiments.pilot.verdict import LEVEL, SPEED_LIMIT
from moepp_megatron.tools.report import formatting
from moepp_megatron.tools.report.blocks import (
    Card,
    Cell,
    Page,
    PageSection,
    Plot,
    Table,
    Text,
    number,
    write_blocks,
)
from moepp_megatron.tools.report.drawing import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    VERMILION,
    plot_style,
    smooth,
)
from moepp_megatron.tools.report.lines import Frame, PlotLine, line_plot
from moepp_megatron.tools.report.series import Series
from moepp_megatron.tools.report.terminal import print_uncut, table_of

_ARM_COLUMNS = (
    *("Arm", "Steps", "Validation loss", "Less vanilla's", "Step", "Of vanilla's"),
    "FFN share",
)
_COLOURS: dict[ArmKind, str] = {
    "vanilla": INK,
    "moepp": BLUE,
    "equal_time": GREEN,
    "narrow": VERMILION,
    "short": MUTED,
}
# The start of training is the same fall for all; what is compared comes later.
_DRAWN_FROM = 0.2
_NOTHING = "-"
# Columns of the page that fit a terminal.
_IN_TERMINAL = (
    *("Arm", "Steps", "Validation loss", "Less vanilla's", "Of vanilla's", "FFN share"),
)


def write_pilot_page(result: PilotResult, out: Path) -> Path:
    """Write the page, which needs no other file and no network.

    Returns:
        `out`.

    Raises:
        ReportError: It cannot be written; an existing page is then unchanged.
    """
    with plot_style():
        plot = _difference_plot(result)
    setting = result.setting
    page = Page(
        kind="MoE++ pilot",
        name=setting.config,
        title=result.sentence,
        facts=_facts(result),
        cards=_cards(result),
        sections=[
            PageSection("", [plot, _arm_table(result)]),
            PageSection("", [Text(_limits(result), "note", fold="How to read it, and its limits")]),
        ],
        sources="pilot.json",
        command=setting.command,
    )
    return write_blocks(out, page)


def print_pilot(result: PilotResult) -> None:
    """Print the arms with 95% intervals, and the answer last."""
    verdict = result.verdict
    print_uncut(
        table_of(_arm_table(result), _IN_TERMINAL),
        f"step of MoE++ over vanilla's: {verdict.speed.mean:.3f} in {result.setting.sessions} "
        f"sessions, {verdict.speed_in_runs.mean:.3f} in the runs",
        result.sentence,
    )


def _arm_table(result: PilotResult) -> Table:
    """A row of numbers for every arm."""
    return Table(_ARM_COLUMNS, [_row(each) for each in result.arms])


def _row(outcome: ArmOutcome) -> list[Cell]:
    return [
        Cell(outcome.arm.name),
        number(f"{outcome.arm.steps:,}"),
        number(formatting.number(outcome.valid_loss.mean)),
        number(*_with_ends(outcome.loss_difference, "+,.4f")),
        number(_seconds(outcome.step_time_s.mean)),
        number(*_with_ends(outcome.time_ratio, ".3f")),
        number(formatting.percent(outcome.ffn_share.mean)),
    ]


def _with_ends(found: Interval | None, form: str) -> tuple[str, str]:
    """The mean, and the ends of its interval."""
    if found is None:
        return _NOTHING, ""
    if found.low is None or found.high is None:
        return f"{found.mean:{form}}", ""
    return f"{found.mean:{form}}", f"{found.low:{form}} to {found.high:{form}}"


def _seconds(value: float) -> str:
    return f"{value * 1e3:,.1f} ms" if value < 1 else f"{value:,.3f} s"


def _cards(result: PilotResult) -> list[Card]:
    verdict, setting = result.verdict, result.setting
    time, ends = _with_ends(verdict.time_to_loss, ".3f")
    in_time, time_ends = _with_ends(verdict.loss_in_time, "+,.4f")
    in_compute, compute_ends = _with_ends(verdict.loss_in_compute, "+,.4f")
    speed, speed_ends = _with_ends(verdict.speed, ".3f")
    look = f"look {setting.look}" if setting.look else "no look yet"
    return [
        Card(
            "Does MoE++ pay?",
            verdict.answer,
            f"{look}; the next one after {setting.next_seeds} seeds",
            accent=True,
        ),
        Card("Loss less vanilla's, same time", in_time, time_ends or "one seed"),
        Card("Loss less narrowed vanilla's, same compute", in_compute, compute_ends or "one seed"),
        Card("Time to vanilla's loss", time, ends or "not known from these runs"),
        Card(
            "Step, of vanilla's",
            speed,
            f"{speed_ends}; in the runs {verdict.speed_in_runs.mean:.3f}"
            + ("" if verdict.speeds_agree else ": too far apart to decide"),
            accent=not verdict.speeds_agree,
        ),
    ]


def _facts(result: PilotResult) -> list[str]:
    setting = result.setting
    seeds = len(result.arms[0].seeds)
    return [
        f"{seeds} seed{'' if seeds == 1 else 's'}, {setting.sessions} sessions of speed",
        f"{setting.steps:,} steps, {formatting.big_count(setting.tokens)} tokens",
        f"{formatting.big_count(setting.parameters)} parameters, tau {setting.tau:g}",
        f"{setting.nproc} x {setting.device}",
        setting.began,
    ]


def _limits(result: PilotResult) -> list[str]:
    setting, value = result.setting, result.token_value
    mean, ends = _with_ends(value, ".4f")
    lines = [
        "It pays if its loss is clearly lower than vanilla's after vanilla's time, and clearly "
        "lower than that of a vanilla model with narrower experts and the same compute. Losses are "
        "in nats, intervals 95%, curves smoothed means over seeds. An e-fold of tokens is worth "
        f"{mean} nats to vanilla{f' ({ends})' if ends else ''}.",
        f'"Pays" is wrong in {LEVEL:.1%} of pilots at most, however often they are extended '
        f"(one-sided level of this look: {setting.level:.3g}), if the noise of a run is normal and "
        "equally large in every arm. Nothing that rests on speed is decided where runs and "
        f"sessions differ by more than {SPEED_LIMIT:.0%}.",
        f"{setting.steps:,} steps of this model show neither longer training nor a larger model, "
        "and one learning rate may suit one of the models better.",
    ]
    if not setting.on_gpu:
        lines.append("Speed on a CPU says nothing about a GPU's: experts run one after the other.")
    versions = f"torch {setting.torch} and megatron-core {setting.megatron_core}"
    return [*lines, f"Measured with {versions}, {setting.cores} processor cores."]


def _difference_plot(result: PilotResult) -> Plot:
    vanilla, *others = result.arms
    x, reference = _smooth_curve(vanilla)
    lines = []
    for each in others:
        # A shorter schedule is compared at its end only.
        if not len(x) or each.arm.steps != vanilla.arm.steps:
            continue
        tokens, values = _smooth_curve(each)
        kept = (tokens >= x[0]) & (tokens <= x[-1])
        gap = values[kept] - np.interp(tokens[kept], x, reference)
        # Differences are small against their noise.
        lines.append(_line(each, tokens[kept], smooth(gap, len(gap) // 20)))
    title, axis = "Training loss less vanilla's, same tokens", "nats (below 0: better)"
    return _plot(title, axis, lines, [("vanilla", 0.0)])


def _smooth_curve(outcome: ArmOutcome) -> tuple[np.ndarray, np.ndarray]:
    tokens, losses = (np.array(each, dtype=np.float64) for each in vars(outcome.curve).values())
    return tokens, smooth(losses) if len(losses) >= 12 else losses


def _line(outcome: ArmOutcome, tokens: np.ndarray, values: np.ndarray) -> PlotLine:
    return PlotLine(outcome.arm.name, Series(tokens, values), _COLOURS[outcome.arm.kind], raw=True)


def _plot(
    title: str, axis: str, lines: list[PlotLine], levels: Sequence[tuple[str, float]] = ()
) -> Plot:
    """Lines over tokens, from where they are worth comparing."""
    if not lines:
        return Plot(title, "", None, "Too few records to draw.")
    start = _DRAWN_FROM * max(float(max(line.points.x, default=0)) for line in lines)
    late = []
    for line in lines:
        x, y = line.points
        kept = x >= start if np.count_nonzero(x >= start) > 1 else x >= 0
        late.append(replace(line, points=Series(x[kept], y[kept])))
    return line_plot(title, "", late, Frame(axis, x="tokens", height=2.1, levels=levels))
