"""Judges rules over a step's numbers: when one begins to hold, and when it has ended.

A rule in one place (a MoE layer, or the whole model) begins once it has held for `for_steps` steps
in a row, and has ended once it has been healthy, beyond `clear`, for as many. Between the limit and
`clear` nothing changes. Decisions use neither random numbers nor clocks.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

# The place of a rule that is not of one layer.
WHOLE_MODEL = 0
# A metric's value, or one for each MoE layer.
Values = Mapping[str, float | Sequence[float]]


@dataclass(frozen=True)
class CompleteRule:
    """A rule, its defaults resolved."""

    name: str
    metric: str
    limit: float
    is_above: bool  # holds above the limit, not below
    clear: float  # healthy again beyond this
    for_steps: int = 1  # to hold in a row before the action, and to be healthy after it
    severity: Literal["info", "warning", "critical"] = "warning"
    action: str = "warn"

    def holds(self, value: float) -> bool:
        """True if the metric is beyond the limit."""
        return value > self.limit if self.is_above else value < self.limit

    def is_healthy(self, value: float) -> bool:
        """True if the metric is within `clear`."""
        return value <= self.clear if self.is_above else value >= self.clear

    @property
    def condition(self) -> str:
        """Format the condition, such as `< 0.25 for 20 steps`."""
        sign = ">" if self.is_above else "<"
        return f"{sign} {self.limit:g}" + f" for {self.for_steps} steps" * (self.for_steps > 1)


@dataclass(frozen=True)
class Event:
    """A rule begins or ends."""

    rule: CompleteRule
    layer: int  # global number of the MoE layer, or `WHOLE_MODEL`
    begins: bool
    value: float  # of the metric; NaN if not measured
    steps: int = 0  # in a row that have led to it


class RuleJudge:
    """Judges rules of different names, step after step.

    `state`, of an earlier run, may have rules and layers that do not exist any more.
    """

    def __init__(
        self, rules: Iterable[CompleteRule], layer_numbers: Sequence[int], state: Sequence[Any] = ()
    ) -> None:
        self.rules = tuple(rules)
        self._layers = list(layer_numbers)
        names, layers = {rule.name for rule in self.rules}, (WHOLE_MODEL, *self._layers)
        # By rule and layer: whether it has begun, and steps in a row that speak for a change.
        self._places: dict[tuple[str, int], tuple[bool, int]] = {
            (name, layer): (bool(begun), int(steps))
            for name, layer, begun, steps in state
            if name in names and layer in layers
        }

    def state(self) -> list[list[Any]]:
        """State for a checkpoint, of plain numbers and names."""
        return [[*place, *phase] for place, phase in self._places.items()]

    def judge(self, values: Values) -> list[Event]:
        """Judge one step's numbers: beginnings and ends, in the order of rules and layers.

        A missing value or NaN was not measured: the steps in a row continue, in each layer.
        """
        events: list[Event] = []
        for rule in self.rules:
            value = values.get(rule.metric)
            if value is None:
                places = [(layer, math.nan) for name, layer in self._places if name == rule.name]
            elif isinstance(value, int | float):
                places = [(WHOLE_MODEL, value)]
            else:
                places = list(zip(self._layers, value, strict=True))
            events += [e for each in places if (e := self._judge(rule, *each)) is not None]
        return events

    def _judge(self, rule: CompleteRule, layer: int, value: float) -> Event | None:
        begun, steps = self._places.get((rule.name, layer), (False, 0))
        speaks = rule.is_healthy(value) if begun else rule.holds(value)
        if math.isnan(value):
            speaks = steps > 0
        steps = steps + 1 if speaks else 0
        event = None
        if steps >= rule.for_steps and not math.isnan(value):
            begun = not begun
            event, steps = Event(rule, layer, begun, value, steps), 0
        self._places[rule.name, layer] = begun, steps
        return event

    def is_quiet(self, rule: str) -> bool:
        """True if the rule of this name neither holds nor has begun anywhere."""
        return not any(any(state) for (name, _), state in self._places.items() if name == rule)

    def forget(self) -> list[Event]:
        """Reset all rules after a rollback; the ends of those that had begun."""
        rules = {rule.name: rule for rule in self.rules}
        begun = [place for place, (is_begun, _) in self._places.items() if is_begun]
        self._places = {}
        return [Event(rules[name], layer, False, math.nan) for name, layer in begun]
