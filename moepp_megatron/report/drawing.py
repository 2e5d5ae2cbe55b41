"""The look that all plots share, and turning a figure into text for the page."""

import base64
import io
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK = "#1f2933"
MUTED = "#7b8794"
GRID = "#e4e7eb"
BLUE = "#0072b2"
VERMILION = "#d55e00"
GREEN = "#009e73"

# Okabe and Ito's palette: told apart with every kind of colour vision.
KIND_COLOURS = {"FFN": BLUE, "constant": "#e69f00", "copy": GREEN, "zero": "#9aa5b1"}

# Darker versions where the colour is that of text.
KIND_INKS = {"FFN": BLUE, "constant": "#9a6700", "copy": "#007a59", "zero": "#52606d"}

# More points than pixels only make the page heavy.
MAX_POINTS = 1200

# Any: the stubs name every key of matplotlib, which this would have to repeat.
STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "svg.fonttype": "path",
    # Without a fixed salt the same run would give another file each time.
    "svg.hashsalt": "moepp",
}


def new_figure(width: float = 6.4, height: float = 3.1) -> Figure:
    """An empty figure of this size in inches, without pyplot's global state."""
    return Figure(figsize=(width, height), layout="constrained")


def svg_data_uri(figure: Figure) -> str:
    """The figure as a ``data:`` address for an image in the page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def plot_style() -> AbstractContextManager[None]:
    """A context in which figures take the common look."""
    return mpl.rc_context(STYLE)


def step_axis(axes: Axes) -> None:
    """Labels the horizontal axis with whole training steps."""
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))


def thin(
    steps: Sequence[int], values: Sequence[float] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Means of neighbouring points, at most ``MAX_POINTS`` of them.

    Returns:
        Steps and values, [n] float64 each; the step of a group is its last.
    """
    size = -(-len(steps) // MAX_POINTS)
    starts = np.arange(0, len(steps), size)
    ends = np.minimum(starts + size, len(steps)) - 1
    sums = np.add.reduceat(np.asarray(values, dtype=np.float64), starts)
    return np.asarray(steps, dtype=np.float64)[ends], sums / (ends - starts + 1)


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving mean over a fiftieth of the points; NaN where a value in reach is NaN."""
    reach = max(1, len(values) // 100)
    window = np.ones(2 * reach + 1)
    counts = np.convolve(np.ones(len(values)), window, mode="same")
    return np.convolve(values, window, mode="same") / counts


def draw_noisy(
    axes: Axes,
    steps: Sequence[int],
    values: Sequence[float],
    colour: str,
    label: str | None = None,
) -> None:
    """A line; with many points the raw values pale behind their moving mean."""
    x, y = thin(steps, values)
    marker = "o" if len(x) <= 12 else None
    if len(x) < 60:
        axes.plot(x, y, color=colour, label=label, marker=marker, markersize=3.5)
        return
    axes.plot(x, y, color=colour, alpha=0.25, linewidth=1.0)
    axes.plot(x, smooth(y), color=colour, label=label)
