"""What telemetry costs: a sample in the background, and what a logged step waits for.

    python benchmarks/telemetry_cost.py [--repeats 200]

On a GPU machine the cards of the node are sampled, elsewhere the CPU. Processor time is that of
this thread alone, so that other work on the machine does not count; the step's wait is wall time.
The all-reduces over ranks that a logged step adds are not in it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

from moepp_megatron.observe.telemetry import CpuSource, GpuSource, Sampler, TelemetrySource
from moepp_megatron.runtime.nvml import Nvml, NvmlUnavailableError


def source_of_this_node() -> TelemetrySource:
    """All cards of the node, or its CPU."""
    try:
        nvml = Nvml()
    except NvmlUnavailableError:
        return CpuSource()
    cards = [nvml.card(index).uuid for index in range(nvml.count())]
    return GpuSource([uuid for uuid in cards if uuid], nvml)


def cost(work: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median processor time and wall time of `work`, ms."""
    processor, wall = [], []
    for _ in range(repeats):
        before, started = time.thread_time(), time.perf_counter()
        work()
        wall.append((time.perf_counter() - started) * 1e3)
        processor.append((time.thread_time() - before) * 1e3)
    return median(processor), median(wall)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=200)
    repeats = parser.parse_args().repeats
    source = source_of_this_node()
    sampler = Sampler(source, interval_s=1.0)
    print(f"{type(source).__name__}, {source.devices} cards, median of {repeats}")
    for name, work in (("sample", sampler.look), ("take", sampler.take)):
        processor, wall = cost(work, repeats)
        print(f"{name:8} {processor:8.3f} ms processor {wall:8.3f} ms wall")
    source.close()


if __name__ == "__main__":
    main()
