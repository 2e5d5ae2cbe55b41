"""Keeps the routers' weights of the newest healthy step, and puts them back."""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from moepp_megatron.moe.router import MoEPPRouter
from moepp_megatron.runtime.distributed import gathered
from moepp_megatron.training.checkpoint.optimizer import copy_into_shard, is_distributed
from moepp_megatron.training.setup import TrainingModel

# Steps between copies of the routers' weights.
COPY_INTERVAL = 10


class RouterCopies:
    """Copies of all routers, each rank those of its own layers.

    Weights are copied before a step and kept after it, because the step shows how these weights
    route; those that its optimizer leaves are seen in the next. `state`, of an earlier run, may be
    of another layout.

    Attributes:
        step: The step before which the copies were made, the same on every rank; None without.
    """

    def __init__(self, model: TrainingModel, state: Sequence[Sequence[Any]]) -> None:
        self._model = model
        self._routers = {layer.layer_number: layer.router for layer in model.layers}
        # Of each layer its step, so that checkpoints of earlier versions can be read.
        self.step: int | None = max((step for _, step, _ in state), default=None)
        self._kept: dict[int, list[Tensor]] = {
            layer: [value.to(torch.cuda.current_device()) for value in values]
            for layer, _, values in state
            if layer in self._routers
        }
        # Step and copies that no healthy step has confirmed yet.
        self._taken: tuple[int, dict[int, list[Tensor]]] | None = None

    def state(self) -> list[list[Any]]:
        """The state for a checkpoint, the same on every rank; a collective."""
        own = {layer: [value.cpu() for value in values] for layer, values in self._kept.items()}
        stages = gathered(own, parallel_state.get_pipeline_model_parallel_group())
        values = {layer: copies for stage in stages for layer, copies in stage.items()}
        return [[layer, self.step, values[layer]] for layer in sorted(values)]

    def take(self, step: int) -> None:
        """Copy the routers before `step` if a copy is due, or none is kept."""
        self._taken = None
        if step % COPY_INTERVAL == 0 or self.step is None:
            with self._model.gathered_parameters():
                copies = {
                    layer: [value.detach().clone() for value in _weights(router)]
                    for layer, router in self._routers.items()
                }
            self._taken = step, copies

    def keep(self) -> None:
        """Keep the newest copies: their step was healthy."""
        if self._taken is not None:
            self.step, self._kept = self._taken
        self._taken = None

    def put_back(self) -> bool:
        """Give all routers the weights that were kept; False without any."""
        if self.step is None:
            return False
        with self._model.gathered_parameters(), torch.no_grad():
            for layer, values in sorted(self._kept.items()):
                # The bias is last: a run may have been resumed with one, and copies are older.
                pairs = zip(_weights(self._routers[layer]), values, strict=False)
                for weight, value in pairs:
                    _overwrite(self._model.optimizers, weight, value)
        return True


def _weights(router: MoEPPRouter) -> list[Tensor]:
    biases = [] if router.expert_bias is None else [router.expert_bias]
    return [*router.parameters(), *biases]


def _overwrite(optimizers: list[Any], weight: Tensor, value: Tensor) -> None:
    """Overwrite a weight, and this rank's part of its fp32 copy in its optimizer."""
    weight.copy_(value)
    main: Tensor | None = getattr(weight, "main_param", None)
    for chained in optimizers:
        if is_distributed(chained):
            copy_into_shard(chained, weight, value)
        elif main is not None:
            main.copy_(value.view_as(main))
