"""The routing guard of a run: its readings, decisions, actions, alerts and state."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from moepp_megatron.config import Config
from moepp_megatron.config.guard_metrics import MEASURED, RECORDED
from moepp_megatron.config.guard_rules import effective_rules
from moepp_megatron.observe.alerts import Alert
from moepp_megatron.observe.guard_judge import Event, RuleJudge, Values
from moepp_megatron.observe.past import Past
from moepp_megatron.observe.shift.reading import ShiftReading, ShiftStory
from moepp_megatron.training.guard.actions import RaisedTau, RouterControl
from moepp_megatron.training.guard.alerts import told
from moepp_megatron.training.guard.fallen import METRIC as FALLEN
from moepp_megatron.training.guard.fallen import FallenClasses
from moepp_megatron.training.guard.readings import counted, from_first_rank, measured
from moepp_megatron.training.guard.safe_mode import ACTION as SAFE_MODE
from moepp_megatron.training.guard.safe_mode import SafeMode
from moepp_megatron.training.parts.batch_losses import BatchLoss
from moepp_megatron.training.parts.budget import BudgetControl
from moepp_megatron.training.parts.router_health import HealthCollector
from moepp_megatron.training.parts.routing_counts import RoutingCounts
from moepp_megatron.training.parts.token_groups import GroupCollector
from moepp_megatron.training.setup import TrainingModel
from moepp_megatron.training.step import StepResult

# Metrics whose alerts say what has moved.
_SHIFTS = ("routing_shift", "loss_shift", "token_shift", "source_shift")
# Actions that go on until the rule is healthy.
_LASTING = ("raise_tau", "safe_mode")


@dataclass(frozen=True)
class GuardVerdict:
    """Result of the guard's judgement of a step.

    Attributes:
        alerts: Alerts for the rank that reports them, without those of rollbacks.
        rollbacks: Rules that demand a rollback, with their places.
    """

    alerts: list[Alert]
    rollbacks: list[Event]

    @property
    def healthy_steps_ago(self) -> int:
        """Steps since the newest one in which none of these rules held."""
        return max(event.held_for for event in self.rollbacks)

    def rollback_alerts(self, step: int, checkpoint: Path | None, newest: int) -> list[Alert]:
        """Alerts of the rollbacks.

        Args:
            step: The step that was judged.
            checkpoint: The checkpoint that is loaded; None if there is none.
            newest: The last step before the rules held.
        """
        if checkpoint is not None:
            note = f"back to {checkpoint.name}"
            return [told(event, step, False, note) for event in self.rollbacks]
        note = f"no checkpoint of step {newest} or before to go back to"
        return [told(replace(event, action="warn"), step, False, note) for event in self.rollbacks]


NOTHING = GuardVerdict([], [])


class RoutingGuard:
    """Judges the rules of `routing_guard` and acts. Every rank has one and calls it together.

    All ranks decide alike in the same step, because they judge rank 0's numbers by a judge that has
    no other input (`readings`, `observe.rules`). A dry run reads, judges and reports, but never
    changes the model.

    Args:
        config: The run's configuration; the guard is enabled.
        model: The wrapped model.
        routing: Counts the selections of a step.
        health: Measures the routers of a step.
        groups: Counts by class of tokens; None where these are not counted.
        state: State from a checkpoint; None at the beginning.
    """

    def __init__(
        self,
        config: Config,
        model: TrainingModel,
        routing: RoutingCounts,
        health: HealthCollector,
        groups: GroupCollector | None,
        state: Mapping[str, Any] | None,
    ) -> None:
        self._config, self._settings = config, config.routing_guard
        self._routing, self._health, self._groups = routing, health, groups
        self._layers = routing.layer_numbers
        rules = effective_rules(self._settings)
        self._metrics = {rule.metric for rule in rules}
        state = state or {}
        self._judge = RuleJudge(rules, self._layers, state.get("judge"))
        self._routers: RouterControl | None = None
        if self._settings.acts:
            self._routers = RouterControl(model)
        self._model = model
        self._may_be_safe = self._settings.acts and any(r.action == SAFE_MODE for r in rules)
        # What the routers have been given, where that is not the budget's or `moe.tau`.
        self._raised_taus: dict[int, float] = {}
        self._load(state)

    def _load(self, state: Mapping[str, Any]) -> None:
        """Restore the state that follows from the decisions."""
        settings = self._settings
        self._raised = RaisedTau(
            self._layers, settings.tau_factor, settings.tau_half_life, state.get("raised", ())
        )
        self._safe: SafeMode | None = None
        if self._may_be_safe:
            self._safe = SafeMode(self._model, self._judge, self._layers, state.get("safe", {}))
        self._past = Past(len(self._layers), state.get("past"))
        self._fallen = self._open_fallen(state.get("fallen"))

    def _open_fallen(self, state: Mapping[str, Any] | None) -> FallenClasses | None:
        if self._groups is None or FALLEN not in self._metrics:
            return None
        return FallenClasses(self._groups, self._layers, state)

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint, the same on every rank; a collective.

        Later steps do not change it.
        """
        state: dict[str, Any] = {
            "judge": self._judge.state(),
            "raised": self._raised.state(),
            "past": self._past.state(),
        }
        if self._safe is not None:
            state["safe"] = self._safe.state()
        if self._fallen is not None:
            state["fallen"] = self._fallen.state()
        return state

    def begin_step(self, step: int, budget: BudgetControl | None) -> None:
        """Carry out the decisions in `step`, and in an evaluation after it.

        Args:
            step: The step that begins.
            budget: Sets tau where the guard does not; None leaves `moe.tau`.
        """
        self._wanted_share = self._config.moe.ffn_share if budget is None else budget.share(step)
        self._in_force = sum(len(self._judge.places(action)) for action in _LASTING)
        if self._routers is None:
            return
        self._set_taus(step, budget)
        if self._safe is not None:
            self._safe.begin_step(step)
            self._routers.set_ffn_only(self._safe.ffn_only())

    def _set_taus(self, step: int, budget: BudgetControl | None) -> None:
        was_raised, self._raised_taus = bool(self._raised_taus), {}
        factors = self._raised.factors
        if not was_raised and all(factor == 1.0 for factor in factors.values()):
            return
        taus = dict.fromkeys(self._layers, self._config.moe.balanced_tau)
        if budget is not None:
            taus = budget.taus(step)
        taus = {layer: tau * factors[layer] for layer, tau in taus.items()}
        assert self._routers is not None, "a dry run sets nothing"
        self._routers.set_taus(taus)
        if any(factor != 1.0 for factor in factors.values()):
            self._raised_taus = taus

    def end_step(
        self,
        step: int,
        result: StepResult,
        loss: BatchLoss,
        shift: ShiftReading | None = None,
        explain: Callable[[], ShiftStory | None] = lambda: None,
    ) -> GuardVerdict:
        """Judge `step`, once the optimizer has acted, or a batch refused after it; a collective.

        Args:
            step: The step.
            result: Result of the step.
            loss: The step's losses, to the same bits on every rank.
            shift: What is known of a shift; None if none is judged.
            explain: Says what a shift is about; a collective.
        """
        if step <= self._settings.warmup:
            return NOTHING
        values = self._read(result, loss, shift)
        events = self._judge.judge(values)
        rollbacks: list[Event] = []
        if self._settings.acts:
            self._raised.step(self._judge.places("raise_tau"))
            rollbacks = [event for event in events if event.begins and event.action == "rollback"]
        if self._safe is not None:
            self._safe.end_step(events, values)
        others = [event for event in events if event not in rollbacks]
        # All ranks have the same events, so all of them ask.
        is_shift = any(event.begins and event.rule.metric in _SHIFTS for event in others)
        story = explain() if is_shift else None
        alerts = [
            told(event, step, not self._settings.acts, story=story)
            if event.rule.metric in _SHIFTS and event.begins
            else told(event, step, not self._settings.acts, self._note(event))
            for event in others
        ]
        return GuardVerdict(alerts, rollbacks)

    def go_back(self, step: int, state: Mapping[str, Any] | None) -> list[Alert]:
        """Reset all rules after a checkpoint has been loaded.

        Counts and times of past actions are kept; otherwise a rule could demand rollbacks for ever.

        Args:
            step: The step that was judged.
            state: State of the checkpoint.

        Returns:
            The alerts for the ends of other actions.
        """
        self._load(state or {})
        return self._forget(step, "went back to a checkpoint")

    def announce_stage(self, step: int) -> list[Alert]:
        """Reset all rules, because other data follow after `step`; the alerts are of ends."""
        self._past = Past(len(self._layers))
        self._fallen = self._open_fallen(None)
        return self._forget(step, "new stage")

    def _forget(self, step: int, note: str) -> list[Alert]:
        ended = [event for event in self._judge.forget() if event.action != "rollback"]
        return [told(event, step, not self._settings.acts, note) for event in ended]

    def _note(self, event: Event) -> str:
        """Further text of an alert: which classes of tokens fell, where a router went back to."""
        if self._fallen is not None and event.rule.metric == FALLEN and event.begins:
            return self._fallen.note(event.layer, event.rule.limit)
        return "" if self._safe is None else self._safe.note(event)

    def _read(self, result: StepResult, loss: BatchLoss, shift: ShiftReading | None) -> Values:
        """This step's values of the metrics that rules use."""
        moe = self._config.moe
        selected_LE = self._routing.selections()
        values = dict(
            counted(selected_LE, moe.num_ffn_experts, moe.router_topk, self._wanted_share)
        )
        if self._metrics & MEASURED.keys():
            health = self._health.collect().get("router_health", {})
            values |= measured(health, moe.num_experts)
        if self._metrics & RECORDED.keys():
            fields = self._routing.collect()
            values |= {name: cast(float, fields[name]) for name in RECORDED if name in fields}
        # Those of a refused batch are not the model's: the numerical guard has judged them.
        if result.updated:
            values |= {"grad_norm": result.grad_norm, "loss": loss.mean}
        if shift is not None:
            values |= shift.metrics
        if self._fallen is not None:
            values[FALLEN] = self._fallen.end_step()
        values = dict(from_first_rank(values))
        shares = cast(Sequence[float], values["ffn_fraction"])
        own = (cast(float, values.get(name, math.nan)) for name in ("grad_norm", "loss"))
        return {**values, **self._past.add(shares, *own)}

    def metrics(self) -> dict[str, Any]:
        """Fields of the record of the step that is under way or has just been taken."""
        found: dict[str, Any] = {"guard_actions": self._in_force}
        if self._raised_taus:
            found["tau"] = sum(self._raised_taus.values()) / len(self._raised_taus)
        return found
