"""Judges routers and data in every step, acts and reports."""

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from moepp_megatron.config import Layout
from moepp_megatron.features.guard.alerts import alert_of, effective_rules
from moepp_megatron.features.guard.copies import RouterCopies
from moepp_megatron.features.guard.settings import MEASURED
from moepp_megatron.observe.alerts import Alert
from moepp_megatron.observe.guard_judge import WHOLE_MODEL, CompleteRule, Event, RuleJudge, Values
from moepp_megatron.observe.shift.monitor import GROUPS, Observed, ShiftMonitor, group_of
from moepp_megatron.runtime.distributed import Agreement
from moepp_megatron.training.checkpoint.files import checkpoint_step
from moepp_megatron.training.part import (
    Fields,
    Outcome,
    Part,
    PartContext,
    Rollback,
    State,
    Step,
    Stop,
    Why,
)
from moepp_megatron.training.parts.routing_counts import RoutingCountsPart
from moepp_megatron.training.step import Batch
from moepp_megatron.training.step_sums import StepCounts, Summand, first_of_tensor_ranks

logger = logging.getLogger(__name__)

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
    (`observe.guard_judge`). They are sent from CPU to CPU, which waits for no device.

    Attributes:
        monitor: Judges the series of a step: loss, routing, logits and token ids.
    """

    key = "guard"

    def __init__(self, run: PartContext) -> None:
        self._config, self._settings = run.config, run.config.routing_guard
        self._counts = run.require(RoutingCountsPart)
        self._health, self._budget = run.feature("router_health"), run.feature("budget")
        self._model, self._batch_loss = run.model, math.nan
        self._counts.watch(logits=True)
        groups = torch.from_numpy(group_of(np.arange(run.config.model.vocab_size)))
        self._group_of = groups.to(torch.cuda.current_device())
        # Sum of the sequences' mean losses, of their squares, number of sequences (with context
        # parallelism of the parts that ranks have); then tokens of each group of ids.
        self._sums = StepCounts(3 + GROUPS)
        self._rules = effective_rules(self._settings, run.config.moe.share_controller != "none")
        self._metrics = {rule.metric for rule in self._rules}
        self._agreement = Agreement()
        self.load({}, "resume", run.progress.step)

    @staticmethod
    def is_wanted(run: PartContext) -> bool:
        """True if the routers are watched."""
        moe, guard = run.config.moe, run.config.routing_guard
        return guard.enabled is not False and moe.num_zero_computation_experts > 0

    def load(self, state: State, why: Why, step: int) -> Iterable[Alert]:
        """Take over the guard; after a rollback reset all rules, with alerts of those that end."""
        ended: list[Alert] = []
        if why == "rollback":
            ended = self._end_rules(step, "went back to a checkpoint")
            state = {**state, "rules": (), "actions": self._actions, "returns": self._returns}
        self._load_monitor(state.get("shift", {}))
        self._judge = RuleJudge(self._rules, self._counts.layer_numbers, state.get("rules", ()))
        self._copies = RouterCopies(self._model, state.get("copies", ()))
        self._actions: int = state.get("actions", 0)
        # Bounded rollbacks; times in a row that a rule has put routers back; the newest cause.
        self._returns: int = state.get("returns", 0)
        self._put_back: dict[str, int] = dict(state.get("put_back", {}))
        self._reported: str | None = state.get("reported")
        return ended

    def _load_monitor(self, state: State) -> None:
        rate = self._settings.false_alarm_steps
        self.monitor = ShiftMonitor(rate, self._counts.layer_numbers, self._config.moe.names)
        if "detectors" in state:
            self.monitor.load(state)
        elif state:
            logger.warning("detectors of the checkpoint are those of an older version: begun anew")

    def state(self) -> State:
        """Rules, copies of routers and detectors, the same on every rank; a collective."""
        return {
            "rules": self._judge.state(),
            "copies": self._copies.state(),
            "actions": self._actions,
            "returns": self._returns,
            "put_back": dict(self._put_back),
            "reported": self._reported,
            "shift": self.monitor.state(),
        }

    def begin_step(self, step: int, layout: Layout) -> None:
        """Begin a new batch; copy routers if a copy is due."""
        self._sums.reset()
        budget = self._budget
        self._wanted_share = self._config.moe.ffn_share if budget is None else budget.share(step)
        self._copies.take(step)

    @torch.no_grad()
    def see(self, chunk: torch.nn.Module, batch: Batch, token_losses: Tensor) -> None:
        """Add a micro-batch, on the last pipeline stage, without waiting for the device."""
        if not first_of_tensor_ranks():
            return
        mask = batch["loss_mask"].double()
        counts = mask.sum(dim=1)
        means = (token_losses.detach().double() * mask).sum(dim=1) / counts.clamp(min=1.0)
        is_counted = (counts > 0).double()
        self._sums.own[:3] += torch.stack([means, means.square(), is_counted]).sum(dim=1)
        groups = self._group_of[batch["labels"].reshape(-1)]
        self._sums.own[3:].index_add_(0, groups, mask.reshape(-1))

    def summands(self) -> Sequence[Summand]:
        """Losses and token ids."""
        return (self._sums,)

    def end_step(self, step: Step) -> Iterable[Alert]:
        """Give the step's series to the monitor, also where its batch was refused."""
        if step.is_finite:
            sums, own = step.result.sums, self._sums.total()
            self._batch_loss = sums.total / sums.tokens if sums.tokens > 0 else math.nan
            spread = _deviation(*own[:3].tolist())
            selected, logits = self._counts.selections().numpy(), self._counts.logits()
            observed = Observed(selected, self._batch_loss, spread, logits, own[3:])
            self.monitor.add(step.attempt, observed, is_refused=not step.updated)
        return ()

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
            # The end of a fault is reported as that of its shift.
            if event not in rollbacks and (event.begins or event.rule.name != _FAULT):
                yield self._alert(event, step.attempt, self._action_of(event, is_back))
        if values["calm"]:
            self._keep_copies()
        for event in begun:
            if event.rule.action == "stop" and self._settings.acts:
                self._actions += 1
                yield Stop(partial(_stopped, event.rule.name))
        if rollbacks:
            newest = min(self._newest_healthy(event, step, values) for event in rollbacks)
            yield Rollback(newest, lambda at: self._rollback(rollbacks, step, at, newest))

    def _keep_copies(self) -> None:
        """Keep the newest copies of routers if no rule that puts routers back holds."""
        names = [rule.name for rule in self._rules if rule.action == "put_back"]
        active = [name for name in names if not self._judge.is_quiet(name)]
        self._put_back = {name: n for name, n in self._put_back.items() if name in active}
        if not active:
            self._copies.keep()

    def _is_of_shift(self, rule: CompleteRule) -> bool:
        return rule.metric in (_SHIFT, _FAULT, *self.monitor.metrics)

    def _is_bounded(self, rule: CompleteRule) -> bool:
        """True if rollbacks for a rule are limited: its cause may outlast them."""
        return rule.action == "put_back" or self._is_of_shift(rule)

    def _wants_checkpoint(self, rule: CompleteRule, is_loss_high: bool) -> bool:
        """True if a rule that begins to hold wants an earlier checkpoint."""
        # Routers that were put back did not help: more than they is damaged. If the loss does not
        # show it, undone steps cost more.
        has_failed = rule.action == "put_back" and rule.name in self._put_back and is_loss_high
        if not self._settings.acts or not (has_failed or rule.action == "rollback"):
            return False
        return self._returns < _MOST_TRIES or not self._is_bounded(rule)

    def _newest_healthy(self, event: Event, step: Step, values: Values) -> int:
        """The newest step before a rule held, or before the shift that it is about."""
        newest, of_shift = step.number - event.steps, cast(float, values["newest_healthy"])
        is_known = self._is_of_shift(event.rule) and not math.isnan(of_shift)
        return min(newest, int(of_shift)) if is_known else newest

    def _put_routers_back(self, begun: Sequence[Event]) -> bool:
        """Put routers back once if rules that begin to hold want it; True if they are back."""
        acts = self._settings.acts
        wanting = {e.rule.name for e in begun if acts and e.rule.action == "put_back"}
        tries = {name: self._put_back.get(name, 0) + 1 for name in wanting}
        may = bool(tries) and max(tries.values()) <= _MOST_TRIES
        is_back = may and self._copies.put_back()
        if is_back:
            self._put_back |= tries
            self._actions += 1
            if self._budget is not None:
                self._budget.restart()
        if wanting or any(event.rule.name == _FAULT for event in begun):
            self.monitor.resolve_fault(is_back)
        return is_back

    def _action_of(self, event: Event, is_back: bool) -> str:
        """Name the action for a rule that begins or ends."""
        action = event.rule.action
        if not event.begins:
            if event.rule.name != _SHIFT:
                return f"end of {action}"
            shift = self.monitor.ended
            is_mended = shift is not None and shift.is_mended
            return "routers are as before" if is_mended else "accepted as usual"
        # A warning is the same whether or not the guard may act.
        if action != "warn" and not self._settings.acts:
            return f"{action} (dry run)"
        if action == "put_back" and is_back:
            return f"put_back of step {self._copies.step}"
        return "stop" if action == "stop" else "warn"

    def _update(self, step: int, events: Sequence[Event], values: Values) -> Iterator[Alert]:
        """Report the cause of a shift that was reported with another."""
        shift, before = self.monitor.event, self._reported
        self._reported = None if shift is None else shift.cause
        if shift is None or shift.cause == before:
            return
        if not any(event.rule.name in (_SHIFT, _FAULT) for event in events):
            for rule in (rule for rule in self._rules if rule.name == _SHIFT):
                event = Event(rule, WHOLE_MODEL, True, cast(float, values["shift"]))
                yield alert_of(event, step, "update", shift=shift)

    def _alert(self, event: Event, step: int, action: str, note: str = "") -> Alert:
        shift = self.monitor.event if event.begins else self.monitor.ended
        return alert_of(event, step, action, note, shift if self._is_of_shift(event.rule) else None)

    def reset_baseline(self, step: int) -> Iterable[Alert]:
        """Reset all rules; alerts of those that end."""
        self._load_monitor({})
        return self._end_rules(step, "new stage")

    def _end_rules(self, step: int, note: str) -> list[Alert]:
        ended = [event for event in self._judge.forget() if event.rule.action != "rollback"]
        return [alert_of(event, step, f"end of {event.rule.action}", note) for event in ended]

    def _read(self, step: Step) -> Values:
        """Read rank 0's values of the metrics that rules use, and what is suspect since when."""
        moe, monitor = self._config.moe, self.monitor
        selected_LE = self._counts.selections()
        values = dict(_counted(selected_LE, moe.num_ffn_experts, self._wanted_share))
        if self._health is not None and self._metrics & MEASURED.keys():
            health = self._health.collect().get("router_health", {})
            values |= {name: health[name] for name in MEASURED if name in health}
        # Those of a refused batch are not the model's: the numerical guard has judged them.
        if step.updated:
            values |= {"grad_norm": step.result.grad_norm, "loss": self._batch_loss}
        event = monitor.event
        values |= {**monitor.metrics, "calm": float(monitor.is_calm), "router_fault": monitor.fault}
        values["loss_high"] = float(monitor.is_loss_high)
        values["newest_healthy"] = math.nan if event is None else float(event.newest_healthy)
        values["shift"] = 0.0 if event is None else event.evidence
        found: Values = self._agreement.from_first(values)
        return found

    def record(self, step: Step, fields: Fields) -> Fields:
        """Evidence over its limit, and actions so far."""
        known = {
            name: value for name, value in self.monitor.metrics.items() if not math.isnan(value)
        }
        return {**known, "guard_actions": self._actions}

    def _rollback(
        self, events: Sequence[Event], step: Step, checkpoint: Path | None, newest: int
    ) -> list[Alert]:
        """Alerts of rollbacks to the checkpoint, or of there being none of `newest` or before."""
        if checkpoint is None:
            note = f"no checkpoint of step {newest} or before to go back to"
            alerts = [self._alert(event, step.attempt, "warn", note) for event in events]
            self.monitor.resolve_fault(is_mended=False)
            return alerts
        self._actions += 1
        self._returns += any(self._is_bounded(event.rule) for event in events)
        lost = step.number - checkpoint_step(checkpoint)
        note = f"back to {checkpoint.name}; steps undone: {lost}"
        return [self._alert(event, step.attempt, "rollback", note) for event in events]


