"""`moepp plan` on the terminal, as JSON, and as a plot of where the time goes."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from moepp_megatron.runtime.atomic import write_result
from moepp_megatron.runtime.terminal import Console
from moepp_megatron.workbench.planning.coster import GIB
from moepp_megatron.workbench.planning.links import placement
from moepp_megatron.workbench.planning.plan import Plan
from moepp_megatron.workbench.planning.planned import Planned
from moepp_megatron.workbench.report import formatting
from moepp_megatron.workbench.report.drawing import BLUE, GREEN, INK, MUTED, STYLE, VERMILION

_LOG_WIDTH = 120

# Bars: the legend's names and colours, and the names in `StepTime.seconds` that they add up.
_BARS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("FFN experts", BLUE, ("experts", "shared_expert", "dense_ffn")),
    ("attention", "#56b4e9", ("attention",)),
    (
        "router, permutation, zero-computation, norms",
        "#9aa5b1",
        ("router", "permutation", "zero_computation", "norms"),
    ),
    ("embedding, output layer, loss", "#52606d", ("output",)),
    ("recomputation", "#f0e442", ("recomputation",)),
    ("expert exchange, exposed", VERMILION, ("expert exchange",)),
    ("tensor and context parallel", "#e69f00", ("tensor parallel", "context parallel")),
    ("pipeline: bubble and transfers", "#cc79a7", ("pipeline bubble", "pipeline transfers")),
    ("data parallel, optimizer", GREEN, ("data parallel", "optimizer")),
)

_WHY = {
    "work": "slower computation: smaller or repeated products, or products beside an exchange",
    "recompute": "recomputation that the best does without",
    "network": "exposed communication (experts, tensor, context, stages)",
    "bubble": "pipeline bubble",
    "end": "data-parallel exchange or optimizer that nothing hides",
}


def _console() -> Console:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _LOG_WIDTH
    return console


def print_plan(plan: Plan, tokens: float, price: float | None) -> None:
    """Print the best layouts, why the others lose, and a comparison of the models."""
    console = _console()
    load = plan.layouts[0].step.load if plan.layouts else None
    hardware = plan.machine.hardware
    console.print(
        f"{plan.search.legal:,} legal layouts on {plan.world:,} {hardware.name}, "
        f"{plan.search.legal - len(plan.search.over):,} of them fit "
        f"{plan.machine.memory_bytes / GIB:.1f} GiB"
    )
    console.print(_layouts(plan))
    for number, planned in enumerate(plan.layouts, start=1):
        console.print(f"{number}  {explain(plan, planned)}", soft_wrap=True)
    console.print()
    for line in _losses(plan):
        console.print(line, soft_wrap=True)
    if plan.best is None:
        return
    console.print(_models(plan, tokens, price))
    if load is not None and load.mean > 1:
        console.print(
            f"fullest rank over mean, in a layer: {load.mean:.2f} on average (half of the layers "
            f"below {load.median:.2f}, nine in ten below {load.p90:.2f}); times hold the average",
            soft_wrap=True,
        )
    console.print("estimates: docs/planning.md says how well they hold", soft_wrap=True)


def _layouts(plan: Plan) -> Table:
    table = Table(title="layouts, best first", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("", "TP", "CP", "PP", "VPP", "EP", "ETP", "DP", "MBS"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("recompute, overlap")
    for name in ("GiB", "step s", "tok/s/GPU", "TFLOP/s", "MFU", "a2a"):
        table.add_column(name, justify="right", no_wrap=True)
    for number, planned in enumerate(plan.layouts, start=1):
        grid = planned.grid
        degrees = (grid.tp, grid.cp, grid.pp, grid.vpp, grid.ep, grid.etp, grid.dp)
        extras = list(grid.recompute) + (["a2a overlap"] if grid.expert_overlap else [])
        table.add_row(
            str(number) if planned.fits else "no",
            *(str(degree) for degree in degrees),
            str(grid.micro_batch),
            ", ".join(extras) or "-",
            f"{planned.memory_gib:.1f}",
            f"{planned.step.total:.3f}",
            f"{planned.tokens_per_s_per_gpu:,.0f}",
            f"{planned.tflops_per_gpu:.0f}",
            f"{planned.mfu:.1%}",
            _size(planned.step.exchange_bytes),
        )
    return table


def explain(plan: Plan, planned: Planned) -> str:
    """One line on a layout: its time by parts, the links of its exchange, its losses."""
    if not planned.fits:
        over = planned.memory_gib - plan.machine.memory_bytes / GIB
        return f"does not fit: {over:.1f} GiB too many on the fullest rank"
    step = planned.step
    shares = {name: seconds / step.total for name, seconds in _bars(step.seconds).items()}
    largest = sorted(shares.items(), key=lambda item: -item[1])[:3]
    text = ", ".join(f"{name} {share:.0%}" for name, share in largest)
    place = placement(planned.grid, "ep", plan.machine.per_node)
    if place.size == 1:
        text += "; no token travels"
    elif place.nodes == 1:
        text += "; tokens travel by NVLink alone"
    else:
        text += f"; tokens travel over {place.nodes} nodes"
    best = plan.best
    if best is None or planned is best:
        return text
    slower = step.total / best.step.total - 1
    ours, theirs = _bars(step.seconds), _bars(best.step.seconds)
    name = max(ours, key=lambda key: ours[key] - theirs[key])
    more = (ours[name] - theirs[name]) / best.step.total
    return f"+{slower:.1%} ({name} +{more:.1%}); {text}"


def _losses(plan: Plan) -> list[str]:
    search = plan.search
    lines = []
    if search.over:
        lines.append(
            f"memory: {len(search.over):,} layouts do not fit, half of them by more than "
            f"{median(search.over) / GIB:,.1f} GiB"
        )
    for name, count in sorted(search.lost.items(), key=lambda item: -item[1]):
        lines.append(
            f"{count:,} lose most by {_WHY[name]}: half of them take over "
            f"{search.gaps[name]:.0%} longer"
        )
    return lines


def _models(plan: Plan, tokens: float, price: float | None) -> Table:
    title = f"MoE++ beside vanilla, each in its best layout; {formatting.big_count(tokens)} tokens"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("model")
    for name in ("phi", "step s", "speed-up", "tok/s/GPU", "a2a", "days", "GPU hours"):
        table.add_column(name, justify="right", no_wrap=True)
    if price is not None:
        table.add_column("money", justify="right", no_wrap=True)
    table.add_column("layout")
    best = plan.best
    assert best is not None, "only a plan with a layout that fits is compared"
    base = next((planned for planned in plan.baselines if planned.kind == "vanilla"), best)
    for planned in models(plan):
        hours = plan.hours(planned, tokens)
        name = "vanilla" if planned.tau is None else f"MoE++ tau {planned.tau:g}"
        row = [
            name if planned.fits else f"{name} (does not fit)",
            f"{planned.ffn_share:.3f}",
            f"{planned.step.total:.3f}",
            f"{base.step.total / planned.step.total:.2f}",
            f"{planned.tokens_per_s_per_gpu:,.0f}",
            _size(planned.step.exchange_bytes),
            f"{hours / 24:,.1f}",
            f"{hours * plan.world:,.0f}",
        ]
        if price is not None:
            row.append(f"{hours * plan.world * price:,.0f}")
        table.add_row(*row, _short_name(planned))
    return table


def _size(count: float) -> str:
    """Format bytes as GB or TB."""
    if count >= 10e12:
        return f"{count / 1e12:,.0f} TB"
    return f"{count / 1e9:,.0f} GB" if count else "0"


def models(plan: Plan) -> list[Planned]:
    """The best layout of each model: vanilla first, then by tau."""
    best = [plan.best] if plan.best else []
    return sorted([*plan.baselines, *best], key=lambda one: (one.tau is not None, -(one.tau or 0)))


def _short_name(planned: Planned) -> str:
    """A layout's degrees above 1, such as TP2 PP8 EP64 MBS1."""
    grid = planned.grid
    replicas = [f"DP{grid.dp}"] if grid.dp > 1 else []
    return " ".join([*grid.splits, *replicas, f"MBS{grid.micro_batch}"])


