"""Draws layer.svg: one MoE++ layer on two ranks, and which tokens travel.

python docs/figures/layer.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
from drawing import EDGE, box, start
from matplotlib.axes import Axes

start("layer", 10)
FFN, LOCAL, LANE = "#1f4e79", "#2e7d4f", "#b3400e"
LAYER, EXPERT, FREE, BAR = "#f3f5f8", "#d5e3f0", "#dcefe2", "#c3d2e2"
# Left to right: tokens, router, first exchange, FFN experts, second exchange, sum.
ROUTER, OUT, EXPERTS, BACK, SUM = 2.0, 5.5, 6.4, 10.0, 11.6


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str) -> None:
    """A straight arrow."""
    axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": color, "lw": 1.6})


def rank(axes: Axes, number: int, middle: float, up: int) -> None:
    """One rank around the height `middle`; `up` is 1 if its own experts are above, else -1."""
    axes.add_patch(
        plt.Rectangle(
            (-0.35, middle - 1.75), 14.1, 3.5, facecolor=LAYER, edgecolor=EDGE, ls="--", lw=0.9
        )
    )
    local, ffn = middle + 0.95 * up, middle - 0.75 * up
    axes.text(-0.2, middle - 0.6, f"rank {number}: tokens", color=EDGE, va="center")
    for index in range(4):
        axes.add_patch(
            plt.Rectangle(
                (-0.1 + 0.38 * index, middle - 0.15),
                0.3,
                0.3,
                facecolor=FFN if index % 2 else LOCAL,
                edgecolor="none",
            )
        )
    arrow(axes, (1.45, middle), (ROUTER, middle), EDGE)
    box(axes, ROUTER, middle - 0.65, 1.7, 1.3, "router\nselects K of\nall experts", "white")
    kinds = ((5.75, 1.1, "zero\n0"), (7.0, 1.1, "copy\nx"), (8.25, 1.9, "constant\na1 x + a2 v"))
    for x, width, text in kinds:
        box(axes, x, local - 0.45, width, 0.9, text, FREE)
    first = 4 * number
    box(axes, EXPERTS, ffn - 0.45, 3.2, 0.9, f"FFN experts {first} to {first + 3}", EXPERT)
    box(axes, SUM, middle - 0.65, 1.7, 1.3, "sum of gate\ntimes output", "white")
    for y, color, near, far in ((local, LOCAL, 5.75, 10.15), (ffn, FFN, OUT, BACK + 0.4)):
        arrow(axes, (ROUTER + 1.7, middle + (y - middle) / 4), (near, y), color)
        arrow(axes, (far, y), (SUM, middle + (y - middle) / 4), color)
    arrow(axes, (OUT + 0.4, ffn), (EXPERTS, ffn), FFN)
    arrow(axes, (EXPERTS + 3.2, ffn), (BACK, ffn), FFN)
    # Router logits come from the layer before and are passed to the next.
    edge = middle + 2.2 * up
    arrow(axes, (ROUTER + 0.5, edge), (ROUTER + 0.5, middle + 0.65 * up), LANE)
    axes.plot([ROUTER + 1.2] * 2, [middle + 0.65 * up, edge], color=LANE, lw=1.6)
    arrow(axes, (ROUTER + 1.2, edge), (13.75, edge), LANE)
    axes.text(
        ROUTER + 0.35, edge, "logits of the\nlayer before", color=LANE, ha="right", va="center"
    )
    axes.text(
        9.0, edge + 0.12, "gating residual: logits to the next MoE layer", color=LANE, ha="center"
    )


def main() -> None:
    """Write the figure next to this file."""
    figure, axes = plt.subplots(figsize=(10.5, 6.4))
    axes.set_xlim(-0.5, 13.9)
    axes.set_ylim(-1.1, 8.6)
    axes.axis("off")
    rank(axes, 0, 6.0, 1)
    rank(axes, 1, 1.5, -1)
    for x in (OUT, BACK):
        box(axes, x, 1.75, 0.4, 4.0, "", BAR)
        axes.text(x + 0.2, 3.75, "all-to-all", rotation=90, ha="center", va="center")
    axes.text(7.95, 3.75, "only FFN tokens travel", color=FFN, ha="center", va="center")
    axes.text(
        7.95, 6.32, "zero-computation experts: on every rank", color=LOCAL, ha="center", va="top"
    )
    axes.text(7.95, 1.18, "no bytes sent", color=LOCAL, ha="center", va="bottom")
    target = Path(__file__).with_name("layer.svg")
    figure.savefig(target, bbox_inches="tight", metadata={"Date": None, "Creator": None})
    print(target, target.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
