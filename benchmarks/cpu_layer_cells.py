"""Efficiency of the MoE++ layer on a CPU, cell by cell, of one or two versions of the code in turn.

    python -P benchmarks/cpu_layer_cells.py OUT.jsonl --before CHECKOUT    # measure
    python -P benchmarks/cpu_layer_cells.py OUT.jsonl --report             # the table only

A cell is a shape of the paper, a tau, a dtype and a pass of `moepp bench layer`; its efficiency is
speed-up times phi. Each process measures one version's cells of a dtype, shape and tau: the two
layers take turns with only the FFN experts' products, once with the rows that an expert of the
MoE++ layer gets and once with those of a vanilla layer's. Versions take turns by process. A cell
that was measured is not measured again. `-P` keeps this folder's names out of the imports of the
other version.

What explains a cell: `products` is the efficiency that the layer would have if it did nothing but
these products, `experts` if it did nothing but its FFN experts (products, SwiGLU, gates), and `row`
the time of a product's row among few over one among many. `faults` are pages that the kernel gave
to the MoE++ layer's pass. `ms` is the MoE++ layer's time, its products' alone, the vanilla
layer's, and the largest parts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
SHAPES = ("0.6B", "1B")
TAUS = (0.1, 0.25, 0.5, 0.75, 1.0)
DTYPES = ("fp32", "bf16")
PASSES = ("forward", "forward_backward")
TOKENS = 4096
ROUNDS = 5
_CELL = ("dtype", "shape", "pass", "tau", "rows")
_HEADS = (*_CELL, "before", "now", "experts", "products", "row", "faults", "ms")


def measure_here(dtype: str, shape_name: str, tau: float) -> list[dict[str, Any]]:
    """Both passes' cells, with the package that is imported."""
    from moepp_megatron.runtime.optional import quiet
    from moepp_megatron.tools.bench.clock import interleaved, speedup
    from moepp_megatron.tools.bench.contestants import Contestant, single_process
    from moepp_megatron.tools.bench.layer import parts_ms
    from moepp_megatron.tools.bench.shapes import SHAPES as PAPER

    quiet()
    shape = PAPER[shape_name]
    cells: list[dict[str, Any]] = []
    with single_process():
        vanilla = Contestant(shape, 1.0, dtype, TOKENS, vanilla=True)
        moepp = Contestant(shape, tau, dtype, TOKENS, vanilla=False)
        layers = {"vanilla": vanilla, "moepp": moepp}
        parts = {
            name: parts_ms(layer.layer, layer.forward_only, ROUNDS)
            for name, layer in layers.items()
        }
        for name in PASSES:
            method = {"forward": "forward_only"}.get(name, name)
            turns = {key: getattr(layer, method) for key, layer in layers.items()}
            for key, layer in layers.items():
                turns[f"{key}_products"] = _products(shape, dtype, layer.load.rows, name)
            turns["moepp_experts"] = _experts(moepp, name)
            faults: dict[str, list[int]] = {key: [] for key in turns}
            turns = {key: _counting_faults(run, faults[key]) for key, run in turns.items()}
            times = interleaved(turns, ROUNDS, warmup=2)
            phi = shape.experts.phi(tau)
            cell: dict[str, Any] = {}
            cell |= {"dtype": dtype, "shape": shape_name, "tau": tau, "pass": name, "phi": phi}
            cell["rows"] = moepp.load.rows // shape.experts.num_ffn_experts
            cell["efficiency"] = speedup(times["vanilla"], times["moepp"]) * phi
            for key in ("experts", "products"):
                cell[key] = speedup(times["vanilla"], times[f"moepp_{key}"]) * phi
            products_ms = [times[f"{key}_products"].median_ms for key in ("moepp", "vanilla")]
            cell["row"] = products_ms[0] / products_ms[1] * vanilla.load.rows / moepp.load.rows
            cell["faults"] = {key: median(counts[-ROUNDS:]) for key, counts in faults.items()}
            cell["ms"] = {key: value.median_ms for key, value in times.items()}
            cells.append(cell)
        cells[0]["parts_ms"] = parts
        cells[1]["backward_ms"] = _backward_ms(moepp.forward_backward)
    return [_rounded(cell) for cell in cells]


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return round(value, 3) if isinstance(value, float) else value


def _backward_ms(forward_backward: Callable[[], None]) -> dict[str, float]:
    """Milliseconds of a pass by node of its backward graph, as the profiler sees them."""
    from torch.profiler import ProfilerActivity, profile

    prefix = "autograd::engine::evaluate_function: "
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(ROUNDS):
            forward_backward()
    return {
        event.key.removeprefix(prefix): event.cpu_time_total / ROUNDS / 1e3
        for event in profiled.key_averages()
        if event.key.startswith(prefix)
    }


