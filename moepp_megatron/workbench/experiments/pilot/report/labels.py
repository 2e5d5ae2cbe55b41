"""Places names beside the points of a plot so that they do not lie on each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from moepp_megatron.workbench.report.drawing import INK

Side = Literal["left", "center", "right"]

# Offsets in points and the side of the text that is tied to them: right, left, above, below.
_SPOTS: tuple[tuple[tuple[int, int], Side], ...] = (
    ((9, 6), "left"),
    ((-9, 6), "right"),
    ((9, -13), "left"),
    ((-9, -13), "right"),
    ((0, 14), "center"),
    ((0, -21), "center"),
    ((9, 20), "left"),
    ((9, -27), "left"),
)
# Half the size of a marker, in points.
_POINT = 6.0


def place_labels(
    axes: Axes,
    points: Sequence[tuple[float, float]],
    names: Sequence[str],
    bars: Sequence[tuple[tuple[float, float], tuple[float, float]]] = (),
) -> None:
    """Writes each name at the first spot where it covers no point, no other name and no edge.

    Args:
        axes: Axes with all curves drawn, which decide the limits.
        points: Points in data units.
        names: Names of the points, in their order.
        bars: Lines that names should not lie on either: both ends of each, in data units.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None, "made with its figure"
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    pixels = [axes.transData.transform(point) for point in points]
    reach = _POINT * figure.dpi / 72
    taken = [Bbox.from_bounds(x - reach, y - reach, 2 * reach, 2 * reach) for x, y in pixels]
    for bar in bars:
        taken.append(_widened(axes.transData.transform(bar).tolist(), reach / 3))
    for index, (point, name) in enumerate(zip(points, names, strict=True)):
        text = axes.annotate(
            name, point, (0, 0), textcoords="offset points", color=INK, fontsize=9, zorder=4
        )
        others = taken[:index] + taken[index + 1 :]
        costs = []
        for spot in _SPOTS:
            _move(text, spot)
            box = text.get_window_extent(renderer)
            costs.append(_cost(box, others, axes.bbox))
        _move(text, _SPOTS[costs.index(min(costs))])
        taken.append(text.get_window_extent(renderer))


def _move(text: Annotation, spot: tuple[tuple[int, int], Side]) -> None:
    text.xyann = spot[0]
    text.set_horizontalalignment(spot[1])


def _widened(ends: Sequence[Sequence[float]], by: float) -> Bbox:
    (x0, y0), (x1, y1) = ends
    return Bbox.from_extents(min(x0, x1) - by, min(y0, y1) - by, max(x0, x1) + by, max(y0, y1) + by)


def _cost(box: Bbox, others: Sequence[Bbox], frame: Bbox) -> float:
    """Area that is covered twice or lies outside, square pixels."""
    covered = sum(_area(Bbox.intersection(box, other)) for other in others)
    return covered + _area(box) - _area(Bbox.intersection(box, frame))


def _area(box: Bbox | None) -> float:
    return 0.0 if box is None else float(box.width * box.height)
