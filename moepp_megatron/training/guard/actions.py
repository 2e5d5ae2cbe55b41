"""Carries the judge's decisions out in the routers: FFN experts only, tau."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from moepp_megatron.moe.budget import set_taus
from moepp_megatron.moe.layer import moepp_layers
from moepp_megatron.observe.guard_judge import layers_in
from moepp_megatron.training.setup import TrainingModel

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
    """Sets this rank's routers."""

    def __init__(self, model: TrainingModel) -> None:
        self._models = model.models
        self._layers = [layer for chunk in model.models for layer in moepp_layers(chunk)]

    def set_ffn_only(self, layers: Collection[int]) -> None:
        """Switch zero-computation experts off in these layers, by global number, and on elsewhere.

        In training and evaluation, from now on.
        """
        for layer in self._layers:
            layer.router.ffn_only = layer.layer_number in layers

    def set_taus(self, taus: Mapping[int, float]) -> None:
        """Set tau by global layer number."""
        set_taus(self._models, dict(taus))
