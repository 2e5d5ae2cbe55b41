"""What measuring router health costs the step in which it is done: steps in turn.

Run under torchrun, from the repository's root:

    torchrun --standalone --nproc-per-node 2 -m benchmarks.health_cost

A round is a step with its routing collected, as every logged step, one in which health is measured
too, and one with the collector switched off again. The cost of a run is the ratio's distance from 1
over `observe.health_interval`.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.quickstart_steps import (
    Kind,
    QuickstartSteps,
    in_turns,
    on_ranks,
    quartiles,
    ratios,
    table,
)

INTERVAL = 10


def measure(rounds: int, folder: Path) -> list[str]:
    """Plain steps, measured ones, and plain ones again."""
    from moepp_megatron.training.collect import RoutingCollector
    from moepp_megatron.training.router_health import HealthCollector

    steps = QuickstartSteps.build(folder)
    routing = RoutingCollector(steps.model, steps.config, steps.layout)
    health = HealthCollector(steps.config, steps.model, routing.layer_numbers, INTERVAL)

    def step(number: int) -> None:
        routing.reset()
        health.begin_step(number)
        steps.take(None, health.add_losses)
        routing.collect()
        assert bool(health.collect()) == (number % INTERVAL == 0), "measured when it should be"

    kinds = {
        "plain": Kind(lambda: step(1)),
        "measured": Kind(lambda: step(INTERVAL)),
        "again": Kind(lambda: step(1)),
    }
    times = in_turns(kinds, rounds)
    lines = [table(times, "plain")]
    for clock in ("wall", "processor"):
        plain, measured = (getattr(times[name], clock) for name in ("plain", "measured"))
        cost = [(ratio - 1.0) / INTERVAL for ratio in ratios(measured, plain)]
        lines.append(f"cost with health_interval {INTERVAL}, by {clock} time: {quartiles(cost, 1)}")
    return lines


if __name__ == "__main__":
    on_ranks(__doc__, default_rounds=30, measure=measure)
