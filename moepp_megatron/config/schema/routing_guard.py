"""Section `routing_guard`: rules over the routers, and the actions when one holds."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from moepp_megatron.config.schema.section import ConfigPath, Section, Unit

GuardAction = Literal["none", "warn", "raise_tau", "safe_mode", "rollback"]


class GuardRule(Section):
    """One rule. If `name` is that of a default rule, missing settings are taken from it."""

    name: Annotated[str, Unit("-"), Field(min_length=1)]
    """What alerts call it; that of a default rule changes that rule"""
    metric: Annotated[str | None, Unit("-")] = None
    """What it looks at (docs/guard.md)"""
    above: Annotated[float | None, Unit("the metric's")] = None
    """The rule holds while the metric is above this"""
    below: Annotated[float | None, Unit("the metric's")] = None
    """The rule holds while the metric is below this"""
    for_steps: Annotated[int | None, Unit("steps"), Field(ge=1)] = None
    """Steps that it must hold before the action is taken; null: 1"""
    of_steps: Annotated[int | None, Unit("steps"), Field(ge=1, le=1000)] = None
    """The newest steps among which those for_steps may lie, so that a value that flickers counts;
    null: in a row"""
    clear: Annotated[float | None, Unit("the metric's")] = None
    """The metric is healthy again beyond this; null: where the rule does not hold"""
    clear_for_steps: Annotated[int | None, Unit("steps"), Field(ge=1)] = None
    """Steps that it must be healthy before the action ends; null: as for_steps"""
    severity: Annotated[Literal["info", "warning", "critical"] | None, Unit("-")] = None
    """Severity of its alerts; null: warning"""
    action: Annotated[GuardAction | None, Unit("-")] = None
    """What is done; none drops the rule; null: warn"""
    scope: Annotated[Literal["any", "mean"] | None, Unit("-")] = None
    """Judge and act on each MoE layer separately, or on the layers' mean and the whole model; null:
    any"""
    min_steps_between: Annotated[int | None, Unit("steps"), Field(ge=0)] = None
    """Fewest steps from the end of the action to its next start, in one place; null: 0"""
    max_firings: Annotated[int | None, Unit("times"), Field(ge=1)] = None
    """Times that the action is taken in a run, layers of one step counting once; after that the
    rule only warns; null: 10"""


class ShiftSection(Section):
    """The expert usage, and the distance from its reference that counts as a shift."""

    window: Annotated[int, Unit("steps"), Field(ge=0)] = 10
    """Steps that expert usage is counted over; 0 counts none"""
    reference: Annotated[ConfigPath | None, Unit("-")] = None
    """routing_profile.json of a run with the same experts and vocabulary to compare with; null
    compares with this run's own windows"""
    fixed_after: Annotated[int | None, Unit("steps"), Field(ge=1)] = None
    """Keep the reference of this step from then on; null lets it follow the run, so that what
    training changes slowly is no shift. Not before training has become slow"""
    span: Annotated[int, Unit("windows"), Field(ge=1)] = 3
    """Windows whose steps make the line that a step is compared with, 12 steps at least; and the
    newest windows of routing_profile.json"""
    lag: Annotated[int, Unit("windows"), Field(ge=0)] = 0
    """Newest windows that are not yet in the line"""
    memory: Annotated[int, Unit("windows"), Field(ge=1)] = 6
    """Windows whose steps tell how much usual steps differ, 40 steps at least; a shift that has
    lasted for so long is what is usual"""
    warmup: Annotated[int, Unit("windows"), Field(ge=1)] = 8
    """Windows before a step is judged"""
    false_alarm_steps: Annotated[float, Unit("steps"), Field(ge=100.0)] = 10_000.0
    """Steps in which chance may raise one false alarm, of routing or of the loss"""
    threshold: Annotated[float | None, Unit("1"), Field(gt=0.0)] = None
    """The limit itself, in standard deviations of evidence that has added up; null: that of
    false_alarm_steps"""


class RoutingGuardSection(Section):
    """Watches the routers and acts where a rule holds."""

    enabled: Annotated[bool | None, Unit("-")] = None
    """true: judge the rules after every step and act; null: judge and only tell, as with dry_run;
    false: neither. `routing_guard: safe`, `observe` and `off` are short for these"""
    dry_run: Annotated[bool, Unit("-")] = False
    """Only tell what would be done; the model's numbers stay what they are"""
    defaults: Annotated[bool, Unit("-")] = True
    """Begin with the default rules (docs/guard.md)"""
    rules: Annotated[list[GuardRule], Unit("-")] = []
    """Further rules, or changes of default rules by their name"""
    warmup: Annotated[int, Unit("steps"), Field(ge=0)] = 0
    """First steps of the run that are not judged"""
    tau_factor: Annotated[float, Unit("1"), Field(gt=1.0)] = 2.0
    """What the action raise_tau multiplies tau by"""
    tau_half_life: Annotated[float, Unit("steps"), Field(gt=0.0)] = 50.0
    """Steps in which half of that (of its logarithm) is gone once the action ends"""
    shift: ShiftSection = ShiftSection()
    """Expert usage and shift of the data"""

    @property
    def acts(self) -> bool:
        """Whether actions are carried out, not only told."""
        return self.enabled is True and not self.dry_run
