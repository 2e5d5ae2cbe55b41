"""What recording a step costs it, and what the recorder costs when it is off: steps in turn.

Run under torchrun:

    torchrun --standalone --nproc-per-node 2 benchmarks/profile_cost.py

The model is that of configs/quickstart.yaml on random tokens. A round is one step without any
recorder, one with a recorder that has no steps to record ("off", as every run has), and one that
is recorded; the order changes from round to round. Starting, stopping and writing a recording
happen between steps and are timed apart. Prints a row: milliseconds a step, median (quartiles), and
the ratios to the plain step of the same round, and the same of the processor time of rank 0, which
other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


class Tokens:
    """Sequences of random tokens."""

    def __init__(self, length: int, vocab_size: int) -> None:
        self._length, self._vocab_size = length, vocab_size

    def __len__(self) -> int:
        """More than any run reads."""
        return 1_000_000

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Depends on the index alone."""
        generator = torch.Generator().manual_seed(index)
        text = torch.randint(self._vocab_size, (self._length + 1,), generator=generator)
        return {
            "tokens": text[:-1],
            "labels": text[1:],
            "loss_mask": torch.ones(self._length),
            "position_ids": torch.arange(self._length),
        }


def measure(rounds: int, folder: Path) -> dict[str, list[float]]:
    """Seconds of plain, off and recorded steps, and of starting and of ending a recording.

    With "cpu" in front: processor time of rank 0's threads in the step.
    """
    from moepp_megatron.config import Layout, load_config
    from moepp_megatron.runtime.distributed import build_groups
    from moepp_megatron.training.batches import rank_batches
    from moepp_megatron.training.profiler import StepRecorder
    from moepp_megatron.training.setup import build_training_model
    from moepp_megatron.training.step import training_step

    quickstart = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
    settings = [f"run.dir={folder}"]
    without = load_config(quickstart, settings)
    config = load_config(quickstart, [*settings, "training.profile_steps=[1]"])
    layout = Layout.from_config(config, dist.get_world_size())
    build_groups(config, layout)
    model = build_training_model(config)
    model.set_training(True)
    data = Tokens(config.model.seq_length, config.model.vocab_size)
    batches = rank_batches(data, 0, config, len(model.chunks))
    kinds = ("plain", "off", "recorded")
    names = (*kinds, *(f"cpu {kind}" for kind in kinds), "start", "end")
    times: dict[str, list[float]] = {name: [] for name in names}

    def plain() -> None:
        dist.barrier()
        began, cpu = time.perf_counter(), time.process_time()
        training_step(model, batches, config, layout)
        times["cpu plain"].append(time.process_time() - cpu)
        dist.barrier()
        times["plain"].append(time.perf_counter() - began)

    def off() -> None:
        recorder = StepRecorder(without, layout, model)
        dist.barrier()
        began, cpu = time.perf_counter(), time.process_time()
        recorder.begin_step(1)
        training_step(model, batches, config, layout)
        recorder.end_step()
        times["cpu off"].append(time.process_time() - cpu)
        dist.barrier()
        times["off"].append(time.perf_counter() - began)
        recorder.close()

    def recorded() -> None:
        recorder = StepRecorder(config, layout, model)
        began = time.perf_counter()
        recorder.begin_step(1)
        dist.barrier()
        ready, cpu = time.perf_counter(), time.process_time()
        training_step(model, batches, config, layout)
        recorder.end_step()
        times["cpu recorded"].append(time.process_time() - cpu)
        dist.barrier()
        done = time.perf_counter()
        recorder.close()
        times["start"].append(ready - began)
        times["recorded"].append(done - ready)
        times["end"].append(time.perf_counter() - done)

    # What a step leaves behind is the next one's: each kind follows each other kind equally often.
    orders = itertools.cycle(itertools.permutations((plain, off, recorded)))
    # The first round warms up.
    for order in itertools.islice(orders, rounds + 1):
        for take in order:
            take()
    return {name: values[1:] for name, values in times.items()}


def quartiles(values: list[float], unit: float = 1e3) -> str:
    """Median (quartiles)."""
    low, middle, high = (unit * one for one in statistics.quantiles(values, n=4))
    digits = 0 if unit == 1e3 else 3
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _print(clock: str, times: dict[str, list[float]]) -> None:
    """A row of one clock: "" or "cpu "."""
    plain, off, recorded = (times[clock + kind] for kind in ("plain", "off", "recorded"))
    cells = [quartiles(one) for one in (plain, off, recorded)]
    for other in (off, recorded):
        pairs = zip(plain, other, strict=True)
        cells.append(quartiles([b / a for a, b in pairs], 1))
    print("| clock | plain | off | recorded | off / plain | recorded / plain |")
    print("|---|---|---|---|---|---|")
    print(f"| {clock or 'wall'} | " + " | ".join(cells) + " |")


def main() -> None:
    """Measure and print."""
    from moepp_megatron.runtime.distributed import start, stop
    from moepp_megatron.runtime.quiet import quiet
    from moepp_megatron.runtime.rank import RankEnvironment

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    quiet()
    logging.disable()
    start(RankEnvironment.read())
    with tempfile.TemporaryDirectory() as folder:
        times: dict[str, Any] = measure(rounds, Path(folder))
        size = sum(path.stat().st_size for path in Path(folder, "profile").glob("rank0*"))
    if dist.get_rank() == 0:
        for clock in ("", "cpu "):
            _print(clock, times)
        print(
            f"start {quartiles(times['start'])}, end and write {quartiles(times['end'])}, "
            f"a rank's files {size / 1024:.0f} KiB"
        )
    stop()


if __name__ == "__main__":
    main()
