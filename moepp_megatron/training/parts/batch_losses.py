"""The loss of each batch and how much its sequences differ, the same on every rank."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moepp_megatron.config import Layout
from moepp_megatron.config.guard_rules import is_watched
from moepp_megatron.observe.alerts import Alert
from moepp_megatron.training.part import Part, Run, Step
from moepp_megatron.training.step import Batch, StepResult
from moepp_megatron.training.step_sums import StepCounts, Summand, first_of_tensor_ranks


@dataclass(frozen=True)
class BatchLoss:
    """Losses of one batch over all ranks, to the same bits on each.

    Attributes:
        mean: Token mean, nats.
        spread: Standard deviation of the sequences' means, nats; NaN for a single sequence. With
            context parallelism a sequence is as much of it as a rank has.
    """

    mean: float
    spread: float


class BatchLosses(Part):
    """Adds up a batch's losses, on the device and without waiting for it.

    Attributes:
        newest: Losses of the newest batch whose loss is finite.
    """

    def __init__(self) -> None:
        self.newest = BatchLoss(math.nan, math.nan)
        # Sum of the sequences' means, sum of their squares, number.
        self._sums = StepCounts(3)

    @classmethod
    def of(cls, run: Run) -> BatchLosses | None:
        """The part of a run; None where nobody judges losses."""
        return cls() if is_watched(run.config) else None

    def begin_step(self, step: int, layout: Layout) -> None:
        """Begin a new batch."""
        self._sums.reset()

    @torch.no_grad()
    def see(self, chunk: torch.nn.Module, batch: Batch, token_losses: Tensor) -> None:
        """Add a micro-batch, on the last pipeline stage.

        Args:
            chunk: The model chunk that has made the losses.
            batch: `loss_mask` [b, s], 0 for tokens that do not count.
            token_losses: [b, s].
        """
        if not first_of_tensor_ranks():
            return
        mask = batch["loss_mask"].double()
        counts = mask.sum(dim=1)
        means = (token_losses.detach().double() * mask).sum(dim=1) / counts.clamp(min=1.0)
        is_counted = (counts > 0).double()
        self._sums.own += torch.stack([means, means.square(), is_counted]).sum(dim=1)

    def summands(self) -> Sequence[Summand]:
        """The losses."""
        return (self._sums,)

    def end_step(self, step: Step) -> Iterable[Alert]:
        """Note the batch's losses."""
        if step.is_finite:
            self.newest = self._sum_up(step.result)
        return ()

    def _sum_up(self, result: StepResult) -> BatchLoss:
        sums = result.sums
        means, squares, rows = self._sums.total().tolist()
        mean = sums.total / sums.tokens if sums.tokens > 0 else math.nan
        if rows < 2:
            return BatchLoss(mean, math.nan)
        variance = (squares - means * means / rows) / (rows - 1)
        return BatchLoss(mean, math.sqrt(max(variance, 0.0)))
