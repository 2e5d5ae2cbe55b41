"""Times work where it runs: CUDA events on a GPU, the host's clock on a CPU.

Contestants are timed in turn, so that other load on the machine affects all alike.
"""

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
class _Timed:
    """Times of one contestant.

    Attributes:
        seconds: One entry per round, in the order of the rounds.
        joules: The GPU's energy per round, the mean; None if unknown. NVML's counter moves every
            tenth of a second or so, so a round must not be much shorter, or there must be many.
    """

    seconds: list[float]
    joules: float | None = None

    @property
    def median_ms(self) -> float:
        """Median, milliseconds."""
        return statistics.median(self.seconds) * 1e3


def speedup(slow: _Timed, fast: _Timed) -> float:
    """Return the speed-up of `fast`: the median over rounds of the ratio within a round."""
    pairs = zip(slow.seconds, fast.seconds, strict=True)
    return statistics.median(s / f for s, f in pairs)


def interleaved(
    contestants: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int,
    *,
    queued: bool = False,
    energy: Callable[[], float | None] = lambda: None,
) -> dict[str, _Timed]:
    """Run all contestants once per round; each round begins with another one.

    The GPU is idle before a contestant's turn, so that times do not mix.

    Args:
        contestants: What to time, by name.
        rounds: Rounds that count.
        warmup: Rounds before them, which do not count.
        queued: On a GPU run each contestant twice in its turn and time the second run, which begins
            behind work, as a layer does in training; otherwise the host's launches would count.
        energy: Counter of the GPU's energy, J.
    """
    names = list(contestants)
    times: dict[str, list[float]] = {name: [] for name in names}
    joules: dict[str, list[float | None]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        for index in range(len(names)):
            name = names[(index + number) % len(names)]
            settle()
            if queued and torch.cuda.is_available():
                contestants[name]()
            before = energy()
            began = now()
            contestants[name]()
            ended = now()
            settle()
            if number >= 0:
                after = energy()
                times[name].append(seconds(began, ended))
                joules[name].append(None if before is None or after is None else after - before)
    return {name: _Timed(values, _mean(joules[name])) for name, values in times.items()}


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None
