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
from moepp_megatron.training.step_sums import Summand, first_of_tensor_ranks, shared_sum


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
        self.begin_batch()

    @classmethod
    def of(cls, run: Run) -> BatchLosses | None:
        """The part of a run; None where nobody judges losses."""
        return cls() if is_watched(run.config) else None

    def begin_step(self, step: int, layout: Layout) -> None:
        """Begin a new batch."""
        self.begin_batch()

    def begin_batch(self) -> None:
        """Forget the batch before."""
        # Sum of the sequences' means, sum of their squares, number.
        self._sums: Tensor | None = None
        self._total: Tensor | None = None

    @torch.no_grad()
    def add(self, batch: Batch, token_losses: Tensor) -> None:
        """Add a micro-batch, on the last pipeline stage.

        Args:
            batch: `loss_mask` [b, s], 0 for tokens that do not count.
            token_losses: [b, s].
        """
        mask = batch["loss_mask"].double()
        counts = mask.sum(dim=1)
        means = (token_losses.detach().double() * mask).sum(dim=1) / counts.clamp(min=1.0)
        is_counted = (counts > 0).double()
        sums = torch.stack([means.sum(), means.square().sum(), is_counted.sum()])
        self._sums = sums if self._sums is None else self._sums + sums

    def see(self, chunk: torch.nn.Module, batch: Batch, token_losses: Tensor) -> None:
        """Add a micro-batch, on the last pipeline stage."""
        self.add(batch, token_losses)

    def summands(self) -> Sequence[Summand]:
        """The losses."""
        return (self,)

    def end_step(self, step: Step) -> Iterable[Alert]:
        """Note the batch's losses."""
        if step.is_finite:
            self.newest = self.sum_up(step.result)
        return ()

    def summand(self) -> Tensor:
        """[3] float64 on the device: this rank's sums."""
        if self._sums is None or not first_of_tensor_ranks():
            device = torch.cuda.current_device()
            return torch.zeros(3, dtype=torch.float64, device=device)
        return self._sums.clone()

    def take_sum(self, total: Tensor) -> None:
        """Note the sums [3] over all ranks."""
        self._total = total

    def sum_up(self, result: StepResult) -> BatchLoss:
        """The batch's losses; a collective unless the step has summed them."""
        if self._total is None:
            self._total = shared_sum(self.summand()).cpu()
        sums = result.sums
        means, squares, rows = self._total.tolist()
        mean = sums.total / sums.tokens if sums.tokens > 0 else math.nan
        if rows < 2:
            return BatchLoss(mean, math.nan)
        variance = (squares - means * means / rows) / (rows - 1)
        return BatchLoss(mean, math.sqrt(max(variance, 0.0)))
