"""Shows the selections of each MoE layer as bars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text

from moepp_megatron.experts import KIND_NAMES, ExpertCounts
from moepp_megatron.observe.metrics import StepMetrics
from moepp_megatron.workbench.report.live.glyphs import KIND_STYLES, Glyphs

_LABEL_WIDTH = 10
_NUMBERS_WIDTH = 30


@dataclass(frozen=True)
class LayerShares:
    """One MoE layer in one step.

    Attributes:
        name: ``layer 3``.
        kinds: Share of all selections by kind, in the order of ``KIND_NAMES``.
        ffn_load: The busiest FFN expert over the FFN experts' mean; NaN if none got a selection.
        unused: FFN experts that got no selection.
    """

    name: str
    kinds: tuple[float, ...]
    ffn_load: float
    unused: int


def layer_shares(
    record: StepMetrics, experts: ExpertCounts, numbers: Sequence[int]
) -> list[LayerShares]:
    """The shares of each MoE layer, or of their mean where layers are not recorded.

    Args:
        record: The step.
        experts: Counts of a layer.
        numbers: Numbers of the MoE layers in the model.

    Returns:
        An empty list if the record has other experts than `experts`.
    """
    rows = record.layer_expert_share or [record.expert_share]
    if any(len(row) != experts.num_experts for row in rows):
        return []
    if record.layer_expert_share is None:
        names = ["all layers"]
    elif len(numbers) == len(rows):
        names = [f"layer {number}" for number in numbers]
    else:
        names = [f"layer {number}" for number in range(1, len(rows) + 1)]
    return [_shares(name, row, experts) for name, row in zip(names, rows, strict=True)]


def expert_bars(
    layers: Sequence[LayerShares],
    wanted: float | None,
    width: int,
    rows: int,
    glyphs: Glyphs,
) -> list[Text]:
    """One bar per layer; with more layers than rows, those furthest from the target.

    Args:
        layers: At least one layer.
        wanted: Target of the FFN share, marked on the bars; None for no mark.
        width: Columns.
        rows: Lines at most.
        glyphs: What to draw with.
    """
    shown, left_out = _most_striking(layers, wanted, rows)
    lines = [_bar(layer, wanted, width, glyphs) for layer in shown]
    if left_out:
        shares = [layer.kinds[0] for layer in left_out]
        text = f"{len(left_out)} more layers, FFN share {min(shares):.3f} to {max(shares):.3f}"
        lines.append(Text(text.rjust(len(text) + _LABEL_WIDTH)[:width], style="dim"))
    return lines


def legend(layers: Sequence[LayerShares], glyphs: Glyphs) -> Text:
    """The kinds of experts that occur, with their fill."""
    text = Text()
    for i, (kind, fill, style) in enumerate(zip(KIND_NAMES, glyphs.bars, KIND_STYLES, strict=True)):
        if any(layer.kinds[i] > 0 for layer in layers):
            text.append(f"  {fill * 2}", style=style)
            text.append(f" {kind}")
    return text


def _shares(name: str, row: Sequence[float], experts: ExpertCounts) -> LayerShares:
    kinds, start = [], 0
    for count in experts.by_kind:
        kinds.append(sum(row[start : start + count]))
        start += count
    ffn = row[: experts.num_ffn_experts]
    load = max(ffn) * len(ffn) / sum(ffn) if sum(ffn) > 0 else math.nan
    return LayerShares(name, tuple(kinds), load, sum(share == 0 for share in ffn))


def _most_striking(
    layers: Sequence[LayerShares], wanted: float | None, rows: int
) -> tuple[Sequence[LayerShares], Sequence[LayerShares]]:
    """Layers to show and to leave out, both in the order of the model."""
    if len(layers) <= rows:
        return layers, []
    middle = wanted if wanted is not None else sum(x.kinds[0] for x in layers) / len(layers)

    def striking(layer: LayerShares) -> tuple[int, float]:
        off = abs(layer.kinds[0] - middle)
        return layer.unused, math.inf if math.isnan(off) else off

    ranked = sorted(layers, key=striking, reverse=True)
    chosen = {layer.name for layer in ranked[: max(1, rows - 1)]}
    return (
        [layer for layer in layers if layer.name in chosen],
        [layer for layer in layers if layer.name not in chosen],
    )


def _bar(layer: LayerShares, wanted: float | None, width: int, glyphs: Glyphs) -> Text:
    room = max(8, width - _LABEL_WIDTH - _NUMBERS_WIDTH)
    line = Text(layer.name.ljust(_LABEL_WIDTH))
    if not all(map(math.isfinite, layer.kinds)):
        return line.append("shares are not finite", style="red")
    cells: list[tuple[str, str]] = []
    reached = 0.0
    for share, fill, style in zip(layer.kinds, glyphs.bars, KIND_STYLES, strict=True):
        reached += share
        cells += [(fill, style)] * (round(reached * room) - len(cells))
    # What a capacity limit dropped went to nobody.
    cells += [(" ", "")] * (room - len(cells))
    if wanted is not None:
        cells[min(room - 1, round(wanted * room))] = (glyphs.mark, "bold green")
    for character, style in cells[:room]:
        line.append(character, style=style)
    line.append(f" FFN {layer.kinds[0]:.3f}")
    line.append(f" load {layer.ffn_load:.2f}" if math.isfinite(layer.ffn_load) else " load none")
    if layer.unused:
        line.append(f" {layer.unused} unused"[: max(0, width - line.cell_len)], style="bold red")
    return line
