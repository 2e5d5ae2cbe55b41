"""Results of `moepp bench`: tables, JSON, and a plot with the paper's numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from matplotlib.axes import Axes

from moepp_megatron.runtime.atomic import write_result
from moepp_megatron.runtime.terminal import Console
from moepp_megatron.tools.bench.layer import LayerResult
from moepp_megatron.tools.bench.step import TimedStep
from moepp_megatron.tools.report.drawing import BLUE, INK, MUTED, VERMILION, png_figure
from moepp_megatron.tools.report.terminal import titled_table, wide_console

_PASS_COLOURS = {"forward": BLUE, "forward_backward": VERMILION}
_PASS_NAMES = {"forward": "forward", "forward_backward": "fwd + bwd"}


def print_table(results: Sequence[LayerResult]) -> None:
    """Print times and efficiency next to the paper's; then parts and memory."""
    console = wide_console(highlight=True)
    title = "MoE++ layer against megatron-core's MoE layer, milliseconds"
    names = ("shape", "tau", "pass", "vanilla", "MoE++", "speedup", "efficiency", "paper")
    table = titled_table(title, *names, words=3)
    for r in results:
        paper = "" if r.paper_efficiency is None else f"{r.paper_efficiency:.2f}"
        table.add_row(
            r.shape,
            f"{r.tau:g}",
            _PASS_NAMES[r.pass_name],
            f"{r.vanilla_ms:.1f}",
            f"{r.moepp_ms:.1f}",
            f"{r.speedup:.2f}",
            f"{r.efficiency:.3f}",
            paper,
        )
    console.print(table)
    console.print("efficiency = speedup x phi: how much of the possible speed-up is reached\n")
    _print_parts(console, results)


def _print_parts(console: Console, results: Sequence[LayerResult]) -> None:
    names = list(dict.fromkeys(part for r in results for part in r.moepp_parts_ms))
    title = "Forward pass, milliseconds a part; kept for the backward pass, MB"
    shown = (name.replace("_", " ") for name in (*names, "overhead", "kept"))
    table = titled_table(title, "shape", "tau", "phi", *shown, words=3)
    seen: set[object] = set()
    for r in results:
        if r.shape not in seen:
            vanilla = [f"{r.vanilla_parts_ms.get(name, 0.0):.1f}" for name in names]
            table.add_row(r.shape, "vanilla", "1", *vanilla, "", _megabytes(r.vanilla_kept_bytes))
            seen.add(r.shape)
        if (r.shape, r.tau) not in seen:
            moepp_ms = [f"{r.moepp_parts_ms[name]:.1f}" for name in names]
            row = (r.shape, f"{r.tau:g}", f"{r.phi:.3f}", *moepp_ms, f"{r.overhead:.1%}")
            table.add_row(*row, _megabytes(r.moepp_kept_bytes))
            seen.add((r.shape, r.tau))
    console.print(table)
    console.print("overhead = all but the FFN experts, as a share of the vanilla layer's time")


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.0f}"


def write_json(path: Path, results: Sequence[LayerResult]) -> None:
    """Write a list of objects: the results' fields, with `pass`, `efficiency` and `overhead`."""
    records = []
    for result in results:
        record = asdict(result)
        record["pass"] = record.pop("pass_name")
        records.append({**record, "efficiency": result.efficiency, "overhead": result.overhead})
    write_result(path, (json.dumps(records, indent=1) + "\n").encode())


def plot(path: Path, results: Sequence[LayerResult]) -> None:
    """Plot efficiency over tau, one panel per shape, with the paper's in grey."""
    shapes = list(dict.fromkeys(r.shape for r in results))
    top = max(1.15, 1.08 * max(r.efficiency for r in results))
    with png_figure(path, 1.2 + 3.4 * len(shapes), 3.4) as figure:
        axes = figure.subplots(1, len(shapes), sharey=True, squeeze=False)[0]
        for axis, shape in zip(axes, shapes, strict=True):
            _panel(axis, [r for r in results if r.shape == shape], top)
        axes[0].set_ylabel("efficiency = speedup x phi")
        first = results[0]
        figure.suptitle(
            f"How much of the possible speed-up is reached ({first.dtype}, {first.tokens} tokens)",
            x=0.01,
            ha="left",
            fontsize=11,
        )


