"""Section `routing_guard`: rules over the routers, and the actions when one holds."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moepp_megatron.config.schema.section import ConfigPath, Section, unit

GuardAction = Literal["none", "warn", "raise_tau", "force_ffn", "safe_mode", "rollback"]


class GuardRule(Section):
    """One rule. If `name` is that of a default rule, missing settings are taken from it."""

    name: str = Field(
        min_length=1,
        description="What alerts call it; that of a default rule changes that rule",
        json_schema_extra=unit("-"),
    )
    metric: str | None = Field(
        default=None,
        description="What it looks at (docs/guard.md)",
        json_schema_extra=unit("-"),
    )
    above: float | None = Field(
        default=None,
        description="The rule holds while the metric is above this",
        json_schema_extra=unit("the metric's"),
    )
    below: float | None = Field(
        default=None,
        description="The rule holds while the metric is below this",
        json_schema_extra=unit("the metric's"),
    )
    for_steps: int | None = Field(
        default=None,
        ge=1,
        description="Steps that it must hold before the action is taken; null: 1",
        json_schema_extra=unit("steps"),
    )
    of_steps: int | None = Field(
        default=None,
        ge=1,
        le=1000,
        description="The newest steps among which those for_steps may lie, so that a value that "
        "flickers counts; null: in a row",
        json_schema_extra=unit("steps"),
    )
    clear: float | None = Field(
        default=None,
        description="The metric is healthy again beyond this; null: where the rule does not hold",
        json_schema_extra=unit("the metric's"),
    )
    clear_for_steps: int | None = Field(
        default=None,
        ge=1,
        description="Steps that it must be healthy before the action ends; null: as for_steps",
        json_schema_extra=unit("steps"),
    )
    severity: Literal["info", "warning", "critical"] | None = Field(
        default=None,
        description="Severity of its alerts; null: warning",
        json_schema_extra=unit("-"),
    )
    action: GuardAction | None = Field(
        default=None,
        description="What is done; none drops the rule; null: warn",
        json_schema_extra=unit("-"),
    )
    scope: Literal["any", "mean"] | None = Field(
        default=None,
        description="Judge and act on each MoE layer by itself, or on the layers' mean and the "
        "whole model; null: any",
        json_schema_extra=unit("-"),
    )
    min_steps_between: int | None = Field(
        default=None,
        ge=0,
        description="Fewest steps from the end of the action to its next start, in one place; "
        "null: 0",
        json_schema_extra=unit("steps"),
    )
    max_firings: int | None = Field(
        default=None,
        ge=1,
        description="Times that the action is taken in a run, layers of one step counting once; "
        "after that the rule only warns; null: 10",
        json_schema_extra=unit("times"),
    )


class ForceFFNSection(Section):
    """The tokens that the action `force_ffn` concerns."""

    tokens: Literal["all", "ids", "high_loss"] = Field(
        default="high_loss",
        description="All tokens, those of token_ids, or those whose token id has a high loss: "
        "running mean of the loss of the token after it",
        json_schema_extra=unit("-"),
    )
    token_ids: list[int] = Field(
        default_factory=list,
        description="Token ids, for tokens: ids",
        json_schema_extra=unit("-"),
    )
    share: float = Field(
        default=0.1,
        gt=0.0,
        lt=1.0,
        description="Share of all tokens that counts as high loss, the worst token ids first",
        json_schema_extra=unit("1"),
    )
    decay: float = Field(
        default=0.99,
        ge=0.0,
        lt=1.0,
        description="Weight of the past, a step, in the running mean; 0.99 looks back 100 steps",
        json_schema_extra=unit("1"),
    )


class ShiftSection(Section):
    """The expert usage, and the distance from its reference that counts as a shift."""

    window: int = Field(
        default=10,
        ge=0,
        description="Steps that expert usage is counted over; 0 counts none",
        json_schema_extra=unit("steps"),
    )
    reference: ConfigPath | None = Field(
        default=None,
        description="routing_profile.json of a run with the same experts and vocabulary to compare "
        "with; null compares with this run's own windows",
        json_schema_extra=unit("-"),
    )
    fixed_after: int | None = Field(
        default=None,
        ge=1,
        description="Keep the reference of this step from then on; null lets it follow the run, so "
        "that what training changes slowly is no shift. Not before training has become slow",
        json_schema_extra=unit("steps"),
    )
    span: int = Field(
        default=3,
        ge=1,
        description="Windows whose steps make the line that a step is compared with, 12 steps at "
        "least; and the newest windows of routing_profile.json",
        json_schema_extra=unit("windows"),
    )
    lag: int = Field(
        default=0,
        ge=0,
        description="Newest windows that are not yet in the line",
        json_schema_extra=unit("windows"),
    )
    memory: int = Field(
        default=6,
        ge=1,
        description="Windows whose steps tell how much usual steps differ, 40 steps at least; a "
        "shift that has lasted for so long is what is usual",
        json_schema_extra=unit("windows"),
    )
    warmup: int = Field(
        default=8,
        ge=1,
        description="Windows before a step is judged",
        json_schema_extra=unit("windows"),
    )
    false_alarm_steps: float = Field(
        default=10_000.0,
        ge=100.0,
        description="Steps in which chance may raise one false alarm, of routing or of the loss",
        json_schema_extra=unit("steps"),
    )
    threshold: float | None = Field(
        default=None,
        gt=0.0,
        description="The limit itself, in standard deviations of evidence that has added up; null: "
        "that of false_alarm_steps",
        json_schema_extra=unit("1"),
    )


class RoutingGuardSection(Section):
    """Watches the routers and acts where a rule holds."""

    enabled: bool | None = Field(
        default=None,
        description="true: judge the rules after every step and act; null: judge and only tell, as "
        "with dry_run; false: neither. `routing_guard: safe`, `observe` and `off` are short for "
        "these",
        json_schema_extra=unit("-"),
    )
    dry_run: bool = Field(
        default=False,
        description="Only tell what would be done; the model's numbers stay what they are",
        json_schema_extra=unit("-"),
    )
    defaults: bool = Field(
        default=True,
        description="Begin with the default rules (docs/guard.md)",
        json_schema_extra=unit("-"),
    )
    rules: list[GuardRule] = Field(
        default_factory=list,
        description="Further rules, or changes of default rules by their name",
        json_schema_extra=unit("-"),
    )
    warmup: int = Field(
        default=0,
        ge=0,
        description="First steps of the run that are not judged",
        json_schema_extra=unit("steps"),
    )
    tau_factor: float = Field(
        default=2.0,
        gt=1.0,
        description="What the action raise_tau multiplies tau by",
        json_schema_extra=unit("1"),
    )
    tau_half_life: float = Field(
        default=50.0,
        gt=0.0,
        description="Steps in which half of that (of its logarithm) is gone once the action ends",
        json_schema_extra=unit("steps"),
    )
    safe_ramp: int = Field(
        default=20,
        ge=0,
        description="Steps over which zero-computation experts that safe mode switched off come "
        "back: their logits are lowered by less and less; 0: at once",
        json_schema_extra=unit("steps"),
    )
    force_ffn: ForceFFNSection = Field(
        default_factory=ForceFFNSection, description="Tokens of the action force_ffn"
    )
    shift: ShiftSection = Field(
        default_factory=ShiftSection, description="Expert usage and shift of the data"
    )

    @property
    def acts(self) -> bool:
        """Whether actions are carried out, not only told."""
        return self.enabled is True and not self.dry_run
