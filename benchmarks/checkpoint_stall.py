"""Times how long a checkpoint stops training: synchronous against asynchronous, interleaved.

    torchrun --standalone --nproc-per-node=2 benchmarks/checkpoint_stall.py --out /tmp/stall

Trains on random tokens, and after every few steps saves in turn synchronously and asynchronously.
Reported, as medians over all saves: the time that `save` keeps the loop (the stall), the time until
the checkpoint is complete, and what an average step takes while one is being written.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moepp_megatron.config import Config, Layout, load_config, with_overrides
from moepp_megatron.runtime import distributed
from moepp_megatron.runtime.optional import quiet
from moepp_megatron.runtime.rank import RankEnvironment
from moepp_megatron.tools.bench.step import RandomTokens

STEPS_BETWEEN = 3


class Loop:
    """A training loop that times its steps."""

    def __init__(self, config: Config, layout: Layout) -> None:
        from moepp_megatron.training.batches import rank_batches
        from moepp_megatron.training.checkpoint.files import Progress
        from moepp_megatron.training.setup import build_training_model

        self._config, self._layout = config, layout
        self.model = build_training_model(config)
        self.model.set_training(True)
        self._batches = rank_batches(RandomTokens(config), 0, config, len(self.model.chunks))
        self.progress = Progress()

    def step(self) -> float:
        """Take a step; returns seconds."""
        from moepp_megatron.training.step import training_step

        started = time.perf_counter()
        training_step(self.model, self._batches, self._config, self._layout)
        torch.cuda.synchronize()
        samples = self._config.training.global_batch_size
        self.progress = self.progress.after_step(samples, samples * self._config.model.seq_length)
        return time.perf_counter() - started


def measure(loop: Loop, writers: dict[str, Any], rounds: int) -> list[dict[str, Any]]:
    """One row a save, the kinds in turn."""
    rows = []
    for index in range(rounds * len(writers)):
        kind = list(writers)[index % len(writers)]
        quiet_steps = [loop.step() for _ in range(STEPS_BETWEEN)]
        dist.barrier()
        started = time.perf_counter()
        writers[kind].save(loop.model, loop.progress)
        stall = time.perf_counter() - started
        busy_steps = []
        while writers[kind].is_writing:
            busy_steps.append(loop.step())
            if writers[kind].is_written():
                writers[kind].finish()
        assert writers[kind].error is None, writers[kind].error
        rows.append(
            {
                "kind": kind,
                "stall_s": stall,
                "complete_s": time.perf_counter() - started,
                "quiet_step_s": statistics.median(quiet_steps),
                "busy_step_s": statistics.median(busy_steps) if busy_steps else None,
                "busy_steps": len(busy_steps),
            }
        )
    return rows


def main() -> None:
    """Run on every rank; rank 0 prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.yaml"))
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoints")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    arguments = parser.parse_args()
    quiet()
    distributed.start(RankEnvironment.read())
    from moepp_megatron.training.checkpoint.write import CheckpointWriter

    overrides = ["checkpoint.save_interval=1", "checkpoint.keep=2", *arguments.overrides]
    config = load_config(arguments.config, overrides)
    layout = Layout.from_config(config, dist.get_world_size())
    distributed.build_groups(config, layout)
    loop = Loop(config, layout)
    writers = {}
    for kind in ("sync", "async"):
        own = with_overrides(config, [f"checkpoint.async_save={str(kind == 'async').lower()}"])
        folder = arguments.out / kind
        writers[kind] = CheckpointWriter(folder, own, folder / "no tokenizer")
    measure(loop, writers, 1)  # the first save of each is checked in full, and memory is fresh
    rows = measure(loop, writers, arguments.rounds)
    if dist.get_rank() == 0:
        _report(rows, arguments.out)
    dist.barrier()
    distributed.stop()


def _report(rows: list[dict[str, Any]], out: Path) -> None:
    newest = max((out / "sync").glob("step_*"))
    size = sum(path.stat().st_size for path in newest.iterdir())
    print(json.dumps(rows))
    print(f"checkpoint {size / 2**20:.1f} MiB, {dist.get_world_size()} ranks")
    for kind in ("sync", "async"):
        mine = [row for row in rows if row["kind"] == kind]
        values = {
            key: statistics.median(row[key] for row in mine if row[key] is not None)
            if any(row[key] is not None for row in mine)
            else float("nan")
            for key in ("stall_s", "complete_s", "quiet_step_s", "busy_step_s")
        }
        line = ", ".join(f"{key} {1e3 * value:.0f} ms" for key, value in values.items())
        low, high = (f(row["stall_s"] for row in mine) for f in (min, max))
        print(f"{kind:5}: {line}; stall {1e3 * low:.0f} to {1e3 * high:.0f} ms, n {len(mine)}")
    for kind in ("sync", "async"):
        shutil.rmtree(out / kind)


if __name__ == "__main__":
    main()
