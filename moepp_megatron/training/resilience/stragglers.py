"""Straggler detection: the slowest rank, though all finish each step together."""

from __future__ import annotations

import logging
import statistics
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from moepp_megatron.training.resilience.collective_clock import CollectiveClock

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RankTimes:
    """Time of the ranks in an interval.

    Attributes:
        busy_s: [ranks] mean seconds per step of each rank, without waiting for others.
        wall_s: [ranks] mean seconds per step.
    """

    busy_s: list[float]
    wall_s: list[float]

    @property
    def slowest(self) -> int:
        """The rank with the longest own time."""
        return max(range(len(self.busy_s)), key=self.busy_s.__getitem__)

    @property
    def ratio(self) -> float:
        """The slowest rank's own time over the median of all ranks.

        The lower median is used: with two ranks it is the other one's time, not the mean.
        """
        return self.busy_s[self.slowest] / max(statistics.median_low(self.busy_s), 1e-9)

    @property
    def waiting_fraction(self) -> float:
        """Share of the time that goes into waiting, over all ranks."""
        return 1.0 - sum(self.busy_s) / max(sum(self.wall_s), 1e-9)


class StragglerDetector:
    """Measures this rank's steps and compares them with the others' at an interval.

    Args:
        interval: Steps between comparisons.
        threshold: Ratio of `RankTimes` from which the slowest rank is named in the log.
    """

    def __init__(self, interval: int, threshold: float) -> None:
        self._interval, self._threshold = interval, threshold
        self._clock = CollectiveClock()
        self._steps, self._wall_s, self._waiting_s = 0, 0.0, 0.0
        self._began = 0.0

    def start(self) -> None:
        """Start measuring collectives, in steps."""
        self._clock.counting = False
        self._clock.start()

    def stop(self) -> None:
        """Stop measuring collectives."""
        self._clock.stop()

    def begin_step(self) -> None:
        """Begin a step; the time since the last one (evaluation, saving) does not count."""
        self._clock.counting = True
        self._began = time.perf_counter()

    def end_step(self, step: int) -> RankTimes | None:
        """End a step; every rank must call.

        Returns:
            The comparison, in steps that have one; the log names the slowest rank if it is
            beyond the threshold.
        """
        self._wall_s += time.perf_counter() - self._began
        self._clock.counting = False
        self._waiting_s += self._clock.read()
        self._steps += 1
        if step % self._interval != 0:
            return None
        times = self._gather()
        self._steps, self._wall_s, self._waiting_s = 0, 0.0, 0.0
        if times.ratio >= self._threshold and dist.get_rank() == 0:
            logger.warning(
                "step %d: rank %d is a straggler: %.3f s a step of its own, %.2f times the "
                "median of %d ranks (resilience.straggler_threshold: %g); look at its node",
                step,
                times.slowest,
                times.busy_s[times.slowest],
                times.ratio,
                len(times.busy_s),
                self._threshold,
            )
        return times

    def _gather(self) -> RankTimes:
        own = max(self._wall_s - self._waiting_s, 0.0) / self._steps
        mine = torch.tensor([own, self._wall_s / self._steps], dtype=torch.float64)
        mine = mine.to(torch.cuda.current_device())
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, mine)
        busy_s, wall_s = torch.stack(everyone).T.tolist()
        return RankTimes(busy_s, wall_s)
