"""Applies the budget of FFN experts per token to the model, step by step."""

from __future__ import annotations

from typing import Any

from moepp_megatron.config import Config
from moepp_megatron.model.megatron_config import moepp_config
from moepp_megatron.moe.budget import Budget, BudgetController, add_to_biases, set_taus
from moepp_megatron.training.collect import RoutingCollector
from moepp_megatron.training.setup import TrainingModel


class BudgetControl:
    """Holds the model to `moe.budget`. Every rank has one and calls its methods together.

    Args:
        config: The run's configuration; `moe.budget.acts` is true.
        model: The wrapped model.
        routing: Counts the selections of a step.
        state: State from a checkpoint; None at the beginning.
    """

    def __init__(
        self,
        config: Config,
        model: TrainingModel,
        routing: RoutingCollector,
        state: dict[str, Any] | None,
    ) -> None:
        self._model, self._routing = model, routing
        # Tau of each layer in the step that is under way or has just been taken.
        self._in_force: dict[int, float] = {}
        self._controller = BudgetController(
            _budget(config), moepp_config(config), len(routing.layer_numbers), state
        )

    def begin_step(self, step: int) -> None:
        """Set tau for `step`."""
        self._in_force = self.taus(step)
        set_taus(self._model.models, self._in_force)

    def taus(self, step: int) -> dict[int, float]:
        """Tau in `step` by global layer number, of all MoE layers."""
        return dict(zip(self._routing.layer_numbers, self._controller.taus(step), strict=True))

    def share(self, step: int) -> float:
        """Target of the FFN share of all selections in `step`."""
        return self._controller.budget.share_at(step)

    def end_step(self, step: int) -> dict[str, Any]:
        """Learn from the selections of `step`, once the optimizer has acted; a collective.

        Returns:
            `state()` after it.
        """
        biases = self._controller.observe(self._routing.selections(), step)
        if biases is not None:
            add_to_biases(self._model.models, self._routing.layer_numbers, biases)
        return self.state()

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint: plain numbers, copies that later steps do not change."""
        return self._controller.state()

    def metrics(self, step: int) -> dict[str, Any]:
        """Fields of the record of `step`, the last that `begin_step` began.

        `tau` is what this step was trained with, as a mean over layers; what the controller has
        learnt from the step since acts on the next one.
        """
        taus = self._in_force.values()
        return {"ffn_target": self.share(step), "tau": sum(taus) / len(taus)}


def _budget(config: Config) -> Budget:
    moe, settings = config.moe, config.moe.budget
    start = settings.start_ffn_per_token
    return Budget(
        share=moe.ffn_share,
        controller=settings.controller,
        gain=settings.controller_gain,
        decay=settings.decay,
        per_layer=settings.scope == "layer",
        start_share=None if start is None else start / moe.router_topk,
        ramp_begin=settings.ramp_begin,
        ramp_steps=settings.ramp_steps,
    )
