"""The metrics to watch in the runs after a pilot, with measured and healthy values."""

from __future__ import annotations

from dataclasses import dataclass

from moepp_megatron.workbench.experiments.pilot.result import ArmOutcome
from moepp_megatron.workbench.report import formatting
from moepp_megatron.workbench.report.healthy import METRICS, wrong_in_words


@dataclass(frozen=True)
class WatchRow:
    """One metric.

    Attributes:
        metric: Its name in `metrics.jsonl` and the monitor.
        meaning: Its meaning in plain words.
        measured: Its value in this pilot, for the arm to continue with.
        healthy: The range in docs/routing.md.
        wrong: Sign of a problem.
    """

    metric: str
    meaning: str
    measured: str
    healthy: str
    wrong: str


def watch_rows(outcome: ArmOutcome) -> list[WatchRow]:
    """The metrics that the arm's runs have; the FFN share always."""
    rows = []
    for metric, meaning, healthy, wrong, is_watched in METRICS:
        if not is_watched:
            continue
        value = outcome.ffn_share.mean if metric == "ffn_fraction" else outcome.health.get(metric)
        if value is None:
            continue
        rows.append(
            WatchRow(
                metric=metric,
                meaning=meaning,
                measured=formatting.significant(value),
                healthy=healthy,
                wrong=wrong_in_words(wrong),
            )
        )
    return rows
