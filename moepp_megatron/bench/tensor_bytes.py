"""What a rank's tensors take on a CPU, to the byte: torch's allocations and frees as they happen.

There is no allocator statistic for a CPU as `torch.cuda.max_memory_allocated` is for a card, and
the resident set of a process holds much else and what the C library keeps. torch's profiler is
told of each allocation; the running sum of its events is exact. Memory that libraries take for
themselves (oneDNN, gloo) is not in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch.profiler import ProfilerActivity, profile, record_function

_MARK = "moepp: measured"


@dataclass(frozen=True)
class TensorBytes:
    """Bytes of tensors.

    Attributes:
        before: When the measured work begins.
        peak: The most at one time within it.
    """

    before: int
    peak: int


def tensor_bytes(prepare: Callable[[], Callable[[], object]]) -> TensorBytes:
    """Bytes of all tensors that `prepare` makes, and the most while what it returns runs.

    Args:
        prepare: Makes everything that counts, and returns the work to measure.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work = prepare()
        with record_function(_MARK):
            work()
    results = profiled.profiler
    assert results is not None, "a profile that ended has results"
    events = results.kineto_results.events()
    mark = next(event for event in events if event.name() == _MARK)
    began, ended = mark.start_ns(), mark.start_ns() + mark.duration_ns()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    before = sum(size for when, size in changes if when < began)
    held = peak = before
    for when, size in changes:
        if began <= when <= ended:
            held += size
            peak = max(peak, held)
    return TensorBytes(before, peak)
