"""All monitors of a run, as one object for the training loop."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Self

import torch.distributed as dist

from moepp_megatron.config import Config
from moepp_megatron.training.resilience.divergence import check_shared_parameters
from moepp_megatron.training.resilience.stragglers import RankTimes, StragglerDetector
from moepp_megatron.training.resilience.watchdog import FIRST_STEP, STEP, Activity, Watchdog
from moepp_megatron.training.setup import TrainingModel


class Supervisor:
    """Used as a context around the training loop; what is switched off is never built.

    Args:
        config: The run's configuration.
        model: The wrapped model.
    """

    def __init__(self, config: Config, model: TrainingModel) -> None:
        settings = config.resilience
        self._model, self._divergence_interval = model, settings.divergence_interval
        self.activity = Activity()
        self._steps_begun = 0
        self._comparison: RankTimes | None = None
        self._watchdog: Watchdog | None = None
        if settings.hang_timeout_s > 0:
            self._watchdog = Watchdog(
                Path(config.run.dir),
                dist.get_rank(),
                dist.get_world_size(),
                self.activity,
                settings,
            )
        self._stragglers: StragglerDetector | None = None
        if settings.straggler_interval > 0 and dist.get_world_size() > 1:
            self._stragglers = StragglerDetector(
                settings.straggler_interval, settings.straggler_threshold
            )

    def __enter__(self) -> Self:
        """Begin; every rank must enter."""
        if self._watchdog is not None:
            if dist.get_rank() == 0:
                self._watchdog.clear()
            # A rank that saw an earlier attempt's alarm would end at once.
            dist.barrier()
            self._watchdog.start()
        if self._stragglers is not None:
            self._stragglers.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End, whatever happened."""
        if self._stragglers is not None:
            self._stragglers.stop()
        if self._watchdog is not None:
            self._watchdog.stop()

    def begin_step(self, step: int) -> None:
        """Training step `step` begins."""
        self._steps_begun += 1
        self.activity.enter(STEP if self._steps_begun > 1 else FIRST_STEP, step)
        if self._stragglers is not None:
            self._stragglers.begin_step()

    def during(self, phase: str) -> AbstractContextManager[None]:
        """Mark work that may take long: evaluation, saving, loading."""
        return self.activity.during(phase)

    def end_step(self, step: int) -> None:
        """The optimizer has taken step `step`; every rank must call.

        Raises:
            SilentDivergenceError: Ranks hold different copies of the same parameters.
        """
        self._comparison = self._stragglers.end_step(step) if self._stragglers else None
        if self._divergence_interval > 0 and step % self._divergence_interval == 0:
            with self._model.gathered_parameters():
                check_shared_parameters(self._model.models, step)

    def metrics(self) -> dict[str, int | float]:
        """Optional fields of the step's record."""
        comparison = self._comparison
        if comparison is None:
            return {}
        return {
            "slowest_rank": comparison.slowest,
            "slowest_rank_ratio": comparison.ratio,
            "waiting_fraction": comparison.waiting_fraction,
        }
