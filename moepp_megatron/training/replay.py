"""What the model makes of batches that it was trained on before, without changing it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moepp_megatron.config import Config, Layout
from moepp_megatron.training.batches import rank_batches
from moepp_megatron.training.resilience.refused_batches import BatchEvidence
from moepp_megatron.training.routers import Routers
from moepp_megatron.training.schedule import BatchSizes
from moepp_megatron.training.setup import TrainingModel
from moepp_megatron.training.step import compute_gradients, unchanged


def replay(
    model: TrainingModel,
    routers: Routers,
    dataset: Any,
    config: Config,
    layout: Layout,
    first_samples: Sequence[int],
) -> list[BatchEvidence]:
    """Loss and routing of global batches; every rank must call.

    Args:
        model: The wrapped model in training mode; its gradients are replaced.
        routers: Count the selections.
        dataset: The training set.
        config: The run's configuration.
        layout: The rank grid.
        first_samples: Where each of the batches begins.
    """
    found, sizes = [], BatchSizes(config)
    # Data loaders draw random numbers too.
    with unchanged(model):
        for first_sample in first_samples:
            iterators = rank_batches(dataset, first_sample, config, len(model.chunks))
            routers.reset_counts()
            then = sizes.layout(layout, first_sample)
            result = compute_gradients(model, iterators, config, then)
            found.append(BatchEvidence(result.sums.loss, routers.selections()))
    return found
