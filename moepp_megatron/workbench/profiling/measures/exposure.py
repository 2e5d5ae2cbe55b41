"""Measures communication that no computation hides.

On a GPU a step computes while a kernel runs that is not NCCL's: communication outside of these is
exposed. On a CPU the training thread computes unless it waits for a collective, which the recorder
marks; in a trace of another program, it computes while one of its operations runs.
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
class MeasuredStepTime:
    """The times of one step on one rank, in microseconds.

    Attributes:
        step_us: Its length.
        compute_us: Time in which something computed.
        communication_us: Time in which a collective ran or waited.
        exposed_us: Time in which a collective ran or waited and nothing computed.
    """

    step_us: float
    compute_us: float
    communication_us: float
    exposed_us: float

    @property
    def idle_us(self) -> float:
        """Time in which the rank neither computed nor communicated."""
        return max(0.0, self.step_us - self.compute_us - self.exposed_us)

    @property
    def exposed_share(self) -> float:
        """Exposed communication as a share of the step."""
        return self.exposed_us / self.step_us if self.step_us > 0 else 0.0


def computing(trace: RankTrace, within: Interval) -> list[Interval]:
    """The intervals in which this rank computes."""
    whole = [within]
    if trace.waits and not trace.on_gpu:
        return subtract(whole, union(span.interval for span in trace.waits))
    work = trace.kernels if trace.on_gpu else trace.host_work
    return intersect(union(span.interval for span in work), whole)


def step_time(trace: RankTrace, step: Span) -> MeasuredStepTime:
    """The times of a step of this rank."""
    within = step.interval
    compute = computing(trace, within)
    busy = union((one.start_us, one.end_us) for one in trace.collectives)
    communication = intersect(busy, [within])
    return MeasuredStepTime(
        step_us=within[1] - within[0],
        compute_us=length(compute),
        communication_us=length(communication),
        exposed_us=length(subtract(communication, compute)),
    )
