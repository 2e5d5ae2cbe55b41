"""Times work where it runs: by CUDA events on a GPU, by the host's clock on a CPU."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


def now() -> Any:
    """Return a point in time between the work requested before and after.

    On a GPU it is an event in the current stream, so that measuring does not slow down the work. If
    the host launches work too slowly, the stream's wait for it counts, as in training.
    """
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds(begin: Any, end: Any) -> float:
    """Seconds between two points in time; on a GPU only after `synchronize`."""
    if not torch.cuda.is_available():
        return float(end - begin)
    return float(begin.elapsed_time(end)) * 1e-3


def synchronize() -> None:
    """Wait until all requested work is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclass(frozen=True)
class _Timed:
    """Seconds of one contestant by round, and the GPU's mean energy per round; None if unknown."""

    seconds: list[float]
    # NVML's counter moves every tenth of a second or so: a round must not be much shorter, or
    # there must be many.
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
    """Time all contestants once per round, so that other load on the machine affects all alike.

    Each round begins with another contestant, `warmup` rounds come first and do not count, and the
    GPU is idle before each turn. With `queued`, a contestant runs twice in its turn on a GPU and
    the second run is timed: it begins behind work, as a layer does in training, where otherwise the
    host's launches would count. `energy` reads the counter of the GPU's energy, J.
    """
    names = list(contestants)
    times: dict[str, list[float]] = {name: [] for name in names}
    joules: dict[str, list[float | None]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        for index in range(len(names)):
            name = names[(index + number) % len(names)]
            synchronize()
            if queued and torch.cuda.is_available():
                contestants[name]()
            before = energy()
            began = now()
            contestants[name]()
            ended = now()
            synchronize()
            if number >= 0:
                after = energy()
                times[name].append(seconds(began, ended))
                joules[name].append(None if before is None or after is None else after - before)
    return {name: _Timed(values, _mean(joules[name])) for name, values in times.items()}


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None
