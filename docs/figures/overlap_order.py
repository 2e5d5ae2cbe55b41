"""Draws overlap_order.svg: what one MoE++ layer computes while its tokens travel.

python docs/figures/overlap_order.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
from drawing import EDGE, box, start
from matplotlib.axes import Axes

start("order", 9)
NETWORK, NEEDED, FILLS = "#b3400e", "#dbe5ee", "#cfe6cf"

# (left, width, text) of each piece, time from left to right. What fills the flight of an exchange
# stands in the row of its own.
FORWARD = {
    "network": [(3.3, 3.0, "tokens and gates"), (9.6, 3.0, "outputs of experts")],
    "needed": [
        (0.0, 3.2, "router,\npermute"),
        (6.4, 3.1, "FFN experts"),
        (12.7, 1.7, "unpermute,\nadd"),
    ],
    "fills": [(3.3, 2.7, "shared expert"), (9.6, 2.7, "zero, copy,\nconstant experts")],
    "starts": [(3.3, "start"), (9.6, "start")],
    "waits": [(6.3, "wait"), (12.6, "wait")],
}
BACKWARD = {
    "network": [(1.8, 3.0, "outputs' gradients"), (8.1, 3.0, "tokens' gradients")],
    "needed": [
        (0.0, 1.7, "add,\nunpermute"),
        (4.9, 3.1, "FFN experts"),
        (11.2, 3.2, "permute,\nrouter"),
    ],
    "fills": [(1.8, 2.7, "zero, copy,\nconstant experts"), (8.1, 2.7, "shared expert")],
    "starts": [(1.8, "start"), (8.1, "start")],
    "waits": [(4.8, "wait"), (11.1, "wait")],
}


def panel(axes: Axes, title: str, pieces: dict) -> None:
    """One pass: network above, what needs it and what fills its time below."""
    axes.set_xlim(-2.6, 15.2)
    axes.set_ylim(-0.35, 3.75)
    axes.axis("off")
    axes.text(-2.5, 3.45, title, weight="bold", va="center")
    rows = {"network": (2.2, NETWORK, "white"), "needed": (1.1, NEEDED, "black")}
    rows["fills"] = (0.0, FILLS, "black")
    for row, (y, fill, ink) in rows.items():
        for x, width, text in pieces[row]:
            box(axes, x, y, width, 0.9, text, fill, ink)
    for y, text in (
        (2.65, "network"),
        (1.55, "compute"),
        (0.45, "compute, in\nthe meantime"),
    ):
        axes.text(-0.25, y, text, ha="right", va="center", color=EDGE)
    for marks, down in ((pieces["starts"], True), (pieces["waits"], False)):
        for x, text in marks:
            axes.plot([x - 0.05, x - 0.05], [-0.1, 3.2], color=NETWORK, lw=0.8, ls="--")
            side = "right" if down else "left"
            axes.text(
                x + (-0.12 if down else 0.02), 3.35, text, ha=side, va="center", color=NETWORK
            )


def main() -> None:
    """Write the figure next to this file."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(11, 5.2))
    panel(above, "forward", FORWARD)
    panel(below, "backward", BACKWARD)
    below.text(
        6.3,
        -0.75,
        "Autograd runs backward what was created last first, so the backward pass of the work in "
        "the meantime falls into the flight of the gradients by itself.\n"
        'At "wait" the stream waits (NCCL), or the host (gloo).',
        ha="center",
        va="top",
    )
    target = Path(__file__).with_name("overlap_order.svg")
    figure.savefig(target, bbox_inches="tight", metadata={"Date": None, "Creator": None})
    print(target, target.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
