"""Cause of batches refused in a row: the model, non-finite numbers, or the data."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

# Of the ways to part the batches into two groups of these sizes, the share that may part them by
# their routing at least as well as "before" and "refused" do.
_SIGNIFICANCE = 0.05
_PERMUTATIONS = 400

Cause = Literal["model", "not finite", "data", "targets"]


@dataclass(frozen=True)
class BatchEvidence:
    """A model's loss and routing on a batch, the same on every rank.

    Attributes:
        loss: Language-model loss in nats; NaN where loss or gradients are not finite.
        selections_LE: [MoE layers, E] float64 selections that routers wanted, over all ranks.
    """

    loss: float
    selections_LE: Tensor

    def state(self) -> list[Any]:
        """The state for a checkpoint, as plain numbers.

        None stands for NaN: saving compares ranks, and NaN is not equal.
        """
        loss = None if math.isnan(self.loss) else self.loss
        return [loss, self.selections_LE.tolist()]

    @classmethod
    def from_state(cls, state: Sequence[Any]) -> BatchEvidence:
        """Undo `state`."""
        loss, selections = state
        known = math.nan if loss is None else loss
        return cls(known, torch.tensor(selections, dtype=torch.float64))


# Meaning of each cause, and the user's remedy where it has ended a run.
_MEANING: dict[Cause, str] = {
    "model": "the model is at fault",
    "not finite": "the model is sound",
    "data": "the data have changed",
    "targets": "the texts are as before, but not the labels",
}
_REMEDY: dict[Cause, str] = {
    "not finite": "look at the texts of these batches, and at precision",
    "data": "resilience.guard_new_data=accept takes such batches",
    "targets": "look at how these texts were prepared; resilience.guard=false takes them",
}


@dataclass(frozen=True)
class _Finding:
    """A cause of refused batches, with the evidence as text."""

    cause: Cause
    numbers: str

    @property
    def text(self) -> str:
        """Numbers and cause."""
        return f"{self.numbers}: {_MEANING[self.cause]}"

    @property
    def remedy(self) -> str:
        """Remedy for the user."""
        return _REMEDY[self.cause]


def find_cause(
    refused: Sequence[BatchEvidence],
    before: Sequence[BatchEvidence],
    is_sound: Callable[[float], bool],
) -> _Finding:
    """Find out why batches were refused, from the current model's judgement of them.

    The model has not changed since the newest batch that it accepted. If it does not take batches
    from then (`before`, maybe none) any more, it was damaged by its last steps. If it does, the
    refused batches are at fault; and if these are also routed otherwise, then they are other texts.
    `is_sound` is true for a loss of earlier batches that an undamaged model gives.
    """
    usual = _median([batch.loss for batch in before])
    numbers = f"batches from before them have a loss of {usual:.4f} now"
    if not before:
        numbers = "no batch before them was accepted"
    if not math.isfinite(usual) or not is_sound(usual):
        return _Finding("model", numbers)
    if not all(math.isfinite(batch.loss) for batch in refused):
        return _Finding("not finite", numbers)
    groups = [[batch.selections_LE for batch in each] for each in (before, refused)]
    numbers += f"; {_moved_share(before, refused):.0%} of the selections are for other experts"
    return _Finding("data" if _has_moved(*groups) else "targets", numbers)


def _median(losses: Sequence[float]) -> float:
    """The median, NaN counting as infinite; NaN of nothing."""
    known = [math.inf if math.isnan(loss) else loss for loss in losses]
    return statistics.median(known) if known else math.nan


def num_needed(num_refused: int) -> int:
    """Batches from before the refused ones, for `_has_moved` to decide."""
    return max(num_refused, math.ceil(1 / _SIGNIFICANCE / num_refused))


def _has_moved(before: Sequence[Tensor], refused: Sequence[Tensor]) -> bool:
    """True if two groups of batches differ significantly in their experts' shares.

    A permutational analysis of variance (Anderson 2001) of Hellinger distances, of all layers
    together. It needs no scale of what is usual: under the same model batches of the same texts can
    be exchanged. Each batch has selections [MoE layers, E].
    """
    points = torch.stack([_coordinates(batch) for batch in (*before, *refused)])
    # Seeded, so that every rank decides alike.
    generator = torch.Generator().manual_seed(0)
    orders = torch.stack(
        [torch.randperm(len(points), generator=generator) for _ in range(_PERMUTATIONS)]
    )
    # [1 + permutations, batches] which batches make the first group, the observed one first.
    groups = torch.cat([torch.arange(len(points)).unsqueeze(0), orders]) < len(before)
    one = groups.double() @ points / len(before)
    other = (~groups).double() @ points / len(refused)
    # With groups of fixed sizes the sum of squares between them is a multiple of this.
    between = (one - other).square().sum(dim=1)
    # The same grouping comes again; rounding must not put it above itself.
    above = between[1:] > between[0] * (1 + 1e-9)
    is_enough = len(before) >= num_needed(len(refused))
    return is_enough and float(above.double().mean()) <= _SIGNIFICANCE


def _coordinates(selections_LE: Tensor) -> Tensor:
    shares = selections_LE / selections_LE.sum(dim=1, keepdim=True).clamp(min=1.0)
    return shares.sqrt().flatten()


def _moved_share(batches: Sequence[BatchEvidence], other: Sequence[BatchEvidence]) -> float:
    """Total variation distance of the experts' shares, mean over the layers."""
    sums = [
        torch.stack([batch.selections_LE for batch in each]).sum(dim=0) for each in (batches, other)
    ]
    shares = [each / each.sum(dim=1, keepdim=True).clamp(min=1.0) for each in sums]
    return float((shares[0] - shares[1]).abs().sum(dim=1).mean() / 2)
