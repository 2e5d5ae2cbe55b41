"""The attention core that a CPU runs instead of a fused one.

It multiplies all scores, masked ones too, and passes over them for mask and softmax.
"""

from __future__ import annotations

from dataclasses import replace

from moepp_megatron.workbench.planning.grid import Grid
from moepp_megatron.workbench.planning.rates import Product, Work
from moepp_megatron.workbench.planning.workload import Workload


def with_local_core(
    load: Workload, grid: Grid, forward: Work, backward: Work
) -> tuple[Work, Work, Work]:
    """Attention's forward and backward work with the core that a CPU runs, and the core alone.

    Args:
        load: The model.
        grid: The layout.
        forward: Forward work of the attention, whose fused core is replaced.
        backward: Backward work, likewise.
    """
    ahead, back = (_scores_core if grid.cp == 1 else _ring_core)(load, grid)
    return _with_core(forward, ahead), _with_core(backward, back), ahead


def _with_core(work: Work, core: Work) -> Work:
    return replace(
        work,
        products=work.products + core.products,
        core_flop=0.0,
        moved=work.moved + core.moved,
        kernels=work.kernels + core.kernels,
    )


def _scores_core(load: Workload, grid: Grid) -> tuple[Work, Work]:
    """megatron-core's `DotProductAttention`: [s, s] scores of every head."""
    attention, s = load.attention, load.seq
    heads = grid.micro_batch * attention.heads // grid.tp
    number = load.numbers.dtype
    qk, v = attention.qk_dim, attention.v_dim
    scores = Product(s, s, qk, heads, number)
    context = Product(s, v, s, heads, number)
    elements = 4.0 * heads * s * s
    ahead = Work((scores, context), moved=4 * elements, kernels=10)
    gradients = (
        Product(s, s, v, heads, number),
        Product(s, v, s, heads, number),
        Product(s, qk, s, heads, number),
        Product(s, qk, s, heads, number),
    )
    return ahead, Work(gradients, moved=7 * elements, kernels=16)


def _ring_core(load: Workload, grid: Grid) -> tuple[Work, Work]:
    """`ContextParallelAttention`: two chunks of queries, each on the keys up to its end."""
    attention, number = load.attention, load.numbers.dtype
    heads = grid.micro_batch * attention.heads // grid.tp
    chunk = load.seq / (2 * grid.cp)
    # An early and a late chunk together see this many keys, on every rank alike.
    keys = load.seq * (2 * grid.cp + 1) / (2 * grid.cp)
    ahead = (
        Product(chunk, keys, attention.qk_dim, heads, number),
        Product(chunk, attention.v_dim, keys, heads, number),
    )
    repeated = Product(chunk, keys, attention.qk_dim, heads, number)
    back = (repeated, *ahead, *ahead)
    return Work(ahead, kernels=20), Work(back, kernels=30)
