"""The healthy ranges of docs/routing.md, for plots and for the help texts of pages."""

from __future__ import annotations

from typing import Any

from moepp_megatron import catalogue
from moepp_megatron.config.sections import section_models

# The section of the routing guard; None where that feature has been removed.
GUARD: Any = section_models().get("routing_guard")

# A test holds the ranges to the page.
METRICS = {name: row for name, row in catalogue.METRICS.items() if row.wrong}

# Of the run that the ranges are from; an entropy is drawn as a share of log E.
QUICKSTART_EXPERTS = 12


def healthy_range(name: str) -> tuple[float, float] | None:
    """The ends of a metric's range; None if unknown."""
    row = catalogue.METRICS.get(name)
    if row is None or not row.healthy:
        return None
    low, high = row.healthy.split(" to ")
    return float(low), float(high)


def wrong_text(wrong: str) -> str:
    """A row's `wrong`, with the condition of a rule of the guard written out."""
    rule = _guard_rule(wrong)
    return wrong if rule is None else _condition(rule)


def _guard_rule(name: str) -> Any:
    """A default rule of the routing guard; None for another name."""
    return None if GUARD is None else GUARD().merged_rules().get(name)


def _condition(rule: Any) -> str:
    """A rule's condition, such as "above 100 for 20 steps (logit_explosion)"."""
    side, limit = ("above", rule.above) if rule.above is not None else ("below", rule.below)
    what = {"mean_ffn_to_target": "of the wanted share", "min_ffn_load": ""}.get(
        str(rule.metric), ""
    )
    text = f"{side} {limit:g} {what}".strip()
    steps = rule.for_steps or 1
    return text + f" for {steps} steps" * (steps > 1) + f" ({rule.name})"
