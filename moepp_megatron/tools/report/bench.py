"""Results of `moepp bench` as tables."""

from collections.abc import Callable, Sequence
from typing import Any

from moepp_megatron.runtime.terminal import Console
from moepp_megatron.tools.report.terminal import titled_table, wide_console

_Result = dict[str, Any]
# Columns: their names, and a result's text in them.
_TIMES: dict[str, Callable[[_Result], str]] = {
    "shape": lambda r: r["shape"],
    "tau": lambda r: f"{r['tau']:g}",
    "pass": lambda r: {"forward": "forward", "forward_backward": "fwd + bwd"}[r["pass"]],
    "vanilla": lambda r: f"{r['vanilla_ms']:.1f}",
    "MoE++": lambda r: f"{r['moepp_ms']:.1f}",
    "speedup": lambda r: f"{r['speedup']:.2f}",
    "efficiency": lambda r: f"{r['efficiency']:.3f}",
    "paper": lambda r: "" if r["paper_efficiency"] is None else f"{r['paper_efficiency']:.2f}",
}
_PARTS = ("router", "dispatch", "experts", "zero_computation", "combine", "rest")


def print_layers(results: Sequence[_Result]) -> None:
    """Print times and efficiency next to the paper's; then parts, memory and bounds."""
    console = wide_console(highlight=True)
    title = "MoE++ layer against megatron-core's MoE layer, milliseconds"
    table = titled_table(title, *_TIMES, words=3)
    for result in results:
        table.add_row(*(show(result) for show in _TIMES.values()))
    console.print(table)
    console.print("efficiency = speedup x phi: how much of the possible speed-up is reached\n")
    _print_parts(console, results)
    first = results[0]
    console.print(
        f"bound: bytes over the measured copy ({first['copy_gb_s']:.0f} GB/s), or FLOPs over the "
        f"measured product ({first['matmul_tflops']:.3g} TFLOP/s) of {first['device']}, whichever "
        "is longer"
    )


def _print_parts(console: Console, results: Sequence[_Result]) -> None:
    title = "Forward pass: milliseconds a part (times its bound); kept for the backward pass, MB"
    shown = (name.replace("_", " ") for name in (*_PARTS, "overhead", "kept", "experts TFLOP/s"))
    table = titled_table(title, "shape", "tau", "phi", *shown, words=3)
    seen: set[object] = set()
    for r in results:
        for side, tau, phi, overhead in (
            ("vanilla", "vanilla", "1", ""),
            ("moepp", f"{r['tau']:g}", f"{r['phi']:.3f}", f"{r['overhead']:.1%}"),
        ):
            if (r["shape"], tau) not in seen:
                seen.add((r["shape"], tau))
                kept, rate = r[f"{side}_kept_bytes"], r[f"{side}_experts_tflops"]
                parts = [_part(r, side, name) for name in _PARTS]
                cells = (overhead, f"{kept / 1e6:.0f}", f"{rate:.3g}")
                table.add_row(r["shape"], tau, phi, *parts, *cells)
    console.print(table)
    console.print("overhead = all but the FFN experts, as a share of the vanilla layer's time")


def _part(result: _Result, side: str, name: str) -> str:
    milliseconds = result[f"{side}_parts_ms"].get(name, 0.0)
    bound = result[f"{side}_bounds_ms"].get(name)
    return f"{milliseconds:.1f}" + (f" ({milliseconds / bound:.1f})" if bound else "")


def print_step(result: _Result) -> None:
    """Print both models' step times and bytes."""
    ranks, tokens = result["ranks"], result["tokens"]
    title = f"Training step on {ranks} rank{'s' if ranks > 1 else ''}, tau {result['tau']:g}, "
    title += f"{tokens} tokens"
    names = ("model", "FFN share", "ms per step", "tokens/s", "all-to-all MB")
    table = titled_table(title, *names, words=1)
    shares = {"vanilla": 1.0, "moepp": result["measured_ffn_fraction"]}
    for model, name in (("vanilla", "vanilla"), ("moepp", "MoE++")):
        milliseconds, sent = result[f"{model}_ms"], result[f"{model}_a2a_bytes"]
        rate = tokens / milliseconds * 1e3
        numbers = (f"{milliseconds:.1f}", f"{rate:,.0f}", f"{sent / 1e6:.1f}")
        table.add_row(name, f"{shares[model]:.3f}", *numbers)
    if (milliseconds := result.get("static_rows_ms")) is not None:
        rate = tokens / milliseconds * 1e3
        table.add_row("static rows", "", f"{milliseconds:.1f}", f"{rate:,.0f}", "")
    console = Console()
    console.print(table)
    console.print(
        f"MoE++ is {result['speedup']:.2f} times as fast (median of the rounds' ratios); "
        f"without anything but FFN experts it could be {1 / result['phi']:.2f} times"
    )
