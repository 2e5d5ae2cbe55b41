"""Shifts of the data, judged in every step: `routing_shift` as a part of the run."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moepp_megatron.config import Layout
from moepp_megatron.config.guard_rules import is_watched
from moepp_megatron.observe.alerts import Alert
from moepp_megatron.observe.shift.reading import ShiftReading, ShiftStory
from moepp_megatron.training.part import Part, Run, Step
from moepp_megatron.training.parts.batch_losses import BatchLosses
from moepp_megatron.training.parts.routing_counts import RoutingCounts
from moepp_megatron.training.parts.sources import SourceCollector
from moepp_megatron.training.routing_shift import RoutingShift
from moepp_megatron.training.step import Batch
from moepp_megatron.training.step_sums import Summand

logger = logging.getLogger(__name__)


class Shift(Part):
    """Detects shifts of the data by the experts, the loss, the token ids and the data sources.

    Args:
        run: The run; its routers are watched and expert usage is counted.

    Attributes:
        reading: What the newest step says; None where none is judged yet.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._counts, self._losses = run.require(RoutingCounts), run.require(BatchLosses)
        self._sources = run.find(SourceCollector)
        self._counts.is_read_each_step = True
        self._open(run.extra.get("shift"))

    @classmethod
    def of(cls, run: Run) -> Shift | None:
        """The part of a run; None where nothing is judged or no usage is counted."""
        counts = is_watched(run.config) and run.config.routing_guard.shift.window > 0
        return cls(run) if counts else None

    def _open(self, state: Mapping[str, Any] | None) -> None:
        run = self._run
        known = None if state is None else dict(state)
        self._shift = RoutingShift(run.config, run.model, self._counts, run.train_set, known)
        self.reading: ShiftReading | None = None

    def begin_step(self, step: int, layout: Layout) -> None:
        """Begin to count token ids."""
        self._shift.counts.begin()

    def see(self, chunk: torch.nn.Module, batch: Batch, token_losses: Tensor) -> None:
        """Count the token ids of a micro-batch."""
        self._shift.counts.add(batch)

    def summands(self) -> Sequence[Summand]:
        """The token ids."""
        return (self._shift.counts,)

    def end_step(self, step: Step) -> Iterable[Alert]:
        """Judge the step, also where its batch was refused."""
        if step.is_finite:
            sources = None if self._sources is None else self._sources.losses()
            self.reading = self._shift.end_step(self._losses.newest, sources)
        return ()

    def explain(self) -> ShiftStory | None:
        """What a shift is about; a collective."""
        return self._shift.explain()

    def record(self, step: Step, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """The reading's metrics."""
        return {} if self.reading is None else self.reading.metrics

    def state(self) -> dict[str, Any]:
        """The detectors; a collective."""
        return {"shift": self._shift.state_dict()}

    def roll_back(self, step: int, extra: Mapping[str, Any]) -> Iterable[Alert]:
        """Take over the detectors of a checkpoint."""
        self._open(extra.get("shift"))
        return ()

    def begin_anew(self, step: int) -> Iterable[Alert]:
        """Forget what was usual."""
        self._open(None)
        return ()

    def write(self) -> None:
        """Write `routing_profile.json`; a full disk costs that file only."""
        try:
            self._shift.write()
        except OSError as error:
            logger.error("the expert usage could not be written: %s", error)
