"""Times work where it runs: CUDA events on a GPU, the host's clock on a CPU.

Contestants are timed in turn, so that other load on the machine affects all alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


def now() -> Any:
    """A point in time between the work requested before and after.

    On a GPU it is an event in the current stream: the host does not wait, so measuring does not
    slow down the work. If the host launches work too slowly, the stream waits for it, and that wait
    counts, as in training.
    """
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds(begin: Any, end: Any) -> float:
    """Seconds between two points in time; on a GPU only after `settle`."""
    if not torch.cuda.is_available():
        return float(end - begin)
    return float(begin.elapsed_time(end)) * 1e-3


def settle() -> None:
    """Wait until all requested work is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Timed:
    """Times of one contestant.

    Attributes:
        seconds: One entry per round, in the order of the rounds.
    """

    seconds: list[float]

    @property
    def median_ms(self) -> float:
        """Median, milliseconds."""
        return statistics.median(self.seconds) * 1e3


def speedup(slow: Timed, fast: Timed) -> float:
    """Return the speed-up of `fast`: the median over rounds of the ratio within a round."""
    pairs = zip(slow.seconds, fast.seconds, strict=True)
    return statistics.median(s / f for s, f in pairs)


def interleaved(
    contestants: Mapping[str, Callable[[], object]], rounds: int, warmup: int
) -> dict[str, Timed]:
    """Run all contestants once per round; each round begins with another one.

    The GPU is idle when a contestant begins, so that times do not mix.

    Args:
        contestants: What to time, by name.
        rounds: Rounds that count.
        warmup: Rounds before them, which do not count.
    """
    names = list(contestants)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        for index in range(len(names)):
            name = names[(index + number) % len(names)]
            settle()
            began = now()
            contestants[name]()
            ended = now()
            settle()
            if number >= 0:
                times[name].append(seconds(began, ended))
    return {name: Timed(values) for name, values in times.items()}
