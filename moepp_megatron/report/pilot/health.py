"""What to watch in the runs that follow a pilot, with what was measured and what is healthy."""

from __future__ import annotations

from dataclasses import dataclass

from moepp_megatron.config.guard_rules import DEFAULT_RULES
from moepp_megatron.config.schema.routing_guard import GuardRule
from moepp_megatron.planning.pilot.result import ArmOutcome
from moepp_megatron.report import formatting


@dataclass(frozen=True)
class WatchRow:
    """One metric.

    Attributes:
        metric: As `metrics.jsonl` and the monitor call it.
        meaning: In plain words.
        measured: In this pilot, of the arm to go on with.
        healthy: The range in docs/routing.md.
        wrong: When something is wrong.
    """

    metric: str
    meaning: str
    measured: str
    healthy: str
    wrong: str


# Metric, meaning, the range of docs/routing.md, and when something is wrong where no rule of the
# guard says it. A test holds the ranges to the page.
_ROWS: tuple[tuple[str, str, str, str], ...] = (
    ("ffn_fraction", "FFN experts' share of all selections", "0.49 to 0.60", "few_ffn_experts"),
    (
        "max_ffn_load",
        "busiest FFN expert over the mean; all ranks wait for it",
        "1.25 to 3.35",
        "above 3 to 4 for long",
    ),
    ("min_ffn_load", "idlest FFN expert over the mean", "0.07 to 0.79", "dead_expert"),
    (
        "gate_entropy",
        "how undecided the router is, nats",
        "1.23 to 2.34",
        "near log E, or near 0",
    ),
    ("logit_variance", "spread of the router's logits", "0.40 to 2.32", "logit_explosion"),
    (
        "row_cosine_max",
        "likeness of the two most alike experts' rows",
        "0.20 to 0.26",
        "near 1",
    ),
    (
        "balance_gradient_ratio",
        "pull of the balance loss against the language model's",
        "0.006 to 0.035",
        "above 1",
    ),
    (
        "constant_replaced",
        "share of the input that constant experts replace",
        "0.06 to 0.58",
        "near 0 or 1",
    ),
    ("residual_ratio", "weight of the gating residual", "0.17 to 0.33", "above 1"),
)


def watch_rows(outcome: ArmOutcome) -> list[WatchRow]:
    """The metrics that the arm's runs have; the FFN share always."""
    rows = []
    for metric, meaning, healthy, wrong in _ROWS:
        value = outcome.ffn_share.mean if metric == "ffn_fraction" else outcome.health.get(metric)
        if value is None:
            continue
        rule = guard_rule(wrong)
        rows.append(
            WatchRow(
                metric=metric,
                meaning=meaning,
                measured=formatting.significant(value),
                healthy=healthy,
                wrong=wrong if rule is None else _condition(rule),
            )
        )
    return rows


def guard_rule(name: str) -> GuardRule | None:
    """A default rule of the routing guard."""
    return next((rule for rule in DEFAULT_RULES if rule.name == name), None)


def _condition(rule: GuardRule) -> str:
    side, limit = ("above", rule.above) if rule.above is not None else ("below", rule.below)
    what = {"ffn_to_target": "of the wanted share", "min_ffn_load": ""}.get(str(rule.metric), "")
    text = f"{side} {limit:g} {what}".strip()
    return f"{text} for {rule.for_steps} steps ({rule.name})"
