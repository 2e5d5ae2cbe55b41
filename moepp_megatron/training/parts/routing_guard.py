"""The routing guard of a run: its readings, decisions, actions, alerts and state."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from moepp_megatron.config import Layout
from moepp_megatron.config.guard_metrics import MEASURED, RECORDED
from moepp_megatron.config.guard_rules import effective_rules, is_watched
from moepp_megatron.observe.alerts import Alert
from moepp_megatron.observe.guard_judge import Event, RuleJudge, Values
from moepp_megatron.observe.past import Past
from moepp_megatron.training.guard.actions import SAFE_MODE, RaisedTau, RouterControl, SafeMode
from moepp_megatron.training.guard.alerts import alert_of
from moepp_megatron.training.guard.fallen import METRIC as FALLEN
from moepp_megatron.training.guard.fallen import FallenClasses
from moepp_megatron.training.guard.readings import counted, from_first_rank, measured
from moepp_megatron.training.part import GoBack, Outcome, Part, Run, Step
from moepp_megatron.training.parts.batch_losses import BatchLosses
from moepp_megatron.training.parts.budget import BudgetControl
from moepp_megatron.training.parts.router_health import HealthCollector
from moepp_megatron.training.parts.routing_counts import RoutingCounts
from moepp_megatron.training.parts.shift import Shift
from moepp_megatron.training.parts.token_groups import GroupCollector

# Metrics whose alerts say what has moved.
_SHIFTS = ("routing_shift", "loss_shift", "token_shift", "source_shift")
# Actions that last until the rule is healthy.
_LASTING = ("raise_tau", SAFE_MODE)


class RoutingGuard(Part):
    """Judges the rules of `routing_guard` and acts.

    All ranks decide alike in the same step, because they judge rank 0's numbers by a judge that has
    no other input (`readings`, `observe.guard_judge`). A dry run reads, judges and reports, but
    never changes the model.

    Args:
        run: The run; its routers are watched.
    """

    def __init__(self, run: Run) -> None:
        self._config, self._settings = run.config, run.config.routing_guard
        self._counts, self._losses = run.require(RoutingCounts), run.require(BatchLosses)
        self._health, self._groups = run.require(HealthCollector), run.find(GroupCollector)
        self._budget, self._shift = run.find(BudgetControl), run.find(Shift)
        self._model, self._layers = run.model, self._counts.layer_numbers
        rules = effective_rules(self._settings)
        self._metrics = {rule.metric for rule in rules}
        state = run.extra.get("guard") or {}
        self._judge = RuleJudge(rules, self._layers, state.get("judge"))
        self._routers = RouterControl(run.model) if self._settings.acts else None
        self._may_be_safe = self._settings.acts and any(r.action == SAFE_MODE for r in rules)
        # What the routers have been given, where that is not the budget's or `moe.tau`.
        self._raised_taus: dict[int, float] = {}
        self._load(state)

    @classmethod
    def of(cls, run: Run) -> RoutingGuard | None:
        """The part of a run; None where routers are not watched."""
        return cls(run) if is_watched(run.config) else None

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
        """Rules, actions and copies of routers, the same on every rank; a collective."""
        state: dict[str, Any] = {
            "judge": self._judge.state(),
            "raised": self._raised.state(),
            "past": self._past.state(),
        }
        if self._safe is not None:
            state["safe"] = self._safe.state()
        if self._fallen is not None:
            state["fallen"] = self._fallen.state()
        return {"guard": state}

    def begin_step(self, step: int, layout: Layout) -> None:
        """Carry out the decisions in `step`, and in an evaluation after it."""
        budget = self._budget
        self._wanted_share = self._config.moe.ffn_share if budget is None else budget.share(step)
        self._in_force = sum(len(self._judge.places(action)) for action in _LASTING)
        if self._routers is None:
            return
        self._set_taus(self._routers, step)
        if self._safe is not None:
            self._safe.begin_step(step)
            self._routers.set_ffn_only(self._safe.ffn_only())

    def _set_taus(self, routers: RouterControl, step: int) -> None:
        was_raised, self._raised_taus = bool(self._raised_taus), {}
        factors = self._raised.factors
        is_raised = any(factor != 1.0 for factor in factors.values())
        if not (was_raised or is_raised):
            return
        taus = dict.fromkeys(self._layers, self._config.moe.balanced_tau)
        if self._budget is not None:
            taus = self._budget.taus(step)
        taus = {layer: tau * factors[layer] for layer, tau in taus.items()}
        routers.set_taus(taus)
        if is_raised:
            self._raised_taus = taus

    def judge(self, step: Step) -> Sequence[Outcome]:
        """Judge a step once the optimizer has acted, or the routing of a refused batch."""
        if not step.is_finite or step.number <= self._settings.warmup:
            return ()
        values = self._read(step)
        events = self._judge.judge(values)
        rollbacks: list[Event] = []
        if self._settings.acts:
            self._raised.step(self._judge.places("raise_tau"))
            rollbacks = [event for event in events if event.begins and event.action == "rollback"]
        if self._safe is not None:
            self._safe.end_step(events, values)
        others = [event for event in events if event not in rollbacks]
        outcomes: list[Outcome] = [*self._alerts(step.number, others)]
        if rollbacks:
            # The newest step in which none of these rules held.
            newest = step.number - max(event.held_for for event in rollbacks)
            outcomes.append(
                GoBack(newest, lambda at: _rollback_alerts(rollbacks, step.number, at, newest))
            )
        return outcomes

    def _alerts(self, step: int, events: Sequence[Event]) -> list[Alert]:
        shifts = [event for event in events if event.begins and event.rule.metric in _SHIFTS]
        # All ranks have the same events, so all of them ask.
        story = self._shift.explain() if shifts and self._shift is not None else None
        is_dry_run = not self._settings.acts
        return [
            alert_of(event, step, is_dry_run, story=story)
            if event in shifts
            else alert_of(event, step, is_dry_run, self._note(event))
            for event in events
        ]

    def roll_back(self, step: int, extra: Mapping[str, Any]) -> Iterable[Alert]:
        """Take over the guard of a checkpoint and reset all rules; alerts of actions that end.

        Counts and times of past actions are kept; otherwise a rule could demand rollbacks for ever.
        """
        self._load(extra.get("guard") or {})
        return self._forget(step, "went back to a checkpoint")

    def begin_anew(self, step: int) -> Iterable[Alert]:
        """Reset all rules; alerts of actions that end."""
        self._past = Past(len(self._layers))
        self._fallen = self._open_fallen(None)
        return self._forget(step, "new stage")

    def _forget(self, step: int, note: str) -> list[Alert]:
        ended = [event for event in self._judge.forget() if event.action != "rollback"]
        return [alert_of(event, step, not self._settings.acts, note) for event in ended]

    def _note(self, event: Event) -> str:
        """Further text of an alert: which classes of tokens fell, where a router went back to."""
        if self._fallen is not None and event.rule.metric == FALLEN and event.begins:
            return self._fallen.note(event.layer, event.rule.limit)
        return "" if self._safe is None else self._safe.note(event)

    def _read(self, step: Step) -> Values:
        """This step's values of the metrics that rules use."""
        moe = self._config.moe
        selected_LE = self._counts.selections()
        values = dict(
            counted(selected_LE, moe.num_ffn_experts, moe.router_topk, self._wanted_share)
        )
        if self._metrics & MEASURED.keys():
            health = self._health.collect().get("router_health", {})
            values |= measured(health, moe.num_experts)
        if self._metrics & RECORDED.keys():
            fields = self._counts.collect()
            values |= {name: cast(float, fields[name]) for name in RECORDED if name in fields}
        # Those of a refused batch are not the model's: the numerical guard has judged them.
        if step.updated:
            values |= {"grad_norm": step.result.grad_norm, "loss": self._losses.newest.mean}
        if self._shift is not None and self._shift.reading is not None:
            values |= self._shift.reading.metrics
        if self._fallen is not None:
            values[FALLEN] = self._fallen.end_step()
        values = dict(from_first_rank(values))
        shares = cast(Sequence[float], values["ffn_fraction"])
        own = (cast(float, values.get(name, math.nan)) for name in ("grad_norm", "loss"))
        return {**values, **self._past.add(shares, *own)}

    def record(self, step: Step, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """Actions in force, and tau where it is raised."""
        found: dict[str, Any] = {"guard_actions": self._in_force}
        if self._raised_taus:
            found["tau"] = sum(self._raised_taus.values()) / len(self._raised_taus)
        return found


def _rollback_alerts(
    events: Sequence[Event], step: int, checkpoint: Path | None, newest: int
) -> list[Alert]:
    """Alerts of rollbacks to the checkpoint, or of there being none of step `newest` or before."""
    if checkpoint is not None:
        note = f"back to {checkpoint.name}"
        return [alert_of(event, step, False, note) for event in events]
    note = f"no checkpoint of step {newest} or before to go back to"
    return [alert_of(replace(event, action="warn"), step, False, note) for event in events]