def _products(shape: Any, dtype: str, rows: int, name: str) -> Callable[[], None]:
    """The FFN experts' products alone, each expert with the same number of rows.

    As in a layer, each expert has rows and weights of its own, which no cache holds, and the
    gradients of all weights exist at the end.
    """
    import torch

    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    hidden, width, count = shape.hidden_size, shape.ffn_hidden_size, shape.experts.num_ffn_experts

    def of_experts(*size: int) -> tuple[torch.Tensor, ...]:
        return (torch.randn(count, *size, dtype=kind) * 0.02).unbind()

    each = rows // count
    weights_in, weights_out = of_experts(2 * width, hidden), of_experts(hidden, width)
    tokens, outputs = of_experts(each, hidden), of_experts(each, hidden)
    activated, projected = of_experts(each, width), of_experts(each, 2 * width)
    linear = torch.ops.mkldnn._linear_pointwise

    def forward() -> None:
        for x, inner, weight_in, weight_out in zip(
            tokens, activated, weights_in, weights_out, strict=True
        ):
            linear(x, weight_in, None, "none", [], "")
            linear(inner, weight_out, None, "none", [], "")

    def backward() -> None:
        grads = []
        for number in range(count):
            torch.mm(outputs[number], weights_out[number])
            grads.append(torch.mm(outputs[number].t(), activated[number]))
            torch.mm(projected[number], weights_in[number])
            grads.append(torch.mm(projected[number].t(), tokens[number]))

    def both() -> None:
        with torch.no_grad():
            forward()
            if name != "forward":
                backward()

    return both


def _experts(contestant: Any, name: str) -> Callable[[], None]:
    """The MoE++ layer's FFN experts alone, on rows that are sorted already."""
    import torch

    layer, rows = contestant.layer, contestant.load.rows
    experts, count = layer.experts, layer.config.num_moe_experts
    grad = torch.randn(rows, layer.config.hidden_size, dtype=layer.config.params_dtype)
    tokens = torch.randn_like(grad, requires_grad=True)
    gates = torch.rand(rows, requires_grad=True)
    each = torch.full((count,), rows // count)
    each[: rows % count] += 1

    def run() -> None:
        if name == "forward":
            with torch.no_grad():
                experts(tokens, each, gates)
            return
        experts(tokens, each, gates)[0].backward(grad)
        tokens.grad = gates.grad = None
        for parameter in experts.parameters():
            parameter.grad = None

    return run


def _counting_faults(run: Callable[[], None], faults: list[int]) -> Callable[[], None]:
    """`run`, which notes how many pages the kernel gave it."""
    from resource import RUSAGE_SELF, getrusage

    def counted() -> None:
        before = getrusage(RUSAGE_SELF).ru_minflt
        run()
        faults.append(getrusage(RUSAGE_SELF).ru_minflt - before)

    return counted


def _measure(out: Path, versions: dict[str, Path]) -> None:
    cells = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    done = {(cell["version"], cell["dtype"], cell["shape"], cell["tau"]) for cell in cells}
    for dtype in DTYPES:
        for shape in SHAPES:
            for tau in TAUS:
                for version, checkout in versions.items():
                    if (version, dtype, shape, tau) in done:
                        continue
                    command = [sys.executable, "-P", __file__, "-", "--cell", dtype, shape]
                    environment = os.environ | {"PYTHONPATH": str(checkout)}
                    answer = subprocess.run(
                        [*command, str(tau)], env=environment, stdout=subprocess.PIPE, check=True
                    )
                    measured = json.loads(answer.stdout.splitlines()[-1])
                    cells += [{"version": version, **cell} for cell in measured]
                    partial = out.with_suffix(".partial")
                    partial.write_text("".join(f"{json.dumps(cell)}\n" for cell in cells))
                    partial.replace(out)


def _report(cells: list[dict[str, Any]]) -> None:
    print(f"| {' | '.join(_HEADS)} |\n{'|---' * len(_HEADS)}|")
    by_key: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for cell in cells:
        key = tuple(cell[name] for name in _CELL)
        by_key.setdefault(key, {})[cell["version"]] = cell
    for key, versions in sorted(by_key.items(), key=lambda item: [str(part) for part in item[0]]):
        if "now" not in versions:
            continue
        now = versions["now"]
        before = f"{versions['before']['efficiency']:.2f}" if "before" in versions else ""
        parts = now["backward_ms"] if "backward_ms" in now else now["parts_ms"]["moepp"]
        largest = sorted(parts.items(), key=lambda part: -part[1])[:6]
        where = ", ".join(f"{part} {ms:.1f}" for part, ms in largest)
        names = ("efficiency", "experts", "products", "row")
        numbers = " | ".join(f"{now[name]:.2f}" for name in names)
        ms = now["ms"]
        times = f"{ms['moepp']:.1f} (products {ms['moepp_products']:.1f}; {ms['vanilla']:.0f})"
        columns = (*key, before, numbers, now["faults"]["moepp"], f"{times} {where}")
        print(f"| {' | '.join(map(str, columns))} |")


def main() -> None:
    """Measure or report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--before", type=Path, help="checkout of the version to compare with")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--cell", nargs=3, metavar=("DTYPE", "SHAPE", "TAU"))
    options = parser.parse_args()
    if options.cell:
        dtype, shape, tau = options.cell
        print(json.dumps(measure_here(dtype, shape, float(tau))))
        return
    if not options.report:
        versions = {"before": options.before} if options.before else {}
        _measure(options.out, {**versions, "now": ROOT})
    _report([json.loads(line) for line in options.out.read_text().splitlines()])


if __name__ == "__main__":
    main()
