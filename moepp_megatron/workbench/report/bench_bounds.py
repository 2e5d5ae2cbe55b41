"""Prints results of `moepp bench card`, and of `bench layer` beside the GPU's bounds."""

from __future__ import annotations

from collections.abc import Sequence

from moepp_megatron.runtime.terminal import Console
from moepp_megatron.workbench.bench.card import CardResult, card_obstacle
from moepp_megatron.workbench.bench.layer import LayerResult
from moepp_megatron.workbench.report.terminal import titled_table, wide_console

_PARTS = ("router", "dispatch", "experts", "zero_computation", "combine")


def print_card(result: CardResult, asked: Sequence[str]) -> None:
    """Print measured beside rated numbers, and missing formats with the reason."""
    on_cpu = "" if result.kind == "cuda" else f", {result.threads} threads"
    names = ("measured", "", "rated", "share")
    table = titled_table(f"{result.device}{on_cpu}", *names, words=1)
    for dtype in asked:
        rate = result.matmul_tflops.get(dtype)
        what = f"{dtype} product of {result.matmul_size}"
        if rate is None:
            table.add_row(what, card_obstacle(dtype) or "", "", "")
        else:
            table.add_row(what, *_beside(rate, result.rated_tflops.get(dtype), "TFLOP/s"))
    table.add_row("copy in memory", *_beside(result.copy_gb_s, result.rated_gb_s, "GB/s"))
    Console().print(table)


def print_bounds(results: Sequence[LayerResult]) -> None:
    """Print each part's time over its bound on this GPU, and the experts' rate."""
    first = results[0]
    title = (
        f"Forward pass of the MoE++ layer on {first.device}, {first.dtype}: "
        "time of each part over its bound"
    )
    table = titled_table(title, "shape", "tau", words=2)
    for name in (*_PARTS, "experts TFLOP/s", "of product"):
        table.add_column(name.replace("_", " "), justify="right")
    seen: set[object] = set()
    for r in results:
        if (r.shape, r.tau) not in seen:
            seen.add((r.shape, r.tau))
            ratios = [_ratio(r.moepp_parts_ms.get(n), r.moepp_bounds_ms.get(n)) for n in _PARTS]
            rate = r.moepp_experts_tflops
            table.add_row(
                r.shape, f"{r.tau:g}", *ratios, f"{rate:.3g}", f"{rate / r.matmul_tflops:.0%}"
            )
    console = wide_console(highlight=True, width=110)
    console.print(table)
    console.print(
        f"bound: bytes over the measured copy ({first.copy_gb_s:.0f} GB/s), or FLOPs over the "
        f"measured product ({first.matmul_tflops:.3g} TFLOP/s), whichever is longer"
    )


def _beside(value: float, rated: float | None, unit: str) -> tuple[str, str, str]:
    measured = f"{value:,.3g} {unit}" if value < 1000 else f"{value:,.0f} {unit}"
    if rated is None:
        return measured, "", ""
    return measured, f"{rated:,.0f} {unit}", f"{value / rated:.0%}"


def _ratio(milliseconds: float | None, bound: float | None) -> str:
    if not milliseconds or not bound:
        return ""
    return f"{milliseconds / bound:.1f}"
