"""Simulates a layout under several conditions: the costs of load, slow nodes and network.

Every variant sees the same draws, so that a difference is the variant's and not chance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moepp_megatron.workbench.planning.grid import Dispatcher, Grid
from moepp_megatron.workbench.planning.imbalance import FORCED_BALANCE
from moepp_megatron.workbench.planning.machine import Machine
from moepp_megatron.workbench.planning.simulation.assumptions import Assumptions
from moepp_megatron.workbench.planning.simulation.faults import Goodput, play_run
from moepp_megatron.workbench.planning.simulation.load import EVEN, LoadSource
from moepp_megatron.workbench.planning.simulation.result import Simulated
from moepp_megatron.workbench.planning.simulation.step import Conditions, simulate
from moepp_megatron.workbench.planning.step import step_time
from moepp_megatron.workbench.planning.workload import Workload

# Steps of a layout that is only compared.
_FEW = 20

PLAIN, DEDUPLICATED, APART, OVERLAPPED = (
    "plain all-to-all",
    "deduplicated all-to-all",
    "exchange not overlapped",
    "exchange overlapped",
)


@dataclass(frozen=True)
class Study:
    """The results of a study.

    Attributes:
        planned_s: The formula's step at even load (`planning/step.py`).
        even: Step with nothing uneven, slow or shared.
        causes: Mean step with only one cause, by its name.
        played: Distribution of steps with all causes.
        choices: Mean step with all causes, by kind of exchange that the layout allows.
        others: The formula's and the mean simulated step of further layouts, with all causes.
        goodput: Goodput of long runs of such steps.
        tokens: Tokens of a step.
        assumptions: The assumptions.
    """

    planned_s: float
    even: Simulated
    causes: Mapping[str, float]
    played: Simulated
    choices: Mapping[str, float]
    others: Sequence[tuple[float, float]]
    goodput: Goodput
    tokens: int
    assumptions: Assumptions

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of the whole run in the long term, with failures and checkpoints."""
        return self.tokens / float(self.played.totals.mean()) * float(self.goodput.share.mean())

    def record(self) -> dict[str, Any]:
        """A dictionary for JSON."""
        played, goodput = self.played, self.goodput
        return {
            "planned_even_s": self.planned_s,
            "even_s": self.even.median,
            "step_s": {
                "mean": float(played.totals.mean()),
                "median": played.median,
                "p95": played.quantile(0.95),
                "p99": played.quantile(0.99),
                "max": float(played.totals.max()),
                "steps": len(played.totals),
            },
            "phases_s": {
                "work": played.work,
                "pipeline transfers": played.transfers,
                "pipeline bubble": played.bubble,
                "data parallel": played.data,
                "optimizer": played.optimizer,
            },
            "fullest_rank": {
                "mean": float(played.loads.mean()),
                "p99": float(np.quantile(played.loads, 0.99)),
            },
            "cause_s": dict(self.causes),
            "choice_s": dict(self.choices),
            "other_layouts_s": [
                {"planned": planned, "simulated": simulated} for planned, simulated in self.others
            ],
            "goodput": {
                "share": float(goodput.share.mean()),
                "p5": float(np.quantile(goodput.share, 0.05)),
                "expected": goodput.expected,
                "saving": goodput.saving,
                "lost": goodput.lost,
                "restarting": goodput.restarting,
                "failures": goodput.failures,
                "checkpoint_interval_s": goodput.interval_s,
                "days": self.assumptions.days,
                "runs": len(goodput.share),
                "tokens_per_s": self.tokens_per_s,
            },
            "columns": played.columns,
            "ranks_per_column": played.ranks_per_column,
            "passes": played.passes,
            "held_up": played.held_up,
            "seed": self.assumptions.seed,
        }


def study(
    load: Workload,
    grid: Grid,
    machine: Machine,
    source: LoadSource,
    assumptions: Assumptions,
    steps: int,
    others: Sequence[tuple[float, Grid]] = (),
) -> Study:
    """Simulate a layout.

    Args:
        load: The workload.
        grid: A legal layout.
        machine: The cluster.
        source: Source of the load.
        assumptions: Assumptions about the cluster.
        steps: Steps to simulate under each of the conditions.
        others: The formula's step and the grid of further layouts.
    """
    seed, faults, fabric = assumptions.seed, assumptions.faults, assumptions.fabric
    everything = Conditions(source, fabric, faults)

    def mean(conditions: Conditions) -> float:
        # Without draws every step is the same.
        count = steps if not conditions.source.is_even or conditions.fabric else 1
        return float(simulate(load, grid, machine, conditions, count, seed).totals.mean())

    def other(load: Workload, grid: Grid) -> float:
        return float(simulate(load, grid, machine, everything, steps, seed).totals.mean())

    played = simulate(load, grid, machine, everything, steps, seed)
    few = min(steps, _FEW)
    compared = [
        (planned, float(simulate(load, one, machine, everything, few, seed).totals.mean()))
        for planned, one in others
    ]
    rng = np.random.default_rng([seed, 1])
    mean_step = float(played.totals.mean())
    return Study(
        planned_s=step_time(load, grid, machine, FORCED_BALANCE).total,
        even=simulate(load, grid, machine, Conditions(EVEN), 1, seed),
        causes={
            "uneven routing": mean(Conditions(source)),
            "slow nodes": mean(Conditions(EVEN, None, faults)),
            "shared network": mean(Conditions(EVEN, fabric)),
        },
        played=played,
        choices=_choices(load, grid, other),
        others=compared,
        goodput=play_run(rng, faults, grid.world, mean_step, assumptions.days, assumptions.runs),
        tokens=load.batch * load.seq,
        assumptions=assumptions,
    )


def can_overlap(load: Workload, grid: Grid) -> bool:
    """Whether the combined schedule is possible, by format, recomputation and chunks."""
    recompute = {"layernorm", "moe", "full"}.isdisjoint(grid.recompute)
    chunks = grid.pp == 1 or grid.vpp > 1
    own_constants = not load.experts.shares_constants
    return load.numbers.dtype == "bf16" and recompute and chunks and own_constants


def _choices(
    load: Workload, grid: Grid, mean_step: Callable[[Workload, Grid], float]
) -> dict[str, float]:
    """The mean step with each kind of exchange that the layout allows; none without exchange."""

    def step(dispatcher: Dispatcher, overlap: bool) -> float:
        other = replace(load, experts=replace(load.experts, dispatcher=dispatcher))
        return mean_step(other, replace(grid, expert_overlap=overlap))

    if grid.ep == 1 or not any(load.is_moe):
        return {}
    choices = {PLAIN: step("alltoall", False), DEDUPLICATED: step("alltoall_dedup", False)}
    if can_overlap(load, grid):
        own = load.experts.dispatcher
        overlapping: Dispatcher = own if own in ("alltoall", "flex") else "alltoall"
        choices[APART] = step(overlapping, False)
        choices[OVERLAPPED] = step(overlapping, True)
    return choices
