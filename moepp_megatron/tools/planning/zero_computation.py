"""Zero-computation experts: their work in each of its three forms, and what it hides.

- combined: in the kernel that returns FFN experts' rows to their tokens, where nothing travels
- apart: in one kernel (`moe.kernels.combine.add_local`)
- plain: in PyTorch's operations
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from moepp_megatron.tools.planning.grid import Grid
from moepp_megatron.tools.planning.machine import Machine
from moepp_megatron.tools.planning.rates import Work, linear_products, work_seconds
from moepp_megatron.tools.planning.workload import Workload

# Dispatchers whose rows travel during computation.
_TICKETS = ("alltoall", "alltoall_dedup")


def local_form(load: Workload, grid: Grid) -> Literal["combined", "apart", "plain"]:
    """The form in which zero-computation experts are computed."""
    if not load.local_fused:
        return "plain"
    return "combined" if grid.ep == 1 and load.experts.dispatcher in _TICKETS else "apart"


def mixing_logits(load: Workload) -> int:
    """Outputs of the constant experts' own gate, `U x`: the router's product computes them too."""
    return sum(n for n, k in load.experts.local_matmuls(load.hidden) if k == load.hidden)


def local_work(load: Workload, grid: Grid) -> tuple[Work, Work]:
    """Forward and backward work of `y = s x + A V`, without `U x`."""
    tokens = grid.tokens(load.seq)
    tensor = tokens * load.hidden * load.numbers.activation_bytes
    matmuls = [(n, k) for n, k in load.experts.local_matmuls(load.hidden) if k != load.hidden]
    ahead, back = linear_products(tokens, matmuls, load.numbers.dtype)
    form = local_form(load, grid)
    if form == "plain":
        forward = Work(ahead, moved=3.0 * tensor, kernels=5)
        return forward, Work(back, moved=6.0 * tensor, kernels=8)
    # Tensors [T, D] of the kernel, those of its products too: x; apart also the output, which is
    # read again. Backward x and its gradient, apart also the output's gradient.
    # Apart, gradients of hidden states and gates meet those of the rows in sums of their own.
    tensors, kernels = {"combined": ((1.0, 2.0), (0, 0)), "apart": ((3.0, 3.0), (1, 4))}[form]
    moved = [
        max(count * tensor - sum(product.moved for product in products), 0.0)
        for count, products in zip(tensors, (ahead, back), strict=True)
    ]
    # Gradients of the gates, then of V: parts added up, rounded.
    after = 1 + (2 if matmuls else 0)
    forward = Work(ahead, 0.0, 0, moved[0], kernels[0])
    return forward, Work(back, 0.0, 0, moved[1], kernels[1] + after)


def seconds_during_rows(
    load: Workload, grid: Grid, machine: Machine, works: Sequence[Work], exchange: float
) -> float:
    """Seconds of an exchange during which this rank computes, `works` on each of its two ways.

    Shared experts compute on the way there, these on the way back (`moe/layer.py`). The combined
    schedule has its own rule. With expert-tensor parallelism rows are gathered, too: left out.
    """
    travels = load.experts.dispatcher in _TICKETS and grid.ep > 1 and grid.etp == 1
    is_combined = grid.expert_overlap or grid.unpaired
    if is_combined or not travels or load.experts.is_vanilla:
        return 0.0
    most = exchange / 2 * (1.0 - machine.reached.overlap_slowdown)
    return sum(min(work_seconds(work, machine), most) for work in works)
