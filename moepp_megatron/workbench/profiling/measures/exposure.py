"""Communication that nothing hides.

On a GPU a step computes where a kernel runs that is not NCCL's: communication outside of these is
exposed. On a CPU the training thread computes unless it waits for a collective, which the recorder
marks; in a trace of another program, it computes where one of its operations runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from moepp_megatron.workbench.profiling.measures.intervals import (
    Interval,
    intersect,
    length,
    subtract,
    union,
)
from moepp_megatron.workbench.profiling.trace import RankTrace, Span


@dataclass(frozen=True)
class StepTime:
    """Of one step on one rank; microseconds.

    Attributes:
        step_us: Its length.
        compute_us: Something computed.
        communication_us: Some collective ran or waited.
        exposed_us: One did and nothing computed.
        idle_us: Neither.
    """

    step_us: float
    compute_us: float
    communication_us: float
    exposed_us: float

    @property
    def idle_us(self) -> float:
        """Neither computed nor communicated."""
        return max(0.0, self.step_us - self.compute_us - self.exposed_us)

    @property
    def exposed_share(self) -> float:
        """Of the step."""
        return self.exposed_us / self.step_us if self.step_us > 0 else 0.0


def computing(trace: RankTrace, within: Interval) -> list[Interval]:
    """When this rank computes."""
    whole = [within]
    if trace.on_gpu:
        return intersect(union(span.interval for span in trace.kernels), whole)
    if trace.waits:
        return subtract(whole, union(span.interval for span in trace.waits))
    return intersect(union(span.interval for span in trace.host_work), whole)


def step_time(trace: RankTrace, step: Span) -> StepTime:
    """How a step of this rank divides up."""
    within = step.interval
    compute = computing(trace, within)
    busy = union((one.start_us, one.end_us) for one in trace.collectives)
    communication = intersect(busy, [within])
    exposed = subtract(communication, compute)
    return StepTime(
        step_us=within[1] - within[0],
        compute_us=length(compute),
        communication_us=length(communication),
        exposed_us=length(exposed),
    )
