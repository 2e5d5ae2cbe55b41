"""Validation loss."""

from __future__ import annotations

from typing import Any

import torch

from moepp_megatron.config import Config, Layout
from moepp_megatron.training.batches import rank_batches
from moepp_megatron.training.collect import mean_loss
from moepp_megatron.training.setup import TrainingModel
from moepp_megatron.training.step import run_schedule


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
