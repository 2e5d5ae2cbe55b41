"""Turns groups of tokens into table rows, for one model or for two with their difference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moepp_megatron.experts import KIND_NAMES
from moepp_megatron.workbench.inspection.aggregates import TokenGroup
from moepp_megatron.workbench.report import formatting
from moepp_megatron.workbench.report.drawing import KIND_COLOURS

_DASH = "-"


@dataclass(frozen=True)
class ShareBar:
    """A part of a stacked bar: percent of the width, colour, text under the pointer."""

    width: float
    colour: str
    title: str


@dataclass(frozen=True)
class InspectionCell:
    """One model's numbers of a group.

    Attributes:
        ffn: FFN experts per token and layer, with its error.
        bars: Shares of the kinds of experts.
        loss: Mean loss.
    """

    ffn: str
    bars: list[ShareBar]
    loss: str


@dataclass(frozen=True)
class InspectionRow:
    """A group in every model.

    Attributes:
        name: Name of the group.
        count: Tokens.
        cells: One per model.
        ffn_change: Second minus first model's FFN experts per token; None for one model.
        loss_change: The same difference of the loss.
    """

    name: str
    count: str
    cells: list[InspectionCell]
    ffn_change: str | None = None
    loss_change: str | None = None


def rows(models: Sequence[Sequence[TokenGroup]]) -> list[InspectionRow]:
    """Rows of the groups, which are the same in every model."""
    return [_row(groups) for groups in zip(*models, strict=True)]


def token_rows(groups: Sequence[TokenGroup]) -> list[InspectionRow]:
    """Rows of single tokens, whose white space is made visible."""
    return [_row([group], visible(group.name)) for group in groups]


def visible(piece: str) -> str:
    """A token's text with white space and control characters shown as in a Python string."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in piece)
    return shown.replace(" ", "\u00b7") if piece else "(part of a character)"


def _row(groups: Sequence[TokenGroup], name: str | None = None) -> InspectionRow:
    first = groups[0]
    cells = [_cell(group) for group in groups]
    label = first.name if name is None else name
    if len(groups) == 1:
        return InspectionRow(label, formatting.count(first.count), cells)
    second = groups[1]
    return InspectionRow(
        label,
        formatting.count(first.count),
        cells,
        _signed(second.ffn - first.ffn),
        _signed(second.loss - first.loss),
    )


def _cell(group: TokenGroup) -> InspectionCell:
    error = "" if math.isnan(group.ffn_error) else f" \u00b1 {group.ffn_error:.2f}"
    texts = formatting.shares(group.kinds)
    bars = [
        ShareBar(100 * share, KIND_COLOURS[kind], f"{kind} {text}")
        for kind, share, text in zip(KIND_NAMES, group.kinds, texts, strict=True)
        if share > 0
    ]
    loss = _DASH if math.isnan(group.loss) else f"{group.loss:.2f}"
    return InspectionCell(f"{group.ffn:.2f}{error}", bars, loss)


def _signed(value: float) -> str:
    return _DASH if math.isnan(value) else f"{value:+.2f}"