def _panel(axis: Axes, results: Sequence[LayerResult], top: float) -> None:
    axis.axhline(1.0, color=INK, linewidth=0.8)
    axis.axhline(0.95, color=MUTED, linewidth=0.8, linestyle=":")
    for name, colour in _PASS_COLOURS.items():
        chosen = sorted((r for r in results if r.pass_name == name), key=lambda r: r.tau)
        if chosen:
            values = [r.efficiency for r in chosen]
            axis.plot([r.tau for r in chosen], values, "o-", color=colour, label=_PASS_NAMES[name])
    known = {r.tau: r.paper_efficiency for r in results if r.paper_efficiency is not None}
    if known:
        taus = sorted(known)
        values = [known[tau] for tau in taus]
        axis.plot(taus, values, "s--", color=MUTED, markersize=4, label="paper, forward, GPU")
    axis.set_title(results[0].shape, loc="left", fontsize=10)
    axis.set_xlabel("tau")
    axis.set_ylim(0, top)
    axis.legend(loc="lower right", fontsize=8)


def print_step(result: TimedStep) -> None:
    """Print both models' step times and bytes."""
    title = f"Training step on {result.ranks} rank{'s' if result.ranks > 1 else ''}, tau "
    title += f"{result.tau:g}, {result.tokens} tokens"
    names = ("model", "FFN share", "ms per step", "tokens/s", "all-to-all MB")
    table = titled_table(title, *names, words=1)
    rows = (
        ("vanilla", 1.0, result.vanilla_ms, result.vanilla_a2a_bytes),
        ("MoE++", result.measured_ffn_fraction, result.moepp_ms, result.moepp_a2a_bytes),
    )
    for name, share, milliseconds, sent in rows:
        rate = result.tokens / milliseconds * 1e3
        table.add_row(
            name, f"{share:.3f}", f"{milliseconds:.1f}", f"{rate:,.0f}", f"{sent / 1e6:.1f}"
        )
    console = Console()
    console.print(table)
    console.print(
        f"MoE++ is {result.speedup:.2f} times as fast (median of the rounds' ratios); "
        f"without anything but FFN experts it could be {1 / result.phi:.2f} times"
    )


def write_records(path: Path, results: object) -> None:
    """Write one object, or a list of objects, with the fields of the results."""
    records = (
        [asdict(result) for result in results] if isinstance(results, list) else asdict(results)  # type: ignore[call-overload]
    )
    write_result(path, (json.dumps(records, indent=1) + "\n").encode())


_PARTS = ("router", "dispatch", "experts", "zero_computation", "combine")


def print_bounds(results: Sequence[LayerResult]) -> None:
    """Print each part's time over its bound on this GPU, and the experts' rate."""
    first = results[0]
    title = (
        f"Forward pass of the MoE++ layer on {first.device}, {first.dtype}: "
        "time of each part over its bound"
    )
    shown = (name.replace("_", " ") for name in (*_PARTS, "experts TFLOP/s", "of product"))
    table = titled_table(title, "shape", "tau", *shown, words=2)
    seen: set[object] = set()
    for r in results:
        if (r.shape, r.tau) not in seen:
            seen.add((r.shape, r.tau))
            ratios = [_ratio(r.moepp_parts_ms.get(n), r.moepp_bounds_ms.get(n)) for n in _PARTS]
            rate = r.moepp_experts_tflops
            table.add_row(
                r.shape, f"{r.tau:g}", *ratios, f"{rate:.3g}", f"{rate / r.matmul_tflops:.0%}"
            )
    console = wide_console(highlight=True)
    console.print(table)
    console.print(
        f"bound: bytes over the measured copy ({first.copy_gb_s:.0f} GB/s), or FLOPs over the "
        f"measured product ({first.matmul_tflops:.3g} TFLOP/s), whichever is longer"
    )


def _ratio(milliseconds: float | None, bound: float | None) -> str:
    if not milliseconds or not bound:
        return ""
    return f"{milliseconds / bound:.1f}"
