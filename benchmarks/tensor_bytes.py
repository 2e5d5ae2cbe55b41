"""What a rank's tensors take on a CPU, to the byte: torch's allocations and frees as they happen.

There is no allocator statistic for a CPU as `torch.cuda.max_memory_allocated` is for a card, and
the resident set of a process holds much else and what the C library keeps. torch's profiler is
told of each allocation and each free of the thread that it watches. What gloo's own threads free it
is not told of; such a block counts until its address is given out again. Memory that libraries
take for themselves (oneDNN, gloo) is not in it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

_MARK = "moepp: measured"


@dataclass(frozen=True)
class TensorBytes:
    """Bytes of tensors.

    Attributes:
        before: When the measured work begins.
        peak: The most at one time within it.
        unseen: Bytes that still count at its end and are in no tensor: freed by other threads.
    """

    before: int
    peak: int
    unseen: int


def tensor_bytes(prepare: Callable[[], Callable[[], object]]) -> TensorBytes:
    """Bytes of all tensors once `prepare` is done, and the most while what it returns runs.

    Args:
        prepare: Makes everything that counts, and returns the work to measure.
    """
    # It must have seen blocks begin to tell of their end: some end within the work.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work = prepare()
        # What only cycles of Python objects hold goes at a time that nobody can foresee.
        gc.collect()
        blocks = _live()
        before = sum(blocks.values())
        with record_function(_MARK):
            work()
    gc.collect()
    after = live_bytes()
    assert profiled.profiler is not None, "a profile that ended has results"
    results = profiled.profiler.kineto_results
    began = next(event.start_ns() for event in results.events() if event.name() == _MARK)
    held = peak = before
    for when, address, size in sorted(_changes(results.experimental_event_tree())):
        if when < began:
            continue
        held += max(size, 0) - blocks.pop(address, 0)
        if size > 0:
            blocks[address] = size
        peak = max(peak, held)
    return TensorBytes(before, peak, held - after)


def live_bytes() -> int:
    """Bytes of the storages of all tensors that Python knows, each once."""
    return sum(_live().values())


def _live() -> dict[int, int]:
    """Address and bytes of the storages of all tensors that Python knows."""
    sizes: dict[int, int] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sizes


def _changes(events: list[Any]) -> Iterator[tuple[int, int, int]]:
    """(time, address, bytes) of every allocation, bytes below 0 of every free."""
    waiting = list(events)
    while waiting:
        event = waiting.pop()
        waiting += event.children
        fields = event.extra_fields
        if isinstance(fields, torch._C._profiler._ExtraFields_Allocation):
            yield event.start_time_ns, fields.ptr, fields.alloc_size
