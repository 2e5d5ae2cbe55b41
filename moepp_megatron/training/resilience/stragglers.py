"""Straggler detection: the slowest rank, though all finish each step together."""

import functools
import logging
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from moepp_megatron.runtime.patches import Replacements

_FUNCTIONS = (
    "all_gather",
    "all_gather_into_tensor",
    "all_reduce",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "recv",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "send",
)


class _CollectiveClock:
    """Adds up the time that the training thread waits for other ranks."""

    # Neither gloo nor NCCL reports it. So while the clock runs, torch's collectives and the waits
    # for asynchronous ones are wrapped: with the wall clock on CPUs, with CUDA events on GPUs,
    # where the time of a collective on the compute stream is what training loses to it. A
    # collective that is being captured into a CUDA graph is not measured: its events would belong
    # to the graph, and could never be read.

    def __init__(self) -> None:
        self.counting = True
        self._on_gpu = dist.get_backend() == "nccl"
        self._depth = 0
        self._seconds = 0.0
        self._pairs: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._replaced = Replacements()

    def start(self) -> None:
        """Wrap the collectives."""
        wrappers = {getattr(dist, name): self._timed(getattr(dist, name)) for name in _FUNCTIONS}
        # megatron-core keeps some under names of its own, taken at import.
        prefixes = ("megatron.core.", "moepp_megatron.")
        loaded = [module for name, module in list(sys.modules.items()) if name.startswith(prefixes)]
        for module in [dist, dist.distributed_c10d, *filter(None, loaded)]:
            for name, value in list(vars(module).items()):
                if callable(value) and _is_key(value, wrappers):
                    self._replaced.put(module, name, wrappers[value])
        work = torch._C._distributed_c10d.Work
        self._replaced.put(work, "wait", self._timed(work.wait))

    def stop(self) -> None:
        """Put everything back."""
        self._replaced.undo()

    def read(self) -> float:
        """Return seconds of waiting since the last reading, on a GPU of what has ended there."""
        # The host waits for no GPU: the rest is for a later reading.
        seconds, self._seconds = self._seconds, 0.0
        while self._pairs and self._pairs[0][1].query():
            begin, end = self._pairs.popleft()
            seconds += begin.elapsed_time(end) / 1000.0
        return seconds

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            # A blocking collective waits for its own asynchronous one: that counts once.
            counts = self.counting and self._depth == 0
            if not counts or (self._on_gpu and torch.cuda.is_current_stream_capturing()):
                return function(*args, **kwargs)
            with self._measure():
                return function(*args, **kwargs)

        return timed

    @contextmanager
    def _measure(self) -> Iterator[None]:
        self._depth += 1
        events = None
        if self._on_gpu:
            events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            events[0].record()
        began = time.perf_counter()
        try:
            yield
        finally:
            self._depth -= 1
            if events is None:
                self._seconds += time.perf_counter() - began
            else:
                events[1].record()
                self._pairs.append(events)


def _is_key(value: Any, wrappers: dict[Any, Any]) -> bool:
    try:
        return value in wrappers
    except TypeError:  # not hashable
        return False


logger = logging.getLogger(__name__)


class StragglerDetector(_CollectiveClock):
    """Measures this rank's steps, and compares them with the others' every `interval` steps.

    From `threshold` times the median on the log names the slowest rank.
    """

    def __init__(self, interval: int, threshold: float) -> None:
        super().__init__()
        # Only in steps.
        self.counting = False
        self._interval, self._threshold = interval, threshold
        self._steps, self._wall_s, self._waiting_s = 0, 0.0, 0.0
        self._began = 0.0

    def begin_step(self) -> None:
        """Begin a step; the time since the last one (evaluation, saving) does not count."""
        self.counting = True
        self._began = time.perf_counter()

    def end_step(self, step: int) -> dict[str, int | float]:
        """End a step; every rank must call. The comparison as metrics, in steps that have one."""
        self._wall_s += time.perf_counter() - self._began
        self.counting = False
        self._waiting_s += self.read()
        self._steps += 1
        if step % self._interval != 0:
            return {}
        busy_s, wall_s = self._gather()
        self._steps, self._wall_s, self._waiting_s = 0, 0.0, 0.0
        slowest = max(range(len(busy_s)), key=busy_s.__getitem__)
        # The lower median: with two ranks it is the other one's time, not the mean.
        ratio = busy_s[slowest] / max(statistics.median_low(busy_s), 1e-9)
        if ratio >= self._threshold and dist.get_rank() == 0:
            logger.warning(
                "step %d: rank %d is a straggler: %.3f s a step of its own, %.2f times the "
                "median of %d ranks (resilience.straggler_threshold: %g); look at its node",
                step,
                slowest,
                busy_s[slowest],
                ratio,
                len(busy_s),
                self._threshold,
            )
        return {
            "slowest_rank": slowest,
            "slowest_rank_ratio": ratio,
            "waiting_fraction": 1.0 - sum(busy_s) / max(sum(wall_s), 1e-9),
        }

    def _gather(self) -> tuple[list[float], list[float]]:
        """Mean seconds per step of each rank without waiting for others, and with it."""
        own = max(self._wall_s - self._waiting_s, 0.0) / self._steps
        mine = torch.tensor([own, self._wall_s / self._steps], dtype=torch.float64)
        mine = mine.to(torch.cuda.current_device())
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, mine)
        busy_s, wall_s = torch.stack(everyone).T.tolist()
        return busy_s, wall_s
