"""Cost and memory of every legal layout of one model."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from moepp_megatron.config import Config
from moepp_megatron.workbench.planning.coster import Cost, Coster
from moepp_megatron.workbench.planning.grid import Grid
from moepp_megatron.workbench.planning.imbalance import AssumedRouting
from moepp_megatron.workbench.planning.machine import Machine
from moepp_megatron.workbench.planning.search import Space

_NEAREST_MISSES = 5
# Layouts that rules beyond the degrees of parallelism may still refuse, or that only differ in
# micro-batch, chunks and recomputation.
_KEPT = 5_000

_LOSSES = ("work", "recompute", "network", "bubble", "end")


@dataclass
class Search:
    """Result of the search over all layouts of one model.

    Attributes:
        best: (seconds, layout, cost, bytes) of those that fit, fastest first.
        misses: (bytes, layout) of those that come closest to fitting.
        legal: Number of legal layouts.
        over: Bytes by which each of the others is too large.
        spared: Number of layouts that recompute although they fit without: not costed.
        lost: Number of layouts that lose most by each of `_LOSSES`, against the best.
        gaps: The median loss of those, as a share of the best step.
    """

    best: list[tuple[float, Grid, Cost, float]] = field(default_factory=list)
    misses: list[tuple[float, Grid]] = field(default_factory=list)
    legal: int = 0
    over: list[float] = field(default_factory=list)
    spared: int = 0
    lost: dict[str, int] = field(default_factory=dict)
    gaps: dict[str, float] = field(default_factory=dict)


def search_layouts(config: Config, world: int, machine: Machine, routing: AssumedRouting) -> Search:
    """Cost and memory of every legal layout."""
    space = Space.of(config, world, machine.per_node)
    coster = Coster(space.load, machine, routing, space.dispatchers)
    search = Search()
    fitting: list[tuple[float, int, Grid, Cost, float]] = []
    missing: list[tuple[float, int, Grid]] = []
    roomy: set[bool] = set()
    for number, grid in enumerate(space.grids()):
        if grid.recompute:
            if grid.expert_overlap in roomy:
                search.spared += 1
                continue
        elif not grid.expert_overlap:
            # The first of the choices within the same degrees.
            roomy.clear()
        held = coster.memory(grid)
        if held > machine.usable_bytes:
            missing.append((held, number, grid))
            continue
        if not grid.recompute:
            roomy.add(grid.expert_overlap)
        cost = coster.cost(grid)
        fitting.append((cost.total, number, grid, cost, held))
    search.legal = len(fitting) + len(missing) + search.spared
    search.over = [held - machine.usable_bytes for held, *_ in missing]
    search.misses = [
        (held, coster.named(grid)) for held, _, grid in heapq.nsmallest(_NEAREST_MISSES, missing)
    ]
    fitting.sort(key=lambda entry: entry[:2])
    search.best = [
        (total, coster.named(grid), cost, held) for total, _, grid, cost, held in fitting[:_KEPT]
    ]
    if fitting:
        _count_losses(search, fitting[0][3], [cost for *_, cost, _ in fitting])
    return search


def _count_losses(search: Search, best: Cost, costs: Sequence[Cost]) -> None:
    """Count by which cost each layout loses most, against the best."""
    gaps: dict[str, list[float]] = {name: [] for name in _LOSSES}
    for cost in costs:
        if cost.total > best.total:
            excess = {name: getattr(cost, name) - getattr(best, name) for name in _LOSSES}
            gaps[max(excess, key=lambda name: excess[name])].append(cost.total / best.total - 1)
    for name, values in gaps.items():
        if values:
            search.lost[name] = len(values)
            search.gaps[name] = sorted(values)[len(values) // 2]
