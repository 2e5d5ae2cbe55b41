"""The loss of each batch and how much its sequences differ, the same on every rank."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from moepp_megatron.training.step import Batch, StepResult


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


class BatchLosses:
    """Adds up a batch's losses, on the device and without waiting for it."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Begin a new batch."""
        # Sum of the sequences' means, sum of their squares, number.
        self._sums: Tensor | None = None

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

    def end(self, result: StepResult) -> BatchLoss:
        """The batch's losses; every rank must call.

        The sums are made on rank 0 and sent from there: after an all-reduce ranks may differ in the
        last bits, and what they decide by it as well.
        """
        device = torch.cuda.current_device()
        values = torch.zeros(5, dtype=torch.float64, device=device)
        # Tensor-parallel ranks hold the same tokens: only the first of each group counts.
        if parallel_state.get_tensor_model_parallel_rank() == 0:
            values[:2] = result.losses.to(device, torch.float64)
            if self._sums is not None:
                values[2:] = self._sums.to(device)
        dist.reduce(values, dst=0)
        dist.broadcast(values, src=0)
        total, tokens, means, squares, rows = values.tolist()
        mean = total / tokens if tokens > 0 else math.nan
        if rows < 2:
            return BatchLoss(mean, math.nan)
        variance = (squares - means * means / rows) / (rows - 1)
        return BatchLoss(mean, math.sqrt(max(variance, 0.0)))
