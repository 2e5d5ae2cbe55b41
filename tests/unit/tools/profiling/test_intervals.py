"""Interval arithmetic against sets of points."""

import random

import pytest

from moepp_megatron.tools.profiling.measures.exposure import (
    _intersect,
    length,
    subtract,
    union,
)


def points(intervals):
    """Unit cells that the intervals cover; all ends are whole numbers."""
    return {cell for start, end in intervals for cell in range(int(start), int(end))}


@pytest.mark.parametrize("seed", range(40))
def test_against_sets(seed):
    draw = random.Random(seed)

    def some():
        starts = [draw.randrange(30) for _ in range(draw.randrange(6))]
        return [(start, start + draw.randrange(8)) for start in starts]

    first, second = some(), some()
    a, b = union(first), union(second)
    assert points(a) == points(first)
    assert all(x[1] < y[0] for x, y in zip(a, a[1:], strict=False))
    assert points(_intersect(a, b)) == points(a) & points(b)
    assert points(subtract(a, b)) == points(a) - points(b)
    assert length(a) == len(points(a))
