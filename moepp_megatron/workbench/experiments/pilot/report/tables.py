"""Tables of the pilot's page, as text in cells: arms, verdicts, equal compute, what to watch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moepp_megatron.workbench.experiments.pilot.report import numbers
from moepp_megatron.workbench.experiments.pilot.result import (
    ArmOutcome,
    ArmVerdict,
    EqualCompute,
    Interval,
    PilotResult,
)
from moepp_megatron.workbench.report import formatting
from moepp_megatron.workbench.report.healthy import METRICS, wrong_in_words


@dataclass(frozen=True)
class PilotCell:
    """A number and the small text below it.

    Attributes:
        value: The number.
        note: Its interval, or nothing.
        is_text: Whether it is text, which may be broken into lines.
    """

    value: str
    note: str = ""
    is_text: bool = False


@dataclass(frozen=True)
class PilotRow:
    """A line of a table.

    Attributes:
        name: Its heading.
        note: Small text below the heading.
        cells: Cells in the order of the table's columns.
        strong: Whether it is the recommended arm's.
    """

    name: str
    note: str
    cells: list[PilotCell]
    strong: bool = False


_ARM_COLUMNS = (
    "Validation loss",
    "Difference to vanilla",
    "Step",
    "Of vanilla's time",
    "Tokens/s",
    "FFN share",
    "All-to-all, MB per step",
    "Energy per token",
    "Alerts",
)


def has_energy(result: PilotResult) -> bool:
    """Whether anything measured what an arm's runs drew."""
    return any(each.energy_per_token_j is not None for each in result.arms)


def arm_columns(result: PilotResult) -> list[str]:
    """Headings; energy only where an arm has it."""
    return [name for name in _ARM_COLUMNS if name != "Energy per token" or has_energy(result)]


def arm_rows(result: PilotResult) -> list[PilotRow]:
    """Rows of all arms in the order of the pilot."""
    return [
        PilotRow(
            name=each.arm.name,
            note=_about(each),
            cells=_arm_cells(each, has_energy(result)),
            strong=each.arm.name == result.recommended,
        )
        for each in result.arms
    ]


def _about(outcome: ArmOutcome) -> str:
    count = len(outcome.seeds)
    return f"top-{outcome.arm.topk}, {outcome.arm.steps:,} steps, {seeds(count)}"


def seeds(count: int) -> str:
    """Number of seeds, such as `3 seeds`."""
    return "1 seed" if count == 1 else f"{count} seeds"


def _arm_cells(outcome: ArmOutcome, with_energy: bool) -> list[PilotCell]:
    cells = [
        interval_cell(outcome.valid_loss, numbers.loss),
        interval_cell(outcome.loss_difference, numbers.signed),
        PilotCell(numbers.seconds(outcome.step_time_s.mean)),
        interval_cell(outcome.time_ratio, numbers.ratio),
        PilotCell(formatting.count(outcome.tokens_per_s.mean)),
        PilotCell(formatting.percent(outcome.ffn_share.mean)),
        PilotCell(numbers.megabytes(outcome.a2a_bytes.mean)),
    ]
    if with_energy:
        used = outcome.energy_per_token_j
        unknown = PilotCell(numbers.NOT_MEASURED, is_text=True)
        cells.append(unknown if used is None else PilotCell(numbers.energy(used.mean)))
    return [*cells, PilotCell(alerts(outcome), is_text=True)]


def interval_cell(found: Interval | None, show: Callable[[float], str]) -> PilotCell:
    """A mean with its interval; a dash where nothing can be told."""
    if found is None:
        return PilotCell(numbers.NOTHING)
    return PilotCell(show(found.mean), numbers.ends(found, show))


def alerts(outcome: ArmOutcome) -> str:
    """Counts of alerts, such as `few_ffn_experts 2, dead_expert 1`, or `none`."""
    raised = sorted(outcome.alerts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{rule} {times}" for rule, times in raised if times) or "none"


@dataclass(frozen=True)
class VerdictRow:
    """One MoE++ arm's answer.

    Attributes:
        verdict: The computed verdict.
        in_time: Loss after vanilla's time minus vanilla's.
        in_compute: Loss minus that of vanilla with the same compute.
        probability: How probable it is that it pays.
        pilot: Time to equal loss at the pilot's scale.
        target: The same ratio at the target.
        why: Numbers behind it; empty for the arm whose reasons are at the top of the page.
        strong: Whether it is the recommended arm.
    """

    verdict: ArmVerdict
    in_time: PilotCell
    in_compute: PilotCell
    probability: PilotCell
    pilot: PilotCell
    target: PilotCell
    why: str
    strong: bool


def verdict_rows(result: PilotResult) -> list[VerdictRow]:
    """Rows of every MoE++ arm, the most favourable first."""
    return [
        VerdictRow(
            verdict=each,
            in_time=interval_cell(each.loss_in_time, numbers.signed),
            in_compute=interval_cell(each.loss_in_compute, numbers.signed),
            probability=PilotCell(numbers.probability(each.probability)),
            pilot=interval_cell(each.time_to_loss, numbers.ratio),
            target=interval_cell(each.target_time_to_loss, numbers.ratio),
            why="" if each is result.chosen else " ".join(each.reasons),
            strong=each.arm == result.recommended,
        )
        for each in result.verdicts
    ]


@dataclass(frozen=True)
class ComputeRow:
    """A MoE++ arm against what has the same compute.

    Attributes:
        arm: Its name.
        other: The vanilla arm.
        difference: MoE++ minus the other, nats.
        text: What it means.
    """

    arm: str
    other: str
    difference: PilotCell
    text: str


def compute_rows(result: PilotResult) -> list[ComputeRow]:
    """Rows of every pair of the same compute."""
    return [
        ComputeRow(
            each.arm,
            each.other,
            interval_cell(each.loss_difference, numbers.signed),
            _meaning(each),
        )
        for each in result.equal_compute
    ]


def _meaning(row: EqualCompute) -> str:
    difference = row.loss_difference
    better = "better" if difference.mean < 0 else "worse"
    size = numbers.loss(abs(difference.mean))
    text = f"After the same tokens {row.arm} is {size} nats {better} than {row.other}"
    if difference.low is None or difference.high is None:
        return text + "; with one seed nobody knows how sure that is."
    if difference.low <= 0 <= difference.high:
        return text + ", which these seeds cannot tell from no difference."
    return text + "; the interval does not contain 0."


@dataclass(frozen=True)
class WatchRow:
    """One metric to watch in the runs that follow, with what was measured and what is healthy.

    Attributes:
        metric: Its name in `metrics.jsonl` and the monitor.
        meaning: Its meaning in plain words.
        measured: Its value in this pilot, for the arm to continue with.
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
    found = {**outcome.health, "ffn_fraction": outcome.ffn_share.mean}
    return [
        WatchRow(
            metric, meaning, formatting.significant(found[metric]), healthy, wrong_in_words(wrong)
        )
        for metric, meaning, healthy, wrong, is_watched in METRICS
        if is_watched and metric in found
    ]
