"""Applies the budget of FFN experts per token to the model, step by step."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from moepp_megatron.config import Config, Layout
from moepp_megatron.model.megatron_config import moepp_config
from moepp_megatron.moe.budget import Budget, BudgetController
from moepp_megatron.observe.alerts import Alert
from moepp_megatron.observe.guard_judge import CompleteRule, RuleJudge
from moepp_megatron.training.part import Fields, Part, PartContext, State, Step, Why
from moepp_megatron.training.parts.routing_counts import RoutingCountsPart
from moepp_megatron.training.setup import TrainingModel

# How far the share, smoothed over 20 steps, may stay from the target.
_MISSED = CompleteRule(
    "budget_missed", "ffn_to_target", limit=0.1, is_above=True, clear=0.05, for_steps=100
)
_SMOOTHING = 0.95


class BudgetPart(Part):
    """Keeps the model to `moe.budget`."""

    key = "budget"

    def __init__(self, config: Config, model: TrainingModel, routing: RoutingCountsPart) -> None:
        self._config, self._routing = config, routing
        self._layers = model.layers
        # Tau of each layer in the step that is under way or has just been taken.
        self._in_force: dict[int, float] = {}
        self.load({}, "resume", 0)
        routing.watch(margins=self._controller.needs_margins)

    @classmethod
    def of(cls, run: PartContext) -> "BudgetPart | None":
        """The part of a run; None without a budget."""
        if not run.config.moe.budget.acts:
            return None
        return cls(run.config, run.model, run.require(RoutingCountsPart))

    def load(self, state: State, why: Why, step: int) -> Iterable[Alert]:
        """Take over the controller."""
        self._controller = BudgetController(
            _budget(self._config),
            moepp_config(self._config),
            len(self._routing.layer_numbers),
            dict(state) or None,
        )
        # How far the share is from the target, smoothed.
        self._off: float = state.get("off", 0.0)
        self._judge = RuleJudge((_MISSED,), (), state.get("rules", ()))
        return ()

    def restart(self) -> None:
        """Forget earlier measurements, made with other routers."""
        self.load({**self.state(), "drift": None, "lacking": None}, "rollback", 0)

    def begin_step(self, step: int, layout: Layout) -> None:
        """Set tau for `step`."""
        self._in_force = self.taus(step)
        for layer in self._layers:
            layer.router.set_tau(self._in_force[layer.layer_number])

    def taus(self, step: int) -> dict[int, float]:
        """Tau in `step` by global layer number, of all MoE layers."""
        return dict(zip(self._routing.layer_numbers, self._controller.taus(step), strict=True))

    def share(self, step: int) -> float:
        """Target of the FFN share of all selections in `step`."""
        return self._controller.budget.share_at(step)

    def end_step(self, step: Step) -> list[Alert]:
        """Learn from the selections of a step that was taken; an alert if the target is missed."""
        if not step.updated:
            return []
        return self.learn(step.number)

    def learn(self, step: int) -> list[Alert]:
        """Learn from the selections of `step`, once the optimizer has acted; a collective."""
        margins = self._routing.margins() if self._controller.needs_margins else None
        selected_LE = self._routing.selections()
        biases = self._controller.observe(selected_LE, step, margins)
        if biases is not None:
            self._add_to_biases(biases)
        ffn = selected_LE[:, : self._config.moe.num_ffn_experts].sum(dim=1)
        return self._report(step, float((ffn / selected_LE.sum(dim=1)).mean()))

    @torch.no_grad()
    def _add_to_biases(self, steps_LE: Tensor) -> None:
        """Add [MoE layers, E] steps, of the layers of all ranks, to this rank's biases."""
        if torch.cuda.is_available():
            # The host waits for a copy from memory that is not pinned.
            steps_LE = steps_LE.pin_memory().to(torch.cuda.current_device(), non_blocking=True)
        for layer in self._layers:
            bias = layer.router.expert_bias
            assert bias is not None, f"MoE layer {layer.layer_number} has no selection bias"
            bias.add_(steps_LE[self._routing.layer_numbers.index(layer.layer_number)])

    def _report(self, step: int, share: float) -> list[Alert]:
        target = self.share(step)
        self._off = _SMOOTHING * self._off + (1.0 - _SMOOTHING) * (share / target - 1.0)
        is_on_its_way = target != self._controller.budget.share
        distance = 0.0 if is_on_its_way else abs(self._off)
        return [
            Alert(
                step=step,
                rule=_MISSED.name,
                metric=_MISSED.metric,
                value=1.0 + self._off,
                condition=f"not within {_MISSED.limit:.0%} of 1 for {_MISSED.for_steps} steps",
                severity=_MISSED.severity,
                action=_MISSED.action,
                remedy=f"{self._why()} (docs/budget.md#the-alert)",
            )
            for event in self._judge.judge({_MISSED.metric: distance})
            if event.begins
        ]

    def _why(self) -> str:
        """Explain why the target is missed, and the remedy."""
        moe, budget = self._config.moe, self._controller.budget
        if budget.controller == "none":
            return "no controller holds it; use moe.budget.controller bias"
        if budget.controller == "tau":
            tau = sum(self._in_force.values()) / len(self._in_force)
            return (
                f"tau is {tau:.3g}, {moe.tau_for(budget.share):.3g} under perfect balance, and "
                f"routers do not follow; moe.balance_coeff ({moe.balance_coeff:g}) is too small "
                "for this target: use moe.budget.controller bias, or a larger one"
            )
        if budget.gain is not None:
            return f"moe.budget.gain ({budget.gain:g}) is too small or too large; leave it out"
        return f"routers change faster than moe.budget.response ({budget.response:g}); use 1"

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint: plain numbers, copies that later steps do not change."""
        own = {"off": self._off, "rules": self._judge.state()}
        return self._controller.state() | own

    def record(self, step: Step, fields: Fields) -> Fields:
        """Return the target, and the mean over layers of the tau that this step trained with."""
        taus = self._in_force.values()
        return {"ffn_target": self.share(step.number), "tau": sum(taus) / len(taus)}


def _budget(config: Config) -> Budget:
    moe, settings = config.moe, config.moe.budget
    start = settings.start_ffn_per_token
    return Budget(
        share=moe.ffn_share,
        controller=settings.held_by,
        gain=settings.fixed_gain,
        response=settings.response,
        decay=settings.decay,
        per_layer={"layer": True, "model": False}[settings.scope],
        start_share=None if start is None else start / moe.router_topk,
        ramp_begin=settings.ramp_begin,
        ramp_steps=settings.ramp_steps,
    )
