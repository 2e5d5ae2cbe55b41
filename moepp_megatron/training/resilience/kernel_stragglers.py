"""Slow GPUs, found by comparing how long the same kernels take on each rank.

nvidia-resiliency-ext records kernels through CUPTI and leaves NCCL's out: what remains is a rank's
own work, whatever it waits for. Its scores say how fast a rank is against the fastest (1.0).
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

# CUPTI costs something in the steps that it watches.
_PROFILED_STEP = 10
_SECTION = "training step"


@dataclass(frozen=True)
class KernelScores:
    """How fast the ranks' kernels ran in an interval.

    Attributes:
        scores: Rank to speed of its kernels against the fastest rank's, (0, 1].
    """

    scores: Mapping[int, float]

    @property
    def slowest(self) -> int:
        """The rank with the lowest score."""
        return min(self.scores, key=self.scores.__getitem__)

    @property
    def ratio(self) -> float:
        """How many times longer the slowest rank's kernels take than the median rank's."""
        return statistics.median_high(self.scores.values()) / max(self.scores[self.slowest], 1e-9)

    @property
    def waiting_fraction(self) -> None:
        """Unknown: only kernels are measured."""
        return None


class KernelStragglerDetector:
    """Names a rank whose kernels are slow; needs GPUs and nvidia-resiliency-ext.

    Same calls as `StragglerDetector`.

    Args:
        interval: Steps between comparisons.
        threshold: Ratio of `KernelScores` from which the slowest rank is named in the log.
    """

    def __init__(self, interval: int, threshold: float) -> None:
        from nvidia_resiliency_ext.attribution.straggler import Detector

        self._detector: Any = Detector
        self._interval, self._threshold = interval, threshold
        self._section: AbstractContextManager[None] | None = None

    def start(self) -> None:
        """Start recording kernels."""
        self._detector.initialize(
            scores_to_compute=["relative_perf_scores"],
            gather_on_rank0=True,
            # At least one step of every interval is recorded.
            profiling_interval=min(_PROFILED_STEP, self._interval),
        )

    def stop(self) -> None:
        """Stop recording kernels."""
        self._leave_section()
        self._detector.shutdown()

    def begin_step(self) -> None:
        """Begin a step; the time since the last one (evaluation, saving) does not count."""
        # A step that the guard refused was never ended.
        self._leave_section()
        self._section = self._detector.detection_section(_SECTION, profile_cuda=True)
        self._section.__enter__()

    def end_step(self, step: int) -> KernelScores | None:
        """End a step; every rank must call.

        Returns:
            On rank 0 the comparison, in steps that have one; the log names the slowest rank
            if it is beyond the threshold.
        """
        self._leave_section()
        if step % self._interval != 0:
            return None
        report = self._detector.generate_report()
        scores = report.gpu_relative_perf_scores if report is not None else {}
        known = KernelScores({rank: x for rank, x in scores.items() if math.isfinite(x)})
        if not known.scores:
            return None
        if known.ratio >= self._threshold:
            logger.warning(
                "step %d: rank %d on node %s is a straggler: its kernels take %.2f times as long "
                "as the median of %d ranks (resilience.straggler_threshold: %g); look at the "
                "clocks and temperature of its GPU",
                step,
                known.slowest,
                report.rank_to_node.get(known.slowest, "?"),
                known.ratio,
                len(known.scores),
                self._threshold,
            )
        return known

    def _leave_section(self) -> None:
        if self._section is not None:
            self._section.__exit__(None, None, None)
            self._section = None
