"""The plan's formula beside steps played pass by pass, over layouts drawn at random.

One process, a minute or two, no GPU:

    python benchmarks/formula_against_simulation.py configs/models/moepp_7b_16_4.yaml --gpus 64 1024

Routing is even, nothing is slow or shared: what is left is how the formula counts the schedule. The
table has the simulated step's excess over the formula's; the last lines say how often, of two
layouts on as many cards, the formula prefers the one that is faster when played.
"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from statistics import median

from moepp_megatron.config import load_config
from moepp_megatron.config.hardware import load_hardware
from moepp_megatron.workbench.planning.coster import Coster
from moepp_megatron.workbench.planning.grid import Grid
from moepp_megatron.workbench.planning.imbalance import FORCED_BALANCE
from moepp_megatron.workbench.planning.machine import Machine, machine_of
from moepp_megatron.workbench.planning.search import Space
from moepp_megatron.workbench.planning.simulation.load import EVEN
from moepp_megatron.workbench.planning.simulation.step import Conditions, simulate
from moepp_megatron.workbench.planning.step import step_time

# Passes of a pipeline above which a layout is too slow to play; few have so many.
_MOST_PASSES = 40_000
_FEW, _MANY = "fewer than 4 micro-batches a stage, ", "at least 4 micro-batches a stage, "


def kind_of(grid: Grid) -> str:
    """The schedule of a layout."""
    schedule = "one stage" if grid.pp == 1 else "interleaved" if grid.vpp > 1 else "1F1B"
    return schedule + (", overlap" if grid.expert_overlap else "")


def draw(space: Space, machine: Machine, each: int, seed: int) -> list[Grid]:
    """Layouts of each schedule that fit, at random."""
    coster = Coster(space.load, machine, FORCED_BALANCE)
    kinds: dict[str, list[Grid]] = defaultdict(list)
    for grid in space.grids():
        passes = grid.micro_batches(space.load.batch) * grid.pp * grid.vpp
        if passes <= _MOST_PASSES and coster.memory(grid) <= machine.memory_bytes:
            kinds[kind_of(grid)].append(grid)
    chance = random.Random(seed)
    return [
        grid
        for _, grids in sorted(kinds.items())
        for grid in chance.sample(grids, min(each, len(grids)))
    ]


def excesses(
    space: Space, grids: list[Grid], machine: Machine
) -> Iterator[tuple[Grid, float, float]]:
    """Each layout with its step by the formula and as played, seconds."""
    for grid in grids:
        planned = step_time(space.load, grid, machine, FORCED_BALANCE).total
        played = simulate(space.load, grid, machine, Conditions(EVEN), 1, seed=0).totals[0]
        yield grid, planned, float(played)


def agreement(pairs: list[tuple[float, float]]) -> float:
    """Share of pairs of layouts that both put into the same order."""
    both = [(a[0] < b[0]) == (a[1] < b[1]) for a, b in combinations(pairs, 2)]
    return sum(both) / len(both) if both else float("nan")


def main() -> None:
    """Draw, play, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--gpus", type=int, nargs="+", default=[64, 1024])
    parser.add_argument("--batch", type=int, help="sequences of a step")
    parser.add_argument("--each", type=int, default=24, help="layouts of each schedule and size")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--list", action="store_true", help="print every layout")
    options = parser.parse_args()
    machine = machine_of(load_hardware("h100_sxm"))
    overrides = [f"training.global_batch_size={options.batch}"] if options.batch else []
    found: dict[str, list[float]] = defaultdict(list)
    orders = []
    for world in options.gpus:
        space = Space.of(load_config(options.config, overrides), world, machine.per_node)
        grids = draw(space, machine, options.each, options.seed)
        pairs = []
        for grid, planned, played in excesses(space, grids, machine):
            excess = played / planned - 1.0
            pairs.append((planned, played))
            kind = kind_of(grid)
            found[kind].append(excess)
            if grid.pp > 1:
                per_stage = grid.micro_batches(space.load.batch) / grid.pp
                overlap = "overlap" if grid.expert_overlap else "no overlap"
                found[(_FEW if per_stage < 4 else _MANY) + overlap].append(excess)
            if options.list:
                print(f"{world} {planned:.4f} {played:.4f} {excess:+.2%} {grid}")
        orders.append(f"{world} cards: {agreement(pairs):.1%} of pairs in the same order")
    print("| layouts | number | lowest | median | highest |\n|---|---|---|---|---|")
    for name, values in sorted(found.items()):
        low, middle, high = min(values), median(values), max(values)
        print(f"| {name} | {len(values)} | {low:+.1%} | {middle:+.1%} | {high:+.1%} |")
    print("\n".join(orders))


if __name__ == "__main__":
    main()
