"""The common style of all plots, and the conversion of a figure into text for the page."""

import base64
import io
import re
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
PAPER = "#fffffe"
"""Background of the plot: white, where a viewer does not prefer dark."""
CELL_INK = "#1f2932"
"""Ink on a coloured cell, which keeps its colour where a viewer prefers dark."""

# What each colour becomes where the viewer prefers dark; colours that are not here stay.
_DARK = {
    INK: "#e4e7eb",
    MUTED: "#9aa5b1",
    GRID: "#3a4550",
    PAPER: "#1c242d",
    BLUE: "#3f97dc",
    "#56b4e9": "#9ad7f7",
    VERMILION: "#f07c33",
    GREEN: "#2cc296",
    "#9a6700": "#e0a940",
    "#007a59": "#2cc296",
    "#52606d": "#9aa5b1",
    "#004c77": "#cfe6f5",
}
_COLOUR = re.compile(r"(fill|stroke): (#[0-9a-f]{6})\b")

# Okabe and Ito's palette: distinct with every kind of colour vision.
KIND_COLOURS = {"FFN": BLUE, "constant": "#e69f00", "copy": GREEN, "zero": "#9aa5b1"}

# Darker versions where the colour is that of text.
KIND_INKS = {"FFN": BLUE, "constant": "#9a6700", "copy": "#007a59", "zero": "#52606d"}

# Lines of one plot, on light and dark. More lines than these cannot be distinguished.
LINE_COLOURS = (BLUE, VERMILION, GREEN, "#e69f00", "#cc79a7", "#56b4e9", MUTED, "#9a6700")
# Beyond this, a layer's row is too thin for its number.
_MAX_NAMED_LAYERS = 32
# A longer name would leave a plot no room.
_LONGEST_NAME = 24

# More points than pixels only make the page heavy.
MAX_POINTS = 1200

# Any: the stubs name every key of matplotlib, which this would have to repeat.
STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "text.color": INK,
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
    """The figure as a ``data:`` address for an image in a light or dark page.

    Its colours are variables that follow the viewer's preference.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    content = _with_variables(buffer.getvalue()).encode()
    return "data:image/svg+xml;base64," + base64.b64encode(content).decode("ascii")


def _with_variables(svg: str) -> str:
    """The picture with a variable for each colour that differs in dark mode."""

    def variable(match: re.Match[str]) -> str:
        kind, colour = match.groups()
        return f"{kind}: var(--{colour[1:]})" if colour in _DARK else match.group()

    light = "".join(f"--{colour[1:]}:{colour};" for colour in _DARK)
    dark = "".join(f"--{colour[1:]}:{other};" for colour, other in _DARK.items())
    style = f":root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"
    start = '<style type="text/css">'
    assert start in svg, "matplotlib writes a style of its own"
    return _COLOUR.sub(variable, svg).replace(start, start + style, 1)


def plain(text: str) -> str:
    """Text for a plot, so that matplotlib neither reads a formula in it nor takes it for hidden."""
    # A label that begins with an underscore is left out of legends.
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def short_name(name: str) -> str:
    """The name with its beginning cut off where it is long: paths differ at their ends."""
    return name if len(name) <= _LONGEST_NAME else "..." + name[3 - _LONGEST_NAME :]


def plot_style() -> AbstractContextManager[None]:
    """A context in which figures have the common style."""
    return mpl.rc_context(STYLE)


def step_axis(axes: Axes) -> None:
    """Label the horizontal axis with whole training steps."""
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))


def name_layers(axes: Axes, numbers: Sequence[int]) -> None:
    """Number the rows of the vertical axis as layers; of many layers only some get their number."""
    stride = -(-len(numbers) // _MAX_NAMED_LAYERS)
    axes.set_yticks(range(0, len(numbers), stride), labels=[str(n) for n in numbers[::stride]])
    axes.set_ylabel("layer")


def thin(
    steps: np.ndarray, values: np.ndarray, extreme: np.ufunc | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Means, or extremes, of neighbouring points: steps and values, at most ``MAX_POINTS`` of each.

    All are [n] float64; `extreme` is `np.minimum` or `np.maximum`; the step of a group is its last.
    """
    size = -(-len(steps) // MAX_POINTS)
    starts = np.arange(0, len(steps), size)
    ends = np.minimum(starts + size, len(steps)) - 1
    if extreme is not None:
        return steps[ends], extreme.reduceat(values, starts)
    return steps[ends], np.add.reduceat(values, starts) / (ends - starts + 1)


def envelope(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least and the greatest of neighbouring points: no peak gets lost, as in `thin`."""
    size = -(-len(steps) // MAX_POINTS)
    if size <= 1:
        return steps, values
    groups = np.pad(values, (0, -len(values) % size), "edge").reshape(-1, size)
    ends = np.concatenate([groups.argmin(axis=1), groups.argmax(axis=1)])
    starts = np.tile(np.arange(len(groups)) * size, 2)
    places = np.unique(np.minimum(starts + ends, len(values) - 1))
    return steps[places], values[places]


def smooth(values: np.ndarray, reach: int | None = None) -> np.ndarray:
    """Centred moving mean, by default over a fiftieth of the points; NaN where one in reach is."""
    reach = max(1, len(values) // 100) if reach is None else reach
    window = np.ones(2 * reach + 1)
    counts = np.convolve(np.ones(len(values)), window, mode="same")
    return np.convolve(values, window, mode="same") / counts
