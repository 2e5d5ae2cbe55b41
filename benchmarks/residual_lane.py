"""What the lane of router logits costs at pipeline boundaries: bytes and step time.

Run under torchrun, one rank a pipeline stage:

    torchrun --standalone --nproc-per-node 2 benchmarks/residual_lane.py

Builds the same model with and without gating residuals, once for the 1F1B and once for the
interleaved schedule, and takes their steps in turn, so that what else the machine does meets both
alike. The model without residuals also lacks the residual's matrix product, E x E a token.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist

SCHEDULES = {"1F1B": None, "interleaved": 2}


class SentBytes:
    """Counts the bytes that this rank sends to neighbouring stages."""

    def __init__(self) -> None:
        from megatron.core.pipeline_parallel import p2p_communication

        self.count = 0
        for name in ("_p2p_ops", "_batched_p2p_ops"):
            setattr(p2p_communication, name, self._counted(getattr(p2p_communication, name)))

    def _counted(self, function: Any) -> Any:
        def call(**kwargs: Any) -> Any:
            for name in ("tensor_send_prev", "tensor_send_next"):
                tensor = kwargs[name]
                if tensor is not None:
                    self.count += tensor.numel() * tensor.element_size()
            return function(**kwargs)

        return call


def settings(arguments: argparse.Namespace, chunks: int | None, residual: bool) -> dict[str, Any]:
    """The configuration: 4 layers a stage, or 2 in each of its chunks."""
    stages = dist.get_world_size()
    return {
        "run": {"dir": "unused"},
        "model": {
            "num_layers": 2 * stages * (chunks or 2),
            "hidden_size": arguments.hidden_size,
            "ffn_hidden_size": 2 * arguments.hidden_size,
            "num_attention_heads": arguments.hidden_size // 64,
            "seq_length": arguments.seq_length,
            "vocab_size": 512,
        },
        "moe": {"gating_residual": residual},
        "precision": {"dtype": arguments.dtype},
        "parallel": {
            "pipeline_model_parallel_size": stages,
            "virtual_pipeline_model_parallel_size": chunks,
        },
        "optimizer": {"lr": 1e-3},
        "training": {
            "train_iters": 1000,
            "global_batch_size": 4 * stages,
            "micro_batch_size": 1,
        },
    }


def measure(arguments: argparse.Namespace, schedule: str, sent: SentBytes) -> str:
    """The row of the result table for one schedule."""
    from megatron.core import parallel_state

    from moepp_megatron.config import Layout, parse_config
    from moepp_megatron.runtime.distributed import build_groups
    from moepp_megatron.training.batches import rank_batches
    from moepp_megatron.training.setup import build_training_model
    from moepp_megatron.training.step import training_step
    from moepp_megatron.workbench.bench.step import RandomTokens

    runs: dict[bool, Any] = {}
    for residual in (False, True):
        config = parse_config(settings(arguments, SCHEDULES[schedule], residual))
        layout = Layout.from_config(config, dist.get_world_size())
        if not runs:
            build_groups(config, layout)
        model = build_training_model(config)
        model.set_training(True)
        data = RandomTokens(config)
        batches = rank_batches(data, 0, config, len(model.chunks))
        runs[residual] = (model, batches, config, layout)
    times: dict[bool, list[float]] = {False: [], True: []}
    num_bytes = dict.fromkeys(runs, 0)
    for step in range(arguments.warmup + arguments.steps):
        for residual in (False, True) if step % 2 else (True, False):
            sent.count = 0
            dist.barrier()
            started = time.perf_counter()
            training_step(*runs[residual])
            dist.barrier()
            if step >= arguments.warmup:
                times[residual].append(time.perf_counter() - started)
            num_bytes[residual] = sent.count
    total = torch.tensor([num_bytes[False], num_bytes[True]])
    dist.all_reduce(total)
    parallel_state.destroy_model_parallel()
    config, layout = runs[True][2:]
    hops = 2 * (layout.pp * layout.vpp - 1) * layout.num_microbatches
    tokens = hops * config.model.seq_length
    without, with_lane = (int(count) / tokens for count in total)
    differences = [b - a for a, b in zip(times[False], times[True], strict=True)]
    return (
        f"| {schedule} | {without:.0f} | {with_lane:.0f} | {quartiles(times[False])} "
        f"| {quartiles(times[True])} | {quartiles(differences)} |"
    )


def quartiles(values: list[float]) -> str:
    """Median and, in brackets, the other quartiles; milliseconds."""
    low, middle, high = (value * 1e3 for value in statistics.quantiles(values, n=4))
    return f"{middle:.1f} ({low:.1f} to {high:.1f})"


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30)
    arguments = parser.parse_args()
    from moepp_megatron.runtime import distributed
    from moepp_megatron.runtime.quiet import quiet
    from moepp_megatron.runtime.rank import RankEnvironment

    quiet()
    distributed.start(RankEnvironment.read())
    sent = SentBytes()
    rows = [measure(arguments, schedule, sent) for schedule in SCHEDULES]
    if dist.get_rank() == 0:
        print("Bytes per token and hop; milliseconds per step, median (quartiles).\n")
        print("| schedule | bytes without | with | step without | with | paired difference |")
        print("|---|---|---|---|---|---|")
        print("\n".join(rows))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
