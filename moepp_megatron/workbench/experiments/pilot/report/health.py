"""What to watch in the runs that follow a pilot, with what was measured and what is healthy."""

from __future__ import annotations

from dataclasses import dataclass

from moepp_megatron.workbench.experiments.pilot.result import ArmOutcome
from moepp_megatron.workbench.report import formatting
from moepp_megatron.workbench.report.healthy import METRICS, wrong_in_words


@dataclass(frozen=True)
class WatchRow:
    """One metric.

    Attributes:
        metric: Same as `metrics.jsonl` and the monitor call it.
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
