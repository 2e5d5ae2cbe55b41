"""Changes of the data and of the routers, judged in every step by all series of a run."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moepp_megatron.config import Layout
from moepp_megatron.config.guard_rules import is_watched
from moepp_megatron.observe.alerts import Alert
from moepp_megatron.observe.shift.monitor import GROUPS, Observed, ShiftMonitor, group_of
from moepp_megatron.training.part import Part, Run, Step
from moepp_megatron.training.parts.batch_losses import BatchLosses
from moepp_megatron.training.parts.routing_counts import RoutingCounts
from moepp_megatron.training.parts.sources import SourceCollector
from moepp_megatron.training.step import Batch
from moepp_megatron.training.step_sums import StepCounts, Summand, first_of_tensor_ranks

logger = logging.getLogger(__name__)


class Shift(Part):
    """Gives the series of each step to a monitor.

    Args:
        run: The run; its routers are watched.

    Attributes:
        monitor: Judges them. All ranks give it the same bits, but their processors may round
            otherwise: what ranks do follows from rank 0's (`guard.readings`).
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._counts, self._losses = run.require(RoutingCounts), run.require(BatchLosses)
        self._sources = run.find(SourceCollector)
        self._counts.watch(logits=True)
        groups = torch.from_numpy(group_of(np.arange(run.config.model.vocab_size)))
        self._group_of = groups.to(torch.cuda.current_device())
        self._tokens = StepCounts(GROUPS)
        self._open(run.extra.get("shift"))

    @classmethod
    def of(cls, run: Run) -> Shift | None:
        """The part of a run; None where routers are not watched."""
        return cls(run) if is_watched(run.config) else None

    def _open(self, state: Mapping[str, Any] | None) -> None:
        names = () if self._sources is None else self._sources.names
        config = self._run.config
        self.monitor = ShiftMonitor(
            config.routing_guard.false_alarm_steps, self._counts.layer_numbers,
            config.moe.names, names,
        )  # fmt: skip
        if state is None:
            return
        if "detectors" in state:
            self.monitor.load(state)
        else:
            logger.warning("detectors of the checkpoint are those of an older version: begun anew")

    def begin_step(self, step: int, layout: Layout) -> None:
        """Begin to count token ids."""
        self._tokens.reset()

    @torch.no_grad()
    def see(self, chunk: torch.nn.Module, batch: Batch, token_losses: Tensor) -> None:
        """Count a micro-batch's labels that have a loss, on the last pipeline stage."""
        if first_of_tensor_ranks():
            groups = self._group_of[batch["labels"].reshape(-1)]
            self._tokens.own.index_add_(0, groups, batch["loss_mask"].reshape(-1).double())

    def summands(self) -> Sequence[Summand]:
        """The token ids."""
        return (self._tokens,)

    def end_step(self, step: Step) -> Iterable[Alert]:
        """Judge the step, also where its batch was refused."""
        if step.is_finite:
            losses = self._losses.newest
            observed = Observed(
                self._counts.selections().numpy(), losses.mean, losses.spread,
                self._counts.logits(), self._tokens.total(),
                None if self._sources is None else self._sources.losses(),
            )  # fmt: skip
            self.monitor.add(step.attempt, observed)
        return ()

    def record(self, step: Step, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """Evidence over its limit."""
        return self.monitor.metrics

    def state(self) -> dict[str, Any]:
        """The detectors."""
        return {"shift": self.monitor.state()}

    def roll_back(self, step: int, extra: Mapping[str, Any]) -> Iterable[Alert]:
        """Take over the detectors of a checkpoint."""
        self._open(extra.get("shift"))
        return ()

    def reset_baseline(self, step: int) -> Iterable[Alert]:
        """Forget what was usual."""
        self._open(None)
        return ()
