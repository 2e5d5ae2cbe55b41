"""The rules of a run's routing guard: the defaults, changed by the user's rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moepp_megatron.config.schema import Config
from moepp_megatron.config.schema.routing_guard import (
    GuardAction,
    GuardRule,
    RoutingGuardSection,
)

# docs/guard.md gives the reason of each number.
DEFAULT_RULES = (
    GuardRule(
        name="collapse_to_zero_computation", metric="ffn_to_target", below=0.1, clear=0.25,
        for_steps=5, of_steps=8, clear_for_steps=20, severity="critical", action="safe_mode",
    ),
    GuardRule(
        name="fall_of_ffn_experts", metric="ffn_to_past", below=0.4, clear=0.6, for_steps=5,
        of_steps=8, clear_for_steps=20, severity="critical", action="safe_mode",
    ),
    GuardRule(
        name="sudden_fall_of_ffn_experts", metric="ffn_to_past", below=0.25, clear=0.6, for_steps=2,
        clear_for_steps=20, severity="critical", action="safe_mode",
    ),
    GuardRule(
        name="few_ffn_experts", metric="ffn_to_target", below=0.6, clear=0.75, for_steps=40,
        of_steps=50, severity="warning", action="raise_tau", scope="mean", min_steps_between=200,
    ),
    GuardRule(
        name="many_ffn_experts", metric="ffn_to_target", above=1.5, clear=1.3, for_steps=100,
        of_steps=120, severity="warning", action="warn", scope="mean",
    ),
    GuardRule(
        name="rare_ffn", metric="class_ffn_to_past", below=0.5, clear=0.75, for_steps=3,
        clear_for_steps=20, severity="warning", action="warn",
    ),
    GuardRule(
        name="ffn_never_skipped", metric="ffn_fraction", above=0.99, clear=0.97, for_steps=100,
        severity="warning", action="warn",
    ),
    GuardRule(
        name="dead_expert", metric="min_ffn_load", below=0.01, clear=0.05, for_steps=75,
        of_steps=100, severity="warning", action="warn",
    ),
    GuardRule(
        name="one_expert_for_all", metric="max_expert_tokens", above=0.85, clear=0.7, for_steps=15,
        of_steps=20, severity="warning", action="warn",
    ),
    GuardRule(
        name="logit_explosion", metric="logit_variance", above=100.0, clear=50.0, for_steps=20,
        severity="critical", action="warn",
    ),
    GuardRule(
        name="entropy_collapse", metric="gate_entropy_ratio", below=0.02, clear=0.05, for_steps=20,
        severity="warning", action="warn",
    ),
    GuardRule(
        name="data_shift", metric="routing_shift", above=1.0, for_steps=1, severity="warning",
        action="warn",
    ),
    GuardRule(
        name="loss_shift", metric="loss_shift", above=1.0, for_steps=1, severity="warning",
        action="warn",
    ),
    GuardRule(
        name="token_shift", metric="token_shift", above=1.0, for_steps=1, severity="warning",
        action="warn",
    ),
    GuardRule(
        name="source_shift", metric="source_shift", above=1.0, for_steps=1, severity="warning",
        action="warn",
    ),
    GuardRule(
        name="gradient_growth", metric="grad_norm_to_past", above=5.0, clear=2.0, for_steps=5,
        of_steps=10, severity="warning", action="warn",
    ),
    GuardRule(
        name="loss_plateau", metric="loss_plateau", above=0.5, clear=0.25, for_steps=1,
        severity="warning", action="warn",
    ),
    GuardRule(
        name="loss_near_zero", metric="loss", below=0.05, clear=0.1, for_steps=15, of_steps=20,
        severity="warning", action="warn",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class CompleteRule:
    """A complete rule, its defaults resolved.

    Attributes:
        name: Its name in alerts.
        metric: One of `GUARD_METRICS`.
        limit: The value beyond which the rule holds; `is_above` gives the side.
        is_above: Whether it holds above the limit, or below.
        clear: The value beyond which the metric is healthy again.
        for_steps: Steps that it must hold before the action.
        of_steps: The newest steps among which they may lie; None: they are in a row.
        clear_for_steps: Steps that it must be healthy before the action ends.
        severity: Severity of its alerts.
        action: The guard's action.
        per_layer: Whether each MoE layer is judged, and acted on, separately.
        min_steps_between: Fewest steps from an end to the next start, in one place.
        max_firings: Times that the action is taken in a run, all places together; places in which
            it begins in the same step count once.
    """

    name: str
    metric: str
    limit: float
    is_above: bool
    clear: float
    for_steps: int = 1
    of_steps: int | None = None
    clear_for_steps: int = 1
    severity: Literal["info", "warning", "critical"] = "warning"
    action: GuardAction = "warn"
    per_layer: bool = True
    min_steps_between: int = 0
    max_firings: int = 10

    def holds(self, value: float) -> bool:
        """Whether the rule holds: the metric is beyond the limit."""
        return value > self.limit if self.is_above else value < self.limit

    def is_healthy(self, value: float) -> bool:
        """Whether the metric is beyond `clear`."""
        return value <= self.clear if self.is_above else value >= self.clear

    @property
    def condition(self) -> str:
        """The rule's condition in words, such as `< 0.25 for 20 steps`."""
        sign = ">" if self.is_above else "<"
        return f"{sign} {self.limit:g}{lasting(self.for_steps, self.of_steps)}"


