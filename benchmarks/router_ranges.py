"""The ranges of docs/routing.md: least and greatest values in the second half of runs.

    moepp train configs/quickstart.yaml --nproc 2 run.dir=runs/healthy
    moepp train configs/quickstart.yaml --nproc 2 run.dir=runs/unbalanced moe.balance_coeff=0
    python -m benchmarks.router_ranges runs/healthy runs/unbalanced

Prints one row for each metric and one column for each run; a range is over layers and steps.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from moepp_megatron.observe.metrics import StepMetrics, read_metrics
from moepp_megatron.workbench.report.run_data import RunConfig, load_run


def values(records: list[StepMetrics], config: RunConfig) -> dict[str, list[float]]:
    """Metric -> its values of all layers and steps."""
    num_ffn = config.moe.num_ffn_experts
    found: dict[str, list[float]] = {}

    def add(name: str, numbers: Iterable[float]) -> None:
        found.setdefault(name, []).extend(each for each in numbers if math.isfinite(each))

    for record in records:
        add("ffn_fraction", [record.ffn_fraction])
        add("layer_ffn_fraction", record.layer_ffn_fraction or [])
        add("max_ffn_load (layer)", _loads(record, num_ffn, max))
        add("idlest FFN expert", _loads(record, num_ffn, min))
        add("dropped_fraction", [record.dropped_fraction])
        for name, by_layer in (record.router_health or {}).items():
            add(name, by_layer)
    return found


def _loads(record: StepMetrics, num_ffn: int, pick: type[max] | type[min]) -> Iterator[float]:
    """Of each layer, one FFN expert's selections over the FFN experts' mean."""
    for shares in record.layer_expert_share or []:
        ffn = shares[:num_ffn]
        yield pick(ffn) * num_ffn / sum(ffn)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    runs = parser.parse_args().runs
    table = Table("metric", *(str(run) for run in runs))
    columns = []
    for run in runs:
        records = read_metrics(run / "metrics.jsonl")
        half = [each for each in records if each.step > records[-1].step // 2]
        columns.append(values(half, load_run(run).config))
        print(f"{run}: steps {half[0].step} to {half[-1].step}")
        histogram = half[-1].layer_ffn_histogram
        if histogram:
            print("  last layer, tokens by FFN experts:", [f"{each:.0%}" for each in histogram[-1]])
        losses = [each.loss_by_ffn for each in half if each.loss_by_ffn]
        print("  loss by FFN experts, newest two:", losses[-2:])
    for name in columns[0]:
        cells = [column.get(name, []) for column in columns]
        table.add_row(name, *(f"{min(c):.3f} to {max(c):.3f}" if c else "null" for c in cells))
    Console().print(table)


if __name__ == "__main__":
    main()