def _stopped(rule: str, saved: str) -> GuardStopError:
    return GuardStopError(f"the routing guard's rule {rule} holds; {saved}; look at alerts.jsonl")


def _counted(selected_LE: Tensor, num_ffn: int, wanted_share: float) -> Values:
    """Return metrics of float64 counts [MoE layers, E], each a list over layers; NaN if unknown."""
    total = selected_LE.sum(dim=1)
    ffn_LF = selected_LE[:, :num_ffn]
    ffn_total = ffn_LF.sum(dim=1)
    share = ffn_total / total
    found = {
        "ffn_fraction": share,
        "ffn_to_target": share / wanted_share,
        "max_ffn_load": ffn_LF.amax(dim=1) * num_ffn / ffn_total,
        "min_ffn_load": ffn_LF.amin(dim=1) * num_ffn / ffn_total,
        "max_expert_share": selected_LE.amax(dim=1) / total,
    }
    mean = float(share.mean()) / wanted_share
    return {"mean_ffn_to_target": mean} | {name: row.tolist() for name, row in found.items()}


def _deviation(total: float, squares: float, number: float) -> float:
    """Standard deviation from the sum of numbers and of their squares; NaN of fewer than two."""
    if number < 2:
        return math.nan
    return math.sqrt(max((squares - total * total / number) / (number - 1), 0.0))
