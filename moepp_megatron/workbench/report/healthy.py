"""The healthy ranges of docs/routing.md, for plots and for the help texts of pages."""

from __future__ import annotations

from typing import NamedTuple

from moepp_megatron.config.guard_rules import DEFAULT_RULES
from moepp_megatron.config.schema.routing_guard import GuardRule


class Metric(NamedTuple):
    """A metric of the routers.

    Attributes:
        name: Its name in `metrics.jsonl` and the monitor.
        meaning: Its meaning in plain words.
        healthy: Its range, layer by layer, in a healthy run of the quickstart model.
        wrong: Sign of a problem: in words, or a default rule of the routing guard.
        is_watched: Whether somebody who follows a run should look at it first.
    """

    name: str
    meaning: str
    healthy: str
    wrong: str
    is_watched: bool = True


# A test holds the ranges to the page.
METRICS = (
    Metric(
        "ffn_fraction", "FFN experts' share of all selections", "0.52 to 0.65", "few_ffn_experts"
    ),
    Metric(
        "max_ffn_load",
        "busiest FFN expert over the mean; all ranks wait for it",
        "1.20 to 2.22",
        "above 3 to 4 for long",
    ),
    Metric("min_ffn_load", "idlest FFN expert over the mean", "0.22 to 0.83", "dead_expert"),
    Metric(
        "gate_entropy", "how undecided the router is, nats", "1.23 to 2.33", "near log E, or near 0"
    ),
    Metric("logit_variance", "spread of the router's logits", "0.42 to 2.08", "logit_explosion"),
    Metric(
        "row_cosine_max", "likeness of the two most alike experts' rows", "0.17 to 0.24", "near 1"
    ),
    Metric(
        "balance_gradient_ratio",
        "pull of the balance loss against the language model's",
        "0.006 to 0.015",
        "above 1",
    ),
    Metric(
        "constant_replaced",
        "share of the input that constant experts replace",
        "0.05 to 0.62",
        "near 0 or 1",
    ),
    Metric("residual_ratio", "weight of the gating residual", "0.14 to 0.30", "above 1"),
    Metric(
        "selection_margin",
        "score of the last selected expert less that of the next one",
        "0.02 to 0.07",
        "near 0 for long: rounding decides",
        is_watched=False,
    ),
    Metric(
        "row_cosine",
        "likeness of two experts' rows, mean over pairs",
        "0.06 to 0.07",
        "near 1",
        is_watched=False,
    ),
    Metric(
        "constant_norm",
        "norm of the constant experts' vectors",
        "0.69 to 0.73",
        "growing without end",
        is_watched=False,
    ),
)

# Of the run that the ranges are from; an entropy is drawn as a share of log E.
QUICKSTART_EXPERTS = 12


def healthy_range(name: str) -> tuple[float, float] | None:
    """The ends of a metric's range; None if unknown."""
    for metric in METRICS:
        if metric.name == name:
            low, high = metric.healthy.split(" to ")
            return float(low), float(high)
    return None


def metrics_in_words() -> list[Metric]:
    """Every metric, with the conditions of the guard's rules written out."""
    return [metric._replace(wrong=wrong_in_words(metric.wrong)) for metric in METRICS]


def wrong_in_words(wrong: str) -> str:
    """`Metric.wrong` in words."""
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
    return f"{text} for {rule.for_steps} steps ({rule.name})"
