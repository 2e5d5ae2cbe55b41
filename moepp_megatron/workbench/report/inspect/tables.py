"""Tables of groups of tokens, for one model or for two with their difference."""

from __future__ import annotations

import math
from collections.abc import Sequence

from moepp_megatron.experts import KIND_NAMES
from moepp_megatron.workbench.inspection.aggregates import TokenGroup
from moepp_megatron.workbench.report import formatting
from moepp_megatron.workbench.report.blocks import Cell, Table, number
from moepp_megatron.workbench.report.drawing import KIND_COLOURS

_COLUMNS = ("FFN experts", "Selections", "Loss")


def group_table(what: str, pick: str, models: Sequence[Sequence[TokenGroup]]) -> Table:
    """The groups, which are the same in every model; a name picks their tokens in the text."""
    head = [what, "Tokens", *_COLUMNS]
    if len(models) > 1:
        named = [f"{letter}: {column}" for letter in "AB" for column in _COLUMNS]
        head = [what, "Tokens", *named, "B - A: FFN experts", "B - A: loss"]
    rows = []
    for groups in zip(*models, strict=True):
        first = groups[0]
        row = [Cell(first.name, pick=pick), number(formatting.count(first.count))]
        row += [cell for group in groups for cell in _cells(group)]
        if len(groups) > 1:
            row += [
                number(_signed(groups[1].ffn - first.ffn)),
                number(_signed(groups[1].loss - first.loss)),
            ]
        rows.append(row)
    return Table(head, rows)


def token_table(title: str, groups: Sequence[TokenGroup]) -> Table:
    """Single tokens, whose white space is made visible."""
    rows = [
        [Cell(_visible(group.name), "code"), number(formatting.count(group.count)), *_cells(group)]
        for group in groups
    ]
    return Table(("Token", "Tokens", *_COLUMNS), rows, title=title, wide=False)


def _visible(piece: str) -> str:
    """A token's text with white space and control characters shown as in a Python string."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in piece)
    return shown.replace(" ", "\u00b7") if piece else "(part of a character)"


def _cells(group: TokenGroup) -> list[Cell]:
    error = "" if math.isnan(group.ffn_error) else f" \u00b1 {group.ffn_error:.2f}"
    texts = formatting.shares(group.kinds)
    bars = [
        (share, KIND_COLOURS[kind], f"{kind} {text}")
        for kind, share, text in zip(KIND_NAMES, group.kinds, texts, strict=True)
        if share > 0
    ]
    loss = "-" if math.isnan(group.loss) else f"{group.loss:.2f}"
    return [number(f"{group.ffn:.2f}{error}"), Cell("", bars=bars), number(loss)]


def _signed(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:+.2f}"
