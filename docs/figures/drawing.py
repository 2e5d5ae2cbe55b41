"""What the scripts of this folder draw with. Each is run by its path and writes one SVG."""

from __future__ import annotations

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

EDGE = "#7a7a7a"


def start(salt: str, font_size: int) -> None:
    """Have the same file written every time: no date, no random ids; text stays text."""
    plt.rcParams.update(
        {
            "svg.hashsalt": salt,
            "svg.fonttype": "none",
            "font.size": font_size,
            "font.family": "DejaVu Sans",
        }
    )


def box(
    axes: Axes,
    x: float,
    y: float,
    width: float,
    height: float,
    text: str,
    fill: str,
    ink: str = "black",
) -> None:
    """A rounded box with text."""
    axes.add_patch(
        FancyBboxPatch(
            (x, y),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.08",
            facecolor=fill,
            edgecolor=EDGE,
            linewidth=0.8,
        )
    )
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", color=ink)
