"""What the action `safe_mode` does: routers go back to healthy weights, or FFN experts alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moepp_megatron.observe.guard_judge import Event, RuleJudge, Values, layers_in
from moepp_megatron.training.guard.router_copies import RouterCopies
from moepp_megatron.training.setup import TrainingModel

ACTION = "safe_mode"


class SafeMode:
    """Carries the action out in the layers in which it is in force.

    A router that falls goes back to its weights from before the fall. Where there are none, or a
    rule holds with them too, zero-computation experts are switched off until the action ends.

    Args:
        model: The wrapped model.
        judge: Judges the rules.
        layer_numbers: Global numbers of all MoE layers.
        state: Result of an earlier `state()`.
    """

    def __init__(
        self,
        model: TrainingModel,
        judge: RuleJudge,
        layer_numbers: Sequence[int],
        state: Mapping[str, Any],
    ) -> None:
        self._judge, self._layers = judge, list(layer_numbers)
        self._copies = RouterCopies(model, state.get("copies", ()))
        # Layers whose routers have gone back, and route well since.
        self._mended = set(state.get("mended", ()))

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint, the same on every rank; a collective."""
        return {"copies": self._copies.state(), "mended": sorted(self._mended)}

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

    def _in_force(self) -> set[int]:
        return layers_in(self._judge.places(ACTION), self._layers)

    def ffn_only(self) -> set[int]:
        """Layers whose zero-computation experts are switched off."""
        return self._in_force() - self._mended

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
