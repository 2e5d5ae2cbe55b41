"""The models at the target's size, by the cost model."""

from __future__ import annotations

from moepp_megatron.workbench.experiments.pilot.report import numbers
from moepp_megatron.workbench.experiments.pilot.report.tables import (
    PilotCell,
    PilotRow,
    interval_cell,
)
from moepp_megatron.workbench.experiments.pilot.result import PilotResult, TargetModel
from moepp_megatron.workbench.report import formatting


def target_columns(result: PilotResult) -> list[str]:
    """Headings; money only where there is a price."""
    names = ["Layout", "Step", "Of vanilla's time", "Tokens/s/GPU"]
    names += ["All-to-all, GB a step", "Hours"]
    if result.target is not None and result.target.price_per_hour is not None:
        names.append("Cost")
    return [*names, "Hours to vanilla's loss"] + (["Cost to it"] if "Cost" in names else [])


def target_rows(result: PilotResult) -> list[PilotRow]:
    """Models at the target; empty without one."""
    if result.target is None:
        return []
    vanilla = result.target.model_of(result.arms[0].arm.name) if result.arms else None
    width = len(target_columns(result))
    rows = []
    for model in result.target.models:
        cells = [PilotCell(model.layout), *_target_cells(result, model, vanilla)]
        if not model.fits:
            cells = [PilotCell(model.layout), *[PilotCell(numbers.NOTHING)] * (width - 1)]
        note = "" if model.fits else "does not fit the GPUs"
        rows.append(PilotRow(model.arm, note, cells, model.arm == result.recommended))
    return rows


def _target_cells(
    result: PilotResult, model: TargetModel, vanilla: TargetModel | None
) -> list[PilotCell]:
    def show(value: float | None, digits: int = 0) -> PilotCell:
        return PilotCell(numbers.NOTHING if value is None else formatting.number(value, digits))

    cells = [
        PilotCell(
            numbers.NOTHING if model.step_time_s is None else numbers.seconds(model.step_time_s)
        ),
        show(model.time_ratio, 3),
        show(model.tokens_per_s_per_gpu),
        show(
            None if model.a2a_bytes is None else model.a2a_bytes / 1e9, 1 if model.a2a_bytes else 0
        ),
        show(model.hours, 1 if model.hours is not None and model.hours < 100 else 0),
    ]
    priced = "Cost" in target_columns(result)
    if priced:
        cells.append(show(model.money))
    cells.append(_to_loss(result, model, None if vanilla is None else vanilla.hours))
    if priced:
        cells.append(_to_loss(result, model, None if vanilla is None else vanilla.money))
    return cells


def _to_loss(result: PilotResult, model: TargetModel, vanilla: float | None) -> PilotCell:
    """Vanilla's hours or money times the arm's time to equal loss."""
    if vanilla is None:
        return PilotCell(numbers.NOTHING)

    def show(factor: float) -> str:
        value = vanilla * factor
        return formatting.number(value, 1 if value < 100 else 0)

    if result.arms and model.arm == result.arms[0].arm.name:
        return PilotCell(show(1.0))
    found = next((v.target_time_to_loss for v in result.verdicts if v.arm == model.arm), None)
    return interval_cell(found, show)
