"""`moepp plan --simulate`: its options, and the simulation of the best layout."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from moepp_megatron.workbench.planning.plan import Plan
    from moepp_megatron.workbench.planning.simulation.study import Study

Simulate = Annotated[
    bool,
    typer.Option(
        "--simulate",
        help="Simulate steps of the best layout, pass by pass, with uneven load, slow nodes and "
        "failures.",
    ),
]
Steps = Annotated[
    int,
    typer.Option(
        "--simulate-steps",
        min=1,
        max=100_000,
        help="Simulate this many steps.",
    ),
]
Assume = Annotated[
    list[str] | None,
    typer.Option(
        "--assume",
        help="Change what --simulate assumes about the cluster, such as mtbf_hours=30000; "
        "docs/planning.md lists the names.",
        metavar="NAME=VALUE",
    ),
]


def play_best(plan: Plan, routing: Path | None, steps: int, assume: list[str]) -> Study | None:
    """Simulate the plan's best layout; None if nothing fits.

    Raises:
        ConfigError: If an assumption is unknown or out of range.
    """
    from moepp_megatron.workbench.planning.recorded_routing import recorded_shares
    from moepp_megatron.workbench.planning.simulation.assumptions import parse_assumptions
    from moepp_megatron.workbench.planning.simulation.load import LoadSource
    from moepp_megatron.workbench.planning.simulation.study import study
    from moepp_megatron.workbench.planning.workload import Workload

    assumptions = parse_assumptions(assume)
    if plan.best is None:
        return None
    source = LoadSource(plan.routing.evenness)
    if routing is not None:
        source = LoadSource(recorded=recorded_shares(routing, plan.config.moe.num_ffn_experts))
    load, dispatcher = Workload.from_config(plan.config), plan.best.grid.dispatcher
    if dispatcher is not None:
        load = load.with_dispatcher(dispatcher)
    others = [(planned.step.total, planned.grid) for planned in plan.layouts[1:]]
    return study(load, plan.best.grid, plan.machine, source, assumptions, steps, others)
