"""`pilot.html`: does MoE++ pay, and how certain is the answer? The same lines in the terminal."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from moepp_megatron.tools.experiments.pilot.pilot import Outcomes, PilotResult
from moepp_megatron.tools.experiments.statistics import Interval
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
from moepp_megatron.tools.report.drawing import LINE_COLOURS, plot_style
from moepp_megatron.tools.report.lines import Frame, PlotLine, line_plot
from moepp_megatron.tools.report.series import finite
from moepp_megatron.tools.report.terminal import print_uncut, table_of

_HEAD = ("Arm", "Steps", "Validation loss", "Less vanilla's", "Step, of vanilla's", "FFN share")
# The start of training is the same fall for all; what is compared comes later.
_DRAWN_FROM = 0.2
_LIMITS = (
    "MoE++ pays if its loss is clearly lower than vanilla's after vanilla's time, and than that of "
    "a vanilla model with narrower experts and the same compute. Losses are in nats, intervals "
    "95%. docs/pilot.md says what decides.",
    "A short training of this model shows neither longer training nor a larger model, and one "
    "learning rate may suit one of the models better. Speed on a CPU says nothing about a GPU's.",
)


def write_pilot_page(result: PilotResult, runs: Outcomes, out: Path) -> Path:
    """Write the page to `out`, and return that; ReportError if it cannot be written."""
    with plot_style():
        plot = _difference_plot(result, runs)
    blocks: list[Block] = [plot, _arm_table(result), Text(_LIMITS, "note")]
    page = Page(
        kind="MoE++ pilot",
        title=result.sentence,
        lead="\n".join(_lines(result)),
        sections=[PageSection("", blocks)],
        sources="pilot.json",
        command=result.command,
    )
    return write_blocks(out, page)


def print_pilot(result: PilotResult) -> None:
    """Print the arms with 95% intervals, and the answer last."""
    print_uncut(table_of(_arm_table(result)), *_lines(result), result.sentence)


def _lines(result: PilotResult) -> Iterator[str]:
    """The numbers that decide, and how they were measured."""
    found = result.verdict
    time, runs = found.time_to_loss, found.speed_in_runs.mean
    yield f"loss after vanilla's time, less vanilla's: {_text(found.loss_in_time, '+.4f')} nats"
    yield f"loss less narrowed vanilla's: {_text(found.loss_in_compute, '+.4f')} nats"
    if time is not None:
        yield f"time to vanilla's loss, of vanilla's: {_text(time, '.3f')}"
    far = "" if found.speeds_agree else ", too far apart to decide"
    speed = f"{_text(found.speed, '.3f')} in sessions, {runs:.3f} in the runs"
    yield f"step, of vanilla's: {speed}{far}"
    yield (
        f"look {result.look}, at a one-sided level of {result.level:.3g}; the next one after "
        f"{result.next_seeds} seeds"
    )


def _arm_table(result: PilotResult) -> Table:
    rows = []
    for arm in result.arms:
        rows.append(
            [
                Cell(arm.name),
                number(f"{arm.steps:,}"),
                number(formatting.number(arm.valid_loss.mean)),
                number("-" if arm.loss_difference is None else _text(arm.loss_difference, "+.4f")),
                number("-" if arm.time_ratio is None else _text(arm.time_ratio, ".3f")),
                number(formatting.percent(arm.ffn_share.mean)),
            ]
        )
    return Table(_HEAD, rows)


def _text(found: Interval, form: str) -> str:
    """The mean, with the ends of its interval if it has one."""
    if found.low is None or found.high is None:
        return f"{found.mean:{form}}"
    return f"{found.mean:{form}} ({found.low:{form}} to {found.high:{form}})"


def _difference_plot(result: PilotResult, runs: Outcomes) -> Plot:
    """Training loss less vanilla's with the same seed, means over seeds."""
    lines = []
    for arm, colour in zip(result.arms[1:], LINE_COLOURS, strict=False):
        # A shorter schedule is compared at its end only.
        if arm.kind == "short":
            continue
        mine, vanilla = (
            [runs[kind][seed].curve for seed in result.seeds] for kind in (arm.kind, "vanilla")
        )
        x = mine[0].x[mine[0].x >= _DRAWN_FROM * mine[0].x[-1]]
        gaps = [
            np.interp(x, *one) - np.interp(x, *other, right=np.nan)
            for one, other in zip(mine, vanilla, strict=True)
        ]
        lines.append(PlotLine(arm.name, finite(x, np.mean(gaps, axis=0)), colour))
    frame = Frame("nats (below 0: better)", x="tokens", levels=[("vanilla", 0.0)], wide=True)
    return line_plot("Training loss less vanilla's, same tokens", "", lines, frame)
