"""Measures how long a rank waits in the experts' all-to-alls, and the bytes that it sends.

Counted around `torch.distributed.all_to_all_single` on the expert-parallel group, through which
both megatron-core's dispatcher and ours send:

    gloo   host time inside the call and inside the wait for it
    NCCL   time of the compute stream between an event before the call (or the wait) and one behind
           it, so that what hides behind computation does not count

Waiting for late ranks is included; it is least for the rank that comes last.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moepp_megatron.runtime.patches import replaced


class AllToAllClock:
    """Counts while `running`; `reset` between steps.

    Args:
        group: The expert-parallel group; all-to-alls on others are not counted.
        hidden_size: Elements of a row that is a hidden vector.
        on_gpu: Whether to take events on the stream rather than host time.

    Attributes:
        vector_bytes: Hidden vectors' bytes handed over for other ranks.
        other_bytes: Bytes of everything else for other ranks: gates, indices.
        calls: All-to-alls begun.
    """

    def __init__(self, group: dist.ProcessGroup, hidden_size: int, on_gpu: bool) -> None:
        self._ranks = dist.get_process_group_ranks(group)
        self._place = dist.get_rank(group)
        self._hidden_size, self._on_gpu = hidden_size, on_gpu
        self._original = dist.all_to_all_single
        self.reset()

    def reset(self) -> None:
        """Forget everything counted."""
        self.vector_bytes = self.other_bytes = self.calls = 0
        self._host_seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def seconds(self) -> float:
        """Seconds of waiting since `reset`; waits for the device."""
        if not self._on_gpu:
            return self._host_seconds
        torch.cuda.synchronize()
        return sum(before.elapsed_time(after) for before, after in self._events) / 1e3

    @contextmanager
    def running(self) -> Iterator[AllToAllClock]:
        """Count while the block runs."""
        self._original = dist.all_to_all_single
        with replaced(dist, all_to_all_single=self._counted):
            yield self

    def _counted(
        self,
        output: Tensor,
        input: Tensor,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        arguments = (output, input, output_split_sizes, input_split_sizes, group, async_op)
        if group is None or dist.get_process_group_ranks(group) != self._ranks:
            return self._original(*arguments)
        self._count_bytes(input, input_split_sizes)
        work = self._timed(lambda: self._original(*arguments))
        return _TimedWork(work, self._timed) if async_op and work is not None else work

    def _count_bytes(self, rows: Tensor, split: Any) -> None:
        self.calls += 1
        ranks = len(self._ranks)
        sent = len(rows) - (len(rows) // ranks if split is None else int(split[self._place]))
        num_bytes = sent * rows[0].numel() * rows.element_size() if len(rows) else 0
        if rows.shape[1:] == (self._hidden_size,):
            self.vector_bytes += num_bytes
        else:
            self.other_bytes += num_bytes

    def _timed(self, work: Callable[[], Any]) -> Any:
        if not self._on_gpu:
            began = time.perf_counter()
            result = work()
            self._host_seconds += time.perf_counter() - began
            return result
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        result = work()
        after.record()
        self._events.append((before, after))
        return result


class _TimedWork:
    """A collective in flight; waiting for it is timed."""

    def __init__(self, work: Any, timed: Callable[[Callable[[], Any]], Any]) -> None:
        self._work, self._timed = work, timed

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        return self._timed(lambda: self._work.wait(*args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)
