"""Copies of the routers' weights from steps in which they were healthy, to go back to."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from moepp_megatron.moe.layer import moepp_layers
from moepp_megatron.moe.router import MoEPPRouter
from moepp_megatron.training.checkpoint.optimizer import is_distributed, put_into_shard
from moepp_megatron.training.setup import TrainingModel

# Steps between copies.
_INTERVAL = 10


class RouterCopies:
    """Keeps, for each MoE layer, its router's weights of the newest step that proved them healthy.

    Every rank has one, holds the routers of its own layers, and calls it together. Weights are
    copied before a step and kept after it, because the step shows how these weights route; those
    that its optimizer leaves are seen in the next.

    Args:
        model: The wrapped model.
        state: Result of an earlier `state()`, which may be of another layout.

    Attributes:
        steps: The step before which the copy of each layer's router was made, by the layer's global
            number; the same on every rank.
    """

    def __init__(self, model: TrainingModel, state: Sequence[Sequence[Any]] = ()) -> None:
        self._model = model
        layers = [layer for chunk in model.models for layer in moepp_layers(chunk)]
        self._routers = {layer.layer_number: layer.router for layer in layers}
        self.steps: dict[int, int] = {layer: step for layer, step, _ in state}
        self._kept: dict[int, list[Tensor]] = {
            layer: [value.to(torch.cuda.current_device()) for value in values]
            for layer, _, values in state
            if layer in self._routers
        }
        self._taken: dict[int, list[Tensor]] = {}
        self._taken_at: int | None = None

    def state(self) -> list[list[Any]]:
        """The state for a checkpoint, the same on every rank; a collective."""
        own = {layer: [value.cpu() for value in values] for layer, values in self._kept.items()}
        group = parallel_state.get_pipeline_model_parallel_group()
        stages: list[dict[int, list[Tensor]]] = [{} for _ in range(dist.get_world_size(group))]
        dist.all_gather_object(stages, own, group=group)
        values = {layer: copies for stage in stages for layer, copies in stage.items()}
        return [[layer, step, values[layer]] for layer, step in sorted(self.steps.items())]

    def take(self, step: int) -> None:
        """Copy the routers before `step`, if they are due."""
        self._taken, self._taken_at = {}, None
        if step % _INTERVAL == 0:
            self._taken_at = step
            with self._model.gathered_parameters():
                self._taken = {
                    layer: [value.detach().clone() for value in _weights(router)]
                    for layer, router in self._routers.items()
                }

    def keep(self, layers: Collection[int]) -> None:
        """Keep what has been copied of these layers, which were healthy in the step."""
        if self._taken_at is not None:
            self.steps |= dict.fromkeys(layers, self._taken_at)
            self._kept |= {layer: self._taken[layer] for layer in layers if layer in self._taken}
        self._taken, self._taken_at = {}, None

    def put_back(self, layers: Iterable[int]) -> set[int]:
        """Give the routers of these layers the weights that were kept.

        Returns:
            The layers of which there is a copy.
        """
        found = {layer for layer in layers if layer in self.steps}
        if found:
            with self._model.gathered_parameters(), torch.no_grad():
                for layer in sorted(found & self._routers.keys()):
                    # The bias is last: a run may have been resumed with one, and copies are older.
                    pairs = zip(_weights(self._routers[layer]), self._kept[layer], strict=False)
                    for weight, value in pairs:
                        _overwrite(self._model.optimizer, weight, value)
        return found


def _weights(router: MoEPPRouter) -> list[Tensor]:
    """All that decides how a router routes."""
    biases = [] if router.expert_bias is None else [router.expert_bias]
    return [*router.parameters(), *biases]


def _overwrite(optimizer: MegatronOptimizer, weight: Tensor, value: Tensor) -> None:
    """Put a value into a weight, and into what this rank has of its fp32 copy in the optimizer."""
    weight.copy_(value)
    main: Tensor | None = getattr(weight, "main_param", None)
    for chained in getattr(optimizer, "chained_optimizers", [optimizer]):
        if is_distributed(chained):
            put_into_shard(chained, weight, value)
        elif main is not None:
            main.copy_(value.view_as(main))
