"""What measuring router health costs the step in which it is done: steps in turn.

Run under torchrun, from the repository's root:

    torchrun --standalone --nproc-per-node 2 -m benchmarks.health_cost

A round is a step with its routing collected, as every logged step, one in which health is measured
too, and one with the collector switched off again. The cost of a run is the ratio's distance from 1
over `observe.health_interval`.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from pathlib import Path

import torch.distributed as dist

from benchmarks.quickstart_steps import (
    Kind,
    QuickstartSteps,
    Times,
    in_turns,
    quartiles,
    ratios,
    table,
)

INTERVAL = 10


def measure(rounds: int, folder: Path) -> dict[str, Times]:
    """Plain steps, measured ones, and plain ones again."""
    from moepp_megatron.training.collect import RoutingCollector
    from moepp_megatron.training.health import HealthCollector

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
    return in_turns(kinds, rounds)


def main() -> None:
    """Measure and print."""
    from moepp_megatron.runtime.distributed import start, stop
    from moepp_megatron.runtime.quiet import quiet
    from moepp_megatron.runtime.rank import RankEnvironment

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    quiet()
    logging.disable()
    start(RankEnvironment.read())
    with tempfile.TemporaryDirectory() as folder:
        times = measure(rounds, Path(folder))
    if dist.get_rank() == 0:
        print(table(times, "plain"))
        for clock in ("wall", "processor"):
            plain, measured = (getattr(times[name], clock) for name in ("plain", "measured"))
            cost = [(ratio - 1.0) / INTERVAL for ratio in ratios(measured, plain)]
            print(f"cost with health_interval {INTERVAL}, by {clock} time: {quartiles(cost, 1)}")
    stop()


if __name__ == "__main__":
    main()
