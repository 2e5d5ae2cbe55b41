"""Memory of CPU ranks: what `planning.memory` estimates against what training steps take.

    torchrun --nproc-per-node 1 -m benchmarks.cpu_memory --json benchmarks/results/cpu_memory_1.json
    torchrun --nproc-per-node 2 -m benchmarks.cpu_memory --json benchmarks/results/cpu_memory_2.json

Each configuration builds its model, takes a step that makes the optimizer's state, and a second one
in which every allocation of a tensor is followed (`benchmarks/tensor_bytes.py`). Routing is held at
its balance, as the estimate assumes. With `--rss` nothing is followed: measured is what the
process's resident set grows by at its peak over what it was before the model, another gauge of
the same with what libraries take and the C library keeps (set MALLOC_MMAP_THRESHOLD_=65536, so
that it returns what tensors free).
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
# One or two micro-batches a data-parallel rank; further ones take no more.
_SHORT = ("training.global_batch_size=8",)
_ONE = "parallel.expert_model_parallel_size=1"
_TP2 = ("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true")
_FULL = (
    "training.recompute_granularity=full",
    "training.recompute_method=uniform",
    "training.recompute_num_layers=1",
)


def _selective(*modules: str) -> tuple[str, ...]:
    return (
        "training.recompute_granularity=selective",
        f"training.recompute_modules=[{','.join(modules)}]",
    )


_VANILLA = (
    "moe.num_zero_experts=0",
    "moe.num_copy_experts=0",
    "moe.num_constant_experts=0",
    "moe.gating_residual=false",
)
# By ranks: name -> what differs from the quickstart model.
CASES: dict[int, dict[str, tuple[str, ...]]] = {
    1: {
        "quickstart": (_ONE,),
        "vanilla": (_ONE, *_VANILLA),
        "tau 0.1": (_ONE, "moe.tau=0.1"),
        "one sequence of 1024": (_ONE, "model.seq_length=1024", "training.micro_batch_size=1"),
        "8 sequences": (_ONE, "training.micro_batch_size=8"),
        "8 layers, 2 groups": (_ONE, "model.num_layers=8", "model.num_query_groups=2"),
        "dense every second": (_ONE, "moe.layer_freq=[0,1,0,1]", "training.micro_batch_size=8"),
        "shared expert": (_ONE, "moe.shared_expert_ffn_hidden_size=512"),
        "recompute all": (_ONE, "model.num_layers=8", "training.micro_batch_size=8", *_FULL),
        "recompute moe": (_ONE, "training.micro_batch_size=8", *_selective("moe")),
        "recompute core_attn": (_ONE, "training.micro_batch_size=8", *_selective("core_attn")),
        "bf16": (_ONE, "precision.dtype=bf16", "training.global_batch_size=8"),
        "512 channels": (
            _ONE,
            "model.hidden_size=512",
            "model.ffn_hidden_size=1024",
            "model.num_attention_heads=8",
            "training.micro_batch_size=8",
        ),
    },
    2: {
        "EP2": ("training.micro_batch_size=4",),
        "EP2 dedup": ("training.micro_batch_size=4", "moe.dispatcher=alltoall_dedup"),
        "EP2 allgather": ("training.micro_batch_size=4", "moe.dispatcher=allgather"),
        "TP2 EP2": (*_TP2, "training.micro_batch_size=8"),
        "TP2 ETP2": (
            *_TP2,
            _ONE,
            "parallel.expert_tensor_parallel_size=2",
            "training.micro_batch_size=8",
        ),
        "PP2, 4 micro-batches": (
            "parallel.pipeline_model_parallel_size=2",
            _ONE,
            "training.micro_batch_size=2",
        ),
        "PP2 VPP2": (
            "parallel.pipeline_model_parallel_size=2",
            "parallel.virtual_pipeline_model_parallel_size=2",
            _ONE,
            "training.micro_batch_size=2",
        ),
        "CP2 EP2": ("parallel.context_parallel_size=2", "training.micro_batch_size=8"),
        "DP2": (_ONE, "training.micro_batch_size=4"),
        "PP2 recompute all": (
            "parallel.pipeline_model_parallel_size=2",
            _ONE,
            "model.num_layers=8",
            "training.micro_batch_size=8",
            *_FULL,
        ),
    },
}


def measure(name: str, settings: tuple[str, ...], folder: Path, rss: bool) -> list[dict[str, Any]]:
    """Estimate and measurement on every rank; every rank calls and gets all."""
    from benchmarks.fresh_ranks import forget_model
    from benchmarks.tensor_bytes import tensor_bytes
    from moepp_megatron.config import Layout, load_config
    from moepp_megatron.runtime.distributed import build_groups
    from moepp_megatron.workbench.bench.step import Stepper

    config = load_config(QUICKSTART, [f"run.dir={folder}", *_SHORT, *settings])
    layout = Layout.from_config(config, dist.get_world_size())
    build_groups(config, layout)

    def prepare() -> Any:
        stepper = Stepper(config, layout)
        stepper.step()
        return stepper.step

    found = _resident(prepare) if rss else tensor_bytes(prepare)
    row = {
        "name": name,
        "ranks": layout.world_size,
        "rank": dist.get_rank(),
        "settings": list(settings),
        "gauge": "resident set" if rss else "tensors",
        "measured": found.peak,
        "measured_before": found.before,
        "unseen": found.unseen,
    }
    rows: list[Any] = [None] * layout.world_size
    dist.all_gather_object(rows, estimated(row))
    forget_model()
    gc.collect()
    return rows


def _resident(prepare: Callable[[], Callable[[], object]]) -> Any:
    """As `tensor_bytes`, from the kernel's count of pages."""
    from benchmarks.tensor_bytes import TensorBytes

    gc.collect()
    resident = _status("VmRSS")
    work = prepare()
    before = _status("VmRSS") - resident
    # Forgets the peak so far.
    Path("/proc/self/clear_refs").write_text("5")
    work()
    return TensorBytes(before, _status("VmHWM") - resident, 0)


