"""Step times of CPU ranks: a calibration, and what the cost model says of layouts outside it.

    python -m benchmarks.cpu_step_times --json benchmarks/results/cpu_step_times.json

For 1 and 2 ranks in turn, torchrun starts ranks once; they build one layout of the quickstart model
after the other and take steps of it, in several passes over all layouts, every second one
backwards, so that a machine that gets slower meets all alike. A layout's time is the median of its
steps. Matrix products and the optimizer alone are timed too; exchanges are not, because in a step
each waits for the rank that comes last, which alone they do not show. From the layouts that
`LAYOUTS` calls "fit" and from these small measurements `benchmarks/calibration.py` takes the
machine's eight numbers; the other layouts are predicted. Every visit is written at once: started
again, the command goes on where it was. With `--report` it only reads the file. A rank computes
with one thread.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
_EP1 = "parallel.expert_model_parallel_size=1"
_TP2 = ("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true")
_PP2 = "parallel.pipeline_model_parallel_size=2"
_VPP2 = "parallel.virtual_pipeline_model_parallel_size=2"
_CP2 = "parallel.context_parallel_size=2"
_FULL = (
    "training.recompute_granularity=full",
    "training.recompute_method=uniform",
    "training.recompute_num_layers=1",
)
_MOE = ("training.recompute_granularity=selective", "training.recompute_modules=[moe]")
_VANILLA = (
    "moe.num_zero_experts=0",
    "moe.num_copy_experts=0",
    "moe.num_constant_experts=0",
    "moe.gating_residual=false",
)


def _micro(sequences: int) -> str:
    return f"training.micro_batch_size={sequences}"


# Ranks -> name -> set and what differs from configs/quickstart.yaml (EP2, 4 micro-batches of 4
# sequences in all, tau 0.75).
LAYOUTS: dict[int, dict[str, tuple[str, tuple[str, ...]]]] = {
    1: {
        "1 rank": ("fit", (_EP1,)),
        "1 rank, vanilla, mb 1": ("fit", (_EP1, _micro(1), *_VANILLA)),
        "1 rank, mb 2": ("held out", (_EP1, _micro(2))),
        "1 rank, recompute all": ("held out", (_EP1, *_FULL)),
        "1 rank, tau 0.1": ("held out", (_EP1, "moe.tau=0.1")),
    },
    2: {
        "EP2": ("fit", ()),
        "EP2, mb 1": ("fit", (_micro(1),)),
        "EP2, vanilla": ("fit", _VANILLA),
        "EP2, recompute all": ("fit", _FULL),
        "DP2": ("fit", (_EP1,)),
        "DP2, tau 0.1, mb 8": ("fit", (_EP1, "moe.tau=0.1", _micro(8))),
        "TP2": ("fit", (*_TP2, _EP1)),
        "PP2": ("fit", (_PP2, _EP1)),
        "CP2": ("fit", (_CP2, _EP1)),
        "EP2, mb 2": ("held out", (_micro(2),)),
        "EP2, mb 8": ("held out", (_micro(8),)),
        "EP2, tau 0.1": ("held out", ("moe.tau=0.1",)),
        "EP2, dedup": ("held out", ("moe.dispatcher=alltoall_dedup",)),
        "EP2, allgather": ("held out", ("moe.dispatcher=allgather",)),
        "EP2, recompute moe": ("held out", _MOE),
        "TP2 EP2": ("held out", _TP2),
        "TP2 ETP2": ("held out", (*_TP2, _EP1, "parallel.expert_tensor_parallel_size=2")),
        "TP2, mb 8": ("held out", (*_TP2, _EP1, _micro(8))),
        "PP2, mb 2": ("held out", (_PP2, _EP1, _micro(2))),
        "PP2 VPP2, mb 2": ("held out", (_PP2, _VPP2, _EP1, _micro(2))),
        "PP2, vanilla, mb 1": ("held out", (_PP2, _EP1, _micro(1), *_VANILLA)),
        "CP2 EP2": ("held out", (_CP2,)),
        "DP2, mb 1": ("held out", (_EP1, _micro(1))),
        "DP2, vanilla": ("held out", (_EP1, *_VANILLA)),
    },
}
# Rows, columns, inner dimension: the quickstart model's experts, projections, gradients, logits.
PRODUCTS = (
    (1024, 576, 192),
    (1024, 4096, 192),
    (4096, 192, 1024),
    (128, 1024, 192),
    (1024, 192, 128),
    (32, 1024, 192),
    (1024, 192, 32),
)
# Elements of the embedding.
TABLE = 4096 * 192


class Visits:
    """What has been measured, on disk after each visit.

    Args:
        path: The file; may exist.
        writes: Whether this process writes it.
    """

    def __init__(self, path: Path, writes: bool) -> None:
        self._path, self._writes = path, writes
        self.entries: list[dict[str, Any]] = []
        if path.exists():
            self.entries = json.loads(path.read_text())["visits"]

    def has(self, **keys: object) -> bool:
        """Whether a visit with these values is there."""
        return any(all(e.get(k) == v for k, v in keys.items()) for e in self.entries)

    def add(self, entry: dict[str, Any]) -> None:
        """Keep a visit and write the file."""
        from moepp_megatron.runtime.atomic import write_atomic

        self.entries.append(entry)
        if self._writes:
            content = {"cores": cores(), "visits": self.entries}
            write_atomic(self._path, (json.dumps(content, indent=1) + "\n").encode())


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def configuration(settings: tuple[str, ...], folder: str = "unused") -> Any:
    """The quickstart model with these settings."""
    from moepp_megatron.config import load_config

    return load_config(QUICKSTART, [f"run.dir={folder}", *settings])


def measure(path: Path, passes: int, steps: int) -> None:
    """On every rank: all layouts of this number of ranks, in passes."""
    import torch
    import torch.distributed as dist

    from moepp_megatron.runtime.distributed import joined
    from moepp_megatron.runtime.quiet import quiet
    from moepp_megatron.runtime.rank import RankEnvironment

    quiet()
    logging.disable()
    rank = RankEnvironment.read()
    with joined(rank), tempfile.TemporaryDirectory() as folder:
        torch.set_num_threads(1)
        visits = Visits(path, rank.rank == 0)
        ranks = dist.get_world_size()
        for number in range(passes):
            if not visits.has(ranks=ranks, round=number, layout="parts"):
                parts = [*_time_products(), _time_optimizer()]
                entry = {"ranks": ranks, "round": number, "layout": "parts", "parts": parts}
                visits.add(entry)
            names = list(LAYOUTS[ranks])
            for name in names[:: 1 if number % 2 == 0 else -1]:
                if visits.has(ranks=ranks, round=number, layout=name):
                    continue
                seconds = _time_layout(LAYOUTS[ranks][name][1], folder, steps)
                visits.add({"ranks": ranks, "round": number, "layout": name, "seconds": seconds})
                if rank.rank == 0:
                    print(f"{ranks} ranks, pass {number}, {name}: {seconds}", flush=True)


def _time_layout(settings: tuple[str, ...], folder: str, steps: int) -> list[float]:
    """Seconds of steps after one that warms up."""
    import torch.distributed as dist

    from benchmarks.fresh_ranks import forget_model
    from moepp_megatron.config import Layout
    from moepp_megatron.runtime.distributed import build_groups
    from moepp_megatron.workbench.bench.step import Stepper

    config = configuration(settings, folder)
    layout = Layout.from_config(config, dist.get_world_size())
    build_groups(config, layout)
    stepper = Stepper(config, layout)
    stepper.step()
    seconds = [_seconds(stepper.step) for _ in range(steps)]
    del stepper
    forget_model()
    return seconds


def _seconds(work: Callable[[], object]) -> float:
    """Seconds of a call, from all ranks' start to all ranks' end."""
    import torch.distributed as dist

    dist.barrier()
    began = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - began


def _time_products() -> list[list[Any]]:
    """Rows, columns, inner dimension, seconds of each of `PRODUCTS`."""
    import torch

    found = []
    for m, n, k in PRODUCTS:
        left, right = torch.randn(m, k), torch.randn(k, n)
        repeats = max(int(2e9 / (2 * m * n * k)), 1)
        multiply = partial(torch.mm, left, right)
        found.append(["product", m, n, k, _processor_seconds(multiply, repeats)])
    return found


def _time_optimizer() -> list[Any]:
    """Parameters and seconds of their update."""
    import torch

    weight = torch.nn.Parameter(torch.randn(TABLE))
    weight.grad = torch.randn_like(weight)
    optimizer = torch.optim.AdamW([weight], lr=1e-3)
    return ["optimizer", weight.numel(), _processor_seconds(optimizer.step, 10)]


def _processor_seconds(work: Callable[[], object], repeats: int) -> float:
    """Processor seconds a call that waits for nobody, all ranks at once; median of three."""
    import torch.distributed as dist

    work()
    times = []
    for _ in range(3):
        dist.barrier()
        began = time.process_time()
        for _ in range(repeats):
            work()
        times.append((time.process_time() - began) / repeats)
    return statistics.median(times)


def read_rates(path: Path) -> Any:
    """Rates of a file of results."""
    from moepp_megatron.workbench.planning.cpu_rates import parse_rates

    return parse_rates(json.loads(path.read_text()).get("rates"), str(path))


def _single_operations(content: dict[str, Any]) -> list[Any]:
    """Observations of operations alone: the median of each; processor time knows no turns."""
    from benchmarks import calibration

    times: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for visit in content["visits"]:
        for *key, seconds in visit.get("parts", []):
            times[visit["ranks"], *key].append(seconds)
    found = []
    for (ranks, kind, *sizes), seconds in times.items():
        median = statistics.median(seconds)
        if kind == "product":
            at_once = min(ranks, content["cores"])
            found.append(calibration.product_observation(tuple(sizes), at_once, median))
        else:
            found.append(calibration.optimizer_observation(sizes[0], median))
    return found


def _layouts(content: dict[str, Any]) -> list[tuple[str, str, int, Any]]:
    """Set, name, ranks and observation of every layout, the calibration's first."""
    from benchmarks.calibration import layout_observation
    from moepp_megatron.config import Layout

    times: dict[tuple[int, str], list[float]] = defaultdict(list)
    for visit in content["visits"]:
        if visit["layout"] != "parts":
            times[visit["ranks"], visit["layout"]] += visit["seconds"]
    found = []
    for (ranks, name), seconds in times.items():
        kind, settings = LAYOUTS[ranks][name]
        config = configuration(settings)
        layout = Layout.from_config(config, ranks)
        median = statistics.median(seconds)
        observation = layout_observation(config, layout, content["cores"], median)
        found.append((kind, name, ranks, observation))
    return sorted(found, key=lambda one: (one[0] != "fit", one[2]))