def lasting(for_steps: int | None, of_steps: int | None = None) -> str:
    """How long a rule must hold, such as ` for 15 of 20 steps`; empty for a single step."""
    if for_steps is None or for_steps == 1:
        return ""
    return f" for {for_steps} of {of_steps} steps" if of_steps else f" for {for_steps} steps"


def is_watched(config: Config) -> bool:
    """Whether the run's routers are judged at all: megatron-core's own layer has none of ours."""
    return config.routing_guard.enabled is not False and config.moe.num_zero_computation_experts > 0


def merged_rules(section: RoutingGuardSection) -> dict[str, GuardRule]:
    """The default rules with the user's changes, and the user's own, by name; dropped ones too."""
    rules = {rule.name: rule for rule in DEFAULT_RULES} if section.defaults else {}
    for own in section.rules:
        base = rules.get(own.name)
        rules[own.name] = own if base is None else _changed(base, own)
    return rules


def effective_rules(section: RoutingGuardSection) -> tuple[CompleteRule, ...]:
    """The complete rules of a checked configuration, in order."""
    return tuple(complete(rule) for rule in merged_rules(section).values() if rule.action != "none")


def complete(rule: GuardRule) -> CompleteRule:
    """Resolve the defaults of a rule that has a metric and one limit."""
    limit = rule.above if rule.above is not None else rule.below
    assert rule.metric is not None, f"rule {rule.name} has no metric"
    assert limit is not None, f"rule {rule.name} has no limit"
    for_steps = rule.for_steps or 1
    return CompleteRule(
        name=rule.name,
        metric=rule.metric,
        limit=limit,
        is_above=rule.above is not None,
        clear=limit if rule.clear is None else rule.clear,
        for_steps=for_steps,
        of_steps=rule.of_steps,
        clear_for_steps=rule.clear_for_steps or for_steps,
        severity=rule.severity or "warning",
        action=rule.action or "warn",
        per_layer={"any": True, "mean": False, None: True}[rule.scope],
        min_steps_between=rule.min_steps_between or 0,
        max_firings=rule.max_firings or 10,
    )


def _changed(base: GuardRule, own: GuardRule) -> GuardRule:
    given = {name: value for name, value in own.model_dump().items() if value is not None}
    if "for_steps" in given and "of_steps" not in given:
        # A new number of steps without those it is of: in a row, as written.
        base = base.model_copy(update={"of_steps": None})
    if "above" in given or "below" in given:
        # A new limit takes the place of the old one, and the old way back does not fit it.
        base = base.model_copy(update={"above": None, "below": None, "clear": None})
    return base.model_copy(update=given)
