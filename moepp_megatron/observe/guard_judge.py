"""Judges rules over a step's numbers: when an action begins, and when it ends.

A rule in one place (a MoE layer, or the whole model) goes through

    ok -> pending -> firing -> clearing -> ok
           |           ^          |
           ok          +----------+

It is `pending` while it holds, but not yet for long enough (in a row, or in so many of the newest
steps), and `clearing` while it is healthy again, but not yet for long enough: the action continues.
Between the limit and the clear value nothing changes (hysteresis). Decisions use neither random
numbers nor clocks: the same numbers give the same decisions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from moepp_megatron.config.guard_rules import CompleteRule

_Phase = Literal["ok", "pending", "firing", "clearing"]
# The place of a rule that is not of one layer.
WHOLE_MODEL = 0
# A metric's value, or one for each MoE layer.
Values = Mapping[str, float | Sequence[float]]


@dataclass
class _Place:
    """The state of one rule in one place."""

    phase: _Phase = "ok"
    # Step at which the phase began.
    since: int = 0
    # Step at which the last action ended.
    ended: int | None = None
    # The present action; `warn` if the rule has used up its actions.
    action: str = "none"
    # The newest steps in which it held, for a rule over `of_steps`.
    held: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Event:
    """An action begins or ends.

    Attributes:
        rule: The rule.
        layer: Global number of the MoE layer, or `WHOLE_MODEL`.
        begins: Whether it begins.
        action: The action; `warn` replaces the rule's action if that is used up.
        value: The metric's value.
        held_for: Steps that the rule has held (at a beginning) or been healthy (at an end).
        is_used_up: Whether the rule has been granted its last action before.
    """

    rule: CompleteRule
    layer: int
    begins: bool
    action: str
    value: float
    held_for: int
    is_used_up: bool = False


def layers_in(places: Collection[int], layer_numbers: Iterable[int]) -> set[int]:
    """The layers of these places: all of them with the whole model."""
    return {layer for layer in layer_numbers if layer in places or WHOLE_MODEL in places}


class RuleJudge:
    """Holds the rules' states.

    Args:
        rules: Complete rules, their names all different.
        layer_numbers: Global numbers of the MoE layers, in the order of the metrics' lists.
        state: Result of an earlier `state()`, to continue from it. Rules and layers that do not
            exist any more are ignored.
    """

    def __init__(
        self,
        rules: Iterable[CompleteRule],
        layer_numbers: Sequence[int],
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.rules = tuple(rules)
        self._layers = list(layer_numbers)
        state = state or {}
        # Counts judged steps. Steps of training can go back, this cannot.
        self._clock: int = state.get("clock", 0)
        names = {rule.name for rule in self.rules}
        self._firings = {k: v for k, v in state.get("firings", {}).items() if k in names}
        self._places: dict[tuple[str, int], _Place] = {
            (name, layer): _Place(phase, since, ended, action, *map(list, held))
            for name, layer, phase, since, ended, action, *held in state.get("places", ())
            if name in names and layer in (WHOLE_MODEL, *self._layers)
        }

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint: plain numbers and names, which later steps do not change."""
        return {
            "clock": self._clock,
            "firings": dict(self._firings),
            "places": [
                [name, layer, place.phase, place.since, place.ended, place.action, [*place.held]]
                for (name, layer), place in self._places.items()
            ],
        }

    def judge(self, values: Values) -> list[Event]:
        """Judge one step's numbers.

        Args:
            values: Values by metric. A missing value or NaN was not measured and changes nothing.

        Returns:
            The beginnings and ends, in the order of the rules and layers.
        """
        self._clock += 1
        events: list[Event] = []
        for rule in self.rules:
            if rule.metric not in values:
                continue
            found: list[Event] = []
            for layer, value in self._by_place(rule, values[rule.metric]):
                if not math.isnan(value):
                    place = self._places.setdefault((rule.name, layer), _Place())
                    found += self._judge(rule, layer, place, value)
            if any(event.begins for event in found):
                # Once, however many layers it is: all of a model may go wrong in the same step.
                self._firings[rule.name] = self._firings.get(rule.name, 0) + 1
            events += found
        return events

    def places(self, action: str, rules: Collection[str] | None = None) -> set[int]:
        """Layers (or `WHOLE_MODEL`) where `action` is being taken, by any rule or these alone."""
        return {
            layer
            for (name, layer), place in self._places.items()
            if place.action == action
            and place.phase in ("firing", "clearing")
            and (rules is None or name in rules)
        }

    def layers_where(
        self, action: str, values: Values, test: Callable[[CompleteRule, float], bool]
    ) -> set[int]:
        """Layers in which every rule with `action` passes a test by what a step has measured."""
        failed = {
            layer
            for rule in self.rules
            if rule.action == action and rule.metric in values
            for layer, value in self._by_place(rule, values[rule.metric])
            if not (math.isnan(value) or test(rule, value))
        }
        return set(self._layers) - layers_in(failed, self._layers)

    def forget(self) -> list[Event]:
        """Reset all rules after a rollback; counts and times of past actions are kept.

        Returns:
            The actions that end by this; their value is NaN, because nothing has been measured.
        """
        rules = {rule.name: rule for rule in self.rules}
        ended = []
        for (name, layer), place in self._places.items():
            if place.phase in ("firing", "clearing"):
                place.ended = self._clock
                ended.append(Event(rules[name], layer, False, place.action, math.nan, 0))
            place.phase, place.action, place.since = "ok", "none", self._clock
            place.held = []
        return ended

    def _by_place(
        self, rule: CompleteRule, value: float | Sequence[float]
    ) -> Iterable[tuple[int, float]]:
        if isinstance(value, int | float):
            return [(WHOLE_MODEL, float(value))]
        if rule.per_layer:
            return list(zip(self._layers, value, strict=True))
        known = [v for v in value if not math.isnan(v)]
        return [(WHOLE_MODEL, sum(known) / len(known) if known else math.nan)]

    def _judge(self, rule: CompleteRule, layer: int, place: _Place, value: float) -> list[Event]:
        if place.phase in ("ok", "pending"):
            holds = rule.holds(value)
            if rule.of_steps is not None:
                steps = [*place.held, self._clock] if holds else place.held
                place.held = [step for step in steps if step > self._clock - rule.of_steps]
            if not (holds or place.held):
                self._enter(place, "ok")
                return []
            self._enter(place, "pending")
            if place.held:
                place.since = place.held[0]
            return self._fire_if_due(rule, layer, place, value) if holds else []
        if rule.is_healthy(value):
            self._enter(place, "clearing")
            return self._end_if_due(rule, layer, place, value)
        if place.phase == "clearing":
            self._enter(place, "firing")
        return []

    def _enter(self, place: _Place, phase: _Phase) -> None:
        if place.phase != phase:
            place.phase, place.since = phase, self._clock

    def _fire_if_due(
        self, rule: CompleteRule, layer: int, place: _Place, value: float
    ) -> list[Event]:
        held = self._clock - place.since + 1
        too_soon = place.ended is not None and self._clock - place.ended < rule.min_steps_between
        enough = held if rule.of_steps is None else len(place.held)
        if enough < rule.for_steps or too_soon:
            return []
        place.held = []
        is_used_up = self._firings.get(rule.name, 0) >= rule.max_firings
        place.action = "warn" if is_used_up else rule.action
        self._enter(place, "firing")
        return [Event(rule, layer, True, place.action, value, held, is_used_up)]

    def _end_if_due(
        self, rule: CompleteRule, layer: int, place: _Place, value: float
    ) -> list[Event]:
        held = self._clock - place.since + 1
        if held < rule.clear_for_steps:
            return []
        event = Event(rule, layer, False, place.action, value, held)
        place.ended, place.action = self._clock, "none"
        self._enter(place, "ok")
        return [event]
