"""Draws curves with characters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text

from moepp_megatron.workbench.report.live.glyphs import Glyphs

_LABEL_WIDTH = 8
# More records than this are thinned out before they are drawn: a cell holds no more anyway.
_MOST_POINTS = 20_000
# The first losses are far above the rest; from this many columns on they may leave the picture.
_COLUMNS_TO_CUT = 40
_CUT_SHARE = 0.05


@dataclass(frozen=True)
class LiveSeries:
    """The data of a curve.

    Attributes:
        steps: [n] steps, increasing.
        values: [n] values; the curve breaks where one is not finite.
        points: Further single values and their steps.
        target: Height of a horizontal line.
        style: Style of the curve.
    """

    steps: Sequence[int]
    values: Sequence[float]
    points: Sequence[tuple[int, float]] = ()
    target: float | None = None
    style: str = "cyan"


def draw_curve(series: LiveSeries, width: int, height: int, glyphs: Glyphs) -> list[Text]:
    """Draws a curve.

    Args:
        series: What to draw; steps must not be empty.
        width: Columns in all, labels included.
        height: Rows of the curve; one more with the steps follows.
        glyphs: The characters to use.

    Returns:
        ``height + 1`` lines of at most ``width`` columns.
    """
    columns = max(4, width - _LABEL_WIDTH - 1)
    per_cell = 2 if glyphs.braille else 1
    means = _column_means(series, columns * per_cell)
    low, high = _range(means, series)
    canvas = _Canvas(columns, height, glyphs)
    canvas.curve(means, low, high)
    lines = []
    target_row = None
    if series.target is not None and low <= series.target <= high:
        target_row = canvas.row_of(series.target, low, high)
    marks = {
        (canvas.row_of(value, low, high), _column(step, series, columns))
        for step, value in series.points
        if math.isfinite(value) and low <= value <= high
    }
    labels = {0: high, height - 1: low}
    for row in range(height):
        line = Text(_label(labels.get(row)).rjust(_LABEL_WIDTH) + " ", style="dim")
        for column in range(columns):
            if (row, column) in marks:
                line.append(glyphs.point, style="bold yellow")
            elif character := canvas.character(row, column):
                line.append(character, style=series.style)
            elif row == target_row:
                line.append(glyphs.line, style="green")
            else:
                line.append(" ")
        lines.append(line)
    first, last = f"step {series.steps[0]:,}", f"{series.steps[-1]:,}"
    axis = " " * (_LABEL_WIDTH + 1) + first + last.rjust(max(1, columns - len(first)))
    lines.append(Text(axis[:width], style="dim"))
    return lines


def sparkline(values: Sequence[float], width: int, glyphs: Glyphs) -> str:
    """The last values in one line of at most `width` characters, a blank for one not finite."""
    shown = values[-width:]
    finite = [value for value in shown if math.isfinite(value)]
    if not finite:
        return " " * len(shown)
    low, high = min(finite), max(finite)
    top = len(glyphs.levels) - 1
    scale = top / (high - low) if high > low else 0.0
    return "".join(
        glyphs.levels[round((value - low) * scale)] if math.isfinite(value) else " "
        for value in shown
    )


class _Canvas:
    """Dots in cells: two by four with braille, or one."""

    # Bit of each dot of a braille cell (Unicode, block U+2800), by row and column.
    BITS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))

    def __init__(self, columns: int, rows: int, glyphs: Glyphs) -> None:
        self._wide, self._high = (2, 4) if glyphs.braille else (1, 1)
        self._braille = glyphs.braille
        self._rows = rows
        self._cells = [[0] * columns for _ in range(rows)]

    def row_of(self, value: float, low: float, high: float) -> int:
        """The row of cells that contains a value."""
        return self._dot_row(value, low, high) // self._high

    def curve(self, means: Sequence[float | None], low: float, high: float) -> None:
        """Draw one value per column of dots; None is left out, NaN breaks the curve."""
        last: tuple[int, int] | None = None
        for x, value in enumerate(means):
            if value is None:
                continue
            if math.isnan(value):
                last = None
                continue
            y = self._dot_row(value, low, high)
            self._line(last or (x, y), (x, y))
            last = (x, y)

    def character(self, row: int, column: int) -> str:
        """The character of a cell; a blank without a dot."""
        bits = self._cells[row][column]
        if not bits:
            return ""
        return chr(0x2800 + bits) if self._braille else "*"

    def _dot_row(self, value: float, low: float, high: float) -> int:
        dots = self._rows * self._high
        height = (high - min(max(value, low), high)) / (high - low)
        return min(dots - 1, int(height * dots))

    def _line(self, start: tuple[int, int], end: tuple[int, int]) -> None:
        (x0, y0), (x1, y1) = start, end
        length = max(abs(x1 - x0), abs(y1 - y0), 1)
        for i in range(length + 1):
            x, y = x0 + round(i * (x1 - x0) / length), y0 + round(i * (y1 - y0) / length)
            self._cells[y // self._high][x // self._wide] |= self.BITS[y % 4][x % 2]


def _column(step: int, series: LiveSeries, columns: int) -> int:
    """The column that contains a step."""
    first, last = series.steps[0], series.steps[-1]
    return min(columns - 1, (step - first) * columns // max(1, last - first))


def _column_means(series: LiveSeries, columns: int) -> list[float | None]:
    """[columns] mean of the finite values in each; None without a value, NaN without a finite."""
    sums, counts, seen = [0.0] * columns, [0] * columns, [False] * columns
    stride = max(1, len(series.steps) // _MOST_POINTS)
    for step, value in zip(series.steps[::stride], series.values[::stride], strict=True):
        column = _column(step, series, columns)
        seen[column] = True
        if math.isfinite(value):
            sums[column] += value
            counts[column] += 1
    return [
        (total / count if count else math.nan) if here else None
        for total, count, here in zip(sums, counts, seen, strict=True)
    ]


def _range(means: Sequence[float | None], series: LiveSeries) -> tuple[float, float]:
    """Lowest and highest value of the picture."""
    known = [value for value in means if value is not None and math.isfinite(value)]
    if len(known) >= _COLUMNS_TO_CUT:
        known = known[int(_CUT_SHARE * len(known)) :]
    known += [value for _, value in series.points if math.isfinite(value)]
    if series.target is not None:
        known.append(series.target)
    if not known:
        return 0.0, 1.0
    low, high = min(known), max(known)
    if high - low < 1e-6 * max(1.0, abs(high)):
        return low - 0.5, high + 0.5
    return low, high


def _label(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:.2e}"
