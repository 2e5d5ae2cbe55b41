"""Tables of the pilot's page, as text in cells."""

from __future__ import annotations

from dataclasses import dataclass

from moepp_megatron.workbench.experiments.pilot.report import words
from moepp_megatron.workbench.experiments.pilot.result import (
    ArmOutcome,
    Interval,
    PilotResult,
    Verdict,
)
from moepp_megatron.workbench.report import formatting


@dataclass(frozen=True)
class Cell:
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
class Row:
    """A line of a table.

    Attributes:
        name: Its heading.
        note: Small text below the heading.
        cells: Cells in the order of the table's columns.
        strong: Whether it is the recommended arm's.
    """

    name: str
    note: str
    cells: list[Cell]
    strong: bool = False


_ARM_COLUMNS = (
    "Validation loss",
    "Difference to vanilla",
    "Step",
    "Of vanilla's time",
    "Tokens/s",
    "FFN share",
    "All-to-all, MB a step",
    "Energy a token",
    "Alerts",
)


def has_energy(result: PilotResult) -> bool:
    """Whether anything measured what an arm's runs drew."""
    return any(each.energy_per_token_j is not None for each in result.arms)


def arm_columns(result: PilotResult) -> list[str]:
    """Headings; energy only where an arm has it."""
    return [name for name in _ARM_COLUMNS if name != "Energy a token" or has_energy(result)]


def arm_rows(result: PilotResult) -> list[Row]:
    """Rows of all arms in the order of the pilot."""
    return [
        Row(
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


def _arm_cells(outcome: ArmOutcome, with_energy: bool) -> list[Cell]:
    difference, time_ratio = outcome.loss_difference, outcome.time_ratio
    used = outcome.energy_per_token_j
    cells = [
        Cell(words.loss(outcome.valid_loss.mean), words.ends(outcome.valid_loss, words.loss)),
        Cell(words.NOTHING)
        if difference is None
        else Cell(words.signed(difference.mean), words.ends(difference, words.signed)),
        Cell(words.seconds(outcome.step_time_s.mean)),
        ratio_cell(time_ratio),
        Cell(formatting.count(outcome.tokens_per_s.mean)),
        Cell(formatting.percent(outcome.ffn_share.mean)),
        Cell(words.megabytes(outcome.a2a_bytes.mean)),
    ]
    if with_energy:
        unknown = Cell(words.NOT_MEASURED, is_text=True)
        cells.append(unknown if used is None else Cell(words.energy(used.mean)))
    return [*cells, Cell(alerts(outcome), is_text=True)]


def alerts(outcome: ArmOutcome) -> str:
    """Counts of alerts, such as `few_ffn_experts 2, dead_expert 1`, or `none`."""
    raised = sorted(outcome.alerts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{rule} {times}" for rule, times in raised if times) or "none"


@dataclass(frozen=True)
class VerdictRow:
    """One MoE++ arm's answer.

    Attributes:
        verdict: The computed verdict.
        factor: Tokens to vanilla's loss over vanilla's.
        pilot: Time to equal loss at the pilot's scale.
        target: The same ratio at the target.
        why: Numbers behind it; empty for the arm whose reasons are at the top of the page.
        strong: Whether it is the recommended arm.
    """

    verdict: Verdict
    factor: Cell
    pilot: Cell
    target: Cell
    why: str
    strong: bool


def ratio_cell(found: Interval | None) -> Cell:
    """A ratio with its interval; a dash where nothing can be told."""
    if found is None:
        return Cell(words.NOTHING)
    return Cell(words.ratio(found.mean), words.ends(found, words.ratio))


def verdict_rows(result: PilotResult) -> list[VerdictRow]:
    """Rows of every MoE++ arm, the most favourable first."""
    rows = []
    for each in result.verdicts:
        rows.append(
            VerdictRow(
                verdict=each,
                factor=ratio_cell(each.token_factor),
                pilot=ratio_cell(each.time_to_loss),
                target=ratio_cell(each.target_time_to_loss),
                why="" if each is words.chosen(result) else " ".join(each.reasons),
                strong=each.arm == result.recommended,
            )
        )
    return rows
