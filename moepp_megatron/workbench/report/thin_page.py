"""`thin.html`: what a model that takes fewer FFN experts has lost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from moepp_megatron.config import load_config
from moepp_megatron.config.flops import forward_flops_per_token
from moepp_megatron.file_names import CONFIG_FILE
from moepp_megatron.observe.metrics import StepMetrics
from moepp_megatron.workbench.report import blocks, formatting
from moepp_megatron.workbench.report.drawing import LINE_COLOURS, PAPER, plot_style
from moepp_megatron.workbench.report.lines import Frame, Line, line_plot
from moepp_megatron.workbench.report.run_data import load_run
from moepp_megatron.workbench.report.series import finite
from moepp_megatron.workbench.report.summary import summarize

# Of a run: FFN experts a token, FLOP of its forward pass, steps trained, and losses by set.
_Numbers = tuple[float, float, int, dict[str, float]]
_HEAD = ("Model", "Steps", "FFN experts a token", "Expert FLOP removed", "FLOP removed")
_CAPTION = (
    "Losses are on validation sets, nats per token, with the rise over the model's own. Removed: "
    "FLOP of a token's forward pass, of the FFN experts and of the whole model, by the FFN share "
    "of the last tenth of the run's records. A start is before its training, which lowers a loss "
    "by itself where the model has not learnt the text: compare with `control` after as many steps."
)
_PLOT = "Each recipe from its start (hollow) to the end of its training. The model's own is at 0%."
# Of a loss, relative: the rounding of bf16 averages out far below it.
_SAME = 1e-3


def at_step_0(model: StepMetrics | None, start: StepMetrics | None) -> tuple[bool, str]:
    """Whether two finished runs have the same validation losses, and both in words."""
    own, begin = _losses(model), _losses(start)
    said = [f"{name}: loss {begin[name]:.4f}, the model's own {own[name]:.4f}" for name in own]
    return all(abs(begin[name] / own[name] - 1) < _SAME for name in own), "; ".join(said)


def _losses(record: StepMetrics | None) -> dict[str, float]:
    """By set, nats; `all data` is what is trained on."""
    assert record is not None, "a finished run has records"
    data = {} if record.valid_loss is None else {"all data": record.valid_loss}
    return {**data, **(record.valid_set_loss or {})}


def _numbers(run: Path) -> _Numbers:
    data, config = load_run(run), load_config(run / CONFIG_FILE)
    share, last = summarize(data).settled_ffn_fraction, data.records[-1]
    flops, steps = forward_flops_per_token(config, share), last.step if last.step > 1 else 0
    return share * config.moe.router_topk, flops, steps, _losses(last)


def _plot(part: str, found: Mapping[str, _Numbers]) -> blocks.Plot:
    """How far the loss on one set has risen over the expert FLOP removed, a line a recipe."""
    experts, *_, own = next(iter(found.values()))
    lines, starts = [], [name for name in found if name.endswith("-start")]
    for start, colour in zip(starts, LINE_COLOURS, strict=False):
        recipe = start.removesuffix("-start")
        ends = [found[name] for name in (start, recipe) if name in found]
        removed = np.array([100 * (1 - taken / experts) for taken, *_ in ends])
        rise = np.array([losses.get(part, math.nan) / own[part] - 1 for *_, losses in ends])
        lines.append(Line(recipe, finite(removed, rise), colour, marker="o"))
    x, y = (np.concatenate([line.points[axis][:1] for line in lines]) for axis in (0, 1))
    frame = Frame(
        *("rise of the loss", formatting.percent, "expert FLOP removed (%)"),
        change=lambda axes: axes.plot(x, y, "o", color=PAPER, markersize=2.5),
    )
    return line_plot(f"Loss, {part}", _PLOT, lines, frame)


def write_thin_page(out: Path, runs: Mapping[str, Path], title: str, command: str) -> blocks.Table:
    """Write the page, which needs no other file.

    Args:
        out: The page.
        runs: Folders of runs by the names of their rows; the first is of the model as it was, and
            the start of RECIPE is RECIPE-start.
        title: The model's name.
        command: What makes the page again.

    Returns:
        Its table: FLOP removed against loss, a row for each run.
    """
    found = {name: _numbers(run) for name, run in runs.items()}
    experts, flops, _, own = next(iter(found.values()))
    rows = []
    for name, (taken, its_flops, steps, losses) in found.items():
        left = (taken / experts, its_flops / flops)
        shown = [f"{steps:,}", formatting.number(taken, 2)]
        shown += [f"{1 - share:.1%}" for share in left]
        for part, loss in own.items():
            its_loss = losses.get(part, math.nan)
            shown.append(f"{formatting.number(its_loss)} ({its_loss / loss - 1:+.2%})")
        rows.append([blocks.Cell(name), *map(blocks.number, shown)])
    table = blocks.Table((*_HEAD, *(f"Loss, {part}" for part in own)), rows, _CAPTION)
    with plot_style():
        plots = [_plot(part, found) for part in own]
    section = blocks.Section("FLOP removed against loss kept", [*plots, table])
    kind, sources = "MoE++ model thinned", "config.yaml and metrics.jsonl of the runs"
    blocks.write_blocks(out, blocks.Page(kind, title, sources, command, sections=[section]))
    return table
