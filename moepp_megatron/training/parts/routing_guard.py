"""The routing guard of a run: its readings, decisions, actions, alerts and state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from moepp_megatron.config import Layout
from moepp_megatron.config.guard_metrics import MEASURED, RECORDED
from moepp_megatron.config.guard_rules import effective_rules, is_watched
from moepp_megatron.observe.alerts import Alert
from moepp_megatron.observe.guard_judge import Event, RuleJudge, Values
from moepp_megatron.training.guard.alerts import alert_of
from moepp_megatron.training.guard.copies import RouterCopies
from moepp_megatron.training.guard.readings import counted, from_first_rank, measured
from moepp_megatron.training.part import Outcome, Part, Rollback, Run, Step, Stop
from moepp_megatron.training.parts.batch_losses import BatchLosses
from moepp_megatron.training.parts.budget import BudgetControl
from moepp_megatron.training.parts.router_health import HealthCollector
from moepp_megatron.training.parts.routing_counts import RoutingCounts
from moepp_megatron.training.parts.shift import Shift

# Rules about what the monitor of shifts has found, and how often in a row routers are put back, and
# in a run a checkpoint is gone back to for them, before what they have become is taken as usual.
_SHIFT, _FAULT = "shift", "router_fault"
_MOST_TRIES = 3


class GuardStopError(RuntimeError):
    """A rule of the routing guard with the action `stop` holds."""


class RoutingGuard(Part):
    """Judges the rules of `routing_guard` and acts.

    All ranks decide alike in the same step, because they judge rank 0's numbers by a judge that has
    no other input (`readings`, `observe.guard_judge`). A dry run reads, judges, reports and copies
    routers, but never changes the model.

    Args:
        run: The run; its routers are watched.
    """

    def __init__(self, run: Run) -> None:
        self._config, self._settings = run.config, run.config.routing_guard
        self._counts, self._losses = run.require(RoutingCounts), run.require(BatchLosses)
        self._health, self._budget = run.require(HealthCollector), run.find(BudgetControl)
        self._shift, self._model = run.require(Shift), run.model
        has_budget = run.config.moe.budget.held_by != "none"
        self._rules = effective_rules(self._settings, has_budget)
        self._metrics = {rule.metric for rule in self._rules}
        self._load(run.extra.get("guard") or {})

    @classmethod
    def of(cls, run: Run) -> RoutingGuard | None:
        """The part of a run; None where routers are not watched."""
        return cls(run) if is_watched(run.config) else None

    def _load(self, state: Mapping[str, Any]) -> None:
        """Restore the state; of an earlier version's only copies of routers."""
        rules = state.get("rules", ())
        self._judge = RuleJudge(self._rules, self._counts.layer_numbers, rules)
        copies = state.get("copies") or state.get("safe", {}).get("copies", ())
        self._copies = RouterCopies(self._model, copies)
        self._actions: int = state.get("actions", 0)
        # Checkpoints that were gone back to because putting routers back did not help.
        self._returns: int = state.get("returns", 0)
        # Times in a row that routers were put back, and the cause that was reported last.
        self._tries: int = state.get("tries", 0)
        self._reported: str | None = state.get("reported")

    def state(self) -> dict[str, Any]:
        """Rules and copies of routers, the same on every rank; a collective."""
        return {
            "guard": {
                "rules": self._judge.state(),
                "copies": self._copies.state(),
                "actions": self._actions,
                "returns": self._returns,
                "tries": self._tries,
                "reported": self._reported,
            }
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
        # All before the first acts: layers of one step are one fault.
        rollbacks = [event for event in events if self._wants_checkpoint(event)]
        for event in events:
            if event not in rollbacks and (event.begins or event.rule.name != _FAULT):
                # The end of the shift that a fault is says all that there is to say.
                yield self._alert(event, step.attempt, self._act(event))
        if values["calm"] and self._judge.is_quiet("put_back"):
            self._copies.keep()
            self._tries = 0
        for event in events:
            if event.begins and event.rule.action == "stop" and self._settings.acts:
                yield Stop(partial(_stopped, event.rule.name))
        if rollbacks:
            newest = min(self._newest_healthy(event, step.number) for event in rollbacks)
            yield Rollback(newest, lambda at: self._rollback(rollbacks, step.attempt, at, newest))

    def _wants_checkpoint(self, event: Event) -> bool:
        """Whether a rule wants an earlier checkpoint."""
        if not (event.begins and self._settings.acts):
            return False
        # Routers that were put back did not help: more than they is damaged.
        failed = event.rule.action == "put_back" and self._tries > 0
        if failed and self._returns < _MOST_TRIES:
            self._returns += 1
            return True
        return event.rule.action == "rollback"

    def _newest_healthy(self, event: Event, step: int) -> int:
        """The newest step before a rule held."""
        shift = self._shift.monitor.event
        if event.rule.name == _FAULT and shift is not None:
            return shift.since - 1
        return step - event.rule.for_steps

    def _act(self, event: Event) -> str:
        """Put routers back if a rule wants it; what is done, in words."""
        action, monitor = event.rule.action, self._shift.monitor
        if not event.begins:
            return self._ending(event)
        if action == "put_back" and self._settings.acts:
            is_back = self._tries < _MOST_TRIES and self._copies.put_back()
            self._tries, self._actions = self._tries + is_back, self._actions + is_back
            monitor.settle(is_back)
            if is_back and self._budget is not None:
                self._budget.restart()
            return f"put_back of step {self._copies.step}" if is_back else "warn"
        if event.rule.name == _FAULT:
            monitor.settle(is_mended=False)
        self._actions += action == "stop" and self._settings.acts
        # A warning is the same whether or not the guard may act.
        is_dry = action != "warn" and not self._settings.acts
        return f"{action} (dry run)" if is_dry else action

    def _ending(self, event: Event) -> str:
        if event.rule.name != _SHIFT:
            return f"end of {event.rule.action}"
        shift = self._shift.monitor.ended
        is_mended = shift is not None and shift.is_mended
        return "routers are as before" if is_mended else "accepted as usual"

    def _update(self, step: int, events: Sequence[Event], values: Values) -> Iterator[Alert]:
        """Correct or complete the alert of a shift that was sent before."""
        shift = self._shift.monitor.event
        if shift is None or any(event.rule.name in (_SHIFT, _FAULT) for event in events):
            self._reported = None if shift is None else shift.cause
            return
        rules = [rule for rule in self._rules if rule.name == _SHIFT]
        if rules and shift.cause != self._reported:
            self._reported = shift.cause
            event = Event(rules[0], 0, True, cast(float, values["shift"]))
            yield alert_of(event, step, "update", shift=shift)

    def _alert(self, event: Event, step: int, action: str) -> Alert:
        monitor = self._shift.monitor
        shift = monitor.event if event.begins else monitor.ended
        is_shift = event.rule.name in (_SHIFT, _FAULT)
        return alert_of(event, step, action, shift=shift if is_shift else None)

    def roll_back(self, step: int, extra: Mapping[str, Any]) -> Iterable[Alert]:
        """Take over the guard of a checkpoint and reset all rules; alerts of those that end."""
        ended = self._forget(step, "went back to a checkpoint")
        kept = {"rules": (), "actions": self._actions, "returns": self._returns}
        self._load({**(extra.get("guard") or {}), **kept})
        return ended

    def reset_baseline(self, step: int) -> Iterable[Alert]:
        """Reset all rules; alerts of those that end."""
        return self._forget(step, "new stage")

    def _forget(self, step: int, note: str) -> list[Alert]:
        ended = [event for event in self._judge.forget() if event.rule.action != "rollback"]
        return [alert_of(event, step, f"end of {event.rule.action}", note) for event in ended]

    def _read(self, step: Step) -> Values:
        """This step's values of the metrics that rules use, and whether nothing is suspect."""
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
        monitor = self._shift.monitor
        values |= monitor.metrics
        values["calm"] = float(monitor.is_calm)
        values["shift"] = 0.0 if monitor.event is None else monitor.event.evidence
        values["router_fault"] = monitor.fault
        return from_first_rank(values)

    def record(self, step: Step, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """Actions so far."""
        return {"guard_actions": self._actions}

    def _rollback(
        self, events: Sequence[Event], step: int, checkpoint: Path | None, newest: int
    ) -> list[Alert]:
        """Alerts of rollbacks to the checkpoint, or of there being none of `newest` or before."""
        if checkpoint is not None:
            self._actions += 1
            return [alert_of(e, step, "rollback", f"back to {checkpoint.name}") for e in events]
        note = f"no checkpoint of step {newest} or before to go back to"
        self._shift.monitor.settle(is_mended=False)
        return [alert_of(event, step, "warn", note) for event in events]


def _stopped(rule: str, saved: str) -> GuardStopError:
    return GuardStopError(f"the routing guard's rule {rule} holds; {saved}; look at alerts.jsonl")
