"""Draws ladder.svg: loss over compute for every arm of the ladder, and its difference from vanilla.

PYTHONPATH=. python docs/figures/ladder.py
"""

from __future__ import annotations

import base64
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from benchmarks.ladder_run import ARMS, SIZES
from benchmarks.ladder_table import FILE, Ladder, line, log_flop, read, rung, values
from moepp_megatron.tools.report.drawing import (
    INK,
    LINE_COLOURS,
    MUTED,
    PAPER,
    new_figure,
    plot_style,
    svg_data_uri,
)

WHAT, SEEDS = "flop", 1
COLOURS = dict(zip(ARMS, (INK, MUTED, *LINE_COLOURS), strict=False))


def draw(axes: Axes, ladder: Ladder, other: str, known: list[str], shown: list[str]) -> None:
    """Every arm's loss, or its loss less another's: seeds as points, the line with its 95% band."""
    for arm in ARMS:
        if arm == other:
            continue
        row, colour = (arm, other), COLOURS[arm]
        for size in shown:
            found = values(ladder, row, size, WHAT)
            axes.plot([10 ** log_flop(size)] * len(found), found, "o", color=colour, markersize=3)
        _, at = line(ladder, row, known, WHAT)
        guesses = [at(size, SEEDS) for size in shown]
        means, far = np.array([(guess.mean, guess.reach(0.025)) for guess in guesses]).T
        mean, low, high = (y if other else 10**y for y in (means, means - far, means + far))
        flop = [10 ** log_flop(size) for size in shown]
        axes.plot(flop, mean, color=colour, label=arm, linewidth=1.4)
        axes.fill_between(flop, low, high, color=colour, alpha=0.12, linewidth=0)


def main() -> None:
    """Write the figure next to this file."""
    ladder = read(FILE)
    there = [size for size in SIZES if all(rung(ladder, arm, size, WHAT) for arm in ARMS)]
    known = there[:3]
    shown = [size for size in SIZES if size in known or size == "L"]
    with plot_style():
        figure = new_figure(6.4, 6.0)
        above, below = figure.subplots(2, 1, sharex=True)
        draw(above, ladder, "", known, shown)
        draw(below, ladder, "vanilla", known, shown)
        above.set_xscale("log")
        above.set_yscale("log")
        above.set_yticks(
            [3, 3.25, 3.5, 3.75, 4, 4.25], labels=["3", "3.25", "3.5", "3.75", "4", "4.25"]
        )
        above.minorticks_off()
        above.set_ylabel("validation loss, nats")
        below.axhline(0.0, color=INK, linewidth=1.0)
        below.set_ylabel("less vanilla's, nats")
        flop = [10 ** log_flop(size) for size in shown]
        names = [f"{size}\n{x:.1e}" for size, x in zip(shown, flop, strict=True)]
        below.set_xticks(flop, labels=names)
        below.set_xlabel("size and FLOP of training, the same for every arm")
        # Over the axes, where no line runs.
        place = {"loc": "outside upper left", "ncols": 3, "borderaxespad": 0.2}
        figure.legend(*above.get_legend_handles_labels(), **place)
        paper = Rectangle((0, 0), 1, 1, transform=figure.transFigure, color=PAPER, zorder=-1)
        figure.add_artist(paper)
        content = base64.b64decode(svg_data_uri(figure).partition(",")[2]).decode()
    # Numbers are drawn as paths; a comment says each, with the sign for minus.
    ascii_only = content.replace("\N{MINUS SIGN}", "-").encode("ascii")
    Path(__file__).with_name("ladder.svg").write_bytes(ascii_only)


if __name__ == "__main__":
    main()
