"""Time of the smaller steps with which a run begins (`training.batch_ramp`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil

from moepp_megatron.config import Config
from moepp_megatron.workbench.planning.grid import Grid
from moepp_megatron.workbench.planning.imbalance import AssumedRouting
from moepp_megatron.workbench.planning.machine import Machine
from moepp_megatron.workbench.planning.step import step_time
from moepp_megatron.workbench.planning.workload import Workload


@dataclass(frozen=True)
class RampStage:
    """Steps of one batch size that is not yet the whole one.

    Attributes:
        tokens: Tokens that they read.
        tokens_per_s: Speed of all GPUs.
    """

    tokens: int
    tokens_per_s: float


def ramp_stages(
    config: Config, load: Workload, grid: Grid, machine: Machine, routing: AssumedRouting
) -> Iterator[RampStage]:
    """The stages before the whole batch, in order; none without a ramp.

    A step keeps its batch to its end, so that a stage may read more than it was given
    (`training.schedule.BatchSizes`).

    Args:
        config: A checked configuration.
        load: Its model.
        grid: A layout that all batch sizes fit.
        machine: The cluster.
        routing: Unevenness of the routing.
    """
    ramp, read = config.training.batch_ramp or [], 0
    for (_, size), (until, _) in zip(ramp, ramp[1:], strict=False):
        per_step = size * load.seq
        steps = max(ceil((until - read) / per_step), 0)
        if steps:
            read += steps * per_step
            step = step_time(replace(load, batch=size), grid, machine, routing)
            yield RampStage(steps * per_step, per_step / step.total)