def _bars(seconds: Mapping[str, float]) -> dict[str, float]:
    """Seconds by the plot's names, which cover the whole time."""
    known = {part for _, _, parts in _BARS for part in parts}
    assert known >= seconds.keys(), f"no bar for {seconds.keys() - known}"
    return {name: sum(seconds.get(part, 0.0) for part in parts) for name, _, parts in _BARS}


def write_json(path: Path, plan: Plan, simulation: Mapping[str, Any] | None = None) -> None:
    """Write a list of layouts, those that fit first, then by step time.

    Args:
        path: The file.
        plan: The plan.
        simulation: The simulation of the best layout, for its key `simulation`.
    """
    layers = plan.config.model.num_layers
    ordered = sorted(
        [*plan.layouts, *plan.baselines], key=lambda one: (not one.fits, one.step.total)
    )
    records = [planned.record(layers) for planned in ordered]
    if simulation is not None:
        # By value, for a baseline may be faster than the best layout of the configured model.
        records[ordered.index(plan.layouts[0])]["simulation"] = dict(simulation)
    text = json.dumps(records, indent=1)
    write_result(path, (text + "\n").encode())


def plot(path: Path, plan: Plan) -> None:
    """Plot stacked bars: the first layouts, and each model in its best layout."""
    entries: list[tuple[str, Planned]] = []
    for planned in models(plan):
        name = "vanilla" if planned.tau is None else f"MoE++ tau {planned.tau:g}"
        entries.append((f"{name}\n{_short_name(planned)}", planned))
    for number, planned in enumerate(plan.layouts[1:], start=2):
        entries.append((f"layout {number}\n{_short_name(planned)}", planned))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 1.9 + 0.46 * len(entries)), layout="constrained")
        axis = figure.subplots()
        _draw(axis, entries)
        hardware = plan.machine.hardware.name
        axis.set_title(
            f"Where a step's time goes: {plan.config.run.name or 'model'} on "
            f"{plan.world:,} {hardware} (estimate)",
            loc="left",
            color=INK,
        )
        figure.legend(
            *axis.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8.5
        )
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=150)
    write_result(path, content.getvalue())


def _draw(axis: Axes, entries: Sequence[tuple[str, Planned]]) -> None:
    places = range(len(entries))
    left = [0.0] * len(entries)
    columns = [_bars(planned.step.seconds) for _, planned in entries]
    for name, colour, _ in _BARS:
        values = [column[name] for column in columns]
        if any(values):
            axis.barh(places, values, left=left, color=colour, label=name, height=0.68)
        left = [start + value for start, value in zip(left, values, strict=True)]
    for place, total, (_, planned) in zip(places, left, entries, strict=True):
        text = f" {total:.2f} s, {planned.tokens_per_s_per_gpu:,.0f} tokens/s/GPU"
        axis.text(total, place, text, va="center", fontsize=8.5, color=MUTED)
    axis.set_yticks(list(places), [name for name, _ in entries], fontsize=8.5)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.28 * max(left))
    axis.set_xlabel("seconds per step")
    axis.grid(axis="y", visible=False)
