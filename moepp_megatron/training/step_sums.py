"""A step's reductions: summed over all ranks in one collective, read from the device once.

Each read makes the host wait for all work that is queued, and the device idles until the host has
queued more. So the loss, the gradient norm, whether both are sound, and whatever else is counted in
a step (`Summand`) travel together, after the backward pass and before the optimizer acts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from numpy.typing import NDArray
from torch import Tensor


class Summand(Protocol):
    """A quantity that every rank counts in a step and that is summed over all."""

    def summand(self) -> Tensor:
        """[n] float64 on the device, this rank's; n is the same on all ranks."""

    def take_sum(self, total: Tensor) -> None:
        """[n] float64 on the CPU, the sum over all ranks, the same bits on each."""


@dataclass(frozen=True)
class StepSums:
    """The values read; `total` is the sum over all ranks of the losses of `tokens` that count.

    `loss` is their mean; NaN if it or the gradients of any rank are not finite, or no token counts.
    `grad_norm` is the global gradient norm as this rank knows it.
    """

    loss: float
    grad_norm: float
    total: float
    tokens: float


def shared_sum(values: Tensor) -> Tensor:
    """Sum a float64 tensor over all ranks, on the device and in place; all get the same bits."""
    # The sums are made on rank 0 and sent from there: after an all-reduce ranks may differ in the
    # last bits, and what they decide by it as well.
    dist.reduce(values, dst=0)
    dist.broadcast(values, src=0)
    return values


def first_of_tensor_ranks() -> bool:
    """True on the tensor-parallel rank that counts tokens which all of them have."""
    return parallel_state.get_tensor_model_parallel_rank() == 0


def zeros(*shape: int) -> Tensor:
    """Float64 zeros on the device, to add up in."""
    return torch.zeros(shape, dtype=torch.float64, device=torch.cuda.current_device())


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum a float64 tensor over all ranks; returned on the CPU."""
    on_device = values.to(torch.cuda.current_device())
    dist.all_reduce(on_device)
    return on_device.cpu()


def mean_loss(losses: Tensor) -> float:
    """Return the token mean of [2] losses and counts of all ranks; NaN if no token counts."""
    if not first_of_tensor_ranks():
        losses = torch.zeros_like(losses)
    total, count = sum_over_ranks(losses).tolist()
    return total / count if count > 0 else math.nan


class StepCounts:
    """Numbers that each rank adds up during a step, without waiting for the device; a `Summand`.

    `own` are this rank's, [*shape] float64 on the device; `shape` is the same on all ranks.
    """

    def __init__(self, *shape: int) -> None:
        self.own = zeros(*shape)
        self._total: Tensor | None = None

    def reset(self) -> None:
        """Begin a new step."""
        self.own.zero_()
        self._total = None

    def summand(self) -> Tensor:
        """[n] float64 on the device, this rank's numbers."""
        return self.own.reshape(-1)

    def take_sum(self, total: Tensor) -> None:
        """Note their sums [n] over all ranks."""
        self._total = total

    def total(self) -> NDArray[np.float64]:
        """Return [*shape] sums, the same bits on each rank; a collective unless they are known."""
        if self._total is None:
            self._total = shared_sum(self.summand().clone()).cpu()
        sums: NDArray[np.float64] = self._total.reshape(self.own.shape).numpy()
        return sums


def read_step(
    losses: Tensor, squares: Tensor, found_inf: bool, summands: Sequence[Summand]
) -> StepSums:
    """Sum and read; every rank must call.

    `losses` are this rank's sum of token losses and number of tokens, [2] float64; `squares` are
    the squared gradient norms of each optimizer, [optimizers] fp32; both are on the device.
    `found_inf` says that an optimizer has gradients that are not finite. Each summand gets its sum.
    """
    is_bad = torch.full_like(losses[:1], float(found_inf))
    is_bad += 1.0 - (losses.isfinite().all() & squares.isfinite().all()).double()
    counted = losses if first_of_tensor_ranks() else torch.zeros_like(losses)
    parts = [counted, is_bad, *(each.summand() for each in summands)]
    ends = [len(part) for part in parts[2:]]
    shared = shared_sum(torch.cat(parts))
    host = torch.cat([shared, squares.double()]).cpu()
    head, *rest, own = host.split([3, *ends, len(squares)])
    total, tokens, num_bad = head.tolist()
    for each, part in zip(summands, rest, strict=True):
        each.take_sum(part)
    # Rounded as megatron-core's.
    norms = [square**0.5 for square in own.tolist()]
    norm = norms[0] if len(norms) == 1 else math.sqrt(sum(each**2 for each in norms))
    loss = total / tokens if tokens > 0 and num_bad == 0 else math.nan
    return StepSums(loss, math.inf if found_inf else norm, total, tokens)
