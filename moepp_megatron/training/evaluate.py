"""Validation losses: of the data that is trained on, and of further sets by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moepp_megatron.config import Config, Layout
from moepp_megatron.training.batches import rank_batches
from moepp_megatron.training.collect import mean_loss
from moepp_megatron.training.setup import TrainingModel
from moepp_megatron.training.step import run_schedule


@dataclass(frozen=True)
class Validation:
    """What a run validates on.

    Attributes:
        whole: The validation part of the data that is trained on; None without one.
        named: The sets of `data.validation`.
    """

    whole: Any | None
    named: Mapping[str, Any]

    @property
    def exists(self) -> bool:
        """Whether there is anything to validate on."""
        return self.whole is not None or bool(self.named)

    def losses(self, model: TrainingModel, config: Config, layout: Layout) -> dict[str, Any]:
        """Fields for the record; every rank must call."""

        def loss_of(dataset: Any) -> float:
            return validation_loss(model, dataset, config, layout)

        return {
            "valid_loss": None if self.whole is None else loss_of(self.whole),
            "valid_set_loss": {name: loss_of(each) for name, each in self.named.items()} or None,
        }


@torch.no_grad()
def validation_loss(model: TrainingModel, dataset: Any, config: Config, layout: Layout) -> float:
    """Token mean over the first `training.eval_iters` global batches of the validation set.

    The same sequences every time, so that values compare. Every rank must call.
    """
    model.set_training(False)
    batches = rank_batches(dataset, 0, config, len(model.chunks))
    losses = torch.zeros(2, dtype=torch.float64, device=torch.cuda.current_device())
    with model.gathered_parameters():
        for _ in range(config.training.eval_iters):
            losses += run_schedule(
                model, batches, config, layout.num_microbatches, forward_only=True
            )
    model.set_training(True)
    return mean_loss(losses)
