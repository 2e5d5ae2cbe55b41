"""The loss of multi-token prediction of a step, over all ranks."""

from __future__ import annotations

from typing import Any

import torch

from moepp_megatron.training.collect import sum_over_ranks
from moepp_megatron.training.setup import TrainingModel
from moepp_megatron.training.step_sums import first_of_tensor_ranks


class FurtherTokens:
    """What `model.multi_token_loss` has added up; every rank has one and calls it together.

    Args:
        model: The wrapped model.
        depths: `model.mtp_num_layers`.
    """

    def __init__(self, model: TrainingModel, depths: int) -> None:
        self._depths = depths
        self._losses = [m.further_loss for m in model.models if getattr(m, "mtp_process", False)]

    def reset(self) -> None:
        """Start counting a new step."""
        for loss in self._losses:
            loss.reset()

    def metrics(self) -> dict[str, Any]:
        """Fields for the record; a collective where there are depths."""
        if self._depths == 0:
            return {}
        total = torch.zeros(
            self._depths, 2, dtype=torch.float64, device=torch.cuda.current_device()
        )
        for loss in self._losses:
            if loss.sums is not None and first_of_tensor_ranks():
                total += loss.sums
        losses, counts = sum_over_ranks(total).unbind(dim=-1)
        return {"mtp_loss": float((losses / counts).mean())}
