"""Section `routing_guard`: rules over the routers, and the actions when one holds."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from moepp_megatron.config.schema.section import Section, Unit

GuardAction = Literal["none", "warn", "put_back", "rollback", "stop"]


class GuardRule(Section):
    """One rule. If `name` is that of a default rule, missing settings are taken from it."""

    name: Annotated[str, Field(min_length=1)]
    """Name in alerts; that of a default rule changes that rule"""
    metric: str | None = None
    """Metric to watch (docs/metrics.md)"""
    above: Annotated[float | None, Unit("the metric's")] = None
    """The rule holds while the metric is above this"""
    below: Annotated[float | None, Unit("the metric's")] = None
    """The rule holds while the metric is below this"""
    for_steps: Annotated[int | None, Unit("steps"), Field(ge=1)] = None
    """Steps in a row that it must hold before the action is taken, and must be healthy before the
    next time; null: 1"""
    clear: Annotated[float | None, Unit("the metric's")] = None
    """The metric is healthy again beyond this; null: where the rule does not hold"""
    severity: Literal["info", "warning", "critical"] | None = None
    """Severity of its alerts; null: warning"""
    action: GuardAction | None = None
    """Response; none drops the rule; put_back gives all routers their weights from the newest
    healthy step; null: warn"""


class RoutingGuardSection(Section):
    """Watches the routers and acts where a rule holds."""

    enabled: bool | None = None
    """true: judge the rules after every step and act; null: judge and only report, as with dry_run;
    false: neither. `routing_guard: safe`, `observe` and `off` are short for these"""
    dry_run: bool = False
    """Only report what would be done; the model's numbers stay what they are"""
    defaults: bool = True
    """Begin with the default rules (docs/guard.md)"""
    rules: list[GuardRule] = []
    """Further rules, or changes of default rules by their name"""
    warmup: Annotated[int, Unit("steps"), Field(ge=0)] = 0
    """First steps of the run that are not judged"""
    false_alarm_steps: Annotated[float, Unit("steps"), Field(ge=100.0)] = 10_000.0
    """Steps in which chance may raise one alarm of a series (loss, routing, token ids, sources)"""

    @property
    def acts(self) -> bool:
        """True if actions are carried out, not only reported."""
        return self.enabled is True and not self.dry_run