def report(path: Path, source: Path | None = None) -> list[str]:
    """Fits (or takes rates of another file), predicts, writes both; the table in Markdown."""
    from benchmarks.calibration import fit
    from moepp_megatron.runtime.atomic import write_atomic

    content = json.loads(path.read_text())
    layouts = _layouts(content)
    if source is None:
        steps = [observation for kind, _, _, observation in layouts if kind == "fit"]
        rates = fit(steps, _single_operations(content))
    else:
        rates = read_rates(source)
    table = []
    for kind, name, ranks, one in layouts:
        said = one.predict(rates)
        row = {"layout": name, "ranks": ranks, "set": kind, "predicted_s": said}
        table.append({**row, "measured_s": one.seconds, "error": said / one.seconds - 1})
    content |= {"rates": asdict(rates), "table": table}
    write_atomic(path, (json.dumps(content, indent=1) + "\n").encode())
    return _lines(table, asdict(rates))


def _lines(table: list[dict[str, Any]], rates: dict[str, float]) -> list[str]:
    lines = ["| layout | ranks | set | predicted ms | measured ms | error |", "|" + "---|" * 6]
    lines += [
        f"| {row['layout']} | {row['ranks']} | {row['set']} | {row['predicted_s'] * 1e3:.0f} "
        f"| {row['measured_s'] * 1e3:.0f} | {row['error']:+.1%} |"
        for row in table
    ]
    for kind in dict.fromkeys(row["set"] for row in table):
        errors = [abs(row["error"]) for row in table if row["set"] == kind]
        lines.append(
            f"\n{kind}: {len(errors)} layouts, median error {statistics.median(errors):.1%}, "
            f"largest {max(errors):.1%}"
        )
    return [*lines, "\nrates: " + ", ".join(f"{k} {v:.3g}" for k, v in rates.items())]


def main() -> None:
    """Start ranks, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--json", type=Path, required=True, help="Results; goes on with what it has."
    )
    parser.add_argument("--passes", type=int, default=3, help="Visits of each layout.")
    parser.add_argument("--steps", type=int, default=2, help="Timed steps of a visit.")
    parser.add_argument("--ranks", type=int, nargs="*", default=list(LAYOUTS))
    parser.add_argument("--report", action="store_true", help="Only read the file.")
    parser.add_argument(
        "--rates",
        type=Path,
        help="Results of another run, whose rates are taken; nothing is fitted.",
    )
    parser.add_argument("--on-rank", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    path = arguments.json.resolve()
    if arguments.on_rank:
        measure(path, arguments.passes, arguments.steps)
        return
    if not arguments.report:
        for ranks in arguments.ranks:
            command = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--nproc-per-node",
                str(ranks),
            ]
            command += ["-m", "benchmarks.cpu_step_times", "--json", str(path), "--on-rank"]
            command += ["--passes", str(arguments.passes), "--steps", str(arguments.steps)]
            subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    print("\n".join(report(path, arguments.rates)))


if __name__ == "__main__":
    main()
