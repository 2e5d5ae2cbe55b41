"""Carries the judge's decisions out in the routers: FFN demands, forced tokens, tau."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from moepp_megatron.config import Config
from moepp_megatron.moe.budget import set_taus
from moepp_megatron.moe.ffn_demand import FFNDemand
from moepp_megatron.moe.layer import moepp_layers
from moepp_megatron.observe.guard_judge import layers_in
from moepp_megatron.training.setup import TrainingModel
from moepp_megatron.training.tagging import tags_of

# Tau times less than this is tau.
_LEAST_RAISE = 1.001


class RaisedTau:
    """Factor on tau in each MoE layer.

    It is the full factor while the action lasts; then its logarithm halves every `half_life` steps,
    because a sudden fall of tau would be a disturbance of its own. It also multiplies a budget's
    tau, whose controller takes the factor back as far as the share exceeds the target.

    Args:
        layer_numbers: Global numbers of all MoE layers.
        factor: `routing_guard.tau_factor`.
        half_life: `routing_guard.tau_half_life`, in steps.
        state: Result of an earlier `state()`.
    """

    def __init__(
        self,
        layer_numbers: Sequence[int],
        factor: float,
        half_life: float,
        state: Sequence[tuple[int, float]] = (),
    ) -> None:
        self._factor, self._half_life = factor, half_life
        known = {int(layer): float(value) for layer, value in state}
        self.factors = {layer: known.get(layer, 1.0) for layer in layer_numbers}

    def state(self) -> list[tuple[int, float]]:
        """The state for a checkpoint: layers whose tau is raised, and their factors."""
        return [(layer, factor) for layer, factor in self.factors.items() if factor != 1.0]

    def step(self, places: Collection[int]) -> None:
        """Update the factors after a step has been judged.

        Args:
            places: Layers, or `WHOLE_MODEL`, where the action is in force.
        """
        raised = layers_in(places, self.factors)
        for layer, factor in self.factors.items():
            if layer in raised:
                self.factors[layer] = self._factor
            else:
                rest = factor**0.5 ** (1.0 / self._half_life)
                self.factors[layer] = rest if rest >= _LEAST_RAISE else 1.0


class RouterControl:
    """Sets this rank's routers.

    Args:
        config: The run's configuration.
        model: The wrapped model.
        needs_tags: Whether routers must be told which tokens are forced.
    """

    def __init__(self, config: Config, model: TrainingModel, needs_tags: bool) -> None:
        self._models = model.models
        self._vocab_size = config.model.vocab_size
        self._layers = [layer for chunk in model.models for layer in moepp_layers(chunk)]
        if needs_tags:
            for chunk in self._models:
                tags_of(chunk, config)

    def demand(self, demands: Mapping[int, FFNDemand], forced_ids: Tensor | None) -> None:
        """Set what routers must give their tokens, in training and evaluation, from now on.

        Args:
            demands: Demand by global layer number; a layer without one is unaffected.
            forced_ids: [vocabulary] bool token ids that the demand `one` concerns; None for all.
                Other demands ignore it.
        """
        for layer in self._layers:
            layer.router.set_ffn_demand(demands.get(layer.layer_number, "none"))
        for chunk in self._models:
            tags = getattr(chunk, "token_tags", None)
            if tags is not None:
                # Without a mask tags force none; without tags all are forced.
                mask = torch.ones(self._vocab_size).bool() if forced_ids is None else forced_ids
                tags.forced_ids = mask.to(torch.cuda.current_device())

    def set_taus(self, taus: Mapping[int, float]) -> None:
        """Set tau by global layer number."""
        set_taus(self._models, dict(taus))
