"""Changes of the data and of the routers, judged in every step by all series of a run."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from moepp_megatron.config import Layout
from moepp_megatron.features.guard.settings import is_watched
from moepp_megatron.observe.alerts import Alert
from moepp_megatron.observe.shift.monitor import GROUPS, Observed, ShiftMonitor, group_of
from moepp_megatron.training.part import Part, PartContext, State, Step, Why
from moepp_megatron.training.parts.routing_counts import RoutingCounts
from moepp_megatron.training.step import Batch
from moepp_megatron.training.step_sums import StepCounts, Summand, first_of_tensor_ranks

logger = logging.getLogger(__name__)


class ShiftPart(Part):
    """Gives the series of each step to a monitor.

    Args:
        run: The run; its routers are watched.

    Attributes:
        batch_loss: Token mean of the newest batch whose loss is finite, over all ranks, in nats.
        monitor: Judges them. All ranks give it the same bits, but their processors may round
            otherwise: what ranks do follows from rank 0's (`RoutingGuardPart`).
    """

    key: ClassVar[str] = "shift"

    def __init__(self, run: PartContext) -> None:
        self._run, self.batch_loss = run, math.nan
        self._counts, self._sources = run.require(RoutingCounts), run.feature("sources")
        self._counts.watch(logits=True)
        groups = torch.from_numpy(group_of(np.arange(run.config.model.vocab_size)))
        self._group_of = groups.to(torch.cuda.current_device())
        # Sum of the sequences' mean losses, of their squares, number of sequences (with context
        # parallelism of the parts that ranks have); then tokens of each group of ids.
        self._sums = StepCounts(3 + GROUPS)
        self._open({})

    @classmethod
    def of(cls, run: PartContext) -> ShiftPart | None:
        """The part of a run; None where routers are not watched."""
        return cls(run) if is_watched(run.config) else None

    def _open(self, state: State) -> None:
        config = self._run.config
        self.monitor = ShiftMonitor(
            config.routing_guard.false_alarm_steps,
            self._counts.layer_numbers,
            config.moe.names,
        )
        if not state:
            return
        if "detectors" in state:
            self.monitor.load(state)
        else:
            logger.warning("detectors of the checkpoint are those of an older version: begun anew")

    def begin_step(self, step: int, layout: Layout) -> None:
        """Begin a new batch."""
        self._sums.reset()

    @torch.no_grad()
    def see(self, chunk: torch.nn.Module, batch: Batch, token_losses: Tensor) -> None:
        """Add a micro-batch, on the last pipeline stage, without waiting for the device.

        Args:
            chunk: The model chunk that has made the losses.
            batch: `labels` [b, s], and `loss_mask` [b, s], 0 for tokens that do not count.
            token_losses: [b, s].
        """
        if not first_of_tensor_ranks():
            return
        mask = batch["loss_mask"].double()
        counts = mask.sum(dim=1)
        means = (token_losses.detach().double() * mask).sum(dim=1) / counts.clamp(min=1.0)
        is_counted = (counts > 0).double()
        self._sums.own[:3] += torch.stack([means, means.square(), is_counted]).sum(dim=1)
        groups = self._group_of[batch["labels"].reshape(-1)]
        self._sums.own[3:].index_add_(0, groups, mask.reshape(-1))

    def summands(self) -> Sequence[Summand]:
        """Losses and token ids."""
        return (self._sums,)

    def end_step(self, step: Step) -> Iterable[Alert]:
        """Judge the step, also where its batch was refused."""
        if step.is_finite:
            sums, own = step.result.sums, self._sums.total()
            self.batch_loss = sums.total / sums.tokens if sums.tokens > 0 else math.nan
            observed = Observed(
                self._counts.selections().numpy(),
                self.batch_loss,
                _deviation(*own[:3].tolist()),
                self._counts.logits(),
                own[3:],
            )
            self.monitor.add(step.attempt, observed, is_refused=not step.updated)
        return ()

    def record(self, step: Step, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """Evidence over its limit."""
        metrics = self.monitor.metrics
        return {name: value for name, value in metrics.items() if not math.isnan(value)}

    def state(self) -> State:
        """The detectors."""
        return self.monitor.state()

    def load(self, state: State, why: Why, step: int) -> Iterable[Alert]:
        """Take over the detectors."""
        self._open(state)
        return ()

    def reset_baseline(self, step: int) -> Iterable[Alert]:
        """Forget what was usual."""
        self._open({})
        return ()


def _deviation(total: float, squares: float, number: float) -> float:
    """Standard deviation from the sum of numbers and of their squares; NaN of fewer than two."""
    if number < 2:
        return math.nan
    return math.sqrt(max((squares - total * total / number) / (number - 1), 0.0))
