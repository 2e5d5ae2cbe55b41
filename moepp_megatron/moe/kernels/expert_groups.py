"""`moe.selection.within_groups` inside the kernel of the selection."""

import triton
import triton.language as tl
from triton.language import constexpr


@triton.jit
def in_best_groups(  # type: ignore[no-untyped-def]
    affinities,
    column,
    NUM_FFN: constexpr,
    GROUPS: constexpr,
    KEPT: constexpr,
    RANKED: constexpr,
    BLOCK_E: constexpr,
):
    """Return the columns that a tile's tokens may select: zero-computation experts and best groups.

    A group's worth is the sum of its RANKED largest affinities; the KEPT best remain.
    """
    # NaN counts as the largest, so that each pass below takes away an expert, and a group.
    affinities = tl.where(affinities != affinities, float("inf"), affinities)
    group = column // (NUM_FFN // GROUPS)
    is_ffn = (column < NUM_FFN)[None, :]
    sums = tl.where(is_ffn, 0.0, affinities)
    for number in tl.static_range(GROUPS):
        inside = (group == number)[None, :] & is_ffn
        left = tl.where(inside, affinities, float("-inf"))
        for _ in tl.static_range(RANKED):
            best = tl.max(left, axis=1)[:, None]
            sums += tl.where(inside, best, 0.0)
            first = tl.min(tl.where(left == best, column[None, :], BLOCK_E), axis=1)[:, None]
            left = tl.where(column[None, :] == first, float("-inf"), left)
    sums = tl.where(is_ffn, sums, float("-inf"))
    chosen = (affinities == affinities) & (column >= NUM_FFN)[None, :]
    for _ in tl.static_range(KEPT):
        best = tl.max(sums, axis=1)[:, None]
        first = tl.min(tl.where(sums == best, group[None, :], BLOCK_E), axis=1)[:, None]
        pick = (group[None, :] == first) & is_ffn
        chosen = chosen | pick
        sums = tl.where(pick, float("-inf"), sums)
    return chosen
