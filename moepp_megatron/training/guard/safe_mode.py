"""What the action `safe_mode` does: routers go back to healthy weights, or FFN experts alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from moepp_megatron.moe.ffn_demand import FFNDemand
from moepp_megatron.observe.guard_judge import Event, RuleJudge, Values, layers_in
from moepp_megatron.training.guard.router_copies import RouterCopies
from moepp_megatron.training.setup import TrainingModel

ACTION = "safe_mode"
# By how much zero-computation experts' logits are lowered at the beginning and at the end of a
# ramp: a factor of 3,000 between scores, then of 1.1.
_RAMP_FROM, _RAMP_TO = 8.0, 0.1


class SafeMode:
    """Carries the action out in the layers in which it is in force.

    A router that falls goes back to its weights from before the fall. Where there are none, or a
    rule holds with them too, zero-computation experts are switched off until the action ends.

    Args:
        model: The wrapped model.
        judge: Judges the rules.
        layer_numbers: Global numbers of all MoE layers.
        ramp_steps: `routing_guard.safe_ramp`.
        state: Result of an earlier `state()`.
    """

    def __init__(
        self,
        model: TrainingModel,
        judge: RuleJudge,
        layer_numbers: Sequence[int],
        ramp_steps: int,
        state: Mapping[str, Any],
    ) -> None:
        self._judge, self._layers = judge, list(layer_numbers)
        self._copies = RouterCopies(model, state.get("copies", ()))
        self._ramp = SafeRamp(layer_numbers, ramp_steps, state.get("ramp", ()))
        # Layers whose routers have gone back, and route well since.
        self._mended = set(state.get("mended", ()))

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint, the same on every rank; a collective."""
        return {
            "copies": self._copies.state(),
            "ramp": self._ramp.state(),
            "mended": sorted(self._mended),
        }

    def begin_step(self, step: int) -> None:
        """Training step `step` begins."""
        self._copies.take(step)

    def end_step(self, events: Sequence[Event], values: Values) -> None:
        """Act on a step that has been judged.

        Args:
            events: What begins and ends.
            values: What was judged.
        """
        safe = self._in_force()
        healthy = self._judge.layers_where(ACTION, values, lambda rule, at: rule.is_healthy(at))
        self._copies.keep(healthy - safe)
        self._mended &= safe & self._judge.layers_where(
            ACTION, values, lambda rule, at: not rule.holds(at)
        )
        begun = {event.layer for event in events if event.begins and event.action == ACTION}
        self._mended |= self._copies.put_back(layers_in(begun, self._layers))
        self._ramp.step(safe - self._mended)

    def _in_force(self) -> set[int]:
        return layers_in(self._judge.places(ACTION), self._layers)

    def demands(self) -> dict[int, FFNDemand]:
        """The demand on each layer in safe mode, or on its way out of it."""
        switched_off = self._in_force() - self._mended
        return self._ramp.demands() | dict.fromkeys(switched_off, "all")

    def note(self, event: Event) -> str:
        """Further text of an alert: where a router has gone back to."""
        if not event.begins or event.action != ACTION:
            return ""
        steps = [
            self._copies.steps[layer]
            for layer in layers_in({event.layer}, self._layers)
            if layer in self._mended
        ]
        if not steps:
            return "no copy of a healthy router to go back to"
        return f"the router has its weights of before step {min(steps)} again"


class SafeRamp:
    """The way out of switched-off zero-computation experts, for each MoE layer.

    All at once, zero-computation experts would change the selections and the gates of most tokens
    between two steps, and the loss with them. Instead their logits are lowered, by less from step
    to step; each step takes the same factor off.

    Args:
        layer_numbers: Global numbers of all MoE layers.
        steps: `routing_guard.safe_ramp`; 0 ends safe mode at once.
        state: Result of an earlier `state()`.
    """

    def __init__(
        self, layer_numbers: Sequence[int], steps: int, state: Sequence[tuple[int, int]] = ()
    ) -> None:
        self._layers, self._steps = list(layer_numbers), steps
        self._left = {int(layer): int(left) for layer, left in state if layer in self._layers}

    def state(self) -> list[tuple[int, int]]:
        """The state for a checkpoint: layers on their way out, and their steps left."""
        return list(self._left.items())

    def step(self, layers: Collection[int]) -> None:
        """Update after a step has been judged.

        Args:
            layers: Layers whose zero-computation experts are switched off.
        """
        for layer in self._layers:
            if layer in layers:
                self._left[layer] = self._steps
            elif layer in self._left:
                self._left[layer] -= 1
                if self._left[layer] < 0:
                    del self._left[layer]

    def demands(self) -> dict[int, FFNDemand]:
        """The demand on each layer that is on its way out."""
        found: dict[int, FFNDemand] = {}
        for layer, left in self._left.items():
            done = 1.0 - (left + 1) / max(self._steps, 1)
            found[layer] = _RAMP_FROM * (_RAMP_TO / _RAMP_FROM) ** max(done, 0.0)
        return found
