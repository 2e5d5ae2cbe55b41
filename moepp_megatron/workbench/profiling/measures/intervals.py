"""Arithmetic of time intervals: lists of (start, end), microseconds."""

from __future__ import annotations

from collections.abc import Iterable

Interval = tuple[float, float]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same points in disjoint intervals, in order; empty ones fall away."""
    merged: list[Interval] = []
    for start, end in sorted(interval for interval in intervals if interval[1] > interval[0]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def intersect(first: list[Interval], second: list[Interval]) -> list[Interval]:
    """Points in both; each argument as `union` returns it."""
    common, i, j = [], 0, 0
    while i < len(first) and j < len(second):
        start, end = max(first[i][0], second[j][0]), min(first[i][1], second[j][1])
        if start < end:
            common.append((start, end))
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return common


def subtract(whole: list[Interval], part: list[Interval]) -> list[Interval]:
    """Points of `whole` outside of `part`; each argument as `union` returns it."""
    if not whole:
        return []
    first, last = whole[0][0], whole[-1][1]
    edges = [first, *(edge for interval in part for edge in interval), last]
    gaps = [(edges[i], edges[i + 1]) for i in range(0, len(edges), 2)]
    return intersect(whole, union(gap for gap in gaps if gap[0] < gap[1]))


def length(intervals: Iterable[Interval]) -> float:
    """Total microseconds of disjoint intervals."""
    return sum(end - start for start, end in intervals)
