"""The healthy ranges of docs/routing.md, for plots and for the help texts of pages."""

from __future__ import annotations

from typing import NamedTuple

from moepp_megatron import catalogue
from moepp_megatron.config.guard_rules import DEFAULT_RULES, lasting
from moepp_megatron.config.schema.routing_guard import GuardRule


class HealthyMetric(NamedTuple):
    """A metric of the routers.

    Attributes:
        name: Its name in `metrics.jsonl` and the monitor.
        meaning: Its meaning in plain words.
        healthy: Its range, layer by layer, in a healthy run of the quickstart model.
        wrong: Sign of a problem: in words, or a default rule of the routing guard.
    """

    name: str
    meaning: str
    healthy: str
    wrong: str


# A test holds the ranges to the page.
METRICS = tuple(
    HealthyMetric(name, row.meaning, row.healthy, row.wrong)
    for name, row in catalogue.METRICS.items()
    if row.wrong
)

# Of the run that the ranges are from; an entropy is drawn as a share of log E.
QUICKSTART_EXPERTS = 12


def healthy_range(name: str) -> tuple[float, float] | None:
    """The ends of a metric's range; None if unknown."""
    row = catalogue.METRICS.get(name)
    if row is None or not row.healthy:
        return None
    low, high = row.healthy.split(" to ")
    return float(low), float(high)


def metrics_in_words() -> list[HealthyMetric]:
    """Every metric, with the conditions of the guard's rules written out."""
    return [metric._replace(wrong=wrong_in_words(metric.wrong)) for metric in METRICS]


def wrong_in_words(wrong: str) -> str:
    """`HealthyMetric.wrong` in words."""
    rule = guard_rule(wrong)
    return wrong if rule is None else _condition(rule)


def guard_rule(name: str) -> GuardRule | None:
    """A default rule of the routing guard."""
    return next((rule for rule in DEFAULT_RULES if rule.name == name), None)


def _condition(rule: GuardRule) -> str:
    """A rule's condition, such as "above 100 for 20 steps (logit_explosion)"."""
    side, limit = ("above", rule.above) if rule.above is not None else ("below", rule.below)
    what = {"ffn_to_target": "of the wanted share", "min_ffn_load": ""}.get(str(rule.metric), "")
    text = f"{side} {limit:g} {what}".strip()
    return f"{text}{lasting(rule.for_steps, rule.of_steps)} ({rule.name})"