def _status(key: str) -> int:
    """Bytes that /proc/self/status gives."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return 0


def table(rows: list[dict[str, Any]]) -> str:
    """Megabytes, as Markdown."""
    lines = [
        "| configuration | rank | weights, gradients, optimizer | estimated | measured | error |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        sizes = (row[key] / 1e6 for key in ("static", "estimated", "measured"))
        cells = " | ".join(f"{size:.1f}" for size in sizes)
        lines.append(
            f"| {row['name']} | {row['rank']} of {row['ranks']} | {cells} | {row['error']:+.1%} |"
        )
    return "\n".join(lines)


def estimated(row: dict[str, Any]) -> dict[str, Any]:
    """The row with today's estimate beside what was measured."""
    from moepp_megatron.config import Layout, load_config
    from moepp_megatron.workbench.planning.memory import rank_memory

    config = load_config(QUICKSTART, ["run.dir=unused", *_SHORT, *row["settings"]])
    layout = Layout.from_config(config, row["ranks"])
    said = rank_memory(config, layout, layout.coordinates(row["rank"]).pp, "local")
    return {
        **row,
        "estimated": said.total,
        "static": said.weights + said.gradients + said.optimizer,
        "activations": said.activations,
        "buffers": said.buffers,
        "error": said.total / row["measured"] - 1,
    }


def main() -> None:
    """Measure and print."""
    from moepp_megatron.runtime.atomic import write_atomic
    from moepp_megatron.runtime.distributed import joined
    from moepp_megatron.runtime.quiet import quiet
    from moepp_megatron.runtime.rank import RankEnvironment

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="Names of configurations.")
    parser.add_argument("--rss", action="store_true", help="The resident set instead of tensors.")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--report", type=Path, nargs="*", help="Only read such files of results.")
    arguments = parser.parse_args()
    if arguments.report:
        found = [row for path in arguments.report for row in json.loads(path.read_text())]
        print(table([estimated(row) for row in found]))
        return
    quiet()
    logging.disable()
    rank = RankEnvironment.read()
    rows = []
    with joined(rank), tempfile.TemporaryDirectory() as folder:
        for name, settings in CASES[rank.world_size].items():
            if arguments.only and name not in arguments.only:
                continue
            found = measure(name, settings, Path(folder), arguments.rss)
            rows += found
            if rank.rank == 0:
                for row in found:
                    print(
                        f"{name:24} {row['rank']} estimated {row['estimated'] / 1e6:7.1f} measured "
                        f"{row['measured'] / 1e6:7.1f} ({row['error']:+.1%}), before "
                        f"{row['static'] / 1e6:.1f} / {row['measured_before'] / 1e6:.1f}, "
                        f"unseen {row['unseen'] / 1e6:.1f}",
                        flush=True,
                    )
    if rank.rank == 0:
        print(table(rows))
        if arguments.json:
            write_atomic(arguments.json, (json.dumps(rows, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
