"""Draws residual_lane.svg: how router logits travel from MoE layer to MoE layer.

python docs/figures/residual_lane.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
from drawing import EDGE, box, start
from matplotlib.axes import Axes

start("lane", 9)
HIDDEN, LANE, LAYER = "#1f4e79", "#b3400e", "#e8eef4"


def arrow(axes: Axes, x0: float, x1: float, y: float, color: str) -> None:
    """From x0 to x1."""
    axes.annotate("", (x1, y), (x0, y), arrowprops={"arrowstyle": "->", "color": color, "lw": 1.6})


def stage(axes: Axes, x: float, names: tuple[str, str], title: str) -> None:
    """Two layers of a stage, from x on; hidden states above, lane below."""
    axes.add_patch(
        plt.Rectangle((x, 0.35), 5.0, 2.75, fill=False, edgecolor=EDGE, linestyle="--", lw=0.9)
    )
    axes.text(x + 2.5, 3.22, title, ha="center", color=EDGE)
    for index, name in enumerate(names):
        left = x + 0.35 + 2.45 * index
        box(axes, left, 0.75, 1.9, 1.95, name, LAYER)
    arrow(axes, x + 2.25, x + 2.8, 2.2, HIDDEN)
    arrow(axes, x + 2.25, x + 2.8, 1.25, LANE)


def message(axes: Axes, x: float) -> None:
    """The tensor that crosses: D hidden columns, then the lane's."""
    axes.add_patch(plt.Rectangle((x, 1.5), 1.5, 0.42, facecolor=HIDDEN, edgecolor="none"))
    axes.add_patch(plt.Rectangle((x + 1.5, 1.5), 0.45, 0.42, facecolor=LANE, edgecolor="none"))
    axes.text(x + 0.75, 2.05, "D columns", ha="center", color=HIDDEN)
    axes.text(x + 1.9, 1.42, "+ 4 E bytes", ha="right", va="top", color=LANE)
    axes.text(x + 0.98, 0.9, "one message,\none tensor", ha="center", va="top", color=EDGE)


def main() -> None:
    """Write the figure next to this file."""
    figure, axes = plt.subplots(figsize=(11, 3.1))
    axes.set_xlim(-1.3, 16.6)
    axes.set_ylim(-0.75, 3.6)
    axes.axis("off")
    stage(axes, 0, ("MoE layer 1\nz1 = W1 x", "MoE layer 2\nz2 = W2 x\n+ G2 z1"), "stage 0")
    stage(axes, 8.3, ("dense layer\nhands z2 on", "MoE layer 3\nz3 = W3 x\n+ G3 z2"), "stage 1")
    arrow(axes, -0.6, 0.35, 2.2, HIDDEN)
    axes.text(-0.7, 2.2, "hidden", ha="right", va="center", color=HIDDEN)
    axes.text(-0.7, 1.25, "lane:\nnone yet", ha="right", va="center", color=LANE)
    for y, color in ((2.2, HIDDEN), (1.25, LANE)):
        axes.plot([4.7, 5.35, 5.6], [y, y, 1.71], color=color, lw=1.6)
    message(axes, 5.7)
    for y, color in ((2.2, HIDDEN), (1.25, LANE)):
        axes.plot([7.7, 7.95, 8.2], [1.71, y, y], color=color, lw=1.6)
        arrow(axes, 8.2, 8.65, y, color)
    arrow(axes, 13.0, 14.1, 2.2, HIDDEN)
    arrow(axes, 13.0, 14.1, 1.25, LANE)
    axes.text(14.2, 2.2, "to the next stage", ha="left", va="center", color=HIDDEN)
    axes.text(14.2, 1.25, "dropped at the loss", ha="left", va="center", color=LANE)
    axes.text(
        7.0,
        -0.15,
        "Inside a stage the lane is TransformerBlock's own `context` argument. At the boundary "
        "fp32 logits are glued on bit for bit (in bf16: two columns a logit).\n"
        "Gradients take the same way back: d loss / d z2 arrives with the gradient of the hidden "
        "states and flows into W2, G2 and z1.",
        ha="center",
        va="top",
    )
    target = Path(__file__).with_name("residual_lane.svg")
    figure.savefig(target, bbox_inches="tight", metadata={"Date": None, "Creator": None})
    print(target, target.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
