"""The routing guard of a run: its readings, decisions, actions, alerts and state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

from moepp_megatron.config import Layout
from moepp_megatron.features.guard.alerts import alert_of
from moepp_megatron.features.guard.copies import RouterCopies
from moepp_megatron.features.guard.readings import counted
from moepp_megatron.features.guard.rules import effective_rules
from moepp_megatron.features.guard.settings import MEASURED, is_watched
from moepp_megatron.features.guard.shift import ShiftPart
from moepp_megatron.observe.alerts import Alert
from moepp_megatron.observe.guard_judge import WHOLE_MODEL, CompleteRule, Event, RuleJudge, Values
from moepp_megatron.runtime.agreement import Agreement
from moepp_megatron.training.checkpoint.files import checkpoint_step
from moepp_megatron.training.part import (
    Outcome,
    Part,
    PartContext,
    Rollback,
    State,
    Step,
    Stop,
    Why,
)
from moepp_megatron.training.parts.routing_counts import RoutingCounts

# Metrics of what the monitor of shifts has found, and the default rules about them.
_SHIFT, _FAULT = "shift", "router_fault"
# How often in a row a rule puts routers back, and how often in a run a checkpoint is gone back to
# for a shift, before what the model has become is taken as usual.
_MOST_TRIES = 3


class GuardStopError(RuntimeError):
    """A rule of the routing guard with the action `stop` holds."""


class RoutingGuardPart(Part):
    """Judges the rules of `routing_guard` and acts.

    Sums of router health and gradients may differ between ranks in their last bits, and ranks that
    decide differently hang. So all judge rank 0's numbers by a judge that has no other input
    (`observe.guard_judge`). They are sent from CPU to CPU, which waits for no device. A dry run
    reads, judges, reports and copies routers, but never changes the model.

    Args:
        run: The run; its routers are watched.
    """

    key: ClassVar[str] = "guard"

    def __init__(self, run: PartContext) -> None:
        self._config, self._settings = run.config, run.config.routing_guard
        self._counts = run.require(RoutingCounts)
        self._health, self._budget = run.feature("router_health"), run.feature("budget")
        self._shift, self._model = run.require(ShiftPart), run.model
        has_budget = run.config.moe.budget.held_by != "none"
        self._rules = effective_rules(self._settings, has_budget)
        self._metrics = {rule.metric for rule in self._rules}
        self._agreement = Agreement()
        self.load({}, "resume", run.progress.step)

    @classmethod
    def of(cls, run: PartContext) -> RoutingGuardPart | None:
        """The part of a run; None where routers are not watched."""
        return cls(run) if is_watched(run.config) else None

    def load(self, state: State, why: Why, step: int) -> Iterable[Alert]:
        """Take over the guard; after a rollback reset all rules, with alerts of those that end."""
        ended: list[Alert] = []
        if why == "rollback":
            ended = self._forget(step, "went back to a checkpoint")
            state = {**state, "rules": (), "actions": self._actions, "returns": self._returns}
        self._judge = RuleJudge(self._rules, self._counts.layer_numbers, state.get("rules", ()))
        self._copies = RouterCopies(self._model, state.get("copies", ()))
        self._actions: int = state.get("actions", 0)
        # Bounded rollbacks; times in a row that a rule has put routers back; the newest cause.
        self._returns: int = state.get("returns", 0)
        self._put_back: dict[str, int] = dict(state.get("put_back", {}))
        self._reported: str | None = state.get("reported")
        return ended

    def state(self) -> State:
        """Rules and copies of routers, the same on every rank; a collective."""
        return {
            "rules": self._judge.state(),
            "copies": self._copies.state(),
            "actions": self._actions,
            "returns": self._returns,
            "put_back": dict(self._put_back),
            "reported": self._reported,
        }

    def begin_step(self, step: int, layout: Layout) -> None:
        """Copy routers where they are due."""
        budget = self._budget
        self._wanted_share = self._config.moe.ffn_share if budget is None else budget.share(step)
        self._copies.take(step)

    def judge(self, step: Step) -> Iterator[Outcome]:
        """Judge a step once the optimizer has acted, or the routing of a refused batch."""
        if not step.is_finite or step.number <= self._settings.warmup:
            return
        values = self._read(step)
        events = self._judge.judge(values)
        yield from self._update(step.attempt, events, values)
        begun = [event for event in events if event.begins]
        is_high = bool(values["loss_high"])
        rollbacks = [event for event in begun if self._wants_checkpoint(event.rule, is_high)]
        is_back = self._put_routers_back([event for event in begun if event not in rollbacks])
        for event in events:
            if event not in rollbacks and (event.begins or event.rule.name != _FAULT):
                # The end of the shift that a fault is says all that there is to say.
                yield self._alert(event, step.attempt, self._done(event, is_back))
        if values["calm"]:
            self._note_calm()
        for event in begun:
            if event.rule.action == "stop" and self._settings.acts:
                self._actions += 1
                yield Stop(partial(_stopped, event.rule.name))
        if rollbacks:
            newest = min(self._newest_healthy(event, step, values) for event in rollbacks)
            yield Rollback(newest, lambda at: self._rollback(rollbacks, step, at, newest))

    def _note_calm(self) -> None:
        """Nothing is suspect: routers are healthy, if no rule that puts them back holds."""
        rules = [rule.name for rule in self._rules if rule.action == "put_back"]
        loud = [name for name in rules if not self._judge.is_quiet(name)]
        self._put_back = {name: n for name, n in self._put_back.items() if name in loud}
        if not loud:
            self._copies.keep()

    def _is_of_shift(self, rule: CompleteRule) -> bool:
        return rule.metric in (_SHIFT, _FAULT, *self._shift.monitor.metrics)

    def _is_bounded(self, rule: CompleteRule) -> bool:
        """True if rollbacks for a rule are limited, since its cause may outlast them."""
        return rule.action == "put_back" or self._is_of_shift(rule)

    def _wants_checkpoint(self, rule: CompleteRule, is_loss_high: bool) -> bool:
        """True if a rule that begins to hold wants an earlier checkpoint."""
        # Routers that were put back did not help: more than they is damaged. Undone steps cost more
        # than that if the loss does not show it.
        has_failed = rule.action == "put_back" and rule.name in self._put_back and is_loss_high
        if not self._settings.acts or not (has_failed or rule.action == "rollback"):
            return False
        return self._returns < _MOST_TRIES or not self._is_bounded(rule)

    def _newest_healthy(self, event: Event, step: Step, values: Values) -> int:
        """The newest step before a rule held, or before the shift that it is about."""
        held = step.number - event.steps
        since = cast(float, values["since"])
        return min(held, int(since) - 1) if since and self._is_of_shift(event.rule) else held

    def _put_routers_back(self, begun: Sequence[Event]) -> bool:
        """Put routers back if rules that begin to hold want it, once for all; whether they are."""
        wanting = {e.rule.name for e in begun if e.rule.action == "put_back"}
        wanting = wanting if self._settings.acts else set()
        tries = {name: self._put_back.get(name, 0) + 1 for name in wanting}
        may = bool(tries) and max(tries.values()) <= _MOST_TRIES
        is_back = may and self._copies.put_back()
        if is_back:
            self._put_back |= tries
            self._actions += 1
            if self._budget is not None:
                self._budget.restart()
        if wanting or any(event.rule.name == _FAULT for event in begun):
            self._shift.monitor.resolve_fault(is_back)
        return is_back

    def _done(self, event: Event, is_back: bool) -> str:
        """Name the action for a rule that begins or ends."""
        action = event.rule.action
        if not event.begins:
            return self._ending(event)
        # A warning is the same whether or not the guard may act.
        if action != "warn" and not self._settings.acts:
            return f"{action} (dry run)"
        if action == "put_back" and is_back:
            return f"put_back of step {self._copies.step}"
        return "stop" if action == "stop" else "warn"

    def _ending(self, event: Event) -> str:
        if event.rule.name != _SHIFT:
            return f"end of {event.rule.action}"
        shift = self._shift.monitor.ended
        is_mended = shift is not None and shift.is_mended
        return "routers are as before" if is_mended else "accepted as usual"

    def _update(self, step: int, events: Sequence[Event], values: Values) -> Iterator[Alert]:
        """Correct or complete the alert of a shift that was sent before."""
        shift, before = self._shift.monitor.event, self._reported
        self._reported = None if shift is None else shift.cause
        rules = [rule for rule in self._rules if rule.name == _SHIFT]
        is_news = not any(event.rule.name in (_SHIFT, _FAULT) for event in events)
        if shift is not None and rules and is_news and shift.cause != before:
            event = Event(rules[0], WHOLE_MODEL, True, cast(float, values["shift"]))
            yield alert_of(event, step, "update", shift=shift)

    def _alert(self, event: Event, step: int, action: str, note: str = "") -> Alert:
        monitor = self._shift.monitor
        shift = monitor.event if event.begins else monitor.ended
        is_shift = self._is_of_shift(event.rule)
        return alert_of(event, step, action, note, shift if is_shift else None)

    def reset_baseline(self, step: int) -> Iterable[Alert]:
        """Reset all rules; alerts of those that end."""
        return self._forget(step, "new stage")

    def _forget(self, step: int, note: str) -> list[Alert]:
        ended = [event for event in self._judge.forget() if event.rule.action != "rollback"]
        return [alert_of(event, step, f"end of {event.rule.action}", note) for event in ended]

    def _read(self, step: Step) -> Values:
        """This step's values of the metrics that rules use, and what is suspect since when."""
        moe, monitor = self._config.moe, self._shift.monitor
        selected_LE = self._counts.selections()
        values = dict(counted(selected_LE, moe.num_ffn_experts, self._wanted_share))
        if self._health is not None and self._metrics & MEASURED.keys():
            health = self._health.collect().get("router_health", {})
            values |= {name: health[name] for name in MEASURED if name in health}
        # Those of a refused batch are not the model's: the numerical guard has judged them.
        if step.updated:
            values |= {"grad_norm": step.result.grad_norm, "loss": self._shift.batch_loss}
        values |= monitor.metrics
        values["calm"] = float(monitor.is_calm)
        values["loss_high"] = float(monitor.is_loss_high)
        values["since"] = 0.0 if monitor.event is None else float(monitor.event.since)
        values["shift"] = 0.0 if monitor.event is None else monitor.event.evidence
        values["router_fault"] = monitor.fault
        found: Values = self._agreement.from_first(values)
        return found

    def record(self, step: Step, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """Actions so far."""
        return {"guard_actions": self._actions}

    def _rollback(
        self, events: Sequence[Event], step: Step, checkpoint: Path | None, newest: int
    ) -> list[Alert]:
        """Alerts of rollbacks to the checkpoint, or of there being none of `newest` or before."""
        if checkpoint is None:
            note = f"no checkpoint of step {newest} or before to go back to"
            alerts = [self._alert(event, step.attempt, "warn", note) for event in events]
            self._shift.monitor.resolve_fault(is_mended=False)
            return alerts
        self._actions += 1
        self._returns += any(self._is_bounded(event.rule) for event in events)
        lost = step.number - checkpoint_step(checkpoint)
        note = f"back to {checkpoint.name}; steps undone: {lost}"
        return [self._alert(event, step.attempt, "rollback", note) for event in events]


def _stopped(rule: str, saved: str) -> GuardStopError:
    return GuardStopError(f"the routing guard's rule {rule} holds; {saved}; look at alerts.jsonl")
